//! The situation that the rules against ghost writes are for, brought about on purpose: a write lies unread in the socket of a server
//! that stands still until its host has given the path up, repeated the write on another one and overwritten it; then the server goes on.
//!
//! Its host's reset is lost meanwhile. The server owns nothing, so no lease and no fence stands between that write and the volume: it would be
//! forwarded to the owner in the host's own name. What has to stop it is the account of the host's silence alone
//! (`weft_target::silence`). Faults drawn at random meet this once in hundreds of seeds, so half of the seeds that have hosts with several
//! paths look for it.

use std::rc::Rc;
use std::time::Duration;

use weft_volume::seams::Timestamp;
use weft_volume::testing::rng::Rng;

use super::Nemesis;
use crate::sim::agent::Agent;
use crate::sim::multipath::COMMAND_QUIESCE;
use crate::sim::steps::Fault;

/// Until when a workload goes on after the plan's length, see `super::super::run`.
const OVERTIME: Duration = Duration::from_millis(200);
/// Between two looks.
const LOOK: Duration = Duration::from_micros(500);

impl Nemesis {
    /// Lays out one such fault, if the seed has it and there is time for all of it.
    pub(super) fn schedule_stranding(self: &Rc<Self>) {
        let plan = &self.cluster.plan;
        if !plan.strands || plan.multipath == 0 {
            return;
        }
        let world = self.cluster.world();
        let mut rng = Rng::new(world.seed()).fork(33);
        let mut some_time = |low, high| Duration::from_millis(rng.between(low, high));
        // A Keep Alive is sent after half a timeout and given up after a whole one; the write is repeated after its quiesce time, and needs a
        // while to be overwritten.
        let standstill = plan.kato * 3 / 2 + COMMAND_QUIESCE + some_time(200, 1_500);
        // Once the host has given up, it sends nothing there.
        let arrival = plan.kato / 2;
        // What it does is to be read before it is overwritten in turn: the server goes on when the workload ends, or a little earlier.
        let ends = plan.length + OVERTIME - some_time(0, 250);
        let begins = ends.saturating_sub(arrival + standstill);
        if begins < Duration::from_secs(1) {
            return;
        }
        let order = rng.next_u64();
        let (nemesis, ends) = (Rc::clone(self), world.now().after(ends));
        let last = world.now().after(begins + arrival);
        world.at(world.now().after(begins), None, move |_| {
            nemesis.strand(order, last, ends)
        });
    }

    /// Stops the process of a server, of one that owns nothing if there is one, and waits for a write to arrive until `last`.
    fn strand(self: &Rc<Self>, order: u64, last: Timestamp, ends: Timestamp) {
        let world = self.cluster.world();
        let mut nodes = self.cluster.nodes();
        Rng::new(order).shuffle(&mut nodes);
        let agents = nodes.into_iter().filter_map(|node| self.cluster.agent(node));
        let mut agents: Vec<Rc<Agent>> = agents
            .filter(|agent| agent.is_in_service() && !world.is_paused(agent.process.id))
            .collect();
        agents.sort_by_key(|agent| !agent.engines.borrow().is_empty());
        let Some(agent) = agents.into_iter().next() else {
            return;
        };
        if !self.may_hurt(agent.node, Duration::from_nanos(ends.0 - world.now().0)) {
            return;
        }
        world.pause(agent.process.id);
        self.cluster.note_hurt(agent.node);
        self.await_write(&agent, last, ends);
    }

    fn await_write(self: &Rc<Self>, agent: &Rc<Agent>, last: Timestamp, ends: Timestamp) {
        let world = self.cluster.world();
        let (node, process) = (agent.node, agent.process.id);
        if !world.is_paused(process) {
            // Somebody else has killed it, or let it go on.
            return;
        }
        if agent.ends.hold_write_of_host() {
            let met = self.cluster.steps.under_way();
            world.note(|| format!("fault: {node} stands still with a write unread, during {met:?}"));
            self.cluster.coverage.borrow_mut().note(Fault::Pause, &met);
            let left = Duration::from_nanos(ends.0 - world.now().0);
            self.stop_kernel(node, Duration::ZERO, left);
            self.later(node, left, move |cluster| {
                let world = cluster.world();
                world.note(|| format!("{node} goes on"));
                world.resume(process);
            });
        } else if world.now() < last {
            let (nemesis, agent) = (Rc::clone(self), Rc::clone(agent));
            world.at(world.now().after(LOOK), None, move |_| {
                nemesis.await_write(&agent, last, ends)
            });
        } else {
            world.note(|| format!("no write came for {node}"));
            world.resume(process);
            self.cluster.note_hurt(node);
        }
    }
}
