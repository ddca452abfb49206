//! What an engine needs from outside, so that its instructions can be counted: a clock that stands still, tasks without a
//! runtime, devices that never wait, and a directory that grants one place after the other and takes none back.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::future::{LocalBoxFuture, pending, ready};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use weft_block::Device;
use weft_block::memory::MemoryDrive;
use weft_proto::band::{
    Band, ChunkAddress, ChunkSize, EpochGrant, Geometry, Replacement, RootUpdate, WINDOW_ROWS_DEFAULT,
};
use weft_proto::id::{BandId, ClusterId, DriveId, Epoch, LayerId, StripeNumber, VolumeId};
use weft_proto::units::MIB;
use weft_volume::engine::Engine;
use weft_volume::format::header::HeaderKey;
use weft_volume::seams::{BandPurpose, Directory, DirectoryError, Drives, Env, Lease, Seams, Timestamp};
use weft_volume::settings::{GarbageMax, Identity, Settings};

const GEOMETRY: Geometry = Geometry { k: 4, m: 2 };

/// Of each device: for all the writes of a benchmark.
const DEVICE_BYTES: u64 = 256 * MIB;

/// See the module.
pub(crate) struct World {
    devices: Vec<Device>,
    tasks: RefCell<FuturesUnordered<LocalBoxFuture<'static, ()>>>,
    spawned: RefCell<Vec<LocalBoxFuture<'static, ()>>>,
    bands: Cell<u64>,
    /// The first MiB of each device is a label's.
    next_mib: Cell<u32>,
    root_version: Cell<u64>,
}

impl World {
    pub(crate) fn new() -> Rc<Self> {
        let devices = (0..GEOMETRY.n()).map(|_| MemoryDrive::device(DEVICE_BYTES));
        Rc::new(Self {
            devices: devices.collect(),
            tasks: RefCell::default(),
            spawned: RefCell::default(),
            bands: Cell::new(0),
            next_mib: Cell::new(1),
            root_version: Cell::new(0),
        })
    }

    /// A new volume.
    pub(crate) fn open(self: &Rc<Self>, size_bytes: u64) -> Engine {
        let seams = Seams {
            env: Rc::clone(self) as Rc<dyn Env>,
            drives: Rc::clone(self) as Rc<dyn Drives>,
            lease: Rc::clone(self) as Rc<dyn Lease>,
            directory: Rc::clone(self) as Rc<dyn Directory>,
        };
        let identity = Identity {
            cluster: ClusterId([7; 16]),
            key: HeaderKey([9; 32]),
            name: "bench".into(),
        };
        let grant = EpochGrant::first(VolumeId(1), size_bytes, GEOMETRY);
        // No checkpoint and no compaction comes in between: one write is like the next.
        let settings = Settings {
            log_budget_bytes: u64::MAX,
            garbage_max: GarbageMax::always(1.0),
            ..Settings::default()
        };
        self.run(Engine::open(seams, settings, identity, grant)).unwrap()
    }

    /// Runs `future` to its end, and every task as far as it gets.
    pub(crate) fn run<T>(&self, future: impl Future<Output = T>) -> T {
        let woken = Arc::new(Woken(AtomicBool::new(true)));
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            let spawned = self.spawned.take();
            let went_on = woken.0.swap(false, Ordering::Relaxed) || !spawned.is_empty();
            assert!(went_on, "everything waits for something that does not come");
            let mut tasks = self.tasks.borrow_mut();
            tasks.extend(spawned);
            while let Poll::Ready(Some(())) = tasks.poll_next_unpin(&mut context) {}
        }
    }
}

/// Whether a task has been woken.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Env for World {
    fn now(&self) -> Timestamp {
        Timestamp(1 << 40)
    }

    fn sleep_until(&self, _: Timestamp) -> LocalBoxFuture<'static, ()> {
        pending().boxed_local()
    }

    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        self.spawned.borrow_mut().push(task);
    }

    fn random_u64(&self) -> u64 {
        4
    }
}

impl Drives for World {
    fn device(&self, drive: DriveId) -> Option<Device> {
        self.devices
            .get(usize::try_from(drive.0).ok()?.checked_sub(1)?)
            .cloned()
    }
}

impl Lease for World {
    fn confirmed_at(&self, _: DriveId) -> Option<Timestamp> {
        Some(self.now())
    }
}

impl World {
    fn grant(&self, volume: VolumeId, epoch: Epoch, chunk_size: ChunkSize) -> Result<Band, DirectoryError> {
        let offset_mib = self.next_mib.get();
        if u64::from(offset_mib + chunk_size.mib()) * MIB > DEVICE_BYTES {
            return Err(DirectoryError::NoSpace);
        }
        self.next_mib.set(offset_mib + chunk_size.mib());
        self.bands.set(self.bands.get() + 1);
        let drives = 1..=u32::from(GEOMETRY.n());
        Ok(Band {
            id: BandId(self.bands.get()),
            volume,
            layer: LayerId(1),
            epoch,
            geometry: GEOMETRY,
            chunk_size,
            window_rows: WINDOW_ROWS_DEFAULT,
            version: 1,
            columns: drives
                .map(|drive| ChunkAddress {
                    drive: DriveId(drive),
                    offset_mib,
                })
                .collect(),
        })
    }

    fn publish(&self) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        self.root_version.set(self.root_version.get() + 1);
        ready(Ok(self.root_version.get())).boxed_local()
    }
}

impl Directory for World {
    fn grant_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        chunk_size: ChunkSize,
        _: u32,
        _: BandPurpose,
    ) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        ready(self.grant(volume, epoch, chunk_size).map(|band| vec![band])).boxed_local()
    }

    fn publish_root(&self, _: RootUpdate) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        self.publish()
    }

    fn finish_takeover(
        &self,
        _: RootUpdate,
        _: Option<Epoch>,
        _: StripeNumber,
    ) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        self.publish()
    }

    fn bands(&self, _: VolumeId) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        // The engine has what it was granted, and no chunk ever moves.
        ready(Ok(Vec::new())).boxed_local()
    }

    fn grant_replacement(
        &self,
        _: VolumeId,
        _: Epoch,
        _: BandId,
        _: u8,
        _: u64,
    ) -> LocalBoxFuture<'static, Result<Replacement, DirectoryError>> {
        // Nothing is lost here, and there are no drives but those of the bands.
        ready(Err(DirectoryError::NoSpace)).boxed_local()
    }

    fn install_replacement(
        &self,
        _: VolumeId,
        _: Epoch,
        replacement: Replacement,
        _: bool,
    ) -> LocalBoxFuture<'static, Result<Band, DirectoryError>> {
        let band = replacement.band;
        ready(Err(DirectoryError::BandChanged { band })).boxed_local()
    }

    fn return_replacement(
        &self,
        _: VolumeId,
        _: Epoch,
        _: Replacement,
        _: bool,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>> {
        ready(Ok(())).boxed_local()
    }

    fn return_bands(
        &self,
        _: VolumeId,
        _: Epoch,
        _: Vec<BandId>,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>> {
        ready(Ok(())).boxed_local()
    }
}
