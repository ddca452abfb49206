//! What an engine tells of itself.

use std::collections::BTreeMap;

use weft_proto::units::BLOCK_BYTES;

use super::Core;
use crate::map::MapStats;
use crate::metrics::Bytes;

/// Figures of one engine since it was opened, and of its volume as of now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes that hosts wrote and got acknowledged.
    pub user_bytes: u64,
    /// Bytes that hosts read.
    pub user_read_bytes: u64,
    /// Bytes sent to drives, in all.
    pub drive_bytes: u64,
    /// Of these: payload of host writes, at their first placement.
    pub drive_user_bytes: u64,
    /// Of these: payload of compaction, repair, recovery, and of stripes that were abandoned.
    pub drive_copy_bytes: u64,
    /// Of these: parity.
    pub drive_parity_bytes: u64,
    /// Of these: shard headers.
    pub drive_header_bytes: u64,
    /// Of these: map blocks and roots.
    pub drive_map_bytes: u64,
    /// Read commands sent to drives.
    pub drive_reads: u64,
    /// Stripes sent, by (w, d).
    pub stripes: BTreeMap<(u8, u32), u64>,
    /// Stripes abandoned because a column failed or stalled.
    pub stripes_abandoned: u64,
    /// Times a drive was passed over.
    pub drives_suspected: u64,
    /// Drives passed over now.
    pub drives_suspect: usize,
    /// Blocks that did not match their checksum.
    pub checksum_mismatches: u64,
    /// Blocks re-appended because of a mismatch.
    pub repaired: u64,
    /// Blocks computed from other columns.
    pub reconstructed: u64,
    /// Bytes of chunks that were rebuilt and installed.
    pub rebuilt_bytes: u64,
    /// Blocks that compaction moved.
    pub compacted_blocks: u64,
    /// Host blocks refused with Capacity Exceeded.
    pub capacity_exceeded: u64,
    /// Checkpoints published.
    pub checkpoints: u64,
    /// Bands granted to this epoch.
    pub bands_granted: u64,
    /// Bands freed by this epoch.
    pub bands_freed: u64,
    /// Bands held now, of all epochs.
    pub bands: usize,
    /// Bytes of the drives that the bands take.
    pub allocated_bytes: u64,
    /// Upper bound of the live bytes, map blocks included, parity and headers not.
    pub live_bytes: u64,
    /// Parts of host commands that wait for a stripe.
    pub queued: usize,
    /// Stripes in flight.
    pub stripes_in_flight: usize,
    /// Whether the lease holds.
    pub leased: bool,
    /// The page map.
    pub map: MapStats,
}

impl Core {
    pub(crate) fn stats(&self) -> Stats {
        let counters = &self.counters;
        let bands = self.bands.borrow();
        let map = self.map.get();
        let kinds = [Bytes::User, Bytes::Copy, Bytes::Parity, Bytes::Header, Bytes::Map];
        Stats {
            user_bytes: counters.user_bytes.get(),
            user_read_bytes: counters.user_read_bytes.get(),
            drive_bytes: kinds.into_iter().map(|kind| counters.bytes(kind)).sum(),
            drive_user_bytes: counters.bytes(Bytes::User),
            drive_copy_bytes: counters.bytes(Bytes::Copy),
            drive_parity_bytes: counters.bytes(Bytes::Parity),
            drive_header_bytes: counters.bytes(Bytes::Header),
            drive_map_bytes: counters.bytes(Bytes::Map),
            drive_reads: counters.drive_reads.get(),
            stripes: counters.stripes(),
            stripes_abandoned: counters.abandoned.get(),
            drives_suspected: counters.suspected.get(),
            drives_suspect: self.health.suspects(),
            checksum_mismatches: counters.mismatches.get(),
            repaired: counters.repaired.get(),
            reconstructed: counters.reconstructed.get(),
            rebuilt_bytes: counters.rebuilt.get(),
            compacted_blocks: counters.compacted.get(),
            capacity_exceeded: counters.full.get(),
            checkpoints: counters.checkpoints.get(),
            bands_granted: counters.bands_granted.get(),
            bands_freed: counters.bands_freed.get(),
            bands: bands.len(),
            allocated_bytes: self.held_bytes(),
            live_bytes: map.map_or(0, |map| {
                bands.keys().map(|band| map.references(*band)).sum::<u64>() * BLOCK_BYTES as u64
            }),
            queued: self.host.queue.borrow().len(),
            stripes_in_flight: self.host.in_flight.get() + self.internal.in_flight.get(),
            leased: self.is_leased(),
            map: map.map_or_else(MapStats::default, |map| map.stats()),
        }
    }
}
