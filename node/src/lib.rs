//! The agent and the `weft` command line: the only crate that knows everything.
//!
//! - [`config`], `args`: what was written and typed, checked once;
//! - `agent`: one server's life: drives, incarnation, ownership, presentation, control;
//! - `cli`: commands that ask the cluster;
//! - `demo`: the whole story on one machine;
//! - `bench`: each stage of the data path beside its floor;
//! - [`local_cluster`]: agents as processes, for the demo and for tests.
//!
//! Architecture invariant: nothing depends on this crate but tests.

mod agent;
mod args;
mod bench;
mod cli;
pub mod config;
mod demo;
pub mod local_cluster;
pub mod metrics;
mod view;

use std::process::ExitCode;

use clap::Parser as _;

use args::{Cli, Command};

/// What an agent logs where `WEFT_LOG` does not say. openraft warns ten times a second of every member that does not answer, and tells each step
/// of an election; who leads, joins and leaves is logged by the metadata service itself.
const AGENT_LOG: &str = "info,openraft=error";

/// The program: parses the command line, runs the command and gives its exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let default_filter = if matches!(cli.command, Command::Agent { .. }) {
        AGENT_LOG
    } else {
        "warn"
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("WEFT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default_filter));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    let code = match cli.command {
        Command::Agent {
            config,
            exit_with_stdin,
        } => agent::main(&config, exit_with_stdin),
        Command::BenchPeer { drives } => on_this_thread(bench::peer(drives)),
        Command::BenchMap(args) => bench::fill_map(args),
        Command::Bench(args) => bench::run(&args, cli.json),
        Command::Demo(args) => on_this_thread(demo::run(args, cli.json)),
        _ => on_this_thread(cli::run(cli)),
    };
    ExitCode::from(code)
}

/// Runs a client command on one thread.
fn on_this_thread(command: impl Future<Output = u8>) -> u8 {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => tokio::task::LocalSet::new().block_on(&runtime, command),
        Err(error) => {
            eprintln!("weft: no event loop: {error}");
            1
        }
    }
}
