//! The layout of a map block: a leaf or an index block of a run, or a table block of a spilled root.
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
use super::slot::Cell;

/// First bytes of every map block.
pub(crate) const PAGE_MAGIC: [u8; 8] = *b"WEFTPAGE";
/// Versions of the map block's layout. 1: the first.
pub(crate) const PAGE_VERSION: u16 = 1;

/// Bytes of the header of a map block.
pub(crate) const PAGE_HEADER_BYTES: usize = size_of::<PageHeader>();
/// Bytes of the body of a map block.
pub(crate) const PAGE_BODY_BYTES: usize = BLOCK_BYTES - PAGE_HEADER_BYTES;
/// Bytes of one record.
pub(crate) const RECORD_BYTES: usize = size_of::<Record>();
/// Records of a full leaf or index block.
pub(crate) const RECORDS_PER_PAGE: usize = PAGE_BODY_BYTES / RECORD_BYTES;

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
    /// Records in a leaf or index block, bytes in a table block.
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
const _: () = assert!(RECORDS_PER_PAGE == 89);

/// One record of a leaf (a block, or a range that reads as zeroes) or of an index block (a child).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Record {
    /// The block; first block of a range; first LBA of a child.
    lba: U64,
    /// Of the sequence.
    epoch: U64,
    /// Of the sequence.
    counter: U64,
    /// The band; of a range, its number of blocks.
    band: U64,
    crc: U32,
    row: U16,
    column: u8,
    start: u8,
    /// Data shards of the stripe; 0 marks a range that reads as zeroes.
    w: u8,
    flags: RecordFlags,
    /// Columns that the stripe passed over, as a set of 24 bits.
    skipped: [u8; 3],
}

const _: () = assert!(size_of::<Record>() == 45);
const _: () = assert!(weft_proto::band::DATA_SHARDS_MAX + weft_proto::band::PARITY_SHARDS_MAX <= 24);
const _: () = assert!(std::mem::offset_of!(Record, band) == 24);
const _: () = assert!(std::mem::offset_of!(Record, w) == 40);

/// Bit 0: settled. The rest is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
struct RecordFlags(u8);

impl RecordFlags {
    const SETTLED: u8 = 1;

    fn new(settled: bool) -> Self {
        Self(if settled { Self::SETTLED } else { 0 })
    }
}

/// A record as the code uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) lba: u64,
    /// 1 for data.
    pub(crate) count: u64,
    pub(crate) cell: Cell,
    /// No older run has a higher sequence for these LBAs.
    pub(crate) settled: bool,
}

impl Item {
    pub(crate) fn end(&self) -> u64 {
        self.lba + self.count
    }
}

impl Record {
    pub(crate) fn new(item: &Item) -> Self {
        let sequence = item.cell.sequence();
        let record = Self {
            lba: item.lba.into(),
            epoch: sequence.epoch.0.into(),
            counter: sequence.counter.into(),
            band: item.count.into(),
            crc: 0.into(),
            row: 0.into(),
            column: 0,
            start: 0,
            w: 0,
            flags: RecordFlags::new(item.settled),
            skipped: [0; 3],
        };
        match item.cell {
            Cell::Zero(_) => record,
            Cell::Data(entry) => Self {
                band: entry.band.0.into(),
                crc: entry.crc.into(),
                row: u16::try_from(entry.row)
                    .expect("a chunk has at most 16384 rows")
                    .into(),
                column: entry.column,
                start: entry.start,
                w: entry.w,
                skipped: skipped_bytes(entry.skipped),
                ..record
            },
        }
    }

    /// A child of an index block: its first LBA and its place.
    pub(crate) fn child_at(first_lba: u64, place: MapEntry) -> Self {
        Self::new(&Item {
            lba: first_lba,
            count: 1,
            cell: Cell::Data(place),
            settled: false,
        })
    }

    pub(crate) fn lba(&self) -> u64 {
        self.lba.get()
    }

    pub(crate) fn item(&self) -> Item {
        let sequence = Sequence {
            epoch: Epoch(self.epoch.get()),
            counter: self.counter.get(),
        };
        let (count, cell) = match self.w {
            0 => (self.band.get(), Cell::Zero(sequence)),
            w => (
                1,
                Cell::Data(MapEntry {
                    band: BandId(self.band.get()),
                    row: u32::from(self.row.get()),
                    column: self.column,
                    start: self.start,
                    w,
                    skipped: skipped_columns(self.skipped),
                    sequence,
                    crc: self.crc.get(),
                }),
            ),
        };
        Item {
            lba: self.lba.get(),
            count,
            cell,
            settled: self.flags.0 & RecordFlags::SETTLED != 0,
        }
    }

    /// The place of a child of an index block.
    pub(crate) fn child(&self) -> Option<MapEntry> {
        match self.item().cell {
            Cell::Data(entry) => Some(entry),
            Cell::Zero(_) => None,
        }
    }

    /// The first LBA after this record, if the record is one that a writer produces.
    fn checked_end(&self) -> Option<u64> {
        let known = self.flags.0 & !RecordFlags::SETTLED == 0;
        let place = (
            self.crc.get(),
            self.row.get(),
            self.column,
            self.start,
            self.skipped,
        );
        let range = place == (0, 0, 0, 0, [0; 3]);
        if !known || (self.w == 0 && (!range || self.band.get() == 0)) {
            return None;
        }
        self.lba.get().checked_add(self.item().count)
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
pub(crate) struct Page {
    bytes: Bytes,
    count: usize,
}

impl Page {
    /// Checks `bytes` to be the block `id` of `identity`.
    pub(crate) fn read(bytes: Bytes, identity: MapIdentity, id: PageId) -> Result<Self, FormatError> {
        let count = check(&bytes, identity, id)?;
        let page = Self { bytes, count };
        if count == 0 || count > RECORDS_PER_PAGE {
            return Err(FormatError::Field("count"));
        }
        let mut end = 0;
        for record in page.records() {
            if record.lba() < end {
                return Err(FormatError::Field("lba"));
            }
            end = record.checked_end().ok_or(FormatError::Field("record"))?;
            if id.level > 0 && record.w == 0 {
                return Err(FormatError::Field("w"));
            }
        }
        Ok(page)
    }

    /// The same in memory of its own: what was lent may be a small part of a receive buffer, all of which it keeps alive.
    pub(crate) fn kept(&self) -> Self {
        Self {
            bytes: Bytes::copy_from_slice(&self.bytes),
            count: self.count,
        }
    }

    /// Lays out the block `id`.
    pub(crate) fn encode(identity: MapIdentity, id: PageId, records: &[Record]) -> Bytes {
        debug_assert!(!records.is_empty() && records.len() <= RECORDS_PER_PAGE);
        seal(identity, id, records.len(), records.as_bytes())
    }

    /// In ascending order, disjoint, at least one.
    pub(crate) fn records(&self) -> &[Record] {
        let body = &self.bytes[PAGE_HEADER_BYTES..];
        <[Record]>::ref_from_prefix_with_elems(body, self.count).map_or(&[], |(records, _)| records)
    }
}

/// Lays out a table block of a spilled root.
pub(crate) fn encode_table(identity: MapIdentity, id: PageId, part: &[u8]) -> Bytes {
    seal(identity, id, part.len(), part)
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

fn seal(identity: MapIdentity, id: PageId, count: usize, content: &[u8]) -> Bytes {
    let mut block = vec![0; BLOCK_BYTES];
    block[PAGE_HEADER_BYTES..PAGE_HEADER_BYTES + content.len()].copy_from_slice(content);
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
    block.into()
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
