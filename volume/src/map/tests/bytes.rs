//! The layouts against bytes that were written by hand, and against every flipped bit and truncation.

use bytes::Bytes;
use weft_proto::band::{Band, ChunkAddress, ChunkSize, Geometry};
use weft_proto::id::{BandId, ClusterId, DriveId, Epoch, LayerId, Sequence, StripeNumber, VolumeId};
use weft_proto::units::Lba;

use crate::entry::{ColumnSet, MapEntry};
use crate::map::address::{POSITIONS, PageId, RUNS, TABLE_LEVEL};
use crate::map::block::{FormatError, MapIdentity, crc32c, encode_table, read_table};
use crate::map::index::{Child, Index};
use crate::map::leaf::{Item, LEAF_RECORDS_MAX, LeafBuilder};
use crate::map::page::Page;
use crate::map::root::{BandState, Root, RootBand, Spilled};
use crate::map::root_format;
use crate::map::root_stripe::RootHead;
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

const INDEX: PageId = PageId {
    run: 9,
    level: 1,
    position: 0,
};

fn block_entry() -> MapEntry {
    MapEntry {
        band: BandId(5),
        row: 300,
        column: 2,
        start: 1,
        w: 4,
        skipped: ColumnSet::NONE.with(5),
        sequence: sequence(1000),
        crc: 0xDEAD_BEEF,
    }
}

fn leaf_items() -> [Item; 3] {
    let block = Item {
        lba: 0x10,
        count: 1,
        cell: Cell::Data(block_entry()),
        settled: true,
    };
    let next = MapEntry {
        band: BandId(7),
        row: 302,
        crc: 0xDEAD_C0DE,
        sequence: sequence(998),
        ..block_entry()
    };
    [
        block,
        Item {
            lba: 0x13,
            cell: Cell::Data(next),
            ..block
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
    assert_eq!(
        encode_leaf(&leaf_items()),
        bytes,
        "{}",
        hex(&encode_leaf(&leaf_items()))
    );
    let Ok(Page::Leaf(leaf)) = Page::read(bytes, IDENTITY, LEAF) else {
        panic!("a leaf");
    };
    let items: Vec<Item> = (0..leaf.len()).map(|slot| leaf.item(slot)).collect();
    assert_eq!(items, leaf_items());
}

#[test]
fn the_index_block_of_the_format_page_decodes_and_encodes() {
    let bytes = Bytes::from(example("index"));
    let children = [Child::new(0x10, block_entry())];
    let encoded = Index::encode(IDENTITY, INDEX, &children);
    assert_eq!(encoded, bytes, "{}", hex(&encoded));
    let page = Page::read(bytes, IDENTITY, INDEX).unwrap();
    assert_eq!(page.children(), children);
}

/// As the format page has it, for who changes the layout.
fn hex(bytes: &[u8]) -> String {
    let lines = bytes
        .chunks(16)
        .enumerate()
        .filter(|(_, line)| line.iter().any(|byte| *byte != 0));
    lines
        .map(|(index, line)| {
            let line: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{:04x}  {}\n", index * 16, line.join(" "))
        })
        .collect()
}

fn encode_leaf(items: &[Item]) -> Bytes {
    let mut builder = LeafBuilder::default();
    assert!(items.iter().all(|item| builder.push(item)));
    builder.encode(IDENTITY, LEAF)
}

#[test]
fn the_first_versions_of_map_blocks_and_roots_are_refused_by_name() {
    let mut block = example("leaf");
    block[8] = 1;
    let crc = crc32c(&block[..60]);
    block[60..64].copy_from_slice(&crc.to_le_bytes());
    let error = Page::read(block.into(), IDENTITY, LEAF).unwrap_err();
    assert_eq!(error.to_string(), "unknown version 1");
    let mut root = example("root");
    root[8] = 1;
    let crc = crc32c(&root[..140]);
    root[140..144].copy_from_slice(&crc.to_le_bytes());
    let error = RootHead::read(&root, Some(IDENTITY)).unwrap_err();
    assert_eq!(error.to_string(), "page-map root: unknown version 1");
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
    let bytes = Index::encode(IDENTITY, INDEX, &[Child::new(0x10, block_entry())]);
    assert!(Page::read(bytes.clone(), IDENTITY, INDEX).is_ok());
    each_flipped_bit(&bytes, |bit, flipped| {
        assert!(
            Page::read(flipped.into(), IDENTITY, INDEX).is_err(),
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
    let [block, next, range] = leaf_items();
    let refused = |items: &[Item]| {
        let read = Page::read(encode_leaf(items), IDENTITY, LEAF);
        matches!(read, Err(FormatError::Field(_)))
    };
    assert!(!refused(&[block, next, range]));
    assert!(refused(&[range, block]), "descending");
    assert!(refused(&[next, block]), "descending, without a range");
    assert!(refused(&[block, block]), "twice the same");
    let inside = Item {
        lba: range.lba + 5,
        ..block
    };
    assert!(refused(&[range, inside]), "a block inside of a range");
    let wrapping = Item {
        count: u64::MAX,
        ..range
    };
    assert!(refused(&[wrapping]), "a range past the end");
    assert!(refused(&[Item { count: 0, ..range }]), "an empty range");

    let refused = |children: &[Child]| {
        let read = Page::read(Index::encode(IDENTITY, INDEX, children), IDENTITY, INDEX);
        matches!(read, Err(FormatError::Field(_)))
    };
    let child = |lba| Child::new(lba, block_entry());
    assert!(!refused(&[child(1), child(2)]));
    assert!(refused(&[child(2), child(1)]), "descending");
    assert!(refused(&[child(1), child(1)]), "twice the same");
    let nowhere = MapEntry {
        w: 0,
        ..block_entry()
    };
    assert!(refused(&[Child::new(1, nowhere)]), "a child that is nowhere");
}

#[test]
fn a_leaf_with_a_sound_checksum_and_a_frame_that_no_writer_makes_is_refused() {
    let read = |change: fn(&mut [u8])| {
        let mut block = example("leaf");
        change(&mut block);
        let crc = crc32c(&block[64..]);
        block[56..60].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32c(&block[..60]);
        block[60..64].copy_from_slice(&crc.to_le_bytes());
        Page::read(block.into(), IDENTITY, LEAF).map(|_| ())
    };
    let refused = |field| Err(FormatError::Field(field));
    assert_eq!(read(|_| {}), Ok(()));
    assert_eq!(read(|block| block[12] = 0), refused("count"));
    let too_many = |block: &mut [u8]| {
        let count = LEAF_RECORDS_MAX as u16 + 1;
        block[12..14].copy_from_slice(&count.to_le_bytes());
    };
    assert_eq!(read(too_many), refused("count"));
    assert_eq!(read(|block| block[160] = 65), refused("width"));
    let past_the_end = |block: &mut [u8]| block[12..14].copy_from_slice(&1000_u16.to_le_bytes());
    assert_eq!(read(past_the_end), refused("width"), "records past the end");
    // The lowest row is 300 now; a row has 16 bits.
    let row = |block: &mut [u8]| block[128..136].copy_from_slice(&65_534_u64.to_le_bytes());
    assert_eq!(read(row), refused("lowest"));
    // A band of 64 bits above the lowest, which is 5.
    assert_eq!(read(|block| block[160 + 6] = 64), refused("lowest"));
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

/// What a reader makes of a root with this body.
fn load_root(root: &Root, body: &[u8], spilled: Option<&Spilled>) -> Result<(), MapError> {
    let head = RootHead::read(&root_format::encode_head(root, body, spilled), None)?;
    run(head.load(&*MemoryStore::new(10).handle())).map(|_| ())
}

#[test]
fn a_root_with_runs_that_no_writer_makes_is_refused() {
    let load = |change: fn(&mut Root), spilled: Option<&Spilled>| {
        let mut root = example_root();
        change(&mut root);
        load_root(&root, &root_format::encode_body(&root), spilled)
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
        (2, 2 * LEAF_RECORDS_MAX as u64 + 1, "records"),
    ] {
        let mut root = example_root();
        root.map.runs[0].run.leaves = leaves;
        root.map.runs[0].run.records = records;
        let loaded = load_root(&root, &root_format::encode_body(&root), None);
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
        load_root(&root, &root_format::encode_body(&root), None)
    };
    let refused = |field| Err(MapError::Root(FormatError::Field(field)));
    assert_eq!(load(&[(1, 20 * 16384), (2, 1)], &[(1, 1 << 49), (2, 1)]), Ok(()));
    assert_eq!(load(&[(1, 20 * 16384 + 1)], &[]), refused("count"));
    assert_eq!(load(&[], &[(1, u64::MAX)]), refused("count"));
    assert_eq!(load(&[], &[(1, 0)]), refused("count"));
    assert_eq!(load(&[], &[(1, 1), (1, 2)]), refused("band of a count"));
    assert_eq!(load(&[], &[(2, 1), (1, 1)]), refused("band of a count"));
}

#[test]
fn a_root_with_bands_that_no_writer_makes_is_refused() {
    let load = |change: fn(&mut Root)| {
        let mut root = example_root();
        change(&mut root);
        load_root(&root, &root_format::encode_body(&root), None)
    };
    let refused = |field| Err(MapError::Root(FormatError::Field(field)));
    let twice = |root: &mut Root| {
        let mut again = root.bands[0].clone();
        again.append_row += 1;
        root.bands.push(again);
    };
    assert_eq!(load(twice), refused("band"));
    // A band that says another geometry than its two chunks are of.
    let load_as = |k: u8, m: u8| {
        let mut root = example_root();
        let body = root_format::encode_body(&root);
        let two_chunks = [2, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0];
        let chunks_at = body.windows(12).position(|bytes| bytes == two_chunks).unwrap();
        let band = &mut root.bands[0].band;
        band.geometry = Geometry { k, m };
        band.columns.resize(usize::from(k + m), band.columns[0]);
        let mut changed = root_format::encode_body(&root);
        changed.truncate(chunks_at);
        changed.extend_from_slice(&body[chunks_at..]);
        load_root(&root, &changed, None)
    };
    assert_eq!(load_as(1, 1), Ok(()));
    assert_eq!(load_as(1, 2), refused("columns"));
    assert_eq!(load_as(0, 2), refused("k, m"));
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
    let children: Vec<Child> = (0..89).map(|lba| Child::new(lba, block_entry())).collect();
    for (id, slot, exists) in [
        (index(last), slot_of_the_last, true),
        (index(last), slot_of_the_last + 1, false),
        (index(POSITIONS - 1), 0, false),
    ] {
        let page = Page::read(Index::encode(IDENTITY, id, &children), IDENTITY, id).unwrap();
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
