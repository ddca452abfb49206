//! The stream of AppendEntries, against a member that says what the test wants.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use openraft::raft::AppendEntriesResponse::HigherVote;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use weft_proto::grpc::metadata::raft_server::{Raft, RaftServer};

use super::*;
use crate::service::incoming;
use crate::store::StateMachine;

/// For a request that is to be answered.
const PATIENCE: Duration = Duration::from_secs(60);

/// Answers each request with its own vote.
#[derive(Clone, Default)]
struct Echo {
    streams: Arc<AtomicUsize>,
    /// Ends each stream behind so many answers, as a member does that is started again.
    answers_of_a_stream: Option<usize>,
    /// A request of this term is answered once the test says so.
    late: Option<(u64, watch::Receiver<bool>)>,
}

impl Echo {
    async fn serve(self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder().add_service(RaftServer::new(self));
        tokio::spawn(server.serve_with_incoming(incoming(listener)));
        address
    }
}

#[tonic::async_trait]
impl Raft for Echo {
    type AppendEntriesStream = <RaftService as Raft>::AppendEntriesStream;

    async fn append_entries(
        &self,
        requests: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<Self::AppendEntriesStream>, Status> {
        self.streams.fetch_add(1, Ordering::Relaxed);
        let late = self.late.clone();
        let answers = requests.into_inner().then(move |request| {
            let late = late.clone();
            async move {
                let request: AppendEntriesRequest<TypeConfig> = read(&request?)?;
                let term = request.vote.leader_id.term;
                if let Some((_, mut now)) = late.filter(|(of, _)| *of == term) {
                    let _ = now.wait_for(|now| *now).await;
                }
                Ok(sealed(&HigherVote::<TypeConfig>(request.vote)))
            }
        });
        let answers_of_a_stream = self.answers_of_a_stream.unwrap_or(usize::MAX);
        Ok(Response::new(answers.take(answers_of_a_stream).boxed()))
    }

    async fn vote(&self, _: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn pre_vote(&self, _: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn transfer_leader(&self, _: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn install_snapshot(
        &self,
        _: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<RaftMessage>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

async fn peer(member: Echo) -> (Peer, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let shared = StateMachine::open(directory.path()).unwrap().shared();
    let node = BasicNode {
        addr: member.serve().await.to_string(),
    };
    let peer = Network { shared }.new_heartbeat_client(2, &node).await;
    (peer, directory)
}

/// Sends a request of this term; answers whether the answer is its own.
async fn call(peer: &mut Peer, term: u64, limit: Duration) -> Result<bool, RPCError<TypeConfig>> {
    let request = AppendEntriesRequest {
        vote: Vote::new(term, 1),
        prev_log_id: None,
        entries: Vec::new(),
        leader_commit: None,
    };
    let answer = peer.append_entries(request, RPCOption::new(limit)).await?;
    Ok(answer == HigherVote(Vote::new(term, 1)))
}

#[tokio::test]
async fn heartbeats_share_a_stream() {
    let member = Echo::default();
    let streams = Arc::clone(&member.streams);
    let (mut peer, _directory) = peer(member).await;
    for term in 1..=20 {
        assert!(call(&mut peer, term, PATIENCE).await.unwrap());
    }
    assert_eq!(streams.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn whoever_calls_seldom_leaves_no_stream_open() {
    let member = Echo::default();
    let streams = Arc::clone(&member.streams);
    let (mut peer, _directory) = peer(member).await;
    peer.keeps_stream = false;
    for term in 1..=3 {
        assert!(call(&mut peer, term, PATIENCE).await.unwrap());
    }
    assert_eq!(streams.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_stream_that_has_ended_is_replaced_and_nobody_is_told() {
    let member = Echo {
        answers_of_a_stream: Some(3),
        ..Echo::default()
    };
    let streams = Arc::clone(&member.streams);
    let (mut peer, _directory) = peer(member).await;
    for term in 1..=10 {
        assert!(call(&mut peer, term, PATIENCE).await.unwrap());
    }
    assert_eq!(streams.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn an_answer_that_comes_too_late_is_nobody_elses() {
    let (now, watched) = watch::channel(false);
    let member = Echo {
        late: Some((2, watched)),
        ..Echo::default()
    };
    let (mut peer, _directory) = peer(member).await;
    assert!(call(&mut peer, 1, PATIENCE).await.unwrap());
    call(&mut peer, 2, Duration::from_millis(10)).await.unwrap_err();
    now.send_replace(true);
    assert!(call(&mut peer, 3, PATIENCE).await.unwrap());
    // Given up by openraft, in the middle.
    now.send_replace(false);
    let given_up = tokio::time::timeout(Duration::from_millis(10), call(&mut peer, 2, PATIENCE));
    given_up.await.unwrap_err();
    now.send_replace(true);
    assert!(call(&mut peer, 4, PATIENCE).await.unwrap());
}
