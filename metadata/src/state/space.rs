//! The chunk allocator of one drive.
//!
//! The chunk area is cut into slabs of 64 MiB. A slab is free, or one 64 MiB chunk, or carved into chunks of one
//! smaller size. Allocation is first fit, so it is deterministic and keeps the end of the drive whole for as long as
//! possible. A last slab shorter than 64 MiB only takes small chunks.
//!
//! Offsets are in MiB from the start of the drive's namespace, as in [`ChunkAddress`].
//!
//! [`ChunkAddress`]: weft_proto::band::ChunkAddress

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use weft_proto::band::ChunkSize;

/// MiB of a slab: the largest chunk.
const SLAB_MIB: u32 = 64;

/// Which chunks of a drive are taken. Chunks in quarantine are taken too; who waits for what is kept elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveSpace {
    start_mib: u32,
    end_mib: u32,
    /// By slab index; an absent slab is free.
    slabs: BTreeMap<u32, Slab>,
    /// Sum of the chunks taken.
    allocated_mib: u64,
}

/// A slab in use. Bit i of `taken` is its i-th chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Slab {
    size: ChunkSize,
    taken: u64,
}

impl DriveSpace {
    /// An empty chunk area `start_mib..end_mib`.
    #[must_use]
    pub fn new(start_mib: u32, end_mib: u32) -> Self {
        Self {
            start_mib,
            end_mib: end_mib.max(start_mib),
            slabs: BTreeMap::new(),
            allocated_mib: 0,
        }
    }

    /// Size of the chunk area.
    #[must_use]
    pub fn capacity_mib(&self) -> u64 {
        u64::from(self.end_mib - self.start_mib)
    }

    /// Taken chunks, quarantined ones included.
    #[must_use]
    pub fn allocated_mib(&self) -> u64 {
        self.allocated_mib
    }

    /// What is not taken. Not all of it fits every size.
    #[must_use]
    pub fn free_mib(&self) -> u64 {
        self.capacity_mib() - self.allocated_mib
    }

    /// How many chunks of `size` can still be allocated.
    #[must_use]
    pub fn available(&self, size: ChunkSize) -> u64 {
        let in_carved: u64 = self
            .slabs
            .iter()
            .filter(|(_, slab)| slab.size == size)
            .map(|(&index, slab)| u64::from(self.slots(index, size) - slab.taken.count_ones()))
            .sum();
        let in_free: u64 = (0..self.slab_count())
            .filter(|index| !self.slabs.contains_key(index))
            .map(|index| u64::from(self.slots(index, size)))
            .sum();
        in_carved + in_free
    }

    /// Takes the first chunk of `size`; answers its offset, or `None` if none is left.
    pub fn allocate(&mut self, size: ChunkSize) -> Option<u32> {
        let index = self
            .slabs
            .iter()
            .find(|(index, slab)| slab.size == size && slab.taken.count_ones() < self.slots(**index, size))
            .map(|(&index, _)| index)
            .or_else(|| {
                (0..self.slab_count())
                    .find(|index| !self.slabs.contains_key(index) && self.slots(*index, size) > 0)
            })?;
        let slab = self.slabs.entry(index).or_insert(Slab { size, taken: 0 });
        let slot = slab.taken.trailing_ones();
        slab.taken |= 1 << slot;
        self.allocated_mib += u64::from(size.mib());
        Some(self.start_mib + index * SLAB_MIB + slot * size.mib())
    }

    /// Whether the chunk at `offset_mib` is taken, with this size.
    #[must_use]
    pub fn is_allocated(&self, offset_mib: u32, size: ChunkSize) -> bool {
        self.locate(offset_mib, size).is_some_and(|(index, slot)| {
            self.slabs
                .get(&index)
                .is_some_and(|slab| slab.size == size && slab.taken & (1 << slot) != 0)
        })
    }

    /// Gives a chunk back. `false` if it was not taken: a violation by the caller, and nothing is changed.
    pub fn release(&mut self, offset_mib: u32, size: ChunkSize) -> bool {
        if !self.is_allocated(offset_mib, size) {
            return false;
        }
        let Some((index, slot)) = self.locate(offset_mib, size) else {
            return false;
        };
        if let Some(slab) = self.slabs.get_mut(&index) {
            slab.taken &= !(1 << slot);
            if slab.taken == 0 {
                self.slabs.remove(&index);
            }
        }
        self.allocated_mib -= u64::from(size.mib());
        true
    }

    /// What `allocated_mib` should be; for the invariant.
    #[must_use]
    pub(super) fn counted_mib(&self) -> u64 {
        self.slabs
            .values()
            .map(|slab| u64::from(slab.taken.count_ones()) * u64::from(slab.size.mib()))
            .sum()
    }

    fn locate(&self, offset_mib: u32, size: ChunkSize) -> Option<(u32, u32)> {
        let relative = offset_mib.checked_sub(self.start_mib)?;
        let (index, within) = (relative / SLAB_MIB, relative % SLAB_MIB);
        (within % size.mib() == 0 && within / size.mib() < self.slots(index, size))
            .then(|| (index, within / size.mib()))
    }

    fn slab_count(&self) -> u32 {
        (self.end_mib - self.start_mib).div_ceil(SLAB_MIB)
    }

    /// Chunks of `size` that slab `index` holds when it is carved for them.
    fn slots(&self, index: u32, size: ChunkSize) -> u32 {
        let begin = index.saturating_mul(SLAB_MIB);
        let length = (self.end_mib - self.start_mib)
            .saturating_sub(begin)
            .min(SLAB_MIB);
        length / size.mib()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_come_first_fit_and_never_cover_the_label() {
        let mut space = DriveSpace::new(4, 4 + 128);
        assert_eq!(space.allocate(ChunkSize::Mib1), Some(4));
        assert_eq!(space.allocate(ChunkSize::Mib1), Some(5));
        assert_eq!(
            space.allocate(ChunkSize::Mib64),
            Some(68),
            "the first slab is carved"
        );
        assert_eq!(
            space.allocate(ChunkSize::Mib8),
            None,
            "one slab is carved, one taken"
        );
        assert!(space.release(4, ChunkSize::Mib1));
        assert!(!space.release(4, ChunkSize::Mib1), "a chunk is given back once");
        assert_eq!(space.allocate(ChunkSize::Mib1), Some(4));
    }

    #[test]
    fn an_emptied_slab_is_whole_again() {
        let mut space = DriveSpace::new(1, 65);
        let taken: Vec<u32> = (0..8).map(|_| space.allocate(ChunkSize::Mib8).unwrap()).collect();
        assert_eq!(space.free_mib(), 0);
        for offset in taken {
            assert!(space.release(offset, ChunkSize::Mib8));
        }
        assert_eq!(space.allocate(ChunkSize::Mib64), Some(1));
    }

    #[test]
    fn a_short_last_slab_takes_small_chunks_only() {
        let mut space = DriveSpace::new(1, 1 + 20);
        assert_eq!(space.available(ChunkSize::Mib64), 0);
        assert_eq!(space.available(ChunkSize::Mib8), 2);
        assert_eq!(space.allocate(ChunkSize::Mib64), None);
        assert_eq!(space.allocate(ChunkSize::Mib8), Some(1));
        assert_eq!(space.allocate(ChunkSize::Mib8), Some(9));
        assert_eq!(space.allocate(ChunkSize::Mib8), None);
        assert!(!space.release(17, ChunkSize::Mib8), "past the end");
        assert!(!space.release(2, ChunkSize::Mib8), "not on its boundary");
    }

    #[test]
    fn counting_agrees_with_the_slabs() {
        let mut space = DriveSpace::new(1, 300);
        for size in [
            ChunkSize::Mib1,
            ChunkSize::Mib8,
            ChunkSize::Mib64,
            ChunkSize::Mib1,
        ] {
            space.allocate(size).unwrap();
        }
        assert_eq!(space.allocated_mib(), 74);
        assert_eq!(space.counted_mib(), 74);
    }
}
