//! `weft demo`: the main job in one command, on one machine, with real processes and real sockets.
//!
//! A cluster of agents on loopback addresses, a 4+2 volume, and a plain NVMe/TCP host with multipath that reaches
//! data only through sockets. While its reads and writes are outstanding a storage node and then the owner get
//! SIGKILL; the volume moves; a node is added; all agents are killed at once and restarted. Every byte is compared.

mod host;
mod input;
mod load;
mod report;
mod scrape;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use weft_metadata::client::MetadataClient;
use weft_metadata::service::voters_among;
use weft_metadata::state::map::{Drive, Phase, Volume};
use weft_metadata::state::{ClusterMap, Command as Proposal};
use weft_proto::grpc::admin::admin_client::AdminClient;
use weft_proto::grpc::admin::{InitRequest, JoinRequest};
use weft_proto::units::Lba;

use crate::args::DemoArgs;
use crate::cli::output::print_all;
use crate::config::EngineConfig;
use crate::local_cluster::{Agents, Options};
use host::Host;
use input::Input;
use load::{Load, Probe};
use report::Report;
use scrape::Samples;

/// The volume's name.
const VOLUME: &str = "demo";

/// How long any single step may take before the demo says it failed. Generous: a slow machine is not a failure.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// A command that takes longer counts as failed, as the host's user would see it.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// Blocks at the volume's end that only probes use.
const PROBE_BLOCKS: u64 = 4;

/// Runs the demo; prints a summary, or one JSON line. Returns the exit code.
pub(crate) async fn run(args: DemoArgs, json: bool) -> u8 {
    let began = Instant::now();
    let mut report = Report::default();
    let outcome = demo(&args, &mut report, json).await;
    report.seconds = began.elapsed().as_secs_f64();
    if let Err(error) = &outcome {
        report.error = Some(format!("{error:#}"));
    }
    if json {
        print_all(&format!(
            "{}\n",
            serde_json::to_string(&report).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
        ));
    } else {
        print_all(&format!("\n{}\n", report.summary()));
    }
    match outcome {
        Ok(()) => {
            eprintln!("every byte came back");
            0
        }
        Err(error) => {
            eprintln!("weft demo: {error:#}");
            1
        }
    }
}

/// What every step works on.
struct Demo<'a> {
    agents: Agents,
    client: MetadataClient,
    host: Host,
    load: Rc<Load>,
    bar: ProgressBar,
    report: &'a mut Report,
    probe_block: u64,
}

async fn demo(args: &DemoArgs, report: &mut Report, json: bool) -> anyhow::Result<()> {
    let path = match &args.input {
        Some(path) => path.clone(),
        None => Input::default_path()?,
    };
    let input = Input::open(&path)?;
    report.input = path.display().to_string();
    report.input_bytes = input.bytes();
    let raw = u64::from(args.nodes * args.drives) * args.drive_size;
    ensure!(
        input.bytes() * 3 < raw,
        "the input has {} bytes, and {} drives of {} bytes are too small for it at 4+2 with room to recover; raise --drive-size",
        input.bytes(),
        args.nodes * args.drives,
        args.drive_size
    );
    let folder = match &args.dir {
        Some(path) => Folder::Given(path.clone()),
        None => Folder::Temporary(
            tempfile::Builder::new()
                .prefix("weft-demo-")
                .tempdir()
                .context("make a temporary folder")?,
        ),
    };
    let options = Options {
        program: std::env::current_exe().context("find this program")?,
        keep: args.keep,
        drives: args.drives,
        drive_bytes: args.drive_size,
        engine: EngineConfig::default(),
        fabric: Default::default(),
        first_address: None,
        namespaces: Vec::new(),
    };
    let mut agents = Agents::new(folder.path(), options)?;
    say(
        json,
        &format!(
            "{} nodes with {} drives each in {}",
            args.nodes,
            args.drives,
            folder.path().display()
        ),
    );
    for _ in 0..args.nodes {
        agents.add()?;
    }
    let addresses = agents.control_addresses();
    let client = MetadataClient::new(addresses.clone());
    let voters = form_cluster(&addresses).await?;
    wait_for(&client, "every agent is registered on every drive", |map| {
        let registered =
            |drive: &&Drive| map.in_service(drive) && drive.registrations.len() >= args.nodes as usize;
        crate::view::drives(map).filter(registered).count() == (args.nodes * args.drives) as usize
    })
    .await?;
    wait_for_voters(&client, voters).await?;
    let volume = create_volume(&client, input.bytes()).await?;
    let host = Host::connect(&volume, &agents).await?;
    let probe_block = load::span_bytes(input.bytes()) / 4096;
    let bar = progress_bar(input.bytes(), json);
    let load = Load::new(host.device(), input);
    let tasks = load.start();
    let mut demo = Demo {
        agents,
        client,
        host,
        load,
        bar,
        report,
        probe_block,
    };
    let outcome = demo.story(json).await;
    demo.load.stop();
    for task in tasks {
        // After a failure a command may be stuck; the report must not wait for it.
        let _ = tokio::time::timeout(COMMAND_LIMIT, task).await;
    }
    demo.report.io_errors = demo.load.io_errors.get();
    demo.report.host_retries += demo.host.retries();
    demo.bar.finish_and_clear();
    outcome.map_err(|error| match demo.agents.first_dead() {
        Some(sentence) => error.context(sentence),
        None => error,
    })?;
    if args.keep {
        print_keep(&demo, &volume, folder.keep()).await?;
    }
    Ok(())
}

impl Demo<'_> {
    /// The steps, in order.
    async fn story(&mut self, json: bool) -> anyhow::Result<()> {
        self.load.write_up_to(10).await;
        self.check()?;

        say(json, "kill a storage node with reads and writes outstanding");
        self.load.allow_up_to(30);
        let storage = self.storage_node().await?;
        self.kill_under_load(storage)?;
        self.load.write_up_to(30).await;
        self.check()?;
        self.agents.start(storage)?;
        self.wait_until_up(storage).await?;

        say(json, "kill the owner with reads and writes outstanding");
        self.load.allow_up_to(60);
        let owner = self.owner().await?;
        let killed_at = Instant::now();
        self.kill_under_load(owner)?;
        load::round_trip(&self.host.device(), Lba(self.probe_block), 0xa5)
            .await
            .map_err(anyhow::Error::msg)?;
        self.report.failover_ms = killed_at.elapsed().as_secs_f64() * 1e3;
        self.load.write_up_to(60).await;
        self.check()?;
        self.agents.start(owner)?;
        self.wait_until_up(owner).await?;

        say(json, "move the volume under I/O");
        self.move_volume().await?;
        self.load.write_up_to(80).await;
        self.check()?;

        say(json, "add a storage node");
        self.add_node().await?;
        self.load.write_up_to(100).await;
        self.check()?;
        self.load.pause().await;
        self.measure_writes().await?;

        say(json, "kill all agents and restart them");
        for index in 0..self.agents.list.len() {
            self.agents.kill(index)?;
        }
        for index in 0..self.agents.list.len() {
            self.agents.start(index)?;
        }
        wait_for(&self.client, "the volume is served again", |map| {
            serving(map).is_some()
        })
        .await?;

        say(json, "read everything back through a new connection");
        self.read_back().await?;
        self.scrape_all().await?;
        self.report.nodes = self.agents.list.len();
        self.check()
    }

    /// Fails as soon as the host saw an error, a difference or a command that took too long.
    fn check(&mut self) -> anyhow::Result<()> {
        self.bar.set_position(self.load.written_bytes());
        if let Some(sentence) = self.load.failure() {
            bail!(sentence);
        }
        if let Some(sentence) = self.agents.first_dead() {
            bail!(sentence);
        }
        ensure!(
            self.load.slowest() <= COMMAND_LIMIT,
            "a host command took {:.1} s",
            self.load.slowest().as_secs_f64()
        );
        Ok(())
    }

    fn kill_under_load(&mut self, index: usize) -> anyhow::Result<()> {
        let (writes, reads) = (
            self.load.writes_outstanding.get(),
            self.load.reads_outstanding.get(),
        );
        self.agents.kill(index)?;
        let name = self.agents.list[index].config.name.clone();
        self.bar
            .suspend(|| eprintln!("  killed {name} with {writes} writes and {reads} reads outstanding"));
        self.report.killed.push(name);
        self.report.outstanding_at_kill.push(writes + reads);
        Ok(())
    }

    async fn volume(&self) -> anyhow::Result<(ClusterMap, Volume)> {
        let map = self.client.map().await.context("read the cluster map")?;
        let volume = map.volume_named(VOLUME).context("the volume is gone")?.clone();
        Ok((map, volume))
    }

    async fn owner(&self) -> anyhow::Result<usize> {
        let (map, volume) = self.volume().await?;
        let owner = volume.phase.owner().context("the volume has no owner")?;
        let name = &map.nodes.get(&owner.node).context("the owner is no node")?.name;
        self.agents
            .index_of(name)
            .context("the owner is no agent of the demo")
    }

    /// A node that does not own the volume.
    async fn storage_node(&self) -> anyhow::Result<usize> {
        let owner = self.owner().await?;
        (0..self.agents.list.len())
            .rev()
            .find(|index| *index != owner)
            .context("there is only one node")
    }

    async fn wait_until_up(&self, index: usize) -> anyhow::Result<()> {
        let name = self.agents.list[index].config.name.clone();
        wait_for(&self.client, &format!("{name} is back"), |map| {
            map.node_named(&name).is_some_and(|node| {
                crate::view::node_is_up(node)
                    && crate::view::drives(map)
                        .filter(|drive| drive.home == weft_metadata::state::map::DriveHome::Node(node.id))
                        .all(|drive| map.in_service(drive))
            })
        })
        .await
    }

    async fn move_volume(&mut self) -> anyhow::Result<()> {
        let (map, volume) = self.volume().await?;
        let owner = volume.phase.owner().context("the volume has no owner")?.node;
        let target = map
            .nodes
            .values()
            .find(|node| node.id != owner && crate::view::node_is_up(node))
            .context("no node to move to")?
            .id;
        self.load.allow_up_to(70);
        let before = self.scrape().await?;
        let host_before = self.load.host_bytes_written.get();
        let probe = Probe::start(self.host.device(), Lba(self.probe_block + 1));
        tokio::time::sleep(Duration::from_millis(300)).await;
        probe.reset();
        self.client
            .propose(Proposal::RequestMove {
                volume: volume.id,
                to: Some(target),
            })
            .await
            .context("request the move")?;
        wait_for(&self.client, "the volume has moved", |map| {
            map.volume_named(VOLUME).is_some_and(
                |volume| matches!(volume.phase, Phase::Serving { owner } if owner.node == target),
            )
        })
        .await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        self.report.move_pause_ms = probe.finish()?.as_secs_f64() * 1e3;
        self.load.pause().await;
        let after = self.scrape().await?;
        let host_payload = self.load.host_bytes_written.get() - host_before + probe.bytes_written.get();
        self.load.resume();
        let delta = |kind: &str| {
            let of = |samples: &Samples| samples.sum_where(host::DRIVE_BYTES, "kind", kind);
            (of(&after) - of(&before)).max(0.0) as u64
        };
        let total = (after.sum(host::DRIVE_BYTES) - before.sum(host::DRIVE_BYTES)).max(0.0) as u64;
        self.report.move_bytes_copied = delta("copy");
        self.report.move_bytes_host = delta("user");
        self.report.move_bytes_drive = total;
        self.report.move_bytes_metadata = total - self.report.move_bytes_copied - self.report.move_bytes_host;
        tracing::info!(host_payload, "host payload during the move");
        Ok(())
    }

    async fn add_node(&mut self) -> anyhow::Result<()> {
        self.report.capacity_before_bytes = self.usable_bytes().await?;
        let index = self.agents.add()?;
        let addresses = self.agents.control_addresses();
        join(&addresses[index], &addresses[..index]).await?;
        self.wait_until_up(index).await?;
        self.report.capacity_after_bytes = self.usable_bytes().await?;
        ensure!(
            self.report.capacity_after_bytes > self.report.capacity_before_bytes,
            "usable capacity did not grow: {} bytes before, {} after",
            self.report.capacity_before_bytes,
            self.report.capacity_after_bytes
        );
        Ok(())
    }

    async fn usable_bytes(&self) -> anyhow::Result<u64> {
        let status = self.client.status().await.context("read the status")?;
        Ok(status.pools.values().map(|pool| pool.usable_bytes()).sum())
    }

    /// Samples of all agents that run.
    async fn scrape(&self) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        for agent in self.agents.list.iter().filter(|agent| agent.runs()) {
            samples.scrape(agent.config.metrics_listen).await?;
        }
        Ok(samples)
    }

    /// Write cost and stripe shapes. Counters end with their process, so agents that were killed are missing in them:
    /// both sides of the ratio are the engines' own counters.
    async fn measure_writes(&mut self) -> anyhow::Result<()> {
        let samples = self.scrape().await?;
        let user = samples.sum(host::USER_BYTES);
        let drives = samples.sum(host::DRIVE_BYTES);
        self.report.bytes_per_user_byte = if user > 0.0 { drives / user } else { 0.0 };
        let histogram = |label: &str| -> BTreeMap<String, u64> {
            samples
                .by_label(host::STRIPES, label)
                .into_iter()
                .map(|(key, count)| (key, count as u64))
                .collect()
        };
        self.report.stripe_width = histogram("w");
        self.report.stripe_depth = histogram("d");
        Ok(())
    }

    async fn read_back(&mut self) -> anyhow::Result<()> {
        let (_, volume) = self.volume().await?;
        let fresh = Host::connect(&volume, &self.agents).await?;
        self.report.sha256_written = self.load.sha256_written();
        self.bar.set_position(0);
        let device = fresh.device();
        let read = self.load.read_all(&device, |at| self.bar.set_position(at));
        self.report.sha256_read = read.await.context("read everything back")?;
        self.report.host_retries += fresh.retries();
        ensure!(
            self.report.sha256_read == self.report.sha256_written,
            "what was read back differs from what was written"
        );
        Ok(())
    }

    async fn scrape_all(&mut self) -> anyhow::Result<()> {
        let samples = self.scrape().await?;
        self.report.metrics_series = samples.series_count();
        ensure!(samples.series_count() > 0, "the agents export no metrics");
        Ok(())
    }
}

/// `weft init` on the first agent and `weft join` on the others; answers how many members shall vote.
async fn form_cluster(addresses: &[String]) -> anyhow::Result<usize> {
    let voters = voters_among(5, addresses.len()).context("no agents")?;
    let request = InitRequest {
        cluster_name: "demo".to_owned(),
        voters: u32::try_from(voters)?,
        force: false,
    };
    admin(&addresses[0]).await?.init(request).await.context("init")?;
    for address in &addresses[1..] {
        join(address, &addresses[..1]).await?;
    }
    Ok(voters)
}

/// The members that join become voters one after the other: before that the first one cannot be spared.
async fn wait_for_voters(client: &MetadataClient, count: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + STEP_LIMIT;
    loop {
        let voters = client.status().await.map_or(0, |status| status.voters.len());
        if voters >= count {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{voters} of {count} members vote after {} s",
            STEP_LIMIT.as_secs()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn join(agent: &str, members: &[String]) -> anyhow::Result<()> {
    let request = JoinRequest {
        members: members.to_vec(),
        force: false,
    };
    admin(agent)
        .await?
        .join(request)
        .await
        .with_context(|| format!("join of {agent}"))?;
    Ok(())
}

async fn admin(address: &str) -> anyhow::Result<AdminClient<tonic::transport::Channel>> {
    let deadline = Instant::now() + STEP_LIMIT;
    loop {
        match AdminClient::connect(format!("http://{address}")).await {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("agent {address}"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn create_volume(client: &MetadataClient, input_bytes: u64) -> anyhow::Result<Volume> {
    let map = client.map().await.context("read the cluster map")?;
    let size = (load::span_bytes(input_bytes) + PROBE_BLOCKS * 4096).next_multiple_of(1 << 30);
    client
        .propose(crate::cli::new_volume(
            &map,
            VOLUME,
            "default",
            size,
            None,
            4096,
            [host::host_nqn()],
        )?)
        .await
        .context("create the volume")?;
    wait_for(client, "the volume is served", |map| serving(map).is_some()).await?;
    let map = client.map().await.context("read the cluster map")?;
    map.volume_named(VOLUME).cloned().context("the volume is gone")
}

fn serving(map: &ClusterMap) -> Option<&Volume> {
    map.volume_named(VOLUME)
        .filter(|volume| matches!(volume.phase, Phase::Serving { .. }))
}

/// Waits until the cluster map satisfies `condition`.
async fn wait_for(
    client: &MetadataClient,
    what: &str,
    condition: impl Fn(&ClusterMap) -> bool,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + STEP_LIMIT;
    loop {
        if let Ok(Ok(map)) = tokio::time::timeout(Duration::from_secs(5), client.map()).await
            && condition(&map)
        {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "waited {} s until {what}, in vain",
            STEP_LIMIT.as_secs()
        );
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

fn progress_bar(bytes: u64, json: bool) -> ProgressBar {
    if json {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("  {bar:40} {bytes}/{total_bytes} {bytes_per_sec}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes).with_style(style)
}

fn say(json: bool, text: &str) {
    if json {
        tracing::info!("{text}");
    } else {
        eprintln!("· {text}");
    }
}

/// Where the cluster lives.
enum Folder {
    Given(PathBuf),
    Temporary(tempfile::TempDir),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Temporary(folder) => folder.path(),
        }
    }

    /// Leaves the folder where it is.
    fn keep(self) -> PathBuf {
        match self {
            Self::Given(path) => path,
            Self::Temporary(folder) => folder.keep(),
        }
    }
}

async fn print_keep(demo: &Demo<'_>, volume: &Volume, folder: PathBuf) -> anyhow::Result<()> {
    let (map, _) = demo.volume().await?;
    let cluster = demo.agents.control_addresses().join(",");
    eprintln!("\nthe cluster stays up in {}", folder.display());
    eprintln!("  weft --cluster {cluster} status");
    eprintln!("  weft --cluster {cluster} volume attach {VOLUME} --host \"$(cat /etc/nvme/hostnqn)\"");
    eprintln!("then, as root on this machine:");
    for line in crate::cli::connect_lines(&map, volume) {
        eprintln!("  {line}");
    }
    eprintln!("end it with: pkill -f 'weft agent --config {}'", folder.display());
    Ok(())
}
