//! What can be set of an engine, with the defaults it has otherwise.

use std::time::Duration;

use weft_proto::band::ChunkSize;
use weft_proto::id::ClusterId;
use weft_proto::units::MIB;

use crate::format::header::HeaderKey;
use crate::map::MapSettings;

/// Who the engine works for.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The cluster, in every header.
    pub cluster: ClusterId,
    /// The cluster's key, from the drive labels.
    pub key: HeaderKey,
    /// The volume's name, kept in the root so that drives alone tell what they hold.
    pub name: String,
}

/// Limits and times of one engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Host stripes in flight. Few make stripes wide at depth, many use fast drives better. Guessed.
    pub stripes_in_flight_max: usize,
    /// Stripes in flight of compaction, checkpoints and recovery.
    pub internal_stripes_in_flight_max: usize,
    /// A column that has not answered a write for this long, in which this process ran, is passed over. A guess between the slowest healthy
    /// flush and what a host notices.
    pub stall: Duration,
    /// A read that has not been answered for this long is reconstructed from other columns.
    pub read_stall: Duration,
    /// How long a drive that failed or stalled is left alone before it is probed.
    pub suspect: Duration,
    /// How long the drives' word is good for. A successor serves one lease plus drift after its fence.
    pub lease: Duration,
    /// How often a wait for the lease, a band or a drive looks again.
    pub retry: Duration,
    /// Bytes written to drives between two checkpoints. Bounds what a takeover scans.
    pub log_budget_bytes: u64,
    /// Largest chunk asked for. Volumes start with 1 MiB and grow.
    pub chunk_size_max: ChunkSize,
    /// How much garbage is left lying while nobody needs its space.
    pub garbage_max: GarbageMax,
    /// How long a write waits for compaction to find space in a full pool before it fails with Capacity Exceeded: well
    /// below the 30 s after which a Linux host gives a command up.
    pub space_wait: Duration,
    /// Blocks that compaction has in flight at once.
    pub compaction_blocks: usize,
    /// Page map: cache and merges.
    pub map: MapSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stripes_in_flight_max: 4,
            internal_stripes_in_flight_max: 4,
            stall: Duration::from_millis(300),
            read_stall: Duration::from_millis(300),
            suspect: Duration::from_secs(1),
            lease: Duration::from_secs(1),
            retry: Duration::from_millis(20),
            log_budget_bytes: 128 * MIB,
            chunk_size_max: ChunkSize::Mib64,
            garbage_max: GarbageMax::default(),
            space_wait: Duration::from_secs(15),
            compaction_blocks: 512,
            map: MapSettings::default(),
        }
    }
}

/// Shares of dead blocks in the sealed bands above which compaction starts unasked. The space it wins is nobody's need yet,
/// and the longer a block is left, the likelier it is dead when its band's turn comes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GarbageMax {
    /// While hosts fill bands, and the pool has space: at three quarters hardly anything in a band lives when it is emptied.
    pub busy: f64,
    /// Once hosts have filled none for a while, or the pool is tight, or the bands are very many: what lies there is rebuilt with
    /// the rest when a drive is lost, looks like used space to whoever watches the pool, and every band is a line in every root.
    pub settled: f64,
    /// Once hosts have filled none for a while and the pool is tight: it may be all the space that another volume needs.
    pub wanted: f64,
}

/// Sealed bands beyond which a busy volume keeps no more garbage than any other. A guess: a root of so many has 1 to 2 MB, a
/// hundredth of what is written between two of them, and is far from the longest that can be written.
const BUSY_BANDS_MAX: usize = 1 << 16;

impl GarbageMax {
    /// The share that counts for a volume of so many sealed bands.
    pub(crate) fn now(self, tight: bool, quiet: bool, bands: usize) -> f64 {
        match (tight, quiet) {
            (false, false) if bands <= BUSY_BANDS_MAX => self.busy,
            (false, _) | (true, false) => self.settled,
            (true, true) => self.wanted,
        }
    }

    /// One share at all times.
    #[must_use]
    pub fn always(share: f64) -> Self {
        Self {
            busy: share,
            settled: share,
            wanted: share,
        }
    }
}

impl Default for GarbageMax {
    fn default() -> Self {
        Self {
            busy: 0.75,
            settled: 0.5,
            wanted: 0.15,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_kept_by_busy_volumes_of_not_too_many_bands_and_given_up_where_it_is_wanted() {
        let shares = GarbageMax::default();
        for (tight, quiet, bands, share) in [
            (false, false, 65_536, 0.75),
            (false, false, 65_537, 0.5),
            (false, true, 100, 0.5),
            (true, false, 100, 0.5),
            (true, true, 100, 0.15),
            (true, true, 65_537, 0.15),
        ] {
            let now = shares.now(tight, quiet, bands);
            assert!(
                (now - share).abs() < f64::EPSILON,
                "{now} of {bands} bands, tight {tight}, quiet {quiet}"
            );
        }
    }
}
