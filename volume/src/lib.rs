//! The log-structured, erasure-coded volume engine.
//!
//! Architecture invariant: the engine knows blocks, bands and epochs. It knows no NVMe, no socket and no
//! clock; see [`seams`].

mod band;
pub mod engine;
pub mod entry;
pub mod error;
pub mod format;
pub mod map;
pub mod metrics;
pub mod seams;
pub mod settings;
mod stripes;
pub mod sub_block;
mod sync;
pub mod testing;
