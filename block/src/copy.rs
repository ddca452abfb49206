//! Copies of blocks that have left the caches.
//!
//! A store to a line that is not there waits for it, in order, and everything behind it waits too: the first locked instruction
//! after such a copy pays for all of it. Processors fetch ahead for loads, and not past the end of a page, nor well for stores. So
//! this fetches ahead itself, what is written as well as what is read (measured in docs/performance.md, "What was tried").
#![expect(
    unsafe_code,
    reason = "addresses are fetched ahead that may be nobody's reference"
)]

/// Copied at a time, while the next piece is on its way.
const PIECE_BYTES: usize = 512;

#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

/// Copies `bytes` bytes, as `std::ptr::copy_nonoverlapping` does, from or to memory that is probably in no cache.
///
/// # Safety
/// As of `std::ptr::copy_nonoverlapping`: all of both is valid, to be read and to be written, and they do not overlap.
#[inline]
pub unsafe fn copy_cold(from: *const u8, to: *mut u8, bytes: usize) {
    let mut at = 0;
    while at < bytes {
        let piece = PIECE_BYTES.min(bytes - at);
        let next = at + piece;
        fetch(from, next, bytes);
        fetch(to, next, bytes);
        // SAFETY: at + piece <= bytes, for which the caller answers.
        unsafe { std::ptr::copy_nonoverlapping(from.add(at), to.add(at), piece) };
        at = next;
    }
}

/// Asks for the beginning of what is copied to `to` next, which [`copy_cold`] cannot know of.
#[inline]
pub fn fetch_first(to: *const u8) {
    fetch(to, 0, PIECE_BYTES);
}

/// [`copy_cold`] between slices of one length.
///
/// # Panics
/// If their lengths differ.
pub fn copy_cold_slice(from: &[u8], to: &mut [u8]) {
    assert_eq!(from.len(), to.len(), "a copy of another length");
    // SAFETY: two slices of that length, of which one is borrowed mutably: they do not overlap.
    unsafe { copy_cold(from.as_ptr(), to.as_mut_ptr(), from.len()) };
}

/// Asks for the lines of the piece that begins at `from`, as far as it lies before `end`.
#[cfg(target_arch = "x86_64")]
fn fetch(start: *const u8, from: usize, end: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in (from..end.min(from + PIECE_BYTES)).step_by(LINE_BYTES) {
        // SAFETY: fetching ahead reads nothing and faults nowhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line).cast()) };
    }
}

/// Left to the processor.
#[cfg(not(target_arch = "x86_64"))]
fn fetch(_: *const u8, _: usize, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_copied_and_nothing_beside_it() {
        let source: Vec<u8> = (0..3000u32).map(|at| (at % 251) as u8 + 1).collect();
        for bytes in (0..1100).chain([1535, 1536, 1537, 2048, 2999]) {
            let mut target = vec![0; bytes + 2];
            copy_cold_slice(&source[1..=bytes], &mut target[1..=bytes]);
            assert_eq!(target[1..=bytes], source[1..=bytes], "{bytes} bytes");
            assert_eq!((target[0], target[bytes + 1]), (0, 0), "{bytes} bytes");
        }
    }

    #[test]
    #[should_panic(expected = "a copy of another length")]
    fn slices_of_two_lengths_are_refused() {
        copy_cold_slice(&[1], &mut [0, 0]);
    }
}
