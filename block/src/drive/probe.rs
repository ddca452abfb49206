//! Opening a path: what it is, how large, and which direct I/O it takes.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::error::DriveError;
use super::lock;
use crate::buffer::AlignedBuf;

/// Logical block of a file: the fabric's own block, and the page of every file system.
const FILE_BLOCK_BYTES: u32 = 4096;

/// Alignment of memory where the kernel does not tell (before Linux 6.1). A page is always enough.
const MEMORY_ALIGN_DEFAULT: usize = 4096;

/// What was opened. The lock is held as long as `file` is open.
#[derive(Debug)]
pub(super) struct Probed {
    pub(super) file: OwnedFd,
    pub(super) kind: DriveKind,
    pub(super) block_bytes: u32,
    pub(super) blocks: u64,
    /// Whether I/O passes the page cache.
    pub(super) direct: bool,
    /// Of the memory that direct I/O uses.
    pub(super) memory_align: usize,
    pub(super) volatile_write_cache: bool,
}

/// What a drive is, as far as operations differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DriveKind {
    BlockDevice,
    File,
}

/// `None`: somebody else holds the lock.
pub(super) fn open(path: &Path) -> Result<Option<Probed>, DriveError> {
    let failed = |errno: Errno| DriveError::Open {
        path: path.to_owned(),
        source: errno.into(),
    };
    let kind = match FileType::from_raw_mode(rustix::fs::stat(path).map_err(failed)?.st_mode) {
        FileType::RegularFile => DriveKind::File,
        FileType::BlockDevice => DriveKind::BlockDevice,
        _ => {
            return Err(DriveError::NotADrive {
                path: path.to_owned(),
            });
        }
    };
    let mut flags = OFlags::RDWR | OFlags::CLOEXEC;
    if kind == DriveKind::BlockDevice {
        flags |= OFlags::EXCL;
    }
    let (file, mut direct) = match rustix::fs::open(path, flags | OFlags::DIRECT, Mode::empty()) {
        Ok(file) => (file, true),
        // tmpfs before Linux 6.6, and file systems that never learnt it.
        Err(Errno::INVAL) => (
            rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?,
            false,
        ),
        Err(Errno::BUSY) if kind == DriveKind::BlockDevice => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    };
    if !lock::try_lock(&file).map_err(failed)? {
        return Ok(None);
    }
    // Again, on what was opened: the path may lead elsewhere by now.
    let stat = rustix::fs::fstat(&file).map_err(failed)?;
    let (block_bytes, bytes) = match kind {
        DriveKind::File => (FILE_BLOCK_BYTES, u64::try_from(stat.st_size).unwrap_or(0)),
        DriveKind::BlockDevice => (
            rustix::fs::ioctl_blksszget(&file).map_err(failed)?,
            rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(failed)?,
        ),
    };
    if !matches!(block_bytes, 512 | 4096) {
        return Err(DriveError::BlockSize {
            path: path.to_owned(),
            block_bytes,
        });
    }
    let blocks = bytes / u64::from(block_bytes);
    if blocks == 0 {
        return Err(DriveError::Empty {
            path: path.to_owned(),
        });
    }
    let mut memory_align = 1;
    if direct {
        match direct_alignment(&file, block_bytes) {
            Some(align) => memory_align = align,
            None => {
                direct = false;
                let buffered = rustix::fs::fcntl_getfl(&file).map_err(failed)? - OFlags::DIRECT;
                rustix::fs::fcntl_setfl(&file, buffered).map_err(failed)?;
            }
        }
    }
    if !direct {
        tracing::warn!(
            drive = %path.display(),
            "the file system takes no direct I/O: this drive goes through the page cache"
        );
    }
    let volatile_write_cache = match kind {
        // What lies below a file is not ours to know.
        DriveKind::File => true,
        DriveKind::BlockDevice => has_write_cache(stat.st_rdev),
    };
    Ok(Some(Probed {
        file,
        kind,
        block_bytes,
        blocks,
        direct,
        memory_align,
        volatile_write_cache,
    }))
}

/// Alignment of memory for direct I/O in blocks of `block_bytes`; `None` where that does not work.
fn direct_alignment(file: &OwnedFd, block_bytes: u32) -> Option<usize> {
    let mut memory_align = MEMORY_ALIGN_DEFAULT;
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(told) = told
        && told.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        let offset_align = told.stx_dio_offset_align;
        if offset_align == 0 || !block_bytes.is_multiple_of(offset_align) {
            return None;
        }
        memory_align = usize::try_from(told.stx_dio_mem_align).ok()?.max(1);
    }
    // Some file systems take the flag and refuse the I/O.
    let mut trial = AlignedBuf::new(block_bytes as usize);
    match rustix::io::pread(file, &mut trial[..], 0) {
        Err(Errno::INVAL) => None,
        // Any other trouble is not about alignment, and the first real operation will tell.
        _ => Some(memory_align),
    }
}

/// Whether a block device has a write cache that loses what it holds with power. Yes, where nobody can tell.
fn has_write_cache(device: u64) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let device = format!("/sys/dev/block/{major}:{minor}");
    // A partition has no queue of its own: its disk has, one folder up.
    [format!("{device}/queue"), format!("{device}/../queue")]
        .iter()
        .find_map(|queue| std::fs::read_to_string(format!("{queue}/write_cache")).ok())
        .is_none_or(|cache| cache.trim() != "write through")
}
