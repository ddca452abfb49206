//! The envelope around everything this crate stores or sends: snapshots, parts of the state, commands, messages.
//!
//! ```text
//!  0        4      6      8                16        20        24
//!  ┌────────┬──────┬──────┬────────────────┬─────────┬─────────┬──────────────┐
//!  │ "WMTA" │ vers │ kind │   body bytes   │ crc32c  │ crc32c  │ body (CBOR)  │
//!  │        │      │      │                │ of body │ of 0–19 │              │
//!  └────────┴──────┴──────┴────────────────┴─────────┴─────────┴──────────────┘
//! ```
//!
//! The header has a checksum of its own, so that a length is only believed from a header that is whole. The body is CBOR
//! with named fields: a field can be added without a new version, as long as it has a default.
//!
//! `docs/format/raft.md`.

use serde::Serialize;
use serde::de::DeserializeOwned;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Largest body that is believed. Derived: the band directory of a cluster is tens of MiB.
const BODY_BYTES_MAX: u64 = 1 << 30;

const MAGIC: [u8; 4] = *b"WMTA";

/// The versions, and what each changed.
mod version {
    /// The first.
    pub(super) const V1: u16 = 1;
}

/// What an envelope holds. A newtype and not an enum: the number comes from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind(pub(crate) u16);

impl Kind {
    /// A whole state with its place in the log.
    pub(crate) const SNAPSHOT: Self = Self(1);
    /// A part of the state in the state machine's store.
    pub(crate) const PART: Self = Self(2);
    /// A proposal of a client, and its reply.
    pub(crate) const PROPOSAL: Self = Self(3);
    /// A query of a client, and its answer.
    pub(crate) const QUERY: Self = Self(4);
    /// The cluster map.
    pub(crate) const MAP: Self = Self(5);
    /// A message between members of the Raft group.
    pub(crate) const RAFT: Self = Self(6);
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: U16,
    kind: U16,
    body_bytes: U64,
    body_crc: U32,
    /// Of everything before it.
    header_crc: U32,
}

const HEADER_BYTES: usize = 24;
const _: () = assert!(size_of::<Header>() == HEADER_BYTES);
const _: () = assert!(std::mem::offset_of!(Header, header_crc) == 20);

/// Why bytes are not an envelope of the kind expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Fewer bytes than a header or than the header says, or more.
    #[error("{found} bytes where {expected} were expected")]
    Length {
        /// Given.
        found: u64,
        /// By the header.
        expected: u64,
    },
    /// Not one of ours.
    #[error("the bytes are not an envelope")]
    Magic,
    /// Written by a later version.
    #[error("version {0} is not known here")]
    Version(u16),
    /// An envelope of something else.
    #[error("kind {found} where {expected} was expected")]
    Kind {
        /// Given.
        found: u16,
        /// Wanted.
        expected: u16,
    },
    /// Header or body were changed after they were written.
    #[error("checksum mismatch")]
    Checksum,
    /// The body does not hold what its kind says.
    #[error("the body does not decode: {0}")]
    Body(String),
}

impl From<EnvelopeError> for std::io::Error {
    fn from(error: EnvelopeError) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, error)
    }
}

pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    // CRC-32C fits 32 bits; the crate answers u64 for every algorithm.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Puts a value into an envelope.
pub(crate) fn seal<T: Serialize>(kind: Kind, value: &T) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    ciborium::into_writer(value, &mut bytes).expect("our own types serialize, and a Vec takes all of it");
    with_header(kind, bytes)
}

/// Puts a body into an envelope, whatever it is.
#[cfg(fuzzing)]
pub(crate) fn wrap(kind: Kind, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes.extend_from_slice(body);
    with_header(kind, bytes)
}

/// Fills in the header before a body.
fn with_header(kind: Kind, mut bytes: Vec<u8>) -> Vec<u8> {
    let body = &bytes[HEADER_BYTES..];
    let mut header = Header {
        magic: MAGIC,
        version: version::V1.into(),
        kind: kind.0.into(),
        body_bytes: (body.len() as u64).into(),
        body_crc: crc32c(body).into(),
        header_crc: 0.into(),
    };
    header.header_crc = crc32c(&header.as_bytes()[..20]).into();
    bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    bytes
}

/// Takes a value out of an envelope.
pub(crate) fn open<T: DeserializeOwned>(kind: Kind, bytes: &[u8]) -> Result<T, EnvelopeError> {
    let (header, body) = Header::read_from_prefix(bytes).map_err(|_| EnvelopeError::Length {
        found: bytes.len() as u64,
        expected: HEADER_BYTES as u64,
    })?;
    if header.magic != MAGIC {
        return Err(EnvelopeError::Magic);
    }
    if crc32c(&bytes[..20]) != header.header_crc.get() {
        return Err(EnvelopeError::Checksum);
    }
    if header.version.get() != version::V1 {
        return Err(EnvelopeError::Version(header.version.get()));
    }
    if header.kind.get() != kind.0 {
        return Err(EnvelopeError::Kind {
            found: header.kind.get(),
            expected: kind.0,
        });
    }
    let expected = header.body_bytes.get();
    if expected > BODY_BYTES_MAX || expected != body.len() as u64 {
        return Err(EnvelopeError::Length {
            found: body.len() as u64,
            expected,
        });
    }
    if crc32c(body) != header.body_crc.get() {
        return Err(EnvelopeError::Checksum);
    }
    ciborium::from_reader(body).map_err(|error| EnvelopeError::Body(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by hand from `docs/format/raft.md`: the number 7 as a part of the state. CBOR 0x07.
    const SEVEN: [u8; 25] = [
        b'W', b'M', b'T', b'A', 1, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, // magic, version, kind, length
        0xc9, 0x95, 0xcb, 0xd5, // crc32c of the body
        0, 0, 0, 0,    // crc32c of the header: filled in by the test
        0x07, // body
    ];

    fn seven() -> [u8; 25] {
        let mut bytes = SEVEN;
        let body = crc32c(&bytes[24..]).to_le_bytes();
        bytes[16..20].copy_from_slice(&body);
        let header = crc32c(&bytes[..20]).to_le_bytes();
        bytes[20..24].copy_from_slice(&header);
        bytes
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        assert_eq!(seal(Kind::PART, &7_u64), seven());
        assert_eq!(open::<u64>(Kind::PART, &seven()), Ok(7));
        // The check value of CRC-32C.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_noticed() {
        let bytes = seven();
        for len in 0..bytes.len() {
            assert!(open::<u64>(Kind::PART, &bytes[..len]).is_err());
        }
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(open::<u64>(Kind::PART, &bytes).is_err(), "bit {bit}");
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        assert!(matches!(
            open::<u64>(Kind::PART, &longer),
            Err(EnvelopeError::Length { .. })
        ));
    }

    #[test]
    fn another_kind_is_refused_by_name() {
        assert_eq!(
            open::<u64>(Kind::MAP, &seven()),
            Err(EnvelopeError::Kind {
                found: 2,
                expected: 5
            })
        );
    }
}
