//! What the engine needs from outside. The engine owns these traits; `node` implements them over the
//! initiator, the metadata service and tokio, and tests over memory and a simulated clock.
//!
//! Architecture invariant: this crate reads no clock, draws no randomness, opens nothing and spawns on no
//! runtime of its own.

use std::rc::Rc;

use futures_util::future::LocalBoxFuture;
use weft_block::Device;
use weft_proto::band::{Band, ChunkSize, Replacement, RootUpdate};
use weft_proto::id::{BandId, DriveId, Epoch, HostId, StripeNumber, VolumeId};

/// Nanoseconds on a monotonic clock with an arbitrary origin, the same for everything in one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// This much later.
    #[must_use]
    pub fn after(self, duration: std::time::Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

/// Clock, timers, tasks and randomness of the thread the engine lives on.
pub trait Env {
    /// Now.
    fn now(&self) -> Timestamp;
    /// Completes at or after `deadline`.
    fn sleep_until(&self, deadline: Timestamp) -> LocalBoxFuture<'static, ()>;
    /// Runs a task on this thread until it ends.
    fn spawn(&self, task: LocalBoxFuture<'static, ()>);
    /// A random number, seeded in tests.
    fn random_u64(&self) -> u64;
}

/// The drives of the cluster as this node reaches them: local or over the fabric, with the incarnation's identity.
pub trait Drives {
    /// `None` while the drive is unreachable or unknown. Offsets are the drive namespace's own.
    fn device(&self, drive: DriveId) -> Option<Device>;
}

/// What the lease knows of each drive (design section 5, "The owner's lease comes from the drives").
pub trait Lease {
    /// When the last check of this incarnation's registration on `drive` that succeeded was **sent**.
    fn confirmed_at(&self, drive: DriveId) -> Option<Timestamp>;
}

/// The metadata service, as the engine uses it: per band and per root, never per I/O.
///
/// Every call carries (volume, epoch) and is refused when stale. Implementations retry until they have an
/// answer from a leader; a lost answer is retried with the same content, and the service recognises it.
pub trait Directory {
    /// Asks for `count` fresh bands for `epoch`.
    fn grant_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        chunk_size: ChunkSize,
        count: u32,
        purpose: BandPurpose,
    ) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>>;

    /// Records a checkpoint, by compare-and-swap; answers the new root version.
    fn publish_root(&self, update: RootUpdate) -> LocalBoxFuture<'static, Result<u64, DirectoryError>>;

    /// Ends `recovered` at `ended_at` and makes `update.epoch` the serving epoch, in one command.
    /// Until it is committed nothing of the new epoch counts.
    fn finish_takeover(
        &self,
        update: RootUpdate,
        recovered: Option<Epoch>,
        ended_at: StripeNumber,
    ) -> LocalBoxFuture<'static, Result<u64, DirectoryError>>;

    /// The volume's bands as they are now: chunks may have been replaced by a rebuild.
    fn bands(&self, volume: VolumeId) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>>;

    /// Asks for a fresh chunk for an attempt to rebuild `column` of `band`, which the caller knows at `version`. A call after
    /// [`DirectoryError::Unavailable`] is another attempt, with another chunk; the earlier one is given up.
    fn grant_replacement(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        band: BandId,
        column: u8,
        version: u64,
    ) -> LocalBoxFuture<'static, Result<Replacement, DirectoryError>>;

    /// Puts a rebuilt chunk in its column's place, by compare-and-swap on the band's version; answers the band as it is then.
    /// Every write that was sent to the chunk has completed, durably, and no other will be sent. `settled` says whether every
    /// write of this epoch to the chunk that is replaced has completed too.
    fn install_replacement(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        replacement: Replacement,
        settled: bool,
    ) -> LocalBoxFuture<'static, Result<Band, DirectoryError>>;

    /// Gives back the chunk of an attempt that ends without an installation. `settled` says whether every write that was sent to
    /// it has completed.
    fn return_replacement(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        replacement: Replacement,
        settled: bool,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>>;

    /// Returns bands that were granted and never written.
    fn return_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        bands: Vec<BandId>,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>>;
}

/// What a band is for. The pool keeps a reserve that user writes never get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BandPurpose {
    /// Host writes.
    User,
    /// Compaction, takeover, checkpoints and TRIM records: may use the reserve.
    Internal,
}

/// Why the metadata service did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// The epoch is no longer the volume's: stop serving.
    #[error("epoch {epoch} is stale, the volume is at {current}")]
    Stale {
        /// The caller's.
        epoch: Epoch,
        /// The volume's.
        current: Epoch,
    },
    /// The root is not the one that was expected.
    #[error("root version {expected} expected, {current} found")]
    RootConflict {
        /// The caller's.
        expected: u64,
        /// The volume's.
        current: u64,
    },
    /// The band was freed, a column of it was replaced, or the attempt to rebuild it was given up: look again.
    #[error("band {band} is not as it was expected to be")]
    BandChanged {
        /// Which.
        band: BandId,
    },
    /// No space for the purpose asked.
    #[error("no space left in the pool")]
    NoSpace,
    /// Fewer healthy failure domains than 1 + m.
    #[error("{available} failure domains available, {needed} needed")]
    TooFewDomains {
        /// Domains with space and in service.
        available: u32,
        /// 1 + m.
        needed: u32,
    },
    /// The volume is being deleted or does not exist.
    #[error("no such volume")]
    NoSuchVolume,
    /// No answer; the caller may repeat the same request.
    #[error("metadata service unreachable")]
    Unavailable,
}

/// The fencing contract: what ownership needs of one drive, in the name of one incarnation. NVMe reservations
/// implement it (`node` over `initiator` for remote drives, over `target` for the local ones).
///
/// Drives hold a *Write Exclusive – All Registrants* reservation, persistent through power loss where they can.
pub trait Fencing {
    /// Registers this incarnation, once per drive. Never called again for the same drive by the same
    /// incarnation: a missing registration means fenced.
    fn register(&self, own: ReservationKey) -> LocalBoxFuture<'static, Result<(), FenceError>>;
    /// Who is registered, and whether the reservation is in force.
    fn report(&self) -> LocalBoxFuture<'static, Result<ReservationReport, FenceError>>;
    /// Removes `victim` and completes only when none of its commands is left in execution on the drive.
    fn preempt_and_abort(
        &self,
        own: ReservationKey,
        victim: ReservationKey,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>>;
}

/// A reservation key: one per incarnation, drawn at random, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReservationKey(pub u64);

/// A drive's reservation as a Reservation Report gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReservationReport {
    /// Whether Write Exclusive – All Registrants is held.
    pub in_force: bool,
    /// Whether registrations persist through power loss.
    pub persists: bool,
    /// Registered identities and keys.
    pub registrants: Vec<(HostId, ReservationKey)>,
}

/// Why a drive could not be asked or did not comply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FenceError {
    /// No answer within 500 ms, or not connected: the drive is unreachable for this takeover.
    #[error("drive unreachable")]
    Unreachable,
    /// This incarnation is not registered: it has been fenced, or the drive forgot.
    #[error("not registered")]
    NotRegistered,
    /// The reservation is not in force: the drive forgot its registrations and counts as failed.
    #[error("reservation not in force")]
    NotInForce,
    /// The drive refused in another way.
    #[error("drive refused with status {status:#06x}")]
    Refused {
        /// NVMe status, type and code as in the completion queue entry's bits 15:1.
        status: u16,
    },
}

/// Everything one engine is given.
#[derive(Clone)]
pub struct Seams {
    /// Clock, timers, tasks, randomness.
    pub env: Rc<dyn Env>,
    /// The drives.
    pub drives: Rc<dyn Drives>,
    /// The lease.
    pub lease: Rc<dyn Lease>,
    /// The metadata service.
    pub directory: Rc<dyn Directory>,
}
