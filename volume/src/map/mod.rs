//! The page map of a layer: LBA → where the block lies, which version it is, its checksum.
//!
//! ```text
//!   insert, zero_range ─► delta ──freeze──► frozen ──write_frozen──► run ─┐
//!                          (memory)          (memory)                    │ merge_step
//!   lookup: delta, frozen, then runs from the newest to the oldest ◄─────┘
//! ```
//!
//! Promises:
//!
//! - **A write never waits for a map page.** `insert`, `zero_range` and `relocate` touch memory only.
//! - **The highest sequence of an LBA wins**, in whatever order inserts come, across delta and runs; of equal
//!   sequences the newer copy. So a recovery may replay stripes in any order.
//! - **Memory is bounded** by the cache and by what changed since the last checkpoint, not by the volume.
//! - **Band counts are never lower than the truth**, so a band without references can be freed; see
//!   [`PageMap::refers_to`].
//!
//! It reads no clock, spawns nothing and does no I/O but through [`PageStore`]. It does not know stripes, when to
//! checkpoint, or when to merge: the engine decides that. `docs/format/checkpoint.md` has what it stores.

mod address;
mod bits;
mod block;
mod cache;
mod checkpoint;
mod counts;
mod delta;
mod fold;
mod garbage;
mod index;
mod leaf;
mod merge;
mod moving;
mod packed;
mod page;
mod pages;
mod root;
mod root_format;
mod root_stripe;
mod run;
mod slot;
mod store;
mod superseded;
#[cfg(test)]
mod tests;
mod writer;
mod zeroes;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use futures_util::lock::Mutex;
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{BandId, Sequence};
use weft_proto::units::{Lba, LbaRange};

use crate::entry::MapEntry;

use address::{PageId, RUNS};
use counts::BandCounts;
use delta::{Delta, SEQUENCE_ZERO};
use garbage::Garbage;
use merge::Merge;
use pages::Pages;
use slot::{Slot, Slots};
use writer::PendingCounts;

pub use address::{HOST_LBA_END, MAP_LBA_START, ROOT_LBA_START, is_map_lba};
pub use block::{FormatError, MapIdentity};
pub use cache::CacheStats;
pub use merge::MergeProgress;
pub use moving::PageState;
pub use root::{BandState, Root, RootBand};
pub use root_stripe::RootHead;
pub use run::RunDescriptor;
pub use slot::Mapping;
pub use store::{MapBlock, MapError, PageStore};

/// Limits of a page map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSettings {
    /// Bytes of leaf and index blocks kept in memory.
    pub cache_bytes: usize,
    /// Runs above which a merge is due whatever their sizes.
    pub runs_max: usize,
    /// Runs of about one size that are merged at once.
    pub merge_fan_in: usize,
    /// Moved map blocks above which their index blocks are rewritten: each is a line of every root.
    pub moved_max: usize,
}

impl Default for MapSettings {
    fn default() -> Self {
        Self {
            cache_bytes: 32 << 20,
            runs_max: 16,
            merge_fan_in: 4,
            moved_max: 1024,
        }
    }
}

/// Counts freezes: what an answer of a lookup is still worth when a copy of the block is relocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(u64);

/// Figures of a page map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapStats {
    /// Blocks and ranges changed since the last freeze.
    pub delta_records: usize,
    /// Blocks and ranges frozen and not yet written.
    pub frozen_records: usize,
    /// Runs.
    pub runs: usize,
    /// Records in all runs, superseded ones included.
    pub run_records: u64,
    /// Blocks of all runs.
    pub run_blocks: u64,
    /// Map blocks that lie elsewhere than their index says.
    pub moved_blocks: usize,
    /// The cache.
    pub cache: CacheStats,
}

/// A run, and in which bands its blocks lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunRoot {
    /// The run.
    pub run: RunDescriptor,
    /// Blocks by band.
    pub page_counts: Vec<(BandId, u64)>,
}

/// What a root says of the page map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapRoot {
    /// From the newest to the oldest.
    pub runs: Vec<RunRoot>,
    /// Map blocks that lie elsewhere than their index says.
    pub moved: Vec<(Lba, MapEntry)>,
    /// Records of the runs by band: an upper bound of the live blocks.
    pub record_counts: Vec<(BandId, u64)>,
    /// The number of the next run.
    pub run_next: u32,
}

/// A run in use.
#[derive(Debug)]
struct Run {
    descriptor: RunDescriptor,
    page_counts: RefCell<BandCounts>,
    /// Whether an index block was rewritten since the map was loaded.
    folded: Cell<bool>,
}

impl Run {
    fn new(descriptor: RunDescriptor, page_counts: BandCounts) -> Rc<Self> {
        Rc::new(Self {
            descriptor,
            page_counts: RefCell::new(page_counts),
            folded: Cell::new(false),
        })
    }
}

/// The page map of one layer. See the module.
pub struct PageMap {
    settings: MapSettings,
    pages: Rc<Pages>,
    delta: RefCell<Delta>,
    frozen: RefCell<Option<Rc<Delta>>>,
    /// From the newest to the oldest.
    runs: RefCell<Rc<[Rc<Run>]>>,
    /// No frozen or written record has a higher sequence.
    sequence_frozen: Cell<Sequence>,
    /// Counts freezes.
    generation: Cell<u64>,
    /// The last freeze that has become a run.
    installed: Cell<u64>,
    /// Of the records of all runs.
    record_counts: RefCell<BandCounts>,
    /// Of those, what is dead already: an estimate.
    garbage: RefCell<Garbage>,
    surveys_closely: Cell<bool>,
    /// Of the blocks of unfinished runs.
    pending_counts: PendingCounts,
    /// Bands without a live block, and the generation in which that was said.
    evacuated: RefCell<BTreeMap<BandId, u64>>,
    run_next: Cell<u32>,
    /// The merge between two steps; locked during one.
    merge: Mutex<Option<Merge>>,
    /// Locked while what was frozen is being written.
    writing: Mutex<()>,
    /// Numbers of unfinished runs, a merge's that is between steps included.
    unfinished: RefCell<Vec<u32>>,
}

impl PageMap {
    /// The empty map of a new layer.
    #[must_use]
    pub fn new(identity: MapIdentity, store: Rc<dyn PageStore>, settings: MapSettings) -> Rc<Self> {
        Self::load(identity, store, settings, &MapRoot::default())
    }

    /// The map as a root has it. Reads nothing: blocks are read when they are needed.
    #[must_use]
    pub fn load(
        identity: MapIdentity,
        store: Rc<dyn PageStore>,
        settings: MapSettings,
        root: &MapRoot,
    ) -> Rc<Self> {
        let collect = |list: &[(BandId, u64)]| {
            let mut counts = BandCounts::default();
            for (band, count) in list {
                counts.add(*band, *count);
            }
            counts
        };
        let runs = root.runs.iter();
        let runs = runs.map(|run| Run::new(run.run, collect(&run.page_counts)));
        let pages = Pages::new(identity, store, settings.cache_bytes);
        for (lba, place) in &root.moved {
            if let Some(id) = PageId::from_lba(*lba) {
                pages.set_moved(id, *place);
            }
        }
        let sequence_frozen = root.runs.iter().map(|run| run.run.sequence_max).max();
        Rc::new(Self {
            settings,
            pages: Rc::new(pages),
            delta: RefCell::default(),
            frozen: RefCell::default(),
            runs: RefCell::new(runs.collect()),
            sequence_frozen: Cell::new(sequence_frozen.unwrap_or(SEQUENCE_ZERO)),
            generation: Cell::new(0),
            installed: Cell::new(0),
            record_counts: RefCell::new(collect(&root.record_counts)),
            garbage: RefCell::default(),
            surveys_closely: Cell::new(false),
            pending_counts: PendingCounts::default(),
            evacuated: RefCell::default(),
            run_next: Cell::new(root.run_next),
            merge: Mutex::default(),
            writing: Mutex::default(),
            unfinished: RefCell::default(),
        })
    }

    // Changes. They touch memory only.

    /// Enters a block that has become visible, or one that a recovery found. `false` when a higher sequence is
    /// already known in memory; a higher one in a run still wins when the block is looked up.
    pub fn insert(&self, lba: Lba, entry: MapEntry) -> bool {
        debug_assert!(lba < HOST_LBA_END, "map blocks are relocated, not inserted");
        let settled = entry.sequence > self.sequence_frozen.get();
        if self.frozen_beats(lba, entry.sequence) {
            return false;
        }
        self.delta.borrow_mut().insert(lba, entry, settled)
    }

    /// Makes `range` read as zeroes where it has no higher sequence: TRIM, Write Zeroes, zero blocks.
    pub fn zero_range(&self, range: LbaRange, sequence: Sequence) {
        let settled = sequence > self.sequence_frozen.get();
        self.delta.borrow_mut().zero_range(range, sequence, settled);
    }

    /// Where the freezes stand. Taken before a lookup whose answer will be relocated.
    #[must_use]
    pub fn generation(&self) -> Generation {
        Generation(self.generation.get())
    }

    /// Enters a copy, of the same sequence, of the block that a lookup since `seen` found at `expected`. `false` when the
    /// block was overwritten, trimmed or moved meanwhile, as far as memory knows: the copy is then garbage.
    pub fn relocate(&self, lba: Lba, expected: &MapEntry, copy: MapEntry, seen: Generation) -> bool {
        debug_assert_eq!(expected.sequence, copy.sequence, "a copy keeps its sequence");
        let stands = |found: Option<(slot::Cell, bool)>| match found {
            None => true,
            Some((slot::Cell::Data(entry), _)) => {
                entry.sequence < copy.sequence
                    || (entry.sequence == copy.sequence && entry.same_place(expected))
            }
            Some((slot::Cell::Zero(sequence), _)) => sequence < copy.sequence,
        };
        if planted(Bug::CopyWinsOverNewer) {
            self.delta.borrow_mut().replace(lba, copy);
            return true;
        }
        let in_delta = self.delta.borrow().get(lba);
        let in_frozen = self.frozen.borrow().as_ref().and_then(|frozen| frozen.get(lba));
        // What stands in the delta is newer than what is frozen.
        if !stands(in_delta) || (in_delta.is_none() && !stands(in_frozen)) {
            return false;
        }
        // Without a freeze since the lookup, everything newer than its answer is in the delta.
        let settled = seen == self.generation();
        self.delta.borrow_mut().insert(lba, copy, settled)
    }

    // Lookups.

    /// What the map says of `lba`, if that takes no read.
    #[must_use]
    pub fn lookup_cached(&self, lba: Lba) -> Option<Mapping> {
        let mut slot = [Slot::default()];
        let mut slots = Slots::new(lba, &mut slot);
        self.apply_memory(&mut slots);
        if !slots.all_settled() {
            for run in self.runs.borrow().iter() {
                // A damaged block is reported by the lookup that may wait.
                if !run::apply_cached(&run.descriptor, &self.pages, &mut slots).ok()? {
                    return None;
                }
            }
        }
        Some(slot[0].mapping())
    }

    /// What the map says of `lba`, as of the moment of the call.
    pub async fn lookup(&self, lba: Lba) -> Result<Mapping, MapError> {
        if let Some(found) = self.lookup_cached(lba) {
            return Ok(found);
        }
        let found = self.lookup_range(LbaRange { start: lba, count: 1 }).await?;
        Ok(found.first().copied().unwrap_or(Mapping::Unwritten))
    }

    /// What the map says of each block of `range`, as of the moment of the call. The caller bounds the range.
    pub async fn lookup_range(&self, range: LbaRange) -> Result<Vec<Mapping>, MapError> {
        loop {
            let layout = self.pages.layout();
            let mut found = vec![Slot::default(); usize::try_from(range.count).unwrap_or(0)];
            let mut slots = Slots::new(range.start, &mut found);
            self.apply_memory(&mut slots);
            let runs = Rc::clone(&self.runs.borrow());
            let mut result = Ok(());
            for run in runs.iter() {
                result = run::apply(&run.descriptor, &self.pages, &mut slots).await;
                if result.is_err() {
                    break;
                }
            }
            match result {
                Ok(()) => return Ok(found.iter().map(Slot::mapping).collect()),
                // A run was merged away under the lookup, and its blocks may be gone.
                Err(_) if self.pages.layout() != layout => {}
                Err(error) => return Err(error),
            }
        }
    }

    // Bands.

    /// References to `band`, superseded ones that no merge has met included: an upper bound of its live blocks.
    #[must_use]
    pub fn references(&self, band: BandId) -> u64 {
        let pages = self.page_references(band);
        if self.evacuated.borrow().contains_key(&band) {
            return pages;
        }
        pages + self.record_references(band)
    }

    /// Live blocks of `band`, as far as that can be told without reading the map: for choosing what to compact. Nothing is
    /// freed because of it.
    #[must_use]
    pub fn live_estimate(&self, band: BandId) -> u64 {
        let pages = self.page_references(band);
        if self.evacuated.borrow().contains_key(&band) {
            return pages;
        }
        let dead = self.garbage.borrow().of(band) as u64;
        pages + self.record_references(band).saturating_sub(dead)
    }

    /// Says whether [`PageMap::live_estimate`] is worth many reads: where space is short.
    pub fn survey_closely(&self, closely: bool) {
        self.surveys_closely.set(closely);
    }

    /// Whether a root built from [`PageMap::snapshot`] at this moment needs `band`, or what changed since does.
    ///
    /// A band may be freed with the publication of that root when this says `false` **and** nothing was appended
    /// to the band since the freeze: the map does not know which bands hold records of TRIMs that only a
    /// replay would find.
    #[must_use]
    pub fn refers_to(&self, band: BandId) -> bool {
        let said = self.evacuated.borrow().get(&band).copied();
        let outdone = said.is_some_and(|said| said < self.installed.get());
        // Map blocks are counted exactly, so no word of the engine overrides their count.
        self.page_references(band) > 0 || (!outdone && self.record_references(band) > 0)
    }

    /// Says that every host block of `band` was looked up and none is live any more: dead, or relocated and entered. What
    /// older runs still say of it will never win, and counts as nothing once the present delta has become a run.
    pub fn evacuated(&self, band: BandId) {
        let generation = self.generation.get();
        self.evacuated.borrow_mut().entry(band).or_insert(generation);
    }

    /// Forgets a band that has been freed.
    pub fn forget(&self, band: BandId) {
        self.evacuated.borrow_mut().remove(&band);
        self.record_counts.borrow_mut().forget(band);
        self.garbage.borrow_mut().forget(band);
        for run in self.runs.borrow().iter() {
            run.page_counts.borrow_mut().forget(band);
        }
    }

    fn record_references(&self, band: BandId) -> u64 {
        let frozen = self.frozen.borrow();
        self.delta.borrow().counts().of(band)
            + frozen.as_ref().map_or(0, |frozen| frozen.counts().of(band))
            + self.record_counts.borrow().of(band)
    }

    fn page_references(&self, band: BandId) -> u64 {
        let runs = self.runs.borrow();
        let pages = runs.iter().map(|run| run.page_counts.borrow().of(band));
        pages.sum::<u64>() + self.pending_counts.borrow().of(band)
    }

    // Memory.

    /// Another limit of the cache than [`MapSettings::cache_bytes`]: what does not fit is dropped now.
    pub fn set_cache_limit(&self, bytes_max: usize) {
        self.pages.set_cache_limit(bytes_max);
    }

    /// Bytes that the cache holds now.
    #[must_use]
    pub fn cached_bytes(&self) -> usize {
        self.pages.cached_bytes()
    }

    // Figures.

    /// Figures as of now.
    #[must_use]
    pub fn stats(&self) -> MapStats {
        let runs = self.runs.borrow();
        MapStats {
            delta_records: self.delta.borrow().len(),
            frozen_records: self.frozen.borrow().as_ref().map_or(0, |frozen| frozen.len()),
            runs: runs.len(),
            run_records: runs.iter().map(|run| run.descriptor.records).sum(),
            run_blocks: runs.iter().map(|run| run.descriptor.blocks()).sum(),
            moved_blocks: self.pages.moved().len(),
            cache: self.pages.cache_stats(),
        }
    }

    fn apply_memory(&self, slots: &mut Slots<'_>) {
        self.delta.borrow().apply(slots);
        if let Some(frozen) = &*self.frozen.borrow() {
            frozen.apply(slots);
        }
    }

    fn frozen_beats(&self, lba: Lba, sequence: Sequence) -> bool {
        let frozen = self.frozen.borrow();
        let found = frozen.as_ref().and_then(|frozen| frozen.get(lba));
        found.is_some_and(|(cell, _)| cell.sequence() > sequence)
    }

    fn run(&self, number: u32) -> Option<Rc<Run>> {
        let runs = self.runs.borrow();
        runs.iter().find(|run| run.descriptor.number == number).cloned()
    }

    fn next_run(&self) -> Result<u32, MapError> {
        let number = self.run_next.get();
        if number == RUNS - 1 {
            return Err(MapError::Exhausted);
        }
        self.run_next.set(number + 1);
        Ok(number)
    }
}
