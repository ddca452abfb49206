//! What changed since the last freeze, in memory.
//!
//! Blocks are found by hash: every write of a host ends here, and most reads begin. They are brought into order once,
//! when they are written as a run.
//!
//! Promise: inserting never waits and never reads a map page. Within the delta the highest sequence of an LBA
//! wins, in whatever order changes come; of equal sequences the later insert, which is the newer copy.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use foldhash::fast::FixedState;
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{Epoch, Sequence};
use weft_proto::units::{Lba, LbaRange};

use crate::entry::MapEntry;

use super::counts::BandCounts;
use super::leaf::Item;
use super::slot::{Cell, Slots};
use super::zeroes::{ZeroRanges, Zeroes};

/// The sequence before every other one.
pub(crate) const SEQUENCE_ZERO: Sequence = Sequence {
    epoch: Epoch(0),
    counter: 0,
};

#[derive(Clone, Copy, Debug)]
struct Point {
    entry: MapEntry,
    settled: bool,
}

/// Blocks and zero ranges, each the highest of its LBA so far.
///
/// A zero range also covers LBAs that have a block of a higher sequence; the block is what counts there. A block of a
/// lower sequence than the range is never kept.
#[derive(Debug)]
pub(crate) struct Delta {
    points: HashMap<u64, Point, FixedState>,
    zeroes: ZeroRanges,
    counts: BandCounts,
    sequence_max: Sequence,
}

impl Default for Delta {
    fn default() -> Self {
        Self {
            points: HashMap::default(),
            zeroes: ZeroRanges::default(),
            counts: BandCounts::default(),
            sequence_max: SEQUENCE_ZERO,
        }
    }
}

impl Delta {
    /// An empty one to follow this: with room for as many blocks, since one is much like the next.
    pub(crate) fn successor(&self) -> Self {
        Self {
            points: HashMap::with_capacity_and_hasher(self.points.len(), FixedState::default()),
            ..Self::default()
        }
    }

    /// Whether `entry` is now the delta's version of `lba`.
    pub(crate) fn insert(&mut self, lba: Lba, entry: MapEntry, settled: bool) -> bool {
        let mut new = Point { entry, settled };
        if let Some(zeroes) = self.zeroes.at(lba.0) {
            if zeroes.sequence > entry.sequence {
                return false;
            }
            // What the range outdoes, this block outdoes too.
            new.settled |= zeroes.settled;
        }
        match self.points.entry(lba.0) {
            Entry::Vacant(vacant) => {
                vacant.insert(new);
            }
            Entry::Occupied(mut occupied) => {
                let old = occupied.get_mut();
                if old.entry.sequence > entry.sequence && !planted(Bug::LowerSequenceWins) {
                    return false;
                }
                new.settled |= old.settled;
                self.counts.subtract(old.entry.band, 1);
                *old = new;
            }
        }
        self.counts.add(entry.band, 1);
        self.sequence_max = self.sequence_max.max(entry.sequence);
        true
    }

    /// Makes `entry` the version of `lba`, whatever is known. Wrong, and for [`Bug::CopyWinsOverNewer`] alone.
    pub(crate) fn replace(&mut self, lba: Lba, entry: MapEntry) {
        if let Some(old) = self.points.remove(&lba.0) {
            self.counts.subtract(old.entry.band, 1);
        }
        self.insert(lba, entry, true);
    }

    pub(crate) fn zero_range(&mut self, range: LbaRange, sequence: Sequence, settled: bool) {
        let Some(end) = range.end().filter(|_| range.count > 0) else {
            return;
        };
        let counts = &mut self.counts;
        let mut remove = |point: &Point| {
            let superseded = point.entry.sequence < sequence;
            if superseded {
                counts.subtract(point.entry.band, 1);
            }
            superseded
        };
        // A range may be as long as the volume: whichever is shorter is gone through.
        if range.count <= self.points.len() as u64 {
            for lba in range.start.0..end.0 {
                if self.points.get(&lba).is_some_and(&mut remove) {
                    self.points.remove(&lba);
                }
            }
        } else {
            self.points
                .retain(|lba, point| !(range.start.0..end.0).contains(lba) || !remove(point));
        }
        self.zeroes.insert(Zeroes {
            start: range.start.0,
            end: end.0,
            sequence,
            settled,
        });
        self.sequence_max = self.sequence_max.max(sequence);
    }

    /// What the delta has for `lba`, with whether it is settled.
    pub(crate) fn get(&self, lba: Lba) -> Option<(Cell, bool)> {
        if let Some(point) = self.points.get(&lba.0) {
            return Some((Cell::Data(point.entry), point.settled));
        }
        let zeroes = self.zeroes.at(lba.0)?;
        Some((Cell::Zero(zeroes.sequence), zeroes.settled))
    }

    pub(crate) fn apply(&self, slots: &mut Slots<'_>) {
        let (start, end) = (slots.start(), slots.end());
        if !self.points.is_empty() {
            for lba in start..end {
                if let Some(point) = self.points.get(&lba) {
                    slots.offer(lba, lba + 1, Cell::Data(point.entry), point.settled);
                }
            }
        }
        // After the points: an offer of a lower sequence changes nothing.
        for zeroes in self.zeroes.overlapping(start, end) {
            slots.offer(
                zeroes.start,
                zeroes.end,
                Cell::Zero(zeroes.sequence),
                zeroes.settled,
            );
        }
    }

    /// Everything in ascending order of LBA, disjoint.
    pub(crate) fn items(&self) -> impl Iterator<Item = Item> {
        let mut points: Vec<(u64, &Point)> = self.points.iter().map(|(lba, point)| (*lba, point)).collect();
        points.sort_unstable_by_key(|(lba, _)| *lba);
        let mut points = points.into_iter().peekable();
        let mut ranges = self.zeroes.iter().peekable();
        let mut from = 0;
        std::iter::from_fn(move || {
            loop {
                let point = points.peek().copied();
                // What is left of the first range at or after `from`.
                let range = ranges.peek().map(|range| Zeroes {
                    start: range.start.max(from),
                    ..*range
                });
                let Some(range) = range else {
                    let (lba, point) = point?;
                    points.next();
                    return Some(Self::item(lba, point));
                };
                if range.start >= range.end {
                    ranges.next();
                    continue;
                }
                match point {
                    Some((lba, point)) if lba <= range.start => {
                        points.next();
                        from = lba + 1;
                        return Some(Self::item(lba, point));
                    }
                    _ => {
                        let end = point.map_or(range.end, |(lba, _)| lba.min(range.end));
                        from = end;
                        return Some(Item {
                            lba: range.start,
                            count: end - range.start,
                            cell: Cell::Zero(range.sequence),
                            settled: range.settled,
                        });
                    }
                }
            }
        })
    }

    fn item(lba: u64, point: &Point) -> Item {
        Item {
            lba,
            count: 1,
            cell: Cell::Data(point.entry),
            settled: point.settled,
        }
    }

    pub(crate) fn counts(&self) -> &BandCounts {
        &self.counts
    }

    pub(crate) fn sequence_max(&self) -> Sequence {
        self.sequence_max
    }

    /// Blocks and ranges held.
    pub(crate) fn len(&self) -> usize {
        self.points.len() + self.zeroes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
