//! The drives of the cluster as this incarnation reaches them: registered once, watched for the lease, fenced when
//! somebody else's incarnation has died.
//!
//! One task attends each drive: it registers the incarnation as soon as the drive is reachable, has that recorded
//! by Raft, and from then on only reads the Reservation Report, every [`LEASE_CHECK`]. A registration that is missing while
//! the reservation is in force means that this incarnation has been fenced: it is never registered again, and the
//! agent comes back as a new incarnation. Design section 5.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use weft_block::Device;
use weft_proto::id::{DriveId, HostId, IncarnationId};
use weft_volume::seams::{Drives, Env, FenceError, Fencing, Lease, ReservationKey, Timestamp};

/// How often an incarnation looks for its registration on each drive (design section 5).
const LEASE_CHECK: Duration = Duration::from_millis(300);

/// A drive that has not answered a reservation command by then is unreachable for now (design section 5).
pub(crate) const FENCE_TIMEOUT: Duration = Duration::from_millis(500);

/// How one drive is reached: through its own server's guard or over the fabric. Both check every command
/// against the drive's reservations.
pub(crate) trait Reach: Fencing {
    /// `None` while it cannot be reached.
    fn device(&self) -> Option<Device>;
}

/// The identity of this incarnation towards drives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) incarnation: IncarnationId,
    pub(crate) host_id: HostId,
    pub(crate) key: ReservationKey,
}

/// How far this incarnation is with one drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
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
    attendant: tokio::task::AbortHandle,
}

/// All drives. Cheap to share on its thread.
pub(crate) struct Fabric {
    identity: Identity,
    env: Rc<dyn Env>,
    began: Instant,
    entries: RefCell<BTreeMap<DriveId, Entry>>,
    /// Registered, and not yet on record in Raft.
    to_record: RefCell<BTreeSet<DriveId>>,
    record: Notify,
    fenced: Notify,
    is_fenced: Cell<bool>,
}

impl Fabric {
    /// No drives yet.
    pub(crate) fn new(identity: Identity, env: Rc<dyn Env>) -> Rc<Self> {
        Rc::new(Self {
            identity,
            env,
            began: Instant::now(),
            entries: RefCell::default(),
            to_record: RefCell::default(),
            record: Notify::new(),
            fenced: Notify::new(),
            is_fenced: Cell::new(false),
        })
    }

    /// Who this incarnation is.
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// Drives known so far.
    pub(crate) fn known(&self) -> BTreeSet<DriveId> {
        self.entries.borrow().keys().copied().collect()
    }

    /// Adds a drive and starts to attend it.
    pub(crate) fn add(self: &Rc<Self>, drive: DriveId, reach: Rc<dyn Reach>) {
        let attendant = tokio::task::spawn_local(Self::attend(Rc::downgrade(self), drive)).abort_handle();
        let entry = Entry {
            reach,
            standing: Cell::new(Standing::Unregistered),
            confirmed_at: Cell::new(None),
            attendant,
        };
        if let Some(replaced) = self.entries.borrow_mut().insert(drive, entry) {
            replaced.attendant.abort();
        }
    }

    /// Forgets a drive that the cluster no longer has.
    pub(crate) fn remove(&self, drive: DriveId) {
        if let Some(entry) = self.entries.borrow_mut().remove(&drive) {
            entry.attendant.abort();
        }
    }

    /// Waits for registrations that Raft does not know of yet, and takes them.
    pub(crate) async fn registrations_to_record(&self) -> BTreeSet<DriveId> {
        loop {
            let notified = self.record.notified();
            let drives = std::mem::take(&mut *self.to_record.borrow_mut());
            if !drives.is_empty() {
                return drives;
            }
            notified.await;
        }
    }

    /// Gives registrations back whose recording failed.
    pub(crate) fn record_later(&self, drives: BTreeSet<DriveId>) {
        self.to_record.borrow_mut().extend(drives);
        self.record.notify_one();
    }

    /// Ends this incarnation, as if it had been fenced.
    pub(crate) fn give_up(&self) {
        self.is_fenced.set(true);
        self.fenced.notify_waiters();
        self.fenced.notify_one();
    }

    /// Completes when this incarnation has been fenced by somebody.
    pub(crate) async fn wait_until_fenced(&self) {
        while !self.is_fenced.get() {
            self.fenced.notified().await;
        }
    }

    /// What `weft node show` prints of the drives.
    pub(crate) fn inspect(&self) -> serde_json::Value {
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

    async fn attend(fabric: std::rc::Weak<Self>, drive: DriveId) {
        loop {
            let Some(this) = fabric.upgrade() else { return };
            this.check(drive).await;
            // All drives at once: an idle thread wakes once for all of them.
            let next = this.next_check();
            drop(this);
            tokio::time::sleep_until(next).await;
        }
    }

    /// The next multiple of [`LEASE_CHECK`] since this fabric began.
    fn next_check(&self) -> Instant {
        let elapsed = self.began.elapsed().as_nanos();
        let into = Duration::from_nanos((elapsed % LEASE_CHECK.as_nanos()) as u64);
        Instant::now() + (LEASE_CHECK - into)
    }

    /// One look at a drive: registers the first time, and reads the report from then on.
    async fn check(&self, drive: DriveId) {
        let Some((reach, standing)) = self.reach(drive) else {
            return;
        };
        if standing == Standing::Unregistered {
            match within(FENCE_TIMEOUT, reach.register(self.identity.key)).await {
                Ok(()) => {
                    self.set_standing(drive, Standing::Registered);
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
        match within(FENCE_TIMEOUT, reach.report()).await {
            Ok(report) if !report.in_force => {
                if standing != Standing::Forgot {
                    tracing::error!(%drive, "the drive has lost its reservation and is not trusted until it is back in force");
                }
                self.set_standing(drive, Standing::Forgot);
            }
            Ok(report) => {
                let own = (self.identity.host_id, self.identity.key);
                if report.registrants.contains(&own) {
                    self.set_standing(drive, Standing::Registered);
                    if let Some(entry) = self.entries.borrow().get(&drive) {
                        entry.confirmed_at.set(Some(sent_at));
                    }
                } else {
                    tracing::error!(%drive, incarnation = %self.identity.incarnation, "this incarnation has been fenced");
                    self.give_up();
                }
            }
            Err(error) => tracing::debug!(%drive, %error, "no reservation report"),
        }
    }

    fn reach(&self, drive: DriveId) -> Option<(Rc<dyn Reach>, Standing)> {
        self.entries
            .borrow()
            .get(&drive)
            .map(|entry| (entry.reach.clone(), entry.standing.get()))
    }

    fn set_standing(&self, drive: DriveId, standing: Standing) {
        if let Some(entry) = self.entries.borrow().get(&drive) {
            entry.standing.set(standing);
        }
    }

    /// Fences `victim` on `drive`. Done when nothing of it is left in execution there.
    pub(crate) async fn fence(&self, drive: DriveId, victim: ReservationKey) -> Result<(), FenceError> {
        let Some((reach, standing)) = self.reach(drive) else {
            return Err(FenceError::Unreachable);
        };
        if standing != Standing::Registered {
            return Err(FenceError::NotRegistered);
        }
        let own = self.identity.key;
        within(
            FENCE_TIMEOUT,
            async move {
                match reach.preempt_and_abort(own, victim).await {
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
            }
            .boxed_local(),
        )
        .await
    }
}

async fn within<T>(
    limit: Duration,
    answer: LocalBoxFuture<'static, Result<T, FenceError>>,
) -> Result<T, FenceError> {
    timeout(limit, answer)
        .await
        .unwrap_or(Err(FenceError::Unreachable))
}

impl Drives for Fabric {
    fn device(&self, drive: DriveId) -> Option<Device> {
        let (reach, standing) = self.reach(drive)?;
        if standing == Standing::Registered {
            reach.device()
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
