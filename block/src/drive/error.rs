//! What a drive did: why one cannot be opened, why one is gone, and what its error numbers mean.

use std::path::PathBuf;

use rustix::io::Errno;
use weft_proto::units::Lba;

use crate::BlockError;

/// Why a drive cannot be opened. For the operator: each names the path.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// The system call's answer.
    #[error("{}: {source}", path.display())]
    Open {
        /// As given.
        path: PathBuf,
        /// As the kernel said.
        source: std::io::Error,
    },
    /// Somebody else has the drive open: another agent, or (block devices) a file system.
    #[error("{} is in use by another process (another agent, or a mounted file system)", path.display())]
    Locked {
        /// As given.
        path: PathBuf,
    },
    /// A folder, a pipe, a terminal.
    #[error("{} is neither a file nor a block device", path.display())]
    NotADrive {
        /// As given.
        path: PathBuf,
    },
    /// The device has a logical block size the fabric cannot use.
    #[error("{} has logical blocks of {block_bytes} bytes; 512 and 4096 are supported", path.display())]
    BlockSize {
        /// As given.
        path: PathBuf,
        /// As the device reports.
        block_bytes: u32,
    },
    /// Not one whole logical block long.
    #[error("{} is empty", path.display())]
    Empty {
        /// As given.
        path: PathBuf,
    },
}

/// Whether a drive can be trusted, as its watch tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// No reason to doubt it.
    Good,
    /// Every operation answers [`BlockError::Gone`], until the drive is opened anew.
    Gone(GoneReason),
}

/// Why a drive is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GoneReason {
    /// A write that had to be durable failed: what is on the medium is unknown.
    #[error("a durable write failed (errno {errno})")]
    DurableWriteFailed {
        /// As the kernel gave it.
        errno: i32,
    },
    /// A flush failed. The kernel reports such a loss once; the next flush would succeed and mean nothing.
    #[error("a flush failed (errno {errno})")]
    FlushFailed {
        /// As the kernel gave it.
        errno: i32,
    },
    /// The device answers that it is not there.
    #[error("the device was removed (errno {errno})")]
    Removed {
        /// As the kernel gave it.
        errno: i32,
    },
    /// The drive is shorter than it was when it was opened: a file was truncated, a device was pulled (and
    /// has 0 bytes then).
    #[error("the drive shrank from {expected} to {bytes} bytes")]
    Shrunk {
        /// Bytes when opened.
        expected: u64,
        /// Bytes now.
        bytes: u64,
    },
    /// The file has no name any more: what is written to it is lost when the agent ends.
    #[error("the file was deleted")]
    Unlinked,
}

/// What was asked, as far as the meaning of an error depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Read { start: Lba },
    Write { durable: bool },
    Flush,
    Discard,
}

/// What an error number means for the caller, and for the drive.
pub(super) fn interpret(errno: Errno, asked: Asked) -> (BlockError, Option<GoneReason>) {
    let number = errno.raw_os_error();
    let os = BlockError::Os { errno: number };
    match errno {
        Errno::NODEV | Errno::NXIO | Errno::NOMEDIUM | Errno::SHUTDOWN => {
            return (BlockError::Gone, Some(GoneReason::Removed { errno: number }));
        }
        // The block layer's name for a reservation conflict.
        Errno::BADE => return (BlockError::ReservationConflict, None),
        _ => {}
    }
    match asked {
        Asked::Read { start } => match errno {
            // What the block layer makes of a medium error, and file systems of a bad checksum.
            Errno::IO | Errno::NODATA | Errno::ILSEQ => (BlockError::Unrecovered { start }, None),
            _ => (os, None),
        },
        Asked::Write { durable } => match errno {
            // Space is found before anything is written, so these leave no doubt about what is on the medium.
            Errno::NOSPC | Errno::DQUOT => (BlockError::CapacityExceeded, None),
            Errno::ROFS | Errno::PERM | Errno::ACCESS => (BlockError::WriteProtected, None),
            // Malformed on our side and refused as a whole.
            Errno::INVAL | Errno::OPNOTSUPP => (os, None),
            _ if durable => (
                BlockError::Gone,
                Some(GoneReason::DurableWriteFailed { errno: number }),
            ),
            Errno::TIMEDOUT | Errno::CANCELED => (BlockError::Unknown, None),
            _ => (os, None),
        },
        Asked::Flush => (BlockError::Gone, Some(GoneReason::FlushFailed { errno: number })),
        Asked::Discard => match errno {
            Errno::NOSPC | Errno::DQUOT => (BlockError::CapacityExceeded, None),
            Errno::ROFS | Errno::PERM | Errno::ACCESS => (BlockError::WriteProtected, None),
            Errno::TIMEDOUT | Errno::CANCELED => (BlockError::Unknown, None),
            _ => (os, None),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failed_promise_of_durability_or_a_missing_device_costs_the_drive() {
        let durable = Asked::Write { durable: true };
        let cached = Asked::Write { durable: false };
        let read = Asked::Read { start: Lba(7) };
        let gone = |errno, asked| interpret(errno, asked).1.is_some();
        assert!(gone(Errno::IO, durable) && gone(Errno::IO, Asked::Flush));
        assert!(!gone(Errno::IO, cached) && !gone(Errno::IO, read));
        assert!(!gone(Errno::NOSPC, durable) && !gone(Errno::INVAL, durable));
        for asked in [durable, cached, read, Asked::Flush, Asked::Discard] {
            assert!(gone(Errno::NODEV, asked));
        }
    }

    #[test]
    fn hosts_are_told_what_the_kernel_meant() {
        let read = Asked::Read { start: Lba(7) };
        let cached = Asked::Write { durable: false };
        for (errno, asked, told) in [
            (Errno::IO, read, BlockError::Unrecovered { start: Lba(7) }),
            (Errno::NOSPC, cached, BlockError::CapacityExceeded),
            (Errno::ROFS, cached, BlockError::WriteProtected),
            (Errno::BADE, cached, BlockError::ReservationConflict),
            (Errno::TIMEDOUT, cached, BlockError::Unknown),
            (Errno::IO, cached, BlockError::Os { errno: 5 }),
        ] {
            assert_eq!(interpret(errno, asked).0, told);
        }
    }
}
