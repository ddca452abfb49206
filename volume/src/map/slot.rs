//! Which version of a block wins.
//!
//! A lookup asks sources from the newest (the delta) to the oldest (the bottom run). The highest sequence
//! wins, and of equal sequences the newest source, because that is the newer copy. An answer is *settled*
//! when no older source can have a higher sequence, and ends the search: writes are settled when they are inserted,
//! so only what a recovery replays in any order, and what was in flight across a freeze, is compared with older runs.

use weft_proto::id::Sequence;
use weft_proto::units::Lba;

use crate::entry::MapEntry;

/// What a source knows of an LBA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    /// A block.
    Data(MapEntry),
    /// Reads as zeroes since this sequence.
    Zero(Sequence),
}

impl Cell {
    pub(crate) fn sequence(&self) -> Sequence {
        match self {
            Self::Data(entry) => entry.sequence,
            Self::Zero(sequence) => *sequence,
        }
    }
}

/// What the page map says of one LBA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The block is there.
    Data(MapEntry),
    /// Reads as zeroes since this sequence: TRIM, Write Zeroes, or a zero block.
    Zero(Sequence),
    /// Never written, or nothing is left of it: reads as zeroes.
    Unwritten,
}

impl Mapping {
    /// The block's place, if there is one to read.
    #[must_use]
    pub fn entry(self) -> Option<MapEntry> {
        match self {
            Self::Data(entry) => Some(entry),
            Self::Zero(_) | Self::Unwritten => None,
        }
    }
}

/// The best version of one LBA so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slot {
    best: Option<Cell>,
    settled: bool,
}

impl Slot {
    pub(crate) fn offer(&mut self, cell: Cell, settled: bool) {
        if self.settled {
            return;
        }
        if self.best.is_none_or(|best| cell.sequence() > best.sequence()) {
            self.best = Some(cell);
        }
        // If this source's version beats everything older, so does whatever beats that version.
        self.settled |= settled;
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.settled
    }

    pub(crate) fn sequence(&self) -> Option<Sequence> {
        self.best.map(|best| best.sequence())
    }

    pub(crate) fn best(&self) -> Option<Cell> {
        self.best
    }

    pub(crate) fn mapping(&self) -> Mapping {
        match self.best {
            None => Mapping::Unwritten,
            Some(Cell::Data(entry)) => Mapping::Data(entry),
            Some(Cell::Zero(sequence)) => Mapping::Zero(sequence),
        }
    }
}

/// The slots of a lookup: `slots[i]` belongs to `start + i`.
pub(crate) struct Slots<'a> {
    start: u64,
    slots: &'a mut [Slot],
}

impl<'a> Slots<'a> {
    pub(crate) fn new(start: Lba, slots: &'a mut [Slot]) -> Self {
        Self {
            start: start.0,
            slots,
        }
    }

    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn end(&self) -> u64 {
        self.start + self.slots.len() as u64
    }

    /// Offers `cell` to every slot of `start … end` that the lookup has.
    pub(crate) fn offer(&mut self, start: u64, end: u64, cell: Cell, settled: bool) {
        let (start, end) = (start.max(self.start), end.min(self.end()));
        for lba in start..end {
            self.slots[(lba - self.start) as usize].offer(cell, settled);
        }
    }

    pub(crate) fn all_settled(&self) -> bool {
        self.slots.iter().all(Slot::is_settled)
    }

    /// The first LBA at or after `from` for which a source whose highest sequence is `highest` could still
    /// say something better.
    pub(crate) fn next_open(&self, from: u64, highest: Sequence) -> Option<u64> {
        (from..self.end()).find(|lba| {
            let slot = &self.slots[(lba - self.start) as usize];
            !slot.is_settled() && slot.sequence().is_none_or(|sequence| sequence < highest)
        })
    }
}
