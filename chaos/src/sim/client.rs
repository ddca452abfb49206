//! The way to the metadata service: finds the leader, asks again with the same content until there is an answer, and is
//! sometimes heard twice, the second time seconds later. And the engine's [`Directory`] over it.
//!
//! A counterpart of `metadata/src/client.rs` and `node/src/agent/directory.rs` without gRPC.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_metadata::propose::BandRequest;
use weft_metadata::state::command::{Purpose, Refusal, Reply};
use weft_metadata::state::{ClusterMap, Command};
use weft_proto::band::{Band, ChunkSize, EpochGrant, RootUpdate};
use weft_proto::id::{BandId, Epoch, IncarnationId, MapVersion, NodeId, StripeNumber, VolumeId};
use weft_volume::seams::{BandPurpose, Directory, DirectoryError, Timestamp};

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
/// As in `node/src/agent/directory.rs`.
const PATIENCE: Duration = Duration::from_secs(2);
const IMPATIENCE: Duration = Duration::from_secs(10);

/// A client of the metadata service in one process.
pub(super) struct Client {
    cluster: Rc<Cluster>,
    process: Process,
    guess: Cell<NodeId>,
    /// Until when narrower bands are taken at once.
    impatient_until: Cell<Option<Timestamp>>,
}

impl Client {
    pub(super) fn new(cluster: &Rc<Cluster>, process: &Process) -> Rc<Self> {
        Rc::new(Self {
            cluster: Rc::clone(cluster),
            process: process.clone(),
            guess: Cell::new(cluster.raft.voters()[0]),
            impatient_until: Cell::new(None),
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

    pub(super) async fn epoch_grant(&self, volume: VolumeId) -> Option<EpochGrant> {
        match self.ask(Request::EpochGrant(volume)).await {
            Response::EpochGrant(grant) => grant,
            _ => None,
        }
    }

    /// The map, once it is newer than `known`; `None` when nobody told in time.
    pub(super) async fn map_after(&self, known: MapVersion) -> Option<Rc<ClusterMap>> {
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

/// [`Directory`] of one engine.
pub(super) struct SimDirectory(pub(super) Rc<Client>);

impl SimDirectory {
    fn propose(
        &self,
        step: Step,
        command: Command,
    ) -> LocalBoxFuture<'static, Result<Reply, DirectoryError>> {
        let client = Rc::clone(&self.0);
        async move {
            let _under = client.cluster.steps.enter(step);
            client.propose(command).await.map_err(directory_error)
        }
        .boxed_local()
    }
}

impl Directory for SimDirectory {
    fn grant_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        chunk_size: ChunkSize,
        count: u32,
        purpose: BandPurpose,
    ) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        let client = Rc::clone(&self.0);
        let mut request = BandRequest {
            volume,
            epoch,
            request: client.process.random(),
            purpose: match purpose {
                BandPurpose::User => Purpose::User,
                BandPurpose::Internal => Purpose::Internal,
            },
            chunk_size,
            count,
            patient: true,
        };
        async move {
            let _under = client.cluster.steps.enter(Step::Grant);
            let process = &client.process;
            let asked = process.now();
            loop {
                let impatient = client.impatient_until.get();
                request.patient = impatient.is_none_or(|until| process.now() >= until);
                let Response::Reply(reply) = client.ask(Request::GrantBands(request)).await else {
                    unreachable!("a request for bands is answered with a reply");
                };
                match reply.accepted() {
                    Ok(Reply::Bands(bands)) => return Ok(bands),
                    Ok(_) => return Err(DirectoryError::Unavailable),
                    Err(Refusal::AwaitsRegistration { .. }) => {
                        if process.now() >= asked.after(PATIENCE) {
                            client.impatient_until.set(Some(process.now().after(IMPATIENCE)));
                        } else {
                            process.sleep(PAUSE).await;
                        }
                    }
                    Err(Refusal::ProposalConflict { .. }) => process.sleep(PAUSE).await,
                    Err(refusal) => return Err(directory_error(refusal)),
                }
            }
        }
        .boxed_local()
    }

    fn publish_root(&self, update: RootUpdate) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        let reply = self.propose(Step::Checkpoint, Command::PublishRoot { update });
        async move { root_version(&reply.await?) }.boxed_local()
    }

    fn finish_takeover(
        &self,
        update: RootUpdate,
        recovered: Option<Epoch>,
        ended_at: StripeNumber,
    ) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        let command = Command::FinishTakeover {
            update,
            recovered,
            ended_at,
        };
        let reply = self.propose(Step::Finish, command);
        async move { root_version(&reply.await?) }.boxed_local()
    }

    fn bands(&self, volume: VolumeId) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        let client = Rc::clone(&self.0);
        async move {
            match client.ask(Request::Bands(volume)).await {
                Response::Bands(bands) => bands.ok_or(DirectoryError::NoSuchVolume),
                _ => Err(DirectoryError::Unavailable),
            }
        }
        .boxed_local()
    }

    fn return_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        bands: Vec<BandId>,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>> {
        let reply = self.propose(Step::Grant, Command::ReturnBands { volume, epoch, bands });
        async move { reply.await.map(drop) }.boxed_local()
    }
}

fn root_version(reply: &Reply) -> Result<u64, DirectoryError> {
    match reply {
        Reply::Root { version } => Ok(*version),
        _ => Err(DirectoryError::Unavailable),
    }
}

/// As in `node/src/agent/directory.rs`.
fn directory_error(refusal: Refusal) -> DirectoryError {
    match refusal {
        Refusal::Stale { epoch, current } => DirectoryError::Stale { epoch, current },
        Refusal::RootConflict { expected, current } => DirectoryError::RootConflict { expected, current },
        Refusal::NoSpace { .. } => DirectoryError::NoSpace,
        Refusal::TooFewDomains {
            available, needed, ..
        } => DirectoryError::TooFewDomains { available, needed },
        Refusal::NoSuchVolume(_) => DirectoryError::NoSuchVolume,
        _ => DirectoryError::Unavailable,
    }
}
