//! One server's life: it starts, waits to be initialised or to join, becomes a member, and ends or comes back as a
//! new incarnation.
//!
//! ```text
//!  control runtime                                   data thread
//!  ───────────────                                   ───────────
//!  Admin service ─ orders ─► Life                     Plane: drives, member
//!  metadata service (Raft)    │  DataThread::call ───►
//!  metrics                    └─ cluster map (watch) ─► Member follows
//! ```

mod alarm;
mod control;
pub(crate) mod env;
mod guest_record;
mod guests;
mod identity;
mod life;
mod local_drives;
mod member;
mod present;
mod remote_reach;
mod route;
mod third_party;
mod thread;

use std::os::unix::process::CommandExt as _;
use std::path::Path;

use crate::config::Config;
use life::Ending;

/// Runs the agent until it is told to end. Returns the exit code.
pub(crate) fn main(config: &Path, exit_with_stdin: bool) -> u8 {
    // First of all: whoever looks for a missing agent sees whether its program began.
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        process = std::process::id(),
        "starting"
    );
    let ending = Config::load(config).and_then(|config| life::run(config, exit_with_stdin));
    match ending {
        Ok(Ending::Asked) => 0,
        Ok(Ending::Fenced) => {
            // A fenced incarnation never serves again: the same process image starts anew, with the same arguments.
            tracing::warn!("fenced: coming back as a new incarnation");
            let arguments = std::env::args_os().skip(1);
            let error = match std::env::current_exe() {
                Ok(program) => std::process::Command::new(program).args(arguments).exec(),
                Err(error) => error,
            };
            eprintln!("weft agent: cannot start again: {error}");
            1
        }
        Err(error) => {
            eprintln!("weft agent: {error:#}");
            1
        }
    }
}
