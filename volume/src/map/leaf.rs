//! The layout of a leaf: records of blocks and of ranges that read as zeroes, each in as few bits as this leaf's take.
//!
//! ```text
//! header │ lowest value and width of each field │ LBAs │ the other fields, record after record
//! ```
//!
//! Every moved block is a record in the next run and in each merge after it, so what a record takes is a large part of what
//! a nearly full pool writes. Within one leaf most fields hardly differ: epochs, w and start are a bit or nothing, bands and
//! LBAs a few. So a field is stored as its difference from the lowest of the leaf, in the width that the largest difference
//! takes: 11 to 15 bytes a record instead of 45.
//!
//! All records of a leaf are of one size: any of them is read where it stands, without those before it (frame of
//! reference; codes of variable length would have to be read from a restart point). LBAs stand together, because a
//! search reads little else.
//!
//! Promise: a leaf that was believed by [`Leaf::read`] answers every slot without another check. `docs/format/checkpoint.md`
//! has the byte tables.

use bytes::Bytes;
use weft_proto::id::{BandId, Epoch, Sequence};
use weft_proto::units::BLOCK_BYTES;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::entry::{ColumnSet, MapEntry};

use super::address::PageId;
use super::bits::{self, BLOCK_BITS, Block};
use super::block::{FormatError, MapIdentity, PAGE_HEADER_BYTES, seal};
use super::slot::Cell;

/// What a leaf says of a block, or of a range that reads as zeroes.
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

/// Most records of a leaf. Derived from nothing: a bound for who reads one.
pub(crate) const LEAF_RECORDS_MAX: usize = 1024;

/// Fields of a record, in the order in which they are stored.
const FIELDS: usize = 12;
const LBA: usize = 0;
const EPOCH: usize = 1;
const COUNTER: usize = 2;
/// Blocks of a range; 1 of a block.
const COUNT: usize = 3;
/// 0 marks a range; it has none of the fields behind this one.
const W: usize = 4;
const SETTLED: usize = 5;
const BAND: usize = 6;
const CRC: usize = 7;
const ROW: usize = 8;
const COLUMN: usize = 9;
const START: usize = 10;
const SKIPPED: usize = 11;

/// The highest value of each field: each the highest number of some width.
const HIGHEST: [u64; FIELDS] = [
    u64::MAX,
    u64::MAX,
    u64::MAX,
    u64::MAX,
    u8::MAX as u64,
    1,
    u64::MAX,
    u32::MAX as u64,
    u16::MAX as u64,
    u8::MAX as u64,
    u8::MAX as u64,
    (1 << 24) - 1,
];

/// What the records of a leaf have in common; behind the block's header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Frame {
    /// Of each field, what is added to the numbers stored.
    lowest: [U64; FIELDS],
    /// Of each field, bits stored.
    widths: [u8; FIELDS],
    rsvd108: [u8; 4],
}

const _: () = assert!(size_of::<Frame>() == 112);
const _: () = assert!(weft_proto::band::DATA_SHARDS_MAX + weft_proto::band::PARITY_SHARDS_MAX <= 24);

/// Where the LBAs begin, in bits.
const LBAS_AT: usize = (PAGE_HEADER_BYTES + size_of::<Frame>()) * 8;
/// Bits for records.
const RECORD_BITS: usize = BLOCK_BITS - LBAS_AT;

/// The fields of a record. Those that a range does not have are 0.
type Values = [u64; FIELDS];

fn values(item: &Item) -> Values {
    let sequence = item.cell.sequence();
    let mut values = [0; FIELDS];
    values[LBA] = item.lba;
    values[EPOCH] = sequence.epoch.0;
    values[COUNTER] = sequence.counter;
    values[COUNT] = item.count;
    values[SETTLED] = u64::from(item.settled);
    match item.cell {
        Cell::Zero(_) => {}
        Cell::Data(entry) => {
            debug_assert!(item.count == 1 && entry.w > 0, "a block is in a data shard");
            values[W] = u64::from(entry.w);
            values[BAND] = entry.band.0;
            values[CRC] = u64::from(entry.crc);
            values[ROW] = u64::from(entry.row);
            values[COLUMN] = u64::from(entry.column);
            values[START] = u64::from(entry.start);
            values[SKIPPED] = u64::from(entry.skipped.0);
        }
    }
    values
}

fn item(values: &Values) -> Item {
    let sequence = Sequence {
        epoch: Epoch(values[EPOCH]),
        counter: values[COUNTER],
    };
    let cell = match values[W] {
        0 => Cell::Zero(sequence),
        w => Cell::Data(MapEntry {
            band: BandId(values[BAND]),
            row: values[ROW] as u32,
            column: values[COLUMN] as u8,
            start: values[START] as u8,
            w: w as u8,
            skipped: ColumnSet(values[SKIPPED] as u32),
            sequence,
            crc: values[CRC] as u32,
        }),
    };
    Item {
        lba: values[LBA],
        count: values[COUNT],
        cell,
        settled: values[SETTLED] == 1,
    }
}

/// The fields that a record has.
fn present(values: &Values) -> usize {
    if values[W] == 0 { BAND } else { FIELDS }
}

/// A leaf under construction.
#[derive(Debug)]
pub(crate) struct LeafBuilder {
    records: Vec<Values>,
    lowest: Values,
    highest: Values,
}

impl Default for LeafBuilder {
    fn default() -> Self {
        Self {
            records: Vec::new(),
            lowest: [u64::MAX; FIELDS],
            highest: [0; FIELDS],
        }
    }
}

impl LeafBuilder {
    /// Takes the next record, which lies behind those before. `false` when the leaf has no room for it.
    pub(crate) fn push(&mut self, item: &Item) -> bool {
        let values = values(item);
        let (mut lowest, mut highest) = (self.lowest, self.highest);
        for field in 0..present(&values) {
            lowest[field] = lowest[field].min(values[field]);
            highest[field] = highest[field].max(values[field]);
        }
        let bits: usize = widths(&lowest, &highest)
            .iter()
            .map(|width| usize::from(*width))
            .sum();
        let count = self.records.len() + 1;
        if count > LEAF_RECORDS_MAX || bits * count > RECORD_BITS {
            return false;
        }
        (self.lowest, self.highest) = (lowest, highest);
        self.records.push(values);
        true
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// LBA of the first record.
    pub(crate) fn first_lba(&self) -> Option<u64> {
        self.records.first().map(|values| values[LBA])
    }

    /// Lays out the leaf `id`.
    pub(crate) fn encode(&self, identity: MapIdentity, id: PageId) -> Bytes {
        debug_assert!(!self.records.is_empty());
        let widths = widths(&self.lowest, &self.highest);
        let mut lowest = [0; FIELDS];
        for field in 0..FIELDS {
            // Nothing that could be read is past the highest value of the field: lower where the width reaches past that.
            let most = HIGHEST[field] - bits::mask(widths[field].into());
            lowest[field] = self.lowest[field].min(most);
            if self.lowest[field] > self.highest[field] {
                lowest[field] = 0; // no record has it
            }
        }
        let frame = Frame {
            lowest: lowest.map(U64::new),
            widths,
            rsvd108: [0; 4],
        };
        seal(identity, id, self.records.len(), |block| {
            block[PAGE_HEADER_BYTES..][..size_of::<Frame>()].copy_from_slice(frame.as_bytes());
            let mut at = LBAS_AT;
            let mut put = |field: usize, values: &Values, present: bool| {
                let width = u32::from(widths[field]);
                if present {
                    bits::write(block, at, width, values[field] - lowest[field]);
                }
                at += width as usize;
            };
            for values in &self.records {
                put(LBA, values, true);
            }
            for values in &self.records {
                let present = present(values);
                for field in LBA + 1..FIELDS {
                    put(field, values, field < present);
                }
            }
        })
    }

    pub(crate) fn clear(&mut self) {
        self.records.clear();
        self.lowest = [u64::MAX; FIELDS];
        self.highest = [0; FIELDS];
    }
}

/// Bits that each field takes.
fn widths(lowest: &Values, highest: &Values) -> [u8; FIELDS] {
    // A field that no record has is lowest at the top.
    std::array::from_fn(|field| bits::width(highest[field].saturating_sub(lowest[field])) as u8)
}

/// A leaf that has been checked. What a search needs is beside the bytes, so that it reads nothing but LBAs of the block.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    bytes: Bytes,
    count: usize,
    lba_lowest: u64,
    lba_width: u32,
    /// Of the fields of a record but its LBA.
    rest_width: usize,
}

impl Leaf {
    /// Checks the records of a leaf whose header and checksums are good.
    pub(crate) fn read(bytes: Bytes, count: usize) -> Result<Self, FormatError> {
        if count == 0 || count > LEAF_RECORDS_MAX {
            return Err(FormatError::Field("count"));
        }
        let frame = *frame(&bytes);
        let lowest = frame.lowest.map(U64::get);
        for field in 0..FIELDS {
            let width = u32::from(frame.widths[field]);
            if width > u64::BITS {
                return Err(FormatError::Field("width"));
            }
            let most = HIGHEST[field].checked_sub(bits::mask(width));
            if most.is_none_or(|most| lowest[field] > most) {
                return Err(FormatError::Field("lowest"));
            }
        }
        let width = |field: usize| usize::from(frame.widths[field]);
        let leaf = Self {
            count,
            lba_lowest: lowest[LBA],
            lba_width: frame.widths[LBA].into(),
            rest_width: (LBA + 1..FIELDS).map(width).sum(),
            bytes,
        };
        if (width(LBA) + leaf.rest_width) * count > RECORD_BITS {
            return Err(FormatError::Field("width"));
        }
        if lowest[W] > 0 && (frame.widths[COUNT], lowest[COUNT]) == (0, 1) {
            leaf.check_blocks()?;
        } else {
            leaf.check_records(&lowest)?;
        }
        Ok(leaf)
    }

    /// Of a leaf without ranges only the order of the LBAs can be wrong.
    fn check_blocks(&self) -> Result<(), FormatError> {
        let mut end = 0;
        for slot in 0..self.count {
            let lba = self.lba(slot);
            if lba < end {
                return Err(FormatError::Field("lba"));
            }
            end = lba.checked_add(1).ok_or(FormatError::Field("record"))?;
        }
        Ok(())
    }

    fn check_records(&self, lowest: &Values) -> Result<(), FormatError> {
        let mut end = 0;
        for slot in 0..self.count {
            let values = self.values(slot);
            let absent = present(&values)..FIELDS;
            let counts = if values[W] > 0 { 1..=1 } else { 1..=u64::MAX };
            if !counts.contains(&values[COUNT]) || values[absent.clone()] != lowest[absent] {
                return Err(FormatError::Field("record"));
            }
            if values[LBA] < end {
                return Err(FormatError::Field("lba"));
            }
            end = values[LBA]
                .checked_add(values[COUNT])
                .ok_or(FormatError::Field("record"))?;
        }
        Ok(())
    }

    /// The same in memory of its own; see [`super::page::Page::kept`].
    pub(crate) fn kept(&self) -> Self {
        Self {
            bytes: Bytes::copy_from_slice(&self.bytes),
            ..*self
        }
    }

    /// Records, at least one.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// LBA of the record in `slot`, below [`Leaf::len`]. They ascend.
    #[inline]
    pub(crate) fn lba(&self, slot: usize) -> u64 {
        let at = LBAS_AT + slot * self.lba_width as usize;
        self.lba_lowest + bits::read(block(&self.bytes), at, self.lba_width)
    }

    /// The record in `slot`, below [`Leaf::len`]. They are disjoint.
    pub(crate) fn item(&self, slot: usize) -> Item {
        item(&self.values(slot))
    }

    /// Where the record in `slot`, below [`Leaf::len`], ends, and its version: little of what [`Leaf::item`] unpacks.
    pub(crate) fn version(&self, slot: usize) -> (u64, Sequence) {
        const { assert!(EPOCH == LBA + 1 && COUNTER == LBA + 2 && COUNT == LBA + 3) };
        let (block, frame) = (block(&self.bytes), frame(&self.bytes));
        let mut at = self.rest_at(slot);
        let mut next = |field: usize| {
            let width = u32::from(frame.widths[field]);
            let value = frame.lowest[field].get() + bits::read(block, at, width);
            at += width as usize;
            value
        };
        let epoch = Epoch(next(EPOCH));
        let counter = next(COUNTER);
        (self.lba(slot) + next(COUNT), Sequence { epoch, counter })
    }

    /// Where the fields of a record but its LBA begin, in bits.
    fn rest_at(&self, slot: usize) -> usize {
        LBAS_AT + self.count * self.lba_width as usize + slot * self.rest_width
    }

    fn values(&self, slot: usize) -> Values {
        let (block, frame) = (block(&self.bytes), frame(&self.bytes));
        let mut at = self.rest_at(slot);
        let mut values = [0; FIELDS];
        values[LBA] = self.lba(slot);
        for (field, value) in values.iter_mut().enumerate().skip(LBA + 1) {
            let width = u32::from(frame.widths[field]);
            *value = frame.lowest[field].get() + bits::read(block, at, width);
            at += width as usize;
        }
        values
    }
}

fn block(bytes: &Bytes) -> &Block {
    bytes
        .first_chunk::<BLOCK_BYTES>()
        .expect("a map block was checked to be a block")
}

fn frame(bytes: &Bytes) -> &Frame {
    let (frame, _) =
        Frame::ref_from_prefix(&block(bytes)[PAGE_HEADER_BYTES..]).expect("a block has room for it");
    frame
}

#[cfg(test)]
mod tests;
