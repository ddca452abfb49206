//! A device under reservations: check and submission are one step, and what is in execution is known by host.
//!
//! ```text
//! command path: admit(host) ── data arrives ── Admission::write ─┐
//!                                                                 ├─ check table ─ count ─ device
//! local caller: local(host) ───────────────── BlockDevice::write ─┘
//! ```
//!
//! Everything runs on one thread, and between the check and the device's method nothing is awaited, so no
//! preempt can come between them. A preempt takes effect in memory before anything is awaited: from that instant
//! the victim's commands are refused, those that were admitted earlier and still wait for their data too.
//! Preempt and Abort then completes when nothing that was submitted before it is left in the device.
//!
//! A caller may drop a future; the I/O goes on (block contract, point 3), so the namespace keeps such futures and
//! still counts them.
//!
//! NVM Express Base Specification 2.0, "Preempting a Reservation or Registration".

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Notify;
use weft_block::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::HostId;
use weft_proto::nvme::reservation::{PersistChange, RegisterAction, ReservationStatus, ReservationType};
use weft_proto::units::{Lba, LbaRange};

use super::file::{self, ReservationFileError};
use super::table::{Access, Effects, Notice, Refused, ReservationTable};
use crate::metrics;

/// Hosts remembered before those with nothing in execution are forgotten.
const HOSTS_MAX: usize = 1024;

/// Why a reservation command failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReservationError {
    /// By the rules; nothing has changed.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The change is in force but could not be made to survive power loss.
    #[error("not persisted: {0}")]
    NotPersisted(Arc<str>),
}

/// A namespace with reservations. A cheap handle; clones are the same namespace.
#[derive(Clone)]
pub struct ReservedNamespace(Rc<Inner>);

struct Inner {
    device: Device,
    uuid: [u8; 16],
    table: RefCell<ReservationTable>,
    file: Option<ReservationFile>,
    hosts: RefCell<BTreeMap<HostId, Rc<Execution>>>,
    /// Something that a drain waits for has changed.
    drained: Notify,
    orphans: Orphans,
    subscribers: RefCell<Vec<Subscriber>>,
}

type Subscriber = Box<dyn Fn(Notice) -> bool>;

struct ReservationFile {
    path: PathBuf,
    /// Held by the thread that writes, so that a dropped caller cannot let two write at once.
    writing: Arc<tokio::sync::Mutex<()>>,
    /// Counts changes of the table.
    version: Cell<u64>,
    /// The version that is on the medium.
    stored: Cell<u64>,
    /// Whether the file on the medium says that the table persists.
    stored_ptpl: Cell<bool>,
}

/// What one host has in the device.
#[derive(Default)]
struct Execution {
    /// Counts Preempt and Aborts against the host.
    generation: Cell<u64>,
    /// Submitted in this generation.
    current: Cell<u32>,
    /// Submitted in an earlier one.
    older: Cell<u32>,
}

/// Futures that their callers have dropped, whose I/O goes on.
#[derive(Default)]
struct Orphans {
    incoming: RefCell<Vec<LocalBoxFuture<'static, ()>>>,
    polled: Cell<FuturesUnordered<LocalBoxFuture<'static, ()>>>,
}

impl ReservedNamespace {
    /// `device` under the reservations that `file` holds; without a file nothing persists and hosts are told so.
    /// `uuid` is the namespace's, which the file has to carry.
    ///
    /// # Errors
    /// [`ReservationFileError`] for a file that cannot be read or believed. The caller decides: serving the drive
    /// without its table would let fenced hosts write again.
    pub fn open(device: Device, uuid: [u8; 16], file: Option<PathBuf>) -> Result<Self, ReservationFileError> {
        let (table, file) = match file {
            None => (ReservationTable::new(), None),
            Some(path) => {
                let table = file::load(&path, uuid)?;
                let stored_ptpl = Cell::new(table.ptpl());
                let file = ReservationFile {
                    path,
                    writing: Arc::default(),
                    version: Cell::new(0),
                    stored: Cell::new(0),
                    stored_ptpl,
                };
                (table, Some(file))
            }
        };
        Ok(Self(Rc::new(Inner {
            device,
            uuid,
            table: RefCell::new(table),
            file,
            hosts: RefCell::default(),
            drained: Notify::new(),
            orphans: Orphans::default(),
            subscribers: RefCell::default(),
        })))
    }

    /// Size and properties of the device.
    #[must_use]
    pub fn info(&self) -> DeviceInfo {
        self.0.device.info()
    }

    /// The UUID given to [`Self::open`].
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.0.uuid
    }

    /// Whether registrations can persist through power loss.
    #[must_use]
    pub fn can_persist(&self) -> bool {
        self.0.file.is_some()
    }

    /// The namespace as `host` has it.
    #[must_use]
    pub fn of_host(&self, host: HostId) -> HostNamespace {
        HostNamespace(Rc::new(OfHost {
            namespace: self.clone(),
            host,
            execution: self.execution(host),
        }))
    }

    /// The namespace as a device of `host`, with no socket: every operation passes the same check.
    #[must_use]
    pub fn local(&self, host: HostId) -> Device {
        Rc::new(self.of_host(host))
    }

    /// Calls `subscriber` for every notice, until it answers `false`.
    pub fn subscribe(&self, subscriber: impl Fn(Notice) -> bool + 'static) {
        self.0.subscribers.borrow_mut().push(Box::new(subscriber));
    }

    /// Reservation Report.
    #[must_use]
    pub fn report(&self) -> ReservationStatus {
        self.0.table.borrow().status()
    }

    /// Reservation Register. Durable, if the table persists, when it returns.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub async fn register(
        &self,
        host: HostId,
        action: RegisterAction,
        ignore_existing_key: bool,
        current_key: u64,
        new_key: u64,
        persist: PersistChange,
    ) -> Result<(), ReservationError> {
        if persist == PersistChange::Set && !self.can_persist() {
            return Err(Refused::InvalidField.into());
        }
        self.apply(|table| table.register(host, action, ignore_existing_key, current_key, new_key, persist))
            .await?;
        Ok(())
    }

    /// Reservation Acquire, action Acquire.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub async fn acquire(
        &self,
        host: HostId,
        current_key: u64,
        rtype: ReservationType,
    ) -> Result<(), ReservationError> {
        self.apply(|table| table.acquire(host, current_key, rtype))
            .await?;
        Ok(())
    }

    /// Reservation Acquire, action Preempt: commands already submitted may still complete afterwards.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub async fn preempt(
        &self,
        host: HostId,
        current_key: u64,
        preempt_key: u64,
        rtype: ReservationType,
    ) -> Result<(), ReservationError> {
        self.apply(|table| table.preempt(host, current_key, preempt_key, rtype))
            .await?;
        Ok(())
    }

    /// Reservation Acquire, action Preempt and Abort: when it returns, no command of a preempted host is in
    /// execution or will ever be.
    ///
    /// # Errors
    /// [`ReservationError`]. [`ReservationError::NotPersisted`] is reported after the wait: the victim is out now and
    /// might be back after power loss. A conflict is reported after a wait too: whoever asks takes "nobody has this key" for
    /// "fenced", and another one's Preempt and Abort of the same host may still be waiting.
    pub async fn preempt_and_abort(
        &self,
        host: HostId,
        current_key: u64,
        preempt_key: u64,
        rtype: ReservationType,
    ) -> Result<(), ReservationError> {
        let mut victims = Vec::new();
        let applied = self.apply(|table| {
            let effects = table.preempt(host, current_key, preempt_key, rtype)?;
            for &victim in &effects.preempted {
                let execution = self.execution(victim);
                execution.generation.set(execution.generation.get() + 1);
                execution
                    .older
                    .set(execution.older.get() + execution.current.take());
                victims.push(execution);
            }
            Ok(effects)
        });
        let applied = applied.await;
        if applied == Err(Refused::Conflict.into()) {
            self.drain_preempted().await;
            return applied;
        }
        // Even when it could not be persisted: the victims' commands are doomed either way, and whoever hears of
        // the error must not find them still running.
        self.drain(&victims).await;
        applied
    }

    /// Reservation Release, action Release.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub async fn release(
        &self,
        host: HostId,
        current_key: u64,
        rtype: Option<ReservationType>,
    ) -> Result<(), ReservationError> {
        self.apply(|table| table.release(host, current_key, rtype))
            .await?;
        Ok(())
    }

    /// Reservation Release, action Clear.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub async fn clear(&self, host: HostId, current_key: u64) -> Result<(), ReservationError> {
        self.apply(|table| table.clear(host, current_key)).await?;
        Ok(())
    }

    /// Feature Reservation Persistence.
    ///
    /// # Errors
    /// [`ReservationError`].
    pub async fn set_ptpl(&self, ptpl: bool) -> Result<(), ReservationError> {
        if ptpl && !self.can_persist() {
            return Err(Refused::InvalidField.into());
        }
        self.apply(|table| {
            table.set_ptpl(ptpl);
            Ok(Effects::default())
        })
        .await
    }

    /// Changes the table in memory at once, then persists and notifies.
    async fn apply(
        &self,
        change: impl FnOnce(&mut ReservationTable) -> Result<Effects, Refused>,
    ) -> Result<(), ReservationError> {
        let effects = {
            let mut table = self.0.table.borrow_mut();
            change(&mut table).inspect_err(|refused| {
                if *refused == Refused::Conflict {
                    metrics::reservation_conflict();
                }
            })?
        };
        if let Some(file) = &self.0.file {
            file.version.set(file.version.get() + 1);
        }
        for notice in effects.notices {
            self.notify(notice);
        }
        self.persist().await
    }

    fn notify(&self, notice: Notice) {
        // Taken out while it is called: a subscriber may look at this namespace.
        let mut subscribers = self.0.subscribers.take();
        subscribers.retain(|subscriber| subscriber(notice));
        let mut current = self.0.subscribers.borrow_mut();
        subscribers.append(&mut current);
        *current = subscribers;
    }

    async fn persist(&self) -> Result<(), ReservationError> {
        let Some(file) = &self.0.file else { return Ok(()) };
        let version = file.version.get();
        let guard = Arc::clone(&file.writing).lock_owned().await;
        if file.stored.get() >= version {
            // Whoever held the lock wrote this change along with its own.
            return Ok(());
        }
        let (bytes, ptpl, version) = {
            let table = self.0.table.borrow();
            (
                file::encode(self.0.uuid, &table),
                table.ptpl(),
                file.version.get(),
            )
        };
        if !ptpl && !file.stored_ptpl.get() {
            file.stored.set(version);
            return Ok(());
        }
        let path = file.path.clone();
        let written = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            file::store(&path, &bytes)
        });
        let error = match written.await {
            Ok(Ok(())) => {
                file.stored.set(version);
                file.stored_ptpl.set(ptpl);
                return Ok(());
            }
            Ok(Err(error)) => crate::error_chain(&error),
            Err(join) => join.to_string(),
        };
        tracing::error!(%error, "reservations could not be persisted");
        Err(ReservationError::NotPersisted(error.into()))
    }

    fn execution(&self, host: HostId) -> Rc<Execution> {
        let mut hosts = self.0.hosts.borrow_mut();
        if let Some(execution) = hosts.get(&host) {
            return Rc::clone(execution);
        }
        if hosts.len() >= HOSTS_MAX {
            // Nobody else holds it: no association, no admission, nothing in execution.
            hosts.retain(|_, execution| Rc::strong_count(execution) > 1);
        }
        Rc::clone(hosts.entry(host).or_default())
    }

    /// Waits until nothing that any Preempt and Abort so far was meant to end is in the device.
    pub async fn drain_preempted(&self) {
        if planted(Bug::ConflictRunsAhead) {
            return;
        }
        let victims: Vec<Rc<Execution>> = {
            let hosts = self.0.hosts.borrow();
            let preempted = hosts.values().filter(|execution| execution.older.get() > 0);
            preempted.cloned().collect()
        };
        self.drain(&victims).await;
    }

    /// Waits until nothing submitted in an earlier generation is in the device.
    async fn drain(&self, victims: &[Rc<Execution>]) {
        let inner = &self.0;
        loop {
            let mut notified = pin!(inner.drained.notified());
            notified.as_mut().enable();
            let drained = poll_fn(|cx| {
                inner.orphans.poll(cx);
                let done = victims.iter().all(|execution| execution.older.get() == 0);
                if done || planted(Bug::AbortDoesNotWait) {
                    return Poll::Ready(true);
                }
                notified.as_mut().poll(cx).map(|()| false)
            })
            .await;
            if drained {
                // Another drain may have had its waker in the set of orphans replaced by ours.
                inner.drained.notify_waiters();
                return;
            }
        }
    }
}

impl Orphans {
    /// Polls what was dropped. Nothing is borrowed while a future runs: it may drop another one.
    fn poll(&self, cx: &mut Context<'_>) {
        let mut polled = self.polled.take();
        loop {
            polled.extend(self.incoming.take());
            while let Poll::Ready(Some(())) = polled.poll_next_unpin(cx) {}
            if self.incoming.borrow().is_empty() {
                break;
            }
        }
        self.polled.set(polled);
    }
}

/// A namespace as one host has it. A cheap handle, which is looked up once and admits many commands.
#[derive(Clone)]
pub struct HostNamespace(Rc<OfHost>);

struct OfHost {
    namespace: ReservedNamespace,
    host: HostId,
    execution: Rc<Execution>,
}

impl HostNamespace {
    /// The namespace, and the host.
    #[must_use]
    pub fn parts(&self) -> (&ReservedNamespace, HostId) {
        (&self.0.namespace, self.0.host)
    }

    /// Admits one command: a later Preempt and Abort against the host ends it, even if the host has registered again by
    /// the time its data arrives.
    #[must_use]
    pub fn admit(&self) -> Admission {
        self.admitted_in(self.generation())
    }

    /// How many Preempt and Aborts there have been against the host: what makes a command one of those that a later one ends.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.0.execution.generation.get()
    }

    /// A command that was admitted when this was the generation.
    #[must_use]
    pub fn admitted_in(&self, generation: u64) -> Admission {
        Admission {
            generation,
            host: self.clone(),
        }
    }
}

/// A command that was admitted, before or while it is executed. Every operation passes the check when it is
/// submitted.
#[derive(Clone)]
pub struct Admission {
    host: HostNamespace,
    generation: u64,
}

impl Admission {
    /// Whether a Preempt and Abort has come since the command was admitted.
    #[must_use]
    pub fn is_aborted(&self) -> bool {
        self.host.generation() != self.generation
    }

    /// Whether the command may touch the blocks now.
    fn is_allowed(&self, access: Access) -> bool {
        let OfHost { namespace, host, .. } = &*self.host.0;
        planted(Bug::WritesUnchecked)
            || !self.is_aborted() && namespace.0.table.borrow().allows(*host, access)
    }

    fn submit<T: 'static>(&self, access: Access, start: impl FnOnce(&Device) -> Io<T>) -> Io<T> {
        if !self.is_allowed(access) {
            metrics::reservation_conflict();
            return Io::ready(Err(BlockError::ReservationConflict));
        }
        let OfHost {
            namespace, execution, ..
        } = &*self.host.0;
        let io = start(&namespace.0.device);
        // What is over by now was in execution for no time in which anybody could have preempted it.
        if io.is_ready() {
            return io;
        }
        let running = InExecution {
            inner: Rc::clone(&namespace.0),
            execution: Rc::clone(execution),
            generation: self.generation,
        };
        execution.current.set(execution.current.get() + 1);
        Io::running(Tracked {
            io: Some((io, running)),
        })
    }

    /// As [`BlockDevice::read`].
    pub fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.submit(Access::Read, |device| device.read(range))
    }

    /// As [`BlockDevice::write`].
    pub fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        self.submit(Access::Write, |device| device.write(start, data, durability))
    }

    /// As [`BlockDevice::write_zeroes`].
    pub fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.submit(Access::Write, |device| {
            device.write_zeroes(range, deallocate, durability)
        })
    }

    /// As [`BlockDevice::deallocate`].
    pub fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.submit(Access::Write, |device| device.deallocate(ranges))
    }

    /// As [`BlockDevice::flush`].
    pub fn flush(&self) -> Io<()> {
        self.submit(Access::Write, |device| device.flush())
    }
}

/// One operation in the device; gone when its I/O is.
struct InExecution {
    inner: Rc<Inner>,
    execution: Rc<Execution>,
    generation: u64,
}

impl Drop for InExecution {
    fn drop(&mut self) {
        let execution = &self.execution;
        if self.generation == execution.generation.get() {
            execution.current.set(execution.current.get() - 1);
        } else {
            execution.older.set(execution.older.get() - 1);
            if execution.older.get() == 0 {
                self.inner.drained.notify_waiters();
            }
        }
    }
}

/// An operation that stays counted when its caller drops it.
struct Tracked<T: 'static> {
    io: Option<(Io<T>, InExecution)>,
}

impl<T> Future for Tracked<T> {
    type Output = Result<T, BlockError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (io, _) = self.io.as_mut().expect("not polled after it was ready");
        let result = std::task::ready!(Pin::new(io).poll(cx));
        self.io = None;
        Poll::Ready(result)
    }
}

impl<T: 'static> Drop for Tracked<T> {
    fn drop(&mut self) {
        let Some((io, running)) = self.io.take() else {
            return;
        };
        let inner = Rc::clone(&running.inner);
        inner.orphans.incoming.borrow_mut().push(Box::pin(async move {
            let _ = io.await;
            drop(running);
        }));
        // A drain under way has to poll it.
        inner.drained.notify_waiters();
    }
}

/// [`ReservedNamespace::local`].
impl BlockDevice for HostNamespace {
    fn info(&self) -> DeviceInfo {
        self.0.namespace.info()
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.admit().read(range)
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        self.admit().write(start, data, durability)
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.admit().write_zeroes(range, deallocate, durability)
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.admit().deallocate(ranges)
    }

    fn flush(&self) -> Io<()> {
        self.admit().flush()
    }
}
