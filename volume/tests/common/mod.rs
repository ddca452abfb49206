//! What the model and the crash tests share: a fabric in one simulated world, a host on it, and the questions asked
//! after each bad day.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use weft_block::{BlockDevice, BlockError, Durability};
use weft_proto::band::{ChunkSize, Geometry};
use weft_proto::id::{BandId, ClusterId, DriveId, IncarnationId, VolumeId};
use weft_proto::units::{Lba, LbaRange};
use weft_volume::engine::Engine;
use weft_volume::error::VolumeError;
use weft_volume::format::header::HeaderKey;
use weft_volume::map::{MapError, MapSettings};
use weft_volume::seams::Env;
use weft_volume::settings::{Identity, Settings};
use weft_volume::testing::World;
use weft_volume::testing::cluster::{Takeover, add_drives, readmit, take_over};
use weft_volume::testing::drive::{DriveSpec, Health};
use weft_volume::testing::metadata::MetadataSpec;
use weft_volume::testing::monitor::assert_clean;
use weft_volume::testing::oracle::{Oracle, contents};
use weft_volume::testing::rng::Rng;
use weft_volume::testing::world::{InFlight, Stopped};

pub const VOLUME: VolumeId = VolumeId(3);

/// What a test runs on.
#[derive(Clone)]
pub struct Spec {
    pub geometry: Geometry,
    pub drives: u32,
    pub drive: DriveSpec,
    pub blocks: u64,
    pub metadata: MetadataSpec,
    pub settings: Settings,
}

impl Spec {
    /// k+m on `drives` drives of 16 MiB, a volume of 1 MiB, and an engine that checkpoints and compacts often.
    pub fn new(k: u8, m: u8, drives: u32) -> Self {
        let settings = Settings {
            chunk_size_max: ChunkSize::Mib1,
            log_budget_bytes: 2 << 20,
            map: MapSettings {
                // A cache of a few blocks, so that maps are read from drives.
                cache_bytes: 64 << 10,
                runs_max: 4,
                merge_fan_in: 2,
                ..MapSettings::default()
            },
            ..Settings::default()
        };
        Self {
            geometry: Geometry { k, m },
            drives,
            drive: DriveSpec::new(16, 0),
            blocks: 256,
            metadata: MetadataSpec {
                reserve_mib: 2,
                ..MetadataSpec::default()
            },
            settings,
        }
    }
}

/// Drives, a metadata service and a volume, with the oracle that watches it.
pub struct Fabric {
    pub world: Rc<World>,
    pub oracle: Rc<RefCell<Oracle>>,
    pub spec: Spec,
    pub mark: Rc<Cell<u64>>,
}

/// An incarnation with an engine that serves.
pub struct Owner {
    pub takeover: Takeover,
    pub host: Host,
}

impl Owner {
    pub fn incarnation(&self) -> IncarnationId {
        self.takeover.incarnation
    }
}

impl Fabric {
    pub fn new(seed: u64, spec: Spec) -> Self {
        let world = World::new(seed);
        world.trace_effects(std::env::var_os("WEFT_TRACE").is_some());
        add_drives(&world, spec.drives, &spec.drive);
        world.configure_metadata(spec.metadata.clone());
        world.create_volume(VOLUME, spec.blocks * 4096, spec.geometry);
        Self {
            world,
            oracle: Rc::default(),
            spec,
            mark: Rc::default(),
        }
    }

    /// Takes the volume over and opens an engine, whatever comes of it.
    pub fn try_open(&self) -> Result<Result<Owner, VolumeError>, Stopped> {
        let takeover = take_over(&self.world, VOLUME)?;
        let identity = Identity {
            cluster: ClusterId([7; 16]),
            key: HeaderKey([9; 32]),
            name: "simulated".into(),
        };
        let open = Engine::open(
            takeover.seams.clone(),
            self.spec.settings.clone(),
            identity,
            takeover.grant.clone(),
        );
        let opened = self.world.block_on(takeover.incarnation, open)?;
        Ok(opened.map(|engine| {
            self.oracle.borrow_mut().settle();
            let host = Host {
                world: Rc::downgrade(&self.world),
                env: self.world.env(takeover.incarnation),
                oracle: Rc::clone(&self.oracle),
                engine,
                mark: Rc::clone(&self.mark),
            };
            Owner { takeover, host }
        }))
    }

    /// Takes the volume over where nothing may fail.
    pub fn open(&self) -> Owner {
        match self.try_open() {
            Ok(Ok(owner)) => owner,
            Ok(Err(error)) => panic!("seed {}: open: {error}", self.world.seed()),
            Err(Stopped) => panic!("nobody asked to stop"),
        }
    }

    /// Kills every agent that lives.
    pub fn crash(&self, in_flight: InFlight) {
        for incarnation in self.world.living() {
            self.world.crash(incarnation, in_flight);
        }
        self.oracle.borrow_mut().all_unknown();
    }

    /// Stops every agent that lives, as SIGSTOP does. What it was asked may still happen.
    pub fn sleep_all(&self) {
        self.world.go_on();
        for incarnation in self.world.living() {
            self.world.pause(incarnation);
        }
        self.oracle.borrow_mut().all_unknown();
    }

    /// Runs `future` on the owner where nothing stops it.
    pub fn run<T: 'static>(&self, owner: &Owner, future: impl Future<Output = T> + 'static) -> T {
        self.world
            .block_on(owner.incarnation(), future)
            .expect("nobody asked to stop")
    }

    /// Reads the whole volume; what it read and all before must be explained, and no rule broken.
    pub fn verify(&self, owner: &Owner, what: &str) {
        let blocks = self.spec.blocks;
        let host = owner.host.clone();
        self.run(owner, async move {
            let step = 32;
            let reads = (0..blocks).step_by(step as usize);
            let reads = join_all(reads.map(|start| host.read(start, step.min(blocks - start)))).await;
            assert!(reads.iter().all(Result::is_ok), "the owner serves");
        });
        self.check(what);
    }

    /// Whether everything so far can be explained, and no rule was broken.
    pub fn check(&self, what: &str) {
        if let Err(violation) = self.oracle.borrow().check() {
            panic!("seed {}, {what}: {violation}", self.world.seed());
        }
        assert_clean(&self.world);
    }

    pub fn revive(&self, owner: &Owner, drive: DriveId) {
        self.world.drive(drive).set_health(Health::Serving);
        let readmitted = readmit(&self.world, VOLUME, owner.incarnation(), drive);
        assert_eq!(readmitted, Ok(true));
    }
}

/// A host on the volume. Every operation is told to the oracle.
#[derive(Clone)]
pub struct Host {
    world: Weak<World>,
    pub env: Rc<dyn Env>,
    oracle: Rc<RefCell<Oracle>>,
    pub engine: Engine,
    mark: Rc<Cell<u64>>,
}

fn range(start: u64, count: u64) -> LbaRange {
    LbaRange {
        start: Lba(start),
        count,
    }
}

impl Host {
    pub fn world(&self) -> Rc<World> {
        self.world.upgrade().expect("the world outlives its hosts")
    }

    /// Effects before this are the test's preparation.
    pub fn mark(&self) {
        self.mark.set(self.world().effects());
    }

    pub async fn sleep(&self, duration: Duration) {
        self.env.sleep_until(self.env.now().after(duration)).await;
    }

    pub async fn write(&self, start: u64, count: u64) -> Result<(), BlockError> {
        let range = range(start, count);
        let id = self.oracle.borrow_mut().write(range);
        let data = contents(id, range);
        let write = self.engine.write(range.start, vec![data], Durability::Durable);
        let result = write.await;
        self.ended(id, &result);
        result
    }

    pub async fn zeroes(&self, start: u64, count: u64) -> Result<(), BlockError> {
        let range = range(start, count);
        let id = self.oracle.borrow_mut().zeroes(range);
        let write = self.engine.write_zeroes(range, false, Durability::Durable);
        let result = write.await;
        self.ended(id, &result);
        result
    }

    pub async fn trim(&self, start: u64, count: u64) -> Result<(), BlockError> {
        let range = range(start, count);
        let id = self.oracle.borrow_mut().zeroes(range);
        let result = self.engine.deallocate(vec![range]).await;
        self.ended(id, &result);
        result
    }

    /// Reads, and leaves the judgement to the oracle. An error other than "not on this path" is a failure: redundancy covers
    /// whatever these tests break.
    pub async fn read(&self, start: u64, count: u64) -> Result<(), BlockError> {
        let range = range(start, count);
        let id = self.oracle.borrow_mut().read(range);
        let result = self.engine.read(range).await;
        match result {
            Ok(bytes) => {
                // Remembered by the oracle, and reported at its next check.
                let _ = self.oracle.borrow_mut().answered(id, &bytes);
                Ok(())
            }
            Err(BlockError::NotReady) => Err(BlockError::NotReady),
            Err(error) => panic!("read of {count} blocks at {start}: {error}"),
        }
    }

    fn ended(&self, id: weft_volume::testing::oracle::OperationId, result: &Result<(), BlockError>) {
        let mut oracle = self.oracle.borrow_mut();
        match result {
            Ok(()) => oracle.acknowledged(id),
            // An engine that stops with a stripe in flight cannot say whether the next owner finds it.
            Err(BlockError::Unknown | BlockError::NotReady) => oracle.unknown(id),
            Err(_) => oracle.refused(id),
        }
    }

    /// A write that has to succeed while this owner is one.
    pub async fn put(&self, start: u64, count: u64) {
        let result = self.write(start, count).await;
        self.must(result).await;
    }

    /// A TRIM that has to succeed while this owner is one.
    pub async fn discard(&self, start: u64, count: u64) {
        let result = self.trim(start, count).await;
        self.must(result).await;
    }

    /// A checkpoint that has to succeed while this owner is one.
    pub async fn checkpoint(&self) {
        match self.engine.checkpoint().await {
            Ok(()) => {}
            Err(
                VolumeError::Fenced
                | VolumeError::Closed
                | VolumeError::Map(MapError::Store(BlockError::NotReady)),
            ) => std::future::pending().await,
            Err(error) => panic!("checkpoint: {error}"),
        }
    }

    /// A rebuild that goes well, or ends by a name that drives and other owners can be the reason for.
    pub async fn rebuild(&self, band: BandId, column: u8) -> bool {
        match self.engine.rebuild(band, column).await {
            Ok(_) => true,
            Err(
                VolumeError::BandChanged { .. }
                | VolumeError::UnknownBand { .. }
                | VolumeError::TooManyMissing { .. }
                | VolumeError::ReplacementNotWritten { .. }
                | VolumeError::Directory(_),
            ) => false,
            Err(VolumeError::Fenced | VolumeError::Closed) => std::future::pending().await,
            Err(error) => panic!("rebuild of column {column} of {band}: {error}"),
        }
    }

    /// A script of an owner that was stopped and has woken up fenced goes no further.
    async fn must(&self, result: Result<(), BlockError>) {
        match result {
            Ok(()) => {}
            Err(BlockError::NotReady) => std::future::pending().await,
            Err(error) => panic!("a volume with drives and space does not refuse: {error}"),
        }
    }
}

/// The seeds to run: `WEFT_SEEDS=from..to` or `WEFT_SEEDS=n`, else `default`.
pub fn seeds(default: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("WEFT_SEEDS") else {
        return default;
    };
    let number = |text: &str| {
        text.trim()
            .parse::<u64>()
            .expect("WEFT_SEEDS is a number or from..to")
    };
    match text.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => number(&text)..number(&text) + 1,
    }
}

/// A random operation on the volume. False when it is not served here any more.
pub async fn random_operation(host: &Host, rng: &mut Rng, blocks: u64) -> bool {
    let count = match rng.below(4) {
        0 => 1,
        1 => rng.between(1, 4),
        2 => rng.between(1, 16),
        _ => rng.between(1, 64),
    };
    let count = count.min(blocks);
    let start = rng.below(blocks - count + 1);
    let result = match rng.below(16) {
        0..=7 => host.write(start, count).await,
        8 => host.zeroes(start, count).await,
        9 => host.trim(start, count).await,
        _ => host.read(start, count).await,
    };
    match result {
        Ok(()) | Err(BlockError::CapacityExceeded) => true,
        Err(BlockError::NotReady | BlockError::Unknown) => false,
        Err(error) => panic!("{error}"),
    }
}
