//! Writing a run: records in, blocks out, level by level.
//!
//! A block of level L + 1 is laid out when 89 blocks of level L have got their places, so only one block per
//! level and one batch wait in memory, however long the run is.

use std::cell::RefCell;
use std::rc::Rc;

use weft_proto::id::Sequence;

use super::address::{INDEX_LEVEL_MAX, POSITIONS, PageId};
use super::counts::BandCounts;
use super::delta::SEQUENCE_ZERO;
use super::format::{Item, Page, RECORDS_PER_PAGE, Record};
use super::pages::Pages;
use super::run::RunDescriptor;
use super::store::{MapBlock, MapError};

/// Blocks handed to the store at once. Few in tests, so that short runs take several batches.
pub(crate) const APPEND_BLOCKS: usize = if cfg!(test) { 3 } else { 64 };

/// The references of the blocks that unfinished runs have already written: they keep bands from being freed.
pub(crate) type PendingCounts = Rc<RefCell<BandCounts>>;

/// One level under construction.
#[derive(Debug, Default)]
struct Level {
    records: Vec<Record>,
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
            levels: vec![Level::default()],
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
        self.push_record(0, Record::new(item))
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
            let child = Record::child_at(waiting.first_lba, place);
            self.push_record(usize::from(waiting.id.level) + 1, child)?;
        }
        Ok(())
    }

    /// Writes what is left. `None` when there was no record. The second value is where the blocks lie, by band.
    pub(crate) async fn finish(mut self) -> Result<Option<(RunDescriptor, BandCounts)>, MapError> {
        if self.records == 0 {
            return Ok(None);
        }
        let mut level = 0;
        loop {
            self.close(level)?;
            while !self.waiting.is_empty() {
                self.flush().await?;
            }
            // A level with one block, all of whose places are known, is the top.
            let above = &self.levels[level + 1];
            if let (1, 0, [top]) = (self.levels[level].position, above.position, &above.records[..])
                && let Some(top) = top.child()
            {
                let descriptor = RunDescriptor {
                    number: self.number,
                    height: level as u8,
                    top,
                    leaves: self.levels[0].position,
                    records: self.records,
                    sequence_max: self.sequence_max,
                };
                return Ok(Some((descriptor, self.page_counts.clone())));
            }
            level += 1;
        }
    }

    fn push_record(&mut self, level: usize, record: Record) -> Result<(), MapError> {
        if level == self.levels.len() {
            self.levels.push(Level::default());
        }
        self.levels[level].records.push(record);
        if self.levels[level].records.len() == RECORDS_PER_PAGE {
            self.close(level)?;
        }
        Ok(())
    }

    /// Lays out the block under construction at `level`, if it has a record.
    fn close(&mut self, level: usize) -> Result<(), MapError> {
        let id = PageId {
            run: self.number,
            level: u8::try_from(level)
                .ok()
                .filter(|level| *level <= INDEX_LEVEL_MAX)
                .ok_or(MapError::Exhausted)?,
            position: self.levels[level].position,
        };
        let under = &mut self.levels[level];
        let Some(first) = under.records.first() else {
            return Ok(());
        };
        if under.position == POSITIONS - 1 {
            return Err(MapError::Exhausted);
        }
        self.waiting.push(Waiting {
            id,
            first_lba: first.lba(),
            block: MapBlock {
                lba: id.lba(),
                data: Page::encode(self.pages.identity, id, &under.records),
            },
        });
        under.records.clear();
        under.position += 1;
        Ok(())
    }
}
