//! The real host and the real target in one process, over loopback sockets.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use weft_block::faulty::{Fault, Faults, Faulty, Ops};
use weft_block::memory::MemoryDrive;
use weft_block::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};
use weft_initiator::{
    CloseReason, ConnectError, ConnectOptions, Controller, HostIdentity, Multipath, MultipathOptions,
    PathState, RemoteDrive, ReservationError, discover,
};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::event::AsyncEvent;
use weft_proto::nvme::log::AnaState;
use weft_proto::nvme::reservation::{
    AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationType,
};
use weft_proto::nvme::status::Status;
use weft_proto::units::{Lba, LbaRange};
use weft_target::reservation::ReservedNamespace;
use weft_target::{
    AllowedHosts, DiscoveryRecord, NamespaceConfig, Registry, RegistryConfig, Source, SubsystemConfig, serve,
};

const SUBNQN: &str = "nqn.2026-01.test:subsystem";
const UUID: [u8; 16] = [7; 16];
const MIB: usize = 1 << 20;
/// What the tests' targets report.
const COMMAND_QUIESCE: Duration = Duration::from_millis(200);
/// What no test takes unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(20);

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(60), test).await.unwrap();
    });
}

fn subnqn() -> Nqn {
    SUBNQN.parse().unwrap()
}

fn host(number: u8) -> HostIdentity {
    HostIdentity {
        hostnqn: format!("nqn.2026-01.test:host{number}").parse().unwrap(),
        hostid: HostId([number; 16]),
    }
}

fn options(address: SocketAddr) -> ConnectOptions {
    ConnectOptions::new(address, subnqn(), host(1))
}

/// A node that presents one namespace.
struct Node {
    registry: Rc<Registry>,
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Node {
    async fn start(device: Device, ana_state: AnaState) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), device, ana_state, 1).await
    }

    async fn start_at(address: SocketAddr, device: Device, ana_state: AnaState, cntlid_min: u16) -> Self {
        let registry = Registry::new(RegistryConfig {
            cntlid_min,
            cntlid_max: cntlid_min + 999,
            command_quiesce: COMMAND_QUIESCE,
            ..RegistryConfig::default()
        });
        registry
            .add_subsystem(SubsystemConfig {
                nqn: subnqn(),
                serial: "1".into(),
                model: "Weft test".into(),
                hosts: AllowedHosts::Any,
                namespaces_max: 16,
            })
            .unwrap();
        registry
            .add_namespace(&subnqn(), namespace(1, device, ana_state))
            .unwrap();
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = registry.clone();
        let task = tokio::task::spawn_local(async move { serve(listener, serving).await.unwrap() });
        Self {
            registry,
            address,
            task,
        }
    }

    /// Ends every connection and stops listening, as a process that is killed does.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

fn namespace(nsid: u32, device: Device, ana_state: AnaState) -> NamespaceConfig {
    let reserved = ReservedNamespace::open(device, UUID, None).unwrap();
    NamespaceConfig {
        nsid,
        uuid: UUID,
        ana_group: nsid,
        ana_state,
        source: Source::Reserved(reserved),
    }
}

/// A volume: no reservations, the same device on every path.
fn volume(nsid: u32, device: Device, ana_state: AnaState) -> NamespaceConfig {
    NamespaceConfig {
        source: Source::PerAssociation(Rc::new(move |_| device.clone())),
        ..namespace(nsid, MemoryDrive::device(1 << 20), ana_state)
    }
}

async fn memory_node() -> Node {
    Node::start(MemoryDrive::device(64 << 20), AnaState::OPTIMIZED).await
}

async fn faulty_node() -> (Node, Faults) {
    let (device, faults) = Faulty::wrap(MemoryDrive::device(64 << 20));
    (Node::start(device, AnaState::OPTIMIZED).await, faults)
}

fn pattern(seed: u64, len: usize) -> Bytes {
    (0..len)
        .map(|index| (index as u64 * 31 + seed * 7 + (index as u64 >> 9)) as u8)
        .collect::<Vec<u8>>()
        .into()
}

fn range(start: u64, count: u64) -> LbaRange {
    LbaRange {
        start: Lba(start),
        count,
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(
        tokio::time::timeout(PATIENCE, wait).await.is_ok(),
        "never: {what}"
    );
}

async fn until_state(mut state: watch::Receiver<PathState>, wanted: impl Fn(&PathState) -> bool) {
    let wait = state.wait_for(|state| wanted(state));
    assert!(tokio::time::timeout(PATIENCE, wait).await.unwrap().is_ok());
}

/// Forwards one address to another, and can fall silent without closing anything.
struct Relay {
    address: SocketAddr,
    silent: watch::Sender<bool>,
}

impl Relay {
    async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (silent, watched) = watch::channel(false);
        tokio::task::spawn_local(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(to).await else {
                    continue;
                };
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                tokio::task::spawn_local(pump(near_read, far_write, watched.clone()));
                tokio::task::spawn_local(pump(far_read, near_write, watched.clone()));
            }
        });
        Self { address, silent }
    }

    fn set_silent(&self, silent: bool) {
        self.silent.send_replace(silent);
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut silent: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let received = from.read(&mut buffer).await;
        // The end of a stream is as silent as its bytes.
        if silent.wait_for(|silent| !silent).await.is_err() {
            return;
        }
        let Ok(len @ 1..) = received else { return };
        if to.write_all(&buffer[..len]).await.is_err() {
            return;
        }
    }
}

#[test]
fn every_operation_does_what_it_says() {
    run(async {
        for (header_digest, data_digest, io_queues, block_bytes) in [
            (false, false, 1, 4096),
            (true, false, 2, 512),
            (false, true, 3, 4096),
            (true, true, 1, 512),
        ] {
            let device = MemoryDrive::new(block_bytes, (64 << 20) / u64::from(block_bytes));
            let node = Node::start(device, AnaState::OPTIMIZED).await;
            let controller = Controller::connect(ConnectOptions {
                header_digest,
                data_digest,
                io_queues,
                ..options(node.address)
            })
            .await
            .unwrap();
            assert_eq!(controller.info().io_queues, io_queues);
            let namespace = controller.namespace(1).await.unwrap();
            assert_eq!(namespace.uuid(), Some(UUID));
            let info = namespace.info();
            assert_eq!((info.block_bytes, info.bytes()), (block_bytes, 64 << 20));

            // In the capsule, by R2T, and with several pieces cut anywhere.
            for (seed, blocks) in [(1, 1), (2, 2), (3, 16), (4, 200)] {
                let data = pattern(seed, blocks as usize * block_bytes as usize);
                let cut = data.len() / 3 + 1;
                let pieces = vec![data.slice(..cut), data.slice(cut..)];
                let at = Lba(seed * 1000);
                namespace
                    .write(at, pieces.clone(), Durability::Durable)
                    .await
                    .unwrap();
                assert_eq!(namespace.read(range(at.0, blocks)).await.unwrap(), data);
                assert!(namespace.compare(at, pieces).await.unwrap());
                let mut other = data.to_vec();
                *other.last_mut().unwrap() ^= 1;
                assert!(!namespace.compare(at, vec![other.into()]).await.unwrap());
                namespace.verify(range(at.0, blocks)).await.unwrap();
            }
            let zeroes = |blocks: usize| Bytes::from(vec![0; blocks * block_bytes as usize]);
            namespace
                .write_zeroes(range(3000, 8), false, Durability::Durable)
                .await
                .unwrap();
            assert_eq!(namespace.read(range(3000, 8)).await.unwrap(), zeroes(8));
            assert_eq!(
                namespace.read(range(3008, 8)).await.unwrap(),
                pattern(3, 16 * block_bytes as usize).slice(8 * block_bytes as usize..)
            );
            namespace
                .deallocate(vec![range(3000, 16), range(4000, 200), range(5000, 0)])
                .await
                .unwrap();
            assert_eq!(namespace.read(range(4000, 200)).await.unwrap(), zeroes(200));
            namespace.flush().await.unwrap();
            // The whole device, in as many commands as it takes.
            namespace
                .write_zeroes(range(0, info.blocks), true, Durability::Durable)
                .await
                .unwrap();
            assert_eq!(namespace.read(range(1000, 1)).await.unwrap(), zeroes(1));
            assert_eq!(controller.outstanding(), 0);
            controller.disconnect().await;
            node.kill().await;
        }
    });
}

#[test]
fn a_mebibyte_travels_whole_both_ways() {
    run(async {
        let node = memory_node().await;
        for digests in [false, true] {
            let controller = Controller::connect(ConnectOptions {
                header_digest: digests,
                data_digest: digests,
                ..options(node.address)
            })
            .await
            .unwrap();
            let namespace = controller.namespace(1).await.unwrap();
            let writes = (0..8).map(|index| {
                let data = pattern(index, MIB);
                let pieces = data.chunks(100_000).map(|piece| data.slice_ref(piece)).collect();
                namespace.write(Lba(index * 256), pieces, Durability::Durable)
            });
            for outcome in join_all(writes).await {
                outcome.unwrap();
            }
            let reads = join_all((0..8).map(|index| namespace.read(range(index * 256, 256)))).await;
            for (index, data) in reads.into_iter().enumerate() {
                assert!(data.unwrap() == pattern(index as u64, MIB), "mebibyte {index}");
            }
        }
    });
}

#[test]
fn more_commands_than_the_queues_are_deep_wait_their_turn() {
    run(async {
        let node = memory_node().await;
        let controller = Controller::connect(ConnectOptions {
            io_queues: 4,
            queue_depth: 8,
            ..options(node.address)
        })
        .await
        .unwrap();
        let namespace = controller.namespace(1).await.unwrap();
        let writes = (0..1000)
            .map(|index| namespace.write(Lba(index), vec![pattern(index, 4096)], Durability::Durable));
        let writes: Vec<_> = writes.collect();
        assert_eq!(controller.outstanding(), 1000, "they start when they are made");
        assert!(join_all(writes).await.into_iter().all(|outcome| outcome.is_ok()));
        let reads = join_all((0..1000).map(|index| namespace.read(range(index, 1)))).await;
        for (index, data) in reads.into_iter().enumerate() {
            assert_eq!(data.unwrap(), pattern(index as u64, 4096));
        }
    });
}

#[test]
fn what_lies_outside_is_refused_before_it_is_sent() {
    run(async {
        let node = memory_node().await;
        let controller = Controller::connect(options(node.address)).await.unwrap();
        let namespace = controller.namespace(1).await.unwrap();
        let blocks = namespace.info().blocks;
        assert!(matches!(
            namespace.read(range(blocks, 1)).await,
            Err(BlockError::OutOfRange { .. })
        ));
        assert!(matches!(
            namespace
                .write(Lba(0), vec![Bytes::from(vec![0; 100])], Durability::Durable)
                .await,
            Err(BlockError::InvalidLength { bytes: 100, .. })
        ));
        assert!(matches!(
            namespace.read(range(0, 257)).await,
            Err(BlockError::InvalidLength { .. })
        ));
        assert_eq!(namespace.read(range(0, 0)).await, Ok(Bytes::new()));
        assert!(
            controller.namespace(2).await.is_err(),
            "there is no second namespace"
        );
    });
}

#[test]
fn a_device_s_errors_arrive_with_their_meaning() {
    run(async {
        let (node, faults) = faulty_node().await;
        let controller = Controller::connect(options(node.address)).await.unwrap();
        let namespace = controller.namespace(1).await.unwrap();
        let write = || namespace.write(Lba(5), vec![pattern(1, 4096)], Durability::Durable);
        for (told, heard) in [
            (BlockError::CapacityExceeded, BlockError::CapacityExceeded),
            (BlockError::WriteProtected, BlockError::WriteProtected),
            (BlockError::ReservationConflict, BlockError::ReservationConflict),
            (BlockError::NotReady, BlockError::NotReady),
            (BlockError::Unknown, BlockError::Unknown),
            (BlockError::Os { errno: 28 }, BlockError::Os { errno: 5 }),
        ] {
            faults.next(Ops::WRITE, 1, Fault::Fail(told));
            assert_eq!(write().await, Err(heard));
        }
        faults.next(
            Ops::READ,
            1,
            Fault::Fail(BlockError::Unrecovered { start: Lba(5) }),
        );
        assert_eq!(
            namespace.read(range(5, 1)).await,
            Err(BlockError::Unrecovered { start: Lba(5) })
        );
        faults.next(Ops::READ, 1, Fault::Fail(BlockError::Unknown));
        assert_eq!(namespace.read(range(5, 1)).await, Err(BlockError::NotReady));
        write().await.unwrap();
    });
}

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
        assert_eq!(received.len(), 128, "an ICReq, and then the socket was closed");
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
            command_timeout: Duration::from_millis(200),
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
        let controller = Controller::connect(ConnectOptions {
            kato: Duration::from_millis(300),
            ..options(relay.address)
        })
        .await
        .unwrap();
        // Long enough for several keep alives to be answered.
        tokio::time::sleep(Duration::from_millis(900)).await;
        assert_eq!(controller.closed_reason(), None);
        relay.set_silent(true);
        assert_eq!(controller.closed().await, CloseReason::KeepAliveTimeout);
    });
}

#[test]
fn a_remote_drive_answers_at_once_and_comes_back() {
    run(async {
        let device = MemoryDrive::device(64 << 20);
        let node = Node::start(device.clone(), AnaState::OPTIMIZED).await;
        let address = node.address;
        let drive = RemoteDrive::open(options(address), 1);
        assert_eq!(
            drive.read(range(0, 1)).await,
            Err(BlockError::NotReady),
            "not connected yet"
        );
        drive.connected().await;
        drive
            .write(Lba(3), vec![pattern(3, 4096)], Durability::Durable)
            .await
            .unwrap();
        let key = 0x1234;
        drive.reservation_register(key, PATIENCE).await.unwrap();

        node.kill().await;
        until_state(drive.watch(), |state| matches!(state, PathState::Disconnected(_))).await;
        assert_eq!(drive.read(range(3, 1)).await, Err(BlockError::NotReady));
        assert_eq!(
            drive
                .write(Lba(3), vec![pattern(9, 4096)], Durability::Durable)
                .await,
            Err(BlockError::NotReady)
        );
        assert_eq!(drive.info().blocks, (64 << 20) / 4096, "as last seen");
        assert_eq!(
            drive.reservation_report(PATIENCE).await,
            Err(ReservationError::NotConnected)
        );

        let node = Node::start_at(address, device, AnaState::OPTIMIZED, 1).await;
        until_state(drive.watch(), |state| *state == PathState::Connected).await;
        assert_eq!(drive.read(range(3, 1)).await.unwrap(), pattern(3, 4096));
        // This target forgot its registrations, and nobody registered on our behalf.
        let report = drive.reservation_report(PATIENCE).await.unwrap();
        assert!(report.registrants.is_empty());
        drop(drive);
        until("association gone", || node.registry.associations().is_empty()).await;
    });
}

#[test]
fn a_preempted_host_meets_a_conflict() {
    run(async {
        let node = memory_node().await;
        let drive = |number: u8| {
            let options = ConnectOptions {
                host: host(number),
                ..options(node.address)
            };
            RemoteDrive::open(options, 1)
        };
        let (victim, successor, stranger) = (drive(1), drive(2), drive(3));
        for drive in [&victim, &successor, &stranger] {
            drive.connected().await;
        }
        let rtype = ReservationType::WriteExclusiveAllRegistrants;
        victim.reservation_register(0x11, PATIENCE).await.unwrap();
        victim.reservation_acquire(rtype, 0x11, PATIENCE).await.unwrap();
        successor.reservation_register(0x22, PATIENCE).await.unwrap();
        let write = |drive: &RemoteDrive| drive.write(Lba(0), vec![pattern(1, 4096)], Durability::Durable);
        write(&victim).await.unwrap();
        write(&successor).await.unwrap();
        assert_eq!(write(&stranger).await, Err(BlockError::ReservationConflict));
        stranger.read(range(0, 1)).await.unwrap();

        let report = successor.reservation_report(PATIENCE).await.unwrap();
        assert_eq!(report.rtype, Some(rtype));
        let mut known: Vec<_> = report
            .registrants
            .iter()
            .map(|one| (one.hostid, one.key))
            .collect();
        known.sort();
        assert_eq!(known, [(host(1).hostid, 0x11), (host(2).hostid, 0x22)]);

        successor
            .reservation_preempt_and_abort(rtype, 0x22, 0x11, PATIENCE)
            .await
            .unwrap();
        assert_eq!(write(&victim).await, Err(BlockError::ReservationConflict));
        write(&successor).await.unwrap();
        assert_eq!(
            successor
                .reservation_preempt_and_abort(rtype, 0x22, 0x11, PATIENCE)
                .await,
            Err(ReservationError::Conflict),
            "the key is gone"
        );
        let report = victim.reservation_report(PATIENCE).await.unwrap();
        assert_eq!(report.registrants.len(), 1);
        successor
            .reservation_release(ReleaseAction::Clear, rtype, 0x22, PATIENCE)
            .await
            .unwrap();
        write(&victim).await.unwrap();
    });
}

#[test]
fn a_preempt_waits_no_longer_than_its_deadline() {
    run(async {
        let (node, faults) = faulty_node().await;
        let victim = Controller::connect(options(node.address)).await.unwrap();
        let successor = RemoteDrive::open(
            ConnectOptions {
                host: host(2),
                ..options(node.address)
            },
            1,
        );
        successor.connected().await;
        let rtype = ReservationType::WriteExclusiveAllRegistrants;
        victim
            .reservation_register(1, RegisterAction::Register, 0, 0x11, false, PersistChange::Keep)
            .await
            .unwrap();
        victim
            .reservation_acquire(1, AcquireAction::Acquire, rtype, 0x11, 0)
            .await
            .unwrap();
        successor.reservation_register(0x22, PATIENCE).await.unwrap();
        let namespace = victim.namespace(1).await.unwrap();
        faults.next(Ops::WRITE, 1, Fault::Hold);
        let write = namespace.write(Lba(0), vec![pattern(1, 4096)], Durability::Durable);
        faults.wait_held(1).await;
        let preempt = successor.reservation_preempt_and_abort(rtype, 0x22, 0x11, Duration::from_millis(100));
        assert_eq!(
            preempt.await,
            Err(ReservationError::Unknown),
            "the write is in execution"
        );
        faults.release();
        // It was in execution when it was preempted: either answer is true to what happened.
        assert!(matches!(
            write.await,
            Ok(()) | Err(BlockError::ReservationConflict)
        ));
        let write = namespace.write(Lba(0), vec![pattern(1, 4096)], Durability::Durable);
        assert_eq!(write.await, Err(BlockError::ReservationConflict));
    });
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

#[test]
fn a_silent_path_is_left_within_its_keep_alive() {
    run(async {
        let device = MemoryDrive::device(64 << 20);
        let mut nodes = two_nodes(&device, [AnaState::OPTIMIZED, AnaState::NON_OPTIMIZED]).await;
        let relay = Relay::start(nodes[0].address).await;
        nodes[0].address = relay.address;
        let multi = multipath(&nodes, Duration::from_millis(400)).await;
        relay.set_silent(true);
        let write = multi.write(Lba(1), vec![pattern(1, 4096)], Durability::Durable);
        write.await.unwrap();
        assert_eq!(multi.host_retries(), 1);
        assert_eq!(device.read(range(1, 1)).await.unwrap(), pattern(1, 4096));
    });
}

#[test]
fn a_write_without_an_answer_is_sent_again_only_when_its_first_attempt_has_quiesced() {
    run(async {
        let device = MemoryDrive::device(64 << 20);
        let mut nodes = two_nodes(&device, [AnaState::OPTIMIZED, AnaState::NON_OPTIMIZED]).await;
        let relay = Relay::start(nodes[0].address).await;
        nodes[0].address = relay.address;
        let multi = multipath(&nodes, Duration::from_millis(400)).await;
        relay.set_silent(true);
        let write = multi.write(Lba(1), vec![pattern(1, 4096)], Durability::Durable);
        let read = multi.read(range(2, 1));
        let lost = async {
            let state = multi.watch_paths()[0].clone();
            until_state(state, |state| matches!(state, PathState::Disconnected(_))).await;
            tokio::time::Instant::now()
        };
        let sent_again = async {
            write.await.unwrap();
            tokio::time::Instant::now()
        };
        let (read, lost, sent_again) = futures_util::future::join3(read, lost, sent_again).await;
        read.unwrap();
        assert!(
            sent_again - lost >= COMMAND_QUIESCE * 9 / 10,
            "{:?}",
            sent_again - lost
        );
        assert!(device.read(range(1, 1)).await.unwrap() == pattern(1, 4096));
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

/// A device with a volatile cache that remembers how it was written.
struct Caching {
    device: Device,
    durabilities: RefCell<Vec<Durability>>,
    flushes: Cell<u32>,
}

impl BlockDevice for Caching {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            volatile_write_cache: true,
            ..self.device.info()
        }
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.device.read(range)
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        self.durabilities.borrow_mut().push(durability);
        self.device.write(start, data, durability)
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.durabilities.borrow_mut().push(durability);
        self.device.write_zeroes(range, deallocate, durability)
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.device.deallocate(ranges)
    }

    fn flush(&self) -> Io<()> {
        self.flushes.set(self.flushes.get() + 1);
        self.device.flush()
    }
}

#[test]
fn durable_reaches_a_drive_with_a_volatile_cache() {
    run(async {
        let caching = Rc::new(Caching {
            device: MemoryDrive::device(1 << 20),
            durabilities: RefCell::default(),
            flushes: Cell::new(0),
        });
        let node = Node::start(caching.clone(), AnaState::OPTIMIZED).await;
        let controller = Controller::connect(options(node.address)).await.unwrap();
        assert!(controller.info().volatile_write_cache);
        let namespace = controller.namespace(1).await.unwrap();
        for durability in [Durability::Durable, Durability::Cached] {
            namespace
                .write(Lba(0), vec![pattern(1, 4096)], durability)
                .await
                .unwrap();
            namespace
                .write_zeroes(range(0, 1), false, durability)
                .await
                .unwrap();
        }
        let (durable, cached) = (Durability::Durable, Durability::Cached);
        assert_eq!(*caching.durabilities.borrow(), [durable, durable, cached, cached]);
        namespace.flush().await.unwrap();
        assert_eq!(caching.flushes.get(), 1);
    });
}
