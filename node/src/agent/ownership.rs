//! Volumes this incarnation owns: taking over, serving, handing over, deleting. One task per epoch.
//!
//! ```text
//!  Recovering{us} ─ grant ─ fence the dead on ≥ n−m drives of each band ─ record ─┬─ lease + drift ─┬─ serve
//!                                                                                 └─ Engine::open ──┘
//!  Serving{us}, move_to ─ quiesce ─ Handover        Deleting{us}, from anywhere ─ abort ─ drain ─ FinishDelete
//! ```
//!
//! Design section 5. The map says what should be; this makes it so and tells Raft.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::Instant;
use weft_block::Device;
use weft_metadata::client::{ClientError, MetadataClient};
use weft_metadata::state::map::{Cluster, ClusterMap, Owner, Phase, Volume};
use weft_metadata::state::{Command, Refusal, Reply};
use weft_proto::band::EpochGrant;
use weft_proto::id::{BandId, DriveId, IncarnationId, NodeId, VolumeId};
use weft_volume::engine::{Engine, Opening};
use weft_volume::error::VolumeError;
use weft_volume::format::header::HeaderKey;
use weft_volume::seams::{Env, ReservationKey, Seams};
use weft_volume::settings::{Identity, Settings};
use weft_volume::sub_block::SubBlock;

use super::directory::RaftDirectory;
use super::fabric::Fabric;
use super::present::Presenter;
use crate::config::EngineConfig;

/// Between two attempts of a step that waits for others.
const RETRY: Duration = Duration::from_millis(50);

/// Between two attempts to open a volume that cannot be read: an operator has to act.
const UNREADABLE_RETRY: Duration = Duration::from_secs(5);

/// Between two looks at the log of all volumes.
const LOG_LOOK: Duration = Duration::from_millis(200);

/// A successor serves one lease and its drift after its fence is complete.
const LEASE_AND_DRIFT: Duration = Duration::from_millis(1010);

/// How long a deletion waits for the writes that its engine had sent. An association is given up after less, so what is left
/// then is in a drive that hangs.
const DRAIN: Duration = Duration::from_secs(3);

/// The volumes of one incarnation.
pub(crate) struct Ownership {
    cluster: Cluster,
    node: NodeId,
    client: MetadataClient,
    env: Rc<dyn Env>,
    fabric: Rc<Fabric>,
    presenter: Rc<Presenter>,
    map: watch::Receiver<Arc<ClusterMap>>,
    settings: Settings,
    node_log_budget_bytes: u64,
    /// Epochs that have a task.
    tasks: RefCell<BTreeMap<VolumeId, Owner>>,
    engines: RefCell<BTreeMap<VolumeId, Engine>>,
}

impl Ownership {
    /// Owns nothing yet.
    #[expect(clippy::too_many_arguments, reason = "the member hands over its parts, once")]
    pub(crate) fn new(
        cluster: &Cluster,
        node: NodeId,
        client: MetadataClient,
        env: Rc<dyn Env>,
        fabric: Rc<Fabric>,
        presenter: Rc<Presenter>,
        map: watch::Receiver<Arc<ClusterMap>>,
        engine: EngineConfig,
    ) -> Rc<Self> {
        let mut settings = Settings {
            stall: Duration::from_millis(engine.stall_ms),
            read_stall: Duration::from_millis(engine.stall_ms),
            log_budget_bytes: u64::from(engine.log_budget_mib) << 20,
            ..Settings::default()
        };
        settings.map.cache_bytes = usize::try_from(engine.cache_mib).unwrap_or(usize::MAX >> 20) << 20;
        Rc::new(Self {
            cluster: cluster.clone(),
            node,
            client,
            env,
            fabric,
            presenter,
            map,
            settings,
            node_log_budget_bytes: u64::from(engine.node_log_budget_mib) << 20,
            tasks: RefCell::default(),
            engines: RefCell::default(),
        })
    }

    /// Starts a task for every epoch that the map gives to this incarnation and that has none.
    pub(crate) fn follow(self: &Rc<Self>, map: &ClusterMap) {
        let own = self.fabric.identity().incarnation;
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
                    tokio::task::spawn_local(self.clone().own(*id, owner));
                }
                // Nothing of it was sent.
                Phase::Deleting { .. } => {
                    self.tasks.borrow_mut().insert(*id, owner);
                    tokio::task::spawn_local(self.clone().finish_delete(*id, owner, Vec::new()));
                }
                Phase::Serving { .. } | Phase::Unowned => {}
            }
        }
    }

    /// Keeps the log of all volumes of this node within its budget, so that a takeover of all of them stays within its time.
    /// For as long as the incarnation lives.
    pub(crate) async fn bound_log(self: Rc<Self>) {
        loop {
            tokio::time::sleep(LOG_LOOK).await;
            let longest = {
                let engines = self.engines.borrow();
                let sum: u64 = engines.values().map(Engine::log_bytes).sum();
                let longest = engines.iter().max_by_key(|(_, engine)| engine.log_bytes());
                longest
                    .filter(|_| sum > self.node_log_budget_bytes)
                    .map(|(volume, engine)| (*volume, engine.clone()))
            };
            if let Some((volume, engine)) = longest
                && let Err(error) = engine.checkpoint().await
            {
                tracing::debug!(%volume, %error, "no checkpoint");
            }
        }
    }

    /// What `weft node show` prints of the volumes.
    pub(crate) fn inspect(&self) -> serde_json::Value {
        let engines = self.engines.borrow();
        let volumes = engines.iter().map(|(volume, engine)| {
            (
                volume.to_string(),
                serde_json::Value::String(format!("{:?}", engine.stats())),
            )
        });
        serde_json::Value::Object(volumes.collect())
    }

    /// One epoch, from its grant to its end.
    async fn own(self: Rc<Self>, volume: VolumeId, owner: Owner) {
        let began = Instant::now();
        let opening = RefCell::default();
        let taken = tokio::select! {
            taken = self.take_over(volume, owner, &opening) => taken,
            () = self.deleted(volume, owner) => {
                let opening: Option<Opening> = opening.take();
                let unsettled = match &opening {
                    Some(opening) => opening.abort_and_drain(DRAIN).await,
                    None => Vec::new(),
                };
                return self.finish_delete(volume, owner, unsettled).await;
            }
        };
        let Some(engine) = taken else {
            return;
        };
        tracing::info!(%volume, epoch = %owner.epoch, took_ms = began.elapsed().as_millis() as u64, "serving");
        self.engines.borrow_mut().insert(volume, engine.clone());
        self.presenter.engine_serves(volume, self.device(volume, &engine));
        self.serve(volume, owner, &engine).await;
        self.presenter.engine_stopped(volume);
        self.engines.borrow_mut().remove(&volume);
    }

    /// Waits until the volume is to be deleted under this epoch.
    async fn deleted(&self, volume: VolumeId, owner: Owner) {
        let deleting = Phase::Deleting { owner: Some(owner) };
        let is_deleting = |map: &Arc<ClusterMap>| {
            let found = map.volumes.get(&volume);
            found.is_some_and(|found| found.phase == deleting)
        };
        if self.map.clone().wait_for(is_deleting).await.is_err() {
            // The agent ends.
            pending().await
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
        loop {
            if !self.is_current(volume, owner) {
                return None;
            }
            let grant = match self.client.epoch_grant(volume).await {
                Ok(Some(grant)) if grant.epoch == owner.epoch => grant,
                answer => {
                    tracing::debug!(%volume, error = ?answer.err(), "no grant yet");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            if grant.recover.is_some() && !self.fence(&grant).await {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            let fenced_at = Instant::now();
            let name = self.volume(volume)?.name;
            let attempt = Opening::new(
                self.seams(),
                self.settings.clone(),
                Identity {
                    cluster: self.cluster.id,
                    key: HeaderKey(self.cluster.authentication_key),
                    name,
                },
                grant.clone(),
            );
            *opening.borrow_mut() = Some(attempt.clone());
            match attempt.open().await {
                Ok(engine) => {
                    if grant.recover.is_some() {
                        tokio::time::sleep_until(fenced_at + LEASE_AND_DRIFT).await;
                    }
                    return Some(engine);
                }
                // Drives that come back make the same grant good again.
                Err(error @ VolumeError::TooManyMissing { .. }) => {
                    tracing::warn!(%volume, epoch = %owner.epoch, "not open yet: {error}");
                    tokio::time::sleep(RETRY).await;
                }
                // Nothing was appended: what is there cannot be read. Nobody else is harmed by trying again.
                Err(
                    error @ (VolumeError::Undecodable { .. }
                    | VolumeError::RootUnreadable { .. }
                    | VolumeError::UnknownBand { .. }),
                ) => {
                    tracing::error!(%volume, epoch = %owner.epoch, "cannot be opened: {error}");
                    tokio::time::sleep(UNREADABLE_RETRY).await;
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
        tokio::time::sleep(LEASE_AND_DRIFT).await;
        if self.is_current(volume, owner) {
            tracing::error!(%volume, epoch = %owner.epoch, "this incarnation ends so that the volume is served again");
            self.fabric.give_up();
        }
    }

    /// The engine with the logical blocks that hosts see.
    fn device(&self, volume: VolumeId, engine: &Engine) -> Device {
        let device: Device = Rc::new(engine.clone());
        match self.volume(volume) {
            Some(found) if found.block_bytes == 512 => Rc::new(SubBlock::new(device, self.env.clone())),
            _ => device,
        }
    }

    /// Serves until the epoch ends: handed over, deleted, or fenced.
    async fn serve(self: &Rc<Self>, volume: VolumeId, owner: Owner, engine: &Engine) {
        let mut map = self.map.clone();
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
                            return self.clone().delete(volume, owner, engine).await;
                        }
                        (Phase::Serving { .. }, Some(to)) if to != self.node => moving = Some(to),
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
            tokio::select! {
                changed = map.changed() => if changed.is_err() {
                    engine.abort();
                    return;
                },
                () = engine.fenced() => {
                    tracing::warn!(%volume, epoch = %owner.epoch, "the epoch is over");
                    self.presenter.engine_stopped(volume);
                    self.end_incarnation_if_current(volume, owner).await;
                    return;
                }
            }
        }
    }

    /// Planned move: quiesce, and give the next epoch to `to`. Whether the epoch has ended.
    async fn hand_over(&self, volume: VolumeId, owner: Owner, engine: &Engine, to: NodeId) -> bool {
        let map = self.map.borrow().clone();
        if !map.nodes.get(&to).is_some_and(crate::view::node_is_up) {
            tracing::warn!(%volume, %to, "not moved: the node is down");
            self.withdraw_move(volume).await;
            return false;
        }
        let began = Instant::now();
        let quiesced = match engine.quiesce().await {
            Ok(quiesced) => quiesced,
            Err(error) => {
                tracing::warn!(%volume, %error, "not quiesced: the volume will be taken over");
                engine.abort();
                self.presenter.engine_stopped(volume);
                self.end_incarnation_if_current(volume, owner).await;
                return true;
            }
        };
        self.presenter.engine_stopped(volume);
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
            reply = self.insist(handover(self.node)).await;
        }
        tracing::info!(%volume, %to, took_ms = began.elapsed().as_millis() as u64, ?reply, "handed over");
        true
    }

    async fn delete(self: Rc<Self>, volume: VolumeId, owner: Owner, engine: &Engine) {
        self.presenter.engine_stopped(volume);
        let unsettled = engine.abort_and_drain(DRAIN).await;
        self.finish_delete(volume, owner, unsettled).await;
    }

    /// Says that a volume is gone but for the bands that a write of this incarnation may still reach.
    async fn finish_delete(self: Rc<Self>, volume: VolumeId, owner: Owner, unsettled: Vec<BandId>) {
        if !unsettled.is_empty() {
            let bands = unsettled.len();
            tracing::warn!(%volume, bands, "deleted with writes under way: their chunks wait for this incarnation's end");
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

    /// Proposes until there is an answer.
    async fn insist(&self, command: Command) -> Result<Reply, Refusal> {
        loop {
            match self.client.propose(command.clone()).await {
                Ok(reply) => return Ok(reply),
                Err(ClientError::Refused(refusal)) => return Err(refusal),
                Err(error) => {
                    tracing::debug!(%error, "asking again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Fences every dead incarnation on the drives of the grant's bands and has that recorded. Whether it was enough:
    /// n − m drives of each band.
    async fn fence(&self, grant: &EpochGrant) -> bool {
        let map = self.map.borrow().clone();
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
        let outcomes = join_all(due.iter().map(|(drive, _, key)| self.fabric.fence(*drive, *key))).await;
        let mut fenced: BTreeMap<IncarnationId, BTreeSet<DriveId>> = BTreeMap::new();
        let mut missing: BTreeSet<DriveId> = BTreeSet::new();
        for ((drive, incarnation, _), outcome) in due.into_iter().zip(outcomes) {
            match outcome {
                Ok(()) => {
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
        self.map.borrow().volumes.get(&volume).cloned()
    }

    fn is_current(&self, volume: VolumeId, owner: Owner) -> bool {
        self.volume(volume)
            .is_some_and(|found| found.phase.owner() == Some(owner))
    }

    fn seams(&self) -> Seams {
        Seams {
            env: self.env.clone(),
            drives: self.fabric.clone(),
            lease: self.fabric.clone(),
            directory: Rc::new(RaftDirectory::new(self.client.clone(), self.env.clone())),
        }
    }
}
