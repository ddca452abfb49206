//! The replicated cluster state and its Raft service.
//!
//! - [`state`]: what the cluster agrees on, pure and deterministic.

pub mod state;
