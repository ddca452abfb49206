//! Volumes that an agent owns: taking over, serving, handing over, deleting. One task per epoch.
//!
//! A counterpart of `node/src/agent/ownership.rs`, in the same order of steps and with the same times.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};
use weft_metadata::state::map::{ClusterMap, NodeState, Owner, Phase, Volume};
use weft_metadata::state::{Command, Reply};
use weft_proto::band::EpochGrant;
use weft_proto::id::{BandId, DriveId, IncarnationId, NodeId, VolumeId};
use weft_volume::engine::{Engine, Opening};
use weft_volume::error::VolumeError;
use weft_volume::format::header::HeaderKey;
use weft_volume::seams::{ReservationKey, Seams};
use weft_volume::settings::Identity;

use super::agent::{Agent, Recovering};
use super::client::SimDirectory;
use super::steps::Step;

/// Between two attempts of a step that waits for others.
const RETRY: Duration = Duration::from_millis(50);
/// Between two attempts to open a volume that cannot be read.
const UNREADABLE_RETRY: Duration = Duration::from_secs(5);
/// A successor serves one lease and its drift after its fence is complete.
const LEASE_AND_DRIFT: Duration = Duration::from_millis(1010);
/// How long a deletion waits for the writes that its engine had sent.
const DRAIN: Duration = Duration::from_secs(3);
/// Between two looks at whether compaction moves anything.
const COMPACTION_LOOK: Duration = Duration::from_millis(50);

impl Agent {
    /// Starts a task for every epoch that the map gives to this incarnation and that has none.
    pub(super) fn follow_ownership(self: &Rc<Self>, map: &ClusterMap) {
        let own = self.incarnation.get();
        for (id, volume) in &map.volumes {
            let Some(owner) = volume
                .phase
                .owner()
                .filter(|owner| Some(owner.incarnation) == own)
            else {
                continue;
            };
            if self.tasks.borrow().get(id) == Some(&owner) {
                continue;
            }
            match volume.phase {
                Phase::Recovering { .. } => {
                    self.tasks.borrow_mut().insert(*id, owner);
                    self.process.spawn(Rc::clone(self).own(*id, owner));
                }
                // Nothing of it was sent.
                Phase::Deleting { .. } => {
                    self.tasks.borrow_mut().insert(*id, owner);
                    self.process
                        .spawn(Rc::clone(self).delete_unopened(*id, owner, None));
                }
                Phase::Serving { .. } | Phase::Unowned => {}
            }
        }
    }

    fn volume(&self, volume: VolumeId) -> Option<Volume> {
        self.map.borrow().volumes.get(&volume).cloned()
    }

    fn is_current(&self, volume: VolumeId, owner: Owner) -> bool {
        self.volume(volume)
            .is_some_and(|found| found.phase.owner() == Some(owner))
    }

    /// One epoch, from its grant to its end.
    async fn own(self: Rc<Self>, volume: VolumeId, owner: Owner) {
        let opening = RefCell::default();
        let taken = {
            let taken = std::pin::pin!(self.take_over(volume, owner, &opening));
            let deleted = std::pin::pin!(self.deleted(volume, owner));
            match select(taken, deleted).await {
                Either::Left((taken, _)) => Some(taken),
                Either::Right(_) => None,
            }
        };
        let engine = match taken {
            Some(Some(engine)) => engine,
            Some(None) => return,
            None => return self.delete_unopened(volume, owner, opening.take()).await,
        };
        let epoch = owner.epoch;
        let node = self.node;
        self.cluster
            .world()
            .note(|| format!("{node} serves {volume} under {epoch}"));
        self.engines.borrow_mut().insert(volume, (owner, engine.clone()));
        self.process
            .spawn(Rc::clone(&self).watch_compaction(volume, owner, engine.clone()));
        self.serve(volume, owner, &engine).await;
        self.engines.borrow_mut().remove(&volume);
    }

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

    /// Waits until the volume is to be deleted under this epoch.
    async fn deleted(&self, volume: VolumeId, owner: Owner) {
        let deleting = Phase::Deleting { owner: Some(owner) };
        let mut map = self.map.subscribe();
        loop {
            let found = map.borrow_and_update().volumes.get(&volume).cloned();
            if found.is_some_and(|found| found.phase == deleting) {
                return;
            }
            map.changed().await;
        }
    }

    /// Fences, recovers, and waits out the former owner's lease. `None` when the epoch is no longer ours. What is being opened stands
    /// in `opening`, for whoever drops this.
    async fn take_over(
        self: &Rc<Self>,
        volume: VolumeId,
        owner: Owner,
        opening: &RefCell<Option<Opening>>,
    ) -> Option<Engine> {
        let steps = &self.cluster.steps;
        loop {
            if !self.is_current(volume, owner) {
                return None;
            }
            let grant = match self.client.epoch_grant(volume).await {
                Some(grant) if grant.epoch == owner.epoch => grant,
                _ => {
                    self.process.sleep(RETRY).await;
                    continue;
                }
            };
            if grant.recover.is_some() {
                let under = steps.enter(Step::Fence);
                let enough = self.fence(&grant).await;
                drop(under);
                if !enough {
                    self.process.sleep(RETRY).await;
                    continue;
                }
            }
            let fenced_at = self.process.now();
            let volume_found = self.volume(volume)?;
            let under = grant.recover.map(|_| steps.enter(Step::Recover));
            let cluster = self.map.borrow().cluster.clone()?;
            let identity = Identity {
                cluster: cluster.id,
                key: HeaderKey(cluster.authentication_key),
                name: volume_found.name,
            };
            let attempt = Opening::new(self.seams(), self.cluster.settings(), identity, grant.clone());
            *opening.borrow_mut() = Some(attempt.clone());
            let recovering = Recovering::by(self);
            let opened = attempt.open().await;
            drop(recovering);
            drop(under);
            match opened {
                Ok(engine) => {
                    if grant.recover.is_some() {
                        let _under = steps.enter(Step::LeaseWait);
                        self.process.sleep_until(fenced_at.after(LEASE_AND_DRIFT)).await;
                    }
                    return Some(engine);
                }
                // Drives that come back make the same grant good again.
                Err(VolumeError::TooManyMissing { .. }) => self.process.sleep(RETRY).await,
                // Nothing was appended: what is there cannot be read.
                Err(
                    error @ (VolumeError::Undecodable { .. }
                    | VolumeError::RootUnreadable { .. }
                    | VolumeError::UnknownBand { .. }),
                ) => {
                    if self.cluster.is_tolerated() {
                        self.cluster.watch.unreadable(volume, owner.epoch, &error);
                    }
                    self.process.sleep(UNREADABLE_RETRY).await;
                }
                // Stripe numbers and sequences of an epoch are given once, so this epoch is spent.
                Err(error) => {
                    let node = self.node;
                    self.cluster
                        .world()
                        .note(|| format!("{node} did not open {volume}: {error}"));
                    self.end_if_current(volume, owner).await;
                    return None;
                }
            }
        }
    }

    /// An epoch that cannot go on although the cluster holds it to be ours: only a new incarnation frees the volume.
    async fn end_if_current(&self, volume: VolumeId, owner: Owner) {
        // The map may be about to say that the epoch is over.
        self.process.sleep(LEASE_AND_DRIFT).await;
        if self.is_current(volume, owner) {
            self.give_up("an epoch is spent");
        }
    }

    /// Serves until the epoch ends: handed over, deleted or fenced.
    async fn serve(self: &Rc<Self>, volume: VolumeId, owner: Owner, engine: &Engine) {
        let mut map = self.map.subscribe();
        loop {
            let (found, tight) = {
                let map = map.borrow_and_update();
                let found = map.volumes.get(&volume).cloned();
                let pool = found.as_ref().and_then(|found| map.pools.get(&found.pool));
                (found.clone(), pool.is_some_and(|pool| pool.tight))
            };
            engine.set_tight(tight);
            let mut moving = None;
            match found {
                Some(found) if found.phase.owner() == Some(owner) => match (found.phase, found.move_to) {
                    (Phase::Deleting { .. }, _) => return self.delete(volume, owner, engine).await,
                    (Phase::Serving { .. }, Some(to)) if to != self.node => moving = Some(to),
                    _ => {}
                },
                // The map may lag behind what this epoch has done itself.
                Some(found) if found.epoch < owner.epoch => {}
                _ => return engine.abort(),
            }
            if let Some(to) = moving
                && self.hand_over(volume, owner, engine, to).await
            {
                return;
            }
            let changed = std::pin::pin!(map.changed());
            let fenced = std::pin::pin!(engine.fenced());
            match select(changed, fenced).await {
                Either::Left(_) => {}
                Either::Right(_) => {
                    self.engines.borrow_mut().remove(&volume);
                    return self.end_if_current(volume, owner).await;
                }
            }
        }
    }

    /// Planned move: quiesce, and give the next epoch to `to`. Whether the epoch has ended.
    async fn hand_over(&self, volume: VolumeId, owner: Owner, engine: &Engine, to: NodeId) -> bool {
        let up = {
            let map = self.map.borrow();
            map.nodes.get(&to).is_some_and(|node| node.state == NodeState::Up)
        };
        if !up {
            let _ = self
                .client
                .propose(Command::RequestMove { volume, to: None })
                .await;
            return false;
        }
        let _under = self.cluster.steps.enter(Step::Move);
        let Ok(quiesced) = engine.quiesce().await else {
            engine.abort();
            self.engines.borrow_mut().remove(&volume);
            self.end_if_current(volume, owner).await;
            return true;
        };
        self.engines.borrow_mut().remove(&volume);
        let handover = |to| Command::Handover {
            volume,
            epoch: owner.epoch,
            last_stripe: quiesced.last,
            update: None,
            unsettled: quiesced.unsettled.clone(),
            to,
        };
        if self.client.propose(handover(to)).await.is_err() {
            // The engine has ended, so somebody has to open the volume again: this node does.
            let _ = self
                .client
                .propose(Command::RequestMove { volume, to: None })
                .await;
            let _: Result<Reply, _> = self.client.propose(handover(self.node)).await;
        }
        true
    }

    async fn delete(&self, volume: VolumeId, owner: Owner, engine: &Engine) {
        let _under = self.cluster.steps.enter(Step::Delete);
        let unsettled = engine.abort_and_drain(DRAIN).await;
        self.finish_delete(volume, owner, unsettled).await;
    }

    async fn delete_unopened(self: Rc<Self>, volume: VolumeId, owner: Owner, opening: Option<Opening>) {
        let _under = self.cluster.steps.enter(Step::Delete);
        let unsettled = match &opening {
            Some(opening) => opening.abort_and_drain(DRAIN).await,
            None => Vec::new(),
        };
        self.finish_delete(volume, owner, unsettled).await;
    }

    async fn finish_delete(&self, volume: VolumeId, owner: Owner, unsettled: Vec<BandId>) {
        let finish = Command::FinishDelete {
            volume,
            epoch: owner.epoch,
            unsettled: Some(unsettled),
        };
        let _ = self.client.propose(finish).await;
    }

    /// Fences every dead incarnation on the drives of the grant's bands and has that recorded. Whether it was enough:
    /// n − m drives of each band.
    async fn fence(&self, grant: &EpochGrant) -> bool {
        let map = self.map.borrow().clone();
        let columns = grant.bands.iter().flat_map(|band| &band.columns);
        let drives: BTreeSet<DriveId> = columns.map(|column| column.drive).collect();
        let due: Vec<(DriveId, IncarnationId, ReservationKey)> = drives
            .iter()
            .flat_map(|drive| {
                map.fences_due(*drive)
                    .map(|dead| (*drive, dead.id, ReservationKey(dead.key)))
            })
            .collect();
        let fences = due
            .iter()
            .map(|(drive, _, key)| self.fabric().fence(*drive, *key));
        let outcomes = join_all(fences).await;
        let mut fenced: BTreeMap<IncarnationId, BTreeSet<DriveId>> = BTreeMap::new();
        let mut missing: BTreeSet<DriveId> = BTreeSet::new();
        for ((drive, incarnation, _), outcome) in due.into_iter().zip(outcomes) {
            if outcome.is_ok() {
                self.cluster.watch.fenced(incarnation, drive);
                fenced.entry(incarnation).or_default().insert(drive);
            } else {
                missing.insert(drive);
            }
        }
        if !fenced.is_empty() {
            let records = fenced.into_iter();
            let commands = records
                .map(|(incarnation, drives)| Command::RecordFenced { incarnation, drives })
                .collect();
            if self.client.propose(Command::Batch(commands)).await.is_err() {
                return false;
            }
        }
        grant.bands.iter().all(|band| {
            let columns = band.columns.iter();
            let unfenced = columns.filter(|column| missing.contains(&column.drive)).count();
            unfenced <= usize::from(band.geometry.m)
        })
    }

    fn seams(&self) -> Seams {
        Seams {
            env: self.process.env(),
            drives: Rc::clone(self.fabric()) as Rc<_>,
            lease: Rc::clone(self.fabric()) as Rc<_>,
            directory: Rc::new(SimDirectory(Rc::clone(&self.client))),
        }
    }
}
