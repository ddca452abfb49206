//! Runs of several index levels, moved blocks, memory bounds, and lookups beside merges.

use std::cell::Cell;
use std::rc::Rc;

use futures_util::future::{join, join_all, join3};
use weft_proto::id::{BandId, Epoch, Sequence};
use weft_proto::units::{Lba, LbaRange};

use crate::entry::{ColumnSet, MapEntry};
use crate::map::cache::CACHED_PAGE_BYTES;
use crate::map::index::CHILDREN_PER_PAGE;
use crate::map::writer::LEAF_RECORDS;
use crate::map::{MapSettings, Mapping, MergeProgress, PageMap, PageState};

use super::memory::{MemoryStore, pause, run};
use super::model::IDENTITY;

const COUNT: u64 = 20_000;

fn sequence(counter: u64) -> Sequence {
    Sequence {
        epoch: Epoch(1),
        counter,
    }
}

fn entry(lba: u64, counter: u64) -> MapEntry {
    MapEntry {
        band: BandId(1 + counter / 1000),
        row: (lba % 16384) as u32,
        column: 0,
        start: 0,
        w: 1,
        skipped: ColumnSet::NONE,
        sequence: sequence(counter),
        crc: counter as u32,
    }
}

/// Block `index` is at LBA 3 × `index`: between two of them nothing was written.
fn filled(store: &Rc<MemoryStore>, cache_pages: usize) -> Rc<PageMap> {
    let settings = MapSettings {
        cache_bytes: cache_pages * CACHED_PAGE_BYTES,
        ..MapSettings::default()
    };
    let map = PageMap::new(IDENTITY, store.handle(), settings);
    for index in 0..COUNT {
        assert!(map.insert(Lba(3 * index), entry(3 * index, index + 1)));
    }
    assert!(map.freeze());
    run(map.write_frozen()).unwrap();
    map
}

async fn check(map: &PageMap, indices: impl Iterator<Item = u64>) {
    for index in indices {
        let lba = 3 * index;
        assert_eq!(
            map.lookup(Lba(lba)).await.unwrap(),
            Mapping::Data(entry(lba, index + 1))
        );
        assert_eq!(map.lookup(Lba(lba + 1)).await.unwrap(), Mapping::Unwritten);
    }
}

#[test]
fn a_run_of_three_levels_answers_for_every_block_with_one_read_per_level() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 1);
    assert!(COUNT > (LEAF_RECORDS * CHILDREN_PER_PAGE) as u64, "three levels");
    let stats = map.stats();
    let leaves = COUNT.div_ceil(LEAF_RECORDS as u64);
    assert_eq!(stats.run_records, COUNT);
    assert_eq!(
        stats.run_blocks,
        leaves + leaves.div_ceil(CHILDREN_PER_PAGE as u64) + 1
    );
    assert_eq!(store.blocks.borrow().len() as u64, stats.run_blocks);
    run(check(&map, (0..COUNT).step_by(7)));
    let before = store.reads.get();
    run(check(&map, [COUNT / 2].into_iter()));
    assert!(store.reads.get() - before <= 6, "two lookups of three levels");
    assert_eq!(
        map.lookup_cached(Lba(3)),
        None,
        "a cache of one block does not reach down"
    );
    for outside in [3 * COUNT, 1 << 61] {
        assert_eq!(run(map.lookup(Lba(outside))).unwrap(), Mapping::Unwritten);
    }
}

#[test]
fn a_range_is_looked_up_with_one_read_per_leaf() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 64);
    let count = 1000;
    let range = LbaRange {
        start: Lba(3000),
        count,
    };
    let found = run(map.lookup_range(range)).unwrap();
    for (lba, found) in (3000..).zip(&found) {
        let expected = if lba % 3 == 0 {
            Mapping::Data(entry(lba, lba / 3 + 1))
        } else {
            Mapping::Unwritten
        };
        assert_eq!(*found, expected);
    }
    let leaves = count / 3 / LEAF_RECORDS as u64 + 2;
    assert!(store.reads.get() <= leaves + 2, "{} reads", store.reads.get());
    let before = store.reads.get();
    assert_eq!(run(map.lookup_range(range)).unwrap(), found);
    assert_eq!(store.reads.get(), before, "all of it was cached");
    assert!(map.lookup_cached(Lba(3333)).is_some());
}

#[test]
fn what_is_superseded_is_said_of_many_blocks_at_once_as_far_as_memory_knows() {
    let store = MemoryStore::new(50);
    let map = filled(&store, COUNT as usize);
    let newer = |index: u64| entry(3 * index, COUNT + index + 1);
    // Every fifth block has a newer version in a run, every seventh in memory, and a range reads as zeroes.
    for index in (0..COUNT).step_by(5) {
        assert!(map.insert(Lba(3 * index), newer(index)));
    }
    assert!(map.freeze());
    run(map.write_frozen()).unwrap();
    for index in (0..COUNT).step_by(7) {
        assert!(map.insert(Lba(3 * index), newer(index)));
    }
    let zeroes = 1000..2000;
    let range = LbaRange {
        start: Lba(3 * zeroes.start),
        count: 3 * (zeroes.end - zeroes.start),
    };
    map.zero_range(range, sequence(3 * COUNT));
    let entries: Vec<_> = (0..COUNT)
        .map(|index| (Lba(3 * index), entry(3 * index, index + 1)))
        .collect();
    let expected = |run_is_known: bool| {
        (0..COUNT).map(move |index| {
            (run_is_known && index % 5 == 0) || index % 7 == 0 || (1000..2000).contains(&index)
        })
    };
    assert!(
        map.superseded(&entries).into_iter().eq(expected(false)),
        "no leaf was ever read"
    );
    let reads = store.reads.get();
    for (lba, _) in &entries {
        run(map.lookup(*lba)).unwrap();
    }
    assert!(store.reads.get() > reads);
    let reads = store.reads.get();
    assert!(map.superseded(&entries).into_iter().eq(expected(true)));
    assert_eq!(store.reads.get(), reads);
    // Between the blocks nobody knows anything, and beyond them neither.
    let unknown: Vec<_> = [1, 2, 4, 3 * COUNT, 1 << 60]
        .map(|lba| (Lba(lba), entry(lba, 1)))
        .into();
    assert_eq!(map.superseded(&unknown), [false; 5]);
}

#[test]
fn a_cached_block_keeps_no_receive_buffer() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 20);
    run(check(&map, (0..COUNT).step_by(41)));
    assert!(map.stats().cache.resident_bytes > 0);
    assert_eq!(store.receive_buffers(), 0);
}

#[test]
fn the_cache_never_holds_more_than_its_limit() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 5);
    for index in (0..COUNT).step_by(41) {
        run(check(&map, [index].into_iter()));
        assert!(map.stats().cache.resident_bytes <= 5 * CACHED_PAGE_BYTES);
    }
    assert!(map.stats().cache.misses > 0 && map.stats().cache.hits > 0);
}

#[test]
fn another_limit_of_the_cache_holds_at_once_and_every_block_is_found_as_before() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 64);
    for limit in [64, 3, 40, 1, 64] {
        map.set_cache_limit(limit * CACHED_PAGE_BYTES);
        assert!(map.cached_bytes() <= limit * CACHED_PAGE_BYTES);
        run(check(&map, (0..COUNT).step_by(97)));
        assert!(map.cached_bytes() <= limit * CACHED_PAGE_BYTES);
        assert!(
            map.cached_bytes() >= limit.min(40) * CACHED_PAGE_BYTES,
            "it fills again"
        );
    }
}

#[test]
fn many_lookups_of_one_block_are_one_read() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 64);
    run(join_all((0..64).map(|_| map.lookup(Lba(300)))));
    assert_eq!(store.reads.get(), 3, "one for each level");
}

#[test]
fn what_changed_and_was_not_checkpointed_is_all_that_grows_in_memory() {
    let store = MemoryStore::new(500);
    let map = filled(&store, 4);
    for round in 1..=5 {
        for index in 0..100 {
            map.insert(Lba(index), entry(index, COUNT * round + index));
        }
        assert_eq!(map.stats().delta_records, 100);
        assert!(map.freeze());
        run(map.write_frozen()).unwrap();
        assert_eq!((map.stats().delta_records, map.stats().frozen_records), (0, 0));
    }
}

#[test]
fn a_trim_of_the_whole_volume_is_one_record_until_the_bottom_drops_it() {
    let store = MemoryStore::new(500);
    let map = filled(&store, 64);
    let everything = LbaRange {
        start: Lba(0),
        count: 1 << 40,
    };
    map.zero_range(everything, sequence(COUNT + 1));
    assert_eq!(map.stats().delta_records, 1);
    map.freeze();
    run(map.write_frozen()).unwrap();
    assert_eq!(
        run(map.lookup(Lba(300))).unwrap(),
        Mapping::Zero(sequence(COUNT + 1))
    );
    run(map.merge_all(sequence(0))).unwrap();
    assert_eq!(
        map.stats().run_records,
        1,
        "a replay could still bring a block back"
    );
    assert!((1..=COUNT / 1000 + 1).all(|band| !map.refers_to(BandId(band))));
    run(map.merge_all(sequence(COUNT + 2))).unwrap();
    assert_eq!(map.stats().runs, 0);
    assert_eq!(run(map.lookup(Lba(300))).unwrap(), Mapping::Unwritten);
    assert!(store.bands().iter().all(|band| !map.refers_to(*band)));
}

#[test]
fn every_map_block_can_move_and_folding_empties_the_table_of_moved_blocks() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 3);
    for round in 0..3 {
        let bands = store.bands();
        store.seal();
        for band in &bands {
            for (lba, place, data) in store.in_band(*band) {
                match run(map.page_state(lba, &place)).unwrap() {
                    PageState::Live => {
                        let copy = store.put(lba, Some(place.sequence), data);
                        assert!(map.relocate_page(lba, &place, copy));
                        assert_eq!(run(map.page_state(lba, &place)).unwrap(), PageState::Dead);
                    }
                    PageState::Dead => {}
                    PageState::Pending => panic!("nothing is being written"),
                }
            }
            assert!(!map.refers_to(*band));
            store.free(*band);
        }
        assert_eq!(map.stats().moved_blocks as u64, map.stats().run_blocks);
        if round == 1 {
            while run(map.fold_moved(None, 2, 1)).unwrap() > 0 {}
            assert_eq!(map.stats().moved_blocks, 1, "the top's place stands in the root");
            let live: u64 = store.bands().iter().map(|band| map.page_references(*band)).sum();
            assert_eq!(live, map.stats().run_blocks);
        }
        run(check(&map, (0..COUNT).step_by(171)));
    }
    let reloaded = PageMap::load(IDENTITY, store.handle(), MapSettings::default(), &map.snapshot());
    run(check(&reloaded, (0..COUNT).step_by(171)));
}

#[test]
fn lookups_go_on_while_runs_are_merged_away_under_them_and_their_bands_are_freed() {
    let store = MemoryStore::new(16);
    let settings = MapSettings {
        cache_bytes: 2 * CACHED_PAGE_BYTES,
        runs_max: 2,
        merge_fan_in: 2,
        moved_max: 5,
    };
    let map = PageMap::new(IDENTITY, store.handle(), settings);
    let newest = Cell::new(0);
    let done = Cell::new(false);
    let work = async {
        for round in 0..30 {
            for index in 0..400 {
                map.insert(Lba(3 * index), entry(3 * index, 400 * round + index + 1));
            }
            newest.set(round);
            assert!(map.freeze());
            map.write_frozen().await.unwrap();
            while map.merge_step(2, sequence(0)).await.unwrap() != MergeProgress::Idle {}
            for band in store.bands() {
                if band != store.open_band() && !map.refers_to(band) {
                    store.free(band);
                    map.forget(band);
                }
            }
        }
        done.set(true);
    };
    let reader = |offset: u64| {
        let (map, newest, done) = (&map, &newest, &done);
        async move {
            let mut lookups = 0u64;
            while !done.get() {
                let index = (offset + lookups * 37) % 400;
                let before = newest.get();
                let found = map.lookup(Lba(3 * index)).await.unwrap();
                if let Mapping::Data(found) = found {
                    let round = (found.sequence.counter - index - 1) / 400;
                    assert!(round >= before && round <= newest.get());
                } else {
                    assert_eq!(before, 0);
                }
                lookups += 1;
                pause().await;
            }
            lookups
        }
    };
    let (_, lookups) = run(join(work, join_all((0..8).map(|offset| reader(offset * 50)))));
    assert!(lookups.iter().sum::<u64>() > 1000);
}

#[test]
fn a_checkpoint_that_fails_loses_nothing_and_can_be_repeated() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 8);
    map.insert(Lba(1), entry(1, COUNT + 7));
    assert!(map.freeze());
    map.insert(Lba(2), entry(2, COUNT + 8));
    store.fail_appends.set(1);
    assert!(run(map.write_frozen()).is_err());
    assert!(!map.freeze(), "what is frozen has to be written first");
    assert_eq!(
        run(map.lookup(Lba(1))).unwrap(),
        Mapping::Data(entry(1, COUNT + 7))
    );
    run(map.write_frozen()).unwrap();
    assert_eq!(map.stats().frozen_records, 0);
    for (lba, counter) in [(1, COUNT + 7), (2, COUNT + 8)] {
        assert_eq!(
            run(map.lookup(Lba(lba))).unwrap(),
            Mapping::Data(entry(lba, counter))
        );
    }
}

#[test]
fn a_merge_that_fails_is_abandoned_and_leaves_the_map_as_it_was() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 8);
    map.insert(Lba(2), entry(2, COUNT + 7));
    map.freeze();
    run(map.write_frozen()).unwrap();
    store.fail_appends.set(1);
    assert!(run(map.merge_all(sequence(0))).is_err());
    assert_eq!(map.stats().runs, 2);
    let live: u64 = store.bands().iter().map(|band| map.page_references(*band)).sum();
    assert_eq!(live, map.stats().run_blocks);
    run(map.merge_all(sequence(0))).unwrap();
    assert_eq!(map.stats().runs, 1);
    run(check(&map, (0..COUNT).step_by(997)));
}

#[test]
fn calls_that_meet_take_turns() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 8);
    for round in 1..6 {
        for index in 0..200 {
            map.insert(Lba(3 * index), entry(3 * index, COUNT * round + index));
        }
        assert!(map.freeze());
        let (first, second) = run(join(map.write_frozen(), map.write_frozen()));
        assert_eq!((first, second), (Ok(()), Ok(())));
        assert_eq!(map.stats().runs, 1 + round as usize);
    }
    let (stepped, all, again) = run(join3(
        map.merge_step(1, sequence(0)),
        map.merge_all(sequence(0)),
        map.merge_all(sequence(0)),
    ));
    assert_eq!(
        (stepped, all, again),
        (Ok(MergeProgress::Working), Ok(()), Ok(()))
    );
    assert_eq!(map.stats().run_records, COUNT);
    let live: u64 = (0..200).map(|band| map.record_references(BandId(band))).sum();
    assert_eq!(live, COUNT);
}

#[test]
fn a_damaged_map_block_is_an_error_and_not_an_answer() {
    let store = MemoryStore::new(50);
    let map = filled(&store, 8);
    for (_, _, data) in store.blocks.borrow_mut().values_mut() {
        let mut bytes = data.to_vec();
        bytes[100] ^= 1;
        *data = bytes.into();
    }
    let error = run(map.lookup(Lba(300))).unwrap_err();
    assert!(matches!(error, crate::map::MapError::Damaged { .. }), "{error}");
    assert_eq!(map.lookup_cached(Lba(300)), None);
}
