//! Reservations of a namespace: the table, its file, and the namespace that enforces it.
//!
//! - [`table`]: the rules, as a pure state machine;
//! - [`file`]: what survives power loss;
//! - [`namespace`]: a device that checks every command against the table in the same instant in which it submits
//!   it, and knows what is in execution for whom, so that Preempt and Abort can wait for it.
//!
//! What this does not do: it never learns what a stripe or a volume is, and it decides nothing about who should
//! be fenced. `docs/design/reservations-and-fencing-at-the-target.md` has the reasons.
//!
//! NVM Express Base Specification 2.0, "Reservations".

pub mod file;
pub mod namespace;
pub mod table;

pub use namespace::{ReservationError, ReservedNamespace};
