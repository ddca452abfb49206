//! What the tests stand on: nodes that present a namespace, a relay that can fall silent, data that is known by its seed, and
//! waits that end with a condition.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use weft_block::Device;
use weft_block::faulty::{Faults, Faulty};
use weft_block::memory::MemoryDrive;
use weft_initiator::{ConnectOptions, HostIdentity, PathState};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::log::AnaState;
use weft_proto::units::{Lba, LbaRange};
use weft_target::reservation::ReservedNamespace;
use weft_target::{AllowedHosts, NamespaceConfig, Registry, RegistryConfig, Source, SubsystemConfig, serve};

const SUBNQN: &str = "nqn.2026-01.test:subsystem";
pub const UUID: [u8; 16] = [7; 16];
/// What the tests' targets report.
pub const COMMAND_QUIESCE: Duration = Duration::from_millis(200);
/// What no test takes unless something is wrong.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(60), test).await.unwrap();
    });
}

pub fn subnqn() -> Nqn {
    SUBNQN.parse().unwrap()
}

pub fn host(number: u8) -> HostIdentity {
    HostIdentity {
        hostnqn: format!("nqn.2026-01.test:host{number}").parse().unwrap(),
        hostid: HostId([number; 16]),
    }
}

pub fn options(address: SocketAddr) -> ConnectOptions {
    ConnectOptions::new(address, subnqn(), host(1))
}

/// A node that presents one namespace.
pub struct Node {
    pub registry: Rc<Registry>,
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Node {
    pub async fn start(device: Device, ana_state: AnaState) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), device, ana_state, 1).await
    }

    pub async fn start_at(address: SocketAddr, device: Device, ana_state: AnaState, cntlid_min: u16) -> Self {
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
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

pub fn namespace(nsid: u32, device: Device, ana_state: AnaState) -> NamespaceConfig {
    let reserved = ReservedNamespace::open(device, UUID, None).unwrap();
    NamespaceConfig {
        nsid,
        uuid: UUID,
        ana_group: nsid,
        ana_state,
        source: Source::Reserved(reserved),
    }
}

pub async fn memory_node() -> Node {
    Node::start(MemoryDrive::device(64 << 20), AnaState::OPTIMIZED).await
}

pub async fn faulty_node() -> (Node, Faults) {
    let (device, faults) = Faulty::wrap(MemoryDrive::device(64 << 20));
    (Node::start(device, AnaState::OPTIMIZED).await, faults)
}

pub fn pattern(seed: u64, len: usize) -> Bytes {
    (0..len)
        .map(|index| (index as u64 * 31 + seed * 7 + (index as u64 >> 9)) as u8)
        .collect::<Vec<u8>>()
        .into()
}

pub fn range(start: u64, count: u64) -> LbaRange {
    LbaRange {
        start: Lba(start),
        count,
    }
}

pub async fn until(what: &str, condition: impl Fn() -> bool) {
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

pub async fn until_state(mut state: watch::Receiver<PathState>, wanted: impl Fn(&PathState) -> bool) {
    let wait = state.wait_for(|state| wanted(state));
    assert!(tokio::time::timeout(PATIENCE, wait).await.unwrap().is_ok());
}

/// Forwards one address to another, and can fall silent without closing anything.
pub struct Relay {
    pub address: SocketAddr,
    silent: watch::Sender<bool>,
    keep_alives: watch::Receiver<usize>,
}

impl Relay {
    pub async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (silent, watched) = watch::channel(false);
        let (counted, keep_alives) = watch::channel(0);
        tokio::task::spawn_local(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(to).await else {
                    continue;
                };
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                let counted = counted.clone();
                let count = move |bytes: &[u8]| {
                    if is_keep_alive(bytes) {
                        counted.send_modify(|count| *count += 1);
                    }
                };
                tokio::task::spawn_local(pump(near_read, far_write, watched.clone(), count));
                tokio::task::spawn_local(pump(far_read, near_write, watched.clone(), |_| {}));
            }
        });
        Self {
            address,
            silent,
            keep_alives,
        }
    }

    /// Keep Alives that were forwarded.
    pub fn keep_alives(&self) -> watch::Receiver<usize> {
        self.keep_alives.clone()
    }

    pub fn set_silent(&self, silent: bool) {
        self.silent.send_replace(silent);
    }
}

/// Whether this is the capsule of a Keep Alive, which is sent alone: PDU type 04h, eight bytes of header, opcode 18h.
fn is_keep_alive(bytes: &[u8]) -> bool {
    bytes.len() == 72 && bytes[0] == 0x04 && bytes[8] == 0x18
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut silent: watch::Receiver<bool>,
    look: impl Fn(&[u8]),
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let received = from.read(&mut buffer).await;
        // The end of a stream is as silent as its bytes.
        if silent.wait_for(|silent| !silent).await.is_err() {
            return;
        }
        let Ok(len @ 1..) = received else { return };
        look(&buffer[..len]);
        if to.write_all(&buffer[..len]).await.is_err() {
            return;
        }
    }
}
