//! The band directory: where volumes lie, and which chunks of which drive are taken.
//!
//! Only the voters hold it. A chunk is free, held by exactly one band, granted to one attempt of a rebuild, or in quarantine:
//! freed while a write of its former writer may still be under way, and kept from reuse until that incarnation is fenced on
//! the drive (design section 3, invariant 3).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use weft_proto::band::{Band, ChunkAddress, ChunkSize, Replacement, RootPointer};
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
    /// Fresh chunks granted to rebuilds of the current epoch and not installed yet; at most one for each column.
    #[serde(default)]
    pub replacements: Vec<GrantedReplacement>,
}

/// A fresh chunk that an attempt to rebuild a column may write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantedReplacement {
    /// As granted.
    pub replacement: Replacement,
    /// Of its chunk.
    pub size: ChunkSize,
    /// The only incarnation that was ever allowed to write to it.
    pub writer: IncarnationId,
}

/// A band and who wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BandRecord {
    /// As granted, with the chunks as they are now.
    pub band: Band,
    /// The only incarnation that was ever allowed to write to it, but for replaced columns.
    pub writer: IncarnationId,
    /// Whether every write ever sent to it is known to have completed, but for those to `unsettled`: its writer has said so.
    pub settled: bool,
    /// Columns that a write may still reach although the writer has settled the others.
    #[serde(default)]
    pub unsettled: BTreeSet<u8>,
    /// Columns that a rebuild has replaced.
    #[serde(default)]
    pub replaced: BTreeMap<u8, Replaced>,
}

/// The last installation of a column's chunk. Every write ever sent to it had completed by then: an attempt that cannot say so is
/// not installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaced {
    /// The only incarnation that was ever allowed to write to the chunk.
    pub writer: IncarnationId,
    /// What was installed, by which a repeated command is known.
    pub installed: Replacement,
}

impl BandRecord {
    /// Who may have a write to `column`'s chunk under way: `None` if every one is known to have completed.
    pub(super) fn unsettled_writer(&self, column: u8) -> Option<IncarnationId> {
        let completed =
            self.settled && !self.unsettled.contains(&column) || self.replaced.contains_key(&column);
        (!completed).then_some(self.writer)
    }

    /// The only incarnation that was ever allowed to write to `column`'s chunk.
    pub(super) fn writer_of(&self, column: u8) -> IncarnationId {
        self.replaced
            .get(&column)
            .map_or(self.writer, |replaced| replaced.writer)
    }
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

impl VolumeLayout {
    /// The owner of `epoch` has stopped: of all that was ever sent to the epoch's bands, only what went to `but` may still be
    /// under way.
    pub(super) fn settle_epoch(&mut self, epoch: Epoch, but: &[ChunkAddress]) {
        for record in self
            .bands
            .values_mut()
            .filter(|record| record.band.epoch == epoch)
        {
            record.settled = true;
            record.unsettled = (0u8..)
                .zip(&record.band.columns)
                .filter(|(_, chunk)| but.contains(chunk))
                .map(|(column, _)| column)
                .collect();
        }
    }
}
