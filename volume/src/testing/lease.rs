//! The lease of the simulated world: what periodic registration checks would have seen.
//!
//! An incarnation checks each drive every 300 ms (design section 5). No task does it here: when the last
//! check that succeeded was sent follows from when the drive fenced the incarnation, and from when the process stood still.

use std::cell::Cell;
use std::rc::{Rc, Weak};

use weft_proto::id::{DriveId, IncarnationId};

use super::drive::Health;
use super::world::World;
use crate::seams::{Lease, Timestamp};

/// Between two checks of one drive.
const CHECK_INTERVAL_NS: u64 = 300_000_000;

/// [`Lease`] of one incarnation.
pub struct SimLease {
    world: Weak<World>,
    incarnation: IncarnationId,
    expired_at: Cell<Option<Timestamp>>,
}

impl SimLease {
    /// A lease that lasts while the incarnation is not fenced.
    #[must_use]
    pub fn new(world: &Rc<World>, incarnation: IncarnationId) -> Rc<Self> {
        Rc::new(Self {
            world: Rc::downgrade(world),
            incarnation,
            expired_at: Cell::new(None),
        })
    }

    /// Lets every check from now on fail.
    pub fn expire(&self) {
        self.expired_at.set(self.world.upgrade().map(|world| world.now()));
    }

    /// Lets checks succeed again.
    pub fn renew(&self) {
        self.expired_at.set(None);
    }
}

impl Lease for SimLease {
    fn confirmed_at(&self, drive: DriveId) -> Option<Timestamp> {
        let world = self.world.upgrade()?;
        let device = world.find_drive(drive)?;
        if device.health() != Health::Serving {
            // The checks of a drive that answers nothing just stop; how long ago is not kept.
            return None;
        }
        let until = [self.expired_at.get(), device.fenced_at(self.incarnation)]
            .into_iter()
            .flatten()
            .fold(world.now(), Timestamp::min);
        // The last tick before, at which the process was running.
        let mut tick = until.0 / CHECK_INTERVAL_NS * CHECK_INTERVAL_NS;
        while tick > 0 && world.was_paused(self.incarnation, Timestamp(tick)) {
            tick -= CHECK_INTERVAL_NS;
        }
        (tick > 0).then_some(Timestamp(tick))
    }
}
