//! A drive in memory, for tests, for benchmarks and for whoever needs a device without a medium.
//!
//! It keeps the contract to the letter. Memory is taken in pieces of [`CHUNK_BYTES`] when a block in them is written
//! first, and kept until the drive is dropped: what is written over and over costs no allocation. What was never
//! written, or was deallocated, reads as zeroes.
//!
//! A read is lent: answered with the drive's own memory, without a copy. What is lent never changes: a page that is
//! overwritten while somebody holds it gets other memory, until it is overwritten again. Writes are copied in, so no
//! receive buffer is kept alive by a drive.
//!
//! It does not survive its process; every completed write is as durable as any other, so it reports no
//! volatile write cache.
#![expect(
    unsafe_code,
    reason = "memory of which some pages are lent while others are written"
)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bytes::Bytes;
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use crate::buffer::AlignedBuf;
use crate::copy::{copy_cold, fetch_first};
use crate::huge::HugeMemory;
use crate::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};

/// Longest transfer, as of a file drive.
const TRANSFER_BYTES_MAX: u32 = 1 << 20;

/// Memory taken at a time. The system gives it page by page as it is touched.
const CHUNK_BYTES: usize = 8 << 20;

const CHUNK_PAGES: usize = CHUNK_BYTES / BLOCK_BYTES;

static ZERO_PAGE: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// See the module.
pub struct MemoryDrive {
    info: DeviceInfo,
    /// By number: chunk n holds the bytes from n × [`CHUNK_BYTES`].
    chunks: RefCell<BTreeMap<u64, Chunk>>,
}

/// A piece of the drive, of which some pages of [`BLOCK_BYTES`] hold data.
struct Chunk {
    memory: Arc<Memory>,
    /// One bit a page. A page that holds none reads as zeroes, whatever its memory has.
    written: [u64; CHUNK_PAGES / 64],
    /// Pages that were overwritten while their memory was lent.
    moved: BTreeMap<usize, Bytes>,
}

/// The memory of a chunk, [`CHUNK_BYTES`] of it, and how often each page is lent. These counts are short, so that many of them share a
/// line of the cache: every read and write all over the drive looks at one.
///
/// Invariant: only the chunk's owner writes, and no page that is lent. So what threads share is only read, and counted
/// atomically.
struct Memory {
    pages: HugeMemory,
    lent: Box<[AtomicU8]>,
}

impl Memory {
    fn new() -> Self {
        Self {
            pages: HugeMemory::zeroed(CHUNK_BYTES),
            lent: (0..CHUNK_PAGES).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    fn is_lent(&self, page: usize) -> bool {
        // With the release of the last reader: its reads are over before the page is written.
        self.lent[page].load(Ordering::Acquire) > 0
    }

    /// The bytes of a range.
    ///
    /// # Safety
    /// Nothing in the range is written while the slice lives.
    unsafe fn bytes(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= CHUNK_BYTES);
        // SAFETY: within the allocation, which is initialised; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.pages.start().as_ptr().add(range.start), range.len()) }
    }

    /// Fetches ahead what is written at `at` next, if that is here.
    fn expect_write(&self, at: usize) {
        if at < CHUNK_BYTES {
            fetch_first(self.pages.start().as_ptr().wrapping_add(at));
        }
    }

    /// Copies `data` to `at`.
    ///
    /// # Safety
    /// The caller is the chunk's owner, and no slice of what is written lives: no page of it is lent.
    unsafe fn write(&self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= CHUNK_BYTES);
        // SAFETY: within the allocation; nobody else looks at it, by the caller's promise.
        unsafe {
            copy_cold(data.as_ptr(), self.pages.start().as_ptr().add(at), data.len());
        }
    }
}

/// A range of pages that somebody reads.
struct Lent {
    memory: Arc<Memory>,
    span: Span,
}

/// A range of a chunk's bytes in one word, so that what is lent is two, and moved in registers.
#[derive(Clone, Copy)]
struct Span(u64);

impl Span {
    fn new(range: &Range<usize>) -> Self {
        Self((range.start as u64) << 32 | range.end as u64)
    }

    fn range(self) -> Range<usize> {
        (self.0 >> 32) as usize..self.0 as u32 as usize
    }
}

const _: () = assert!(CHUNK_BYTES <= u32::MAX as usize);

impl Lent {
    /// `None` if a page is lent as often as can be counted.
    fn new(memory: &Arc<Memory>, range: &Range<usize>) -> Option<Self> {
        let counts = &memory.lent[pages(range)];
        // Nobody else counts up.
        if counts.iter().any(|lent| lent.load(Ordering::Relaxed) == u8::MAX) {
            return None;
        }
        for lent in counts {
            lent.fetch_add(1, Ordering::Relaxed);
        }
        Some(Self {
            memory: Arc::clone(memory),
            span: Span::new(range),
        })
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the pages are counted as lent as long as this lives, so they are not written.
        unsafe { self.memory.bytes(self.span.range()) }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        for lent in &self.memory.lent[pages(&self.span.range())] {
            lent.fetch_sub(1, Ordering::Release);
        }
    }
}

/// The pages that a range of bytes touches.
fn pages(range: &Range<usize>) -> Range<usize> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

impl Chunk {
    fn new() -> Self {
        Self {
            memory: Arc::new(Memory::new()),
            written: [0; CHUNK_PAGES / 64],
            moved: BTreeMap::new(),
        }
    }

    /// All of its memory touched.
    fn resident() -> Self {
        let chunk = Self::new();
        for page in 0..CHUNK_PAGES {
            // SAFETY: it is new: nothing is lent.
            unsafe { chunk.memory.write(page * BLOCK_BYTES, &[0xff]) };
        }
        chunk
    }

    fn is_written(&self, page: usize) -> bool {
        self.written[page / 64] >> (page % 64) & 1 == 1
    }

    /// The range without a copy, if it lies in one piece, and has not been lent too often.
    fn lend(&self, range: Range<usize>) -> Option<Bytes> {
        let mut touched = pages(&range);
        let first = touched.start;
        if touched.len() == 1 {
            let within = range.start % BLOCK_BYTES..range.start % BLOCK_BYTES + range.len();
            if !self.is_written(first) {
                return Some(Bytes::from_static(&ZERO_PAGE[within]));
            }
            if let Some(page) = self.moved.get(&first) {
                return Some(page.slice(within));
            }
        }
        let in_place = touched.clone().all(|page| self.is_written(page))
            && (self.moved.is_empty() || !touched.any(|page| self.moved.contains_key(&page)));
        if !in_place {
            return None;
        }
        Lent::new(&self.memory, &range).map(Bytes::from_owner)
    }

    /// Copies the bytes from `at` into `out`.
    fn read(&self, at: usize, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let (page, within) = ((at + done) / BLOCK_BYTES, (at + done) % BLOCK_BYTES);
            let len = (BLOCK_BYTES - within).min(out.len() - done);
            let piece = &mut out[done..done + len];
            if !self.is_written(page) {
                piece.fill(0);
            } else if let Some(moved) = self.moved.get(&page) {
                piece.copy_from_slice(&moved[within..within + len]);
            } else {
                // SAFETY: only this thread writes, and not before the copy is made.
                piece.copy_from_slice(unsafe { self.memory.bytes(at + done..at + done + len) });
            }
            done += len;
        }
    }

    /// Copies `data` to `at`. Whether `more` follows it at once.
    fn write(&mut self, at: usize, mut data: &[u8], more: bool) {
        let mut to = at;
        while !data.is_empty() {
            let within = to % BLOCK_BYTES;
            let (part, rest) = data.split_at((BLOCK_BYTES - within).min(data.len()));
            if more || !rest.is_empty() {
                self.memory.expect_write(to + part.len());
            }
            self.write_page(to / BLOCK_BYTES, within, part);
            to += part.len();
            data = rest;
        }
    }

    fn write_page(&mut self, page: usize, within: usize, part: &[u8]) {
        if part.len() == BLOCK_BYTES {
            self.put(page, part);
            return;
        }
        // Part of a page, which only 512-byte blocks can ask for.
        let mut whole = [0; BLOCK_BYTES];
        self.read(page * BLOCK_BYTES, &mut whole);
        whole[within..within + part.len()].copy_from_slice(part);
        self.put(page, &whole);
    }

    /// Gives a page its bytes.
    fn put(&mut self, page: usize, bytes: &[u8]) {
        self.written[page / 64] |= 1 << (page % 64);
        if self.memory.is_lent(page) {
            let mut copy = AlignedBuf::new(BLOCK_BYTES);
            copy.copy_from_slice(bytes);
            self.moved.insert(page, copy.freeze());
        } else {
            // SAFETY: the page is not lent, and this thread, which would lend it, is here.
            unsafe { self.memory.write(page * BLOCK_BYTES, bytes) };
            if !self.moved.is_empty() {
                self.moved.remove(&page);
            }
        }
    }

    /// Makes the bytes from `at` to `end` read as zeroes.
    fn zero(&mut self, at: usize, end: usize) {
        for page in pages(&(at..end)) {
            let start = page * BLOCK_BYTES;
            let (from, to) = (at.max(start), end.min(start + BLOCK_BYTES));
            if to - from == BLOCK_BYTES {
                self.written[page / 64] &= !(1 << (page % 64));
                self.moved.remove(&page);
            } else if self.is_written(page) {
                self.write_page(page, from - start, &ZERO_PAGE[..to - from]);
            }
        }
    }
}

impl MemoryDrive {
    /// A drive of `blocks` blocks of `block_bytes` (512 or 4096) bytes, all zeroes.
    ///
    /// # Panics
    /// If `block_bytes` is neither.
    #[must_use]
    pub fn new(block_bytes: u32, blocks: u64) -> Rc<Self> {
        assert!(
            matches!(block_bytes, 512 | 4096),
            "a logical block has 512 or 4096 bytes"
        );
        Rc::new(Self {
            info: DeviceInfo {
                block_bytes,
                blocks,
                transfer_bytes_max: TRANSFER_BYTES_MAX,
                volatile_write_cache: false,
                deallocated_reads_zero: true,
            },
            chunks: RefCell::default(),
        })
    }

    /// The same as a [`Device`], with 4096-byte blocks.
    #[must_use]
    pub fn device(bytes: u64) -> Device {
        Self::new(4096, bytes / BLOCK_BYTES as u64)
    }

    /// The same with all of its memory taken, and touched, at once: for measurements, in which the first write of a
    /// block should cost what every other one does.
    #[must_use]
    pub fn preallocated(bytes: u64) -> Device {
        let drive = Self::new(4096, bytes / BLOCK_BYTES as u64);
        let chunks = bytes.div_ceil(CHUNK_BYTES as u64);
        drive
            .chunks
            .borrow_mut()
            .extend((0..chunks).map(|number| (number, Chunk::resident())));
        drive
    }

    /// Bytes that hold data, counted in pages.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        let chunks = self.chunks.borrow();
        let pages: u32 = chunks
            .values()
            .flat_map(|chunk| chunk.written.iter().map(|word| word.count_ones()))
            .sum();
        u64::from(pages) * BLOCK_BYTES as u64
    }

    fn byte_range(&self, range: LbaRange) -> (u64, u64) {
        let block_bytes = u64::from(self.info.block_bytes);
        let start = range.start.0 * block_bytes;
        (start, start + range.count * block_bytes)
    }

    fn read_now(&self, range: LbaRange) -> Result<Bytes, BlockError> {
        let len = self.info.check_read(range)?;
        let (start, _) = self.byte_range(range);
        let chunks = self.chunks.borrow();
        let (number, at) = place(start);
        if let Some(lent) = chunks
            .get(&number)
            .filter(|_| at + len <= CHUNK_BYTES && len > 0)
            .and_then(|chunk| chunk.lend(at..at + len))
        {
            return Ok(lent);
        }
        let mut out = AlignedBuf::new(len);
        let mut done = 0;
        while done < len {
            let (number, at) = place(start + done as u64);
            let part = (CHUNK_BYTES - at).min(len - done);
            let piece = &mut out[done..done + part];
            match chunks.get(&number) {
                Some(chunk) => chunk.read(at, piece),
                None => piece.fill(0),
            }
            done += part;
        }
        Ok(out.freeze())
    }

    fn write_now(&self, start: Lba, data: &[Bytes]) -> Result<(), BlockError> {
        let range = self.info.check_write(start, data)?;
        let (mut to, _) = self.byte_range(range);
        let mut chunks = self.chunks.borrow_mut();
        let end = to + data.iter().map(|segment| segment.len() as u64).sum::<u64>();
        for segment in data {
            let mut rest = &segment[..];
            while !rest.is_empty() {
                let (number, at) = place(to);
                let (part, next) = rest.split_at(rest.len().min(CHUNK_BYTES - at));
                let more = to + (part.len() as u64) < end;
                chunks
                    .entry(number)
                    .or_insert_with(Chunk::new)
                    .write(at, part, more);
                to += part.len() as u64;
                rest = next;
            }
        }
        Ok(())
    }

    fn zero_now(&self, range: LbaRange) -> Result<(), BlockError> {
        self.info.check_range(range)?;
        if range.count == 0 {
            return Ok(());
        }
        let (start, end) = self.byte_range(range);
        let (first, last) = (place(start).0, place(end - 1).0);
        // Only chunks that exist are visited: the range may be as long as the drive.
        for (number, chunk) in self.chunks.borrow_mut().range_mut(first..=last) {
            let base = number * CHUNK_BYTES as u64;
            let from = start.saturating_sub(base) as usize;
            let to = (end - base).min(CHUNK_BYTES as u64) as usize;
            chunk.zero(from, to);
        }
        Ok(())
    }
}

/// Number of the chunk that has a byte of the drive, and where in it.
fn place(byte: u64) -> (u64, usize) {
    let chunk = CHUNK_BYTES as u64;
    (byte / chunk, (byte % chunk) as usize)
}

impl BlockDevice for MemoryDrive {
    fn info(&self) -> DeviceInfo {
        self.info
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        Io::ready(self.read_now(range))
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, _: Durability) -> Io<()> {
        Io::ready(self.write_now(start, &data))
    }

    fn write_zeroes(&self, range: LbaRange, _: bool, _: Durability) -> Io<()> {
        Io::ready(self.zero_now(range))
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        // All ranges are checked before any takes effect.
        let checked = ranges.iter().try_for_each(|range| self.info.check_range(*range));
        Io::ready(checked.and_then(|()| ranges.into_iter().try_for_each(|range| self.zero_now(range))))
    }

    fn flush(&self) -> Io<()> {
        Io::ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn range(start: u64, count: u64) -> LbaRange {
        LbaRange {
            start: Lba(start),
            count,
        }
    }

    #[tokio::test]
    async fn memory_keeps_the_contract() {
        for block_bytes in [512, 4096] {
            testing::conformance(async || {
                let drive: Device = MemoryDrive::new(block_bytes, (16 << 20) / u64::from(block_bytes));
                drive
            })
            .await;
        }
    }

    #[tokio::test]
    async fn a_read_is_lent_and_not_changed_by_later_writes() {
        let drive = MemoryDrive::new(4096, 64);
        let write = |byte: u8| {
            let data = vec![Bytes::from(vec![byte; 8 * 4096])];
            drive.write(Lba(8), data, Durability::Durable)
        };
        write(1).await.unwrap();
        let lent = drive.read(range(9, 4)).await.unwrap();
        let again = drive.read(range(9, 4)).await.unwrap();
        assert_eq!(lent.as_ptr(), again.as_ptr(), "the same memory, twice");
        let whole = |byte: u8| {
            let read = drive.read(range(8, 8));
            async move { read.await.unwrap().iter().all(|found| *found == byte) }
        };
        for byte in [2, 3] {
            write(byte).await.unwrap();
            assert!(lent.iter().all(|found| *found == 1));
            assert!(whole(byte).await);
            // One page alone is lent from where it lies now.
            let page = drive.read(range(10, 1)).await.unwrap();
            assert!(page.iter().all(|found| *found == byte));
        }
        let at = lent.as_ptr();
        drop((lent, again));
        write(4).await.unwrap();
        assert!(whole(4).await);
        let read = drive.read(range(9, 4)).await.unwrap();
        assert_eq!(read.as_ptr(), at, "back where it was");
    }

    #[tokio::test]
    async fn what_is_lent_more_often_than_can_be_counted_is_copied() {
        let drive = MemoryDrive::new(4096, 64);
        let write = |byte: u8| drive.write(Lba(0), vec![Bytes::from(vec![byte; 4096])], Durability::Durable);
        write(1).await.unwrap();
        let mut lent = Vec::new();
        for _ in 0..2 * usize::from(u8::MAX) {
            lent.push(drive.read(range(0, 1)).await.unwrap());
        }
        let place = lent[0].as_ptr();
        let in_place = lent.iter().filter(|page| page.as_ptr() == place).count();
        assert_eq!(in_place, usize::from(u8::MAX));
        write(2).await.unwrap();
        assert!(lent.iter().flatten().all(|&byte| byte == 1));
        drop(lent);
        write(3).await.unwrap();
        let page = drive.read(range(0, 1)).await.unwrap();
        assert!(page.as_ptr() == place && page.iter().all(|&byte| byte == 3));
    }

    #[tokio::test]
    async fn deallocated_pages_hold_nothing_and_read_as_zeroes_again() {
        let drive = MemoryDrive::new(4096, 1 << 40);
        let data = vec![Bytes::from(vec![7; 3 * 4096])];
        drive.write(Lba(1 << 39), data, Durability::Cached).await.unwrap();
        assert_eq!(drive.written_bytes(), 3 * 4096);
        drive.deallocate(vec![range(0, 1 << 40)]).await.unwrap();
        assert_eq!(drive.written_bytes(), 0);
        let read = drive.read(range(1 << 39, 3)).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 0));
    }

    #[tokio::test]
    async fn a_page_written_in_part_shows_nothing_of_its_former_life() {
        let drive = MemoryDrive::new(512, 1024);
        let data = |byte: u8, blocks: usize| vec![Bytes::from(vec![byte; blocks * 512])];
        drive.write(Lba(8), data(7, 8), Durability::Cached).await.unwrap();
        drive.deallocate(vec![range(8, 8)]).await.unwrap();
        drive
            .write(Lba(10), data(9, 2), Durability::Cached)
            .await
            .unwrap();
        let read = drive.read(range(8, 8)).await.unwrap();
        let expected: Vec<u8> = (0..8)
            .flat_map(|block| [if block / 2 == 1 { 9 } else { 0 }; 512])
            .collect();
        assert!(read == expected);
    }

    #[tokio::test]
    async fn an_operation_may_lie_across_two_pieces_of_memory() {
        let drive = MemoryDrive::new(4096, 1 << 20);
        let start = (CHUNK_BYTES / 4096) as u64 - 2;
        let bytes: Vec<u8> = (0..5 * 4096).map(|at| (at / 77) as u8).collect();
        drive
            .write(Lba(start), vec![Bytes::from(bytes.clone())], Durability::Cached)
            .await
            .unwrap();
        assert!(drive.read(range(start, 5)).await.unwrap() == bytes);
        drive.deallocate(vec![range(start + 1, 2)]).await.unwrap();
        let read = drive.read(range(start, 5)).await.unwrap();
        assert!(read[..4096] == bytes[..4096] && read[3 * 4096..] == bytes[3 * 4096..]);
        assert!(read[4096..3 * 4096].iter().all(|byte| *byte == 0));
    }
}
