//! One life of an agent: starts its incarnation, brings its server's drive into service, follows the map. What the incarnation does
//! then is the real thing, `weft-incarnation`.
//!
//! A counterpart of `node/src/agent/member.rs` and `life/incarnation.rs`.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use weft_incarnation::fabric::{Fabric, Identity};
use weft_incarnation::local_drive::{self, LocalReach};
use weft_incarnation::ownership::{Ownership, Parts};
use weft_incarnation::published::{Published, Subscriber};
use weft_incarnation::silence::Silence;
use weft_metadata::leader::HEARTBEAT;
use weft_metadata::state::map::{DriveHome, DriveState, Owner};
use weft_metadata::state::{ClusterMap, Command, Reply};
use weft_proto::id::{DriveId, HostId, IncarnationId, NodeId, VolumeId};
use weft_proto::nvme::reservation::PersistChange;
use weft_volume::engine::Engine;
use weft_volume::seams::ReservationKey;

use super::client::{Client, Service};
use super::cluster::Cluster;
use super::connection::Ends;
use super::drive::{LocalDrive, RemoteDrive, is_present};
use super::ownership::Watching;
use super::process::Process;
use super::reach::{OtherDrive, OwnDrive};
use super::steps::Step;

/// Between looks at the health of the server's own drive.
const HEALTH_LOOK: Duration = Duration::from_millis(100);

/// An agent from its start to its end.
pub(super) struct Agent {
    pub(super) cluster: Rc<Cluster>,
    pub(super) node: NodeId,
    pub(super) process: Process,
    pub(super) client: Rc<Client>,
    /// Once its incarnation has begun.
    ownership: OnceCell<Rc<Ownership>>,
    pub(super) map: Rc<Published<Arc<ClusterMap>>>,
    host: HostId,
    key: ReservationKey,
    pub(super) incarnation: Cell<Option<IncarnationId>>,
    /// The server's drive, once others may reach it.
    served: RefCell<Option<Rc<LocalDrive>>>,
    /// Those that serve hosts.
    pub(super) engines: RefCell<BTreeMap<VolumeId, Serving>>,
    /// Of lasting connections.
    pub(super) ends: Ends,
    /// Takeovers that scan and replay now.
    pub(super) recovering: Cell<u32>,
}

/// An engine that serves hosts under one epoch.
#[derive(Clone)]
pub(super) struct Serving {
    pub(super) owner: Owner,
    pub(super) engine: Engine,
    pub(super) silence: Rc<Silence>,
}

/// A takeover that scans and replays, until dropped.
pub(super) struct Recovering(Rc<Agent>);

impl Recovering {
    pub(super) fn by(agent: &Rc<Agent>) -> Self {
        agent.recovering.set(agent.recovering.get() + 1);
        Self(Rc::clone(agent))
    }
}

impl Drop for Recovering {
    fn drop(&mut self) {
        self.0.recovering.set(self.0.recovering.get() - 1);
    }
}

impl Agent {
    /// Starts the process. It lives until it is killed or gives up.
    pub(super) fn start(cluster: &Rc<Cluster>, node: NodeId) -> Rc<Self> {
        let process = Process::start(&cluster.world(), node);
        let mut host = [0; 16];
        host[..8].copy_from_slice(&process.random().to_le_bytes());
        host[8..].copy_from_slice(&process.random().to_le_bytes());
        let (host, key) = (HostId(host), ReservationKey(process.random() | 1));
        let agent = Rc::new(Self {
            cluster: Rc::clone(cluster),
            node,
            client: Client::new(cluster, &process),
            process,
            ownership: OnceCell::new(),
            map: Published::new(Arc::default()),
            host,
            key,
            incarnation: Cell::new(None),
            served: RefCell::default(),
            engines: RefCell::default(),
            ends: Ends::default(),
            recovering: Cell::new(0),
        });
        agent.process.spawn(Rc::clone(&agent).live());
        agent
    }

    /// The server's drive, if `drive` is it and it is in service.
    pub(super) fn served_drive(&self, drive: DriveId) -> Option<Rc<LocalDrive>> {
        let served = self.served.borrow();
        served.as_ref().filter(|local| local.id == drive).cloned()
    }

    /// Whether others may reach the server's drive.
    pub(super) fn is_in_service(&self) -> bool {
        self.served.borrow().is_some()
    }

    /// Ends this process, which comes back as a new one.
    pub(super) fn give_up(&self, why: &str) {
        let node = self.node;
        self.cluster
            .world()
            .note(|| format!("the agent of {node} gives up: {why}"));
        self.cluster.end_agent(node, self.process.id, Some((50, 300)));
    }

    /// What its engines say of themselves, once it may own any.
    pub(super) fn inspect_volumes(&self) -> Option<serde_json::Value> {
        self.ownership.get().map(|ownership| ownership.inspect())
    }

    async fn live(self: Rc<Self>) {
        let registering = self.cluster.steps.enter(Step::Register);
        let start = Command::StartIncarnation {
            node: self.node,
            host_id: self.host,
            key: self.key.0,
        };
        let Ok(Reply::Incarnation(incarnation)) = self.client.propose(start).await else {
            return self.give_up("no incarnation");
        };
        self.incarnation.set(Some(incarnation));
        self.cluster
            .watch
            .incarnation_started(self.process.id, incarnation);
        self.process.spawn(Rc::clone(&self).keep_session(incarnation));
        self.process.spawn(Rc::clone(&self).follow_map());
        let mut receiver = self.map.subscribe();
        while !receiver
            .borrow_and_update()
            .incarnations
            .contains_key(&incarnation)
        {
            receiver.changed().await;
        }
        let fabric = self.begin_incarnation(incarnation);
        self.serve_drive(&fabric).await;
        let service = Rc::new(Service(Rc::clone(&self.client)));
        self.process
            .spawn(Rc::clone(&fabric).keep_registrations_on_record(service));
        drop(registering);
        self.follow(&fabric, receiver).await;
    }

    /// What an incarnation is: its way to drives, and the volumes it will own.
    fn begin_incarnation(self: &Rc<Self>, incarnation: IncarnationId) -> Rc<Fabric> {
        let identity = Identity {
            incarnation,
            host_id: self.host,
            key: self.key,
        };
        let fabric = Fabric::new(identity, self.process.env());
        let cluster = self.map.borrow().cluster.clone();
        let ownership = Ownership::new(Parts {
            cluster: cluster.expect("a cluster with an identity"),
            node: self.node,
            metadata: Rc::new(Service(Rc::clone(&self.client))),
            env: self.process.env(),
            fabric: Rc::clone(&fabric),
            observer: Rc::new(Watching(Rc::downgrade(self))),
            map: Rc::clone(&self.map),
            settings: self.cluster.settings(),
            bounds: self.cluster.bounds(),
        });
        self.process.spawn(Rc::clone(&ownership).keep_within_bounds());
        self.process.spawn(Rc::clone(&ownership).watch_leases());
        if self.ownership.set(ownership).is_err() {
            unreachable!("an agent has one incarnation");
        }
        let (this, fenced) = (Rc::clone(self), Rc::clone(&fabric));
        self.process.spawn(async move {
            fenced.wait_until_fenced().await;
            this.give_up("fenced");
        });
        fabric
    }

    async fn keep_session(self: Rc<Self>, incarnation: IncarnationId) {
        loop {
            match self.client.heartbeat(incarnation).await {
                Some(false) => return self.give_up("declared dead"),
                Some(true) => self.process.sleep(HEARTBEAT).await,
                // Another member is asked at once.
                None => self.process.sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn follow_map(self: Rc<Self>) {
        loop {
            let known = self.map.borrow().version;
            match self.client.map_after(known).await {
                // An answer may be older than what another one has brought meanwhile.
                Some(map) if map.version > known => {
                    self.map.replace(map);
                }
                Some(_) => {}
                None => self.process.sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Puts the server's drive into service: reservation in force, dead incarnations fenced, then online.
    async fn serve_drive(self: &Rc<Self>, fabric: &Rc<Fabric>) {
        let local = self.cluster.local_drive(self.node);
        let cluster = self
            .map
            .borrow()
            .cluster
            .clone()
            .expect("a cluster with an identity");
        // Its table has no file here: what survives its agent is carried over by `LocalDrive::restarted`.
        let enforced = local_drive::enforce(&local.namespace, &cluster, PersistChange::Keep).await;
        enforced.expect("nobody else reserves a drive of the cluster");
        let reach = LocalReach {
            namespace: local.namespace.clone(),
            host: self.host,
        };
        let device = local.device(self.host, self.process.id);
        fabric.add(local.id, Rc::new(OwnDrive { reach, device }));
        let map = self.map.borrow().clone();
        self.fence_local(&local, &map).await;
        *self.served.borrow_mut() = Some(Rc::clone(&local));
        self.cluster.note_hurt(self.node);
        self.process.spawn(Rc::clone(self).watch_health(local));
    }

    /// Says in Raft whether the drive is there.
    async fn watch_health(self: Rc<Self>, local: Rc<LocalDrive>) {
        loop {
            let state = if is_present(&local.medium) {
                DriveState::Online
            } else {
                DriveState::Failed
            };
            let known = self.map.borrow().drives.get(&local.id).map(|drive| drive.state);
            if known != Some(state) {
                let drive = local.id;
                let _ = self.client.propose(Command::SetDriveState { drive, state }).await;
            }
            self.process.sleep(HEALTH_LOOK).await;
        }
    }

    /// Fences dead incarnations on the server's drive, in the cluster's own name, and has that recorded.
    async fn fence_local(&self, local: &LocalDrive, map: &ClusterMap) {
        let Some(cluster) = &map.cluster else { return };
        let mut commands = Vec::new();
        for dead in map.fences_due(local.id) {
            let _under = self.cluster.steps.enter(Step::Fence);
            let fenced = local_drive::fence_dead(&local.namespace, cluster, ReservationKey(dead.key)).await;
            if fenced.is_ok() {
                self.cluster.watch.fenced(dead.id, local.id);
                commands.push(Command::RecordFenced {
                    incarnation: dead.id,
                    drives: BTreeSet::from([local.id]),
                });
            }
        }
        if !commands.is_empty() {
            let _ = self.client.propose(Command::Batch(commands)).await;
        }
    }

    /// Acts on every version of the map.
    async fn follow(self: &Rc<Self>, fabric: &Rc<Fabric>, mut receiver: Subscriber<Arc<ClusterMap>>) {
        loop {
            let map = receiver.borrow_and_update().clone();
            let known = fabric.known();
            for drive in map.drives.values().filter(|drive| !known.contains(&drive.id)) {
                if let DriveHome::Node(home) = drive.home
                    && home != self.node
                {
                    let remote = RemoteDrive::new(&self.cluster, &self.process, self.host, drive.id, home);
                    fabric.add(drive.id, Rc::new(OtherDrive(remote)));
                }
            }
            if let Some(ownership) = self.ownership.get() {
                ownership.follow(&map);
            }
            let local = self.served.borrow().clone();
            if let Some(local) = local
                && map.fences_due(local.id).next().is_some()
            {
                let (this, map) = (Rc::clone(self), Arc::clone(&map));
                self.process
                    .spawn(async move { this.fence_local(&local, &map).await });
            }
            receiver.changed().await;
        }
    }
}
