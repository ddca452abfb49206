//! `weft bench cluster`: six targets with memory drives, the owner of a 4+2 volume on them, and a host, each a process
//! of its own on the same cores, over loopback; beside one target of `weft bench target`.
//!
//! The processes are the data path of agents without their control side: targets, initiator and engine as agents use
//! them, with a directory in memory. No metadata service, no fencing.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use weft_block::polling::SPAN_DEFAULT;

use super::floor::noise;
use super::host::{Host, Idle, Workload};
use super::pairs::{Window, measure};
use super::peer::GEOMETRY;
use super::report::{Heading, Required, Row};
use super::target::{Target, random, subnqn};
use super::{Output, Plan, machine, trips};

const DRIVES: usize = 6;

/// Measures the cluster.
///
/// # Errors
/// A process does not start, a command fails.
pub(super) fn run(plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    let mut cluster = Cluster::start()?;
    let target = Target::start(SPAN_DEFAULT)?;
    let sleeping = Target::start(Duration::ZERO)?;
    let payload: Bytes = noise(128 << 10).into();
    let mut single = Host::to_target(target.address, &subnqn(), 1, &payload)?;
    let owner = cluster.owner.as_ref().context("the owner runs")?.address;
    let mut whole = Host::to_target(owner, &subnqn(), 1, &payload)?;
    whole.idle = Idle::Sleep;

    for (reads, name, required) in [(0, "write", 0.25), (100, "read", 0.35)] {
        let workload = random(reads, 128);
        let paired = measure(
            plan.pairs,
            || single.run(&workload, plan.window),
            || cluster.window(&mut whole, &workload, plan.window),
        )?;
        let floor_is = "one NVMe/TCP target with a memory drive, polling load generator";
        output.row(Row::new(
            heading(
                format!("4+2, 4 KiB random {name}, depth 128"),
                "IOPS",
                floor_is,
                Required::RatioAtLeast(required),
            ),
            &paired,
        ));
    }
    let mut single = Host::to_target(sleeping.address, &subnqn(), 1, &payload)?;
    single.idle = Idle::Sleep;
    let workload = random(0, 1);
    let p50 = |window: anyhow::Result<Window>| {
        let mut window = window?;
        window.value = window.latency.quantile_us(0.5).unwrap_or(f64::NAN);
        Ok(window)
    };
    let paired = measure(
        plan.pairs,
        || p50(single.run(&workload, plan.window)),
        || p50(cluster.window(&mut whole, &workload, plan.window)),
    )?;
    output.row(Row::new(
        heading(
            "4+2, 4 KiB random write, depth 1, p50".to_owned(),
            "µs",
            "one NVMe/TCP hop, both ends sleep",
            Required::RatioAtMost(3.0),
        ),
        &paired,
    ));
    count_trips(&mut cluster, whole, output)
}

/// That a write at depth 1 is two round trips one after the other: from the host to the owner, and from there to the
/// drives.
fn count_trips(cluster: &mut Cluster, host: Host, output: &mut Output) -> anyhow::Result<()> {
    // A target that asks for a write's data asks for one more trip.
    let to_owner = 1 + u64::from(host.asked_for_data());
    drop(host);
    // The drives take one owner at a time.
    drop(cluster.owner.take());
    let addresses: Vec<SocketAddr> = cluster.drives.iter().map(|peer| peer.address).collect();
    let owner = trips::count(GEOMETRY, &addresses)?;
    let workload = "4+2, 4 KiB random write, depth 1, trips".to_owned();
    output.row(Row::counted(
        heading(
            workload,
            "trips",
            "one to the owner, one to the drives",
            Required::ValueAtMost(2.0),
        ),
        (to_owner + owner.trips) as f64,
        2.0,
    ));
    output.note(format!(
        "cluster: a write at depth 1 takes {to_owner} trip to the owner and {} to the drives, {:.2} commands",
        owner.trips, owner.commands
    ));
    Ok(())
}

fn heading(workload: String, unit: &'static str, floor_is: &'static str, required: Required) -> Heading {
    Heading {
        stage: "cluster",
        workload,
        unit,
        floor_is,
        required,
        processes: DRIVES as u32 + 2,
        drive_kind: "memory",
    }
}

struct Cluster {
    owner: Option<Peer>,
    drives: Vec<Peer>,
}

impl Cluster {
    /// Each process has its core, as an agent's data thread has. What the rate hangs on is the owner, so it has one, and the others
    /// share the host's. Processes inherit the core of this thread, which is on the host's afterwards.
    fn start() -> anyhow::Result<Self> {
        let host_core = machine::host_core();
        machine::pin(host_core)?;
        let drives = (0..DRIVES)
            .map(|_| Peer::start(&[]))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let addresses: Vec<SocketAddr> = drives.iter().map(|peer| peer.address).collect();
        machine::pin(machine::SUBJECT_CORE)?;
        let owner = Peer::start(&addresses).context("owner")?;
        machine::pin(host_core)?;
        Ok(Self {
            owner: Some(owner),
            drives,
        })
    }

    /// A window of the host, with the CPU of all other processes as the target's.
    fn window(&self, host: &mut Host, workload: &Workload, window: Duration) -> anyhow::Result<Window> {
        let before = self.cpu();
        let mut measured = host.run(workload, window)?;
        let operations: f64 = measured.latency.count() as f64;
        measured.cpu.target = before
            .zip(self.cpu())
            .map(|(before, after)| (after - before).as_secs_f64() * 1e6 / operations);
        Ok(measured)
    }

    fn cpu(&self) -> Option<Duration> {
        self.drives.iter().chain(&self.owner).map(Peer::cpu).sum()
    }
}

/// A process of the cluster. It ends with this value.
struct Peer {
    address: SocketAddr,
    child: Child,
}

impl Peer {
    fn start(drives: &[SocketAddr]) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("bench-peer")
            .args(drives.iter().map(SocketAddr::to_string))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a process of the cluster")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        match line.trim().parse() {
            Ok(address) => Ok(Self { address, child }),
            Err(_) => {
                drop(child.stdin.take());
                child.wait()?;
                anyhow::bail!("a process of the cluster did not start")
            }
        }
    }

    /// CPU time of its one data thread.
    fn cpu(&self) -> Option<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{}/schedstat", self.child.id())).ok()?;
        text.split_whitespace()
            .next()?
            .parse()
            .ok()
            .map(Duration::from_nanos)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // It ends by itself; there is nobody to tell how.
        let _ = self.child.wait();
    }
}
