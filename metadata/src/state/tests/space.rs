//! Bands, chunks, quarantine and the reserve.

use weft_proto::band::ChunkSize;
use weft_proto::id::{DriveId, Epoch, IncarnationId, NodeId};

use super::super::command::{BandProposal, Command, Purpose, Refusal, Reply};
use super::super::map::DriveState;
use super::{Checked, geometry};

#[test]
fn a_repeated_request_is_answered_with_the_same_bands() {
    let (mut cluster, volume, _) = Checked::serving();
    let command = Command::GrantBands {
        volume,
        epoch: Epoch(1),
        request: 1234,
        purpose: Purpose::User,
        chunk_size: ChunkSize::Mib8,
        proposals: vec![BandProposal {
            geometry: geometry(1, 1),
            drives: vec![DriveId(1), DriveId(3)],
        }],
    };
    let first = cluster.accept(command.clone());
    let before = cluster.state.clone();
    assert_eq!(cluster.accept(command), first);
    assert_eq!(cluster.state, before);
}

#[test]
fn a_band_is_granted_only_where_the_owner_is_registered_and_domains_differ() {
    let mut cluster = Checked::cluster(3, 256, geometry(1, 1));
    let volume = cluster.volume("v");
    // A new life of node 1 is registered nowhere yet.
    let fresh = cluster.start(NodeId(1));
    cluster.begin(volume, 1).unwrap();
    let propose = |drives: Vec<u32>, k| Command::GrantBands {
        volume,
        epoch: Epoch(1),
        request: 1,
        purpose: Purpose::Internal,
        chunk_size: ChunkSize::Mib1,
        proposals: vec![BandProposal {
            geometry: geometry(k, 1),
            drives: drives.into_iter().map(DriveId).collect(),
        }],
    };
    assert_eq!(
        cluster.refuse(propose(vec![1, 2], 1)),
        Refusal::ProposalConflict { drive: DriveId(1) }
    );
    cluster.register(fresh);
    assert_eq!(
        cluster.refuse(propose(vec![2, 2], 1)),
        Refusal::ProposalConflict { drive: DriveId(2) },
        "shards never double up"
    );
    assert!(matches!(
        cluster.refuse(propose(vec![1, 2, 3], 2)),
        Refusal::Invalid { .. }
    ));
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(3),
    });
    assert_eq!(
        cluster.refuse(propose(vec![1, 3], 1)),
        Refusal::ProposalConflict { drive: DriveId(3) },
        "its node is down"
    );
    assert!(matches!(
        cluster.accept(propose(vec![1, 2], 1)),
        Reply::Bands(bands) if bands.len() == 1
    ));
}

#[test]
fn host_writes_leave_the_reserve_and_the_engine_may_use_it() {
    // Four domains for 1+1: the largest one, 640 MiB, is kept for its rebuild, and 10 % for the engine at most.
    let mut cluster = Checked::cluster(4, 640, geometry(1, 1));
    let volume = cluster.volume("v");
    cluster.serve(volume, 1);
    let pool = cluster.state.map.pools[&weft_proto::id::PoolId(1)].clone();
    let space = cluster.state.pool_space(&pool);
    assert_eq!((space.capacity_mib, space.rebuild_reserve_mib), (2560, 640));
    assert_eq!(
        space.internal_reserve_mib, 80,
        "4 bands of 2 chunks of 8 MiB, and one part in 160"
    );
    let refused = loop {
        match fullest(&mut cluster, volume, Purpose::User) {
            Reply::Bands(_) => {}
            Reply::Refused(refusal) => break refusal,
            reply => panic!("{reply:?}"),
        }
    };
    let Refusal::NoSpace {
        free_mib,
        reserve_mib,
    } = refused
    else {
        panic!("{refused:?}");
    };
    assert_eq!(reserve_mib, 720);
    assert!((720..720 + 128).contains(&free_mib), "{free_mib} MiB left");
    assert!(matches!(
        fullest(&mut cluster, volume, Purpose::Internal),
        Reply::Bands(_)
    ));
}

/// Found by the simulator with drives of 12 MiB (seed 1010): a server was away while hosts wrote, the others were filled, and
/// what was free lay where the engines' own bands could not use it.
#[test]
fn hosts_leave_a_reserve_that_bands_can_reach() {
    let mut cluster = Checked::cluster(3, 96, geometry(2, 1));
    let volume = cluster.volume("v");
    cluster.serve(volume, 1);
    let pool = cluster.state.map.pools[&weft_proto::id::PoolId(1)].clone();
    cluster.accept(Command::SetDriveState {
        drive: DriveId(3),
        state: DriveState::Failed,
    });
    let grant =
        |request, purpose, geometry: weft_proto::band::Geometry, drives: Vec<u32>| Command::GrantBands {
            volume,
            epoch: Epoch(1),
            request,
            purpose,
            chunk_size: ChunkSize::Mib1,
            proposals: vec![BandProposal {
                geometry,
                drives: drives.into_iter().map(DriveId).collect(),
            }],
        };
    let fill = |cluster: &mut Checked, geometry, drives: &[u32]| loop {
        let request = cluster.state.next.band + 1000;
        match cluster.apply(grant(request, Purpose::User, geometry, drives.to_vec())) {
            Reply::Bands(_) => {}
            Reply::Refused(Refusal::NoSpace { .. }) => break,
            reply => panic!("{reply:?}"),
        }
    };
    // As wide as two domains allow, until nothing is left to hosts; then the third one is back, empty.
    fill(&mut cluster, geometry(1, 1), &[1, 2]);
    cluster.accept(Command::SetDriveState {
        drive: DriveId(3),
        state: DriveState::Online,
    });
    fill(&mut cluster, geometry(2, 1), &[1, 2, 3]);
    let space = cluster.state.pool_space(&pool);
    assert!(
        space.free_mib > 80 + space.reserve_mib(),
        "free on the third: {space:?}"
    );
    assert!(space.free_reach_mib >= space.reserve_mib(), "{space:?}");
    for request in 0..4 {
        cluster.accept(grant(request, Purpose::Internal, geometry(2, 1), vec![1, 2, 3]));
    }
}

/// One band of 64 MiB chunks on the two emptiest drives.
fn fullest(cluster: &mut Checked, volume: weft_proto::id::VolumeId, purpose: Purpose) -> Reply {
    let mut drives: Vec<(u64, DriveId)> = cluster
        .state
        .chunks
        .iter()
        .map(|(id, chunks)| (chunks.space.allocated_mib(), *id))
        .collect();
    drives.sort_unstable();
    let request = cluster.state.next.band + 1_000_000;
    cluster.apply(Command::GrantBands {
        volume,
        epoch: Epoch(1),
        request,
        purpose,
        chunk_size: ChunkSize::Mib64,
        proposals: vec![BandProposal {
            geometry: geometry(1, 1),
            drives: drives[..2].iter().map(|(_, id)| *id).collect(),
        }],
    })
}

#[test]
fn what_the_live_owner_frees_is_free_at_once_but_for_the_chunks_it_lists() {
    let (mut cluster, volume, first) = Checked::serving();
    let second = cluster.band(volume);
    let mut update = cluster.root(volume, second.id, &[first.id]);
    update.unsettled = vec![first.columns[1]];
    cluster.accept(Command::PublishRoot { update });
    let of = |cluster: &Checked, index: usize| {
        cluster.state.chunks[&first.columns[index].drive]
            .space
            .is_allocated(first.columns[index].offset_mib, first.chunk_size)
    };
    assert!(!of(&cluster, 0));
    assert!(of(&cluster, 1), "a write is still under way there");
    cluster.fence(IncarnationId(1), &[first.columns[1].drive.0]);
    assert!(!of(&cluster, 1));
}

#[test]
fn a_root_outside_of_the_volumes_bands_is_refused() {
    let (mut cluster, volume, band) = Checked::serving();
    for update in [
        cluster.root(volume, weft_proto::id::BandId(99), &[]),
        cluster.root(volume, band.id, &[band.id]),
        cluster.root(volume, band.id, &[weft_proto::id::BandId(99)]),
    ] {
        assert!(matches!(
            cluster.refuse(Command::PublishRoot { update }),
            Refusal::NoSuchBand(_)
        ));
    }
}

#[test]
fn returned_bands_are_free_and_may_be_returned_again() {
    let (mut cluster, volume, _) = Checked::serving();
    let before = cluster.state.chunks.clone();
    let band = cluster.band(volume);
    let back = Command::ReturnBands {
        volume,
        epoch: Epoch(1),
        bands: vec![band.id],
    };
    assert_eq!(cluster.accept(back.clone()), Reply::Applied);
    assert_eq!(cluster.state.chunks, before);
    assert_eq!(cluster.accept(back), Reply::Unchanged);
}

#[test]
fn a_deleted_volume_gives_its_space_back_once_its_owner_has_stopped() {
    let (mut cluster, volume, _) = Checked::serving();
    cluster.accept(Command::DeleteVolume { volume });
    assert_eq!(
        cluster.refuse(Command::ResizeVolume {
            volume,
            size_bytes: 2 << 30
        }),
        Refusal::NoSuchVolume(volume)
    );
    cluster.accept(Command::FinishDelete {
        volume,
        epoch: Epoch(1),
        unsettled: Some(vec![]),
    });
    assert!(
        cluster
            .state
            .chunks
            .values()
            .all(|chunks| chunks.space.allocated_mib() == 0)
    );
    assert_eq!(
        cluster.accept(Command::DeleteVolume { volume }),
        Reply::Unchanged,
        "the answer may have been lost"
    );
}

#[test]
fn a_dead_owners_deleted_volume_leaves_its_chunks_in_quarantine() {
    let (mut cluster, volume, _) = Checked::serving();
    cluster.accept(Command::Batch(vec![
        Command::DeleteVolume { volume },
        Command::MarkDead {
            incarnation: IncarnationId(1),
        },
        // What a dead owner said before counts for nothing.
        Command::FinishDelete {
            volume,
            epoch: Epoch(1),
            unsettled: Some(vec![]),
        },
    ]));
    assert_eq!(quarantined_mib(&cluster), 2);
    cluster.fence(IncarnationId(1), &[1, 2, 3]);
    assert!(
        cluster
            .state
            .chunks
            .values()
            .all(|chunks| chunks.space.allocated_mib() == 0)
    );
}

fn quarantined_mib(cluster: &Checked) -> u64 {
    let chunks = cluster.state.chunks.values();
    chunks.map(|chunks| chunks.quarantined_mib()).sum()
}

#[test]
fn a_deleted_volumes_chunks_with_a_write_under_way_wait_for_their_owners_fence() {
    let (mut cluster, volume, written) = Checked::serving();
    cluster.band(volume);
    cluster.accept(Command::DeleteVolume { volume });
    cluster.accept(Command::FinishDelete {
        volume,
        epoch: Epoch(1),
        unsettled: Some(vec![written.columns[1]]),
    });
    assert_eq!(quarantined_mib(&cluster), 1, "of four chunks, the one it listed");
    let drives = [written.columns[1].drive.0];
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(1),
    });
    cluster.fence(IncarnationId(1), &drives);
    assert_eq!(quarantined_mib(&cluster), 0);
}

/// A leader may hold an owner to be dead before that is committed, and ask without it.
#[test]
fn a_deletion_that_its_live_owner_did_not_finish_settles_nothing() {
    let (mut cluster, volume, _) = Checked::serving();
    cluster.accept(Command::DeleteVolume { volume });
    cluster.accept(Command::FinishDelete {
        volume,
        epoch: Epoch(1),
        unsettled: None,
    });
    assert_eq!(quarantined_mib(&cluster), 2);
}

#[test]
fn a_pool_is_tight_before_hosts_are_refused_and_roomy_again_when_bands_are_freed() {
    let mut cluster = Checked::cluster(4, 256, geometry(1, 1));
    let volume = cluster.volume("v");
    let first = cluster.serve(volume, 1);
    let pool = cluster.state.map.volumes[&volume].pool;
    let mut granted = Vec::new();
    let mut noticed_after = None;
    for request in 0.. {
        let drives = [1 + request as u32 % 4, 1 + (request as u32 + 1) % 4];
        let reply = cluster.state.apply(Command::GrantBands {
            volume,
            epoch: Epoch(1),
            request: 1000 + request,
            purpose: Purpose::User,
            chunk_size: ChunkSize::Mib8,
            proposals: vec![BandProposal {
                geometry: geometry(1, 1),
                drives: drives.into_iter().map(DriveId).collect(),
            }],
        });
        match reply {
            Reply::Bands(bands) => granted.extend(bands.into_iter().map(|band| band.id)),
            Reply::Refused(Refusal::NoSpace { .. }) => break,
            reply => panic!("{reply:?}"),
        }
        if cluster.state.map.pools[&pool].tight {
            noticed_after.get_or_insert(granted.len());
        }
    }
    let noticed_after = noticed_after.expect("the pool was never tight");
    assert!(noticed_after < granted.len(), "only when it was full");
    assert!(noticed_after > granted.len() / 2, "when it was half empty");
    let before = cluster.state.map.version;
    let update = cluster.root(volume, first.id, &granted);
    cluster.accept(Command::PublishRoot { update });
    assert!(!cluster.state.map.pools[&pool].tight);
    assert!(cluster.state.map.version > before, "watchers are told");
}
