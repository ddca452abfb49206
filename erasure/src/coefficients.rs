//! The coefficients: which multiple of each data shard goes into each parity shard.
//!
//! A Cauchy matrix 1 / (x + y) with x = 0 … 3 for the parities and y = 4 … 19 for the data shards, its rows
//! and columns scaled so that the first row and the first column are all ones. Scaling by non-zero factors
//! keeps every square submatrix nonsingular, so the code is MDS for every k ≤ 16 and m ≤ 4 at once.
//!
//! What that gives:
//! - **First column 1**: a stripe of one data shard has m parities equal to it, an (m + 1)-way copy.
//! - **Column j depends on j alone**: a stripe of w shards is encoded as one of k whose other shards are zero.
//! - **Row p depends on p alone**: m = 2 has the first two parities of m = 4.
//! - **First row 1**: parity 0 is the exclusive or of the data.
//!
//! The table is part of the on-disk format: it never changes. `docs/design/erasure-coefficients.md`.

use crate::field::{inverse, mul};

/// Most data shards of a stripe.
pub const DATA_SHARDS_MAX: usize = 16;
/// Most parity shards of a stripe.
pub const PARITY_SHARDS_MAX: usize = 4;

/// One coefficient per data shard.
pub(crate) type Row = [u8; DATA_SHARDS_MAX];

/// By parity, then by data shard.
pub(crate) static COEFFICIENTS: [Row; PARITY_SHARDS_MAX] = {
    let mut rows = [[0; DATA_SHARDS_MAX]; PARITY_SHARDS_MAX];
    let y0 = PARITY_SHARDS_MAX as u8;
    let mut parity = 0;
    while parity < PARITY_SHARDS_MAX {
        let x = parity as u8;
        let mut data = 0;
        while data < DATA_SHARDS_MAX {
            let y = y0 + data as u8;
            // 1/(x+y), its row times (x + y0), its column times y (which is x0 + y), all over y0 (x0 + y0).
            let numerator = mul(x ^ y0, y);
            let denominator = mul(x ^ y, y0);
            rows[parity][data] = mul(numerator, inverse(denominator));
            data += 1;
        }
        parity += 1;
    }
    rows
};

/// The coefficient of a data shard in a parity shard, both counted from 0: the on-disk constants, for whoever
/// checks a stripe with another tool.
///
/// # Panics
/// Past [`PARITY_SHARDS_MAX`] or [`DATA_SHARDS_MAX`].
#[must_use]
pub fn coefficient(parity: usize, data: usize) -> u8 {
    COEFFICIENTS[parity][data]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as `docs/design/erasure-coefficients.md` prints it, because drives hold parities made with it.
    #[test]
    fn the_table_never_changes() {
        assert_eq!(COEFFICIENTS, TABLE);
    }

    #[test]
    fn the_first_row_and_the_first_column_are_ones() {
        assert_eq!(COEFFICIENTS[0], [1; DATA_SHARDS_MAX]);
        for row in &COEFFICIENTS {
            assert_eq!(row[0], 1);
        }
    }

    /// MDS for every k and m: [I; C] keeps rank k under any m erasures if and only if every square submatrix
    /// of C is nonsingular. There are C(20, 4) − 1 = 4844 of them.
    #[test]
    fn every_square_submatrix_is_nonsingular() {
        let mut seen = 0;
        for rows in 1u32..1 << PARITY_SHARDS_MAX {
            for columns in 1u32..1 << DATA_SHARDS_MAX {
                if rows.count_ones() != columns.count_ones() {
                    continue;
                }
                let rows: Vec<usize> = (0..PARITY_SHARDS_MAX).filter(|i| rows >> i & 1 == 1).collect();
                let columns: Vec<usize> = (0..DATA_SHARDS_MAX).filter(|i| columns >> i & 1 == 1).collect();
                assert_ne!(
                    determinant(&rows, &columns),
                    0,
                    "rows {rows:?}, columns {columns:?}"
                );
                seen += 1;
            }
        }
        assert_eq!(seen, 4844);
    }

    /// By Laplace expansion, which shares nothing with the elimination of `reconstruct`.
    fn determinant(rows: &[usize], columns: &[usize]) -> u8 {
        let Some((&row, rest)) = rows.split_first() else {
            return 1;
        };
        columns.iter().enumerate().fold(0, |sum, (index, &column)| {
            let mut others = columns.to_vec();
            others.remove(index);
            sum ^ mul(COEFFICIENTS[row][column], determinant(rest, &others))
        })
    }

    const TABLE: [Row; 4] = [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [
            1, 217, 92, 172, 187, 135, 248, 235, 72, 51, 123, 75, 166, 168, 8, 182,
        ],
        [
            1, 92, 70, 123, 245, 58, 101, 53, 104, 40, 200, 108, 210, 103, 250, 25,
        ],
        [
            1, 172, 123, 158, 195, 31, 143, 227, 82, 34, 37, 250, 110, 101, 190, 83,
        ],
    ];
}
