//! Byte by byte, on any processor; also the last bytes that do not fill a vector.

use super::{Mode, Terms};
use crate::field::NIBBLE_PRODUCTS;

/// Sums the bytes from `done` on.
pub(super) fn combine(terms: &Terms<'_>, outputs: &mut [&mut [u8]], done: usize) {
    if done == terms.bytes {
        return;
    }
    for (row, output) in terms.rows.iter().zip(outputs) {
        let output = &mut output[done..];
        if terms.mode == Mode::Assign {
            output.fill(0);
        }
        for (&coefficient, source) in row.iter().zip(terms.sources) {
            let products = &NIBBLE_PRODUCTS[usize::from(coefficient)];
            for (out, &byte) in output.iter_mut().zip(&source[done..]) {
                *out ^= products.low[usize::from(byte & 15)] ^ products.high[usize::from(byte >> 4)];
            }
        }
    }
}
