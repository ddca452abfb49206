//! Checkpoints: the map's changes as a run, then a root, then one compare-and-swap in the directory.
//!
//! ```text
//! capture (no await):  freeze the map · H · append rows · band states
//! write:               the run (and merges) · the root · wait until H covers the root's stripe
//! publish:             root in, bands that nothing refers to out
//! ```
//!
//! Writes go on all the while. A root is published only when every stripe up to its own is closed, so everything
//! a root refers to lies at or below the H that a recovery starts from.
//!
//! TRIM records: one that became visible before stripe N was given can be forgotten once a root's replay starts
//! above N, because no stripe formed later holds an older copy (see [`super::work::Copy`]). Stripes that
//! re-append abandoned ones may; while a replay would see one of those, nothing is forgotten.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use bytes::Bytes;
use weft_block::BlockError;
use weft_proto::band::{ChunkAddress, RootPointer, RootUpdate};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{BandId, Epoch, Sequence, StripeNumber};
use weft_proto::units::{BLOCK_BYTES, Lba};

use super::append::{Opening, plan};
use super::work::{BlockWork, Target, Work};
use super::{Core, Life};
use crate::band::Phase;
use crate::error::VolumeError;
use crate::format::checksum::block_crc;
use crate::map::{BandState as RootBandState, MapError, MergeProgress, ROOT_LBA_START, Root, RootBand};
use crate::seams::DirectoryError;
use crate::sync::Reply;

/// Most payload blocks of a root's stripe; a longer root spills to map blocks.
const ROOT_BLOCKS_MAX: usize = 32;
/// Blocks of merging between two looks at whether the engine still lives.
const MERGE_STEP_BLOCKS: usize = 256;

/// What checkpoints remember between each other.
pub(crate) struct Checkpoints {
    /// Bytes written to drives since the last capture.
    bytes: Cell<u64>,
    running: Cell<bool>,
    /// Zero records that are not visible yet.
    pub(crate) zeroes_pending: RefCell<BTreeSet<Sequence>>,
    /// Captures whose stripes a replay could still see: the last number then, and the sequence below which every zero
    /// record was visible.
    captures: RefCell<Vec<(StripeNumber, Sequence)>>,
    /// Zero records below this may be forgotten.
    floor: Cell<Sequence>,
}

impl Default for Checkpoints {
    fn default() -> Self {
        Self {
            bytes: Cell::new(0),
            running: Cell::new(false),
            zeroes_pending: RefCell::default(),
            captures: RefCell::default(),
            floor: Cell::new(Sequence {
                epoch: Epoch(0),
                counter: 0,
            }),
        }
    }
}

impl Checkpoints {
    /// Bytes written to drives since the last capture.
    pub(crate) fn log_bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Counts towards the log budget.
    pub(crate) fn written(&self, bytes: u64, core: &Core) {
        let before = self.bytes.get();
        self.bytes.set(before + bytes);
        let budget = core.settings.log_budget_bytes;
        if before < budget && before + bytes >= budget {
            core.changed.notify();
        }
    }
}

/// What a checkpoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The log is long, or somebody asked.
    Ordinary,
    /// Space is short: merge the whole map, so that band counts are exact.
    Exact,
    /// The last one of this epoch.
    Final,
    /// The first one: with it the epoch begins to count.
    Takeover {
        recovered: Option<Epoch>,
        ended_at: StripeNumber,
    },
}

/// State taken in one step with the freeze.
struct Capture {
    closed_through: StripeNumber,
    counter_next: u64,
    bands: Vec<RootBand>,
    /// Sealed, with every stripe closed: nothing is appended to them any more.
    over: Vec<BandId>,
}

impl Core {
    pub(crate) async fn checkpoint_loop(self: &Rc<Self>) {
        loop {
            let changed = self.changed.changed();
            if self.life.get() != Life::Serving {
                return;
            }
            if self.checkpoints.log_bytes() >= self.settings.log_budget_bytes {
                if let Err(error) = self.checkpoint(Purpose::Ordinary).await {
                    tracing::warn!(volume = %self.volume, %error, "checkpoint put off");
                    self.sleep(self.settings.retry * 10).await;
                }
                continue;
            }
            changed.await;
        }
    }

    pub(crate) async fn checkpoint_now(self: &Rc<Self>) -> Result<(), VolumeError> {
        self.checkpoint(Purpose::Ordinary).await.map(|_| ())
    }

    /// Publishes a checkpoint; answers how many bands it freed. One at a time.
    pub(crate) async fn checkpoint(self: &Rc<Self>, purpose: Purpose) -> Result<usize, VolumeError> {
        loop {
            let changed = self.changed.changed();
            self.alive()?;
            if !self.checkpoints.running.replace(true) {
                break;
            }
            changed.await;
        }
        let result = self.run_checkpoint(purpose).await;
        self.checkpoints.running.set(false);
        self.worth_compacting.notify();
        self.changed.notify();
        self.pump.notify();
        result
    }

    /// What ends a wait of an engine that has stopped.
    pub(crate) fn alive(&self) -> Result<(), VolumeError> {
        match self.life.get() {
            Life::Opening | Life::Serving | Life::Quiescing => Ok(()),
            Life::Closed => Err(VolumeError::Closed),
            Life::Fenced => Err(VolumeError::Fenced),
        }
    }

    async fn run_checkpoint(self: &Rc<Self>, purpose: Purpose) -> Result<usize, VolumeError> {
        let map = Rc::clone(self.map());
        // Left over from an attempt that failed.
        self.write_frozen().await?;
        let capture = self.capture(purpose);
        self.write_frozen().await?;
        // Merges one call at a time: nothing else in the engine merges. A hand-over and a takeover do not wait for any.
        let floor = self.checkpoints.floor.get();
        match purpose {
            Purpose::Ordinary => {
                while self.life.get() == Life::Serving
                    && map.merge_step(MERGE_STEP_BLOCKS, floor).await? != MergeProgress::Idle
                {
                }
                self.alive()?;
            }
            Purpose::Exact => map.merge_all(floor).await?,
            Purpose::Final | Purpose::Takeover { .. } => {}
        }
        // No await from the snapshot to the choice of bands to free.
        let snapshot = map.snapshot();
        let freed = self.unreferenced(&capture);
        let unsettled = self.unsettled(&freed);
        let (expected_version, _) = self.root.get();
        let root = Root {
            cluster: self.identity.cluster,
            volume: self.volume,
            name: self.identity.name.clone(),
            size_bytes: self.size_bytes.get(),
            layer: self.layer,
            layers: vec![self.layer],
            geometry: self.geometry,
            epoch: self.epoch,
            root_version: expected_version + 1,
            counter_next: capture.counter_next,
            stripe_next: StripeNumber(capture.closed_through.0 + 1),
            complete: capture.closed_through,
            ended: self.ended.borrow().clone(),
            bands: capture
                .bands
                .into_iter()
                .filter(|band| !freed.contains(&band.band.id))
                .collect(),
            map: snapshot,
        };
        let blocks = root.write(&map, ROOT_BLOCKS_MAX).await?;
        let pointer = self.write_root(blocks).await?;
        self.wait_closed(pointer.stripe).await?;
        let update = RootUpdate {
            volume: self.volume,
            epoch: self.epoch,
            expected_version,
            root: pointer,
            freed: freed.clone(),
            unsettled,
        };
        let version = self.publish(update, purpose).await?;
        self.root.set((version, Some(pointer)));
        for band in &freed {
            self.bands.borrow_mut().remove(band);
            map.forget(*band);
        }
        let counters = &self.counters;
        counters.checkpoints.add(1);
        counters.bands_freed.add(freed.len() as u64);
        if !freed.is_empty() {
            self.space.hope();
            self.space.freed.notify();
        }
        tracing::debug!(volume = %self.volume, version, stripe = %pointer.stripe, freed = freed.len(), "checkpoint");
        Ok(freed.len())
    }

    /// Everything a root says, as of one moment.
    fn capture(&self, purpose: Purpose) -> Capture {
        let frozen = self.map().freeze();
        debug_assert!(frozen, "what was frozen before has been written");
        self.checkpoints.bytes.set(0);
        let numbers = self.numbers.borrow();
        let closed_through = numbers.closed_through();
        let visible_below = self
            .checkpoints
            .zeroes_pending
            .borrow()
            .first()
            .copied()
            .unwrap_or(Sequence {
                epoch: self.epoch,
                counter: self.last_sequence().counter + 1,
            });
        let mut captures = self.checkpoints.captures.borrow_mut();
        if numbers.reappended() <= closed_through {
            // A replay from this capture starts above `closed_through`.
            while let Some((last, floor)) = captures.first().copied()
                && last <= closed_through
            {
                self.checkpoints
                    .floor
                    .set(self.checkpoints.floor.get().max(floor));
                captures.remove(0);
            }
        }
        captures.push((numbers.last(), visible_below));
        let held = self.bands.borrow();
        let over = held
            .values()
            .filter(|band| band.phase.get() == Phase::Sealed && !band.writer.borrow().has_open_stripes())
            .map(|band| band.id)
            .collect();
        let bands = held
            .values()
            .map(|band| {
                let writer = band.writer.borrow();
                let ours = band.band.borrow().epoch == self.epoch;
                let ended = !ours || band.phase.get() == Phase::Sealed || purpose == Purpose::Final;
                let state = if ended && !writer.has_open_stripes() {
                    RootBandState::Sealed
                } else if writer.is_untouched() && ours {
                    RootBandState::Granted
                } else {
                    RootBandState::Open
                };
                RootBand {
                    band: Rc::unwrap_or_clone(Rc::clone(&band.band.borrow())),
                    state,
                    append_row: if ours { writer.append_row() } else { band.rows },
                    stripe_last: StripeNumber(band.order.get()),
                }
            })
            .collect();
        Capture {
            closed_through,
            counter_next: self.last_sequence().counter + 1,
            bands,
            over,
        }
    }

    /// Bands that the next root does not need, and that nobody reads or has a write to in flight.
    ///
    /// Only those that were over at the capture: what was appended since may be a TRIM record, which the root's map
    /// does not have and only a replay of the band would find.
    fn unreferenced(&self, capture: &Capture) -> Vec<BandId> {
        let bands = self.bands.borrow();
        capture
            .over
            .iter()
            .filter_map(|band| bands.get(band))
            .filter(|band| band.is_quiet())
            .filter(|band| !self.map().refers_to(band.id) || planted(Bug::FreeBandTooEarly))
            .map(|band| band.id)
            .collect()
    }

    /// Chunks of these bands that a write of unknown outcome may still reach.
    fn unsettled(&self, bands: &[BandId]) -> Vec<ChunkAddress> {
        bands
            .iter()
            .filter_map(|band| self.band(*band))
            .flat_map(|band| band.unsettled())
            .collect()
    }

    async fn write_frozen(self: &Rc<Self>) -> Result<(), VolumeError> {
        loop {
            match self.map().write_frozen().await {
                Ok(()) => return Ok(()),
                Err(MapError::Store(BlockError::NotReady | BlockError::Unknown)) => {
                    self.alive()?;
                    self.sleep(self.settings.retry).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes a root as one stripe of its own.
    async fn write_root(self: &Rc<Self>, blocks: Vec<Bytes>) -> Result<RootPointer, VolumeError> {
        loop {
            let changed = self.changed.changed();
            self.alive()?;
            match self.send_root(&blocks) {
                None => self.changed_or_retry(changed).await,
                Some(reply) => match reply.wait().await {
                    Ok(pointer) => return Ok(pointer),
                    // Abandoned: the next attempt passes over the column that failed.
                    Err(_) => self.alive()?,
                },
            }
        }
    }

    fn send_root(self: &Rc<Self>, blocks: &[Bytes]) -> Option<Rc<Reply<Result<RootPointer, BlockError>>>> {
        loop {
            let Opening::Band(band, skipped, transfer) = self.opening(&self.internal) else {
                return None;
            };
            let plan = plan(&band, skipped, transfer, blocks.len(), 0);
            let Some(plan) = plan.filter(|plan| plan.blocks == blocks.len()) else {
                if band.writer.borrow().waits_for_window() {
                    return None;
                }
                // The rest of the band is too short for a root.
                self.retire(&self.internal);
                continue;
            };
            let reply = Reply::new();
            let work = blocks
                .iter()
                .enumerate()
                .map(|(index, data)| {
                    let lba = Lba(ROOT_LBA_START.0 + index as u64);
                    let sequence = self.next_sequence();
                    Work::Block(BlockWork {
                        lba,
                        sequence,
                        crc: block_crc(self.volume, lba, sequence, data),
                        data: data.clone(),
                        target: Target::Root(Rc::clone(&reply)),
                        was_in: Vec::new(),
                    })
                })
                .collect();
            self.send_stripe(&self.internal, &band, skipped, plan, work);
            return Some(reply);
        }
    }

    /// Waits until H has reached `stripe`.
    async fn wait_closed(&self, stripe: StripeNumber) -> Result<(), VolumeError> {
        loop {
            let changed = self.changed.changed();
            self.alive()?;
            if self.numbers.borrow().closed_through() >= stripe {
                return Ok(());
            }
            changed.await;
        }
    }

    async fn publish(&self, update: RootUpdate, purpose: Purpose) -> Result<u64, VolumeError> {
        let directory = &self.seams.directory;
        loop {
            self.alive()?;
            let answer = match purpose {
                Purpose::Ordinary | Purpose::Exact | Purpose::Final => {
                    directory.publish_root(update.clone()).await
                }
                Purpose::Takeover { recovered, ended_at } => {
                    directory
                        .finish_takeover(update.clone(), recovered, ended_at)
                        .await
                }
            };
            match answer {
                Ok(version) => return Ok(version),
                Err(error) => {
                    if let Some(error) = self.directory_error(&error) {
                        return Err(error);
                    }
                    if error != DirectoryError::Unavailable {
                        tracing::warn!(volume = %self.volume, %error, "root not taken");
                    }
                    self.sleep(self.settings.retry * 5).await;
                }
            }
        }
    }

    /// Finishes what is in flight and publishes the final root.
    pub(crate) async fn finish(self: &Rc<Self>) -> Result<(), VolumeError> {
        loop {
            let changed = self.changed.changed();
            self.alive()?;
            let compacting = self.space.busy.get() || !self.copies.borrow().is_empty();
            if self.host.is_idle() && self.internal.is_idle() && !compacting {
                break;
            }
            self.changed_or_retry(changed).await;
        }
        self.return_unused().await;
        self.checkpoint(Purpose::Final).await.map(drop)
    }

    /// Whether every write that was sent has ended.
    pub(crate) fn is_drained(&self) -> bool {
        let bands = self.bands.borrow();
        bands.values().all(|band| band.sent.is_answered())
    }

    /// Chunks to which a write is still on its way, or may be: the next owner may free them, but not reuse them.
    pub(crate) fn unsettled_chunks(&self) -> Vec<ChunkAddress> {
        self.bands
            .borrow()
            .values()
            .flat_map(|band| band.unsettled())
            .collect()
    }
}

const _: () = assert!(ROOT_BLOCKS_MAX * BLOCK_BYTES <= 1 << 20);
