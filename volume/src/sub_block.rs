//! 512-byte logical blocks on a device of 4 KiB blocks: some firmware boots from nothing else.
//!
//! A write that covers part of a block reads it, merges, and writes it whole. Order per block: of two writes that
//! touch the same block, at least one of them in part, the later one starts when the earlier one has been answered; so
//! a merge never brings back bytes that another write has replaced. Writes of whole blocks do not wait for
//! each other, and reads wait for nobody.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use weft_block::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};
use weft_proto::units::{Lba, LbaRange};

use crate::seams::Env;
use crate::sync::{Notify, detached};

/// Bytes of a presented block.
pub const SUB_BLOCK_BYTES: u32 = 512;

/// The decorator. Cheap to clone.
#[derive(Clone)]
pub struct SubBlock(Rc<Inner>);

struct Inner {
    device: Device,
    env: Rc<dyn Env>,
    /// Presented blocks in one of the device's.
    ratio: u64,
    /// Changes under way or waiting, in order of arrival.
    claims: RefCell<Vec<Claim>>,
    next: Cell<u64>,
    released: Rc<Notify>,
}

/// The device blocks that one change touches.
#[derive(Clone, Copy)]
struct Claim {
    id: u64,
    first: u64,
    /// One past the last.
    end: u64,
    /// It reads and merges.
    merges: bool,
}

/// What a change writes.
enum Change {
    Data(Vec<Bytes>),
    Zeroes { deallocate: bool },
}

impl SubBlock {
    /// Presents `device` in blocks of [`SUB_BLOCK_BYTES`]. `env` runs the merges.
    #[must_use]
    pub fn new(device: Device, env: Rc<dyn Env>) -> Self {
        let ratio = u64::from(device.info().block_bytes / SUB_BLOCK_BYTES).max(1);
        Self(Rc::new(Inner {
            device,
            env,
            ratio,
            claims: RefCell::default(),
            next: Cell::new(0),
            released: Rc::default(),
        }))
    }

    fn check(&self, range: LbaRange) -> Result<(), BlockError> {
        let blocks = self.info().blocks;
        if range.is_within(blocks) {
            return Ok(());
        }
        Err(BlockError::OutOfRange {
            start: range.start,
            count: range.count,
            blocks,
        })
    }

    fn change(&self, range: LbaRange, change: Change, durability: Durability) -> Io<()> {
        if let Err(error) = self.check(range) {
            return Io::ready(Err(error));
        }
        if range.count == 0 {
            return Io::ready(Ok(()));
        }
        let inner = Rc::clone(&self.0);
        let claim = inner.claim(range);
        if !claim.merges && inner.is_first(claim) {
            // Nothing to wait for: the device's own write is the answer.
            let io = inner.write_whole(inner.cover(range), change, durability);
            let guard = Release(Rc::clone(&inner), claim.id);
            return inner.detached(async move {
                let _guard = guard;
                io.await
            });
        }
        let task = Rc::clone(&inner);
        inner.detached(async move {
            let _guard = Release(Rc::clone(&task), claim.id);
            task.wait_turn(claim).await;
            if claim.merges {
                task.merge(range, change, durability).await
            } else {
                task.write_whole(task.cover(range), change, durability).await
            }
        })
    }
}

/// Gives a claim back, however its change ended.
struct Release(Rc<Inner>, u64);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.claims.borrow_mut().retain(|claim| claim.id != self.1);
        self.0.released.notify();
    }
}

impl Inner {
    /// Runs `work` whatever becomes of the answer's future.
    fn detached(&self, work: impl Future<Output = Result<(), BlockError>> + 'static) -> Io<()> {
        detached(&*self.env, work)
    }

    /// The device blocks that `range` touches.
    fn cover(&self, range: LbaRange) -> LbaRange {
        let first = range.start.0 / self.ratio;
        let end = (range.start.0 + range.count).div_ceil(self.ratio);
        LbaRange {
            start: Lba(first),
            count: end - first,
        }
    }

    fn claim(&self, range: LbaRange) -> Claim {
        let cover = self.cover(range);
        let whole = range.start.0.is_multiple_of(self.ratio) && range.count.is_multiple_of(self.ratio);
        let id = self.next.get();
        self.next.set(id + 1);
        let claim = Claim {
            id,
            first: cover.start.0,
            end: cover.start.0 + cover.count,
            merges: !whole,
        };
        self.claims.borrow_mut().push(claim);
        claim
    }

    /// Whether no earlier change stands in the way.
    fn is_first(&self, claim: Claim) -> bool {
        !self.claims.borrow().iter().any(|earlier| {
            earlier.id < claim.id
                && earlier.first < claim.end
                && claim.first < earlier.end
                && (earlier.merges || claim.merges)
        })
    }

    async fn wait_turn(&self, claim: Claim) {
        loop {
            let released = self.released.changed();
            if self.is_first(claim) {
                return;
            }
            released.await;
        }
    }

    fn write_whole(&self, cover: LbaRange, change: Change, durability: Durability) -> Io<()> {
        match change {
            Change::Data(data) => self.device.write(cover.start, data, durability),
            Change::Zeroes { deallocate } => self.device.write_zeroes(cover, deallocate, durability),
        }
    }

    /// Reads the blocks at the ends, and writes all of them whole. Zeroes in the middle stay records.
    async fn merge(&self, range: LbaRange, change: Change, durability: Durability) -> Result<(), BlockError> {
        let cover = self.cover(range);
        match change {
            Change::Data(data) => {
                let mut bytes = BytesMut::from(&self.device.read(cover).await?[..]);
                let sub = SUB_BLOCK_BYTES as usize;
                let mut at = (range.start.0 - cover.start.0 * self.ratio) as usize * sub;
                for piece in data {
                    bytes[at..at + piece.len()].copy_from_slice(&piece);
                    at += piece.len();
                }
                self.device
                    .write(cover.start, vec![bytes.freeze()], durability)
                    .await
            }
            Change::Zeroes { deallocate } => {
                let end = range.start.0 + range.count;
                let whole_first = range.start.0.div_ceil(self.ratio);
                let whole_end = (end / self.ratio).max(whole_first);
                let middle = LbaRange {
                    start: Lba(whole_first),
                    count: whole_end - whole_first,
                };
                if middle.count > 0 {
                    self.device.write_zeroes(middle, deallocate, durability).await?;
                }
                // What is left of the first and of the last block; one block when both are the same.
                let head_end = (whole_first * self.ratio).min(end);
                self.zero_part(range.start.0, head_end, durability).await?;
                let tail = (whole_end * self.ratio).max(head_end);
                self.zero_part(tail, end, durability).await
            }
        }
    }

    /// Zeroes presented blocks `start … end` of one device block.
    async fn zero_part(&self, start: u64, end: u64, durability: Durability) -> Result<(), BlockError> {
        if start >= end {
            return Ok(());
        }
        let cover = self.cover(LbaRange {
            start: Lba(start),
            count: end - start,
        });
        let mut bytes = BytesMut::from(&self.device.read(cover).await?[..]);
        let sub = SUB_BLOCK_BYTES as usize;
        let first = cover.start.0 * self.ratio;
        bytes[(start - first) as usize * sub..(end - first) as usize * sub].fill(0);
        self.device
            .write(cover.start, vec![bytes.freeze()], durability)
            .await
    }
}

impl BlockDevice for SubBlock {
    fn info(&self) -> DeviceInfo {
        let info = self.0.device.info();
        DeviceInfo {
            block_bytes: SUB_BLOCK_BYTES,
            blocks: info.blocks * self.0.ratio,
            // A range that is not aligned covers one block more than its length.
            transfer_bytes_max: info.transfer_bytes_max - info.block_bytes.min(info.transfer_bytes_max / 2),
            ..info
        }
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        if let Err(error) = self.check(range) {
            return Io::ready(Err(error));
        }
        let bytes = range.count.saturating_mul(u64::from(SUB_BLOCK_BYTES));
        if bytes > u64::from(self.info().transfer_bytes_max) {
            return Io::ready(Err(BlockError::InvalidLength {
                bytes,
                block_bytes: SUB_BLOCK_BYTES,
            }));
        }
        if range.count == 0 {
            return Io::ready(Ok(Bytes::new()));
        }
        let cover = self.0.cover(range);
        let skip = (range.start.0 - cover.start.0 * self.0.ratio) as usize * SUB_BLOCK_BYTES as usize;
        let io = self.0.device.read(cover);
        Io::running(async move {
            let whole = io.await?;
            Ok(whole.slice(skip..skip + bytes as usize))
        })
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        let bytes: u64 = data.iter().map(|piece| piece.len() as u64).sum();
        if !bytes.is_multiple_of(u64::from(SUB_BLOCK_BYTES))
            || bytes > u64::from(self.info().transfer_bytes_max)
        {
            return Io::ready(Err(BlockError::InvalidLength {
                bytes,
                block_bytes: SUB_BLOCK_BYTES,
            }));
        }
        let range = LbaRange {
            start,
            count: bytes / u64::from(SUB_BLOCK_BYTES),
        };
        self.change(range, Change::Data(data), durability)
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.change(range, Change::Zeroes { deallocate }, durability)
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        for range in &ranges {
            if let Err(error) = self.check(*range) {
                return Io::ready(Err(error));
            }
        }
        let changes: Vec<Io<()>> = ranges
            .into_iter()
            .map(|range| self.change(range, Change::Zeroes { deallocate: true }, Durability::Cached))
            .collect();
        Io::running(async move {
            for change in changes {
                change.await?;
            }
            Ok(())
        })
    }

    fn flush(&self) -> Io<()> {
        self.0.device.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;
    use weft_block::memory::MemoryDrive;

    fn fill(byte: u8, blocks: usize) -> Vec<Bytes> {
        vec![Bytes::from(vec![byte; blocks * 512])]
    }

    #[test]
    fn any_order_of_parts_of_a_block_keeps_every_part() {
        let world = World::new(3);
        let incarnation = world.incarnation();
        let device: Device = MemoryDrive::new(4096, 64);
        let sub = SubBlock::new(device, world.env(incarnation));
        let writer = sub.clone();
        let writes = async move {
            let mut all = Vec::new();
            // Parts of block 0, then a whole write over blocks 0 and 1, then parts again.
            for part in 0..8 {
                all.push(writer.write(Lba(part), fill(part as u8 + 1, 1), Durability::Cached));
            }
            all.push(writer.write(Lba(0), fill(100, 16), Durability::Cached));
            all.push(writer.write(Lba(3), fill(9, 7), Durability::Cached));
            all.push(writer.write_zeroes(
                LbaRange {
                    start: Lba(1),
                    count: 13,
                },
                false,
                Durability::Cached,
            ));
            all.push(writer.write(Lba(15), fill(7, 2), Durability::Cached));
            futures_util::future::join_all(all).await
        };
        let results = world.block_on(incarnation, writes).unwrap();
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        let read = sub.read(LbaRange {
            start: Lba(0),
            count: 20,
        });
        let bytes = world.block_on(incarnation, read).unwrap().unwrap();
        let expected = [100, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 100, 7, 7, 0, 0, 0];
        let found: Vec<u8> = bytes.chunks(512).map(|block| block[0]).collect();
        assert_eq!(found, expected);
        assert!(sub.0.claims.borrow().is_empty());
    }

    #[test]
    fn it_is_a_block_device_like_any_other() {
        let world = World::new(3);
        let incarnation = world.incarnation();
        let env = world.env(incarnation);
        let cases = async move {
            weft_block::testing::conformance(async || {
                let device: Device = MemoryDrive::new(4096, 4096);
                Rc::new(SubBlock::new(
                    device,
                    Rc::<crate::testing::world::SimEnv>::clone(&env),
                )) as Device
            })
            .await;
        };
        world.block_on(incarnation, cases).unwrap();
    }
}
