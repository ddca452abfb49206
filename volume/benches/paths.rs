//! Hot paths of the engine over memory devices. See `benches/harness.rs`.
//!
//! Time stands still and tasks run in the order in which they are woken, so that every run does the same.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../../benches/harness.rs"]
mod harness;
#[path = "paths/world.rs"]
mod world;

use std::hint::black_box;
use std::process::ExitCode;
use std::rc::Rc;

use bytes::Bytes;
use weft_block::{BlockDevice as _, Durability};
use weft_proto::id::{Epoch, Sequence, VolumeId};
use weft_proto::units::{Lba, LbaRange};
use weft_volume::engine::Engine;
use weft_volume::format::checksum::block_crc;

use world::World;

/// Blocks of the volume.
const BLOCKS: u64 = 4096;

/// Commands outstanding.
const DEPTH: u64 = 128;

fn main() -> ExitCode {
    harness::main(
        env!("CARGO_MANIFEST_DIR"),
        &[
            ("128 random writes of 4 KiB at once, 4+2", || writes(DEPTH)),
            ("a write of 4 KiB by itself, 4+2", || writes(1)),
            ("128 random reads of 4 KiB at once, 4+2", reads),
            ("checksum of a block", checksum),
        ],
    )
}

fn noise(bytes: u32) -> Bytes {
    (0..bytes).map(|at| (at * 7 + at / 64) as u8).collect()
}

/// A volume that was written once.
fn filled() -> (Rc<World>, Engine) {
    let world = World::new();
    let engine = world.open(BLOCKS * 4096);
    let payload = noise(128 * 4096);
    for start in (0..BLOCKS).step_by(128) {
        let write = engine.write(Lba(start), vec![payload.clone()], Durability::Durable);
        world.run(write).unwrap();
    }
    (world, engine)
}

/// Places all over the volume, the same in every run.
fn places() -> impl FnMut() -> u64 {
    let mut next = 0;
    move || {
        next = (next + 1021) % BLOCKS;
        next
    }
}

fn writes(depth: u64) -> Box<dyn FnMut()> {
    let (world, engine) = filled();
    let (mut place, payload) = (places(), noise(4096));
    Box::new(move || {
        let write = |_| engine.write(Lba(place()), vec![payload.clone()], Durability::Durable);
        let all: Vec<_> = (0..depth).map(write).collect();
        for outcome in world.run(futures_util::future::join_all(all)) {
            outcome.unwrap();
        }
    })
}

fn reads() -> Box<dyn FnMut()> {
    let (world, engine) = filled();
    let mut place = places();
    Box::new(move || {
        let read = |_| {
            let start = Lba(place());
            engine.read(LbaRange { start, count: 1 })
        };
        let all: Vec<_> = (0..DEPTH).map(read).collect();
        for outcome in world.run(futures_util::future::join_all(all)) {
            black_box(outcome.unwrap());
        }
    })
}

fn checksum() -> Box<dyn FnMut()> {
    let block = noise(4096);
    let sequence = Sequence {
        epoch: Epoch(1),
        counter: 77,
    };
    Box::new(move || {
        let crc = block_crc(VolumeId(1), Lba(9), black_box(sequence), black_box(&block));
        black_box(crc);
    })
}
