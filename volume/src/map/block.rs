//! What map blocks have in common: a header that says which volume, layer, run, level and position a block is, so that a misdirected
//! read is noticed, and two checksums that cover every bit of it. And the table blocks of a spilled root, which have nothing else.
//!
//! This module is layout, and the checks a block can fail on its own. `docs/format/checkpoint.md` has the byte tables. The
//! children of an index block are in [`super::index`], the records of a leaf in [`super::leaf`].

use bytes::Bytes;
use weft_proto::id::{LayerId, VolumeId};
use weft_proto::units::BLOCK_BYTES;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::address::PageId;
use super::bits::Block;

/// First bytes of every map block.
pub(crate) const PAGE_MAGIC: [u8; 8] = *b"WEFTPAGE";
/// Versions of the map block's layout. 1: the first; records of 45 bytes in leaves too. 2: records of a leaf in as few bits as
/// they take.
pub(crate) const PAGE_VERSION: u16 = 2;

/// Bytes of the header of a map block.
pub(crate) const PAGE_HEADER_BYTES: usize = size_of::<PageHeader>();
/// Bytes of the body of a map block.
pub(crate) const PAGE_BODY_BYTES: usize = BLOCK_BYTES - PAGE_HEADER_BYTES;

/// Why bytes are not the block, record or root they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Shorter or longer than it says or should be.
    #[error("{found} bytes where {expected} belong")]
    Length {
        /// Bytes wanted.
        expected: usize,
        /// Bytes there.
        found: usize,
    },
    /// Another kind of thing.
    #[error("wrong magic")]
    Magic,
    /// Written by a version that this one does not know.
    #[error("unknown version {0}")]
    Version(u16),
    /// The header's checksum does not match.
    #[error("header checksum mismatch")]
    HeaderChecksum,
    /// The body's checksum does not match.
    #[error("body checksum mismatch")]
    BodyChecksum,
    /// Sound, but of another volume, layer, run or position: a misdirected read or write.
    #[error("a block of another place or volume")]
    Identity,
    /// Checksums match, and a field has a value that no writer produces.
    #[error("field `{0}` out of range")]
    Field(&'static str),
}

/// Whose page map it is; part of every block's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapIdentity {
    /// The volume that wrote the layer.
    pub volume: VolumeId,
    /// The layer.
    pub layer: LayerId,
}

/// The first 64 bytes of a map block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PageHeader {
    /// [`PAGE_MAGIC`].
    magic: [u8; 8],
    /// [`PAGE_VERSION`].
    version: U16,
    /// 0 leaf, 1 … 14 index block, 15 table block.
    level: u8,
    rsvd11: u8,
    /// Records in a leaf, children of an index block, bytes in a table block.
    count: U16,
    rsvd14: [u8; 2],
    volume: U64,
    layer: U64,
    run: U32,
    position: U32,
    rsvd40: [u8; 16],
    /// crc32c of the 4032 bytes of the body.
    body_crc: U32,
    /// crc32c of bytes 0 … 59.
    header_crc: U32,
}

const _: () = assert!(size_of::<PageHeader>() == 64);
const _: () = assert!(std::mem::offset_of!(PageHeader, volume) == 16);
const _: () = assert!(std::mem::offset_of!(PageHeader, run) == 32);
const _: () = assert!(std::mem::offset_of!(PageHeader, body_crc) == 56);

/// Lays out a table block of a spilled root.
pub(crate) fn encode_table(identity: MapIdentity, id: PageId, part: &[u8]) -> Bytes {
    seal(identity, id, part.len(), |block| {
        block[PAGE_HEADER_BYTES..][..part.len()].copy_from_slice(part);
    })
}

/// Checks a table block of a spilled root and answers its part of the body.
pub(crate) fn read_table(bytes: &Bytes, identity: MapIdentity, id: PageId) -> Result<Bytes, FormatError> {
    let count = check(bytes, identity, id)?;
    if count == 0 || count > PAGE_BODY_BYTES {
        return Err(FormatError::Field("count"));
    }
    Ok(bytes.slice(PAGE_HEADER_BYTES..PAGE_HEADER_BYTES + count))
}

pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Lays out the block `id`: its header, around what `fill` puts into the body of a block of zeroes.
pub(super) fn seal(identity: MapIdentity, id: PageId, count: usize, fill: impl FnOnce(&mut Block)) -> Bytes {
    let mut block = Box::new([0; BLOCK_BYTES]);
    fill(&mut block);
    let mut header = PageHeader {
        magic: PAGE_MAGIC,
        version: PAGE_VERSION.into(),
        level: id.level,
        rsvd11: 0,
        count: u16::try_from(count).expect("a block has less than 64 KiB").into(),
        rsvd14: [0; 2],
        volume: identity.volume.0.into(),
        layer: identity.layer.0.into(),
        run: id.run.into(),
        position: id.position.into(),
        rsvd40: [0; 16],
        body_crc: crc32c(&block[PAGE_HEADER_BYTES..]).into(),
        header_crc: 0.into(),
    };
    header.header_crc = crc32c(&header.as_bytes()[..60]).into();
    block[..PAGE_HEADER_BYTES].copy_from_slice(header.as_bytes());
    Bytes::from(block as Box<[u8]>)
}

/// The one place where a map block is believed. Answers its count, not yet bounded.
pub(super) fn check(bytes: &Bytes, identity: MapIdentity, id: PageId) -> Result<usize, FormatError> {
    let length = FormatError::Length {
        expected: BLOCK_BYTES,
        found: bytes.len(),
    };
    if bytes.len() != BLOCK_BYTES {
        return Err(length);
    }
    let (header, body) = PageHeader::read_from_prefix(bytes).map_err(|_| length)?;
    if header.magic != PAGE_MAGIC {
        return Err(FormatError::Magic);
    }
    if header.header_crc.get() != crc32c(&bytes[..60]) {
        return Err(FormatError::HeaderChecksum);
    }
    // After the checksum, so that a flipped bit is not reported as a newer version.
    if header.version.get() != PAGE_VERSION {
        return Err(FormatError::Version(header.version.get()));
    }
    if header.body_crc.get() != crc32c(body) {
        return Err(FormatError::BodyChecksum);
    }
    let found = PageId {
        run: header.run.get(),
        level: header.level,
        position: header.position.get(),
    };
    if (header.volume.get(), header.layer.get()) != (identity.volume.0, identity.layer.0) || found != id {
        return Err(FormatError::Identity);
    }
    Ok(usize::from(header.count.get()))
}
