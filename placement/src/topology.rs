//! The drives as they are at one moment: what placement is told.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use weft_proto::band::{ChunkSize, DriveClass};
use weft_proto::id::{DriveId, NodeId};

/// Where a drive fails together with others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Home {
    /// An agent's server.
    Node(NodeId),
    /// A third-party box, by name: a domain of its own at the level of nodes.
    Box(String),
}

/// At which level the chunks of a band must not share a failure domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DomainLevel {
    /// Distinct drives, spread over nodes as evenly as they go: for clusters with few nodes.
    Drive,
    /// Distinct nodes or boxes: the default.
    Node,
    /// Distinct racks; a node or box without one is a rack of its own.
    Rack,
}

impl std::fmt::Display for DomainLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Drive => "drive",
            Self::Node => "node",
            Self::Rack => "rack",
        })
    }
}

/// A failure domain: what fails as one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Domain {
    /// One drive.
    Drive(DriveId),
    /// One node or box, with all its drives.
    Home(Home),
    /// One rack, with all its nodes and boxes.
    Rack(String),
}

/// Chunks that a drive can still take, by size. Each size is counted as if only that size were allocated.
///
/// Fragmentation is the allocator's secret: what counts is not the MiB free, but the chunks that fit into them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FreeChunks {
    /// Of 1 MiB.
    pub mib1: u64,
    /// Of 8 MiB.
    pub mib8: u64,
    /// Of 64 MiB.
    pub mib64: u64,
}

impl FreeChunks {
    /// Of free space in one piece.
    #[must_use]
    pub fn unfragmented(free_mib: u64) -> Self {
        Self {
            mib1: free_mib,
            mib8: free_mib / 8,
            mib64: free_mib / 64,
        }
    }

    /// Of one size.
    #[must_use]
    pub fn of(self, size: ChunkSize) -> u64 {
        match size {
            ChunkSize::Mib1 => self.mib1,
            ChunkSize::Mib8 => self.mib8,
            ChunkSize::Mib64 => self.mib64,
        }
    }
}

/// A drive as placement sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// Which.
    pub id: DriveId,
    /// Its node or box.
    pub home: Home,
    /// The rack of its home, if the operator named one.
    pub rack: Option<String>,
    /// Its class.
    pub class: DriveClass,
    /// Size of the chunk area.
    pub capacity_mib: u64,
    /// Of it, neither taken nor in quarantine.
    pub free_mib: u64,
    /// The same, as chunks.
    pub free_chunks: FreeChunks,
    /// Whether bands may be granted on it: online, and its home is up.
    pub in_service: bool,
    /// Whether the incarnation that asks is registered with it.
    pub registered: bool,
    /// Registrations that it holds.
    pub registrants: u32,
    /// Registrations that it takes.
    pub registrants_max: u32,
    /// Percent by which its free space counts for less, 0 … 100: for drives that are slow or wearing out. A drive
    /// with 100 is still used where a band would not fit otherwise.
    pub penalty_percent: u8,
}

impl Drive {
    /// The failure domain it belongs to at `level`.
    #[must_use]
    pub fn domain(&self, level: DomainLevel) -> Domain {
        match (level, &self.rack) {
            (DomainLevel::Drive, _) => Domain::Drive(self.id),
            (DomainLevel::Rack, Some(rack)) => Domain::Rack(rack.clone()),
            (DomainLevel::Node, _) | (DomainLevel::Rack, None) => Domain::Home(self.home.clone()),
        }
    }
}

/// All drives of the cluster at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Topology {
    drives: BTreeMap<DriveId, Drive>,
}

impl Topology {
    /// The order of `drives` does not matter. Of two with the same id the later one counts.
    #[must_use]
    pub fn new(drives: impl IntoIterator<Item = Drive>) -> Self {
        Self {
            drives: drives.into_iter().map(|drive| (drive.id, drive)).collect(),
        }
    }

    /// One drive.
    #[must_use]
    pub fn drive(&self, id: DriveId) -> Option<&Drive> {
        self.drives.get(&id)
    }

    /// All of them, by id.
    pub fn drives(&self) -> impl Iterator<Item = &Drive> {
        self.drives.values()
    }
}
