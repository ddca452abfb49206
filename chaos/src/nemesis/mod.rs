//! The nemesis: hurts a cluster of real agents on a seeded schedule, never more of it at once than the volumes'
//! redundancy covers, and heals everything at the end.
//!
//! A node is *hurt* from the moment it is killed or stopped until the cluster shows it up, its drive online and its
//! incarnation registered everywhere again. A node whose drive has rotted or vanished is *scarred*: it stays hurt for the
//! rest of the run, since nothing rebuilds what the drive held yet. At most `m` nodes are hurt at once.
//!
//! The seed decides which fault comes next, on whom, for how long and after which pause; when a node has healed is for the
//! cluster to say, so two runs of one seed differ in time.

mod observer;
mod rot;

use std::collections::BTreeMap;
use std::fs;
use std::process::Stdio;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use weft_node::local_cluster::Agents;

use self::observer::{Observer, View};
use self::rot::flip_bits;
use crate::clients::Volume;
use crate::isolation::{Networks, SmallFileSystem, Throttle};

/// How long a cluster without faults may take to serve everything again. Generous: a slow machine is not a failure.
const HEAL_LIMIT: Duration = Duration::from_secs(180);

/// What lasting harm a run does to one drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scar {
    /// Bits flip in what the drive holds.
    Rot,
    /// Its file is removed while the agent has it open.
    Removed,
}

/// Where a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Sound,
    /// Killed; started again then.
    Killed(Instant),
    /// Stopped; resumed then.
    Stopped(Instant),
    /// Cut off from others, or its I/O held up, or its drive's file system full; healed then.
    Troubled(Trouble, Instant),
    /// Started, resumed or healed at that time, and not in full service yet.
    Healing(Instant),
}

/// What is done to a node that goes on running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// It reaches some or all others no more, or they it, or neither.
    Cut,
    /// Its drive does a few operations a second.
    Slow,
    /// Its drive has no room for what was never written.
    Full,
}

/// See the module.
pub struct Nemesis {
    agents: Agents,
    volumes: Vec<Volume>,
    random: SmallRng,
    began: Instant,
    health: Vec<Health>,
    /// The node whose drive gets a scar, which one, and when.
    scar: Option<(usize, Scar, Instant)>,
    scarred: bool,
    hurt_max: usize,
    tools: Tools,
    /// Cuts in force, by the node that they are done to.
    cuts: Vec<(usize, usize, usize)>,
    observer: Observer,
    moves: Vec<JoinHandle<bool>>,
    /// Faults so far, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Moves that were seen to their end.
    pub moved: usize,
    /// What must not happen and did.
    pub failures: Vec<String>,
}

/// What a nemesis that is root can hurt nodes with besides signals.
#[derive(Debug, Default)]
pub struct Tools {
    /// Of all nodes.
    pub networks: Option<Networks>,
    /// Of whichever node is held up.
    pub throttle: Option<Throttle>,
    /// Under the drive of this node.
    pub small: Option<(usize, SmallFileSystem)>,
}

impl Nemesis {
    /// A nemesis of `agents`, for a run that ends at `until`.
    pub fn new(
        agents: Agents,
        volumes: &[Volume],
        seed: u64,
        began: Instant,
        until: Instant,
        tools: Tools,
    ) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let nodes = agents.list.len();
        // From a third of the run on: before, as many nodes are killed and stopped at once as redundancy covers.
        let from = Instant::now() + (until - Instant::now()) / 3;
        let scar = match random.random_range(0..4) {
            0 => None,
            1 | 2 => Some(Scar::Rot),
            _ => Some(Scar::Removed),
        }
        .map(|scar| (random.random_range(0..nodes), scar, from));
        Self {
            health: vec![Health::Sound; nodes],
            observer: Observer::new(&agents),
            agents,
            volumes: volumes.to_vec(),
            random,
            began,
            scar,
            scarred: false,
            hurt_max: 2,
            tools,
            cuts: Vec::new(),
            moves: Vec::new(),
            faults: BTreeMap::new(),
            moved: 0,
            failures: Vec::new(),
        }
    }

    /// Hurts the cluster until `until`; calls `tick` now and then, and ends early when that says so.
    ///
    /// # Errors
    /// A process cannot be started or signalled.
    pub fn rage(&mut self, until: Instant, mut tick: impl FnMut() -> bool) -> anyhow::Result<()> {
        let mut next = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until && tick() {
            self.heal_due()?;
            self.expect_all_alive()?;
            if Instant::now() >= next {
                self.strike()?;
                next = Instant::now() + self.draw_ms(300, 6_000);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Ends all faults and waits until the cluster is whole, but for scars.
    ///
    /// # Errors
    /// It does not become whole.
    pub fn heal(&mut self) -> anyhow::Result<()> {
        self.say("the end: everything is healed");
        for health in &mut self.health {
            if let Health::Killed(due) | Health::Stopped(due) | Health::Troubled(_, due) = health {
                *due = Instant::now();
            }
        }
        let deadline = Instant::now() + HEAL_LIMIT;
        loop {
            self.heal_due()?;
            self.expect_all_alive()?;
            let missing = self.missing();
            if missing.is_empty() {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "{} s after the last fault: {}",
                HEAL_LIMIT.as_secs(),
                missing.join(", ")
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        let moves = std::mem::take(&mut self.moves);
        let done = moves.into_iter().filter_map(|thread| thread.join().ok());
        self.moved = done.filter(|finished| *finished).count();
        self.say("whole again");
        Ok(())
    }

    /// Addresses of all nodes' NVMe/TCP listeners.
    #[must_use]
    pub fn nvme_addresses(&self) -> Vec<std::net::SocketAddr> {
        self.agents
            .list
            .iter()
            .map(|agent| agent.config.nvme_listen)
            .collect()
    }

    fn strike(&mut self) -> anyhow::Result<()> {
        if let Some((node, scar, from)) = self.scar
            && Instant::now() >= from
            && (self.scarred || self.health[node] == Health::Sound && self.hurt() < self.hurt_max)
            && (!self.scarred || scar == Scar::Rot && self.random.random_range(0..8) == 0)
        {
            self.scarred = true;
            return self.injure(node, scar);
        }
        match self.random.random_range(0..100) {
            0..25 => self.kill(),
            25..45 => self.stop(),
            45..65 => self.cut(),
            65..73 => self.slow(),
            73..79 => self.fill(),
            79..87 => {
                self.kill()?;
                self.stop()
            }
            _ => {
                self.move_volume();
                Ok(())
            }
        }
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        let Some(node) = self.victim(false) else {
            return Ok(());
        };
        let down = self.draw_ms(100, 15_000);
        self.fault("kill", &format!("{}, down for {down:?}", self.name(node)));
        self.agents.kill(node)?;
        self.health[node] = Health::Killed(Instant::now() + down);
        Ok(())
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        let Some(node) = self.victim(true) else {
            return Ok(());
        };
        let stopped = self.draw_ms(100, 20_000);
        self.fault("stop", &format!("{}, for {stopped:?}", self.name(node)));
        self.agents.signal(node, "STOP")?;
        self.health[node] = Health::Stopped(Instant::now() + stopped);
        Ok(())
    }

    /// Cuts a node off: from all others or some, what it sends or what it hears or both.
    fn cut(&mut self) -> anyhow::Result<()> {
        if self.tools.networks.is_none() {
            return Ok(());
        }
        let Some(node) = self.victim(true) else {
            return Ok(());
        };
        let down = self.draw_ms(100, 20_000);
        let (sends, hears) = [(true, true), (true, false), (false, true)][self.random.random_range(0..3)];
        let all = self.random.random_bool(0.7);
        let mut others: Vec<usize> = (0..self.health.len()).filter(|other| *other != node).collect();
        others.retain(|_| all || self.random.random_bool(0.5));
        let how = match (sends, hears) {
            (true, true) => "partition",
            (true, false) => "partition out",
            _ => "partition in",
        };
        self.fault(
            how,
            &format!("{} and {} others, for {down:?}", self.name(node), others.len()),
        );
        for other in others {
            if sends {
                self.cut_one(node, node, other)?;
            }
            if hears {
                self.cut_one(node, other, node)?;
            }
        }
        self.health[node] = Health::Troubled(Trouble::Cut, Instant::now() + down);
        Ok(())
    }

    fn cut_one(&mut self, whose: usize, from: usize, to: usize) -> anyhow::Result<()> {
        self.cuts.push((whose, from, to));
        let networks = self.tools.networks.as_ref();
        networks.map_or(Ok(()), |networks| networks.cut(from, to))
    }

    /// Holds the I/O of a node up.
    fn slow(&mut self) -> anyhow::Result<()> {
        let free = !self
            .health
            .iter()
            .any(|health| matches!(health, Health::Troubled(Trouble::Slow, _)));
        if self.tools.throttle.is_none() || !free {
            return Ok(());
        }
        let Some(node) = self.victim(true) else {
            return Ok(());
        };
        let (down, operations) = (self.draw_ms(500, 15_000), self.random.random_range(5..200));
        let process = self.agents.process_id(node).context("an agent that runs")?;
        self.fault(
            "slow",
            &format!(
                "{}, {operations} operations a second, for {down:?}",
                self.name(node)
            ),
        );
        if let Some(throttle) = &self.tools.throttle {
            throttle.limit(operations)?;
            throttle.take(process)?;
        }
        self.health[node] = Health::Troubled(Trouble::Slow, Instant::now() + down);
        Ok(())
    }

    /// Fills the file system under the one drive that has its own.
    fn fill(&mut self) -> anyhow::Result<()> {
        let Some((node, _)) = self.tools.small else {
            return Ok(());
        };
        let room = self.hurt() < self.hurt_max || self.is_scarred(node);
        if self.health[node] != Health::Sound || !room {
            return Ok(());
        }
        let down = self.draw_ms(500, 15_000);
        self.fault("fill", &format!("the drive of {}, for {down:?}", self.name(node)));
        if let Some((_, small)) = &self.tools.small {
            small.fill()?;
        }
        self.health[node] = Health::Troubled(Trouble::Full, Instant::now() + down);
        Ok(())
    }

    /// Ends what troubles a node.
    fn relieve(&mut self, node: usize, trouble: Trouble) -> anyhow::Result<()> {
        match trouble {
            Trouble::Cut => {
                let cuts = std::mem::take(&mut self.cuts).into_iter();
                let (ended, left): (Vec<_>, Vec<_>) = cuts.partition(|(whose, ..)| *whose == node);
                self.cuts = left;
                for (_, from, to) in ended {
                    // Another node's cut may be of the same way.
                    let still = self.cuts.iter().any(|cut| (cut.1, cut.2) == (from, to));
                    if let (Some(networks), false) = (&self.tools.networks, still) {
                        networks.mend(from, to)?;
                    }
                }
            }
            Trouble::Slow => {
                if let Some(throttle) = &self.tools.throttle {
                    throttle.limit(0)?;
                    if let Some(process) = self.agents.process_id(node) {
                        throttle.release(process)?;
                    }
                }
            }
            Trouble::Full => {
                if let Some((_, small)) = &self.tools.small {
                    small.drain()?;
                }
            }
        }
        self.say(&format!("relieve {} of {trouble:?}", self.name(node)));
        Ok(())
    }

    fn move_volume(&mut self) {
        let volume = &self.volumes[self.random.random_range(0..self.volumes.len())];
        let to = self.random.random_range(0..self.health.len());
        if self.health[to] != Health::Sound || self.is_scarred(to) {
            return;
        }
        let (volume, to) = (volume.name.clone(), self.name(to).to_owned());
        self.fault("move", &format!("{volume} to {to}"));
        let mut command = self.agents.command(&["volume", "move", &volume, "--to", &to]);
        // Whether it gets there is not promised: its target may be the next victim.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let wait = move || command.status().is_ok_and(|status| status.success());
        self.moves.push(std::thread::spawn(wait));
    }

    /// A node that may be hurt now: an owner in half of the cases.
    fn victim(&mut self, stop: bool) -> Option<usize> {
        let removed = |scar: &Option<(usize, Scar, Instant)>, node| matches!(scar, Some((scarred, Scar::Removed, _)) if *scarred == node);
        let may = |node: usize| {
            let room = self.hurt() < self.hurt_max || self.is_scarred(node);
            // An agent does not start without its drive's file.
            let startable = stop || !self.scarred || !removed(&self.scar, node);
            self.health[node] == Health::Sound && room && startable
        };
        let candidates: Vec<usize> = (0..self.health.len()).filter(|node| may(*node)).collect();
        let owners: Vec<usize> = candidates
            .iter()
            .copied()
            .filter(|node| self.owns(*node))
            .collect();
        let among = if !owners.is_empty() && self.random.random_bool(0.5) {
            owners
        } else {
            candidates
        };
        (!among.is_empty()).then(|| among[self.random.random_range(0..among.len())])
    }

    fn injure(&mut self, node: usize, scar: Scar) -> anyhow::Result<()> {
        let drive = self.agents.list[node].config.drives[0].path.clone();
        match scar {
            Scar::Rot => {
                let flipped = flip_bits(&drive, &mut self.random)?;
                self.fault("rot", &format!("{}, {flipped} bits flipped", self.name(node)));
            }
            Scar::Removed => {
                self.fault("remove", &format!("the drive file of {}", self.name(node)));
                fs::remove_file(&drive).with_context(|| format!("remove {}", drive.display()))?;
            }
        }
        Ok(())
    }

    /// Starts and resumes what is due, and notes who has healed.
    fn heal_due(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        for node in 0..self.health.len() {
            match self.health[node] {
                Health::Killed(due) if due <= now => {
                    self.agents.start(node)?;
                    self.say(&format!("start {}", self.name(node)));
                }
                Health::Stopped(due) if due <= now => {
                    self.agents.signal(node, "CONT")?;
                    self.say(&format!("resume {}", self.name(node)));
                }
                Health::Troubled(trouble, due) if due <= now => self.relieve(node, trouble)?,
                Health::Healing(since) if self.sound_since(node, since) => {
                    self.health[node] = Health::Sound;
                    self.say(&format!(
                        "{} is whole after {:.1?}",
                        self.name(node),
                        since.elapsed()
                    ));
                    continue;
                }
                _ => continue,
            }
            self.health[node] = Health::Healing(Instant::now());
        }
        Ok(())
    }

    /// An agent that ends by itself is a failure; it is started again so that the run can go on.
    fn expect_all_alive(&mut self) -> anyhow::Result<()> {
        let Some(sentence) = self.agents.first_dead() else {
            return Ok(());
        };
        self.say(&sentence);
        let name = sentence.split_whitespace().nth(1).unwrap_or_default();
        let node = self.agents.index_of(name).context("the agent that ended")?;
        self.failures.push(sentence);
        self.agents.kill(node)?;
        self.health[node] = Health::Killed(Instant::now());
        Ok(())
    }

    fn hurt(&self) -> usize {
        let hurt = |node: &usize| self.health[*node] != Health::Sound || self.is_scarred(*node);
        (0..self.health.len()).filter(hurt).count()
    }

    fn is_scarred(&self, node: usize) -> bool {
        self.scarred && self.scar.is_some_and(|(scarred, ..)| scarred == node)
    }

    fn owns(&self, node: usize) -> bool {
        self.observer
            .view()
            .is_some_and(|view| view.owns(self.name(node)))
    }

    /// Whether a view that was asked for after `since` shows the node in full service.
    fn sound_since(&self, node: usize, since: Instant) -> bool {
        // A second on top: the leader may not have noticed yet that the node was away.
        let settled = since + Duration::from_secs(1);
        let view = self.observer.view();
        view.is_some_and(|view| view.asked > settled && self.unsound(node, &view).is_none())
    }

    /// What a node lacks. A drive whose file was removed is not missed.
    fn unsound(&self, node: usize, view: &View) -> Option<String> {
        let scar = self
            .scar
            .filter(|(_, scar, _)| self.scarred && *scar == Scar::Removed);
        view.unsound(self.name(node), scar.map(|(node, ..)| self.name(node)))
    }

    /// What keeps the cluster from being whole.
    fn missing(&self) -> Vec<String> {
        let Some(view) = self.observer.view() else {
            return vec!["the cluster does not say how it is".to_owned()];
        };
        let mut missing: Vec<String> = (0..self.health.len())
            .filter_map(|node| match self.health[node] {
                Health::Sound => None,
                _ => Some(
                    self.unsound(node, &view)
                        .unwrap_or_else(|| format!("{} heals", self.name(node))),
                ),
            })
            .collect();
        missing.extend(view.unserved());
        missing
    }

    fn name(&self, node: usize) -> &str {
        &self.agents.list[node].config.name
    }

    fn fault(&mut self, kind: &'static str, what: &str) {
        *self.faults.entry(kind).or_default() += 1;
        self.say(&format!("{kind} {what}"));
    }

    fn say(&self, sentence: &str) {
        eprintln!("{:9.3} s  {sentence}", self.began.elapsed().as_secs_f64());
    }

    /// Milliseconds whose logarithm is evenly spread: short ones as often as long ones.
    fn draw_ms(&mut self, least: u64, most: u64) -> Duration {
        let exponent = self.random.random_range((least as f64).ln()..(most as f64).ln());
        Duration::from_millis(exponent.exp() as u64)
    }
}
