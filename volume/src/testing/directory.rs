//! The way to the metadata service: calls that are committed at one point of virtual time and answered at a later one.
//!
//! A call can be answered [`DirectoryError::Unavailable`] before or after it was committed, and a crashed caller's call can
//! still be committed later.

use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use weft_proto::band::{Band, ChunkSize, Replacement, RootUpdate};
use weft_proto::id::{BandId, Epoch, IncarnationId, StripeNumber, VolumeId};

use super::answer::{Giver, answer};
use super::metadata::rebuilds::Column;
use super::metadata::{Commit, Metadata};
use super::world::{InFlight, World};
use crate::seams::{BandPurpose, Directory, DirectoryError};

/// Meets the fate of a crashed caller's calls.
pub(super) fn crash(world: &World, caller: IncarnationId, in_flight: InFlight) {
    let ids: Vec<u64> = {
        let metadata = world.metadata.borrow();
        let calls = metadata.calls.iter();
        calls
            .filter(|(_, (incarnation, _))| *incarnation == caller)
            .map(|(id, _)| *id)
            .collect()
    };
    for id in ids {
        let now = match in_flight {
            InFlight::Lost => false,
            InFlight::Landed => true,
            InFlight::Mixed => match world.metadata.borrow_mut().rng.below(3) {
                0 => false,
                1 => true,
                // Still on its way: it commits at its time, unless the epoch is stale by then.
                _ => continue,
            },
        };
        let call = world.metadata.borrow_mut().calls.remove(&id);
        if let (true, Some((_, commit)), Some(world)) = (now, call, world.this()) {
            commit(&world);
        }
    }
}

/// [`Directory`] as one incarnation reaches it.
pub struct SimDirectory {
    world: Weak<World>,
    incarnation: IncarnationId,
}

impl SimDirectory {
    /// The metadata service of `world`.
    #[must_use]
    pub fn new(world: &Rc<World>, incarnation: IncarnationId) -> Rc<Self> {
        Rc::new(Self {
            world: Rc::downgrade(world),
            incarnation,
        })
    }

    fn call<T: 'static>(
        &self,
        what: &'static str,
        apply: impl FnOnce(&mut Metadata, &World) -> Result<T, DirectoryError> + 'static,
    ) -> LocalBoxFuture<'static, Result<T, DirectoryError>> {
        let Some(world) = self.world.upgrade() else {
            return Box::pin(std::future::pending());
        };
        let (giver, reply) = answer();
        let (id, commit_at, answer_after, unavailable) = {
            let mut guard = world.metadata.borrow_mut();
            let metadata = &mut *guard;
            let (low, high) = metadata.spec.latency_us;
            let commit_at = world
                .now()
                .after(Duration::from_micros(metadata.rng.between(low, high)));
            let answer_after = Duration::from_micros(metadata.rng.between(low, high));
            let one_in = metadata.spec.unavailable_one_in;
            let unavailable =
                (one_in > 0 && metadata.rng.chance(1, one_in)).then(|| metadata.rng.chance(1, 2));
            let id = metadata.call_next;
            metadata.call_next += 1;
            (id, commit_at, answer_after, unavailable)
        };
        let caller = self.incarnation;
        let commit: Commit = Box::new(move |world: &Rc<World>| {
            let give = |world: &Rc<World>, giver: Giver<Result<T, DirectoryError>>, result| {
                world.at(world.now().after(answer_after), Some(caller), move |_| {
                    giver.give(result)
                });
            };
            if unavailable == Some(false) {
                give(world, giver, Err(DirectoryError::Unavailable));
                return;
            }
            let result = apply(&mut world.metadata.borrow_mut(), world);
            if result.is_ok() {
                world.effect(|| format!("{caller}: {what}"));
            }
            let result = if unavailable == Some(true) {
                Err(DirectoryError::Unavailable)
            } else {
                result
            };
            give(world, giver, result);
        });
        world.metadata.borrow_mut().calls.insert(id, (caller, commit));
        world.at(commit_at, None, move |world| {
            let call = world.metadata.borrow_mut().calls.remove(&id);
            if let Some((_, commit)) = call {
                commit(world);
            }
        });
        Box::pin(reply)
    }
}

impl Directory for SimDirectory {
    fn grant_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        chunk_size: ChunkSize,
        count: u32,
        purpose: BandPurpose,
    ) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        self.call("grant bands", move |metadata, world| {
            metadata.grant_bands(world, volume, epoch, chunk_size, count, purpose)
        })
    }

    fn publish_root(&self, update: RootUpdate) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        self.call("publish root", move |metadata, world| {
            metadata.publish_root(world, &update, None)
        })
    }

    fn finish_takeover(
        &self,
        update: RootUpdate,
        recovered: Option<Epoch>,
        ended_at: StripeNumber,
    ) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        self.call("finish takeover", move |metadata, world| {
            metadata.publish_root(world, &update, Some((recovered, ended_at)))
        })
    }

    fn bands(&self, volume: VolumeId) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        self.call("list bands", move |metadata, _| {
            if metadata.volumes.contains_key(&volume) {
                Ok(metadata.listed(volume, true))
            } else {
                Err(DirectoryError::NoSuchVolume)
            }
        })
    }

    fn return_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        bands: Vec<BandId>,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>> {
        self.call("return bands", move |metadata, world| {
            metadata.return_bands(world, volume, epoch, &bands)
        })
    }

    fn grant_replacement(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        band: BandId,
        column: u8,
        version: u64,
    ) -> LocalBoxFuture<'static, Result<Replacement, DirectoryError>> {
        let wanted = Column {
            band,
            column,
            version,
        };
        self.call("grant replacement", move |metadata, world| {
            metadata.grant_replacement(world, volume, epoch, wanted)
        })
    }

    fn install_replacement(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        replacement: Replacement,
        settled: bool,
    ) -> LocalBoxFuture<'static, Result<Band, DirectoryError>> {
        self.call("install replacement", move |metadata, world| {
            metadata.install_replacement(world, volume, epoch, replacement, settled)
        })
    }

    fn return_replacement(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        replacement: Replacement,
        settled: bool,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>> {
        self.call("return replacement", move |metadata, world| {
            metadata.return_replacement(world, volume, epoch, replacement, settled)
        })
    }
}
