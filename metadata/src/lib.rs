//! The replicated cluster state and its Raft service.
//!
//! - [`state`]: what the cluster agrees on, pure and deterministic.

pub mod envelope;
mod log;
pub mod metrics;
pub mod propose;
mod raft;
pub mod state;
mod store;
