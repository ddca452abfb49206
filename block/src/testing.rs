//! What every device must do, as cases any of them can be run through.
//!
//! [`conformance`] makes a fresh device for each case. A device must be at least [`DEVICE_BYTES_MIN`] long and may
//! hold anything at first. A case that does not hold panics, naming itself: this module is for tests.
//!
//! What cannot be seen without pulling the plug (durability) is not tested here; see the drive's own tests
//! and the simulator.

use std::pin::Pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use weft_proto::units::{Lba, LbaRange};

use crate::{BlockError, Device, Durability};

/// The smallest device the cases fit on.
pub const DEVICE_BYTES_MIN: u64 = 8 << 20;

/// What no device takes to begin a write, however slow the machine.
const STARTED_WITHIN: Duration = Duration::from_secs(60);

/// Runs every case on a device of its own.
///
/// # Panics
/// If the device does not keep the contract.
pub async fn conformance(make: impl AsyncFn() -> Device) {
    for (name, case) in CASES {
        tracing::debug!(case = name, "conformance");
        let device = make().await;
        assert!(
            device.info().bytes() >= DEVICE_BYTES_MIN,
            "the device is too small for these cases"
        );
        let case = case(Blocks::new(device));
        CurrentCase::run(name, case).await;
    }
}

type Case = fn(Blocks) -> Pin<Box<dyn Future<Output = ()>>>;

const CASES: &[(&str, Case)] = &[
    ("info_is_sane", |d| Box::pin(info_is_sane(d))),
    ("a_range_past_the_end_is_refused", |d| {
        Box::pin(a_range_past_the_end_is_refused(d))
    }),
    ("a_length_that_is_not_whole_blocks_is_refused", |d| {
        Box::pin(a_length_that_is_not_whole_blocks_is_refused(d))
    }),
    ("nothing_at_all_is_a_legal_range", |d| {
        Box::pin(nothing_at_all_is_a_legal_range(d))
    }),
    ("a_refused_write_changes_nothing", |d| {
        Box::pin(a_refused_write_changes_nothing(d))
    }),
    ("what_was_written_is_read", |d| {
        Box::pin(what_was_written_is_read(d))
    }),
    ("the_first_and_the_last_block_hold_data", |d| {
        Box::pin(the_first_and_the_last_block_hold_data(d))
    }),
    ("data_may_be_cut_anywhere", |d| {
        Box::pin(data_may_be_cut_anywhere(d))
    }),
    ("the_largest_transfer_works", |d| {
        Box::pin(the_largest_transfer_works(d))
    }),
    ("many_small_segments_are_one_write", |d| {
        Box::pin(many_small_segments_are_one_write(d))
    }),
    ("zeroed_blocks_read_as_zeroes", |d| {
        Box::pin(zeroed_blocks_read_as_zeroes(d))
    }),
    ("deallocated_blocks_read_as_promised", |d| {
        Box::pin(deallocated_blocks_read_as_promised(d))
    }),
    ("deallocation_checks_every_range_first", |d| {
        Box::pin(deallocation_checks_every_range_first(d))
    }),
    ("a_future_starts_when_it_is_made", |d| {
        Box::pin(a_future_starts_when_it_is_made(d))
    }),
    ("a_dropped_read_harms_nothing", |d| {
        Box::pin(a_dropped_read_harms_nothing(d))
    }),
    ("disjoint_operations_in_flight_do_not_mix", |d| {
        Box::pin(disjoint_operations_in_flight_do_not_mix(d))
    }),
    ("a_random_history_matches_an_array", |d| {
        Box::pin(a_random_history_matches_an_array(d))
    }),
];

/// Says which case was running when one panics.
struct CurrentCase(&'static str);

impl CurrentCase {
    async fn run(name: &'static str, case: Pin<Box<dyn Future<Output = ()>>>) {
        let current = Self(name);
        case.await;
        std::mem::forget(current);
    }
}

impl Drop for CurrentCase {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("conformance case: {}", self.0);
        }
    }
}

/// A device with shorthands in whole blocks.
struct Blocks {
    device: Device,
    block_bytes: usize,
    /// Longest transfer, in blocks.
    transfer_max: u64,
    blocks: u64,
}

impl Blocks {
    fn new(device: Device) -> Self {
        let info = device.info();
        Self {
            block_bytes: info.block_bytes as usize,
            transfer_max: u64::from(info.transfer_bytes_max / info.block_bytes),
            blocks: info.blocks,
            device,
        }
    }

    async fn read(&self, start: u64, count: u64) -> Bytes {
        let data = self.device.read(range(start, count)).await.expect("read");
        assert_eq!(data.len() as u64, count * self.block_bytes as u64, "read length");
        data
    }

    async fn write(&self, start: u64, data: &[u8]) {
        let data = vec![Bytes::copy_from_slice(data)];
        let written = self.device.write(Lba(start), data, Durability::Cached);
        written.await.expect("write");
    }

    /// Bytes that differ from block to block, and by `seed`.
    fn pattern(&self, count: u64, seed: u64) -> Vec<u8> {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut data = vec![0; count as usize * self.block_bytes];
        for chunk in data.chunks_mut(8) {
            chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
        }
        data
    }
}

fn range(start: u64, count: u64) -> LbaRange {
    LbaRange {
        start: Lba(start),
        count,
    }
}

/// xorshift64*: enough to cut and choose, the same for a seed for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

async fn info_is_sane(d: Blocks) {
    let info = d.device.info();
    assert!(matches!(info.block_bytes, 512 | 4096), "block size");
    assert_eq!(info.transfer_bytes_max % info.block_bytes, 0, "whole blocks");
    assert!(info.transfer_bytes_max >= 4096, "a fabric block fits");
}

async fn a_range_past_the_end_is_refused(d: Blocks) {
    for bad in [
        range(d.blocks, 1),
        range(d.blocks - 1, 2),
        range(u64::MAX, 1),
        range(u64::MAX, u64::MAX),
        range(d.blocks + 1, 0),
    ] {
        let expected = Err(BlockError::OutOfRange {
            start: bad.start,
            count: bad.count,
            blocks: d.blocks,
        });
        assert_eq!(d.device.read(bad).await.map(drop), expected, "read");
        let zeroes = d.device.write_zeroes(bad, true, Durability::Cached).await;
        assert_eq!(zeroes, expected, "write zeroes");
        assert_eq!(d.device.deallocate(vec![bad]).await, expected, "deallocate");
        if bad.count < 16 {
            let data = vec![Bytes::from(vec![1; bad.count as usize * d.block_bytes])];
            let written = d.device.write(bad.start, data, Durability::Cached).await;
            assert_eq!(written, expected, "write");
        }
    }
}

async fn a_length_that_is_not_whole_blocks_is_refused(d: Blocks) {
    let limit = d.device.info().transfer_bytes_max as usize;
    for len in [1, d.block_bytes - 1, d.block_bytes + 1, limit + d.block_bytes] {
        let data = vec![Bytes::from(vec![1; len])];
        let error = d.device.write(Lba(0), data, Durability::Cached).await;
        let expected = BlockError::InvalidLength {
            bytes: len as u64,
            block_bytes: d.device.info().block_bytes,
        };
        assert_eq!(error, Err(expected), "{len} bytes");
    }
    if d.blocks > d.transfer_max {
        let error = d.device.read(range(0, d.transfer_max + 1)).await;
        assert!(
            matches!(error, Err(BlockError::InvalidLength { .. })),
            "long read: {error:?}"
        );
    }
}

async fn nothing_at_all_is_a_legal_range(d: Blocks) {
    for start in [0, 5, d.blocks] {
        assert!(d.read(start, 0).await.is_empty());
        for data in [vec![], vec![Bytes::new()], vec![Bytes::new(), Bytes::new()]] {
            let written = d.device.write(Lba(start), data, Durability::Durable).await;
            assert_eq!(written, Ok(()));
        }
        let zeroed = d.device.write_zeroes(range(start, 0), true, Durability::Durable);
        assert_eq!(zeroed.await, Ok(()));
        assert_eq!(d.device.deallocate(vec![range(start, 0)]).await, Ok(()));
    }
    assert_eq!(d.device.deallocate(vec![]).await, Ok(()));
}

async fn a_refused_write_changes_nothing(d: Blocks) {
    let old = d.pattern(2, 1);
    d.write(d.blocks - 2, &old).await;
    let data = vec![Bytes::from(d.pattern(3, 2))];
    let refused = d.device.write(Lba(d.blocks - 2), data, Durability::Durable).await;
    assert!(refused.is_err());
    assert_eq!(d.read(d.blocks - 2, 2).await, old);
}

async fn what_was_written_is_read(d: Blocks) {
    for durability in [Durability::Cached, Durability::Durable] {
        for (start, count) in [(0, 1), (3, 2), (17, 8)] {
            let data = d.pattern(count, start + 100);
            let written = d
                .device
                .write(Lba(start), vec![Bytes::from(data.clone())], durability);
            assert_eq!(written.await, Ok(()));
            assert_eq!(d.read(start, count).await, data);
        }
    }
    // Overwritten in part.
    let (old, new) = (d.pattern(4, 7), d.pattern(2, 8));
    d.write(40, &old).await;
    d.write(41, &new).await;
    let expected = [
        &old[..d.block_bytes],
        &new[..],
        &old[3 * d.block_bytes..4 * d.block_bytes],
    ]
    .concat();
    assert_eq!(d.read(40, 4).await, expected);
    assert_eq!(d.device.flush().await, Ok(()));
    assert_eq!(d.read(40, 4).await, expected);
}

async fn the_first_and_the_last_block_hold_data(d: Blocks) {
    let (first, last) = (d.pattern(1, 1), d.pattern(1, 2));
    d.write(0, &first).await;
    d.write(d.blocks - 1, &last).await;
    assert_eq!(d.read(0, 1).await, first);
    assert_eq!(d.read(d.blocks - 1, 1).await, last);
}

async fn data_may_be_cut_anywhere(d: Blocks) {
    let count = 16.min(d.transfer_max);
    for seed in 1..40 {
        let data = Bytes::from(d.pattern(count, seed));
        let mut random = Random(seed);
        let mut segments = Vec::new();
        let mut at = 0;
        while at < data.len() {
            // Odd lengths, empty segments, whole blocks.
            let len = match random.below(4) {
                0 => 0,
                1 => d.block_bytes * random.below(3) as usize,
                2 => 1 + random.below(100) as usize,
                _ => 1 + random.below(9000) as usize,
            };
            let end = (at + len).min(data.len());
            segments.push(data.slice(at..end));
            at = end;
        }
        let start = random.below(50);
        let written = d.device.write(Lba(start), segments, Durability::Cached);
        assert_eq!(written.await, Ok(()), "seed {seed}");
        assert!(d.read(start, count).await == data, "seed {seed}");
    }
}

async fn the_largest_transfer_works(d: Blocks) {
    let count = d.transfer_max.min(d.blocks - 1);
    let data = d.pattern(count, 3);
    d.write(1, &data).await;
    assert!(d.read(1, count).await == data);
}

async fn many_small_segments_are_one_write(d: Blocks) {
    // More segments than a system call takes (IOV_MAX is 1024).
    let count = 4096 / d.block_bytes as u64;
    let data = Bytes::from(d.pattern(count, 9));
    let segments = (0..data.len()).step_by(2).map(|at| data.slice(at..at + 2));
    let written = d.device.write(Lba(6), segments.collect(), Durability::Durable);
    assert_eq!(written.await, Ok(()));
    assert_eq!(d.read(6, count).await, data);
    // And as many whole blocks, each its own segment.
    let data = Bytes::from(d.pattern(d.transfer_max.min(d.blocks), 10));
    let segments = (0..data.len()).step_by(d.block_bytes);
    let segments = segments.map(|at| Bytes::copy_from_slice(&data[at..at + d.block_bytes]));
    let written = d.device.write(Lba(0), segments.collect(), Durability::Cached);
    assert_eq!(written.await, Ok(()));
    assert!(d.read(0, data.len() as u64 / d.block_bytes as u64).await == data);
}

async fn zeroed_blocks_read_as_zeroes(d: Blocks) {
    for deallocate in [false, true] {
        for durability in [Durability::Cached, Durability::Durable] {
            let data = d.pattern(12, 5);
            d.write(8, &data).await;
            let zeroed = d.device.write_zeroes(range(10, 5), deallocate, durability);
            assert_eq!(zeroed.await, Ok(()));
            let mut expected = data.clone();
            expected[2 * d.block_bytes..7 * d.block_bytes].fill(0);
            assert_eq!(d.read(8, 12).await, expected);
        }
    }
    // Longer than a transfer.
    let long = (2 * d.transfer_max + 3).min(d.blocks - 2);
    let edge = d.pattern(1, 6);
    d.write(1, &edge).await;
    d.write(1 + long, &edge).await;
    let zeroed = d
        .device
        .write_zeroes(range(2, long - 1), true, Durability::Cached);
    assert_eq!(zeroed.await, Ok(()));
    assert_eq!(d.read(1, 1).await, edge);
    assert_eq!(d.read(1 + long, 1).await, edge);
    for start in [2, long / 2, long] {
        assert!(d.read(start, 1).await.iter().all(|byte| *byte == 0));
    }
}

async fn deallocated_blocks_read_as_promised(d: Blocks) {
    let data = d.pattern(32, 11);
    d.write(64, &data).await;
    let deallocated = d.device.deallocate(vec![range(66, 4), range(90, 1)]);
    assert_eq!(deallocated.await, Ok(()));
    let after = d.read(64, 32).await;
    for (index, (old, new)) in data
        .chunks(d.block_bytes)
        .zip(after.chunks(d.block_bytes))
        .enumerate()
    {
        let gone = (2..6).contains(&index) || index == 26;
        let zero = new.iter().all(|byte| *byte == 0);
        if !gone {
            assert_eq!(old, new, "block {index} was not deallocated");
        } else if d.device.info().deallocated_reads_zero {
            assert!(zero, "block {index} was deallocated");
        } else {
            assert!(zero || old == new, "block {index} is neither old nor zero");
        }
    }
    let again = d.pattern(4, 12);
    d.write(66, &again).await;
    assert_eq!(d.read(66, 4).await, again);
}

async fn deallocation_checks_every_range_first(d: Blocks) {
    let data = d.pattern(2, 13);
    d.write(0, &data).await;
    let ranges = vec![range(0, 1), range(d.blocks, 1)];
    let refused = d.device.deallocate(ranges).await;
    assert!(matches!(refused, Err(BlockError::OutOfRange { .. })));
    assert_eq!(d.read(0, 2).await, data);
}

async fn a_future_starts_when_it_is_made(d: Blocks) {
    // Never polled, only made; a write that does not start would never be seen. Whoever executes it may need time for
    // it: a remote device, or a kernel's worker thread on a busy machine.
    let data = d.pattern(1, 14);
    let unpolled = d
        .device
        .write(Lba(20), vec![Bytes::from(data.clone())], Durability::Durable);
    let made = Instant::now();
    while made.elapsed() < STARTED_WITHIN {
        if d.read(20, 1).await == data {
            drop(unpolled);
            return;
        }
    }
    panic!("the write did not start");
}

async fn a_dropped_read_harms_nothing(d: Blocks) {
    let data = d.pattern(8, 15);
    d.write(0, &data).await;
    for _ in 0..64 {
        drop(d.device.read(range(0, 8)));
        // Takes a buffer that the dropped read could still be filling.
        let other = d.pattern(8, 16);
        d.write(100, &other).await;
        assert_eq!(d.read(100, 8).await, other);
    }
    assert_eq!(d.read(0, 8).await, data);
}

async fn disjoint_operations_in_flight_do_not_mix(d: Blocks) {
    let datas: Vec<Vec<u8>> = (0..200).map(|seed| d.pattern(4, seed + 1000)).collect();
    let writes = datas.iter().enumerate().map(|(index, data)| {
        let data = vec![Bytes::copy_from_slice(data)];
        d.device.write(Lba(index as u64 * 4), data, Durability::Cached)
    });
    let writes: Vec<_> = writes.collect();
    assert!(join_all(writes).await.into_iter().all(|done| done.is_ok()));
    let reads: Vec<_> = (0..200).map(|index| d.device.read(range(index * 4, 4))).collect();
    for (data, read) in datas.iter().zip(join_all(reads).await) {
        assert!(read.expect("read") == *data);
    }
}

/// Blocks of the random history. Small, so that operations meet.
const ARENA_BLOCKS: u64 = 96;

async fn a_random_history_matches_an_array(d: Blocks) {
    for seed in 1..=4 {
        random_history(&d, seed).await;
    }
}

/// Rounds of operations in flight at once that do not overlap within a round (the contract gives overlapping
/// ones no order), each round over all of the arena, checked against an array.
async fn random_history(d: &Blocks, seed: u64) {
    let mut random = Random(seed);
    let block = d.block_bytes;
    let mut model = d.pattern(ARENA_BLOCKS, seed);
    let zeroes_after_deallocate = d.device.info().deallocated_reads_zero;
    let longest = 8.min(d.transfer_max);
    for piece in (0..ARENA_BLOCKS).step_by(longest as usize) {
        let end = (piece + longest).min(ARENA_BLOCKS);
        d.write(piece, &model[piece as usize * block..end as usize * block])
            .await;
    }
    for round in 0..40 {
        let mut at = 0;
        let mut reads = Vec::new();
        let mut changes = Vec::new();
        while at < ARENA_BLOCKS {
            let count = (1 + random.below(longest)).min(ARENA_BLOCKS - at);
            let bytes = at as usize * block..(at + count) as usize * block;
            let durability = if random.below(4) == 0 {
                Durability::Durable
            } else {
                Durability::Cached
            };
            match random.below(8) {
                0..=2 => reads.push((d.device.read(range(at, count)), bytes)),
                3..=5 => {
                    let data = Bytes::from(d.pattern(count, random.next()));
                    model[bytes].copy_from_slice(&data);
                    let cut = random.below(data.len() as u64) as usize;
                    let segments = vec![data.slice(..cut), data.slice(cut..)];
                    changes.push(d.device.write(Lba(at), segments, durability));
                }
                6 => {
                    model[bytes].fill(0);
                    let deallocate = random.below(2) == 0;
                    changes.push(d.device.write_zeroes(range(at, count), deallocate, durability));
                }
                _ if zeroes_after_deallocate => {
                    model[bytes].fill(0);
                    changes.push(d.device.deallocate(vec![range(at, count)]));
                }
                _ => changes.push(d.device.flush()),
            }
            at += count;
        }
        let (changes, contents): (Vec<_>, Vec<_>) = (
            join_all(changes).await,
            join_all(
                reads
                    .into_iter()
                    .map(async |(read, bytes)| (read.await.expect("read"), bytes)),
            )
            .await,
        );
        assert!(changes.iter().all(Result::is_ok), "seed {seed}, round {round}");
        for (content, bytes) in contents {
            assert!(content == model[bytes], "seed {seed}, round {round}");
        }
    }
    for start in 0..ARENA_BLOCKS {
        let bytes = start as usize * block..(start as usize + 1) * block;
        assert!(
            d.read(start, 1).await == model[bytes],
            "seed {seed}, block {start}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faulty::{Fault, Faulty, Ops};
    use crate::memory::MemoryDrive;

    /// Whether the cases find `fault`, met by every operation of `ops`.
    fn is_found(ops: Ops, fault: &Fault) -> bool {
        let fault = fault.clone();
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            runtime.expect("a runtime").block_on(conformance(async || {
                let (device, faults) = Faulty::wrap(MemoryDrive::device(16 << 20));
                faults.every(ops, fault.clone());
                device
            }));
        };
        // A thread of its own: the case panics, and that is what is wanted.
        std::thread::spawn(run).join().is_err()
    }

    #[test]
    fn the_cases_find_a_device_that_does_not_keep_the_contract() {
        for (ops, fault) in [
            (Ops::READ, Fault::FlipBit(9)),
            (Ops::READ, Fault::Misdirect(1)),
            (Ops::WRITE, Fault::FlipBit(4096 * 8 + 1)),
            (Ops::WRITE, Fault::Forget),
            (Ops::WRITE, Fault::Misdirect(1)),
            (Ops::WRITE_ZEROES, Fault::Forget),
            (Ops::WRITE_ZEROES, Fault::Misdirect(1)),
            (Ops::DEALLOCATE, Fault::Forget),
            (Ops::FLUSH, Fault::Fail(BlockError::NotReady)),
        ] {
            assert!(is_found(ops, &fault), "{fault:?} of {ops:?} went unnoticed");
        }
    }
}
