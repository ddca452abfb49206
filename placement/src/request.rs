//! What is asked of placement, and what it answers.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use weft_proto::band::{ChunkSize, DriveClass, Geometry};
use weft_proto::id::DriveId;

use crate::survivable::Survivable;
use crate::topology::{DomainLevel, Drive};

/// Which drives a pool's bands may use together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// What the chunks of a band must not share.
    pub level: DomainLevel,
    /// Most shards of a band on one node or box; counts at [`DomainLevel::Drive`], where a node may hold several.
    /// `None` sets no bound: shards are then spread evenly all the same. A bound of m lets one node fail.
    pub shards_per_node_max: Option<u8>,
    /// Classes of drives that may be used.
    pub classes: BTreeSet<DriveClass>,
}

/// A batch of bands of one geometry, for one incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What the volume asks for.
    pub geometry: Geometry,
    /// The narrowest k that will do, with the same m: 1 for new bands of a volume that is in use, `geometry.k` to ask
    /// whether the geometry fits. Never below 1, never above `geometry.k`.
    pub k_min: u8,
    /// Of all chunks.
    pub chunk_size: ChunkSize,
    /// How many bands.
    pub count: u32,
    /// Where they may lie.
    pub policy: Policy,
    /// Drives not to be used, in or out of service: failed, stalled or drained ones.
    pub excluded: BTreeSet<DriveId>,
    /// Use only drives where the incarnation's registration is on record; otherwise also those that have room
    /// for one more registrant.
    pub registered_only: bool,
    /// Drawn by whoever asks. Equal input gives equal output; another seed gives another spread.
    pub seed: u64,
}

impl Request {
    /// Whether `drive` may hold a chunk, its space aside.
    pub(crate) fn allows(&self, drive: &Drive) -> bool {
        let has_registration =
            drive.registered || !self.registered_only && drive.registrants < drive.registrants_max;
        drive.in_service
            && has_registration
            && self.policy.classes.contains(&drive.class)
            && !self.excluded.contains(&drive.id)
    }

    /// [`Request::k_min`] within its range.
    pub(crate) fn k_min(&self) -> u8 {
        self.k_min.clamp(1, self.geometry.k)
    }
}

/// Where one band should lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// As asked, or with a smaller k where domains are scarce. m is never smaller.
    pub geometry: Geometry,
    /// By column, k + m of them.
    pub drives: Vec<DriveId>,
    /// What the band survives, computed from where its shards lie.
    pub survivable: Survivable,
}

/// What would fit where the geometry that was asked for does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WouldFit {
    /// At the same level: with smaller k, or, where that is not enough, with smaller m.
    pub narrower: Option<Geometry>,
    /// At [`DomainLevel::Drive`].
    pub by_drive: Option<Geometry>,
}

impl std::fmt::Display for WouldFit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.narrower, self.by_drive) {
            (None, None) => f.write_str("nothing would fit"),
            (Some(narrower), None) => write!(f, "{narrower} would fit"),
            (None, Some(by_drive)) => write!(f, "{by_drive} with domain=drive would fit"),
            (Some(narrower), Some(by_drive)) => {
                write!(f, "{narrower} would fit, or {by_drive} with domain=drive")
            }
        }
    }
}

/// Why not one band can be placed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There are enough failure domains, but too few of them have a chunk left.
    #[error(
        "no space: {geometry} needs {}, {with_space} of {in_service} have space",
        needs(*geometry, *k_min, *level)
    )]
    NoSpace {
        /// As asked.
        geometry: Geometry,
        /// The narrowest that would have done.
        k_min: u8,
        /// Of the domains counted.
        level: DomainLevel,
        /// Domains with space for a chunk on a drive that may be used.
        with_space: u32,
        /// Domains with a drive that may be used.
        in_service: u32,
    },
    /// There are too few failure domains in service, whatever their space.
    #[error(
        "{geometry} needs {}, {with_space} have space: {would_fit}",
        needs(*geometry, *k_min, *level)
    )]
    TooFewDomains {
        /// As asked.
        geometry: Geometry,
        /// The narrowest that would have done.
        k_min: u8,
        /// Of the domains counted.
        level: DomainLevel,
        /// Domains with space for a chunk on a drive that may be used. At [`DomainLevel::Drive`] with a bound on
        /// the shards of a node, drives beyond the bound do not count.
        with_space: u32,
        /// Domains with a drive that may be used.
        in_service: u32,
        /// For the operator.
        would_fit: WouldFit,
    },
}

/// "6 node domains", or "6 node domains, at the least 3".
fn needs(geometry: Geometry, k_min: u8, level: DomainLevel) -> String {
    let (wanted, least) = (geometry.n(), k_min + geometry.m);
    if least < wanted {
        format!("{wanted} {level} domains, at the least {least}")
    } else {
        format!("{wanted} {level} domains")
    }
}
