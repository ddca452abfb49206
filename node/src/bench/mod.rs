//! `weft bench`: each stage of the data path beside the floor it cannot beat, measured in the same run.
//!
//! A ratio holds on any machine where a rate does not, so every row is a number of pairs: floor and subject in turn,
//! for a short window each, in one process on the same cores. The row's ratio is the median of the pairs' ratios, and
//! it fails only if the whole interval of that median lies on the wrong side of what is required.
//!
//! - `pairs`, `statistics`, `histogram`: how it is measured;
//! - `report`: rows, the table, JSON;
//! - `host`, `echo`, `ring_echo`, `echo_answer`, `wire`: the load generator, its floors, and the bytes that all handle alike;
//! - `guest`: the load generator of emulated controllers;
//! - `trips`: round trips that a write waits for, counted;
//! - `load`, `ring_floor`: load on a device of this thread; io_uring without a drive around it;
//! - `floor`, `world`: memory floors; what an engine needs from outside, at its cheapest;
//! - `stripes`, `cleaning`: which shapes an engine's writes took; the model that its cleaning is compared with;
//! - `peer`: one process of the cluster that is measured;
//! - one file per stage.
//!
//! What it does not do: compare with other software, or say anything about a machine that is busy. It prints how idle
//! the machine was before and after. `docs/performance.md` has the figures and what was learnt from them.

mod cleaning;
mod cluster;
mod drive;
mod echo;
mod echo_answer;
mod engine;
mod erasure;
mod floor;
mod guest;
mod histogram;
mod host;
mod idle;
mod load;
mod machine;
mod memory;
mod pairs;
mod peer;
mod report;
mod ring_echo;
mod ring_floor;
mod space;
mod statistics;
mod stripes;
mod target;
mod trips;
mod vfio_user;
mod wire;
mod world;

use std::time::{Duration, Instant};

use crate::args::{BenchArgs, BenchStage};
use crate::cli::output::print_all;
use report::{Report, Row};

pub(crate) use memory::fill_map;
pub(crate) use peer::peer;

/// How long and how often.
struct Plan {
    /// Of one side of a pair.
    window: Duration,
    /// Pairs of a row, at least 9.
    pairs: usize,
    /// For which an idle agent is watched.
    idle: Duration,
    /// How much larger than with `--quick` what is written to a pool and mapped in a map is.
    scale: u64,
    /// How full the pools of `space` are, in per cent.
    fill: &'static [u64],
}

/// Where rows go while the run goes on.
struct Output {
    rows: Vec<Row>,
    notes: Vec<String>,
    json: bool,
}

impl Output {
    fn row(&mut self, row: Row) {
        if !self.json {
            row.print();
        }
        self.rows.push(row);
    }

    fn note(&mut self, note: String) {
        self.notes.push(note);
    }
}

/// Runs the stages that were asked for and prints the report. Returns the exit code: 0 if every row passes, 1 if one
/// does not or could not be measured.
pub(crate) fn run(args: &BenchArgs, json: bool) -> u8 {
    let plan = if args.quick {
        Plan {
            window: Duration::from_millis(32),
            pairs: 9,
            idle: Duration::from_secs(3),
            scale: 1,
            // All stages shall take no more than a minute, and each of these takes a fifth of that.
            fill: if args.stage.is_none() {
                &[80]
            } else {
                &[70, 80, 85]
            },
        }
    } else {
        Plan {
            window: Duration::from_millis(200),
            pairs: 15,
            idle: Duration::from_secs(15),
            scale: 8,
            fill: &[70, 80, 85],
        }
    };
    let began = Instant::now();
    let mut output = Output {
        rows: Vec::new(),
        notes: Vec::new(),
        json,
    };
    let mut errors = Vec::new();
    let idle_before = machine::idle_share();
    if !json {
        Report::print_head();
    }
    let stages = args
        .stage
        .map_or_else(|| BenchStage::ALL.to_vec(), |stage| vec![stage]);
    for stage in stages {
        // A thread of its own, so that a stage's pinning ends with it.
        let outcome = std::thread::scope(|scope| {
            let (plan, output) = (&plan, &mut output);
            scope.spawn(move || run_stage(stage, plan, output)).join()
        });
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => errors.push(format!("{stage:?}: {error:#}")),
            Err(_) => errors.push(format!("{stage:?}: panicked")),
        }
    }
    let report = Report {
        machine: machine::Machine::here(),
        quick: args.quick,
        optimised: !cfg!(debug_assertions),
        idle_before,
        idle_after: machine::idle_share(),
        seconds: began.elapsed().as_secs_f64(),
        rows: output.rows,
        notes: output.notes,
        errors,
    };
    if json {
        match serde_json::to_string(&report) {
            Ok(text) => print_all(&format!("{text}\n")),
            Err(error) => eprintln!("weft: {error}"),
        }
    } else {
        report.print_foot();
    }
    u8::from(!report.passes())
}

fn run_stage(stage: BenchStage, plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    match stage {
        BenchStage::Target => target::run(plan, output),
        BenchStage::VfioUser => vfio_user::run(plan, output),
        BenchStage::Drive => drive::run(plan, output),
        BenchStage::Cluster => cluster::run(plan, output),
        BenchStage::Engine => engine::run(plan, output),
        BenchStage::Erasure => erasure::run(plan, output),
        BenchStage::Space => space::run(plan, output),
        BenchStage::Memory => memory::run(plan, output),
        BenchStage::Idle => idle::run(plan, output),
    }
}
