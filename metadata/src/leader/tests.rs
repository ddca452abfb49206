//! Decisions, by hand and without a clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use weft_proto::band::Geometry;
use weft_proto::id::{Epoch, HostId, IncarnationId, LayerId, NodeId, PoolId, VolumeId};

use super::*;
use crate::state::map::{Incarnation, Node, Owner, Presentation};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Nodes 1 to `nodes`, each with the live incarnation of the same number.
fn map(nodes: u32) -> ClusterMap {
    let mut map = ClusterMap::default();
    for index in 1..=nodes {
        let (node, incarnation) = (NodeId(index), IncarnationId(u64::from(index)));
        map.nodes.insert(
            node,
            Node {
                id: node,
                name: format!("node-{index}"),
                rack: None,
                control_address: format!("127.0.0.1:{index}"),
                nvme_address: "127.0.0.1:1".into(),
                state: NodeState::Up,
                incarnation: Some(incarnation),
            },
        );
        map.incarnations.insert(
            incarnation,
            Incarnation {
                id: incarnation,
                node,
                host_id: HostId([index as u8; 16]),
                key: 1,
                state: IncarnationState::Live,
            },
        );
    }
    map
}

fn volume(map: &mut ClusterMap, id: u64, owner: Option<u32>) -> VolumeId {
    let volume = VolumeId(id);
    let epoch = Epoch(u64::from(owner.is_some()));
    map.volumes.insert(
        volume,
        Volume {
            id: volume,
            name: format!("v{id}"),
            pool: PoolId(1),
            size_bytes: 4096,
            block_bytes: 4096,
            geometry: Geometry::new(1, 1).unwrap(),
            uuid: [0; 16],
            subnqn: format!("nqn.2026-01.example:{id}").parse().unwrap(),
            allowed_hosts: BTreeSet::new(),
            presentation: Presentation::All,
            layer: LayerId(id),
            epoch,
            phase: owner.map_or(Phase::Unowned, |node| Phase::Serving {
                owner: Owner {
                    epoch,
                    node: NodeId(node),
                    incarnation: IncarnationId(u64::from(node)),
                },
            }),
            preferred: None,
            move_to: None,
        },
    );
    volume
}

/// A leader that has heard everybody at `now`.
fn settled(map: &ClusterMap, now: Duration) -> LeaderCore {
    let mut core = LeaderCore::default();
    for incarnation in map.incarnations.keys() {
        core.heartbeat(now, *incarnation);
    }
    assert_eq!(core.decide(now, map), Decisions::default());
    core
}

fn commands(decisions: &Decisions) -> Vec<Command> {
    match decisions.command.clone() {
        None => vec![],
        Some(Command::Batch(commands)) => commands,
        Some(command) => vec![command],
    }
}

#[test]
fn a_broken_session_and_a_refusing_port_are_death_at_once() {
    let map = map(3);
    let mut core = settled(&map, ms(0));
    core.broken(ms(0), IncarnationId(2));
    let decisions = core.decide(ms(10), &map);
    assert_eq!(decisions.probes, [(IncarnationId(2), "127.0.0.1:2".to_owned())]);
    assert_eq!(
        decisions.command, None,
        "a connection may break for other reasons"
    );
    core.probed(ms(0), IncarnationId(2), true);
    let decisions = core.decide(ms(20), &map);
    assert_eq!(decisions.deaths, [(IncarnationId(2), Cause::Refused)]);
    assert_eq!(
        commands(&decisions),
        [Command::MarkDead {
            incarnation: IncarnationId(2)
        }]
    );
}

#[test]
fn a_leader_that_was_paused_itself_holds_nobody_to_be_dead() {
    let map = map(3);
    let mut core = settled(&map, ms(0));
    core.awake(ms(0));
    core.awake(ms(50));
    core.awake(ms(13_000));
    assert_eq!(core.decide(ms(13_000), &map).deaths, []);
    core.heartbeat(ms(13_200), IncarnationId(1));
    core.heartbeat(ms(13_200), IncarnationId(2));
    for now in (13_050..14_000).step_by(50) {
        core.awake(ms(now));
    }
    let decisions = core.decide(ms(14_001), &map);
    assert_eq!(decisions.deaths, [(IncarnationId(3), Cause::Silent)]);
}

#[test]
fn an_incarnation_that_has_just_started_gets_its_time_from_any_leader() {
    let mut map = map(3);
    let newcomer = map.incarnations.remove(&IncarnationId(3)).unwrap();
    let mut core = settled(&map, ms(0));
    let others = |core: &mut LeaderCore, now| {
        for id in [1, 2] {
            core.heartbeat(now, IncarnationId(id));
        }
    };
    others(&mut core, ms(9000));
    map.incarnations.insert(newcomer.id, newcomer);
    let decisions = core.decide(ms(9000), &map);
    assert_eq!(decisions.deaths, [], "its session has not had time to begin");
    others(&mut core, ms(10_001));
    let decisions = core.decide(ms(10_001), &map);
    assert_eq!(decisions.deaths, [(IncarnationId(3), Cause::Silent)]);
}

#[test]
fn a_session_that_comes_back_outlives_its_probe() {
    let map = map(2);
    let mut core = settled(&map, ms(0));
    core.broken(ms(0), IncarnationId(2));
    assert_eq!(core.decide(ms(10), &map).probes.len(), 1);
    core.heartbeat(ms(15), IncarnationId(2));
    core.probed(ms(0), IncarnationId(2), true);
    assert_eq!(core.decide(ms(20), &map).deaths, []);
}

#[test]
fn a_port_that_still_listens_is_asked_again() {
    let map = map(2);
    let mut core = settled(&map, ms(0));
    core.broken(ms(0), IncarnationId(2));
    assert_eq!(core.decide(ms(10), &map).probes.len(), 1);
    // The process is on its way out: its listener is closed a moment after its session.
    core.probed(ms(0), IncarnationId(2), false);
    assert_eq!(core.decide(ms(20), &map).probes, []);
    assert_eq!(core.decide(ms(110), &map).probes.len(), 1);
    core.probed(ms(0), IncarnationId(2), true);
    assert_eq!(
        core.decide(ms(120), &map).deaths,
        [(IncarnationId(2), Cause::Refused)]
    );
}

#[test]
fn silence_is_death_after_a_second() {
    let map = map(2);
    let mut core = settled(&map, ms(0));
    core.heartbeat(ms(1500), IncarnationId(1));
    assert_eq!(
        core.decide(ms(1500), &map).deaths,
        [(IncarnationId(2), Cause::Silent)]
    );
    assert_eq!(
        core.decide(ms(1510), &map).deaths,
        [],
        "declared once while the command is under way"
    );
    core.heartbeat(ms(2100), IncarnationId(1));
    assert_eq!(
        core.decide(ms(2100), &map).deaths.len(),
        1,
        "and again if it was lost"
    );
}

#[test]
fn a_new_leader_gives_sessions_a_second_and_asks_every_port_at_once() {
    let map = map(3);
    let mut core = LeaderCore::default();
    let decisions = core.decide(ms(5000), &map);
    assert_eq!(decisions.probes.len(), 3);
    assert_eq!(decisions.deaths, []);
    // The former leader's process is gone, the others are merely slow to come.
    core.probed(ms(0), IncarnationId(1), true);
    core.probed(ms(0), IncarnationId(2), false);
    assert_eq!(
        core.decide(ms(5050), &map).deaths,
        [(IncarnationId(1), Cause::Refused)]
    );
    core.heartbeat(ms(5500), IncarnationId(2));
    core.heartbeat(ms(5900), IncarnationId(3));
    assert_eq!(
        core.decide(ms(6100), &map).deaths,
        [(IncarnationId(1), Cause::Refused)]
    );
}

#[test]
fn the_volumes_of_the_dead_are_spread_over_the_living_in_one_batch() {
    let mut map = map(3);
    for id in 1..=6 {
        volume(&mut map, id, Some(1));
    }
    let mut core = settled(&map, ms(0));
    core.broken(ms(0), IncarnationId(1));
    let _ = core.decide(ms(5), &map);
    core.probed(ms(0), IncarnationId(1), true);
    let commands = commands(&core.decide(ms(10), &map));
    assert_eq!(
        commands[0],
        Command::MarkDead {
            incarnation: IncarnationId(1)
        },
        "death comes first"
    );
    let mut given = BTreeMap::new();
    for command in &commands[1..] {
        let Command::BeginTakeover { node, volumes, .. } = command else {
            panic!("{command:?}");
        };
        given.insert(*node, volumes.len());
    }
    assert_eq!(given, BTreeMap::from([(NodeId(2), 3), (NodeId(3), 3)]));
    assert_eq!(
        core.decide(ms(20), &map).command,
        None,
        "nothing is given twice while it is under way"
    );
}

#[test]
fn a_volume_without_owner_goes_where_it_is_wished_or_preferred_or_to_whoever_has_least() {
    let mut map = map(3);
    volume(&mut map, 1, Some(1));
    let plain = volume(&mut map, 2, None);
    let preferring = volume(&mut map, 3, None);
    map.volumes.get_mut(&preferring).unwrap().preferred = Some(NodeId(3));
    let moving = volume(&mut map, 4, None);
    map.volumes.get_mut(&moving).unwrap().move_to = Some(NodeId(1));
    let mut core = LeaderCore::default();
    for id in 1..=3 {
        core.heartbeat(ms(0), IncarnationId(id));
    }
    let mut given = BTreeMap::new();
    for command in commands(&core.decide(ms(0), &map)) {
        if let Command::BeginTakeover { node, volumes, .. } = command {
            given.extend(volumes.into_iter().map(|(volume, _)| (volume, node)));
        }
    }
    assert_eq!(
        given,
        BTreeMap::from([(plain, NodeId(2)), (preferring, NodeId(3)), (moving, NodeId(1))])
    );
}

#[test]
fn nobody_is_given_a_volume_before_it_is_heard() {
    let mut map = map(2);
    volume(&mut map, 1, None);
    let mut core = LeaderCore::default();
    assert_eq!(core.decide(ms(10), &map).command, None);
    core.heartbeat(ms(20), IncarnationId(2));
    assert!(matches!(
        core.decide(ms(20), &map).command,
        Some(Command::BeginTakeover { node: NodeId(2), .. })
    ));
}

#[test]
fn a_dead_owners_deletion_is_finished_for_it() {
    let mut map = map(2);
    let deleted = volume(&mut map, 1, Some(1));
    let phase = map.volumes[&deleted].phase;
    map.volumes.get_mut(&deleted).unwrap().phase = Phase::Deleting { owner: phase.owner() };
    let mut core = settled(&map, ms(0));
    assert_eq!(core.decide(ms(5), &map).command, None, "a live owner stops first");
    map.incarnations.get_mut(&IncarnationId(1)).unwrap().state = IncarnationState::Dead;
    assert_eq!(
        core.decide(ms(10), &map).command,
        Some(Command::FinishDelete {
            volume: deleted,
            epoch: Epoch(1),
            unsettled: None,
        })
    );
}

#[test]
fn only_the_heartbeat_of_a_missing_incarnation_is_news() {
    let map = map(2);
    let mut core = LeaderCore::default();
    assert!(core.heartbeat(ms(0), IncarnationId(1)), "not known before");
    assert!(!core.heartbeat(ms(200), IncarnationId(1)));
    let _ = core.decide(ms(200), &map);
    assert!(
        core.heartbeat(ms(210), IncarnationId(2)),
        "known from the map only"
    );
    core.broken(ms(300), IncarnationId(1));
    assert!(core.heartbeat(ms(310), IncarnationId(1)), "its session broke");
    assert!(!core.heartbeat(ms(320), IncarnationId(1)));
}

/// Asks the core only when it says that it is due, and answers when it first declared somebody dead.
fn first_death(core: &mut LeaderCore, map: &ClusterMap, from: Duration) -> Duration {
    let mut now = from;
    for _ in 0..1000 {
        core.awake(now);
        if !core.decide(now, map).deaths.is_empty() {
            return now;
        }
        let due = core.due(now);
        assert!(due > now, "it would be asked for ever");
        now = due;
    }
    panic!("nobody died");
}

#[test]
fn asked_only_when_due_a_leader_notices_silence_in_time() {
    let map = map(3);
    let mut core = settled(&map, ms(0));
    core.heartbeat(ms(130), IncarnationId(1));
    core.heartbeat(ms(140), IncarnationId(3));
    let at = first_death(&mut core, &map, ms(140));
    assert_eq!(at, SILENCE + ms(1));
}

#[test]
fn a_leader_that_is_due_probes_again_and_repeats_what_had_no_effect() {
    let mut map = map(2);
    volume(&mut map, 1, Some(2));
    let mut core = settled(&map, ms(0));
    core.broken(ms(10), IncarnationId(2));
    assert_eq!(core.decide(ms(10), &map).probes.len(), 1);
    assert_eq!(core.due(ms(10)), ms(10) + PROBE_AGAIN + ms(1));
    core.probed(ms(12), IncarnationId(2), true);
    assert!(core.decide(ms(12), &map).command.is_some());
    // The proposal was lost. Others are heard all the time, and the silence of 2 is known.
    let mut now = ms(12);
    let repeated = loop {
        now = core.due(now);
        core.awake(now);
        core.heartbeat(now, IncarnationId(1));
        if core.decide(now, &map).command.is_some() {
            break now;
        }
        assert!(now < ms(2000));
    };
    assert_eq!(repeated, ms(12) + PATIENCE + ms(1));
}
