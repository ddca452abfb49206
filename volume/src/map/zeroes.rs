//! Ranges that read as zeroes, as disjoint intervals: one TRIM may cover the whole volume.

use std::collections::BTreeMap;

use weft_proto::id::Sequence;

/// An interval of LBAs that reads as zeroes since `sequence`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zeroes {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) sequence: Sequence,
    pub(crate) settled: bool,
}

/// Disjoint intervals by start. Where two overlap, the higher sequence keeps the overlap.
#[derive(Debug, Default)]
pub(crate) struct ZeroRanges(BTreeMap<u64, Zeroes>);

impl ZeroRanges {
    pub(crate) fn insert(&mut self, new: Zeroes) {
        let mut gap = new.start;
        for old in self.overlapping(new.start, new.end).collect::<Vec<_>>() {
            if old.sequence >= new.sequence {
                // The old one stays; the new one fills what lies before it.
                self.put(Zeroes {
                    start: gap,
                    end: old.start,
                    ..new
                });
                gap = old.end;
                continue;
            }
            self.0.remove(&old.start);
            self.put(Zeroes {
                end: new.start,
                ..old
            });
            self.put(Zeroes {
                start: new.end,
                ..old
            });
        }
        self.put(Zeroes { start: gap, ..new });
    }

    pub(crate) fn at(&self, lba: u64) -> Option<Zeroes> {
        let (_, found) = self.0.range(..=lba).next_back()?;
        (found.end > lba).then_some(*found)
    }

    /// Those that have an LBA of `start … end`, ascending, not cut.
    pub(crate) fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = Zeroes> {
        let first = self.at(start).map_or(start, |found| found.start);
        self.0.range(first..end.max(first)).map(|(_, found)| *found)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Zeroes> {
        self.0.values().copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds a piece that overlaps nothing; an empty one is dropped, an adjoining equal one is joined.
    fn put(&mut self, mut piece: Zeroes) {
        if piece.start >= piece.end {
            return;
        }
        let same = |other: &Zeroes| (other.sequence, other.settled) == (piece.sequence, piece.settled);
        if let Some((_, left)) = self.0.range(..piece.start).next_back()
            && left.end == piece.start
            && same(left)
        {
            piece.start = left.start;
        }
        if let Some(right) = self.0.get(&piece.end)
            && same(right)
        {
            let (start, end) = (right.start, right.end);
            self.0.remove(&start);
            piece.end = end;
        }
        self.0.insert(piece.start, piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use weft_proto::id::Epoch;

    fn zeroes(start: u64, end: u64, counter: u64) -> Zeroes {
        Zeroes {
            start,
            end,
            sequence: Sequence {
                epoch: Epoch(1),
                counter,
            },
            settled: true,
        }
    }

    #[test]
    fn one_trim_of_everything_is_one_interval() {
        let mut ranges = ZeroRanges::default();
        for counter in 1..100 {
            ranges.insert(zeroes(counter * 10, counter * 10 + 5, counter));
        }
        ranges.insert(zeroes(0, 1 << 60, 100));
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [zeroes(0, 1 << 60, 100)]);
    }

    #[test]
    fn an_older_range_fills_only_the_gaps() {
        let mut ranges = ZeroRanges::default();
        ranges.insert(zeroes(10, 20, 5));
        ranges.insert(zeroes(0, 30, 3));
        assert_eq!(
            ranges.iter().collect::<Vec<_>>(),
            [zeroes(0, 10, 3), zeroes(10, 20, 5), zeroes(20, 30, 3)]
        );
    }

    proptest! {
        #[test]
        fn intervals_agree_with_one_sequence_per_block(
            inserts in prop::collection::vec((0u64..40, 1u64..20), 0..30),
            order in prop::collection::vec(any::<u64>(), 30),
        ) {
            let mut ranges = ZeroRanges::default();
            let mut model = [0u64; 64];
            for ((start, count), counter) in inserts.into_iter().zip(order) {
                let counter = counter % 8 + 1;
                ranges.insert(zeroes(start, start + count, counter));
                for block in &mut model[start as usize..(start + count) as usize] {
                    *block = counter.max(*block);
                }
            }
            for (lba, counter) in model.iter().enumerate() {
                let found = ranges.at(lba as u64).map_or(0, |found| found.sequence.counter);
                prop_assert_eq!(found, *counter);
            }
            let mut end = 0;
            for piece in ranges.iter() {
                prop_assert!(piece.start >= end && piece.end > piece.start);
                end = piece.end;
            }
        }
    }
}
