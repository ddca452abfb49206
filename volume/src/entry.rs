//! Where one block lies: the value of the page map.
//!
//! All rows of a stripe hold one shard each of the same code word, and shard indices follow the columns from
//! `start` in cyclic order. So (band, row, start, w, skipped) is all that a degraded read needs, and a map
//! entry never has to name the stripe's first row or depth.

use weft_proto::band::Geometry;
use weft_proto::id::{BandId, Sequence};

/// A set of columns of one band, bit c for column c.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ColumnSet(pub u32);

impl ColumnSet {
    /// No column.
    pub const NONE: Self = Self(0);

    /// Whether `column` is in it.
    #[must_use]
    pub fn contains(self, column: u8) -> bool {
        self.0 >> column & 1 == 1
    }

    /// With `column` added.
    #[must_use]
    pub fn with(self, column: u8) -> Self {
        Self(self.0 | 1 << column)
    }

    /// How many.
    #[must_use]
    pub fn count(self) -> u8 {
        self.0.count_ones() as u8
    }
}

/// Which columns a stripe lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    /// Column of shard 0.
    pub start: u8,
    /// Data shards, 1 …= k.
    pub w: u8,
    /// Columns passed over because their drive was not in service when the stripe was written. Fits 24 bits:
    /// a band has at most 20 columns.
    pub skipped: ColumnSet,
}

impl Shape {
    /// Whether a stripe of this shape fits a band of `geometry`: everything that is read from a drive is asked
    /// this once, before the other methods are used.
    #[must_use]
    pub fn fits(self, geometry: Geometry) -> bool {
        let n = geometry.n();
        self.start < n
            && self.w >= 1
            && self.w <= geometry.k
            && u32::from(n) <= 32
            && self.skipped.0 >> n == 0
            && !self.skipped.contains(self.start)
            && self.w + geometry.m <= n - self.skipped.count()
    }

    /// The columns of shards 0 … w+m−1, in that order.
    pub fn columns(self, geometry: Geometry) -> impl Iterator<Item = u8> {
        let n = geometry.n();
        (0..n)
            .map(move |step| (self.start + step) % n)
            .filter(move |column| !self.skipped.contains(*column))
            .take(usize::from(self.w + geometry.m))
    }

    /// The shard on `column`, if the stripe has one there.
    #[must_use]
    pub fn shard_index(self, geometry: Geometry, column: u8) -> Option<u8> {
        self.columns(geometry)
            .position(|candidate| candidate == column)
            .map(|index| index as u8)
    }
}

/// What the page map knows of a 4 KiB block that has data: where it lies, which version of it that is, and its
/// checksum. A block without data (never written, all zeroes, trimmed) has no entry, or a tombstone that carries
/// only a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The band.
    pub band: BandId,
    /// The block's own row, counted from the start of the chunk.
    pub row: u32,
    /// The block's column, 0 … n−1.
    pub column: u8,
    /// Column of shard 0 of its stripe.
    pub start: u8,
    /// Data shards of its stripe, 1 …= k.
    pub w: u8,
    /// Columns that its stripe passed over.
    pub skipped: ColumnSet,
    /// Given to the block at its first write and kept by every copy; the highest wins.
    pub sequence: Sequence,
    /// [`crate::format::checksum::block_crc`] of its bytes.
    pub crc: u32,
}

impl MapEntry {
    /// Whether both say the same place, whatever version lies there.
    #[must_use]
    pub fn same_place(&self, other: &Self) -> bool {
        (self.band, self.row, self.column) == (other.band, other.row, other.column)
    }

    /// The columns of the stripe around it.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape {
            start: self.start,
            w: self.w,
            skipped: self.skipped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(4, 2).expect("valid")
    }

    #[test]
    fn shards_follow_the_columns_cyclically_and_pass_over_the_skipped() {
        let shape = Shape {
            start: 4,
            w: 2,
            skipped: ColumnSet::NONE.with(5).with(1),
        };
        assert!(shape.fits(geometry()));
        assert_eq!(shape.columns(geometry()).collect::<Vec<_>>(), [4, 0, 2, 3]);
        assert_eq!(shape.shard_index(geometry(), 2), Some(2));
        assert_eq!(shape.shard_index(geometry(), 5), None);
    }

    #[test]
    fn a_shape_from_a_drive_is_checked_against_its_band() {
        let good = Shape {
            start: 0,
            w: 4,
            skipped: ColumnSet::NONE,
        };
        assert!(good.fits(geometry()));
        for bad in [
            Shape { start: 6, ..good },
            Shape { w: 0, ..good },
            Shape { w: 5, ..good },
            Shape {
                skipped: ColumnSet::NONE.with(3),
                ..good
            },
            Shape {
                w: 1,
                skipped: ColumnSet::NONE.with(0),
                ..good
            },
            Shape {
                w: 1,
                skipped: ColumnSet(1 << 6),
                ..good
            },
        ] {
            assert!(!bad.fits(geometry()), "{bad:?}");
        }
    }
}
