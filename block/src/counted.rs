//! A decorator that counts what passes: operations and bytes by kind.
//!
//! This is the measure of write amplification: what a layer was asked above against what it asked of its
//! drives below. It counts what was asked, whatever the outcome.

use std::cell::Cell;
use std::ops::Sub;
use std::rc::Rc;

use bytes::Bytes;
use weft_proto::units::{Lba, LbaRange};

use crate::{BlockDevice, Device, DeviceInfo, Durability, Io};

/// What passed since the decorator was made. Subtract an earlier reading to have an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes of data, durable or not.
    pub writes: u64,
    /// Bytes of data written.
    pub write_bytes: u64,
    /// Writes of data that had to be durable.
    pub durable_writes: u64,
    /// Write Zeroes operations.
    pub zeroes: u64,
    /// Bytes zeroed.
    pub zero_bytes: u64,
    /// Deallocate operations; each may carry several ranges.
    pub deallocations: u64,
    /// Bytes deallocated.
    pub deallocated_bytes: u64,
    /// Flushes.
    pub flushes: u64,
}

impl Sub for Counts {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            reads: self.reads - earlier.reads,
            read_bytes: self.read_bytes - earlier.read_bytes,
            writes: self.writes - earlier.writes,
            write_bytes: self.write_bytes - earlier.write_bytes,
            durable_writes: self.durable_writes - earlier.durable_writes,
            zeroes: self.zeroes - earlier.zeroes,
            zero_bytes: self.zero_bytes - earlier.zero_bytes,
            deallocations: self.deallocations - earlier.deallocations,
            deallocated_bytes: self.deallocated_bytes - earlier.deallocated_bytes,
            flushes: self.flushes - earlier.flushes,
        }
    }
}

/// See the module.
pub struct Counted {
    device: Device,
    counts: Cell<Counts>,
}

impl Counted {
    /// Counts what goes to `device`.
    #[must_use]
    pub fn new(device: Device) -> Rc<Self> {
        Rc::new(Self {
            device,
            counts: Cell::default(),
        })
    }

    /// What has passed so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts.get()
    }

    fn count(&self, add: impl FnOnce(&mut Counts)) {
        let mut counts = self.counts.get();
        add(&mut counts);
        self.counts.set(counts);
    }

    /// Saturating: ranges are not checked yet.
    fn bytes(&self, range: LbaRange) -> u64 {
        range
            .count
            .saturating_mul(u64::from(self.device.info().block_bytes))
    }
}

impl BlockDevice for Counted {
    fn info(&self) -> DeviceInfo {
        self.device.info()
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.count(|counts| {
            counts.reads += 1;
            counts.read_bytes = counts.read_bytes.saturating_add(self.bytes(range));
        });
        self.device.read(range)
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        self.count(|counts| {
            counts.writes += 1;
            counts.write_bytes += data.iter().map(|segment| segment.len() as u64).sum::<u64>();
            counts.durable_writes += u64::from(durability == Durability::Durable);
        });
        self.device.write(start, data, durability)
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.count(|counts| {
            counts.zeroes += 1;
            counts.zero_bytes = counts.zero_bytes.saturating_add(self.bytes(range));
        });
        self.device.write_zeroes(range, deallocate, durability)
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.count(|counts| {
            counts.deallocations += 1;
            for range in &ranges {
                counts.deallocated_bytes = counts.deallocated_bytes.saturating_add(self.bytes(*range));
            }
        });
        self.device.deallocate(ranges)
    }

    fn flush(&self) -> Io<()> {
        self.count(|counts| counts.flushes += 1);
        self.device.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryDrive;
    use crate::testing;

    #[tokio::test]
    async fn counting_keeps_the_contract() {
        testing::conformance(async || {
            let counted: Device = Counted::new(MemoryDrive::device(16 << 20));
            counted
        })
        .await;
    }

    #[tokio::test]
    async fn everything_that_passes_is_counted() {
        let drive = Counted::new(MemoryDrive::device(16 << 20));
        let range = |start, count| LbaRange {
            start: Lba(start),
            count,
        };
        let data = || vec![Bytes::from(vec![1; 4096]), Bytes::from(vec![2; 4096])];
        drive.write(Lba(0), data(), Durability::Durable).await.unwrap();
        let before = drive.counts();
        drive.write(Lba(4), data(), Durability::Cached).await.unwrap();
        drive.read(range(0, 3)).await.unwrap();
        drive
            .write_zeroes(range(0, 5), true, Durability::Cached)
            .await
            .unwrap();
        drive.deallocate(vec![range(0, 1), range(2, 2)]).await.unwrap();
        drive.flush().await.unwrap();
        let expected = Counts {
            reads: 1,
            read_bytes: 3 * 4096,
            writes: 1,
            write_bytes: 2 * 4096,
            durable_writes: 0,
            zeroes: 1,
            zero_bytes: 5 * 4096,
            deallocations: 1,
            deallocated_bytes: 3 * 4096,
            flushes: 1,
        };
        assert_eq!(drive.counts() - before, expected);
    }
}
