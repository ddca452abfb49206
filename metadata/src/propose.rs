//! From a request for bands to the command that grants them: placement's view of the state, and its answer.
//!
//! Pure. The leader proposes from the state it has applied; [`crate::state`] checks the proposal again when it is
//! committed, and answers [`Refusal::ProposalConflict`] where the state has moved on in the meantime.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use weft_placement::{self as placement, FreeChunks, Policy, Topology};
use weft_proto::band::ChunkSize;
use weft_proto::id::{Epoch, IncarnationId, VolumeId};

use crate::state::command::{BandProposal, Purpose};
use crate::state::map::{Drive, Owner, Pool, Registration, Volume};
use crate::state::{ClusterState, Command, Refusal};

/// What an owner asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BandRequest {
    /// For which volume.
    pub volume: VolumeId,
    /// The owner's.
    pub epoch: Epoch,
    /// Drawn by the owner; a repeated request is answered with the same bands. Seeds the spread too.
    pub request: u64,
    /// Host writes leave the reserve alone.
    pub purpose: Purpose,
    /// Of all chunks.
    pub chunk_size: ChunkSize,
    /// Bands wanted; fewer may be granted where space ends.
    pub count: u32,
    /// Whether to refuse, with [`Refusal::AwaitsRegistration`], rather than to grant narrower bands than there would be
    /// once the owner has registered on every drive in service. An owner that has just started is better off waiting.
    pub patient: bool,
}

/// The command that grants up to `request.count` bands where placement would put them now.
///
/// # Errors
/// [`Refusal`] where not one band can be granted.
pub fn propose_bands(state: &ClusterState, request: &BandRequest) -> Result<Command, Refusal> {
    let (volume, owner, pool) = asking(state, request.volume, request.epoch)?;
    let space = state.pool_space(pool);
    let no_space = Refusal::NoSpace {
        free_mib: space.free_reach_mib,
        reserve_mib: space.reserve_mib(),
    };
    let available_mib = match request.purpose {
        Purpose::User => space.free_reach_mib.saturating_sub(space.reserve_mib()),
        Purpose::Internal => space.free_mib,
    };
    let topology = topology(state, owner.incarnation);
    let wanted = placement::Request {
        geometry: volume.geometry,
        k_min: 1,
        chunk_size: request.chunk_size,
        count: request.count.clamp(1, crate::state::BANDS_PER_GRANT_MAX as u32),
        policy: Policy {
            level: pool.domain,
            shards_per_node_max: None,
            classes: pool.classes.clone(),
        },
        excluded: BTreeSet::new(),
        registered_only: true,
        seed: request.request,
    };
    let placed = placement::propose(&topology, &wanted);
    if request.patient && width(&placed) < volume.geometry.k {
        let anywhere = placement::propose(
            &topology,
            &placement::Request {
                registered_only: false,
                ..wanted
            },
        );
        if width(&anywhere) > width(&placed) {
            return Err(Refusal::AwaitsRegistration {
                width: width(&placed),
                possible: width(&anywhere),
            });
        }
    }
    let placed = placed.map_err(|refusal| match refusal {
        placement::Refusal::NoSpace { .. } => no_space.clone(),
        placement::Refusal::TooFewDomains {
            in_service,
            would_fit,
            ..
        } => Refusal::TooFewDomains {
            available: in_service,
            needed: 1 + u32::from(volume.geometry.m),
            fits: would_fit.narrower,
        },
    })?;
    let mut left_mib = available_mib;
    let proposals: Vec<BandProposal> = placed
        .into_iter()
        .take_while(|placed| {
            let band_mib = u64::from(placed.geometry.n()) * u64::from(request.chunk_size.mib());
            let fits = band_mib <= left_mib;
            left_mib = left_mib.saturating_sub(band_mib);
            fits
        })
        .map(|placed| BandProposal {
            geometry: placed.geometry,
            drives: placed.drives,
        })
        .collect();
    if proposals.is_empty() {
        return Err(no_space);
    }
    Ok(Command::GrantBands {
        volume: request.volume,
        epoch: request.epoch,
        request: request.request,
        purpose: request.purpose,
        chunk_size: request.chunk_size,
        proposals,
    })
}

/// The volume, its owner and its pool, for an owner that asks in `epoch`. The command that is proposed is checked against the epoch.
fn asking(state: &ClusterState, id: VolumeId, epoch: Epoch) -> Result<(&Volume, Owner, &Pool), Refusal> {
    let map = &state.map;
    let volume = map.volumes.get(&id).ok_or(Refusal::NoSuchVolume(id))?;
    let owner = volume.phase.owner().ok_or(Refusal::Stale {
        epoch,
        current: volume.epoch,
    })?;
    let pool = map
        .pools
        .get(&volume.pool)
        .ok_or(Refusal::NoSuchPool(volume.pool))?;
    Ok((volume, owner, pool))
}

/// k of the first band, and 0 where there is none.
fn width(placed: &Result<Vec<placement::Placement>, placement::Refusal>) -> u8 {
    placed
        .as_ref()
        .ok()
        .and_then(|bands| bands.first())
        .map_or(0, |band| band.geometry.k)
}

/// The drives as placement sees them, for bands of `incarnation`.
#[must_use]
pub fn topology(state: &ClusterState, incarnation: IncarnationId) -> Topology {
    Topology::new(state.map.drives.values().filter_map(|drive| {
        let chunks = state.chunks.get(&drive.id)?;
        Some(placement::Drive {
            id: drive.id,
            home: state.map.home(drive),
            rack: state.map.rack(drive).map(str::to_owned),
            class: drive.class,
            capacity_mib: chunks.space.capacity_mib(),
            free_mib: chunks.space.free_mib(),
            free_chunks: FreeChunks {
                mib1: chunks.space.available(ChunkSize::Mib1),
                mib8: chunks.space.available(ChunkSize::Mib8),
                mib64: chunks.space.available(ChunkSize::Mib64),
            },
            in_service: state.map.in_service(drive),
            registered: drive.registrations.get(&incarnation) == Some(&Registration::Registered),
            // The cluster's own registration takes a place too.
            registrants: 1 + registrants(drive),
            registrants_max: drive.registrants_max,
            penalty_percent: 0,
        })
    }))
}

fn registrants(drive: &Drive) -> u32 {
    let registered = drive
        .registrations
        .values()
        .filter(|registration| **registration == Registration::Registered);
    u32::try_from(registered.count()).unwrap_or(u32::MAX)
}

mod replacement;
#[cfg(test)]
mod tests;

pub use replacement::propose_replacement;
