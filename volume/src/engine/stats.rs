//! What the engine counts.

use std::cell::{Cell, RefCell};

use super::Core;
use crate::map::MapStats;

/// Figures of one engine since it was opened, and of its volume as of now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Blocks the host wrote, zero blocks included.
    pub host_blocks_written: u64,
    /// Blocks the host read.
    pub host_blocks_read: u64,
    /// Bytes sent to drives, headers and parity included.
    pub drive_bytes_written: u64,
    /// Read commands sent to drives.
    pub drive_reads: u64,
    /// Stripes sent, by data shards: index w.
    pub stripe_width: Vec<u64>,
    /// Stripes sent, by rows of payload: index log2(d) rounded up, 0 for d ≤ 1.
    pub stripe_depth: Vec<u64>,
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
    /// Upper bound of the live blocks.
    pub live_blocks: u64,
    /// Host commands waiting for a stripe.
    pub queued: usize,
    /// Stripes in flight.
    pub stripes_in_flight: usize,
    /// Whether the lease holds.
    pub leased: bool,
    /// The page map.
    pub map: MapStats,
}

/// The counters behind [`Stats`].
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) host_written: Cell<u64>,
    pub(crate) host_read: Cell<u64>,
    pub(crate) drive_bytes: Cell<u64>,
    pub(crate) drive_reads: Cell<u64>,
    width: RefCell<[u64; 17]>,
    depth: RefCell<[u64; 8]>,
    pub(crate) abandoned: Cell<u64>,
    pub(crate) suspected: Cell<u64>,
    pub(crate) mismatches: Cell<u64>,
    pub(crate) repaired: Cell<u64>,
    pub(crate) reconstructed: Cell<u64>,
    pub(crate) compacted: Cell<u64>,
    pub(crate) full: Cell<u64>,
    pub(crate) checkpoints: Cell<u64>,
    pub(crate) bands_granted: Cell<u64>,
    pub(crate) bands_freed: Cell<u64>,
}

impl Counters {
    pub(crate) fn stripe_sent(&self, w: u8, d: u32, _blocks: usize, bytes: u64) {
        if let Some(count) = self.width.borrow_mut().get_mut(usize::from(w)) {
            *count += 1;
        }
        let bucket = d.next_power_of_two().trailing_zeros() as usize;
        if let Some(count) = self.depth.borrow_mut().get_mut(bucket) {
            *count += 1;
        }
        self.drive_bytes.set(self.drive_bytes.get() + bytes);
    }
}

impl Core {
    pub(crate) fn stats(&self) -> Stats {
        let counters = &self.counters;
        let bands = self.bands.borrow();
        let map = self.map.get();
        Stats {
            host_blocks_written: counters.host_written.get(),
            host_blocks_read: counters.host_read.get(),
            drive_bytes_written: counters.drive_bytes.get(),
            drive_reads: counters.drive_reads.get(),
            stripe_width: counters.width.borrow().to_vec(),
            stripe_depth: counters.depth.borrow().to_vec(),
            stripes_abandoned: counters.abandoned.get(),
            drives_suspected: counters.suspected.get(),
            drives_suspect: self.health.suspects(),
            checksum_mismatches: counters.mismatches.get(),
            repaired: counters.repaired.get(),
            reconstructed: counters.reconstructed.get(),
            compacted_blocks: counters.compacted.get(),
            capacity_exceeded: counters.full.get(),
            checkpoints: counters.checkpoints.get(),
            bands_granted: counters.bands_granted.get(),
            bands_freed: counters.bands_freed.get(),
            bands: bands.len(),
            allocated_bytes: bands
                .values()
                .map(|band| band.band.borrow().chunk_size.bytes() * u64::from(band.geometry.n()))
                .sum(),
            live_blocks: map.map_or(0, |map| bands.keys().map(|band| map.references(*band)).sum()),
            queued: self.host.queue.borrow().len(),
            stripes_in_flight: self.host.in_flight.get() + self.internal.in_flight.get(),
            leased: self.is_leased(),
            map: map.map_or_else(MapStats::default, |map| map.stats()),
        }
    }
}
