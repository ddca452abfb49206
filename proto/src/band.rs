//! Where a volume's bytes lie: what metadata grants and the volume engine writes.
//!
//! These are the nouns `metadata` and `volume` share, so that neither depends on the other. Formats on the
//! wire and on drives are declared where they are written; the serde derives serve the Raft log and the
//! control services.

use serde::{Deserialize, Serialize};

use crate::id::{BandId, DriveId, Epoch, LayerId, StripeNumber, VolumeId};
use crate::units::{BLOCK_BYTES, MIB};

/// Most data shards of a stripe.
pub const DATA_SHARDS_MAX: u8 = 16;
/// Most parity shards of a stripe.
pub const PARITY_SHARDS_MAX: u8 = 4;

/// k data and m parity shards. k and m are per band.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Geometry {
    /// Data shards of a full stripe, 1 …= [`DATA_SHARDS_MAX`].
    pub k: u8,
    /// Parity shards of every stripe, 1 …= [`PARITY_SHARDS_MAX`].
    pub m: u8,
}

impl Geometry {
    /// `None` outside of the supported range.
    #[must_use]
    pub fn new(k: u8, m: u8) -> Option<Self> {
        ((1..=DATA_SHARDS_MAX).contains(&k) && (1..=PARITY_SHARDS_MAX).contains(&m)).then_some(Self { k, m })
    }

    /// Columns of a band: k + m.
    #[must_use]
    pub fn n(self) -> u8 {
        self.k + self.m
    }
}

impl std::fmt::Display for Geometry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}+{}", self.k, self.m)
    }
}

impl std::fmt::Debug for Geometry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// The size of a chunk. Small ones are carved from a 64 MiB one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ChunkSize {
    /// 1 MiB: 256 rows.
    Mib1,
    /// 8 MiB: 2048 rows.
    Mib8,
    /// 64 MiB: 16384 rows.
    Mib64,
}

impl ChunkSize {
    /// In MiB, the unit of placement on a drive.
    #[must_use]
    pub fn mib(self) -> u32 {
        match self {
            Self::Mib1 => 1,
            Self::Mib8 => 8,
            Self::Mib64 => 64,
        }
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.mib()) * MIB
    }

    /// The largest chunks that a volume of `size_bytes` takes: of such a size that it fills 64 bands or more. The few bands that
    /// are always open, asked for ahead or just emptied are then a small part of it, and among many bands there are
    /// some with much garbage.
    #[must_use]
    pub fn for_volume(size_bytes: u64, geometry: Geometry) -> Self {
        let share = size_bytes / u64::from(geometry.k.max(1)) / 64;
        [Self::Mib64, Self::Mib8]
            .into_iter()
            .find(|size| share >= size.bytes())
            .unwrap_or(Self::Mib1)
    }

    /// In rows of [`BLOCK_BYTES`].
    #[must_use]
    pub fn rows(self) -> u32 {
        self.mib() * (MIB as u32 / BLOCK_BYTES as u32)
    }
}

/// What a drive is made of, as far as placement and the shape of writes care. On its label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveClass {
    /// Storage-class memory or similar: narrow stripes.
    Scm,
    /// Triple-level cell flash: the default.
    Tlc,
    /// Quad-level cell flash: large and sequential.
    Qlc,
}

impl std::fmt::Display for DriveClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Scm => "scm",
            Self::Tlc => "tlc",
            Self::Qlc => "qlc",
        })
    }
}

/// One column of a band: a chunk on a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkAddress {
    /// The drive.
    pub drive: DriveId,
    /// Offset of the chunk from the start of the drive's namespace, in MiB. Never 0: the label is there.
    pub offset_mib: u32,
}

impl ChunkAddress {
    /// Offset of a row in bytes from the start of the drive's namespace.
    #[must_use]
    pub fn row_byte_offset(self, row: u32) -> u64 {
        u64::from(self.offset_mib) * MIB + u64::from(row) * BLOCK_BYTES as u64
    }
}

/// A band as granted: n chunks of one size on n drives, which one epoch of one volume may append to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Band {
    /// Unique in the cluster.
    pub id: BandId,
    /// Who it was granted to.
    pub volume: VolumeId,
    /// The layer its blocks belong to.
    pub layer: LayerId,
    /// The only epoch that ever appends to it.
    pub epoch: Epoch,
    /// k and m of this band; may be narrower than the volume's where domains were scarce.
    pub geometry: Geometry,
    /// Of all its chunks.
    pub chunk_size: ChunkSize,
    /// Writes in flight span at most this many rows, so that a recovery scan knows how far to probe.
    pub window_rows: u32,
    /// Counts replaced chunks: a rebuild installs a chunk by compare-and-swap on it.
    pub version: u64,
    /// By column, n of them. (band, row, column) keeps its meaning when a chunk is replaced.
    pub columns: Vec<ChunkAddress>,
}

/// A fresh chunk for one attempt to rebuild one column of a band: granted, written, and then installed in the column's place by
/// compare-and-swap on the band's version, or never used again by its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Replacement {
    /// Drawn by whoever asked; names the attempt.
    pub request: u64,
    /// The band.
    pub band: BandId,
    /// Which of its columns.
    pub column: u8,
    /// The band's version that it replaces a chunk of.
    pub version: u64,
    /// Where the column shall lie.
    pub chunk: ChunkAddress,
}

/// Rows in flight per band where the grant says nothing else (design section 4).
pub const WINDOW_ROWS_DEFAULT: u32 = 256;

/// Where the stripe of a page-map root lies. Enough to read it degraded with nothing else known but the band.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootPointer {
    /// The band.
    pub band: BandId,
    /// First row of the stripe (its header row).
    pub row: u32,
    /// Column of its shard 0.
    pub start: u8,
    /// Data shards.
    pub w: u8,
    /// Payload blocks per shard.
    pub d: u16,
    /// The stripe's number, checked against its header.
    pub stripe: StripeNumber,
}

/// A checkpoint that the owner asks Raft to record, by compare-and-swap under (volume, epoch).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootUpdate {
    /// Whose root.
    pub volume: VolumeId,
    /// The owner's epoch; refused when stale.
    pub epoch: Epoch,
    /// The root version that this one replaces; refused unless it is current.
    pub expected_version: u64,
    /// The new root.
    pub root: RootPointer,
    /// Bands that no block of the new root refers to: Raft frees them with this command.
    pub freed: Vec<BandId>,
    /// Chunks of these that a write of unknown outcome may still reach: not to be granted again before the owner's
    /// incarnation has been fenced there.
    pub unsettled: Vec<ChunkAddress>,
}

/// What Raft answers to the grant of a new epoch: everything the new owner needs, as of one log index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochGrant {
    /// The volume.
    pub volume: VolumeId,
    /// The layer that is written.
    pub layer: LayerId,
    /// The new epoch.
    pub epoch: Epoch,
    /// The last epoch that served, which is to be recovered; `None` for a volume never opened, and after a
    /// clean hand-over.
    pub recover: Option<Epoch>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Geometry that the volume asks for.
    pub geometry: Geometry,
    /// Counts published roots.
    pub root_version: u64,
    /// The last published root.
    pub root: Option<RootPointer>,
    /// Every band granted and not freed, of the recovered epoch and of those that ended before it. Bands of takeovers that
    /// were never finished are not listed: nothing of them counts.
    pub bands: Vec<Band>,
    /// Where each earlier epoch ended: nothing of it above this stripe number is valid. An epoch that was handed over
    /// cleanly ends at its last stripe.
    pub ended: Vec<(Epoch, StripeNumber)>,
}

impl EpochGrant {
    /// Of the first epoch of a volume that was never opened.
    #[must_use]
    pub fn first(volume: VolumeId, size_bytes: u64, geometry: Geometry) -> Self {
        Self {
            volume,
            layer: LayerId(1),
            epoch: Epoch(1),
            recover: None,
            size_bytes,
            geometry,
            root_version: 0,
            root: None,
            bands: Vec::new(),
            ended: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_sizes_agree_in_every_unit() {
        for (size, rows) in [
            (ChunkSize::Mib1, 256),
            (ChunkSize::Mib8, 2048),
            (ChunkSize::Mib64, 16384),
        ] {
            assert_eq!(size.rows(), rows);
            assert_eq!(size.bytes(), u64::from(rows) * 4096);
        }
    }

    #[test]
    fn a_geometry_has_data_and_parity() {
        assert_eq!(Geometry::new(4, 2).map(Geometry::n), Some(6));
        for (k, m) in [(0, 2), (17, 2), (4, 0), (4, 5)] {
            assert_eq!(Geometry::new(k, m), None);
        }
    }
}
