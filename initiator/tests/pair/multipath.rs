//! One volume behind two nodes: what a host learns of its paths, and what it does when they die, fall silent or change their access
//! state.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use weft_block::faulty::{Fault, Faulty, Ops};
use weft_block::memory::MemoryDrive;
use weft_block::{BlockDevice, BlockError, Device, Durability};
use weft_initiator::{ConnectOptions, Multipath, MultipathOptions, PathState, discover};
use weft_proto::nvme::log::AnaState;
use weft_proto::units::Lba;
use weft_target::{AllowedHosts, DiscoveryRecord, NamespaceConfig, Source};

use crate::rig::{
    COMMAND_QUIESCE, Node, Relay, host, memory_node, namespace, options, pattern, range, run, subnqn, until,
    until_state,
};

/// A volume: no reservations, the same device on every path.
fn volume(nsid: u32, device: Device, ana_state: AnaState) -> NamespaceConfig {
    NamespaceConfig {
        source: Source::PerAssociation(Rc::new(move |_, _| device.clone())),
        ..namespace(nsid, MemoryDrive::device(1 << 20), ana_state)
    }
}

/// Two nodes that present one volume.
async fn two_nodes(device: &Device, states: [AnaState; 2]) -> [Node; 2] {
    let mut nodes = Vec::new();
    for (index, state) in states.into_iter().enumerate() {
        let address = "127.0.0.1:0".parse().unwrap();
        let node = Node::start_at(address, device.clone(), state, 1 + 1000 * index as u16).await;
        node.registry.remove_namespace(&subnqn(), 1).unwrap();
        node.registry
            .add_namespace(&subnqn(), volume(1, device.clone(), state))
            .unwrap();
        nodes.push(node);
    }
    nodes.try_into().unwrap_or_else(|_| panic!("two nodes"))
}

async fn multipath(nodes: &[Node; 2], kato: Duration) -> Multipath {
    let connect = ConnectOptions {
        kato,
        ..options(nodes[0].address)
    };
    let addresses = nodes.iter().map(|node| node.address).collect();
    let device = Multipath::connect(MultipathOptions::new(connect, addresses, 1))
        .await
        .unwrap();
    for state in device.watch_paths() {
        until_state(state, |state| *state == PathState::Connected).await;
    }
    device
}

/// Writes blocks one after another until told to stop; answers how many.
fn load(device: Multipath, stop: Rc<Cell<bool>>) -> JoinHandle<u64> {
    tokio::task::spawn_local(async move {
        let mut count = 0;
        while !stop.get() {
            let at = count % 1000;
            let data = pattern(count, 4096);
            device
                .write(Lba(at), vec![data.clone()], Durability::Durable)
                .await
                .unwrap();
            assert_eq!(device.read(range(at, 1)).await.unwrap(), data);
            count += 1;
        }
        count
    })
}

#[test]
fn a_path_that_dies_costs_its_host_no_error() {
    run(async {
        let device = MemoryDrive::device(64 << 20);
        let nodes = two_nodes(&device, [AnaState::OPTIMIZED, AnaState::NON_OPTIMIZED]).await;
        let multi = multipath(&nodes, Duration::from_secs(1)).await;
        let stop = Rc::new(Cell::new(false));
        let loads: Vec<_> = (0..4).map(|_| load(multi.clone(), stop.clone())).collect();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let [first, second] = nodes;
        let address = first.address;
        first.kill().await;
        until_state(multi.watch_paths()[0].clone(), |state| {
            matches!(state, PathState::Disconnected(_))
        })
        .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        // Back on the first path, then without any, then the second again.
        let first = Node::start_at(address, device.clone(), AnaState::OPTIMIZED, 2000).await;
        until_state(multi.watch_paths()[0].clone(), |state| {
            *state == PathState::Connected
        })
        .await;
        let address = second.address;
        first.kill().await;
        second.kill().await;
        for state in multi.watch_paths() {
            until_state(state, |state| matches!(state, PathState::Disconnected(_))).await;
        }
        let _second = Node::start_at(address, device.clone(), AnaState::NON_OPTIMIZED, 3000).await;
        until_state(multi.watch_paths()[1].clone(), |state| {
            *state == PathState::Connected
        })
        .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        stop.set(true);
        for load in loads {
            assert!(load.await.unwrap() > 0);
        }
        assert_eq!(multi.io_errors(), 0);
        assert!(multi.host_retries() > 0);
        assert_eq!(multi.outstanding(), 0);
    });
}

#[test]
fn commands_follow_the_access_state() {
    run(async {
        let (first_device, first_faults) = Faulty::wrap(MemoryDrive::device(64 << 20));
        let device: Device = first_device;
        let nodes = two_nodes(&device, [AnaState::OPTIMIZED, AnaState::NON_OPTIMIZED]).await;
        let multi = multipath(&nodes, Duration::from_secs(1)).await;
        let states = |multi: &Multipath| -> Vec<_> { multi.paths().iter().map(|path| path.ana).collect() };
        assert_eq!(
            states(&multi),
            [Some(AnaState::OPTIMIZED), Some(AnaState::NON_OPTIMIZED)]
        );
        let stop = Rc::new(Cell::new(false));
        let load = load(multi.clone(), stop.clone());
        for (index, state, expected) in [
            (
                0,
                AnaState::INACCESSIBLE,
                [AnaState::INACCESSIBLE, AnaState::NON_OPTIMIZED],
            ),
            (
                1,
                AnaState::OPTIMIZED,
                [AnaState::INACCESSIBLE, AnaState::OPTIMIZED],
            ),
            (
                1,
                AnaState::INACCESSIBLE,
                [AnaState::INACCESSIBLE, AnaState::INACCESSIBLE],
            ),
            (
                0,
                AnaState::NON_OPTIMIZED,
                [AnaState::NON_OPTIMIZED, AnaState::INACCESSIBLE],
            ),
        ] {
            nodes[index].registry.set_ana_state(&subnqn(), 1, state).unwrap();
            let expected = expected.map(Some);
            until("access states are known", || states(&multi) == expected).await;
        }
        // A volume between two owners refuses for a while without any change of state.
        first_faults.next(Ops::ALL, 5, Fault::Fail(BlockError::NotReady));
        until("the refusals are over", || first_faults.fault_count() == 5).await;
        stop.set(true);
        load.await.unwrap();
        assert_eq!(multi.io_errors(), 0);
        assert!(multi.host_retries() >= 5);
    });
}

#[test]
fn a_host_gives_up_after_its_retry_timeout_and_not_before() {
    run(async {
        let device = MemoryDrive::device(1 << 20);
        let nodes = two_nodes(&device, [AnaState::INACCESSIBLE, AnaState::INACCESSIBLE]).await;
        let addresses = nodes.iter().map(|node| node.address).collect();
        let multi = Multipath::connect(MultipathOptions {
            retry_timeout: Duration::from_millis(300),
            ..MultipathOptions::new(options(nodes[0].address), addresses, 1)
        })
        .await
        .unwrap();
        let asked = std::time::Instant::now();
        let write = multi.write(Lba(0), vec![pattern(1, 4096)], Durability::Durable);
        assert_eq!(write.await, Err(BlockError::NotReady));
        assert!(asked.elapsed() >= Duration::from_millis(300));
        assert_eq!(multi.io_errors(), 1);
    });
}

/// A host whose better path has just fallen silent, with what has to be kept for the paths to stay as they are. What is
/// started before anything is awaited goes to that path, however slow the machine.
async fn behind_a_silent_path(device: &Device) -> (Multipath, [Node; 2], Relay) {
    let mut nodes = two_nodes(device, [AnaState::OPTIMIZED, AnaState::NON_OPTIMIZED]).await;
    let relay = Relay::start(nodes[0].address).await;
    nodes[0].address = relay.address;
    let multi = multipath(&nodes, Duration::from_millis(400)).await;
    // A machine that stood still for this long may have cost the path; it comes back.
    until("the better path is up", || {
        let path = &multi.paths()[0];
        path.state == PathState::Connected && path.ana == Some(AnaState::OPTIMIZED)
    })
    .await;
    relay.set_silent(true);
    (multi, nodes, relay)
}

#[test]
fn a_silent_path_is_left_within_its_keep_alive() {
    run(async {
        let device = MemoryDrive::device(64 << 20);
        let (multi, _nodes, _relay) = behind_a_silent_path(&device).await;
        let write = multi.write(Lba(1), vec![pattern(1, 4096)], Durability::Durable);
        write.await.unwrap();
        // More than once, where a machine that stands still costs the other path too.
        assert!(multi.host_retries() >= 1);
        assert_eq!(device.read(range(1, 1)).await.unwrap(), pattern(1, 4096));
    });
}

#[test]
fn a_write_without_an_answer_is_sent_again_only_when_its_first_attempt_has_quiesced() {
    run(async {
        let device = MemoryDrive::device(64 << 20);
        let (multi, _nodes, _relay) = behind_a_silent_path(&device).await;
        let write = multi.write(Lba(1), vec![pattern(1, 4096)], Durability::Durable);
        let read = multi.read(range(2, 1));
        let not_yet_lost = async {
            let mut then = Instant::now();
            loop {
                let now = Instant::now();
                if multi.paths()[0].state != PathState::Connected {
                    return then;
                }
                then = now;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let sent_again = async {
            write.await.unwrap();
            Instant::now()
        };
        let (read, not_yet_lost, sent_again) =
            futures_util::future::join3(read, not_yet_lost, sent_again).await;
        read.unwrap();
        let between = sent_again - not_yet_lost;
        assert!(between >= COMMAND_QUIESCE, "{between:?}");
        assert!(device.read(range(1, 1)).await.unwrap() == pattern(1, 4096));
    });
}

#[test]
fn discovery_shows_a_host_its_paths() {
    run(async {
        let node = memory_node().await;
        let record = |number: u8, address: &str, hosts: AllowedHosts| DiscoveryRecord {
            subnqn: subnqn(),
            address: address.parse().unwrap(),
            portid: u16::from(number),
            hosts,
        };
        let second = "[::1]:4421";
        node.registry.set_discovery(vec![
            record(1, &node.address.to_string(), AllowedHosts::Any),
            record(2, second, AllowedHosts::List([host(1).hostnqn].into())),
            record(3, "10.0.0.1:4420", AllowedHosts::List([host(2).hostnqn].into())),
        ]);
        let entries = discover(node.address, host(1)).await.unwrap();
        let shown: Vec<_> = entries
            .iter()
            .filter(|entry| entry.subnqn() == Some(subnqn()))
            .filter_map(|entry| entry.socket_addr())
            .collect();
        assert_eq!(shown, [node.address, second.parse().unwrap()]);
        let found = MultipathOptions::new(options(node.address), Vec::new(), 1)
            .discovered(node.address)
            .await
            .unwrap();
        assert_eq!(found.addresses.len(), 2);
    });
}
