#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses its part; a test fails by panicking"
)]
//! A cluster of real agents and a plain NVMe/TCP host, for the black-box tests.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use weft_block::{BlockError, Device, Durability};
use weft_initiator::{ConnectOptions, HostIdentity, Multipath, MultipathOptions};
use weft_node::config::{EngineConfig, FabricConfig};
use weft_node::local_cluster::{Agents, Options};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::units::{Lba, LbaRange};

pub(crate) const HOSTNQN: &str = "nqn.2014-08.org.nvmexpress:uuid:7e570000-0000-4000-8000-000000000001";

/// How long the host waits for an answer: as long as these tests wait for anything, whatever the machine does to seven agents
/// on its two cores meanwhile.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A folder for one cluster, removed at the end; `WEFT_KEEP=1` keeps it with the agents' logs, for a look at what failed.
pub(crate) fn folder() -> TempDir {
    let mut folder = tempfile::tempdir().unwrap();
    if std::env::var_os("WEFT_KEEP").is_some() {
        eprintln!("kept: {}", folder.path().display());
        folder.disable_cleanup(true);
    }
    folder
}

/// Agents that have been started and belong to no cluster yet.
pub(crate) fn agents(folder: &Path, nodes: u32, drive_mib: u64) -> Agents {
    agents_with(folder, nodes, drive_mib, engine(), FabricConfig::default())
}

/// What the engines of these tests are bound by.
pub(crate) fn engine() -> EngineConfig {
    EngineConfig {
        log_budget_mib: 8,
        ..EngineConfig::default()
    }
}

fn agents_with(
    folder: &Path,
    nodes: u32,
    drive_mib: u64,
    engine: EngineConfig,
    fabric: FabricConfig,
) -> Agents {
    let options = Options {
        program: PathBuf::from(env!("CARGO_BIN_EXE_weft")),
        keep: false,
        drives: 1,
        drive_bytes: drive_mib << 20,
        engine,
        fabric,
        first_address: None,
        namespaces: Vec::new(),
    };
    let mut agents = Agents::new(folder, options).unwrap();
    for _ in 0..nodes {
        agents.add().unwrap();
    }
    agents
}

/// A cluster of `nodes` nodes with one drive each.
pub(crate) fn cluster(folder: &Path, nodes: u32, drive_mib: u64) -> Agents {
    let agents = agents(folder, nodes, drive_mib);
    agents.form(3).unwrap();
    agents
}

/// A cluster whose associations with drives outlast a node that is stopped for a while.
pub(crate) fn patient_cluster(folder: &Path, nodes: u32, drive_mib: u64) -> Agents {
    let fabric = FabricConfig {
        keep_alive_ms: 60_000,
        ..FabricConfig::default()
    };
    let agents = agents_with(folder, nodes, drive_mib, engine(), fabric);
    agents.form(3).unwrap();
    agents
}

/// A cluster whose engines are bound otherwise.
pub(crate) fn cluster_with(folder: &Path, nodes: u32, drive_mib: u64, engine: EngineConfig) -> Agents {
    let agents = agents_with(folder, nodes, drive_mib, engine, FabricConfig::default());
    agents.form(3).unwrap();
    agents
}

/// Creates a 4+2 volume that the test's host may use, and waits until it is served.
pub(crate) fn volume(agents: &Agents, name: &str, size: &str) -> Nqn {
    agents
        .weft_ok(&["volume", "create", name, "--size", size, "--ec", "4+2"])
        .unwrap();
    let attached = agents
        .weft_json(&["volume", "attach", name, "--host", HOSTNQN])
        .unwrap();
    wait_until_served(agents, name);
    attached["subnqn"].as_str().unwrap().parse().unwrap()
}

/// Sum of a metric over all agents that answer.
pub(crate) fn metric(agents: &Agents, name: &str) -> f64 {
    (0..agents.list.len())
        .filter_map(|index| agents.metric(index, name, ""))
        .sum()
}

/// The agent that owns the volume.
pub(crate) fn owner(agents: &Agents, volume: &str) -> usize {
    let list = agents.weft_ok(&["volume", "show", volume]).unwrap();
    let line = list.lines().find(|line| line.starts_with("owner")).unwrap();
    agents.index_of(line.split_whitespace().nth(1).unwrap()).unwrap()
}

pub(crate) fn wait_until_served(agents: &Agents, name: &str) {
    agents
        .wait_until("the volume is served", |agents| {
            agents
                .weft_ok(&["volume", "show", name])
                .is_ok_and(|text| text.contains("serving"))
        })
        .unwrap();
}

/// Runs a host's work on one thread, as a host has its own.
pub(crate) fn on_host<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, work)
}

/// Connects to the volume by every path.
pub(crate) async fn connect(agents: &Agents, subnqn: &Nqn) -> Device {
    let addresses = agents.list.iter().map(|agent| agent.config.nvme_listen).collect();
    Rc::new(connect_by(addresses, subnqn).await)
}

/// Connects to the volume by these paths.
pub(crate) async fn connect_by(addresses: Vec<SocketAddr>, subnqn: &Nqn) -> Multipath {
    let options = MultipathOptions {
        retry_timeout: PATIENCE,
        ..MultipathOptions::new(path_options(addresses[0], subnqn), addresses, 1)
    };
    Multipath::connect(options).await.unwrap()
}

/// One path of the test's host to the volume.
pub(crate) fn path_options(address: SocketAddr, subnqn: &Nqn) -> ConnectOptions {
    let host = HostIdentity {
        hostnqn: HOSTNQN.parse().unwrap(),
        hostid: HostId([0x7e; 16]),
    };
    ConnectOptions::new(address, subnqn.clone(), host)
}

/// Bytes of one command of these tests, in blocks.
pub(crate) const CHUNK_BLOCKS: u64 = 32;

pub(crate) fn chunk_start(chunk: u64) -> Lba {
    Lba(chunk * CHUNK_BLOCKS)
}

/// What round `round` writes into a chunk: differs in every block, chunk and round, and never compresses to zeroes.
pub(crate) fn pattern(chunk: u64, round: u64) -> Bytes {
    let mut state = (chunk << 20 | round).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity((CHUNK_BLOCKS * 4096) as usize);
    while bytes.len() < (CHUNK_BLOCKS * 4096) as usize {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.into()
}

pub(crate) async fn write_chunk(device: &Device, chunk: u64, round: u64) -> Result<(), BlockError> {
    device
        .write(
            chunk_start(chunk),
            vec![pattern(chunk, round)],
            Durability::Cached,
        )
        .await
}

pub(crate) async fn expect_chunk(device: &Device, chunk: u64, round: u64) {
    let data = device
        .read(LbaRange {
            start: chunk_start(chunk),
            count: CHUNK_BLOCKS,
        })
        .await
        .unwrap();
    assert!(
        data == pattern(chunk, round),
        "chunk {chunk} is not what round {round} wrote"
    );
}
