//! Leaves as they are written and read, by themselves.

use super::*;
use crate::map::page::Page;
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
