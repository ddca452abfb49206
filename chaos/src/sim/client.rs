//! The way to the metadata service: finds the leader, asks again with the same content until there is an answer, and is
//! sometimes heard twice, the second time seconds later.
//!
//! A counterpart of `metadata/src/client.rs` without gRPC.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use weft_incarnation::metadata::{Answer, Metadata};
use weft_metadata::client::ClientError;
use weft_metadata::propose::BandRequest;
use weft_metadata::state::command::{Refusal, ReplacementRequest, Reply};
use weft_metadata::state::{ClusterMap, Command};
use weft_proto::band::{Band, EpochGrant, Replacement};
use weft_proto::id::{IncarnationId, MapVersion, NodeId, VolumeId};

use super::cluster::Cluster;
use super::process::Process;
use super::raft::{Request, Response};
use super::steps::Step;

/// Until one member counts as not answering.
const ATTEMPT: Duration = Duration::from_millis(1000);
/// The same for a heartbeat: well below the second that a new leader gives sessions to come.
const SESSION_ATTEMPT: Duration = Duration::from_millis(300);
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(50);
/// One request in so many is heard twice although nothing is wrong with the wires.
const REPEATED_ONE_IN: u64 = 100;

/// A client of the metadata service in one process.
pub(super) struct Client {
    cluster: Rc<Cluster>,
    process: Process,
    guess: Cell<NodeId>,
}

impl Client {
    pub(super) fn new(cluster: &Rc<Cluster>, process: &Process) -> Rc<Self> {
        Rc::new(Self {
            cluster: Rc::clone(cluster),
            process: process.clone(),
            guess: Cell::new(cluster.raft.voters()[0]),
        })
    }

    /// Asks until a leader answers.
    async fn ask(&self, request: Request) -> Response {
        loop {
            if let Some(response) = self.try_once(request.clone(), ATTEMPT).await {
                return response;
            }
            self.process.sleep(PAUSE).await;
        }
    }

    async fn try_once(&self, request: Request, limit: Duration) -> Option<Response> {
        let to = self.guess.get();
        let network = &self.cluster.network;
        if network.is_cut_from_metadata(self.process.node) {
            self.process.sleep(limit).await;
            return None;
        }
        if network.is_bad() || network.chance(1, REPEATED_ONE_IN) {
            self.cluster.repeat(&self.process, to, request.clone());
        }
        let cluster = Rc::clone(&self.cluster);
        let answer = self
            .cluster
            .call(&self.process, to, limit, move |agent| {
                cluster.answer(agent, request).boxed_local()
            })
            .await;
        match answer {
            Ok(Response::NotLeader(Some(leader))) => self.guess.set(leader),
            Ok(Response::NotLeader(None) | Response::Unknown) | Err(_) => {
                let voters = self.cluster.raft.voters();
                let at = voters.iter().position(|voter| *voter == to).unwrap_or(0);
                self.guess.set(voters[(at + 1) % voters.len()]);
            }
            Ok(response) => return Some(response),
        }
        None
    }

    /// Proposes until there is an answer.
    pub(super) async fn propose(&self, command: Command) -> Result<Reply, Refusal> {
        match self.ask(Request::Propose(Box::new(command))).await {
            Response::Reply(reply) => reply.accepted(),
            _ => unreachable!("a proposal is answered with a reply"),
        }
    }

    /// The map, once it is newer than `known`; `None` when nobody told in time.
    pub(super) async fn map_after(&self, known: MapVersion) -> Option<Arc<ClusterMap>> {
        match self.try_once(Request::Map(known), ATTEMPT).await {
            Some(Response::Map(map)) => Some(map),
            _ => None,
        }
    }

    /// Whether the leader holds the incarnation to be live; `None` without a leader.
    pub(super) async fn heartbeat(&self, incarnation: IncarnationId) -> Option<bool> {
        match self
            .try_once(Request::Heartbeat(incarnation), SESSION_ATTEMPT)
            .await
        {
            Some(Response::Heard(live)) => Some(live),
            _ => None,
        }
    }
}

impl Cluster {
    /// The same request, heard twice: now, or after whatever its sender has done since it was answered. A sender that asked again
    /// because the answer was late leaves such a one behind, in a socket or in the queue of a member that was slow.
    fn repeat(self: &Rc<Self>, from: &Process, to: NodeId, request: Request) {
        let late = if self.network.chance(1, 2) {
            self.network.lateness()
        } else {
            Duration::ZERO
        };
        let from = (from.node, from.id);
        let cluster = Rc::clone(self);
        let world = self.world();
        world.at(world.now().after(late), None, move |_| {
            cluster.transmit(from, to, move |cluster| {
                let Some(agent) = cluster.agent(to) else { return };
                let again = Rc::clone(cluster);
                agent.process.clone().spawn(async move {
                    drop(again.answer(agent, request).await);
                });
            });
        });
    }
}

/// The client as an incarnation asks it.
pub(super) struct Service(pub(super) Rc<Client>);

impl Service {
    /// What is under way until a command is answered.
    fn step(command: &Command) -> Option<Step> {
        match command {
            Command::PublishRoot { .. } => Some(Step::Checkpoint),
            Command::FinishTakeover { .. } => Some(Step::Finish),
            Command::ReturnBands { .. } => Some(Step::Grant),
            Command::RecordRegistrations { .. } => Some(Step::Register),
            _ => None,
        }
    }
}

impl Metadata for Service {
    fn propose(&self, command: Command) -> Answer<Reply> {
        let client = Rc::clone(&self.0);
        async move {
            let _under = Self::step(&command).map(|step| client.cluster.steps.enter(step));
            Ok(client.propose(command).await?)
        }
        .boxed_local()
    }

    fn grant_bands(&self, request: BandRequest) -> Answer<Vec<Band>> {
        let client = Rc::clone(&self.0);
        async move {
            let _under = client.cluster.steps.enter(Step::Grant);
            let Response::Reply(reply) = client.ask(Request::GrantBands(request)).await else {
                unreachable!("a request for bands is answered with a reply");
            };
            match reply.accepted()? {
                Reply::Bands(bands) => Ok(bands),
                _ => Err(ClientError::Unexpected),
            }
        }
        .boxed_local()
    }

    fn grant_replacement(&self, request: ReplacementRequest) -> Answer<Replacement> {
        let client = Rc::clone(&self.0);
        async move {
            let Response::Reply(reply) = client.ask(Request::GrantReplacement(request)).await else {
                unreachable!("a request for a chunk is answered with a reply");
            };
            match reply.accepted()? {
                Reply::Replacement(replacement) => Ok(replacement),
                _ => Err(ClientError::Unexpected),
            }
        }
        .boxed_local()
    }

    fn epoch_grant(&self, volume: VolumeId) -> Answer<Option<EpochGrant>> {
        let client = Rc::clone(&self.0);
        async move {
            match client.ask(Request::EpochGrant(volume)).await {
                Response::EpochGrant(grant) => Ok(grant),
                _ => Err(ClientError::Unexpected),
            }
        }
        .boxed_local()
    }

    fn bands(&self, volume: VolumeId) -> Answer<Option<Vec<Band>>> {
        let client = Rc::clone(&self.0);
        async move {
            match client.ask(Request::Bands(volume)).await {
                Response::Bands(bands) => Ok(bands),
                _ => Err(ClientError::Unexpected),
            }
        }
        .boxed_local()
    }
}
