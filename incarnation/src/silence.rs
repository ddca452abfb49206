//! An engine that nobody should wait for: it has been without its lease for a while, so it answers nobody, and may never again.
//!
//! Whoever waits for it then is told that the outcome is unknown. That is no less than a host finds out that gives the path up by
//! itself, and it comes as safely: what is still under way takes effect before a successor serves, or never; and if this
//! engine goes on, in the order in which it arrived, so before whatever the host repeats or sends after that.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::sync::Notify;
use weft_block::BlockError;
use weft_proto::id::{Epoch, VolumeId};
use weft_volume::seams::Timestamp;

/// How long an engine may be without its lease before hosts are told to look elsewhere. A guess: a check that was late should not do
/// it, and a successor needs about as long.
const PATIENCE: Duration = Duration::from_millis(1500);

/// What a look at the leases brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The engine of this epoch has been without its lease for too long.
    Silenced(VolumeId, Epoch),
    /// It was silenced, and has its lease again.
    SpeaksAgain(VolumeId, Epoch),
}

/// Since when engines have been without their lease.
#[derive(Default)]
pub(crate) struct Patience(BTreeMap<(VolumeId, Epoch), Without>);

struct Without {
    since: Timestamp,
    silenced: bool,
}

impl Patience {
    /// Takes in which engines there are and whether they have their lease. Who is not there any more is forgotten.
    pub(crate) fn look(
        &mut self,
        now: Timestamp,
        leases: impl Iterator<Item = ((VolumeId, Epoch), bool)>,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut former = std::mem::take(&mut self.0);
        for (engine @ (volume, epoch), is_leased) in leases {
            let known = former.remove(&engine);
            if is_leased {
                if known.is_some_and(|known| known.silenced) {
                    changes.push(Change::SpeaksAgain(volume, epoch));
                }
                continue;
            }
            let mut known = known.unwrap_or(Without {
                since: now,
                silenced: false,
            });
            if !known.silenced && now >= known.since.after(PATIENCE) {
                known.silenced = true;
                changes.push(Change::Silenced(volume, epoch));
            }
            self.0.insert(engine, known);
        }
        changes
    }
}

/// See the module.
#[derive(Default)]
pub struct Silence {
    holds: Cell<bool>,
    begun: Notify,
}

impl Silence {
    /// Nobody should wait from now on.
    pub fn begin(&self) {
        self.holds.set(true);
        self.begun.notify_waiters();
    }

    /// The engine may be waited for.
    pub fn end(&self) {
        self.holds.set(false);
    }

    /// Whether nobody should wait.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.holds.get()
    }

    /// What the engine answers.
    ///
    /// # Errors
    /// Its own; [`BlockError::Unknown`] if it was silenced first.
    pub async fn or_answer<T>(
        &self,
        answer: impl Future<Output = Result<T, BlockError>>,
    ) -> Result<T, BlockError> {
        let silenced = async {
            if !self.holds.get() {
                self.begun.notified().await;
            }
        };
        match select(pin!(answer), pin!(silenced)).await {
            Either::Left((answer, _)) => answer,
            Either::Right(_) => Err(BlockError::Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use futures_util::future::{pending, ready};

    use super::*;

    #[test]
    fn an_engine_is_silenced_once_and_speaks_again_with_its_lease() {
        let mut patience = Patience::default();
        let at = |ms: u64| Timestamp(ms * 1_000_000);
        let (first, second) = ((VolumeId(1), Epoch(4)), (VolumeId(2), Epoch(9)));
        let mut look =
            |ms, leases: &[((VolumeId, Epoch), bool)]| patience.look(at(ms), leases.iter().copied());
        assert_eq!(look(1000, &[(first, true), (second, false)]), []);
        assert_eq!(look(2000, &[(first, false), (second, false)]), []);
        assert_eq!(
            look(2500, &[(first, false), (second, false)]),
            [Change::Silenced(second.0, second.1)]
        );
        assert_eq!(
            look(3400, &[(first, true), (second, false)]),
            [],
            "late, and told"
        );
        assert_eq!(
            look(3500, &[(first, false), (second, false)]),
            [],
            "anew from here"
        );
        assert_eq!(
            look(4000, &[(first, false), (second, true)]),
            [Change::SpeaksAgain(second.0, second.1)]
        );
        // The next epoch of the volume is another engine.
        let next = (first.0, Epoch(5));
        assert_eq!(look(5000, &[(next, false)]), []);
        assert_eq!(look(5500, &[(next, true)]), []);
    }

    #[test]
    fn who_waits_is_told_that_the_outcome_is_unknown() {
        let silence = Silence::default();
        let mut waiting = Box::pin(silence.or_answer(pending::<Result<(), _>>()));
        let mut not_yet_polled = Box::pin(silence.or_answer(pending::<Result<(), _>>()));
        assert_eq!(waiting.as_mut().now_or_never(), None);
        silence.begin();
        assert_eq!(waiting.as_mut().now_or_never(), Some(Err(BlockError::Unknown)));
        assert_eq!(
            not_yet_polled.as_mut().now_or_never(),
            Some(Err(BlockError::Unknown))
        );
        assert_eq!(
            silence.or_answer(ready(Ok(1))).now_or_never(),
            Some(Ok(1)),
            "an answer is an answer"
        );
        silence.end();
        assert_eq!(silence.or_answer(pending::<Result<(), _>>()).now_or_never(), None);
    }
}
