//! A host with a path through every node: it repeats on another one what it gets no answer to.
//!
//! A counterpart of `initiator/src/multipath.rs`: a command that was refused as not begun goes on at once; a write whose path was lost, or
//! whose outcome nobody knows, is sent again once the Command Quiesce Time of its controller has passed. Each task writes blocks
//! that nobody else writes, and each write has its answer before the next one starts: so whatever a first attempt does after the
//! second one was answered is seen as a value that comes back. (Two hosts that repeat writes of one block undo each other's by
//! themselves.)

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use weft_block::BlockError;
use weft_proto::id::NodeId;
use weft_proto::units::{Lba, LbaRange};
use weft_volume::testing::rng::Rng;

use super::association::Kind;
use super::connection::{Answered, Connection};
use super::front::{HostCommand, What};
use super::host::Host;
use super::plan::LANE_BLOCKS;
use super::steps::Step;
use crate::history::Action;

/// What agents report, `COMMAND_QUIESCE` of `node/src/agent/route.rs`.
pub(super) const COMMAND_QUIESCE: Duration = Duration::from_secs(1);
/// Between two attempts of a command that was refused as not begun.
const REFUSED_PAUSE: Duration = Duration::from_millis(10);

/// The paths of one host.
pub(super) struct Multipath {
    host: Rc<Host>,
    kato: Duration,
    paths: RefCell<BTreeMap<NodeId, Rc<Connection>>>,
}

impl Multipath {
    /// Connects through all nodes, again and again for as long as the world lasts.
    pub(super) fn start(host: &Rc<Host>, kato: Duration) -> Rc<Self> {
        let multipath = Rc::new(Self {
            host: Rc::clone(host),
            kato,
            paths: RefCell::default(),
        });
        for node in host.cluster.nodes() {
            host.spawn(Rc::clone(&multipath).keep_path(node));
        }
        multipath
    }

    async fn keep_path(self: Rc<Self>, node: NodeId) {
        let (cluster, process) = (&self.host.cluster, &self.host.process);
        loop {
            let opened = Connection::open(cluster, process, node, Kind::Host, self.kato).await;
            if let Some(connection) = opened {
                self.paths.borrow_mut().insert(node, Rc::clone(&connection));
                connection.lost().await;
                self.paths.borrow_mut().remove(&node);
            }
            process.sleep(Duration::from_millis(cluster.draw(50, 500))).await;
        }
    }

    /// Writes and reads the blocks of one lane until the workload ends.
    pub(super) fn work(self: &Rc<Self>, mut rng: Rng, lane: u64) {
        let this = Rc::clone(self);
        self.host.spawn(async move {
            let host = &this.host;
            let first = host.cluster.plan.lane(lane);
            // Half of them stay on a path while it lasts.
            let mut preferred = None;
            while host.cluster.is_working() {
                let count = rng.between(1, 2);
                let start = Lba(first + rng.below(LANE_BLOCKS - count + 1));
                let volume = rng.below(u64::from(host.cluster.plan.volumes)) as u16;
                let range = LbaRange { start, count };
                let what = rng.below(10);
                if rng.chance(1, 8) {
                    preferred = rng.chance(1, 2).then(|| host.cluster.any_node(&mut rng));
                }
                this.command(volume, range, what, preferred, &mut rng).await;
                let pause = Duration::from_micros(rng.between(0, host.cluster.plan.think_us / 2));
                host.process.sleep(pause).await;
            }
        });
    }

    async fn command(
        &self,
        volume: u16,
        range: LbaRange,
        what: u64,
        preferred: Option<NodeId>,
        rng: &mut Rng,
    ) {
        let mut rng = rng.fork(what);
        let send = async |command| self.send(command, preferred, &mut rng).await;
        match what {
            0..=5 => self.host.write_by(volume, range, send).await,
            6 => self.host.zeroes_by(volume, range, Action::Deallocate, send).await,
            _ => drop(self.host.read_by(volume, range, Step::Read, send).await),
        }
    }

    /// Sends a command until it is answered.
    async fn send(&self, command: HostCommand, preferred: Option<NodeId>, rng: &mut Rng) -> Answered {
        let process = &self.host.process;
        let mut attempted = false;
        loop {
            let Some(path) = self.path(preferred, rng) else {
                process.sleep(REFUSED_PAUSE).await;
                continue;
            };
            match path.send(command.clone()).await {
                Some(Err(BlockError::NotReady)) => process.sleep(REFUSED_PAUSE).await,
                None | Some(Err(BlockError::Unknown)) => {
                    if !matches!(command.what, What::Read) {
                        process.sleep(COMMAND_QUIESCE).await;
                    }
                }
                // A former attempt may have been done, or half of it.
                Some(Err(BlockError::CapacityExceeded)) if attempted => return Err(BlockError::Unknown),
                Some(answered) => return answered,
            }
            attempted = true;
        }
    }

    fn path(&self, preferred: Option<NodeId>, rng: &mut Rng) -> Option<Rc<Connection>> {
        let paths = self.paths.borrow();
        let sound: Vec<&Rc<Connection>> = paths.values().filter(|path| !path.is_lost()).collect();
        let wanted = sound.iter().find(|path| Some(path.to()) == preferred);
        if let Some(path) = wanted {
            return Some(Rc::clone(path));
        }
        (!sound.is_empty()).then(|| Rc::clone(sound[rng.index(sound.len())]))
    }
}
