//! The space of a pool, and the part of it that host writes never get.
//!
//! A full pool must still be able to compact, take over, checkpoint and rebuild: otherwise it could never be
//! emptied again (design section 4, "Space").

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use weft_proto::band::{ChunkSize, Geometry};

use super::ClusterState;
use super::map::{Domain, Pool};

/// Bands per volume kept for the engine's own writes, of the largest chunks that it takes. Guessed: two for what lives in bands that
/// were emptied and are not freed yet, one open, and one that was open at a takeover in the meantime.
const INTERNAL_BANDS_PER_VOLUME: u64 = 4;
/// Of the capacity, one part in so many is kept besides. A merge of all runs writes a page map anew, 11 to 15 bytes for each block
/// of 4 KiB, before the old one can be freed: one part in 273 at most. The rest is for what lives in the third to fifth band that
/// a volume of many bands empties before any is freed.
const SHARE: u64 = 160;
/// The engine's own part is at most one in so many of the capacity. Guessed.
const INTERNAL_SHARE_MAX: u64 = 10;

/// A pool with less than one part in so many left to hosts is tight, or with less than two bands for each volume: with one, whether
/// it was told before hosts were refused hung on how sizes divide. Early enough for idle volumes to give up their garbage
/// before a busy one is refused; not earlier, because what is kept free costs as much as if it were full: at 85 % full, each
/// further percent makes compaction a tenth dearer.
const TIGHT_SHARE: u64 = 128;

/// How full a pool is: over its drives in service, in MiB of raw capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSpace {
    /// Chunk areas.
    pub capacity_mib: u64,
    /// Neither taken nor in quarantine.
    pub free_mib: u64,
    /// In quarantine.
    pub quarantined_mib: u64,
    /// Distinct failure domains.
    pub domains: u32,
    /// Kept so that the largest failure domain can be rebuilt on the others.
    pub rebuild_reserve_mib: u64,
    /// Kept for compaction, takeover, checkpoints and TRIM records.
    pub internal_reserve_mib: u64,
    /// The pool's default, for [`PoolSpace::usable_bytes`].
    pub geometry: Geometry,
}

impl PoolSpace {
    /// What host writes never get.
    #[must_use]
    pub fn reserve_mib(&self) -> u64 {
        self.rebuild_reserve_mib + self.internal_reserve_mib
    }

    /// Whether hosts have so little left that garbage has to become space. `was` is the last answer: it changes with
    /// hysteresis.
    #[must_use]
    pub fn is_tight(&self, was: bool) -> bool {
        let usable = self.capacity_mib.saturating_sub(self.reserve_mib());
        let left = self.free_mib.saturating_sub(self.reserve_mib());
        let two_bands_each = self.internal_reserve_mib / (INTERNAL_BANDS_PER_VOLUME / 2);
        let tight = two_bands_each.max(usable / TIGHT_SHARE);
        usable > 0 && left < if was { tight * 4 / 3 } else { tight }
    }

    /// What hosts could store in an empty pool of this shape, in full stripes of the pool's geometry, in bytes.
    #[must_use]
    pub fn usable_bytes(&self) -> u64 {
        let raw = self.capacity_mib.saturating_sub(self.reserve_mib()) << 20;
        raw / u64::from(self.geometry.n()) * u64::from(self.geometry.k)
    }
}

/// MiB of raw capacity that a pool keeps for what its volumes' engines write on their own account. `chunks` are the largest that
/// each volume takes.
#[must_use]
pub fn internal_reserve_mib(
    chunks: impl IntoIterator<Item = ChunkSize>,
    geometry: Geometry,
    capacity_mib: u64,
) -> u64 {
    let chunks_mib: u64 = chunks.into_iter().map(|chunk| u64::from(chunk.mib())).sum();
    let wished_mib = chunks_mib * u64::from(geometry.n()) * INTERNAL_BANDS_PER_VOLUME;
    (wished_mib + capacity_mib / SHARE).min(capacity_mib / INTERNAL_SHARE_MAX)
}

impl ClusterState {
    /// Brings every pool's `tight` up to date.
    pub(super) fn note_tightness(&mut self) {
        let changed: Vec<_> = self
            .map
            .pools
            .values()
            .filter_map(|pool| {
                let tight = self.pool_space(pool).is_tight(pool.tight);
                (tight != pool.tight).then_some((pool.id, tight))
            })
            .collect();
        for (id, tight) in changed {
            if let Some(pool) = self.map.pools.get_mut(&id) {
                pool.tight = tight;
            }
            self.map_changed();
        }
    }

    /// The pool's space now.
    #[must_use]
    pub fn pool_space(&self, pool: &Pool) -> PoolSpace {
        let mut capacity_by_domain: BTreeMap<Domain, u64> = BTreeMap::new();
        let (mut free_mib, mut quarantined_mib) = (0, 0);
        for drive in self.map.drives.values() {
            if !self.map.in_service(drive) || !pool.classes.contains(&drive.class) {
                continue;
            }
            let Some(chunks) = self.chunks.get(&drive.id) else {
                continue;
            };
            *capacity_by_domain
                .entry(self.map.domain(drive, pool.domain))
                .or_default() += chunks.space.capacity_mib();
            free_mib += chunks.space.free_mib();
            quarantined_mib += chunks.quarantined_mib();
        }
        let capacity_mib: u64 = capacity_by_domain.values().sum();
        let chunks = self
            .map
            .volumes
            .values()
            .filter(|volume| volume.pool == pool.id)
            .map(|volume| ChunkSize::for_volume(volume.size_bytes, volume.geometry));
        let n = u64::from(pool.geometry.n());
        let internal_reserve_mib = internal_reserve_mib(chunks, pool.geometry, capacity_mib);
        // Losing the largest domain d needs room for its chunks on the others: free − free(d) ≥ taken(d), which is
        // free ≥ capacity(d). With only n domains there is nowhere to rebuild to and nothing to keep.
        let rebuild_reserve_mib = if capacity_by_domain.len() as u64 > n {
            capacity_by_domain.values().copied().max().unwrap_or(0)
        } else {
            0
        };
        PoolSpace {
            capacity_mib,
            free_mib,
            quarantined_mib,
            domains: u32::try_from(capacity_by_domain.len()).unwrap_or(u32::MAX),
            rebuild_reserve_mib,
            internal_reserve_mib,
            geometry: pool.geometry,
        }
    }
}
