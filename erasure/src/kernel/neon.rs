//! AArch64: each product two table lookups of sixteen entries.
//!
//! It relies on what [`Terms`] promises: every source and every output has `bytes` bytes.
#![expect(
    unsafe_code,
    reason = "vector loads and stores through pointers, and a call into code for a detected feature"
)]

use std::arch::aarch64::*;

use super::{Mode, Terms};
use crate::field::NIBBLE_PRODUCTS;

/// Bytes of a vector, and of a step.
const BYTES: usize = 16;

/// Sums as many leading bytes as fill a vector; returns how many.
pub(super) fn neon(terms: &Terms<'_>, outputs: &mut [&mut [u8]]) -> usize {
    // SAFETY: a `Kernel` runs only after `Kernel::is_available` found NEON. The pointers are those of distinct
    // exclusive borrows, valid for `bytes` bytes.
    unsafe {
        match outputs {
            [a] => rows(terms, [a.as_mut_ptr()]),
            [a, b] => rows(terms, [a.as_mut_ptr(), b.as_mut_ptr()]),
            [a, b, c] => rows(terms, [a.as_mut_ptr(), b.as_mut_ptr(), c.as_mut_ptr()]),
            [a, b, c, d] => rows(
                terms,
                [a.as_mut_ptr(), b.as_mut_ptr(), c.as_mut_ptr(), d.as_mut_ptr()],
            ),
            _ => 0,
        }
    }
}

#[target_feature(enable = "neon")]
fn rows<const R: usize>(terms: &Terms<'_>, outputs: [*mut u8; R]) -> usize {
    let nibble = vdupq_n_u8(0x0f);
    let done = terms.bytes / BYTES * BYTES;
    for at in (0..done).step_by(BYTES) {
        let mut sums = [vdupq_n_u8(0); R];
        if terms.mode == Mode::Accumulate {
            for (sum, output) in sums.iter_mut().zip(outputs) {
                // SAFETY: at + BYTES <= done <= bytes, the output's length (`Terms`).
                *sum = unsafe { vld1q_u8(output.add(at)) };
            }
        }
        for (index, source) in terms.sources.iter().enumerate() {
            // SAFETY: at + BYTES <= done <= bytes, the source's length (`Terms`).
            let vector = unsafe { vld1q_u8(source.as_ptr().add(at)) };
            let low_nibbles = vandq_u8(vector, nibble);
            let high_nibbles = vshrq_n_u8::<4>(vector);
            for (sum, row) in sums.iter_mut().zip(terms.rows) {
                let products = &NIBBLE_PRODUCTS[usize::from(row[index])];
                // SAFETY: both tables are arrays of 16 bytes.
                let (low, high) =
                    unsafe { (vld1q_u8(products.low.as_ptr()), vld1q_u8(products.high.as_ptr())) };
                let product = veorq_u8(vqtbl1q_u8(low, low_nibbles), vqtbl1q_u8(high, high_nibbles));
                *sum = veorq_u8(*sum, product);
            }
        }
        for (sum, output) in sums.iter().zip(outputs) {
            // SAFETY: at + BYTES <= done <= bytes, the output's length (`Terms`).
            unsafe { vst1q_u8(output.add(at), *sum) };
        }
    }
    done
}
