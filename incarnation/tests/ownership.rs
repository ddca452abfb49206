//! Which engine serves when epochs of one volume follow each other on one incarnation, in simulated time.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_block::Device;
use weft_block::memory::MemoryDrive;
use weft_incarnation::bounds::Bounds;
use weft_incarnation::fabric::{Fabric, Identity, Reach};
use weft_incarnation::metadata::{Answer, Metadata};
use weft_incarnation::ownership::{Observer, Ownership, Parts};
use weft_incarnation::published::Published;
use weft_metadata::client::ClientError;
use weft_metadata::propose::{BandRequest, propose_bands};
use weft_metadata::state::command::{NewDrive, NewNode, NewPool, NewVolume, ReplacementRequest};
use weft_metadata::state::map::{
    ClusterMap, DomainLevel, DriveClass, DriveHome, Owner, Presentation, Settings as ClusterSettings,
};
use weft_metadata::state::{ClusterState, Command, Reply};
use weft_proto::band::{Band, EpochGrant, Geometry, Replacement};
use weft_proto::id::{ClusterId, DriveId, DriveUuid, Epoch, HostId, IncarnationId, NodeId, PoolId, VolumeId};
use weft_volume::engine::Engine;
use weft_volume::seams::{FenceError, Fencing, ReservationKey, ReservationReport};
use weft_volume::settings::Settings;
use weft_volume::testing::World;

const VOLUME: VolumeId = VolumeId(1);
const NODES: u32 = 3;
const KEY: ReservationKey = ReservationKey(1);
const HOST: HostId = HostId([1; 16]);
const DRIVE_MIB: u32 = 64;

/// The metadata service: the real state, which commits at once, and whose answers to hand-overs may be lost.
#[derive(Clone)]
struct Service {
    state: Rc<RefCell<ClusterState>>,
    map: Rc<Published<Arc<ClusterMap>>>,
    loses_answers: Rc<Cell<bool>>,
}

impl Service {
    fn apply(&self, command: Command) -> Reply {
        let reply = self.state.borrow_mut().apply(command);
        let map = self.state.borrow().map.clone();
        self.map.replace(Arc::new(map));
        reply
    }

    fn must(&self, command: Command) -> Reply {
        let text = format!("{command:?}");
        let reply = self.apply(command).accepted();
        reply.unwrap_or_else(|refusal| panic!("{text}: {refusal}"))
    }
}

fn ready<T: 'static>(value: Result<T, ClientError>) -> Answer<T> {
    async move { value }.boxed_local()
}

fn reply(reply: Reply) -> Result<Reply, ClientError> {
    reply.accepted().map_err(ClientError::Refused)
}

impl Metadata for Service {
    fn propose(&self, command: Command) -> Answer<Reply> {
        let answered = !(self.loses_answers.get() && matches!(command, Command::Handover { .. }));
        let done = reply(self.apply(command));
        let last = "the answer was lost".into();
        ready(if answered {
            done
        } else {
            Err(ClientError::Unavailable { last })
        })
    }

    fn grant_bands(&self, request: BandRequest) -> Answer<Vec<Band>> {
        let command = propose_bands(&self.state.borrow(), &request);
        let granted = command
            .map_err(ClientError::Refused)
            .and_then(|command| reply(self.apply(command)));
        ready(granted.map(|granted| match granted {
            Reply::Bands(bands) => bands,
            other => panic!("{other:?}"),
        }))
    }

    fn grant_replacement(&self, _request: ReplacementRequest) -> Answer<Replacement> {
        ready(Err(ClientError::Unexpected))
    }

    fn epoch_grant(&self, volume: VolumeId) -> Answer<Option<EpochGrant>> {
        ready(Ok(self.state.borrow().epoch_grant(volume)))
    }

    fn bands(&self, volume: VolumeId) -> Answer<Option<Vec<Band>>> {
        ready(Ok(self.state.borrow().bands(volume)))
    }
}

/// A drive that does what it is asked.
struct Willing(Device);

type Fenced<T> = LocalBoxFuture<'static, Result<T, FenceError>>;

impl Reach for Willing {
    fn device(&self) -> Option<Device> {
        Some(Rc::clone(&self.0))
    }
}

impl Fencing for Willing {
    fn register(&self, _own: ReservationKey) -> Fenced<()> {
        async { Ok(()) }.boxed_local()
    }

    fn report(&self) -> Fenced<ReservationReport> {
        let report = ReservationReport {
            in_force: true,
            persists: true,
            registrants: vec![(HOST, KEY)],
        };
        async move { Ok(report) }.boxed_local()
    }

    fn preempt_and_abort(&self, _own: ReservationKey, _victim: ReservationKey) -> Fenced<()> {
        async { Ok(()) }.boxed_local()
    }
}

/// What hosts are told.
#[derive(Default)]
struct Shown(RefCell<BTreeMap<VolumeId, Epoch>>);

impl Observer for Shown {
    fn serves(&self, volume: VolumeId, owner: Owner, _engine: &Engine) {
        self.0.borrow_mut().insert(volume, owner.epoch);
    }

    fn stopped(&self, volume: VolumeId) {
        self.0.borrow_mut().remove(&volume);
    }
}

/// Three nodes with a drive each, all registered everywhere, and a volume of 1+1.
fn cluster(service: &Service) {
    service.must(Command::Init {
        id: ClusterId([1; 16]),
        name: "test".into(),
        authentication_key: [2; 32],
        fencing_host_id: HostId([3; 16]),
        fencing_key: 4,
        settings: ClusterSettings::default(),
    });
    for number in 1..=NODES {
        service.must(Command::AddNode(NewNode {
            name: format!("node-{number}"),
            rack: None,
            control_address: format!("127.0.0.1:{}", 1000 + number),
            nvme_address: format!("127.0.0.1:{}", 2000 + number),
        }));
        service.must(Command::StartIncarnation {
            node: NodeId(number),
            host_id: HostId([number as u8; 16]),
            key: u64::from(number),
        });
        service.must(Command::AddDrive(NewDrive {
            uuid: DriveUuid([number as u8; 16]),
            name: format!("drive-{number}"),
            home: DriveHome::Node(NodeId(number)),
            class: DriveClass::Tlc,
            start_mib: 1,
            end_mib: DRIVE_MIB,
            registrants_max: 16,
        }));
    }
    for number in 1..=NODES {
        service.must(Command::RecordRegistrations {
            incarnation: IncarnationId(u64::from(number)),
            drives: (1..=NODES).map(DriveId).collect(),
        });
    }
    service.must(Command::CreatePool(NewPool {
        name: "pool".into(),
        geometry: Geometry::new(1, 1).expect("a supported geometry"),
        domain: DomainLevel::Node,
        classes: BTreeSet::from([DriveClass::Tlc]),
    }));
    service.must(Command::CreateVolume(NewVolume {
        name: "v".into(),
        pool: PoolId(1),
        size_bytes: 1 << 20,
        block_bytes: 4096,
        geometry: None,
        uuid: [1; 16],
        subnqn: "nqn.2026-01.org.example:v".parse().expect("a valid NQN"),
        allowed_hosts: BTreeSet::new(),
        presentation: Presentation::All,
        preferred: None,
    }));
}

/// The first node takes the volume over.
fn take_over(service: &Service) {
    let epoch = service.state.borrow().map.volumes[&VOLUME].epoch;
    service.must(Command::BeginTakeover {
        node: NodeId(1),
        incarnation: IncarnationId(1),
        volumes: vec![(VOLUME, epoch)],
    });
}

/// Found by the simulator (seed 8453694): the engine of the new epoch went with the task of the old one.
#[test]
fn an_owner_that_hears_late_of_its_hand_over_still_serves_what_it_has_taken_over_since() {
    let world = World::new(1);
    let life = world.incarnation();
    let env = world.env(life);
    let service = Service {
        state: Rc::default(),
        map: Published::new(Arc::default()),
        loses_answers: Rc::default(),
    };
    cluster(&service);
    let identity = Identity {
        incarnation: IncarnationId(1),
        host_id: HOST,
        key: KEY,
    };
    let fabric = Fabric::new(identity, env.clone());
    for drive in 1..=NODES {
        let device = MemoryDrive::new(4096, u64::from(DRIVE_MIB) << 8);
        fabric.add(DriveId(drive), Rc::new(Willing(device)));
    }
    let shown = Rc::new(Shown::default());
    let ownership = Ownership::new(Parts {
        cluster: service
            .map
            .borrow()
            .cluster
            .clone()
            .expect("a cluster with an identity"),
        node: NodeId(1),
        metadata: Rc::new(service.clone()),
        env: env.clone(),
        fabric,
        observer: Rc::<Shown>::clone(&shown),
        map: Rc::clone(&service.map),
        settings: Settings::default(),
        bounds: Bounds {
            log_bytes: 1 << 30,
            cache_bytes: 1 << 20,
        },
    });
    let follow = || {
        let map = service.map.borrow().clone();
        ownership.follow(&map);
        world.run_for(Duration::from_secs(5)).expect("the world goes on");
    };
    let served = || shown.0.borrow().get(&VOLUME).copied();
    world.run_for(Duration::from_secs(1)).expect("the world goes on");

    take_over(&service);
    follow();
    assert_eq!(served(), Some(Epoch(1)));

    service.loses_answers.set(true);
    let to = Some(NodeId(2));
    service.must(Command::RequestMove { volume: VOLUME, to });
    follow();
    assert_eq!(served(), None);
    assert_eq!(service.state.borrow().map.volumes[&VOLUME].epoch, Epoch(2));

    // Whoever was given the volume dies before it serves, and the first node gets it back.
    let incarnation = IncarnationId(2);
    service.must(Command::MarkDead { incarnation });
    take_over(&service);
    follow();
    assert_eq!(served(), Some(Epoch(3)));

    service.loses_answers.set(false);
    world.run_for(Duration::from_secs(5)).expect("the world goes on");
    assert_eq!(
        served(),
        Some(Epoch(3)),
        "the former epoch's task takes nothing with it"
    );
    assert!(ownership.inspect().get(VOLUME.to_string()).is_some());
}
