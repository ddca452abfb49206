//! From an owner's wish to rebuild a column to the command that grants a fresh chunk for it.

use std::collections::BTreeSet;

use weft_placement::{self as placement, Policy};
use weft_proto::id::DriveId;

use super::{asking, topology};
use crate::state::command::ReplacementRequest;
use crate::state::{ClusterState, Command, Refusal};

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
    let request = *request;
    Command::GrantReplacement { request, drive }
}
