//! Seeded random commands, with every invariant after each; and the same commands again, which lead to the same state.

use weft_proto::band::{ChunkAddress, ChunkSize, Replacement};
use weft_proto::id::{BandId, DriveId, Epoch, IncarnationId, NodeId, StripeNumber, VolumeId};

use super::super::ClusterState;
use super::super::command::{BandProposal, Command, Purpose, ReplacementRequest, Reply};
use super::super::map::{DriveState, IncarnationState, NodeState, Phase};
use super::{Checked, geometry, new_volume};

/// SplitMix64: a seed is all a failure needs to reproduce.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

const NODES: u64 = 5;

#[test]
fn random_commands_keep_every_invariant() {
    let mut done = Done::default();
    for seed in 0..20 {
        run(seed, &mut done);
    }
    let Done {
        grants,
        roots,
        replacements,
        installed,
    } = done;
    assert!(
        grants > 200 && roots > 200 && replacements > 100 && installed > 50,
        "they did little: {grants} grants, {roots} roots, {installed} of {replacements} replacements installed"
    );
}

/// What was accepted.
#[derive(Default)]
struct Done {
    grants: u32,
    roots: u32,
    replacements: u32,
    installed: u32,
}

fn run(seed: u64, done: &mut Done) {
    println!("seed {seed}");
    let mut random = Seeded(seed);
    let mut cluster = Checked::cluster(NODES as u32, 200, geometry(2, 1));
    let start = cluster.state.clone();
    let mut history = Vec::new();
    for step in 0..1000 {
        let command = draw(&mut random, &cluster.state, step);
        history.push(command.clone());
        match cluster.apply(command) {
            Reply::Bands(_) => done.grants += 1,
            Reply::Root { .. } => done.roots += 1,
            Reply::Replacement(_) => done.replacements += 1,
            Reply::Band(_) => done.installed += 1,
            _ => {}
        }
    }
    let mut replayed = start;
    for command in history {
        replayed.apply(command);
    }
    assert_eq!(replayed, cluster.state, "seed {seed}: replay differs");

    let mut stored = Vec::new();
    ciborium::into_writer(&cluster.state, &mut stored).unwrap();
    let read: ClusterState = ciborium::from_reader(stored.as_slice()).unwrap();
    assert_eq!(read, cluster.state, "seed {seed}: the stored form differs");
}

fn draw(random: &mut Seeded, state: &ClusterState, step: u64) -> Command {
    let node = NodeId(1 + random.below(NODES) as u32);
    let volume = match state.map.volumes.len() as u64 {
        count if count > 0 && !random.one_in(20) => *state
            .map
            .volumes
            .keys()
            .nth(random.below(count) as usize)
            .unwrap(),
        _ => VolumeId(1 + random.below(state.next.volume)),
    };
    let found = state.map.volumes.get(&volume);
    let current = found.map_or(Epoch(0), |volume| volume.epoch);
    let epoch = if random.one_in(12) {
        Epoch(current.0.saturating_sub(1))
    } else {
        current
    };
    let bands: Vec<BandId> = state
        .layouts
        .get(&volume)
        .map(|layout| layout.bands.keys().copied().collect())
        .unwrap_or_default();
    let some_band = |random: &mut Seeded| match bands.len() {
        0 => BandId(1),
        count => bands[random.below(count as u64) as usize],
    };
    let some_chunks = |random: &mut Seeded| -> Vec<ChunkAddress> {
        let bands = state
            .layouts
            .get(&volume)
            .into_iter()
            .flat_map(|layout| layout.bands.values());
        let chunks = bands.flat_map(|record| record.band.columns.clone());
        chunks.filter(|_| random.one_in(5)).collect()
    };
    match random.below(30) {
        0 => Command::CreateVolume(new_volume(&"v".repeat(1 + random.below(6) as usize))),
        // A life that registers with every drive, on a node that is down, mostly.
        1..=4 => {
            let down = state
                .map
                .nodes
                .values()
                .find(|node| node.state == NodeState::Down);
            let node = match down {
                Some(down) if !random.one_in(4) => down.id,
                _ if random.one_in(6) => node,
                _ => return Command::RequestMove { volume, to: None },
            };
            Command::Batch(vec![
                Command::StartIncarnation {
                    node,
                    host_id: weft_proto::id::HostId([step as u8; 16]),
                    key: 1_000_000 + step,
                },
                Command::RecordRegistrations {
                    incarnation: IncarnationId(state.next.incarnation),
                    drives: (1..=NODES as u32).map(DriveId).collect(),
                },
            ])
        }
        5 if random.one_in(3) => Command::MarkDead {
            incarnation: IncarnationId(1 + random.below(state.next.incarnation)),
        },
        5 => Command::AllowHost {
            volume,
            host: "nqn.2026-01.example:host".parse().unwrap(),
        },
        6..=7 => Command::RecordFenced {
            // A dead one, mostly: whoever is fenced while it lives does little from then on.
            incarnation: state
                .map
                .incarnations
                .values()
                .find(|found| found.state == IncarnationState::Dead || random.one_in(40))
                .map_or(IncarnationId(1), |found| found.id),
            drives: (1..=NODES as u32)
                .filter(|_| !random.one_in(3))
                .map(DriveId)
                .collect(),
        },
        8..=11 => Command::BeginTakeover {
            node,
            incarnation: state.map.nodes[&node].incarnation.unwrap(),
            volumes: vec![(volume, epoch)],
        },
        12..=15 => Command::GrantBands {
            volume,
            epoch,
            request: step,
            purpose: if random.one_in(2) {
                Purpose::User
            } else {
                Purpose::Internal
            },
            chunk_size: [ChunkSize::Mib1, ChunkSize::Mib8, ChunkSize::Mib64][random.below(3) as usize],
            proposals: (0..=random.below(2))
                .map(|_| {
                    let first = random.below(NODES);
                    BandProposal {
                        geometry: geometry(2, 1),
                        drives: (0..3)
                            .map(|i| DriveId(1 + ((first + i) % NODES) as u32))
                            .collect(),
                    }
                })
                .collect(),
        },
        16 => Command::ReturnBands {
            volume,
            epoch,
            bands: vec![some_band(random)],
        },
        17..=20 => {
            let band = some_band(random);
            let update = weft_proto::band::RootUpdate {
                volume,
                epoch,
                expected_version: state.layouts.get(&volume).map_or(0, |layout| layout.root_version),
                root: weft_proto::band::RootPointer {
                    band,
                    row: step as u32,
                    start: 0,
                    w: 1,
                    d: 1,
                    stripe: StripeNumber(step),
                },
                freed: bands
                    .iter()
                    .copied()
                    .filter(|other| *other != band && random.one_in(2))
                    .collect(),
                unsettled: some_chunks(random),
            };
            match found.map(|volume| volume.phase) {
                Some(Phase::Recovering { recover, .. }) => Command::FinishTakeover {
                    update,
                    recovered: recover,
                    ended_at: StripeNumber(step),
                },
                _ => Command::PublishRoot { update },
            }
        }
        21 => Command::Handover {
            volume,
            epoch,
            last_stripe: StripeNumber(step),
            update: None,
            unsettled: some_chunks(random),
            to: node,
        },
        24..=29 => rebuild(random, state, volume, epoch, some_band, step),
        22 => match random.below(6) {
            0 => Command::DeleteVolume { volume },
            1 => Command::FinishDelete {
                volume,
                epoch,
                unsettled: random.one_in(2).then(|| some_chunks(random)),
            },
            _ => Command::RequestMove {
                volume,
                to: Some(node),
            },
        },
        _ => Command::SetDriveState {
            drive: DriveId(1 + random.below(NODES) as u32),
            state: match random.below(6) {
                0 => DriveState::Offline,
                _ => DriveState::Online,
            },
        },
    }
}

/// A grant for some column of some band, or the end of an attempt that is under way or was.
fn rebuild(
    random: &mut Seeded,
    state: &ClusterState,
    volume: VolumeId,
    epoch: Epoch,
    some_band: impl Fn(&mut Seeded) -> BandId,
    step: u64,
) -> Command {
    let layout = state.layouts.get(&volume);
    let granted: Vec<Replacement> = layout
        .map(|layout| {
            layout
                .replacements
                .iter()
                .map(|granted| granted.replacement)
                .collect()
        })
        .unwrap_or_default();
    let settled = random.one_in(2);
    if !granted.is_empty() && !random.one_in(3) {
        let replacement = granted[random.below(granted.len() as u64) as usize];
        return if random.one_in(4) {
            Command::ReturnReplacement {
                volume,
                epoch,
                replacement,
                settled,
            }
        } else {
            Command::InstallReplacement {
                volume,
                epoch,
                replacement,
                settled,
            }
        };
    }
    let band = some_band(random);
    let version = layout
        .and_then(|layout| layout.bands.get(&band))
        .map_or(0, |record| record.band.version);
    let request = ReplacementRequest {
        volume,
        epoch,
        request: step,
        band,
        column: random.below(3) as u8,
        version: version.saturating_sub(u64::from(random.one_in(12))),
    };
    let drive = DriveId(1 + random.below(NODES) as u32);
    Command::GrantReplacement { request, drive }
}
