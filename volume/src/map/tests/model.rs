//! The page map against a `BTreeMap`: writes, late writes, trims, compaction copies, checkpoints, merges,
//! moves of map blocks, freed bands, and crashes that replay the log since the last published root in any order.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::rc::Rc;

use bytes::Bytes;
use proptest::prelude::*;
use weft_proto::band::Geometry;
use weft_proto::id::{BandId, ClusterId, Epoch, LayerId, Sequence, StripeNumber, VolumeId};
use weft_proto::units::{Lba, LbaRange};

use crate::entry::{ColumnSet, MapEntry};
use crate::map::{
    Generation, MapIdentity, MapSettings, Mapping, MergeProgress, PageMap, PageState, Root, RootHead,
};

use super::memory::{MAP_BANDS, MemoryStore, run};

const LBAS: u64 = 700;
const USER_BAND_BLOCKS: u32 = 48;

pub(crate) const IDENTITY: MapIdentity = MapIdentity {
    volume: VolumeId(7),
    layer: LayerId(8),
};

/// What a stripe in the log tells a replay.
#[derive(Clone, Copy, Debug)]
enum Logged {
    Block(u64, MapEntry),
    Zero(u64, u64, Sequence),
}

/// A write, trim or copy that has its sequence and is not visible yet.
struct InFlight {
    logged: Logged,
    /// Set for a compaction copy: what was looked up, and when.
    copy_of: Option<(MapEntry, Generation)>,
    /// The lowest sequence that may follow in the log because of it.
    since: u64,
}

impl InFlight {
    fn band(&self) -> Option<BandId> {
        match self.logged {
            Logged::Block(_, entry) => Some(entry.band),
            Logged::Zero(..) => None,
        }
    }
}

/// What a crash falls back to.
#[derive(Clone)]
struct Published {
    payload: Vec<Bytes>,
    /// Where the log goes on.
    log_start: usize,
}

fn entry(band: BandId, row: u32, lba: u64, sequence: Sequence) -> MapEntry {
    MapEntry {
        band,
        row,
        column: 2,
        start: 1,
        w: 4,
        skipped: ColumnSet(0x10_0001),
        sequence,
        crc: lba as u32,
    }
}

struct World {
    store: Rc<MemoryStore>,
    map: Rc<PageMap>,
    settings: MapSettings,
    counter: u64,
    user_band: u64,
    user_row: u32,
    /// User blocks on drives.
    disk: BTreeMap<(BandId, u32), (u64, Sequence)>,
    model: BTreeMap<u64, (Sequence, bool)>,
    in_flight: Vec<InFlight>,
    log: Vec<Logged>,
    /// Of each logged stripe, [`InFlight::since`].
    log_since: Vec<u64>,
    /// Where a replay from the root to come begins: it meets some stripes that are in the root already.
    frozen_at: usize,
    frozen_floor: u64,
    floor: u64,
    published: Published,
    freed: BTreeSet<BandId>,
}

fn sequence(counter: u64) -> Sequence {
    Sequence {
        epoch: Epoch(3),
        counter,
    }
}

fn replay(map: &PageMap, logged: Logged) {
    match logged {
        Logged::Block(lba, entry) => {
            map.insert(Lba(lba), entry);
        }
        Logged::Zero(start, count, sequence) => map.zero_range(
            LbaRange {
                start: Lba(start),
                count,
            },
            sequence,
        ),
    }
}

pub(crate) fn root(map: &PageMap) -> Root {
    Root {
        cluster: ClusterId([1; 16]),
        volume: IDENTITY.volume,
        name: "model".into(),
        size_bytes: LBAS * 4096,
        layer: IDENTITY.layer,
        layers: vec![IDENTITY.layer],
        geometry: Geometry::new(4, 2).unwrap(),
        epoch: Epoch(3),
        root_version: 1,
        counter_next: 1,
        stripe_next: StripeNumber(1),
        complete: StripeNumber(0),
        ended: Vec::new(),
        bands: Vec::new(),
        map: map.snapshot(),
    }
}

impl World {
    fn new(cache_bytes: usize) -> Self {
        let store = MemoryStore::new(20);
        let settings = MapSettings {
            cache_bytes,
            runs_max: 4,
            merge_fan_in: 3,
            moved_max: 5,
        };
        let map = PageMap::new(IDENTITY, store.handle(), settings);
        let payload = run(root(&map).write(&map, 1)).unwrap();
        Self {
            store,
            map,
            settings,
            counter: 1,
            user_band: 1,
            user_row: 0,
            disk: BTreeMap::new(),
            model: BTreeMap::new(),
            in_flight: Vec::new(),
            log: Vec::new(),
            log_since: Vec::new(),
            frozen_at: 0,
            frozen_floor: 0,
            floor: 0,
            published: Published {
                payload,
                log_start: 0,
            },
            freed: BTreeSet::new(),
        }
    }

    fn next_sequence(&mut self) -> Sequence {
        self.counter += 1;
        sequence(self.counter)
    }

    fn place(&mut self, lba: u64, sequence: Sequence) -> MapEntry {
        if self.user_row == USER_BAND_BLOCKS {
            self.user_band += 1;
            self.user_row = 0;
        }
        let entry = entry(BandId(self.user_band), self.user_row, lba, sequence);
        self.user_row += 1;
        self.disk.insert((entry.band, entry.row), (lba, sequence));
        entry
    }

    fn begin(&mut self, lba: u64) {
        let sequence = self.next_sequence();
        let entry = self.place(lba, sequence);
        self.in_flight.push(InFlight {
            logged: Logged::Block(lba, entry),
            copy_of: None,
            since: sequence.counter,
        });
    }

    fn begin_zero(&mut self, start: u64, count: u64) {
        let sequence = self.next_sequence();
        self.in_flight.push(InFlight {
            logged: Logged::Zero(start, count, sequence),
            copy_of: None,
            since: sequence.counter,
        });
    }

    fn complete(&mut self, index: usize) {
        let done = self.in_flight.swap_remove(index);
        self.log.push(done.logged);
        self.log_since.push(done.since);
        match (done.logged, done.copy_of) {
            (Logged::Block(lba, entry), Some((expected, seen))) => {
                self.map.relocate(Lba(lba), &expected, entry, seen);
            }
            (logged, _) => {
                replay(&self.map, logged);
                self.enter(logged);
            }
        }
    }

    /// Makes the model see what has become visible.
    fn enter(&mut self, logged: Logged) {
        let (start, end, sequence, data) = match logged {
            Logged::Block(lba, entry) => (lba, lba + 1, entry.sequence, true),
            Logged::Zero(start, count, sequence) => (start, (start + count).min(LBAS), sequence, false),
        };
        for lba in start..end {
            let found = self.model.entry(lba).or_insert((sequence, data));
            if found.0 <= sequence {
                *found = (sequence, data);
            }
        }
    }

    fn begin_copy(&mut self, lba: u64) -> bool {
        let seen = self.map.generation();
        let Mapping::Data(found) = run(self.map.lookup(Lba(lba))).unwrap() else {
            return false;
        };
        // A trim that has its sequence and is not visible yet will outdo the copy.
        let since = self.in_flight.iter().map(|write| write.since).min();
        let since = since.unwrap_or(self.counter);
        let entry = self.place(lba, found.sequence);
        self.in_flight.push(InFlight {
            logged: Logged::Block(lba, entry),
            copy_of: Some((found, seen)),
            since,
        });
        true
    }

    fn freeze(&mut self) {
        if self.map.freeze() {
            self.frozen_at = self.log.len().saturating_sub(30);
            let logged = self.log_since[self.frozen_at..].iter().copied();
            let oldest = self.in_flight.iter().map(|write| write.since).chain(logged).min();
            self.frozen_floor = oldest.unwrap_or(self.counter);
        }
    }

    fn checkpoint(&mut self, fail: bool, fresh: bool) {
        if fresh {
            self.freeze();
        }
        self.store.fail_appends.set(u32::from(fail));
        let written = run(self.map.write_frozen());
        self.store.fail_appends.set(0);
        if written.is_err() {
            assert!(fail);
            return;
        }
        self.floor = self.frozen_floor;
        // Bands that nothing is appended to any more, decided at the same moment as the root.
        let freed: Vec<BandId> = self
            .bands()
            .into_iter()
            .filter(|band| !self.is_written(*band) && !self.map.refers_to(*band))
            .collect();
        let payload = run(root(&self.map).write(&self.map, 1)).unwrap();
        self.published = Published {
            payload,
            log_start: self.frozen_at,
        };
        for band in freed {
            self.disk.retain(|place, _| place.0 != band);
            self.store.free(band);
            self.map.forget(band);
            self.freed.insert(band);
        }
        self.check_root();
    }

    fn load_published(&self) -> Rc<PageMap> {
        let payload = self.published.payload.concat();
        let head = RootHead::read(&payload, Some(IDENTITY)).unwrap();
        let loaded = run(head.load(&*self.store.handle())).unwrap();
        PageMap::load(IDENTITY, self.store.handle(), self.settings, &loaded.map)
    }

    /// No committed root refers to a band that is freed, even without the log.
    fn check_root(&self) {
        let map = self.load_published();
        for lba in 0..LBAS {
            if let Mapping::Data(entry) = run(map.lookup(Lba(lba))).unwrap() {
                assert_eq!(
                    self.disk.get(&(entry.band, entry.row)),
                    Some(&(lba, entry.sequence)),
                    "the root's {lba}"
                );
            }
        }
    }

    fn fold(&self, blocks: usize, keep: usize) {
        run(async {
            let merging = self.map.merge.lock().await;
            self.map.fold_moved(merging.as_ref(), blocks, keep).await
        })
        .unwrap();
    }

    /// With everything in one run, the counts of bands are exact.
    fn check_counts(&mut self) {
        self.checkpoint(false, true);
        self.checkpoint(false, true);
        self.checkpoint(false, true);
        run(self.map.merge_all(sequence(self.floor))).unwrap();
        let mut live: BTreeMap<BandId, u64> = BTreeMap::new();
        for lba in 0..LBAS {
            if let Mapping::Data(entry) = run(self.map.lookup(Lba(lba))).unwrap() {
                *live.entry(entry.band).or_default() += 1;
            }
        }
        for band in self.bands().into_iter().filter(|band| band.0 < MAP_BANDS) {
            let exact = live.get(&band).copied().unwrap_or(0);
            assert_eq!(self.map.record_references(band), exact, "{band}");
        }
        let stats = self.map.stats();
        assert_eq!((stats.runs <= 1, stats.moved_blocks), (true, 0));
        let pages: u64 = self
            .store
            .bands()
            .into_iter()
            .map(|band| self.map.page_references(band))
            .sum();
        assert_eq!(pages, stats.run_blocks);
    }

    fn bands(&self) -> Vec<BandId> {
        let mut bands = self.store.bands();
        bands.extend(self.disk.keys().map(|place| place.0));
        bands.sort_unstable();
        bands.dedup();
        bands
    }

    /// Open, or the last root's scan would find something there that is not in it.
    fn is_written(&self, band: BandId) -> bool {
        band == BandId(self.user_band)
            || band == self.store.open_band()
            || self.in_flight.iter().any(|write| write.band() == Some(band))
            || self.log[self.frozen_at..]
                .iter()
                .any(|logged| matches!(logged, Logged::Block(_, entry) if entry.band == band))
    }

    /// Moves every live block out of a sealed band of user blocks.
    fn evacuate(&mut self, pick: u64) {
        let bands: Vec<BandId> = self
            .bands()
            .into_iter()
            .filter(|band| band.0 < MAP_BANDS && !self.is_written(*band))
            .collect();
        if bands.is_empty() {
            return;
        }
        let victim = bands[pick as usize % bands.len()];
        let held: Vec<u64> = self
            .disk
            .iter()
            .filter(|(place, _)| place.0 == victim)
            .map(|(_, (lba, _))| *lba)
            .collect();
        for lba in held {
            let found = run(self.map.lookup(Lba(lba))).unwrap();
            if found.entry().is_some_and(|entry| entry.band == victim) && self.begin_copy(lba) {
                self.complete(self.in_flight.len() - 1);
            }
        }
        self.map.evacuated(victim);
        assert_eq!(self.map.references(victim), 0);
    }

    /// Moves every live map block out of a sealed band of map blocks.
    fn evacuate_pages(&mut self, pick: u64) {
        self.store.seal();
        let bands = self.store.bands();
        if bands.is_empty() {
            return;
        }
        let victim = bands[pick as usize % bands.len()];
        let mut pending = false;
        for (lba, place, data) in self.store.in_band(victim) {
            match run(self.map.page_state(lba, &place)).unwrap() {
                PageState::Live => {
                    let copy = self.store.put(lba, Some(place.sequence), data);
                    assert!(self.map.relocate_page(lba, &place, copy));
                }
                PageState::Dead => {}
                PageState::Pending => pending = true,
            }
        }
        if !pending {
            self.map.evacuated(victim);
        }
    }

    /// Everything in memory is lost; the last published root and the log after it are not. A stripe that was
    /// in flight may have reached the drives.
    fn crash(&mut self, order: u64) {
        for (index, write) in std::mem::take(&mut self.in_flight).into_iter().enumerate() {
            if order >> (index % 64) & 1 == 1 {
                self.log.push(write.logged);
                self.log_since.push(write.since);
                if write.copy_of.is_none() {
                    self.enter(write.logged);
                }
            }
        }
        self.map = self.load_published();
        let mut stripes = self.log[self.published.log_start..].to_vec();
        let mut random = order | 1;
        for index in (1..stripes.len()).rev() {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            stripes.swap(index, (random >> 33) as usize % (index + 1));
        }
        for logged in stripes {
            replay(&self.map, logged);
        }
        self.frozen_at = self.published.log_start;
        self.frozen_floor = 0;
        self.floor = 0;
    }

    fn check(&self) {
        let range = LbaRange {
            start: Lba(0),
            count: LBAS,
        };
        let found = run(self.map.lookup_range(range)).unwrap();
        let mut live: BTreeMap<BandId, u64> = BTreeMap::new();
        for (lba, found) in (0..LBAS).zip(found) {
            match (self.model.get(&lba), found) {
                (Some((sequence, true)), Mapping::Data(entry)) => {
                    assert_eq!(entry.sequence, *sequence, "at {lba}");
                    assert_eq!(
                        self.disk.get(&(entry.band, entry.row)),
                        Some(&(lba, *sequence)),
                        "at {lba}"
                    );
                    assert_eq!(
                        (entry.column, entry.start, entry.w, entry.skipped, entry.crc),
                        (2, 1, 4, ColumnSet(0x10_0001), lba as u32)
                    );
                    *live.entry(entry.band).or_default() += 1;
                }
                (Some((sequence, false)), Mapping::Zero(found)) => assert_eq!(found, *sequence, "at {lba}"),
                (None | Some((_, false)), Mapping::Unwritten) => {}
                (expected, found) => panic!("LBA {lba}: {found:?} where {expected:?} belongs"),
            }
            if let Some(cached) = self.map.lookup_cached(Lba(lba)) {
                assert_eq!(cached, run(self.map.lookup(Lba(lba))).unwrap());
            }
        }
        self.check_superseded();
        for (band, count) in live {
            assert!(self.map.refers_to(band), "{band} has {count} live blocks");
            assert!(
                self.map.references(band) >= count,
                "{band} has {count} live blocks"
            );
        }
    }

    /// What memory says to be superseded is, of every block that was ever written.
    fn check_superseded(&self) {
        let mut entries: Vec<(Lba, MapEntry)> = self
            .disk
            .iter()
            .map(|((band, row), (lba, sequence))| (Lba(*lba), entry(*band, *row, *lba, *sequence)))
            .collect();
        entries.sort_by_key(|(lba, _)| *lba);
        let superseded = self.map.superseded(&entries);
        for ((lba, entry), superseded) in entries.iter().zip(superseded) {
            let newest = self.model.get(&lba.0).map(|(sequence, _)| *sequence);
            assert!(
                !superseded || newest > Some(entry.sequence),
                "LBA {lba}: {entry:?}"
            );
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Write { start: u64, count: u64, leave: u64 },
    Complete(u64),
    Zero { start: u64, count: u64, wait: bool },
    BeginCopy(u64),
    Freeze,
    Checkpoint { fail: bool, fresh: bool },
    MergeStep(usize),
    MergeAll,
    DropMerge,
    Evacuate(u64),
    EvacuatePages(u64),
    Fold { blocks: usize, keep: usize },
    Crash(u64),
    Check,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0..LBAS, 1u64..160, 0u64..3).prop_map(|(start, count, leave)| Op::Write { start, count, leave }),
        // A few hot blocks, so that late writes, late trims and copies of one block meet.
        4 => (0u64..6, 1u64..4, 0u64..12).prop_map(|(start, count, leave)| Op::Write { start, count, leave }),
        2 => (0u64..6, 1u64..4, any::<bool>())
            .prop_map(|(start, count, wait)| Op::Zero { start, count, wait }),
        2 => (0u64..6).prop_map(Op::BeginCopy),
        3 => any::<u64>().prop_map(Op::Complete),
        3 => (0..LBAS, prop_oneof![3 => 1u64..40, 1 => Just(1u64 << 50)], any::<bool>())
            .prop_map(|(start, count, wait)| Op::Zero { start, count, wait }),
        2 => (0..LBAS).prop_map(Op::BeginCopy),
        2 => Just(Op::Freeze),
        5 => (prop::bool::weighted(0.1), prop::bool::weighted(0.8))
            .prop_map(|(fail, fresh)| Op::Checkpoint { fail, fresh }),
        5 => (1usize..6).prop_map(Op::MergeStep),
        1 => Just(Op::MergeAll),
        1 => Just(Op::DropMerge),
        3 => any::<u64>().prop_map(Op::Evacuate),
        3 => any::<u64>().prop_map(Op::EvacuatePages),
        2 => (1usize..4, 0usize..3).prop_map(|(blocks, keep)| Op::Fold { blocks, keep }),
        2 => any::<u64>().prop_map(Op::Crash),
        2 => Just(Op::Check),
    ]
}

fn apply(world: &mut World, op: Op) {
    match op {
        Op::Write { start, count, leave } => {
            for lba in start..(start + count).min(LBAS) {
                world.begin(lba);
            }
            while world.in_flight.len() as u64 > leave {
                world.complete(0);
            }
        }
        Op::Complete(index) if !world.in_flight.is_empty() => {
            world.complete(index as usize % world.in_flight.len());
        }
        Op::Complete(_) => {}
        Op::Zero { start, count, wait } => {
            world.begin_zero(start, count);
            if !wait {
                world.complete(world.in_flight.len() - 1);
            }
        }
        Op::BeginCopy(lba) => {
            world.begin_copy(lba);
        }
        Op::Freeze => world.freeze(),
        Op::Checkpoint { fail, fresh } => world.checkpoint(fail, fresh),
        Op::MergeStep(blocks) => {
            run(world.map.merge_step(blocks, sequence(world.floor))).unwrap();
        }
        Op::MergeAll => run(world.map.merge_all(sequence(world.floor))).unwrap(),
        Op::DropMerge => {
            let step = world.map.merge_step(3, sequence(world.floor));
            let mut step = Box::pin(step);
            let mut context = std::task::Context::from_waker(futures_util::task::noop_waker_ref());
            let _ = step.as_mut().poll(&mut context);
        }
        Op::Evacuate(pick) => world.evacuate(pick),
        Op::EvacuatePages(pick) => world.evacuate_pages(pick),
        Op::Fold { blocks, keep } => {
            world.fold(blocks, keep);
        }
        Op::Crash(order) => world.crash(order),
        Op::Check => world.check(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn the_map_agrees_with_a_btreemap_through_everything(
        ops in prop::collection::vec(op(), 1..80),
        cache_pages in 1usize..12,
    ) {
        let mut world = World::new(cache_pages * crate::map::cache::CACHED_PAGE_BYTES);
        for op in ops {
            apply(&mut world, op);
        }
        world.check();
        let stats = world.map.stats();
        prop_assert!(stats.cache.resident_bytes <= cache_pages * crate::map::cache::CACHED_PAGE_BYTES);
        // What a crash leaves is the same volume.
        world.crash(1);
        world.check();
        world.check_counts();
        world.check();
    }
}

#[test]
fn freed_bands_come_back_as_fast_as_they_are_overwritten() {
    let mut world = World::new(1 << 20);
    for round in 0..60 {
        apply(
            &mut world,
            Op::Write {
                start: 0,
                count: LBAS,
                leave: 0,
            },
        );
        for pick in 0..3 {
            world.evacuate(pick);
            world.evacuate_pages(pick);
        }
        world.checkpoint(false, true);
        while run(world.map.merge_step(4, sequence(world.floor))).unwrap() != MergeProgress::Idle {}
        if round % 7 == 0 {
            world.crash(round);
        }
        world.check();
    }
    assert!(!world.freed.is_empty());
    let written = 60 * LBAS;
    assert!(
        (world.disk.len() as u64) < written / 4,
        "{} of {written} blocks are still held",
        world.disk.len()
    );
}
