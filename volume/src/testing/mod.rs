//! A simulated world for the engine: a virtual clock, drives that lose power, a metadata service and an oracle.
//!
//! Plain code without tokio, sockets or a real clock, used by this crate's tests and by `chaos`. Everything is
//! reproduced by a seed: see [`world`]. A test makes a [`World`], adds drives and a volume, takes the
//! volume over ([`cluster::take_over`]), runs an engine on the [`Seams`](crate::seams::Seams) it gets, crashes it,
//! takes over again, and asks the [`oracle`] whether any block read what it should not.
//!
//! What it does not simulate: NVMe, Raft, a network. Those have tests of their own.

pub mod answer;
pub mod cluster;
pub mod directory;
pub mod drive;
pub mod lease;
pub mod metadata;
pub mod monitor;
pub mod oracle;
pub mod rng;
pub mod world;

pub use world::World;

#[cfg(test)]
mod tests;
