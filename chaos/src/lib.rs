//! Tests against the real thing, real or in simulated time, as programs: nothing depends on this crate.
//!
//! - `guest` (`src/bin/guest`): the Linux kernel as a host of a volume, and its nvmet as a third-party drive, in
//!   QEMU guests ([`guest`]).
//! - `chaos` (`src/bin/chaos.rs`): real agents under a seeded [`nemesis`], [`clients`] that record a [`history`], and a
//!   [`checker`] that says whether any correct volume could have answered so.
//! - `sim` (`src/bin/sim.rs`): a whole cluster in simulated time under every kind of fault, by seed ([`sim`], which says
//!   exactly what is real and what stands in).

pub mod checker;
pub mod clients;
pub mod guest;
pub mod history;
pub mod isolation;
pub mod mirror;
pub mod nemesis;
pub mod sim;
