//! What is told of dead blocks between merges.

use std::collections::BTreeMap;

use weft_proto::id::{BandId, Epoch, Sequence};
use weft_proto::units::{Lba, LbaRange};

use crate::entry::{ColumnSet, MapEntry};
use crate::map::cache::CACHED_PAGE_BYTES;
use crate::map::{MapSettings, PageMap};

use super::memory::{MemoryStore, run};
use super::model::IDENTITY;

const BLOCKS: u64 = 20_000;
const BAND_BLOCKS: u64 = 1000;
/// Apart from the bands that map blocks lie in.
const FIRST_BAND: u64 = 1 << 20;

/// A map that is overwritten at random, and where each block is.
struct Overwritten {
    map: std::rc::Rc<PageMap>,
    places: BTreeMap<u64, BandId>,
    written: u64,
    random: u64,
}

impl Overwritten {
    fn new(cache_pages: usize) -> Self {
        let settings = MapSettings {
            cache_bytes: cache_pages * CACHED_PAGE_BYTES,
            ..MapSettings::default()
        };
        let map = PageMap::new(IDENTITY, MemoryStore::new(1 << 16).handle(), settings);
        let mut this = Self {
            map,
            places: BTreeMap::new(),
            written: 0,
            random: 1,
        };
        (0..BLOCKS).for_each(|lba| this.write(lba));
        this.checkpoint();
        this
    }

    fn write(&mut self, lba: u64) {
        let band = BandId(FIRST_BAND + self.written / BAND_BLOCKS);
        self.written += 1;
        let entry = MapEntry {
            band,
            row: 1,
            column: 0,
            start: 0,
            w: 1,
            skipped: ColumnSet::NONE,
            sequence: self.sequence(),
            crc: 0,
        };
        assert!(self.map.insert(Lba(lba), entry));
        self.places.insert(lba, band);
    }

    fn sequence(&self) -> Sequence {
        Sequence {
            epoch: Epoch(1),
            counter: self.written,
        }
    }

    fn overwrite(&mut self, count: u64) {
        for _ in 0..count {
            self.random = self
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            self.write((self.random >> 33) % BLOCKS);
        }
    }

    fn checkpoint(&self) {
        assert!(self.map.freeze());
        run(self.map.write_frozen()).unwrap();
    }

    /// The largest difference between what is told of a band and what lives in it, in blocks.
    fn error(&self) -> u64 {
        let bands = (0..self.written.div_ceil(BAND_BLOCKS)).map(|band| BandId(FIRST_BAND + band));
        let mut live: BTreeMap<BandId, u64> = bands.map(|band| (band, 0)).collect();
        for band in self.places.values() {
            *live.entry(*band).or_default() += 1;
        }
        live.into_iter()
            .map(|(band, live)| self.map.live_estimate(band).abs_diff(live))
            .max()
            .unwrap_or(0)
    }
}

#[test]
fn without_a_merge_the_estimate_is_near_what_lives() {
    let mut volume = Overwritten::new(1000);
    for _ in 0..30 {
        volume.overwrite(BAND_BLOCKS);
        volume.checkpoint();
    }
    let oldest = BandId(FIRST_BAND);
    assert_eq!(
        volume.map.references(oldest),
        BAND_BLOCKS,
        "no merge gave anything back"
    );
    assert!(volume.map.live_estimate(oldest) < BAND_BLOCKS / 3);
    assert!(volume.error() < BAND_BLOCKS / 4, "{} blocks off", volume.error());
}

#[test]
fn map_blocks_that_are_not_in_memory_make_it_coarser_and_not_wrong() {
    let mut volume = Overwritten::new(60);
    for _ in 0..15 {
        volume.overwrite(BAND_BLOCKS);
        volume.checkpoint();
    }
    // The oldest bands together, because few lookups stand for many blocks.
    let bands = (0..BLOCKS / BAND_BLOCKS).map(|band| BandId(FIRST_BAND + band));
    let told: u64 = bands.clone().map(|band| volume.map.live_estimate(band)).sum();
    let live = volume
        .places
        .values()
        .filter(|place| bands.clone().any(|band| band == **place))
        .count();
    assert!(
        told.abs_diff(live as u64) < BLOCKS / 20,
        "{told} told, {live} live"
    );
}

#[test]
fn a_merge_takes_back_what_it_gives_back() {
    let mut volume = Overwritten::new(1000);
    for _ in 0..30 {
        volume.overwrite(BAND_BLOCKS);
        volume.checkpoint();
    }
    run(volume.map.merge_all(volume.sequence())).unwrap();
    assert_eq!(volume.error(), 0);
}

#[test]
fn trimmed_ranges_count_as_garbage() {
    let mut volume = Overwritten::new(1000);
    let range = LbaRange {
        start: Lba(0),
        count: BLOCKS / 2,
    };
    volume.written += 1;
    volume.map.zero_range(range, volume.sequence());
    volume.places.retain(|lba, _| *lba >= BLOCKS / 2);
    volume.checkpoint();
    let told: u64 = (0..BLOCKS / BAND_BLOCKS)
        .map(|band| volume.map.live_estimate(BandId(FIRST_BAND + band)))
        .sum();
    assert!(
        told.abs_diff(BLOCKS / 2) < BLOCKS / 20,
        "{told} blocks are told to live"
    );
}
