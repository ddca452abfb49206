//! The cluster map: the part of the state that every agent follows.
//!
//! Nodes, incarnations, drives with the registrations on record, pools and volumes. It names who owns what and
//! never where a band lies: the band directory stays with the voters ([`super::layout`]), so that the map's size does
//! not depend on the data stored. Design sections 2 and 6.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use weft_proto::band::{Geometry, WINDOW_ROWS_DEFAULT};
use weft_proto::id::{
    ClusterId, DriveId, DriveUuid, Epoch, HostId, IncarnationId, LayerId, MapVersion, NodeId, PoolId,
    VolumeId,
};
use weft_proto::nqn::Nqn;

pub use weft_placement::{Domain, DomainLevel, DriveClass, Home};

/// Everything an agent knows of its cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterMap {
    /// Counts changes of this map.
    pub version: MapVersion,
    /// `None` before `Init`.
    pub cluster: Option<Cluster>,
    /// Servers that run an agent.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Incarnations that are live, or dead and not yet fenced wherever they are on record. One that is absent is gone.
    pub incarnations: BTreeMap<IncarnationId, Incarnation>,
    /// Drives, with removed ones (their ids are never reused).
    pub drives: BTreeMap<DriveId, Drive>,
    /// Pools.
    pub pools: BTreeMap<PoolId, Pool>,
    /// Volumes.
    pub volumes: BTreeMap<VolumeId, Volume>,
}

impl Default for ClusterMap {
    fn default() -> Self {
        Self {
            version: MapVersion(0),
            cluster: None,
            nodes: BTreeMap::new(),
            incarnations: BTreeMap::new(),
            drives: BTreeMap::new(),
            pools: BTreeMap::new(),
            volumes: BTreeMap::new(),
        }
    }
}

/// The cluster's identity and settings.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// On every label and in every stripe header.
    pub id: ClusterId,
    /// For people.
    pub name: String,
    /// Authenticates labels and stripe headers, so that a guest's data can never be taken for a header.
    pub authentication_key: [u8; 32],
    /// Host Identifier of the cluster's own registration on every drive: used only to fence.
    pub fencing_host_id: HostId,
    /// Reservation key of that registration, never 0.
    pub fencing_key: u64,
    /// What an operator may change.
    pub settings: Settings,
}

impl std::fmt::Debug for Cluster {
    // The key is a secret: it must not reach a log by way of a debug print.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Cluster-wide settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Voters of the Raft group that the leader aims at: 1, 3 or 5.
    pub voters: u8,
    /// Largest volume.
    pub volume_bytes_max: u64,
    /// Rows of a band that its writes under way may span, of bands granted from now on: a takeover reads as many behind the
    /// last one that it finds. At least [`WINDOW_ROWS_DEFAULT`], into which the root of the largest volume fits.
    pub window_rows: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            voters: 3,
            // Derived: 2^34 blocks of 4 KiB, which a page-map key holds with room to spare.
            volume_bytes_max: 64 << 40,
            window_rows: WINDOW_ROWS_DEFAULT,
        }
    }
}

/// A server that runs an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Never reused.
    pub id: NodeId,
    /// Unique in the cluster.
    pub name: String,
    /// Failure domain above the node, if the operator named one.
    pub rack: Option<String>,
    /// Where its agent serves gRPC, `host:port`.
    pub control_address: String,
    /// Where its agent serves NVMe/TCP, `host:port`.
    pub nvme_address: String,
    /// Whether its current incarnation is live.
    pub state: NodeState,
    /// Its latest incarnation, `None` before the first one.
    pub incarnation: Option<IncarnationId>,
}

/// Whether a node's agent is alive, as far as the leader knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeState {
    /// Its current incarnation is live.
    Up,
    /// It has none, or the current one is dead.
    Down,
}

/// One life of an agent process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incarnation {
    /// Never reused.
    pub id: IncarnationId,
    /// Where it runs.
    pub node: NodeId,
    /// The NVMe Host Identifier it drew.
    pub host_id: HostId,
    /// The reservation key it drew, never 0.
    pub key: u64,
    /// Live or dead.
    pub state: IncarnationState,
}

/// The life cycle of an incarnation. The third state, gone, is its absence from the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IncarnationState {
    /// May own volumes and register with drives.
    Live,
    /// Must not come back; to be fenced wherever it is on record.
    Dead,
}

/// A drive and who is registered with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// Never reused.
    pub id: DriveId,
    /// The label's own identity.
    pub uuid: DriveUuid,
    /// Unique in the cluster.
    pub name: String,
    /// Who serves it.
    pub home: DriveHome,
    /// Its class.
    pub class: DriveClass,
    /// Where the chunk area begins, in MiB from the start of the namespace. Never 0: the label is there.
    pub start_mib: u32,
    /// Where the chunk area ends, exclusive, in MiB.
    pub end_mib: u32,
    /// Whether bands may be granted on it.
    pub state: DriveState,
    /// Registrants the drive takes, the cluster's own registration included.
    pub registrants_max: u32,
    /// Registrations on record. Those of incarnations that are gone are forgotten.
    pub registrations: BTreeMap<IncarnationId, Registration>,
}

impl Drive {
    /// Size of the chunk area.
    #[must_use]
    pub fn capacity_mib(&self) -> u64 {
        u64::from(self.end_mib.saturating_sub(self.start_mib))
    }
}

/// Who serves a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DriveHome {
    /// An agent's server.
    Node(NodeId),
    /// A third-party NVMe-oF target that every agent reaches directly.
    ThirdParty {
        /// `host:port` of the NVMe/TCP listener.
        address: String,
        /// The subsystem.
        subnqn: Nqn,
        /// Namespace identifier (NSID).
        nsid: u32,
        /// The failure domain the drive shares with others of the same box.
        box_name: String,
    },
}

/// Whether a drive serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DriveState {
    /// In service, while its home is up.
    Online,
    /// Expected back.
    Offline,
    /// Lost its medium, its reservation or its label: nothing is granted on it.
    Failed,
    /// Taken out by an operator. Final.
    Removed,
}

/// What is on record about one incarnation's registration on one drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Registration {
    /// It registered, once.
    Registered,
    /// It was preempted and aborted; it never registers again.
    Fenced,
}

/// A default geometry and the drives that bands may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Never reused.
    pub id: PoolId,
    /// Unique in the cluster.
    pub name: String,
    /// For volumes that ask for none.
    pub geometry: Geometry,
    /// What the chunks of a band must not share.
    pub domain: DomainLevel,
    /// Classes its bands may use.
    pub classes: BTreeSet<DriveClass>,
    /// Little is left of what host writes may use: owners compact ahead of need, each for all of them.
    pub tight: bool,
}

/// A volume: what hosts see, and who owns it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Never reused.
    pub id: VolumeId,
    /// Unique in the cluster.
    pub name: String,
    /// Where its bands lie.
    pub pool: PoolId,
    /// What hosts see, in bytes; whole [`Volume::block_bytes`].
    pub size_bytes: u64,
    /// Logical block size presented, 512 or 4096.
    pub block_bytes: u32,
    /// What its bands ask for.
    pub geometry: Geometry,
    /// The namespace's UUID.
    pub uuid: [u8; 16],
    /// The subsystem that presents it, on every path the same.
    pub subnqn: Nqn,
    /// Hosts it serves. None means nobody.
    pub allowed_hosts: BTreeSet<Nqn>,
    /// Nodes that present it.
    pub presentation: Presentation,
    /// The layer that is written.
    pub layer: LayerId,
    /// The last epoch granted; 0 before the first.
    pub epoch: Epoch,
    /// Who owns it.
    pub phase: Phase,
    /// The owner of choice where there is one.
    pub preferred: Option<NodeId>,
    /// An operator's wish, until the owner has handed over to it.
    pub move_to: Option<NodeId>,
}

/// Which nodes present a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Presentation {
    /// Every node.
    All,
    /// These.
    Nodes(BTreeSet<NodeId>),
}

impl Presentation {
    /// Whether `node` presents the volume.
    #[must_use]
    pub fn includes(&self, node: NodeId) -> bool {
        match self {
            Self::All => true,
            Self::Nodes(nodes) => nodes.contains(&node),
        }
    }
}

/// Who owns a volume and how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Nobody has owned it yet.
    Unowned,
    /// `owner` fences, loads and recovers; nothing of its epoch counts yet.
    Recovering {
        /// Of the new epoch.
        owner: Owner,
        /// The last epoch that served; `None` for a volume never opened and after a clean hand-over.
        recover: Option<Epoch>,
    },
    /// `owner` serves.
    Serving {
        /// Of the current epoch.
        owner: Owner,
    },
    /// To disappear once `owner` has stopped sending, or at once where there is none.
    Deleting {
        /// Who may still be sending.
        owner: Option<Owner>,
    },
}

impl Phase {
    /// Whoever holds the current epoch.
    #[must_use]
    pub fn owner(self) -> Option<Owner> {
        match self {
            Self::Unowned => None,
            Self::Recovering { owner, .. } | Self::Serving { owner } => Some(owner),
            Self::Deleting { owner } => owner,
        }
    }
}

/// The holder of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Of the volume.
    pub epoch: Epoch,
    /// The server.
    pub node: NodeId,
    /// The process.
    pub incarnation: IncarnationId,
}

impl ClusterMap {
    /// Whether `incarnation` is live.
    #[must_use]
    pub fn is_live(&self, incarnation: IncarnationId) -> bool {
        self.incarnations
            .get(&incarnation)
            .is_some_and(|found| found.state == IncarnationState::Live)
    }

    /// Whether nothing of `incarnation` can reach `drive` any more: it is fenced there, or gone.
    #[must_use]
    pub fn is_fenced(&self, incarnation: IncarnationId, drive: DriveId) -> bool {
        if !self.incarnations.contains_key(&incarnation) {
            return true;
        }
        self.drives
            .get(&drive)
            .is_some_and(|drive| drive.registrations.get(&incarnation) == Some(&Registration::Fenced))
    }

    /// Whether bands may be granted on `drive` now: online, and its home is up.
    #[must_use]
    pub fn in_service(&self, drive: &Drive) -> bool {
        drive.state == DriveState::Online
            && match &drive.home {
                DriveHome::Node(node) => self
                    .nodes
                    .get(node)
                    .is_some_and(|node| node.state == NodeState::Up),
                DriveHome::ThirdParty { .. } => true,
            }
    }

    /// Node or box of `drive`: what fails together with it at least.
    #[must_use]
    pub fn home(&self, drive: &Drive) -> Home {
        match &drive.home {
            DriveHome::Node(node) => Home::Node(*node),
            DriveHome::ThirdParty { box_name, .. } => Home::Box(box_name.clone()),
        }
    }

    /// The rack of `drive`, if the operator named one. A third-party box has none.
    #[must_use]
    pub fn rack(&self, drive: &Drive) -> Option<&str> {
        match &drive.home {
            DriveHome::Node(node) => self.nodes.get(node)?.rack.as_deref(),
            DriveHome::ThirdParty { .. } => None,
        }
    }

    /// The failure domain of `drive` at `level`, as placement sees it.
    #[must_use]
    pub fn domain(&self, drive: &Drive, level: DomainLevel) -> Domain {
        match (level, self.rack(drive)) {
            (DomainLevel::Drive, _) => Domain::Drive(drive.id),
            (DomainLevel::Rack, Some(rack)) => Domain::Rack(rack.to_owned()),
            (DomainLevel::Node, _) | (DomainLevel::Rack, None) => Domain::Home(self.home(drive)),
        }
    }

    /// Dead incarnations still on record as registered with `drive`: to be fenced there by whoever reaches it.
    pub fn fences_due(&self, drive: DriveId) -> impl Iterator<Item = &Incarnation> {
        self.drives
            .get(&drive)
            .into_iter()
            .flat_map(|drive| &drive.registrations)
            .filter(|(_, registration)| **registration == Registration::Registered)
            .filter_map(|(id, _)| self.incarnations.get(id))
            .filter(|incarnation| incarnation.state == IncarnationState::Dead)
    }

    /// The volumes that `incarnation` owns, by whatever phase.
    pub fn owned_by(&self, incarnation: IncarnationId) -> impl Iterator<Item = &Volume> {
        self.volumes.values().filter(move |volume| {
            volume
                .phase
                .owner()
                .is_some_and(|owner| owner.incarnation == incarnation)
        })
    }

    /// The node called `name`.
    #[must_use]
    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.nodes.values().find(|node| node.name == name)
    }

    /// The drive called `name`.
    #[must_use]
    pub fn drive_named(&self, name: &str) -> Option<&Drive> {
        self.drives
            .values()
            .find(|drive| drive.name == name && drive.state != DriveState::Removed)
    }

    /// The pool called `name`.
    #[must_use]
    pub fn pool_named(&self, name: &str) -> Option<&Pool> {
        self.pools.values().find(|pool| pool.name == name)
    }

    /// The volume called `name`.
    #[must_use]
    pub fn volume_named(&self, name: &str) -> Option<&Volume> {
        self.volumes.values().find(|volume| volume.name == name)
    }
}
