//! Real agents under a seeded nemesis: `chaos --minutes M --seed S [--json]`.
//!
//! Seven agents with a drive each, two 4+2 volumes. Clients record what they write and read while agents are killed,
//! stopped and resumed, a drive rots or vanishes, and owners move; and, where it is root, agents are cut off from each other, a drive
//! is full, or slow. At the end everything is healed, every block is read back
//! through three nodes, and the whole history has to be one that a correct volume could have given. The last line says
//! how it went; the exit status is non-zero if anything failed, and then the folder with logs and history is kept.
//!
//! The program is also the agent that it starts, so that both are always of one build.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use serde_json::json;
use weft_chaos::checker::{self, Violation};
use weft_chaos::clients::{self, Harvest, VOLUME_BYTES, Volume, Watch};
use weft_chaos::history;
use weft_chaos::isolation::{Networks, SmallFileSystem, Throttle};
use weft_chaos::mirror::Mirror;
use weft_chaos::nemesis::{Nemesis, Tools};
use weft_node::config::EngineConfig;
use weft_node::local_cluster::{Agents, Options};

/// Nodes of the cluster: one more than a 4+2 band needs, so that a lost drive can be replaced in new bands.
const NODES: u32 = 7;
/// Voters: as many may be hurt at once as of a band's drives.
const VOTERS: u32 = 5;
/// Bytes of each drive file (sparse).
const DRIVE_BYTES: u64 = 768 << 20;
/// Volumes.
const VOLUMES: u16 = 2;
/// Blocks whose violations are printed whole.
const SHOWN: usize = 4;

#[derive(Parser)]
#[command(about = "Hurts a cluster of real agents and checks every answer its hosts got")]
struct Args {
    /// How long faults are injected, in minutes.
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// What decides the faults and the load.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Longest pause of a client between commands, in milliseconds: long runs need not wear out the machine.
    #[arg(long, default_value_t = clients::THINK_MAX.as_millis() as u64)]
    think_ms: u64,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Keep the folder of a run that passed, too.
    #[arg(long)]
    keep: bool,
    /// Agents at loopback addresses and no faults that only root can do, even as root.
    #[arg(long)]
    loopback: bool,
    /// The `weft` program to run agents with, instead of the one in this program.
    #[arg(long)]
    weft: Option<PathBuf>,
}

fn main() -> ExitCode {
    // An agent, or a command of the cluster's.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|first| first == "agent" || first == "--cluster")
    {
        return weft_node::main();
    }
    let args = Args::parse();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that is said about a run.
#[derive(Default)]
struct Report {
    faults: BTreeMap<&'static str, u64>,
    moves_finished: usize,
    harvest: Harvest,
    violations: Vec<Violation>,
    /// Blocks that were compared with the mirror file.
    mirrored: u64,
    /// What else must not happen: agents that end, a cluster that does not heal.
    failures: Vec<String>,
}

impl Report {
    fn passed(&self) -> bool {
        self.violations.is_empty() && self.failures.is_empty() && self.harvest.io_errors.is_empty()
    }
}

fn run(args: &Args) -> anyhow::Result<bool> {
    let mut folder = tempfile::Builder::new().prefix("weft-chaos-").tempdir()?;
    eprintln!("cluster in {}, seed {}", folder.path().display(), args.seed);
    let began = Instant::now();
    let report = torment(args, folder.path(), began)?;
    let passed = report.passed();
    if !passed {
        let path = folder.path().join("history.txt");
        let mut file = std::io::BufWriter::new(std::fs::File::create(&path)?);
        history::write_text(&report.harvest.history, &mut file)?;
        file.flush()?;
    }
    folder.disable_cleanup(args.keep || !passed);
    print(args, &report, folder.path());
    Ok(passed)
}

/// Forms the cluster, hurts it under load, heals it, reads everything back and checks.
fn torment(args: &Args, folder: &std::path::Path, began: Instant) -> anyhow::Result<Report> {
    let tools = tools(args, folder);
    let agents = form(args, folder, &tools)?;
    let volumes = create_volumes(&agents)?;
    let watch = Arc::new(Watch {
        began,
        stop: AtomicBool::new(false),
        answered: AtomicU64::new(0),
        mirror: Mirror::new(VOLUME_BYTES)?,
    });
    let until = Instant::now() + Duration::from_secs_f64(args.minutes * 60.0);
    let mut nemesis = Nemesis::new(agents, &volumes, args.seed, began, until, tools);
    let nodes = nemesis.nvme_addresses();
    let hosts = {
        let (volumes, nodes, watch, seed) = (volumes.clone(), nodes.clone(), watch.clone(), args.seed);
        let think = Duration::from_millis(args.think_ms);
        std::thread::spawn(move || clients::run(&volumes, &nodes, seed, think, &watch))
    };
    let mut told = Instant::now();
    let raged = nemesis.rage(until, || {
        if told.elapsed() > Duration::from_secs(15) {
            told = Instant::now();
            let answered = watch.answered.load(Ordering::Relaxed);
            eprintln!(
                "{:9.3} s  {answered} commands answered",
                began.elapsed().as_secs_f64()
            );
        }
        !hosts.is_finished()
    });
    // The load goes on while the cluster heals, and ends on a whole one: then every command has its answer.
    let healed = raged.and_then(|()| nemesis.heal());
    watch.stop.store(true, Ordering::Relaxed);
    let mut report = Report::default();
    match hosts.join() {
        Ok(Ok(harvest)) => report.harvest = harvest,
        Ok(Err(error)) => report.failures.push(format!("the hosts: {error:#}")),
        Err(_) => report.failures.push("a host panicked".to_owned()),
    }
    match healed {
        Ok(()) => match clients::read_back(&volumes, &nodes[..3], &watch) {
            Ok(last) => {
                report.harvest.history.extend(last.history);
                report.harvest.io_errors.extend(last.io_errors);
                report.harvest.commands += last.commands;
            }
            Err(error) => report.failures.push(format!("read back: {error:#}")),
        },
        Err(error) => report.failures.push(format!("{error:#}")),
    }
    let (mirrored, differences) = watch.mirror.result();
    report.mirrored = mirrored;
    report.failures.extend(differences);
    report.failures.append(&mut nemesis.failures);
    report.moves_finished = nemesis.moved;
    report.faults = std::mem::take(&mut nemesis.faults);
    report.violations = checker::check(&report.harvest.history);
    Ok(report)
}

/// The node whose drive has a file system of its own.
const SMALL_NODE: usize = 6;

/// What this machine lets a nemesis do besides signals. What it does not is said, and done without.
fn tools(args: &Args, folder: &std::path::Path) -> Tools {
    fn or_without<T>(what: &str, tool: anyhow::Result<T>) -> Option<T> {
        tool.inspect_err(|error| eprintln!("without {what}: {error:#}"))
            .ok()
    }
    if args.loopback || !rustix::process::geteuid().is_root() {
        return Tools::default();
    }
    // Its drive alone: an agent whose own files find no room is another story.
    let small = || -> anyhow::Result<SmallFileSystem> {
        let (mounted, node) = (folder.join("small"), folder.join(format!("n{}", SMALL_NODE + 1)));
        let small = SmallFileSystem::new(&mounted, DRIVE_BYTES + (64 << 20))?;
        std::fs::create_dir_all(&node)?;
        std::os::unix::fs::symlink(mounted.join("drive1.img"), node.join("drive1.img"))?;
        Ok(small)
    };
    Tools {
        networks: or_without("partitions", Networks::new(NODES as usize)),
        throttle: or_without("slow drives", Throttle::new(folder)),
        small: or_without("full drives", small()).map(|small| (SMALL_NODE, small)),
    }
}

fn form(args: &Args, folder: &std::path::Path, tools: &Tools) -> anyhow::Result<Agents> {
    let program = match &args.weft {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("find this program")?,
    };
    let options = Options {
        program,
        keep: false,
        drives: 1,
        drive_bytes: DRIVE_BYTES,
        engine: EngineConfig {
            // Checkpoints, and with them compaction, every few seconds of this load.
            log_budget_mib: 8,
            ..EngineConfig::default()
        },
        fabric: Default::default(),
        first_address: None,
        namespaces: tools.networks.as_ref().map(Networks::hosts).unwrap_or_default(),
    };
    let mut agents = Agents::new(folder, options)?;
    for _ in 0..NODES {
        agents.add()?;
    }
    agents.form(VOTERS)?;
    Ok(agents)
}

fn create_volumes(agents: &Agents) -> anyhow::Result<Vec<Volume>> {
    let size = VOLUME_BYTES.to_string();
    let mut volumes = Vec::new();
    for index in 0..VOLUMES {
        let name = format!("v{index}");
        agents.weft_ok(&["volume", "create", &name, "--size", &size, "--ec", "4+2"])?;
        let mut subnqn = None;
        for host in clients::hosts(index) {
            let host = clients::host_nqn(host).to_string();
            let attached = agents.weft_json(&["volume", "attach", &name, "--host", &host])?;
            subnqn = attached["subnqn"].as_str().map(str::to_owned);
        }
        agents.wait_until("the volume is served", |agents| {
            agents
                .weft_ok(&["volume", "show", &name])
                .is_ok_and(|text| text.contains("serving"))
        })?;
        volumes.push(Volume {
            index,
            name,
            subnqn: subnqn.context("attach prints the subsystem")?.parse()?,
        });
    }
    Ok(volumes)
}

fn print(args: &Args, report: &Report, folder: &std::path::Path) {
    let harvest = &report.harvest;
    for violation in report.violations.iter().take(SHOWN) {
        eprintln!("\nviolation: {violation}");
    }
    for sentence in harvest.io_errors.iter().take(20) {
        eprintln!("i/o error: {sentence}");
    }
    for sentence in &report.failures {
        eprintln!("failure: {sentence}");
    }
    let kept = (args.keep || !report.passed()).then(|| folder.display().to_string());
    if let Some(kept) = &kept {
        eprintln!("kept: {kept}");
    }
    let (longest, asked) = harvest.longest;
    let summary = json!({
        "passed": report.passed(),
        "seed": args.seed,
        "minutes": args.minutes,
        "faults": report.faults,
        "moves_finished": report.moves_finished,
        "commands": harvest.commands,
        "operations_checked": harvest.history.len(),
        "blocks_mirrored": report.mirrored,
        "unknown_outcomes": harvest.unknown,
        "plain_host_errors": harvest.plain_errors,
        "host_retries": harvest.retries,
        "violations": report.violations.len(),
        "io_errors": harvest.io_errors.len(),
        "failures": report.failures.len(),
        "longest_pause_ms": longest.as_millis(),
        "longest_pause_at_s": asked.as_secs_f64(),
        "folder": kept,
    });
    if args.json {
        println!("{summary}");
    } else if let Some(fields) = summary.as_object() {
        for (name, value) in fields {
            println!("{name:20} {value}");
        }
    }
}
