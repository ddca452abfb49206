//! Encoding: parity from data.

use crate::coefficients::{COEFFICIENTS, DATA_SHARDS_MAX, PARITY_SHARDS_MAX, Row};
use crate::kernel::{Kernel, Mode};
use crate::reconstruct::{ReconstructError, Reconstruction};

/// The codec of one m: stateless, two bytes, `Copy`.
///
/// The number of data shards comes with each call, because it varies from stripe to stripe. Every operation
/// works byte position by byte position, so a stripe can be coded in any cut: whole, a block at a time, or
/// from scattered slices.
///
/// ```
/// use weft_erasure::Codec;
///
/// let codec = Codec::new(2).expect("1 to 4 parity shards");
/// let data: [&[u8]; 3] = [b"four", b"byte", b"data"];
/// let (mut p, mut q) = ([0; 4], [0; 4]);
/// codec.encode(&data, &mut [&mut p, &mut q]);
///
/// // Shards 0 and 2 are lost; what is left are data shard 1 and both parities, shards 3 and 4.
/// let (mut first, mut third) = ([0; 4], [0; 4]);
/// let plan = codec.reconstruction(3, &[1, 3, 4], &[0, 2])?;
/// assert_eq!(plan.sources(), [1, 3, 4]);
/// plan.run(&[b"byte", &p, &q], &mut [&mut first, &mut third]);
/// assert_eq!((&first, &third), (b"four", b"data"));
/// # Ok::<(), weft_erasure::ReconstructError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Codec {
    m: u8,
    /// Available on this processor: the constructors see to it, and the kernels' soundness rests on it.
    kernel: Kernel,
}

impl Codec {
    /// `None` unless 1 ≤ `m` ≤ [`PARITY_SHARDS_MAX`].
    #[must_use]
    pub fn new(m: u8) -> Option<Self> {
        Self::with_kernel(m, Kernel::detect())
    }

    /// With chosen instructions, for tests and measurements. `None` also where the processor lacks them.
    #[must_use]
    pub fn with_kernel(m: u8, kernel: Kernel) -> Option<Self> {
        ((1..=PARITY_SHARDS_MAX).contains(&usize::from(m)) && kernel.is_available())
            .then_some(Self { m, kernel })
    }

    /// Parity shards of every stripe.
    #[must_use]
    pub fn m(self) -> u8 {
        self.m
    }

    /// The instructions in use.
    #[must_use]
    pub fn kernel(self) -> Kernel {
        self.kernel
    }

    /// Writes the m parity shards of w = `data.len()` data shards.
    ///
    /// Bytes at one position depend on no other position: call it once with whole shards or once per 4 KiB
    /// block, whichever needs no copy.
    ///
    /// # Panics
    /// Unless 1 ≤ w ≤ [`DATA_SHARDS_MAX`], `parity` has m slices, and all slices have the same length.
    pub fn encode(self, data: &[&[u8]], parity: &mut [&mut [u8]]) {
        assert!(!data.is_empty(), "a stripe has at least one data shard");
        self.kernel.combine(Mode::Assign, self.rows(parity), data, parity);
    }

    /// Like [`Codec::encode`], each data shard being a list of slices, cut anywhere. A shard that is shorter
    /// than the parity counts as followed by zeroes; an empty list is a shard of zeroes.
    ///
    /// # Panics
    /// Unless 1 ≤ w ≤ [`DATA_SHARDS_MAX`], `parity` has m slices of one length, and no shard is longer.
    pub fn encode_scattered<S: AsRef<[u8]>>(self, data: &[&[S]], parity: &mut [&mut [u8]]) {
        assert!(!data.is_empty(), "a stripe has at least one data shard");
        crate::scattered::combine(self.kernel, self.rows(parity), data, parity);
    }

    /// Adds one data shard's part to the parities: begin with zeroes, call it once for each data shard, in any
    /// order, and the result is that of [`Codec::encode`]. For data that arrives shard by shard.
    ///
    /// Adding old ⊕ new turns the parity of the old shard into that of the new one.
    ///
    /// # Panics
    /// Unless `index` < [`DATA_SHARDS_MAX`], `parity` has m slices, and all slices have the same length.
    pub fn accumulate(self, index: usize, data: &[u8], parity: &mut [&mut [u8]]) {
        assert!(index < DATA_SHARDS_MAX, "data shard {index} of {DATA_SHARDS_MAX}");
        let mut rows = [[0; DATA_SHARDS_MAX]; PARITY_SHARDS_MAX];
        for (row, coefficients) in rows.iter_mut().zip(self.rows(parity)) {
            row[0] = coefficients[index];
        }
        let rows = &rows[..usize::from(self.m)];
        self.kernel.combine(Mode::Accumulate, rows, &[data], parity);
    }

    /// How to compute the shards `want` of a stripe of `w` data shards from those `present`.
    ///
    /// Shards are numbered as in the stripe: data 0 … w − 1, then parity w … w + m − 1. Any w of them are
    /// enough. `present` may list more, in any order; the plan names the w it uses, data before parity. `want` may be
    /// data and parity, present or not. The plan serves any number of blocks of stripes with the same shape.
    ///
    /// # Errors
    /// [`ReconstructError`] when fewer than w are present, or a number is out of range.
    ///
    /// # Panics
    /// When more shards are wanted than a stripe can have.
    pub fn reconstruction(
        self,
        w: u8,
        present: &[u8],
        want: &[u8],
    ) -> Result<Reconstruction, ReconstructError> {
        Reconstruction::new(self.kernel, self.m, w, present.iter().copied(), want)
    }

    /// One plan, one use: computes the shards `want` into `outputs`, in the same order, from `shards`, which are
    /// (number, bytes) in any order. See [`Codec::reconstruction`].
    ///
    /// # Errors
    /// As for [`Codec::reconstruction`].
    ///
    /// # Panics
    /// Unless `outputs` has one slice per wanted shard and all slices have the same length.
    pub fn reconstruct(
        self,
        w: u8,
        shards: &[(u8, &[u8])],
        want: &[u8],
        outputs: &mut [&mut [u8]],
    ) -> Result<(), ReconstructError> {
        let present = shards.iter().map(|&(number, _)| number);
        let plan = Reconstruction::new(self.kernel, self.m, w, present, want)?;
        let mut sources: [&[u8]; DATA_SHARDS_MAX] = [&[]; DATA_SHARDS_MAX];
        for (source, number) in sources.iter_mut().zip(plan.sources()) {
            if let Some((_, bytes)) = shards.iter().find(|(shard, _)| shard == number) {
                *source = bytes;
            }
        }
        plan.run(&sources[..plan.sources().len()], outputs);
        Ok(())
    }

    fn rows(self, parity: &[&mut [u8]]) -> &'static [Row] {
        assert_eq!(parity.len(), usize::from(self.m), "parity shards");
        &COEFFICIENTS[..usize::from(self.m)]
    }
}
