//! How old the command is that a device is given.
//!
//! What was read of a host in time ([`crate::silence`]) may be begun late all the same: the process may be stopped at any instruction
//! between the two, and a command may wait for others in between. A device that only hands commands on, to where the host may have sent
//! them again itself, has to know since when.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

/// When the last of the command arrived that the device of an association is being given. True during the call that begins an operation.
#[derive(Clone, Debug)]
pub struct Arrival(Rc<Cell<Instant>>);

impl Arrival {
    /// Of no command yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self(Rc::new(Cell::new(now)))
    }

    /// When it was.
    #[must_use]
    pub fn get(&self) -> Instant {
        self.0.get()
    }

    /// An operation of a command that arrived at `arrived` is begun.
    pub fn set(&self, arrived: Instant) {
        self.0.set(arrived);
    }
}
