//! Load on a block device of this thread: a fixed number of operations outstanding, refilled in batches.

use std::cell::RefCell;
use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use weft_block::{BlockError, Device, Durability, Io};
use weft_proto::units::{Lba, LbaRange};

use super::floor::{BLOCK, noise};
use super::histogram::Histogram;
use super::machine::CpuClock;
use super::pairs::{CpuPerIo, Window};

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

/// What writes are cut from.
pub(super) const PAYLOAD_BYTES: usize = 4 << 20;

/// Where in it the `bytes` for the place numbered so are.
pub(super) fn payload_at(place: u64, bytes: usize) -> usize {
    (place as usize * BLOCK) % (PAYLOAD_BYTES - bytes + BLOCK)
}

/// See the module.
pub(super) struct Load {
    device: Device,
    payload: Bytes,
    random: RefCell<SmallRng>,
    clock: Clock,
}

impl Load {
    /// Of bytes that lie anywhere, as those from a socket do.
    pub(super) fn new(device: Device, clock: Clock) -> Self {
        Self::of(Bytes::from(noise(PAYLOAD_BYTES)), device, clock)
    }

    /// Of pieces of `payload`, [`PAYLOAD_BYTES`] long.
    pub(super) fn of(payload: Bytes, device: Device, clock: Clock) -> Self {
        Self {
            device,
            payload,
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
        let start = Instant::now();
        self.run_while(pattern, |done| start.elapsed() < window || done == 0)
            .await
    }

    /// Keeps `pattern` going while `goes_on` says so of the operations done. It is asked whenever some have completed.
    pub(super) async fn run_while(
        &self,
        pattern: Pattern,
        mut goes_on: impl FnMut(u64) -> bool,
    ) -> anyhow::Result<Window> {
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
        let mut running: Vec<(Instant, Running)> = Vec::with_capacity(pattern.depth);
        let mut latency = Histogram::default();
        let (clock, start) = (CpuClock::now(), Instant::now());
        let mut done = 0u64;
        while goes_on(done) {
            for _ in running.len()..pattern.depth {
                let began = Instant::now();
                match self.start(pattern, place()) {
                    // What a device in memory answers at once is not waited for.
                    Started::Done(outcome) => {
                        outcome?;
                        latency.record(began.elapsed().as_nanos() as u64);
                        done += 1;
                    }
                    Started::Running(answer) => running.push((began, answer)),
                }
            }
            if running.is_empty() {
                // The device's own tasks have their turn.
                tokio::task::yield_now().await;
                continue;
            }
            done += finish_some(&mut running, &mut latency).await?;
        }
        let (seconds, cpu) = (start.elapsed().as_secs_f64(), clock.elapsed());
        while !running.is_empty() {
            finish_some(&mut running, &mut Histogram::default()).await?;
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

    /// Starts one operation.
    fn start(&self, pattern: Pattern, place: u64) -> Started {
        let blocks = pattern.blocks();
        let range = LbaRange {
            start: Lba(place * blocks),
            count: blocks,
        };
        let bytes = blocks as usize * BLOCK;
        if pattern.read {
            return match self.device.read(range).take_ready() {
                Ok(outcome) => Started::Done(outcome.map(drop)),
                Err(io) => Started::Running(Running::Read(io)),
            };
        }
        let at = payload_at(place, bytes);
        let data = vec![self.payload.slice(at..at + bytes)];
        match self
            .device
            .write(range.start, data, Durability::Durable)
            .take_ready()
        {
            Ok(outcome) => Started::Done(outcome),
            Err(io) => Started::Running(Running::Write(io)),
        }
    }
}

/// An operation that was started.
enum Started {
    /// And is over.
    Done(Result<(), BlockError>),
    Running(Running),
}

enum Running {
    Read(Io<Bytes>),
    Write(Io<()>),
}

impl Running {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BlockError>> {
        match self {
            Self::Read(io) => Pin::new(io).poll(context).map_ok(drop),
            Self::Write(io) => Pin::new(io).poll(context),
        }
    }
}

/// Waits until at least one of `running` is over and takes all that are: what completed together is refilled together. All of
/// them are asked each time, which costs less than to keep books on who was woken.
async fn finish_some(running: &mut Vec<(Instant, Running)>, latency: &mut Histogram) -> anyhow::Result<u64> {
    poll_fn(|context| {
        let mut done = 0;
        let mut index = 0;
        while let Some((began, answer)) = running.get_mut(index) {
            match answer.poll(context) {
                Poll::Pending => index += 1,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Ready(Ok(())) => {
                    latency.record(began.elapsed().as_nanos() as u64);
                    running.swap_remove(index);
                    done += 1;
                }
            }
        }
        if done == 0 {
            return Poll::Pending;
        }
        Poll::Ready(Ok(done))
    })
    .await
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
