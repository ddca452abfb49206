use weft_proto::band::{ChunkAddress, ChunkSize, WINDOW_ROWS_DEFAULT};
use weft_proto::id::DriveId;

use super::*;

const KEY: HeaderKey = HeaderKey([0x42; 32]);
const CLUSTER: ClusterId = ClusterId([0xC1; 16]);

fn band() -> Band {
    Band {
        id: BandId(0x0B),
        volume: VolumeId(0x0C),
        layer: LayerId(0x0D),
        epoch: Epoch(0x0E),
        geometry: Geometry { k: 4, m: 2 },
        chunk_size: ChunkSize::Mib1,
        window_rows: WINDOW_ROWS_DEFAULT,
        version: 1,
        columns: (0..6)
            .map(|drive| ChunkAddress {
                drive: DriveId(drive),
                offset_mib: 1,
            })
            .collect(),
    }
}

fn header() -> StripeHeader {
    StripeHeader {
        cluster: CLUSTER,
        volume: VolumeId(0x0C),
        layer: LayerId(0x0D),
        epoch: Epoch(0x0E),
        band: BandId(0x0B),
        stripe: StripeNumber(0x11),
        closed_through: StripeNumber(0x10),
        row: 7,
        d: 2,
        geometry: Geometry { k: 4, m: 2 },
        shape: Shape {
            start: 5,
            w: 1,
            skipped: ColumnSet(0b10),
        },
        blocks: vec![BlockRecord {
            lba: Lba(0x21),
            sequence: Sequence {
                epoch: Epoch(0x0E),
                counter: 0x22,
            },
            crc: 0xAABB_CCDD,
        }],
        zeroes: vec![ZeroRecord {
            range: LbaRange {
                start: Lba(0x31),
                count: 0x32,
            },
            sequence: Sequence {
                epoch: Epoch(0x03),
                counter: 0x33,
            },
        }],
    }
}

const PART: ShardPart = ShardPart {
    index: 1,
    column: 0,
    payload_crc: 0x0102_0304,
};

/// The example of `docs/format/stripe.md`, with the two tags left out.
fn example() -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(b"WEFTSTRP");
    bytes.extend_from_slice(&[2, 0, 4, 2, 1, 5, 2, 0]);
    bytes.extend_from_slice(&[0xC1; 16]);
    for number in [0x0C, 0x0D, 0x0E, 0x0B, 0x11, 0x10] {
        bytes.extend_from_slice(&[number, 0, 0, 0, 0, 0, 0, 0]);
    }
    bytes.extend_from_slice(&[7, 0, 0, 0, 0b10, 0, 0, 0]);
    bytes.extend_from_slice(&[1, 0, 1, 0, 252, 0, 0, 0]);
    bytes.extend_from_slice(&[0; 32]);
    bytes.extend_from_slice(&[0; 16]); // common tag
    bytes.extend_from_slice(&[1, 0, 0, 0, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend_from_slice(&[0; 16]); // shard tag
    bytes.extend_from_slice(&[0; 16]);
    for number in [0x21, 0x0E, 0x22] {
        bytes.extend_from_slice(&[number, 0, 0, 0, 0, 0, 0, 0]);
    }
    bytes.extend_from_slice(&[0xDD, 0xCC, 0xBB, 0xAA]);
    for number in [0x31, 0x32, 0x03, 0x33] {
        bytes.extend_from_slice(&[number, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(bytes.len(), 252);
    // The tags as the page defines them, with nothing but BLAKE3 itself.
    let mut authenticated = bytes[..128].to_vec();
    authenticated.extend_from_slice(&bytes[192..]);
    let tag = blake3::keyed_hash(&KEY.0, &authenticated);
    bytes[128..144].copy_from_slice(&tag.as_bytes()[..16]);
    let tag = blake3::keyed_hash(&KEY.0, &bytes[128..160]);
    bytes[160..176].copy_from_slice(&tag.as_bytes()[..16]);
    bytes.resize(4096, 0);
    bytes
}

fn parse(block: &[u8]) -> Result<(StripeHeader, ShardPart), HeaderError> {
    StripeHeader::parse(block, &KEY, CLUSTER, &band(), 7, 0)
}

/// The used bytes of the page's example.
fn page_example() -> Vec<u8> {
    let page = include_str!("../../../../docs/format/stripe.md");
    let hex = page
        .split("```hex\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .expect("the page has an example");
    hex.split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16).expect("two hex digits"))
        .collect()
}

#[test]
fn the_pages_example_is_what_is_written_and_read() {
    let lines: Vec<String> = example()[..252]
        .chunks(16)
        .map(|line| line.iter().map(|byte| format!("{byte:02x} ")).collect())
        .collect();
    assert_eq!(
        page_example(),
        example()[..252],
        "the page should say\n{}",
        lines.join("\n")
    );
    assert_eq!(header().template(&KEY).shard(PART), example());
    assert_eq!(parse(&example()), Ok((header(), PART)));
}

#[test]
fn every_flipped_bit_of_the_used_bytes_is_noticed() {
    let example = example();
    // Bytes 176 … 191 are reserved and not authenticated; nothing is read from them.
    for at in (0..176).chain(192..252) {
        for bit in 0..8 {
            let mut block = example.clone();
            block[at] ^= 1 << bit;
            assert!(parse(&block).is_err(), "byte {at} bit {bit}");
        }
    }
}

#[test]
fn every_truncation_is_noticed() {
    let example = example();
    for length in 0..252 {
        assert!(parse(&example[..length]).is_err(), "{length}");
    }
}

#[test]
fn a_header_is_believed_only_where_it_was_written() {
    let example = example();
    let parse = |key, cluster, band: &Band, row, column| {
        StripeHeader::parse(&example, key, cluster, band, row, column).unwrap_err()
    };
    let elsewhere = HeaderError::Elsewhere;
    assert_eq!(parse(&KEY, CLUSTER, &band(), 8, 0), elsewhere);
    assert_eq!(parse(&KEY, CLUSTER, &band(), 7, 2), elsewhere);
    assert_eq!(parse(&KEY, ClusterId([0; 16]), &band(), 7, 0), elsewhere);
    let mut other = band();
    other.id = BandId(9);
    assert_eq!(parse(&KEY, CLUSTER, &other, 7, 0), elsewhere);
    let mut other = band();
    other.epoch = Epoch(9);
    assert_eq!(parse(&KEY, CLUSTER, &other, 7, 0), elsewhere);
    let key = HeaderKey([1; 32]);
    assert_eq!(parse(&key, CLUSTER, &band(), 7, 0), HeaderError::NotAuthentic);
}

#[test]
fn a_sibling_of_a_known_header_is_believed_exactly_when_it_would_be_parsed() {
    let column = 2;
    let part = ShardPart {
        index: 2,
        column,
        payload_crc: 7,
    };
    let template = header().template(&KEY);
    let sibling = template.shard(part);
    let known = example();
    let believed =
        |known: &[u8], block: &[u8], key, column| header().parse_sibling(known, block, key, column);
    assert_eq!(believed(&known, &sibling, &KEY, column), Some(part));
    assert_eq!(
        StripeHeader::parse(&sibling, &KEY, CLUSTER, &band(), 7, column),
        Ok((header(), part))
    );
    for at in (0..176).chain(192..252) {
        for bit in 0..8 {
            let mut block = sibling.to_vec();
            block[at] ^= 1 << bit;
            assert_eq!(
                believed(&known, &block, &KEY, column),
                None,
                "byte {at} bit {bit}"
            );
        }
    }
    for length in 0..252 {
        assert_eq!(
            believed(&known, &sibling[..length], &KEY, column),
            None,
            "{length}"
        );
    }
    assert_eq!(believed(&known, &sibling, &HeaderKey([1; 32]), column), None);
    assert_eq!(
        believed(&known, &sibling, &KEY, 0),
        None,
        "found in another column"
    );
    let misplaced = template.shard(ShardPart { column: 0, ..part });
    assert_eq!(
        believed(&known, &misplaced, &KEY, 0),
        None,
        "not the shard of that column"
    );
    let mut other = header();
    other.closed_through.0 += 1;
    let other = other.template(&KEY).shard(part);
    assert_eq!(believed(&known, &other, &KEY, column), None, "of another stripe");
}

#[test]
fn an_authentic_header_whose_numbers_disagree_is_refused() {
    let refuse = |change: &dyn Fn(&mut StripeHeader), part: ShardPart| {
        let mut header = header();
        change(&mut header);
        let block = header.template(&KEY).shard(part);
        assert_eq!(
            StripeHeader::parse(&block, &KEY, CLUSTER, &band(), header.row, 0).unwrap_err(),
            HeaderError::Inconsistent
        );
    };
    refuse(&|header| header.d = 0, PART); // more blocks than slots
    refuse(&|header| header.shape.w = 5, PART);
    refuse(&|header| header.shape.start = 6, PART);
    refuse(&|header| header.shape.skipped = ColumnSet(1 << 6), PART);
    refuse(&|header| header.geometry.k = 3, PART);
    refuse(&|header| header.row = 254, PART); // past the end of the chunk
    refuse(&|header| header.zeroes[0].range.count = u64::MAX, PART);
    refuse(&|_| (), ShardPart { index: 2, ..PART }); // not the shard of that column
}

#[test]
fn a_full_table_fits_one_block() {
    assert!(StripeHeader::has_room(BLOCKS_MAX, 10));
    assert!(!StripeHeader::has_room(BLOCKS_MAX + 1, 0));
    assert!(StripeHeader::has_room(0, ZEROES_MAX));
    assert!(!StripeHeader::has_room(0, ZEROES_MAX + 1));
}
