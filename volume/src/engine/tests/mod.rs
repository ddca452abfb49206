//! The engine on simulated drives: what S's model and crash harness in `volume/tests` do not look at closely.

mod degraded;
mod life;
mod rebuild;
mod space;

use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use weft_block::{BlockDevice, BlockError, Durability};
use weft_proto::band::Geometry;
use weft_proto::id::{ClusterId, DriveId, IncarnationId, VolumeId};
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange, MIB};

use super::{Engine, Opening};
use crate::error::VolumeError;
use crate::format::header::HeaderKey;
use crate::settings::{Identity, Settings};
use crate::testing::World;
use crate::testing::cluster::{Takeover, add_drives, take_over};
use crate::testing::drive::{DriveSpec, Health};
use crate::testing::rng::Rng;
use crate::testing::world::InFlight;

const VOLUME: VolumeId = VolumeId(7);

/// A world with one volume, its present owner, and what every block should read as.
struct Fixture {
    world: Rc<World>,
    settings: Settings,
    owner: Takeover,
    engine: Engine,
    model: BTreeMap<u64, u64>,
    rng: Rng,
}

fn identity() -> Identity {
    Identity {
        cluster: ClusterId([9; 16]),
        key: HeaderKey([3; 32]),
        name: "database".into(),
    }
}

fn small() -> Settings {
    Settings {
        log_budget_bytes: 4 * MIB,
        ..Settings::default()
    }
}

/// A block whose bytes follow from a number; 0 is the zero block.
fn block(fill: u64) -> Bytes {
    let mut bytes = vec![0; BLOCK_BYTES];
    if fill != 0 {
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&(fill.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ index as u64).to_le_bytes());
        }
    }
    Bytes::from(bytes)
}

impl Fixture {
    fn new(drives: u32, size_mib: u32, geometry: Geometry, volume_bytes: u64) -> Self {
        Self::with(drives, size_mib, geometry, volume_bytes, small())
    }

    fn with(drives: u32, size_mib: u32, geometry: Geometry, volume_bytes: u64, settings: Settings) -> Self {
        let world = World::new(1);
        add_drives(&world, drives, &DriveSpec::new(size_mib, 0));
        world.create_volume(VOLUME, volume_bytes, geometry);
        let owner = take_over(&world, VOLUME).expect("not stopped");
        let engine = open(&world, &owner, &settings).expect("opens");
        Self {
            world,
            settings,
            owner,
            engine,
            model: BTreeMap::new(),
            rng: Rng::new(5),
        }
    }

    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        self.world
            .block_on(self.owner.incarnation, future)
            .expect("not stopped")
    }

    fn write(&mut self, lba: u64, fills: &[u64]) -> Result<(), BlockError> {
        let data = fills.iter().map(|fill| block(*fill)).collect();
        let result = self.run(self.engine.write(Lba(lba), data, Durability::Cached));
        if result.is_ok() {
            for (lba, fill) in (lba..).zip(fills) {
                self.model.insert(lba, *fill);
            }
        }
        result
    }

    /// Many writes at once, of one block each.
    fn write_all(&mut self, writes: &[(u64, u64)]) {
        let futures: Vec<_> = writes
            .iter()
            .map(|(lba, fill)| {
                self.engine
                    .write(Lba(*lba), vec![block(*fill)], Durability::Cached)
            })
            .collect();
        for result in self.run(futures_util::future::join_all(futures)) {
            result.expect("written");
        }
        self.model.extend(writes.iter().copied());
    }

    fn read(&self, lba: u64, count: u64) -> Result<Bytes, BlockError> {
        self.run(self.engine.read(LbaRange {
            start: Lba(lba),
            count,
        }))
    }

    fn check(&self, lba: u64, count: u64) {
        let bytes = self.read(lba, count).expect("read");
        for (index, found) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            let fill = self.model.get(&(lba + index as u64)).copied().unwrap_or(0);
            assert!(
                found == block(fill),
                "block {} is not version {fill}",
                lba + index as u64
            );
        }
    }

    fn check_all(&self) {
        let end = self.model.keys().last().map_or(1, |last| last + 1);
        for lba in (0..end).step_by(64) {
            self.check(lba, 64.min(end - lba));
        }
    }

    fn checkpoint(&self) {
        let engine = self.engine.clone();
        self.run(async move { engine.checkpoint().await })
            .expect("checkpoint");
    }

    /// The owner dies; another one takes over.
    fn fail_over(&mut self) {
        self.try_fail_over().expect("recovers");
    }

    fn try_fail_over(&mut self) -> Result<(), VolumeError> {
        self.world.crash(self.owner.incarnation, InFlight::Mixed);
        self.owner = take_over(&self.world, VOLUME).expect("not stopped");
        self.engine = open(&self.world, &self.owner, &self.settings)?;
        Ok(())
    }

    /// A planned move.
    fn move_over(&mut self) {
        let engine = self.engine.clone();
        let quiesced = self.run(async move { engine.quiesce().await }).expect("quiesced");
        self.world
            .hand_over(VOLUME, self.engine.epoch(), quiesced.last, &quiesced.unsettled)
            .expect("handed over");
        self.owner = take_over(&self.world, VOLUME).expect("not stopped");
        assert_eq!(self.owner.grant.recover, None);
        self.engine = open(&self.world, &self.owner, &self.settings).expect("opens");
    }

    fn set_health(&self, drive: u32, health: Health) {
        self.world.drive(DriveId(drive)).set_health(health);
    }
}

fn open(world: &Rc<World>, owner: &Takeover, settings: &Settings) -> Result<Engine, VolumeError> {
    let incarnation: IncarnationId = owner.incarnation;
    let opening = Engine::open(
        owner.seams.clone(),
        settings.clone(),
        identity(),
        owner.grant.clone(),
    );
    world.block_on(incarnation, opening).expect("not stopped")
}
