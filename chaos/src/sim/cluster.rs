//! The simulated cluster: servers with a drive and an agent each, the wires between them, metadata, and who watches.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use weft_block::DeviceInfo;
use weft_incarnation::bounds::Bounds;
use weft_metadata::state::command::{NewDrive, NewNode, NewPool, NewVolume};
use weft_metadata::state::map::{
    DomainLevel, DriveClass, DriveHome, Phase, Presentation, Settings as ClusterSettings,
};
use weft_metadata::state::{Command, Reply};
use weft_proto::band::ChunkSize;
use weft_proto::id::{ClusterId, DriveId, DriveUuid, HostId, IncarnationId, NodeId, PoolId, VolumeId};
use weft_volume::map::MapSettings;
use weft_volume::settings::{GarbageMax, Settings};
use weft_volume::testing::World;
use weft_volume::testing::drive::{DriveSpec, Health};
use weft_volume::testing::rng::Rng;

use super::agent::Agent;
use super::drive::LocalDrive;
use super::network::Network;
use super::plan::Plan;
use super::raft::Raft;
use super::steps::{Coverage, Steps};
use super::watch::Watch;

/// Nanoseconds after which a node that was healed is one like any other.
const SETTLED: u64 = 2_000_000_000;

struct Server {
    drive: Rc<LocalDrive>,
    agent: Option<Rc<Agent>>,
    /// Without power: nothing answers, not even with a refusal.
    dark: bool,
}

/// See the module.
pub(super) struct Cluster {
    /// Weak, because the world holds what holds this.
    world: Weak<World>,
    pub(super) plan: Plan,
    pub(super) network: Network,
    pub(super) raft: Raft,
    pub(super) steps: Rc<Steps>,
    pub(super) watch: Watch,
    pub(super) coverage: RefCell<Coverage>,
    servers: RefCell<BTreeMap<NodeId, Server>>,
    rng: RefCell<Rng>,
    working: Cell<bool>,
    /// When each node was last hurt or healed.
    hurt_at: RefCell<BTreeMap<NodeId, u64>>,
    /// How wrong clocks go, in parts in a million.
    pub(super) drift_ppm: Cell<u64>,
}

impl Cluster {
    /// The cluster as an operator has just set it up; its agents start at once.
    pub(super) fn new(world: &Rc<World>, plan: Plan) -> Rc<Self> {
        let rng = Rng::new(world.seed());
        let voters = if plan.nodes >= 5 && plan.geometry.m > 1 {
            5
        } else {
            3
        };
        let voters: Vec<NodeId> = (1..=voters).map(NodeId).collect();
        let cluster = Rc::new(Self {
            world: Rc::downgrade(world),
            network: Network::new(rng.fork(21)),
            raft: Raft::new(rng.fork(22), voters),
            steps: Rc::default(),
            watch: Watch::default(),
            coverage: RefCell::default(),
            servers: RefCell::default(),
            rng: RefCell::new(rng.fork(23)),
            working: Cell::new(true),
            hurt_at: RefCell::default(),
            drift_ppm: Cell::new(0),
            plan,
        });
        let weak = Rc::downgrade(&cluster);
        world.watch_landings(Rc::new(move |landed| {
            if let Some(cluster) = weak.upgrade() {
                cluster.raft.inspect(|state| cluster.watch.landing(state, landed));
            }
        }));
        cluster.set_up();
        cluster.run_elections();
        for node in cluster.nodes() {
            cluster.start_agent(node);
        }
        cluster
    }

    pub(super) fn world(&self) -> Rc<World> {
        self.world.upgrade().expect("the world outlives the cluster")
    }

    fn set_up(self: &Rc<Self>) {
        let plan = &self.plan;
        self.must(Command::Init {
            id: ClusterId([7; 16]),
            name: "simulated".into(),
            authentication_key: [9; 32],
            fencing_host_id: HostId([0xfe; 16]),
            fencing_key: 0xfe,
            settings: ClusterSettings::default(),
        });
        self.raft.set_window_rows(plan.window_rows);
        for node in 1..=plan.nodes {
            self.must(self.new_node(NodeId(node)));
            self.must(self.new_drive(NodeId(node)));
            self.add_server(NodeId(node));
        }
        self.must(Command::CreatePool(NewPool {
            name: "default".into(),
            geometry: plan.geometry,
            domain: DomainLevel::Node,
            classes: BTreeSet::from([DriveClass::Tlc]),
        }));
        for volume in 1..=plan.volumes {
            self.must(self.new_volume(volume));
        }
    }

    fn must(&self, command: Command) {
        let what = format!("{command:?}");
        let reply = self.raft.apply(self, command);
        assert!(!matches!(reply, Reply::Refused(_)), "{what}: {reply:?}");
    }

    pub(super) fn new_node(&self, node: NodeId) -> Command {
        Command::AddNode(NewNode {
            name: format!("node-{}", node.0),
            rack: None,
            control_address: format!("node-{}:1", node.0),
            nvme_address: format!("node-{}:2", node.0),
        })
    }

    pub(super) fn new_drive(&self, node: NodeId) -> Command {
        Command::AddDrive(NewDrive {
            uuid: DriveUuid([node.0 as u8; 16]),
            name: format!("drive-{}", node.0),
            home: DriveHome::Node(node),
            class: DriveClass::Tlc,
            start_mib: 1,
            end_mib: self.plan.drive_mib,
            registrants_max: 1000,
        })
    }

    /// A volume; the same number makes the same one.
    pub(super) fn new_volume(&self, number: u16) -> Command {
        Command::CreateVolume(NewVolume {
            name: format!("volume-{number}"),
            pool: PoolId(1),
            size_bytes: self.plan.total_blocks() * 4096,
            block_bytes: 4096,
            geometry: None,
            uuid: [number as u8; 16],
            subnqn: format!("nqn.2026-01.org.example:volume-{number}")
                .parse()
                .expect("a valid NQN"),
            allowed_hosts: BTreeSet::new(),
            presentation: Presentation::All,
            preferred: None,
        })
    }

    /// A server with its drive. Nodes and drives are added in order, so that their numbers are the same.
    pub(super) fn add_server(&self, node: NodeId) {
        let spec = DriveSpec {
            volatile_write_cache: self.plan.volatile_write_cache,
            tear_bytes: self.plan.tear_bytes,
            ..DriveSpec::new(self.plan.drive_mib, node.0)
        };
        let medium = self.world().add_drive(DriveId(node.0), spec);
        let server = Server {
            drive: Rc::new(LocalDrive::new(medium)),
            agent: None,
            dark: false,
        };
        self.servers.borrow_mut().insert(node, server);
    }

    /// Of every engine: small, so that everything happens often.
    pub(super) fn settings(&self) -> Settings {
        Settings {
            chunk_size_max: ChunkSize::Mib1,
            log_budget_bytes: self.plan.log_budget_bytes,
            garbage_max: GarbageMax {
                // As far apart as an agent's.
                busy: self.plan.garbage_max * 1.5,
                settled: self.plan.garbage_max,
                wanted: self.plan.garbage_max.min(0.15),
            },
            map: MapSettings {
                cache_bytes: 64 << 10,
                runs_max: 4,
                merge_fan_in: 2,
                ..MapSettings::default()
            },
            ..Settings::default()
        }
    }

    /// Of all engines of a node: what one and a half may take.
    pub(super) fn bounds(&self) -> Bounds {
        let Settings {
            log_budget_bytes,
            map,
            ..
        } = self.settings();
        Bounds {
            log_bytes: log_budget_bytes * 3 / 2,
            cache_bytes: map.cache_bytes * 3 / 2,
        }
    }

    pub(super) fn draw(&self, low: u64, high: u64) -> u64 {
        self.rng.borrow_mut().between(low, high)
    }

    // What redundancy has to cover.

    /// A node was hurt, or is whole again, now.
    pub(super) fn note_hurt(&self, node: NodeId) {
        let now = self.world().now().0;
        self.hurt_at.borrow_mut().insert(node, now);
    }

    /// Whether no more than m nodes are hurt, for long enough that everybody can have noticed.
    pub(super) fn is_tolerated(&self) -> bool {
        let world = self.world();
        let now = world.now().0;
        let hurt_at = self.hurt_at.borrow();
        let servers = self.servers.borrow();
        let whole = |(node, server): &(&NodeId, &Server)| {
            let lives = server
                .agent
                .as_ref()
                .is_some_and(|agent| agent.is_in_service() && !world.is_paused(agent.process.id));
            let long_ago = hurt_at.get(node).is_none_or(|at| at + SETTLED < now);
            let damaged = self.plan.damaged == Some(node.0);
            lives && long_ago && !damaged && server.drive.medium.health() == Health::Serving
        };
        let hurt = servers.len() - servers.iter().filter(whole).count();
        hurt <= usize::from(self.plan.geometry.m) && !self.network.is_troubled()
    }

    // The workload.

    /// Whether a volume has an owner that serves it.
    pub(super) fn is_served(&self, volume: VolumeId) -> bool {
        self.raft.inspect(|state| {
            let found = state.map.volumes.get(&volume);
            found.is_some_and(|found| matches!(found.phase, Phase::Serving { .. }))
        })
    }

    pub(super) fn is_working(&self) -> bool {
        self.working.get()
    }

    pub(super) fn stop_working(&self) {
        self.working.set(false);
    }

    // Servers.

    pub(super) fn nodes(&self) -> Vec<NodeId> {
        self.servers.borrow().keys().copied().collect()
    }

    pub(super) fn any_node(&self, rng: &mut Rng) -> NodeId {
        let nodes = self.nodes();
        nodes[rng.index(nodes.len())]
    }

    /// The living agent of a server.
    /// What the engines of all nodes say of themselves.
    pub(super) fn inspect_engines(&self) -> String {
        let servers = self.servers.borrow();
        let shown = servers.iter().filter_map(|(node, server)| {
            let volumes = server.agent.as_ref()?.inspect_volumes()?;
            Some(format!("{node}: {volumes}"))
        });
        shown.collect::<Vec<_>>().join("; ")
    }

    pub(super) fn agent(&self, node: NodeId) -> Option<Rc<Agent>> {
        self.servers.borrow().get(&node)?.agent.clone()
    }

    pub(super) fn is_dark(&self, node: NodeId) -> bool {
        self.servers.borrow().get(&node).is_some_and(|server| server.dark)
    }

    pub(super) fn local_drive(&self, node: NodeId) -> Rc<LocalDrive> {
        Rc::clone(&self.servers.borrow()[&node].drive)
    }

    pub(super) fn drive_info(&self, drive: DriveId) -> DeviceInfo {
        let servers = self.servers.borrow();
        let server = servers.values().find(|server| server.drive.id == drive);
        let server = server.expect("a drive of the cluster");
        server.drive.medium.handle(IncarnationId(0)).info()
    }

    pub(super) fn start_agent(self: &Rc<Self>, node: NodeId) {
        let has_one = self.agent(node).is_some();
        if has_one {
            return;
        }
        let agent = Agent::start(self, node);
        self.drift(&agent);
        if let Some(server) = self.servers.borrow_mut().get_mut(&node) {
            server.agent = Some(agent);
            server.dark = false;
        }
    }

    /// Gives the agent's clock an error of its own.
    pub(super) fn drift(&self, agent: &Agent) {
        let most = self.drift_ppm.get();
        if most > 0 {
            let drift = self.draw(0, 2 * most) as i64 - most as i64;
            self.world().set_drift(agent.process.id, drift);
        }
    }

    /// The process of an agent ends; its server lives. It starts again after so many milliseconds, if at all.
    pub(super) fn end_agent(
        self: &Rc<Self>,
        node: NodeId,
        process: IncarnationId,
        restart_ms: Option<(u64, u64)>,
    ) {
        let Some(agent) = self.take_agent(node, process) else {
            return;
        };
        agent.ends.close(self, node);
        self.restart_drive(node, false);
        if let Some(incarnation) = agent.incarnation.get() {
            let cluster = Rc::clone(self);
            let after = Duration::from_micros(self.draw(100, 3_000));
            let world = self.world();
            world.at(world.now().after(after), None, move |_| {
                cluster.session_breaks(node, incarnation);
            });
        }
        self.restart_agent(node, restart_ms);
    }

    /// A server loses power: its agent, what the drive's cache held, and every word to anybody.
    pub(super) fn lose_power(self: &Rc<Self>, node: NodeId, restart_ms: (u64, u64)) {
        let Some(process) = self.agent(node).map(|agent| agent.process.id) else {
            return;
        };
        if let Some(server) = self.servers.borrow_mut().get_mut(&node) {
            server.dark = true;
        }
        self.take_agent(node, process);
        self.restart_drive(node, true);
        self.restart_agent(node, Some(restart_ms));
    }

    /// Nobody serves the drive of a server any more.
    fn restart_drive(&self, node: NodeId, power: bool) {
        self.local_drive(node).medium.restart(power);
        if let Some(server) = self.servers.borrow_mut().get_mut(&node) {
            server.drive = Rc::new(server.drive.restarted());
        }
    }

    fn take_agent(&self, node: NodeId, process: IncarnationId) -> Option<Rc<Agent>> {
        let agent = {
            let mut servers = self.servers.borrow_mut();
            let server = servers.get_mut(&node)?;
            let found = server.agent.take_if(|agent| agent.process.id == process);
            found?
        };
        self.world().kill(process);
        agent.engines.borrow_mut().clear();
        Some(agent)
    }

    fn restart_agent(self: &Rc<Self>, node: NodeId, restart_ms: Option<(u64, u64)>) {
        let Some((low, high)) = restart_ms else { return };
        let cluster = Rc::clone(self);
        let after = Duration::from_millis(self.draw(low, high));
        let world = self.world();
        world.at(world.now().after(after), None, move |_| cluster.start_agent(node));
    }

    /// Lets go of everything that holds this, so that it can be dropped.
    pub(super) fn dismantle(&self) {
        self.raft.dismantle();
        for node in self.nodes() {
            if let Some(agent) = self.agent(node) {
                self.take_agent(node, agent.process.id);
            }
        }
        for server in std::mem::take(&mut *self.servers.borrow_mut()).into_values() {
            server.drive.medium.restart(false);
            server.drive.let_go();
        }
    }
}

/// The node of a control address, as [`Cluster::new_node`] makes them.
pub(super) fn node_at(address: &str) -> Option<NodeId> {
    let name = address.strip_suffix(":1")?;
    name.strip_prefix("node-")?.parse().ok().map(NodeId)
}
