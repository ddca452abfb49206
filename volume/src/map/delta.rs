//! What changed since the last freeze, in memory.
//!
//! Promise: inserting never waits and never reads a map page. Within the delta the highest sequence of an LBA
//! wins, in whatever order changes come; of equal sequences the later insert, which is the newer copy.

use std::collections::BTreeMap;

use weft_proto::id::{BandId, Epoch, Sequence};
use weft_proto::units::{Lba, LbaRange};

use crate::entry::MapEntry;

use super::counts::BandCounts;
use super::format::Item;
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
    points: BTreeMap<u64, Point>,
    zeroes: ZeroRanges,
    counts: BandCounts,
    sequence_max: Sequence,
}

impl Default for Delta {
    fn default() -> Self {
        Self {
            points: BTreeMap::new(),
            zeroes: ZeroRanges::default(),
            counts: BandCounts::default(),
            sequence_max: SEQUENCE_ZERO,
        }
    }
}

impl Delta {
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
        if let Some(old) = self.points.get_mut(&lba.0) {
            if old.entry.sequence > entry.sequence {
                return false;
            }
            new.settled |= old.settled;
            self.counts.subtract(old.entry.band, 1);
            *old = new;
        } else {
            self.points.insert(lba.0, new);
        }
        self.counts.add(entry.band, 1);
        self.sequence_max = self.sequence_max.max(entry.sequence);
        true
    }

    pub(crate) fn zero_range(&mut self, range: LbaRange, sequence: Sequence, settled: bool) {
        let Some(end) = range.end().filter(|_| range.count > 0) else {
            return;
        };
        let superseded: Vec<(u64, BandId)> = self
            .points
            .range(range.start.0..end.0)
            .filter(|(_, point)| point.entry.sequence < sequence)
            .map(|(lba, point)| (*lba, point.entry.band))
            .collect();
        for (lba, band) in superseded {
            self.points.remove(&lba);
            self.counts.subtract(band, 1);
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
        for (lba, point) in self.points.range(start..end) {
            slots.offer(*lba, lba + 1, Cell::Data(point.entry), point.settled);
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
        let mut points = self.points.iter().peekable();
        let mut ranges = self.zeroes.iter().peekable();
        let mut from = 0;
        std::iter::from_fn(move || {
            loop {
                let point = points.peek().map(|(lba, point)| (**lba, **point));
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

    fn item(lba: u64, point: Point) -> Item {
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
