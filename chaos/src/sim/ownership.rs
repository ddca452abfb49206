//! What the simulator sees of the volumes that an agent owns: which engine serves hosts, and which steps are under way.

use std::any::Any;
use std::rc::{Rc, Weak};
use std::time::Duration;

use weft_incarnation::ownership::{self, Observer, StepGuard};
use weft_metadata::state::map::Owner;
use weft_proto::id::{DriveId, Epoch, IncarnationId, VolumeId};
use weft_volume::engine::Engine;
use weft_volume::error::VolumeError;

use super::agent::{Agent, Recovering};
use super::steps::Step;

/// Between two looks at whether compaction moves anything.
const COMPACTION_LOOK: Duration = Duration::from_millis(50);

/// Weak, because the agent holds what holds this.
pub(super) struct Watching(pub(super) Weak<Agent>);

impl Observer for Watching {
    fn serves(&self, volume: VolumeId, owner: Owner, engine: &Engine) {
        let Some(agent) = self.0.upgrade() else { return };
        let (node, epoch) = (agent.node, owner.epoch);
        agent
            .cluster
            .world()
            .note(|| format!("{node} serves {volume} under {epoch}"));
        agent.engines.borrow_mut().insert(volume, (owner, engine.clone()));
        agent
            .process
            .spawn(Rc::clone(&agent).watch_compaction(volume, owner, engine.clone()));
    }

    fn stopped(&self, volume: VolumeId) {
        if let Some(agent) = self.0.upgrade() {
            agent.engines.borrow_mut().remove(&volume);
        }
    }

    fn begins(&self, step: ownership::Step) -> StepGuard {
        let Some(agent) = self.0.upgrade() else {
            return Box::new(());
        };
        let (step, recovering): (_, Option<Box<dyn Any>>) = match step {
            ownership::Step::Fence => (Step::Fence, None),
            ownership::Step::Recover => (Step::Recover, Some(Box::new(Recovering::by(&agent)))),
            ownership::Step::LeaseWait => (Step::LeaseWait, None),
            ownership::Step::HandOver => (Step::Move, None),
            ownership::Step::Delete => (Step::Delete, None),
        };
        Box::new((agent.cluster.steps.enter(step), recovering))
    }

    fn fenced(&self, incarnation: IncarnationId, drive: DriveId) {
        if let Some(agent) = self.0.upgrade() {
            agent.cluster.watch.fenced(incarnation, drive);
        }
    }

    fn unreadable(&self, volume: VolumeId, epoch: Epoch, error: &VolumeError) {
        if let Some(agent) = self.0.upgrade()
            && agent.cluster.is_tolerated()
        {
            agent.cluster.watch.unreadable(volume, epoch, error);
        }
    }
}

impl Agent {
    async fn watch_compaction(self: Rc<Self>, volume: VolumeId, owner: Owner, engine: Engine) {
        let mut moved = 0;
        let mut under = None;
        while self
            .engines
            .borrow()
            .get(&volume)
            .is_some_and(|(found, _)| *found == owner)
        {
            let now = engine.stats().compacted_blocks;
            if now == moved {
                under = None;
            } else if under.is_none() {
                under = Some(self.cluster.steps.enter(Step::Compaction));
            }
            moved = now;
            self.process.sleep(COMPACTION_LOOK).await;
        }
    }
}
