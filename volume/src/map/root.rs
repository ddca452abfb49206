//! The root: what a volume's owner records with every checkpoint, enough to open the volume from drives alone.
//!
//! This module is the meaning; [`super::root_format`] is the layout, and [`super::root_stripe`] takes it to a stripe and back.

use weft_proto::band::{Band, Geometry};
use weft_proto::id::{ClusterId, Epoch, LayerId, StripeNumber, VolumeId};

use crate::entry::MapEntry;

use super::MapRoot;
use super::block::MapIdentity;

/// What a root says of a band's life. A freed band is not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BandState {
    /// Granted, not known to hold anything.
    Granted,
    /// Appended to.
    Open,
    /// Never appended to again.
    Sealed,
}

/// A band as a root lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootBand {
    /// As granted, with the chunks it had when the root was written.
    pub band: Band,
    /// When the root's changes were frozen.
    pub state: BandState,
    /// Every stripe that starts before this row is in the root's runs: a scan starts here.
    pub append_row: u32,
    /// The highest stripe number in it, by which its age is judged.
    pub stripe_last: StripeNumber,
}

/// Everything a root holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The cluster.
    pub cluster: ClusterId,
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The layer whose map this is.
    pub layer: LayerId,
    /// The layer stack, top first.
    pub layers: Vec<LayerId>,
    /// k and m asked of new bands.
    pub geometry: Geometry,
    /// The epoch that wrote it.
    pub epoch: Epoch,
    /// The version it is published as.
    pub root_version: u64,
    /// No block of this epoch in the root has this counter or a higher one.
    pub counter_next: u64,
    /// No stripe of this epoch in the root has this number or a higher one.
    pub stripe_next: StripeNumber,
    /// H: every stripe of this epoch up to it was complete or completely re-appended.
    pub complete: StripeNumber,
    /// Where earlier epochs ended.
    pub ended: Vec<(Epoch, StripeNumber)>,
    /// The bands.
    pub bands: Vec<RootBand>,
    /// The page map's runs.
    pub map: MapRoot,
}

impl Root {
    /// The identity its map blocks carry.
    #[must_use]
    pub fn identity(&self) -> MapIdentity {
        MapIdentity {
            volume: self.volume,
            layer: self.layer,
        }
    }
}

/// Where the body of a spilled root lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spilled {
    /// The run number the table blocks are written under.
    pub(crate) run: u32,
    /// Of the table blocks, in order.
    pub(crate) places: Vec<MapEntry>,
    /// The bands they lie in, as far as the root knew them.
    pub(crate) bands: Vec<RootBand>,
}
