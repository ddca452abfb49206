//! Proposals, applied.

use weft_proto::band::ChunkSize;
use weft_proto::id::{Epoch, IncarnationId};

use super::*;
use crate::state::Reply;
use crate::state::command::ReplacementRequest;
use crate::state::tests::{Checked, geometry};

fn request(volume: VolumeId, count: u32, purpose: Purpose) -> BandRequest {
    BandRequest {
        volume,
        epoch: Epoch(1),
        request: u64::from(count) + 17,
        purpose,
        chunk_size: ChunkSize::Mib8,
        count,
        patient: false,
    }
}

#[test]
fn a_patient_owner_waits_for_its_registrations_and_an_impatient_one_does_not() {
    let mut cluster = Checked::cluster(7, 1024, geometry(4, 2));
    let volume = cluster.volume("v");
    cluster.begin(volume, 1).unwrap();
    for drive in cluster.state.map.drives.values_mut().take(3) {
        drive.registrations.remove(&IncarnationId(1));
    }
    let impatient = request(volume, 1, Purpose::User);
    let patient = BandRequest {
        patient: true,
        ..impatient
    };
    assert_eq!(
        propose_bands(&cluster.state, &patient),
        Err(Refusal::AwaitsRegistration {
            width: 2,
            possible: 4
        })
    );
    let Ok(Command::GrantBands { proposals, .. }) = propose_bands(&cluster.state, &impatient) else {
        panic!("no bands");
    };
    assert_eq!(proposals[0].geometry, geometry(2, 2));
}

#[test]
fn patience_does_not_wait_for_nodes_that_are_down() {
    let mut cluster = Checked::cluster(6, 1024, geometry(4, 2));
    let volume = cluster.volume("v");
    cluster.begin(volume, 1).unwrap();
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(6),
    });
    let patient = BandRequest {
        patient: true,
        ..request(volume, 1, Purpose::User)
    };
    let Ok(Command::GrantBands { proposals, .. }) = propose_bands(&cluster.state, &patient) else {
        panic!("no bands");
    };
    assert_eq!(proposals[0].geometry, geometry(3, 2));
}

#[test]
fn what_is_proposed_is_granted() {
    let mut cluster = Checked::cluster(7, 1024, geometry(4, 2));
    let volume = cluster.volume("v");
    cluster.begin(volume, 1).unwrap();
    let command = propose_bands(&cluster.state, &request(volume, 8, Purpose::User)).unwrap();
    let Reply::Bands(bands) = cluster.accept(command) else {
        panic!("no bands");
    };
    assert_eq!(bands.len(), 8);
    assert!(bands.iter().all(|band| band.geometry == geometry(4, 2)));
}

#[test]
fn short_of_nodes_k_shrinks_and_m_stays() {
    let mut cluster = Checked::cluster(6, 1024, geometry(4, 2));
    let volume = cluster.volume("v");
    cluster.begin(volume, 1).unwrap();
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(6),
    });
    let command = propose_bands(&cluster.state, &request(volume, 1, Purpose::Internal)).unwrap();
    let Reply::Bands(bands) = cluster.accept(command) else {
        panic!("no bands");
    };
    assert_eq!(bands[0].geometry, geometry(3, 2));
    for incarnation in [3, 4, 5] {
        cluster.accept(Command::MarkDead {
            incarnation: IncarnationId(incarnation),
        });
    }
    assert!(matches!(
        propose_bands(&cluster.state, &request(volume, 1, Purpose::Internal)),
        Err(Refusal::TooFewDomains {
            available: 2,
            needed: 3,
            ..
        })
    ));
}

#[test]
fn host_writes_are_offered_no_more_than_the_reserve_leaves() {
    let mut cluster = Checked::cluster(4, 256, geometry(1, 1));
    let volume = cluster.volume("v");
    cluster.begin(volume, 1).unwrap();
    let mut granted = 0;
    let refused = loop {
        let mut request = request(volume, 8, Purpose::User);
        request.request = 1000 + granted;
        match propose_bands(&cluster.state, &request) {
            Ok(command) => match cluster.accept(command) {
                Reply::Bands(bands) => granted += bands.len() as u64,
                reply => panic!("{reply:?}"),
            },
            Err(refusal) => break refusal,
        }
    };
    let Refusal::NoSpace {
        free_mib,
        reserve_mib,
    } = refused
    else {
        panic!("{refused:?}");
    };
    assert!(free_mib >= reserve_mib && free_mib - reserve_mib < 16);
    assert!(propose_bands(&cluster.state, &request(volume, 8, Purpose::Internal)).is_ok());
}

#[test]
fn a_column_is_rebuilt_on_another_drive_apart_from_the_others() {
    let mut cluster = Checked::cluster(5, 256, geometry(2, 2));
    let volume = cluster.volume("v");
    let band = cluster.serve(volume, 1);
    let wanted = ReplacementRequest {
        volume,
        epoch: Epoch(1),
        request: 99,
        band: band.id,
        column: 3,
        version: 0,
    };
    let command = propose_replacement(&cluster.state, &wanted).unwrap();
    let Reply::Replacement(granted) = cluster.accept(command) else {
        panic!("no chunk");
    };
    let taken = |drive| band.columns.iter().any(|chunk| chunk.drive == drive);
    assert!(
        !taken(granted.chunk.drive),
        "the fifth node's drive, not the lost one"
    );
    // Asked for again when that node is down: the answer is on record.
    let home = cluster.state.map.nodes[&weft_proto::id::NodeId(5)]
        .incarnation
        .unwrap();
    cluster.accept(Command::MarkDead { incarnation: home });
    let again = propose_replacement(&cluster.state, &wanted).unwrap();
    assert_eq!(cluster.accept(again), Reply::Replacement(granted));
    let other = ReplacementRequest {
        request: 100,
        ..wanted
    };
    assert!(matches!(
        propose_replacement(&cluster.state, &other),
        Err(Refusal::TooFewDomains { needed: 4, .. })
    ));
}
