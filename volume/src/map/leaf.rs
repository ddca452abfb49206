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
use super::format::{FormatError, MapIdentity, PAGE_HEADER_BYTES, seal};
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

    /// The same in memory of its own; see [`super::format::Page::kept`].
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

    fn values(&self, slot: usize) -> Values {
        let (block, frame) = (block(&self.bytes), frame(&self.bytes));
        let mut at = LBAS_AT + self.count * self.lba_width as usize + slot * self.rest_width;
        let mut values = [0; FIELDS];
        values[LBA] = self.lba(slot);
        for field in LBA + 1..FIELDS {
            let width = u32::from(frame.widths[field]);
            values[field] = frame.lowest[field].get() + bits::read(block, at, width);
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
mod tests {
    use super::*;
    use crate::map::format::Page;
    use proptest::prelude::*;
    use weft_proto::id::{LayerId, VolumeId};

    const IDENTITY: MapIdentity = MapIdentity {
        volume: VolumeId(1),
        layer: LayerId(2),
    };
    const ID: PageId = PageId {
        run: 3,
        level: 0,
        position: 4,
    };

    fn sequence(epoch: u64, counter: u64) -> Sequence {
        Sequence {
            epoch: Epoch(epoch),
            counter,
        }
    }

    /// As a volume of a TiB has them after a while: anywhere, of any age, in any of four thousand bands of 64 MiB.
    fn scattered(index: u64) -> Item {
        let random = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Item {
            lba: index * 40 + random % 40,
            count: 1,
            cell: Cell::Data(MapEntry {
                band: BandId(70_000 + (random >> 20) % 4096),
                row: (random >> 32) as u32 % 16_384,
                column: (random >> 46) as u8 % 6,
                start: (random >> 50) as u8 % 6,
                w: 4,
                skipped: ColumnSet::NONE,
                sequence: sequence(7, (random >> 8) % (1 << 30)),
                crc: (random >> 13) as u32,
            }),
            settled: true,
        }
    }

    fn encoded(builder: &LeafBuilder) -> Leaf {
        let page = Page::read(builder.encode(IDENTITY, ID), IDENTITY, ID).expect("what is written is read");
        let Page::Leaf(leaf) = page else {
            panic!("level 0 is a leaf");
        };
        leaf
    }

    fn items(leaf: &Leaf) -> Vec<Item> {
        (0..leaf.len()).map(|slot| leaf.item(slot)).collect()
    }

    /// Packs `all` into leaves and compares what they say. Answers the number of leaves.
    fn packed(all: &[Item]) -> usize {
        let mut leaves = 0;
        let mut left = all;
        while !left.is_empty() {
            let mut builder = LeafBuilder::default();
            let taken = left.iter().take_while(|item| builder.push(item)).count();
            assert!(taken > 0, "an empty leaf has room for any record");
            let (now, later) = left.split_at(taken);
            let leaf = encoded(&builder);
            assert_eq!(items(&leaf), now);
            assert!((0..taken).all(|slot| leaf.lba(slot) == now[slot].lba));
            left = later;
            leaves += 1;
        }
        leaves
    }

    #[test]
    fn a_leaf_of_a_large_volume_has_three_times_as_many_records_as_with_45_bytes_each() {
        let all: Vec<Item> = (0..10_000).map(scattered).collect();
        let each = all.len() / packed(&all);
        assert!(each > 3 * 89, "{each} records in a leaf");
    }

    #[test]
    fn blocks_that_were_written_one_after_another_take_half_as_much_again() {
        let block = |index: u64| Item {
            lba: index,
            count: 1,
            cell: Cell::Data(MapEntry {
                band: BandId(70_000),
                row: (index / 4) as u32,
                column: (index % 4) as u8,
                start: 0,
                w: 4,
                skipped: ColumnSet::NONE,
                sequence: sequence(7, 1 << 40 | index),
                crc: (index as u32).wrapping_mul(0x9e37_79b9),
            }),
            settled: true,
        };
        let all: Vec<Item> = (0..10_000).map(block).collect();
        let each = all.len() / packed(&all);
        assert!(each > 5 * 89, "{each} records in a leaf");
    }

    #[test]
    fn fields_may_be_as_large_as_they_come_and_nothing_past_that_can_be_read() {
        let block = |lba: u64, extreme: bool| Item {
            lba,
            count: 1,
            cell: Cell::Data(MapEntry {
                band: BandId(if extreme { u64::MAX } else { 1 }),
                row: if extreme { 65_535 } else { 60_000 },
                column: if extreme { 255 } else { 250 },
                start: if extreme { 255 } else { 0 },
                w: if extreme { 255 } else { 1 },
                skipped: ColumnSet(if extreme { 0xff_ffff } else { 0xff_fff0 }),
                sequence: sequence(if extreme { u64::MAX } else { u64::MAX - 5 }, u64::MAX),
                crc: if extreme { u32::MAX } else { 7 },
            }),
            settled: extreme,
        };
        assert_eq!(packed(&[block(0, false), block(u64::MAX - 1, true)]), 1);
        let range = |lba, count| Item {
            lba,
            count,
            cell: Cell::Zero(sequence(1, 1)),
            settled: false,
        };
        assert_eq!(packed(&[range(0, 1), block(1, true), range(2, u64::MAX - 2)]), 1);
        assert_eq!(packed(&[range(0, u64::MAX)]), 1);
    }

    #[test]
    fn a_leaf_is_not_longer_than_its_bound_however_short_its_records_are() {
        let range = |index: u64| Item {
            lba: 2 * index,
            count: 1,
            cell: Cell::Zero(sequence(1, 1)),
            settled: true,
        };
        let mut builder = LeafBuilder::default();
        let taken = (0..5000).take_while(|index| builder.push(&range(*index))).count();
        assert_eq!(taken, LEAF_RECORDS_MAX);
        assert_eq!(items(&encoded(&builder)).len(), LEAF_RECORDS_MAX);
    }

    fn any_item() -> impl Strategy<Value = Item> {
        let number = || prop_oneof![4 => 0u64..50, 2 => 0u64..1 << 40, 1 => any::<u64>()];
        let place = (
            number(),
            any::<u32>(),
            any::<u16>(),
            any::<[u8; 3]>(),
            0u32..1 << 24,
        );
        let version = (number(), number(), any::<bool>());
        (1u64..1 << 50, prop::option::weighted(0.8, place), version).prop_map(
            |(count, place, (epoch, counter, settled))| {
                let sequence = sequence(epoch, counter);
                let data = |(band, crc, row, [column, start, w], skipped): (u64, u32, u16, [u8; 3], u32)| {
                    Cell::Data(MapEntry {
                        band: BandId(band),
                        row: row.into(),
                        column,
                        start,
                        w: w.max(1),
                        skipped: ColumnSet(skipped),
                        sequence,
                        crc,
                    })
                };
                Item {
                    lba: 0,
                    count: if place.is_some() { 1 } else { count },
                    cell: place.map_or(Cell::Zero(sequence), data),
                    settled,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn any_records_that_ascend_are_read_as_they_were_written(
            mut all in prop::collection::vec((any_item(), prop_oneof![0u64..10, 0u64..1 << 48]), 1..300),
        ) {
            let mut end = 0;
            for (item, gap) in &mut all {
                item.lba = end + *gap;
                end = item.end();
            }
            let all: Vec<Item> = all.into_iter().map(|(item, _)| item).collect();
            packed(&all);
        }

        /// Checksums that match are no proof: a block whose frame or records are anything at all is refused, or every slot of it
        /// can be read.
        #[test]
        fn whatever_is_in_a_leaf_it_is_refused_or_can_be_read(
            changes in prop::collection::vec((PAGE_HEADER_BYTES..400usize, any::<u8>()), 1..20),
            count in prop_oneof![0usize..2000, Just(200)],
        ) {
            let mut builder = LeafBuilder::default();
            for index in 0..200 {
                prop_assert!(builder.push(&scattered(index)));
            }
            let mut bytes = builder.encode(IDENTITY, ID).to_vec();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            if let Ok(leaf) = Leaf::read(bytes.into(), count) {
                let mut end = 0;
                for item in items(&leaf) {
                    prop_assert!(item.lba >= end && item.count > 0);
                    end = item.end();
                }
            }
        }
    }
}
