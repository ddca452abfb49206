//! The drives of the cluster as one incarnation reaches them: registered once, watched for the lease, fenced for others.
//!
//! A counterpart of `node/src/agent/fabric.rs` over simulated calls: the same rules and times, and the target's real
//! reservations at the other end.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::sync::Notify;
use weft_block::Device;
use weft_proto::id::{DriveId, HostId};
use weft_proto::nvme::reservation::{PersistChange, RegisterAction, ReservationType};
use weft_target::reservation::ReservationError;
use weft_target::reservation::table::Refused;
use weft_volume::seams::{Drives, FenceError, Lease, ReservationKey, ReservationReport, Timestamp};

use super::agent::Agent;
use super::drive::{LocalDrive, RemoteDrive};
use super::process::Process;

/// How often an incarnation looks for its registration on each drive (design section 5).
const LEASE_CHECK: Duration = Duration::from_millis(300);
/// Until a drive that does not answer counts as unreachable (design section 5).
const FENCE_TIMEOUT: Duration = Duration::from_millis(500);
/// What every drive of a cluster holds (design section 5).
pub(super) const RESERVATION: ReservationType = ReservationType::WriteExclusiveAllRegistrants;

/// How one drive is reached.
#[derive(Clone)]
pub(super) enum Reach {
    /// In this server.
    Local(Rc<LocalDrive>),
    /// Through the agent of its server.
    Remote(Rc<RemoteDrive>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Unregistered,
    Registered,
    Forgot,
}

struct Entry {
    reach: Reach,
    standing: Cell<Standing>,
    confirmed_at: Cell<Option<Timestamp>>,
}

/// See the module.
pub(super) struct Fabric {
    agent: Weak<Agent>,
    process: Process,
    host: HostId,
    key: ReservationKey,
    entries: RefCell<BTreeMap<DriveId, Rc<Entry>>>,
    /// Registered, and not yet on record in Raft.
    to_record: RefCell<BTreeSet<DriveId>>,
    record: Notify,
}

/// A reservation command, as it is done where the drive is.
#[derive(Clone, Copy)]
enum Order {
    Register,
    Report,
    Preempt(ReservationKey),
}

impl Fabric {
    pub(super) fn new(agent: Weak<Agent>, process: Process, host: HostId, key: ReservationKey) -> Rc<Self> {
        Rc::new(Self {
            agent,
            process,
            host,
            key,
            entries: RefCell::default(),
            to_record: RefCell::default(),
            record: Notify::new(),
        })
    }

    pub(super) fn knows(&self, drive: DriveId) -> bool {
        self.entries.borrow().contains_key(&drive)
    }

    /// Adds a drive and attends it from now on.
    pub(super) fn add(self: &Rc<Self>, drive: DriveId, reach: Reach) {
        let entry = Rc::new(Entry {
            reach,
            standing: Cell::new(Standing::Unregistered),
            confirmed_at: Cell::new(None),
        });
        self.entries.borrow_mut().insert(drive, Rc::clone(&entry));
        let fabric = Rc::clone(self);
        self.process.spawn(async move {
            loop {
                fabric.check(drive, &entry).await;
                fabric.process.sleep(LEASE_CHECK).await;
            }
        });
    }

    /// Waits for registrations that Raft does not know of yet, and takes them.
    pub(super) async fn registrations_to_record(&self) -> BTreeSet<DriveId> {
        loop {
            let notified = self.record.notified();
            let drives = std::mem::take(&mut *self.to_record.borrow_mut());
            if !drives.is_empty() {
                return drives;
            }
            notified.await;
        }
    }

    /// One look at a drive: registers the first time, and reads the report from then on.
    async fn check(&self, drive: DriveId, entry: &Entry) {
        if entry.standing.get() == Standing::Unregistered {
            if self.order(&entry.reach, Order::Register).await.is_err() {
                return;
            }
            entry.standing.set(Standing::Registered);
            self.to_record.borrow_mut().insert(drive);
            self.record.notify_one();
        }
        let sent_at = self.process.now();
        match self.order(&entry.reach, Order::Report).await {
            Ok(report) if !report.in_force => entry.standing.set(Standing::Forgot),
            Ok(report) if report.registrants.contains(&(self.host, self.key)) => {
                entry.standing.set(Standing::Registered);
                entry.confirmed_at.set(Some(sent_at));
            }
            Ok(_) => {
                if let Some(agent) = self.agent.upgrade() {
                    agent.give_up("fenced");
                }
            }
            Err(_) => {}
        }
    }

    async fn order(&self, reach: &Reach, order: Order) -> Result<ReservationReport, FenceError> {
        let (host, key) = (self.host, self.key);
        match reach {
            Reach::Local(drive) => {
                let done = obey(Rc::clone(drive), host, key, order);
                self.process
                    .within(FENCE_TIMEOUT, done)
                    .await
                    .unwrap_or(Err(FenceError::Unreachable))
            }
            Reach::Remote(remote) => {
                let Some(agent) = self.agent.upgrade() else {
                    return Err(FenceError::Unreachable);
                };
                let id = agent.drive_at(remote.home());
                let called = agent
                    .cluster
                    .call(&self.process, remote.home(), FENCE_TIMEOUT, move |there| {
                        async move {
                            match id.and_then(|id| there.served_drive(id)) {
                                Some(drive) => obey(drive, host, key, order).await,
                                None => Err(FenceError::Unreachable),
                            }
                        }
                        .boxed_local()
                    })
                    .await;
                remote.set_connected(!matches!(called, Err(_) | Ok(Err(FenceError::Unreachable))));
                called.unwrap_or(Err(FenceError::Unreachable))
            }
        }
    }

    /// Fences `victim` on `drive`. Done when nothing of it is left in execution there.
    pub(super) async fn fence(&self, drive: DriveId, victim: ReservationKey) -> Result<(), FenceError> {
        let entry = self.entries.borrow().get(&drive).cloned();
        let entry = entry.ok_or(FenceError::Unreachable)?;
        if entry.standing.get() != Standing::Registered {
            return Err(FenceError::NotRegistered);
        }
        let fence = async {
            match self.order(&entry.reach, Order::Preempt(victim)).await {
                Ok(_) => Ok(()),
                // "Key not found" is fenced, but only where the reservation is in force.
                Err(FenceError::Refused { .. }) => {
                    let report = self.order(&entry.reach, Order::Report).await?;
                    let absent = report.registrants.iter().all(|(_, key)| *key != victim);
                    match (report.in_force, absent) {
                        (false, _) => Err(FenceError::NotInForce),
                        (true, true) => Ok(()),
                        (true, false) => Err(FenceError::NotRegistered),
                    }
                }
                Err(error) => Err(error),
            }
        };
        let fenced = self.process.within(FENCE_TIMEOUT, fence).await;
        fenced.unwrap_or(Err(FenceError::Unreachable))
    }
}

/// Does a reservation command on the drive, as its target does.
fn obey(
    drive: Rc<LocalDrive>,
    host: HostId,
    key: ReservationKey,
    order: Order,
) -> LocalBoxFuture<'static, Result<ReservationReport, FenceError>> {
    async move {
        let done = match order {
            Order::Register => {
                let register = RegisterAction::Register;
                let namespace = &drive.namespace;
                namespace
                    .register(host, register, false, 0, key.0, PersistChange::Keep)
                    .await
            }
            Order::Report => Ok(()),
            Order::Preempt(victim) => {
                drive
                    .namespace
                    .preempt_and_abort(host, key.0, victim.0, RESERVATION)
                    .await
            }
        };
        done.map_err(|error| match error {
            ReservationError::Refused(Refused::Conflict) => FenceError::Refused { status: 0x083 },
            ReservationError::Refused(_) => FenceError::NotRegistered,
            ReservationError::NotPersisted(_) => FenceError::Unreachable,
        })?;
        let status = drive.namespace.report();
        Ok(ReservationReport {
            in_force: status.rtype == Some(RESERVATION),
            persists: true,
            registrants: status
                .registrants
                .iter()
                .map(|registrant| (registrant.hostid, ReservationKey(registrant.key)))
                .collect(),
        })
    }
    .boxed_local()
}

impl Drives for Fabric {
    fn device(&self, drive: DriveId) -> Option<Device> {
        let entry = self.entries.borrow().get(&drive).cloned()?;
        if entry.standing.get() != Standing::Registered {
            return None;
        }
        match &entry.reach {
            Reach::Local(local) => Some(local.device(self.host, self.process.id)),
            Reach::Remote(remote) => remote
                .is_connected()
                .then(|| Rc::<RemoteDrive>::clone(remote) as Device),
        }
    }
}

impl Lease for Fabric {
    fn confirmed_at(&self, drive: DriveId) -> Option<Timestamp> {
        self.entries.borrow().get(&drive)?.confirmed_at.get()
    }
}
