//! One life of a program in the simulated world: its tasks, its clock, its randomness.

use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::{Either, select};
use weft_proto::id::{IncarnationId, NodeId};
use weft_volume::seams::{Env, Timestamp};
use weft_volume::testing::World;
use weft_volume::testing::world::SimEnv;

/// A process. It ends with [`World::kill`], and a new one takes its place. The world numbers processes by itself: the number is
/// not that of the incarnation which metadata assigns to an agent.
#[derive(Clone)]
pub(super) struct Process {
    world: Weak<World>,
    pub(super) id: IncarnationId,
    /// Where it runs.
    pub(super) node: NodeId,
    env: Rc<SimEnv>,
}

impl Process {
    pub(super) fn start(world: &Rc<World>, node: NodeId) -> Self {
        let id = world.incarnation();
        Self {
            world: Rc::downgrade(world),
            id,
            node,
            env: world.env(id),
        }
    }

    pub(super) fn env(&self) -> Rc<dyn Env> {
        Rc::<SimEnv>::clone(&self.env)
    }

    /// By its own clock, which may drift.
    pub(super) fn now(&self) -> Timestamp {
        self.env.now()
    }

    pub(super) async fn sleep(&self, duration: Duration) {
        self.sleep_until(self.now().after(duration)).await;
    }

    pub(super) async fn sleep_until(&self, deadline: Timestamp) {
        self.env.sleep_until(deadline).await;
    }

    /// What `future` answers, unless `limit` passes first.
    pub(super) async fn within<T>(&self, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
        let timeout = self.env.sleep_until(self.now().after(limit));
        match select(std::pin::pin!(future), timeout).await {
            Either::Left((answer, _)) => Some(answer),
            Either::Right(_) => None,
        }
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.env.spawn(Box::pin(task));
    }

    pub(super) fn random(&self) -> u64 {
        self.env.random_u64()
    }

    pub(super) fn is_dead(&self) -> bool {
        self.world.upgrade().is_none_or(|world| world.is_dead(self.id))
    }
}
