//! `weft bench space`: what a byte that a host writes costs on the drives when the pool is 70, 80 and 85 % full of live
//! data and blocks are overwritten at random, beside a model of greedy cleaning.
//!
//! The engine alone, over memory devices, under settings of an agent, with a pool that keeps the metadata service's
//! reserve and says when it is tight. Bytes are counted, so a busy machine changes nothing.
//!
//! - "Full" is the share of live blocks in what hosts may fill of an empty pool: its capacity after the reserve.
//! - The floor is the model's write amplification on the same bands, the reserve included since that is free space
//!   too, times the cost of a full stripe, (1 + 1/d)(1 + m/k), at the depth that the engine's full stripes had.
//! - Everything that goes to drives counts: checkpoints, merges of the map, narrow stripes.
//!
//! The pool is a miniature, so that it can be written over in seconds: of the smallest chunks, to have as many bands (255 with
//! `--quick`, 1023 otherwise) as 64 and 256 GiB have of the largest. `docs/performance.md` says what that leaves open. With all other
//! stages and `--quick` it is only the pool that is 80 % full.

use std::cell::Cell;

use anyhow::Context as _;
use tokio::task::LocalSet;
use weft_block::memory::MemoryDrive;
use weft_proto::band::{ChunkSize, Geometry};
use weft_proto::units::{BLOCK_BYTES, MIB};
use weft_volume::engine::Stats;
use weft_volume::settings::Settings;

use super::cleaning::greedy;
use super::load::{Clock, Load, Pattern};
use super::report::{Heading, Required, Row};
use super::stripes::Stripes;
use super::world::World;
use super::{Output, Plan, machine};
use crate::config::EngineConfig;

const GEOMETRY: Geometry = Geometry { k: 4, m: 2 };

/// Of a device with `--quick`: 255 bands of the smallest chunks.
const DEVICE_BYTES: u64 = 256 * MIB;

/// A larger plan has at most so many times as much: it has to fit in memory.
const SCALE_MAX: u64 = 4;

/// Overwrites before anything is counted, and while it is, in parts of all blocks that the devices have room for.
const SETTLED_AFTER: f64 = 0.75;
const COUNTED: f64 = 0.75;

/// Rows of a shard that a full stripe has at least.
const DEEP: u32 = 8;

const OVERWRITE: Pattern = Pattern {
    read: false,
    random: true,
    depth: 128,
};

/// Measures pools that are more and more full.
///
/// # Errors
/// The engine refuses a write: the pool should have had room for it.
pub(super) fn run(plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    machine::pin(machine::SUBJECT_CORE)?;
    for &percent in plan.fill {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let pool = LocalSet::new()
            .block_on(&runtime, overwrite(percent, plan.scale.min(SCALE_MAX)))
            .with_context(|| format!("a pool that is {percent} % full"))?;
        pool.tell(percent, output);
    }
    Ok(())
}

/// A pool that was overwritten for a while.
struct Pool {
    before: Stats,
    after: Stats,
    live_blocks: u64,
    bands: u64,
    rows: u64,
    /// Share of the drives' chunks that bands took, on average over the writes that were counted.
    held: f64,
}

async fn overwrite(percent: u64, scale: u64) -> anyhow::Result<Pool> {
    let devices = (0..GEOMETRY.n())
        .map(|_| MemoryDrive::device(DEVICE_BYTES * scale))
        .collect();
    let world = World::new(GEOMETRY, devices);
    let volume_bytes = world.space().usable_bytes() * percent / 100 / MIB * MIB;
    let settings = Settings {
        log_budget_bytes: u64::from(EngineConfig::default().log_budget_mib) * MIB * scale / 4,
        chunk_size_max: ChunkSize::Mib1,
        ..Settings::default()
    };
    let engine = world.open(settings, volume_bytes).await?;
    let load = Load::new(std::rc::Rc::new(engine.clone()), Clock::Cpu);
    load.fill().await?;
    let room = world.space().capacity_mib * MIB / BLOCK_BYTES as u64 * u64::from(GEOMETRY.k)
        / u64::from(GEOMETRY.n());
    let (held, looks) = (Cell::new(0.0), Cell::new(0.0));
    let write = async |share: f64| {
        let blocks = (room as f64 * share) as u64;
        held.set(0.0);
        looks.set(0.0);
        load.run_while(OVERWRITE, |done| {
            world.tell_tightness(&engine);
            let space = world.space();
            held.set(held.get() + 1.0 - space.free_mib as f64 / space.capacity_mib as f64);
            looks.set(looks.get() + 1.0);
            done < blocks
        })
        .await
    };
    write(SETTLED_AFTER).await?;
    let before = engine.stats();
    write(COUNTED).await?;
    let after = engine.stats();
    engine.abort();
    let chunk_size = world.chunk_size_max().context("no band was granted")?;
    Ok(Pool {
        before,
        after,
        live_blocks: volume_bytes / BLOCK_BYTES as u64,
        bands: world.space().capacity_mib / u64::from(GEOMETRY.n()) / u64::from(chunk_size.mib()),
        rows: u64::from(chunk_size.rows()),
        held: held.get() / looks.get(),
    })
}

impl Pool {
    fn tell(&self, percent: u64, output: &mut Output) {
        let stripes = Stripes::between(&self.before, &self.after);
        let Geometry { k, m } = GEOMETRY;
        let depth = stripes.depth(k);
        let band_blocks = self.rows as f64 * f64::from(k) * depth / (depth + 1.0);
        let amplification = greedy(
            self.bands as usize,
            band_blocks as usize,
            self.live_blocks as usize,
        );
        let stripe_cost = (1.0 + 1.0 / depth) * (1.0 + f64::from(m) / f64::from(k));
        let user = (self.after.user_bytes - self.before.user_bytes).max(1) as f64;
        let per_user = |bytes: fn(&Stats) -> u64| (bytes(&self.after) - bytes(&self.before)) as f64 / user;

        let heading = |workload: &str, unit, floor_is, required| Heading {
            stage: "space",
            workload: format!("4+2, {percent} % full, random 4 KiB: {workload}"),
            unit,
            floor_is,
            required,
            processes: 1,
            drive_kind: "memory",
        };
        let cost = per_user(|stats| stats.drive_bytes);
        output.row(Row::counted(
            heading(
                "cost",
                "B/B",
                "greedy cleaning of the same bands (a model), times the cost of a full stripe",
                Required::RatioAtMost(1.25),
            ),
            cost,
            amplification * stripe_cost,
        ));
        let full = stripes.share(|w, d| w == k && d >= DEEP);
        output.row(Row::counted(
            heading("full", "%", "nothing", Required::ValueAtLeast(90.0)),
            full * 100.0,
            0.0,
        ));
        let log = self.bands as f64 * band_blocks;
        output.note(format!(
            "{percent} % full: {} bands of {:.0} blocks, {:.0} % of them live, {:.0} % of the drives taken; the model writes a block {amplification:.2} \
             times at {stripe_cost:.2} drive bytes; the engine {cost:.2} in all ({:.2} payload, {:.2} copied by compaction, \
             {:.2} parity, {:.2} headers, {:.2} map), {:.0} blocks in a band; {} checkpoints; {}",
            self.bands,
            band_blocks,
            self.live_blocks as f64 * 100.0 / log,
            self.held * 100.0,
            per_user(|stats| stats.drive_user_bytes),
            per_user(|stats| stats.drive_copy_bytes),
            per_user(|stats| stats.drive_parity_bytes),
            per_user(|stats| stats.drive_header_bytes),
            per_user(|stats| stats.drive_map_bytes),
            (per_user(|stats| stats.drive_user_bytes)
                + per_user(|stats| stats.drive_copy_bytes)
                + per_user(|stats| stats.drive_map_bytes))
                * user
                / BLOCK_BYTES as f64
                / (self.after.bands_granted - self.before.bands_granted).max(1) as f64,
            self.after.checkpoints - self.before.checkpoints,
            stripes.histograms(),
        ));
    }
}
