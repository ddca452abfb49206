//! Tests against the real thing, real or in simulated time, as programs: nothing depends on this crate.
//!
//! - `guest` (`src/bin/guest`): the Linux kernel as a host of a volume, and its nvmet as a third-party drive, in
//!   QEMU guests ([`guest`]).
//! - `chaos` (`src/bin/chaos.rs`): real agents under a seeded [`nemesis`], [`clients`] that record a [`history`], and a
//!   [`checker`] that says whether any correct volume could have answered so.
//! - `sim` (`src/bin/sim.rs`): a whole cluster in simulated time under every kind of fault, by seed ([`sim`], which says
//!   exactly what is real and what stands in).
//!
//! # Clocks
//!
//! Every process of the simulator has one clock of its own, which goes wrong by up to half a percent and stands still for nobody, a stopped
//! process included. It is the counterpart of `CLOCK_MONOTONIC`, which is what `std::time::Instant` and tokio's timers read on Linux:
//! leases, time-outs, keep-alives and the leader's decisions know no other one. The kernel never sets it: not when an operator or an
//! NTP daemon sets the time of day, not at a leap second.
//!
//! The time of day does jump, and there is no such fault here, because nothing could tell it from none: no crate of Weft reads
//! `CLOCK_REALTIME`. That is a lint, not a habit: `clippy.toml` forbids `SystemTime::now` and `elapsed` in the whole workspace. What
//! dates a line of the log is a library's, and is only printed.
//!
//! What does break a lease that is counted by `CLOCK_MONOTONIC`, and is not simulated because no promise is made for it:
//!
//! - a machine that is suspended, or a guest that is: the clock does not count that time, so a lease outlasts what others waited for;
//! - a guest that is restored or moved: its monitor may set the clock forward, so a successor waits for too short a time;
//! - an NTP daemon that slews by more than the 1 % which leases allow. ntpd and systemd-timesyncd keep to half a part in a thousand; chrony
//!   may go to one part in twelve unless `maxslewrate` says less (by their manuals, not tried here).

pub mod checker;
#[cfg(feature = "agents")]
pub mod clients;
pub mod guest;
pub mod history;
pub mod isolation;
#[cfg(feature = "agents")]
pub mod mirror;
#[cfg(feature = "agents")]
pub mod nemesis;
pub mod sim;
