//! Units. Bytes, blocks and counts are not interchangeable.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a row, of a page-map block and of a stripe header: the fabric's own block, whatever the logical
/// block size of a drive or of a presented volume.
pub const BLOCK_BYTES: usize = 4096;

/// One mebibyte, the unit in which chunks are placed on drives.
pub const MIB: u64 = 1 << 20;

/// A logical block address. Whose logical block size applies is said where it is used: a device's own, or
/// [`BLOCK_BYTES`] inside the volume engine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lba(pub u64);

impl fmt::Debug for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LBA {:#x}", self.0)
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A range of logical blocks. May be empty; may lie outside a device until it has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LbaRange {
    /// First block.
    pub start: Lba,
    /// Number of blocks.
    pub count: u64,
}

impl LbaRange {
    /// The block after the last one, or `None` past 2^64.
    #[must_use]
    pub fn end(self) -> Option<Lba> {
        self.start.0.checked_add(self.count).map(Lba)
    }

    /// Whether the whole range lies within the first `blocks` blocks.
    #[must_use]
    pub fn is_within(self, blocks: u64) -> bool {
        self.end().is_some_and(|end| end.0 <= blocks)
    }
}

/// A count of logical blocks: one-based, never zero.
///
/// The wire carries NLB zero-based. [`BlockCount::from_nlb_z`] is the only place the `+ 1` is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockCount(u32);

impl BlockCount {
    /// From the zero-based Number of Logical Blocks of an NVM command (NVM Command Set, "Read command").
    #[must_use]
    pub fn from_nlb_z(nlb_z: u16) -> Self {
        Self(u32::from(nlb_z) + 1)
    }

    /// `None` for zero and for more than an NVM command can carry (65536).
    #[must_use]
    pub fn new(count: u32) -> Option<Self> {
        (1..=1 << 16).contains(&count).then_some(Self(count))
    }

    /// One-based.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }

    /// As the wire carries it.
    #[must_use]
    pub fn to_nlb_z(self) -> u16 {
        u16::try_from(self.0 - 1).expect("a BlockCount is at most 65536")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zero_based_count_converts_once_each_way() {
        assert_eq!(BlockCount::from_nlb_z(0).get(), 1);
        assert_eq!(BlockCount::from_nlb_z(u16::MAX).get(), 65536);
        assert_eq!(BlockCount::from_nlb_z(u16::MAX).to_nlb_z(), u16::MAX);
        assert_eq!(BlockCount::new(0), None);
        assert_eq!(BlockCount::new(65537), None);
    }

    #[test]
    fn a_range_that_wraps_is_outside_of_everything() {
        let range = LbaRange {
            start: Lba(u64::MAX),
            count: 2,
        };
        assert_eq!(range.end(), None);
        assert!(!range.is_within(u64::MAX));
    }
}
