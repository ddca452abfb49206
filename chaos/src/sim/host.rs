//! Hosts: what they ask of the volumes through which nodes, and the history they keep for the checker.
//!
//! A host sends each command once, through one node, and never repeats it: what it does not hear of is unknown, and
//! the checker lets it happen at any later time or never. Hosts with several paths, that do repeat, are in [`super::multipath`].

use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use weft_block::BlockError;
use weft_proto::id::{NodeId, VolumeId};
use weft_proto::units::{Lba, LbaRange};
use weft_volume::testing::rng::Rng;

use super::cluster::Cluster;
use super::front::{HostCommand, What};
use super::process::Process;
use super::steps::Step;
use crate::history::{Action, BLOCK_BYTES, Block, Outcome, Record, Value, observe, stamp_into};

/// After this a host holds a command to be lost.
pub(super) const COMMAND_LIMIT: Duration = Duration::from_secs(2);

/// Node numbers from here on are hosts.
pub(super) const FIRST_HOST: u32 = 1000;

/// One host. Its tasks share it.
pub(super) struct Host {
    pub(super) cluster: Rc<Cluster>,
    pub(super) process: Process,
    client: u16,
}

impl Host {
    pub(super) fn start(cluster: &Rc<Cluster>, number: u16) -> Rc<Self> {
        let node = NodeId(FIRST_HOST + u32::from(number));
        Rc::new(Self {
            cluster: Rc::clone(cluster),
            process: Process::start(&cluster.world(), node),
            client: number,
        })
    }

    /// Random commands until the workload ends, or reads alone.
    pub(super) fn work(self: &Rc<Self>, mut rng: Rng, reads_only: bool) {
        let host = Rc::clone(self);
        self.process.spawn(async move {
            while host.cluster.is_working() {
                host.random_command(&mut rng, reads_only).await;
                // In bursts, so that commands overlap.
                let most = if rng.chance(2, 3) {
                    300
                } else {
                    3 * host.cluster.plan.think_us
                };
                let pause = rng.between(0, most);
                host.process.sleep(Duration::from_micros(pause)).await;
            }
        });
    }

    /// Writes small random ranges of a volume, of which nobody reads a block, for a while.
    pub(super) fn scribble(self: &Rc<Self>, volume: VolumeId, mut rng: Rng, duration: Duration) {
        let host = Rc::clone(self);
        let deadline = self.process.now().after(duration);
        let volume = (volume.0 - 1) as u16;
        self.process.spawn(async move {
            while host.process.now() < deadline && host.cluster.is_working() {
                let blocks = u64::from(host.cluster.plan.blocks);
                let count = rng.between(1, 8);
                let start = Lba(rng.below(blocks - count + 1));
                let node = host.cluster.any_node(&mut rng);
                host.write(volume, node, LbaRange { start, count }).await;
                host.process
                    .sleep(Duration::from_micros(rng.between(0, 2_000)))
                    .await;
            }
        });
    }

    async fn random_command(&self, rng: &mut Rng, reads_only: bool) {
        let plan = &self.cluster.plan;
        let volume = rng.below(u64::from(plan.volumes)) as u16;
        let count = match rng.below(8) {
            0..=3 => 1,
            4 | 5 => rng.between(1, 4),
            6 => rng.between(4, 12),
            _ => rng.between(8, 32),
        };
        let count = count.min(u64::from(plan.blocks));
        let what = rng.below(100);
        // Half of all commands meet on a few blocks. The lanes of other hosts are only read.
        let end = if rng.chance(1, 2) && count <= 8 {
            8
        } else if reads_only || what >= 63 {
            plan.total_blocks()
        } else {
            u64::from(plan.blocks)
        };
        let start = rng.below(end - count + 1);
        let range = LbaRange {
            start: Lba(start),
            count,
        };
        let node = self.cluster.any_node(rng);
        match what {
            _ if reads_only => drop(self.read(volume, node, range, Step::Read).await),
            0..=44 => self.write(volume, node, range).await,
            45..=49 => self.zeroes(volume, node, range, Action::WriteZeroes).await,
            50..=57 => self.zeroes(volume, node, range, Action::Deallocate).await,
            58..=62 => drop(self.read(volume, node, range, Step::Compare).await),
            _ => drop(self.read(volume, node, range, Step::Read).await),
        }
    }

    async fn send(&self, node: NodeId, command: HostCommand) -> Result<Bytes, BlockError> {
        let called = self
            .cluster
            .call(&self.process, node, COMMAND_LIMIT, move |agent| {
                agent.serve_host(command).boxed_local()
            });
        called.await.unwrap_or(Err(BlockError::Unknown))
    }

    fn io_error(&self, what: &str) {
        self.cluster.world().note(|| what.to_owned());
        if self.cluster.is_tolerated() {
            let what = format!("a host met an error within the tolerated failures: {what}");
            self.cluster.watch.violation(what);
        }
    }

    fn now(&self) -> u64 {
        self.cluster.world().now().0
    }

    async fn write(&self, volume: u16, node: NodeId, range: LbaRange) {
        let send = async |command| self.send(node, command).await;
        self.write_by(volume, range, send).await;
    }

    /// Writes blocks that tell who wrote them, by sending the command in whatever way.
    pub(super) async fn write_by(
        &self,
        volume: u16,
        range: LbaRange,
        send: impl AsyncFnOnce(HostCommand) -> Result<Bytes, BlockError>,
    ) {
        let wide = if range.count >= 8 {
            Step::WideWrite
        } else {
            Step::Write
        };
        let _under = self.cluster.steps.enter(wide);
        let version = self.cluster.watch.next_version();
        let mut bytes = BytesMut::zeroed(range.count as usize * BLOCK_BYTES);
        for (lba, bytes) in lbas(range).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
            stamp_into(bytes, Block { volume, lba }, self.client, version);
        }
        let value = Value::Written {
            client: self.client,
            version,
        };
        let what = What::Write(bytes.freeze());
        self.change(volume, range, what, Action::Write, value, send).await;
    }

    async fn zeroes(&self, volume: u16, node: NodeId, range: LbaRange, action: Action) {
        let send = async |command| self.send(node, command).await;
        self.zeroes_by(volume, range, action, send).await;
    }

    /// Write Zeroes or a deallocation.
    pub(super) async fn zeroes_by(
        &self,
        volume: u16,
        range: LbaRange,
        action: Action,
        send: impl AsyncFnOnce(HostCommand) -> Result<Bytes, BlockError>,
    ) {
        let _under = self.cluster.steps.enter(Step::Trim);
        let what = match action {
            Action::Deallocate => What::Deallocate,
            _ => What::Zeroes,
        };
        self.change(volume, range, what, action, Value::Zero, send).await;
    }

    async fn change(
        &self,
        volume: u16,
        range: LbaRange,
        what: What,
        action: Action,
        value: Value,
        send: impl AsyncFnOnce(HostCommand) -> Result<Bytes, BlockError>,
    ) {
        let invoked_ns = self.now();
        // On record while it is open: whoever reads it meanwhile is judged with it.
        let open = self.cluster.watch.open(lbas(range).map(|lba| Record {
            block: Block { volume, lba },
            client: self.client,
            action,
            outcome: Outcome::Unknown,
            value,
            invoked_ns,
            completed_ns: u64::MAX,
        }));
        let command = HostCommand {
            volume: volume_id(volume),
            range,
            what,
        };
        let outcome = match send(command).await {
            Ok(_) => Outcome::Ok,
            Err(BlockError::CapacityExceeded) => Outcome::Refused,
            // An engine that stops with a stripe in flight cannot say whether the next owner finds it.
            Err(BlockError::Unknown | BlockError::NotReady) => Outcome::Unknown,
            Err(error) => {
                self.io_error(&format!("{action:?} of {range:?} on volume {volume}: {error}"));
                Outcome::Unknown
            }
        };
        if outcome != Outcome::Unknown {
            self.cluster.watch.close(open, outcome, self.now());
        }
    }

    /// Whether the read was answered.
    pub(super) async fn read(&self, volume: u16, node: NodeId, range: LbaRange, step: Step) -> bool {
        let send = async |command| self.send(node, command).await;
        self.read_by(volume, range, step, send).await
    }

    /// Reads blocks, and keeps what they told. Whether the read was answered.
    pub(super) async fn read_by(
        &self,
        volume: u16,
        range: LbaRange,
        step: Step,
        send: impl AsyncFnOnce(HostCommand) -> Result<Bytes, BlockError>,
    ) -> bool {
        let _under = self.cluster.steps.enter(step);
        let invoked_ns = self.now();
        let command = HostCommand {
            volume: volume_id(volume),
            range,
            what: What::Read,
        };
        let bytes = match send(command).await {
            Ok(bytes) => bytes,
            Err(BlockError::Unknown | BlockError::NotReady) => return false,
            Err(error) => {
                self.io_error(&format!("read of {range:?} on volume {volume}: {error}"));
                return false;
            }
        };
        if bytes.len() != range.count as usize * BLOCK_BYTES {
            let got = bytes.len();
            self.cluster
                .watch
                .violation(format!("a read of {range:?} was answered with {got} bytes"));
            return false;
        }
        let completed_ns = self.now();
        for (lba, bytes) in lbas(range).zip(bytes.chunks(BLOCK_BYTES)) {
            let block = Block { volume, lba };
            self.cluster.watch.record(Record {
                block,
                client: self.client,
                action: Action::Read,
                outcome: Outcome::Ok,
                value: observe(block, bytes),
                invoked_ns,
                completed_ns,
            });
        }
        true
    }

    /// Reads every block of a volume through `node`, again and again until each read is answered or `limit` has passed.
    pub(super) async fn read_all(self: Rc<Self>, volume: u16, node: NodeId, limit: Duration) -> bool {
        let deadline = self.process.now().after(limit);
        let blocks = self.cluster.plan.total_blocks();
        let mut start = 0;
        while start < blocks {
            let range = LbaRange {
                start: Lba(start),
                count: 16.min(blocks - start),
            };
            if self.read(volume, node, range, Step::Read).await {
                start += 16;
            } else if self.process.now() >= deadline {
                return false;
            } else {
                self.process.sleep(Duration::from_millis(100)).await;
            }
        }
        true
    }

    /// Writes one block, again and again until it is acknowledged or `limit` has passed.
    pub(super) async fn write_once(self: Rc<Self>, volume: u16, node: NodeId, limit: Duration) -> bool {
        let deadline = self.process.now().after(limit);
        loop {
            let before = self.cluster.watch.acknowledgements();
            let range = LbaRange {
                start: Lba(0),
                count: 1,
            };
            self.write(volume, node, range).await;
            if self.cluster.watch.acknowledgements() > before {
                return true;
            }
            if self.process.now() >= deadline {
                return false;
            }
            self.process.sleep(Duration::from_millis(100)).await;
        }
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.process.spawn(task);
    }
}

fn lbas(range: LbaRange) -> impl Iterator<Item = u32> {
    (range.start.0..range.start.0 + range.count).map(|lba| lba as u32)
}

/// Volumes are created in order, so the index tells the id.
pub(super) fn volume_id(index: u16) -> VolumeId {
    VolumeId(u64::from(index) + 1)
}
