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
use crate::field::{BIT_MATRICES, NIBBLE_PRODUCTS, NibbleProducts};

/// How many bytes before it is needed a source or an output is fetched. It may point past the end, and costs a few percent when
/// all of it is in the cache. Measured, cold:
///
/// - sources, on a Zen 5: nothing for up to eight of them and two rows, which the window reaches by itself; a few percent with three
///   rows; with 16 sources and four rows 0.67 of what memory can do instead of 0.52, in shards of 64 KiB. Longer ways were no better;
/// - outputs, on a Granite Rapids, whose stores otherwise wait for their lines in order behind all loads that the window reaches:
///   4+2 of 4 KiB 0.62 → 1.03 of what memory can do, other stripes of four sources and more 1.03 to 1.3 times as fast, in the
///   second-level cache up to 1.8 times. Outputs alone further ahead were worse. On the Zen 5 they were no better for it.
const AHEAD: usize = 256;

/// One kernel: what differs is the vector, its loads and stores, and how a product is made.
///
/// Two vectors per row are in flight, which hides the latency of a product. A macro and not a trait, because
/// the features that make the intrinsics safe belong to the function around them.
///
/// There is one loop for each number of sources, unrolled over them. With cold memory that is what decides: a
/// processor starts loads only as far ahead as its window of instructions reaches, and a loop over sources fills
/// the window with its own bookkeeping. One loop for all numbers coded 64 KiB shards at 0.6 to 0.7 of what memory
/// can do, this one at 0.95 and more; stores that bypass the cache, and so lose the parity to whoever checksums it
/// next, are not needed for that.
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
            fn rows<const W: usize, const R: usize, const ADD: bool>(
                terms: &Terms<'_>,
                outputs: [*mut u8; R],
            ) -> usize {
                let Some(sources) = terms.sources.first_chunk::<W>() else {
                    return 0;
                };
                let sources = sources.map(<[u8]>::as_ptr);
                // By source, then by row: the order in which the inner loop reads them.
                let table: [[_; R]; W] =
                    std::array::from_fn(|source| std::array::from_fn(|row| $table(terms.rows[row][source])));
                let done = terms.bytes / STEP * STEP;
                for at in (0..done).step_by(STEP) {
                    let mut sums = [[$zero(); 2]; R];
                    if ADD {
                        for (sum, output) in sums.iter_mut().zip(outputs) {
                            // SAFETY: at + STEP <= done <= bytes, the output's length (`Terms`).
                            *sum = unsafe {
                                [$load(output.add(at).cast()), $load(output.add(at + $bytes).cast())]
                            };
                        }
                    }
                    for output in outputs {
                        for line in (0..STEP).step_by(64) {
                            _mm_prefetch::<_MM_HINT_T0>(output.wrapping_add(at + AHEAD + line).cast());
                        }
                    }
                    for (source, entries) in sources.iter().zip(&table) {
                        for line in (0..STEP).step_by(64) {
                            _mm_prefetch::<_MM_HINT_T0>(source.wrapping_add(at + AHEAD + line).cast());
                        }
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

            #[target_feature(enable = $features)]
            fn widths<const R: usize>(terms: &Terms<'_>, outputs: [*mut u8; R]) -> usize {
                if terms.mode == Mode::Accumulate {
                    // Sources are added one at a time; anything else is left to the scalar kernel.
                    return match terms.sources {
                        [_] => rows::<1, R, true>(terms, outputs),
                        _ => 0,
                    };
                }
                let rows = match terms.sources.len() {
                    1 => rows::<1, R, false>,
                    2 => rows::<2, R, false>,
                    3 => rows::<3, R, false>,
                    4 => rows::<4, R, false>,
                    5 => rows::<5, R, false>,
                    6 => rows::<6, R, false>,
                    7 => rows::<7, R, false>,
                    8 => rows::<8, R, false>,
                    9 => rows::<9, R, false>,
                    10 => rows::<10, R, false>,
                    11 => rows::<11, R, false>,
                    12 => rows::<12, R, false>,
                    13 => rows::<13, R, false>,
                    14 => rows::<14, R, false>,
                    15 => rows::<15, R, false>,
                    16 => rows::<16, R, false>,
                    // None, or more than there are coefficients: `combine` refuses it.
                    _ => return 0,
                };
                rows(terms, outputs)
            }

            // SAFETY: a `Kernel` runs only after `Kernel::is_available` found these features. The pointers are
            // those of distinct exclusive borrows, valid for `bytes` bytes.
            unsafe {
                match outputs {
                    [a] => widths(terms, [a.as_mut_ptr()]),
                    [a, b] => widths(terms, [a.as_mut_ptr(), b.as_mut_ptr()]),
                    [a, b, c] => widths(terms, [a.as_mut_ptr(), b.as_mut_ptr(), c.as_mut_ptr()]),
                    [a, b, c, d] => {
                        widths(terms, [a.as_mut_ptr(), b.as_mut_ptr(), c.as_mut_ptr(), d.as_mut_ptr()])
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
