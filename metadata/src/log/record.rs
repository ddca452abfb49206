//! A record of the write-ahead log: layout and checks, no files.
//!
//! ```text
//!  0        4    5    6        8          16      20        24        28        32
//!  ┌────────┬────┬────┬────────┬──────────┬───────┬─────────┬─────────┬─────────┬──────┬─────────┐
//!  │ "WREC" │vers│kind│ rsvd6  │ sequence │ batch │  body   │ crc32c  │ crc32c  │ body │ padding │
//!  │        │    │    │        │          │       │  bytes  │ of body │ of 0–27 │      │ to 8    │
//!  └────────┴────┴────┴────────┴──────────┴───────┴─────────┴─────────┴─────────┴──────┴─────────┘
//! ```
//!
//! `sequence` counts records over all segments; a record that does not continue it belongs to an earlier life of the
//! file. `batch` counts flushes: a valid record two batches after a broken one proves that the broken one had been
//! answered, and then the log is damaged and not merely torn.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::envelope::crc32c;

const MAGIC: [u8; 4] = *b"WREC";
const VERSION: u8 = 1;
/// Records begin at multiples of this.
pub(super) const ALIGN: usize = 8;
/// Largest body that is believed.
pub(super) const BODY_BYTES_MAX: usize = 256 << 20;

/// What a record says. A newtype: the number comes from a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub(super) struct RecordKind(pub(super) u8);

impl RecordKind {
    /// The first record of a segment: everything that earlier segments said and entries do not.
    pub(super) const SEGMENT: Self = Self(1);
    /// The vote.
    pub(super) const VOTE: Self = Self(2);
    /// The last committed log id.
    pub(super) const COMMITTED: Self = Self(3);
    /// A log entry.
    pub(super) const ENTRY: Self = Self(4);
    /// Entries after this log id are gone.
    pub(super) const TRUNCATE: Self = Self(5);
    /// Entries up to this log id are gone.
    pub(super) const PURGE: Self = Self(6);
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: u8,
    kind: RecordKind,
    rsvd6: U16,
    sequence: U64,
    batch: U32,
    body_bytes: U32,
    body_crc: U32,
    /// Of everything before it.
    header_crc: U32,
}

/// Bytes of a record before its body.
pub(super) const HEADER_BYTES: usize = 32;
const _: () = assert!(size_of::<Header>() == HEADER_BYTES);
const _: () = assert!(std::mem::offset_of!(Header, header_crc) == 28);

/// A record as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub(super) kind: RecordKind,
    pub(super) sequence: u64,
    pub(super) batch: u32,
    pub(super) body: &'a [u8],
    /// With its padding.
    pub(super) bytes: usize,
}

/// Appends a record.
pub(super) fn write(into: &mut Vec<u8>, kind: RecordKind, sequence: u64, batch: u32, body: &[u8]) {
    debug_assert!(into.len().is_multiple_of(ALIGN));
    let mut header = Header {
        magic: MAGIC,
        version: VERSION,
        kind,
        rsvd6: 0.into(),
        sequence: sequence.into(),
        batch: batch.into(),
        body_bytes: u32::try_from(body.len()).unwrap_or(u32::MAX).into(),
        body_crc: crc32c(body).into(),
        header_crc: 0.into(),
    };
    header.header_crc = crc32c(&header.as_bytes()[..28]).into();
    into.extend_from_slice(header.as_bytes());
    into.extend_from_slice(body);
    into.resize(into.len().next_multiple_of(ALIGN), 0);
}

/// Bytes that a record with such a body takes.
pub(super) fn size(body_bytes: usize) -> usize {
    (HEADER_BYTES + body_bytes).next_multiple_of(ALIGN)
}

/// Reads the record at the beginning of `bytes`. `None` if there is no whole one.
pub(super) fn read(bytes: &[u8]) -> Option<Record<'_>> {
    let header = header(bytes)?;
    let body_bytes = header.body_bytes.get() as usize;
    if body_bytes > BODY_BYTES_MAX {
        return None;
    }
    let body = bytes.get(HEADER_BYTES..HEADER_BYTES + body_bytes)?;
    (crc32c(body) == header.body_crc.get()).then_some(Record {
        kind: header.kind,
        sequence: header.sequence.get(),
        batch: header.batch.get(),
        body,
        bytes: size(body_bytes),
    })
}

/// Sequence and batch of the record header at the beginning of `bytes`, whatever became of its body.
pub(super) fn read_header(bytes: &[u8]) -> Option<(u64, u32)> {
    header(bytes).map(|header| (header.sequence.get(), header.batch.get()))
}

fn header(bytes: &[u8]) -> Option<Header> {
    let (header, _) = Header::read_from_prefix(bytes).ok()?;
    let whole =
        header.magic == MAGIC && header.version == VERSION && crc32c(&bytes[..28]) == header.header_crc.get();
    whole.then_some(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_documented_one() {
        let mut bytes = Vec::new();
        write(&mut bytes, RecordKind::ENTRY, 0x0102, 3, b"abc");
        assert_eq!(
            bytes[..24],
            [
                b'W', b'R', b'E', b'C', 1, 4, 0, 0, 0x02, 0x01, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0
            ]
        );
        // CRC-32C of "abc".
        assert_eq!(bytes[24..28], 0x364b_3fb7_u32.to_le_bytes());
        assert_eq!(bytes[32..], *b"abc\0\0\0\0\0");
        let record = read(&bytes).unwrap();
        assert_eq!(
            (
                record.kind,
                record.sequence,
                record.batch,
                record.body,
                record.bytes
            ),
            (RecordKind::ENTRY, 0x0102, 3, &b"abc"[..], 40)
        );
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_noticed() {
        let mut bytes = Vec::new();
        write(&mut bytes, RecordKind::VOTE, 1, 1, b"12345678");
        for len in 0..bytes.len() {
            assert_eq!(read(&bytes[..len]), None);
        }
        for bit in 0..bytes.len() * 8 {
            let mut broken = bytes.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(&broken), None, "bit {bit}");
        }
    }
}
