//! A drive: a file or a raw block device, through io_uring and past the page cache.
//!
//! [`Drive::open`] locks the path (a second agent is refused), finds out what it is, and gives a
//! [`BlockDevice`] that keeps the contract:
//!
//! - Reads land in aligned buffers that are used again and are lent as they are. Writes use the caller's memory in
//!   place where it is aligned; the rest is copied once.
//! - [`Durability::Durable`] is RWF_DSYNC, which the kernel turns into FUA where the device has it; a flush is
//!   fdatasync.
//! - Discard reaches the medium: holes are punched into files, block devices get BLKDISCARD.
//! - At most `queue_depth` operations are with the kernel; more wait, in order.
//! - The kernel's memory stays alive: an operation is held until it has ended, whatever became of its future
//!   or of the runtime.
//! - A drive that failed to make a write durable, was removed, deleted or truncated is **gone**: every later
//!   operation answers [`BlockError::Gone`], and [`Drive::health`] says why. Nothing makes it good again but
//!   opening it anew.
//!
//! It does not retry a drive's errors, and knows nothing of what is stored: the label is in [`crate::label`].
//!
//! A drive belongs to the thread it was opened on, inside a `LocalSet` of a `current_thread` runtime with I/O and
//! time enabled; one `LocalSet` per thread, which the ring's driver lives in.

mod error;
mod lock;
mod operation;
mod port;
mod probe;
mod ring;
mod threads;

#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use tokio::sync::{oneshot, watch};
use weft_proto::units::{Lba, LbaRange};

pub use error::{DriveError, GoneReason, Health};

use crate::buffer::AlignedBuf;
use crate::metrics::{DriveMetrics, Op};
use crate::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};
use error::Asked;
use operation::{Action, Operation, align_pieces};
use port::{Answer, Backend, Port};
use probe::{DriveKind, Probed};
use ring::Ring;
use threads::Threads;

/// Longest transfer of any drive. Larger ones gain nothing: a device splits them again.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 20;

/// How a drive is opened.
#[derive(Clone, Debug)]
pub struct DriveOptions {
    /// The value of the metrics' label `drive`. `None` takes the path.
    pub name: Option<String>,
    /// Operations with the kernel at most; more wait.
    pub queue_depth: usize,
    /// How often the drive is looked at, whether it is still there.
    pub health_interval: Duration,
    /// How long to wait for a lock: that of an agent that was just killed goes with its last operation.
    pub lock_wait: Duration,
    /// Who talks to the kernel.
    pub engine: Engine,
}

impl Default for DriveOptions {
    fn default() -> Self {
        Self {
            name: None,
            // NVMe drives gain little beyond; a guess that bounds latency behind a deep queue.
            queue_depth: 128,
            health_interval: Duration::from_secs(1),
            lock_wait: Duration::from_secs(2),
            engine: Engine::Auto,
        }
    }
}

/// Who talks to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring where it is permitted, else threads, with a warning.
    Auto,
    /// Worker threads.
    Threads,
}

/// A handle to an open drive; clones share it. The lock is given up when the last one is dropped and its
/// operations have ended. See the module.
#[derive(Clone)]
pub struct Drive(Rc<Inner>);

struct Inner {
    path: PathBuf,
    info: DeviceInfo,
    kind: DriveKind,
    direct: bool,
    memory_align: usize,
    file: Arc<OwnedFd>,
    port: Rc<Port>,
}

/// Makes a sparse file of `bytes` bytes to be a drive.
///
/// # Errors
/// [`DriveError::Open`]; also when there is something at the path already.
pub fn create_file(path: &Path, bytes: u64) -> Result<(), DriveError> {
    let failed = |source| DriveError::Open {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(failed)?;
    file.set_len(bytes).map_err(failed)?;
    file.sync_all().map_err(failed)
}

impl Drive {
    /// Opens and locks the drive at `path`.
    ///
    /// # Errors
    /// [`DriveError`]: what stands in the way, with the path.
    pub async fn open(path: &Path, options: DriveOptions) -> Result<Self, DriveError> {
        let deadline = tokio::time::Instant::now() + options.lock_wait;
        let probed = loop {
            if let Some(probed) = probe::open(path)? {
                break probed;
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(DriveError::Locked {
                    path: path.to_owned(),
                });
            }
            tokio::time::sleep(LOCK_RETRY).await;
        };
        Ok(Self(Inner::start(path, probed, &options)))
    }

    /// As given to [`Drive::open`].
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether I/O passes the page cache by.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.0.direct
    }

    /// Whether worker threads do its I/O, because they were asked to or io_uring is not permitted.
    #[must_use]
    pub fn uses_threads(&self) -> bool {
        self.0.port.uses_threads()
    }

    /// Tells when the drive is gone, and why.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.0.port.health()
    }

    /// Waits until every operation that was started has ended. Operations started meanwhile are waited for
    /// too: stop asking first.
    pub async fn drained(&self) {
        self.0.port.drained().await;
    }

    /// The drive as any device.
    #[must_use]
    pub fn device(&self) -> Device {
        Rc::new(self.clone())
    }
}

impl Inner {
    fn start(path: &Path, probed: Probed, options: &DriveOptions) -> Rc<Self> {
        let Probed {
            file,
            kind,
            block_bytes,
            blocks,
            direct,
            memory_align,
            volatile_write_cache,
        } = probed;
        let name = options.name.clone().unwrap_or_else(|| path.display().to_string());
        let align = if direct { block_bytes as usize } else { 1 };
        let port = Port::new(
            backend(options.engine),
            options.queue_depth,
            align,
            DriveMetrics::new(&name),
        );
        let drive = Rc::new(Self {
            path: path.to_owned(),
            info: DeviceInfo {
                block_bytes,
                blocks,
                transfer_bytes_max: TRANSFER_BYTES_MAX,
                volatile_write_cache,
                deallocated_reads_zero: kind == DriveKind::File,
            },
            kind,
            direct,
            memory_align,
            file: Arc::new(file),
            port,
        });
        tokio::task::spawn_local(watch_presence(Rc::downgrade(&drive), options.health_interval));
        drive
    }

    /// Looks whether the drive is still there, in full.
    fn check_presence(&self) {
        let expected = self.info.bytes();
        let bytes = match self.kind {
            DriveKind::File => {
                let Ok(stat) = rustix::fs::fstat(&*self.file) else {
                    return;
                };
                if stat.st_nlink == 0 {
                    return self.port.condemn(GoneReason::Unlinked);
                }
                u64::try_from(stat.st_size).unwrap_or(0)
            }
            // A device that was pulled has no size any more. (Writes to it fail with "no space", so the
            // size has to be looked at.) The file's position moves; nothing uses it.
            DriveKind::BlockDevice => match rustix::fs::seek(&*self.file, SeekFrom::End(0)) {
                Ok(bytes) => bytes,
                Err(_) => return,
            },
        };
        if bytes < expected {
            self.port.condemn(GoneReason::Shrunk { expected, bytes });
        }
    }

    fn offset(&self, start: Lba) -> u64 {
        start.0 * u64::from(self.info.block_bytes)
    }

    fn submit(
        &self,
        offset: u64,
        action: Action,
        asked: Asked,
        op: Op,
        bytes: u64,
    ) -> oneshot::Receiver<Answer> {
        let operation = Operation::new(self.file.clone(), offset, action);
        self.port.start(operation, asked, op, bytes)
    }

    fn submit_sync(&self) -> oneshot::Receiver<Answer> {
        self.submit(0, Action::Sync, Asked::Flush, Op::Flush, 0)
    }

    fn submit_write(
        &self,
        offset: u64,
        data: Vec<Bytes>,
        durability: Durability,
    ) -> oneshot::Receiver<Answer> {
        let bytes = data.iter().map(|segment| segment.len() as u64).sum();
        let durable = durability == Durability::Durable;
        let pieces = if self.direct {
            align_pieces(data, self.memory_align, self.info.block_bytes as usize)
        } else {
            align_pieces(data, 1, 1)
        };
        let action = Action::Write { pieces, durable };
        self.submit(offset, action, Asked::Write { durable }, Op::Write, bytes)
    }

    /// Zeroes a range of bytes by the best means there are. `deallocate`: frees its space, if possible.
    async fn zero(&self, offset: u64, bytes: u64, deallocate: bool) -> Result<(), BlockError> {
        let punch = Action::Allocate {
            mode: FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            bytes,
        };
        let zero = match self.kind {
            DriveKind::File => Action::Allocate {
                mode: FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
                bytes,
            },
            DriveKind::BlockDevice => Action::ZeroOut { bytes },
        };
        let means = if deallocate { vec![punch, zero] } else { vec![zero] };
        for action in means {
            let asked = self.submit(offset, action, Asked::Discard, Op::WriteZeroes, bytes);
            match answered(asked).await {
                Err(error) if is_unsupported(&error) => {}
                other => return other,
            }
        }
        // tmpfs and others know no cheaper way.
        let zeroes = AlignedBuf::zeroed(ZERO_WRITE_BYTES).freeze();
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let len = (end - at).min(ZERO_WRITE_BYTES as u64);
            let part = vec![zeroes.slice(..len as usize)];
            answered(self.submit_write(at, part, Durability::Cached)).await?;
            at += len;
        }
        Ok(())
    }
}

/// Between two looks at a lock that somebody holds.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// A transfer of zeroes, where they have to be written.
const ZERO_WRITE_BYTES: usize = 256 << 10;

fn backend(engine: Engine) -> Backend {
    match engine {
        Engine::Threads => Backend::Threads(Threads::current()),
        Engine::Auto => match Ring::current() {
            Ok(ring) => Backend::Ring(ring),
            Err(error) => {
                tracing::warn!(%error, "io_uring is not available: drives use worker threads");
                Backend::Threads(Threads::current())
            }
        },
    }
}

/// Looks after a drive until it is dropped or gone.
async fn watch_presence(drive: Weak<Inner>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let Some(drive) = drive.upgrade() else {
            return;
        };
        // A system call that may wait for a disk; on a local file system it does not: the inode is open.
        drive.check_presence();
        if drive.port.check().is_err() {
            return;
        }
    }
}

fn is_unsupported(error: &BlockError) -> bool {
    let unsupported = [Errno::OPNOTSUPP, Errno::NOSYS, Errno::NOTTY];
    matches!(error, BlockError::Os { errno } if unsupported.iter().any(|known| known.raw_os_error() == *errno))
}

/// The answer of one operation.
async fn answered(answer: oneshot::Receiver<Answer>) -> Result<(), BlockError> {
    match answer.await {
        Ok(answer) => answer.map(drop),
        // The port and its queue are gone with the runtime.
        Err(_) => Err(BlockError::Unknown),
    }
}

impl BlockDevice for Drive {
    fn info(&self) -> DeviceInfo {
        self.0.info
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        let checked = self.0.port.check().and_then(|()| self.0.info.check_read(range));
        let len = match checked {
            Ok(0) => return Io::ready(Ok(Bytes::new())),
            Ok(len) => len,
            Err(error) => return Io::ready(Err(error)),
        };
        let action = Action::Read {
            buffer: AlignedBuf::new(len),
            done: 0,
        };
        let asked = Asked::Read { start: range.start };
        let answer = self
            .0
            .submit(self.0.offset(range.start), action, asked, Op::Read, len as u64);
        Io::running(async move {
            match answer.await {
                Ok(Ok(Some(buffer))) => Ok(buffer.freeze()),
                Ok(Err(error)) => Err(error),
                Ok(Ok(None)) | Err(_) => Err(BlockError::Unknown),
            }
        })
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        let checked = self
            .0
            .port
            .check()
            .and_then(|()| self.0.info.check_write(start, &data));
        match checked {
            Ok(range) if range.count == 0 => return Io::ready(Ok(())),
            Ok(_) => {}
            Err(error) => return Io::ready(Err(error)),
        }
        Io::running(answered(self.0.submit_write(
            self.0.offset(start),
            data,
            durability,
        )))
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        if let Err(error) = self.0.port.check().and_then(|()| self.0.info.check_range(range)) {
            return Io::ready(Err(error));
        }
        if range.count == 0 {
            return Io::ready(Ok(()));
        }
        let drive = self.0.clone();
        let offset = self.0.offset(range.start);
        let bytes = range.count * u64::from(self.0.info.block_bytes);
        // Several steps: a task of their own, so that they happen whether the future is polled or not.
        let steps = tokio::task::spawn_local(async move {
            drive.zero(offset, bytes, deallocate).await?;
            match durability {
                Durability::Cached => Ok(()),
                Durability::Durable => answered(drive.submit_sync()).await,
            }
        });
        Io::running(async move { steps.await.unwrap_or(Err(BlockError::Unknown)) })
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        let in_range = ranges
            .iter()
            .try_for_each(|range| self.0.info.check_range(*range));
        if let Err(error) = self.0.port.check().and(in_range) {
            return Io::ready(Err(error));
        }
        let started: Vec<_> = ranges
            .into_iter()
            .filter(|range| range.count > 0)
            .map(|range| {
                let bytes = range.count * u64::from(self.0.info.block_bytes);
                let action = match self.0.kind {
                    DriveKind::File => Action::Allocate {
                        mode: FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                        bytes,
                    },
                    DriveKind::BlockDevice => Action::Discard { bytes },
                };
                let offset = self.0.offset(range.start);
                answered(
                    self.0
                        .submit(offset, action, Asked::Discard, Op::Deallocate, bytes),
                )
            })
            .collect();
        Io::running(async move {
            for answer in join_all(started).await {
                match answer {
                    // A hint that the device cannot take has been given all the same.
                    Err(error) if is_unsupported(&error) => {}
                    other => other?,
                }
            }
            Ok(())
        })
    }

    fn flush(&self) -> Io<()> {
        match self.0.port.check() {
            Ok(()) => Io::running(answered(self.0.submit_sync())),
            Err(error) => Io::ready(Err(error)),
        }
    }
}
