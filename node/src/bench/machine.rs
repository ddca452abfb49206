//! The machine a run happened on, its idle CPU, and the clocks and cores of this process.

use std::time::Duration;

use anyhow::Context as _;
use rustix::thread::CpuSet;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// What has to be known to compare two reports.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    /// Processor model.
    pub(super) machine: String,
    /// Logical processors.
    pub(super) cores: usize,
    /// Kernel release.
    pub(super) kernel: String,
    /// That the program was built from, or `unknown`; with `-dirty` if the working tree had something else in it.
    pub(super) commit: String,
}

impl Machine {
    /// This one.
    pub(super) fn here() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| {
            line.strip_prefix("model name")?
                .split_once(": ")
                .map(|(_, name)| name)
        });
        Self {
            machine: model.unwrap_or("unknown").to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| "unknown".to_owned(), |release| release.trim().to_owned()),
            commit: env!("WEFT_COMMIT").to_owned(),
        }
    }
}

/// Share of all CPUs that nobody uses, over a fifth of a second. This thread sleeps meanwhile.
pub(super) fn idle_share() -> Option<f64> {
    let (idle_before, all_before) = cpu_ticks()?;
    std::thread::sleep(Duration::from_millis(200));
    let (idle, all) = cpu_ticks()?;
    (all > all_before).then(|| (idle - idle_before) as f64 / (all - all_before) as f64)
}

/// Idle ticks and all ticks since boot.
fn cpu_ticks() -> Option<(u64, u64)> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let ticks: Vec<u64> = stat
        .lines()
        .next()?
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq steal
    Some((ticks.get(3)? + ticks.get(4)?, ticks.iter().sum()))
}

/// The core of whatever is measured.
pub(super) const SUBJECT_CORE: usize = 0;

/// The core of the load generator; the same where there is only one. For a thread that is not pinned yet: it counts the cores that
/// the thread may use.
pub(super) fn host_core() -> usize {
    usize::from(std::thread::available_parallelism().map_or(1, usize::from) > 1)
}

/// Keeps the calling thread on one core.
///
/// # Errors
/// The core is not there, or not ours to use.
pub(super) fn pin(core: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("cannot run on core {core} alone"))
}

/// Lets the calling thread, and processes that it starts, run on every core.
///
/// # Errors
/// The cores are not ours to use.
pub(super) fn unpin() -> anyhow::Result<CpuSet> {
    let mut all = CpuSet::new();
    (0..std::thread::available_parallelism()?.get()).for_each(|core| all.set(core));
    rustix::thread::sched_setaffinity(None, &all).context("cannot run on all cores")?;
    Ok(all)
}

/// CPU time of this thread and of this whole process.
#[derive(Clone, Copy)]
pub(super) struct CpuClock {
    thread: Duration,
    process: Duration,
}

impl CpuClock {
    pub(super) fn now() -> Self {
        Self {
            thread: read(ClockId::ThreadCPUTime),
            process: read(ClockId::ProcessCPUTime),
        }
    }

    /// Since then: this thread's, and that of all other threads of the process.
    pub(super) fn elapsed(self) -> (Duration, Duration) {
        let now = Self::now();
        let thread = now.thread.saturating_sub(self.thread);
        (
            thread,
            now.process.saturating_sub(self.process).saturating_sub(thread),
        )
    }
}

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_a_kernel_and_cores() {
        let machine = Machine::here();
        assert!(machine.cores >= 1 && !machine.kernel.is_empty());
    }

    #[test]
    fn cpu_time_of_this_thread_passes_while_it_works() {
        let clock = CpuClock::now();
        while clock.elapsed().0.is_zero() {
            std::hint::spin_loop();
        }
    }
}
