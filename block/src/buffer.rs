//! Aligned buffers that direct I/O can use in place, and that are used again instead of freed.
//!
//! [`AlignedBuf`] is memory at a 4 KiB boundary. [`AlignedBuf::freeze`] makes [`Bytes`] of it; when the last
//! of them is dropped the memory returns to a free list of the thread that dropped it. The lists are bounded
//! ([`POOL_BYTES_MAX`]); what does not fit is freed.
//!
//! Whoever receives data that is going to a drive should receive it into one of these: the drive then needs
//! no copy.
#![expect(
    unsafe_code,
    reason = "memory with an alignment of its own has to be allocated and freed by hand"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytes::Bytes;

/// Alignment of every buffer: enough for direct I/O on any drive known (a page).
pub const BUFFER_ALIGN: usize = 4096;

/// Memory a thread keeps for reuse. A guess: 32 of the largest transfers.
pub const POOL_BYTES_MAX: usize = 32 << 20;

/// The largest capacity that is kept; larger buffers are allocated and freed each time.
const POOLED_CAPACITY_MAX: usize = BUFFER_ALIGN << (CLASS_COUNT - 1);

/// Capacities are powers of two from 4 KiB to 2 MiB: one list each.
const CLASS_COUNT: usize = 10;

/// Owned memory, aligned to [`BUFFER_ALIGN`], always initialised.
pub struct AlignedBuf {
    start: NonNull<u8>,
    /// Bytes in use, at most `capacity`.
    len: usize,
    /// Bytes allocated, a multiple of [`BUFFER_ALIGN`], never 0.
    capacity: usize,
}

// SAFETY: the buffer owns its memory alone, as a `Box<[u8]>` does.
unsafe impl Send for AlignedBuf {}
// SAFETY: a shared reference only reads, as with `Box<[u8]>`.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` bytes with unspecified contents: zeroes, or what its last user left there.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let capacity = capacity_for(len);
        if let Some(start) = pool_take(capacity) {
            return Self { start, len, capacity };
        }
        let layout = layout(capacity);
        // SAFETY: the layout's size is `capacity`, which is never 0.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Self { start, len, capacity }
    }

    /// A buffer of `len` zeroes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let mut buffer = Self::new(len);
        buffer.fill(0);
        buffer
    }

    /// A buffer with the bytes of `segments`, one after another.
    #[must_use]
    pub fn gather(segments: &[Bytes]) -> Self {
        let mut buffer = Self::new(segments.iter().map(Bytes::len).sum());
        let mut at = 0;
        for segment in segments {
            buffer[at..at + segment.len()].copy_from_slice(segment);
            at += segment.len();
        }
        buffer
    }

    /// Keeps the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Shares the buffer; its memory is used again when the last handle is dropped.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes from `start` are allocated, initialised and ours.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlignedBuf")
            .field("len", &self.len)
            .field("capacity", &self.capacity)
            .finish()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if !pool_give(self.start, self.capacity) {
            // SAFETY: allocated in `new` with this layout, and nobody else holds it.
            unsafe { dealloc(self.start.as_ptr(), layout(self.capacity)) };
        }
    }
}

fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity, BUFFER_ALIGN).expect("a buffer is far smaller than the address space")
}

fn capacity_for(len: usize) -> usize {
    if len <= POOLED_CAPACITY_MAX {
        len.next_power_of_two().max(BUFFER_ALIGN)
    } else {
        len.next_multiple_of(BUFFER_ALIGN)
    }
}

fn class_of(capacity: usize) -> Option<usize> {
    (capacity <= POOLED_CAPACITY_MAX).then(|| (capacity / BUFFER_ALIGN).trailing_zeros() as usize)
}

/// Memory of this thread that waits for its next use.
#[derive(Default)]
struct Pool {
    free: [Vec<NonNull<u8>>; CLASS_COUNT],
    bytes: usize,
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, free) in self.free.iter_mut().enumerate() {
            for start in free.drain(..) {
                // SAFETY: the pool owns what it was given; its list tells the capacity it was allocated with.
                unsafe { dealloc(start.as_ptr(), layout(BUFFER_ALIGN << class)) };
            }
        }
    }
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

fn pool_take(capacity: usize) -> Option<NonNull<u8>> {
    let class = class_of(capacity)?;
    // `try_with`: buffers may be taken and dropped while the thread ends.
    POOL.try_with(|pool| {
        let mut pool = pool.borrow_mut();
        let start = pool.free[class].pop()?;
        pool.bytes -= capacity;
        Some(start)
    })
    .ok()
    .flatten()
}

/// Whether the pool took the memory.
fn pool_give(start: NonNull<u8>, capacity: usize) -> bool {
    let Some(class) = class_of(capacity) else {
        return false;
    };
    POOL.try_with(|pool| {
        let mut pool = pool.borrow_mut();
        if pool.bytes + capacity > POOL_BYTES_MAX {
            return false;
        }
        pool.bytes += capacity;
        pool.free[class].push(start);
        true
    })
    .unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_buffer_is_aligned_and_as_long_as_asked() {
        for len in [0, 1, 512, 4096, 4097, 1 << 20, (2 << 20) + 1] {
            let buffer = AlignedBuf::new(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % BUFFER_ALIGN, 0);
        }
    }

    #[test]
    fn dropped_memory_is_used_again() {
        let first = AlignedBuf::new(100_000);
        let at = first.as_ptr();
        let shared = first.freeze();
        let part = shared.slice(10..20);
        drop(shared);
        assert_ne!(
            AlignedBuf::new(100_000).as_ptr(),
            at,
            "a slice still holds the buffer"
        );
        drop(part);
        let pair = [AlignedBuf::new(100_000), AlignedBuf::new(100_000)];
        assert!(pair.iter().any(|buffer| buffer.as_ptr() == at));
    }

    #[test]
    fn gathered_segments_stand_one_after_another() {
        let segments = [
            Bytes::from_static(b"ab"),
            Bytes::new(),
            Bytes::from_static(b"cde"),
        ];
        assert_eq!(&AlignedBuf::gather(&segments)[..], b"abcde");
    }

    #[test]
    fn the_pool_is_bounded() {
        let buffers: Vec<_> = (0..40).map(|_| AlignedBuf::new(1 << 20)).collect();
        drop(buffers);
        POOL.with(|pool| assert!(pool.borrow().bytes <= POOL_BYTES_MAX));
    }
}
