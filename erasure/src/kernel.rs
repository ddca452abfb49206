//! The kernels: sums of multiples of byte strings, as fast as the processor allows.
//!
//! One operation serves encoding and reconstruction: `outputs[r] = Σ rows[r][s] · sources[s]`, for up to four
//! outputs at once, so that each source is loaded once. [`Kernel::detect`] picks the best instructions of the
//! processor at hand; all kernels give the same bytes, which `tests/every_erasure.rs` shows.

mod scalar;

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::coefficients::{DATA_SHARDS_MAX, PARITY_SHARDS_MAX, Row};

/// Which instructions do the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kernel {
    /// AVX-512 and GFNI: 64 bytes per instruction.
    GfniAvx512,
    /// AVX2 and GFNI: 32 bytes per instruction.
    GfniAvx2,
    /// AVX2 byte shuffles, two lookups per product.
    Avx2,
    /// AArch64 table lookups.
    Neon,
    /// Table lookups byte by byte: any processor.
    Scalar,
}

impl Kernel {
    /// All of them, fastest first.
    const ALL: [Self; 5] = [
        Self::GfniAvx512,
        Self::GfniAvx2,
        Self::Avx2,
        Self::Neon,
        Self::Scalar,
    ];

    /// The fastest one of this processor.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().next().unwrap_or(Self::Scalar)
    }

    /// All that this processor can run, fastest first. For tests and measurements.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|kernel| kernel.is_available())
    }

    /// Whether this processor can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::GfniAvx512 => {
                is_x86_feature_detected!("gfni")
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
            }
            #[cfg(target_arch = "x86_64")]
            Self::GfniAvx2 => is_x86_feature_detected!("gfni") && is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            Self::Scalar => true,
            #[allow(unreachable_patterns, reason = "which arms exist depends on the architecture")]
            _ => false,
        }
    }

    /// Writes `Σ rows[r][s] · sources[s]` to `outputs[r]`, or adds it there.
    ///
    /// The caller has checked that the kernel is available ([`crate::Codec`] holds no other).
    ///
    /// # Panics
    /// When slices differ in length, or there are more than [`DATA_SHARDS_MAX`] sources.
    pub(crate) fn combine(self, mode: Mode, rows: &[Row], sources: &[&[u8]], outputs: &mut [&mut [u8]]) {
        assert_eq!(rows.len(), outputs.len(), "one row of coefficients per output");
        assert!(sources.len() <= DATA_SHARDS_MAX, "more sources than coefficients");
        let Some(bytes) = outputs.first().map(|output| output.len()) else {
            return;
        };
        // The vector kernels read and write through pointers and rely on exactly this.
        for slice in sources
            .iter()
            .copied()
            .chain(outputs.iter().map(|output| &**output))
        {
            assert_eq!(slice.len(), bytes, "shards differ in length");
        }
        for (rows, outputs) in rows
            .chunks(PARITY_SHARDS_MAX)
            .zip(outputs.chunks_mut(PARITY_SHARDS_MAX))
        {
            if let ([only], Mode::Assign) = (sources, mode)
                && rows.iter().all(|row| row[0] == 1)
            {
                // w = 1: parities are copies.
                outputs.iter_mut().for_each(|output| output.copy_from_slice(only));
                continue;
            }
            let terms = Terms {
                mode,
                rows,
                sources,
                bytes,
            };
            let done = self.vector(&terms, outputs);
            scalar::combine(&terms, outputs, done);
        }
    }

    /// Does as many leading bytes as fit the vector width; returns how many.
    fn vector(self, terms: &Terms<'_>, outputs: &mut [&mut [u8]]) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::GfniAvx512 => x86::gfni_avx512(terms, outputs),
            #[cfg(target_arch = "x86_64")]
            Self::GfniAvx2 => x86::gfni_avx2(terms, outputs),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::avx2(terms, outputs),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::neon(terms, outputs),
            Self::Scalar => 0,
            #[allow(unreachable_patterns, reason = "which arms exist depends on the architecture")]
            _ => 0,
        }
    }
}

/// Whether the outputs' old bytes count.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// They are overwritten.
    Assign,
    /// The sum is added to them.
    Accumulate,
}

/// What a kernel is to sum, checked by [`Kernel::combine`]: 1 … 4 rows, at most 16 sources, and every source
/// and every output has exactly `bytes` bytes.
struct Terms<'a> {
    mode: Mode,
    rows: &'a [Row],
    sources: &'a [&'a [u8]],
    bytes: usize,
}
