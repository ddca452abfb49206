//! Writing a run: records in, blocks out, level by level.
//!
//! A leaf is laid out when the next record has no room in it, a block of level L + 1 when 89 blocks of level L have got
//! their places, so only one block per level and one batch wait in memory, however long the run is.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use weft_proto::id::Sequence;

use super::address::{INDEX_LEVEL_MAX, POSITIONS, PageId};
use super::counts::BandCounts;
use super::delta::SEQUENCE_ZERO;
use super::index::{CHILDREN_PER_PAGE, Child, Index};
use super::leaf::{Item, LEAF_RECORDS_MAX, LeafBuilder};
use super::pages::Pages;
use super::run::RunDescriptor;
use super::store::{MapBlock, MapError};

/// Blocks handed to the store at once. Few in tests, so that short runs take several batches.
pub(crate) const APPEND_BLOCKS: usize = if cfg!(test) { 3 } else { 64 };

/// Records in a leaf at most. Few in tests, so that short runs have several levels.
pub(crate) const LEAF_RECORDS: usize = if cfg!(test) { 89 } else { LEAF_RECORDS_MAX };

/// The references of the blocks that unfinished runs have already written: they keep bands from being freed.
pub(crate) type PendingCounts = Rc<RefCell<BandCounts>>;

/// A level of index blocks under construction.
#[derive(Debug, Default)]
struct Level {
    children: Vec<Child>,
    /// Of the block under construction: how many were laid out.
    position: u32,
}

/// A laid-out block waiting for its batch.
struct Waiting {
    id: PageId,
    first_lba: u64,
    block: MapBlock,
}

/// Streams records, in ascending order and disjoint, into a new run.
pub(crate) struct RunWriter {
    pages: Rc<Pages>,
    number: u32,
    leaf: LeafBuilder,
    /// Leaves laid out.
    leaves: u32,
    /// Above the leaves, from the lowest.
    levels: Vec<Level>,
    waiting: Vec<Waiting>,
    records: u64,
    sequence_max: Sequence,
    /// What the blocks written so far lie in; also part of `pending` while this writer lives.
    page_counts: BandCounts,
    pending: PendingCounts,
}

impl Drop for RunWriter {
    fn drop(&mut self) {
        self.pending.borrow_mut().subtract_all(&self.page_counts);
    }
}

impl RunWriter {
    pub(crate) fn new(pages: Rc<Pages>, number: u32, pending: PendingCounts) -> Self {
        Self {
            pages,
            number,
            leaf: LeafBuilder::default(),
            leaves: 0,
            levels: Vec::new(),
            waiting: Vec::new(),
            records: 0,
            sequence_max: SEQUENCE_ZERO,
            page_counts: BandCounts::default(),
            pending,
        }
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Takes the next record. The caller calls [`RunWriter::flush`] when [`RunWriter::is_full`].
    pub(crate) fn push(&mut self, item: &Item) -> Result<(), MapError> {
        self.records += 1;
        self.sequence_max = self.sequence_max.max(item.cell.sequence());
        if self.leaf.len() == LEAF_RECORDS || !self.leaf.push(item) {
            self.close_leaf()?;
            let taken = self.leaf.push(item);
            assert!(taken, "an empty leaf has room for any record");
        }
        Ok(())
    }

    /// Whether a batch waits to be written.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting.len() >= APPEND_BLOCKS
    }

    /// Writes the blocks that wait.
    pub(crate) async fn flush(&mut self) -> Result<(), MapError> {
        let waiting = std::mem::take(&mut self.waiting);
        let blocks = waiting.iter().map(|waiting| waiting.block.clone()).collect();
        let places = self.pages.store.append(blocks).await?;
        assert_eq!(
            places.len(),
            waiting.len(),
            "the store answers a place for each block"
        );
        for (waiting, place) in waiting.iter().zip(places) {
            self.page_counts.add(place.band, 1);
            self.pending.borrow_mut().add(place.band, 1);
            self.push_child(waiting.id.level + 1, Child::new(waiting.first_lba, place))?;
        }
        Ok(())
    }

    /// Writes what is left. `None` when there was no record. The second value is where the blocks lie, by band.
    pub(crate) async fn finish(mut self) -> Result<Option<(RunDescriptor, BandCounts)>, MapError> {
        if self.records == 0 {
            return Ok(None);
        }
        self.close_leaf()?;
        let mut height = 0;
        loop {
            while !self.waiting.is_empty() {
                self.flush().await?;
            }
            // A level with one block, all of whose places are known, is the top.
            let above = &self.levels[usize::from(height)];
            if let (0, [top]) = (above.position, &above.children[..])
                && let Some(top) = top.place()
            {
                let descriptor = RunDescriptor {
                    number: self.number,
                    height,
                    top,
                    leaves: self.leaves,
                    records: self.records,
                    sequence_max: self.sequence_max,
                };
                return Ok(Some((descriptor, self.page_counts.clone())));
            }
            height += 1;
            self.close_index(height)?;
        }
    }

    fn close_leaf(&mut self) -> Result<(), MapError> {
        let Some(first_lba) = self.leaf.first_lba() else {
            return Ok(());
        };
        let id = self.next_id(0, self.leaves)?;
        let data = self.leaf.encode(self.pages.identity, id);
        self.wait(id, first_lba, data);
        self.leaf.clear();
        self.leaves += 1;
        Ok(())
    }

    fn push_child(&mut self, level: u8, child: Child) -> Result<(), MapError> {
        let above_leaves = usize::from(level - 1);
        if above_leaves == self.levels.len() {
            self.levels.push(Level::default());
        }
        self.levels[above_leaves].children.push(child);
        if self.levels[above_leaves].children.len() == CHILDREN_PER_PAGE {
            self.close_index(level)?;
        }
        Ok(())
    }

    /// Lays out the index block under construction at `level`, if it has a child.
    fn close_index(&mut self, level: u8) -> Result<(), MapError> {
        let under = &self.levels[usize::from(level - 1)];
        let Some(first) = under.children.first() else {
            return Ok(());
        };
        let id = self.next_id(level, under.position)?;
        let (first_lba, data) = (
            first.lba(),
            Index::encode(self.pages.identity, id, &under.children),
        );
        self.wait(id, first_lba, data);
        let under = &mut self.levels[usize::from(level - 1)];
        under.children.clear();
        under.position += 1;
        Ok(())
    }

    fn next_id(&self, level: u8, position: u32) -> Result<PageId, MapError> {
        if level > INDEX_LEVEL_MAX || position == POSITIONS - 1 {
            return Err(MapError::Exhausted);
        }
        Ok(PageId {
            run: self.number,
            level,
            position,
        })
    }

    fn wait(&mut self, id: PageId, first_lba: u64, data: Bytes) {
        self.waiting.push(Waiting {
            id,
            first_lba,
            block: MapBlock { lba: id.lba(), data },
        });
    }
}
