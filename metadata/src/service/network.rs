//! Raft's messages between members: openraft's network traits over gRPC, and the other end.
//!
//! A message is an envelope with openraft's own type in CBOR. A member is reached at the control address that the
//! cluster map has for it now; the address in the membership only counts until the map has one.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use openraft::BasicNode;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest, VoteRequest,
    VoteResponse,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use weft_proto::grpc::metadata as grpc;
use weft_proto::grpc::metadata::RaftMessage;
use weft_proto::grpc::metadata::raft_client::RaftClient;
use weft_proto::id::NodeId;

use super::RaftGroup;
use crate::client::{self, MESSAGE_BYTES_MAX};
use crate::envelope::{self, Kind};
use crate::raft::TypeConfig;
use crate::raft::types::{Snapshot, SnapshotMeta, Vote};
use crate::store::Shared;

/// A snapshot travels in pieces of this size.
const PIECE_BYTES: usize = 1 << 20;
/// Largest snapshot taken from a peer.
const SNAPSHOT_BYTES_MAX: usize = 1 << 30;
/// Between attempts to reach a member that does not answer. Short: a restarted member should not wait for it.
const BACKOFF: Duration = Duration::from_millis(100);

type TransferLeaderResponse = openraft::raft::TransferLeaderResponse<TypeConfig>;

/// Makes connections to members.
#[derive(Clone, Debug)]
pub(super) struct Network {
    pub(super) shared: Arc<Shared>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer {
            target,
            fallback: node.addr.clone(),
            shared: Arc::clone(&self.shared),
            connected: None,
            keeps_stream: false,
            appends: None,
        }
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer {
            keeps_stream: true,
            ..self.new_client(target, node).await
        }
    }
}

/// One member as this one reaches it.
#[derive(Debug)]
pub(super) struct Peer {
    target: u64,
    /// The address in the membership.
    fallback: String,
    shared: Arc<Shared>,
    connected: Option<(String, Channel)>,
    /// Whether the stream of AppendEntries stays open between two calls. Where they are rare it costs more than it saves: its
    /// connection is tested while it is silent.
    keeps_stream: bool,
    /// Over `connected`, between two calls.
    appends: Option<Appends>,
}

/// AppendEntries and their answers, one at a time, on one stream: most of what an idle leader does is to send heartbeats, and a
/// call for each would have a stream of its own, with headers both ways.
#[derive(Debug)]
struct Appends {
    requests: mpsc::Sender<RaftMessage>,
    answers: Streaming<RaftMessage>,
}

impl Appends {
    async fn open(mut client: RaftClient<Channel>) -> Result<Self, Status> {
        let (requests, sent) = mpsc::channel(1);
        let answers = client.append_entries(ReceiverStream::new(sent)).await?;
        Ok(Self {
            requests,
            answers: answers.into_inner(),
        })
    }

    /// Sends one request and waits for its answer. To be dropped unless it has one: the next answer would be this one's.
    async fn call(&mut self, request: RaftMessage) -> Result<RaftMessage, Status> {
        let ended = || Status::unavailable("the stream of AppendEntries has ended");
        self.requests.send(request).await.map_err(|_| ended())?;
        self.answers.message().await?.ok_or_else(ended)
    }
}

impl Peer {
    fn client(&mut self) -> Result<RaftClient<Channel>, Unreachable<TypeConfig>> {
        let node = u32::try_from(self.target).map(NodeId).ok();
        let address = self
            .shared
            .read(|state| {
                node.and_then(|node| state.map.nodes.get(&node))
                    .map(|node| node.control_address.clone())
            })
            .unwrap_or_else(|| self.fallback.clone());
        let channel = match &self.connected {
            Some((known, channel)) if *known == address => channel.clone(),
            _ => {
                self.appends = None;
                let channel = client::connect(&address)
                    .ok_or_else(|| Unreachable::new(&Status::invalid_argument("not an address")))?;
                self.connected = Some((address, channel.clone()));
                channel
            }
        };
        Ok(RaftClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// Sends one message, and answers what the peer's openraft answered.
    async fn call<Req, Resp, F>(
        &mut self,
        message: &Req,
        option: &RPCOption,
        call: impl FnOnce(RaftClient<Channel>, RaftMessage) -> F,
    ) -> Result<Resp, RPCError<TypeConfig>>
    where
        Req: Serialize,
        Resp: DeserializeOwned,
        F: Future<Output = Result<Response<RaftMessage>, Status>>,
    {
        let client = self.client()?;
        let answer = call(client, sealed(message));
        let answer = async { Ok(answer.await?.into_inner()) };
        self.within(option, answer).await
    }

    /// Waits for the answer of the peer's openraft, and forgets the connection if it does not come.
    async fn within<Resp: DeserializeOwned>(
        &mut self,
        option: &RPCOption,
        answer: impl Future<Output = Result<RaftMessage, Status>>,
    ) -> Result<Resp, RPCError<TypeConfig>> {
        match tokio::time::timeout(option.soft_ttl(), answer).await {
            Ok(Ok(answer)) => {
                envelope::open(Kind::RAFT, &answer.body).map_err(|error| NetworkError::new(&error).into())
            }
            Ok(Err(status)) => {
                self.connected = None;
                Err(Unreachable::new(&status).into())
            }
            Err(elapsed) => {
                self.connected = None;
                Err(NetworkError::new(&elapsed).into())
            }
        }
    }
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = Bytes;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let client = self.client()?;
        let request = sealed(&rpc);
        // Not kept meanwhile: this may be given up half-way.
        let kept = self.appends.take();
        let mut appends = None;
        let answer = async {
            if let Some(mut kept) = kept
                && let Ok(answer) = kept.call(request.clone()).await
            {
                appends = Some(kept);
                return Ok(answer);
            }
            // What was kept may have ended long ago, with the peer's process. Entries may be sent twice.
            let mut opened = Appends::open(client).await?;
            let answer = opened.call(request).await?;
            appends = Some(opened);
            Ok(answer)
        };
        let response = self.within(&option, answer).await;
        self.appends = appends.filter(|_| self.keeps_stream);
        response
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(&rpc, &option, |mut client, message| async move {
            client.vote(message).await
        })
        .await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(&rpc, &option, |mut client, message| async move {
            client.pre_vote(message).await
        })
        .await
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse, RPCError<TypeConfig>> {
        self.call(&req, &option, |mut client, message| async move {
            client.transfer_leader(message).await
        })
        .await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let mut client = self.client()?;
        let head = sealed(&(vote, snapshot.meta));
        let data = snapshot.snapshot;
        let pieces = (0..data.len().div_ceil(PIECE_BYTES)).map(move |index| {
            let end = data.len().min((index + 1) * PIECE_BYTES);
            RaftMessage {
                body: data[index * PIECE_BYTES..end].to_vec(),
            }
        });
        let messages = tokio_stream::iter(std::iter::once(head).chain(pieces));
        tokio::select! {
            closed = cancel => Err(closed.into()),
            response = client.install_snapshot(messages) => match response {
                Ok(response) => envelope::open(Kind::RAFT, &response.into_inner().body)
                    .map_err(|error| NetworkError::new(&error).into()),
                Err(status) => Err(Unreachable::new(&status).into()),
            }
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(BACKOFF)))
    }
}

/// The gRPC service that other members call.
#[derive(Clone, Debug)]
pub struct RaftService {
    pub(super) raft: RaftGroup,
}

fn sealed<T: Serialize>(message: &T) -> RaftMessage {
    RaftMessage {
        body: envelope::seal(Kind::RAFT, message),
    }
}

fn read<T: DeserializeOwned>(message: &RaftMessage) -> Result<T, Status> {
    envelope::open(Kind::RAFT, &message.body).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn answer<T: Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Result<RaftMessage, Status> {
    match result {
        Ok(value) => Ok(sealed(&value)),
        Err(error) => Err(Status::internal(error.to_string())),
    }
}

#[tonic::async_trait]
impl grpc::raft_server::Raft for RaftService {
    type AppendEntriesStream = BoxStream<'static, Result<RaftMessage, Status>>;

    async fn append_entries(
        &self,
        requests: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<Self::AppendEntriesStream>, Status> {
        let raft = self.raft.clone();
        let answers = requests.into_inner().then(move |request| {
            let raft = raft.clone();
            async move { answer(raft.append_entries(read(&request?)?).await) }
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn vote(&self, message: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        answer(self.raft.vote(read(message.get_ref())?).await).map(Response::new)
    }

    async fn pre_vote(&self, message: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        answer(self.raft.pre_vote(read(message.get_ref())?).await).map(Response::new)
    }

    async fn transfer_leader(&self, message: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        answer(self.raft.handle_transfer_leader(read(message.get_ref())?).await).map(Response::new)
    }

    async fn install_snapshot(
        &self,
        messages: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<RaftMessage>, Status> {
        let mut messages = messages.into_inner();
        let head = messages
            .next()
            .await
            .ok_or_else(|| Status::invalid_argument("an empty snapshot"))??;
        let (vote, meta): (Vote, SnapshotMeta) = read(&head)?;
        let mut data = Vec::new();
        while let Some(piece) = messages.next().await {
            data.extend_from_slice(&piece?.body);
            if data.len() > SNAPSHOT_BYTES_MAX {
                return Err(Status::resource_exhausted("the snapshot is too large"));
            }
        }
        let snapshot = Snapshot {
            meta,
            snapshot: Bytes::from(data),
        };
        answer(self.raft.install_full_snapshot(vote, snapshot).await).map(Response::new)
    }
}

#[cfg(test)]
mod tests;
