//! The page map as drives have it: a root (inline or spilled over table blocks), and the index blocks and leaves that its runs
//! consist of.
//!
//! - A root that is believed is written and read again to the same.
//! - A map over it answers every lookup, with an entry or with an error, and ends.
//! - Memory is bounded by the bytes that are there, not by the counts in them.

use std::mem::offset_of;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use weft_block::BlockError;
use weft_proto::band::{Band, ChunkAddress, ChunkSize, Geometry};
use weft_proto::id::{BandId, ClusterId, DriveId, Epoch, LayerId, Sequence, StripeNumber, VolumeId};
use weft_proto::tcp::crc32c;
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};
use weft_volume::entry::{ColumnSet, MapEntry};
use weft_volume::map::{
    BandState, MapBlock, MapError, MapIdentity, MapRoot, MapSettings, PageMap, PageStore, Root, RootBand,
    RootHead,
};

use crate::input::Input;
use crate::memory::bounded;

const IDENTITY: MapIdentity = MapIdentity {
    volume: VolumeId(12),
    layer: LayerId(13),
};

/// The header of a root, as `docs/format/checkpoint.md` has it: only what is made right here.
#[repr(C)]
struct RootLayout {
    fixed: [u8; 104],
    inline_bytes: [u8; 4],
    inline_crc: [u8; 4],
    body_bytes: [u8; 4],
    body_crc: [u8; 4],
    rsvd120: [u8; 20],
    header_crc: [u8; 4],
}
const ROOT_HEADER: usize = size_of::<RootLayout>();
const _: () = assert!(ROOT_HEADER == 144);

/// The header of a map block.
#[repr(C)]
struct PageLayout {
    magic: [u8; 8],
    version: [u8; 2],
    level: u8,
    rsvd11: u8,
    count: [u8; 2],
    rsvd14: [u8; 2],
    volume: [u8; 8],
    layer: [u8; 8],
    run: [u8; 4],
    position: [u8; 4],
    rsvd40: [u8; 16],
    body_crc: [u8; 4],
    header_crc: [u8; 4],
}
const PAGE_HEADER: usize = size_of::<PageLayout>();
const _: () = assert!(PAGE_HEADER == 64);

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Makes a root's lengths and checksums right; the body is everything after the header.
fn repair_root(bytes: &mut [u8]) {
    if bytes.len() < ROOT_HEADER {
        return;
    }
    let (header, body) = bytes.split_at_mut(ROOT_HEADER);
    let length = (body.len() as u32).to_le_bytes();
    let crc = crc32c(body).to_le_bytes();
    put(header, offset_of!(RootLayout, inline_bytes), &length);
    put(header, offset_of!(RootLayout, inline_crc), &crc);
    let spilled = header[12..16] != [0; 4];
    if !spilled {
        put(header, offset_of!(RootLayout, body_bytes), &length);
        put(header, offset_of!(RootLayout, body_crc), &crc);
    }
    let at = offset_of!(RootLayout, header_crc);
    let crc = crc32c(&header[..at]).to_le_bytes();
    put(header, at, &crc);
}

/// Drives that answer every read of a map block with the next of a few blocks, made right for the place if `repair` says so.
/// What is appended is kept instead.
struct Drives {
    blocks: Vec<Vec<u8>>,
    repair: bool,
    appended: std::cell::RefCell<Vec<MapBlock>>,
}

impl PageStore for Drives {
    fn append(&self, blocks: Vec<MapBlock>) -> LocalBoxFuture<'static, Result<Vec<MapEntry>, BlockError>> {
        let mut appended = self.appended.borrow_mut();
        let places = (appended.len()..).zip(&blocks).map(|(row, _)| place(row as u16));
        let places = places.collect();
        appended.extend(blocks);
        async move { Ok(places) }.boxed_local()
    }

    fn read(&self, lba: Lba, _: MapEntry) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
        let appended = self.appended.borrow();
        let found = appended.iter().find(|block| block.lba == lba);
        let answer = match (found, self.blocks.len()) {
            (Some(block), _) => Ok(block.data.clone()),
            (None, 0) => Err(BlockError::Unrecovered { start: lba }),
            (None, count) => {
                let mut block = self.blocks[(lba.0 % count as u64) as usize].clone();
                if self.repair {
                    repair_page(&mut block, lba);
                }
                Ok(block.into())
            }
        };
        async move { answer }.boxed_local()
    }
}

/// Makes identity, place and checksums of a map block right.
fn repair_page(block: &mut [u8], lba: Lba) {
    put(block, 0, b"WEFTPAGE");
    put(block, offset_of!(PageLayout, version), &2_u16.to_le_bytes());
    block[offset_of!(PageLayout, level)] = (lba.0 >> 28 & 0xf) as u8;
    put(
        block,
        offset_of!(PageLayout, volume),
        &IDENTITY.volume.0.to_le_bytes(),
    );
    put(
        block,
        offset_of!(PageLayout, layer),
        &IDENTITY.layer.0.to_le_bytes(),
    );
    let run = (lba.0 >> 32) as u32 & 0x7fff_ffff;
    put(block, offset_of!(PageLayout, run), &run.to_le_bytes());
    put(
        block,
        offset_of!(PageLayout, position),
        &(lba.0 as u32 & 0x0fff_ffff).to_le_bytes(),
    );
    let body = crc32c(&block[PAGE_HEADER..]).to_le_bytes();
    put(block, offset_of!(PageLayout, body_crc), &body);
    let at = offset_of!(PageLayout, header_crc);
    let header = crc32c(&block[..at]).to_le_bytes();
    put(block, at, &header);
}

fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("drives in memory are always ready")
}

const REPAIR_ROOT: u8 = 1 << 0;
const REPAIR_PAGES: u8 = 1 << 1;

/// Byte 0: what is made right. Two bytes: length of the root. Two: where lookups begin. Then the root, then blocks in pieces of
/// a length in two bytes each.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let root_bytes = usize::from(input.u16());
    let lookup = Lba(u64::from(input.u16()));
    let mut payload = input.bytes(root_bytes).to_vec();
    if flags & REPAIR_ROOT != 0 {
        repair_root(&mut payload);
    }
    let mut blocks = Vec::new();
    while !input.is_empty() && blocks.len() < 8 {
        let bytes = usize::from(input.u16());
        let mut block = input.bytes(bytes.min(BLOCK_BYTES)).to_vec();
        block.resize(BLOCK_BYTES, 0);
        blocks.push(block);
    }
    let drives = Rc::new(Drives {
        blocks,
        repair: flags & REPAIR_PAGES != 0,
        appended: Vec::new().into(),
    });
    bounded(64 * payload.len() + (2 << 20), || {
        let Ok(head) = RootHead::read(&payload, None) else {
            return;
        };
        let _ = head.bands();
        let Ok(root) = now(head.load(&*drives)) else {
            return;
        };
        if root.identity() == IDENTITY {
            look_up(&drives, &root, lookup);
        }
        write_again(&drives, root);
    });
}

fn look_up(drives: &Rc<Drives>, root: &Root, first: Lba) {
    let settings = MapSettings {
        // So that blocks are dropped and read again.
        cache_bytes: 4 * BLOCK_BYTES,
        ..MapSettings::default()
    };
    let map = PageMap::load(root.identity(), drives.clone(), settings, &root.map);
    let range = LbaRange {
        start: first,
        count: 64,
    };
    let _ = map.stats();
    if let Ok(found) = now(map.lookup_range(range)) {
        assert_eq!(found.len(), 64);
        for (offset, mapping) in (0..).zip(found) {
            let single = now(map.lookup(Lba(first.0 + offset)));
            assert_eq!(single, Ok(mapping), "alone as in a range");
        }
    }
    for (band, _) in &root.map.record_counts {
        let _ = (map.references(*band), map.refers_to(*band));
    }
}

/// Writes the root through a map, once in one piece and once spilled, and reads it again.
fn write_again(drives: &Rc<Drives>, root: Root) {
    for blocks_max in [16, 1] {
        let map = PageMap::new(root.identity(), drives.clone(), MapSettings::default());
        drives.appended.borrow_mut().clear();
        let written = match now(root.clone().write(&map, blocks_max)) {
            Ok(written) => written,
            // Its pointers do not fit, or its numbers are used up.
            Err(MapError::RootTooLarge { .. } | MapError::Exhausted) => continue,
            Err(error) => panic!("{error}"),
        };
        assert!(written.len() <= blocks_max);
        let payload = written.concat();
        let head = RootHead::read(&payload, Some(root.identity())).expect("what was written is read");
        let mut again = now(head.load(&**drives)).expect("what was written is read");
        // The writer's own.
        again.map.run_next = root.map.run_next;
        assert_eq!(again, root);
    }
}

fn place(row: u16) -> MapEntry {
    MapEntry {
        band: BandId(11),
        row: u32::from(row),
        column: 1,
        start: 0,
        w: 4,
        skipped: ColumnSet::NONE,
        sequence: Sequence {
            epoch: Epoch(14),
            counter: u64::from(row) + 1,
        },
        crc: 5,
    }
}

/// A map with two runs, one of them with an index block: its root in one piece and spilled, with its blocks.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let drives = Rc::new(Drives {
        blocks: Vec::new(),
        repair: false,
        appended: Vec::new().into(),
    });
    let map = PageMap::new(IDENTITY, drives.clone(), MapSettings::default());
    for (round, blocks) in [200, 40].into_iter().enumerate() {
        for block in 0..blocks {
            let mut entry = place(block);
            entry.sequence.counter += 1000 * round as u64;
            map.insert(Lba(2 * u64::from(block)), entry);
        }
        let zeroes = LbaRange {
            start: Lba(1000),
            count: 50,
        };
        map.zero_range(zeroes, place(999).sequence);
        map.freeze();
        now(map.write_frozen()).expect("drives in memory take it");
    }
    let root = Root {
        cluster: ClusterId([0xc1; 16]),
        volume: IDENTITY.volume,
        name: "volume".into(),
        size_bytes: 1 << 30,
        layer: IDENTITY.layer,
        layers: vec![IDENTITY.layer],
        geometry: Geometry { k: 4, m: 2 },
        epoch: Epoch(14),
        root_version: 3,
        counter_next: 2000,
        stripe_next: StripeNumber(50),
        complete: StripeNumber(49),
        ended: vec![(Epoch(13), StripeNumber(7))],
        bands: (11..14).map(band).collect(),
        map: map.snapshot(),
    };
    let blocks: Vec<Bytes> = drives
        .appended
        .borrow()
        .iter()
        .map(|block| block.data.clone())
        .collect();
    let small = Root {
        map: MapRoot::default(),
        ..root.clone()
    };
    let mut seeds = Vec::new();
    for (root, blocks_max) in [(&root, 16), (&small, 16), (&root, 1)] {
        let payload = now(root.clone().write(&map, blocks_max))
            .expect("it fits")
            .concat();
        let used = payload
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        for flags in [0, REPAIR_PAGES, REPAIR_ROOT | REPAIR_PAGES] {
            let mut seed = vec![flags];
            seed.extend((used as u16).to_le_bytes());
            seed.extend(0_u16.to_le_bytes());
            seed.extend_from_slice(&payload[..used]);
            for block in blocks.iter().take(4) {
                let used = block
                    .iter()
                    .rposition(|byte| *byte != 0)
                    .map_or(0, |last| last + 1);
                seed.extend((used as u16).to_le_bytes());
                seed.extend_from_slice(&block[..used]);
            }
            seeds.push(seed);
        }
    }
    seeds
}

fn band(id: u64) -> RootBand {
    RootBand {
        band: Band {
            id: BandId(id),
            volume: IDENTITY.volume,
            layer: IDENTITY.layer,
            epoch: Epoch(14),
            geometry: Geometry { k: 4, m: 2 },
            chunk_size: ChunkSize::Mib8,
            window_rows: 256,
            version: 1,
            columns: (0..6)
                .map(|drive| ChunkAddress {
                    drive: DriveId(drive),
                    offset_mib: 64,
                })
                .collect(),
        },
        state: BandState::Open,
        append_row: 100,
        stripe_last: StripeNumber(49),
    }
}
