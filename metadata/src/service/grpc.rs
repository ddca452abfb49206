//! The gRPC service that clients call.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::{RaftMetrics, ReadPolicy};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status as GrpcStatus, Streaming};
use weft_proto::grpc::metadata as grpc;
use weft_proto::id::{IncarnationId, NodeId};

use super::RaftGroup;
use super::driver::Event;
use crate::envelope::{self, Kind};
use crate::propose;
use crate::raft::{Proposal, TypeConfig};
use crate::state::{ClusterState, Command, Refusal, Reply};
use crate::store::Shared;
use crate::wire::{Answer, Proposed, Query, Status};

/// How often a proposal of placement is made again from a newer state before its refusal is the answer.
const PROPOSALS_MAX: u32 = 5;

/// The service that clients call.
#[derive(Clone, Debug)]
pub struct ClientService {
    pub(super) raft: RaftGroup,
    pub(super) shared: Arc<Shared>,
    pub(super) events: mpsc::UnboundedSender<Event>,
}

/// Somebody else leads, as far as is known.
struct NotLeader {
    address: String,
}

impl From<NotLeader> for grpc::Redirect {
    fn from(NotLeader { address }: NotLeader) -> Self {
        Self {
            leader_address: address,
        }
    }
}

impl ClientService {
    /// Commits and applies one command.
    pub(super) async fn write(&self, command: Command) -> Result<Result<Reply, GrpcStatus>, Redirected> {
        match self.raft.client_write(Proposal(command)).await {
            Ok(response) => Ok(Ok(response.data)),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => Err(Redirected {
                node: forward.leader_id,
                fallback: forward.leader_node.map(|node| node.addr),
            }),
            // The entry may have been committed all the same: the client repeats it.
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(forward))) => Err(Redirected {
                node: forward.leader_id,
                fallback: forward.leader_node.map(|node| node.addr),
            }),
            Err(error) => Ok(Err(GrpcStatus::unavailable(error.to_string()))),
        }
    }

    /// Proposes bands or chunks from the state as it is, again where it has moved on in the meantime.
    async fn write_placed(
        &self,
        place: impl Fn(&ClusterState) -> Result<Command, Refusal>,
    ) -> Result<Result<Reply, GrpcStatus>, Redirected> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            // A proposal is made from the leader's own state: a follower's may be old, and its refusal with it.
            self.ensure_leader().await?;
            let command = match self.shared.read(&place) {
                Ok(command) => command,
                Err(refusal) => return Ok(Ok(Reply::Refused(refusal))),
            };
            let reply = self.write(command).await?;
            match reply {
                Ok(Reply::Refused(Refusal::ProposalConflict { .. })) if attempts < PROPOSALS_MAX => {}
                reply => return Ok(reply),
            }
        }
    }

    async fn ensure_leader(&self) -> Result<(), Redirected> {
        match self.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => Err(Redirected {
                node: forward.leader_id,
                fallback: forward.leader_node.map(|node| node.addr),
            }),
            Err(_) => Err(Redirected {
                node: None,
                fallback: None,
            }),
        }
    }

    fn not_leader(&self, redirected: Redirected) -> NotLeader {
        NotLeader {
            address: self
                .address_of(redirected.node)
                .or(redirected.fallback)
                .unwrap_or_default(),
        }
    }

    fn address_of(&self, node: Option<u64>) -> Option<String> {
        let node = NodeId(u32::try_from(node?).ok()?);
        self.shared
            .read(|state| Some(state.map.nodes.get(&node)?.control_address.clone()))
    }

    /// `None` while this member leads; otherwise who does.
    fn elsewhere(&self) -> Option<NotLeader> {
        let redirected = {
            // Looked at in place: this is asked for every heartbeat.
            let metrics = self.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            if metrics.current_leader == Some(metrics.id) {
                return None;
            }
            Redirected {
                node: metrics.current_leader,
                fallback: metrics.current_leader.and_then(|leader| {
                    let node = metrics.membership_config.membership().get_node(&leader)?;
                    Some(node.addr.clone())
                }),
            }
        };
        Some(self.not_leader(redirected))
    }

    fn answer(&self, query: Query) -> Answer {
        self.shared.read(|state| match query {
            Query::Map => Answer::Map(Box::new(state.map.clone())),
            Query::EpochGrant(volume) => Answer::EpochGrant(state.epoch_grant(volume)),
            Query::Bands(volume) => Answer::Bands(state.bands(volume)),
            Query::Status => {
                let metrics = self.raft.metrics().borrow_watched().clone();
                let membership = metrics.membership_config.membership();
                let node = |id: u64| NodeId(u32::try_from(id).unwrap_or(u32::MAX));
                Answer::Status(Box::new(Status {
                    leader: node(metrics.id),
                    term: metrics.current_term,
                    applied_index: metrics.last_applied.map_or(0, |log_id| log_id.index),
                    voters: voters(&metrics).into_iter().map(node).collect(),
                    learners: membership.learner_ids().map(node).collect(),
                    ..Status::of(state)
                }))
            }
        })
    }
}

/// The members of which a minority can be spared now. While a change is under way a majority of the old voters is needed as
/// well, so the new ones do not count before their membership is committed.
fn voters(metrics: &RaftMetrics<TypeConfig>) -> Vec<u64> {
    let stored = &metrics.membership_config;
    match stored.membership().get_joint_config().as_slice() {
        [old, _, ..] => old.iter().copied().collect(),
        [voters] if *stored.log_id() <= metrics.last_applied => voters.iter().copied().collect(),
        _ => vec![metrics.id],
    }
}

/// Who leads, by openraft's word.
pub(super) struct Redirected {
    node: Option<u64>,
    fallback: Option<String>,
}

#[tonic::async_trait]
impl grpc::metadata_server::Metadata for ClientService {
    async fn propose(
        &self,
        request: Request<grpc::ProposeRequest>,
    ) -> Result<Response<grpc::ProposeReply>, GrpcStatus> {
        let proposed: Proposed = envelope::open(Kind::PROPOSAL, &request.into_inner().proposal)
            .map_err(|error| GrpcStatus::invalid_argument(error.to_string()))?;
        let written = match &proposed {
            Proposed::Command(command) => self.write(Command::clone(command)).await,
            Proposed::Bands(request) => {
                self.write_placed(|state| propose::propose_bands(state, request))
                    .await
            }
            Proposed::Replacement(request) => {
                self.write_placed(|state| propose::propose_replacement(state, request))
                    .await
            }
        };
        let result = match written {
            Ok(reply) => grpc::propose_reply::Result::Reply(envelope::seal(Kind::PROPOSAL, &reply?)),
            Err(redirected) => grpc::propose_reply::Result::Redirect(self.not_leader(redirected).into()),
        };
        Ok(Response::new(grpc::ProposeReply { result: Some(result) }))
    }

    async fn query(
        &self,
        request: Request<grpc::QueryRequest>,
    ) -> Result<Response<grpc::QueryReply>, GrpcStatus> {
        let query: Query = envelope::open(Kind::QUERY, &request.into_inner().query)
            .map_err(|error| GrpcStatus::invalid_argument(error.to_string()))?;
        let result = match self.ensure_leader().await {
            Ok(()) => grpc::query_reply::Result::Answer(envelope::seal(Kind::QUERY, &self.answer(query))),
            Err(redirected) => grpc::query_reply::Result::Redirect(self.not_leader(redirected).into()),
        };
        Ok(Response::new(grpc::QueryReply { result: Some(result) }))
    }

    type WatchStream = ReceiverStream<Result<grpc::WatchReply, GrpcStatus>>;

    async fn watch(
        &self,
        request: Request<grpc::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, GrpcStatus> {
        let mut have_version = request.into_inner().have_version;
        let (sender, receiver) = mpsc::channel(2);
        let service = self.clone();
        tokio::spawn(async move {
            let mut maps = service.shared.watch_map();
            let mut leadership = service.raft.server_metrics();
            loop {
                if let Some(elsewhere) = service.elsewhere() {
                    let result = grpc::watch_reply::Result::Redirect(elsewhere.into());
                    let _ = sender.send(Ok(grpc::WatchReply { result: Some(result) })).await;
                    return;
                }
                let map = Arc::clone(&maps.borrow_and_update());
                if map.version.0 > have_version {
                    have_version = map.version.0;
                    let result = grpc::watch_reply::Result::Map(envelope::seal(Kind::MAP, &*map));
                    let sent = sender.send(Ok(grpc::WatchReply { result: Some(result) })).await;
                    if sent.is_err() {
                        return;
                    }
                    continue;
                }
                tokio::select! {
                    changed = maps.changed() => if changed.is_err() { return },
                    changed = leadership.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type SessionStream = Pin<Box<dyn Stream<Item = Result<grpc::HeartbeatReply, GrpcStatus>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<grpc::Heartbeat>>,
    ) -> Result<Response<Self::SessionStream>, GrpcStatus> {
        let session = Session {
            service: self.clone(),
            beats: request.into_inner(),
            incarnation: None,
            ended: false,
        };
        let replies = futures_util::stream::unfold(session, |mut session| async move {
            let reply = session.next().await?;
            Some((Ok(reply), session))
        });
        Ok(Response::new(replies.boxed()))
    }
}

/// One agent's session. Dropped when its connection breaks, and reports that.
struct Session {
    service: ClientService,
    beats: Streaming<grpc::Heartbeat>,
    incarnation: Option<IncarnationId>,
    ended: bool,
}

impl Session {
    async fn next(&mut self) -> Option<grpc::HeartbeatReply> {
        if self.ended {
            return None;
        }
        let beat = self.beats.message().await.ok()??;
        let incarnation = IncarnationId(beat.incarnation);
        self.incarnation = Some(incarnation);
        let result = match self.service.elsewhere() {
            Some(elsewhere) => {
                // This is an answer, not a death.
                self.incarnation = None;
                self.ended = true;
                grpc::heartbeat_reply::Result::Redirect(elsewhere.into())
            }
            None => {
                let (live, map_version) = self.service.shared.read(|state| {
                    // An incarnation that this member has not applied yet is not dead.
                    let unknown = incarnation.0 >= state.next.incarnation;
                    (unknown || state.map.is_live(incarnation), state.map.version.0)
                });
                let _ = self.service.events.send(Event::Heartbeat(incarnation));
                grpc::heartbeat_reply::Result::Ack(grpc::HeartbeatAck { live, map_version })
            }
        };
        Some(grpc::HeartbeatReply { result: Some(result) })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(incarnation) = self.incarnation {
            let _ = self.service.events.send(Event::Broken(incarnation));
        }
    }
}

/// openraft's configuration type, named so that its bounds are checked where it is used.
const _: fn() = || {
    fn is_config<C: openraft::RaftTypeConfig>() {}
    is_config::<TypeConfig>();
};
