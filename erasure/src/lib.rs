//! Reed-Solomon codec: any w + m with w ≤ 16 data and m ≤ 4 parity shards.
//!
//! Systematic, over GF(2^8) with polynomial 0x11d. It promises:
//! - any w shards of a stripe give all w + m (MDS);
//! - a stripe of one data shard is an (m + 1)-way copy, and a stripe of w shards is encoded as a wider one
//!   whose other data is zero, so one table of coefficients serves every width;
//! - bytes at one position depend on no other position, so stripes may be coded block by block and from
//!   scattered slices;
//! - the same bytes on every processor.
//!
//! It does not check what it is given: a wrong source gives a wrong result. Checksums belong to the stripe
//! header, numbers of columns to the band. It allocates nothing and knows no I/O.
//!
//! Choice of coefficients: `docs/design/erasure-coefficients.md`.

mod codec;
mod coefficients;
mod field;
mod kernel;
mod reconstruct;
mod scattered;

pub use codec::Codec;
pub use coefficients::{DATA_SHARDS_MAX, PARITY_SHARDS_MAX, coefficient};
pub use kernel::Kernel;
pub use reconstruct::{ReconstructError, Reconstruction};

/// Most shards of a stripe.
pub const SHARDS_MAX: usize = DATA_SHARDS_MAX + PARITY_SHARDS_MAX;
