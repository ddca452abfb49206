//! Reconstruction: any shards of a stripe from any w of the others.
//!
//! With e data shards missing (e ≤ m), the e parities chosen are e equations in e unknowns: a system of at
//! most 4 × 4 is inverted, never one of w × w. Everything has a fixed size; nothing is allocated.

use crate::SHARDS_MAX;
use crate::coefficients::{COEFFICIENTS, DATA_SHARDS_MAX, PARITY_SHARDS_MAX, Row};
use crate::field::{inverse, product};
use crate::kernel::{Kernel, Mode};

/// Why shards cannot be reconstructed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReconstructError {
    /// The stripe's w is not 1 … 16.
    #[error("a stripe of {w} data shards, supported are 1 to {DATA_SHARDS_MAX}")]
    UnsupportedWidth {
        /// As given.
        w: u8,
    },
    /// A shard number is past the stripe's last one.
    #[error("shard {shard} of a stripe of {shards}")]
    NoSuchShard {
        /// As given.
        shard: u8,
        /// w + m.
        shards: u8,
    },
    /// More than m shards are missing.
    #[error("{present} shards present, {needed} needed")]
    TooFewShards {
        /// Different ones among those given.
        present: u8,
        /// w.
        needed: u8,
    },
}

/// How to compute some shards from others, for any number of blocks. Made by [`Codec::reconstruction`](crate::Codec::reconstruction).
#[derive(Clone, Debug)]
pub struct Reconstruction {
    kernel: Kernel,
    /// Shard numbers to read, the first `w` of them, ascending.
    sources: [u8; DATA_SHARDS_MAX],
    w: usize,
    /// By wanted shard, then by source: the first `wanted` of them.
    rows: [Row; SHARDS_MAX],
    wanted: usize,
}

impl Reconstruction {
    /// Of a stripe of `w` data and `m` parity shards, computed with `kernel`.
    pub(crate) fn new(
        kernel: Kernel,
        m: u8,
        w: u8,
        present: impl Iterator<Item = u8> + Clone,
        want: &[u8],
    ) -> Result<Self, ReconstructError> {
        if !(1..=DATA_SHARDS_MAX).contains(&usize::from(w)) {
            return Err(ReconstructError::UnsupportedWidth { w });
        }
        let shards = w + m;
        let mut named = present.clone().chain(want.iter().copied());
        if let Some(shard) = named.find(|&shard| shard >= shards) {
            return Err(ReconstructError::NoSuchShard { shard, shards });
        }
        let present = present.fold(0u32, |set, shard| set | 1 << shard);
        let count = present.count_ones() as u8;
        if count < w {
            return Err(ReconstructError::TooFewShards {
                present: count,
                needed: w,
            });
        }

        // Ascending, so that data comes first: what is at hand already costs no arithmetic, and parity 0
        // before the others is a plain exclusive or.
        let w = usize::from(w);
        let mut sources = [0; DATA_SHARDS_MAX];
        let numbers = (0..shards).filter(|&shard| present >> shard & 1 == 1);
        for (source, number) in sources[..w].iter_mut().zip(numbers) {
            *source = number;
        }

        let data = data_from(w, &sources);
        let mut rows = [[0; DATA_SHARDS_MAX]; SHARDS_MAX];
        let mut wanted = 0;
        for &shard in want {
            assert!(wanted < SHARDS_MAX, "a shard is wanted more than once");
            let shard = usize::from(shard);
            rows[wanted] = if shard < w {
                data[shard]
            } else {
                parity_from(&data[..w], &COEFFICIENTS[shard - w])
            };
            wanted += 1;
        }
        Ok(Self {
            kernel,
            sources,
            w,
            rows,
            wanted,
        })
    }

    /// The w shards to read, ascending.
    #[must_use]
    pub fn sources(&self) -> &[u8] {
        &self.sources[..self.w]
    }

    /// Computes the wanted shards, in the order they were asked for, from the bytes of [`Self::sources`], in
    /// their order. Like encoding, block by block or at once.
    ///
    /// # Panics
    /// Unless there is one slice per source and one per wanted shard, all of the same length.
    pub fn run(&self, sources: &[&[u8]], outputs: &mut [&mut [u8]]) {
        assert_eq!(sources.len(), self.w, "one slice per source");
        self.kernel
            .combine(Mode::Assign, &self.rows[..self.wanted], sources, outputs);
    }

    /// Like [`Self::run`], each source being a list of slices, cut anywhere. A shorter one counts as followed
    /// by zeroes.
    ///
    /// # Panics
    /// Unless there is one list per source and one output per wanted shard, the outputs have one length, and
    /// no source is longer.
    pub fn run_scattered<S: AsRef<[u8]>>(&self, sources: &[&[S]], outputs: &mut [&mut [u8]]) {
        assert_eq!(sources.len(), self.w, "one list per source");
        crate::scattered::combine(self.kernel, &self.rows[..self.wanted], sources, outputs);
    }
}

/// Each of the w data shards as a sum of multiples of the sources, which are ascending.
fn data_from(w: usize, sources: &[u8; DATA_SHARDS_MAX]) -> [Row; DATA_SHARDS_MAX] {
    let mut data = [[0; DATA_SHARDS_MAX]; DATA_SHARDS_MAX];
    let mut missing = [0; PARITY_SHARDS_MAX];
    let mut e = 0;
    for (shard, row) in data[..w].iter_mut().enumerate() {
        // As many of the data shards before this one are sources as are not missing.
        let position = shard - e;
        if usize::from(sources[position]) == shard {
            row[position] = 1;
        } else {
            missing[e] = shard;
            e += 1;
        }
    }

    // The e sources at the end are parities. Each says: Σ C·(missing) = parity − Σ C·(data at hand).
    let at_hand = w - e;
    let equation = |number: usize| &COEFFICIENTS[usize::from(sources[at_hand + number]) - w];
    let mut system = [[0; PARITY_SHARDS_MAX]; PARITY_SHARDS_MAX];
    for (number, row) in system[..e].iter_mut().enumerate() {
        for (value, &shard) in row.iter_mut().zip(&missing[..e]) {
            *value = equation(number)[shard];
        }
    }
    let inverted = invert(system, e);
    for (&shard, multiples) in missing[..e].iter().zip(&inverted) {
        let row = &mut data[shard];
        for (number, &multiple) in multiples[..e].iter().enumerate() {
            row[at_hand + number] = multiple;
            let coefficients = equation(number);
            for (value, &source) in row[..at_hand].iter_mut().zip(sources) {
                *value ^= product(multiple, coefficients[usize::from(source)]);
            }
        }
    }
    data
}

/// A parity as a sum of multiples of the sources, given each data shard as one.
fn parity_from(data: &[Row], coefficients: &Row) -> Row {
    let mut row = [0; DATA_SHARDS_MAX];
    for (shard, &coefficient) in data.iter().zip(coefficients) {
        add_multiple(&mut row, shard, coefficient);
    }
    row
}

/// The inverse of the leading e × e of `system`, by Gauss-Jordan.
fn invert(
    mut system: [[u8; PARITY_SHARDS_MAX]; PARITY_SHARDS_MAX],
    e: usize,
) -> [[u8; PARITY_SHARDS_MAX]; PARITY_SHARDS_MAX] {
    let mut inverted = [[0; PARITY_SHARDS_MAX]; PARITY_SHARDS_MAX];
    for (diagonal, row) in inverted.iter_mut().enumerate() {
        row[diagonal] = 1;
    }
    for pivot in 0..e {
        // Every leading minor of a submatrix of C is itself a minor of C and so not 0: eliminating in order
        // always leaves a pivot, and no rows need to be exchanged.
        let scale = inverse(system[pivot][pivot]);
        system[pivot] = system[pivot].map(|value| product(value, scale));
        inverted[pivot] = inverted[pivot].map(|value| product(value, scale));
        let (pivot_system, pivot_inverted) = (system[pivot], inverted[pivot]);
        for row in (0..e).filter(|&row| row != pivot) {
            let factor = system[row][pivot];
            add_multiple(&mut system[row], &pivot_system, factor);
            add_multiple(&mut inverted[row], &pivot_inverted, factor);
        }
    }
    inverted
}

/// `row += factor · other`.
fn add_multiple<const N: usize>(row: &mut [u8; N], other: &[u8; N], factor: u8) {
    for (value, &other) in row.iter_mut().zip(other) {
        *value ^= product(factor, other);
    }
}
