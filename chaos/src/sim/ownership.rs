//! What the simulator sees of the volumes that an agent owns: which engine serves hosts, and which steps are under way.

use std::any::Any;
use std::rc::{Rc, Weak};
use std::time::Duration;

use weft_incarnation::ownership::{self, Observer, StepGuard};
use weft_incarnation::silence::Silence;
use weft_metadata::state::map::Owner;
use weft_proto::id::{BandId, DriveId, Epoch, IncarnationId, VolumeId};
use weft_volume::engine::Engine;
use weft_volume::error::VolumeError;

use super::agent::{Agent, Recovering, Serving};
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
        let serving = Serving {
            owner,
            engine: engine.clone(),
            silence: Rc::default(),
        };
        agent.engines.borrow_mut().insert(volume, serving);
        agent
            .process
            .spawn(Rc::clone(&agent).watch_compaction(volume, owner, engine.clone()));
        agent
            .process
            .spawn(Rc::clone(&agent).rebuild_now_and_then(volume, owner, engine.clone()));
    }

    fn stopped(&self, volume: VolumeId) {
        if let Some(agent) = self.0.upgrade() {
            agent.engines.borrow_mut().remove(&volume);
        }
    }

    fn silenced(&self, volume: VolumeId) {
        if let Some((agent, silence)) = self.silence(volume) {
            let world = agent.cluster.world();
            world.note(|| format!("{} is silenced as the owner of {volume}", agent.node));
            silence.begin();
        }
    }

    fn speaks_again(&self, volume: VolumeId) {
        if let Some((agent, silence)) = self.silence(volume) {
            let world = agent.cluster.world();
            world.note(|| format!("{} speaks again for {volume}", agent.node));
            silence.end();
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

impl Watching {
    fn silence(&self, volume: VolumeId) -> Option<(Rc<Agent>, Rc<Silence>)> {
        let agent = self.0.upgrade()?;
        let silence = Rc::clone(&agent.engines.borrow().get(&volume)?.silence);
        Some((agent, silence))
    }
}

impl Agent {
    /// In place of a policy: some column of a sealed band is rebuilt, one on a drive that is out of service if there is any.
    async fn rebuild_now_and_then(self: Rc<Self>, volume: VolumeId, owner: Owner, engine: Engine) {
        let most = self.cluster.plan.rebuild_ms;
        loop {
            let pause = most / 2 + self.process.random() % most;
            self.process.sleep(Duration::from_millis(pause)).await;
            if !self.serves_under(volume, owner) || !self.cluster.is_working() {
                return;
            }
            let columns: Vec<(BandId, u8, DriveId)> = engine
                .sealed_bands()
                .iter()
                .flat_map(|band| {
                    let columns = (0u8..).zip(&band.columns);
                    columns
                        .map(|(column, chunk)| (band.id, column, chunk.drive))
                        .collect::<Vec<_>>()
                })
                .collect();
            let map = self.map.borrow().clone();
            let in_service = |drive: &DriveId| {
                let found = map.drives.get(drive);
                found.is_some_and(|drive| map.in_service(drive))
            };
            let lost = columns.iter().filter(|(_, _, drive)| !in_service(drive));
            let lost: Vec<_> = lost.copied().collect();
            let chosen = if lost.is_empty() { columns } else { lost };
            if chosen.is_empty() {
                continue;
            }
            let (band, column, _) = chosen[(self.process.random() % chosen.len() as u64) as usize];
            let tolerated = self.cluster.is_tolerated();
            let result = {
                let _under = self.cluster.steps.enter(Step::Rebuild);
                engine.rebuild(band, column).await
            };
            let world = self.cluster.world();
            world.note(|| format!("{volume}: column {column} of {band} rebuilt: {result:?}"));
            if let Err(error @ VolumeError::Undecodable { .. }) = &result
                && tolerated
                && self.cluster.is_tolerated()
            {
                self.cluster.watch.unreadable(volume, owner.epoch, error);
            }
        }
    }

    /// Whether the engine of this epoch still serves hosts.
    fn serves_under(&self, volume: VolumeId, owner: Owner) -> bool {
        let engines = self.engines.borrow();
        engines.get(&volume).is_some_and(|serving| serving.owner == owner)
    }

    async fn watch_compaction(self: Rc<Self>, volume: VolumeId, owner: Owner, engine: Engine) {
        let mut moved = 0;
        let mut under = None;
        while self.serves_under(volume, owner) {
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
