//! The data side of a member: one incarnation's drives, fabric, presentation and ownership, all following the cluster
//! map.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;
use weft_block::Device;
use weft_block::drive::Health;
use weft_incarnation::fabric::{Fabric, Identity};
use weft_incarnation::local_drive::{self, LocalReach};
use weft_incarnation::ownership::{Observer, Ownership, Parts};
use weft_incarnation::published::Published;
use weft_initiator::{ConnectOptions, HostIdentity, RemoteDrive};
use weft_metadata::client::{ClientError, MetadataClient};
use weft_metadata::state::Command;
use weft_metadata::state::map::{Cluster, ClusterMap, DriveHome, DriveState, Owner};
use weft_proto::id::{DriveId, NodeId, VolumeId};
use weft_proto::nvme::reservation::PersistChange;
use weft_target::reservation::ReservedNamespace;
use weft_target::{Registry, RegistryConfig};
use weft_volume::engine::Engine;
use weft_volume::seams::{Env, ReservationKey};
use weft_volume::sub_block::SubBlock;

use super::env::TokioEnv;
use super::guests::Guests;
use super::local_drives::LocalDrive;
use super::present::Presenter;
use super::remote_reach::RemoteReach;
use super::route::COMMAND_QUIESCE;
use crate::config::EngineConfig;
use crate::view;

/// Controller identifiers of one node: nodes present the same subsystems, and their ranges must not meet.
const CNTLIDS_PER_NODE: u16 = 512;

/// Everything the control side knows when it starts the data side.
pub(crate) struct MemberOptions {
    pub(crate) cluster: Cluster,
    pub(crate) node: NodeId,
    pub(crate) node_name: String,
    pub(crate) identity: Identity,
    pub(crate) client: MetadataClient,
    pub(crate) map: watch::Receiver<Arc<ClusterMap>>,
    pub(crate) reservations_dir: PathBuf,
    /// Where guests are on record.
    pub(crate) guest_record: PathBuf,
    pub(crate) nvme: TcpListener,
    pub(crate) discovery: TcpListener,
    pub(crate) engine: EngineConfig,
    /// Of associations with drives.
    pub(crate) keep_alive: Duration,
}

/// A member's data side.
pub(crate) struct Member {
    cluster: Cluster,
    node: NodeId,
    node_name: String,
    client: MetadataClient,
    map: watch::Receiver<Arc<ClusterMap>>,
    /// The map as this thread has acted upon it.
    followed: Rc<Published<Arc<ClusterMap>>>,
    reservations_dir: PathBuf,
    keep_alive: Duration,
    fabric: Rc<Fabric>,
    presenter: Rc<Presenter>,
    ownership: Rc<Ownership>,
    guests: Guests,
    local: RefCell<Vec<(DriveId, Rc<LocalDrive>, ReservedNamespace)>>,
}

impl Member {
    /// Brings this server's drives into service, then listens, then follows the map.
    ///
    /// # Errors
    /// A listener cannot be used. A drive that cannot be used is logged and left out: the others serve.
    pub(crate) async fn start(options: MemberOptions, drives: &[Rc<LocalDrive>]) -> anyhow::Result<Rc<Self>> {
        let MemberOptions {
            cluster,
            node,
            node_name,
            identity,
            client,
            map,
            reservations_dir,
            guest_record,
            nvme,
            discovery,
            engine,
            keep_alive,
        } = options;
        let first = u16::try_from(node.0)
            .ok()
            .and_then(|node| node.checked_mul(CNTLIDS_PER_NODE));
        let first = first
            .filter(|first| *first <= 0xffef - CNTLIDS_PER_NODE)
            .context("too many nodes")?;
        let registry = Registry::new(RegistryConfig {
            cntlid_min: first + 1,
            cntlid_max: first + CNTLIDS_PER_NODE - 1,
            command_quiesce: COMMAND_QUIESCE,
            ..RegistryConfig::default()
        });
        let env: Rc<dyn Env> = Rc::new(TokioEnv::new());
        let fabric = Fabric::new(identity, env.clone());
        let presenter = Presenter::new(registry.clone(), cluster.id, node);
        let followed = Published::new(map.borrow().clone());
        let observer = Presenting {
            presenter: presenter.clone(),
            env: env.clone(),
            map: followed.clone(),
        };
        let ownership = Ownership::new(Parts {
            cluster: cluster.clone(),
            node,
            metadata: Rc::new(client.clone()),
            env,
            fabric: fabric.clone(),
            observer: Rc::new(observer),
            map: followed.clone(),
            settings: engine.settings(),
            bounds: engine.bounds(),
        });
        let guests = Guests::new(registry.clone(), cluster.id, map.clone(), guest_record);
        let member = Rc::new(Self {
            cluster,
            node,
            node_name,
            client,
            map,
            followed,
            reservations_dir,
            keep_alive,
            fabric,
            presenter,
            ownership,
            guests,
            local: RefCell::default(),
        });
        for drive in drives {
            if let Err(error) = member.add_local(drive.clone()).await {
                tracing::error!(drive = %drive.path.display(), "drive left out: {error:#}");
            }
        }
        // Only now can others reach these drives, when everything dead has been fenced on them.
        let nvme = tokio::net::TcpListener::from_std(nvme).context("nvme_listen")?;
        let discovery = tokio::net::TcpListener::from_std(discovery).context("discovery_listen")?;
        tokio::task::spawn_local(weft_target::serve(nvme, registry.clone()));
        tokio::task::spawn_local(weft_target::serve(discovery, registry));
        tokio::task::spawn_local(member.clone().follow());
        let metadata = Rc::new(member.client.clone());
        tokio::task::spawn_local(member.fabric.clone().keep_registrations_on_record(metadata));
        tokio::task::spawn_local(member.ownership.clone().keep_within_bounds());
        tokio::task::spawn_local(member.ownership.clone().watch_leases());
        member.guests.restore();
        Ok(member)
    }

    /// Completes when this incarnation has been fenced.
    pub(crate) async fn wait_until_fenced(&self) {
        self.fabric.wait_until_fenced().await;
    }

    /// The guests of this server.
    pub(crate) fn guests(&self) -> &Guests {
        &self.guests
    }

    /// Waits until the map knows a drive.
    pub(crate) async fn wait_for_drive(&self, drive: DriveId) {
        let mut map = self.map.clone();
        // The map ends with the agent.
        let _ = map.wait_for(|map| map.drives.contains_key(&drive)).await;
    }

    /// The live state as a tree.
    pub(crate) fn inspect(&self) -> serde_json::Value {
        serde_json::json!({
            "incarnation": self.fabric.identity().incarnation.to_string(),
            "drives": self.fabric.inspect(),
            "volumes": self.ownership.inspect(),
            "guests": self.guests.inspect(),
        })
    }

    /// Puts a labelled drive of this server into service: reservation in force, dead incarnations fenced, then online.
    ///
    /// # Errors
    /// The label is not the cluster's, the map does not know the drive, or its reservations cannot be read.
    pub(crate) async fn add_local(self: &Rc<Self>, local: Rc<LocalDrive>) -> anyhow::Result<()> {
        let uuid = local
            .uuid()
            .context("it has no label; add it with `weft drive add --path`")?;
        let map = self.map.borrow().clone();
        let known = map
            .drives
            .values()
            .find(|drive| drive.uuid == uuid && drive.state != DriveState::Removed);
        let known = known
            .with_context(|| format!("its label {uuid} is not on record in this cluster"))?
            .clone();
        let file = self.reservations_dir.join(format!("{uuid}.reservations"));
        let namespace = ReservedNamespace::open(local.device(), uuid.0, Some(file))?;
        local_drive::enforce(&namespace, &self.cluster, PersistChange::Set)
            .await
            .context("put the reservation in force")?;
        local.record_id(known.id, self.node).await?;
        let identity = self.fabric.identity();
        let reach = Rc::new(LocalReach {
            namespace: namespace.clone(),
            host: identity.host_id,
        });
        self.local
            .borrow_mut()
            .push((known.id, local.clone(), namespace.clone()));
        self.fabric.add(known.id, reach);
        self.fence_local(known.id, &map).await;
        self.presenter.add_drive(known.id, uuid, namespace)?;
        self.set_drive_state(known.id, DriveState::Online).await;
        tokio::task::spawn_local(Self::watch_health(self.clone(), known.id, local));
        Ok(())
    }

    /// Fences dead incarnations on a drive of this server and has that recorded: their chunks are free again then.
    async fn fence_local(&self, drive: DriveId, map: &ClusterMap) {
        let namespace = self
            .local
            .borrow()
            .iter()
            .find(|(id, ..)| *id == drive)
            .map(|(_, _, n)| n.clone());
        let Some(namespace) = namespace else { return };
        let mut commands = Vec::new();
        for dead in map.fences_due(drive) {
            match local_drive::fence_dead(&namespace, &self.cluster, ReservationKey(dead.key)).await {
                Ok(()) => commands.push(Command::RecordFenced {
                    incarnation: dead.id,
                    drives: BTreeSet::from([drive]),
                }),
                Err(error) => tracing::error!(%drive, dead = %dead.id, %error, "not fenced"),
            }
        }
        if !commands.is_empty()
            && let Err(error) = self.client.propose(Command::Batch(commands)).await
        {
            tracing::warn!(%drive, %error, "fences not recorded yet");
        }
    }

    async fn set_drive_state(&self, drive: DriveId, state: DriveState) {
        let current = self.map.borrow().drives.get(&drive).map(|drive| drive.state);
        if current == Some(state) {
            return;
        }
        loop {
            match self.client.propose(Command::SetDriveState { drive, state }).await {
                Ok(_) => return,
                Err(ClientError::Refused(refusal)) => {
                    tracing::warn!(%drive, %refusal, "drive state refused");
                    return;
                }
                Err(error) => {
                    tracing::warn!(%drive, %error, "drive state not recorded yet");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn watch_health(self: Rc<Self>, drive: DriveId, local: Rc<LocalDrive>) {
        let mut health = local.drive.health();
        let gone = health
            .wait_for(|health| matches!(health, Health::Gone(_)))
            .await
            .map(|health| *health);
        if let Ok(Health::Gone(reason)) = gone {
            tracing::error!(%drive, path = %local.path.display(), %reason, "a drive has failed; replace it");
            self.fabric.remove(drive);
            self.set_drive_state(drive, DriveState::Failed).await;
        }
    }

    /// Acts on every version of the map.
    async fn follow(self: Rc<Self>) {
        let mut receiver = self.map.clone();
        loop {
            let map = receiver.borrow_and_update().clone();
            self.followed.replace(map.clone());
            self.follow_drives(&map);
            self.presenter.follow(&map);
            self.ownership.follow(&map);
            let local: Vec<DriveId> = self.local.borrow().iter().map(|(drive, ..)| *drive).collect();
            for drive in local {
                if map.fences_due(drive).next().is_some() {
                    let (this, map) = (self.clone(), map.clone());
                    tokio::task::spawn_local(async move { this.fence_local(drive, &map).await });
                }
            }
            if receiver.changed().await.is_err() {
                return;
            }
        }
    }

    /// Reaches the drives of other nodes and of third parties, and forgets those that were removed.
    fn follow_drives(&self, map: &ClusterMap) {
        let known = self.fabric.known();
        for drive in view::drives(map).filter(|drive| !known.contains(&drive.id)) {
            let (address, subnqn, nsid) = match &drive.home {
                DriveHome::Node(node) if *node == self.node => continue,
                DriveHome::Node(node) => {
                    let Some(node) = map.nodes.get(node) else { continue };
                    (
                        node.nvme_address.clone(),
                        view::drive_subnqn(self.cluster.id, drive.uuid),
                        1,
                    )
                }
                DriveHome::ThirdParty {
                    address,
                    subnqn,
                    nsid,
                    ..
                } => (address.clone(), subnqn.clone(), *nsid),
            };
            let Ok(address) = address.parse() else {
                tracing::error!(drive = %drive.id, %address, "not an address");
                continue;
            };
            let host = HostIdentity {
                hostnqn: view::node_host_nqn(self.cluster.id, &self.node_name),
                hostid: self.fabric.identity().host_id,
            };
            let mut options = ConnectOptions::new(address, subnqn, host);
            options.kato = self.keep_alive;
            options.connect_timeout = Duration::from_secs(1);
            let remote = RemoteDrive::open(options, nsid);
            self.fabric.add(drive.id, Rc::new(RemoteReach(remote)));
        }
        let present: BTreeSet<DriveId> = view::drives(map).map(|drive| drive.id).collect();
        for drive in known.difference(&present) {
            self.fabric.remove(*drive);
        }
    }
}

/// Presents the volumes that this incarnation owns, in the logical blocks that their hosts see.
struct Presenting {
    presenter: Rc<Presenter>,
    env: Rc<dyn Env>,
    map: Rc<Published<Arc<ClusterMap>>>,
}

impl Observer for Presenting {
    fn serves(&self, volume: VolumeId, _owner: Owner, engine: &Engine) {
        let block_bytes = self
            .map
            .borrow()
            .volumes
            .get(&volume)
            .map(|found| found.block_bytes);
        let device: Device = Rc::new(engine.clone());
        let device = match block_bytes {
            Some(512) => Rc::new(SubBlock::new(device, self.env.clone())),
            _ => device,
        };
        self.presenter.engine_serves(volume, device);
    }

    fn stopped(&self, volume: VolumeId) {
        self.presenter.engine_stopped(volume);
    }

    fn silenced(&self, volume: VolumeId) {
        self.presenter.engine_silenced(volume);
    }

    fn speaks_again(&self, volume: VolumeId) {
        self.presenter.engine_speaks_again(volume);
    }
}

/// A key for an incarnation, never 0.
pub(crate) fn draw_key() -> ReservationKey {
    ReservationKey(rand::random_range(1..=u64::MAX))
}
