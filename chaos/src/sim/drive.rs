//! A server's drive under the target's real reservations, and the same drive as another server reaches it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_block::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};
use weft_proto::id::{DriveId, HostId, IncarnationId, NodeId};
use weft_proto::nvme::reservation::{PersistChange, RegisterAction};
use weft_proto::units::{Lba, LbaRange};
use weft_target::reservation::ReservedNamespace;
use weft_volume::testing::answer::answer;
use weft_volume::testing::drive::{Health, SimDrive};

use super::cluster::Cluster;
use super::network::NoAnswer;
use super::process::Process;

/// Silence after which the association with a drive is given up: commands on it end with an unknown outcome.
const KEEP_ALIVE: Duration = Duration::from_millis(1000);

/// A drive in its server, as one agent serves it.
pub(super) struct LocalDrive {
    pub(super) id: DriveId,
    pub(super) medium: Rc<SimDrive>,
    pub(super) namespace: ReservedNamespace,
    sender: Rc<Cell<IncarnationId>>,
}

impl LocalDrive {
    pub(super) fn new(medium: Rc<SimDrive>) -> Self {
        let sender = Rc::new(Cell::new(IncarnationId(0)));
        let device = Rc::new(Medium {
            drive: Rc::clone(&medium),
            sender: Rc::clone(&sender),
        });
        let namespace = ReservedNamespace::open(device, [0; 16], None).expect("no file is read");
        Self {
            id: medium.id(),
            medium,
            namespace,
            sender,
        }
    }

    /// The drive as the next agent of its server finds it: nothing in execution, and the reservations that its file tells of.
    pub(super) fn restarted(&self) -> Self {
        let restarted = Self::new(Rc::clone(&self.medium));
        let report = self.namespace.report();
        for registrant in &report.registrants {
            let (host, key) = (registrant.hostid, registrant.key);
            let (register, keep) = (RegisterAction::Register, PersistChange::Keep);
            let registered = restarted.namespace.register(host, register, false, 0, key, keep);
            let done = registered.now_or_never().expect("no file is written");
            done.expect("it was registered before");
        }
        if let (Some(rtype), Some(holder)) = (report.rtype, report.registrants.first()) {
            let acquired = restarted.namespace.acquire(holder.hostid, holder.key, rtype);
            let done = acquired.now_or_never().expect("no file is written");
            done.expect("the reservation was in force before");
        }
        self.let_go();
        restarted
    }

    /// Drops what callers left in execution: it has ended with its agent.
    pub(super) fn let_go(&self) {
        // Looks at everything that was left once, which is all it takes when the drive has ended it.
        let _ = self.namespace.drain_preempted().now_or_never();
    }

    /// The drive as `host` may use it; `sender` is the process, for those who watch.
    pub(super) fn device(&self, host: HostId, sender: IncarnationId) -> Device {
        Rc::new(Tagged {
            device: self.namespace.local(host),
            sender,
            current: Rc::clone(&self.sender),
        })
    }
}

/// Below the reservations: who sends is whoever passed them in this instant.
struct Medium {
    drive: Rc<SimDrive>,
    sender: Rc<Cell<IncarnationId>>,
}

/// Above the reservations: says who sends. Check and submission are one step, so nobody comes between.
struct Tagged {
    device: Device,
    sender: IncarnationId,
    current: Rc<Cell<IncarnationId>>,
}

macro_rules! forwards {
    ($type:ty, $self:ident => $device:expr) => {
        impl BlockDevice for $type {
            fn info(&$self) -> DeviceInfo {
                $device.info()
            }

            fn read(&$self, range: LbaRange) -> Io<Bytes> {
                $device.read(range)
            }

            fn write(&$self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
                $device.write(start, data, durability)
            }

            fn write_zeroes(&$self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
                $device.write_zeroes(range, deallocate, durability)
            }

            fn deallocate(&$self, ranges: Vec<LbaRange>) -> Io<()> {
                $device.deallocate(ranges)
            }

            fn flush(&$self) -> Io<()> {
                $device.flush()
            }
        }
    };
}

forwards!(Medium, self => self.drive.handle(self.sender.get()));
forwards!(Tagged, self => {
    self.current.set(self.sender);
    &self.device
});

/// A drive of another server. Every command is a call to the agent there.
pub(super) struct RemoteDrive {
    cluster: Rc<Cluster>,
    pub(super) process: Process,
    host: HostId,
    drive: DriveId,
    home: NodeId,
    /// Whether the last command was answered.
    connected: Rc<Cell<bool>>,
}

impl RemoteDrive {
    pub(super) fn new(
        cluster: &Rc<Cluster>,
        process: &Process,
        host: HostId,
        drive: DriveId,
        home: NodeId,
    ) -> Rc<Self> {
        Rc::new(Self {
            cluster: Rc::clone(cluster),
            process: process.clone(),
            host,
            drive,
            home,
            connected: Rc::new(Cell::new(false)),
        })
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connected.get()
    }

    pub(super) fn set_connected(&self, connected: bool) {
        self.connected.set(connected);
    }

    /// Has something done at the drive's own agent, in the name of this one's host; without a namespace if it does not serve the
    /// drive. The outer error is the wires'.
    pub(super) async fn call<T: 'static>(
        &self,
        limit: Duration,
        command: impl FnOnce(Option<ReservedNamespace>, HostId) -> LocalBoxFuture<'static, T> + 'static,
    ) -> Result<T, NoAnswer> {
        let (host, drive) = (self.host, self.drive);
        self.cluster
            .call(&self.process, self.home, limit, move |agent| {
                let namespace = agent.served_drive(drive).map(|local| local.namespace.clone());
                command(namespace, host)
            })
            .await
    }

    fn io<T: 'static>(&self, command: impl FnOnce(Device) -> Io<T> + 'static) -> Io<T> {
        let (giver, answered) = answer();
        let (cluster, process, home) = (Rc::clone(&self.cluster), self.process.clone(), self.home);
        let (host, drive, sender) = (self.host, self.drive, self.process.id);
        let connected = Rc::clone(&self.connected);
        self.process.spawn(async move {
            let called = cluster.call(&process, home, KEEP_ALIVE, move |agent| {
                async move {
                    match agent.served_drive(drive) {
                        Some(local) => command(local.device(host, sender)).await,
                        None => Err(BlockError::NotReady),
                    }
                }
                .boxed_local()
            });
            giver.give(called.await.unwrap_or_else(|_| {
                connected.set(false);
                Err(BlockError::Unknown)
            }));
        });
        Io::running(answered)
    }
}

impl BlockDevice for RemoteDrive {
    fn info(&self) -> DeviceInfo {
        self.cluster.drive_info(self.drive)
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.io(move |device| device.read(range))
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        self.io(move |device| device.write(start, data, durability))
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.io(move |device| device.write_zeroes(range, deallocate, durability))
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.io(move |device| device.deallocate(ranges))
    }

    fn flush(&self) -> Io<()> {
        self.io(|device| device.flush())
    }
}

/// Whether the drive's server would still use it.
pub(super) fn is_present(drive: &SimDrive) -> bool {
    drive.health() != Health::Dead
}
