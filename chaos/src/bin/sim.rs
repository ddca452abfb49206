//! `sim`: the deterministic simulator by seeds. See [`weft_chaos::sim`].
//!
//! ```sh
//! cargo run --release -p weft-chaos --bin sim -- --seeds 1000
//! cargo run --release -p weft-chaos --bin sim -- --seed 17 --trace
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use clap::Parser;
use weft_chaos::sim::{self, Coverage, Outcome};

/// Runs a simulated cluster under faults, seed by seed.
#[derive(Parser)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    seed_base: u64,
    /// Runs this one seed alone: the same events as before.
    #[arg(long)]
    seed: Option<u64>,
    /// Plants this bug, which the run is then expected to find; `list` names them all, `all` hunts one after the other.
    #[cfg(feature = "deliberate-bugs")]
    #[arg(long)]
    bug: Option<String>,
    /// Prints everything that happens.
    #[arg(long)]
    trace: bool,
    /// Ends after so many failed seeds.
    #[arg(long, default_value_t = 5)]
    failures_max: usize,
    /// How many seeds to run at once, each in a thread of its own.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Fails if a fault has not met a step in the whole run.
    #[arg(long)]
    no_empty_cell: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seeds = match arguments.seed {
        Some(seed) => seed..seed + 1,
        None => arguments.seed_base..arguments.seed_base + arguments.seeds,
    };
    #[cfg(feature = "deliberate-bugs")]
    if let Some(bug) = &arguments.bug {
        return hunt(bug, seeds, arguments.trace);
    }
    let mut total = run(&arguments, seeds);
    total.print();
    let empty = arguments.no_empty_cell && !total.coverage.empty().is_empty();
    if total.failed.is_empty() && !empty {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs the seeds. Each is a world of its own, whatever thread it runs in.
fn run(arguments: &Arguments, seeds: std::ops::Range<u64>) -> Total {
    let seeds = Mutex::new(seeds);
    let total = Mutex::new(Total::default());
    let next = || {
        let enough = total.lock().unwrap_or_else(PoisonError::into_inner).failed.len();
        let mut seeds = seeds.lock().unwrap_or_else(PoisonError::into_inner);
        (enough < arguments.failures_max).then(|| seeds.next()).flatten()
    };
    let work = || {
        while let Some(seed) = next() {
            let ran = catch_unwind(AssertUnwindSafe(|| sim::run(seed, arguments.trace)));
            let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
            match ran {
                Ok(outcome) => total.add(outcome, arguments.seed.is_some()),
                Err(_) => total.fail(seed, "a panic, see above"),
            }
            if total.failed.len() == arguments.failures_max {
                println!("enough failures, no more seeds are started");
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..arguments.threads {
            scope.spawn(work);
        }
        work();
    });
    total.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Plants bugs, and tells how many seeds it takes to find each.
#[cfg(feature = "deliberate-bugs")]
fn hunt(wanted: &str, seeds: std::ops::Range<u64>, trace: bool) -> ExitCode {
    use weft_proto::deliberate::Bug;

    // A planted bug may break what asserts protect: a panic counts as found, and need not be seen.
    std::panic::set_hook(Box::new(|_| {}));
    let bugs = Bug::ALL
        .iter()
        .filter(|bug| wanted == "all" || format!("{bug:?}") == wanted);
    let (mut hunted, mut missed) = (0, 0);
    for bug in bugs {
        hunted += 1;
        match sim::hunt(*bug, seeds.clone(), trace) {
            Some(found) => println!(
                "{:<26} {:>6} seeds  {:.150}",
                format!("{bug:?}"),
                found.seeds,
                found.how
            ),
            None => {
                missed += 1;
                println!(
                    "{:<26} not found in {} seeds",
                    format!("{bug:?}"),
                    seeds.end - seeds.start
                );
            }
        }
    }
    println!("{hunted} bugs planted, {missed} not found");
    if hunted > 0 && missed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[derive(Default)]
struct Total {
    seeds: u64,
    simulated: Duration,
    operations: Vec<u64>,
    events: Vec<u64>,
    faults: Vec<u64>,
    coverage: Coverage,
    failed: Vec<u64>,
}

impl Total {
    fn add(&mut self, outcome: Outcome, alone: bool) {
        if alone {
            println!(
                "seed {}: digest {:016x}, {} events, {} operations, {} metadata commands, {:.1} s simulated",
                outcome.seed,
                outcome.digest,
                outcome.events,
                outcome.operations,
                outcome.commands,
                outcome.simulated.as_secs_f64()
            );
        }
        self.seeds += 1;
        self.simulated += outcome.simulated;
        self.operations.push(outcome.operations);
        self.events.push(outcome.events);
        self.faults.push(outcome.coverage.faults());
        self.coverage.merge(&outcome.coverage);
        if !outcome.failures.is_empty() {
            println!("seed {} FAILED:", outcome.seed);
            for failure in outcome.failures.iter().take(6) {
                println!("  {failure}");
            }
            self.failed.push(outcome.seed);
        }
    }

    fn fail(&mut self, seed: u64, what: &str) {
        println!("seed {seed} FAILED: {what}");
        self.seeds += 1;
        self.failed.push(seed);
    }

    fn print(&mut self) {
        print!("{}", self.coverage);
        let empty = self.coverage.empty();
        if !empty.is_empty() {
            let shown = empty.iter().take(20);
            let cells = shown.map(|(fault, step)| format!("{} × {}", fault.label(), step.label()));
            println!(
                "{} empty cells: {}",
                empty.len(),
                cells.collect::<Vec<_>>().join(", ")
            );
        }
        println!(
            "median of a seed: {} events, {} faults, {} operations",
            median(&mut self.events),
            median(&mut self.faults),
            median(&mut self.operations)
        );
        self.failed.sort_unstable();
        if !self.failed.is_empty() {
            println!("failed seeds: {:?}", self.failed);
        }
        println!(
            "{} seeds, {:.2} simulated hours, {} faults injected, {} operations checked, {} failures",
            self.seeds,
            self.simulated.as_secs_f64() / 3600.0,
            self.faults.iter().sum::<u64>(),
            self.operations.iter().sum::<u64>(),
            self.failed.len()
        );
    }
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}
