//! A sorted, immutable run: a tree of blocks, leaves with records and index blocks with their places.
//!
//! Every level of index blocks is full except for its last block, so a child's position follows from its
//! parent's: child `slot` of the index block at `position` stands at `position` × 89 + `slot`. Records are
//! disjoint and ascending over the whole run, so one leaf answers for an LBA.

use std::rc::Rc;

use weft_proto::id::Sequence;

use crate::entry::MapEntry;

use super::address::{POSITIONS, PageId};
use super::block::FormatError;
use super::index::{CHILDREN_PER_PAGE, Child};
use super::leaf::Leaf;
use super::page::Page;
use super::pages::Pages;
use super::slot::Slots;
use super::store::MapError;

/// What a root says of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunDescriptor {
    /// Never reused within the layer.
    pub number: u32,
    /// Index levels above the leaves: 0 when the run is one leaf.
    pub height: u8,
    /// Where the one block of the highest level lies.
    pub top: MapEntry,
    /// Leaf blocks.
    pub leaves: u32,
    /// Records in all leaves.
    pub records: u64,
    /// No record has a higher sequence.
    pub sequence_max: Sequence,
}

impl RunDescriptor {
    pub(crate) fn top_id(&self) -> PageId {
        PageId {
            run: self.number,
            level: self.height,
            position: 0,
        }
    }

    /// Blocks of all levels.
    pub(crate) fn blocks(&self) -> u64 {
        let mut level_blocks = u64::from(self.leaves);
        let mut blocks = level_blocks;
        for _ in 0..self.height {
            level_blocks = level_blocks.div_ceil(CHILDREN_PER_PAGE as u64);
            blocks += level_blocks;
        }
        blocks
    }
}

/// The way from the top of a run to the leaf that answers for an LBA.
pub(crate) struct Descent {
    lba: u64,
    id: PageId,
    place: MapEntry,
    /// First LBA of the block that is needed, as far as is known.
    first: u64,
    /// The leaf that will be found answers for LBAs below this.
    end: u64,
}

/// What a [`Descent`] needs or has found.
pub(crate) enum Step {
    /// The records of the block that was given are the answer up to `end`, exclusive.
    Leaf {
        /// No record of the leaf is of a lower LBA.
        first: u64,
        /// First LBA that another leaf answers for.
        end: u64,
    },
    /// One level down.
    Down,
    /// The run has nothing before `end`, exclusive.
    Nothing {
        /// First LBA the run may know.
        end: u64,
    },
}

impl Descent {
    pub(crate) fn new(run: &RunDescriptor, lba: u64) -> Self {
        Self {
            lba,
            id: run.top_id(),
            place: run.top,
            first: 0,
            end: u64::MAX,
        }
    }

    /// The block needed now, and where it was written.
    pub(crate) fn needs(&self) -> (PageId, MapEntry) {
        (self.id, self.place)
    }

    /// Takes the block that was needed.
    pub(crate) fn take(&mut self, page: &Page) -> Result<Step, MapError> {
        if self.id.level == 0 {
            return Ok(Step::Leaf {
                first: self.first,
                end: self.end,
            });
        }
        let children = page.children();
        let slot = first_past(children, self.lba, self.first, self.end);
        if let Some(next) = children.get(slot) {
            self.end = self.end.min(next.lba());
        }
        let Some(slot) = slot.checked_sub(1) else {
            return Ok(Step::Nothing { end: self.end });
        };
        let (id, place) = child(self.id, slot, page)?;
        self.first = children[slot].lba();
        self.id = id;
        self.place = place;
        Ok(Step::Down)
    }
}

/// The slot of the index block `at` under which `id`, which is below it, stands. `None` when it stands elsewhere.
pub(crate) fn slot_towards(at: PageId, id: PageId) -> Option<usize> {
    let mut position = u64::from(id.position);
    for _ in id.level + 1..at.level {
        position /= CHILDREN_PER_PAGE as u64;
    }
    let slot = position.checked_sub(u64::from(at.position) * CHILDREN_PER_PAGE as u64)?;
    usize::try_from(slot)
        .ok()
        .filter(|slot| *slot < CHILDREN_PER_PAGE)
}

/// The child in `slot` of the index block `parent`, and where it was written.
pub(crate) fn child(parent: PageId, slot: usize, page: &Page) -> Result<(PageId, MapEntry), MapError> {
    let out_of_range = || MapError::damaged(parent, FormatError::Field("record"));
    let place = page
        .children()
        .get(slot)
        .and_then(Child::place)
        .ok_or_else(out_of_range)?;
    let position = u64::from(parent.position) * CHILDREN_PER_PAGE as u64 + slot as u64;
    let position = u32::try_from(position)
        .ok()
        .filter(|position| *position < POSITIONS)
        .ok_or_else(out_of_range)?;
    let id = PageId {
        run: parent.run,
        level: parent.level - 1,
        position,
    };
    Ok((id, place))
}

/// LBAs in ascending order, of the records of a leaf or the children of an index block.
trait Ascending {
    fn len(&self) -> usize;

    /// Of the one in `slot`, below `len`.
    fn lba(&self, slot: usize) -> u64;
}

impl Ascending for Leaf {
    fn len(&self) -> usize {
        self.len()
    }

    fn lba(&self, slot: usize) -> u64 {
        self.lba(slot)
    }
}

impl Ascending for [Child] {
    fn len(&self) -> usize {
        self.len()
    }

    fn lba(&self, slot: usize) -> u64 {
        self[slot].lba()
    }
}

/// The slot of the first one past `lba`, of those that lie within `first … end`.
///
/// What a run has is spread over its LBAs nearly evenly more often than not, so the search begins at the place in
/// proportion and widens from there. Most searches touch one or two cache lines of a block that is in no cache, where a
/// binary search touches six.
fn first_past<A: Ascending + ?Sized>(lbas: &A, lba: u64, first: u64, end: u64) -> usize {
    let Some(last) = lbas.len().checked_sub(1) else {
        return 0;
    };
    // Without an end from the level above, the last one is the end.
    let end = if end == u64::MAX { lbas.lba(last) } else { end };
    let share = lba.saturating_sub(first) as f64 / end.saturating_sub(first).max(1) as f64;
    let guess = ((share * lbas.len() as f64) as usize).min(last);
    // Up to `low`, exclusive, none is past `lba`; from `high` on every one is.
    let (mut low, mut high) = (0, lbas.len());
    let mut step = 1;
    if lbas.lba(guess) <= lba {
        low = guess + 1;
        while low < high {
            let probe = (low + step - 1).min(last);
            if lbas.lba(probe) > lba {
                high = probe;
                break;
            }
            low = probe + 1;
            step *= 2;
        }
    } else {
        high = guess;
        while low < high {
            let probe = high.saturating_sub(step);
            if lbas.lba(probe) <= lba {
                low = probe + 1;
                break;
            }
            high = probe;
            step *= 2;
        }
    }
    while low < high {
        let middle = low + (high - low) / 2;
        if lbas.lba(middle) <= lba {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// Offers what a leaf knows of `from … end`; it has nothing below `first`, and the next one begins at `next`.
fn offer(page: &Page, slots: &mut Slots<'_>, first: u64, next: u64, from: u64, end: u64) {
    let Page::Leaf(leaf) = page else {
        return;
    };
    let at = first_past(leaf, from, first, next).saturating_sub(1);
    for slot in (at..leaf.len()).take_while(|slot| leaf.lba(*slot) < end) {
        let item = leaf.item(slot);
        slots.offer(item.lba.max(from), item.end(), item.cell, item.settled);
    }
}

/// The version that a leaf has of `lba`; it has nothing below `first`, and the next one begins at `next`.
pub(crate) fn version_at(leaf: &Leaf, lba: u64, first: u64, next: u64) -> Option<Sequence> {
    let slot = first_past(leaf, lba, first, next).checked_sub(1)?;
    let (end, sequence) = leaf.version(slot);
    (lba < end).then_some(sequence)
}

/// Offers what `run` knows, as far as the cache reaches. `false` when a block would have to be read.
pub(crate) fn apply_cached(
    run: &RunDescriptor,
    pages: &Pages,
    slots: &mut Slots<'_>,
) -> Result<bool, MapError> {
    let mut from = slots.start();
    while let Some(lba) = slots.next_open(from, run.sequence_max) {
        let mut descent = Descent::new(run, lba);
        from = loop {
            let Some(page) = pages.cached(descent.needs().0) else {
                return Ok(false);
            };
            match descent.take(&page)? {
                Step::Down => {}
                Step::Nothing { end } => break end,
                Step::Leaf { first, end } => {
                    let upto = end.min(slots.end());
                    offer(&page, slots, first, end, lba, upto);
                    break end;
                }
            }
        };
    }
    Ok(true)
}

/// Offers what `run` knows, reading what is not cached.
pub(crate) async fn apply(
    run: &RunDescriptor,
    pages: &Rc<Pages>,
    slots: &mut Slots<'_>,
) -> Result<(), MapError> {
    let mut from = slots.start();
    while let Some(lba) = slots.next_open(from, run.sequence_max) {
        let mut descent = Descent::new(run, lba);
        from = loop {
            let (id, place) = descent.needs();
            let page = pages.page(id, place).await?;
            match descent.take(&page)? {
                Step::Down => {}
                Step::Nothing { end } => break end,
                Step::Leaf { first, end } => {
                    let upto = end.min(slots.end());
                    offer(&page, slots, first, end, lba, upto);
                    break end;
                }
            }
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Ascending for Vec<u64> {
        fn len(&self) -> usize {
            self.len()
        }

        fn lba(&self, slot: usize) -> u64 {
            self[slot]
        }
    }

    fn check(lbas: &Vec<u64>, lba: u64, first: u64, end: u64) {
        let expected = lbas.iter().filter(|known| **known <= lba).count();
        assert_eq!(
            first_past(lbas, lba, first, end),
            expected,
            "{lba} in {lbas:?}, {first} … {end}"
        );
    }

    proptest! {
        #[test]
        fn a_search_by_proportion_finds_what_counting_finds(
            lbas in prop::collection::btree_set(prop_oneof![0u64..200, any::<u64>()], 0..400),
            lba in prop_oneof![0u64..200, any::<u64>()],
            slack in 0u64..1000,
        ) {
            let lbas: Vec<u64> = lbas.into_iter().collect();
            let (low, high) = (lbas.first().copied().unwrap_or(0), lbas.last().copied().unwrap_or(0));
            for first in [0, low.saturating_sub(slack), low] {
                for end in [u64::MAX, high.saturating_add(slack), high.saturating_add(1)] {
                    check(&lbas, lba, first, end);
                    for known in &lbas {
                        check(&lbas, *known, first, end);
                    }
                }
            }
        }
    }
}
