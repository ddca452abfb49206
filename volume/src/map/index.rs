//! The layout of an index block: its children, in ascending order of their first LBAs. `docs/format/checkpoint.md` has the byte tables.

use bytes::Bytes;
use weft_proto::id::{BandId, Epoch, Sequence};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::entry::{ColumnSet, MapEntry};

use super::address::PageId;
use super::block::{FormatError, MapIdentity, PAGE_BODY_BYTES, PAGE_HEADER_BYTES, seal};

/// Children of a full index block.
pub(crate) const CHILDREN_PER_PAGE: usize = PAGE_BODY_BYTES / size_of::<Child>();
const _: () = assert!(CHILDREN_PER_PAGE == 89);

/// A map block and where it lies: of an index block, of the table of moved blocks, or a run's top in a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Child {
    /// First LBA below it; its own LBA in the table of moved blocks.
    lba: U64,
    /// Of the sequence.
    epoch: U64,
    /// Of the sequence.
    counter: U64,
    band: U64,
    crc: U32,
    row: U16,
    column: u8,
    start: u8,
    /// Data shards of the stripe, at least 1.
    w: u8,
    rsvd41: u8,
    /// Columns that the stripe passed over, as a set of 24 bits.
    skipped: [u8; 3],
}

const _: () = assert!(size_of::<Child>() == 45);
const _: () = assert!(std::mem::offset_of!(Child, band) == 24);
const _: () = assert!(std::mem::offset_of!(Child, w) == 40);

impl Child {
    pub(crate) fn new(lba: u64, place: MapEntry) -> Self {
        Self {
            lba: lba.into(),
            epoch: place.sequence.epoch.0.into(),
            counter: place.sequence.counter.into(),
            band: place.band.0.into(),
            crc: place.crc.into(),
            row: u16::try_from(place.row)
                .expect("a chunk has at most 16384 rows")
                .into(),
            column: place.column,
            start: place.start,
            w: place.w,
            rsvd41: 0,
            skipped: skipped_bytes(place.skipped),
        }
    }

    pub(crate) fn lba(&self) -> u64 {
        self.lba.get()
    }

    /// Where it lies; `None` if that is nowhere.
    pub(crate) fn place(&self) -> Option<MapEntry> {
        (self.w > 0).then(|| MapEntry {
            band: BandId(self.band.get()),
            row: u32::from(self.row.get()),
            column: self.column,
            start: self.start,
            w: self.w,
            skipped: skipped_columns(self.skipped),
            sequence: Sequence {
                epoch: Epoch(self.epoch.get()),
                counter: self.counter.get(),
            },
            crc: self.crc.get(),
        })
    }
}

fn skipped_bytes(skipped: ColumnSet) -> [u8; 3] {
    debug_assert!(skipped.0 >> 24 == 0, "a band has at most 20 columns");
    let [first, second, third, _] = skipped.0.to_le_bytes();
    [first, second, third]
}

fn skipped_columns([first, second, third]: [u8; 3]) -> ColumnSet {
    ColumnSet(u32::from_le_bytes([first, second, third, 0]))
}

/// An index block that has been checked.
#[derive(Clone, Debug)]
pub(crate) struct Index {
    bytes: Bytes,
    count: usize,
}

impl Index {
    pub(super) fn read(bytes: Bytes, count: usize) -> Result<Self, FormatError> {
        let index = Self { bytes, count };
        if count == 0 || count > CHILDREN_PER_PAGE {
            return Err(FormatError::Field("count"));
        }
        let mut end = 0;
        for child in index.children() {
            if child.lba() < end {
                return Err(FormatError::Field("lba"));
            }
            if child.w == 0 || child.rsvd41 != 0 {
                return Err(FormatError::Field("child"));
            }
            end = child.lba().checked_add(1).ok_or(FormatError::Field("child"))?;
        }
        Ok(index)
    }

    /// Lays out the index block `id`.
    pub(crate) fn encode(identity: MapIdentity, id: PageId, children: &[Child]) -> Bytes {
        debug_assert!(!children.is_empty() && children.len() <= CHILDREN_PER_PAGE);
        seal(identity, id, children.len(), |block| {
            let bytes = children.as_bytes();
            block[PAGE_HEADER_BYTES..][..bytes.len()].copy_from_slice(bytes);
        })
    }

    /// The same in memory of its own; see [`super::page::Page::kept`].
    pub(super) fn kept(&self) -> Self {
        Self {
            bytes: Bytes::copy_from_slice(&self.bytes),
            count: self.count,
        }
    }

    /// Children, at least one.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// In ascending order of LBA.
    pub(super) fn children(&self) -> &[Child] {
        let body = &self.bytes[PAGE_HEADER_BYTES..];
        <[Child]>::ref_from_prefix_with_elems(body, self.count).map_or(&[], |(children, _)| children)
    }
}
