//! The drives of the cluster as this incarnation reaches them: registered once, watched for the lease, fenced when
//! somebody else's incarnation has died.
//!
//! One task attends each drive: it registers the incarnation as soon as the drive is reachable, has that recorded
//! by Raft, and from then on only reads the Reservation Report, every [`LEASE_CHECK`]. A registration that is missing while
//! the reservation is in force means that this incarnation has been fenced: it is never registered again, and the
//! agent comes back as a new incarnation. Design section 5.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use weft_block::Device;
use weft_metadata::state::Command;
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{DriveId, HostId, IncarnationId};
use weft_volume::seams::{Drives, Env, FenceError, Fencing, Lease, ReservationKey, Timestamp};

use crate::metadata::{Metadata, insist};
use crate::time::within;

/// How often an incarnation looks for its registration on each drive (design section 5).
const LEASE_CHECK: Duration = Duration::from_millis(300);

/// A drive that has not answered a reservation command by then is unreachable for now (design section 5).
pub const FENCE_TIMEOUT: Duration = Duration::from_millis(500);

/// How one drive is reached: through its own server's guard or over the fabric. Both check every command
/// against the drive's reservations.
pub trait Reach: Fencing {
    /// `None` while it cannot be reached.
    fn device(&self) -> Option<Device>;
}

/// The identity of this incarnation towards drives.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Its number.
    pub incarnation: IncarnationId,
    /// Drawn at random for it.
    pub host_id: HostId,
    /// The same.
    pub key: ReservationKey,
}

/// How far this incarnation is with one drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Not reachable yet since it became known.
    Unregistered,
    /// Registered; a report that lacks it means fenced.
    Registered,
    /// The drive has lost its reservation: nothing is trusted to it.
    Forgot,
}

struct Entry {
    reach: Rc<dyn Reach>,
    standing: Cell<Standing>,
    confirmed_at: Cell<Option<Timestamp>>,
}

/// All drives. Cheap to share on its thread.
pub struct Fabric {
    identity: Identity,
    env: Rc<dyn Env>,
    began: Timestamp,
    entries: RefCell<BTreeMap<DriveId, Rc<Entry>>>,
    /// Registered, and not yet on record in Raft.
    to_record: RefCell<BTreeSet<DriveId>>,
    record: Notify,
    fenced: Notify,
    is_fenced: Cell<bool>,
}

impl Fabric {
    /// No drives yet.
    pub fn new(identity: Identity, env: Rc<dyn Env>) -> Rc<Self> {
        Rc::new(Self {
            identity,
            began: env.now(),
            env,
            entries: RefCell::default(),
            to_record: RefCell::default(),
            record: Notify::new(),
            fenced: Notify::new(),
            is_fenced: Cell::new(false),
        })
    }

    /// Who this incarnation is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Drives known so far.
    pub fn known(&self) -> BTreeSet<DriveId> {
        self.entries.borrow().keys().copied().collect()
    }

    /// Adds a drive and starts to attend it.
    pub fn add(self: &Rc<Self>, drive: DriveId, reach: Rc<dyn Reach>) {
        let entry = Rc::new(Entry {
            reach,
            standing: Cell::new(Standing::Unregistered),
            confirmed_at: Cell::new(None),
        });
        let attendant = Self::attend(Rc::downgrade(self), drive, Rc::downgrade(&entry));
        self.entries.borrow_mut().insert(drive, entry);
        self.env.spawn(Box::pin(attendant));
    }

    /// Forgets a drive that the cluster no longer has.
    pub fn remove(&self, drive: DriveId) {
        self.entries.borrow_mut().remove(&drive);
    }

    /// Has Raft record where this incarnation has registered, for as long as it lives: bands are granted on those drives only.
    pub async fn keep_registrations_on_record(self: Rc<Self>, metadata: Rc<dyn Metadata>) {
        let incarnation = self.identity.incarnation;
        loop {
            let drives = self.registrations_to_record().await;
            let record = Command::RecordRegistrations { incarnation, drives };
            if let Err(refusal) = insist(&*metadata, &*self.env, record).await {
                tracing::error!(%refusal, "registrations refused");
            }
        }
    }

    /// Waits for registrations that Raft does not know of yet, and takes them.
    async fn registrations_to_record(&self) -> BTreeSet<DriveId> {
        loop {
            let notified = self.record.notified();
            let drives = std::mem::take(&mut *self.to_record.borrow_mut());
            if !drives.is_empty() {
                return drives;
            }
            notified.await;
        }
    }

    /// Ends this incarnation, as if it had been fenced.
    pub fn give_up(&self) {
        self.is_fenced.set(true);
        self.fenced.notify_waiters();
        self.fenced.notify_one();
    }

    /// Completes when this incarnation has been fenced by somebody.
    pub async fn wait_until_fenced(&self) {
        while !self.is_fenced.get() {
            self.fenced.notified().await;
        }
    }

    /// What `weft node show` prints of the drives.
    pub fn inspect(&self) -> serde_json::Value {
        let now = self.env.now();
        let entries = self.entries.borrow();
        let drives = entries.iter().map(|(drive, entry)| {
            let age = entry
                .confirmed_at
                .get()
                .map(|at| now.0.saturating_sub(at.0) / 1_000_000);
            (
                drive.to_string(),
                serde_json::json!({
                    "standing": format!("{:?}", entry.standing.get()),
                    "reachable": entry.reach.device().is_some(),
                    "confirmed_ms_ago": age,
                }),
            )
        });
        serde_json::Value::Object(drives.collect())
    }

    /// Looks after a drive for as long as this is the way to it.
    async fn attend(fabric: Weak<Self>, drive: DriveId, entry: Weak<Entry>) {
        loop {
            let (Some(this), Some(entry)) = (fabric.upgrade(), entry.upgrade()) else {
                return;
            };
            this.check(drive, &entry).await;
            // All drives at once: an idle thread wakes once for all of them.
            let next = this.env.sleep_until(this.next_check());
            drop((this, entry));
            next.await;
        }
    }

    /// The next multiple of [`LEASE_CHECK`] since this fabric began.
    fn next_check(&self) -> Timestamp {
        let now = self.env.now();
        let into = now.0.saturating_sub(self.began.0) % LEASE_CHECK.as_nanos() as u64;
        Timestamp(now.0 - into).after(LEASE_CHECK)
    }

    /// One look at a drive: registers the first time, and reads the report from then on. What is answered after the drive was
    /// forgotten, or reached in another way, counts for nothing.
    async fn check(&self, drive: DriveId, entry: &Rc<Entry>) {
        let reach = &entry.reach;
        let before = entry.standing.get();
        if before == Standing::Unregistered {
            let registered = self.in_time(reach.register(self.identity.key)).await;
            if !self.is_current(drive, entry) {
                return;
            }
            match registered {
                Ok(()) => {
                    entry.standing.set(Standing::Registered);
                    self.to_record.borrow_mut().insert(drive);
                    self.record.notify_one();
                }
                Err(error) => {
                    tracing::debug!(%drive, %error, "not registered yet");
                    return;
                }
            }
        }
        let sent_at = self.env.now();
        let report = self.in_time(reach.report()).await;
        if !self.is_current(drive, entry) {
            return;
        }
        match report {
            Ok(report) if !report.in_force => {
                if before != Standing::Forgot {
                    tracing::error!(%drive, "the drive has lost its reservation and is not trusted until it is back in force");
                }
                entry.standing.set(Standing::Forgot);
            }
            Ok(report) => {
                let own = (self.identity.host_id, self.identity.key);
                if report.registrants.contains(&own) {
                    entry.standing.set(Standing::Registered);
                    entry.confirmed_at.set(Some(sent_at));
                } else if planted(Bug::RegisterAgain) {
                    entry.standing.set(Standing::Unregistered);
                } else {
                    tracing::error!(%drive, incarnation = %self.identity.incarnation, "this incarnation has been fenced");
                    self.give_up();
                }
            }
            Err(error) => tracing::debug!(%drive, %error, "no reservation report"),
        }
    }

    fn entry(&self, drive: DriveId) -> Option<Rc<Entry>> {
        self.entries.borrow().get(&drive).cloned()
    }

    fn is_current(&self, drive: DriveId, entry: &Rc<Entry>) -> bool {
        self.entries
            .borrow()
            .get(&drive)
            .is_some_and(|found| Rc::ptr_eq(found, entry))
    }

    async fn in_time<T>(&self, answer: impl Future<Output = Result<T, FenceError>>) -> Result<T, FenceError> {
        within(&*self.env, FENCE_TIMEOUT, answer)
            .await
            .unwrap_or(Err(FenceError::Unreachable))
    }

    /// Fences `victim` on `drive`. Done when nothing of it is left in execution there.
    ///
    /// # Errors
    /// It may be left there, or come back: the drive cannot be reached, does not know this incarnation, or its reservation is not
    /// in force.
    pub async fn fence(&self, drive: DriveId, victim: ReservationKey) -> Result<(), FenceError> {
        let entry = self.entry(drive).ok_or(FenceError::Unreachable)?;
        if entry.standing.get() != Standing::Registered {
            return Err(FenceError::NotRegistered);
        }
        let reach = &entry.reach;
        self.in_time(async {
            match reach.preempt_and_abort(self.identity.key, victim).await {
                Ok(()) => Ok(()),
                // "Key not found" is fenced, but only where the reservation is in force.
                Err(FenceError::Refused { .. }) => {
                    let report = reach.report().await?;
                    let absent = report.registrants.iter().all(|(_, key)| *key != victim);
                    match (report.in_force, absent) {
                        (false, _) => Err(FenceError::NotInForce),
                        (true, true) => Ok(()),
                        (true, false) => Err(FenceError::NotRegistered),
                    }
                }
                Err(error) => Err(error),
            }
        })
        .await
    }
}

impl Drives for Fabric {
    fn device(&self, drive: DriveId) -> Option<Device> {
        let entry = self.entry(drive)?;
        if entry.standing.get() == Standing::Registered {
            entry.reach.device()
        } else {
            None
        }
    }
}

impl Lease for Fabric {
    fn confirmed_at(&self, drive: DriveId) -> Option<Timestamp> {
        self.entries.borrow().get(&drive)?.confirmed_at.get()
    }
}
