//! What the world lends to one incarnation: clock, timers, tasks and randomness.

use std::future::Future;
use std::pin::Pin;
use std::rc::Weak;
use std::task::{Context, Poll};

use futures_util::future::LocalBoxFuture;
use weft_proto::id::IncarnationId;

use super::World;
use crate::seams::{Env, Timestamp};
use crate::testing::answer::{Answer, answer};

/// [`Env`] of one incarnation.
pub struct SimEnv {
    pub(super) world: Weak<World>,
    pub(super) incarnation: IncarnationId,
}

impl Env for SimEnv {
    fn now(&self) -> Timestamp {
        self.world.upgrade().map_or(Timestamp(0), |world| {
            let core = world.core.borrow();
            let life = core.lives.get(&self.incarnation);
            life.map_or(core.now, |life| life.clock.local(core.now))
        })
    }

    fn sleep_until(&self, deadline: Timestamp) -> LocalBoxFuture<'static, ()> {
        let Some(world) = self.world.upgrade() else {
            return Box::pin(std::future::pending());
        };
        let (giver, wakeup) = answer();
        // A paused process notices late, never early: the task simply does not run.
        let deadline = {
            let core = world.core.borrow();
            let life = core.lives.get(&self.incarnation);
            life.map_or(deadline, |life| life.clock.world(deadline))
                .max(core.now)
        };
        let key = world.at(deadline, Some(self.incarnation), move |_| giver.give(()));
        Box::pin(Sleep {
            world: self.world.clone(),
            key,
            wakeup,
        })
    }

    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        if let Some(world) = self.world.upgrade() {
            world.spawn(self.incarnation, task);
        }
    }

    fn random_u64(&self) -> u64 {
        self.world.upgrade().map_or(0, |world| {
            let mut core = world.core.borrow_mut();
            core.lives
                .get_mut(&self.incarnation)
                .map_or(0, |life| life.rng.next_u64())
        })
    }
}

struct Sleep {
    world: Weak<World>,
    key: (Timestamp, u64),
    wakeup: Answer<()>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.wakeup).poll(cx)
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        // A timer nobody waits for must not keep the world from noticing a deadlock.
        if let Some(world) = self.world.upgrade() {
            world.cancel(self.key);
        }
    }
}
