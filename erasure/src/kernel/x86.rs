//! x86-64: GFNI with AVX-512 or AVX2, and AVX2 byte shuffles.
//!
//! Three functions are the interface: each sums as many leading bytes as fill its vectors and returns how many.
//! They rely on what [`Terms`] promises: every source and every output has `bytes` bytes.
#![expect(
    unsafe_code,
    reason = "vector loads and stores through pointers, and calls into code for detected features"
)]

use std::arch::x86_64::*;

use super::{Mode, Terms};
use crate::coefficients::DATA_SHARDS_MAX;
use crate::field::{BIT_MATRICES, NIBBLE_PRODUCTS, NibbleProducts};

/// One kernel: what differs is the vector, its loads and stores, and how a product is made.
///
/// Two vectors per row are in flight, which hides the latency of a product. A macro and not a trait, because
/// the features that make the intrinsics safe belong to the function around them.
macro_rules! kernel {
    (
        $(#[$doc:meta])*
        $name:ident, features $features:literal, bytes $bytes:literal,
        zero $zero:ident, load $load:ident, store $store:ident, xor $xor:ident,
        table $table:ident,
        product |$vector:ident, $entry:ident| $product:expr
    ) => {
        $(#[$doc])*
        pub(super) fn $name(terms: &Terms<'_>, outputs: &mut [&mut [u8]]) -> usize {
            const STEP: usize = 2 * $bytes;

            #[target_feature(enable = $features)]
            fn rows<const R: usize>(terms: &Terms<'_>, outputs: [*mut u8; R]) -> usize {
                // By source, then by row: the order in which the inner loop reads them.
                let mut table = [[$table(0); R]; DATA_SHARDS_MAX];
                for (source, by_row) in table.iter_mut().enumerate().take(terms.sources.len()) {
                    for (entry, row) in by_row.iter_mut().zip(terms.rows) {
                        *entry = $table(row[source]);
                    }
                }
                let done = terms.bytes / STEP * STEP;
                for at in (0..done).step_by(STEP) {
                    let mut sums = [[$zero(); 2]; R];
                    if terms.mode == Mode::Accumulate {
                        for (sum, output) in sums.iter_mut().zip(outputs) {
                            // SAFETY: at + STEP <= done <= bytes, the output's length (`Terms`).
                            *sum = unsafe {
                                [$load(output.add(at).cast()), $load(output.add(at + $bytes).cast())]
                            };
                        }
                    }
                    for (source, entries) in terms.sources.iter().zip(&table) {
                        let source = source.as_ptr();
                        // SAFETY: at + STEP <= done <= bytes, the source's length (`Terms`).
                        let vectors = unsafe {
                            [$load(source.add(at).cast()), $load(source.add(at + $bytes).cast())]
                        };
                        for (sum, &$entry) in sums.iter_mut().zip(entries) {
                            for (sum, $vector) in sum.iter_mut().zip(vectors) {
                                *sum = $xor(*sum, $product);
                            }
                        }
                    }
                    for (sum, output) in sums.iter().zip(outputs) {
                        // SAFETY: at + STEP <= done <= bytes, the output's length (`Terms`).
                        unsafe {
                            $store(output.add(at).cast(), sum[0]);
                            $store(output.add(at + $bytes).cast(), sum[1]);
                        }
                    }
                }
                done
            }

            // SAFETY: a `Kernel` runs only after `Kernel::is_available` found these features. The pointers are
            // those of distinct exclusive borrows, valid for `bytes` bytes.
            unsafe {
                match outputs {
                    [a] => rows(terms, [a.as_mut_ptr()]),
                    [a, b] => rows(terms, [a.as_mut_ptr(), b.as_mut_ptr()]),
                    [a, b, c] => rows(terms, [a.as_mut_ptr(), b.as_mut_ptr(), c.as_mut_ptr()]),
                    [a, b, c, d] => {
                        rows(terms, [a.as_mut_ptr(), b.as_mut_ptr(), c.as_mut_ptr(), d.as_mut_ptr()])
                    }
                    _ => 0,
                }
            }
        }
    };
}

/// The bit matrix of a coefficient, which the affine instruction broadcasts.
fn bit_matrix(coefficient: u8) -> i64 {
    BIT_MATRICES[usize::from(coefficient)].cast_signed()
}

/// The lookup tables of a coefficient.
fn nibble_products(coefficient: u8) -> &'static NibbleProducts {
    &NIBBLE_PRODUCTS[usize::from(coefficient)]
}

kernel! {
    /// 128 bytes a step.
    gfni_avx512, features "gfni,avx512f,avx512bw", bytes 64,
    zero _mm512_setzero_si512, load _mm512_loadu_si512, store _mm512_storeu_si512, xor _mm512_xor_si512,
    table bit_matrix,
    product |vector, matrix| _mm512_gf2p8affine_epi64_epi8::<0>(vector, _mm512_set1_epi64(matrix))
}

kernel! {
    /// 64 bytes a step.
    gfni_avx2, features "gfni,avx2", bytes 32,
    zero _mm256_setzero_si256, load _mm256_loadu_si256, store _mm256_storeu_si256, xor _mm256_xor_si256,
    table bit_matrix,
    product |vector, matrix| _mm256_gf2p8affine_epi64_epi8::<0>(vector, _mm256_set1_epi64x(matrix))
}

kernel! {
    /// 64 bytes a step, each product two lookups of sixteen entries.
    avx2, features "avx2", bytes 32,
    zero _mm256_setzero_si256, load _mm256_loadu_si256, store _mm256_storeu_si256, xor _mm256_xor_si256,
    table nibble_products,
    product |vector, products| {
        let nibble = _mm256_set1_epi8(0x0f);
        // SAFETY: both tables are arrays of 16 bytes; the load has no alignment to respect.
        let [low, high] = unsafe {
            [
                _mm256_broadcastsi128_si256(_mm_loadu_si128(products.low.as_ptr().cast())),
                _mm256_broadcastsi128_si256(_mm_loadu_si128(products.high.as_ptr().cast())),
            ]
        };
        _mm256_xor_si256(
            _mm256_shuffle_epi8(low, _mm256_and_si256(vector, nibble)),
            _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi64::<4>(vector), nibble)),
        )
    }
}
