//! The deterministic simulator: a whole cluster in one thread, by seed, with the same events each time.
//!
//! # What is real
//!
//! - the engine (`weft-volume`): every write, read, checkpoint, compaction and recovery;
//! - what an incarnation does with drives and volumes (`weft-incarnation`): registrations, the lease, fences, takeover, planned moves,
//!   deletion, grants of bands;
//! - the cluster's state machine, its invariants, and the leader's decisions (`weft-metadata`: `state`, `leader`, `propose`);
//! - placement (`weft-placement`);
//! - the reservations of a drive, with the drain of Preempt and Abort, and what a target makes of the silence of a host
//!   (`weft-target`: `reservation`, `silence`);
//! - the checker that judges the hosts' histories ([`crate::checker`]).
//!
//! # What stands in
//!
//! - Raft: [`raft`] keeps its promises without its messages;
//! - the agent around these: [`agent`], [`client`], [`reach`], [`front`] and [`association`] do in the same order and with the same
//!   times what `node/src/agent` does over tokio, gRPC and NVMe/TCP: an agent's start, its session, the way of a host's command;
//! - drives, wires, clocks and hosts: [`drive`], [`network`], [`connection`], [`process`], [`host`], [`multipath`], on [`weft_volume::testing`].
//!
//! What it does not do: a policy of rebuilds (an owner rebuilds some column now and then), snapshots and tiers, which the product does
//! not have yet; third-party drives; NVMe and Raft as bytes; a time of day that jumps, which nobody reads ("Clocks" at the top of the crate).
//!
//! # What is checked
//!
//! [`watch`] says what is checked all the time; [`run`] checks the rest at the end: that everything is served again once the
//! faults are over, that every block can be read through several nodes, and that the history is linearizable.

mod agent;
mod association;
mod client;
mod cluster;
mod connection;
mod drive;
mod front;
mod host;
mod multipath;
mod nemesis;
mod network;
mod ownership;
mod plan;
mod process;
mod raft;
mod reach;
mod steps;
mod watch;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use weft_proto::id::NodeId;
use weft_volume::testing::World;
use weft_volume::testing::rng::Rng;

use cluster::Cluster;
use host::Host;
use multipath::Multipath;
use nemesis::{Nemesis, heal_all};

pub use steps::{Coverage, Fault, Step};

/// What a run has come to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its seed.
    pub seed: u64,
    /// Stands for the order of all polls and the times of all answers.
    pub digest: u64,
    /// Simulated time.
    pub simulated: Duration,
    /// Times that a task ran.
    pub events: u64,
    /// Blocks of commands that the checker judged.
    pub operations: u64,
    /// Commands that metadata applied.
    pub commands: u64,
    /// Faults, and the steps that they met.
    pub coverage: Coverage,
    /// Everything that was wrong.
    pub failures: Vec<String>,
}

/// How long everything may take to be served again once the faults are over.
const HEALED: Duration = Duration::from_secs(90);

/// Runs one seed to its end.
#[must_use]
pub fn run(seed: u64, trace: bool) -> Outcome {
    let world = World::new(seed);
    world.trace_effects(trace);
    let plan = plan::Plan::draw(seed);
    world.note(|| format!("{plan:?}"));
    let cluster = Cluster::new(&world, plan);
    let hosts: Vec<Rc<Host>> = (0..cluster.plan.hosts)
        .map(|number| Host::start(&cluster, number))
        .collect();
    let rng = Rng::new(seed).fork(41);
    for (number, host) in (0..).zip(&hosts) {
        for task in 0..cluster.plan.depth {
            host.work(rng.fork(number * 16 + task), task == 0);
        }
    }
    for number in 0..cluster.plan.multipath {
        let host = Host::start(&cluster, cluster.plan.hosts + cluster.plan.deletions + number);
        let multipath = Multipath::start(&host, cluster.plan.kato);
        for task in 0..cluster.plan.lanes {
            let lane = u64::from(number) * cluster.plan.lanes + task;
            multipath.work(rng.fork(4096 + lane), lane);
        }
    }
    Nemesis::new(&cluster).schedule();
    let length = cluster.plan.length + Duration::from_millis(200);
    pass(&world, length);
    cluster.stop_working();
    heal_all(&cluster);
    world.note(|| "all faults are over".to_owned());
    let mut failures = Vec::new();
    settle(&cluster, &hosts[0], &mut failures);
    if cluster.plan.restart_all && failures.is_empty() {
        world.note(|| "everything is killed and started again".to_owned());
        for node in cluster.nodes() {
            cluster.lose_power(node, (10, 500));
        }
        settle(&cluster, &hosts[0], &mut failures);
    }
    let history = cluster.watch.take_history();
    failures.extend(cluster.watch.violations());
    failures.extend(world.violations());
    failures.extend(crate::checker::check(&history).iter().map(ToString::to_string));
    let digest = history.iter().fold(world.digest(), |digest, record| {
        (digest ^ record.completed_ns ^ record.invoked_ns.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    let mut outcome = Outcome {
        seed,
        digest,
        simulated: Duration::from_nanos(world.now().0 - 1_000_000_000),
        events: world.polls(),
        operations: history.len() as u64,
        commands: cluster.raft.applied(),
        coverage: cluster.coverage.borrow().clone(),
        failures,
    };
    cluster.dismantle();
    let left = (Rc::downgrade(&cluster), Rc::downgrade(&world));
    drop((hosts, cluster, world));
    if left.0.strong_count() > 0 || left.1.strong_count() > 0 {
        let leak = "something of it outlives the seed: two things own each other".to_owned();
        outcome.failures.push(leak);
    }
    outcome
}

/// How a planted bug was found.
#[cfg(feature = "deliberate-bugs")]
#[derive(Clone, Debug)]
pub struct FoundBug {
    /// Seeds that it took.
    pub seeds: u64,
    /// The first thing that was wrong.
    pub how: String,
}

/// Plants `bug` and runs seeds until something is wrong, with everything that happens printed if `trace` says so.
#[cfg(feature = "deliberate-bugs")]
#[must_use]
pub fn hunt(bug: weft_proto::deliberate::Bug, seeds: std::ops::Range<u64>, trace: bool) -> Option<FoundBug> {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    weft_proto::deliberate::plant(Some(bug));
    let found = (1..).zip(seeds).find_map(|(count, seed)| {
        let how = match catch_unwind(AssertUnwindSafe(|| run(seed, trace))) {
            Ok(outcome) => outcome.failures.into_iter().next()?,
            Err(panic) => match panic.downcast_ref::<String>() {
                Some(message) => format!("an assertion: {message}"),
                None => "an assertion".to_owned(),
            },
        };
        let how = how.lines().next().unwrap_or_default().to_owned();
        Some(FoundBug { seeds: count, how })
    });
    weft_proto::deliberate::plant(None);
    found
}

/// Lets time pass.
fn pass(world: &Rc<World>, duration: Duration) {
    world.run_for(duration).expect("nobody asks the world to stop");
}

/// After the faults: every volume takes a write, and every block of it is read through two nodes.
fn settle(cluster: &Rc<Cluster>, host: &Rc<Host>, failures: &mut Vec<String>) {
    let world = cluster.world();
    let done: Rc<Cell<u32>> = Rc::default();
    let failed: Rc<Cell<u32>> = Rc::default();
    let volumes = cluster.plan.volumes;
    for volume in 0..volumes {
        let (this, cluster) = (Rc::clone(host), Rc::clone(cluster));
        let (done, failed) = (Rc::clone(&done), Rc::clone(&failed));
        host.spawn(async move {
            let first = NodeId(cluster.draw(1, u64::from(cluster.plan.nodes)) as u32);
            let second = NodeId(first.0 % cluster.plan.nodes + 1);
            let mut served = Rc::clone(&this).write_once(volume, first, HEALED).await;
            served &= Rc::clone(&this).read_all(volume, first, HEALED).await;
            served &= this.read_all(volume, second, HEALED).await;
            if !served {
                failed.set(failed.get() + 1);
            }
            done.set(done.get() + 1);
        });
    }
    while done.get() < u32::from(volumes) {
        pass(&world, Duration::from_millis(20));
    }
    if failed.get() > 0 {
        let phases = cluster.raft.inspect(|state| {
            let volumes = state.map.volumes.values();
            let phases: Vec<String> = volumes
                .map(|volume| format!("{} {:?} {:?}", volume.id, volume.epoch, volume.phase))
                .collect();
            let pools = state.map.pools.values();
            let space: Vec<_> = pools.map(|pool| state.pool_space(pool)).collect();
            let waiting = state
                .chunks
                .values()
                .flat_map(|chunks| chunks.quarantine.values());
            let mut quarantined: BTreeMap<_, u32> = BTreeMap::new();
            for chunk in waiting {
                *quarantined.entry(chunk.writer).or_default() += chunk.size.mib();
            }
            format!(
                "{}; {space:?}; MiB in quarantine by writer: {quarantined:?}",
                phases.join(", ")
            )
        });
        failures.push(format!(
            "not everything was served {HEALED:?} after the faults: {phases}; {}",
            cluster.inspect_engines()
        ));
    }
}
