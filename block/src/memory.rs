//! A drive in memory, for tests and for whoever needs a device without a medium.
//!
//! It keeps the contract to the letter, is sparse (what was never written takes no memory and reads as
//! zeroes), and lends: a read is answered with the very memory a write left, as long as the range was
//! written by one write. Writes are copied in, so that no receive buffer is kept alive by a drive.
//!
//! It does not survive its process; every completed write is as durable as any other, so it reports no
//! volatile write cache.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use crate::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};

/// Longest transfer, as of a file drive.
const TRANSFER_BYTES_MAX: u32 = 1 << 20;

/// Pages that share one allocation at most. Bounds what a single page that is left of an old write can keep
/// alive.
const EXTENT_PAGES_MAX: usize = 32;

const PAGE: u64 = BLOCK_BYTES as u64;

static ZERO_PAGE: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// See the module.
pub struct MemoryDrive {
    info: DeviceInfo,
    pages: RefCell<BTreeMap<u64, Page>>,
}

/// A page of [`BLOCK_BYTES`] within the allocation that its write made.
#[derive(Clone)]
struct Page {
    extent: Bytes,
    /// In bytes from the start of `extent`.
    offset: usize,
}

impl Page {
    fn bytes(&self) -> &[u8] {
        &self.extent[self.offset..self.offset + BLOCK_BYTES]
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
            pages: RefCell::default(),
        })
    }

    /// The same as a [`Device`], with 4096-byte blocks.
    #[must_use]
    pub fn device(bytes: u64) -> Device {
        Self::new(4096, bytes / PAGE)
    }

    /// Bytes that take memory, counted in pages.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.pages.borrow().len() as u64 * PAGE
    }

    fn read_now(&self, range: LbaRange) -> Result<Bytes, BlockError> {
        let len = self.info.check_read(range)?;
        let from = range.start.0 * u64::from(self.info.block_bytes);
        Ok(self.lend(from, len).unwrap_or_else(|| self.copy(from, len)))
    }

    /// The range as one slice of one allocation, if it lies in one.
    fn lend(&self, from: u64, len: usize) -> Option<Bytes> {
        let pages = self.pages.borrow();
        let within = (from % PAGE) as usize;
        let Some(first) = pages.get(&(from / PAGE)) else {
            let fits = within + len <= BLOCK_BYTES;
            return fits.then(|| Bytes::from_static(&ZERO_PAGE[..len]));
        };
        let page_count = (within + len).div_ceil(BLOCK_BYTES);
        for (index, number) in (from / PAGE..).take(page_count).enumerate().skip(1) {
            let page = pages.get(&number)?;
            let adjacent = page.extent.as_ptr() == first.extent.as_ptr()
                && page.offset == first.offset + index * BLOCK_BYTES;
            if !adjacent {
                return None;
            }
        }
        let start = first.offset + within;
        Some(first.extent.slice(start..start + len))
    }

    fn copy(&self, from: u64, len: usize) -> Bytes {
        let pages = self.pages.borrow();
        let mut out = BytesMut::zeroed(len);
        let mut done = 0;
        while done < len {
            let at = from + done as u64;
            let within = (at % PAGE) as usize;
            let part = (BLOCK_BYTES - within).min(len - done);
            if let Some(page) = pages.get(&(at / PAGE)) {
                out[done..done + part].copy_from_slice(&page.bytes()[within..within + part]);
            }
            done += part;
        }
        out.freeze()
    }

    fn write_now(&self, start: Lba, data: Vec<Bytes>) -> Result<(), BlockError> {
        let range = self.info.check_write(start, &data)?;
        let block_bytes = u64::from(self.info.block_bytes);
        let (mut at, end) = (start.0 * block_bytes, (start.0 + range.count) * block_bytes);
        let mut source = Segments(data.into_iter().collect());
        while at < end {
            let within = (at % PAGE) as usize;
            let left = (end - at) as usize;
            let whole_pages = (left / BLOCK_BYTES).min(EXTENT_PAGES_MAX);
            if within == 0 && whole_pages > 0 {
                let mut extent = BytesMut::zeroed(whole_pages * BLOCK_BYTES);
                source.fill(&mut extent);
                self.put(at / PAGE, extent.freeze());
                at += (whole_pages * BLOCK_BYTES) as u64;
            } else {
                // Part of a page, which only 512-byte blocks can ask for. Copied rather than changed in
                // place: the page may be lent.
                let mut page = BytesMut::zeroed(BLOCK_BYTES);
                if let Some(old) = self.pages.borrow().get(&(at / PAGE)) {
                    page.copy_from_slice(old.bytes());
                }
                let part = (BLOCK_BYTES - within).min(left);
                source.fill(&mut page[within..within + part]);
                self.put(at / PAGE, page.freeze());
                at += part as u64;
            }
        }
        Ok(())
    }

    fn put(&self, first: u64, extent: Bytes) {
        let mut pages = self.pages.borrow_mut();
        for (number, offset) in (first..).zip((0..extent.len()).step_by(BLOCK_BYTES)) {
            let extent = extent.clone();
            pages.insert(number, Page { extent, offset });
        }
    }

    fn zero_now(&self, range: LbaRange) -> Result<(), BlockError> {
        self.info.check_range(range)?;
        let block_bytes = u64::from(self.info.block_bytes);
        let (from, end) = (
            range.start.0 * block_bytes,
            (range.start.0 + range.count) * block_bytes,
        );
        let mut pages = self.pages.borrow_mut();
        // Only pages that exist are visited: the range may be as long as the drive.
        let touched: Vec<u64> = pages
            .range(from / PAGE..end.div_ceil(PAGE))
            .map(|(number, _)| *number)
            .collect();
        for number in touched {
            let page_at = number * PAGE;
            let zero_from = from.max(page_at) - page_at;
            let zero_to = end.min(page_at + PAGE) - page_at;
            if zero_from == 0 && zero_to == PAGE {
                pages.remove(&number);
            } else if let Some(page) = pages.get_mut(&number) {
                let mut bytes = BytesMut::from(page.bytes());
                bytes[zero_from as usize..zero_to as usize].fill(0);
                *page = Page {
                    extent: bytes.freeze(),
                    offset: 0,
                };
            }
        }
        Ok(())
    }
}

/// Scattered bytes, taken from the front.
struct Segments(std::collections::VecDeque<Bytes>);

impl Segments {
    /// Fills `out`; the caller has checked that there is as much.
    fn fill(&mut self, mut out: &mut [u8]) {
        while !out.is_empty() {
            let segment = self.0.front_mut().expect("the length was checked");
            let part = segment.len().min(out.len());
            let (head, tail) = out.split_at_mut(part);
            head.copy_from_slice(&segment.split_to(part));
            out = tail;
            if segment.is_empty() {
                self.0.pop_front();
            }
        }
    }
}

impl BlockDevice for MemoryDrive {
    fn info(&self) -> DeviceInfo {
        self.info
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        ready(self.read_now(range))
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, _: Durability) -> Io<()> {
        ready(self.write_now(start, data))
    }

    fn write_zeroes(&self, range: LbaRange, _: bool, _: Durability) -> Io<()> {
        ready(self.zero_now(range))
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        // All ranges are checked before any takes effect.
        let checked = ranges.iter().try_for_each(|range| self.info.check_range(*range));
        ready(checked.and_then(|()| ranges.into_iter().try_for_each(|range| self.zero_now(range))))
    }

    fn flush(&self) -> Io<()> {
        ready(Ok(()))
    }
}

fn ready<T: 'static>(result: Result<T, BlockError>) -> Io<T> {
    std::future::ready(result).boxed_local()
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
    async fn a_read_is_lent_and_not_changed_by_a_later_write() {
        let drive = MemoryDrive::new(4096, 64);
        let write = |byte: u8| {
            let data = vec![Bytes::from(vec![byte; 8 * 4096])];
            drive.write(Lba(8), data, Durability::Durable)
        };
        write(1).await.unwrap();
        let lent = drive.read(range(9, 4)).await.unwrap();
        let again = drive.read(range(9, 4)).await.unwrap();
        assert_eq!(lent.as_ptr(), again.as_ptr(), "the same memory, twice");
        write(2).await.unwrap();
        assert!(lent.iter().all(|byte| *byte == 1));
    }

    #[tokio::test]
    async fn deallocated_pages_take_no_memory() {
        let drive = MemoryDrive::new(4096, 1 << 40);
        let data = vec![Bytes::from(vec![7; 3 * 4096])];
        drive.write(Lba(1 << 39), data, Durability::Cached).await.unwrap();
        assert_eq!(drive.allocated_bytes(), 3 * 4096);
        drive.deallocate(vec![range(0, 1 << 40)]).await.unwrap();
        assert_eq!(drive.allocated_bytes(), 0);
    }
}
