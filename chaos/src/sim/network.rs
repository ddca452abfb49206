//! Messages between servers and hosts: late, lost, out of order, cut off in one direction or both.
//!
//! A call is a request and its answer, each a message of its own, as over a connection to the process that lives on the other
//! side when the request is sent. A process that has died since refuses it, a server without power says nothing. What
//! has been sent by a process that died may arrive or not. A message that meets a cut is lost, or waits for the cut to
//! end, as TCP repeats it.
//!
//! What it does not do: send one request twice. NVMe/TCP does not; who asks metadata does ([`super::client`]).

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use weft_proto::id::{IncarnationId, NodeId};
use weft_volume::testing::answer::answer;
use weft_volume::testing::rng::Rng;

use super::agent::Agent;
use super::cluster::Cluster;
use super::process::Process;

/// Why a call has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// There is no such process, or it has died since.
    Refused,
    /// Nothing was heard in time.
    Silence,
}

/// The state of the wires.
pub(super) struct Network {
    rng: RefCell<Rng>,
    cuts: RefCell<BTreeSet<(NodeId, NodeId)>>,
    /// Their requests to metadata are lost: control traffic often has a network of its own.
    without_metadata: RefCell<BTreeSet<NodeId>>,
    /// One message in so many is lost, late by far, or asked for twice; 0 for none.
    pub(super) bad_one_in: Cell<u64>,
}

/// Times that a message waits for a cut to end.
const TRIES_MAX: u32 = 20;

/// What arriving does.
pub(super) type Message = Box<dyn FnOnce(&Rc<Cluster>)>;

impl Network {
    pub(super) fn new(rng: Rng) -> Self {
        Self {
            rng: RefCell::new(rng),
            cuts: RefCell::default(),
            without_metadata: RefCell::default(),
            bad_one_in: Cell::new(0),
        }
    }

    pub(super) fn cut(&self, from: NodeId, to: NodeId) {
        self.cuts.borrow_mut().insert((from, to));
    }

    pub(super) fn mend(&self, from: NodeId, to: NodeId) {
        self.cuts.borrow_mut().remove(&(from, to));
    }

    pub(super) fn cut_from_metadata(&self, node: NodeId) {
        self.without_metadata.borrow_mut().insert(node);
    }

    pub(super) fn mend_to_metadata(&self, node: NodeId) {
        self.without_metadata.borrow_mut().remove(&node);
    }

    pub(super) fn is_cut_from_metadata(&self, node: NodeId) -> bool {
        self.without_metadata.borrow().contains(&node)
    }

    pub(super) fn mend_all(&self) {
        self.cuts.borrow_mut().clear();
        self.without_metadata.borrow_mut().clear();
        self.bad_one_in.set(0);
    }

    /// Whether anything but delays is to be expected of it.
    pub(super) fn is_troubled(&self) -> bool {
        let cut = !self.cuts.borrow().is_empty() || !self.without_metadata.borrow().is_empty();
        cut || self.bad_one_in.get() > 0
    }

    pub(super) fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cuts.borrow().contains(&(from, to))
    }

    pub(super) fn chance(&self, numerator: u64, denominator: u64) -> bool {
        self.rng.borrow_mut().chance(numerator, denominator)
    }

    /// Whether the next message is a bad one.
    pub(super) fn is_bad(&self) -> bool {
        let one_in = self.bad_one_in.get();
        one_in > 0 && self.chance(1, one_in)
    }

    /// Until TCP tries again what a cut has swallowed.
    pub(super) fn repetition(&self) -> Duration {
        Duration::from_millis(self.rng.borrow_mut().between(20, 300))
    }

    /// Of what is heard again long after it was sent.
    pub(super) fn lateness(&self) -> Duration {
        Duration::from_millis(self.rng.borrow_mut().between(1, 2_000))
    }

    pub(super) fn delay(&self, local: bool) -> Duration {
        let late = self.is_bad();
        let mut rng = self.rng.borrow_mut();
        let micros = if late {
            rng.between(1_000, 3_000_000)
        } else if local {
            rng.between(1, 10)
        } else if rng.chance(1, 100) {
            rng.between(200, 5_000)
        } else {
            rng.between(20, 200)
        };
        Duration::from_micros(micros)
    }
}

impl Cluster {
    /// Has the agent on `to` do `serve`, and waits for its answer for at most `limit` of the caller's time.
    pub(super) async fn call<T: 'static>(
        self: &Rc<Self>,
        from: &Process,
        to: NodeId,
        limit: Duration,
        serve: impl FnOnce(Rc<Agent>) -> LocalBoxFuture<'static, T> + 'static,
    ) -> Result<T, NoAnswer> {
        let (giver, answered) = answer();
        let expected = self.agent(to).map(|agent| agent.process.id);
        let back = from.node;
        self.transmit((from.node, from.id), to, move |cluster| {
            let Some(agent) = cluster
                .agent(to)
                .filter(|agent| Some(agent.process.id) == expected)
            else {
                // A living kernel refuses; a server without power says nothing.
                if !cluster.is_dark(to) {
                    cluster.transmit((to, IncarnationId(0)), back, move |_| {
                        giver.give(Err(NoAnswer::Refused));
                    });
                }
                return;
            };
            let cluster = Rc::clone(cluster);
            let process = agent.process.clone();
            process.clone().spawn(async move {
                let served = serve(agent).await;
                cluster.transmit((to, process.id), back, move |_| giver.give(Ok(served)));
            });
        });
        from.within(limit, answered)
            .await
            .unwrap_or(Err(NoAnswer::Silence))
    }

    /// Sends one message.
    pub(super) fn transmit(
        self: &Rc<Self>,
        from: (NodeId, IncarnationId),
        to: NodeId,
        message: impl FnOnce(&Rc<Self>) + 'static,
    ) {
        let local = from.0 == to;
        if !local && self.network.is_bad() && self.network.chance(1, 3) {
            return;
        }
        let delay = self.network.delay(local);
        self.arrive_after(delay, from, to, Box::new(message), TRIES_MAX);
    }

    fn arrive_after(
        self: &Rc<Self>,
        delay: Duration,
        from: (NodeId, IncarnationId),
        to: NodeId,
        message: Message,
        tries: u32,
    ) {
        let cluster = Rc::clone(self);
        let world = self.world();
        world.at(world.now().after(delay), None, move |world| {
            // What a dead process had sent may have left its server, or not.
            if from.1.0 != 0 && world.is_dead(from.1) && cluster.network.chance(1, 2) {
                return;
            }
            if cluster.network.is_cut(from.0, to) {
                if tries > 0 && cluster.network.chance(7, 8) {
                    let again = cluster.network.repetition();
                    cluster.arrive_after(again, from, to, message, tries - 1);
                }
                return;
            }
            message(&cluster);
        });
    }
}
