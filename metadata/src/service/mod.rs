//! A member of the Raft group, as a service inside an agent.
//!
//! Every agent runs one. Voters hold the log and the state; an agent that is not chosen has an empty one and redirects,
//! until the leader asks it to join. The first agent [`MetadataService::bootstrap`]s the group.
//!
//! - [`grpc`]: what clients call; [`network`]: what members call;
//! - [`driver`]: the leader's duties.
//!
//! Its listener is the agent's: [`MetadataService::services`] gives the tonic services to put beside others, and
//! [`MetadataService::serve`] a server of these alone. Mutual TLS will come with the listener, there and in
//! [`crate::client`]'s one place that connects.

mod driver;
mod grpc;
mod network;

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use openraft::errors::{InitializeError, RaftError};
use openraft::{BasicNode, SnapshotPolicy};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use weft_proto::grpc::metadata::metadata_server::MetadataServer;
use weft_proto::grpc::metadata::raft_server::RaftServer;
use weft_proto::id::NodeId;

use crate::client::MESSAGE_BYTES_MAX;
use crate::log::{LogStore, SEGMENT_BYTES};
use crate::raft::{Proposal, TypeConfig};
use crate::state::command::NewNode;
use crate::state::{ClusterMap, ClusterState, Command, Refusal, Reply};
use crate::store::{Shared, StateMachine};

pub use grpc::ClientService;
pub use network::RaftService;

type RaftGroup = openraft::Raft<TypeConfig, StateMachine>;

/// What a member needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where log, state and snapshots are kept. One member at a time.
    pub directory: PathBuf,
    /// Who this is.
    pub node: NodeId,
    /// Raft's times.
    pub timing: Timing,
}

impl Config {
    /// With the usual times.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>, node: NodeId) -> Self {
        Self {
            directory: directory.into(),
            node,
            timing: Timing::default(),
        }
    }
}

/// Raft's times, and how long the log gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Between a leader's heartbeats.
    pub heartbeat: Duration,
    /// A follower stands for election after a silence of `election_max` (the leader's lease) and a time drawn
    /// from this …
    pub election_min: Duration,
    /// … to this.
    pub election_max: Duration,
    /// Entries between snapshots.
    pub snapshot_entries: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            // openraft sends at its ticks, which are 13/64 of this apart, of which every third is taken (see `raft::runtime`): 63 ms.
            // So a heartbeat goes out every 126 ms, and also when a tick is 20 ms late.
            heartbeat: Duration::from_millis(106),
            // Together a silence of 400 to 500 ms: a heartbeat may be 270 ms late or two of them lost, and an unplanned failover
            // has more than 1.4 of its two seconds for the lease, the fence and the scan.
            election_min: Duration::from_millis(150),
            election_max: Duration::from_millis(250),
            snapshot_entries: 2000,
        }
    }
}

/// Why a member did not start or begin.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Its files could not be opened or read.
    #[error("metadata storage: {0}")]
    Storage(#[from] io::Error),
    /// openraft stopped, or was set up wrongly.
    #[error("raft: {0}")]
    Raft(String),
    /// The state rejects what was asked.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A running member. Dropping it leaves its tasks running; [`MetadataService::shutdown`] ends them.
#[derive(Debug)]
pub struct MetadataService {
    raft: RaftGroup,
    shared: Arc<Shared>,
    events: mpsc::UnboundedSender<driver::Event>,
    tasks: Vec<JoinHandle<()>>,
}

/// The tonic services of a member, to be put beside others.
pub type Services = (MetadataServer<ClientService>, RaftServer<RaftService>);

impl MetadataService {
    /// Opens the member's storage and starts it. It takes part once it serves ([`MetadataService::services`]) and is
    /// a member, by [`MetadataService::bootstrap`] or because the leader has asked it to join.
    ///
    /// # Errors
    /// [`ServiceError`] if the storage does not open or is damaged.
    pub async fn start(config: Config) -> Result<Self, ServiceError> {
        let Config {
            directory,
            node,
            timing,
        } = config;
        let (log, machine) = tokio::task::spawn_blocking(move || {
            let log = LogStore::open(&directory.join("log"), SEGMENT_BYTES)?;
            Ok::<_, io::Error>((log, StateMachine::open(&directory)?))
        })
        .await
        .map_err(io::Error::other)??;
        let shared = machine.shared();
        let network = network::Network {
            shared: Arc::clone(&shared),
        };
        let raft = RaftGroup::new(
            u64::from(node.0),
            Arc::new(raft_config(timing)?),
            network,
            log,
            machine,
        )
        .await
        .map_err(|error| ServiceError::Raft(error.to_string()))?;
        let (events, received) = mpsc::unbounded_channel();
        let driver = driver::Driver {
            raft: raft.clone(),
            shared: Arc::clone(&shared),
            events: events.clone(),
        };
        let tasks = vec![
            tokio::spawn(driver.clone().run(received)),
            tokio::spawn(driver.run_membership()),
        ];
        Ok(Self {
            raft,
            shared,
            events,
            tasks,
        })
    }

    /// Begins a group of this one member, and a cluster: `init` is a [`Command::Init`], `first` this node. It must be
    /// [`NodeId`] 1. May be repeated after a crash.
    ///
    /// # Errors
    /// [`ServiceError`] if the group has begun otherwise, or the state rejects the commands.
    pub async fn bootstrap(&self, init: Command, first: NewNode) -> Result<NodeId, ServiceError> {
        let this = *self.raft.node_id();
        let member = BasicNode {
            addr: first.control_address.clone(),
        };
        match self.raft.initialize(BTreeMap::from([(this, member)])).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(error) => return Err(ServiceError::Raft(error.to_string())),
        }
        self.raft
            .wait(Some(Duration::from_secs(30)))
            .metrics(|metrics| metrics.current_leader.is_some(), "a leader")
            .await
            .map_err(|error| ServiceError::Raft(error.to_string()))?;
        self.write(init).await?;
        match self.write(Command::AddNode(first)).await? {
            Reply::Node(node) if u64::from(node.0) == this => Ok(node),
            reply => Err(ServiceError::Raft(format!("{reply:?} instead of {this}"))),
        }
    }

    async fn write(&self, command: Command) -> Result<Reply, ServiceError> {
        let response = self
            .raft
            .client_write(Proposal(command))
            .await
            .map_err(|error| ServiceError::Raft(error.to_string()))?;
        Ok(response.data.accepted()?)
    }

    /// The tonic services, for the agent's own server.
    #[must_use]
    pub fn services(&self) -> Services {
        let clients = MetadataServer::new(ClientService {
            raft: self.raft.clone(),
            shared: Arc::clone(&self.shared),
            events: self.events.clone(),
        })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let members = RaftServer::new(RaftService {
            raft: self.raft.clone(),
        })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
        (clients, members)
    }

    /// Serves on a bound listener until `shutdown` completes, for an agent that serves nothing else there.
    pub fn serve(
        &self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> impl Future<Output = Result<(), tonic::transport::Error>> + Send + 'static {
        let (clients, members) = self.services();
        Server::builder()
            .add_service(clients)
            .add_service(members)
            .serve_with_incoming_shutdown(incoming(listener), shutdown)
    }

    /// Whether this member has ever been part of a group.
    ///
    /// # Errors
    /// [`ServiceError`] if it has stopped.
    pub async fn is_initialized(&self) -> Result<bool, ServiceError> {
        self.raft
            .is_initialized()
            .await
            .map_err(|error| ServiceError::Raft(error.to_string()))
    }

    /// Whether this member leads, as far as it knows.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.raft.is_leader()
    }

    /// The map as this member has applied it; may lag behind the leader's.
    #[must_use]
    pub fn local_map(&self) -> watch::Receiver<Arc<ClusterMap>> {
        self.shared.watch_map()
    }

    /// The whole state as this member has applied it; for inspection and tests.
    #[must_use]
    pub fn local_state(&self) -> ClusterState {
        self.shared.read(ClusterState::clone)
    }

    /// Stops the member. Its files are closed when this and every service of it are gone.
    pub async fn shutdown(mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
        }
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "the Raft member ended badly");
        }
    }
}

/// How many of `members` vote where `wished` shall: 5, 3 or 1, since an even number only adds a way to fail. `None` of none.
#[must_use]
pub fn voters_among(wished: usize, members: usize) -> Option<usize> {
    [5, 3, 1]
        .into_iter()
        .find(|count| *count <= wished && *count <= members)
}

/// What arrives on a listener. Without delay: a server that is given its connections does not set that by itself, and an
/// answer of two packets then waits 40 ms for an acknowledgement.
pub fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

fn raft_config(timing: Timing) -> Result<openraft::Config, ServiceError> {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    openraft::Config {
        cluster_name: "weft".into(),
        heartbeat_interval: ms(timing.heartbeat),
        election_timeout_min: ms(timing.election_min),
        election_timeout_max: ms(timing.election_max),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(timing.snapshot_entries),
        max_in_snapshot_log_to_keep: timing.snapshot_entries / 2,
        replication_lag_threshold: timing.snapshot_entries * 2,
        // A member that was cut off must not depose a leader that works, when it comes back.
        enable_pre_vote: Some(true),
        ..openraft::Config::default()
    }
    .validate()
    .map_err(|error| ServiceError::Raft(error.to_string()))
}
