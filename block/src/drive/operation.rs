//! One operation as the kernel is asked for it, with the memory it uses.
//!
//! An operation owns its file and its buffers, so whoever holds it keeps them alive: while the kernel works on
//! one, the ring (or a worker thread) holds it, whatever became of the future. It has two forms: an entry for a
//! ring, and a system call for a worker thread.
#![expect(unsafe_code, reason = "ioctl: the operand's type depends on the number")]

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use io_uring::{opcode, squeue, types};
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};
use rustix::ioctl::{Opcode, Setter, ioctl, opcode as ioctl_opcode};

use crate::buffer::AlignedBuf;

/// IOV_MAX of Linux: the most segments of one system call.
const SEGMENTS_MAX: usize = 1024;

/// `BLKDISCARD` (linux/fs.h): the operand is first byte and length, two 64-bit integers.
const BLKDISCARD: Opcode = ioctl_opcode::none(0x12, 119);
/// `BLKZEROOUT` (linux/fs.h), with the same operand.
const BLKZEROOUT: Opcode = ioctl_opcode::none(0x12, 127);

/// See the module.
pub(super) struct Operation {
    file: Arc<OwnedFd>,
    /// Where the rest of the operation begins, in bytes from the start of the drive.
    offset: u64,
    action: Action,
}

/// What is asked.
pub(super) enum Action {
    Read {
        buffer: AlignedBuf,
        /// Bytes that are there already.
        done: usize,
    },
    Write {
        /// What is left to write.
        pieces: VecDeque<Piece>,
        durable: bool,
    },
    /// fdatasync: also the flush of a block device's cache.
    Sync,
    /// fallocate, which punches holes and zeroes ranges.
    Allocate { mode: FallocateFlags, bytes: u64 },
    /// BLKDISCARD.
    Discard { bytes: u64 },
    /// BLKZEROOUT.
    ZeroOut { bytes: u64 },
}

/// A contiguous part of a write.
pub(super) enum Piece {
    /// The caller's memory, used in place.
    Lent(Bytes),
    /// An aligned copy.
    Copied(Bytes),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Lent(bytes) | Self::Copied(bytes) => bytes,
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Lent(bytes) | Self::Copied(bytes) => bytes.advance(count),
        }
    }
}

/// `struct iovec`. Ours, because the ring keeps it beside an operation and a borrowed slice could not stay.
#[repr(C)]
pub(super) struct IoVec {
    base: *const u8,
    len: usize,
}

/// After a result: done, or to be asked again for the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Done,
    Again,
    Failed(Errno),
    /// The file ended before the range did.
    Ended,
}

impl Operation {
    pub(super) fn new(file: Arc<OwnedFd>, offset: u64, action: Action) -> Self {
        Self { file, offset, action }
    }

    /// Whether a ring cannot do it.
    pub(super) fn needs_thread(&self) -> bool {
        matches!(self.action, Action::Discard { .. } | Action::ZeroOut { .. })
    }

    /// The buffer of a read that is done.
    pub(super) fn into_buffer(self) -> Option<AlignedBuf> {
        match self.action {
            Action::Read { buffer, .. } => Some(buffer),
            _ => None,
        }
    }

    /// How far a read came, in bytes from the start of the drive, and how far it was to come.
    pub(super) fn reached(&self) -> (u64, u64) {
        let left = match &self.action {
            Action::Read { buffer, done } => buffer.len() - done,
            _ => 0,
        };
        (self.offset, self.offset + left as u64)
    }

    /// The form for a ring. The entry points into `self`'s buffers and into `vectors`, so both have to stay
    /// where they are until the completion is seen. (Moving `self` moves no buffer.)
    pub(super) fn entry(&mut self, vectors: &mut Vec<IoVec>) -> squeue::Entry {
        let file = types::Fd(self.file.as_raw_fd());
        match &mut self.action {
            Action::Read { buffer, done } => {
                let rest = &mut buffer[*done..];
                let len = length(rest.len());
                opcode::Read::new(file, rest.as_mut_ptr(), len)
                    .offset(self.offset)
                    .build()
            }
            Action::Write { pieces, durable } => {
                let flags = write_flags(*durable).bits().cast_signed();
                if let [only] = pieces.make_contiguous() {
                    let bytes = only.bytes();
                    return opcode::Write::new(file, bytes.as_ptr(), length(bytes.len()))
                        .offset(self.offset)
                        .rw_flags(flags)
                        .build();
                }
                vectors.clear();
                vectors.extend(pieces.iter().take(SEGMENTS_MAX).map(|piece| IoVec {
                    base: piece.bytes().as_ptr(),
                    len: piece.bytes().len(),
                }));
                opcode::Writev::new(file, vectors.as_ptr().cast(), length(vectors.len()))
                    .offset(self.offset)
                    .rw_flags(flags)
                    .build()
            }
            Action::Sync => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Action::Allocate { mode, bytes } => opcode::Fallocate::new(file, *bytes)
                .offset(self.offset)
                .mode(mode.bits().cast_signed())
                .build(),
            Action::Discard { .. } | Action::ZeroOut { .. } => {
                unreachable!("a discard of a block device goes to a worker thread")
            }
        }
    }

    /// The form for a worker thread: waits for the kernel, and answers as a completion would.
    pub(super) fn run(&mut self) -> Result<usize, Errno> {
        let (file, offset) = (&*self.file, self.offset);
        match &mut self.action {
            Action::Read { buffer, done } => {
                let rest = IoSliceMut::new(&mut buffer[*done..]);
                rustix::io::preadv(file, &mut [rest], offset)
            }
            Action::Write { pieces, durable } => {
                let pieces: Vec<IoSlice<'_>> = pieces
                    .iter()
                    .take(SEGMENTS_MAX)
                    .map(|piece| IoSlice::new(piece.bytes()))
                    .collect();
                rustix::io::pwritev2(file, &pieces, offset, write_flags(*durable))
            }
            Action::Sync => rustix::fs::fdatasync(file).map(|()| 0),
            Action::Allocate { mode, bytes } => {
                rustix::fs::fallocate(file, *mode, offset, *bytes).map(|()| 0)
            }
            Action::Discard { bytes } => {
                // SAFETY: the operand of this number is two 64-bit integers, only read.
                unsafe { ioctl(file, Setter::<BLKDISCARD, [u64; 2]>::new([offset, *bytes])) }.map(|()| 0)
            }
            Action::ZeroOut { bytes } => {
                // SAFETY: the operand of this number is two 64-bit integers, only read.
                unsafe { ioctl(file, Setter::<BLKZEROOUT, [u64; 2]>::new([offset, *bytes])) }.map(|()| 0)
            }
        }
    }

    /// Takes a result in. The kernel may do less than asked; the rest is asked for again, from a whole block
    /// of `align` bytes, since direct I/O may start nowhere else.
    pub(super) fn advance(&mut self, result: Result<usize, Errno>, align: usize) -> Step {
        let count = match result {
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return Step::Again,
            Err(errno) => return Step::Failed(errno),
        };
        match &mut self.action {
            Action::Read { buffer, done } => {
                if *done + count >= buffer.len() {
                    return Step::Done;
                }
                if count == 0 {
                    return Step::Ended;
                }
                let whole = count - count % align;
                if whole == 0 {
                    return Step::Ended;
                }
                *done += whole;
                self.offset += whole as u64;
                Step::Again
            }
            Action::Write { pieces, .. } => {
                let left: usize = pieces.iter().map(|piece| piece.bytes().len()).sum();
                if count >= left {
                    pieces.clear();
                    return Step::Done;
                }
                let mut whole = count - count % align;
                if whole == 0 {
                    // Nothing was written and nothing said why.
                    return Step::Failed(Errno::IO);
                }
                self.offset += whole as u64;
                while let Some(front) = pieces.front_mut().filter(|_| whole > 0) {
                    let part = front.bytes().len().min(whole);
                    front.advance(part);
                    whole -= part;
                    if front.bytes().is_empty() {
                        pieces.pop_front();
                    }
                }
                Step::Again
            }
            Action::Sync | Action::Allocate { .. } | Action::Discard { .. } | Action::ZeroOut { .. } => {
                Step::Done
            }
        }
    }
}

fn write_flags(durable: bool) -> ReadWriteFlags {
    if durable {
        ReadWriteFlags::DSYNC
    } else {
        ReadWriteFlags::empty()
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("a transfer is at most TRANSFER_BYTES_MAX")
}

/// Cuts a write into pieces that direct I/O takes: memory aligned to `memory_align`, lengths whole blocks of
/// `block_bytes`. What is so already is used in place; the rest is copied, once.
pub(super) fn align_pieces(data: Vec<Bytes>, memory_align: usize, block_bytes: usize) -> VecDeque<Piece> {
    let mut pieces = VecDeque::with_capacity(data.len().min(8));
    let mut gathered: Vec<Bytes> = Vec::new();
    let mut gathered_len = 0;
    for mut segment in data {
        // The rest of a block that an earlier segment began.
        let missing = (block_bytes - gathered_len % block_bytes) % block_bytes;
        if missing > 0 && !segment.is_empty() {
            let part = segment.split_to(missing.min(segment.len()));
            gathered_len += part.len();
            gathered.push(part);
        }
        if gathered_len.is_multiple_of(block_bytes)
            && (segment.as_ptr() as usize).is_multiple_of(memory_align)
        {
            let whole = segment.len() - segment.len() % block_bytes;
            if whole > 0 {
                copy_gathered(&mut gathered, &mut pieces);
                gathered_len = 0;
                pieces.push_back(Piece::Lent(segment.split_to(whole)));
            }
        }
        if !segment.is_empty() {
            gathered_len += segment.len();
            gathered.push(segment);
        }
    }
    copy_gathered(&mut gathered, &mut pieces);
    pieces
}

fn copy_gathered(gathered: &mut Vec<Bytes>, pieces: &mut VecDeque<Piece>) {
    if !gathered.is_empty() {
        pieces.push_back(Piece::Copied(AlignedBuf::gather(gathered).freeze()));
        gathered.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(pieces: &VecDeque<Piece>) -> Vec<(&'static str, usize)> {
        pieces
            .iter()
            .map(|piece| match piece {
                Piece::Lent(bytes) => ("lent", bytes.len()),
                Piece::Copied(bytes) => ("copied", bytes.len()),
            })
            .collect()
    }

    fn aligned(len: usize) -> Bytes {
        AlignedBuf::new(len).freeze()
    }

    fn odd(len: usize) -> Bytes {
        AlignedBuf::new(len + 1).freeze().slice(1..)
    }

    #[test]
    fn aligned_blocks_are_lent_and_the_rest_is_copied_once() {
        let pieces = |data| align_pieces(data, 4096, 4096);
        assert_eq!(shape(&pieces(vec![aligned(8192)])), [("lent", 8192)]);
        assert_eq!(shape(&pieces(vec![odd(8192)])), [("copied", 8192)]);
        let mixed = vec![
            odd(100),
            odd(3996),
            aligned(8192),
            Bytes::new(),
            odd(4096),
            odd(4096),
        ];
        assert_eq!(
            shape(&pieces(mixed)),
            [("copied", 4096), ("lent", 8192), ("copied", 8192)]
        );
        // The aligned segment begins in the middle of a block: only its own last part could be in place, and
        // that is not aligned any more.
        let shifted = vec![odd(100), aligned(8192), odd(3996)];
        assert_eq!(shape(&pieces(shifted)), [("copied", 12288)]);
        // Whole blocks of an aligned segment are in place, its tail is gathered with what follows.
        let tail = vec![aligned(4096 + 10), odd(4086)];
        assert_eq!(shape(&pieces(tail)), [("lent", 4096), ("copied", 4096)]);
    }

    #[test]
    fn pieces_hold_the_same_bytes_in_the_same_order() {
        let source: Vec<u8> = (0..40960u32).map(|at| (at % 251) as u8).collect();
        let source = Bytes::from(source);
        for step in [1, 7, 512, 4095, 4096, 4097, 40960] {
            let data = (0..source.len())
                .step_by(step)
                .map(|at| source.slice(at..(at + step).min(source.len())));
            let pieces = align_pieces(data.collect(), 512, 4096);
            let joined: Vec<u8> = pieces.iter().flat_map(|piece| piece.bytes().to_vec()).collect();
            assert!(joined == source, "step {step}");
            assert!(
                pieces
                    .iter()
                    .all(|piece| piece.bytes().len().is_multiple_of(4096))
            );
            assert!(
                pieces
                    .iter()
                    .all(|piece| (piece.bytes().as_ptr() as usize).is_multiple_of(512))
            );
        }
    }

    fn write(lengths: &[usize]) -> Operation {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let pieces = lengths.iter().map(|len| Piece::Lent(aligned(*len))).collect();
        Operation::new(
            file,
            0,
            Action::Write {
                pieces,
                durable: false,
            },
        )
    }

    #[test]
    fn a_short_write_goes_on_at_the_next_whole_block() {
        let mut operation = write(&[4096, 8192]);
        assert_eq!(operation.advance(Ok(4096 + 4096 + 17), 4096), Step::Again);
        assert_eq!(operation.offset, 8192);
        assert_eq!(operation.advance(Ok(4096), 4096), Step::Done);
        assert_eq!(write(&[4096]).advance(Ok(0), 4096), Step::Failed(Errno::IO));
        assert_eq!(write(&[4096]).advance(Err(Errno::INTR), 4096), Step::Again);
    }

    #[test]
    fn a_read_past_the_end_of_the_file_says_so() {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let buffer = AlignedBuf::new(8192);
        let mut operation = Operation::new(file, 0, Action::Read { buffer, done: 0 });
        assert_eq!(operation.advance(Ok(4096), 4096), Step::Again);
        let result = operation.run();
        assert_eq!(operation.advance(result, 4096), Step::Ended);
    }
}
