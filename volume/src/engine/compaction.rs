//! Compaction: live blocks of mostly dead bands move to full stripes elsewhere, so that bands can be freed. And
//! repair, which is the same for one block.
//!
//! Victims are chosen by cost-benefit, (share of garbage × age) ÷ cost of reading and writing what lives. A
//! copy keeps its sequence and is entered only if the map still means the copy it was made from. A moved band
//! counts as empty once every stripe header in it was looked at and nothing live was left; it is freed by the
//! next checkpoint.
//!
//! When it runs: as soon as a grant was refused for want of space, which is half a band or more ahead of need; otherwise when the
//! share of garbage passes a setting. That is highest for a busy volume of a pool with space, whose garbage grows by itself
//! the longer it is left, and lowest while the pool is tight and this volume is quiet: its garbage may be all the space another
//! one needs. It goes on beside user I/O, in its own stripes, which may use the pool's reserve.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use weft_proto::id::Sequence;
use weft_proto::units::Lba;

use super::checkpoint::Purpose;
use super::scan::Walk;
use super::space::gain;
use super::work::{BlockWork, Copy, CopyGroup, Target, Work};
use super::{Core, Life};
use crate::band::{BandState, Phase};
use crate::entry::MapEntry;
use crate::error::VolumeError;
use crate::map::{Generation, HOST_LBA_END, Mapping, PageState, is_map_lba};
use crate::seams::BandPurpose;
use crate::sync::{Changed, give_way, within};

/// Rows read at once when a band is walked for its headers: few, because a deep stripe is mostly payload.
const WALK_PIECE_ROWS: u32 = 8;
/// A band that gains less than this is not worth moving even when space is short: ten moved for one won. Guessed.
const GAIN_MIN: f64 = 0.1;
/// A band that gains less than this is left alone while there is space.
const GAIN_MIN_IDLE: f64 = 0.25;
/// Candidates looked up before hosts' work has its turn: some tens of microseconds.
const LOOKUPS_PER_TURN: usize = 64;
/// The same of those that are asked about together, each for a fraction of a lookup.
const SORTED_OUT_PER_TURN: usize = 512;
/// Of so many bands one may be emptied and not freed yet. Each checkpoint frees them all, so the more, the fewer checkpoints, of
/// which each has a line for every band. What was moved out of them takes the pool's reserve (`weft_metadata::state::reserve`
/// reckons with these numbers), so they are bounded, whatever the volume's size: a volume of many bands has large ones, beside
/// which a checkpoint is small.
const BANDS_PER_EMPTIED: usize = 192;
const EMPTIED_MIN: usize = 2;
const EMPTIED_MAX: usize = 5;
/// A volume whose hosts have filled no band for so long is quiet. Guessed.
const QUIET_AFTER: Duration = Duration::from_secs(5);
/// Sealed bands below which garbage is no reason to compact.
const SEALED_BANDS_MIN: usize = 4;

/// Whether a band was emptied.
enum Evacuation {
    Emptied,
    /// A map block in it may belong to a run that is being written.
    Pending,
}

/// A band that may be emptied.
struct Victim {
    band: Rc<BandState>,
    /// Blocks of it that live, as far as is known.
    live: u64,
}

/// A live block that was found in a victim.
struct Live {
    copy: Rc<Copy>,
    expected: MapEntry,
    seen: Generation,
}

impl Core {
    pub(crate) async fn compaction_loop(self: &Rc<Self>) {
        loop {
            // Not at every change: looking at all bands is too much for every stripe.
            let changed = self.worth_compacting.changed();
            if self.life.get() != Life::Serving {
                return;
            }
            self.space.busy.set(true);
            let result = if self.space.is_wanted() {
                self.find_space().await
            } else if let Some(band) = self.wasteful() {
                self.compact(&band).await.map(|_| ())
            } else {
                self.space.busy.set(false);
                self.wait_for_garbage(changed).await;
                continue;
            };
            self.space.busy.set(false);
            self.changed.notify();
            if let Err(error) = result {
                if self.is_over() {
                    return;
                }
                tracing::warn!(volume = %self.volume, %error, "compaction put off");
                self.sleep(self.settings.retry * 10).await;
            }
        }
    }

    /// Waits until there may be something to compact: also until a busy volume has become quiet.
    async fn wait_for_garbage(&self, changed: Changed) {
        if self.is_quiet() {
            return changed.await;
        }
        let deadline = self.seams.env.now().after(QUIET_AFTER);
        let _ = within(&*self.seams.env, deadline, Box::pin(changed)).await;
    }

    /// Whether the hosts' stream has opened no band for a while.
    fn is_quiet(&self) -> bool {
        self.seams.env.now() >= self.host.opened_at.get().after(QUIET_AFTER)
    }

    /// The best victim, if garbage passes the setting.
    fn wasteful(&self) -> Option<Rc<BandState>> {
        let victims = self.victims();
        let (mut capacity, mut live) = (0, 0);
        for victim in &victims {
            capacity += victim.band.capacity_blocks();
            live += victim.live;
        }
        let garbage_max =
            self.settings
                .garbage_max
                .now(self.space.tight.get(), self.is_quiet(), victims.len());
        let much =
            victims.len() >= SEALED_BANDS_MIN && (capacity - live) as f64 > garbage_max * capacity as f64;
        much.then(|| self.best(victims, GAIN_MIN_IDLE)).flatten()
    }

    /// Turns garbage into free bands until the volume holds less than when the pool refused, hosts have been granted
    /// one of them, or nothing is left to gain.
    ///
    /// Measured by what is held, not by what was freed: moved blocks, runs and roots take bands too, and a search that
    /// only kept pace with itself would go on forever. It looks at bands opened before it began, each once.
    async fn find_space(self: &Rc<Self>) -> Result<(), VolumeError> {
        let held = self.held_bytes();
        let granted = self.host.granted.get();
        let before = self.bands_opened.get();
        let emptied_max = (self.bands.borrow().len() / BANDS_PER_EMPTIED).clamp(EMPTIED_MIN, EMPTIED_MAX);
        if self
            .victims()
            .iter()
            .any(|victim| !self.map().refers_to(victim.band.id))
        {
            // What is dead already costs nothing but a root.
            self.checkpoint(Purpose::Ordinary).await?;
        }
        let mut exact = false;
        let (mut gained, mut emptied) = (0.0, 0);
        let found = loop {
            if self.host.granted.get() > granted || self.held_bytes() < held {
                break true;
            }
            let mut victims = self.victims();
            victims.retain(|victim| victim.band.order.get() <= before);
            match self.best(victims, GAIN_MIN) {
                Some(band) => {
                    gained += self.compact(&band).await?;
                    emptied += 1;
                    let enough = gained >= 1.0 && self.host.starved_since.get().is_some();
                    if emptied < emptied_max && !enough {
                        continue;
                    }
                    self.checkpoint(Purpose::Ordinary).await?;
                }
                None if emptied > 0 => {
                    self.checkpoint(Purpose::Ordinary).await?;
                }
                None if !exact => {
                    // Exact counts: what a former owner overwrote hides behind runs that were not merged.
                    exact = true;
                    self.checkpoint(Purpose::Exact).await?;
                }
                None => break false,
            }
            (gained, emptied) = (0.0, 0);
        };
        tracing::debug!(volume = %self.volume, found, held, now = self.held_bytes(), "search for space done");
        self.space.settle(found);
        // Who was refused again meanwhile asks once more.
        self.space.freed.notify();
        self.changed.notify();
        self.pump.notify();
        Ok(())
    }

    /// Moves the live blocks of one band. Answers the share of a band that was gained.
    async fn compact(self: &Rc<Self>, band: &Rc<BandState>) -> Result<f64, VolumeError> {
        let share = gain(band, self.live_estimate(band));
        match self.evacuate(band).await? {
            Evacuation::Emptied => {
                self.map().evacuated(band.id);
                band.evacuated.set(true);
                Ok(share)
            }
            Evacuation::Pending => {
                // A checkpoint ends the run that is being written.
                self.checkpoint(Purpose::Ordinary).await?;
                Ok(0.0)
            }
        }
    }

    /// Live blocks of a band, as far as is known.
    fn live_estimate(&self, band: &BandState) -> u64 {
        self.map().live_estimate(band.id).min(band.capacity_blocks())
    }

    fn victims(&self) -> Vec<Victim> {
        self.bands
            .borrow()
            .values()
            .filter(|band| {
                band.phase.get() == Phase::Sealed
                    && !band.evacuated.get()
                    && !band.writer.borrow().has_open_stripes()
            })
            .map(|band| Victim {
                band: Rc::clone(band),
                live: self.live_estimate(band),
            })
            .collect()
    }

    /// Of `victims` the band whose move gains most for its cost, and `gain_min` at least.
    fn best(&self, victims: Vec<Victim>, gain_min: f64) -> Option<Rc<BandState>> {
        let now = self.bands_opened.get() + 1;
        victims
            .into_iter()
            .filter_map(|Victim { band, live }| {
                let share = gain(&band, live);
                let age = (now - band.order.get().min(now)) as f64 + 1.0;
                let score = share * age.sqrt() / (2.0 - share);
                (share >= gain_min).then_some((score, band))
            })
            .max_by(|(a, _), (b, _)| a.total_cmp(b))
            .map(|(_, band)| band)
    }

    async fn evacuate(self: &Rc<Self>, band: &Rc<BandState>) -> Result<Evacuation, VolumeError> {
        let walk = Walk {
            from: 0,
            until: band.rows,
            piece: WALK_PIECE_ROWS,
            window: None,
            verify: false,
        };
        let stripes = self.scan_band(band, walk).await?;
        let mut candidates: Vec<(Lba, MapEntry)> = Vec::new();
        for found in stripes.values() {
            for (index, record) in found.header.blocks.iter().enumerate() {
                if let Some(entry) = found.entry(index)
                    && (record.lba < HOST_LBA_END || is_map_lba(record.lba))
                {
                    candidates.push((record.lba, entry));
                }
            }
        }
        drop(stripes);
        // Neighbours are found in the same blocks of the map.
        candidates.sort_unstable_by_key(|(lba, _)| *lba);
        let mut perhaps_live = Vec::new();
        for batch in candidates.chunks(SORTED_OUT_PER_TURN) {
            give_way().await;
            let superseded = self.map().superseded(batch);
            let left = batch.iter().zip(superseded).filter(|(_, superseded)| !superseded);
            perhaps_live.extend(left.map(|(candidate, _)| *candidate));
        }
        for batch in perhaps_live.chunks(self.settings.compaction_blocks.max(1)) {
            if self.life.get() != Life::Serving {
                return Err(VolumeError::Closed);
            }
            if !self.move_blocks(batch).await? {
                return Ok(Evacuation::Pending);
            }
        }
        Ok(Evacuation::Emptied)
    }

    /// Moves those of `candidates` that the map refers to. `false` when one may be in a run that is being written.
    async fn move_blocks(self: &Rc<Self>, candidates: &[(Lba, MapEntry)]) -> Result<bool, VolumeError> {
        let group = CopyGroup::new(0);
        let mut live: Vec<Live> = Vec::new();
        let mut settled = true;
        for (index, (lba, entry)) in candidates.iter().enumerate() {
            if index % LOOKUPS_PER_TURN == 0 {
                give_way().await;
            }
            let found = self.live(*lba, entry, &group).await;
            match found {
                Ok(Found::Live(found)) => live.push(found),
                Ok(Found::Dead) => {}
                Ok(Found::Pending) => settled = false,
                Err(error) => {
                    for found in &live {
                        self.unregister(&found.copy);
                    }
                    return Err(error);
                }
            }
        }
        let reads = live
            .iter()
            .map(|found| self.read_entry_or_dead(found))
            .collect::<Vec<_>>();
        let read = join_all(reads).await;
        if let Some(error) = read.iter().find_map(|result| result.as_ref().err()) {
            let error = error.clone();
            for found in &live {
                self.unregister(&found.copy);
            }
            return Err(error);
        }
        let group = CopyGroup::new(live.len());
        let moved = live.len() as u64;
        for (found, data) in live.into_iter().zip(read) {
            self.enqueue_copy(found, data?, &group);
        }
        group
            .reply
            .wait()
            .await
            .map_err(|_| self.alive().err().unwrap_or(VolumeError::Closed))?;
        self.counters.compacted.add(moved);
        Ok(settled)
    }

    /// Whether the map means this copy of `lba`. A live one is registered before it is looked up.
    async fn live(
        self: &Rc<Self>,
        lba: Lba,
        entry: &MapEntry,
        group: &Rc<CopyGroup>,
    ) -> Result<Found, VolumeError> {
        let map = self.map();
        let seen = map.generation();
        if is_map_lba(lba) {
            return Ok(match map.page_state(lba, entry).await? {
                PageState::Live => Found::Live(Live {
                    copy: Copy::new(lba, group), // superseded by merges, which `relocate_page` notices
                    expected: *entry,
                    seen,
                }),
                PageState::Dead => Found::Dead,
                PageState::Pending => Found::Pending,
            });
        }
        let copy = self.register(lba, group);
        match map.lookup(lba).await {
            Ok(Mapping::Data(found)) if found.same_place(entry) && found.sequence == entry.sequence => {
                copy.sequence.set(Some(found.sequence));
                Ok(Found::Live(Live {
                    copy,
                    expected: found,
                    seen,
                }))
            }
            Ok(_) => {
                self.unregister(&copy);
                Ok(Found::Dead)
            }
            Err(error) => {
                self.unregister(&copy);
                Err(error.into())
            }
        }
    }

    /// The bytes of a live block; anything at all once a newer version has killed the copy.
    async fn read_entry_or_dead(self: &Rc<Self>, found: &Live) -> Result<Bytes, VolumeError> {
        match self.read_unmapped_or_wait(found).await {
            Err(_) if found.copy.is_dead() => Ok(Bytes::new()),
            result => result,
        }
    }

    async fn read_unmapped_or_wait(self: &Rc<Self>, found: &Live) -> Result<Bytes, VolumeError> {
        loop {
            let changed = self.changed.changed();
            match self.read_unmapped(found.copy.lba, &found.expected).await {
                Err(VolumeError::TooManyMissing { .. }) if !found.copy.is_dead() => {
                    self.alive()?;
                    self.changed_or_retry(changed).await;
                }
                result => return result,
            }
        }
    }

    fn enqueue_copy(self: &Rc<Self>, found: Live, data: Bytes, group: &Rc<CopyGroup>) {
        let Live { copy, expected, seen } = found;
        *copy.group.borrow_mut() = Rc::clone(group);
        let work = BlockWork {
            lba: copy.lba,
            sequence: expected.sequence,
            crc: expected.crc,
            data,
            target: Target::Copy { copy, expected, seen },
            was_in: Vec::new(),
        };
        self.enqueue(BandPurpose::Internal, Work::Block(work));
    }

    /// Re-appends a block whose copy on its drive is damaged, in the background.
    pub(crate) fn repair(self: &Rc<Self>, lba: Lba, entry: MapEntry, data: Bytes) {
        let core = Rc::clone(self);
        self.spawn(async move {
            let group = CopyGroup::new(1);
            match core.live(lba, &entry, &group).await {
                Ok(Found::Live(found)) => {
                    core.enqueue_copy(found, data, &group);
                    if group.reply.wait().await.is_ok() {
                        core.counters.repaired.add(1);
                    }
                }
                Ok(Found::Dead | Found::Pending) => {}
                Err(error) => {
                    tracing::warn!(volume = %core.volume, %lba, %error, "not repaired");
                }
            }
        });
    }

    // The registry of copies; see `work::Copy`.

    fn register(&self, lba: Lba, group: &Rc<CopyGroup>) -> Rc<Copy> {
        let copy = Copy::new(lba, group);
        self.copies
            .borrow_mut()
            .entry(lba.0)
            .or_default()
            .push(Rc::clone(&copy));
        copy
    }

    pub(crate) fn unregister(&self, copy: &Rc<Copy>) {
        let mut copies = self.copies.borrow_mut();
        if let Some(of_lba) = copies.get_mut(&copy.lba.0) {
            of_lba.retain(|other| !Rc::ptr_eq(other, copy));
            if of_lba.is_empty() {
                copies.remove(&copy.lba.0);
            }
        }
    }

    /// A version of these blocks becomes visible: copies of older ones are not wanted any more. A version that
    /// comes late and is older than what a copy was made from leaves the copy alone.
    pub(crate) fn kill_copies(&self, start: u64, count: u64, sequence: Sequence) {
        let copies = self.copies.borrow();
        if copies.is_empty() {
            return;
        }
        for copy in copies
            .range(start..start.saturating_add(count))
            .flat_map(|(_, of_lba)| of_lba)
        {
            copy.newest.set(copy.newest.get().max(Some(sequence)));
        }
    }
}

/// What the map says of a candidate.
enum Found {
    Live(Live),
    Dead,
    Pending,
}

impl Copy {
    fn new(lba: Lba, group: &Rc<CopyGroup>) -> Rc<Self> {
        Rc::new(Self {
            lba,
            sequence: Cell::new(None),
            newest: Cell::new(None),
            group: std::cell::RefCell::new(Rc::clone(group)),
        })
    }
}
