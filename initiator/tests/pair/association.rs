//! The life of one association: who may have one, what is heard through it of namespaces that come and change, and how it ends when a
//! peer says nothing, an answer stays away, or nobody holds it any more.

use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use weft_block::faulty::{Fault, Ops};
use weft_block::memory::MemoryDrive;
use weft_block::{BlockDevice, BlockError, Durability};
use weft_initiator::{CloseReason, ConnectError, ConnectOptions, Controller};
use weft_proto::nvme::event::AsyncEvent;
use weft_proto::nvme::log::AnaState;
use weft_proto::nvme::status::Status;
use weft_proto::units::Lba;
use weft_target::AllowedHosts;

use crate::rig::{
    Relay, faulty_node, host, memory_node, namespace, options, pattern, range, run, subnqn, until,
};

#[test]
fn whom_nobody_expects_is_refused() {
    run(async {
        let node = memory_node().await;
        let unknown = ConnectOptions {
            subnqn: "nqn.2026-01.test:other".parse().unwrap(),
            ..options(node.address)
        };
        let error = Controller::connect(unknown).await.unwrap_err();
        let ConnectError::Refused(status) = error else {
            panic!("{error}");
        };
        assert_eq!(status.code(), Status::CONNECT_INVALID_PARAMETERS);
        node.registry
            .set_hosts(&subnqn(), AllowedHosts::List([host(2).hostnqn].into()))
            .unwrap();
        let error = Controller::connect(options(node.address)).await.unwrap_err();
        assert!(matches!(error, ConnectError::Refused(_)), "{error}");
        let address = node.address;
        node.kill().await;
        let error = Controller::connect(options(address)).await.unwrap_err();
        assert!(matches!(error, ConnectError::Socket { .. }), "{error}");
    });
}

#[test]
fn a_peer_that_says_nothing_does_not_hold_a_connect() {
    run(async {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = silent.local_addr().unwrap();
        let error = Controller::connect(ConnectOptions {
            connect_timeout: Duration::from_millis(100),
            ..options(address)
        })
        .await
        .unwrap_err();
        assert_eq!(error, ConnectError::Timeout { address });
        let (mut accepted, _) = silent.accept().await.unwrap();
        let mut received = Vec::new();
        accepted.read_to_end(&mut received).await.unwrap();
        // An ICReq, unless the machine stood still before it could leave; and then the socket was closed.
        assert!(matches!(received.len(), 0 | 128), "{} bytes", received.len());
    });
}

#[test]
fn a_controller_that_is_let_go_leaves_no_association() {
    run(async {
        let node = memory_node().await;
        let controller = Controller::connect(options(node.address)).await.unwrap();
        let namespace = controller.namespace(1).await.unwrap();
        assert_eq!(node.registry.associations().len(), 1);
        let closed = controller.closed();
        drop(controller);
        namespace.flush().await.unwrap();
        assert_eq!(
            node.registry.associations().len(),
            1,
            "a namespace holds its controller"
        );
        drop(namespace);
        assert_eq!(closed.await, CloseReason::Disconnected);
        until("association gone", || node.registry.associations().is_empty()).await;

        let controller = Controller::connect(options(node.address)).await.unwrap();
        controller.disconnect().await;
        assert_eq!(controller.closed_reason(), Some(CloseReason::Disconnected));
        until("association gone", || node.registry.associations().is_empty()).await;
    });
}

#[test]
fn a_write_without_an_answer_is_unknown_and_ends_the_association() {
    run(async {
        let (node, faults) = faulty_node().await;
        let controller = Controller::connect(ConnectOptions {
            command_timeout: Duration::from_secs(1),
            queue_depth: 2,
            ..options(node.address)
        })
        .await
        .unwrap();
        let namespace = controller.namespace(1).await.unwrap();
        faults.every(Ops::WRITE | Ops::READ, Fault::Hold);
        let write = |at: u64| namespace.write(Lba(at), vec![pattern(at, 4096)], Durability::Durable);
        let (first, read, waiting) = (write(1), namespace.read(range(2, 1)), write(3));
        assert_eq!(first.await, Err(BlockError::Unknown), "it is in execution");
        assert_eq!(read.await, Err(BlockError::NotReady), "a read may be repeated");
        assert_eq!(waiting.await, Err(BlockError::NotReady), "it was never sent");
        assert_eq!(controller.closed().await, CloseReason::CommandTimeout);
        assert_eq!(write(4).await, Err(BlockError::NotReady));
        faults.clear();
        faults.release();
    });
}

#[test]
fn silence_is_noticed_by_keep_alive() {
    run(async {
        let node = memory_node().await;
        let relay = Relay::start(node.address).await;
        // A machine that stands still for as long costs the association too: the next one has more time.
        for kato in [300, 1200, 4800].map(Duration::from_millis) {
            let connect = Controller::connect(ConnectOptions {
                kato,
                ..options(relay.address)
            });
            let Ok(controller) = connect.await else {
                continue;
            };
            // Long enough for several keep alives to be answered.
            tokio::time::sleep(3 * kato).await;
            if controller.closed_reason().is_none() {
                relay.set_silent(true);
                assert_eq!(controller.closed().await, CloseReason::KeepAliveTimeout);
                return;
            }
        }
        panic!("associations end although their keep alives are answered");
    });
}

#[test]
fn traffic_stands_in_for_keep_alives_until_it_ends() {
    run(async {
        let node = memory_node().await;
        // Where a machine stands still for a while a Keep Alive is right: the next one has more time.
        for kato in [1, 4, 16].map(Duration::from_secs) {
            let relay = Relay::start(node.address).await;
            let connect = Controller::connect(ConnectOptions {
                kato,
                ..options(relay.address)
            });
            let Ok(controller) = connect.await else {
                continue;
            };
            let namespace = controller.namespace(1).await.unwrap();
            let mut keep_alives = relay.keep_alives();
            let start = Instant::now();
            let mut slowest = Duration::ZERO;
            while start.elapsed() < kato * 2 {
                let sent = Instant::now();
                tokio::time::sleep(kato / 10).await;
                let answered = namespace.read(range(2, 1)).await.is_ok();
                slowest = slowest.max(if answered { sent.elapsed() } else { kato });
            }
            if slowest > kato / 5 {
                continue;
            }
            assert_eq!(*keep_alives.borrow_and_update(), 0);
            tokio::select! {
                counted = keep_alives.changed() => counted.unwrap(),
                _ = controller.closed() => continue,
            }
            relay.set_silent(true);
            assert_eq!(controller.closed().await, CloseReason::KeepAliveTimeout);
            return;
        }
        panic!("no machine stands still for so long");
    });
}

#[test]
fn namespaces_come_go_and_grow_with_an_event() {
    run(async {
        let node = memory_node().await;
        let controller = Controller::connect(options(node.address)).await.unwrap();
        let mut events = controller.events();
        assert_eq!(controller.active_namespaces().await.unwrap(), [1]);
        node.registry
            .add_namespace(
                &subnqn(),
                namespace(5, MemoryDrive::device(1 << 20), AnaState::OPTIMIZED),
            )
            .unwrap();
        assert_eq!(events.next().await, Some(AsyncEvent::NAMESPACE_CHANGED));
        assert_eq!(controller.changed_namespaces().await.unwrap(), Some(vec![5]));
        assert_eq!(controller.active_namespaces().await.unwrap(), [1, 5]);
        node.registry
            .set_ana_state(&subnqn(), 5, AnaState::NON_OPTIMIZED)
            .unwrap();
        while events.next().await != Some(AsyncEvent::ANA_CHANGE) {}
        let log = controller.ana_log().await.unwrap();
        let state_of = |nsid| {
            log.groups
                .iter()
                .find(|group| group.nsids == [nsid])
                .unwrap()
                .state
        };
        assert_eq!(
            (state_of(1), state_of(5)),
            (AnaState::OPTIMIZED, AnaState::NON_OPTIMIZED)
        );
        node.kill().await;
        while events.next().await.is_some() {}
    });
}
