//! `weft bench engine`: the volume engine over six memory devices, on one core, beside the work that no engine can
//! leave out.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::LocalSet;
use weft_block::memory::MemoryDrive;
use weft_proto::band::Geometry;
use weft_proto::units::MIB;
use weft_volume::engine::Stats;
use weft_volume::settings::Settings;

use super::floor::{BLOCK, StripeFloor, noise};
use super::load::{Clock, Load, Pattern};
use super::machine::{self, CpuClock};
use super::pairs::{Window, measure};
use super::report::{Heading, Required, Row};
use super::stripes::Stripes;
use super::world::World;
use super::{Output, Plan};

/// Four data and two parity shards, on as many devices.
const K: u8 = 4;
const M: u8 = 2;
const GEOMETRY: Geometry = Geometry { k: K, m: M };

/// Of the volume: larger than the caches, and small enough to be written over many times.
const VOLUME_BYTES: u64 = 128 * MIB;

/// Of each device. Four of six hold data: eight volumes' worth, so that most bands that are compacted are nearly dead.
const DEVICE_BYTES: u64 = 256 * MIB;

const RANDOM_WRITE: Pattern = Pattern {
    read: false,
    random: true,
    depth: 128,
};
const RANDOM_READ: Pattern = Pattern {
    read: true,
    ..RANDOM_WRITE
};
const SEQUENTIAL_WRITE: Pattern = Pattern {
    read: false,
    random: false,
    depth: 8,
};

/// Rows of a shard of a full stripe: what the floor is given.
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
    let devices = (0..K + M)
        .map(|_| MemoryDrive::preallocated(DEVICE_BYTES))
        .collect();
    let world = World::new(GEOMETRY, devices);
    let engine = local.block_on(&runtime, world.open(Settings::default(), VOLUME_BYTES))?;
    let load = Load::new(Rc::new(engine.clone()), Clock::Cpu);
    // Everything is mapped, and background work has begun, before anything is measured.
    local.block_on(&runtime, load.fill())?;

    let floor = StripeFloor::new(K, M, FLOOR_ROWS, 128 << 20).context("a codec of two parities")?;
    let floor = RefCell::new(floor);
    let payload = noise(4 << 20);
    for (name, pattern, required) in [
        ("4+2, 4 KiB random write, depth 128", RANDOM_WRITE, 400e3),
        ("4+2, 4 KiB random read, depth 128", RANDOM_READ, 600e3),
        ("4+2, 128 KiB sequential write, depth 8", SEQUENTIAL_WRITE, 2.5),
    ] {
        let before = engine.stats();
        let paired = measure(
            plan.pairs,
            || {
                Ok(floor_window(
                    &mut floor.borrow_mut(),
                    &payload,
                    pattern,
                    plan.window,
                ))
            },
            || local.block_on(&runtime, load.run(pattern, plan.window)),
        )?;
        let heading = |required| Heading {
            stage: "engine",
            workload: name.to_owned(),
            unit: pattern.unit(),
            floor_is: if pattern.read {
                "one copy out of a device and its crc32c"
            } else {
                "copies in and out, crc32c of block and shard, headers, parity of a full stripe"
            },
            required,
            processes: 1,
            drive_kind: "memory",
        };
        if pattern == RANDOM_WRITE {
            output.row(Row::new(heading(Required::RatioAtLeast(0.4)), &paired));
        }
        output.row(Row::new(heading(Required::ValueAtLeast(required)), &paired));
        if !pattern.read {
            output.note(format!("{name}: {}", drive_side(&before, &engine.stats())));
        }
    }
    engine.abort();
    Ok(())
}

/// What the engine made of writes: the shape of its stripes, and what it wrote for each user byte.
fn drive_side(before: &Stats, after: &Stats) -> String {
    let stripes = Stripes::between(before, after);
    let user = (after.user_bytes - before.user_bytes).max(1) as f64;
    let per_user = |bytes: fn(&Stats) -> u64| (bytes(after) - bytes(before)) as f64 / user;
    format!(
        "{:.1} blocks a stripe, {:.0} % of them in stripes of w = {K} and d ≥ {FLOOR_ROWS}; {:.2} drive bytes a user byte \
         ({:.2} payload, {:.2} parity, {:.2} headers, {:.2} copied by compaction, {:.2} map); {} checkpoints",
        stripes.blocks_each(),
        stripes.share(|w, d| w == K && d >= FLOOR_ROWS as u32) * 100.0,
        per_user(|stats| stats.drive_bytes),
        per_user(|stats| stats.drive_user_bytes),
        per_user(|stats| stats.drive_parity_bytes),
        per_user(|stats| stats.drive_header_bytes),
        per_user(|stats| stats.drive_copy_bytes),
        per_user(|stats| stats.drive_map_bytes),
        after.checkpoints - before.checkpoints,
    )
}

/// The same work without an engine, by the CPU time of this thread as for the engine.
fn floor_window(floor: &mut StripeFloor, payload: &[u8], pattern: Pattern, window: Duration) -> Window {
    let mut random = SmallRng::seed_from_u64(2);
    let mut out = vec![0; BLOCK];
    let (clock, start) = (CpuClock::now(), Instant::now());
    let mut blocks = 0;
    while start.elapsed() < window {
        if pattern.read {
            for _ in 0..32 {
                floor.read(random.random(), &mut out);
            }
            blocks += 32;
        } else {
            let sources: Vec<&[u8]> = (0..floor.blocks())
                .map(|_| {
                    let at = random.random_range(0..payload.len() / BLOCK) * BLOCK;
                    &payload[at..at + BLOCK]
                })
                .collect();
            floor.write(&sources);
            blocks += sources.len() as u64;
        }
    }
    Window {
        value: pattern.rate(blocks / pattern.blocks(), clock.elapsed().0.as_secs_f64()),
        ..Window::default()
    }
}
