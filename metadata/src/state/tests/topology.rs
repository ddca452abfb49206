//! Nodes, incarnations, drives, registrations, pools and volumes.

use weft_proto::id::{ClusterId, DriveId, HostId, IncarnationId, NodeId, VolumeId};

use super::super::ClusterState;
use super::super::command::{Command, Refusal, Reply};
use super::super::map::{DriveState, NodeState, Registration, Settings};
use super::{Checked, geometry, init, new_node, new_volume};

#[test]
fn nothing_works_before_init_and_init_works_once() {
    let mut state = ClusterState::default();
    assert_eq!(
        state.apply(Command::AddNode(new_node(1))),
        Reply::Refused(Refusal::NotInitialised)
    );
    assert_eq!(state.apply(init()), Reply::Applied);
    assert_eq!(state.apply(init()), Reply::Unchanged);
    let Command::Init { name, .. } = init() else {
        unreachable!()
    };
    let other = Command::Init {
        id: ClusterId([9; 16]),
        name,
        authentication_key: [0; 32],
        fencing_host_id: HostId([9; 16]),
        fencing_key: 9,
        settings: Settings::default(),
    };
    assert_eq!(
        state.apply(other),
        Reply::Refused(Refusal::AlreadyInitialised(ClusterId([1; 16])))
    );
}

#[test]
fn a_restart_declares_the_previous_life_dead() {
    let mut cluster = Checked::cluster(2, 256, geometry(1, 1));
    let second = cluster.start(NodeId(1));
    assert!(cluster.state.map.is_live(second));
    assert!(!cluster.state.map.is_live(IncarnationId(1)));
    assert_eq!(cluster.state.map.nodes[&NodeId(1)].state, NodeState::Up);
    let due: Vec<_> = cluster
        .state
        .map
        .fences_due(DriveId(2))
        .map(|incarnation| incarnation.id)
        .collect();
    assert_eq!(due, [IncarnationId(1)], "to be fenced wherever it is on record");
    assert_eq!(
        cluster.refuse(Command::StartIncarnation {
            node: NodeId(1),
            host_id: HostId([1; 16]),
            key: 1
        }),
        Refusal::IncarnationIsDead(IncarnationId(1)),
        "the former process asks again"
    );
    assert_eq!(
        cluster.refuse(Command::RecordRegistrations {
            incarnation: IncarnationId(1),
            drives: [DriveId(1)].into()
        }),
        Refusal::IncarnationIsDead(IncarnationId(1))
    );
}

#[test]
fn the_same_draw_is_the_same_incarnation() {
    let mut cluster = Checked::cluster(1, 256, geometry(1, 1));
    assert_eq!(
        cluster.accept(Command::StartIncarnation {
            node: NodeId(1),
            host_id: HostId([1; 16]),
            key: 1
        }),
        Reply::Incarnation(IncarnationId(1))
    );
}

#[test]
fn the_fenced_do_not_register_again() {
    let mut cluster = Checked::cluster(2, 256, geometry(1, 1));
    cluster.fence(IncarnationId(1), &[2]);
    assert_eq!(
        cluster.state.map.drives[&DriveId(2)].registrations[&IncarnationId(1)],
        Registration::Fenced
    );
    assert_eq!(
        cluster.refuse(Command::RecordRegistrations {
            incarnation: IncarnationId(1),
            drives: [DriveId(1), DriveId(2)].into()
        }),
        Refusal::Fenced {
            incarnation: IncarnationId(1),
            drive: DriveId(2)
        }
    );
}

#[test]
fn a_drive_takes_no_more_registrants_than_it_says() {
    let mut cluster = Checked::cluster(15, 256, geometry(1, 1));
    // 15 incarnations and the cluster's own are its 16.
    cluster.accept(Command::AddNode(new_node(16)));
    let last = cluster.start(NodeId(16));
    assert_eq!(
        cluster.refuse(Command::RecordRegistrations {
            incarnation: last,
            drives: [DriveId(1)].into()
        }),
        Refusal::TooManyRegistrants {
            drive: DriveId(1),
            max: 16
        }
    );
}

#[test]
fn a_node_with_chunks_stays_and_one_without_goes() {
    let (mut cluster, ..) = Checked::serving();
    assert!(matches!(
        cluster.refuse(Command::RemoveNode { node: NodeId(1) }),
        Refusal::NodeInUse {
            drives: 1,
            volumes: 1,
            ..
        }
    ));
    cluster.accept(Command::RemoveNode { node: NodeId(3) });
    assert_eq!(cluster.state.map.drives[&DriveId(3)].state, DriveState::Removed);
    assert_eq!(
        cluster.refuse(Command::SetDriveState {
            drive: DriveId(3),
            state: DriveState::Online
        }),
        Refusal::DriveIsRemoved(DriveId(3))
    );
}

#[test]
fn too_few_domains_are_refused_with_what_would_fit() {
    let mut cluster = Checked::cluster(5, 256, geometry(4, 2));
    assert_eq!(
        cluster.refuse(Command::CreateVolume(new_volume("v"))),
        Refusal::TooFewDomains {
            available: 5,
            needed: 6,
            fits: Some(geometry(3, 2))
        }
    );
    let mut fitting = new_volume("v");
    fitting.geometry = Some(geometry(3, 2));
    fitting.size_bytes = 65 << 40;
    assert!(matches!(
        cluster.refuse(Command::CreateVolume(fitting.clone())),
        Refusal::VolumeTooLarge { max_bytes, .. } if max_bytes == 3 << 44
    ));
    fitting.size_bytes = 1 << 30;
    assert_eq!(
        cluster.accept(Command::CreateVolume(fitting)),
        Reply::Volume(VolumeId(1))
    );
}

#[test]
fn volumes_grow_and_do_not_shrink_and_have_a_largest_size() {
    let mut cluster = Checked::cluster(2, 256, geometry(1, 1));
    let volume = cluster.volume("v");
    let resize = |size_bytes| Command::ResizeVolume { volume, size_bytes };
    assert_eq!(cluster.accept(resize(2 << 30)), Reply::Applied);
    assert!(matches!(
        cluster.refuse(resize(1 << 30)),
        Refusal::WouldShrink { .. }
    ));
    // Of 1+1, 2^18 bands of one data chunk of 64 MiB each.
    assert_eq!(
        cluster.refuse(resize((16 << 40) + 4096)),
        Refusal::VolumeTooLarge {
            geometry: geometry(1, 1),
            size_bytes: (16 << 40) + 4096,
            max_bytes: 16 << 40,
        }
    );
    assert_eq!(cluster.accept(resize(16 << 40)), Reply::Applied);
    assert!(matches!(
        cluster.refuse(resize((2 << 30) + 512)),
        Refusal::Invalid { .. }
    ));
}

#[test]
fn the_debug_form_keeps_the_key() {
    let mut state = ClusterState::default();
    state.apply(init());
    let printed = format!("{:?}", state.map.cluster);
    assert!(!printed.contains("authentication_key"), "{printed}");
}
