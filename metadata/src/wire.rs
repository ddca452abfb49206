//! What clients ask of the metadata service and what it answers, inside the envelopes that gRPC carries.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use weft_proto::band::{Band, EpochGrant};
use weft_proto::id::{DriveId, NodeId, PoolId, VolumeId};

use crate::propose::BandRequest;
use crate::state::command::ReplacementRequest;
use crate::state::reserve::PoolSpace;
use crate::state::{ClusterMap, ClusterState, Command};

/// What a client proposes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Proposed {
    /// As it is.
    Command(Box<Command>),
    /// Bands wherever the leader's placement puts them.
    Bands(BandRequest),
    /// A chunk for the rebuild of a column wherever the leader's placement puts it.
    Replacement(ReplacementRequest),
}

/// A linearizable read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Query {
    /// The cluster map.
    Map,
    /// What the owner of the current epoch needs.
    EpochGrant(VolumeId),
    /// A volume's bands as they are now.
    Bands(VolumeId),
    /// How the service and the space are.
    Status,
}

/// What a query answers, in the same order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// To [`Query::Map`].
    Map(Box<ClusterMap>),
    /// To [`Query::EpochGrant`]; `None` unless the volume is recovering.
    EpochGrant(Option<EpochGrant>),
    /// To [`Query::Bands`]; `None` if there is no such volume.
    Bands(Option<Vec<Band>>),
    /// To [`Query::Status`].
    Status(Box<Status>),
}

/// The Raft group and the space, for people and for metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Who leads.
    pub leader: NodeId,
    /// Raft term.
    pub term: u64,
    /// Index of the last entry applied by the leader.
    pub applied_index: u64,
    /// Members that vote, by a membership that is committed: a minority of them can be spared.
    pub voters: Vec<NodeId>,
    /// Members that follow without a vote.
    pub learners: Vec<NodeId>,
    /// By drive.
    pub drives: BTreeMap<DriveId, DriveUsage>,
    /// By pool, over drives in service.
    pub pools: BTreeMap<PoolId, PoolSpace>,
    /// By volume.
    pub volumes: BTreeMap<VolumeId, VolumeUsage>,
}

/// How full a drive is, in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveUsage {
    /// Chunk area.
    pub capacity_mib: u64,
    /// Taken, quarantined chunks included.
    pub allocated_mib: u64,
    /// Freed, and waiting for a fence.
    pub quarantined_mib: u64,
}

/// What a volume takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeUsage {
    /// Bands granted and not freed.
    pub bands: u64,
    /// Their chunks, in MiB.
    pub allocated_mib: u64,
    /// Bands with a column on a drive out of service.
    pub degraded_bands: u64,
    /// Counts published roots.
    pub root_version: u64,
}

impl Status {
    /// The part that the state knows; the Raft group's is filled in by the service.
    pub(crate) fn of(state: &ClusterState) -> Self {
        let drives = state
            .chunks
            .iter()
            .map(|(id, chunks)| {
                let usage = DriveUsage {
                    capacity_mib: chunks.space.capacity_mib(),
                    allocated_mib: chunks.space.allocated_mib(),
                    quarantined_mib: chunks.quarantined_mib(),
                };
                (*id, usage)
            })
            .collect();
        let pools = state
            .map
            .pools
            .values()
            .map(|pool| (pool.id, state.pool_space(pool)))
            .collect();
        let in_service = |drive: &DriveId| {
            state
                .map
                .drives
                .get(drive)
                .is_some_and(|drive| state.map.in_service(drive))
        };
        let volumes = state
            .layouts
            .iter()
            .map(|(id, layout)| {
                let bands = || layout.bands.values().map(|record| &record.band);
                let usage = VolumeUsage {
                    bands: layout.bands.len() as u64,
                    allocated_mib: bands()
                        .map(|band| band.columns.len() as u64 * u64::from(band.chunk_size.mib()))
                        .sum(),
                    degraded_bands: bands()
                        .filter(|band| !band.columns.iter().all(|chunk| in_service(&chunk.drive)))
                        .count() as u64,
                    root_version: layout.root_version,
                };
                (*id, usage)
            })
            .collect();
        Self {
            leader: NodeId(0),
            term: 0,
            applied_index: 0,
            voters: Vec::new(),
            learners: Vec::new(),
            drives,
            pools,
            volumes,
        }
    }
}
