//! Tables of a root: rows of numbers, each stored as the difference from the lowest of its column, in as many bits as the
//! column's largest difference takes. Most of what a root says of a band is what it says of every other one, and takes no bits.
//!
//! Reading never believes a number of rows that the bytes do not hold: where there are several, each takes a bit at least.
//!
//! `docs/format/checkpoint.md`, "Tables".

use super::bits::{mask, width};
use super::block::FormatError;

/// Appends a table of `rows`.
pub(crate) fn encode<const F: usize>(bytes: &mut Vec<u8>, rows: &[[u64; F]]) {
    let count = u32::try_from(rows.len()).expect("a root has less than 2^32 of anything");
    bytes.extend_from_slice(&count.to_le_bytes());
    if rows.is_empty() {
        return;
    }
    let mut columns = [(0, 0); F];
    for (field, column) in columns.iter_mut().enumerate() {
        let values = || rows.iter().map(|row| row[field]);
        let lowest = values().min().unwrap_or(0);
        let bits = width(values().max().unwrap_or(0) - lowest);
        // So that nothing that can be read overflows.
        *column = (lowest.min(u64::MAX - mask(bits)), bits);
    }
    if rows.len() > 1 && columns.iter().all(|(_, bits)| *bits == 0) {
        columns[0] = (columns[0].0.min(u64::MAX - 1), 1);
    }
    for (lowest, _) in columns {
        bytes.extend_from_slice(&lowest.to_le_bytes());
    }
    bytes.extend(columns.map(|(_, bits)| bits as u8));
    let (mut word, mut held) = (0_u128, 0);
    for row in rows {
        for (value, (lowest, bits)) in row.iter().zip(columns) {
            word |= u128::from(value - lowest) << held;
            held += bits;
            while held >= 8 {
                bytes.push(word as u8);
                word >>= 8;
                held -= 8;
            }
        }
    }
    if held > 0 {
        bytes.push(word as u8);
    }
}

/// A table that is read, row by row.
#[derive(Debug)]
pub(crate) struct Table<'a, const F: usize> {
    rows: usize,
    /// Lowest value and bits of each column.
    columns: [(u64, u32); F],
    bytes: &'a [u8],
    /// The next bit.
    at: usize,
}

impl<'a, const F: usize> Table<'a, F> {
    /// Takes a table from the front of `input`.
    pub(crate) fn take(input: &mut &'a [u8]) -> Result<Self, FormatError> {
        let mut split = |count: usize| {
            let (taken, rest) = input.split_at_checked(count).ok_or(FormatError::Length {
                expected: count,
                found: input.len(),
            })?;
            *input = rest;
            Ok(taken)
        };
        let count = split(4)?
            .iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        let mut table = Self {
            rows: count,
            columns: [(0, 0); F],
            bytes: &[],
            at: 0,
        };
        if count == 0 {
            return Ok(table);
        }
        let (lowest, _) = split(F * 8)?.as_chunks::<8>();
        let widths = split(F)?;
        for (column, (lowest, bits)) in table.columns.iter_mut().zip(lowest.iter().zip(widths)) {
            *column = (u64::from_le_bytes(*lowest), u32::from(*bits));
            if column.1 > u64::BITS {
                return Err(FormatError::Field("width"));
            }
            if column.0.checked_add(mask(column.1)).is_none() {
                return Err(FormatError::Field("lowest"));
            }
        }
        let row_bits: u32 = table.columns.iter().map(|(_, bits)| bits).sum();
        if count > 1 && row_bits == 0 {
            return Err(FormatError::Field("width"));
        }
        table.bytes = split(count.saturating_mul(row_bits as usize).div_ceil(8))?;
        Ok(table)
    }

    /// Rows that are left.
    pub(crate) fn len(&self) -> usize {
        self.rows
    }

    fn number(&mut self, bits: u32) -> u64 {
        let (byte, shift) = (self.at / 8, self.at % 8);
        self.at += bits as usize;
        // Nine bytes hold 64 bits, wherever they begin.
        let around = self.bytes.iter().skip(byte).take(9).rev();
        let word = around.fold(0_u128, |word, byte| word << 8 | u128::from(*byte));
        (word >> shift) as u64 & mask(bits)
    }
}

impl<const F: usize> Iterator for Table<'_, F> {
    type Item = [u64; F];

    fn next(&mut self) -> Option<[u64; F]> {
        self.rows = self.rows.checked_sub(1)?;
        let columns = self.columns;
        Some(columns.map(|(lowest, bits)| lowest + self.number(bits)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode<const F: usize>(bytes: &[u8]) -> Result<Vec<[u64; F]>, FormatError> {
        let mut input = bytes;
        let rows = Table::take(&mut input)?.collect();
        assert!(input.is_empty());
        Ok(rows)
    }

    #[test]
    fn what_all_rows_have_in_common_takes_no_bits() {
        let mut bytes = Vec::new();
        encode(&mut bytes, &[[5, 700, 1], [6, 700, 4], [9, 700, 2]]);
        let mut expected = vec![3, 0, 0, 0];
        expected.extend([5, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0xbc, 0x02, 0, 0, 0, 0, 0, 0]);
        expected.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([3, 0, 2]);
        // 000 and 00, 001 and 11, 100 and 01, from the least significant bit.
        expected.extend([0b0010_0000, 0b0011_0011]);
        assert_eq!(bytes, expected);
        assert_eq!(decode(&bytes), Ok(vec![[5, 700, 1], [6, 700, 4], [9, 700, 2]]));
        bytes.clear();
        encode::<3>(&mut bytes, &[]);
        assert_eq!(bytes, [0; 4]);
        let alike = [[u64::MAX, 3]; 9];
        bytes.clear();
        encode(&mut bytes, &alike);
        assert_eq!(decode(&bytes), Ok(alike.to_vec()));
    }

    #[test]
    fn what_no_writer_makes_is_refused() {
        let mut good = Vec::new();
        encode(&mut good, &[[5, u64::MAX], [6, 7]]);
        let read = |change: fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            decode::<2>(&bytes)
        };
        assert!(read(|_| {}).is_ok());
        assert_eq!(read(|bytes| bytes[20] = 65), Err(FormatError::Field("width")));
        assert_eq!(read(|bytes| bytes[12] = 8), Err(FormatError::Field("lowest")));
        let no_bits = |bytes: &mut Vec<u8>| bytes[20..22].fill(0);
        assert_eq!(
            read(no_bits),
            Err(FormatError::Field("width")),
            "rows for nothing"
        );
        assert!(matches!(
            read(|bytes| bytes[..4].fill(0xff)),
            Err(FormatError::Length { .. })
        ));
        for length in 0..good.len() {
            assert!(decode::<2>(&good[..length]).is_err(), "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            lowest in any::<[u64; 3]>(),
            shifts in prop::array::uniform3(0_u32..64),
            rows in prop::collection::vec(any::<[u64; 3]>(), 0..50),
        ) {
            let value = |field: usize, value: u64| lowest[field].saturating_add(value >> shifts[field]);
            let mut rows: Vec<[u64; 3]> = rows
                .iter()
                .map(|row| [value(0, row[0]), value(1, row[1]), value(2, row[2])])
                .collect();
            rows.sort_unstable();
            rows.dedup();
            let mut bytes = Vec::new();
            encode(&mut bytes, &rows);
            prop_assert_eq!(decode(&bytes), Ok(rows));
        }
    }
}
