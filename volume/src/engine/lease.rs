//! The owner's lease: without it, neither is a read answered nor a write acknowledged.
//!
//! A lease holds for one second (less one percent, for clocks that drift) from the **sending** of the check that
//! completed m+1 of the n drives of one of the volume's unsealed bands. A successor has fenced n−m of the same
//! drives, so the two sets meet (design section 5). Unsealed, because the chunks of a sealed band may be rebuilt elsewhere and
//! the band may be freed, and then a successor fences other drives; so the last band is only sealed when another one is open.

use std::rc::Rc;

use weft_proto::deliberate::{Bug, planted};

use super::{Core, Life};
use crate::band::Phase;
use crate::error::VolumeError;
use crate::seams::Timestamp;

impl Core {
    /// Waits until an answer may be given.
    pub(crate) async fn leased(self: &Rc<Self>) -> Result<(), VolumeError> {
        loop {
            let changed = self.changed.changed();
            match self.life.get() {
                Life::Serving | Life::Quiescing | Life::Opening => {}
                Life::Fenced => return Err(VolumeError::Fenced),
                Life::Closed => return Err(VolumeError::Closed),
            }
            if self.is_leased() || planted(Bug::AnswerWithoutLease) {
                return Ok(());
            }
            self.changed_or_retry(changed).await;
        }
    }

    /// Whether an answer may be given now.
    pub(crate) fn is_leased(&self) -> bool {
        self.is_leased_at(self.seams.env.now())
    }

    /// The same for one who has just looked at the clock.
    pub(crate) fn is_leased_at(&self, now: Timestamp) -> bool {
        if now.0 < self.lease_until.get() {
            return true;
        }
        let until = self.compute_lease();
        self.lease_until.set(until.0);
        now < until
    }

    fn compute_lease(&self) -> Timestamp {
        let drift = self.settings.lease / 100;
        let mut length = self.settings.lease.saturating_sub(drift);
        if planted(Bug::LeaseTooLong) {
            length *= 4;
        }
        let mut best = Timestamp(0);
        for band in self.bands.borrow().values() {
            let of_this_epoch = band.band.borrow().epoch == self.epoch;
            if !of_this_epoch || band.phase.get() == Phase::Sealed {
                continue;
            }
            let mut confirmed: Vec<Timestamp> = band
                .band
                .borrow()
                .columns
                .iter()
                .filter_map(|chunk| self.seams.lease.confirmed_at(chunk.drive))
                .collect();
            confirmed.sort_unstable_by(|a, b| b.cmp(a));
            if let Some(sent) = confirmed.get(usize::from(band.geometry.m)) {
                best = best.max(sent.after(length));
            }
        }
        best
    }
}
