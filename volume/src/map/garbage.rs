//! An estimate of the references that are dead already, by band: what compaction chooses its victims by.
//!
//! A write does not look up what it supersedes, because that could wait for a map page; the superseded entry is given
//! back when a merge meets both, which for the oldest run is seldom. Until then the band counts hide which bands are full
//! of garbage. So when a run is written, a sample of its records is looked up in the older runs and stands for the rest: many of
//! those that memory can answer, a few of those that take a read.
//!
//! It is for choosing. Whether a band may be freed is decided by [`BandCounts`], which are never too low.

use std::collections::BTreeMap;
use std::rc::Rc;

use weft_proto::id::BandId;
use weft_proto::units::Lba;

use super::counts::BandCounts;
use super::leaf::Item;
use super::pages::Pages;
use super::slot::{Cell, Slot, Slots};
use super::{Run, run};

/// Of so many blocks of a run one is looked up: a lookup costs a tenth of what it costs to write a block.
const SAMPLE_EVERY: usize = 4;
/// Of so many lookups that would have to read one does, while there is space. Where space is short every one does: a victim that was
/// chosen wrongly costs a thousand lookups.
const READ_EVERY: usize = 8;
/// A lookup that stands for so many blocks always reads.
const WORTH_A_READ: f64 = 64.0;
/// Places of a range of zeroes that are looked up.
const SAMPLES_PER_RANGE: u64 = 64;

/// Dead references by band. A band that is not listed has none, as far as is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Garbage(BTreeMap<BandId, f64>);

impl Garbage {
    pub(crate) fn of(&self, band: BandId) -> f64 {
        self.0.get(&band).copied().unwrap_or(0.0)
    }

    /// Enters what a new run supersedes.
    pub(crate) fn add(&mut self, survey: &Survey) {
        for (sample, scale) in [(&survey.looked_up, 1.0), (&survey.read, survey.unread_scale())] {
            for (band, found) in &sample.superseded {
                *self.0.entry(*band).or_default() += found * scale;
            }
        }
    }

    /// Takes away what a merge gave back.
    pub(crate) fn subtract_all(&mut self, given_back: &BandCounts) {
        for (band, count) in given_back.iter() {
            if let Some(found) = self.0.get_mut(&band) {
                *found = (*found - count as f64).max(0.0);
            }
        }
    }

    /// The counts are exact.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(crate) fn forget(&mut self, band: BandId) {
        self.0.remove(&band);
    }
}

/// What the records of a run supersede in older runs.
#[derive(Default)]
pub(crate) struct Survey {
    /// Whether every lookup of the sample may read.
    closely: bool,
    seen: usize,
    /// Lookups that stand for themselves: memory answered, or they were worth a read.
    looked_up: Sample,
    /// Lookups that read map blocks, for others that would have had to.
    read: Sample,
    /// Lookups that would have had to read, in all.
    unread: usize,
    unread_blocks: f64,
}

#[derive(Default)]
struct Sample {
    /// Blocks that the lookups stand for.
    blocks: f64,
    superseded: BTreeMap<BandId, f64>,
}

impl Survey {
    pub(crate) fn new(closely: bool) -> Self {
        Self {
            closely,
            ..Self::default()
        }
    }

    /// Looks at the next record of the new run, if it is in the sample. `older` are the runs before it. A map block that
    /// cannot be read, or is damaged, is reported by who needs it.
    pub(crate) async fn look(&mut self, item: &Item, older: &[Rc<Run>], pages: &Rc<Pages>) {
        match item.cell {
            Cell::Data(_) => {
                self.seen += 1;
                if self.seen.is_multiple_of(SAMPLE_EVERY) {
                    self.look_up(item, item.lba, SAMPLE_EVERY as f64, older, pages)
                        .await;
                }
            }
            Cell::Zero(_) => {
                let samples = item.count.min(SAMPLES_PER_RANGE);
                let each = item.count as f64 / samples as f64;
                for sample in 0..samples {
                    let lba = item.lba + (sample as f64 * each) as u64;
                    self.look_up(item, lba, each, older, pages).await;
                }
            }
        }
    }

    async fn look_up(&mut self, item: &Item, lba: u64, blocks: f64, older: &[Rc<Run>], pages: &Rc<Pages>) {
        let mut slot = [Slot::default()];
        let mut slots = Slots::new(Lba(lba), &mut slot);
        let in_memory = older
            .iter()
            .all(|run| matches!(run::apply_cached(&run.descriptor, pages, &mut slots), Ok(true)));
        if in_memory {
            self.looked_up.enter(item, &slot[0], blocks);
            return;
        }
        let worth_a_read = self.closely || blocks >= WORTH_A_READ;
        if !worth_a_read {
            self.unread_blocks += blocks;
            self.unread += 1;
            if self.unread % READ_EVERY != 1 {
                return;
            }
        }
        slot = [Slot::default()];
        let mut slots = Slots::new(Lba(lba), &mut slot);
        for run in older {
            if run::apply(&run.descriptor, pages, &mut slots).await.is_err() {
                return;
            }
        }
        let sample = if worth_a_read {
            &mut self.looked_up
        } else {
            &mut self.read
        };
        sample.enter(item, &slot[0], blocks);
    }

    /// How much more blocks would have had to be read for than were.
    fn unread_scale(&self) -> f64 {
        self.unread_blocks / self.read.blocks.max(1.0)
    }
}

impl Sample {
    fn enter(&mut self, item: &Item, found: &Slot, blocks: f64) {
        self.blocks += blocks;
        let Some(Cell::Data(before)) = found.best() else {
            return;
        };
        let dead = match item.cell {
            // What a replay found may be older than what is known.
            Cell::Data(entry) if before.sequence > entry.sequence => entry.band,
            Cell::Zero(sequence) if before.sequence > sequence => return,
            Cell::Data(_) | Cell::Zero(_) => before.band,
        };
        *self.superseded.entry(dead).or_default() += blocks;
    }
}
