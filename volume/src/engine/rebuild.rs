//! The rebuild step: one column of one sealed band, shard by shard, into a fresh chunk that then takes the column's place.
//!
//! ```text
//! grant ──► for each window of rows: find the stripes, reconstruct their shards, write them ──► install ──► the band's column
//!                                      │ anything goes wrong
//!                                      └──► return (or leave) the chunk; nothing has changed
//! ```
//!
//! What it promises: a shard is written byte for byte as it was, header and payload, and only if w other shards of its stripe
//! prove it (or the old one, where its drive still answers; see [`super::shard`]); a hole stays a hole. Every write goes to the chunk of this
//! attempt's grant, never to an address that the band has; all of them have completed durably before the installation is asked
//! for, and none is sent afterwards. A stripe that cannot be proven, and that the map refers to, ends the attempt.
//!
//! What it does not do: choose a column, try again, wait for drives, or hold up a checkpoint that frees the band meanwhile.
//!
//! Memory: the headers of a window of rows and the stripes that are under way, a few.
//! `docs/design/rebuild-step.md` has the argument why no chunk is reused under a write of this.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use weft_block::{BlockError, Durability};
use weft_proto::band::{Band, Replacement};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::BandId;
use weft_proto::units::{BLOCK_BYTES, Lba};

use super::scan::{Found, Walk};
use super::{Core, Life};
use crate::band::{BandState, Phase, Rebuild};
use crate::error::VolumeError;
use crate::seams::DirectoryError;
use crate::sync::{Reply, give_way, patiently};

/// Rows whose stripes are looked for at once: bounds how many headers are held.
const WINDOW_ROWS: u32 = 256;
/// Rows read at once in the search for headers: few, because a deep stripe is mostly payload.
const WALK_PIECE_ROWS: u32 = 8;

/// What a rebuild did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// Shards that were written.
    pub shards: u64,
    /// Their bytes, headers included.
    pub bytes: u64,
    /// Stripes of which too little was left and that nothing refers to: they had been abandoned or dropped.
    pub holes: u64,
}

/// One attempt: a chunk of its own, and how its writes have ended so far.
struct Attempt {
    replacement: Replacement,
    done: Cell<Rebuilt>,
    /// Every write that was sent has an outcome that is known.
    settled: Cell<bool>,
    /// The first error: nothing more is sent.
    failed: RefCell<Option<VolumeError>>,
}

/// A band's turn: one column of it is rebuilt at a time.
struct Turn(Rc<BandState>);

impl Turn {
    fn take(band: &Rc<BandState>) -> Option<Self> {
        let free = band.rebuild.get() == Rebuild::None;
        free.then(|| {
            band.rebuild.set(Rebuild::Filling);
            Self(Rc::clone(band))
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.rebuild.set(Rebuild::None);
    }
}

impl Core {
    pub(crate) fn sealed_bands(&self) -> Vec<Band> {
        let bands = self.bands.borrow();
        bands
            .values()
            .filter(|band| band.takes_no_more())
            .map(|band| Band::clone(&band.band.borrow()))
            .collect()
    }

    pub(crate) async fn rebuild(self: &Rc<Self>, id: BandId, column: u8) -> Result<Rebuilt, VolumeError> {
        self.serves()?;
        let band = self.band(id).ok_or(VolumeError::UnknownBand { band: id })?;
        if !band.takes_no_more() {
            return Err(VolumeError::NotSealed { band: id });
        }
        if column >= band.geometry.n() {
            return Err(VolumeError::NoSuchColumn { band: id, column });
        }
        let turn = Turn::take(&band).ok_or(VolumeError::RebuildUnderWay { band: id })?;
        let replacement = self.ask_for_replacement(&band, column).await?;
        let attempt = Attempt {
            replacement,
            done: Cell::default(),
            settled: Cell::new(true),
            failed: RefCell::default(),
        };
        let filled = self.fill(&band, &attempt).await;
        let (core, reply) = (Rc::clone(self), Reply::new());
        let answer = Rc::clone(&reply);
        // Whoever waits for it: a swap that was asked for may yet be committed, and until that is known no scan believes the band.
        self.spawn(async move {
            let result = core.finish_rebuild(&band, &attempt, filled).await;
            drop(turn);
            answer.give(result);
        });
        reply.wait().await
    }

    /// Installs a chunk that was filled, or gives it back.
    async fn finish_rebuild(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        attempt: &Attempt,
        filled: Result<(), VolumeError>,
    ) -> Result<Rebuilt, VolumeError> {
        let result = match filled {
            Ok(()) => self.install(band, attempt).await,
            Err(error) => Err(Ended::Unasked(error)),
        };
        let (id, column) = (band.id, attempt.replacement.column);
        match result {
            Ok(()) => {
                let done = attempt.done.get();
                self.counters.rebuilt.add(done.bytes);
                tracing::info!(volume = %self.volume, band = %id, column, ?done, "column rebuilt");
                Ok(done)
            }
            Err(Ended::Unasked(error)) => {
                tracing::warn!(volume = %self.volume, band = %id, column, %error, "column not rebuilt");
                self.give_back(attempt).await;
                Err(error)
            }
            // Perhaps it is installed, or will be: its chunk is not this engine's to give back.
            Err(Ended::Asked(error)) => Err(error),
        }
    }

    async fn ask_for_replacement(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        column: u8,
    ) -> Result<Replacement, VolumeError> {
        loop {
            self.still_there(band, None)?;
            let version = band.band.borrow().version;
            let answer = self
                .seams
                .directory
                .grant_replacement(self.volume, self.epoch, band.id, column, version)
                .await;
            match answer {
                Ok(replacement) => return Ok(replacement),
                Err(DirectoryError::Unavailable) => self.sleep(self.settings.retry * 5).await,
                Err(error) => return Err(self.refused(error).await),
            }
        }
    }

    /// Writes everything that the column held into the attempt's chunk.
    async fn fill(self: &Rc<Self>, band: &Rc<BandState>, attempt: &Attempt) -> Result<(), VolumeError> {
        let column = attempt.replacement.column;
        for from in (0..band.rows).step_by(WINDOW_ROWS as usize) {
            self.still_there(band, Some(&attempt.replacement))?;
            let walk = Walk {
                from,
                until: from.saturating_add(WINDOW_ROWS),
                piece: WALK_PIECE_ROWS,
                window: None,
                verify: false,
            };
            let stripes = self.scan_band(band, walk).await?;
            let mut shards = futures_util::stream::iter(stripes.into_values())
                .filter(|found| {
                    let shape = found.header.shape;
                    std::future::ready(shape.shard_index(band.geometry, column).is_some())
                })
                .map(|found| self.rebuild_shard(band, attempt, found))
                .buffer_unordered(self.settings.internal_stripes_in_flight_max.max(1));
            // To the end in any case: a write that is left alone has no outcome.
            while shards.next().await.is_some() {}
            drop(shards);
            if let Some(error) = attempt.failed.take()
                && !planted(Bug::InstallDespiteError)
            {
                return Err(error);
            }
            // Beside hosts' work, not in front of it.
            give_way().await;
        }
        Ok(())
    }

    /// One stripe's shard, unless the attempt has failed. What goes wrong is the attempt's end.
    async fn rebuild_shard(self: &Rc<Self>, band: &Rc<BandState>, attempt: &Attempt, found: Found) {
        if attempt.failed.borrow().is_some() {
            return;
        }
        let result = async {
            self.still_there(band, Some(&attempt.replacement))?;
            let row = found.header.row;
            let Some(shard) = self
                .reconstruct_shard(band, attempt.replacement.column, &found)
                .await?
            else {
                let done = attempt.done.get();
                attempt.done.set(Rebuilt {
                    holes: done.holes + 1,
                    ..done
                });
                return Ok(());
            };
            self.still_there(band, Some(&attempt.replacement))?;
            self.write_shard(attempt, row, shard).await
        };
        if let Err(error) = result.await {
            attempt.failed.borrow_mut().get_or_insert(error);
        }
    }

    /// Writes a shard to the attempt's chunk, and waits until it is durable.
    async fn write_shard(
        self: &Rc<Self>,
        attempt: &Attempt,
        row: u32,
        shard: Vec<Bytes>,
    ) -> Result<(), VolumeError> {
        let Replacement {
            chunk, band, column, ..
        } = attempt.replacement;
        let failed = |error| VolumeError::ReplacementNotWritten {
            band,
            column,
            drive: chunk.drive,
            error,
        };
        let device = self
            .seams
            .drives
            .device(chunk.drive)
            .ok_or_else(|| failed(BlockError::NotReady))?;
        let info = device.info();
        let durability = if info.volatile_write_cache {
            Durability::Durable
        } else {
            Durability::Cached
        };
        let rows_max = (info.transfer_bytes_max as usize / BLOCK_BYTES).max(1);
        let mut at = row;
        for piece in pieces(shard, rows_max) {
            let bytes: usize = piece.iter().map(Bytes::len).sum();
            let start = Lba(chunk.row_byte_offset(at) / u64::from(info.block_bytes));
            let written = device.write(start, piece, durability);
            match patiently(&*self.seams.env, self.settings.stall, written).await {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    if error == BlockError::Unknown {
                        attempt.settled.set(false);
                    }
                    self.drive_error(chunk.drive, &error);
                    return Err(failed(error));
                }
                None => {
                    // It goes on without anybody who waits for it.
                    attempt.settled.set(false);
                    self.suspect(chunk.drive);
                    return Err(failed(BlockError::Unknown));
                }
            }
            at += (bytes / BLOCK_BYTES) as u32;
            let done = attempt.done.get();
            attempt.done.set(Rebuilt {
                bytes: done.bytes + bytes as u64,
                ..done
            });
        }
        let done = attempt.done.get();
        attempt.done.set(Rebuilt {
            shards: done.shards + 1,
            ..done
        });
        Ok(())
    }

    /// Asks for the swap. From the first question on, only a refusal says that it will not happen.
    async fn install(self: &Rc<Self>, band: &Rc<BandState>, attempt: &Attempt) -> Result<(), Ended> {
        let replacement = attempt.replacement;
        self.still_there(band, Some(&replacement))
            .map_err(Ended::Unasked)?;
        let old = band.chunk(replacement.column);
        band.rebuild.set(Rebuild::Installing);
        loop {
            // Of writes of earlier epochs the directory knows.
            let settled = band.band.borrow().epoch == self.epoch
                && band.sent.is_answered()
                && old.is_none_or(|old| band.sent.is_known(old));
            let answer = self
                .seams
                .directory
                .install_replacement(self.volume, self.epoch, replacement, settled)
                .await;
            match answer {
                Ok(now) => {
                    if let Some(old) = old {
                        // The directory has been told what is known of it, and it is the band's no more.
                        band.sent.forget(old);
                    }
                    if band.band.borrow().version < now.version {
                        *band.band.borrow_mut() = Rc::new(now);
                    }
                    self.changed.notify();
                    return Ok(());
                }
                Err(DirectoryError::Unavailable) => {
                    self.alive().map_err(Ended::Asked)?;
                    self.sleep(self.settings.retry * 5).await;
                }
                Err(error) => {
                    band.rebuild.set(Rebuild::Filling);
                    return Err(Ended::Unasked(self.refused(error).await));
                }
            }
        }
    }

    async fn give_back(self: &Rc<Self>, attempt: &Attempt) {
        if self.life.get() == Life::Fenced {
            return;
        }
        let answer = self
            .seams
            .directory
            .return_replacement(
                self.volume,
                self.epoch,
                attempt.replacement,
                attempt.settled.get(),
            )
            .await;
        if let Err(error) = answer {
            // The next attempt gives it up, or the end of the epoch.
            self.directory_error(&error);
        }
    }

    /// A refusal of the directory as the caller's error.
    async fn refused(self: &Rc<Self>, error: DirectoryError) -> VolumeError {
        if let DirectoryError::BandChanged { band } = error {
            self.refresh_bands().await;
            return VolumeError::BandChanged { band };
        }
        match self.directory_error(&error) {
            Some(over) => over,
            None => VolumeError::Directory(error),
        }
    }

    fn serves(&self) -> Result<(), VolumeError> {
        match self.life.get() {
            Life::Serving => Ok(()),
            Life::Opening | Life::Quiescing | Life::Closed => Err(VolumeError::Closed),
            Life::Fenced => Err(VolumeError::Fenced),
        }
    }

    /// Whether a rebuild of `band` still makes sense: the engine serves, the band is there, and at the version of the attempt.
    fn still_there(&self, band: &Rc<BandState>, attempt: Option<&Replacement>) -> Result<(), VolumeError> {
        self.serves()?;
        let held = self.band(band.id).is_some_and(|held| Rc::ptr_eq(&held, band));
        let version = band.band.borrow().version;
        if held && attempt.is_none_or(|attempt| attempt.version == version) {
            Ok(())
        } else {
            Err(VolumeError::BandChanged { band: band.id })
        }
    }
}

impl BandState {
    /// Sealed, and every stripe of it closed.
    fn takes_no_more(&self) -> bool {
        self.phase.get() == Phase::Sealed && !self.writer.borrow().has_open_stripes()
    }
}

/// How an attempt ended without a known installation.
enum Ended {
    /// It was not asked for, or refused.
    Unasked(VolumeError),
    /// It may have been, or may yet be committed.
    Asked(VolumeError),
}

/// A shard in pieces of at most `rows_max` blocks.
fn pieces(shard: Vec<Bytes>, rows_max: usize) -> Vec<Vec<Bytes>> {
    let bytes: usize = shard.iter().map(Bytes::len).sum();
    if bytes <= rows_max * BLOCK_BYTES {
        return vec![shard];
    }
    shard
        .into_iter()
        .flat_map(|part| {
            let starts = (0..part.len()).step_by(rows_max * BLOCK_BYTES);
            starts
                .map(|start| vec![part.slice(start..part.len().min(start + rows_max * BLOCK_BYTES))])
                .collect::<Vec<_>>()
        })
        .collect()
}
