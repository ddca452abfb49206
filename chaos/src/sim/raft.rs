//! A stand-in for Raft around the real state machine: what a group of voters promises, without its messages.
//!
//! Real: [`ClusterState`] with its commands, placement's proposals, and [`LeaderCore`], which decides who is dead and who
//! owns what. The stand-in keeps Raft's promises: one log, each entry applied once and in order; nothing is committed or
//! read without a leader that lives, runs and reaches a majority both ways; a leader that stops being one has entries of
//! unknown outcome, which its successor may have or not; who asked never hears of those.
//!
//! What it does not do: votes, logs and snapshots as messages and files (`weft-metadata` has tests with the real openraft).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use weft_metadata::leader::LeaderCore;
use weft_metadata::propose::{BandRequest, propose_bands, propose_replacement};
use weft_metadata::state::command::ReplacementRequest;
use weft_metadata::state::{ClusterMap, ClusterState, Command, Reply, invariants};
use weft_proto::band::{Band, EpochGrant};
use weft_proto::id::{IncarnationId, MapVersion, NodeId, VolumeId};
use weft_volume::testing::answer::{Giver, answer};
use weft_volume::testing::rng::Rng;

use super::agent::Agent;
use super::cluster::Cluster;
use super::steps::{Step, Under};

/// What a member is asked.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Propose(Box<Command>),
    GrantBands(BandRequest),
    GrantReplacement(ReplacementRequest),
    EpochGrant(VolumeId),
    Bands(VolumeId),
    /// The map, as soon as it is newer than this, or after a while.
    Map(MapVersion),
    Heartbeat(IncarnationId),
}

/// What it answers.
pub(super) enum Response {
    Reply(Reply),
    EpochGrant(Option<EpochGrant>),
    Bands(Option<Vec<Band>>),
    Map(Arc<ClusterMap>),
    /// Whether the incarnation counts as live.
    Heard(bool),
    /// Ask this one, if any.
    NotLeader(Option<NodeId>),
    /// The outcome is unknown.
    Unknown,
}

struct Leader {
    agent: Rc<Agent>,
    term: u64,
    core: LeaderCore,
    /// A decision is on its way.
    deciding: bool,
}

/// See the module.
pub(super) struct Raft {
    rng: RefCell<Rng>,
    state: RefCell<ClusterState>,
    map: RefCell<Arc<ClusterMap>>,
    changed: Notify,
    leader: RefCell<Option<Leader>>,
    term: Cell<u64>,
    voters: Vec<NodeId>,
    /// Since when nobody leads, and when the next election is decided.
    vacant: RefCell<Option<(Under, u64)>>,
    applied: Cell<u64>,
}

const TICK: Duration = Duration::from_millis(50);
/// How long a member keeps a request for a newer map.
const LONG_POLL: Duration = Duration::from_millis(500);

impl Raft {
    pub(super) fn new(rng: Rng, voters: Vec<NodeId>) -> Self {
        Self {
            rng: RefCell::new(rng),
            state: RefCell::default(),
            map: RefCell::default(),
            changed: Notify::new(),
            leader: RefCell::new(None),
            term: Cell::new(0),
            voters,
            vacant: RefCell::new(None),
            applied: Cell::new(0),
        }
    }

    /// The committed state. Nobody in the simulation may look at it but checks and the harness.
    pub(super) fn inspect<T>(&self, look: impl FnOnce(&ClusterState) -> T) -> T {
        look(&self.state.borrow())
    }

    /// Windows smaller than an operator may have: chunks are small here, and so are roots. For a cluster's first moment.
    pub(super) fn set_window_rows(&self, rows: u32) {
        let mut state = self.state.borrow_mut();
        let cluster = state.map.cluster.as_mut().expect("a cluster with an identity");
        cluster.settings.window_rows = rows;
    }

    /// Commands applied.
    pub(super) fn applied(&self) -> u64 {
        self.applied.get()
    }

    pub(super) fn leader_node(&self) -> Option<NodeId> {
        self.leader.borrow().as_ref().map(|leader| leader.agent.node)
    }

    pub(super) fn dismantle(&self) {
        self.leader.borrow_mut().take();
        self.vacant.borrow_mut().take();
    }

    pub(super) fn voters(&self) -> &[NodeId] {
        &self.voters
    }

    /// Applies one committed command, and has every invariant of the state checked.
    pub(super) fn apply(&self, cluster: &Cluster, command: Command) -> Reply {
        self.applied.set(self.applied.get() + 1);
        let before = self.state.borrow().clone();
        let what = command.clone();
        let reply = self.state.borrow_mut().apply(command);
        let state = self.state.borrow();
        cluster.world().note(|| {
            let what = format!("{what:?}");
            format!("raft {}: {what:.300} -> {reply:?}", self.applied.get())
        });
        let mut violations = invariants::violations(&state);
        violations.extend(invariants::violations_between(&before, &state));
        for violation in violations {
            cluster
                .watch
                .violation(format!("metadata after {what:?}: {violation}"));
        }
        if state.layouts != before.layouts || state.chunks != before.chunks {
            cluster.watch.layout_changed(&before, &state);
        }
        if state.map.version != before.map.version {
            cluster.watch.applied(&state);
            *self.map.borrow_mut() = Arc::new(state.map.clone());
            self.changed.notify_waiters();
        }
        reply
    }
}

impl Cluster {
    /// Elects and deposes, for as long as the world lives.
    pub(super) fn run_elections(self: &Rc<Self>) {
        let cluster = Rc::clone(self);
        let world = self.world();
        world.at(world.now().after(TICK), None, move |_| {
            cluster.elect();
            cluster.run_elections();
        });
    }

    /// Whether `agent` lives, runs and reaches a majority of the voters, itself included.
    fn commands_majority(&self, agent: &Agent) -> bool {
        let world = self.world();
        let runs = |agent: &Agent| !agent.process.is_dead() && !world.is_paused(agent.process.id);
        let reached = self.raft.voters.iter().filter(|voter| {
            self.agent(**voter).is_some_and(|other| {
                runs(&other)
                    && (other.node == agent.node
                        || !self.network.is_cut(agent.node, other.node)
                            && !self.network.is_cut(other.node, agent.node))
            })
        });
        runs(agent) && reached.count() > self.raft.voters.len() / 2
    }

    fn elect(self: &Rc<Self>) {
        let now = self.world().now().0;
        let led = {
            let leader = self.raft.leader.borrow();
            leader
                .as_ref()
                .is_some_and(|leader| self.commands_majority(&leader.agent))
        };
        if led {
            self.raft.vacant.borrow_mut().take();
            return;
        }
        let due = match &*self.raft.vacant.borrow() {
            Some((_, due)) => *due <= now,
            None => false,
        };
        if self.raft.vacant.borrow().is_none() {
            let timeout = self.raft.rng.borrow_mut().between(200, 900) * 1_000_000;
            let under = self.steps.enter(Step::NoLeader);
            *self.raft.vacant.borrow_mut() = Some((under, now + timeout));
        }
        if !due {
            return;
        }
        self.raft.leader.borrow_mut().take();
        let mut candidates: Vec<Rc<Agent>> = self.raft.voters.iter().filter_map(|n| self.agent(*n)).collect();
        candidates.retain(|agent| self.commands_majority(agent));
        if candidates.is_empty() {
            return;
        }
        let index = self.raft.rng.borrow_mut().index(candidates.len());
        let agent = candidates.swap_remove(index);
        self.raft.term.set(self.raft.term.get() + 1);
        self.raft.vacant.borrow_mut().take();
        let term = self.raft.term.get();
        self.world().note(|| format!("{} leads term {term}", agent.node));
        *self.raft.leader.borrow_mut() = Some(Leader {
            agent: Rc::clone(&agent),
            term,
            core: LeaderCore::default(),
            deciding: false,
        });
        let cluster = Rc::clone(self);
        agent
            .process
            .clone()
            .spawn(async move { cluster.lead(term, agent).await });
    }

    /// The duties of a leader.
    async fn lead(self: Rc<Self>, term: u64, agent: Rc<Agent>) {
        while self.raft.term.get() == term {
            agent.process.sleep(TICK).await;
            if !self.commands_majority(&agent) {
                continue;
            }
            let now = Duration::from_nanos(agent.process.now().0);
            let decisions = {
                let mut leader = self.raft.leader.borrow_mut();
                let Some(leader) = leader.as_mut().filter(|leader| leader.term == term) else {
                    return;
                };
                leader.core.awake(now);
                if leader.deciding {
                    continue;
                }
                let decisions = leader.core.decide(now, &self.raft.state.borrow().map);
                leader.deciding = decisions.command.is_some();
                decisions
            };
            for (incarnation, address) in decisions.probes {
                self.probe(term, agent.node, incarnation, &address);
            }
            if let Some(command) = decisions.command {
                let (cluster, agent) = (Rc::clone(&self), Rc::clone(&agent));
                agent.process.clone().spawn(async move {
                    cluster.commit(&agent, term, command).await;
                    cluster.with_core(term, |leader| leader.deciding = false);
                });
            }
        }
    }

    fn with_core(&self, term: u64, change: impl FnOnce(&mut Leader)) {
        if let Some(leader) = self.raft.leader.borrow_mut().as_mut()
            && leader.term == term
        {
            change(leader);
        }
    }

    /// Whether the control port of a node refuses: only then is there no process.
    fn probe(self: &Rc<Self>, term: u64, from: NodeId, incarnation: IncarnationId, address: &str) {
        let Some(node) = super::cluster::node_at(address) else {
            return;
        };
        let cluster = Rc::clone(self);
        let world = self.world();
        world.at(world.now().after(Duration::from_millis(1)), None, move |_| {
            let reached = !cluster.network.is_cut(from, node) && !cluster.network.is_cut(node, from);
            let refused = reached && !cluster.is_dark(node) && cluster.agent(node).is_none();
            cluster.with_core(term, |leader| {
                let now = Duration::from_nanos(leader.agent.process.now().0);
                leader.core.probed(now, incarnation, refused);
            });
        });
    }

    /// The connections of a process that ended were reset: its session breaks.
    pub(super) fn session_breaks(self: &Rc<Self>, node: NodeId, incarnation: IncarnationId) {
        let leader = self.raft.leader_node();
        let reached = leader.is_some_and(|leader| !self.network.is_cut(node, leader));
        if reached {
            let term = self.raft.term.get();
            self.with_core(term, |leader| {
                let now = Duration::from_nanos(leader.agent.process.now().0);
                leader.core.broken(now, incarnation);
            });
        }
    }

    /// Replicates a command from the leader of `term`. `None` when it stopped leading before it knew the outcome.
    async fn commit(self: &Rc<Self>, agent: &Rc<Agent>, term: u64, command: Command) -> Option<Reply> {
        let (giver, reply) = answer();
        self.replicate(Rc::clone(agent), term, command, giver, 100);
        reply.await
    }

    fn replicate(
        self: &Rc<Self>,
        agent: Rc<Agent>,
        term: u64,
        command: Command,
        giver: Giver<Option<Reply>>,
        tries: u32,
    ) {
        let cluster = Rc::clone(self);
        let micros = self.raft.rng.borrow_mut().between(300, 3_000);
        let delay = if tries == 100 {
            Duration::from_micros(micros)
        } else {
            TICK
        };
        let world = self.world();
        world.at(world.now().after(delay), None, move |_| {
            if cluster.raft.term.get() != term || tries == 0 {
                // Its successor has the entry, or it is lost.
                if cluster.raft.rng.borrow_mut().chance(1, 2) {
                    cluster.raft.apply(&cluster, command);
                }
                giver.give(None);
            } else if cluster.commands_majority(&agent) {
                let reply = cluster.raft.apply(&cluster, command);
                giver.give(Some(reply));
            } else {
                cluster.replicate(agent, term, command, giver, tries - 1);
            }
        });
    }

    /// A member answers.
    pub(super) async fn answer(self: Rc<Self>, agent: Rc<Agent>, request: Request) -> Response {
        let hint = self.raft.leader_node();
        let term = self.raft.term.get();
        let leads = hint == Some(agent.node) && self.commands_majority(&agent);
        if !leads {
            return Response::NotLeader(hint.filter(|node| *node != agent.node));
        }
        match request {
            Request::Propose(command) => self.committed(&agent, term, *command).await,
            Request::GrantBands(wanted) => {
                let proposed = propose_bands(&self.raft.state.borrow(), &wanted);
                match proposed {
                    Ok(command) => self.committed(&agent, term, command).await,
                    Err(refusal) => Response::Reply(Reply::Refused(refusal)),
                }
            }
            Request::GrantReplacement(wanted) => {
                let proposed = propose_replacement(&self.raft.state.borrow(), &wanted);
                match proposed {
                    Ok(command) => self.committed(&agent, term, command).await,
                    Err(refusal) => Response::Reply(Reply::Refused(refusal)),
                }
            }
            Request::EpochGrant(volume) => Response::EpochGrant(self.raft.state.borrow().epoch_grant(volume)),
            Request::Bands(volume) => {
                let state = self.raft.state.borrow();
                let layout = state.layouts.get(&volume);
                Response::Bands(layout.map(|layout| {
                    let records = layout.bands.values();
                    records.map(|record| record.band.clone()).collect()
                }))
            }
            Request::Map(known) => {
                let deadline = agent.process.now().after(LONG_POLL);
                loop {
                    let changed = self.raft.changed.notified();
                    if self.raft.map.borrow().version > known || agent.process.now() >= deadline {
                        break;
                    }
                    let left = Duration::from_nanos(deadline.0 - agent.process.now().0);
                    let _ = agent.process.within(left, changed).await;
                }
                if !self.commands_majority(&agent) {
                    return Response::Unknown;
                }
                Response::Map(Arc::clone(&self.raft.map.borrow()))
            }
            Request::Heartbeat(incarnation) => {
                self.with_core(term, |leader| {
                    let now = Duration::from_nanos(leader.agent.process.now().0);
                    leader.core.heartbeat(now, incarnation);
                });
                Response::Heard(self.raft.state.borrow().map.is_live(incarnation))
            }
        }
    }

    async fn committed(self: &Rc<Self>, agent: &Rc<Agent>, term: u64, command: Command) -> Response {
        match self.commit(agent, term, command).await {
            Some(reply) => Response::Reply(reply),
            None => Response::Unknown,
        }
    }
}
