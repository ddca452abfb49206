//! The types that openraft is told to use.

mod runtime;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::state::{Command, Reply};

/// A command on its way through the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Proposal(pub(crate) Command);

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

openraft::declare_raft_types!(
    /// openraft's configuration: a member is a [`weft_proto::id::NodeId`] at its control address.
    pub(crate) TypeConfig:
        D = Proposal,
        R = Reply,
        NodeId = u64,
        Node = openraft::BasicNode,
        AsyncRuntime = runtime::RareTicks,
);

/// openraft's names, with our configuration.
pub(crate) mod types {
    use super::TypeConfig;
    use openraft::type_config::alias;

    pub(crate) type Entry = alias::EntryOf<TypeConfig>;
    pub(crate) type LogId = alias::LogIdOf<TypeConfig>;
    pub(crate) type SnapshotMeta = alias::SnapshotMetaOf<TypeConfig>;
    pub(crate) type StoredMembership = alias::StoredMembershipOf<TypeConfig>;
    pub(crate) type Vote = alias::VoteOf<TypeConfig>;
    /// A snapshot travels as its whole envelope.
    pub(crate) type Snapshot = alias::SnapshotOf<TypeConfig, bytes::Bytes>;
}
