//! The bytes of a label, as `docs/format/label.md` has them.
//!
//! This module is layout, and the checks a copy can fail on its own. Which of two copies counts is decided in
//! [`super`].

use weft_proto::band::DriveClass;
use weft_proto::id::{ClusterId, DriveId, DriveUuid, NodeId};
use weft_proto::units::MIB;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{AuthenticationKey, CopyPlace, Label};

/// Bytes of the header block.
pub(super) const HEADER_BYTES: usize = 4096;

/// Bytes of the area that each copy has.
pub(super) const COPY_BYTES: usize = MIB as usize;

/// Opens every label.
pub(super) const MAGIC: [u8; 8] = *b"WEFTLABL";

/// A version of the layout. 1: the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version(pub(super) u32);

impl Version {
    pub(super) const CURRENT: Self = Self(1);
}

/// In place of a drive or node number: none.
const NO_ID: u32 = u32::MAX;

const CLASS_SCM: u8 = 1;
const CLASS_TLC: u8 = 2;
const CLASS_QLC: u8 = 3;

/// The header block.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    /// `WEFTLABL`.
    magic: [u8; 8],
    version: U32,
    /// Bytes of header block and body.
    length: U32,
    /// crc32c of this block, with this field zero.
    header_crc: U32,
    /// crc32c of the body.
    body_crc: U32,
    /// Counts changes; the copy with the higher one is newer.
    generation: U64,
    cluster: [u8; 16],
    drive_uuid: [u8; 16],
    /// Number of the drive, or [`NO_ID`] before metadata gave one.
    drive: U32,
    /// Number of the node that serves it, or [`NO_ID`] for a third-party drive.
    node: U32,
    /// Where the copy belongs: 0 at the start of the drive, 1 at its end.
    place: u8,
    class: u8,
    rsvd74: [u8; 6],
    /// Size of the drive in MiB, rounded down.
    size_mib: U32,
    chunks_start_mib: U32,
    /// Exclusive.
    chunks_end_mib: U32,
    rsvd92: [u8; 4],
    key: [u8; 32],
    rsvd128: [u8; 3968],
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);
const _: () = assert!(std::mem::offset_of!(Header, header_crc) == 16);
const _: () = assert!(std::mem::offset_of!(Header, generation) == 24);
const _: () = assert!(std::mem::offset_of!(Header, drive) == 64);
const _: () = assert!(std::mem::offset_of!(Header, size_mib) == 80);
const _: () = assert!(std::mem::offset_of!(Header, key) == 96);
const _: () = assert!(std::mem::offset_of!(Header, rsvd128) == 128);

/// What is wrong with one copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Invalid {
    /// No magic: there is no label here.
    Absent,
    /// Begins like a label; a checksum, a bound or its place is wrong.
    Damaged,
    /// Written by a later version.
    Version(u32),
}

/// A copy whose header checks. Its body is `body_bytes` long and still to be checked.
#[derive(Debug)]
pub(super) struct DecodedHeader {
    /// Without the body.
    pub(super) label: Label,
    pub(super) generation: u64,
    pub(super) body_bytes: usize,
    body_crc: u32,
}

/// The header block and body of one copy.
pub(super) fn encode(label: &Label, generation: u64, place: CopyPlace) -> Vec<u8> {
    let body = &label.body;
    let mut header = Header {
        magic: MAGIC,
        version: U32::new(Version::CURRENT.0),
        length: U32::new((HEADER_BYTES + body.len()) as u32),
        header_crc: U32::ZERO,
        body_crc: U32::new(crc_fast::crc32_iscsi(body)),
        generation: U64::new(generation),
        cluster: label.cluster.0,
        drive_uuid: label.drive_uuid.0,
        drive: U32::new(label.drive.map_or(NO_ID, |drive| drive.0)),
        node: U32::new(label.node.map_or(NO_ID, |node| node.0)),
        place: match place {
            CopyPlace::First => 0,
            CopyPlace::Last => 1,
        },
        class: match label.class {
            DriveClass::Scm => CLASS_SCM,
            DriveClass::Tlc => CLASS_TLC,
            DriveClass::Qlc => CLASS_QLC,
        },
        rsvd74: [0; 6],
        size_mib: U32::new(label.size_mib),
        chunks_start_mib: U32::new(label.chunks_start_mib),
        chunks_end_mib: U32::new(label.chunks_end_mib),
        rsvd92: [0; 4],
        key: label.key.0,
        rsvd128: [0; 3968],
    };
    header.header_crc = U32::new(crc_fast::crc32_iscsi(header.as_bytes()));
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

/// Checks the header block of the copy at `place`.
pub(super) fn decode_header(block: &[u8], place: CopyPlace) -> Result<DecodedHeader, Invalid> {
    let Ok((header, _)) = Header::read_from_prefix(block) else {
        return Err(Invalid::Damaged);
    };
    if header.magic != MAGIC {
        return Err(Invalid::Absent);
    }
    // The checksum before the version: a damaged version is damage, not the future. It stands at the same
    // place in every version, and so does the length of the block it covers.
    let mut unsummed = header.as_bytes().to_vec();
    unsummed[16..20].fill(0);
    if crc_fast::crc32_iscsi(&unsummed) != header.header_crc.get() {
        return Err(Invalid::Damaged);
    }
    if header.version.get() != Version::CURRENT.0 {
        return Err(Invalid::Version(header.version.get()));
    }
    let length = header.length.get() as usize;
    let expected_place = match place {
        CopyPlace::First => 0,
        CopyPlace::Last => 1,
    };
    if !(HEADER_BYTES..=COPY_BYTES).contains(&length) || header.place != expected_place {
        return Err(Invalid::Damaged);
    }
    let class = match header.class {
        CLASS_SCM => DriveClass::Scm,
        CLASS_TLC => DriveClass::Tlc,
        CLASS_QLC => DriveClass::Qlc,
        _ => return Err(Invalid::Damaged),
    };
    let id = |number: U32| Some(number.get()).filter(|number| *number != NO_ID);
    let label = Label {
        cluster: ClusterId(header.cluster),
        drive_uuid: DriveUuid(header.drive_uuid),
        drive: id(header.drive).map(DriveId),
        node: id(header.node).map(NodeId),
        class,
        size_mib: header.size_mib.get(),
        chunks_start_mib: header.chunks_start_mib.get(),
        chunks_end_mib: header.chunks_end_mib.get(),
        key: AuthenticationKey(header.key),
        body: bytes::Bytes::new(),
    };
    let ordered = 0 < label.chunks_start_mib
        && label.chunks_start_mib < label.chunks_end_mib
        && label.chunks_end_mib < label.size_mib;
    if !ordered {
        return Err(Invalid::Damaged);
    }
    Ok(DecodedHeader {
        label,
        generation: header.generation.get(),
        body_bytes: length - HEADER_BYTES,
        body_crc: header.body_crc.get(),
    })
}

impl DecodedHeader {
    /// Checks the body and puts it into the label.
    pub(super) fn with_body(self, body: bytes::Bytes) -> Result<(Label, u64), Invalid> {
        if body.len() != self.body_bytes || crc_fast::crc32_iscsi(&body) != self.body_crc {
            return Err(Invalid::Damaged);
        }
        Ok((Label { body, ..self.label }, self.generation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of `docs/format/label.md`: offset and bytes of each line of its dump.
    fn example() -> Vec<u8> {
        let page = include_str!("../../../docs/format/label.md");
        let dump = page.split("```text dump\n").nth(1).expect("the page has a dump");
        let dump = dump.split("```").next().expect("the dump ends");
        let mut bytes = vec![0; HEADER_BYTES];
        for line in dump.lines() {
            let (offset, row) = line.split_once(':').expect("offset: bytes");
            let offset = usize::from_str_radix(offset, 16).expect("a hexadecimal offset");
            for (index, byte) in row.split_whitespace().enumerate() {
                let at = offset + index;
                bytes.resize(bytes.len().max(at + 1), 0);
                bytes[at] = u8::from_str_radix(byte, 16).expect("a hexadecimal byte");
            }
        }
        bytes
    }

    fn example_label() -> Label {
        Label {
            cluster: "00010203-0405-0607-0809-0a0b0c0d0e0f".parse().unwrap(),
            drive_uuid: "f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff".parse().unwrap(),
            drive: Some(DriveId(7)),
            node: None,
            class: DriveClass::Qlc,
            size_mib: 1024,
            chunks_start_mib: 1,
            chunks_end_mib: 1023,
            key: AuthenticationKey([0xa5; 32]),
            body: bytes::Bytes::from_static(b"weft"),
        }
    }

    fn decode(bytes: &[u8], place: CopyPlace) -> Result<(Label, u64), Invalid> {
        let header = decode_header(bytes, place)?;
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default().to_vec();
        header.with_body(body.into())
    }

    #[test]
    fn the_example_of_the_format_page_is_what_it_says() {
        assert_eq!(decode(&example(), CopyPlace::Last), Ok((example_label(), 258)));
    }

    #[test]
    fn a_label_is_written_as_the_format_page_shows() {
        assert!(encode(&example_label(), 258, CopyPlace::Last) == example());
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = example();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                let expected = if at < 8 { Invalid::Absent } else { Invalid::Damaged };
                assert_eq!(
                    decode(&bad, CopyPlace::Last),
                    Err(expected),
                    "byte {at}, bit {bit}"
                );
            }
        }
    }

    #[test]
    fn every_truncation_is_noticed() {
        let good = example();
        for len in 0..good.len() {
            assert!(decode(&good[..len], CopyPlace::Last).is_err(), "{len} bytes");
        }
        let mut longer = good;
        longer.push(0);
        assert_eq!(decode(&longer, CopyPlace::Last), Err(Invalid::Damaged));
    }

    #[test]
    fn a_copy_at_the_wrong_end_is_damage() {
        assert_eq!(decode(&example(), CopyPlace::First), Err(Invalid::Damaged));
    }

    /// With the checksum made right, so that only the change itself can be noticed.
    fn changed(at: usize, bytes: &[u8]) -> Result<(Label, u64), Invalid> {
        let mut copy = example();
        copy[at..at + bytes.len()].copy_from_slice(bytes);
        copy[16..20].fill(0);
        let crc = crc_fast::crc32_iscsi(&copy[..HEADER_BYTES]);
        copy[16..20].copy_from_slice(U32::new(crc).as_bytes());
        decode(&copy, CopyPlace::Last)
    }

    #[test]
    fn a_later_version_is_told_apart_from_damage() {
        assert_eq!(changed(8, &[2, 0, 0, 0]), Err(Invalid::Version(2)));
    }

    #[test]
    fn nonsense_with_a_right_checksum_is_damage() {
        for (at, bytes) in [
            (12, [0, 0, 0, 0]),    // length below the header
            (12, [1, 0, 0x10, 0]), // length past the area
            (84, [0, 0, 0, 0]),    // chunks begin in the label
            (88, [1, 0, 0, 0]),    // no chunks
            (88, [0, 4, 0, 0]),    // chunks end in the last label
            (72, [1, 0, 0, 0]),    // no such class
        ] {
            assert_eq!(changed(at, &bytes), Err(Invalid::Damaged), "{at}: {bytes:?}");
        }
    }
}
