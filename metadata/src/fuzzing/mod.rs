//! Doors for the fuzzer, which exist only in its builds (`--cfg fuzzing`): the log's records and everything that comes in an
//! envelope. `fuzz/` at the top of the repository uses them; each function panics on a finding.

pub(crate) mod judge;

use std::collections::BTreeSet;

use openraft::raft::{AppendEntriesRequest, VoteRequest};
use weft_proto::band::{ChunkAddress, ChunkSize, Geometry, Replacement, RootPointer, RootUpdate};
use weft_proto::id::{
    BandId, ClusterId, DriveId, DriveUuid, Epoch, HostId, IncarnationId, NodeId, PoolId, StripeNumber,
    VolumeId,
};

use self::judge::Judge;
use crate::envelope::{self, Kind};
use crate::raft::TypeConfig;
use crate::raft::types::{SnapshotMeta, Vote};
use crate::state::command::{NewDrive, NewNode, NewPool, NewVolume, ReplacementRequest};
use crate::state::invariants::violations;
use crate::state::layout::{DriveChunks, VolumeLayout};
use crate::state::map::{DomainLevel, DriveClass, DriveHome, Presentation, Settings};
use crate::state::{ClusterMap, ClusterState, Command};
use crate::wire::{Answer, Proposed, Query};

/// Bytes of an envelope before its body.
pub const ENVELOPE_HEADER_BYTES: usize = 24;

/// Opens a Raft log: `bytes` are a segment if `framed`, else the bodies of records.
pub fn raft_log(bytes: &[u8], framed: bool) {
    crate::log::fuzzing::log(bytes, framed);
}

/// Inputs of [`raft_log`].
#[must_use]
pub fn raft_log_seeds() -> Vec<(bool, Vec<u8>)> {
    crate::log::fuzzing::seeds()
}

/// Opens an envelope, or a body that is put into one; `kind` says what it should hold. A command that opens is applied to a
/// small cluster, whose invariants must hold afterwards.
pub fn envelope(kind: u8, bytes: &[u8], sealed: bool) {
    let mut judge = Judge::new(bytes, sealed);
    match kind % 11 {
        kind @ 0..=2 => crate::store::fuzz(kind, &mut judge),
        3 => judge.judge::<DriveChunks>(Kind::PART),
        4 => judge.judge::<VolumeLayout>(Kind::PART),
        5 => {
            if let Some(Proposed::Command(command)) = judge.open::<Proposed>(Kind::PROPOSAL) {
                let mut state = STATE.with(Clone::clone);
                let _ = state.apply(*command);
                let found = violations(&state);
                assert!(found.is_empty(), "{found:#?}");
            }
        }
        6 => judge.judge::<Query>(Kind::QUERY),
        7 => judge.judge::<Answer>(Kind::QUERY),
        8 => judge.judge::<ClusterMap>(Kind::MAP),
        9 => judge.judge::<AppendEntriesRequest<TypeConfig>>(Kind::RAFT),
        _ => {
            judge.judge::<VoteRequest<TypeConfig>>(Kind::RAFT);
            judge.judge::<(Vote, SnapshotMeta)>(Kind::RAFT);
        }
    }
}

thread_local! {
    static STATE: ClusterState = {
        let mut state = ClusterState::default();
        for command in commands() {
            let _ = state.apply(command);
        }
        state
    };
}

/// A cluster of three with a pool, and a volume that is served and rebuilt.
fn commands() -> Vec<Command> {
    let mut commands = vec![Command::Init {
        id: ClusterId([1; 16]),
        name: "fuzz".into(),
        authentication_key: [2; 32],
        fencing_host_id: HostId([3; 16]),
        fencing_key: 4,
        settings: Settings::default(),
    }];
    for index in 1..=3 {
        commands.push(Command::AddNode(NewNode {
            name: format!("node-{index}"),
            rack: None,
            control_address: format!("127.0.0.1:{}", 1000 + index),
            nvme_address: format!("127.0.0.1:{}", 2000 + index),
        }));
        commands.push(Command::StartIncarnation {
            node: NodeId(index),
            host_id: HostId([10 + index as u8; 16]),
            key: u64::from(index),
        });
        commands.push(Command::AddDrive(NewDrive {
            uuid: DriveUuid([index as u8; 16]),
            name: format!("drive-{index}"),
            home: DriveHome::Node(NodeId(index)),
            class: DriveClass::Tlc,
            start_mib: 1,
            end_mib: 201,
            registrants_max: 16,
        }));
    }
    let drives: BTreeSet<DriveId> = (1..=3).map(DriveId).collect();
    for index in 1..=3 {
        commands.push(Command::RecordRegistrations {
            incarnation: IncarnationId(index),
            drives: drives.clone(),
        });
    }
    commands.push(Command::CreatePool(NewPool {
        name: "pool".into(),
        geometry: Geometry { k: 2, m: 1 },
        domain: DomainLevel::Node,
        classes: BTreeSet::from([DriveClass::Tlc]),
    }));
    commands.push(Command::CreateVolume(NewVolume {
        name: "volume".into(),
        pool: PoolId(1),
        size_bytes: 1 << 24,
        block_bytes: 4096,
        geometry: None,
        uuid: [7; 16],
        subnqn: "nqn.2026-01.example:volume".parse().expect("a name"),
        allowed_hosts: BTreeSet::new(),
        presentation: Presentation::All,
        preferred: None,
    }));
    commands.push(Command::BeginTakeover {
        node: NodeId(1),
        incarnation: IncarnationId(1),
        volumes: vec![(VolumeId(1), Epoch(0))],
    });
    commands.push(Command::GrantBands {
        volume: VolumeId(1),
        epoch: Epoch(1),
        request: 1,
        purpose: crate::state::command::Purpose::Internal,
        chunk_size: ChunkSize::Mib1,
        proposals: vec![crate::state::command::BandProposal {
            geometry: Geometry { k: 2, m: 1 },
            drives: drives.into_iter().collect(),
        }],
    });
    commands.push(Command::FinishTakeover {
        update: RootUpdate {
            volume: VolumeId(1),
            epoch: Epoch(1),
            expected_version: 0,
            root: RootPointer {
                band: BandId(1),
                row: 0,
                start: 0,
                w: 1,
                d: 1,
                stripe: StripeNumber(1),
            },
            freed: Vec::new(),
            unsettled: Vec::new(),
        },
        recovered: None,
        ended_at: StripeNumber(0),
    });
    // A column of its only band is replaced, on the drive where it was, and is about to be once more.
    for (request, version) in [(2, 0), (3, 1)] {
        let request = ReplacementRequest {
            volume: VolumeId(1),
            epoch: Epoch(1),
            request,
            band: BandId(1),
            column: 2,
            version,
        };
        let drive = DriveId(3);
        commands.push(Command::GrantReplacement { request, drive });
        commands.push(Command::InstallReplacement {
            volume: VolumeId(1),
            epoch: Epoch(1),
            replacement: Replacement {
                request: 2,
                band: BandId(1),
                column: 2,
                version: 0,
                chunk: ChunkAddress {
                    drive: DriveId(3),
                    offset_mib: 2,
                },
            },
            settled: false,
        });
    }
    commands.push(Command::ReturnReplacement {
        volume: VolumeId(1),
        epoch: Epoch(1),
        replacement: Replacement {
            request: 4,
            band: BandId(1),
            column: 1,
            version: 1,
            chunk: ChunkAddress {
                drive: DriveId(3),
                offset_mib: 4,
            },
        },
        settled: true,
    });
    commands
}

/// Inputs of [`fn@envelope`]: kind and envelope.
#[must_use]
pub fn envelope_seeds() -> Vec<(u8, Vec<u8>)> {
    let state = STATE.with(Clone::clone);
    let mut seeds: Vec<(u8, Vec<u8>)> = (0..).zip(crate::store::fuzz_seeds(&state)).collect();
    seeds.extend(
        state
            .chunks
            .values()
            .take(1)
            .map(|chunks| (3, envelope::seal(Kind::PART, chunks))),
    );
    seeds.extend(
        state
            .layouts
            .values()
            .map(|layout| (4, envelope::seal(Kind::PART, layout))),
    );
    for command in commands() {
        let proposed = Proposed::Command(Box::new(command));
        seeds.push((5, envelope::seal(Kind::PROPOSAL, &proposed)));
    }
    let batch = Proposed::Command(Box::new(Command::Batch(commands())));
    seeds.push((5, envelope::seal(Kind::PROPOSAL, &batch)));
    seeds.push((6, envelope::seal(Kind::QUERY, &Query::EpochGrant(VolumeId(1)))));
    let grant = state.epoch_grant(VolumeId(1));
    seeds.push((7, envelope::seal(Kind::QUERY, &Answer::EpochGrant(grant))));
    seeds.push((8, envelope::seal(Kind::MAP, &state.map)));
    let append = AppendEntriesRequest::<TypeConfig> {
        vote: Vote::new(3, 1),
        prev_log_id: None,
        entries: Vec::new(),
        leader_commit: None,
    };
    seeds.push((9, envelope::seal(Kind::RAFT, &append)));
    seeds.push((
        10,
        envelope::seal(Kind::RAFT, &VoteRequest::<TypeConfig>::new(Vote::new(3, 1), None)),
    ));
    seeds
}
