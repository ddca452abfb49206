//! The header block of a shard, as a scan finds it on a drive.
//!
//! A header that parses fits the place it was read from, its shape can be walked, and encoding it again gives a header
//! that parses to the same.

use std::mem::offset_of;

use weft_proto::band::{Band, ChunkAddress, ChunkSize, Geometry};
use weft_proto::id::{BandId, ClusterId, DriveId, Epoch, LayerId, Sequence, StripeNumber, VolumeId};
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};
use weft_volume::entry::{ColumnSet, Shape};
use weft_volume::format::header::{
    BlockRecord, HeaderKey, MAGIC, ShardPart, StripeHeader, VERSION, ZeroRecord,
};

use crate::input::Input;
use crate::memory::bounded;

const KEY: HeaderKey = HeaderKey([0x42; 32]);
const CLUSTER: ClusterId = ClusterId([0xc1; 16]);
const ROW: u32 = 7;

/// The fixed part, as `docs/format/stripe.md` has it: only what is made right here.
#[repr(C)]
struct Layout {
    magic: [u8; 8],
    version: [u8; 2],
    kmws: [u8; 4],
    d: [u8; 2],
    cluster: [u8; 16],
    volume: [u8; 8],
    layer: [u8; 8],
    epoch: [u8; 8],
    band: [u8; 8],
    stripe: [u8; 16],
    row: [u8; 4],
    skipped: [u8; 4],
    block_count: [u8; 2],
    zeroes_count: [u8; 2],
    length: [u8; 4],
    rsvd96: [u8; 32],
    common_tag: [u8; 16],
    shard: [u8; 16],
    shard_tag: [u8; 16],
    rsvd176: [u8; 16],
}
const FIXED: usize = size_of::<Layout>();
const _: () = assert!(FIXED == 192);
const COMMON_TAG: usize = offset_of!(Layout, common_tag);
const SHARD_TAG: usize = offset_of!(Layout, shard_tag);
const _: () = assert!(COMMON_TAG == 128 && SHARD_TAG == 160);

fn band() -> Band {
    Band {
        id: BandId(11),
        volume: VolumeId(12),
        layer: LayerId(13),
        epoch: Epoch(14),
        geometry: Geometry { k: 4, m: 2 },
        chunk_size: ChunkSize::Mib1,
        window_rows: 256,
        version: 1,
        columns: (0..6)
            .map(|drive| ChunkAddress {
                drive: DriveId(drive),
                offset_mib: 1,
            })
            .collect(),
    }
}

const IDENTITY: u8 = 1 << 0;
const LENGTH: u8 = 1 << 1;
const TAGS: u8 = 1 << 2;

/// Makes right what `flags` says.
fn repair(block: &mut [u8], flags: u8) {
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    if flags & IDENTITY != 0 {
        let band = band();
        put(offset_of!(Layout, magic), &MAGIC);
        put(offset_of!(Layout, version), &VERSION.to_le_bytes());
        put(offset_of!(Layout, cluster), &CLUSTER.0);
        put(offset_of!(Layout, volume), &band.volume.0.to_le_bytes());
        put(offset_of!(Layout, layer), &band.layer.0.to_le_bytes());
        put(offset_of!(Layout, epoch), &band.epoch.0.to_le_bytes());
        put(offset_of!(Layout, band), &band.id.0.to_le_bytes());
        put(offset_of!(Layout, row), &ROW.to_le_bytes());
    }
    if flags & LENGTH != 0 {
        let count = |at: usize| usize::from(u16::from_le_bytes([block[at], block[at + 1]]));
        let blocks = count(offset_of!(Layout, block_count));
        let zeroes = count(offset_of!(Layout, zeroes_count));
        let length = (FIXED + 28 * blocks + 32 * zeroes) as u32;
        let at = offset_of!(Layout, length);
        block[at..at + 4].copy_from_slice(&length.to_le_bytes());
    }
    if flags & TAGS != 0 {
        let at = offset_of!(Layout, length);
        let length = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]) as usize;
        let mut hasher = blake3::Hasher::new_keyed(&KEY.0);
        hasher.update(&block[..COMMON_TAG]);
        hasher.update(block.get(FIXED..length).unwrap_or_default());
        let tag = hasher.finalize();
        block[COMMON_TAG..COMMON_TAG + 16].copy_from_slice(&tag.as_bytes()[..16]);
        let tag = blake3::keyed_hash(&KEY.0, &block[COMMON_TAG..SHARD_TAG]);
        block[SHARD_TAG..SHARD_TAG + 16].copy_from_slice(&tag.as_bytes()[..16]);
    }
}

/// Byte 0: what is made right. Byte 1: the column. Then the block, filled up with zeroes if there is room for a header.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let column = input.u8();
    let mut block = input.rest().to_vec();
    if block.len() >= FIXED {
        block.resize(BLOCK_BYTES, 0);
        repair(&mut block, flags);
    }
    let band = band();
    bounded(64 << 10, || {
        let Ok((header, part)) = StripeHeader::parse(&block, &KEY, CLUSTER, &band, ROW, column) else {
            return;
        };
        let columns: Vec<u8> = header.shape.columns(header.geometry).collect();
        assert_eq!(columns.len(), usize::from(header.shape.w + band.geometry.m));
        assert_eq!(columns[usize::from(part.index)], column);
        assert!(header.blocks.len() <= usize::from(header.shape.w) * usize::from(header.d));
        assert!(header.row + 1 + u32::from(header.d) <= band.chunk_size.rows());
        let again = header.template(&KEY).shard(part);
        assert_eq!(
            StripeHeader::parse(&again, &KEY, CLUSTER, &band, ROW, column),
            Ok((header, part))
        );
    });
}

/// A full stripe, a narrow one with a column passed over, and one of zero records only.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let header = |shape, d, blocks: u64, zeroes: u64| StripeHeader {
        cluster: CLUSTER,
        volume: VolumeId(12),
        layer: LayerId(13),
        epoch: Epoch(14),
        band: BandId(11),
        stripe: StripeNumber(17),
        closed_through: StripeNumber(16),
        row: ROW,
        d,
        geometry: Geometry { k: 4, m: 2 },
        shape,
        blocks: (0..blocks)
            .map(|block| BlockRecord {
                lba: Lba(100 + block),
                sequence: sequence(block),
                crc: 0x1234_5678,
            })
            .collect(),
        zeroes: (0..zeroes)
            .map(|range| ZeroRecord {
                range: LbaRange {
                    start: Lba(1000 * range),
                    count: 50,
                },
                sequence: sequence(range),
            })
            .collect(),
    };
    let full = Shape {
        start: 0,
        w: 4,
        skipped: ColumnSet::NONE,
    };
    let narrow = Shape {
        start: 5,
        w: 1,
        skipped: ColumnSet::NONE.with(1),
    };
    let mut seeds = Vec::new();
    for (header, index, column) in [
        (header(full, 8, 32, 0), 3, 3),
        (header(narrow, 2, 1, 1), 1, 0),
        (header(narrow, 0, 0, 3), 0, 5),
    ] {
        let part = ShardPart {
            index,
            column,
            payload_crc: 7,
        };
        let mut block = header.template(&KEY).shard(part).to_vec();
        let used = FIXED + 28 * header.blocks.len() + 32 * header.zeroes.len();
        block.truncate(used);
        for flags in [0, IDENTITY | LENGTH | TAGS] {
            let mut seed = vec![flags, column];
            seed.extend_from_slice(&block);
            seeds.push(seed);
        }
    }
    seeds
}

fn sequence(counter: u64) -> Sequence {
    Sequence {
        epoch: Epoch(14),
        counter,
    }
}
