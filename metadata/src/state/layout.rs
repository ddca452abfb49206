//! The band directory: where volumes lie, and which chunks of which drive are taken.
//!
//! Only the voters hold it. A chunk is free, held by exactly one band, or in quarantine: freed while a write of its
//! former writer may still be under way, and kept from reuse until that incarnation is fenced on the drive
//! (design section 3, invariant 3).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use weft_proto::band::{Band, ChunkSize, RootPointer};
use weft_proto::id::{BandId, Epoch, IncarnationId, StripeNumber};

use super::space::DriveSpace;

/// Answers kept per volume, so that a repeated request for bands is recognised. An owner has a few under way.
pub(super) const ANSWERS_KEPT: usize = 32;

/// What a volume's data consists of.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeLayout {
    /// The last published root.
    pub root: Option<RootPointer>,
    /// Counts published roots.
    pub root_version: u64,
    /// Every band granted and not freed.
    pub bands: BTreeMap<BandId, BandRecord>,
    /// Where earlier epochs ended: those that still have bands, and the last one.
    pub ended: Vec<(Epoch, StripeNumber)>,
    /// Requests for bands answered in the current epoch, oldest first.
    pub answered: Vec<(u64, Vec<BandId>)>,
}

/// A band and who wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BandRecord {
    /// As granted, with the chunks as they are now.
    pub band: Band,
    /// The only incarnation that was ever allowed to write to it.
    pub writer: IncarnationId,
    /// Whether every write ever sent to it is known to have completed: its epoch was handed over cleanly.
    pub settled: bool,
}

/// The chunks of one drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveChunks {
    /// The allocator.
    pub space: DriveSpace,
    /// Freed chunks that wait for the fencing of their writer, by offset in MiB.
    pub quarantine: BTreeMap<u32, Quarantined>,
}

/// A freed chunk that must not be reused yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// Of the chunk.
    pub size: ChunkSize,
    /// Whose write may still be under way.
    pub writer: IncarnationId,
}

impl DriveChunks {
    /// Chunks in quarantine, in MiB.
    #[must_use]
    pub fn quarantined_mib(&self) -> u64 {
        self.quarantine
            .values()
            .map(|chunk| u64::from(chunk.size.mib()))
            .sum()
    }

    /// Gives back the chunks that only waited for `writer`.
    pub(super) fn release_quarantine(&mut self, writer: IncarnationId) {
        let due: Vec<(u32, ChunkSize)> = self
            .quarantine
            .iter()
            .filter(|(_, chunk)| chunk.writer == writer)
            .map(|(&offset, chunk)| (offset, chunk.size))
            .collect();
        for (offset, size) in due {
            self.quarantine.remove(&offset);
            self.space.release(offset, size);
        }
    }
}
