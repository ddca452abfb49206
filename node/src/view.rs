//! Small questions to the cluster map that several parts of this crate ask.

use weft_metadata::state::ClusterMap;
use weft_metadata::state::map::{Drive, DriveState, Node, NodeState};
use weft_proto::id::ClusterId;
use weft_proto::nqn::Nqn;

/// Drives that have not been removed.
pub(crate) fn drives(map: &ClusterMap) -> impl Iterator<Item = &Drive> {
    map.drives
        .values()
        .filter(|drive| drive.state != DriveState::Removed)
}

/// Whether the node's agent lives.
pub(crate) fn node_is_up(node: &Node) -> bool {
    node.state == NodeState::Up
}

/// The HostNQN of a node's agent, the same in every incarnation.
pub(crate) fn node_host_nqn(cluster: ClusterId, node: &str) -> Nqn {
    nqn(&format!("nqn.2026-11.io.weft:{cluster}:node:{node}"))
}

/// The subsystem of a drive of a node.
pub(crate) fn drive_subnqn(cluster: ClusterId, drive: weft_proto::id::DriveUuid) -> Nqn {
    nqn(&format!("nqn.2026-11.io.weft:{cluster}:drive:{drive}"))
}

/// The subsystem that presents a volume, the same on every node.
pub(crate) fn volume_subnqn(cluster: ClusterId, volume: &str) -> Nqn {
    nqn(&format!("nqn.2026-11.io.weft:{cluster}:volume:{volume}"))
}

/// The owner's own subsystem of a volume, which forwarders use. It never forwards, so that forwarding cannot loop.
pub(crate) fn owner_subnqn(volume_subnqn: &Nqn) -> Nqn {
    nqn(&format!("{volume_subnqn}:owner"))
}

/// The name by which the guest that has a volume as its drive is known, on whichever node it runs.
pub(crate) fn guest_nqn(cluster: ClusterId, volume: &str) -> Nqn {
    nqn(&format!("nqn.2026-11.io.weft:{cluster}:guest:{volume}"))
}

fn nqn(text: &str) -> Nqn {
    text.parse()
        .expect("a cluster id and a checked name make an NQN of less than 223 bytes")
}
