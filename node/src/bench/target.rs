//! `weft bench target`: an NVMe/TCP target with a memory drive on one core, beside an echo of the same bytes on the
//! same core; the load generator has the other core.

use std::net::SocketAddr;
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::LocalSet;
use weft_block::memory::MemoryDrive;
use weft_block::polling::{SPAN_DEFAULT, keep_awake};
use weft_block::{Device, Durability};
use weft_proto::nqn::Nqn;
use weft_proto::nvme::log::AnaState;
use weft_proto::units::{Lba, MIB};
use weft_target::reservation::ReservedNamespace;
use weft_target::{AllowedHosts, NamespaceConfig, Registry, RegistryConfig, Source, SubsystemConfig, serve};

use super::echo::{Echo, Through};
use super::floor::{noise, noise_in_huge_pages};
use super::host::{Host, QUEUE_ENTRIES, Workload};
use super::machine;
use super::pairs::{Paired, Window, measure};
use super::report::{Heading, Required, Row};
use super::{Output, Plan};

/// Of the drive: the first quarter is written in single blocks, the second one in 128 KiB pieces.
const DRIVE_BYTES: u64 = 256 * MIB;
const BLOCKS: u64 = DRIVE_BYTES / 4096;
const RANDOM_AREA: (u64, u64) = (0, BLOCKS / 4);
const SEQUENTIAL_AREA: (u64, u64) = (BLOCKS / 4, BLOCKS / 4);

const ECHO: &str = "polled TCP echo of the same bytes, same cores, same load generator";
const RING_ECHO: &str = "polled io_uring echo of the same bytes, same cores, same load generator";

/// 128 KiB commands outstanding.
const SEQUENTIAL_DEPTH: usize = 8;

/// Measures the target.
///
/// # Errors
/// A connection or a command fails, or a core cannot be had.
pub(super) fn run(plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    machine::pin(machine::host_core())?;
    let payload: Bytes = noise(128 << 10).into();
    let target = Target::start(SPAN_DEFAULT)?;
    // As much of it as is read, and all of it touched.
    let table = Bytes::from_owner(noise_in_huge_pages(
        ((SEQUENTIAL_AREA.0 + SEQUENTIAL_AREA.1) * 4096) as usize,
    ));

    for connections in [1, 4] {
        let bench = Bench::new(&target, Through::Sockets, connections, &payload, &table)?;
        for depth in [32, 128] {
            for (reads, name) in [(100, "read"), (0, "write"), (70, "70/30")] {
                let workload = random(reads, depth);
                let paired = bench.measure(plan, &workload, |_| {})?;
                let name = format!("4 KiB random {name}, depth {depth}, {}", plural(connections));
                output.row(Row::new(
                    heading(name, "IOPS", Required::RatioAtLeast(0.75)),
                    &paired,
                ));
            }
        }
        if connections == 1 {
            for (reads, name) in [(100, "read"), (0, "write")] {
                // The value compared is the latency, not the rate.
                let paired = bench.measure(plan, &random(reads, 1), |window| {
                    window.value = window.latency.quantile_us(0.5).unwrap_or(f64::NAN);
                })?;
                let name = format!("4 KiB random {name}, depth 1, p50");
                output.row(Row::new(
                    heading(name, "µs", Required::RatioAtMost(1.25)),
                    &paired,
                ));
            }
            for (reads, name) in [(100, "read"), (0, "write")] {
                let workload = Workload {
                    reads,
                    blocks: 32,
                    area: SEQUENTIAL_AREA,
                    sequential: true,
                    depth: SEQUENTIAL_DEPTH,
                };
                let paired = bench.measure(plan, &workload, |window| {
                    window.value *= workload.bytes() as f64 / 1e9;
                })?;
                let name = format!("128 KiB sequential {name}, depth {SEQUENTIAL_DEPTH}");
                output.row(Row::new(
                    heading(name, "GB/s", Required::RatioAtLeast(0.8)),
                    &paired,
                ));
            }
        }
    }
    let bench = Bench::new(&target, Through::Ring, 16, &payload, &table)?;
    for (reads, name) in [(100, "read"), (0, "write")] {
        let paired = bench.measure(plan, &random(reads, 1), |_| {})?;
        let name = format!("4 KiB random {name}, depth 1, {}", plural(16));
        let heading = Heading {
            floor_is: RING_ECHO,
            ..heading(name, "IOPS", Required::RatioAtLeast(0.8))
        };
        output.row(Row::new(heading, &paired));
    }
    Ok(())
}

/// One block each, all over the part of the drive that is for it.
pub(super) fn random(reads: u32, depth: usize) -> Workload {
    Workload {
        reads,
        blocks: 1,
        area: RANDOM_AREA,
        sequential: false,
        depth,
    }
}

fn plural(connections: usize) -> String {
    format!(
        "{connections} connection{}",
        if connections == 1 { "" } else { "s" }
    )
}

fn heading(workload: String, unit: &'static str, required: Required) -> Heading {
    Heading {
        stage: "target",
        workload,
        unit,
        floor_is: ECHO,
        required,
        processes: 1,
        drive_kind: "memory",
    }
}

/// The target and an echo, with the same number of connections to each.
struct Bench {
    // Hosts go before the echo: it ends by itself when it is told to, they by being dropped.
    hosts: std::cell::RefCell<(Host, Host)>,
    echo: Echo,
}

impl Bench {
    fn new(
        target: &Target,
        through: Through,
        connections: usize,
        payload: &Bytes,
        table: &Bytes,
    ) -> anyhow::Result<Self> {
        let echo = Echo::start(through, connections, table.clone())?;
        let hosts = (
            Host::to_echo(echo.address, connections, payload)?,
            Host::to_target(target.address, &subnqn(), connections, payload)?,
        );
        Ok(Self {
            hosts: hosts.into(),
            echo,
        })
    }

    fn measure(
        &self,
        plan: &Plan,
        workload: &Workload,
        value: impl Fn(&mut Window),
    ) -> anyhow::Result<Paired> {
        let floor = || {
            self.echo.set_active(true);
            let window = self.hosts.borrow_mut().0.run(workload, plan.window);
            self.echo.set_active(false);
            let mut window = window.context("echo")?;
            value(&mut window);
            Ok(window)
        };
        let subject = || {
            let mut window = self
                .hosts
                .borrow_mut()
                .1
                .run(workload, plan.window)
                .context("target")?;
            value(&mut window);
            Ok(window)
        };
        measure(plan.pairs, floor, subject)
    }
}

/// The subsystem of a bench target.
pub(super) fn subnqn() -> Nqn {
    "nqn.2026-01.io.weft:bench".parse().expect("a well-formed NQN")
}

/// A registry with `source` as its one namespace, and a listener for it. Within a `LocalSet`.
///
/// # Errors
/// The address, or the registry's.
pub(super) async fn present(source: Source) -> anyhow::Result<(TcpListener, Rc<Registry>)> {
    let registry = registry(source)?;
    Ok((TcpListener::bind("127.0.0.1:0").await?, registry))
}

/// A registry with `source` as its one namespace.
///
/// # Errors
/// The registry's.
pub(super) fn registry(source: Source) -> anyhow::Result<Rc<Registry>> {
    let registry = Registry::new(RegistryConfig {
        queue_entries_max: QUEUE_ENTRIES,
        ..RegistryConfig::default()
    });
    registry.add_subsystem(SubsystemConfig {
        nqn: subnqn(),
        serial: "bench-1".into(),
        model: "Weft bench".into(),
        hosts: AllowedHosts::Any,
        namespaces_max: 1,
    })?;
    registry.add_namespace(
        &subnqn(),
        NamespaceConfig {
            nsid: 1,
            uuid: *b"weft-bench-ns-01",
            ana_group: 1,
            ana_state: AnaState::OPTIMIZED,
            source,
        },
    )?;
    Ok(registry)
}

/// A drive under reservations, as every drive of a cluster is.
///
/// # Errors
/// The reservation table's.
pub(super) fn drive(device: Device) -> anyhow::Result<Source> {
    Ok(Source::Reserved(ReservedNamespace::open(
        device,
        *b"weft-bench-ns-01",
        None,
    )?))
}

/// A target with a memory drive, on a thread of its own.
pub(super) struct Target {
    pub(super) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    join: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Target {
    /// Which stays awake for `polling` after each activity.
    pub(super) fn start(polling: Duration) -> anyhow::Result<Self> {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let join = std::thread::Builder::new().name("target".into()).spawn(move || {
            machine::pin(machine::SUBJECT_CORE)?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            LocalSet::new().block_on(&runtime, async move {
                let device = MemoryDrive::preallocated(DRIVE_BYTES);
                fill(&device).await?;
                let (listener, registry) = present(drive(device)?).await?;
                tokio::task::spawn_local(keep_awake(polling));
                ready.send(listener.local_addr()?)?;
                tokio::select! {
                    served = serve(listener, registry) => served?,
                    _ = stopped => {}
                }
                Ok(())
            })
        })?;
        let Ok(address) = is_ready.recv_timeout(Duration::from_secs(30)) else {
            match join.join() {
                Ok(Err(error)) => return Err(error),
                _ => bail!("the target did not start"),
            }
        };
        Ok(Self {
            address,
            stop: Some(stop),
            join: Some(join),
        })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(join) = self.join.take() {
            // What it answered has been measured already.
            let _ = join.join();
        }
    }
}

/// Writes all of the drive, as a host would: the first quarter block by block, the rest in 128 KiB pieces.
async fn fill(device: &Device) -> anyhow::Result<()> {
    let payload = Bytes::from(noise(128 << 10));
    for block in 0..RANDOM_AREA.1 {
        let data = payload.slice(..4096);
        device.write(Lba(block), vec![data], Durability::Durable).await?;
    }
    for block in (SEQUENTIAL_AREA.0..BLOCKS).step_by(32) {
        device
            .write(Lba(block), vec![payload.clone()], Durability::Durable)
            .await?;
    }
    Ok(())
}
