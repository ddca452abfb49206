//! The hosts of a run: what they ask for, and the history they record.
//!
//! Two kinds, which share the volumes and read everywhere:
//!
//! - **Multipath hosts** reach a volume over every node, retry, and must never see an error. As their initiator asks,
//!   no write is started to a block while an older one to it has no answer; they keep that among each other, as a
//!   cluster file system's lock manager would. So a write that is sent twice cannot undo a later one by the host's own
//!   doing, and whatever undoes it is the fabric's.
//! - **Plain hosts** have one path, to one node, and do not retry: each write is sent once and may end Unknown. They
//!   write to the *contested* blocks at the end, all at once and without any lock.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use weft_block::{BlockDevice, BlockError, Durability, Io};
use weft_initiator::{ConnectOptions, Controller, HostIdentity, Multipath, MultipathOptions, Namespace};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::units::{Lba, LbaRange};

use crate::history::{Action, BLOCK_BYTES, Block, Outcome, Record, Value, observe, stamp};
use crate::mirror::Mirror;

/// Blocks of each volume that the multipath hosts write.
pub const LOCKED_BLOCKS: u32 = 3072;
/// Blocks behind them that the plain hosts write.
pub const CONTESTED_BLOCKS: u32 = 64;
/// Of the locked blocks, those that take half of the commands, so that blocks are written again and again.
const HOT_BLOCKS: u32 = 96;
/// Multipath hosts of each volume.
const HOSTS: u16 = 2;
/// Commands that each of them has in flight.
const TASKS: u16 = 3;
/// Plain hosts of each volume.
const PLAIN_HOSTS: u16 = 4;
/// Longest command, in blocks.
const COMMAND_BLOCKS_MAX: u32 = 32;
/// A host waits this long for an answer before the run calls the command stuck: far more than any retry takes.
const STUCK: Duration = Duration::from_secs(120);
/// Longest pause of a client between commands, unless said otherwise. It bounds the history, and leaves the machine time for the
/// agents.
pub const THINK_MAX: Duration = Duration::from_millis(16);

/// Bytes of a volume of the run.
pub const VOLUME_BYTES: u64 = 64 << 20;

/// A volume of the run.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its index in the history.
    pub index: u16,
    /// Its name.
    pub name: String,
    /// Where it is presented.
    pub subnqn: Nqn,
}

/// What all clients of a run share with whoever watches them.
#[derive(Debug)]
pub struct Watch {
    /// When the run began: zero of all times.
    pub began: Instant,
    /// Ends the clients after the command each has in flight.
    pub stop: AtomicBool,
    /// Commands answered so far.
    pub answered: AtomicU64,
    /// What the locked blocks hold, as the answers to their writes say.
    pub mirror: Mirror,
}

impl Watch {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).expect("a run is shorter than centuries")
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// What the clients bring home.
#[derive(Debug, Default)]
pub struct Harvest {
    /// One record for each block of each command.
    pub history: Vec<Record>,
    /// Errors that a multipath host saw, and answers no host may get.
    pub io_errors: Vec<String>,
    /// Errors that plain hosts saw, by name: their business is to see some.
    pub plain_errors: BTreeMap<String, u64>,
    /// Commands that ended Unknown.
    pub unknown: u64,
    /// Commands answered with success.
    pub commands: u64,
    /// Commands that multipath hosts sent again.
    pub retries: u64,
    /// The longest a multipath host waited for an answer, and when it asked.
    pub longest: (Duration, Duration),
}

/// HostNQN of a host by its number.
#[must_use]
pub fn host_nqn(host: u16) -> Nqn {
    format!("nqn.2014-08.org.nvmexpress:uuid:c4a05000-0000-4000-8000-00000000{host:04x}")
        .parse()
        .expect("a well-formed name")
}

/// Numbers of all hosts that connect to a volume: who has to be allowed.
pub fn hosts(volume: u16) -> impl Iterator<Item = u16> {
    let count = HOSTS + PLAIN_HOSTS + 1;
    volume * count..(volume + 1) * count
}

fn connect_options(host: u16, address: SocketAddr, subnqn: &Nqn) -> ConnectOptions {
    let mut id = *b"weft-chaos-host\0";
    id[15] = u8::try_from(host).expect("few hosts");
    let host = HostIdentity {
        hostnqn: host_nqn(host),
        hostid: HostId(id),
    };
    ConnectOptions::new(address, subnqn.clone(), host)
}

/// Runs the clients of all volumes on this thread until the watch says stop, with pauses of up to `think_max` between
/// commands.
///
/// # Errors
/// A multipath host cannot connect at the beginning.
pub fn run(
    volumes: &[Volume],
    nodes: &[SocketAddr],
    seed: u64,
    think_max: Duration,
    watch: &Arc<Watch>,
) -> anyhow::Result<Harvest> {
    on_this_thread(async {
        let harvest = Rc::new(RefCell::new(Harvest::default()));
        let mut tasks = Vec::new();
        let mut paths = Vec::new();
        let mut clients = 0;
        for volume in volumes {
            let mut numbers = hosts(volume.index);
            let locked = Rc::new(RefCell::new(BTreeSet::new()));
            let mut client = |through| {
                clients += 1;
                Client {
                    id: clients,
                    through,
                    volume: volume.index,
                    locked: locked.clone(),
                    random: SmallRng::seed_from_u64(seed ^ u64::from(clients) << 40),
                    version: 0,
                    watch: watch.clone(),
                    harvest: harvest.clone(),
                }
            };
            for host in numbers.by_ref().take(HOSTS.into()) {
                let options = connect_options(host, nodes[0], &volume.subnqn);
                let path = Multipath::connect(MultipathOptions::new(options, nodes.to_vec(), 1)).await?;
                for _ in 0..TASKS {
                    tasks.push(tokio::task::spawn_local(
                        client(Through::Multipath(path.clone())).work(think_max),
                    ));
                }
                paths.push(path);
            }
            for host in numbers.take(PLAIN_HOSTS.into()) {
                let node = nodes[usize::from(host) % nodes.len()];
                let plain = Plain::new(connect_options(host, node, &volume.subnqn));
                tasks.push(tokio::task::spawn_local(
                    client(Through::Plain(plain)).work(think_max),
                ));
            }
        }
        for task in tasks {
            task.await.map_err(|error| anyhow::anyhow!("a client: {error}"))?;
        }
        let mut harvest = harvest.take();
        harvest.retries = paths.iter().map(Multipath::host_retries).sum();
        Ok(harvest)
    })
}

/// Reads every block of every volume through each of the nodes by itself, as hosts that were not there before.
///
/// # Errors
/// A node does not connect.
pub fn read_back(volumes: &[Volume], nodes: &[SocketAddr], watch: &Arc<Watch>) -> anyhow::Result<Harvest> {
    on_this_thread(async {
        let harvest = Rc::new(RefCell::new(Harvest::default()));
        for volume in volumes {
            let host = hosts(volume.index).last().expect("a volume has hosts");
            for node in nodes {
                let options = connect_options(host, *node, &volume.subnqn);
                let path = Multipath::connect(MultipathOptions::new(options, vec![*node], 1)).await?;
                let mut reader = Client {
                    id: 0,
                    through: Through::Multipath(path),
                    volume: volume.index,
                    locked: Rc::default(),
                    random: SmallRng::seed_from_u64(0),
                    version: 0,
                    watch: watch.clone(),
                    harvest: harvest.clone(),
                };
                let blocks = u32::try_from(VOLUME_BYTES / BLOCK_BYTES as u64).expect("a small volume");
                for lba in (0..blocks).step_by(COMMAND_BLOCKS_MAX as usize) {
                    reader.command(Action::Read, lba, COMMAND_BLOCKS_MAX).await;
                }
            }
        }
        Ok(harvest.take())
    })
}

fn on_this_thread<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, work)
}

/// How a client reaches its volume.
enum Through {
    Multipath(Multipath),
    Plain(Plain),
}

/// One path to one node: connected again when it is lost, never retried on.
struct Plain {
    options: ConnectOptions,
    namespace: RefCell<Option<Rc<Namespace>>>,
}

impl Plain {
    fn new(options: ConnectOptions) -> Self {
        Self {
            options,
            namespace: RefCell::default(),
        }
    }

    /// What is connected, if the node answers now.
    async fn namespace(&self) -> Option<Rc<Namespace>> {
        let known = self.namespace.borrow().clone();
        if let Some(known) = known.filter(|known| known.controller().closed_reason().is_none()) {
            return Some(known);
        }
        let controller = Controller::connect(self.options.clone()).await.ok()?;
        let namespace = controller.namespace(1).await.ok()?;
        *self.namespace.borrow_mut() = Some(namespace.clone());
        Some(namespace)
    }
}

/// One command at a time, recorded.
struct Client {
    id: u16,
    through: Through,
    volume: u16,
    /// Blocks that a multipath host is writing.
    locked: Rc<RefCell<BTreeSet<u32>>>,
    random: SmallRng,
    version: u32,
    watch: Arc<Watch>,
    harvest: Rc<RefCell<Harvest>>,
}

impl Client {
    async fn work(mut self, think_max: Duration) {
        while !self.watch.stopped() {
            let action = match self.random.random_range(0..100) {
                0..40 => Action::Read,
                40..85 => Action::Write,
                85..93 => Action::WriteZeroes,
                _ => Action::Deallocate,
            };
            let count = match self.random.random_range(0..10) {
                0..5 => 1,
                5..9 => self.random.random_range(2..9),
                _ => COMMAND_BLOCKS_MAX,
            };
            let locks = matches!(self.through, Through::Multipath(_)) && action != Action::Read;
            let (start, count) = self.place(action, count);
            if !locks {
                self.command(action, start, count).await;
            } else if self.lock(start, count) {
                self.command(action, start, count).await;
                self.locked
                    .borrow_mut()
                    .retain(|lba| !(start..start + count).contains(lba));
            }
            let think = self.random.random_range(Duration::ZERO..=think_max);
            tokio::time::sleep(think).await;
        }
    }

    /// Where a command goes: to the client's own kind of blocks if it writes, anywhere if it reads.
    fn place(&mut self, action: Action, count: u32) -> (u32, u32) {
        let contested = match (&self.through, action) {
            (_, Action::Read) => self.random.random_range(0..3) == 0,
            (Through::Multipath(_), _) => false,
            (Through::Plain(_), _) => true,
        };
        let (first, blocks) = match contested {
            true => (LOCKED_BLOCKS, CONTESTED_BLOCKS),
            false if self.random.random_bool(0.5) => (0, HOT_BLOCKS),
            false => (0, LOCKED_BLOCKS),
        };
        // Narrow in the contested blocks: the more commands meet in a block, the better.
        let count = if contested { count.min(4) } else { count };
        (first + self.random.random_range(0..=blocks - count), count)
    }

    /// Takes the blocks for a write, if nobody else has one of them.
    fn lock(&self, start: u32, count: u32) -> bool {
        let mut locked = self.locked.borrow_mut();
        if locked.range(start..start + count).next().is_some() {
            return false;
        }
        locked.extend(start..start + count);
        true
    }

    /// Sends one command and records what became of each of its blocks.
    async fn command(&mut self, action: Action, start: u32, count: u32) {
        let device: Rc<dyn BlockDevice> = match &self.through {
            Through::Multipath(path) => Rc::new(path.clone()),
            Through::Plain(plain) => match plain.namespace().await {
                Some(namespace) => namespace,
                None => return tokio::time::sleep(Duration::from_millis(200)).await,
            },
        };
        self.version += 1;
        let invoked_ns = self.watch.now_ns();
        let answer = self.submit(&*device, action, start, count);
        let answer = tokio::time::timeout(STUCK, answer).await;
        let completed_ns = self.watch.now_ns();
        self.watch.answered.fetch_add(1, Ordering::Relaxed);
        let waited = Duration::from_nanos(completed_ns - invoked_ns);
        let (outcome, data) = self.judge(answer.ok(), (action, start, count), waited, invoked_ns);
        self.mirror(action, start, count, outcome, &data);
        for index in 0..count {
            let block = Block {
                volume: self.volume,
                lba: start + index,
            };
            let value = match action {
                Action::Read => {
                    let at = index as usize * BLOCK_BYTES;
                    observe(block, data.get(at..at + BLOCK_BYTES).unwrap_or_default())
                }
                Action::Write => Value::Written {
                    client: self.id,
                    version: self.version,
                },
                Action::WriteZeroes | Action::Deallocate => Value::Zero,
            };
            self.harvest.borrow_mut().history.push(Record {
                block,
                client: self.id,
                action,
                outcome,
                value,
                invoked_ns,
                completed_ns,
            });
        }
        if outcome != Outcome::Ok {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Does to the mirror file what the answer says was done to the volume; what was read at the end is compared with it.
    fn mirror(&self, action: Action, start: u32, count: u32, outcome: Outcome, data: &Bytes) {
        let (mirror, volume) = (&self.watch.mirror, self.volume);
        for index in 0..count {
            let lba = start + index;
            if lba >= LOCKED_BLOCKS {
                return;
            }
            let block = Block { volume, lba };
            match (action, outcome) {
                (Action::Read, Outcome::Ok) if self.watch.stopped() => {
                    let at = index as usize * BLOCK_BYTES;
                    mirror.compare(block, data.get(at..at + BLOCK_BYTES).unwrap_or_default());
                }
                (Action::Read, _) => {}
                (_, Outcome::Refused) => {}
                (_, Outcome::Unknown) => mirror.doubt(block),
                (Action::Write, Outcome::Ok) => mirror.write(block, &stamp(block, self.id, self.version)),
                (_, Outcome::Ok) => mirror.write(block, &[0; BLOCK_BYTES]),
            }
        }
    }

    fn submit(&self, device: &dyn BlockDevice, action: Action, start: u32, count: u32) -> Io<Bytes> {
        let range = LbaRange {
            start: Lba(start.into()),
            count: count.into(),
        };
        let done: Io<()> = match action {
            Action::Read => return device.read(range),
            Action::Write => {
                let block = |index| Block {
                    volume: self.volume,
                    lba: start + index,
                };
                let data = (0..count).map(|index| stamp(block(index), self.id, self.version));
                device.write(range.start, data.collect(), Durability::Cached)
            }
            Action::WriteZeroes => {
                device.write_zeroes(range, self.version.is_multiple_of(2), Durability::Cached)
            }
            Action::Deallocate => device.deallocate(vec![range]),
        };
        Io::running(async move { done.await.map(|()| Bytes::new()) })
    }

    /// Counts an answer; `None` is none at all.
    fn judge(
        &self,
        answer: Option<Result<Bytes, BlockError>>,
        what: (Action, u32, u32),
        waited: Duration,
        invoked_ns: u64,
    ) -> (Outcome, Bytes) {
        let mut harvest = self.harvest.borrow_mut();
        let multipath = matches!(self.through, Through::Multipath(_));
        let at = Duration::from_nanos(invoked_ns);
        if multipath && waited > harvest.longest.0 {
            harvest.longest = (waited, at);
        }
        let (outcome, error) = match answer {
            Some(Ok(data)) => {
                harvest.commands += 1;
                return (Outcome::Ok, data);
            }
            None => (Outcome::Unknown, format!("no answer in {STUCK:?}")),
            Some(Err(error)) if error == BlockError::Unknown => (Outcome::Unknown, error.to_string()),
            Some(Err(error)) => (Outcome::Refused, error.to_string()),
        };
        harvest.unknown += u64::from(outcome == Outcome::Unknown);
        let (action, start, count) = what;
        let expected = error == BlockError::Unknown.to_string() || error == BlockError::NotReady.to_string();
        if multipath || !expected {
            harvest.io_errors.push(format!(
                "client {} {action:?} of volume {} blocks {start}+{count}, asked at {:.3} s: {error} after {:.3} s",
                self.id,
                self.volume,
                at.as_secs_f64(),
                waited.as_secs_f64()
            ));
        } else {
            *harvest.plain_errors.entry(error).or_default() += 1;
        }
        (outcome, Bytes::new())
    }
}
