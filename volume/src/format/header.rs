//! The header block of a shard: who wrote what, where.
//!
//! ```text
//! row r      header: common part │ shard part │ table of blocks and zero records
//! row r+1 …  d payload blocks
//! ```
//!
//! The common part and the table are the same in every shard of a stripe, so any shard alone tells what the
//! stripe holds. Both parts are authenticated with a key that guests never see (keyed BLAKE3, 16 bytes), so a
//! guest's data can never be taken for a header: the common part once per stripe, the shard part with a
//! second tag over the first one and 16 more bytes.
//!
//! Parsing is the one place where bytes of a drive become a [`StripeHeader`]: identity, place and bounds are
//! checked here and nowhere later. `docs/format/stripe.md` is the page.

use std::fmt;

use bytes::Bytes;
use weft_proto::band::{Band, Geometry};
use weft_proto::id::{BandId, ClusterId, Epoch, LayerId, Sequence, StripeNumber, VolumeId};
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::entry::{ColumnSet, Shape};

/// First bytes of every header block.
pub const MAGIC: [u8; 8] = *b"WEFTSTRP";
/// The versions there are: 1, the first, had crc32c for the checksums of blocks and payloads; 2 has those of [`super::checksum`].
pub const VERSION: u16 = 2;
/// Room for block and zero records.
pub const TABLE_BYTES: usize = BLOCK_BYTES - size_of::<RawHeader>();
/// Most payload blocks of a stripe, padding included. Bounded by the table; 128 leaves room for ten zero
/// records beside a full stripe.
pub const BLOCKS_MAX: usize = 128;
const _: () = assert!(BLOCKS_MAX * size_of::<RawBlock>() + 10 * size_of::<RawZeroes>() <= TABLE_BYTES);
/// Most zero records of a stripe that carries no blocks.
pub const ZEROES_MAX: usize = TABLE_BYTES / size_of::<RawZeroes>();

/// The key that headers are authenticated with, from the drive labels of the cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HeaderKey(pub [u8; 32]);

impl fmt::Debug for HeaderKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HeaderKey(..)")
    }
}

/// The fixed part of a header block; the table follows it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U16,
    k: u8,
    m: u8,
    w: u8,
    start: u8,
    d: U16,
    cluster: [u8; 16],
    volume: U64,
    layer: U64,
    epoch: U64,
    band: U64,
    stripe: U64,
    closed_through: U64,
    row: U32,
    skipped: U32,
    block_count: U16,
    zeroes_count: U16,
    /// Of the fixed part and the table in use.
    length: U32,
    rsvd96: [u8; 32],
    common_tag: [u8; 16],
    index: u8,
    column: u8,
    rsvd146: [u8; 2],
    payload_crc: U32,
    rsvd152: [u8; 8],
    shard_tag: [u8; 16],
    rsvd176: [u8; 16],
}

const COMMON_TAG_AT: usize = std::mem::offset_of!(RawHeader, common_tag);
const SHARD_AT: usize = std::mem::offset_of!(RawHeader, index);
const SHARD_TAG_AT: usize = std::mem::offset_of!(RawHeader, shard_tag);
const _: () = assert!(size_of::<RawHeader>() == 192);
const _: () = assert!(std::mem::offset_of!(RawHeader, cluster) == 16);
const _: () = assert!(std::mem::offset_of!(RawHeader, stripe) == 64);
const _: () = assert!(std::mem::offset_of!(RawHeader, row) == 80);
const _: () = assert!(std::mem::offset_of!(RawHeader, length) == 92);
const _: () = assert!(COMMON_TAG_AT == 128);
const _: () = assert!(SHARD_AT == 144);
const _: () = assert!(SHARD_TAG_AT == 160);

/// One block of the stripe.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBlock {
    lba: U64,
    epoch: U64,
    counter: U64,
    crc: U32,
}
const _: () = assert!(size_of::<RawBlock>() == 28);

/// A range that reads as zeroes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawZeroes {
    lba: U64,
    count: U64,
    epoch: U64,
    counter: U64,
}
const _: () = assert!(size_of::<RawZeroes>() == 32);

/// A block that a stripe carries. Block b lies in data shard b / d, at row + 1 + b mod d.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRecord {
    /// Which block of the volume (or of its page map).
    pub lba: Lba,
    /// Which version of it.
    pub sequence: Sequence,
    /// [`super::checksum::block_crc`] of its bytes.
    pub crc: u32,
}

/// TRIM, Write Zeroes or blocks that were all zeroes: `range` reads as zeroes since `sequence`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroRecord {
    /// In 4 KiB blocks.
    pub range: LbaRange,
    /// Which version of every block in it.
    pub sequence: Sequence,
}

/// Everything that is the same in all shards of a stripe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StripeHeader {
    /// The cluster.
    pub cluster: ClusterId,
    /// The volume that wrote it.
    pub volume: VolumeId,
    /// The layer its blocks belong to.
    pub layer: LayerId,
    /// The owner's epoch.
    pub epoch: Epoch,
    /// The band it lies in.
    pub band: BandId,
    /// Its number within the epoch.
    pub stripe: StripeNumber,
    /// H: every stripe of the epoch up to this one was complete, or its blocks completely re-appended, when this
    /// one was written.
    pub closed_through: StripeNumber,
    /// Row of the header blocks.
    pub row: u32,
    /// Payload blocks per shard; 0 for a stripe of zero records only.
    pub d: u16,
    /// k and m of the band.
    pub geometry: Geometry,
    /// Its columns.
    pub shape: Shape,
    /// What it carries; at most w·d, the rest of the payload is zeroes.
    pub blocks: Vec<BlockRecord>,
    /// Ranges that read as zeroes.
    pub zeroes: Vec<ZeroRecord>,
}

/// The part of a header that differs between the shards of a stripe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardPart {
    /// 0 … w−1 data, w … w+m−1 parity.
    pub index: u8,
    /// Where it lies.
    pub column: u8,
    /// [`super::checksum::payload_crc`] of this shard's d payload blocks.
    pub payload_crc: u32,
}

/// Why a block is not a header that belongs where it lies. Only [`HeaderError::NoMagic`] is ordinary: payload
/// and unwritten rows look like that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not a header at all, or truncated.
    #[error("not a stripe header")]
    NoMagic,
    /// Written by a later version of this program.
    #[error("stripe header version {0} is not known")]
    Version(u16),
    /// A tag does not match: damaged, or not written by this cluster.
    #[error("stripe header is not authentic")]
    NotAuthentic,
    /// Authentic, but of another cluster, volume, epoch, band, row or column: a misdirected read or write, or an
    /// earlier life of the chunk.
    #[error("stripe header belongs elsewhere")]
    Elsewhere,
    /// Authentic and here, but its numbers do not fit together.
    #[error("stripe header is inconsistent")]
    Inconsistent,
}

/// A stripe's header block with the common part filled in, from which each shard's is made.
#[derive(Clone)]
pub struct HeaderTemplate {
    block: Vec<u8>,
    key: HeaderKey,
}

impl HeaderTemplate {
    /// The header block of one shard.
    #[must_use]
    pub fn shard(&self, part: ShardPart) -> Bytes {
        let mut block = self.block.clone();
        block[SHARD_AT] = part.index;
        block[SHARD_AT + 1] = part.column;
        block[SHARD_AT + 4..SHARD_AT + 8].copy_from_slice(&part.payload_crc.to_le_bytes());
        let tag = shard_tag(&self.key, &block);
        block[SHARD_TAG_AT..SHARD_TAG_AT + 16].copy_from_slice(&tag);
        Bytes::from(block)
    }
}

impl StripeHeader {
    /// Whether this many blocks and zero records fit one header.
    #[must_use]
    pub fn has_room(blocks: usize, zeroes: usize) -> bool {
        blocks <= BLOCKS_MAX
            && blocks * size_of::<RawBlock>() + zeroes * size_of::<RawZeroes>() <= TABLE_BYTES
    }

    /// Encodes and authenticates the common part.
    ///
    /// # Panics
    ///
    /// If the tables do not fit: the batcher asks [`Self::has_room`] first.
    #[must_use]
    pub fn template(&self, key: &HeaderKey) -> HeaderTemplate {
        assert!(
            Self::has_room(self.blocks.len(), self.zeroes.len()),
            "a stripe is formed within its header"
        );
        let length = size_of::<RawHeader>()
            + self.blocks.len() * size_of::<RawBlock>()
            + self.zeroes.len() * size_of::<RawZeroes>();
        let raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            k: self.geometry.k,
            m: self.geometry.m,
            w: self.shape.w,
            start: self.shape.start,
            d: self.d.into(),
            cluster: self.cluster.0,
            volume: self.volume.0.into(),
            layer: self.layer.0.into(),
            epoch: self.epoch.0.into(),
            band: self.band.0.into(),
            stripe: self.stripe.0.into(),
            closed_through: self.closed_through.0.into(),
            row: self.row.into(),
            skipped: self.shape.skipped.0.into(),
            block_count: (self.blocks.len() as u16).into(),
            zeroes_count: (self.zeroes.len() as u16).into(),
            length: (length as u32).into(),
            rsvd96: [0; 32],
            common_tag: [0; 16],
            index: 0,
            column: 0,
            rsvd146: [0; 2],
            payload_crc: 0.into(),
            rsvd152: [0; 8],
            shard_tag: [0; 16],
            rsvd176: [0; 16],
        };
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        block.extend_from_slice(raw.as_bytes());
        for record in &self.blocks {
            let raw = RawBlock {
                lba: record.lba.0.into(),
                epoch: record.sequence.epoch.0.into(),
                counter: record.sequence.counter.into(),
                crc: record.crc.into(),
            };
            block.extend_from_slice(raw.as_bytes());
        }
        for record in &self.zeroes {
            let raw = RawZeroes {
                lba: record.range.start.0.into(),
                count: record.range.count.into(),
                epoch: record.sequence.epoch.0.into(),
                counter: record.sequence.counter.into(),
            };
            block.extend_from_slice(raw.as_bytes());
        }
        let tag = common_tag(key, &block);
        block[COMMON_TAG_AT..COMMON_TAG_AT + 16].copy_from_slice(&tag);
        block.resize(BLOCK_BYTES, 0);
        HeaderTemplate { block, key: *key }
    }

    /// Parses the block at (`row`, `column`) of `band`.
    pub fn parse(
        block: &[u8],
        key: &HeaderKey,
        cluster: ClusterId,
        band: &Band,
        row: u32,
        column: u8,
    ) -> Result<(Self, ShardPart), HeaderError> {
        let Ok((raw, _)) = RawHeader::ref_from_prefix(block) else {
            return Err(HeaderError::NoMagic);
        };
        if raw.magic != MAGIC {
            return Err(HeaderError::NoMagic);
        }
        if raw.version.get() != VERSION {
            return Err(HeaderError::Version(raw.version.get()));
        }
        let length = raw.length.get() as usize;
        let (block_count, zeroes_count) = (
            usize::from(raw.block_count.get()),
            usize::from(raw.zeroes_count.get()),
        );
        // The length sizes what is hashed, so it is bounded first.
        if length > block.len().min(BLOCK_BYTES)
            || length
                != size_of::<RawHeader>()
                    + block_count * size_of::<RawBlock>()
                    + zeroes_count * size_of::<RawZeroes>()
            || raw.common_tag != common_tag(key, &block[..length])
            || raw.shard_tag != shard_tag(key, block)
        {
            return Err(HeaderError::NotAuthentic);
        }
        if raw.cluster != cluster.0
            || raw.volume.get() != band.volume.0
            || raw.layer.get() != band.layer.0
            || raw.epoch.get() != band.epoch.0
            || raw.band.get() != band.id.0
            || raw.row.get() != row
            || raw.column != column
        {
            return Err(HeaderError::Elsewhere);
        }
        let shape = Shape {
            start: raw.start,
            w: raw.w,
            skipped: ColumnSet(raw.skipped.get()),
        };
        let slots = usize::from(raw.w) * usize::from(raw.d.get());
        let end = u64::from(row) + 1 + u64::from(raw.d.get());
        if (raw.k, raw.m) != (band.geometry.k, band.geometry.m)
            || !shape.fits(band.geometry)
            || shape.shard_index(band.geometry, column) != Some(raw.index)
            || !Self::has_room(block_count, zeroes_count)
            || block_count > slots
            || end > u64::from(band.chunk_size.rows())
        {
            return Err(HeaderError::Inconsistent);
        }
        let table = &block[size_of::<RawHeader>()..length];
        let (blocks, zeroes) = table.split_at(block_count * size_of::<RawBlock>());
        let header = Self {
            cluster,
            volume: band.volume,
            layer: band.layer,
            epoch: band.epoch,
            band: band.id,
            stripe: StripeNumber(raw.stripe.get()),
            closed_through: StripeNumber(raw.closed_through.get()),
            row,
            d: raw.d.get(),
            geometry: band.geometry,
            shape,
            blocks: parse_blocks(blocks)?,
            zeroes: parse_zeroes(zeroes)?,
        };
        Ok((header, raw.shard_part()))
    }

    /// The shard part of another header of this stripe, found in `column` at the same row. `known` is the block that this header
    /// was parsed from: where both have the same common part and table, those need not be authenticated again, which is most of
    /// what [`Self::parse`] costs. `None` of any other block: that may be a header all the same, of something else.
    #[must_use]
    pub fn parse_sibling(
        &self,
        known: &[u8],
        block: &[u8],
        key: &HeaderKey,
        column: u8,
    ) -> Option<ShardPart> {
        let (raw, _) = RawHeader::ref_from_prefix(block).ok()?;
        let table = size_of::<RawHeader>()..raw.length.get() as usize;
        let same =
            known.get(..SHARD_AT)? == &block[..SHARD_AT] && known.get(table.clone())? == block.get(table)?;
        (same
            && raw.shard_tag == shard_tag(key, block)
            && raw.column == column
            && self.shape.shard_index(self.geometry, column) == Some(raw.index))
        .then(|| raw.shard_part())
    }
}

impl RawHeader {
    fn shard_part(&self) -> ShardPart {
        ShardPart {
            index: self.index,
            column: self.column,
            payload_crc: self.payload_crc.get(),
        }
    }
}

fn parse_blocks(table: &[u8]) -> Result<Vec<BlockRecord>, HeaderError> {
    let raw = <[RawBlock]>::ref_from_bytes(table).map_err(|_| HeaderError::Inconsistent)?;
    Ok(raw
        .iter()
        .map(|raw| BlockRecord {
            lba: Lba(raw.lba.get()),
            sequence: Sequence {
                epoch: Epoch(raw.epoch.get()),
                counter: raw.counter.get(),
            },
            crc: raw.crc.get(),
        })
        .collect())
}

fn parse_zeroes(table: &[u8]) -> Result<Vec<ZeroRecord>, HeaderError> {
    let raw = <[RawZeroes]>::ref_from_bytes(table).map_err(|_| HeaderError::Inconsistent)?;
    raw.iter()
        .map(|raw| {
            let range = LbaRange {
                start: Lba(raw.lba.get()),
                count: raw.count.get(),
            };
            range.end().ok_or(HeaderError::Inconsistent)?;
            Ok(ZeroRecord {
                range,
                sequence: Sequence {
                    epoch: Epoch(raw.epoch.get()),
                    counter: raw.counter.get(),
                },
            })
        })
        .collect()
}

/// Over the fixed part before the tag, and the table. At least 128 bytes, so it can never be a shard's input.
fn common_tag(key: &HeaderKey, used: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(&key.0);
    hasher.update(&used[..COMMON_TAG_AT]);
    hasher.update(used.get(size_of::<RawHeader>()..).unwrap_or_default());
    truncate(hasher.finalize())
}

/// Over the common tag and the shard part: 32 bytes, one compression.
fn shard_tag(key: &HeaderKey, block: &[u8]) -> [u8; 16] {
    truncate(blake3::keyed_hash(&key.0, &block[COMMON_TAG_AT..SHARD_TAG_AT]))
}

fn truncate(hash: blake3::Hash) -> [u8; 16] {
    let mut tag = [0; 16];
    tag.copy_from_slice(&hash.as_bytes()[..16]);
    tag
}

#[cfg(test)]
mod tests;
