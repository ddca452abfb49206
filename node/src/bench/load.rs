//! Load on a block device of this thread: a fixed number of operations outstanding, refilled in batches.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::ensure;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use weft_block::{Device, Durability, Io};
use weft_proto::units::{Lba, LbaRange};

use super::floor::{BLOCK, noise};
use super::histogram::Histogram;
use super::machine::CpuClock;
use super::pairs::Window;
use super::report::CpuPerIo;

/// What is done to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    /// Read, else durable writes.
    pub(super) read: bool,
    /// One block each at random places, else 128 KiB one after another.
    pub(super) random: bool,
    /// Outstanding.
    pub(super) depth: usize,
}

impl Pattern {
    /// Of one operation.
    pub(super) fn blocks(self) -> u64 {
        if self.random { 1 } else { 32 }
    }

    /// IOPS for single blocks, GB/s for longer operations.
    pub(super) fn rate(self, operations: u64, seconds: f64) -> f64 {
        if self.random {
            operations as f64 / seconds
        } else {
            (operations * self.blocks() * BLOCK as u64) as f64 / seconds / 1e9
        }
    }

    pub(super) fn unit(self) -> &'static str {
        if self.random { "IOPS" } else { "GB/s" }
    }
}

/// By which clock a rate is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    /// CPU time of this thread: for work that this thread does alone and never waits in, which a busy machine then
    /// does not slow down.
    Cpu,
    /// The wall's: where others work too.
    Wall,
}

/// See the module.
pub(super) struct Load {
    device: Device,
    payload: Bytes,
    random: RefCell<SmallRng>,
    clock: Clock,
}

impl Load {
    pub(super) fn new(device: Device, clock: Clock) -> Self {
        Self {
            device,
            payload: Bytes::from(noise(4 << 20)),
            random: RefCell::new(SmallRng::seed_from_u64(1)),
            clock,
        }
    }

    /// Writes every block once.
    pub(super) async fn fill(&self) -> anyhow::Result<()> {
        let step = 128;
        for start in (0..self.device.info().blocks).step_by(step) {
            let data = self.payload.slice(..step * BLOCK);
            self.device
                .write(Lba(start), vec![data], Durability::Durable)
                .await?;
        }
        Ok(())
    }

    /// Keeps `pattern` going for `window`.
    pub(super) async fn run(&self, pattern: Pattern, window: Duration) -> anyhow::Result<Window> {
        let blocks = pattern.blocks();
        let places = self.device.info().blocks / blocks;
        let mut next = 0;
        let mut place = || {
            if pattern.random {
                return self.random.borrow_mut().random_range(0..places);
            }
            next = (next + 1) % places;
            next
        };
        let mut running: FuturesUnordered<_> =
            (0..pattern.depth).map(|_| self.start(pattern, place())).collect();
        let mut latency = Histogram::default();
        let (clock, start) = (CpuClock::now(), Instant::now());
        let (mut done, mut finished) = (0u64, Vec::with_capacity(pattern.depth));
        while start.elapsed() < window || done == 0 {
            // Everything that is ready is taken before anything new is started: what completed together is refilled
            // together.
            let mut ready = (&mut running).ready_chunks(pattern.depth);
            finished.extend(ready.next().await.into_iter().flatten());
            for outcome in finished.drain(..) {
                latency.record(outcome?);
                done += 1;
                running.push(self.start(pattern, place()));
            }
        }
        let (seconds, cpu) = (start.elapsed().as_secs_f64(), clock.elapsed());
        while let Some(outcome) = running.next().await {
            outcome?;
        }
        let seconds = match self.clock {
            Clock::Cpu => cpu.0.as_secs_f64(),
            Clock::Wall => seconds,
        };
        Ok(Window {
            value: pattern.rate(done, seconds),
            latency,
            cpu: CpuPerIo {
                host: None,
                target: Some((cpu.0 + cpu.1).as_secs_f64() * 1e6 / done as f64),
            },
        })
    }

    /// Starts one operation; answers its nanoseconds.
    fn start(&self, pattern: Pattern, place: u64) -> impl Future<Output = anyhow::Result<u64>> + use<> {
        let blocks = pattern.blocks();
        let range = LbaRange {
            start: Lba(place * blocks),
            count: blocks,
        };
        let bytes = blocks as usize * BLOCK;
        let began = Instant::now();
        let (mut read, mut write): (Option<Io<Bytes>>, Option<Io<()>>) = (None, None);
        if pattern.read {
            read = Some(self.device.read(range));
        } else {
            let at = (place as usize * BLOCK) % (self.payload.len() - bytes + BLOCK);
            let data = vec![self.payload.slice(at..at + bytes)];
            write = Some(self.device.write(range.start, data, Durability::Durable));
        }
        async move {
            if let Some(read) = read {
                ensure!(read.await?.len() == bytes, "a short read");
            }
            if let Some(write) = write {
                write.await?;
            }
            Ok(began.elapsed().as_nanos() as u64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_operation_is_counted_and_completes() {
        let load = Load::new(weft_block::memory::MemoryDrive::device(8 << 20), Clock::Wall);
        load.fill().await.unwrap();
        for (read, random) in [(true, true), (false, true), (true, false), (false, false)] {
            let pattern = Pattern {
                read,
                random,
                depth: 8,
            };
            let window = load.run(pattern, Duration::from_millis(1)).await.unwrap();
            assert!(
                window.value > 0.0 && window.latency.quantile_us(0.5).is_some(),
                "{pattern:?}"
            );
        }
    }
}
