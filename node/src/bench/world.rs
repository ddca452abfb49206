//! What an engine needs from outside, at its cheapest: a directory in memory that grants bands on a fixed set of
//! devices and takes freed ones back, and a lease that always holds. No fencing, no failures, nothing durable. The pool
//! keeps the reserve that the metadata service would, and says when it is tight as that does.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use futures_util::FutureExt as _;
use futures_util::future::{LocalBoxFuture, ready};
use weft_block::Device;
use weft_metadata::state::reserve::{PoolSpace, internal_reserve_mib};
use weft_metadata::state::space::DriveSpace;
use weft_proto::band::{
    Band, ChunkAddress, ChunkSize, EpochGrant, Geometry, Replacement, RootUpdate, WINDOW_ROWS_DEFAULT,
};
use weft_proto::id::{BandId, ClusterId, DriveId, Epoch, LayerId, StripeNumber, VolumeId};
use weft_proto::units::MIB;
use weft_volume::engine::Engine;
use weft_volume::format::header::HeaderKey;
use weft_volume::seams::{BandPurpose, Directory, DirectoryError, Drives, Env, Lease, Seams, Timestamp};
use weft_volume::settings::{Identity, Settings};

use crate::agent::env::TokioEnv;

const VOLUME: VolumeId = VolumeId(1);

/// See the module.
pub(super) struct World {
    env: Rc<TokioEnv>,
    devices: Vec<Device>,
    geometry: Geometry,
    tight: Cell<bool>,
    /// The largest that the volume takes.
    chunk_size: Cell<ChunkSize>,
    state: RefCell<State>,
}

struct State {
    /// Of each drive alike: every band has a chunk at the same offset of every drive.
    space: DriveSpace,
    granted: BTreeMap<BandId, Band>,
    last_band: u64,
    root_version: u64,
}

impl World {
    /// A pool of bands of `geometry` on devices of one size, as many as a band has columns.
    pub(super) fn new(geometry: Geometry, devices: Vec<Device>) -> Rc<Self> {
        assert_eq!(
            devices.len(),
            usize::from(geometry.n()),
            "a device for each column"
        );
        let mib = devices.first().map_or(0, |device| device.info().bytes() / MIB) as u32;
        Rc::new(Self {
            env: Rc::new(TokioEnv::new()),
            devices,
            geometry,
            tight: Cell::new(false),
            chunk_size: Cell::new(ChunkSize::Mib1),
            state: RefCell::new(State {
                // The first MiB is a label's.
                space: DriveSpace::new(1, mib),
                granted: BTreeMap::new(),
                last_band: 0,
                root_version: 0,
            }),
        })
    }

    /// Creates the volume and opens its engine. Within a `LocalSet`.
    ///
    /// # Errors
    /// The engine's.
    pub(super) async fn open(self: &Rc<Self>, settings: Settings, size_bytes: u64) -> anyhow::Result<Engine> {
        let chunk_size = ChunkSize::for_volume(size_bytes, self.geometry);
        self.chunk_size.set(chunk_size.min(settings.chunk_size_max));
        let seams = Seams {
            env: Rc::clone(&self.env) as Rc<dyn Env>,
            drives: Rc::clone(self) as Rc<dyn Drives>,
            lease: Rc::clone(self) as Rc<dyn Lease>,
            directory: Rc::clone(self) as Rc<dyn Directory>,
        };
        let identity = Identity {
            cluster: ClusterId([7; 16]),
            key: HeaderKey([9; 32]),
            name: "bench".into(),
        };
        let grant = EpochGrant::first(VOLUME, size_bytes, self.geometry);
        Ok(Engine::open(seams, settings, identity, grant).await?)
    }

    /// How full the pool is.
    pub(super) fn space(&self) -> PoolSpace {
        let columns = u64::from(self.geometry.n());
        let state = self.state.borrow();
        let capacity_mib = state.space.capacity_mib() * columns;
        let free_mib = state.space.free_mib() * columns;
        PoolSpace {
            capacity_mib,
            // All drives are filled alike.
            reach_mib: capacity_mib,
            free_mib,
            free_reach_mib: free_mib,
            quarantined_mib: 0,
            domains: u32::from(self.geometry.n()),
            // With as many drives as columns there is nowhere to rebuild to.
            rebuild_reserve_mib: 0,
            internal_reserve_mib: internal_reserve_mib([self.chunk_size.get()], self.geometry, capacity_mib),
            geometry: self.geometry,
        }
    }

    /// Tells the engine what the metadata service would tell it about the pool.
    pub(super) fn tell_tightness(&self, engine: &Engine) {
        let tight = self.space().is_tight(self.tight.get());
        self.tight.set(tight);
        engine.set_tight(tight);
    }

    /// The largest chunks that were granted.
    pub(super) fn chunk_size_max(&self) -> Option<ChunkSize> {
        let state = self.state.borrow();
        state.granted.values().map(|band| band.chunk_size).max()
    }

    fn publish(&self, update: &RootUpdate) -> Result<u64, DirectoryError> {
        let mut state = self.state.borrow_mut();
        if update.expected_version != state.root_version {
            return Err(DirectoryError::RootConflict {
                expected: update.expected_version,
                current: state.root_version,
            });
        }
        state.root_version += 1;
        for band in &update.freed {
            state.give_back(*band);
        }
        Ok(state.root_version)
    }
}

impl State {
    /// A chunk at the same offset of every drive, which leaves `reserve_mib` of each.
    fn take(&mut self, size: ChunkSize, reserve_mib: u64) -> Option<u32> {
        if self.space.free_mib() < u64::from(size.mib()) + reserve_mib {
            return None;
        }
        self.space.allocate(size)
    }

    fn give_back(&mut self, id: BandId) {
        if let Some(band) = self.granted.remove(&id) {
            self.space.release(band.columns[0].offset_mib, band.chunk_size);
        }
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
        Some(self.env.now())
    }
}

impl Directory for World {
    fn grant_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        chunk_size: ChunkSize,
        count: u32,
        purpose: BandPurpose,
    ) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        let columns = u64::from(self.geometry.n());
        let reserve = match purpose {
            BandPurpose::User => self.space().reserve_mib().div_ceil(columns),
            BandPurpose::Internal => 0,
        };
        let mut state = self.state.borrow_mut();
        let mut bands = Vec::new();
        for _ in 0..count {
            let Some(offset_mib) = state.take(chunk_size, reserve) else {
                break;
            };
            state.last_band += 1;
            let drives = 1..=self.devices.len() as u32;
            let band = Band {
                id: BandId(state.last_band),
                volume,
                layer: LayerId(1),
                epoch,
                geometry: self.geometry,
                chunk_size,
                window_rows: WINDOW_ROWS_DEFAULT,
                version: 1,
                columns: drives
                    .take(usize::from(self.geometry.n()))
                    .map(|drive| ChunkAddress {
                        drive: DriveId(drive),
                        offset_mib,
                    })
                    .collect(),
            };
            state.granted.insert(band.id, band.clone());
            bands.push(band);
        }
        let answer = if bands.is_empty() {
            Err(DirectoryError::NoSpace)
        } else {
            Ok(bands)
        };
        ready(answer).boxed_local()
    }

    fn publish_root(&self, update: RootUpdate) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        ready(self.publish(&update)).boxed_local()
    }

    fn finish_takeover(
        &self,
        update: RootUpdate,
        _: Option<Epoch>,
        _: StripeNumber,
    ) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        ready(self.publish(&update)).boxed_local()
    }

    fn bands(&self, _: VolumeId) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        let bands = self.state.borrow().granted.values().cloned().collect();
        ready(Ok(bands)).boxed_local()
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
        bands: Vec<BandId>,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>> {
        let mut state = self.state.borrow_mut();
        for band in bands {
            state.give_back(band);
        }
        ready(Ok(())).boxed_local()
    }
}
