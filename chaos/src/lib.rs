//! Tests against the real thing, as programs: nothing depends on this crate.
//!
//! - `guest` (`src/bin/guest.rs`): the Linux kernel as a host of a volume, and its nvmet as a third-party drive, in
//!   QEMU guests ([`guest`]).
//!
//! The deterministic simulator and the nemesis for real processes will live here too.

pub mod guest;
