//! The control services: messages, clients and servers generated from `proto/*.proto`.
//!
//! The metadata service carries opaque envelopes (docs/format/raft.md), which `weft-metadata` alone reads.

/// The metadata service and the Raft group behind it.
#[expect(missing_docs, reason = "generated; the comments are in proto/metadata.proto")]
#[allow(
    clippy::all,
    unused_qualifications,
    unreachable_pub,
    reason = "generated code is not held to our lints"
)]
pub mod metadata {
    tonic::include_proto!("weft.metadata.v1");
}

/// The administration service of an agent.
#[allow(
    missing_docs,
    clippy::all,
    unused_qualifications,
    unreachable_pub,
    reason = "generated; the comments are in proto/admin.proto"
)]
pub mod admin {
    tonic::include_proto!("weft.admin.v1");
}
