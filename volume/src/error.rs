//! Why an engine could not be opened, or could not serve.

use weft_block::BlockError;
use weft_proto::id::{BandId, DriveId, Epoch, StripeNumber};
use weft_proto::units::Lba;

use crate::map::MapError;
use crate::seams::DirectoryError;

/// Why blocks could not be served or a volume could not be opened. What a host is told of it is a
/// [`BlockError`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// More than m columns of a band that recovery needs are unreachable. Nothing is lost yet: open again
    /// when drives come back.
    #[error("band {band}: {missing} columns unreachable, {tolerated} tolerated")]
    TooManyMissing {
        /// The band.
        band: BandId,
        /// Columns that cannot be read.
        missing: u8,
        /// m.
        tolerated: u8,
    },
    /// An acknowledged stripe cannot be decoded from what was found.
    #[error("stripe {stripe} of {epoch} in band {band}: {valid} valid shards, {needed} needed")]
    Undecodable {
        /// The epoch that is recovered.
        epoch: Epoch,
        /// The band.
        band: BandId,
        /// The stripe.
        stripe: StripeNumber,
        /// Shards whose header and payload check.
        valid: u8,
        /// w.
        needed: u8,
    },
    /// The root that the directory names cannot be read from any w of its columns.
    #[error("the root in band {band} cannot be read")]
    RootUnreadable {
        /// The band.
        band: BandId,
    },
    /// The directory names a root in a band that it does not list.
    #[error("{band} is not among the volume's bands")]
    UnknownBand {
        /// The band.
        band: BandId,
    },
    /// Only what takes no more appends is rebuilt.
    #[error("{band} is not sealed")]
    NotSealed {
        /// The band.
        band: BandId,
    },
    /// A band without this column.
    #[error("{band} has no column {column}")]
    NoSuchColumn {
        /// The band.
        band: BandId,
        /// Asked for.
        column: u8,
    },
    /// One column of a band is rebuilt at a time.
    #[error("a column of {band} is being rebuilt")]
    RebuildUnderWay {
        /// The band.
        band: BandId,
    },
    /// The band was freed, or a column of it replaced, while one was being rebuilt: nothing was installed.
    #[error("{band} has changed meanwhile")]
    BandChanged {
        /// The band.
        band: BandId,
    },
    /// The fresh chunk of a rebuild did not take a write: nothing was installed, and another attempt takes another chunk.
    #[error("the fresh chunk on {drive} for column {column} of {band} was not written: {error}")]
    ReplacementNotWritten {
        /// The band.
        band: BandId,
        /// Its column.
        column: u8,
        /// Where the fresh chunk lies.
        drive: DriveId,
        /// What the drive said; [`BlockError::Unknown`] when it stalled.
        error: BlockError,
    },
    /// A block could be neither read nor reconstructed.
    #[error("block {lba} lost: {present} of {needed} shards readable")]
    BlockLost {
        /// The block.
        lba: Lba,
        /// Readable shards of its row.
        present: u8,
        /// w.
        needed: u8,
    },
    /// The epoch is over: the engine has stopped.
    #[error("fenced: the epoch has ended or the drives refuse this incarnation")]
    Fenced,
    /// The engine is being closed.
    #[error("closed")]
    Closed,
    /// The metadata service refused.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The page map is damaged.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl VolumeError {
    /// What a host that asked for `lba` is told.
    #[must_use]
    pub fn to_block(&self, lba: Lba) -> BlockError {
        match self {
            Self::TooManyMissing { .. }
            | Self::NotSealed { .. }
            | Self::NoSuchColumn { .. }
            | Self::RebuildUnderWay { .. }
            | Self::BandChanged { .. }
            | Self::ReplacementNotWritten { .. }
            | Self::Fenced
            | Self::Closed
            | Self::Directory(_) => BlockError::NotReady,
            Self::Undecodable { .. }
            | Self::RootUnreadable { .. }
            | Self::UnknownBand { .. }
            | Self::BlockLost { .. } => BlockError::Unrecovered { start: lba },
            Self::Map(MapError::Store(error)) => error.clone(),
            Self::Map(_) => BlockError::Unrecovered { start: lba },
        }
    }
}
