//! The space of a pool, and the part of it that host writes never get.
//!
//! A full pool must still be able to compact, take over, checkpoint and rebuild: otherwise it could never be
//! emptied again (design section 4, "Space"). So the reserve is counted in what bands can reach: a pool whose domains are filled
//! unevenly, because one of them was away for a while or is larger, may have free space that no band of k + m columns can use.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use weft_placement::depth_mib;
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
/// The engine's own part is at most one in so many of the capacity, but for the takeovers below. Guessed.
const INTERNAL_SHARE_MAX: u64 = 10;
/// Bands of the smallest chunks that each volume needs, however many volumes there are: one that was open when its owner died, and
/// one for its successor's root. A volume that finds none is not served, not even for reads.
const TAKEOVER_BANDS_PER_VOLUME: u64 = 2;
/// Those take at most one part in so many of the capacity. Guessed.
const TAKEOVER_SHARE_MAX: u64 = 2;

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
    /// Of them, what bands as wide as the pool's reach when it is empty.
    pub reach_mib: u64,
    /// Neither taken nor in quarantine.
    pub free_mib: u64,
    /// Of that, what bands as wide as the pool's reach.
    pub free_reach_mib: u64,
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
        let usable = self.reach_mib.saturating_sub(self.reserve_mib());
        let left = self.free_reach_mib.saturating_sub(self.reserve_mib());
        let two_bands_each = self.internal_reserve_mib / (INTERNAL_BANDS_PER_VOLUME / 2);
        let tight = two_bands_each.max(usable / TIGHT_SHARE);
        usable > 0 && left < if was { tight * 4 / 3 } else { tight }
    }

    /// What hosts could store in an empty pool of this shape, in full stripes of the pool's geometry, in bytes.
    #[must_use]
    pub fn usable_bytes(&self) -> u64 {
        let raw = self.reach_mib.saturating_sub(self.reserve_mib()) << 20;
        raw / u64::from(self.geometry.n()) * u64::from(self.geometry.k)
    }
}

/// MiB of raw capacity that a pool keeps for what its volumes' engines write on their own account. `chunks` are the largest that
/// each volume takes, `reach_mib` is what bands reach of an empty pool.
#[must_use]
pub fn internal_reserve_mib(
    chunks: impl IntoIterator<Item = ChunkSize>,
    geometry: Geometry,
    reach_mib: u64,
) -> u64 {
    let n = u64::from(geometry.n());
    let (mut chunks_mib, mut volumes) = (0, 0);
    for chunk in chunks {
        chunks_mib += u64::from(chunk.mib());
        volumes += 1;
    }
    let wished_mib = chunks_mib * n * INTERNAL_BANDS_PER_VOLUME + reach_mib / SHARE;
    let takeover_mib = volumes * n * TAKEOVER_BANDS_PER_VOLUME * u64::from(ChunkSize::Mib1.mib());
    wished_mib
        .min(reach_mib / INTERNAL_SHARE_MAX)
        .max(takeover_mib.min(reach_mib / TAKEOVER_SHARE_MAX))
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
        // Capacity and what is free of it.
        let mut by_domain: BTreeMap<Domain, (u64, u64)> = BTreeMap::new();
        let mut quarantined_mib = 0;
        for drive in self.map.drives.values() {
            if !self.map.in_service(drive) || !pool.classes.contains(&drive.class) {
                continue;
            }
            let Some(chunks) = self.chunks.get(&drive.id) else {
                continue;
            };
            let domain = by_domain.entry(self.map.domain(drive, pool.domain)).or_default();
            domain.0 += chunks.space.capacity_mib();
            domain.1 += chunks.space.free_mib();
            quarantined_mib += chunks.quarantined_mib();
        }
        let capacities = || by_domain.values().map(|domain| domain.0);
        let free = || by_domain.values().map(|domain| domain.1);
        // Short of domains, bands are narrower.
        let n = pool.geometry.n();
        let width = u8::try_from(by_domain.len()).map_or(n, |domains| domains.min(n));
        let depth_mib_empty = depth_mib(capacities(), width);
        let reach_mib = depth_mib_empty * u64::from(width);
        let chunks = self
            .map
            .volumes
            .values()
            .filter(|volume| volume.pool == pool.id)
            .map(|volume| ChunkSize::for_volume(volume.size_bytes, volume.geometry));
        let internal_reserve_mib = internal_reserve_mib(chunks, pool.geometry, reach_mib);
        // Losing the largest domain d needs room for its chunks on the others: free − free(d) ≥ taken(d), which is
        // free ≥ capacity(d), or as much of it as bands can take. With only n domains there is nowhere to rebuild to and nothing to keep.
        let rebuild_reserve_mib = if by_domain.len() > usize::from(n) {
            capacities().max().unwrap_or(0).min(depth_mib_empty)
        } else {
            0
        };
        PoolSpace {
            capacity_mib: capacities().sum(),
            reach_mib,
            free_mib: free().sum(),
            free_reach_mib: depth_mib(free(), width) * u64::from(width),
            quarantined_mib,
            domains: u32::try_from(by_domain.len()).unwrap_or(u32::MAX),
            rebuild_reserve_mib,
            internal_reserve_mib,
            geometry: pool.geometry,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_volume_of_a_small_pool_can_be_taken_over() {
        let geometry = Geometry { k: 4, m: 2 };
        let reserve = |volumes| internal_reserve_mib(vec![ChunkSize::Mib1; volumes], geometry, 6 * 64);
        assert_eq!(reserve(1), 6 * 4 + 2, "four bands, and one part in 160");
        assert_eq!(reserve(2), 38, "a tenth");
        assert_eq!(reserve(10), 10 * 2 * 6, "two bands each");
        assert_eq!(reserve(100), 6 * 32, "half of it");
    }
}
