//! The layout of a map block: its header, the children of an index block, and the table block of a spilled root. A leaf's
//! records are in [`super::leaf`].
//!
//! This module is layout, and the checks a block can fail on its own. `docs/format/checkpoint.md` has the
//! byte tables. A block says which volume, layer, run, level and position it is, so a misdirected read is
//! noticed; every bit of it is under one of two checksums.

use bytes::Bytes;
use weft_proto::id::{BandId, Epoch, LayerId, Sequence, VolumeId};
use weft_proto::units::{BLOCK_BYTES, Lba};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::entry::{ColumnSet, MapEntry};

use super::address::PageId;
use super::bits::Block;
use super::leaf::Leaf;

/// First bytes of every map block.
pub(crate) const PAGE_MAGIC: [u8; 8] = *b"WEFTPAGE";
/// Versions of the map block's layout. 1: the first; records of 45 bytes in leaves too. 2: records of a leaf in as few bits as
/// they take.
pub(crate) const PAGE_VERSION: u16 = 2;

/// Bytes of the header of a map block.
pub(crate) const PAGE_HEADER_BYTES: usize = size_of::<PageHeader>();
/// Bytes of the body of a map block.
pub(crate) const PAGE_BODY_BYTES: usize = BLOCK_BYTES - PAGE_HEADER_BYTES;
/// Children of a full index block.
pub(crate) const CHILDREN_PER_PAGE: usize = PAGE_BODY_BYTES / size_of::<Child>();

/// Why bytes are not the block, record or root they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Shorter or longer than it says or should be.
    #[error("{found} bytes where {expected} belong")]
    Length {
        /// Bytes wanted.
        expected: usize,
        /// Bytes there.
        found: usize,
    },
    /// Another kind of thing.
    #[error("wrong magic")]
    Magic,
    /// Written by a version that this one does not know.
    #[error("unknown version {0}")]
    Version(u16),
    /// The header's checksum does not match.
    #[error("header checksum mismatch")]
    HeaderChecksum,
    /// The body's checksum does not match.
    #[error("body checksum mismatch")]
    BodyChecksum,
    /// Sound, but of another volume, layer, run or position: a misdirected read or write.
    #[error("a block of another place or volume")]
    Identity,
    /// Checksums match, and a field has a value that no writer produces.
    #[error("field `{0}` out of range")]
    Field(&'static str),
}

/// Whose page map it is; part of every block's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapIdentity {
    /// The volume that wrote the layer.
    pub volume: VolumeId,
    /// The layer.
    pub layer: LayerId,
}

/// The first 64 bytes of a map block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PageHeader {
    /// [`PAGE_MAGIC`].
    magic: [u8; 8],
    /// [`PAGE_VERSION`].
    version: U16,
    /// 0 leaf, 1 … 14 index block, 15 table block.
    level: u8,
    rsvd11: u8,
    /// Records in a leaf, children of an index block, bytes in a table block.
    count: U16,
    rsvd14: [u8; 2],
    volume: U64,
    layer: U64,
    run: U32,
    position: U32,
    rsvd40: [u8; 16],
    /// crc32c of the 4032 bytes of the body.
    body_crc: U32,
    /// crc32c of bytes 0 … 59.
    header_crc: U32,
}

const _: () = assert!(size_of::<PageHeader>() == 64);
const _: () = assert!(std::mem::offset_of!(PageHeader, volume) == 16);
const _: () = assert!(std::mem::offset_of!(PageHeader, run) == 32);
const _: () = assert!(std::mem::offset_of!(PageHeader, body_crc) == 56);
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

/// A leaf or index block that has been checked.
#[derive(Clone, Debug)]
pub(crate) enum Page {
    Leaf(Leaf),
    Index(Index),
}

impl Page {
    /// Checks `bytes` to be the block `id` of `identity`.
    pub(crate) fn read(bytes: Bytes, identity: MapIdentity, id: PageId) -> Result<Self, FormatError> {
        let count = check(&bytes, identity, id)?;
        match id.level {
            0 => Leaf::read(bytes, count).map(Self::Leaf),
            _ => Index::read(bytes, count).map(Self::Index),
        }
    }

    /// The same in memory of its own: what was lent may be a small part of a receive buffer, all of which it keeps alive.
    pub(crate) fn kept(&self) -> Self {
        match self {
            Self::Leaf(leaf) => Self::Leaf(leaf.kept()),
            Self::Index(index) => Self::Index(Index {
                bytes: Bytes::copy_from_slice(&index.bytes),
                count: index.count,
            }),
        }
    }

    /// The children of an index block; a leaf has none.
    pub(crate) fn children(&self) -> &[Child] {
        match self {
            Self::Leaf(_) => &[],
            Self::Index(index) => index.children(),
        }
    }
}

/// An index block that has been checked.
#[derive(Clone, Debug)]
pub(crate) struct Index {
    bytes: Bytes,
    count: usize,
}

impl Index {
    fn read(bytes: Bytes, count: usize) -> Result<Self, FormatError> {
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

    /// Children, at least one.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// In ascending order of LBA.
    fn children(&self) -> &[Child] {
        let body = &self.bytes[PAGE_HEADER_BYTES..];
        <[Child]>::ref_from_prefix_with_elems(body, self.count).map_or(&[], |(children, _)| children)
    }
}

/// Lays out a table block of a spilled root.
pub(crate) fn encode_table(identity: MapIdentity, id: PageId, part: &[u8]) -> Bytes {
    seal(identity, id, part.len(), |block| {
        block[PAGE_HEADER_BYTES..][..part.len()].copy_from_slice(part);
    })
}

/// Checks a table block of a spilled root and answers its part of the body.
pub(crate) fn read_table(bytes: &Bytes, identity: MapIdentity, id: PageId) -> Result<Bytes, FormatError> {
    let count = check(bytes, identity, id)?;
    if count == 0 || count > PAGE_BODY_BYTES {
        return Err(FormatError::Field("count"));
    }
    Ok(bytes.slice(PAGE_HEADER_BYTES..PAGE_HEADER_BYTES + count))
}

pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Lays out the block `id`: its header, around what `fill` puts into the body of a block of zeroes.
pub(super) fn seal(identity: MapIdentity, id: PageId, count: usize, fill: impl FnOnce(&mut Block)) -> Bytes {
    let mut block = Box::new([0; BLOCK_BYTES]);
    fill(&mut block);
    let mut header = PageHeader {
        magic: PAGE_MAGIC,
        version: PAGE_VERSION.into(),
        level: id.level,
        rsvd11: 0,
        count: u16::try_from(count).expect("a block has less than 64 KiB").into(),
        rsvd14: [0; 2],
        volume: identity.volume.0.into(),
        layer: identity.layer.0.into(),
        run: id.run.into(),
        position: id.position.into(),
        rsvd40: [0; 16],
        body_crc: crc32c(&block[PAGE_HEADER_BYTES..]).into(),
        header_crc: 0.into(),
    };
    header.header_crc = crc32c(&header.as_bytes()[..60]).into();
    block[..PAGE_HEADER_BYTES].copy_from_slice(header.as_bytes());
    Bytes::from(block as Box<[u8]>)
}

/// The one place where a map block is believed. Answers its count, not yet bounded.
fn check(bytes: &Bytes, identity: MapIdentity, id: PageId) -> Result<usize, FormatError> {
    let length = FormatError::Length {
        expected: BLOCK_BYTES,
        found: bytes.len(),
    };
    if bytes.len() != BLOCK_BYTES {
        return Err(length);
    }
    let (header, body) = PageHeader::read_from_prefix(bytes).map_err(|_| length)?;
    if header.magic != PAGE_MAGIC {
        return Err(FormatError::Magic);
    }
    if header.header_crc.get() != crc32c(&bytes[..60]) {
        return Err(FormatError::HeaderChecksum);
    }
    // After the checksum, so that a flipped bit is not reported as a newer version.
    if header.version.get() != PAGE_VERSION {
        return Err(FormatError::Version(header.version.get()));
    }
    if header.body_crc.get() != crc32c(body) {
        return Err(FormatError::BodyChecksum);
    }
    let found = PageId {
        run: header.run.get(),
        level: header.level,
        position: header.position.get(),
    };
    if (header.volume.get(), header.layer.get()) != (identity.volume.0, identity.layer.0) || found != id {
        return Err(FormatError::Identity);
    }
    Ok(usize::from(header.count.get()))
}

/// The LBA of a page as errors name it.
pub(crate) fn damaged(id: PageId, reason: FormatError) -> super::MapError {
    super::MapError::Damaged {
        lba: Lba(id.lba().0),
        reason,
    }
}
