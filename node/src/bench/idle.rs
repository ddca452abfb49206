//! `weft bench idle`: what an agent costs that owns a hundred volumes and has a hundred hosts' associations, while
//! nobody reads or writes.
//!
//! A real cluster of real processes, as `weft demo` starts them: six nodes with one drive file each. All volumes are
//! 4+2 and belong to the first node, and every host is connected to that node, so it is the one that is measured: its
//! lease checks on six drives, its associations with five of them, keep-alive with the hosts, Raft, metrics.
//!
//! The floor is nothing at all. By what the kernel counts for the process, so other programs do not disturb it.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::future::join_all;
use tokio::task::LocalSet;
use weft_initiator::{ConnectOptions, HostIdentity, RemoteDrive};
use weft_metadata::client::MetadataClient;
use weft_metadata::state::map::Phase;
use weft_metadata::state::{ClusterMap, Command as Proposal};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::units::MIB;

use super::report::{Heading, Required, Row};
use super::{Output, Plan, machine};
use crate::config::{EngineConfig, FabricConfig};
use crate::local_cluster::{Agents, Options};

const NODES: usize = 6;
const VOLUMES: usize = 100;

/// Of a drive file, which is sparse: room for a few bands of each volume.
const DRIVE_BYTES: u64 = 4096 * MIB;
const VOLUME_BYTES: u64 = 1024 * MIB;

/// What `nvme connect` of Linux asks for where nothing else is said.
const KATO: Duration = Duration::from_secs(5);

/// What is left to settle after the last volume was opened: first checkpoints, connections.
const SETTLE: Duration = Duration::from_millis(1500);

/// How long a step of the set-up may take. Generous: a slow machine is not a failure.
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures an idle agent.
///
/// # Errors
/// The cluster does not come up, a volume is not served, a host is refused.
pub(super) fn run(plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    machine::unpin()?;
    let folder = tempfile::tempdir()?;
    let options = Options {
        program: std::env::current_exe()?,
        keep: false,
        drives: 1,
        drive_bytes: DRIVE_BYTES,
        engine: EngineConfig::default(),
        fabric: FabricConfig::default(),
        first_address: None,
        namespaces: Vec::new(),
    };
    let began = Instant::now();
    let mut agents = Agents::new(folder.path(), options)?;
    for _ in 0..NODES {
        agents.add()?;
    }
    agents.form(3)?;
    let formed = began.elapsed();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = LocalSet::new();
    let measured = local.block_on(&runtime, measure(&agents, plan.idle));
    let Measured {
        created,
        served,
        connected,
        cpu_by_thread,
        resident_bytes,
    } = measured.map_err(|error| match agents.first_dead() {
        Some(sentence) => error.context(sentence),
        None => error,
    })?;

    let heading = |workload: &str, unit, most| Heading {
        stage: "idle",
        workload: format!("agent with {VOLUMES} volumes and {VOLUMES} hosts, {workload}"),
        unit,
        floor_is: "nothing",
        required: Required::ValueAtMost(most),
        processes: NODES as u32 + 1,
        drive_kind: "file",
    };
    let percent: f64 = cpu_by_thread.values().sum::<f64>() * 100.0;
    output.row(Row::counted(heading("CPU", "% core", 2.0), percent, 0.0));
    let megabytes = resident_bytes as f64 / 1e6;
    output.row(Row::counted(heading("resident", "MB", 200.0), megabytes, 0.0));
    let threads: Vec<String> = cpu_by_thread
        .iter()
        .filter(|(_, share)| **share >= 0.0001)
        .map(|(name, share)| format!("{name} {:.2} %", share * 100.0))
        .collect();
    output.note(format!(
        "idle: {}; {NODES} agents formed in {:.1} s; {VOLUMES} volumes created in {:.2} s, all served after {:.2} s; {VOLUMES} hosts \
         connected in {:.2} s",
        threads.join(", "),
        formed.as_secs_f64(),
        created.as_secs_f64(),
        served.as_secs_f64(),
        connected.as_secs_f64(),
    ));
    Ok(())
}

/// What was learnt of the first agent, and how long it took to get there.
struct Measured {
    created: Duration,
    served: Duration,
    connected: Duration,
    /// Share of a core, by the names of threads.
    cpu_by_thread: BTreeMap<String, f64>,
    resident_bytes: u64,
}

async fn measure(agents: &Agents, window: Duration) -> anyhow::Result<Measured> {
    let process = agents.process_id(0).context("the first agent runs")?;
    let client = MetadataClient::new(agents.control_addresses());
    let hostnqn: Nqn = "nqn.2026-01.io.weft:bench-host".parse()?;
    let began = Instant::now();
    let map = create_volumes(&client, &agents.list[0].config.name, &hostnqn).await?;
    let created = began.elapsed();
    let map = wait_until_served(&client, map).await?;
    let served = began.elapsed();

    let began = Instant::now();
    let hosts: Vec<Rc<RemoteDrive>> = map
        .volumes
        .values()
        .zip(1u128..)
        .map(|(volume, number)| {
            let host = HostIdentity {
                hostnqn: hostnqn.clone(),
                hostid: HostId(number.to_be_bytes()),
            };
            let address = agents.list[0].config.nvme_listen;
            let mut options = ConnectOptions::new(address, volume.subnqn.clone(), host);
            options.kato = KATO;
            RemoteDrive::open(options, 1)
        })
        .collect();
    let all = join_all(hosts.iter().map(|host| host.connected()));
    tokio::time::timeout(PATIENCE, all)
        .await
        .context("the hosts were not all connected in two minutes")?;
    let connected = began.elapsed();

    tokio::time::sleep(SETTLE).await;
    let (before, start) = (thread_times(process)?, Instant::now());
    tokio::time::sleep(window).await;
    let (after, elapsed) = (thread_times(process)?, start.elapsed());
    let mut cpu_by_thread = BTreeMap::new();
    for (thread, (name, time)) in after {
        let earlier = before.get(&thread).map_or(0, |(_, time)| *time);
        let share = time.saturating_sub(earlier) as f64 / elapsed.as_nanos() as f64;
        *cpu_by_thread.entry(name).or_default() += share;
    }
    let resident_bytes = resident_bytes(process)?;
    ensure!(
        hosts.iter().all(|host| host.controller().is_some()),
        "a host lost its connection"
    );
    Ok(Measured {
        created,
        served,
        connected,
        cpu_by_thread,
        resident_bytes,
    })
}

/// All at once, as many clients would.
async fn create_volumes(client: &MetadataClient, owner: &str, hostnqn: &Nqn) -> anyhow::Result<ClusterMap> {
    let map = client.map().await.context("read the cluster map")?;
    let owner = map.node_named(owner).context("the first node is a member")?.id;
    let proposals = (0..VOLUMES)
        .map(|index| {
            let name = format!("v{index}");
            let hosts = [hostnqn.clone()];
            let mut proposal =
                crate::cli::new_volume(&map, &name, "default", VOLUME_BYTES, None, 4096, hosts)?;
            if let Proposal::CreateVolume(volume) = &mut proposal {
                volume.preferred = Some(owner);
            }
            Ok(proposal)
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    for answer in join_all(proposals.into_iter().map(|proposal| client.propose(proposal))).await {
        answer.context("create a volume")?;
    }
    Ok(map)
}

async fn wait_until_served(client: &MetadataClient, mut map: ClusterMap) -> anyhow::Result<ClusterMap> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // A map may be older than what was just proposed.
        if let Ok(newer) = client.map().await {
            map = newer;
        }
        let serving = map
            .volumes
            .values()
            .filter(|volume| matches!(volume.phase, Phase::Serving { .. }))
            .count();
        if serving == VOLUMES {
            return Ok(map);
        }
        ensure!(
            Instant::now() < deadline,
            "{serving} of {VOLUMES} volumes served after two minutes"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Name and nanoseconds of CPU of each thread of a process.
fn thread_times(process: u32) -> anyhow::Result<BTreeMap<u32, (String, u64)>> {
    let mut times = BTreeMap::new();
    let folder = format!("/proc/{process}/task");
    for entry in std::fs::read_dir(&folder).with_context(|| format!("read {folder}"))? {
        let path = entry?.path();
        // A thread may end between the two looks.
        if let Some((thread, time)) = thread_time(&path) {
            times.insert(thread, time);
        }
    }
    Ok(times)
}

fn thread_time(folder: &Path) -> Option<(u32, (String, u64))> {
    let thread = folder.file_name()?.to_str()?.parse().ok()?;
    let text = std::fs::read_to_string(folder.join("schedstat")).ok()?;
    let name = std::fs::read_to_string(folder.join("comm")).ok()?;
    let time = text.split_whitespace().next()?.parse().ok()?;
    Some((thread, (name.trim().to_owned(), time)))
}

/// What a process has in memory.
pub(super) fn resident_bytes(process: u32) -> anyhow::Result<u64> {
    status_bytes(&format!("/proc/{process}/status"), "VmRSS:")
}

/// A line in kB of a process's status.
pub(super) fn status_bytes(path: &str, field: &str) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let kib: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("no {field} in {path}"))?;
    Ok(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_works_uses_cpu_and_memory() {
        let own = std::process::id();
        let spent = || -> u64 { thread_times(own).unwrap().values().map(|(_, time)| time).sum() };
        let before = spent();
        while spent() <= before {
            std::hint::spin_loop();
        }
        assert!(resident_bytes(own).unwrap() > 0);
    }
}
