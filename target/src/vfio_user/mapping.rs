//! A mapping of guest memory: the only `unsafe` of this transport. For either side: a client that measures has the same
//! memory.
//!
//! Guest memory is shared with a guest that changes it at any time, from another process. So no reference into it is
//! ever made: bytes are copied out, or in, by raw pointers, and what was copied is what is checked and used. Words
//! that both sides poll (doorbells, event indices, phase tags) are atomics.
//!
//! The file behind a mapping must not shrink while it is mapped, or an access would end this process with SIGBUS;
//! the server maps only what is sealed against that.
#![expect(
    unsafe_code,
    reason = "memory that another process shares can only be mapped and accessed through raw pointers"
)]

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use weft_block::copy::copy_cold;

/// A mapped part of a file.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    writable: bool,
}

impl Mapping {
    /// Maps `bytes` from `offset`, a multiple of the page size.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(file: BorrowedFd<'_>, offset: u64, bytes: usize, writable: bool) -> rustix::io::Result<Self> {
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: a new mapping at an address of the kernel's choice: nothing that exists is replaced.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                MapFlags::SHARED,
                file,
                offset,
            )?
        };
        let start = NonNull::new(start.cast()).expect("the kernel maps nothing at address 0 unasked");
        Ok(Self {
            start,
            bytes,
            writable,
        })
    }

    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(
            offset.checked_add(bytes).is_some_and(|end| end <= self.bytes),
            "an access of {bytes} bytes at {offset} was not checked against the mapping's {}",
            self.bytes
        );
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// Here as in all accesses: past the end, or not aligned.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        // SAFETY: `from` is mapped for as many bytes and `to` is our own memory, so they do not overlap. The guest may
        // write meanwhile: what is copied is then a mixture, which whoever uses it expects of a guest's bytes.
        unsafe { copy_cold(from, to.as_mut_ptr(), to.len()) };
    }

    /// Copies bytes in. The mapping has to be writable.
    pub fn write(&self, offset: usize, from: &[u8]) {
        assert!(self.writable, "a write to memory that is read-only");
        let to = self.at(offset, from.len());
        // SAFETY: as in `read`, in the other direction.
        unsafe { copy_cold(from.as_ptr(), to, from.len()) };
    }

    /// Reads a word at a multiple of 4, before whatever is read after it.
    pub fn load_u32(&self, offset: usize) -> u32 {
        let at = self.at(offset, 4);
        assert!(at.cast::<u32>().is_aligned(), "a word at {offset}");
        // SAFETY: mapped and aligned; shared memory is accessed as an atomic.
        u32::from_le(unsafe { AtomicU32::from_ptr(at.cast()) }.load(Ordering::Acquire))
    }

    /// Writes a word at a multiple of 4, after whatever was written before it.
    pub fn store_u32(&self, offset: usize, value: u32) {
        assert!(self.writable, "a write to memory that is read-only");
        let at = self.at(offset, 4);
        assert!(at.cast::<u32>().is_aligned(), "a word at {offset}");
        // SAFETY: as in `load_u32`.
        unsafe { AtomicU32::from_ptr(at.cast()) }.store(value.to_le(), Ordering::Release);
    }

    /// Writes two words at a multiple of 8, the second, with whatever it announces, after the first.
    pub fn store_pair(&self, offset: usize, first: u64, second: u64) {
        assert!(self.writable, "a write to memory that is read-only");
        let at = self.at(offset, 16);
        assert!(at.cast::<u64>().is_aligned(), "a pair at {offset}");
        // SAFETY: as in `load_u32`; the second word is within the 16 bytes that were checked.
        unsafe {
            AtomicU64::from_ptr(at.cast()).store(first.to_le(), Ordering::Relaxed);
            AtomicU64::from_ptr(at.add(8).cast()).store(second.to_le(), Ordering::Release);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and no reference into it exists.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "what was mapped can be unmapped");
    }
}
