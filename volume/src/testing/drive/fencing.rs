//! Preempt and Abort: from when on an incarnation changes nothing here.

use std::rc::Rc;
use std::time::Duration;

use weft_proto::id::IncarnationId;

use super::{Health, SimDrive, State};
use crate::seams::{FenceError, Timestamp};
use crate::testing::answer::{Answer, Giver, answer};

impl SimDrive {
    /// Preempt and Abort of `victim`: its further writes are refused, its commands in execution are aborted
    /// or finished, and only then does it complete. An already fenced incarnation is fenced.
    ///
    /// # Errors
    /// [`FenceError::Unreachable`] for a drive that gave no answer within 500 ms.
    pub async fn fence(self: Rc<Self>, victim: IncarnationId) -> Result<(), FenceError> {
        if self.health() != Health::Serving {
            let (giver, timeout) = answer();
            if let Some(world) = self.world.upgrade() {
                // Owned by nobody: the victim may be dead, and the caller may die too.
                let deadline = world.now().after(Duration::from_millis(500));
                world.at(deadline, None, |_| giver.give(()));
            }
            timeout.await;
            if self.health() != Health::Serving {
                return Err(FenceError::Unreachable);
            }
        }
        let fenced = self.start_fence(victim);
        fenced.await;
        Ok(())
    }

    fn start_fence(self: &Rc<Self>, victim: IncarnationId) -> Answer<()> {
        let (giver, fenced) = answer();
        let now = self.world.upgrade().map_or(Timestamp(0), |world| world.now());
        let (ids, latency) = {
            let mut state = self.state.borrow_mut();
            state.fenced.entry(victim).or_insert(now);
            state.fencing.push((victim, giver));
            let ids: Vec<u64> = state
                .in_flight
                .iter()
                .filter(|(_, command)| command.sender == victim)
                .map(|(id, _)| *id)
                .collect();
            (ids, self.latency(&mut state))
        };
        // Some are aborted now, the rest run to their end; both before the fence completes.
        for id in ids {
            let (aborted, landed) = {
                let mut state = self.state.borrow_mut();
                let overdue = state.in_flight.get(&id).is_some_and(|command| command.overdue);
                (overdue || state.rng.chance(1, 2), state.rng.chance(1, 3))
            };
            if aborted {
                self.abort(id, landed);
            }
        }
        let drive = Rc::downgrade(self);
        if let Some(world) = self.world.upgrade() {
            world.at(now.after(latency), None, move |_| {
                if let Some(drive) = drive.upgrade() {
                    drive.answer_fences();
                }
            });
        }
        fenced
    }

    /// When `incarnation` was fenced here; `None` while it is not.
    #[must_use]
    pub fn fenced_at(&self, incarnation: IncarnationId) -> Option<Timestamp> {
        self.state.borrow().fenced.get(&incarnation).copied()
    }

    /// Whether the fence of `incarnation` is complete: refused, and nothing of it left in execution.
    #[must_use]
    pub fn is_fenced(&self, incarnation: IncarnationId) -> bool {
        let state = self.state.borrow();
        state.fenced.contains_key(&incarnation)
            && state
                .in_flight
                .values()
                .all(|command| command.sender != incarnation)
    }

    /// Completes the fences that wait for nothing any more.
    pub(super) fn answer_fences(&self) {
        let done: Vec<Giver<()>> = {
            let mut state = self.state.borrow_mut();
            let State {
                fencing, in_flight, ..
            } = &mut *state;
            let (done, waiting) = std::mem::take(fencing)
                .into_iter()
                .partition(|(victim, _)| in_flight.values().all(|command| command.sender != *victim));
            *fencing = waiting;
            done.into_iter().map(|(_, giver): (_, Giver<()>)| giver).collect()
        };
        for giver in done {
            giver.give(());
        }
    }
}
