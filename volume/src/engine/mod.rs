//! The engine of one volume: what it is made of, and its life.
//!
//! ```text
//!  host ──► device ──► append ──► stripes on n drives ──► map ──► answer (lease)
//!  host ──► read ◄── map, drives, reconstruction
//!  background: supply (bands ahead of need) · checkpoint (map, root) · compaction (space)
//!  at open: recovery (scan, replay, re-append), then one takeover command
//! ```
//!
//! One thread, tasks on [`crate::seams::Env::spawn`]. What tasks share is [`Core`]; every change that another
//! task may wait for ends in `changed.notify()`.
//!
//! What it does not do: fence anybody, watch drives, decide who owns what. `node` does that, and opens an engine
//! under an [`EpochGrant`] once the former owner is fenced. `docs/design/engine.md` tells the reasons.

mod append;
mod block_read;
mod checkpoint;
mod compaction;
mod device;
mod flight;
mod health;
mod lease;
mod opening;
mod pages;
mod read;
mod rebuild;
mod recovery;
mod scan;
mod shard;
mod space;
mod stats;
mod supply;
mod work;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use weft_proto::band::{Band, ChunkAddress, EpochGrant, Geometry, RootPointer};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{BandId, Epoch, LayerId, Sequence, StripeNumber, VolumeId};
use weft_proto::units::BLOCK_BYTES;

use crate::band::{BandState, Phase};
use crate::error::VolumeError;
use crate::map::PageMap;
use crate::metrics::Counters;
use crate::seams::{BandPurpose, DirectoryError, Seams, Timestamp};
use crate::settings::{Identity, Settings};
use crate::stripes::StripeNumbers;
use crate::sync::{Notify, within};

use append::Stream;
use checkpoint::Checkpoints;
use health::Health;
use space::Space;
use work::Copy;

pub use opening::Opening;
pub use rebuild::Rebuilt;
pub use stats::Stats;

/// Whether the engine serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Not yet: recovering, or the first root is not committed.
    Opening,
    /// Serves.
    Serving,
    /// Finishes what it took and takes no more.
    Quiescing,
    /// Everything is in a published root; nothing happens any more.
    Closed,
    /// The epoch is over, or the drives refuse this incarnation: stopped at once.
    Fenced,
}

/// Everything the tasks of one engine share.
pub(crate) struct Core {
    pub(crate) seams: Seams,
    pub(crate) settings: Settings,
    pub(crate) identity: Identity,
    pub(crate) volume: VolumeId,
    pub(crate) layer: LayerId,
    pub(crate) epoch: Epoch,
    pub(crate) geometry: Geometry,
    pub(crate) size_bytes: Cell<u64>,
    pub(crate) ended: RefCell<Vec<(Epoch, StripeNumber)>>,
    pub(crate) life: Cell<Life>,
    /// Something that a task may wait for changed: bands, health, life, flights, space.
    pub(crate) changed: Rc<Notify>,
    /// There may be something to compact: a band was sealed, space is short.
    pub(crate) worth_compacting: Rc<Notify>,
    /// There may be something to append.
    pub(crate) pump: Rc<Notify>,
    map: OnceCell<Rc<PageMap>>,
    pub(crate) bands: RefCell<BTreeMap<BandId, Rc<BandState>>>,
    pub(crate) bands_opened: Cell<u64>,
    pub(crate) numbers: RefCell<StripeNumbers>,
    /// The last sequence counter given.
    counter: Cell<u64>,
    pub(crate) host: Stream,
    pub(crate) internal: Stream,
    /// The last band of both streams, while neither has another.
    pub(crate) full_unsealed: RefCell<Option<Rc<BandState>>>,
    pub(crate) health: Health,
    /// Copies under way, by LBA; see [`work::Copy`].
    pub(crate) copies: RefCell<BTreeMap<u64, Vec<Rc<Copy>>>>,
    pub(crate) lease_until: Cell<u64>,
    /// When the directory was last asked where chunks are.
    pub(crate) refreshed: Cell<Timestamp>,
    pub(crate) root: Cell<(u64, Option<RootPointer>)>,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) space: Space,
    pub(crate) counters: Counters,
}

/// The engine of one volume under one epoch. A cheap handle; see [`weft_block::BlockDevice`] for its I/O.
#[derive(Clone)]
pub struct Engine(pub(crate) Rc<Core>);

/// What a planned move hands over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quiesced {
    /// The epoch ends here: every stripe up to it is in the root.
    pub last: StripeNumber,
    /// Chunks that a write of this epoch may still reach.
    pub unsettled: Vec<ChunkAddress>,
    /// The version of the final root.
    pub root_version: u64,
    /// The final root.
    pub root: Option<RootPointer>,
}

impl Engine {
    /// Opens the volume under `grant`: creates it when it has no root, loads the root after a clean hand-over, and
    /// recovers `grant.recover` otherwise. Whoever wrote the recovered epoch must be fenced, on at least n − m
    /// of each listed band's drives, before this is called. Serves as soon as it returns.
    ///
    /// Nothing of the new epoch counts before its first root is committed, so a crash in here, or an error, is cured
    /// by opening again **under a new epoch**: stripe numbers and sequences of one epoch are given once. Only after
    /// [`VolumeError::TooManyMissing`], which is found out before anything is written, may the same grant be
    /// tried again.
    pub async fn open(
        seams: Seams,
        settings: Settings,
        identity: Identity,
        grant: EpochGrant,
    ) -> Result<Self, VolumeError> {
        Opening::new(seams, settings, identity, grant).open().await
    }

    /// The epoch it serves under.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.0.epoch
    }

    /// Whether hosts may be answered now.
    #[must_use]
    pub fn is_leased(&self) -> bool {
        self.0.is_leased()
    }

    /// Completes when the engine has stopped because its epoch is over or a drive refused it. The incarnation
    /// must exit then and come back as a new one.
    pub async fn fenced(&self) {
        loop {
            let changed = self.0.changed.changed();
            if self.0.life.get() == Life::Fenced {
                return;
            }
            changed.await;
        }
    }

    /// For a planned move and for a clean stop: finishes what is in flight, refuses what comes ([`NotReady`]),
    /// publishes a final root and answers what to hand over. The engine serves nothing afterwards, also after an error:
    /// then the next owner takes over as from a dead one.
    ///
    /// [`NotReady`]: weft_block::BlockError::NotReady
    pub async fn quiesce(&self) -> Result<Quiesced, VolumeError> {
        let core = &self.0;
        match core.life.get() {
            Life::Serving => core.life.set(Life::Quiescing),
            Life::Fenced => return Err(VolumeError::Fenced),
            Life::Opening | Life::Quiescing | Life::Closed => return Err(VolumeError::Closed),
        }
        core.changed.notify();
        core.worth_compacting.notify();
        core.pump.notify();
        if let Err(error) = core.finish().await {
            // It took its last write: only a takeover can bring the volume back.
            if !core.is_over() {
                core.stop(Life::Closed);
            }
            return Err(error);
        }
        let (root_version, root) = core.root.get();
        let last = core.numbers.borrow().last();
        let unsettled = core.unsettled_chunks();
        core.stop(Life::Closed);
        Ok(Quiesced {
            last,
            unsettled,
            root_version,
            root,
        })
    }

    /// Stops at once, as a crash would: what is waiting ends [`NotReady`], nothing is published.
    ///
    /// [`NotReady`]: weft_block::BlockError::NotReady
    pub fn abort(&self) {
        if !self.0.is_over() {
            self.0.stop(Life::Closed);
        }
    }

    /// For a deletion: stops as [`Self::abort`] does, and then waits until every write that was sent has ended, for at most
    /// `limit`. Answers the chunks that one may still reach, because it has not ended or because nobody knows how it did: they
    /// are nobody else's before this incarnation is fenced there.
    pub async fn abort_and_drain(&self, limit: Duration) -> Vec<ChunkAddress> {
        self.abort();
        if planted(Bug::DeleteDoesNotDrain) {
            return Vec::new();
        }
        let core = &self.0;
        let deadline = core.seams.env.now().after(limit);
        loop {
            let changed = core.changed.changed();
            if core.is_drained() || within(&*core.seams.env, deadline, changed).await.is_none() {
                return core.unsettled_chunks();
            }
        }
    }

    /// Publishes a checkpoint that covers everything visible now.
    pub async fn checkpoint(&self) -> Result<(), VolumeError> {
        self.0.checkpoint_now().await
    }

    /// Bytes sent to drives since the last checkpoint began: what a takeover has to scan.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.0.checkpoints.log_bytes()
    }

    /// Asks the directory where the bands' chunks are now: a rebuild has moved some. Reads that have to reconstruct ask by
    /// themselves from time to time.
    pub async fn refresh_bands(&self) {
        self.0.refresh_bands().await;
    }

    /// Rebuilds one column of a sealed band into a fresh chunk on another drive, and has it take the column's place: every shard
    /// that the other columns can prove, byte for byte. Reads go on, and use the new chunk afterwards. Only with the last step
    /// does anything change; an error changes nothing, and the next attempt takes another chunk. It stops between two steps
    /// when the engine does, and may be dropped: what it had asked for then waits for the end of the epoch.
    ///
    /// Which column when, and again after an error, is for whoever calls.
    ///
    /// # Errors
    /// [`VolumeError::TooManyMissing`] and [`VolumeError::Undecodable`] when what the map refers to cannot be computed now;
    /// [`VolumeError::BandChanged`] when the band was freed or rebuilt meanwhile; [`VolumeError::ReplacementNotWritten`];
    /// [`VolumeError::Directory`] without a drive for it.
    pub async fn rebuild(&self, band: BandId, column: u8) -> Result<Rebuilt, VolumeError> {
        self.0.rebuild(band, column).await
    }

    /// The bands that take no more appends, as the engine knows them: what can be rebuilt.
    #[must_use]
    pub fn sealed_bands(&self) -> Vec<Band> {
        self.0.sealed_bands()
    }

    /// Says whether the pool has little space left: then dead blocks are not left lying until this volume itself is refused.
    pub fn set_tight(&self, tight: bool) {
        if self.0.space.tight.replace(tight) != tight {
            self.0.map().survey_closely(tight);
            self.0.worth_compacting.notify();
        }
    }

    /// Bytes that the page map's cache holds now.
    #[must_use]
    pub fn cached_bytes(&self) -> usize {
        self.0.map().cached_bytes()
    }

    /// Another limit of the page map's cache than the setting, because other volumes want memory too. What does not fit is
    /// dropped now.
    pub fn set_cache_limit(&self, bytes_max: usize) {
        self.0.map().set_cache_limit(bytes_max);
    }

    /// The volume has grown to `size_bytes`.
    pub fn grow(&self, size_bytes: u64) {
        self.0.size_bytes.set(self.0.size_bytes.get().max(size_bytes));
    }

    /// Figures as of now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }
}

impl Core {
    fn new(seams: Seams, settings: Settings, identity: Identity, grant: &EpochGrant) -> Rc<Self> {
        let host = Stream::new(BandPurpose::User, settings.stripes_in_flight_max);
        let internal = Stream::new(BandPurpose::Internal, settings.internal_stripes_in_flight_max);
        Rc::new(Self {
            seams,
            settings,
            identity,
            volume: grant.volume,
            layer: grant.layer,
            epoch: grant.epoch,
            geometry: grant.geometry,
            size_bytes: Cell::new(grant.size_bytes),
            ended: RefCell::new(grant.ended.clone()),
            life: Cell::new(Life::Opening),
            changed: Rc::default(),
            worth_compacting: Rc::default(),
            pump: Rc::default(),
            map: OnceCell::new(),
            bands: RefCell::default(),
            bands_opened: Cell::new(0),
            numbers: RefCell::default(),
            counter: Cell::new(0),
            host,
            internal,
            full_unsealed: RefCell::default(),
            health: Health::default(),
            copies: RefCell::default(),
            lease_until: Cell::new(0),
            refreshed: Cell::new(Timestamp(0)),
            root: Cell::new((grant.root_version, grant.root)),
            checkpoints: Checkpoints::default(),
            space: Space::default(),
            counters: Counters::default(),
        })
    }

    fn start_background(self: &Rc<Self>) {
        let core = Rc::clone(self);
        self.spawn(async move { core.checkpoint_loop().await });
        let core = Rc::clone(self);
        self.spawn(async move { core.compaction_loop().await });
    }

    pub(crate) fn map(&self) -> &Rc<PageMap> {
        self.map.get().expect("the map is loaded before anything uses it")
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.seams.env.spawn(Box::pin(task));
    }

    pub(crate) async fn sleep(&self, duration: Duration) {
        let deadline = self.seams.env.now().after(duration);
        self.seams.env.sleep_until(deadline).await;
    }

    /// Waits for a change, or for the retry time where what is waited for changes outside of the engine.
    pub(crate) async fn changed_or_retry(&self, changed: crate::sync::Changed) {
        let deadline = self.seams.env.now().after(self.settings.retry);
        let _ = within(&*self.seams.env, deadline, Box::pin(changed)).await;
    }

    /// Whether the engine has stopped for good.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.life.get(), Life::Closed | Life::Fenced)
    }

    /// The next sequence. Never repeats: the epoch is ours alone, and the counter only grows.
    pub(crate) fn next_sequence(&self) -> Sequence {
        let counter = self.counter.get() + 1;
        self.counter.set(counter);
        Sequence {
            epoch: self.epoch,
            counter,
        }
    }

    /// The last sequence given.
    pub(crate) fn last_sequence(&self) -> Sequence {
        Sequence {
            epoch: self.epoch,
            counter: self.counter.get(),
        }
    }

    pub(crate) fn band(&self, id: BandId) -> Option<Rc<BandState>> {
        self.bands.borrow().get(&id).cloned()
    }

    /// Enters a band of this or an earlier epoch.
    pub(crate) fn add_band(&self, band: Band, phase: Phase) -> Rc<BandState> {
        let order = self.bands_opened.get() + 1;
        self.bands_opened.set(order);
        let state = BandState::new(band, phase, order);
        self.bands.borrow_mut().insert(state.id, Rc::clone(&state));
        state
    }

    /// The directory or a drive says that the epoch is over.
    pub(crate) fn fence(&self) {
        if !self.is_over() {
            tracing::warn!(volume = %self.volume, epoch = %self.epoch, "fenced: the engine stops");
            self.stop(Life::Fenced);
        }
    }

    /// Ends everything: no answer is given from here on but [`weft_block::BlockError::NotReady`].
    fn stop(&self, life: Life) {
        self.life.set(life);
        self.host.fail_all();
        self.internal.fail_all();
        self.changed.notify();
        self.worth_compacting.notify();
        self.pump.notify();
    }

    /// What an error of the directory means for the engine.
    pub(crate) fn directory_error(&self, error: &DirectoryError) -> Option<VolumeError> {
        match error {
            DirectoryError::Stale { .. }
            | DirectoryError::RootConflict { .. }
            | DirectoryError::NoSuchVolume => {
                self.fence();
                Some(VolumeError::Fenced)
            }
            DirectoryError::BandChanged { .. }
            | DirectoryError::NoSpace
            | DirectoryError::TooFewDomains { .. }
            | DirectoryError::Unavailable => None,
        }
    }

    /// The size in blocks of the map.
    pub(crate) fn size_blocks(&self) -> u64 {
        self.size_bytes.get() / BLOCK_BYTES as u64
    }
}

/// A core that does not keep itself alive through what it owns.
#[derive(Clone)]
pub(crate) struct WeakCore(pub(crate) Weak<Core>);

#[cfg(test)]
mod tests;
