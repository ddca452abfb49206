//! The label (superblock) of a drive: which cluster it belongs to, and which drive it is.
//!
//! ```text
//!  0        1 MiB                                       size − 1 MiB      size (whole MiB)
//!  ├ label 0 ┼───────────────── chunks ─────────────────────┼─ label 1 ─────┤
//! ```
//!
//! It stands at both ends of the drive and works over any [`Device`], so third-party drives carry it too. Two
//! copies with a generation: the newer valid one counts. A change writes the worse copy first and the other
//! only when that one is durable, so at every moment one of them is whole.
//!
//! [`read`] changes nothing and tells how the copies are; [`repair`] makes them equal again; [`format()`] gives a
//! drive its first label and refuses one that is in use; [`update`] changes a label that is there.
//!
//! A label holds the cluster's authentication key: whoever reads the drive can forge stripe headers. It keeps a
//! guest's data from being taken for a header, and is no defence against whoever holds the drive.
//!
//! Format: `docs/format/label.md`.

mod layout;

use bytes::Bytes;
use weft_proto::band::DriveClass;
use weft_proto::id::{ClusterId, DriveId, DriveUuid, NodeId};
use weft_proto::units::{Lba, LbaRange, MIB};

use crate::buffer::AlignedBuf;
use crate::{BlockError, Device, Durability};
use layout::{COPY_BYTES, HEADER_BYTES, Invalid};

/// The smallest drive: one 64 MiB slab of chunks and a label at each end.
pub const DRIVE_BYTES_MIN: u64 = 66 * MIB;

/// Most bytes of [`Label::body`]: what the area of a copy leaves.
pub const BODY_BYTES_MAX: usize = COPY_BYTES - HEADER_BYTES;

/// Where the chunk area begins.
const CHUNKS_START_MIB: u32 = 1;

/// What a label says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The cluster that owns the drive.
    pub cluster: ClusterId,
    /// The drive's own identity, drawn when it was formatted.
    pub drive_uuid: DriveUuid,
    /// Its number; `None` until metadata has given one.
    pub drive: Option<DriveId>,
    /// The node that serves it; `None` for a third-party drive, and before the node has a number.
    pub node: Option<NodeId>,
    /// What it is made of.
    pub class: DriveClass,
    /// Size of the drive in whole MiB when it was formatted. The last copy ends there, also if the drive has
    /// grown since.
    pub size_mib: u32,
    /// Where the chunk area begins.
    pub chunks_start_mib: u32,
    /// Where it ends, exclusive.
    pub chunks_end_mib: u32,
    /// Of the cluster; stripe headers are authenticated with it.
    pub key: AuthenticationKey,
    /// Opaque here, at most [`BODY_BYTES_MAX`]: room for a copy of the metadata's snapshot.
    pub body: Bytes,
}

impl Label {
    /// The label of a drive of `drive_bytes` bytes, with the chunk area as large as it can be.
    ///
    /// # Errors
    /// [`LabelError::TooSmall`] and [`LabelError::TooLarge`].
    pub fn new(
        cluster: ClusterId,
        key: AuthenticationKey,
        drive_uuid: DriveUuid,
        class: DriveClass,
        drive_bytes: u64,
    ) -> Result<Self, LabelError> {
        if drive_bytes < DRIVE_BYTES_MIN {
            return Err(LabelError::TooSmall {
                bytes: drive_bytes,
                minimum: DRIVE_BYTES_MIN,
            });
        }
        let size_mib =
            u32::try_from(drive_bytes / MIB).map_err(|_| LabelError::TooLarge { bytes: drive_bytes })?;
        Ok(Self {
            cluster,
            drive_uuid,
            drive: None,
            node: None,
            class,
            size_mib,
            chunks_start_mib: CHUNKS_START_MIB,
            chunks_end_mib: size_mib - 1,
            key,
            body: Bytes::new(),
        })
    }

    /// Refuses the label of another cluster.
    ///
    /// # Errors
    /// [`LabelError::OtherCluster`], which names both.
    pub fn expect_cluster(&self, expected: ClusterId) -> Result<(), LabelError> {
        if self.cluster == expected {
            return Ok(());
        }
        Err(LabelError::OtherCluster {
            found: self.cluster,
            expected,
        })
    }
}

/// The cluster's key for stripe headers. Never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AuthenticationKey(pub [u8; 32]);

impl std::fmt::Debug for AuthenticationKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthenticationKey(..)")
    }
}

/// One of the two copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyPlace {
    /// The first MiB.
    First,
    /// The last whole MiB.
    Last,
}

impl CopyPlace {
    fn other(self) -> Self {
        match self {
            Self::First => Self::Last,
            Self::Last => Self::First,
        }
    }
}

/// A label that was found on a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What it says.
    pub label: Label,
    /// Counts its changes.
    pub generation: u64,
    /// The copy that does not say so (damaged, missing or older) and that [`repair`] rewrites.
    pub worse: Option<CopyPlace>,
}

/// Why a drive has no label to use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// Neither end holds a label.
    #[error("no weft label on this drive")]
    Absent,
    /// There were labels, and neither copy is whole.
    #[error("both copies of the drive's label are damaged")]
    Damaged,
    /// Written by a later version of this program.
    #[error("the drive's label has version {version}, and this program knows up to {known}")]
    FutureVersion {
        /// On the drive.
        version: u32,
        /// The latest known.
        known: u32,
    },
    /// The drive belongs to another cluster.
    #[error("the drive belongs to cluster {found}, not to {expected}")]
    OtherCluster {
        /// On the drive.
        found: ClusterId,
        /// Asked for.
        expected: ClusterId,
    },
    /// The drive is formatted already.
    #[error("the drive is formatted already: {drive_uuid} of cluster {cluster}")]
    Formatted {
        /// Whose it is.
        cluster: ClusterId,
        /// Which it is.
        drive_uuid: DriveUuid,
    },
    /// No label, but data where the label goes: a file system, a partition table, another product.
    #[error("the drive is not empty: it holds data that is not weft's")]
    Foreign,
    /// No room for chunks.
    #[error("the drive has {bytes} bytes, and needs at least {minimum}")]
    TooSmall {
        /// Of the drive.
        bytes: u64,
        /// [`DRIVE_BYTES_MIN`].
        minimum: u64,
    },
    /// Larger than a place on a drive can be named.
    #[error("the drive has {bytes} bytes, and at most 2^52 can be used")]
    TooLarge {
        /// Of the drive.
        bytes: u64,
    },
    /// The drive is smaller than it was when it was formatted.
    #[error("the drive has shrunk from {labelled_mib} MiB to {size_mib} MiB")]
    Shrunk {
        /// As its label says.
        labelled_mib: u32,
        /// As it is.
        size_mib: u64,
    },
    /// More than the label has room for.
    #[error("{bytes} bytes do not fit into a label, {maximum} do")]
    BodyTooLong {
        /// Given.
        bytes: usize,
        /// [`BODY_BYTES_MAX`].
        maximum: usize,
    },
    /// The label says that it is the last one there can be; nothing that counts changes from 1 gets there.
    #[error("the drive's label has the last generation and cannot be changed, only erased")]
    LastGeneration,
    /// The drive could not be asked.
    #[error("{0}")]
    Io(#[from] BlockError),
}

/// Reads the label, from whichever copy is newest. Changes nothing.
///
/// # Errors
/// [`LabelError`]; `Absent` for a drive that never had one.
pub async fn read(device: &Device) -> Result<Found, LabelError> {
    let bytes = device.info().bytes();
    if bytes < 2 * MIB {
        return Err(LabelError::TooSmall {
            bytes,
            minimum: DRIVE_BYTES_MIN,
        });
    }
    let first = read_copy(device, 0, CopyPlace::First).await?;
    // The drive may have grown: the first copy knows where the last one is.
    let labelled_mib = match &first {
        Ok((label, _)) => Some(label.size_mib),
        Err(_) => None,
    };
    let size_mib = bytes / MIB;
    if let Some(labelled_mib) = labelled_mib
        && u64::from(labelled_mib) > size_mib
    {
        return Err(LabelError::Shrunk {
            labelled_mib,
            size_mib,
        });
    }
    let last_at = labelled_mib.map_or(size_mib, u64::from) * MIB - MIB;
    let last = read_copy(device, last_at, CopyPlace::Last).await?;
    // A last copy that names another place as its own would have chunks and repairs go past the end of the drive.
    let last = last.and_then(|(label, generation)| {
        if u64::from(label.size_mib) * MIB == last_at + MIB {
            Ok((label, generation))
        } else {
            Err(Invalid::Damaged)
        }
    });
    choose(first, last)
}

/// A copy as it was found.
type ReadCopy = Result<(Label, u64), Invalid>;

fn choose(first: ReadCopy, last: ReadCopy) -> Result<Found, LabelError> {
    // A later version in either copy: the other one is older, and acting on it could undo what a later
    // program did.
    for copy in [&first, &last] {
        if let Err(Invalid::Version(version)) = copy {
            return Err(LabelError::FutureVersion {
                version: *version,
                known: layout::Version::CURRENT.0,
            });
        }
    }
    let (label, generation, worse) = match (first, last) {
        (Ok(first), Ok(last)) if first == last => (first.0, first.1, None),
        (Ok(first), Ok(last)) if first.1 >= last.1 => (first.0, first.1, Some(CopyPlace::Last)),
        (Ok(_), Ok(last)) => (last.0, last.1, Some(CopyPlace::First)),
        (Ok(first), Err(_)) => (first.0, first.1, Some(CopyPlace::Last)),
        (Err(_), Ok(last)) => (last.0, last.1, Some(CopyPlace::First)),
        (Err(Invalid::Absent), Err(Invalid::Absent)) => return Err(LabelError::Absent),
        (Err(_), Err(_)) => return Err(LabelError::Damaged),
    };
    Ok(Found {
        label,
        generation,
        worse,
    })
}

/// Rewrites the worse copy, if there is one, from the better one.
///
/// # Errors
/// [`LabelError::Io`].
pub async fn repair(device: &Device, found: &mut Found) -> Result<(), LabelError> {
    if let Some(place) = found.worse {
        tracing::warn!(?place, "rewriting a copy of a drive's label from the other");
        write_copy(device, &found.label, found.generation, place).await?;
        found.worse = None;
    }
    Ok(())
}

/// Reads the label and repairs it: what an agent does when it starts.
///
/// # Errors
/// [`LabelError`].
pub async fn open(device: &Device, cluster: ClusterId) -> Result<Found, LabelError> {
    let mut found = read(device).await?;
    // Nothing is written to a drive of somebody else.
    found.label.expect_cluster(cluster)?;
    repair(device, &mut found).await?;
    Ok(found)
}

/// Whether [`format()`] may overwrite what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// Labels and foreign data are lost: an operator said so.
    Forced,
    /// Only an empty drive is formatted.
    Refused,
}

/// Gives a drive its first label.
///
/// # Errors
/// [`LabelError::Formatted`], `Damaged`, `FutureVersion` and `Foreign` for a drive that is not empty, unless
/// forced; nothing is written then. [`LabelError::Shrunk`] for a label of another size than the drive.
pub async fn format(device: &Device, label: &Label, overwrite: Overwrite) -> Result<Found, LabelError> {
    let size_mib = device.info().bytes() / MIB;
    if u64::from(label.size_mib) > size_mib {
        return Err(LabelError::Shrunk {
            labelled_mib: label.size_mib,
            size_mib,
        });
    }
    check_body(label)?;
    let found = read(device).await;
    if overwrite == Overwrite::Refused {
        match &found {
            Ok(found) => {
                return Err(LabelError::Formatted {
                    cluster: found.label.cluster,
                    drive_uuid: found.label.drive_uuid,
                });
            }
            Err(LabelError::Absent) => {}
            Err(error) => return Err(error.clone()),
        }
        if !is_zero(device, 0).await? {
            return Err(LabelError::Foreign);
        }
    }
    // Above whatever is there, so that an old copy never wins over a new one.
    let generation = found.map_or(Ok(1), |found| generation_after(&found))?;
    write_copy(device, label, generation, CopyPlace::First).await?;
    write_copy(device, label, generation, CopyPlace::Last).await?;
    Ok(Found {
        label: label.clone(),
        generation,
        worse: None,
    })
}

/// Changes the label of a drive to `label`: `found` is what was read or written last.
///
/// # Errors
/// [`LabelError::Io`]: then the drive holds the old or the new label, and `found` has to be read again.
pub async fn update(device: &Device, found: &mut Found, label: Label) -> Result<(), LabelError> {
    check_body(&label)?;
    let generation = generation_after(found)?;
    // The worse copy first: until it is durable, the other one is the only whole one.
    let first = found.worse.unwrap_or(CopyPlace::First);
    write_copy(device, &label, generation, first).await?;
    write_copy(device, &label, generation, first.other()).await?;
    *found = Found {
        label,
        generation,
        worse: None,
    };
    Ok(())
}

/// Takes the label off a drive, at both ends.
///
/// # Errors
/// [`LabelError::Io`]; one of the copies may be left.
pub async fn erase(device: &Device) -> Result<(), LabelError> {
    let bytes = device.info().bytes();
    let labelled = read(device)
        .await
        .ok()
        .map(|found| u64::from(found.label.size_mib));
    let mut ends = vec![bytes / MIB];
    ends.extend(labelled);
    // The last copy first: an interrupted erasure leaves a label that says where the last copy was.
    for end_mib in ends.into_iter().filter(|end| *end >= 2) {
        zero_header(device, (end_mib - 1) * MIB).await?;
    }
    zero_header(device, 0).await
}

fn generation_after(found: &Found) -> Result<u64, LabelError> {
    found.generation.checked_add(1).ok_or(LabelError::LastGeneration)
}

fn check_body(label: &Label) -> Result<(), LabelError> {
    if label.body.len() > BODY_BYTES_MAX {
        return Err(LabelError::BodyTooLong {
            bytes: label.body.len(),
            maximum: BODY_BYTES_MAX,
        });
    }
    Ok(())
}

async fn read_copy(device: &Device, at: u64, place: CopyPlace) -> Result<ReadCopy, BlockError> {
    let header = match read_bytes(device, at, HEADER_BYTES).await {
        Ok(block) => layout::decode_header(&block, place),
        // A medium error is damage like any other: the other copy is there for it.
        Err(BlockError::Unrecovered { .. }) => Err(Invalid::Damaged),
        Err(error) => return Err(error),
    };
    let header = match header {
        Ok(header) => header,
        Err(invalid) => return Ok(Err(invalid)),
    };
    let body_bytes = header.body_bytes;
    match read_bytes(
        device,
        at + HEADER_BYTES as u64,
        body_bytes.next_multiple_of(HEADER_BYTES),
    )
    .await
    {
        Ok(body) => Ok(header.with_body(body.slice(..body_bytes))),
        Err(BlockError::Unrecovered { .. }) => Ok(Err(Invalid::Damaged)),
        Err(error) => Err(error),
    }
}

async fn write_copy(
    device: &Device,
    label: &Label,
    generation: u64,
    place: CopyPlace,
) -> Result<(), BlockError> {
    let at = match place {
        CopyPlace::First => 0,
        CopyPlace::Last => u64::from(label.size_mib) * MIB - MIB,
    };
    let bytes = layout::encode(label, generation, place);
    let mut padded = AlignedBuf::zeroed(bytes.len().next_multiple_of(HEADER_BYTES));
    padded[..bytes.len()].copy_from_slice(&bytes);
    let padded = padded.freeze();
    // Body before header: a copy that is cut off keeps its old header, which does not match the new body, or
    // has no header at all.
    let header = padded.slice(..HEADER_BYTES);
    write_bytes(device, at + HEADER_BYTES as u64, padded.slice(HEADER_BYTES..)).await?;
    write_bytes(device, at, header).await
}

/// `len` bytes (whole blocks) from `at`, in as many transfers as the device needs.
async fn read_bytes(device: &Device, at: u64, len: usize) -> Result<Bytes, BlockError> {
    let info = device.info();
    let step = (info.transfer_bytes_max as usize).max(info.block_bytes as usize);
    if len <= step {
        return device.read(byte_range(device, at, len)).await;
    }
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let part = step.min(len - bytes.len());
        let range = byte_range(device, at + bytes.len() as u64, part);
        bytes.extend_from_slice(&device.read(range).await?);
    }
    Ok(bytes.into())
}

async fn write_bytes(device: &Device, mut at: u64, mut bytes: Bytes) -> Result<(), BlockError> {
    let step = device.info().transfer_bytes_max as usize;
    while !bytes.is_empty() {
        let part = bytes.split_to(step.min(bytes.len()));
        let start = byte_range(device, at, 0).start;
        at += part.len() as u64;
        device.write(start, vec![part], Durability::Durable).await?;
    }
    Ok(())
}

async fn zero_header(device: &Device, at: u64) -> Result<(), LabelError> {
    let zeroes = AlignedBuf::zeroed(HEADER_BYTES).freeze();
    Ok(write_bytes(device, at, zeroes).await?)
}

async fn is_zero(device: &Device, at: u64) -> Result<bool, BlockError> {
    let bytes = read_bytes(device, at, COPY_BYTES).await?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

fn byte_range(device: &Device, at: u64, len: usize) -> LbaRange {
    let block_bytes = u64::from(device.info().block_bytes);
    LbaRange {
        start: Lba(at / block_bytes),
        count: len as u64 / block_bytes,
    }
}

#[cfg(test)]
mod tests;
