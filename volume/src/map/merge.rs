//! Merging adjacent runs into one, a step at a time.
//!
//! The inputs are immutable, so lookups and checkpoints go on; the output takes their place in one move when
//! it is complete. A step reads a bounded number of blocks. A merge that fails or is dropped leaves the map
//! as it was and its blocks as garbage.
//!
//! A merge is where superseded entries are met and given back to the band counts. When the oldest run is among the
//! inputs, ranges that read as zeroes are dropped, unless a replay could still bring an older version back.

use std::rc::Rc;

use weft_proto::id::Sequence;

use super::address::PageId;
use super::checkpoint::Unfinished;
use super::counts::BandCounts;
use super::leaf::Item;
use super::page::Page;
use super::pages::Pages;
use super::run::{RunDescriptor, child};
use super::slot::{Cell, Slot};
use super::store::MapError;
use super::writer::{PendingCounts, RunWriter};
use super::{PageMap, Run};

/// What [`PageMap::merge_step`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeProgress {
    /// Nothing to merge.
    Idle,
    /// More to do.
    Working,
    /// A merge was completed.
    Done,
}

/// Reads a run from its first record to its last, each block once and past the cache.
struct Cursor {
    pages: Rc<Pages>,
    /// From the top down to the leaf; with each block the slot that is next.
    path: Vec<(PageId, Page, usize)>,
    top: Option<RunDescriptor>,
    current: Option<Item>,
}

impl Cursor {
    fn new(pages: Rc<Pages>, run: RunDescriptor) -> Self {
        Self {
            pages,
            path: Vec::new(),
            top: Some(run),
            current: None,
        }
    }

    /// Makes the next record current where there is one. Answers the number of blocks read for it.
    async fn fill(&mut self) -> Result<usize, MapError> {
        let mut read = 0;
        if let Some(run) = self.top.take() {
            let page = self.pages.read(run.top_id(), run.top).await?;
            self.path.push((run.top_id(), page, 0));
            read += 1;
        }
        while self.current.is_none() {
            let Some((id, page, slot)) = self.path.last_mut() else {
                break;
            };
            let here = *slot;
            *slot += 1;
            match page {
                Page::Leaf(leaf) if here < leaf.len() => self.current = Some(leaf.item(here)),
                Page::Index(index) if here < index.len() => {
                    let (id, place) = child(*id, here, page)?;
                    let page = self.pages.read(id, place).await?;
                    self.path.push((id, page, 0));
                    read += 1;
                }
                Page::Leaf(_) | Page::Index(_) => drop(self.path.pop()),
            }
        }
        Ok(read)
    }

    /// Cuts off what lies before `lba`.
    fn advance(&mut self, lba: u64) {
        if let Some(item) = &mut self.current {
            if item.end() <= lba {
                self.current = None;
            } else if item.lba < lba {
                item.count = item.end() - lba;
                item.lba = lba;
            }
        }
    }
}

/// A merge under way.
pub(crate) struct Merge {
    /// From the newest to the oldest.
    inputs: Vec<u32>,
    cursors: Vec<Cursor>,
    writer: RunWriter,
    /// Whether nothing is older than the inputs.
    bottom: bool,
    /// Ranges of zeroes below this sequence are dropped at the bottom.
    floor: Sequence,
    /// The last range, kept back because the next one may continue it.
    held: Option<Item>,
    superseded: BandCounts,
}

/// What a finished merge leaves.
pub(crate) struct Merged {
    /// The runs that the output replaces, from the newest to the oldest.
    pub(crate) inputs: Vec<u32>,
    /// The output and where its blocks lie; `None` when nothing was left.
    pub(crate) output: Option<(RunDescriptor, BandCounts)>,
    /// Entries that no longer stand in any run.
    pub(crate) superseded: BandCounts,
}

impl Merge {
    /// `runs` are adjacent, from the newest to the oldest.
    pub(crate) fn new(
        pages: &Rc<Pages>,
        runs: &[RunDescriptor],
        number: u32,
        bottom: bool,
        floor: Sequence,
        pending: PendingCounts,
    ) -> Self {
        Self {
            inputs: runs.iter().map(|run| run.number).collect(),
            cursors: runs
                .iter()
                .map(|run| Cursor::new(Rc::clone(pages), *run))
                .collect(),
            writer: RunWriter::new(Rc::clone(pages), number, pending),
            bottom,
            floor,
            held: None,
            superseded: BandCounts::default(),
        }
    }

    /// Whether `run` is an input.
    pub(crate) fn reads(&self, run: u32) -> bool {
        self.inputs.contains(&run)
    }

    pub(crate) fn output_number(&self) -> u32 {
        self.writer.number()
    }

    /// Reads about `blocks` blocks and writes what they give. `true` when the inputs are used up.
    pub(crate) async fn step(&mut self, blocks: usize) -> Result<bool, MapError> {
        let mut read = 0;
        loop {
            for cursor in &mut self.cursors {
                if cursor.current.is_none() {
                    read += cursor.fill().await?;
                }
            }
            if !self.sweep()? {
                return Ok(true);
            }
            if self.writer.is_full() {
                self.writer.flush().await?;
            }
            if read >= blocks {
                return Ok(false);
            }
        }
    }

    /// Completes the output after the last step.
    pub(crate) async fn finish(mut self) -> Result<Merged, MapError> {
        if let Some(held) = self.held.take() {
            self.writer.push(&held)?;
        }
        Ok(Merged {
            inputs: self.inputs,
            output: self.writer.finish().await?,
            superseded: self.superseded,
        })
    }

    /// Decides the first LBAs on which all inputs stay the same. `false` when there are none left.
    fn sweep(&mut self) -> Result<bool, MapError> {
        let items = || self.cursors.iter().filter_map(|cursor| cursor.current);
        let Some(start) = items().map(|item| item.lba).min() else {
            return Ok(false);
        };
        let end = items()
            .map(|item| if item.lba == start { item.end() } else { item.lba })
            .min()
            .unwrap_or(start);
        let mut slot = Slot::default();
        for item in items().filter(|item| item.lba == start) {
            slot.offer(item.cell, item.settled);
        }
        let mut kept = false;
        for item in items().filter(|item| item.lba == start) {
            if let Cell::Data(entry) = item.cell {
                // A replay may have entered the same copy a second time: one of them is given back.
                if kept || slot.best() != Some(item.cell) {
                    self.superseded.add(entry.band, 1);
                } else {
                    kept = true;
                }
            }
        }
        for cursor in &mut self.cursors {
            cursor.advance(end);
        }
        let Some(cell) = slot.best() else {
            return Ok(true);
        };
        if self.bottom && matches!(cell, Cell::Zero(sequence) if sequence < self.floor) {
            return Ok(true);
        }
        self.emit(Item {
            lba: start,
            count: end - start,
            cell,
            settled: self.bottom || slot.is_settled(),
        })?;
        Ok(true)
    }

    /// Joins adjoining ranges of one sequence, which superseded records had cut.
    fn emit(&mut self, item: Item) -> Result<(), MapError> {
        if let Some(held) = &mut self.held {
            if held.end() == item.lba
                && held.settled == item.settled
                && held.cell == item.cell
                && matches!(item.cell, Cell::Zero(_))
            {
                held.count += item.count;
                return Ok(());
            }
            let held = *held;
            self.held = None;
            self.writer.push(&held)?;
        }
        match item.cell {
            Cell::Zero(_) => self.held = Some(item),
            Cell::Data(_) => self.writer.push(&item)?,
        }
        Ok(())
    }
}

impl PageMap {
    /// Does about `blocks` blocks' worth of merging, if any is due, and otherwise of rewriting the index of moved blocks, if
    /// there are too many. Waits while another call is at it.
    ///
    /// `floor`: a range of zeroes below this sequence was visible before any stripe was formed that a replay from a
    /// later root could apply, and no such stripe has an older version of a block in it. Such ranges are dropped where no
    /// older run is left. A copy may be looked up before and written after a range becomes visible: ranges that were
    /// pending then are not below the floor. `Sequence { epoch: 0, counter: 0 }` keeps all.
    pub async fn merge_step(&self, blocks: usize, floor: Sequence) -> Result<MergeProgress, MapError> {
        let mut place = self.merge.lock().await;
        let merge = match place.take() {
            Some(merge) => merge,
            None => {
                let records: Vec<u64> = self.run_records();
                let Some(count) = choose(&records, self.settings.merge_fan_in, self.settings.runs_max) else {
                    let folded = self.fold_moved(None, blocks, self.settings.moved_max).await?;
                    return Ok(match folded {
                        0 => MergeProgress::Idle,
                        _ => MergeProgress::Working,
                    });
                };
                self.begin_merge(count, floor)?
            }
        };
        self.continue_merge(&mut place, merge, blocks).await
    }

    /// Merges all runs into one, so that band counts become exact as of the last checkpoint. For a pool
    /// that is tight, and for tests; it reads and rewrites the whole map.
    pub async fn merge_all(&self, floor: Sequence) -> Result<(), MapError> {
        let mut place = self.merge.lock().await;
        while let Some(merge) = place.take() {
            self.continue_merge(&mut place, merge, usize::MAX).await?;
        }
        let count = self.runs.borrow().len();
        if count > 0 {
            let merge = self.begin_merge(count, floor)?;
            self.continue_merge(&mut place, merge, usize::MAX).await?;
        }
        Ok(())
    }

    fn run_records(&self) -> Vec<u64> {
        self.runs
            .borrow()
            .iter()
            .map(|run| run.descriptor.records)
            .collect()
    }

    fn begin_merge(&self, count: usize, floor: Sequence) -> Result<Merge, MapError> {
        let runs = Rc::clone(&self.runs.borrow());
        let inputs: Vec<RunDescriptor> = runs.iter().take(count).map(|run| run.descriptor).collect();
        let bottom = count >= runs.len();
        let pending = Rc::clone(&self.pending_counts);
        Ok(Merge::new(
            &self.pages,
            &inputs,
            self.next_run()?,
            bottom,
            floor,
            pending,
        ))
    }

    /// `place` is where a merge waits for its next step.
    async fn continue_merge(
        &self,
        place: &mut Option<Merge>,
        mut merge: Merge,
        blocks: usize,
    ) -> Result<MergeProgress, MapError> {
        // Lives until the merge is back in its place or done, so that a dropped future leaves nothing behind.
        let unfinished = Unfinished::new(self, merge.output_number());
        if !merge.step(blocks).await? {
            unfinished.keep();
            *place = Some(merge);
            return Ok(MergeProgress::Working);
        }
        let merged = merge.finish().await?;
        let mut runs = self.runs.borrow().to_vec();
        let at = runs
            .iter()
            .position(|run| merged.inputs.contains(&run.descriptor.number));
        runs.retain(|run| !merged.inputs.contains(&run.descriptor.number));
        if let (Some(at), Some((descriptor, page_counts))) = (at, merged.output) {
            runs.insert(at, Run::new(descriptor, page_counts));
        }
        *self.runs.borrow_mut() = runs.into();
        self.record_counts.borrow_mut().subtract_all(&merged.superseded);
        if self.runs.borrow().len() <= 1 {
            self.garbage.borrow_mut().clear();
        } else {
            self.garbage.borrow_mut().subtract_all(&merged.superseded);
        }
        for number in merged.inputs {
            self.pages.retire(number);
        }
        Ok(MergeProgress::Done)
    }
}

/// Which runs to merge next, as a range of `records` from the newest to the oldest.
///
/// Tiers: the newest runs are merged with the next older one as long as that is not larger than they
/// are together, so a record is rewritten once per tier. Fewer than `fan_in` runs are left alone until there are more
/// than `runs_max`; then the cheapest prefix that helps is merged.
pub(crate) fn choose(records: &[u64], fan_in: usize, runs_max: usize) -> Option<usize> {
    let mut total = 0;
    let mut tier = 0;
    for (index, count) in records.iter().enumerate() {
        if index > 0 && *count > total {
            break;
        }
        total += count;
        tier = index + 1;
    }
    if tier >= fan_in {
        return Some(tier);
    }
    (records.len() > runs_max).then_some(tier.max(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_tier_wait_until_there_are_enough() {
        assert_eq!(choose(&[], 4, 8), None);
        assert_eq!(choose(&[10, 10, 10], 4, 8), None);
        assert_eq!(choose(&[10, 10, 10, 10], 4, 8), Some(4));
        assert_eq!(choose(&[10, 10, 10, 10, 1000], 4, 8), Some(4));
        assert_eq!(choose(&[10, 10, 10, 10, 40, 1000], 4, 8), Some(5));
        assert_eq!(choose(&[10, 10, 10, 10, 41, 1000], 4, 8), Some(4));
    }

    #[test]
    fn too_many_runs_are_merged_whatever_their_sizes() {
        assert_eq!(choose(&[1, 10, 100, 1000], 4, 4), None);
        assert_eq!(choose(&[1, 10, 100, 1000, 10000], 4, 4), Some(2));
    }

    #[test]
    fn steady_checkpoints_keep_the_number_of_runs_bounded_and_the_work_logarithmic() {
        let mut runs: Vec<u64> = Vec::new();
        let mut rewritten = 0;
        for _ in 0..2000 {
            runs.insert(0, 100);
            while let Some(count) = choose(&runs, 4, 16) {
                let merged = runs.drain(..count).sum();
                rewritten += merged;
                runs.insert(0, merged);
            }
            assert!(runs.len() <= 16);
        }
        assert!(rewritten < 2000 * 100 * 12, "rewrote {rewritten} records");
    }
}
