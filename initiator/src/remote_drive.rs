//! A drive of another machine, for whoever decides about redundancy itself.
//!
//! Connected or not, it answers at once: without a connection every operation is Not Ready, and nothing waits for a
//! dead drive. The connection is made again for ever, with back-off. A reconnect never registers: a registration that
//! is missing says that this incarnation was fenced (design section 5).

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use weft_block::{BlockDevice, BlockError, DeviceInfo, Durability, Io};
use weft_proto::nvme::reservation::{
    AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationStatus, ReservationType,
};
use weft_proto::units::{Lba, LbaRange};

use crate::controller::Controller;
use crate::namespace::Namespace;
use crate::options::ConnectOptions;
use crate::path::{Identity, Path, PathState};
use crate::qpair::TRANSFER_BYTES_MAX;
use crate::reservation::ReservationError;

/// What a drive that was never reached says of itself: nothing can be read from it.
const UNKNOWN: DeviceInfo = DeviceInfo {
    block_bytes: 4096,
    blocks: 0,
    transfer_bytes_max: TRANSFER_BYTES_MAX,
    volatile_write_cache: true,
    deallocated_reads_zero: false,
};

/// One namespace over one path.
#[derive(Debug)]
pub struct RemoteDrive {
    path: Path,
    nsid: u32,
    /// As last seen, so that it survives a disconnection.
    info: Cell<Option<DeviceInfo>>,
}

impl RemoteDrive {
    /// Starts to connect. Runs on a `LocalSet`; the task ends with the drive.
    #[must_use]
    pub fn open(options: ConnectOptions, nsid: u32) -> Rc<Self> {
        let path = Path::open(options, nsid, Rc::new(Identity::default()), Rc::new(|| {}));
        Rc::new(Self {
            path,
            nsid,
            info: Cell::new(None),
        })
    }

    /// Connected or not, and why not.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<PathState> {
        self.path.watch()
    }

    /// Waits until it is connected.
    pub async fn connected(&self) {
        let mut state = self.path.watch();
        // An error would say that the path is gone, which this drive holds.
        let _ = state.wait_for(|state| *state == PathState::Connected).await;
    }

    /// Its namespace's UUID or NGUID, while it is connected.
    #[must_use]
    pub fn uuid(&self) -> Option<[u8; 16]> {
        self.path.live()?.namespace.uuid()
    }

    /// The controller, while it is connected.
    #[must_use]
    pub fn controller(&self) -> Option<Rc<Controller>> {
        Some(self.path.live()?.controller)
    }

    /// Commands without an answer.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.path.live().map_or(0, |live| live.controller.outstanding())
    }

    /// Registers `key` for this host, replacing whatever key it had, to persist through power loss where the drive
    /// can. Never done without being asked for.
    ///
    /// # Errors
    /// [`ReservationError`]; Unknown after `deadline`.
    pub async fn reservation_register(&self, key: u64, deadline: Duration) -> Result<(), ReservationError> {
        let namespace = self.namespace().ok_or(ReservationError::NotConnected)?;
        let persist = if namespace.reservations_persist() {
            PersistChange::Set
        } else {
            PersistChange::Keep
        };
        self.within(deadline, async |controller| {
            let action = RegisterAction::Register;
            controller
                .reservation_register(self.nsid, action, 0, key, true, persist)
                .await
        })
        .await
    }

    /// Removes this host's registration.
    ///
    /// # Errors
    /// [`ReservationError`]; Unknown after `deadline`.
    pub async fn reservation_unregister(&self, key: u64, deadline: Duration) -> Result<(), ReservationError> {
        self.within(deadline, async |controller| {
            let action = RegisterAction::Unregister;
            controller
                .reservation_register(self.nsid, action, key, 0, false, PersistChange::Keep)
                .await
        })
        .await
    }

    /// Acquires a reservation.
    ///
    /// # Errors
    /// [`ReservationError`]; Unknown after `deadline`.
    pub async fn reservation_acquire(
        &self,
        rtype: ReservationType,
        key: u64,
        deadline: Duration,
    ) -> Result<(), ReservationError> {
        self.within(deadline, async |controller| {
            controller
                .reservation_acquire(self.nsid, AcquireAction::Acquire, rtype, key, 0)
                .await
        })
        .await
    }

    /// Preempt and Abort: complete when none of the victim's commands is left in execution.
    ///
    /// # Errors
    /// [`ReservationError`]; Unknown after `deadline`: the victim may be fenced, or may be later.
    pub async fn reservation_preempt_and_abort(
        &self,
        rtype: ReservationType,
        key: u64,
        victim: u64,
        deadline: Duration,
    ) -> Result<(), ReservationError> {
        self.within(deadline, async |controller| {
            controller
                .reservation_preempt_and_abort(self.nsid, rtype, key, victim)
                .await
        })
        .await
    }

    /// Releases the reservation, or clears it with every registration.
    ///
    /// # Errors
    /// [`ReservationError`]; Unknown after `deadline`.
    pub async fn reservation_release(
        &self,
        action: ReleaseAction,
        rtype: ReservationType,
        key: u64,
        deadline: Duration,
    ) -> Result<(), ReservationError> {
        self.within(deadline, async |controller| {
            controller
                .reservation_release(self.nsid, action, rtype, key)
                .await
        })
        .await
    }

    /// Who is registered, and what is held.
    ///
    /// # Errors
    /// [`ReservationError`]; Unknown after `deadline`.
    pub async fn reservation_report(
        &self,
        deadline: Duration,
    ) -> Result<ReservationStatus, ReservationError> {
        self.within(deadline, async |controller| {
            controller.reservation_report(self.nsid).await
        })
        .await
    }

    /// Asks the controller and waits no longer than `deadline`. The command stays in flight: giving up on the answer
    /// is no reason to end the association.
    async fn within<T>(
        &self,
        deadline: Duration,
        ask: impl AsyncFnOnce(Rc<Controller>) -> Result<T, ReservationError>,
    ) -> Result<T, ReservationError> {
        let controller = self.controller().ok_or(ReservationError::NotConnected)?;
        match tokio::time::timeout(deadline, ask(controller)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ReservationError::Unknown),
        }
    }

    fn namespace(&self) -> Option<Rc<Namespace>> {
        let namespace = self.path.live()?.namespace;
        self.info.set(Some(namespace.info()));
        Some(namespace)
    }

    fn start<T: 'static>(&self, operation: impl FnOnce(&Namespace) -> Io<T>) -> Io<T> {
        match self.namespace() {
            Some(namespace) => operation(&namespace),
            None => Io::ready(Err(BlockError::NotReady)),
        }
    }
}

impl BlockDevice for RemoteDrive {
    /// As last seen; no blocks before it was first reached.
    fn info(&self) -> DeviceInfo {
        match self.namespace() {
            Some(namespace) => namespace.info(),
            None => self.info.get().unwrap_or(UNKNOWN),
        }
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.start(|namespace| namespace.read(range))
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        self.start(|namespace| namespace.write(start, data, durability))
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.start(|namespace| namespace.write_zeroes(range, deallocate, durability))
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.start(|namespace| namespace.deallocate(ranges))
    }

    fn flush(&self) -> Io<()> {
        self.start(Namespace::flush)
    }
}
