//! Volumes this incarnation owns: taking over, serving, handing over, deleting. One task per epoch.
//!
//! ```text
//!  Recovering{us} ─ grant ─ fence the dead on ≥ n−m drives of each band ─ record ─┬─ lease + drift ─┬─ serve
//!                                                                                 └─ Engine::open ──┘
//!  Serving{us}, move_to ─ quiesce ─ Handover        Deleting{us}, from anywhere ─ abort ─ drain ─ FinishDelete
//! ```
//!
//! Design section 5. The map says what should be; this makes it so and tells Raft.

use std::any::Any;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};
use weft_metadata::state::map::{Cluster, ClusterMap, NodeState, Owner, Phase, Volume};
use weft_metadata::state::{Command, Refusal, Reply};
use weft_proto::band::{ChunkAddress, EpochGrant};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{DriveId, Epoch, IncarnationId, NodeId, VolumeId};
use weft_volume::engine::{Engine, Opening};
use weft_volume::error::VolumeError;
use weft_volume::format::header::HeaderKey;
use weft_volume::seams::{Env, ReservationKey, Seams};
use weft_volume::settings::{Identity, Settings};

use crate::bounds::Bounds;
use crate::directory::RaftDirectory;
use crate::fabric::Fabric;
use crate::metadata::{Metadata, RETRY, insist};
use crate::published::Published;
use crate::silence::{Change, Patience};
use crate::time::sleep;

/// Between two attempts to open a volume that cannot be read: an operator has to act.
const UNREADABLE_RETRY: Duration = Duration::from_secs(5);

/// Between two looks at what all volumes take together.
const BOUNDS_LOOK: Duration = Duration::from_millis(200);

/// Between two looks at who has a lease.
const LEASE_LOOK: Duration = Duration::from_millis(500);

/// A successor serves one lease and its drift after its fence is complete.
const LEASE_AND_DRIFT: Duration = Duration::from_millis(1010);

/// How long a deletion waits for the writes that its engine had sent. An association is given up after less, so what is left
/// then is in a drive that hangs.
const DRAIN: Duration = Duration::from_secs(3);

/// Who is told what becomes of volumes: the agent presents them to hosts, a test watches.
pub trait Observer {
    /// An engine serves the volume from now on.
    fn serves(&self, volume: VolumeId, owner: Owner, engine: &Engine);

    /// No engine of this incarnation serves the volume any more.
    fn stopped(&self, volume: VolumeId);

    /// The engine has had no lease for a while, so nobody gets an answer here: this incarnation is cut off from its drives, and somebody
    /// else may serve. Hosts should not wait for the volume on this path.
    fn silenced(&self, volume: VolumeId) {
        let _ = volume;
    }

    /// An engine that was silenced has its lease again.
    fn speaks_again(&self, volume: VolumeId) {
        let _ = volume;
    }

    /// A step begins. It ends when the answer is dropped.
    fn begins(&self, step: Step) -> StepGuard {
        let _ = step;
        Box::new(())
    }

    /// Nothing of this incarnation is left on a drive, or can come there.
    fn fenced(&self, incarnation: IncarnationId, drive: DriveId) {
        let _ = (incarnation, drive);
    }

    /// What is on the drives does not make a volume.
    fn unreadable(&self, volume: VolumeId, epoch: Epoch, error: &VolumeError) {
        let _ = (volume, epoch, error);
    }
}

/// Ends a step when it is dropped.
pub type StepGuard = Box<dyn Any>;

/// What takes time in the life of an epoch, so that a fault can meet it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Dead incarnations are preempted on the drives of the epoch's bands.
    Fence,
    /// The former epoch is scanned and replayed.
    Recover,
    /// The former owner's lease runs out.
    LeaseWait,
    /// The volume is handed over.
    HandOver,
    /// The volume is deleted.
    Delete,
}

/// What an [`Ownership`] is made of.
pub struct Parts {
    /// The cluster's identity and keys.
    pub cluster: Cluster,
    /// Where this incarnation runs.
    pub node: NodeId,
    /// The metadata service.
    pub metadata: Rc<dyn Metadata>,
    /// Clock, timers, tasks.
    pub env: Rc<dyn Env>,
    /// The drives.
    pub fabric: Rc<Fabric>,
    /// Who is told.
    pub observer: Rc<dyn Observer>,
    /// The cluster map, as it becomes known here.
    pub map: Rc<Published<Arc<ClusterMap>>>,
    /// Of every engine.
    pub settings: Settings,
    /// Of all engines together.
    pub bounds: Bounds,
}

/// The volumes of one incarnation.
pub struct Ownership {
    parts: Parts,
    /// Epochs that have a task.
    tasks: RefCell<BTreeMap<VolumeId, Owner>>,
    engines: RefCell<BTreeMap<VolumeId, Engine>>,
}

impl Ownership {
    /// Owns nothing yet.
    #[must_use]
    pub fn new(parts: Parts) -> Rc<Self> {
        Rc::new(Self {
            parts,
            tasks: RefCell::default(),
            engines: RefCell::default(),
        })
    }

    /// Starts a task for every epoch that the map gives to this incarnation and that has none.
    pub fn follow(self: &Rc<Self>, map: &ClusterMap) {
        let own = self.parts.fabric.identity().incarnation;
        for (id, volume) in &map.volumes {
            let Some(owner) = volume.phase.owner().filter(|owner| owner.incarnation == own) else {
                continue;
            };
            if self.tasks.borrow().get(id) == Some(&owner) {
                continue;
            }
            match volume.phase {
                Phase::Recovering { .. } => {
                    self.tasks.borrow_mut().insert(*id, owner);
                    self.spawn(self.clone().own(*id, owner));
                }
                Phase::Deleting { .. } => {
                    self.tasks.borrow_mut().insert(*id, owner);
                    self.spawn(self.clone().delete_unopened(*id, owner, None));
                }
                Phase::Serving { .. } | Phase::Unowned => {}
            }
        }
    }

    /// Keeps what all volumes of this node take together within bounds, for as long as the incarnation lives.
    pub async fn keep_within_bounds(self: Rc<Self>) {
        let Parts { bounds, settings, .. } = &self.parts;
        let mut cache_limit = settings.map.cache_bytes;
        loop {
            self.sleep(BOUNDS_LOOK).await;
            let longest = {
                let engines = self.engines.borrow();
                cache_limit = bounds.cache_limit(engines.values(), cache_limit, settings.map.cache_bytes);
                for engine in engines.values() {
                    engine.set_cache_limit(cache_limit);
                }
                bounds.longest_log(engines.values()).cloned()
            };
            if let Some(engine) = longest
                && let Err(error) = engine.checkpoint().await
            {
                tracing::debug!(%error, "no checkpoint");
            }
        }
    }

    /// Tells of engines that have been without a lease for a while, and of those that have it again, for as long as the incarnation lives.
    pub async fn watch_leases(self: Rc<Self>) {
        let Parts { env, observer, .. } = &self.parts;
        let mut patience = Patience::default();
        loop {
            self.sleep(LEASE_LOOK).await;
            let changes = {
                let engines = self.engines.borrow();
                let leases = engines
                    .iter()
                    .map(|(volume, engine)| ((*volume, engine.epoch()), engine.is_leased()));
                patience.look(env.now(), leases)
            };
            for change in changes {
                match change {
                    Change::Silenced(volume, epoch) => {
                        tracing::warn!(%volume, %epoch, "no lease for a while: hosts are sent to other paths");
                        observer.silenced(volume);
                    }
                    Change::SpeaksAgain(volume, epoch) => {
                        tracing::info!(%volume, %epoch, "the lease is back");
                        observer.speaks_again(volume);
                    }
                }
            }
        }
    }

    /// What is shown to an operator of the volumes.
    #[must_use]
    pub fn inspect(&self) -> serde_json::Value {
        let engines = self.engines.borrow();
        let volumes = engines.iter().map(|(volume, engine)| {
            (
                volume.to_string(),
                serde_json::Value::String(format!("{:?}", engine.stats())),
            )
        });
        serde_json::Value::Object(volumes.collect())
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.parts.env.spawn(Box::pin(task));
    }

    async fn sleep(&self, duration: Duration) {
        sleep(&*self.parts.env, duration).await;
    }

    /// One epoch, from its grant to its end.
    async fn own(self: Rc<Self>, volume: VolumeId, owner: Owner) {
        let Parts { env, observer, .. } = &self.parts;
        let began = env.now();
        let opening = RefCell::default();
        let taken = {
            let taken = pin!(self.take_over(volume, owner, &opening));
            let deleted = pin!(self.deleted(volume, owner));
            match select(taken, deleted).await {
                Either::Left((taken, _)) => Some(taken),
                Either::Right(_) => None,
            }
        };
        let engine = match taken {
            Some(Some(engine)) => engine,
            Some(None) => return,
            None => return self.clone().delete_unopened(volume, owner, opening.take()).await,
        };
        let took_ms = env.now().0.saturating_sub(began.0) / 1_000_000;
        tracing::info!(%volume, epoch = %owner.epoch, took_ms, "serving");
        self.engines.borrow_mut().insert(volume, engine.clone());
        observer.serves(volume, owner, &engine);
        self.serve(volume, owner, &engine).await;
        self.stopped(volume, owner);
    }

    /// The epoch's engine serves no more. A later epoch may have come back to this incarnation before the task of this one
    /// has heard the answer to its hand-over: its engine is left alone.
    fn stopped(&self, volume: VolumeId, owner: Owner) {
        let mut engines = self.engines.borrow_mut();
        let is_this = |engine: &Engine| engine.epoch() == owner.epoch;
        if engines.get(&volume).is_some_and(is_this) {
            engines.remove(&volume);
            drop(engines);
            self.parts.observer.stopped(volume);
        }
    }

    /// Waits until the volume is to be deleted under this epoch.
    async fn deleted(&self, volume: VolumeId, owner: Owner) {
        let deleting = Phase::Deleting { owner: Some(owner) };
        let mut map = self.parts.map.subscribe();
        loop {
            let found = map
                .borrow_and_update()
                .volumes
                .get(&volume)
                .map(|found| found.phase);
            if found == Some(deleting) {
                return;
            }
            map.changed().await;
        }
    }

    /// Fences, recovers, and waits out the former owner's lease. `None` when the epoch is no longer ours. What is being opened stands
    /// in `opening`, for whoever drops this.
    async fn take_over(
        &self,
        volume: VolumeId,
        owner: Owner,
        opening: &RefCell<Option<Opening>>,
    ) -> Option<Engine> {
        let parts = &self.parts;
        loop {
            if !self.is_current(volume, owner) {
                return None;
            }
            let grant = match parts.metadata.epoch_grant(volume).await {
                Ok(Some(grant)) if grant.epoch == owner.epoch => grant,
                answer => {
                    tracing::debug!(%volume, error = ?answer.err(), "no grant yet");
                    self.sleep(RETRY).await;
                    continue;
                }
            };
            let takes_over = grant.recover.is_some();
            if takes_over && !self.fence(&grant).await {
                self.sleep(RETRY).await;
                continue;
            }
            let fenced_at = parts.env.now();
            let name = self.volume(volume)?.name;
            let attempt = Opening::new(
                self.seams(),
                parts.settings.clone(),
                Identity {
                    cluster: parts.cluster.id,
                    key: HeaderKey(parts.cluster.authentication_key),
                    name,
                },
                grant.clone(),
            );
            *opening.borrow_mut() = Some(attempt.clone());
            let opened = {
                let _step = takes_over.then(|| parts.observer.begins(Step::Recover));
                attempt.open().await
            };
            match opened {
                Ok(engine) => {
                    if takes_over && !planted(Bug::NoLeaseWait) {
                        let _step = parts.observer.begins(Step::LeaseWait);
                        parts.env.sleep_until(fenced_at.after(LEASE_AND_DRIFT)).await;
                    }
                    return Some(engine);
                }
                // Drives that come back make the same grant good again.
                Err(error @ VolumeError::TooManyMissing { .. }) => {
                    tracing::warn!(%volume, epoch = %owner.epoch, "not open yet: {error}");
                    self.sleep(RETRY).await;
                }
                // Nothing was appended: what is there cannot be read. Nobody else is harmed by trying again.
                Err(
                    error @ (VolumeError::Undecodable { .. }
                    | VolumeError::RootUnreadable { .. }
                    | VolumeError::UnknownBand { .. }),
                ) => {
                    tracing::error!(%volume, epoch = %owner.epoch, "cannot be opened: {error}");
                    parts.observer.unreadable(volume, owner.epoch, &error);
                    self.sleep(UNREADABLE_RETRY).await;
                }
                // Stripe numbers and sequences of an epoch are given once, so this epoch is spent.
                Err(error) => {
                    tracing::warn!(%volume, epoch = %owner.epoch, "not opened: {error}");
                    self.end_incarnation_if_current(volume, owner).await;
                    return None;
                }
            }
        }
    }

    /// An epoch that cannot go on although the cluster holds it to be ours: only a new incarnation frees the volume.
    async fn end_incarnation_if_current(&self, volume: VolumeId, owner: Owner) {
        // The map may be about to say that the epoch is over.
        self.sleep(LEASE_AND_DRIFT).await;
        if self.is_current(volume, owner) {
            tracing::error!(%volume, epoch = %owner.epoch, "this incarnation ends so that the volume is served again");
            self.parts.fabric.give_up();
        }
    }

    /// Serves until the epoch ends: handed over, deleted, or fenced.
    async fn serve(self: &Rc<Self>, volume: VolumeId, owner: Owner, engine: &Engine) {
        let Parts { node, .. } = &self.parts;
        let mut map = self.parts.map.subscribe();
        loop {
            let (found, tight) = {
                let map = map.borrow_and_update();
                let found = map.volumes.get(&volume).cloned();
                let pool = found.as_ref().and_then(|found| map.pools.get(&found.pool));
                let tight = pool.is_some_and(|pool| pool.tight);
                (found, tight)
            };
            engine.set_tight(tight);
            let mut moving = None;
            match found {
                Some(found) if found.phase.owner() == Some(owner) => {
                    engine.grow(found.size_bytes);
                    match (found.phase, found.move_to) {
                        (Phase::Deleting { .. }, _) => {
                            return self.delete(volume, owner, engine).await;
                        }
                        (Phase::Serving { .. }, Some(to)) if to != *node => moving = Some(to),
                        _ => {}
                    }
                }
                // The map may lag behind what this epoch has done itself.
                Some(found) if found.epoch < owner.epoch => {}
                _ => {
                    engine.abort();
                    return;
                }
            }
            if let Some(to) = moving
                && self.hand_over(volume, owner, engine, to).await
            {
                return;
            }
            let changed = pin!(map.changed());
            let fenced = pin!(engine.fenced());
            if let Either::Right(_) = select(changed, fenced).await {
                tracing::warn!(%volume, epoch = %owner.epoch, "the epoch is over");
                self.stopped(volume, owner);
                self.end_incarnation_if_current(volume, owner).await;
                return;
            }
        }
    }

    /// Planned move: quiesce, and give the next epoch to `to`. Whether the epoch has ended.
    async fn hand_over(&self, volume: VolumeId, owner: Owner, engine: &Engine, to: NodeId) -> bool {
        let Parts {
            env, observer, map, ..
        } = &self.parts;
        let is_up = {
            let map = map.borrow();
            map.nodes.get(&to).is_some_and(|node| node.state == NodeState::Up)
        };
        if !is_up {
            tracing::warn!(%volume, %to, "not moved: the node is down");
            self.withdraw_move(volume).await;
            return false;
        }
        let _step = observer.begins(Step::HandOver);
        let began = env.now();
        let quiesced = match engine.quiesce().await {
            Ok(quiesced) => quiesced,
            Err(error) => {
                tracing::warn!(%volume, %error, "not quiesced: the volume will be taken over");
                engine.abort();
                self.stopped(volume, owner);
                self.end_incarnation_if_current(volume, owner).await;
                return true;
            }
        };
        self.stopped(volume, owner);
        let handover = |to| Command::Handover {
            volume,
            epoch: owner.epoch,
            last_stripe: quiesced.last,
            update: None,
            unsettled: quiesced.unsettled.clone(),
            to,
        };
        let mut reply = self.insist(handover(to)).await;
        if let Err(refusal) = &reply {
            // The engine has ended, so somebody has to open the volume again: this node does.
            tracing::warn!(%volume, %to, %refusal, "the move was refused");
            self.withdraw_move(volume).await;
            reply = self.insist(handover(self.parts.node)).await;
        }
        let took_ms = env.now().0.saturating_sub(began.0) / 1_000_000;
        tracing::info!(%volume, %to, took_ms, ?reply, "handed over");
        true
    }

    async fn delete(&self, volume: VolumeId, owner: Owner, engine: &Engine) {
        let _step = self.parts.observer.begins(Step::Delete);
        self.stopped(volume, owner);
        let unsettled = engine.abort_and_drain(DRAIN).await;
        self.finish_delete(volume, owner, unsettled).await;
    }

    /// Deletes a volume that is not served: of what is being opened, something may have been sent; of nothing, nothing was.
    async fn delete_unopened(self: Rc<Self>, volume: VolumeId, owner: Owner, opening: Option<Opening>) {
        let _step = self.parts.observer.begins(Step::Delete);
        let unsettled = match &opening {
            Some(opening) => opening.abort_and_drain(DRAIN).await,
            None => Vec::new(),
        };
        self.finish_delete(volume, owner, unsettled).await;
    }

    /// Says that a volume is gone but for the chunks that a write of this incarnation may still reach.
    async fn finish_delete(&self, volume: VolumeId, owner: Owner, unsettled: Vec<ChunkAddress>) {
        if !unsettled.is_empty() {
            let chunks = unsettled.len();
            tracing::warn!(%volume, chunks, "deleted with writes under way: their chunks wait for this incarnation's end");
        }
        let finish = Command::FinishDelete {
            volume,
            epoch: owner.epoch,
            unsettled: Some(unsettled),
        };
        if let Err(refusal) = self.insist(finish).await {
            tracing::warn!(%volume, %refusal, "the deletion was not finished");
        }
    }

    async fn withdraw_move(&self, volume: VolumeId) {
        if let Err(refusal) = self.insist(Command::RequestMove { volume, to: None }).await {
            tracing::warn!(%volume, %refusal, "the move was not withdrawn");
        }
    }

    async fn insist(&self, command: Command) -> Result<Reply, Refusal> {
        insist(&*self.parts.metadata, &*self.parts.env, command).await
    }

    /// Fences every dead incarnation on the drives of the grant's bands and has that recorded. Whether it was enough:
    /// n − m drives of each band.
    async fn fence(&self, grant: &EpochGrant) -> bool {
        let Parts {
            fabric,
            observer,
            map,
            ..
        } = &self.parts;
        let _step = observer.begins(Step::Fence);
        let map = map.borrow().clone();
        let drives: BTreeSet<DriveId> = grant
            .bands
            .iter()
            .flat_map(|band| &band.columns)
            .map(|column| column.drive)
            .collect();
        let due: Vec<(DriveId, IncarnationId, ReservationKey)> = drives
            .iter()
            .flat_map(|drive| {
                map.fences_due(*drive)
                    .map(|dead| (*drive, dead.id, ReservationKey(dead.key)))
            })
            .collect();
        let outcomes = join_all(due.iter().map(|(drive, _, key)| fabric.fence(*drive, *key))).await;
        let mut fenced: BTreeMap<IncarnationId, BTreeSet<DriveId>> = BTreeMap::new();
        let mut missing: BTreeSet<DriveId> = BTreeSet::new();
        for ((drive, incarnation, _), outcome) in due.into_iter().zip(outcomes) {
            match outcome {
                Err(_) if planted(Bug::RecordFailedFences) => {
                    fenced.entry(incarnation).or_default().insert(drive);
                }
                Ok(()) => {
                    observer.fenced(incarnation, drive);
                    fenced.entry(incarnation).or_default().insert(drive);
                }
                Err(error) => {
                    tracing::debug!(%drive, %incarnation, %error, "not fenced");
                    missing.insert(drive);
                }
            }
        }
        if !fenced.is_empty() {
            let commands = fenced
                .into_iter()
                .map(|(incarnation, drives)| Command::RecordFenced { incarnation, drives })
                .collect();
            if let Err(refusal) = self.insist(Command::Batch(commands)).await {
                tracing::warn!(%refusal, "fences not recorded");
                return false;
            }
        }
        grant.bands.iter().all(|band| {
            let unfenced = band
                .columns
                .iter()
                .filter(|column| missing.contains(&column.drive))
                .count();
            unfenced <= usize::from(band.geometry.m)
        })
    }

    fn volume(&self, volume: VolumeId) -> Option<Volume> {
        self.parts.map.borrow().volumes.get(&volume).cloned()
    }

    fn is_current(&self, volume: VolumeId, owner: Owner) -> bool {
        self.volume(volume)
            .is_some_and(|found| found.phase.owner() == Some(owner))
    }

    fn seams(&self) -> Seams {
        let Parts {
            metadata,
            env,
            fabric,
            ..
        } = &self.parts;
        Seams {
            env: Rc::clone(env),
            drives: fabric.clone(),
            lease: fabric.clone(),
            directory: Rc::new(RaftDirectory::new(Rc::clone(metadata), Rc::clone(env))),
        }
    }
}
