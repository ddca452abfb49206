//! From an owner's wish to rebuild a column to the command that grants a fresh chunk for it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use weft_placement::{self as placement, Policy};
use weft_proto::id::{BandId, DriveId, Epoch, VolumeId};

use super::{asking, topology};
use crate::state::{ClusterState, Command, Refusal};

/// What an owner asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplacementRequest {
    /// Whose band.
    pub volume: VolumeId,
    /// The owner's.
    pub epoch: Epoch,
    /// Drawn by the owner; a repeated request is answered with the same chunk. Seeds the choice too.
    pub request: u64,
    /// Which band.
    pub band: BandId,
    /// Which column of it.
    pub column: u8,
    /// The version of the band that the owner knows.
    pub version: u64,
}

/// The command that grants a chunk where placement would put the column now: on another drive, apart from the band's other
/// columns.
///
/// # Errors
/// [`Refusal`] where none can be granted.
pub fn propose_replacement(state: &ClusterState, request: &ReplacementRequest) -> Result<Command, Refusal> {
    let (_, owner, pool) = asking(state, request.volume, request.epoch)?;
    let layout = state
        .layouts
        .get(&request.volume)
        .ok_or(Refusal::NoSuchVolume(request.volume))?;
    let known = layout.replacements.iter().map(|granted| granted.replacement);
    if let Some(known) = known.into_iter().find(|known| known.request == request.request) {
        // Granted before, and perhaps the last chunk: the answer is on record.
        return Ok(grant(request, known.chunk.drive));
    }
    let band = &layout
        .bands
        .get(&request.band)
        .ok_or(Refusal::NoSuchBand(request.band))?
        .band;
    let lost = band
        .columns
        .get(usize::from(request.column))
        .ok_or(Refusal::NoSuchColumn {
            band: request.band,
            column: request.column,
        })?
        .drive;
    let others: Vec<DriveId> = band
        .columns
        .iter()
        .map(|chunk| chunk.drive)
        .filter(|drive| *drive != lost)
        .collect();
    let wanted = placement::Request {
        geometry: band.geometry,
        k_min: 1,
        chunk_size: band.chunk_size,
        count: 1,
        policy: Policy {
            level: pool.domain,
            shards_per_node_max: None,
            classes: pool.classes.clone(),
        },
        excluded: BTreeSet::from([lost]),
        registered_only: true,
        seed: request.request,
    };
    let space = state.pool_space(pool);
    placement::propose_replacement(&topology(state, owner.incarnation), &wanted, &others)
        .map(|drive| grant(request, drive))
        .map_err(|refusal| match refusal {
            placement::Refusal::NoSpace { .. } => Refusal::NoSpace {
                free_mib: space.free_reach_mib,
                reserve_mib: space.reserve_mib(),
            },
            placement::Refusal::TooFewDomains { in_service, .. } => Refusal::TooFewDomains {
                available: in_service,
                needed: u32::from(band.geometry.n()),
                fits: None,
            },
        })
}

fn grant(request: &ReplacementRequest, drive: DriveId) -> Command {
    let ReplacementRequest {
        volume,
        epoch,
        request,
        band,
        column,
        version,
    } = *request;
    Command::GrantReplacement {
        volume,
        epoch,
        request,
        band,
        column,
        version,
        drive,
    }
}
