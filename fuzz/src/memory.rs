//! How much memory a parser takes: an allocator that counts, and an assertion over it.
//!
//! A peer's length must not size our memory. libFuzzer's own limit is per process and far too high to notice a parser
//! that takes a thousand bytes for one; [`bounded`] knows how much its caller expects.
#![expect(unsafe_code, reason = "a global allocator is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a count of bytes in use and of the most there ever were.
pub struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn took(bytes: usize) {
    let current = CURRENT.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(current, Relaxed);
}

// SAFETY: every call goes to the system's allocator with the arguments it came with; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: as above. Passed on as it is, so that zeroed memory stays lazy.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CURRENT.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Does `work` and says how much it had allocated at most, above what there was before. One thread.
pub fn measured<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = CURRENT.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    (result, PEAK.load(Relaxed).saturating_sub(before))
}

/// Does `work` and asserts that it never had more than `bytes` allocated above what there was before. One thread.
///
/// # Panics
/// If it had.
pub fn bounded<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    let (result, most) = measured(work);
    assert!(most <= bytes, "{most} bytes of memory, at most {bytes} expected");
    result
}
