//! Takeover, hand-over, and whose commands still count.

use weft_proto::band::ChunkSize;
use weft_proto::id::{Epoch, IncarnationId, NodeId, StripeNumber};

use super::super::command::{Command, Purpose, Refusal, Reply};
use super::super::map::Phase;
use super::{Checked, geometry};

#[test]
fn a_live_owner_is_not_taken_over() {
    let (mut cluster, volume, _) = Checked::serving();
    assert_eq!(
        cluster.begin(volume, 2),
        Err(Refusal::OwnerIsLive {
            volume,
            incarnation: IncarnationId(1)
        })
    );
}

#[test]
fn a_takeover_finishes_only_when_enough_drives_have_fenced_the_former_owner() {
    let mut cluster = Checked::cluster(4, 256, geometry(2, 1));
    let volume = cluster.volume("v");
    let old = cluster.serve(volume, 1);
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(1),
    });
    assert_eq!(cluster.begin(volume, 2), Ok(Epoch(2)));
    let grant = cluster.state.epoch_grant(volume).unwrap();
    assert_eq!(
        (grant.recover, grant.bands, grant.root_version),
        (Some(Epoch(1)), vec![old.clone()], 1)
    );
    let band = match cluster.state.apply(Command::GrantBands {
        volume,
        epoch: Epoch(2),
        request: 99,
        purpose: Purpose::Internal,
        chunk_size: ChunkSize::Mib1,
        proposals: vec![super::BandProposal {
            geometry: geometry(2, 1),
            drives: [2, 3, 4].map(weft_proto::id::DriveId).to_vec(),
        }],
    }) {
        Reply::Bands(mut bands) => bands.remove(0),
        reply => panic!("{reply:?}"),
    };
    let finish = Command::FinishTakeover {
        update: cluster.root(volume, band.id, &[old.id]),
        recovered: Some(Epoch(1)),
        ended_at: StripeNumber(12),
    };
    assert_eq!(
        cluster.refuse(finish.clone()),
        Refusal::NotFenced {
            band: old.id,
            fenced: 0,
            needed: 2
        }
    );
    // Drive 1 went down with its node: n − m = 2 others are enough.
    cluster.fence(IncarnationId(1), &[2, 3]);
    assert_eq!(cluster.accept(finish.clone()), Reply::Root { version: 2 });
    assert_eq!(
        cluster.accept(finish),
        Reply::Root { version: 2 },
        "the first answer may be lost"
    );
    assert_eq!(
        cluster.state.layouts[&volume].ended,
        vec![(Epoch(1), StripeNumber(12))]
    );
    // The old band is freed: its chunk on drive 1 waits there for the fence.
    assert_eq!(
        cluster.state.chunks[&old.columns[0].drive].quarantined_mib(),
        1,
        "drive 1 has not fenced the dead owner"
    );
    cluster.fence(IncarnationId(1), &[1, 4]);
    assert_eq!(cluster.state.chunks[&old.columns[0].drive].quarantined_mib(), 0);
    assert!(
        !cluster.state.map.incarnations.contains_key(&IncarnationId(1)),
        "fenced everywhere is gone"
    );
}

#[test]
fn a_second_takeover_recovers_the_same_epoch_and_forgets_the_first_ones_bands() {
    let mut cluster = Checked::cluster(5, 256, geometry(2, 1));
    let volume = cluster.volume("v");
    let served = cluster.serve(volume, 1);
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(1),
    });
    cluster.begin(volume, 2).unwrap();
    let abandoned = cluster.band(volume);
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(2),
    });
    assert_eq!(cluster.begin(volume, 3), Ok(Epoch(3)));
    let grant = cluster.state.epoch_grant(volume).unwrap();
    assert_eq!((grant.recover, grant.bands), (Some(Epoch(1)), vec![served]));
    let chunk = abandoned.columns[0];
    assert!(
        cluster.state.chunks[&chunk.drive]
            .quarantine
            .contains_key(&chunk.offset_mib),
        "a dead owner may still be writing there"
    );
    cluster.fence(IncarnationId(2), &[chunk.drive.0]);
    assert!(cluster.state.chunks[&chunk.drive].quarantine.is_empty());
}

#[test]
fn every_command_of_a_replaced_owner_is_stale() {
    let (mut cluster, volume, band) = Checked::serving();
    let update = cluster.root(volume, band.id, &[]);
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(1),
    });
    cluster.begin(volume, 2).unwrap();
    let stale = Refusal::Stale {
        epoch: Epoch(1),
        current: Epoch(2),
    };
    let late = [
        Command::PublishRoot {
            update: update.clone(),
        },
        Command::ReturnBands {
            volume,
            epoch: Epoch(1),
            bands: vec![band.id],
        },
        Command::GrantBands {
            volume,
            epoch: Epoch(1),
            request: 5,
            purpose: Purpose::User,
            chunk_size: ChunkSize::Mib1,
            proposals: vec![],
        },
        Command::FinishTakeover {
            update,
            recovered: None,
            ended_at: StripeNumber(0),
        },
        Command::Handover {
            volume,
            epoch: Epoch(1),
            last_stripe: StripeNumber(9),
            update: None,
            unsettled: vec![],
            to: NodeId(3),
        },
    ];
    for command in late {
        assert_eq!(cluster.refuse(command), stale);
    }
}

#[test]
fn a_dead_owner_cannot_publish_even_before_it_is_replaced() {
    let (mut cluster, volume, band) = Checked::serving();
    let update = cluster.root(volume, band.id, &[]);
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(1),
    });
    assert_eq!(
        cluster.refuse(Command::PublishRoot { update }),
        Refusal::IncarnationIsDead(IncarnationId(1))
    );
}

#[test]
fn a_hand_over_recovers_nothing_and_settles_what_was_written() {
    let (mut cluster, volume, settled) = Checked::serving();
    let unsettled = cluster.band(volume);
    cluster.accept(Command::RequestMove {
        volume,
        to: Some(NodeId(2)),
    });
    let handover = Command::Handover {
        volume,
        epoch: Epoch(1),
        last_stripe: StripeNumber(40),
        update: None,
        unsettled: vec![unsettled.columns[1]],
        to: NodeId(2),
    };
    assert_eq!(cluster.accept(handover.clone()), Reply::Epoch(Epoch(2)));
    assert_eq!(
        cluster.accept(handover),
        Reply::Epoch(Epoch(2)),
        "the first answer may be lost"
    );
    assert_eq!(cluster.state.map.volumes[&volume].move_to, None);
    let grant = cluster.state.epoch_grant(volume).unwrap();
    assert_eq!(grant.recover, None);
    assert_eq!(grant.ended, vec![(Epoch(1), StripeNumber(40))]);

    let band = cluster.band(volume);
    let update = cluster.root(volume, band.id, &[settled.id, unsettled.id]);
    cluster.accept(Command::FinishTakeover {
        update,
        recovered: None,
        ended_at: StripeNumber(0),
    });
    // The former owner is live: the one chunk with a write under way waits until it is fenced there.
    let quarantined: u64 = cluster
        .state
        .chunks
        .values()
        .map(|chunks| chunks.quarantined_mib())
        .sum();
    assert_eq!(quarantined, 1);
    cluster.fence(IncarnationId(1), &[unsettled.columns[1].drive.0]);
    let chunks = cluster.state.chunks.values();
    assert_eq!(chunks.map(|chunks| chunks.quarantined_mib()).sum::<u64>(), 0);
}

/// The same process, but another engine: it cannot say whether what its predecessor left under way has ended.
#[test]
fn an_owner_that_gets_a_volume_back_does_not_settle_what_it_left_under_way() {
    let (mut cluster, volume, unsettled) = Checked::serving();
    let handover = |epoch, unsettled, to| Command::Handover {
        volume,
        epoch,
        last_stripe: StripeNumber(40),
        update: None,
        unsettled,
        to: NodeId(to),
    };
    cluster.accept(handover(Epoch(1), vec![unsettled.columns[0]], 2));
    let band = cluster.band(volume);
    let update = cluster.root(volume, band.id, &[]);
    cluster.accept(Command::FinishTakeover {
        update,
        recovered: None,
        ended_at: StripeNumber(0),
    });
    cluster.accept(handover(Epoch(2), vec![], 1));
    let band = cluster.band(volume);
    let update = cluster.root(volume, band.id, &[unsettled.id]);
    cluster.accept(Command::FinishTakeover {
        update,
        recovered: None,
        ended_at: StripeNumber(0),
    });
    let chunks = cluster.state.chunks.values();
    let quarantined: u64 = chunks.map(|chunks| chunks.quarantined_mib()).sum();
    assert_eq!(quarantined, 1);
}

#[test]
fn a_target_that_dies_after_a_hand_over_leaves_nothing_to_recover() {
    let (mut cluster, volume, _) = Checked::serving();
    cluster.accept(Command::Handover {
        volume,
        epoch: Epoch(1),
        last_stripe: StripeNumber(3),
        update: None,
        unsettled: vec![],
        to: NodeId(2),
    });
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(2),
    });
    assert_eq!(cluster.begin(volume, 3), Ok(Epoch(3)));
    assert_eq!(cluster.state.epoch_grant(volume).unwrap().recover, None);
}

#[test]
fn a_repeated_takeover_is_answered_with_the_same_epoch() {
    let mut cluster = Checked::cluster(3, 256, geometry(1, 1));
    let volume = cluster.volume("v");
    let begin = Command::BeginTakeover {
        node: NodeId(1),
        incarnation: IncarnationId(1),
        volumes: vec![(volume, Epoch(0))],
    };
    let first = cluster.accept(begin.clone());
    assert_eq!(first, Reply::Takeovers(vec![(volume, Ok(Epoch(1)))]));
    assert_eq!(cluster.accept(begin), first);
    assert!(matches!(
        cluster.state.map.volumes[&volume].phase,
        Phase::Recovering { recover: None, .. }
    ));
}

#[test]
fn a_root_is_published_by_compare_and_swap() {
    let (mut cluster, volume, band) = Checked::serving();
    let update = cluster.root(volume, band.id, &[]);
    let publish = Command::PublishRoot {
        update: update.clone(),
    };
    assert_eq!(cluster.accept(publish.clone()), Reply::Root { version: 2 });
    assert_eq!(cluster.accept(publish), Reply::Root { version: 2 });
    let mut other = update;
    other.root.row = 77;
    assert_eq!(
        cluster.refuse(Command::PublishRoot { update: other }),
        Refusal::RootConflict {
            expected: 1,
            current: 2
        }
    );
}
