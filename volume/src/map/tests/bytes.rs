//! The layouts against bytes that were written by hand, and against every flipped bit and truncation.

use bytes::Bytes;
use weft_proto::band::{Band, ChunkAddress, ChunkSize, Geometry};
use weft_proto::id::{BandId, ClusterId, DriveId, Epoch, LayerId, Sequence, StripeNumber, VolumeId};
use weft_proto::units::Lba;

use crate::entry::{ColumnSet, MapEntry};
use crate::map::address::{POSITIONS, PageId, RUNS, TABLE_LEVEL};
use crate::map::format::{FormatError, Item, MapIdentity, Page, Record, encode_table, read_table};
use crate::map::root::{BandState, Root, RootBand, RootHead, Spilled};
use crate::map::root_format;
use crate::map::run::{RunDescriptor, child};
use crate::map::slot::Cell;
use crate::map::{MapError, MapRoot, MapSettings, PageMap, RunRoot};

use super::memory::{MemoryStore, run};
use super::model::IDENTITY;

/// The bytes of the example `name` of `docs/format/checkpoint.md`.
fn example(name: &str) -> Vec<u8> {
    let page = include_str!("../../../../docs/format/checkpoint.md");
    let (_, from) = page.split_once(&format!("```hex {name}\n")).unwrap();
    let (text, _) = from.split_once("\n```").unwrap();
    let mut bytes = Vec::new();
    for line in text.lines().filter(|line| *line != "*") {
        let (offset, line) = line.split_once("  ").unwrap();
        bytes.resize(usize::from_str_radix(offset, 16).unwrap(), 0);
        bytes.extend(line.split(' ').map(|byte| u8::from_str_radix(byte, 16).unwrap()));
    }
    bytes
}

fn sequence(counter: u64) -> Sequence {
    Sequence {
        epoch: Epoch(3),
        counter,
    }
}

const LEAF: PageId = PageId {
    run: 9,
    level: 0,
    position: 4,
};

fn leaf_items() -> [Item; 2] {
    let entry = MapEntry {
        band: BandId(5),
        row: 300,
        column: 2,
        start: 1,
        w: 4,
        skipped: ColumnSet::NONE.with(5),
        sequence: sequence(1000),
        crc: 0xDEAD_BEEF,
    };
    [
        Item {
            lba: 0x10,
            count: 1,
            cell: Cell::Data(entry),
            settled: true,
        },
        Item {
            lba: 0x20,
            count: 4096,
            cell: Cell::Zero(sequence(1001)),
            settled: true,
        },
    ]
}

fn example_root() -> Root {
    Root {
        cluster: ClusterId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]),
        volume: VolumeId(7),
        name: "disk0".into(),
        size_bytes: 1 << 30,
        layer: LayerId(8),
        layers: vec![LayerId(8)],
        geometry: Geometry::new(4, 2).unwrap(),
        epoch: Epoch(3),
        root_version: 6,
        counter_next: 1003,
        stripe_next: StripeNumber(42),
        complete: StripeNumber(41),
        ended: vec![(Epoch(2), StripeNumber(77))],
        bands: vec![band(5, Geometry::new(1, 1).unwrap())],
        map: MapRoot {
            runs: vec![RunRoot {
                run: RunDescriptor {
                    number: 9,
                    height: 0,
                    top: MapEntry {
                        band: BandId(5),
                        row: 11,
                        column: 0,
                        start: 0,
                        w: 1,
                        skipped: ColumnSet::NONE,
                        sequence: sequence(1002),
                        crc: 0xCAFE_F00D,
                    },
                    leaves: 1,
                    records: 2,
                    sequence_max: sequence(1001),
                },
                page_counts: vec![(BandId(5), 1)],
            }],
            moved: Vec::new(),
            record_counts: vec![(BandId(5), 1)],
            run_next: 10,
        },
    }
}

fn band(id: u64, geometry: Geometry) -> RootBand {
    let columns = (0..geometry.n()).map(|column| ChunkAddress {
        drive: DriveId(11 + u32::from(column)),
        offset_mib: 64 << column,
    });
    RootBand {
        band: Band {
            id: BandId(id),
            volume: VolumeId(7),
            layer: LayerId(8),
            epoch: Epoch(3),
            geometry,
            chunk_size: ChunkSize::Mib8,
            window_rows: 256,
            version: 1,
            columns: columns.collect(),
        },
        state: BandState::Open,
        append_row: 12,
        stripe_last: StripeNumber(41),
    }
}

#[test]
fn the_leaf_of_the_format_page_decodes_and_encodes() {
    let bytes = Bytes::from(example("leaf"));
    let page = Page::read(bytes.clone(), IDENTITY, LEAF).unwrap();
    let items: Vec<Item> = page.records().iter().map(Record::item).collect();
    assert_eq!(items, leaf_items());
    let records = leaf_items().map(|item| Record::new(&item));
    assert_eq!(Page::encode(IDENTITY, LEAF, &records), bytes);
}

#[test]
fn the_root_of_the_format_page_decodes_and_encodes() {
    let bytes = example("root");
    let store = MemoryStore::new(10);
    let head = RootHead::read(&bytes, Some(IDENTITY)).unwrap();
    assert_eq!(head.bands(), []);
    let root = run(head.load(&*store.handle())).unwrap();
    assert_eq!(root, example_root());

    let map = PageMap::load(IDENTITY, store.handle(), MapSettings::default(), &root.map);
    let mut written = root.clone();
    // A root takes a run number, used or not.
    written.map.run_next += 1;
    let blocks = run(root.write(&map, 1)).unwrap();
    assert_eq!(blocks.len(), 1);
    let read = RootHead::read(&blocks[0], Some(IDENTITY)).unwrap();
    assert_eq!(run(read.load(&*store.handle())).unwrap(), written);
    let differs: Vec<usize> = (0..bytes.len())
        .filter(|index| bytes[*index] != blocks[0][*index])
        .collect();
    assert!(
        differs
            .iter()
            .all(|index| *index == 96 || (140..144).contains(index)),
        "{differs:?}"
    );
}

fn each_flipped_bit(bytes: &[u8], mut check: impl FnMut(usize, Vec<u8>)) {
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        check(bit, flipped);
    }
}

#[test]
fn every_flipped_bit_of_a_map_block_is_noticed() {
    let leaf = example("leaf");
    each_flipped_bit(&leaf, |bit, flipped| {
        assert!(
            Page::read(flipped.into(), IDENTITY, LEAF).is_err(),
            "bit {bit} of a leaf"
        );
    });
    let index = PageId {
        run: 9,
        level: 1,
        position: 0,
    };
    let bytes = Page::encode(IDENTITY, index, &[Record::new(&leaf_items()[0])]);
    assert!(Page::read(bytes.clone(), IDENTITY, index).is_ok());
    each_flipped_bit(&bytes, |bit, flipped| {
        assert!(
            Page::read(flipped.into(), IDENTITY, index).is_err(),
            "bit {bit} of an index block"
        );
    });
    let table = PageId {
        run: 9,
        level: TABLE_LEVEL,
        position: 3,
    };
    let bytes = encode_table(IDENTITY, table, b"a part of a root");
    assert_eq!(
        read_table(&bytes, IDENTITY, table).unwrap(),
        b"a part of a root".as_slice()
    );
    each_flipped_bit(&bytes, |bit, flipped| {
        assert!(
            read_table(&flipped.into(), IDENTITY, table).is_err(),
            "bit {bit} of a table block"
        );
    });
}

#[test]
fn every_truncation_of_a_map_block_is_noticed_and_so_is_a_byte_too_many() {
    let leaf = Bytes::from(example("leaf"));
    for length in 0..leaf.len() {
        assert_eq!(
            Page::read(leaf.slice(..length), IDENTITY, LEAF).map(|_| ()),
            Err(FormatError::Length {
                expected: 4096,
                found: length
            })
        );
    }
    let mut longer = leaf.to_vec();
    longer.push(0);
    assert!(Page::read(longer.into(), IDENTITY, LEAF).is_err());
}

#[test]
fn a_misdirected_map_block_is_noticed() {
    let leaf = Bytes::from(example("leaf"));
    for id in [
        PageId { run: 8, ..LEAF },
        PageId { level: 1, ..LEAF },
        PageId { position: 5, ..LEAF },
    ] {
        assert_eq!(
            Page::read(leaf.clone(), IDENTITY, id).map(|_| ()),
            Err(FormatError::Identity)
        );
    }
    for identity in [
        MapIdentity {
            volume: VolumeId(6),
            ..IDENTITY
        },
        MapIdentity {
            layer: LayerId(7),
            ..IDENTITY
        },
    ] {
        assert_eq!(
            Page::read(leaf.clone(), identity, LEAF).map(|_| ()),
            Err(FormatError::Identity)
        );
    }
}

#[test]
fn a_map_block_with_sound_checksums_and_records_that_no_writer_makes_is_refused() {
    let [block, range] = leaf_items();
    let refused = |items: &[Item], id: PageId| {
        let records: Vec<Record> = items.iter().map(Record::new).collect();
        let bytes = Page::encode(IDENTITY, id, &records);
        matches!(Page::read(bytes, IDENTITY, id), Err(FormatError::Field(_)))
    };
    assert!(!refused(&[block, range], LEAF));
    assert!(refused(&[range, block], LEAF), "descending");
    assert!(refused(&[block, block], LEAF), "twice the same");
    let inside = Item {
        lba: range.lba + 5,
        ..block
    };
    assert!(refused(&[range, inside], LEAF), "a block inside of a range");
    assert!(refused(&[Item { count: 0, ..range }], LEAF), "an empty range");
    let wrapping = Item {
        count: u64::MAX,
        ..range
    };
    assert!(refused(&[wrapping], LEAF), "a range past the end");
    assert!(
        refused(&[block, range], PageId { level: 1, ..LEAF }),
        "a child that is a range"
    );
}

#[test]
fn every_flipped_bit_and_truncation_of_a_root_is_noticed() {
    let bytes = example("root");
    let store = MemoryStore::new(10);
    let read = |bytes: &[u8]| {
        let head = RootHead::read(bytes, Some(IDENTITY))?;
        run(head.load(&*store.handle()))
    };
    assert!(read(&bytes).is_ok());
    each_flipped_bit(&bytes, |bit, flipped| {
        assert!(read(&flipped).is_err(), "bit {bit}");
    });
    for length in 0..bytes.len() {
        assert!(read(&bytes[..length]).is_err(), "{length} bytes");
    }
}

#[test]
fn a_root_with_runs_that_no_writer_makes_is_refused() {
    let load = |change: fn(&mut Root), spilled: Option<&Spilled>| {
        let mut root = example_root();
        change(&mut root);
        let body = root_format::encode_body(&root);
        let head = RootHead::read(&root_format::encode_head(&root, &body, spilled), None)?;
        run(head.load(&*MemoryStore::new(10).handle())).map(|_| ())
    };
    let refused = |field| Err(MapError::Root(FormatError::Field(field)));
    assert_eq!(load(|_| {}, None), Ok(()));
    assert_eq!(load(|root| root.map.run_next = RUNS, None), refused("run_next"));
    assert_eq!(
        load(|root| root.map.runs[0].run.number = RUNS, None),
        refused("number")
    );
    for (leaves, records, field) in [
        (0, 1, "leaves"),
        (POSITIONS, u64::from(POSITIONS), "leaves"),
        (2, 1, "records"),
        (2, 2 * 89 + 1, "records"),
    ] {
        let mut root = example_root();
        root.map.runs[0].run.leaves = leaves;
        root.map.runs[0].run.records = records;
        let body = root_format::encode_body(&root);
        let head = RootHead::read(&root_format::encode_head(&root, &body, None), None).unwrap();
        let loaded = run(head.load(&*MemoryStore::new(10).handle())).map(|_| ());
        assert_eq!(loaded, refused(field), "{leaves} leaves, {records} records");
    }
    let spilled = Spilled {
        run: RUNS,
        places: vec![example_root().map.runs[0].run.top],
        bands: Vec::new(),
    };
    assert_eq!(load(|_| {}, Some(&spilled)), refused("table_run"));
}

#[test]
fn a_root_whose_counts_could_overflow_is_refused() {
    let load = |page_counts: &[(u64, u64)], record_counts: &[(u64, u64)]| {
        let counts = |list: &[(u64, u64)]| list.iter().map(|(band, count)| (BandId(*band), *count)).collect();
        let mut root = example_root();
        root.map.runs[0].page_counts = counts(page_counts);
        root.map.record_counts = counts(record_counts);
        let body = root_format::encode_body(&root);
        let head = RootHead::read(&root_format::encode_head(&root, &body, None), None)?;
        run(head.load(&*MemoryStore::new(10).handle())).map(|_| ())
    };
    let refused = |field| Err(MapError::Root(FormatError::Field(field)));
    assert_eq!(load(&[(1, 20 * 16384), (2, 1)], &[(1, 1 << 49), (2, 1)]), Ok(()));
    assert_eq!(load(&[(1, 20 * 16384 + 1)], &[]), refused("count"));
    assert_eq!(load(&[], &[(1, u64::MAX)]), refused("count"));
    assert_eq!(load(&[], &[(1, 0)]), refused("count"));
    assert_eq!(load(&[], &[(1, 1), (1, 1)]), refused("band of a count"));
}

#[test]
fn an_index_block_has_no_children_past_the_last_position() {
    let index = |position| PageId {
        run: 9,
        level: 1,
        position,
    };
    let last = POSITIONS / 89;
    let slot_of_the_last = (POSITIONS - 1 - last * 89) as usize;
    let records: Vec<Record> = (0..89)
        .map(|lba| {
            Record::new(&Item {
                lba,
                ..leaf_items()[0]
            })
        })
        .collect();
    for (id, slot, exists) in [
        (index(last), slot_of_the_last, true),
        (index(last), slot_of_the_last + 1, false),
        (index(POSITIONS - 1), 0, false),
    ] {
        let page = Page::read(Page::encode(IDENTITY, id, &records), IDENTITY, id).unwrap();
        assert_eq!(child(id, slot, &page).is_ok(), exists, "slot {slot}");
    }
}

#[test]
fn a_root_of_another_volume_is_refused_unless_only_drives_are_known() {
    let bytes = example("root");
    let other = MapIdentity {
        volume: VolumeId(70),
        layer: LayerId(8),
    };
    assert!(matches!(
        RootHead::read(&bytes, Some(other)),
        Err(MapError::Root(FormatError::Identity))
    ));
    assert_eq!(RootHead::read(&bytes, None).unwrap().identity(), IDENTITY);
}

#[test]
fn a_large_root_spills_and_its_head_names_the_bands_one_needs_to_read_it() {
    let store = MemoryStore::new(7);
    let map = PageMap::new(IDENTITY, store.handle(), MapSettings::default());
    let mut root = example_root();
    let geometry = Geometry::new(4, 2).unwrap();
    root.bands = (0..2000)
        .map(|id| band(super::memory::MAP_BANDS + id, geometry))
        .collect();
    root.map.moved = (0..50)
        .map(|position| {
            let id = PageId {
                run: 9,
                level: 0,
                position,
            };
            (id.lba(), root.map.runs[0].run.top)
        })
        .collect();
    let payload = run(root.clone().write(&map, 2)).unwrap();
    assert!(payload.len() <= 2);
    let head = RootHead::read(&payload.concat(), Some(IDENTITY)).unwrap();
    let named: Vec<BandId> = head.bands().iter().map(|band| band.band.id).collect();
    assert_eq!(named, store.bands());
    let read = run(head.load(&*store.handle())).unwrap();
    root.map.run_next = read.map.run_next;
    assert_eq!(read, root);

    // A head that is too long for the stripe is an error, not a truncated root.
    let mut huge = root;
    huge.name = "x".repeat(8 << 20);
    assert!(matches!(
        run(huge.write(&map, 2)),
        Err(MapError::RootTooLarge { .. })
    ));
}

#[test]
fn every_flipped_bit_in_the_head_of_a_spilled_root_is_noticed() {
    let store = MemoryStore::new(7);
    let map = PageMap::new(IDENTITY, store.handle(), MapSettings::default());
    let mut root = example_root();
    root.name = "x".repeat(5000);
    let payload = run(root.write(&map, 1)).unwrap().concat();
    let used = 144 + 2 * 45 + 4;
    assert_eq!(payload[used..].iter().filter(|byte| **byte != 0).count(), 0);
    each_flipped_bit(&payload[..used], |bit, flipped| {
        assert!(RootHead::read(&flipped, Some(IDENTITY)).is_err(), "bit {bit}");
    });
}

#[test]
fn an_lba_of_a_map_block_is_outside_of_the_hosts() {
    assert!(crate::map::is_map_lba(LEAF.lba()));
    assert!(LEAF.lba() > Lba(1 << 62));
}
