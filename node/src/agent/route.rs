//! The device of a volume as one host association sees it on this node: the local engine if this node owns the
//! volume, else the owner, over NVMe/TCP.
//!
//! A forwarder opens one association to the owner for each host association, with that host's identity. It keeps
//! nothing: a command goes on at once, or is refused with "not ready on this path" after [`ROUTE_WAIT`], and
//! the host's multipath tries again. After that time it never goes on, even if a way is there by then: whoever was
//! held up for longer may have been given up by the host, which has sent the command to somebody else meanwhile. The time
//! counts from when the command arrived, wherever in this process it was held up. Forwarding goes to a subsystem that only
//! owners serve, so it cannot loop.
//!
//! An owner that has lost its drives answers nobody. What waits for its engine then ends Unknown, so that hosts go on elsewhere and do not
//! wait until they give the path up, which takes Linux half a minute; `docs/design/silenced-owner.md` says why that is safe.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;
use weft_block::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};
use weft_incarnation::silence::Silence;
use weft_initiator::{ConnectOptions, Controller, HostIdentity, Namespace};
use weft_proto::nqn::Nqn;
use weft_proto::units::{Lba, LbaRange};
use weft_target::arrival::Arrival;

/// How long a command may wait for a route: long enough for a planned move, far below any host's patience.
const ROUTE_WAIT: Duration = Duration::from_millis(150);

/// Between two attempts to reach an owner that could not be reached.
const RECONNECT_PAUSE: Duration = Duration::from_millis(5);

/// Longest keep alive of forwarding associations. One whose host has a shorter one has that, so that a forwarder's right lapses
/// before the host gives it up.
const FORWARD_KATO: Duration = Duration::from_secs(1);

/// What may be left of a forwarder that has died: a command in its kernel, on the way to the owner. The owner takes none
/// that comes when the forwarder has been silent for its keep-alive timeout.
pub(crate) const COMMAND_QUIESCE: Duration = FORWARD_KATO;

/// Where a volume is served, as far as this node knows.
#[derive(Clone)]
pub(crate) enum Served {
    /// Nowhere, at the moment.
    Nowhere,
    /// By an engine of this node.
    Here(Device),
    /// By the owner at this NVMe/TCP address.
    By(SocketAddr),
}

/// One volume on this node: where it is served, and how large it is.
pub(crate) struct Slot {
    served: RefCell<Served>,
    info: Cell<DeviceInfo>,
    owner_subnqn: Nqn,
    changed: Notify,
    /// Of the engine of this node.
    silence: Silence,
}

impl Slot {
    /// Served nowhere yet. `owner_subnqn` is the subsystem that only the owner serves.
    pub(crate) fn new(owner_subnqn: Nqn, info: DeviceInfo) -> Rc<Self> {
        Rc::new(Self {
            served: RefCell::new(Served::Nowhere),
            info: Cell::new(info),
            owner_subnqn,
            changed: Notify::new(),
            silence: Silence::default(),
        })
    }

    /// The volume is served somewhere else from now on; commands that wait go there.
    pub(crate) fn set_served(&self, served: Served) {
        if !matches!(served, Served::Nowhere) {
            self.silence.end();
        }
        *self.served.borrow_mut() = served;
        self.changed.notify_waiters();
    }

    /// The engine of this node has no lease: nothing goes to it for now, and what waits for it ends with an unknown outcome.
    pub(crate) fn silence(&self) {
        self.set_served(Served::Nowhere);
        self.silence.begin();
    }

    /// The volume has another size.
    pub(crate) fn set_info(&self, info: DeviceInfo) {
        self.info.set(info);
    }

    fn served(&self) -> Served {
        self.served.borrow().clone()
    }

    /// The volume as `host` sees it through this node, with the keep-alive timeout that it asked for. Of each command, `arrival` says how
    /// old it is.
    pub(crate) fn device(
        self: &Rc<Self>,
        host: HostIdentity,
        kato: Option<Duration>,
        arrival: &Arrival,
    ) -> Device {
        Rc::new(RoutedDevice(Rc::new(Route {
            slot: self.clone(),
            host,
            kato: kato.map_or(FORWARD_KATO, |kato| kato.min(FORWARD_KATO)),
            arrival: kato.map(|_| arrival.clone()),
            forward: RefCell::default(),
            connecting: tokio::sync::Mutex::new(()),
            refused_at: Cell::default(),
        })))
    }

    /// The volume on the owner's own subsystem: served by an engine here, or not at all.
    pub(crate) fn owner_device(self: &Rc<Self>) -> Device {
        Rc::new(OwnedDevice(self.clone()))
    }
}

struct Forward {
    address: SocketAddr,
    controller: Rc<Controller>,
    namespace: Rc<Namespace>,
}

/// The way of one host association.
struct Route {
    slot: Rc<Slot>,
    host: HostIdentity,
    /// Of the association with the owner.
    kato: Duration,
    /// `None` of a host that never gives a path up: age says nothing, and the commands of a guest wait here for as long as it takes.
    arrival: Option<Arrival>,
    forward: RefCell<Option<Forward>>,
    connecting: tokio::sync::Mutex<()>,
    /// When the owner could last not be reached.
    refused_at: Cell<Option<Instant>>,
}

impl Route {
    /// Until when the command that is being begun may be handed on.
    fn deadline(&self) -> Instant {
        let arrived = self
            .arrival
            .as_ref()
            .map_or_else(Instant::now, |arrival| Instant::from_std(arrival.get()));
        arrived + ROUTE_WAIT.min(self.kato / 4)
    }

    /// The device for a command now, if it can be said without waiting. The engine of this node has commands however old they are: their
    /// repetitions come after them here, and it takes nothing any more once there is another owner.
    fn device_now(&self, deadline: Instant) -> Option<Device> {
        match self.slot.served() {
            Served::Nowhere => None,
            Served::Here(device) => Some(device),
            Served::By(address) => self.forward_to(address).filter(|_| Instant::now() < deadline),
        }
    }

    fn forward_to(&self, address: SocketAddr) -> Option<Device> {
        let forward = self.forward.borrow();
        let forward = forward.as_ref()?;
        let usable = forward.address == address && forward.controller.closed_reason().is_none();
        usable.then(|| forward.namespace.clone() as Device)
    }

    /// Connects to the owner in the host's name, once at a time.
    async fn connect(&self, address: SocketAddr) -> Option<Device> {
        let _one_at_a_time = self.connecting.lock().await;
        if let Some(device) = self.forward_to(address) {
            return Some(device);
        }
        // Every command that waits comes here in its turn: while an owner is down, they do not all try.
        let refused_at = self.refused_at.get();
        if refused_at.is_some_and(|at| at.elapsed() < RECONNECT_PAUSE) {
            return None;
        }
        let former = self.forward.borrow_mut().take();
        drop(former);
        let mut options = ConnectOptions::new(address, self.slot.owner_subnqn.clone(), self.host.clone());
        options.kato = self.kato;
        options.connect_timeout = Duration::from_secs(1);
        let controller = Controller::connect(options)
            .await
            .inspect_err(|error| {
                tracing::debug!(%address, %error, "the owner cannot be reached yet");
                self.refused_at.set(Some(Instant::now()));
            })
            .ok()?;
        let namespace = controller.namespace(1).await.ok()?;
        *self.forward.borrow_mut() = Some(Forward {
            address,
            controller,
            namespace: namespace.clone(),
        });
        Some(namespace)
    }

    /// Waits until there is a device, or the command has waited long enough.
    async fn device_by(&self, deadline: Instant) -> Result<Device, BlockError> {
        loop {
            let changed = self.slot.changed.notified();
            if Instant::now() >= deadline {
                return Err(BlockError::NotReady);
            }
            if let Some(device) = self.device_now(deadline) {
                return Ok(device);
            }
            if let Served::By(address) = self.slot.served() {
                match tokio::time::timeout_at(deadline, self.connect(address)).await {
                    // Whether there is time left for it is asked above.
                    Ok(Some(_)) | Err(_) => {}
                    Ok(None) => tokio::time::sleep(RECONNECT_PAUSE).await,
                }
            } else {
                let _ = tokio::time::timeout_at(deadline, changed).await;
            }
        }
    }

    /// Asks the owner how large the volume is, if commands go there.
    async fn look_at_size(&self) {
        let namespace = self
            .forward
            .borrow()
            .as_ref()
            .map(|forward| forward.namespace.clone());
        if let Some(namespace) = namespace {
            // Without an answer the association is about to end, and the next one asks anyway.
            let _ = namespace.refresh().await;
        }
    }

    /// Issues a command, whose range was checked, again if the device says that nothing was done and another one may serve it.
    async fn issue<T>(
        self: Rc<Self>,
        first: Option<Io<T>>,
        deadline: Instant,
        command: impl Fn(&Device) -> Io<T>,
    ) -> Result<T, BlockError> {
        let mut pending = first;
        loop {
            let io = match pending.take() {
                Some(io) => io,
                None => command(&self.device_by(deadline).await?),
            };
            match self.slot.silence.or_answer(io).await {
                Err(BlockError::NotReady) if Instant::now() < deadline => {
                    let changed = self.slot.changed.notified();
                    let _ = tokio::time::timeout(Duration::from_millis(2), changed).await;
                }
                // The range was checked: the volume has grown, and it is not known yet where it is served.
                Err(BlockError::OutOfRange { .. }) if Instant::now() < deadline => {
                    self.look_at_size().await;
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Err(BlockError::OutOfRange { .. }) => return Err(BlockError::NotReady),
                answer => return answer,
            }
        }
    }

    fn start<T: 'static>(self: &Rc<Self>, command: impl Fn(&Device) -> Io<T> + 'static) -> Io<T> {
        let deadline = self.deadline();
        match self.device_now(deadline) {
            // The usual way: the command starts now, as the block contract asks.
            Some(device) => {
                let first = command(&device);
                Io::running(self.clone().issue(Some(first), deadline, command))
            }
            None => {
                let (sender, receiver) = tokio::sync::oneshot::channel();
                let waiting = self.clone().issue(None, deadline, command);
                tokio::task::spawn_local(async move {
                    let _ = sender.send(waiting.await);
                });
                Io::running(async move { receiver.await.unwrap_or(Err(BlockError::Unknown)) })
            }
        }
    }
}

struct RoutedDevice(Rc<Route>);

impl BlockDevice for RoutedDevice {
    fn info(&self) -> DeviceInfo {
        self.0.slot.info.get()
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        if let Err(error) = self.info().check_read(range) {
            return Io::ready(Err(error));
        }
        self.0.start(move |device| device.read(range))
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        if let Err(error) = self.info().check_write(start, &data) {
            return Io::ready(Err(error));
        }
        self.0
            .start(move |device| device.write(start, data.clone(), durability))
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        if let Err(error) = self.info().check_range(range) {
            return Io::ready(Err(error));
        }
        self.0
            .start(move |device| device.write_zeroes(range, deallocate, durability))
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        if let Err(error) = ranges
            .iter()
            .try_for_each(|range| self.info().check_range(*range))
        {
            return Io::ready(Err(error));
        }
        self.0.start(move |device| device.deallocate(ranges.clone()))
    }

    fn flush(&self) -> Io<()> {
        self.0.start(|device| device.flush())
    }
}

struct OwnedDevice(Rc<Slot>);

impl OwnedDevice {
    fn issue<T: 'static>(&self, command: impl FnOnce(&Device) -> Io<T>) -> Io<T> {
        match self.0.served() {
            Served::Here(device) => match command(&device).take_ready() {
                Ok(answer) => Io::ready(answer),
                Err(io) => {
                    let slot = self.0.clone();
                    Io::running(async move { slot.silence.or_answer(io).await })
                }
            },
            Served::Nowhere | Served::By(_) => Io::ready(Err(BlockError::NotReady)),
        }
    }
}

impl BlockDevice for OwnedDevice {
    fn info(&self) -> DeviceInfo {
        self.0.info.get()
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.issue(|device| device.read(range))
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        self.issue(|device| device.write(start, data, durability))
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.issue(|device| device.write_zeroes(range, deallocate, durability))
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.issue(|device| device.deallocate(ranges))
    }

    fn flush(&self) -> Io<()> {
        self.issue(|device| device.flush())
    }
}

#[cfg(test)]
mod tests {
    use weft_block::faulty::{Fault, Faulty, Ops};
    use weft_block::memory::MemoryDrive;
    use weft_proto::id::HostId;
    use weft_proto::nvme::log::AnaState;
    use weft_target::{
        AllowedHosts, NamespaceConfig, Registry, RegistryConfig, Source, SubsystemConfig, serve,
    };

    use super::*;

    const KATO: Duration = Duration::from_secs(2);
    const OWNER: &str = "nqn.2026-01.io.weft:owner";
    const FIRST: LbaRange = LbaRange {
        start: Lba(0),
        count: 1,
    };

    /// A drive and where it is served as an owner serves a volume.
    async fn owner() -> (Device, SocketAddr) {
        let registry = Registry::new(RegistryConfig::default());
        let subsystem = SubsystemConfig {
            nqn: OWNER.parse().unwrap(),
            serial: "1".into(),
            model: "Weft".into(),
            hosts: AllowedHosts::Any,
            namespaces_max: 1,
        };
        registry.add_subsystem(subsystem).unwrap();
        let drive = MemoryDrive::device(1 << 20);
        let served = drive.clone();
        let namespace = NamespaceConfig {
            nsid: 1,
            uuid: [1; 16],
            ana_group: 1,
            ana_state: AnaState::OPTIMIZED,
            source: Source::PerAssociation(Rc::new(move |_, _| served.clone())),
        };
        registry
            .add_namespace(&OWNER.parse().unwrap(), namespace)
            .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::task::spawn_local(serve(listener, registry));
        (drive, address)
    }

    /// Runs `test` as the data thread runs.
    fn on_data_thread(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, test);
    }

    fn host() -> HostIdentity {
        HostIdentity {
            hostnqn: "nqn.host".parse().unwrap(),
            hostid: HostId([1; 16]),
        }
    }

    #[test]
    fn who_waits_for_an_engine_that_is_silenced_is_told_so_and_what_comes_is_refused() {
        on_data_thread(async {
            let (drive, faults) = Faulty::wrap(MemoryDrive::device(1 << 20));
            let slot = Slot::new("nqn.owner".parse().unwrap(), drive.info());
            slot.set_served(Served::Here(drive.clone()));
            let arrival = Arrival::new(std::time::Instant::now());
            for device in [slot.device(host(), None, &arrival), slot.owner_device()] {
                let write =
                    |byte| device.write(Lba(0), vec![Bytes::from(vec![byte; 4096])], Durability::Durable);
                faults.next(Ops::WRITE, 1, Fault::Hold);
                let mut held = write(7);
                assert!(futures_util::poll!(&mut held).is_pending());
                slot.silence();
                assert_eq!(held.await, Err(BlockError::Unknown));
                assert_eq!(write(8).await, Err(BlockError::NotReady));
                slot.set_served(Served::Here(drive.clone()));
                faults.release();
                write(9).await.unwrap();
            }
        });
    }

    #[test]
    fn a_command_that_was_held_up_for_longer_than_its_wait_does_not_go_on() {
        on_data_thread(async {
            let drive = MemoryDrive::device(1 << 20);
            let slot = Slot::new("nqn.owner".parse().unwrap(), drive.info());
            let routed = slot.device(host(), None, &Arrival::new(std::time::Instant::now()));
            let block = |byte| vec![Bytes::from(vec![byte; 4096])];
            let mut held = routed.write(Lba(0), block(7), Durability::Durable);
            // It waits for a route when the process is stopped; and when it goes on, there is one.
            assert!(futures_util::poll!(&mut held).is_pending());
            tokio::task::yield_now().await;
            std::thread::sleep(ROUTE_WAIT);
            slot.set_served(Served::Here(drive.clone()));
            assert_eq!(held.await, Err(BlockError::NotReady));
            assert!(drive.read(FIRST).await.unwrap() == vec![0; 4096]);
            routed.write(Lba(0), block(8), Durability::Durable).await.unwrap();
            assert!(drive.read(FIRST).await.unwrap() == vec![8; 4096]);
        });
    }

    #[test]
    fn the_time_of_a_command_that_an_engine_gave_back_counts_from_when_it_arrived() {
        on_data_thread(async {
            let (drive, faults) = Faulty::wrap(MemoryDrive::device(1 << 20));
            let slot = Slot::new("nqn.owner".parse().unwrap(), drive.info());
            slot.set_served(Served::Here(drive.clone()));
            let routed = slot.device(host(), Some(KATO), &Arrival::new(std::time::Instant::now()));
            faults.next(Ops::WRITE, 1, Fault::Fail(BlockError::NotReady));
            // The engine has it. The process is stopped before anybody waits for what the engine says, which is that it did nothing.
            let held = routed.write(Lba(0), vec![Bytes::from(vec![7; 4096])], Durability::Durable);
            std::thread::sleep(ROUTE_WAIT);
            assert_eq!(held.await, Err(BlockError::NotReady), "and nobody else gets it");
            assert!(drive.read(FIRST).await.unwrap() == vec![0; 4096]);
        });
    }

    #[test]
    fn an_old_command_is_not_forwarded_although_the_way_stands_open() {
        on_data_thread(async {
            let (drive, address) = owner().await;
            let slot = Slot::new(OWNER.parse().unwrap(), drive.info());
            slot.set_served(Served::By(address));
            let arrival = Arrival::new(std::time::Instant::now());
            let write = |routed: &Device, byte| {
                routed.write(Lba(0), vec![Bytes::from(vec![byte; 4096])], Durability::Durable)
            };
            let routed = slot.device(host(), Some(KATO), &arrival);
            while write(&routed, 7).await.is_err() {
                // The first ones make the way.
                arrival.set(std::time::Instant::now());
            }
            // Stopped since it was read; and whatever it was that let it wait before it was given to its device.
            std::thread::sleep(ROUTE_WAIT);
            assert_eq!(write(&routed, 8).await, Err(BlockError::NotReady));
            assert!(drive.read(FIRST).await.unwrap() == vec![7; 4096]);
            arrival.set(std::time::Instant::now());
            while write(&routed, 9).await.is_err() {
                arrival.set(std::time::Instant::now());
            }
            assert!(drive.read(FIRST).await.unwrap() == vec![9; 4096]);
            // A host without a keep-alive timeout gives no path up: its commands go on at any age.
            let patient = slot.device(host(), None, &arrival);
            std::thread::sleep(ROUTE_WAIT);
            while write(&patient, 10).await.is_err() {}
            assert!(drive.read(FIRST).await.unwrap() == vec![10; 4096]);
        });
    }
}
