//! Which of many entries memory knows to be superseded: what compaction asks of a victim's blocks, of which most are.
//!
//! A lookup of each would go down every run from its top. Here the entries come in the order of their LBAs, and each run is
//! gone through once, with the leaf of the last answer at hand: a band's blocks are several in each leaf unless its volume
//! is much larger than its bands.
//!
//! Promise: what is said to be superseded is, for ever, because versions only rise. What is not said to be may be superseded all the
//! same: by what is not in the cache, by a copy of the same version, or since.

use weft_proto::id::Sequence;
use weft_proto::units::Lba;

use crate::entry::MapEntry;

use super::PageMap;
use super::leaf::Leaf;
use super::page::Page;
use super::pages::Pages;
use super::run::{Descent, RunDescriptor, Step, version_at};

impl PageMap {
    /// Marks those of `entries`, whose LBAs ascend, of which memory knows a higher version.
    #[must_use]
    pub fn superseded(&self, entries: &[(Lba, MapEntry)]) -> Vec<bool> {
        debug_assert!(entries.is_sorted_by_key(|(lba, _)| *lba));
        let mut superseded = vec![false; entries.len()];
        self.supersede_by(
            entries,
            &mut superseded,
            self.delta.borrow().sequence_max(),
            |lba| {
                let (cell, _) = self.delta.borrow().get(lba)?;
                Some(cell.sequence())
            },
        );
        if let Some(frozen) = &*self.frozen.borrow() {
            self.supersede_by(entries, &mut superseded, frozen.sequence_max(), |lba| {
                frozen.get(lba).map(|(cell, _)| cell.sequence())
            });
        }
        for run in self.runs.borrow().iter() {
            let mut sweep = Sweep::new(&run.descriptor, &self.pages);
            self.supersede_by(entries, &mut superseded, run.descriptor.sequence_max, |lba| {
                sweep.version(lba.0)
            });
        }
        superseded
    }

    /// Marks those that are not marked yet and for which a source, whose highest version is `highest`, has a higher one.
    fn supersede_by(
        &self,
        entries: &[(Lba, MapEntry)],
        superseded: &mut [bool],
        highest: Sequence,
        mut version: impl FnMut(Lba) -> Option<Sequence>,
    ) {
        for ((lba, entry), superseded) in entries.iter().zip(superseded) {
            if !*superseded && entry.sequence < highest {
                *superseded = version(*lba).is_some_and(|version| version > entry.sequence);
            }
        }
    }
}

/// One run, asked for LBAs in ascending order.
struct Sweep<'a> {
    run: &'a RunDescriptor,
    pages: &'a Pages,
    /// The leaf that answers for LBAs below `end`, and its first LBA; without one nobody does.
    leaf: Option<(Leaf, u64)>,
    end: u64,
}

impl<'a> Sweep<'a> {
    fn new(run: &'a RunDescriptor, pages: &'a Pages) -> Self {
        Self {
            run,
            pages,
            leaf: None,
            end: 0,
        }
    }

    /// The version of `lba` that the run has, if it has one and the cache knows.
    fn version(&mut self, lba: u64) -> Option<Sequence> {
        if lba >= self.end {
            self.descend(lba);
        }
        let (leaf, first) = self.leaf.as_ref()?;
        version_at(leaf, lba, *first, self.end)
    }

    fn descend(&mut self, lba: u64) {
        // A block that is not in the cache, or damaged, answers for nothing but this LBA.
        (self.leaf, self.end) = (None, lba + 1);
        let mut descent = Descent::new(self.run, lba);
        while let Some(page) = self.pages.cached(descent.needs().0) {
            match (descent.take(&page), page) {
                (Ok(Step::Down), _) => {}
                (Ok(Step::Nothing { end }), _) => {
                    self.end = end;
                    return;
                }
                (Ok(Step::Leaf { first, end }), Page::Leaf(leaf)) => {
                    (self.leaf, self.end) = (Some((leaf, first)), end);
                    return;
                }
                (Ok(Step::Leaf { .. }) | Err(_), _) => return,
            }
        }
    }
}
