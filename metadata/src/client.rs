//! The way to the metadata service, for agents and the command line alike.
//!
//! A [`MetadataClient`] finds the leader by itself: it asks any member it knows, follows redirects, and learns the
//! members' addresses from every map it sees. A request is repeated with the same content until it is answered or its
//! deadline has passed; commands are made to be repeated ([`crate::state::command`]).
//!
//! [`MetadataClient::watch`] and [`MetadataClient::session`] keep running in the background for as long as what they
//! return lives, through every change of leader.
//!
//! Connections and background work belong to the runtime on which the client was made (an agent's control runtime);
//! requests may come from any other, a data core's included.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use weft_proto::band::{Band, EpochGrant, Replacement, RootUpdate};
use weft_proto::grpc::metadata as grpc;
use weft_proto::grpc::metadata::metadata_client::MetadataClient as Stub;
use weft_proto::id::{BandId, Epoch, IncarnationId, StripeNumber, VolumeId};

use crate::envelope::{self, EnvelopeError, Kind};
use crate::leader::HEARTBEAT;
use crate::propose::BandRequest;
use crate::state::command::ReplacementRequest;
use crate::state::{ClusterMap, Command, Refusal, Reply};
use crate::wire::{Answer, Proposed, Query, Status};

/// Messages of the map and of proposals. Guessed: maps are some hundred KiB.
pub(crate) const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Until a request counts as unanswered, where nothing else is said.
const DEADLINE: Duration = Duration::from_secs(10);
/// Until one member counts as not answering, and the next is asked.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Until a leader counts as gone for a session, and until a session counts as not begun. Both together stay below the
/// second that a new leader gives sessions to come: else a leader that hangs would take live agents with it.
const SESSION_SILENCE: Duration = Duration::from_millis(600);
const SESSION_ATTEMPT: Duration = Duration::from_millis(300);
const _: () =
    assert!(SESSION_SILENCE.as_millis() + SESSION_ATTEMPT.as_millis() < crate::leader::SILENCE.as_millis());
/// Between attempts while nobody leads.
const PAUSE: Duration = Duration::from_millis(50);
/// Silence after which a connection is tested, and after which it is given up. A leader that vanished without a word
/// must not hold up a watch.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_millis(1000));

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The state rejects the command.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No leader answered before the deadline. The command may have been done, or may still be.
    #[error("metadata service unreachable ({last})")]
    Unavailable {
        /// What the last attempt met.
        last: String,
    },
    /// An answer that is none: a member of another version.
    #[error("metadata service answered what cannot be read: {0}")]
    Answer(#[from] EnvelopeError),
    /// An answer to something else.
    #[error("metadata service gave an answer to another question")]
    Unexpected,
}

/// A client of the metadata service. Cheap to clone; clones share what they have learnt.
#[derive(Clone, Debug)]
pub struct MetadataClient {
    peers: Arc<Mutex<Peers>>,
    /// Where connections and background work live; `None` for that of whoever asks.
    home: Option<Handle>,
    deadline: Duration,
    /// Until one member counts as not answering.
    attempt: Duration,
    /// Told when another member is known to lead.
    news: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Peers {
    /// Control addresses, in the order in which they are asked.
    addresses: Vec<String>,
    /// Who is held to lead.
    leader: Option<String>,
    channels: BTreeMap<String, Channel>,
    /// Of the address that is asked next.
    next: usize,
}

/// What one attempt brought.
enum Attempt<T> {
    Answered(T),
    Redirected(String),
}

impl MetadataClient {
    /// A client that begins with these control addresses (`host:port`), in this order. Made on a tokio runtime, it
    /// lives there; made outside of one, it lives wherever it is first used. Connects when first used.
    #[must_use]
    pub fn new(addresses: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            peers: Arc::new(Mutex::new(Peers {
                addresses: addresses.into_iter().map(Into::into).collect(),
                ..Peers::default()
            })),
            home: Handle::try_current().ok(),
            deadline: DEADLINE,
            attempt: ATTEMPT,
            news: Arc::default(),
        }
    }

    /// The same client with another deadline for each request.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Proposes a command; answers once it is committed and applied.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the state rejects it; [`ClientError::Unavailable`] if the outcome is unknown.
    pub async fn propose(&self, command: Command) -> Result<Reply, ClientError> {
        self.send(Proposed::Command(Box::new(command))).await
    }

    /// Asks for fresh bands, wherever placement puts them. May answer fewer than asked for.
    ///
    /// # Errors
    /// As [`MetadataClient::propose`]; [`Refusal::NoSpace`] and [`Refusal::TooFewDomains`] among the refusals.
    pub async fn grant_bands(&self, request: BandRequest) -> Result<Vec<Band>, ClientError> {
        match self.send(Proposed::Bands(request)).await? {
            Reply::Bands(bands) => Ok(bands),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Asks for a fresh chunk to rebuild a column into, wherever placement puts it.
    ///
    /// # Errors
    /// As [`MetadataClient::propose`]; [`Refusal::BandConflict`] and [`Refusal::NoSuchBand`] among the refusals.
    pub async fn grant_replacement(&self, request: ReplacementRequest) -> Result<Replacement, ClientError> {
        match self.send(Proposed::Replacement(request)).await? {
            Reply::Replacement(replacement) => Ok(replacement),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Gives back bands that were never written.
    ///
    /// # Errors
    /// As [`MetadataClient::propose`].
    pub async fn return_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        bands: Vec<BandId>,
    ) -> Result<(), ClientError> {
        self.propose(Command::ReturnBands { volume, epoch, bands })
            .await
            .map(|_| ())
    }

    /// Records a checkpoint; answers the new root version.
    ///
    /// # Errors
    /// As [`MetadataClient::propose`].
    pub async fn publish_root(&self, update: RootUpdate) -> Result<u64, ClientError> {
        root_version(self.propose(Command::PublishRoot { update }).await?)
    }

    /// Ends the recovered epoch and makes the new one serve; answers the new root version.
    ///
    /// # Errors
    /// As [`MetadataClient::propose`]; [`Refusal::NotFenced`] while too few fences are on record.
    pub async fn finish_takeover(
        &self,
        update: RootUpdate,
        recovered: Option<Epoch>,
        ended_at: StripeNumber,
    ) -> Result<u64, ClientError> {
        root_version(
            self.propose(Command::FinishTakeover {
                update,
                recovered,
                ended_at,
            })
            .await?,
        )
    }

    /// The cluster map as of now.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`] without a leader.
    pub async fn map(&self) -> Result<ClusterMap, ClientError> {
        match self.query(Query::Map).await? {
            Answer::Map(map) => {
                self.learn(&map);
                Ok(*map)
            }
            _ => Err(ClientError::Unexpected),
        }
    }

    /// What the owner of the volume's new epoch needs; `None` unless the volume is recovering.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`] without a leader.
    pub async fn epoch_grant(&self, volume: VolumeId) -> Result<Option<EpochGrant>, ClientError> {
        match self.query(Query::EpochGrant(volume)).await? {
            Answer::EpochGrant(grant) => Ok(grant),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// The volume's bands as they are now; `None` if there is no such volume.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`] without a leader.
    pub async fn bands(&self, volume: VolumeId) -> Result<Option<Vec<Band>>, ClientError> {
        match self.query(Query::Bands(volume)).await? {
            Answer::Bands(bands) => Ok(bands),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// How the Raft group and the space are.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`] without a leader.
    pub async fn status(&self) -> Result<Status, ClientError> {
        match self.query(Query::Status).await? {
            Answer::Status(status) => Ok(*status),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// The map as it changes; version 0 until the first has come. Ends when the receiver and its clones are dropped.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterMap>> {
        let (sender, receiver) = watch::channel(Arc::new(ClusterMap::default()));
        let client = self.clone();
        self.spawn(async move {
            while !sender.is_closed() {
                tokio::select! {
                    () = sender.closed() => return,
                    () = client.follow(&sender) => {}
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        receiver
    }

    /// Keeps a session of `incarnation` with the leader, by heartbeats. The receiver turns `false` when the incarnation
    /// has been declared dead: the process must then exit. Ends when the receiver and its clones are dropped.
    ///
    /// It runs where the client lives: on a runtime that nothing blocks for longer than a heartbeat.
    #[must_use]
    pub fn session(&self, incarnation: IncarnationId) -> watch::Receiver<bool> {
        let (sender, receiver) = watch::channel(true);
        let client = self.clone();
        self.spawn(async move {
            while !sender.is_closed() && *sender.borrow() {
                tokio::select! {
                    () = sender.closed() => return,
                    () = client.beat(incarnation, &sender) => {}
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        receiver
    }

    /// Learns the members' addresses.
    pub fn learn(&self, map: &ClusterMap) {
        if map.nodes.is_empty() {
            return;
        }
        let mut peers = self.lock();
        let known: Vec<String> = map
            .nodes
            .values()
            .map(|node| node.control_address.clone())
            .collect();
        // Those given at the beginning stay: they may be right where the map is old.
        for address in known {
            if !peers.addresses.contains(&address) {
                peers.addresses.push(address);
            }
        }
    }

    /// The address of the leader, as far as it is known.
    #[must_use]
    pub fn leader(&self) -> Option<String> {
        self.lock().leader.clone()
    }

    async fn send(&self, proposed: Proposed) -> Result<Reply, ClientError> {
        let proposal = envelope::seal(Kind::PROPOSAL, &proposed);
        let reply: Reply = self
            .ask(|mut stub| {
                let request = grpc::ProposeRequest {
                    proposal: proposal.clone(),
                };
                async move {
                    let reply = stub.propose(request).await?.into_inner();
                    attempt(reply.result.map(|result| match result {
                        grpc::propose_reply::Result::Reply(reply) => Ok(reply),
                        grpc::propose_reply::Result::Redirect(redirect) => Err(redirect),
                    }))
                }
            })
            .await
            .and_then(|bytes| open(Kind::PROPOSAL, &bytes))?;
        Ok(reply.accepted()?)
    }

    async fn query(&self, query: Query) -> Result<Answer, ClientError> {
        let query = envelope::seal(Kind::QUERY, &query);
        self.ask(|mut stub| {
            let request = grpc::QueryRequest { query: query.clone() };
            async move {
                let reply = stub.query(request).await?.into_inner();
                attempt(reply.result.map(|result| match result {
                    grpc::query_reply::Result::Answer(answer) => Ok(answer),
                    grpc::query_reply::Result::Redirect(redirect) => Err(redirect),
                }))
            }
        })
        .await
        .and_then(|bytes| open(Kind::QUERY, &bytes))
    }

    /// Asks whoever is held to lead, and then everybody in turn, until somebody answers or the deadline has passed. Who is silent is
    /// not waited for once somebody else is known to lead: a leader that is cut off would cost a takeover seconds.
    async fn ask<T, F>(&self, mut call: impl FnMut(Stub<Channel>) -> F) -> Result<T, ClientError>
    where
        F: Future<Output = Result<Attempt<T>, tonic::Status>>,
    {
        let until = Instant::now() + self.deadline;
        let mut last = "no member is known".to_owned();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Unavailable { last });
            }
            if let Some((address, stub)) = self.pick() {
                let asked = tokio::time::timeout(left.min(self.attempt), call(stub));
                let outcome = tokio::select! {
                    biased;
                    outcome = asked => outcome,
                    () = self.another_leads(&address) => {
                        last = format!("{address} does not lead any more");
                        continue;
                    }
                };
                match outcome {
                    Ok(Ok(Attempt::Answered(answer))) => {
                        self.leads(&address);
                        return Ok(answer);
                    }
                    Ok(Ok(Attempt::Redirected(to))) => {
                        last = format!("{address} does not lead");
                        if self.redirected(&address, to) {
                            continue;
                        }
                    }
                    Ok(Err(status)) => {
                        last = format!("{address}: {}", status.message());
                        self.failed(&address);
                    }
                    Err(_) => {
                        last = format!("{address}: no answer in time");
                        self.failed(&address);
                    }
                }
            }
            tokio::time::sleep(PAUSE.min(left)).await;
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        match &self.home {
            Some(home) => home.spawn(task),
            None => tokio::spawn(task),
        }
    }

    fn pick(&self) -> Option<(String, Stub<Channel>)> {
        let mut peers = self.lock();
        let address = match &peers.leader {
            Some(leader) => leader.clone(),
            None => {
                let count = peers.addresses.len();
                let address = peers.addresses.get(peers.next % count.max(1))?.clone();
                peers.next = (peers.next + 1) % count;
                address
            }
        };
        let channel = match peers.channels.get(&address) {
            Some(channel) => channel.clone(),
            None => {
                let _at_home = self.home.as_ref().map(Handle::enter);
                let channel = connect(&address)?;
                peers.channels.insert(address.clone(), channel.clone());
                channel
            }
        };
        let stub = Stub::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Some((address, stub))
    }

    /// Whether somebody else is known to lead, and can be asked at once.
    fn redirected(&self, asked: &str, to: String) -> bool {
        let mut peers = self.lock();
        if to.is_empty() || to == asked {
            peers.leader = None;
            return false;
        }
        let is_news = peers.leader.as_deref() != Some(&to);
        if !peers.addresses.contains(&to) {
            peers.addresses.push(to.clone());
        }
        peers.leader = Some(to);
        is_news
    }

    /// A member has shown that it leads.
    fn leads(&self, address: &str) {
        {
            let mut peers = self.lock();
            if peers.leader.as_deref() == Some(address) {
                return;
            }
            peers.leader = Some(address.to_owned());
        }
        self.news.notify_waiters();
    }

    /// Waits until somebody else than `address` is held to lead.
    async fn another_leads(&self, address: &str) {
        loop {
            let news = self.news.notified();
            if self.leader().is_some_and(|leader| leader != address) {
                return;
            }
            news.await;
        }
    }

    fn failed(&self, address: &str) {
        let mut peers = self.lock();
        if peers.leader.as_deref() == Some(address) {
            peers.leader = None;
        }
        // A connection that hangs is not used again.
        peers.channels.remove(address);
    }

    fn lock(&self) -> MutexGuard<'_, Peers> {
        // Nothing panics while it holds the lock.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the map of one leader, until it leads no more.
    async fn follow(&self, sender: &watch::Sender<Arc<ClusterMap>>) {
        let Some((address, mut stub)) = self.pick() else {
            return;
        };
        let have_version = sender.borrow().version.0;
        let request = grpc::WatchRequest { have_version };
        let mut stream = match tokio::time::timeout(self.attempt, stub.watch(request)).await {
            Ok(Ok(stream)) => stream.into_inner(),
            Ok(Err(_)) | Err(_) => return self.failed(&address),
        };
        loop {
            match stream.message().await {
                Ok(Some(grpc::WatchReply {
                    result: Some(grpc::watch_reply::Result::Map(bytes)),
                })) => match envelope::open::<ClusterMap>(Kind::MAP, &bytes) {
                    Ok(map) => {
                        self.leads(&address);
                        self.learn(&map);
                        // A former leader may be behind what has been seen already.
                        sender.send_if_modified(|current| {
                            let newer = map.version > current.version;
                            if newer {
                                *current = Arc::new(map);
                            }
                            newer
                        });
                    }
                    Err(error) => {
                        tracing::error!(%error, %address, "the cluster map cannot be read");
                        return self.failed(&address);
                    }
                },
                Ok(Some(grpc::WatchReply {
                    result: Some(grpc::watch_reply::Result::Redirect(redirect)),
                })) => {
                    self.redirected(&address, redirect.leader_address);
                    return;
                }
                Ok(Some(grpc::WatchReply { result: None }) | None) | Err(_) => {
                    return self.failed(&address);
                }
            }
        }
    }

    /// Keeps one session, until it breaks.
    async fn beat(&self, incarnation: IncarnationId, live: &watch::Sender<bool>) {
        let Some((address, mut stub)) = self.pick() else {
            return;
        };
        let (beats, received) = tokio::sync::mpsc::channel(4);
        let heartbeat = grpc::Heartbeat {
            incarnation: incarnation.0,
        };
        // The first heartbeat goes with the request: the leader answers only when it has one.
        let _ = beats.try_send(heartbeat);
        let outbound = tokio_stream::wrappers::ReceiverStream::new(received);
        let mut stream = match tokio::time::timeout(SESSION_ATTEMPT, stub.session(outbound)).await {
            Ok(Ok(stream)) => stream.into_inner(),
            Ok(Err(_)) | Err(_) => return self.failed(&address),
        };
        let mut ticks = tokio::time::interval(HEARTBEAT);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut answered = Instant::now();
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    // A leader that answers none of several heartbeats is not there any more.
                    let full = beats.try_send(heartbeat).is_err();
                    if full || answered.elapsed() > SESSION_SILENCE {
                        return self.failed(&address);
                    }
                }
                message = stream.message() => match message {
                    Ok(Some(grpc::HeartbeatReply {
                        result: Some(grpc::heartbeat_reply::Result::Ack(ack)),
                    })) => {
                        answered = Instant::now();
                        self.leads(&address);
                        if !ack.live {
                            live.send_replace(false);
                            return;
                        }
                    }
                    Ok(Some(grpc::HeartbeatReply {
                        result: Some(grpc::heartbeat_reply::Result::Redirect(redirect)),
                    })) => {
                        self.redirected(&address, redirect.leader_address);
                        return;
                    }
                    Ok(Some(grpc::HeartbeatReply { result: None }) | None) | Err(_) => {
                        return self.failed(&address);
                    }
                }
            }
        }
    }
}

/// A connection to a control port, made when it is first used. Mutual TLS belongs here, and beside the listener.
pub(crate) fn connect(address: &str) -> Option<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
    Some(
        endpoint
            .connect_timeout(ATTEMPT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE.0)
            .keep_alive_timeout(KEEP_ALIVE.1)
            .keep_alive_while_idle(false)
            .connect_lazy(),
    )
}

fn attempt<T>(result: Option<Result<T, grpc::Redirect>>) -> Result<Attempt<T>, tonic::Status> {
    match result {
        Some(Ok(answer)) => Ok(Attempt::Answered(answer)),
        Some(Err(redirect)) => Ok(Attempt::Redirected(redirect.leader_address)),
        None => Err(tonic::Status::internal("an empty answer")),
    }
}

fn open<T: DeserializeOwned>(kind: Kind, bytes: &[u8]) -> Result<T, ClientError> {
    Ok(envelope::open(kind, bytes)?)
}

fn root_version(reply: Reply) -> Result<u64, ClientError> {
    match reply {
        Reply::Root { version } => Ok(version),
        _ => Err(ClientError::Unexpected),
    }
}

#[cfg(test)]
mod tests;
