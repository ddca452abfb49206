//! Faults by seed, each noted with the protocol steps that it met, and healed again.
//!
//! With a drive that is damaged for good, what else is hurt at the same time stays within m: more would be a loss that nobody
//! promises to survive. Without one, anything may happen at once; then the volumes freeze, and must go on when it is over.

mod stranded;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use weft_metadata::state::{Command, Reply};
use weft_proto::id::{NodeId, VolumeId};
use weft_volume::testing::drive::{Astray, Health};
use weft_volume::testing::rng::Rng;

use super::client::Client;
use super::cluster::Cluster;
use super::host::{FIRST_HOST, Host};
use super::process::Process;
use super::steps::{Fault, Step};

/// How long a node counts as hurt after its fault is over: it may have been declared dead, and comes back.
const RECOVERY: Duration = Duration::from_secs(4);

/// How many polls a fault waits for the step that it is aimed at.
const AIM_POLLS: u64 = 25_000;
/// The same for a deletion: there are few in a run, and each takes milliseconds.
const AIM_POLLS_DELETE: u64 = 150_000;

/// See the module.
pub(super) struct Nemesis {
    cluster: Rc<Cluster>,
    rng: RefCell<Rng>,
    /// Until when each node counts as hurt.
    hurt: RefCell<BTreeMap<NodeId, u64>>,
}

impl Nemesis {
    pub(super) fn new(cluster: &Rc<Cluster>) -> Rc<Self> {
        Rc::new(Self {
            cluster: Rc::clone(cluster),
            rng: RefCell::new(Rng::new(cluster.world().seed()).fork(31)),
            hurt: RefCell::default(),
        })
    }

    /// Lays out all faults of the run, and the operator's moves.
    pub(super) fn schedule(self: &Rc<Self>) {
        let plan = &self.cluster.plan;
        let world = self.cluster.world();
        let length = plan.length.as_millis() as u64;
        if plan.faults.contains(&Fault::Drift) {
            self.cluster.drift_ppm.set(5_000);
        }
        let operator = Process::start(&world, NodeId(FIRST_HOST + 900));
        let client = Client::new(&self.cluster, &operator);
        for _ in 0..plan.fault_count {
            if plan.faults.is_empty() {
                break;
            }
            let fault = plan.faults[self.rng.borrow_mut().index(plan.faults.len())];
            let at = Duration::from_micros(self.rng.borrow_mut().between(500_000, length * 1_000));
            let nemesis = Rc::clone(self);
            let (operator, client) = (operator.clone(), Rc::clone(&client));
            world.at(world.now().after(at), None, move |world| {
                if nemesis.rng.borrow_mut().chance(1, 4) {
                    // Between any two awaits of anybody, not only where time passes.
                    let polls = nemesis.between(1, 40);
                    world.after_polls(polls, move |_| nemesis.strike(fault));
                } else {
                    let step = nemesis.step_for(fault);
                    if step == Step::Move {
                        // There are few in a run, and each takes milliseconds.
                        nemesis.request_move(&operator, &client, Duration::ZERO);
                    }
                    let polls = if step == Step::Delete {
                        AIM_POLLS_DELETE
                    } else {
                        AIM_POLLS
                    };
                    nemesis.aim(fault, step, polls);
                }
            });
        }
        for _ in 0..self.between(0, 4) {
            let after = self.some_time(2_000, length);
            self.request_move(&operator, &client, after);
        }
        self.schedule_deletions(&operator, &client);
        self.schedule_stranding();
        if plan.joins {
            let node = NodeId(plan.nodes + 1);
            let at = Duration::from_millis(self.between(1_000, length));
            let (cluster, process) = (Rc::clone(&self.cluster), operator.clone());
            operator.spawn(async move {
                process.sleep(at).await;
                let added = client.propose(cluster.new_node(node)).await;
                let drive = client.propose(cluster.new_drive(node)).await;
                if added.is_ok() && drive.is_ok() {
                    cluster.add_server(node);
                    cluster.start_agent(node);
                }
            });
        }
    }

    /// The operator moves some volume to some node.
    fn request_move(&self, operator: &Process, client: &Rc<Client>, after: Duration) {
        let volume = VolumeId(self.between(1, u64::from(self.cluster.plan.volumes)));
        let to = Some(self.any_node());
        let (client, process) = (Rc::clone(client), operator.clone());
        operator.spawn(async move {
            process.sleep(after).await;
            let _ = client.propose(Command::RequestMove { volume, to }).await;
        });
    }

    /// Volumes that come and go: written until they are deleted, and for a moment longer, while others take their chunks.
    fn schedule_deletions(self: &Rc<Self>, operator: &Process, client: &Rc<Client>) {
        let plan = &self.cluster.plan;
        let length = plan.length.as_millis() as u64;
        for number in 0..plan.deletions {
            let at = self.some_time(500, length - 1_000);
            let life = self.some_time(100, 2_000);
            let wanted = self.cluster.new_volume(100 + number);
            let host = Host::start(&self.cluster, plan.hosts + number);
            let rng = self.rng.borrow_mut().fork(u64::from(number));
            let served_first = self.rng.borrow_mut().chance(1, 2);
            let (client, process, cluster) = (Rc::clone(client), operator.clone(), Rc::clone(&self.cluster));
            operator.spawn(async move {
                process.sleep(at).await;
                let Ok(Reply::Volume(volume)) = client.propose(wanted).await else {
                    return;
                };
                // Half of them wait for it to be served; the others may meet the owner while it opens it.
                while served_first && cluster.is_working() && !cluster.is_served(volume) {
                    process.sleep(Duration::from_millis(20)).await;
                }
                for task in 0..6 {
                    host.scribble(volume, rng.fork(task), life + Duration::from_millis(20));
                }
                process.sleep(life).await;
                let _ = client.propose(Command::DeleteVolume { volume }).await;
            });
        }
    }

    fn between(&self, low: u64, high: u64) -> u64 {
        self.rng.borrow_mut().between(low, high)
    }

    fn any_node(&self) -> NodeId {
        self.cluster.any_node(&mut self.rng.borrow_mut())
    }

    /// A node to hurt: an owner half of the time, and one that redundancy can spare.
    fn victim(&self, duration: Duration) -> Option<NodeId> {
        let nodes = self.cluster.nodes();
        let owners: Vec<NodeId> = nodes
            .iter()
            .copied()
            .filter(|node| {
                let agent = self.cluster.agent(*node);
                agent.is_some_and(|agent| !agent.engines.borrow().is_empty())
            })
            .collect();
        let node = if !owners.is_empty() && self.rng.borrow_mut().chance(1, 2) {
            owners[self.rng.borrow_mut().index(owners.len())]
        } else {
            self.any_node()
        };
        self.may_hurt(node, duration).then_some(node)
    }

    fn may_hurt(&self, node: NodeId, duration: Duration) -> bool {
        let now = self.cluster.world().now();
        let mut hurt = self.hurt.borrow_mut();
        hurt.retain(|_, until| *until > now.0);
        if let Some(damaged) = self.cluster.plan.damaged {
            hurt.insert(NodeId(damaged), u64::MAX);
            let others = hurt.keys().filter(|other| **other != node).count();
            if others >= usize::from(self.cluster.plan.geometry.m) {
                return false;
            }
        }
        let until = now.after(duration + RECOVERY).0;
        let known = hurt.entry(node).or_insert(0);
        *known = until.max(*known);
        true
    }

    /// A duration between `low` and `high` milliseconds.
    fn some_time(&self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.between(low, high))
    }

    fn later(self: &Rc<Self>, node: NodeId, after: Duration, heal: impl FnOnce(&Rc<Cluster>) + 'static) {
        let cluster = Rc::clone(&self.cluster);
        let world = self.cluster.world();
        world.at(world.now().after(after), None, move |_| {
            heal(&cluster);
            cluster.note_hurt(node);
        });
    }

    /// The step that a fault is aimed at. Hosts' commands are under way nearly all the time and are met without aiming, so what is
    /// rare is aimed at. More deaths than redundancy covers are worst where what is left is believed. Where volumes are deleted, every
    /// third fault waits for that; where none is, nobody does.
    fn step_for(&self, fault: Fault) -> Step {
        const RARE: [Step; 8] = [
            Step::Compaction,
            Step::Rebuild,
            Step::Fence,
            Step::Recover,
            Step::Finish,
            Step::LeaseWait,
            Step::Move,
            Step::NoLeader,
        ];
        let mut rng = self.rng.borrow_mut();
        let any = Step::ALL[rng.index(Step::ALL.len())];
        let rare = RARE[rng.index(RARE.len())];
        if fault == Fault::Many && rng.chance(1, 2) {
            return Step::Recover;
        }
        let deletes = self.cluster.plan.deletions > 0;
        match any {
            _ if deletes && rng.chance(1, 3) => Step::Delete,
            Step::Read | Step::Write | Step::WideWrite | Step::Trim | Step::Delete => rare,
            any => any,
        }
    }

    /// Waits until `step` is under way, and strikes somewhere in it.
    fn aim(self: &Rc<Self>, fault: Fault, step: Step, polls_left: u64) {
        let met = self.cluster.steps.is_under_way(step);
        let pause = self.between(1, if met { 6 } else { 3 });
        let nemesis = Rc::clone(self);
        self.cluster.world().after_polls(pause, move |_| {
            // What was under way may have ended meanwhile: the faults that just miss are worth as much.
            if met || polls_left <= pause {
                nemesis.strike(fault);
            } else {
                nemesis.aim(fault, step, polls_left - pause);
            }
        });
    }

    /// One fault, now.
    fn strike(self: &Rc<Self>, fault: Fault) {
        if !self.cluster.is_working() {
            return;
        }
        let met = self.cluster.steps.under_way();
        let world = self.cluster.world();
        let struck = match fault {
            Fault::Kill => self.kill(),
            Fault::Power => self.power(),
            Fault::Many => self.many(),
            Fault::Pause => self.pause(),
            Fault::DriveDead => self.unhealthy(Health::Dead),
            Fault::DriveStall => self.unhealthy(Health::Stalled),
            Fault::DriveSlow => self.slow(),
            Fault::DriveFull => self.full(),
            Fault::LostWrite => self.astray(Astray::Lost),
            Fault::Misdirected => {
                let by = self.between(1, 600);
                self.astray(Astray::Misdirected(by))
            }
            Fault::BitFlip => self.flip_bits(),
            Fault::Messages => self.messages(),
            Fault::Partition => self.partition(false),
            Fault::OneWay => self.partition(true),
            Fault::NoMetadata => self.no_metadata(),
            Fault::Drift => self.drift(),
        };
        if let Some(whom) = struck {
            self.cluster.note_hurt(whom);
            world.note(|| format!("fault: {} at {whom}, during {met:?}", fault.label()));
            self.cluster.coverage.borrow_mut().note(fault, &met);
        }
    }

    fn kill(&self) -> Option<NodeId> {
        let node = self.victim(Duration::from_secs(2))?;
        let process = self.cluster.agent(node)?.process.id;
        self.cluster.end_agent(node, process, Some((20, 2_000)));
        Some(node)
    }

    fn power(&self) -> Option<NodeId> {
        let node = self.victim(Duration::from_secs(4))?;
        self.cluster.agent(node)?;
        self.cluster.lose_power(node, (200, 4_000));
        Some(node)
    }

    fn many(&self) -> Option<NodeId> {
        let mut nodes = self.cluster.nodes();
        self.rng.borrow_mut().shuffle(&mut nodes);
        let least = u64::from(self.cluster.plan.geometry.m) + 1;
        if self.rng.borrow_mut().chance(1, 2) {
            // Whoever recovers a volume is left to see what is missing, if enough others can die.
            let idle = |node: &NodeId| {
                let agent = self.cluster.agent(*node);
                agent.is_none_or(|agent| agent.recovering.get() == 0)
            };
            let others: Vec<NodeId> = nodes.iter().copied().filter(idle).collect();
            if others.len() as u64 >= least {
                nodes = others;
            }
        }
        let count = self.between(least, nodes.len() as u64);
        for node in nodes.iter().take(count as usize) {
            if self.rng.borrow_mut().chance(1, 2) {
                self.cluster.lose_power(*node, (500, 4_000));
            } else if let Some(agent) = self.cluster.agent(*node) {
                self.cluster
                    .end_agent(*node, agent.process.id, Some((100, 4_000)));
            }
        }
        nodes.first().copied()
    }

    fn pause(self: &Rc<Self>) -> Option<NodeId> {
        let duration = if self.rng.borrow_mut().chance(1, 3) {
            self.some_time(10, 500)
        } else {
            self.some_time(500, 5_000)
        };
        let node = self.victim(duration)?;
        let process = self.cluster.agent(node)?.process.id;
        self.cluster.world().pause(process);
        if self.rng.borrow_mut().chance(1, 3) {
            self.stop_kernel(node, self.some_time(0, 100), duration);
        }
        self.later(node, duration, move |cluster| cluster.world().resume(process));
        Some(node)
    }

    /// The whole server stands still, not one process of it: nothing that is sent to it from `after` on arrives, and a reset is not
    /// repeated. So what lies in its sockets is read when it goes on, whoever has given it up meanwhile.
    fn stop_kernel(&self, node: NodeId, after: Duration, duration: Duration) {
        let plan = &self.cluster.plan;
        let hosts =
            (0..plan.hosts + plan.deletions + plan.multipath).map(|host| FIRST_HOST + u32::from(host));
        let mut others: Vec<NodeId> = hosts.map(NodeId).collect();
        others.extend(self.cluster.nodes().into_iter().filter(|other| *other != node));
        let cuts: Vec<_> = others
            .into_iter()
            .flat_map(|other| [(node, other), (other, node)])
            .collect();
        let (cluster, world) = (Rc::clone(&self.cluster), self.cluster.world());
        let begins = world.now().after(after.min(duration));
        world.at(begins, None, move |world| {
            for (from, to) in &cuts {
                cluster.network.cut(*from, *to);
            }
            world.at(begins.after(duration.saturating_sub(after)), None, move |_| {
                for (from, to) in cuts {
                    cluster.network.mend(from, to);
                }
            });
        });
    }

    fn unhealthy(self: &Rc<Self>, health: Health) -> Option<NodeId> {
        let duration = self.some_time(50, 4_000);
        let node = self.victim(duration)?;
        self.cluster.local_drive(node).medium.set_health(health);
        self.later(node, duration, move |cluster| {
            cluster.local_drive(node).medium.set_health(Health::Serving);
        });
        Some(node)
    }

    fn slow(self: &Rc<Self>) -> Option<NodeId> {
        let duration = self.some_time(500, 5_000);
        let node = self.victim(duration)?;
        let factor = [10, 100, 1000][self.rng.borrow_mut().index(3)];
        self.cluster.local_drive(node).medium.set_slowness(factor);
        self.later(node, duration, move |cluster| {
            cluster.local_drive(node).medium.set_slowness(1);
        });
        Some(node)
    }

    fn full(self: &Rc<Self>) -> Option<NodeId> {
        let duration = self.some_time(200, 4_000);
        let node = self.victim(duration)?;
        self.cluster.local_drive(node).medium.set_full(true);
        self.later(node, duration, move |cluster| {
            cluster.local_drive(node).medium.set_full(false);
        });
        Some(node)
    }

    fn damaged(&self) -> Option<NodeId> {
        let node = NodeId(self.cluster.plan.damaged?);
        self.may_hurt(node, Duration::ZERO).then_some(node)
    }

    fn astray(&self, how: Astray) -> Option<NodeId> {
        let node = self.damaged()?;
        let count = self.between(1, 20) as u32;
        self.cluster.local_drive(node).medium.set_astray(how, count);
        Some(node)
    }

    fn flip_bits(&self) -> Option<NodeId> {
        let node = self.damaged()?;
        let medium = Rc::clone(&self.cluster.local_drive(node).medium);
        let blocks = u64::from(medium.spec().size_mib) * 256;
        for block in (256..blocks).filter(|block| medium.holds(*block)) {
            if self.rng.borrow_mut().chance(1, 8) {
                let bit = self.between(0, 8 * 4096 - 1) as usize;
                medium.flip_bit(block, bit);
            }
        }
        Some(node)
    }

    fn messages(self: &Rc<Self>) -> Option<NodeId> {
        let one_in = [8, 40, 200][self.rng.borrow_mut().index(3)];
        self.cluster.network.bad_one_in.set(one_in);
        let duration = self.some_time(200, 4_000);
        self.later(NodeId(0), duration, |cluster| cluster.network.bad_one_in.set(0));
        Some(NodeId(0))
    }

    /// Cuts one node, or several, off from some or all others.
    fn partition(self: &Rc<Self>, one_way: bool) -> Option<NodeId> {
        let duration = if self.rng.borrow_mut().chance(1, 3) {
            self.some_time(50, 1_500)
        } else {
            self.some_time(1_500, 8_000)
        };
        let first = self.victim(duration)?;
        let mut nodes = self.cluster.nodes();
        self.rng.borrow_mut().shuffle(&mut nodes);
        nodes.retain(|node| *node != first);
        let others: Vec<NodeId> = match self.between(0, 3) {
            // All of them; the leader alone; or any.
            0 | 1 => nodes,
            2 => vec![self.cluster.raft.leader_node().unwrap_or(NodeId(1))],
            _ => nodes.split_off(self.between(0, nodes.len() as u64 - 1) as usize),
        };
        let out = self.rng.borrow_mut().chance(1, 2);
        let mut cuts = Vec::new();
        for other in others.into_iter().filter(|other| *other != first) {
            if !one_way || out {
                cuts.push((first, other));
            }
            if !one_way || !out {
                cuts.push((other, first));
            }
        }
        for (from, to) in &cuts {
            self.cluster.network.cut(*from, *to);
        }
        self.later(first, duration, move |cluster| {
            for (from, to) in cuts {
                cluster.network.mend(from, to);
            }
        });
        Some(first)
    }

    /// One that owns a volume goes on with it: hosts and drives reach it, nobody tells it that it has been succeeded. What stops it
    /// is the drives alone.
    fn no_metadata(self: &Rc<Self>) -> Option<NodeId> {
        let duration = self.some_time(300, 6_000);
        let node = self.victim(duration)?;
        self.cluster.network.cut_from_metadata(node);
        self.later(node, duration, move |cluster| {
            cluster.network.mend_to_metadata(node)
        });
        Some(node)
    }

    fn drift(&self) -> Option<NodeId> {
        let node = self.any_node();
        let agent = self.cluster.agent(node)?;
        self.cluster.drift(&agent);
        Some(node)
    }
}

/// Ends every fault that has an end.
pub(super) fn heal_all(cluster: &Rc<Cluster>) {
    cluster.network.mend_all();
    for node in cluster.nodes() {
        cluster.note_hurt(node);
        let medium = &cluster.local_drive(node).medium;
        medium.set_health(Health::Serving);
        medium.set_slowness(1);
        medium.set_full(false);
        medium.set_astray(Astray::Lost, 0);
        match cluster.agent(node) {
            Some(agent) => cluster.world().resume(agent.process.id),
            None => cluster.start_agent(node),
        }
    }
}
