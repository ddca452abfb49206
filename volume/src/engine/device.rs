//! The volume as a block device of 4 KiB blocks, without a volatile write cache.
//!
//! Every completed write is durable (invariant 1), so `flush` has nothing to do but to wait for the lease, and the
//! caller's [`Durability`] makes no difference.

use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use weft_block::{BlockDevice, BlockError, DeviceInfo, Durability, Io};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::Sequence;
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use super::block_read::BlockRead;
use super::flight::ZERO_BLOCK;
use super::work::{BlockWork, Op, Target, Work, ZeroWork};
use super::{Core, Engine};
use crate::error::VolumeError;
use crate::format::checksum::block_crc;
use crate::seams::{BandPurpose, Timestamp};
use crate::sync::started;

/// Longest read or write. A stripe header lists 128 blocks; longer commands are several stripes.
const TRANSFER_BYTES_MAX: u32 = 1 << 20;

impl BlockDevice for Engine {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            block_bytes: BLOCK_BYTES as u32,
            blocks: self.0.size_blocks(),
            transfer_bytes_max: TRANSFER_BYTES_MAX,
            volatile_write_cache: false,
            deallocated_reads_zero: true,
        }
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        let core = Rc::clone(&self.0);
        if let Err(error) = core.check(range) {
            return Io::ready(Err(error));
        }
        if range.count > u64::from(TRANSFER_BYTES_MAX) / BLOCK_BYTES as u64 {
            return Io::ready(Err(invalid(range.count.saturating_mul(BLOCK_BYTES as u64))));
        }
        if range.count == 0 {
            return Io::ready(Ok(Bytes::new()));
        }
        if !core.accepts() {
            return Io::ready(Err(BlockError::NotReady));
        }
        let arrived = core.seams.env.now();
        if range.count == 1
            && let Some(io) = BlockRead::start(&core, range.start, arrived)
        {
            return io;
        }
        started(async move {
            let result = core.read_range(range).await;
            core.answer(range, result, arrived).await
        })
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, _durability: Durability) -> Io<()> {
        let core = &self.0;
        let bytes: usize = data.iter().map(Bytes::len).sum();
        if !bytes.is_multiple_of(BLOCK_BYTES) || bytes > TRANSFER_BYTES_MAX as usize {
            return Io::ready(Err(invalid(bytes as u64)));
        }
        let range = LbaRange {
            start,
            count: (bytes / BLOCK_BYTES) as u64,
        };
        if let Err(error) = core.check(range) {
            return Io::ready(Err(error));
        }
        if range.count == 0 {
            return Io::ready(Ok(()));
        }
        if range.count == 1
            && let [block] = &data[..]
        {
            return core.submit(bytes as u64, [Part::of(start, block.clone())]);
        }
        let mut parts: Vec<Part> = Vec::with_capacity(range.count as usize);
        for (lba, block) in (start.0..).zip(blocks(data)) {
            match (Part::of(Lba(lba), block), parts.last_mut()) {
                (Part::Zeroes(_), Some(Part::Zeroes(range))) => range.count += 1,
                (part, _) => parts.push(part),
            }
        }
        core.submit(bytes as u64, parts)
    }

    fn write_zeroes(&self, range: LbaRange, _deallocate: bool, _durability: Durability) -> Io<()> {
        self.deallocate(vec![range])
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        let core = &self.0;
        let mut parts = Vec::with_capacity(ranges.len());
        for range in ranges {
            if let Err(error) = core.check(range) {
                return Io::ready(Err(error));
            }
            if range.count > 0 {
                parts.push(Part::Zeroes(range));
            }
        }
        core.submit(0, parts)
    }

    fn flush(&self) -> Io<()> {
        let core = Rc::clone(&self.0);
        Io::running(async move { core.leased().await.map_err(|error| error.to_block(Lba(0))) })
    }
}

/// What a host command breaks into.
enum Part {
    Block(Lba, Bytes),
    Zeroes(LbaRange),
}

impl Part {
    /// One block.
    fn of(lba: Lba, block: Bytes) -> Self {
        if block[..] == ZERO_BLOCK {
            Self::Zeroes(LbaRange { start: lba, count: 1 })
        } else {
            Self::Block(lba, block)
        }
    }
}

impl Core {
    fn check(&self, range: LbaRange) -> Result<(), BlockError> {
        let blocks = self.size_blocks();
        if range.is_within(blocks) {
            Ok(())
        } else {
            Err(BlockError::OutOfRange {
                start: range.start,
                count: range.count,
                blocks,
            })
        }
    }

    /// What the host is told of a read: nothing without a lease.
    pub(super) async fn answer(
        self: &Rc<Self>,
        range: LbaRange,
        result: Result<Bytes, VolumeError>,
        arrived: Timestamp,
    ) -> Result<Bytes, BlockError> {
        // An error is an answer too: without a lease, a successor may have reused what could not be read here.
        let result = self.leased().await.and(result);
        if result.is_ok() {
            self.count_read(range, arrived, self.seams.env.now());
        }
        result.map_err(|error| {
            tracing::debug!(volume = %self.volume, %error, "read not served");
            error.to_block(range.start)
        })
    }

    pub(super) fn count_read(&self, range: LbaRange, arrived: Timestamp, now: Timestamp) {
        let counters = &self.counters;
        counters.user_read_bytes.add(range.count * BLOCK_BYTES as u64);
        counters.read_seconds.record(seconds_between(arrived, now));
    }

    /// Queues the parts of one host command, `user_bytes` of which are data. Their sequences are given here, so overlapping writes take effect in
    /// the order of arrival.
    fn submit<P>(self: &Rc<Self>, user_bytes: u64, parts: P) -> Io<()>
    where
        P: IntoIterator<Item = Part, IntoIter: ExactSizeIterator>,
    {
        if !self.accepts() {
            return Io::ready(Err(BlockError::NotReady));
        }
        let arrived = self.seams.env.now();
        let parts = parts.into_iter();
        let op = Op::new(parts.len());
        for part in parts {
            let sequence = self.next_sequence();
            if planted(Bug::TrimInMemoryOnly)
                && let Part::Zeroes(range) = part
            {
                self.map().zero_range(range, sequence);
                op.part_done();
                continue;
            }
            if matches!(part, Part::Zeroes(_)) {
                self.checkpoints.zeroes_pending.borrow_mut().insert(sequence);
            }
            self.enqueue(BandPurpose::User, self.work(part, sequence, &op));
        }
        let core = Rc::clone(self);
        Io::running(async move {
            op.answer().await?;
            let mut now = core.seams.env.now();
            if !core.accepts() || !core.is_leased_at(now) {
                core.leased().await.map_err(|error| error.to_block(Lba(0)))?;
                now = core.seams.env.now();
            }
            let counters = &core.counters;
            counters.user_bytes.add(user_bytes);
            let seconds = if user_bytes > 0 {
                &counters.write_seconds
            } else {
                &counters.zero_seconds
            };
            seconds.record(seconds_between(arrived, now));
            Ok(())
        })
    }

    fn work(&self, part: Part, sequence: Sequence, op: &Rc<Op>) -> Work {
        match part {
            Part::Block(lba, data) => Work::Block(BlockWork {
                lba,
                sequence,
                crc: block_crc(self.volume, lba, sequence, &data),
                data,
                target: Target::Host(Rc::clone(op)),
                was_in: Vec::new(),
            }),
            Part::Zeroes(range) => Work::Zeroes(ZeroWork {
                range,
                sequence,
                op: Rc::clone(op),
                was_in: Vec::new(),
            }),
        }
    }
}

fn seconds_between(start: Timestamp, end: Timestamp) -> f64 {
    Duration::from_nanos(end.0.saturating_sub(start.0)).as_secs_f64()
}

/// Cuts scattered bytes into blocks; only a block that is itself scattered is copied.
fn blocks(data: Vec<Bytes>) -> impl Iterator<Item = Bytes> {
    let mut rest = data.into_iter().filter(|piece| !piece.is_empty());
    let mut current = Bytes::new();
    std::iter::from_fn(move || {
        if current.is_empty() {
            current = rest.next()?;
        }
        if current.len() >= BLOCK_BYTES {
            return Some(current.split_to(BLOCK_BYTES));
        }
        let mut block = BytesMut::with_capacity(BLOCK_BYTES);
        loop {
            let missing = BLOCK_BYTES - block.len();
            block.extend_from_slice(&current.split_to(missing.min(current.len())));
            if block.len() == BLOCK_BYTES {
                return Some(block.freeze());
            }
            current = rest.next()?;
        }
    })
}

fn invalid(bytes: u64) -> BlockError {
    BlockError::InvalidLength {
        bytes,
        block_bytes: BLOCK_BYTES as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_bytes_become_whole_blocks() {
        let bytes: Vec<u8> = (0..3 * BLOCK_BYTES).map(|at| (at / 100) as u8).collect();
        let whole = Bytes::from(bytes.clone());
        let data = vec![
            whole.slice(..10),
            Bytes::new(),
            whole.slice(10..5000),
            whole.slice(5000..),
        ];
        let cut: Vec<Bytes> = blocks(data).collect();
        assert_eq!(cut.len(), 3);
        assert_eq!(cut.concat(), bytes);
    }
}
