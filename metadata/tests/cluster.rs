//! Clusters of members in one process, over loopback sockets. Each member has a runtime of its own, so that killing it
//! ends every task it has, in the middle of whatever it was doing.
//!
//! Nothing here depends on speed: tests wait for conditions, with a deadline that only a defect reaches.

#![expect(
    clippy::unwrap_used,
    reason = "a test, helpers included, ends at the first thing that goes wrong"
)]

use std::collections::BTreeSet;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use weft_metadata::service::Timing;
use weft_metadata::state::command::{Command, NewDrive, NewNode, NewPool, NewVolume, Reply};
use weft_metadata::state::map::{
    ClusterMap, DomainLevel, DriveClass, DriveHome, NodeState, Phase, Presentation, Settings,
};
use weft_metadata::state::{ClusterState, Refusal};
use weft_metadata::{ClientError, Config, MetadataClient, MetadataService};
use weft_proto::band::Geometry;
use weft_proto::id::{ClusterId, DriveUuid, HostId, IncarnationId, NodeId, PoolId, VolumeId};

const PATIENCE: Duration = Duration::from_secs(60);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// One agent, as far as metadata goes: a member, and a session of its incarnation.
struct Member {
    node: NodeId,
    address: SocketAddr,
    directory: PathBuf,
    running: Option<Running>,
}

struct Running {
    runtime: Runtime,
    service: Arc<MetadataService>,
    /// Of its agent, once it has one.
    session: Option<watch::Receiver<bool>>,
}

struct Cluster {
    members: Vec<Member>,
    client: MetadataClient,
    /// The tests' own tasks.
    runtime: Runtime,
    _directory: TempDir,
}

impl Member {
    /// Starts the member on its files, as after a crash.
    fn start(&mut self, timing: Timing) {
        let runtime = runtime();
        let mut config = Config::new(&self.directory, self.node);
        config.timing = timing;
        let address = self.address;
        let (service, address) = runtime.block_on(async {
            let listener = bind(address).await;
            let address = listener.local_addr().unwrap();
            let service = Arc::new(MetadataService::start(config).await.unwrap());
            tokio::spawn(service.serve(listener, std::future::pending()));
            (service, address)
        });
        self.address = address;
        self.running = Some(Running {
            runtime,
            service,
            session: None,
        });
    }

    /// Ends every task where it stands.
    fn kill(&mut self) {
        if let Some(Running { runtime, service, .. }) = self.running.take() {
            runtime.shutdown_timeout(Duration::from_secs(10));
            drop(service);
        }
    }

    fn new_node(&self) -> NewNode {
        NewNode {
            name: format!("node-{}", self.node.0),
            rack: None,
            control_address: self.address.to_string(),
            nvme_address: "127.0.0.1:4420".into(),
        }
    }

    fn state(&self) -> ClusterState {
        self.running.as_ref().unwrap().service.local_state()
    }
}

/// The port of a killed member may take a moment to be free again.
async fn bind(address: SocketAddr) -> tokio::net::TcpListener {
    let until = Instant::now() + PATIENCE;
    loop {
        match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) if Instant::now() < until => {
                eprintln!("{address}: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => panic!("{address}: {error}"),
        }
    }
}

impl Cluster {
    /// `count` members, of which `voters` vote; every one with a live incarnation.
    fn start(count: u32, voters: u8, timing: Timing) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut members: Vec<Member> = (1..=count)
            .map(|index| Member {
                node: NodeId(index),
                address: "127.0.0.1:0".parse().unwrap(),
                directory: directory.path().join(index.to_string()),
                running: None,
            })
            .collect();
        for member in &mut members {
            member.start(timing);
        }
        let client = MetadataClient::new(members.iter().map(|member| member.address.to_string()))
            .with_deadline(PATIENCE);
        let mut cluster = Self {
            members,
            client,
            runtime: runtime(),
            _directory: directory,
        };
        let first = &cluster.members[0];
        let running = first.running.as_ref().unwrap();
        running
            .runtime
            .block_on(running.service.bootstrap(init(voters), first.new_node()))
            .unwrap();
        for index in 1..count as usize {
            let new = cluster.members[index].new_node();
            assert_eq!(
                cluster.propose(Command::AddNode(new)),
                Reply::Node(NodeId(index as u32 + 1))
            );
        }
        for index in 0..count as usize {
            cluster.enliven(index);
        }
        let wanted = usize::from(voters).min(count as usize);
        cluster.wait("the voters", |cluster| {
            cluster
                .ask(|client| async move { client.status().await })
                .is_ok_and(|status| status.voters.len() == wanted)
        });
        cluster
    }

    /// A new incarnation, with a session from the member's own runtime.
    fn enliven(&mut self, index: usize) -> IncarnationId {
        let node = self.members[index].node;
        let key = u64::from(std::process::id()) << 32 | u64::from(unique());
        let reply = self.propose(Command::StartIncarnation {
            node,
            host_id: HostId(u128::from(key).to_le_bytes()),
            key,
        });
        let Reply::Incarnation(incarnation) = reply else {
            panic!("{reply:?}");
        };
        let client = MetadataClient::new(self.members.iter().map(|member| member.address.to_string()));
        let running = self.members[index].running.as_mut().unwrap();
        let _entered = running.runtime.enter();
        running.session = Some(client.session(incarnation));
        incarnation
    }

    fn ask<T, F: Future<Output = T>>(&self, call: impl FnOnce(MetadataClient) -> F) -> T {
        self.runtime.block_on(call(self.client.clone()))
    }

    fn propose(&self, command: Command) -> Reply {
        self.ask(|client| async move { client.propose(command).await })
            .unwrap()
    }

    fn map(&self) -> ClusterMap {
        self.ask(|client| async move { client.map().await }).unwrap()
    }

    fn wait(&self, what: &str, mut reached: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !reached(self) {
            assert!(Instant::now() < until, "waited for {what} in vain");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Index of the member that leads.
    fn leader(&self) -> usize {
        let status = self.ask(|client| async move { client.status().await }).unwrap();
        self.members
            .iter()
            .position(|member| member.node == status.leader)
            .unwrap()
    }

    fn pool(&self) -> PoolId {
        match self.propose(Command::CreatePool(NewPool {
            name: "pool".into(),
            geometry: Geometry::new(1, 1).unwrap(),
            domain: DomainLevel::Node,
            classes: BTreeSet::from([DriveClass::Tlc]),
        })) {
            Reply::Pool(pool) => pool,
            reply => panic!("{reply:?}"),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.members.iter_mut().for_each(Member::kill);
    }
}

fn unique() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

fn init(voters: u8) -> Command {
    Command::Init {
        id: ClusterId([1; 16]),
        name: "test".into(),
        authentication_key: [2; 32],
        fencing_host_id: HostId([3; 16]),
        fencing_key: 4,
        settings: Settings {
            voters,
            ..Settings::default()
        },
    }
}

fn drive(node: NodeId, name: &str) -> Command {
    Command::AddDrive(NewDrive {
        uuid: DriveUuid(u128::from(unique()).to_le_bytes()),
        name: name.into(),
        home: DriveHome::Node(node),
        class: DriveClass::Tlc,
        start_mib: 1,
        end_mib: 1025,
        registrants_max: 64,
    })
}

fn volume(pool: PoolId, name: &str) -> Command {
    Command::CreateVolume(NewVolume {
        name: name.into(),
        pool,
        size_bytes: 1 << 30,
        block_bytes: 4096,
        geometry: None,
        uuid: [7; 16],
        subnqn: format!("nqn.2026-01.example:{name}").parse().unwrap(),
        allowed_hosts: BTreeSet::new(),
        presentation: Presentation::All,
        preferred: None,
    })
}

#[test]
fn a_client_finds_the_leader_and_the_refusal_comes_back_typed() {
    let cluster = Cluster::start(3, 3, Timing::default());
    // A client that knows nobody but a follower.
    let leader = cluster.leader();
    let follower = cluster.members[(leader + 1) % 3].address.to_string();
    let client = MetadataClient::new([follower]).with_deadline(PATIENCE);
    cluster.runtime.block_on(async {
        let map = client.map().await.unwrap();
        assert_eq!(map.nodes.len(), 3);
        let refused = client
            .propose(Command::RemoveNode { node: NodeId(77) })
            .await
            .unwrap_err();
        assert_eq!(refused, ClientError::Refused(Refusal::NoSuchNode(NodeId(77))));
    });
    assert_eq!(client.leader(), Some(cluster.members[leader].address.to_string()));
}

#[test]
fn a_killed_leader_is_replaced_and_nothing_answered_is_lost() {
    let mut cluster = Cluster::start(3, 3, Timing::default());
    for round in 0..3 {
        for index in 0..10 {
            cluster.propose(drive(NodeId(1), &format!("before-{round}-{index}")));
        }
        let leader = cluster.leader();
        cluster.members[leader].kill();
        for index in 0..10 {
            cluster.propose(drive(NodeId(1), &format!("after-{round}-{index}")));
        }
        assert_ne!(cluster.leader(), leader);
        assert_eq!(cluster.map().drives.len(), (round + 1) * 20);
        cluster.members[leader].start(Timing::default());
        cluster.enliven(leader);
        cluster.wait("the restarted member to catch up", |cluster| {
            cluster.members[leader].state() == cluster.members[cluster.leader()].state()
        });
    }
}

#[test]
fn all_members_killed_at_once_come_back_with_everything_answered() {
    let mut cluster = Cluster::start(3, 3, Timing::default());
    let pool = cluster.pool();
    cluster.propose(drive(NodeId(1), "one"));
    cluster.propose(drive(NodeId(2), "two"));
    let Reply::Volume(volume) = cluster.propose(volume(pool, "v")) else {
        panic!("no volume");
    };
    for _ in 0..2 {
        let answered = cluster.map();
        cluster.members.iter_mut().for_each(Member::kill);
        for index in 0..3 {
            cluster.members[index].start(Timing::default());
        }
        let found = cluster.map();
        assert_eq!(found.drives, answered.drives);
        assert_eq!(found.volumes[&volume].name, "v");
        assert!(found.volumes[&volume].epoch >= answered.volumes[&volume].epoch);
        assert!(found.version >= answered.version);
        assert_eq!(found.cluster, answered.cluster);
        for index in 0..3 {
            cluster.enliven(index);
        }
    }
}

#[test]
fn a_lone_member_survives_every_restart() {
    let mut cluster = Cluster::start(1, 1, Timing::default());
    for index in 0..5 {
        cluster.propose(drive(NodeId(1), &format!("drive-{index}")));
        cluster.members[0].kill();
        cluster.members[0].start(Timing::default());
        assert_eq!(cluster.map().drives.len(), index + 1);
    }
}

#[test]
fn a_watch_goes_on_through_a_change_of_leader() {
    let mut cluster = Cluster::start(3, 3, Timing::default());
    let maps = {
        let _entered = cluster.runtime.enter();
        cluster.client.watch()
    };
    let sees = |name: &'static str| {
        let maps = maps.clone();
        move |_: &Cluster| maps.borrow().drive_named(name).is_some()
    };
    cluster.propose(drive(NodeId(1), "before"));
    cluster.wait("the first change", sees("before"));
    let leader = cluster.leader();
    cluster.members[leader].kill();
    cluster.propose(drive(NodeId(1), "after"));
    cluster.wait("a change under another leader", sees("after"));
    assert!(maps.borrow().drive_named("before").is_some());
}

#[test]
fn the_volumes_of_a_killed_agent_go_to_the_living() {
    let mut cluster = Cluster::start(3, 3, Timing::default());
    let pool = cluster.pool();
    for index in 1..=3_u32 {
        cluster.propose(drive(NodeId(index), &format!("drive-{index}")));
    }
    for name in ["a", "b", "c", "d", "e", "f"] {
        cluster.propose(volume(pool, name));
    }
    let owner = |map: &ClusterMap, id: u64| map.volumes[&VolumeId(id)].phase.owner();
    cluster.wait("an owner for every volume", |cluster| {
        let map = cluster.map();
        (1..=6).all(|id| owner(&map, id).is_some())
    });
    // The one that dies is a follower once, and the leader once.
    for victim in [(cluster.leader() + 1) % 3, cluster.leader()] {
        let node = cluster.members[victim].node;
        let killed = Instant::now();
        cluster.members[victim].kill();
        cluster.wait("new owners", |cluster| {
            let map = cluster.map();
            map.nodes[&node].state == NodeState::Down
                && (1..=6).all(|id| owner(&map, id).is_some_and(|owner| owner.node != node))
        });
        println!("took over {:?} after the kill", killed.elapsed());
        let map = cluster.map();
        let orphans = map
            .volumes
            .values()
            .filter(|volume| matches!(volume.phase, Phase::Recovering { .. }))
            .count();
        assert_eq!(orphans, 6, "nobody serves in this test");
        cluster.members[victim].start(Timing::default());
        cluster.enliven(victim);
    }
}

#[test]
fn a_session_learns_of_its_death() {
    let cluster = Cluster::start(1, 1, Timing::default());
    let incarnation = cluster.map().nodes[&NodeId(1)].incarnation.unwrap();
    let mut session = cluster.members[0]
        .running
        .as_ref()
        .unwrap()
        .session
        .clone()
        .unwrap();
    cluster.propose(Command::MarkDead { incarnation });
    cluster.runtime.block_on(async {
        tokio::time::timeout(PATIENCE, session.wait_for(|live| !live))
            .await
            .unwrap()
            .unwrap();
    });
}

#[test]
fn five_voters_lose_two_and_a_late_one_comes_back_by_snapshot() {
    let timing = Timing {
        snapshot_entries: 20,
        ..Timing::default()
    };
    let mut cluster = Cluster::start(5, 5, timing);
    let leader = cluster.leader();
    let late = (leader + 1) % 5;
    cluster.members[late].kill();
    cluster.members[leader].kill();
    // Far more than the log keeps beside a snapshot.
    for index in 0..150 {
        cluster.propose(drive(NodeId(1), &format!("drive-{index}")));
    }
    cluster.members[late].start(timing);
    cluster.members[leader].start(timing);
    cluster.wait("both to catch up", |cluster| {
        let expected = cluster.members[cluster.leader()].state();
        cluster.members.iter().all(|member| member.state() == expected)
    });
    assert_eq!(cluster.map().drives.len(), 150);
    // And by their own files, all at once.
    cluster.members.iter_mut().for_each(Member::kill);
    for index in 0..5 {
        cluster.members[index].start(timing);
    }
    assert_eq!(cluster.map().drives.len(), 150);
}

#[test]
fn agents_beyond_the_voters_follow_without_a_vote() {
    let cluster = Cluster::start(4, 3, Timing::default());
    let status = cluster
        .ask(|client| async move { client.status().await })
        .unwrap();
    assert_eq!(status.voters, [NodeId(1), NodeId(2), NodeId(3)]);
    // The fourth answers nothing itself, and a client that begins there is led on by its other addresses.
    let maps = {
        let _entered = cluster.runtime.enter();
        MetadataClient::new(
            cluster
                .members
                .iter()
                .rev()
                .map(|member| member.address.to_string()),
        )
        .watch()
    };
    cluster.wait("the map", |_| maps.borrow().nodes.len() == 4);
}
