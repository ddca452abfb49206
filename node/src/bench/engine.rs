//! `weft bench engine`: the volume engine over six memory devices, on one core, beside the work that no engine can
//! leave out.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::LocalSet;
use weft_block::{BlockDevice as _, Durability, Io};
use weft_proto::units::{Lba, LbaRange, MIB};
use weft_volume::engine::Engine;

use super::floor::{BLOCK, StripeFloor, noise};
use super::histogram::Histogram;
use super::machine::{self, CpuClock};
use super::pairs::{Window, measure};
use super::report::{CpuPerIo, Heading, Required, Row};
use super::world::World;
use super::{Output, Plan};

/// Four data and two parity shards, on as many devices.
const K: u8 = 4;
const M: u8 = 2;

/// Of the volume: larger than the caches, and small enough to be written over many times.
const VOLUME_BYTES: u64 = 256 * MIB;

/// Of each device: five volumes fit, so that overwriting compacts as a half-full pool does.
const DEVICE_BYTES: u64 = 512 * MIB;

const DEPTH: usize = 128;

/// 128 KiB writes outstanding.
const SEQUENTIAL_DEPTH: usize = 8;
const SEQUENTIAL_BLOCKS: u64 = 32;

/// Rows of a full stripe of a batch of [`DEPTH`] blocks: what the floor is given.
const FLOOR_ROWS: usize = 8;

/// Measures the engine.
///
/// # Errors
/// The engine refuses an I/O, or a core cannot be had.
pub(super) fn run(plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    machine::pin(machine::SUBJECT_CORE)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = LocalSet::new();
    let on = |work: &mut dyn FnMut() -> futures_util::future::LocalBoxFuture<
        'static,
        anyhow::Result<Window>,
    >| { local.block_on(&runtime, work()) };
    let world = World::new(usize::from(K + M), |_| {
        weft_block::memory::MemoryDrive::device(DEVICE_BYTES)
    });
    let engine = local.block_on(&runtime, world.open(K, M, VOLUME_BYTES))?;
    let load = Rc::new(Load {
        engine: engine.clone(),
        payload: Bytes::from(noise(4 << 20)),
        random: RefCell::new(SmallRng::seed_from_u64(1)),
    });
    // Everything is mapped, and background work has begun, before anything is measured.
    let fill = Rc::clone(&load);
    local.block_on(&runtime, async move { fill.fill().await })?;

    let floor =
        RefCell::new(StripeFloor::new(K, M, FLOOR_ROWS, 128 << 20).context("a codec of two parities")?);
    let payload = load.payload.clone();
    let write_floor = |block_bytes: usize| {
        let (floor, payload, window) = (&floor, &payload, plan.window);
        move || {
            Ok(floor_of_writes(
                &mut floor.borrow_mut(),
                payload,
                window,
                block_bytes,
            ))
        }
    };
    let subject = |kind: Kind, depth: usize| {
        let (load, window) = (Rc::clone(&load), plan.window);
        let on = &on;
        move || {
            on(&mut || {
                let load = Rc::clone(&load);
                Box::pin(async move { load.window(kind, depth, window).await })
            })
        }
    };

    let heading = |workload: &str, unit, floor_is, required| Heading {
        stage: "engine",
        workload: workload.to_owned(),
        unit,
        floor_is,
        required,
        processes: 1,
        drive_kind: "memory",
    };
    const WRITE_FLOOR: &str =
        "copies in and out, crc32c of block and shard, headers, parity of a full stripe";
    const READ_FLOOR: &str = "one copy out of a device and its crc32c";
    let paired = measure(plan.pairs, write_floor(BLOCK), subject(Kind::Write, DEPTH))?;
    let name = "4+2, 4 KiB random write, depth 128";
    output.row(Row::new(
        heading(name, "IOPS", WRITE_FLOOR, Required::RatioAtLeast(0.4)),
        &paired,
    ));
    output.row(Row::new(
        heading(name, "IOPS", WRITE_FLOOR, Required::ValueAtLeast(400e3)),
        &paired,
    ));

    let read_floor = || Ok(floor_of_reads(&floor.borrow(), plan.window));
    let paired = measure(plan.pairs, read_floor, subject(Kind::Read, DEPTH))?;
    let name = "4+2, 4 KiB random read, depth 128";
    output.row(Row::new(
        heading(name, "IOPS", READ_FLOOR, Required::ValueAtLeast(600e3)),
        &paired,
    ));

    let paired = measure(
        plan.pairs,
        write_floor(SEQUENTIAL_BLOCKS as usize * BLOCK),
        subject(Kind::Sequential, SEQUENTIAL_DEPTH),
    )?;
    let name = "4+2, 128 KiB sequential write, depth 8";
    output.row(Row::new(
        heading(name, "GB/s", WRITE_FLOOR, Required::ValueAtLeast(2.5)),
        &paired,
    ));
    engine.abort();
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write,
    Read,
    Sequential,
}

struct Load {
    engine: Engine,
    payload: Bytes,
    random: RefCell<SmallRng>,
}

impl Load {
    async fn fill(&self) -> anyhow::Result<()> {
        let step = 128u64;
        for start in (0..VOLUME_BYTES / BLOCK as u64).step_by(step as usize) {
            let data = self.payload.slice(..step as usize * BLOCK);
            self.engine
                .write(Lba(start), vec![data], Durability::Durable)
                .await?;
        }
        Ok(())
    }

    async fn window(&self, kind: Kind, depth: usize, window: std::time::Duration) -> anyhow::Result<Window> {
        let blocks_each = if kind == Kind::Sequential {
            SEQUENTIAL_BLOCKS
        } else {
            1
        };
        let places = VOLUME_BYTES / BLOCK as u64 / blocks_each;
        let mut next = 0;
        let mut start_one = || {
            let place = if kind == Kind::Sequential {
                next = (next + 1) % places;
                next
            } else {
                self.random.borrow_mut().random_range(0..places)
            };
            self.start(kind, place, blocks_each)
        };
        let mut running: FuturesUnordered<_> = (0..depth).map(|_| start_one()).collect();
        let mut latency = Histogram::default();
        let (clock, start) = (CpuClock::now(), Instant::now());
        let mut done = 0u64;
        while let Some(finished) = running.next().await {
            let elapsed: u64 = finished?;
            latency.record(elapsed);
            done += 1;
            if done.is_multiple_of(16) && start.elapsed() >= window {
                break;
            }
            running.push(start_one());
        }
        let (seconds, cpu) = (start.elapsed().as_secs_f64(), clock.elapsed().0);
        while let Some(finished) = running.next().await {
            finished?;
        }
        ensure!(done > 0, "nothing completed");
        let value = if kind == Kind::Sequential {
            (done * blocks_each * BLOCK as u64) as f64 / seconds / 1e9
        } else {
            done as f64 / seconds
        };
        let target = Some(cpu.as_secs_f64() * 1e6 / done as f64);
        Ok(Window {
            value,
            latency,
            cpu: CpuPerIo { host: None, target },
        })
    }

    /// Starts one I/O; answers its nanoseconds.
    fn start(
        &self,
        kind: Kind,
        place: u64,
        blocks: u64,
    ) -> impl Future<Output = anyhow::Result<u64>> + use<> {
        let range = LbaRange {
            start: Lba(place * blocks),
            count: blocks,
        };
        let began = Instant::now();
        let (mut read, mut write): (Option<Io<Bytes>>, Option<Io<()>>) = (None, None);
        if kind == Kind::Read {
            read = Some(self.engine.read(range));
        } else {
            let bytes = blocks as usize * BLOCK;
            let at = (place as usize * BLOCK) % (self.payload.len() - bytes + 1);
            let data = self.payload.slice(at..at + bytes);
            write = Some(self.engine.write(range.start, vec![data], Durability::Durable));
        }
        async move {
            if let Some(read) = read {
                let data = read.await?;
                ensure!(data.len() == blocks as usize * BLOCK, "a short read");
            }
            if let Some(write) = write {
                write.await?;
            }
            Ok(began.elapsed().as_nanos() as u64)
        }
    }
}

/// IOPS of single blocks, or GB/s of longer writes.
fn floor_of_writes(
    floor: &mut StripeFloor,
    payload: &Bytes,
    window: std::time::Duration,
    write_bytes: usize,
) -> Window {
    let mut random = SmallRng::seed_from_u64(2);
    let per_stripe = floor.blocks();
    let start = Instant::now();
    let mut blocks = 0;
    while start.elapsed() < window {
        let sources: Vec<&[u8]> = (0..per_stripe)
            .map(|_| {
                let at = random.random_range(0..payload.len() / BLOCK) * BLOCK;
                &payload[at..at + BLOCK]
            })
            .collect();
        floor.write(&sources);
        blocks += per_stripe;
    }
    let seconds = start.elapsed().as_secs_f64();
    let value = if write_bytes == BLOCK {
        blocks as f64 / seconds
    } else {
        (blocks * BLOCK) as f64 / seconds / 1e9
    };
    Window {
        value,
        ..Window::default()
    }
}

fn floor_of_reads(floor: &StripeFloor, window: std::time::Duration) -> Window {
    let mut random = SmallRng::seed_from_u64(3);
    let mut out = vec![0; BLOCK];
    let start = Instant::now();
    let mut blocks = 0u64;
    while start.elapsed() < window {
        for _ in 0..32 {
            floor.read(random.random(), &mut out);
        }
        blocks += 32;
    }
    Window {
        value: blocks as f64 / start.elapsed().as_secs_f64(),
        ..Window::default()
    }
}
