//! The block-device contract, and the devices that keep it.
//!
//! [`BlockDevice`] is the one contract for blocks: `target` serves one, `volume` is one and is built on many,
//! `initiator` makes one of a remote namespace, tests use memory. Features that wrap I/O (delay, fault, rate
//! limit, cache) are decorators of it, never flags inside.
//!
//! Architecture invariant: a device is a range of logical blocks. It knows no stripe, no volume and no NVMe
//! queue.
//!
//! # The contract
//!
//! 1. **One thread.** A handle belongs to one `current_thread` runtime; futures are not `Send`. Nothing on
//!    the data path takes a lock.
//! 2. **Buffers are owned.** Writes take refcounted [`Bytes`], scattered; reads return `Bytes`, which may be
//!    lent from where the data lives (memory, a receive buffer) without a copy. The kernel or a peer may
//!    hold a buffer after its future is dropped, so no borrowed buffer could be sound.
//! 3. **The future starts the I/O when it is made**, not when it is first polled: a caller may make n of
//!    them and then wait. Dropping one abandons the answer, never the I/O: the effect may still happen.
//! 4. **Durable or not is the caller's word.** A write with [`Durability::Durable`] survives the loss of
//!    power once it has completed, as does every completed write once a later [`BlockDevice::flush`] has.
//! 5. **No order** between operations in flight. Whoever needs one waits. A read that overlaps a write in flight sees,
//!    per logical block, the old or the new bytes.
//! 6. **Unknown is an outcome.** [`BlockError::Unknown`] says the operation may have happened or may happen
//!    later; every other error of a write says it will not take effect after the error is returned, though
//!    part of it may have.
//! 7. Ranges come from outside: an implementation checks them itself and answers
//!    [`BlockError::OutOfRange`]; it never panics on one.
//!
//! Why it is so, and what was refused: `docs/design/block-contract.md`. Whatever claims to keep it runs
//! [`testing::conformance`].
//!
//! ```
//! use weft_block::{BlockError, Durability, memory::MemoryDrive};
//! use weft_proto::units::{Lba, LbaRange};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let device = MemoryDrive::device(16 << 20);
//! let header = bytes::Bytes::from(vec![1; 4096]);
//! let payload = bytes::Bytes::from(vec![2; 8192]);
//! // Both are on their way before either is waited for.
//! let first = device.write(Lba(0), vec![header.clone(), payload.clone()], Durability::Durable);
//! let second = device.write(Lba(100), vec![header, payload], Durability::Durable);
//! first.await?;
//! second.await?;
//! let read = device.read(LbaRange { start: Lba(1), count: 1 }).await?;
//! assert_eq!(read[0], 2);
//! # Ok::<_, BlockError>(()) }).unwrap();
//! ```

pub mod buffer;
pub mod copy;
pub mod counted;
pub mod drive;
pub mod faulty;
pub mod huge;
mod io;
pub mod label;
pub mod memory;
pub mod metrics;
pub mod polling;
pub mod testing;

pub use io::Io;

use std::rc::Rc;

use bytes::Bytes;
use weft_proto::units::{Lba, LbaRange};

/// A shared handle to any device.
pub type Device = Rc<dyn BlockDevice>;

/// What a device is. Fixed while the handle lives, except that a namespace may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Bytes of a logical block, 512 or 4096.
    pub block_bytes: u32,
    /// Size in logical blocks.
    pub blocks: u64,
    /// Longest single read or write, in bytes; a multiple of `block_bytes`.
    pub transfer_bytes_max: u32,
    /// Whether a completed write that was not [`Durability::Durable`] can be lost with power.
    pub volatile_write_cache: bool,
    /// Whether deallocated blocks read as zeroes.
    pub deallocated_reads_zero: bool,
}

impl DeviceInfo {
    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.block_bytes)
    }

    /// Checks that `range` lies on the device; an empty range may stand right behind the last block.
    ///
    /// # Errors
    /// [`BlockError::OutOfRange`].
    pub fn check_range(&self, range: LbaRange) -> Result<(), BlockError> {
        if range.is_within(self.blocks) {
            return Ok(());
        }
        Err(BlockError::OutOfRange {
            start: range.start,
            count: range.count,
            blocks: self.blocks,
        })
    }

    /// Checks a read of `range` and answers its length in bytes.
    ///
    /// # Errors
    /// [`BlockError::OutOfRange`], or [`BlockError::InvalidLength`] past `transfer_bytes_max`.
    pub fn check_read(&self, range: LbaRange) -> Result<usize, BlockError> {
        self.check_range(range)?;
        let bytes = range.count.saturating_mul(u64::from(self.block_bytes));
        self.check_transfer(bytes)
    }

    /// Checks a write of `data` at `start` and answers the range it covers.
    ///
    /// # Errors
    /// [`BlockError::InvalidLength`] unless `data` is whole blocks and one transfer, else
    /// [`BlockError::OutOfRange`].
    pub fn check_write(&self, start: Lba, data: &[Bytes]) -> Result<LbaRange, BlockError> {
        let bytes = data
            .iter()
            .fold(0u64, |sum, segment| sum.saturating_add(segment.len() as u64));
        self.check_transfer(bytes)?;
        let range = LbaRange {
            start,
            count: bytes / u64::from(self.block_bytes),
        };
        self.check_range(range)?;
        Ok(range)
    }

    fn check_transfer(&self, bytes: u64) -> Result<usize, BlockError> {
        let invalid = BlockError::InvalidLength {
            bytes,
            block_bytes: self.block_bytes,
        };
        if !bytes.is_multiple_of(u64::from(self.block_bytes)) || bytes > u64::from(self.transfer_bytes_max) {
            return Err(invalid);
        }
        usize::try_from(bytes).map_err(|_| invalid)
    }
}

/// Whether a write must survive the loss of power when it completes (NVMe's FUA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// May still be in a volatile cache.
    Cached,
    /// On the medium.
    Durable,
}

/// A range of logical blocks that can be read and written. See the module for the contract.
pub trait BlockDevice {
    /// Size and properties.
    fn info(&self) -> DeviceInfo;

    /// Reads `range`; the answer has exactly its bytes.
    fn read(&self, range: LbaRange) -> Io<Bytes>;

    /// Writes `data` (whole blocks in total, cut anywhere) at `start`.
    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()>;

    /// Makes `range` read as zeroes; frees its space if `deallocate` is set and the device can.
    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()>;

    /// Says that the contents of `ranges` are no longer needed (TRIM). Discard reaches the device.
    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()>;

    /// Makes every write that completed before this call durable.
    fn flush(&self) -> Io<()>;
}

/// Why a device could not do what it was asked, in terms a host can be told.
///
/// What the device can cure by itself, such as a stale band, is retried behind the contract and has no
/// variant here. Mapped once to an NVMe status, in `target::status`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The range ends past the device.
    #[error("{count} blocks at {start} end past the device of {blocks} blocks")]
    OutOfRange {
        /// First block asked for.
        start: Lba,
        /// Blocks asked for.
        count: u64,
        /// Size of the device in blocks.
        blocks: u64,
    },
    /// A length or alignment the device does not take: the caller's fault.
    #[error("{bytes} bytes are not whole blocks of {block_bytes}, or more than one transfer takes")]
    InvalidLength {
        /// Bytes given.
        bytes: u64,
        /// Logical block size.
        block_bytes: u32,
    },
    /// The write needs space and there is none. Reads and deallocation go on.
    #[error("capacity exceeded")]
    CapacityExceeded,
    /// The medium lost these blocks: a checksum or the drive says so, and redundancy could not help.
    #[error("unrecovered read error at {start}")]
    Unrecovered {
        /// The first block that could not be read.
        start: Lba,
    },
    /// Another host holds a reservation, or this one was preempted.
    #[error("reservation conflict")]
    ReservationConflict,
    /// Not served on this path now (ownership moves, no valid lease, not connected). Nothing was done; another
    /// path or a retry will serve it.
    #[error("not ready on this path")]
    NotReady,
    /// The device refuses writes.
    #[error("write protected")]
    WriteProtected,
    /// The device is gone for good: a file vanished, a drive was pulled, a flush failed before (a drive that failed
    /// to flush is not trusted again).
    #[error("device is gone")]
    Gone,
    /// The outcome is unknown: the operation may have happened, or may still happen.
    #[error("outcome unknown: no answer in time or connection lost")]
    Unknown,
    /// The operating system refused the operation.
    #[error("i/o error (errno {errno})")]
    Os {
        /// As the kernel gave it.
        errno: i32,
    },
}
