//! The addresses of the page map's own blocks.
//!
//! A map block is an ordinary block of the volume with an LBA above every host LBA, so the engine writes,
//! checks, copies and compacts it like any other. The LBA says which block of which run it is and stays the
//! same when the block moves:
//!
//! ```text
//! bit  63     62…32        31…28    27…0
//!      1      run number   level    position within the level
//! ```
//!
//! Level 0 is a leaf, levels 1 … 14 are index blocks, level 15 is a table block of a spilled root. Run numbers are
//! never reused within a layer.

use weft_proto::units::Lba;

/// Host LBAs lie below this: 2^62 blocks.
pub const HOST_LBA_END: Lba = Lba(1 << 62);

/// The payload blocks of a root's own stripe carry LBAs from here on; the page map never refers to them.
pub const ROOT_LBA_START: Lba = HOST_LBA_END;

/// The page map's blocks carry LBAs from here on.
pub const MAP_LBA_START: Lba = Lba(1 << 63);

/// Level of the table blocks of a spilled root.
pub(crate) const TABLE_LEVEL: u8 = 15;
/// Highest level of an index block.
pub(crate) const INDEX_LEVEL_MAX: u8 = 14;
/// Blocks a level can have.
pub(crate) const POSITIONS: u32 = 1 << 28;
/// Run numbers there are.
pub(crate) const RUNS: u32 = 1 << 31;

/// Whether `lba` is a block of the page map.
#[must_use]
pub fn is_map_lba(lba: Lba) -> bool {
    lba >= MAP_LBA_START
}

/// Which block of which run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PageId {
    /// Below [`RUNS`].
    pub(crate) run: u32,
    /// 0 for a leaf.
    pub(crate) level: u8,
    /// Below [`POSITIONS`].
    pub(crate) position: u32,
}

impl PageId {
    /// The LBA the block is written under.
    pub(crate) fn lba(self) -> Lba {
        debug_assert!(self.run < RUNS && self.level <= TABLE_LEVEL && self.position < POSITIONS);
        Lba(MAP_LBA_START.0
            | u64::from(self.run) << 32
            | u64::from(self.level) << 28
            | u64::from(self.position))
    }

    /// `None` when `lba` is not a map block's.
    pub(crate) fn from_lba(lba: Lba) -> Option<Self> {
        is_map_lba(lba).then_some(Self {
            run: (lba.0 >> 32) as u32 & (RUNS - 1),
            level: (lba.0 >> 28 & 0xF) as u8,
            position: lba.0 as u32 & (POSITIONS - 1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_keeps_its_identity_through_its_lba() {
        let id = PageId {
            run: 0x1234_5678,
            level: 2,
            position: 0x0ABC_DEF0,
        };
        assert_eq!(id.lba(), Lba(0x9234_5678_2ABC_DEF0));
        assert_eq!(PageId::from_lba(id.lba()), Some(id));
        let last = PageId {
            run: RUNS - 1,
            level: TABLE_LEVEL,
            position: POSITIONS - 1,
        };
        assert_eq!(last.lba(), Lba(u64::MAX));
        assert_eq!(PageId::from_lba(last.lba()), Some(last));
    }

    #[test]
    fn host_and_root_blocks_are_not_map_blocks() {
        assert_eq!(PageId::from_lba(Lba(0)), None);
        assert_eq!(PageId::from_lba(ROOT_LBA_START), None);
        assert_eq!(PageId::from_lba(Lba(MAP_LBA_START.0 - 1)), None);
    }
}
