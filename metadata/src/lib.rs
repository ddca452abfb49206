//! The replicated cluster state and its Raft service.
//!
//! ```text
//!   agents, command line ──► client ──► service ──► openraft ──► state
//!                                          ▲           │
//!                                        leader    log, store
//! ```
//!
//! - [`state`]: what the cluster agrees on, pure and deterministic;
//! - [`propose`], [`leader`]: what to propose: where bands lie, who is dead, who owns what; pure as well;
//! - `log`, `store`: the write-ahead log, the state machine and its snapshots; [`envelope`]: how bytes are wrapped;
//! - [`service`]: a member of the group, over gRPC; [`client`]: everybody else's way to it.
//!
//! Architecture invariant: metadata is off the data path. It is asked per band, per root and per change of owner,
//! never per I/O; and what it has answered survives the restart of any or all members.

pub mod client;
#[cfg(test)]
mod crash;
mod disk;
pub mod envelope;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod leader;
mod log;
pub mod metrics;
pub mod propose;
mod raft;
pub mod service;
pub mod state;
mod store;
mod wire;

pub use client::{ClientError, MetadataClient};
pub use service::{Config, MetadataService};
pub use wire::{DriveUsage, Status, VolumeUsage};
