//! `weft bench memory`: what a page map takes of memory when a volume was written in single blocks all over, beside
//! 0.05 % of the volume, and whether the cache setting bounds it.
//!
//! The map alone, in a process of its own for each cache setting, so that what the process takes is the map's. It is
//! filled as an engine fills it: a checkpoint for each log budget, with its merges. Then it is asked for blocks all over
//! until the cache is full. Its blocks lie in a file in memory that is not part of the process. They are lent out of
//! receive buffers, since that is where the map's blocks come from when drives are remote.
//!
//! A map of a whole TiB takes too long to make: what it would take is what the largest one took, and what was added by its
//! last quarter for each further byte. The engine's own lists of bands are not in it.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;

use anyhow::{Context as _, ensure};
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use futures_util::future::{LocalBoxFuture, ready};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use weft_block::BlockError;
use weft_proto::id::{BandId, Epoch, LayerId, Sequence, VolumeId};
use weft_proto::units::{BLOCK_BYTES, Lba, MIB};
use weft_volume::entry::{ColumnSet, MapEntry};
use weft_volume::map::{MapBlock, MapIdentity, MapSettings, MergeProgress, PageMap, PageStore};

use super::idle::status_bytes;
use super::report::{Heading, Required, Row};
use super::{Output, Plan};
use crate::args::BenchMapArgs;
use crate::config::EngineConfig;

/// Of the smaller cache. The larger one is an agent's.
const SMALL_CACHE_MIB: usize = 16;

/// Blocks of a map that a TiB is reckoned from, at least: its last quarter adds more than a process moves by itself.
const RECKONED_FROM: u64 = 1 << 23;

/// Blocks of the volume with `--quick`. Three quarters of it have more records than the larger cache has room for.
const BLOCKS: u64 = 1 << 21;

const TIB: f64 = (1u64 << 40) as f64;

/// Of the capacity.
const SHARE_MAX: f64 = 0.0005;

/// Drive bytes of a random 4 KiB write at depth, about: of a log budget, the rest are other bytes.
const DRIVE_BYTES_A_BLOCK: u64 = 6500;

/// Blocks of a band of the largest chunks at 4+2.
const BAND_BLOCKS: u64 = 4 * 16_384;

/// What a connection asks of its socket at a time.
const RECEIVE_BYTES: usize = 64 << 10;

/// Measures the memory of maps.
///
/// # Errors
/// A process cannot be started, or does not do its work.
pub(super) fn run(plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    let config = EngineConfig::default();
    let blocks = BLOCKS * plan.scale;
    let checkpoint_blocks = u64::from(config.log_budget_mib) * MIB / DRIVE_BYTES_A_BLOCK;
    // At once: they only compete for time, which does not matter here.
    let children = [SMALL_CACHE_MIB, config.cache_mib as usize]
        .map(|cache_mib| start(blocks, cache_mib, checkpoint_blocks));
    let mut grown = Vec::new();
    for (child, cache_mib) in children
        .into_iter()
        .zip([SMALL_CACHE_MIB, config.cache_mib as usize])
    {
        let filled = finish(child?)?;
        let [most, whole] = &filled[..] else {
            anyhow::bail!("a map of {} samples", filled.len());
        };
        output.note(format!(
            "memory, cache {cache_mib} MiB: {:.0} GiB mapped, {:.1} MiB in the process ({:.1} when three quarters were); by the map's \
             own account {:.1} MiB of cache and {} records that no run has; {} runs of {:.0} MiB on drives",
            gib(whole.blocks),
            mib(whole.resident_bytes),
            mib(most.resident_bytes),
            mib(whole.cache_bytes),
            whole.records_in_memory,
            whole.runs,
            mib(whole.map_bytes),
        ));
        grown.push((most.clone(), whole.clone()));
    }
    let [(_, small), (most, whole)] = &grown[..] else {
        anyhow::bail!("two maps");
    };
    let heading = |workload: String, unit, floor_is, required| Heading {
        stage: "memory",
        workload,
        unit,
        floor_is,
        required,
        processes: 1,
        drive_kind: "memory",
    };
    if blocks >= RECKONED_FROM {
        let mapped = (whole.blocks * BLOCK_BYTES as u64) as f64;
        let per_byte = whole.resident_bytes.saturating_sub(most.resident_bytes) as f64 / (mapped / 4.0);
        let of_a_tib = whole.resident_bytes as f64 + per_byte * (TIB - mapped).max(0.0);
        output.row(Row::counted(
            heading(
                format!("1 TiB mapped at random 4 KiB, cache {} MiB", config.cache_mib),
                "MiB",
                "nothing",
                Required::ValueAtMost(SHARE_MAX * TIB / MIB as f64),
            ),
            of_a_tib / MIB as f64,
            0.0,
        ));
    } else {
        output.note(format!(
            "memory: a TiB is not reckoned from {:.0} GiB, whose last quarter adds less than a process moves by itself; without \
             --quick it is",
            gib(blocks)
        ));
    }
    let setting = (config.cache_mib as usize - SMALL_CACHE_MIB) as f64;
    output.row(Row::counted(
        heading(
            format!(
                "each MiB of cache from {SMALL_CACHE_MIB} to {} MiB",
                config.cache_mib
            ),
            "MiB",
            "the setting",
            Required::RatioAtMost(1.25),
        ),
        (mib(whole.resident_bytes) - mib(small.resident_bytes)) / setting,
        1.0,
    ));
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

fn gib(blocks: u64) -> f64 {
    blocks as f64 / (1 << 18) as f64
}

fn start(blocks: u64, cache_mib: usize, checkpoint_blocks: u64) -> anyhow::Result<Child> {
    Command::new(std::env::current_exe()?)
        .arg("bench-map")
        .args([
            blocks.to_string(),
            cache_mib.to_string(),
            checkpoint_blocks.to_string(),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start a process with a map")
}

fn finish(child: Child) -> anyhow::Result<Vec<Filled>> {
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "a process with a map ended with {}",
        output.status
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A map of so many blocks.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Filled {
    blocks: u64,
    /// Added to the process since before there was a map.
    resident_bytes: u64,
    cache_bytes: u64,
    records_in_memory: usize,
    runs: usize,
    map_bytes: u64,
}

/// Fills a map and prints what it took, at three quarters and in the end. Returns the exit code.
pub(crate) fn fill_map(args: BenchMapArgs) -> u8 {
    let filled = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(fill(args)))
        .and_then(|filled| Ok(serde_json::to_string(&filled)?));
    match filled {
        Ok(line) => {
            println!("{line}");
            0
        }
        Err(error) => {
            eprintln!("weft: {error:#}");
            1
        }
    }
}

async fn fill(args: BenchMapArgs) -> anyhow::Result<Vec<Filled>> {
    ensure!(
        args.blocks.is_power_of_two() && args.checkpoint_blocks > 0,
        "a number of blocks that is a power of two, and a checkpoint after some"
    );
    let before = own_bytes()?;
    let identity = MapIdentity {
        volume: VolumeId(1),
        layer: LayerId(1),
    };
    let settings = MapSettings {
        cache_bytes: args.cache_mib << 20,
        ..MapSettings::default()
    };
    let map = PageMap::new(identity, Rc::new(Store::new()?), settings);
    let mut filled = Vec::new();
    for index in 0..args.blocks {
        map.insert(scattered(index, args.blocks), entry(index));
        let (written, most) = (index + 1, args.blocks / 4 * 3);
        if written == most || written == args.blocks {
            fill_cache(&map, written, args).await?;
            let stats = map.stats();
            filled.push(Filled {
                blocks: written,
                resident_bytes: own_bytes()?.saturating_sub(before),
                cache_bytes: stats.cache.resident_bytes as u64,
                records_in_memory: stats.delta_records + stats.frozen_records,
                runs: stats.runs,
                map_bytes: stats.run_blocks * BLOCK_BYTES as u64,
            });
        }
        if written % args.checkpoint_blocks == 0 {
            map.freeze();
            map.write_frozen().await?;
            while map.merge_step(256, floor()).await? != MergeProgress::Idle {}
        }
    }
    Ok(filled)
}

/// Asks all over, until no more fits the cache.
async fn fill_cache(map: &Rc<PageMap>, written: u64, args: BenchMapArgs) -> anyhow::Result<()> {
    let mut random = SmallRng::seed_from_u64(6);
    // Each look brings a few blocks of the map, more than one that is new while the cache has room.
    for _ in 0..2 * (args.cache_mib << 20) / BLOCK_BYTES {
        let index = random.random_range(0..written);
        map.lookup(scattered(index, args.blocks)).await?;
    }
    Ok(())
}

/// The `index`-th block to be written: every one once, each far from the one before.
fn scattered(index: u64, blocks: u64) -> Lba {
    Lba(index.wrapping_mul(0x9e37_79b9_7f4a_7c15) & (blocks - 1))
}

fn entry(index: u64) -> MapEntry {
    place(1 + index / BAND_BLOCKS, index)
}

/// No range of zeroes is ever written here.
fn floor() -> Sequence {
    sequence(0)
}

fn sequence(counter: u64) -> Sequence {
    Sequence {
        epoch: Epoch(1),
        counter,
    }
}

fn place(band: u64, index: u64) -> MapEntry {
    MapEntry {
        band: BandId(band),
        row: (index % BAND_BLOCKS / 4) as u32,
        column: (index % 4) as u8,
        start: 0,
        w: 4,
        skipped: ColumnSet::NONE,
        sequence: sequence(index + 1),
        crc: index as u32,
    }
}

/// Anonymous memory of this process.
fn own_bytes() -> anyhow::Result<u64> {
    status_bytes("/proc/self/status", "RssAnon:")
}

/// Map blocks one after another in a file that lies in memory, but not in this process.
struct Store {
    file: File,
    next: Cell<u64>,
    received: RefCell<BytesMut>,
}

/// The first band of map blocks.
const MAP_BANDS: u64 = 1 << 32;

impl Store {
    fn new() -> anyhow::Result<Self> {
        let file = rustix::fs::memfd_create("weft-bench-map", MemfdFlags::CLOEXEC)?;
        Ok(Self {
            file: file.into(),
            next: Cell::new(0),
            received: RefCell::default(),
        })
    }

    fn put(&self, block: &MapBlock) -> Result<MapEntry, BlockError> {
        let index = self.next.get();
        self.next.set(index + 1);
        self.file
            .write_all_at(&block.data, index * BLOCK_BYTES as u64)
            .map_err(|_| BlockError::CapacityExceeded)?;
        Ok(place(MAP_BANDS + index / BAND_BLOCKS, index))
    }

    fn get(&self, place: MapEntry) -> Result<Bytes, BlockError> {
        let index = place.sequence.counter - 1;
        let mut received = self.received.borrow_mut();
        received.clear();
        // Answers to other commands came with it.
        received.resize(RECEIVE_BYTES, 0xa5);
        self.file
            .read_exact_at(&mut received[..BLOCK_BYTES], index * BLOCK_BYTES as u64)
            .map_err(|_| BlockError::Unknown)?;
        Ok(received.split_to(BLOCK_BYTES).freeze())
    }
}

impl PageStore for Store {
    fn append(&self, blocks: Vec<MapBlock>) -> LocalBoxFuture<'static, Result<Vec<MapEntry>, BlockError>> {
        ready(blocks.iter().map(|block| self.put(block)).collect()).boxed_local()
    }

    fn read(&self, _: Lba, place: MapEntry) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
        ready(self.get(place)).boxed_local()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_block_is_written_once() {
        let written: BTreeSet<u64> = (0..1024).map(|index| scattered(index, 1024).0).collect();
        assert_eq!(written.len(), 1024);
    }

    #[tokio::test]
    async fn a_filled_map_finds_what_it_has_and_its_cache_keeps_to_the_setting() {
        let filled = fill(BenchMapArgs {
            blocks: 1 << 18,
            cache_mib: 1,
            checkpoint_blocks: 10_000,
        })
        .await
        .unwrap();
        let [most, whole] = &filled[..] else {
            panic!("{filled:?}")
        };
        assert_eq!((most.blocks, whole.blocks), (3 << 16, 1 << 18));
        assert!(whole.map_bytes > 2 << 20 && whole.runs > 0);
        assert!((900_000..=1 << 20).contains(&whole.cache_bytes), "{whole:?}");
    }
}
