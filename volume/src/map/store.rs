//! What the page map asks of the engine: append its blocks, read them back.

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use weft_block::BlockError;
use weft_proto::units::Lba;

use crate::entry::MapEntry;

use super::address::PageId;
use super::block::FormatError;

/// A block of the page map on its way to a band.
#[derive(Clone, Debug)]
pub struct MapBlock {
    /// The LBA it is written under, at or above [`super::MAP_LBA_START`].
    pub lba: Lba,
    /// 4096 bytes.
    pub data: Bytes,
}

/// Where map blocks live. The engine implements it with ordinary stripes.
pub trait PageStore {
    /// Writes `blocks`, gives each a sequence, and answers where each lies, in order, once all are durable.
    fn append(&self, blocks: Vec<MapBlock>) -> LocalBoxFuture<'static, Result<Vec<MapEntry>, BlockError>>;

    /// Reads the block `lba` at `place`, checked against its checksum and reconstructed if need be.
    fn read(&self, lba: Lba, place: MapEntry) -> LocalBoxFuture<'static, Result<Bytes, BlockError>>;

    /// The same without what lies at `place` itself: that has the right checksum and is another block all the same.
    ///
    /// A map block's header ends with its own crc32c, so a crc32c of the whole block says nothing of the header: two blocks
    /// with the same records match each other's, and a drive that misdirects writes can put one in the other's place.
    fn read_around(&self, lba: Lba, place: MapEntry) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
        self.read(lba, place)
    }
}

/// Why the page map could not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// A map block that the store returned as good is not what it should be.
    #[error("map block {lba}: {reason}")]
    Damaged {
        /// The block.
        lba: Lba,
        /// What is wrong with it.
        reason: FormatError,
    },
    /// The layer has used every run number, or a run would need more blocks than it can address.
    #[error("the page map is out of block addresses")]
    Exhausted,
    /// A root, or the table it spilled, is not what it should be.
    #[error("page-map root: {0}")]
    Root(FormatError),
    /// A root's tables need more pointers than its head has room for.
    #[error("a root of {bytes} bytes does not fit")]
    RootTooLarge {
        /// Encoded.
        bytes: usize,
    },
    /// The store could not append or read.
    #[error(transparent)]
    Store(#[from] BlockError),
}

impl MapError {
    /// Of the block `id`.
    pub(super) fn damaged(id: PageId, reason: FormatError) -> Self {
        Self::Damaged {
            lba: id.lba(),
            reason,
        }
    }
}
