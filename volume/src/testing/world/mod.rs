//! The simulated world: one virtual clock, one executor and the drives, shared by every incarnation.
//!
//! Everything that happens is either a task being polled or an event at a point of virtual time; the seed picks
//! among what could happen next. Time passes only when no task can run, so a simulated hour costs nothing and
//! no test depends on how fast its machine is.
//!
//! **Effects** are what outlives a process: a write, flush or deallocate that took effect on a drive, and a
//! command that the metadata service committed. They are numbered from 1. A harness runs a script once to
//! count them, and then once per effect with [`World::crash_after`], which stops the world right after that effect,
//! before anyone hears of it.
//!
//! What it does not do: threads, sockets, real time. A task that spins without waiting hangs the test.

mod env;
mod life;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use foldhash::fast::FixedState;
use futures_util::future::LocalBoxFuture;
use weft_proto::id::{DriveId, IncarnationId};

pub use self::env::SimEnv;
pub use self::life::InFlight;
use self::life::Life;
use super::answer::{Answer, answer};
use super::drive::{DriveSpec, SimDrive};
use super::metadata::Metadata;
use super::rng::Rng;
use crate::seams::Timestamp;

/// Virtual time after which a run that still waits for its condition is taken for hung.
const PATIENCE: Duration = Duration::from_secs(600);

/// The world stopped because the effect given to [`World::crash_after`] happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

type TaskId = u64;

struct Task {
    incarnation: IncarnationId,
    /// `None` while it is being polled.
    future: Option<LocalBoxFuture<'static, ()>>,
    /// Puts it among the woken ones: made once, since a task is polled hundreds of times.
    waker: Waker,
    /// Whether it is among those that can run.
    ready: bool,
    polls: u64,
}

type Event = Box<dyn FnOnce(&Rc<World>)>;

/// A write that takes effect on a drive.
#[derive(Clone, Copy, Debug)]
pub struct Landed<'a> {
    /// Who sent it.
    pub sender: IncarnationId,
    /// Where.
    pub drive: DriveId,
    /// The first block.
    pub start: u64,
    /// What each block holds from now on; `None` is zeroes.
    pub blocks: &'a [Option<Bytes>],
    /// Whether all of it does, and the sender may be told so.
    pub whole: bool,
}

/// Told of every write that takes effect.
pub type Landing = Rc<dyn Fn(&Landed<'_>)>;

struct Core {
    now: Timestamp,
    /// Draws the order of tasks. Devices and incarnations have streams of their own.
    rng: Rng,
    tasks: HashMap<TaskId, Task, FixedState>,
    task_next: TaskId,
    ready: Vec<TaskId>,
    events: BTreeMap<(Timestamp, u64), (Option<IncarnationId>, Event)>,
    event_next: u64,
    lives: BTreeMap<IncarnationId, Life>,
    incarnation_next: u64,
    effects: u64,
    crash_after: Option<u64>,
    stopped: bool,
    /// Polls of tasks so far, and what is to happen after some number of them.
    polls: u64,
    interruptions: BTreeMap<u64, Event>,
    paused: usize,
    digest: u64,
    /// What was woken and is being sorted in; empty between two steps.
    woken: Vec<TaskId>,
}

impl Core {
    /// One of the tasks that can run, by the seed.
    fn pick(&mut self) -> Option<usize> {
        if self.ready.is_empty() {
            return None;
        }
        if self.paused == 0 {
            return Some(self.rng.index(self.ready.len()));
        }
        let runs = |index: &usize| {
            let incarnation = self.tasks[&self.ready[*index]].incarnation;
            !self.lives.get(&incarnation).is_some_and(|life| life.paused)
        };
        let runnable: Vec<usize> = (0..self.ready.len()).filter(runs).collect();
        (!runnable.is_empty()).then(|| runnable[self.rng.index(runnable.len())])
    }

    /// Goes into the digest: the order of everything that happens.
    fn digest(&mut self, what: u64) {
        let mixed = (self.digest ^ what).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.digest = mixed.rotate_left(23) ^ self.now.0;
    }
}

/// See the module. Held by the harness alone; everything else holds it weakly, so that dropping it ends every task.
pub struct World {
    this: Weak<Self>,
    seed: u64,
    core: RefCell<Core>,
    woken: Arc<Mutex<Vec<TaskId>>>,
    drives: RefCell<BTreeMap<DriveId, Rc<SimDrive>>>,
    pub(super) metadata: RefCell<Metadata>,
    violations: RefCell<Vec<String>>,
    landing: RefCell<Option<Landing>>,
    trace: Cell<bool>,
}

impl World {
    /// An empty world.
    #[must_use]
    pub fn new(seed: u64) -> Rc<Self> {
        Rc::new_cyclic(|this| Self {
            this: this.clone(),
            seed,
            core: RefCell::new(Core {
                now: Timestamp(1_000_000_000),
                rng: Rng::new(seed).fork(1),
                tasks: HashMap::default(),
                task_next: 1,
                ready: Vec::new(),
                events: BTreeMap::new(),
                event_next: 0,
                lives: BTreeMap::new(),
                incarnation_next: 1,
                effects: 0,
                crash_after: None,
                stopped: false,
                polls: 0,
                interruptions: BTreeMap::new(),
                paused: 0,
                digest: seed,
                woken: Vec::new(),
            }),
            woken: Arc::default(),
            drives: RefCell::default(),
            metadata: RefCell::new(Metadata::new(seed)),
            violations: RefCell::default(),
            landing: RefCell::default(),
            trace: Cell::new(false),
        })
    }

    pub(super) fn this(&self) -> Option<Rc<Self>> {
        self.this.upgrade()
    }

    /// The seed it was made with.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Virtual time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.core.borrow().now
    }

    // Drives.

    /// Adds a drive.
    pub fn add_drive(&self, id: DriveId, spec: DriveSpec) -> Rc<SimDrive> {
        let drive = SimDrive::new(
            self.this.clone(),
            id,
            spec,
            Rng::new(self.seed).fork(0x2_0000 + u64::from(id.0)),
        );
        self.drives.borrow_mut().insert(id, Rc::clone(&drive));
        drive
    }

    /// A drive that was added.
    ///
    /// # Panics
    /// When it was not.
    #[must_use]
    pub fn drive(&self, id: DriveId) -> Rc<SimDrive> {
        self.find_drive(id).expect("a drive that was added")
    }

    pub(super) fn find_drive(&self, id: DriveId) -> Option<Rc<SimDrive>> {
        self.drives.borrow().get(&id).cloned()
    }

    /// All of them, in the order of their ids.
    #[must_use]
    pub fn all_drives(&self) -> Vec<Rc<SimDrive>> {
        self.drives.borrow().values().cloned().collect()
    }

    // Effects.

    /// How many effects there were.
    #[must_use]
    pub fn effects(&self) -> u64 {
        self.core.borrow().effects
    }

    /// Stops the world right after effect number `effect`.
    pub fn crash_after(&self, effect: u64) {
        self.core.borrow_mut().crash_after = Some(effect);
    }

    /// Lets the world go on after [`World::crash_after`] stopped it.
    pub fn go_on(&self) {
        let mut core = self.core.borrow_mut();
        core.stopped = false;
        core.crash_after = None;
    }

    /// Counts one.
    pub(super) fn effect(&self, what: impl FnOnce() -> String) {
        let mut core = self.core.borrow_mut();
        core.effects += 1;
        if core.crash_after == Some(core.effects) {
            core.stopped = true;
        }
        if self.trace.get() {
            println!(
                "{:>10.3} ms effect {}: {}",
                core.now.0 as f64 / 1e6,
                core.effects,
                what()
            );
        }
    }

    /// Prints each effect as it happens: for a person who debugs one seed.
    pub fn trace_effects(&self, on: bool) {
        self.trace.set(on);
    }

    /// Prints a line in the trace, if it is on.
    pub fn note(&self, what: impl FnOnce() -> String) {
        if self.trace.get() {
            println!("{:>10.3} ms {}", self.now().0 as f64 / 1e6, what());
        }
    }

    // Violations.

    /// Notes that an invariant was broken. Noted, not panicked, so that all of them print.
    pub fn violation(&self, what: String) {
        self.note(|| format!("violation: {what}"));
        self.violations.borrow_mut().push(what);
    }

    /// The invariants that were broken so far.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.violations.borrow().clone()
    }

    // Running.

    /// Runs until `condition` holds.
    ///
    /// # Errors
    /// [`Stopped`] at the effect given to [`World::crash_after`].
    ///
    /// # Panics
    /// When nothing can run and no event is due, or after ten minutes of virtual time: both with the tasks that wait.
    pub fn run_until(&self, mut condition: impl FnMut() -> bool) -> Result<(), Stopped> {
        let give_up = self.now().after(PATIENCE);
        loop {
            if self.core.borrow().stopped {
                return Err(Stopped);
            }
            if condition() {
                return Ok(());
            }
            assert!(
                self.step(),
                "deadlock (seed {}): {}",
                self.seed,
                self.describe_tasks()
            );
            assert!(
                self.now() < give_up,
                "no progress in {PATIENCE:?} of virtual time (seed {}): {}",
                self.seed,
                self.describe_tasks()
            );
        }
    }

    /// Runs `future` as a task of `incarnation` until it ends.
    ///
    /// # Errors
    /// [`Stopped`] at the effect given to [`World::crash_after`].
    ///
    /// # Panics
    /// As [`World::run_until`].
    pub fn block_on<T: 'static>(
        &self,
        incarnation: IncarnationId,
        future: impl Future<Output = T> + 'static,
    ) -> Result<T, Stopped> {
        let running = self.start(incarnation, future);
        self.run_until(|| running.is_done())?;
        Ok(running.take().expect("the task ended"))
    }

    /// Starts `future` as a task of `incarnation`, to be waited for with [`World::run_until`].
    pub fn start<T: 'static>(
        &self,
        incarnation: IncarnationId,
        future: impl Future<Output = T> + 'static,
    ) -> Running<T> {
        let (giver, result) = answer();
        self.spawn(incarnation, Box::pin(async move { giver.give(future.await) }));
        Running(result)
    }

    /// Lets `duration` of virtual time pass.
    ///
    /// # Errors
    /// [`Stopped`] at the effect given to [`World::crash_after`].
    pub fn run_for(&self, duration: Duration) -> Result<(), Stopped> {
        let deadline = self.now().after(duration);
        // So that there is something to wait for when nothing else is due.
        self.at(deadline, None, |_| {});
        self.run_until(|| self.now() >= deadline)
    }

    /// Does one thing; false when there is nothing to do.
    fn step(&self) -> bool {
        let next = {
            let mut guard = self.core.borrow_mut();
            let core = &mut *guard;
            std::mem::swap(
                &mut core.woken,
                &mut *self.woken.lock().unwrap_or_else(PoisonError::into_inner),
            );
            for id in core.woken.drain(..) {
                if let Some(task) = core.tasks.get_mut(&id)
                    && !std::mem::replace(&mut task.ready, true)
                {
                    core.ready.push(id);
                }
            }
            if let Some(index) = core.pick() {
                let id = core.ready.swap_remove(index);
                core.polls += 1;
                core.digest(id);
                let task = core.tasks.get_mut(&id).expect("only live tasks are ready");
                task.polls += 1;
                task.ready = false;
                let waker = task.waker.clone();
                task.future.take().map(|future| (id, future, waker))
            } else {
                None
            }
        };
        if let Some((id, future, waker)) = next {
            self.poll(id, future, &waker);
            self.interrupt();
            return true;
        }
        let event = {
            let mut core = self.core.borrow_mut();
            let Some(((time, number), (_, event))) = core.events.pop_first() else {
                return false;
            };
            core.now = core.now.max(time);
            core.digest(number);
            event
        };
        if let Some(this) = self.this.upgrade() {
            event(&this);
        }
        true
    }

    /// Does what was to happen after as many polls as there were.
    fn interrupt(&self) {
        let due = {
            let mut core = self.core.borrow_mut();
            let polls = core.polls;
            let first = core.interruptions.first_entry();
            first
                .filter(|entry| *entry.key() <= polls)
                .map(std::collections::btree_map::OccupiedEntry::remove)
        };
        if let (Some(event), Some(this)) = (due, self.this.upgrade()) {
            event(&this);
        }
    }

    fn poll(&self, id: TaskId, mut future: LocalBoxFuture<'static, ()>, waker: &Waker) {
        let poll = future.as_mut().poll(&mut Context::from_waker(waker));
        let ended = {
            let mut core = self.core.borrow_mut();
            match (poll, core.tasks.get_mut(&id)) {
                (Poll::Pending, Some(task)) => {
                    task.future = Some(future);
                    None
                }
                // Done, or its incarnation was crashed from inside the poll.
                _ => {
                    core.tasks.remove(&id);
                    Some(future)
                }
            }
        };
        drop(ended);
    }

    fn describe_tasks(&self) -> String {
        let core = self.core.borrow();
        let tasks: BTreeMap<_, _> = core.tasks.iter().collect();
        let tasks: Vec<String> = tasks
            .into_iter()
            .map(|(id, task)| format!("task {id} of {} (polled {} times)", task.incarnation, task.polls))
            .collect();
        format!(
            "at {:.3} ms, after {} effects, waiting: [{}]",
            core.now.0 as f64 / 1e6,
            core.effects,
            tasks.join(", ")
        )
    }

    fn spawn(&self, incarnation: IncarnationId, future: LocalBoxFuture<'static, ()>) {
        let mut core = self.core.borrow_mut();
        if core.lives.get(&incarnation).is_none_or(|life| life.dead) {
            drop(core);
            drop(future);
            return;
        }
        let id = core.task_next;
        core.task_next += 1;
        let waker = TaskWaker {
            id,
            woken: Arc::clone(&self.woken),
        };
        let task = Task {
            incarnation,
            future: Some(future),
            waker: Waker::from(Arc::new(waker)),
            ready: true,
            polls: 0,
        };
        core.tasks.insert(id, task);
        core.ready.push(id);
    }

    /// Does `event` after `polls` more polls of tasks: between any two awaits, not only where time passes.
    pub fn after_polls(&self, polls: u64, event: impl FnOnce(&Rc<Self>) + 'static) {
        let mut core = self.core.borrow_mut();
        let mut due = core.polls + polls.max(1);
        while core.interruptions.contains_key(&due) {
            due += 1;
        }
        core.interruptions.insert(due, Box::new(event));
    }

    /// Polls of tasks so far.
    #[must_use]
    pub fn polls(&self) -> u64 {
        self.core.borrow().polls
    }

    /// Stands for the order of everything that has happened: equal for two runs of one seed.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.core.borrow().digest
    }

    /// Has every write that takes effect told to `landing`.
    pub fn watch_landings(&self, landing: Landing) {
        *self.landing.borrow_mut() = Some(landing);
    }

    pub(super) fn landed(&self, landed: &Landed<'_>) {
        let landing = self.landing.borrow().clone();
        if let Some(landing) = landing {
            landing(landed);
        }
    }

    /// Does `event` at `time`; unless `owner` has crashed by then.
    pub fn at(
        &self,
        time: Timestamp,
        owner: Option<IncarnationId>,
        event: impl FnOnce(&Rc<Self>) + 'static,
    ) -> (Timestamp, u64) {
        let mut core = self.core.borrow_mut();
        let key = (time, core.event_next);
        core.event_next += 1;
        core.events.insert(key, (owner, Box::new(event)));
        key
    }

    fn cancel(&self, key: (Timestamp, u64)) {
        let event = self.core.borrow_mut().events.remove(&key);
        drop(event);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Tasks and events first, while the rest still stands.
        let tasks = std::mem::take(&mut self.core.get_mut().tasks);
        let tasks: BTreeMap<_, _> = tasks.into_iter().collect();
        drop(tasks);
        let events = std::mem::take(&mut self.core.get_mut().events);
        drop(events);
    }
}

/// A task that was started and whose result is wanted.
pub struct Running<T>(Answer<T>);

impl<T> Running<T> {
    /// Whether it has ended and its result was not yet taken.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.0.is_given()
    }

    /// Its result, once.
    #[must_use]
    pub fn take(&self) -> Option<T> {
        self.0.take()
    }
}

struct TaskWaker {
    id: TaskId,
    woken: Arc<Mutex<Vec<TaskId>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.woken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(self.id);
    }
}
