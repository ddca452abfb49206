//! The lives of agents: how they begin, stand still and end, and what their clocks show.

use std::collections::BTreeSet;
use std::rc::Rc;

use weft_proto::id::IncarnationId;

use super::env::SimEnv;
use super::{Task, TaskId, World};
use crate::seams::Timestamp;
use crate::testing::rng::Rng;

/// What becomes of the commands that an incarnation had in flight when it died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InFlight {
    /// None of them takes effect.
    Lost,
    /// All of them take effect, at once.
    Landed,
    /// Each by the seed: lost, landed, partly landed, or still to land later, until the incarnation is
    /// fenced on that drive (a ghost write).
    Mixed,
}

/// What the world knows of one life of an agent.
pub(super) struct Life {
    pub(super) rng: Rng,
    pub(super) dead: bool,
    /// Stopped by SIGSTOP: its tasks do not run.
    pub(super) paused: bool,
    /// The stretches it was paused for; the end of the last one is `None` while it lasts.
    pauses: Vec<(Timestamp, Option<Timestamp>)>,
    pub(super) clock: Clock,
}

/// The clock of one life: right at some moment, and too fast or too slow from then on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// World time and local time of that moment.
    origin: (u64, u64),
    /// Local nanoseconds more, in a million.
    drift_ppm: i64,
}

impl Clock {
    pub(super) fn local(self, world: Timestamp) -> Timestamp {
        let passed = i128::from(world.0.saturating_sub(self.origin.0));
        let local = passed * i128::from(1_000_000 + self.drift_ppm) / 1_000_000;
        Timestamp(
            self.origin
                .1
                .saturating_add(u64::try_from(local).unwrap_or(u64::MAX)),
        )
    }

    /// The first world time at which the clock shows `local` or more.
    pub(super) fn world(self, local: Timestamp) -> Timestamp {
        let wanted = i128::from(local.0.saturating_sub(self.origin.1));
        let rate = i128::from(1_000_000 + self.drift_ppm);
        let passed = (wanted * 1_000_000 + rate - 1) / rate;
        Timestamp(
            self.origin
                .0
                .saturating_add(u64::try_from(passed).unwrap_or(u64::MAX)),
        )
    }
}

impl World {
    /// A new life of an agent.
    pub fn incarnation(&self) -> IncarnationId {
        let mut core = self.core.borrow_mut();
        let id = IncarnationId(core.incarnation_next);
        core.incarnation_next += 1;
        let life = Life {
            rng: Rng::new(self.seed).fork(0x1_0000 + id.0),
            dead: false,
            paused: false,
            pauses: Vec::new(),
            clock: Clock {
                origin: (core.now.0, core.now.0),
                drift_ppm: 0,
            },
        };
        core.lives.insert(id, life);
        id
    }

    /// Clock, timers, tasks and randomness of `incarnation`.
    #[must_use]
    pub fn env(&self, incarnation: IncarnationId) -> Rc<SimEnv> {
        Rc::new(SimEnv {
            world: self.this.clone(),
            incarnation,
        })
    }

    /// Kills `incarnation`: its tasks and timers are dropped, and what it had in flight at drives and at the
    /// metadata service meets the fate `in_flight`.
    pub fn crash(&self, incarnation: IncarnationId, in_flight: InFlight) {
        self.go_on();
        self.kill(incarnation);
        for drive in self.all_drives() {
            drive.crash(incarnation, in_flight);
        }
        crate::testing::directory::crash(self, incarnation, in_flight);
    }

    /// Ends the process of `incarnation` and nothing else: what it has sent is the affair of whoever carries it.
    pub fn kill(&self, incarnation: IncarnationId) {
        self.resume(incarnation);
        let tasks: Vec<Task> = {
            let mut core = self.core.borrow_mut();
            if let Some(life) = core.lives.get_mut(&incarnation) {
                life.dead = true;
            }
            let mut ids: Vec<TaskId> = core
                .tasks
                .iter()
                .filter(|(_, task)| task.incarnation == incarnation)
                .map(|(id, _)| *id)
                .collect();
            ids.sort_unstable();
            core.ready.retain(|id| ids.binary_search(id).is_err());
            ids.iter().filter_map(|id| core.tasks.remove(id)).collect()
        };
        // Outside of the borrow: what a task owns may call back when it is dropped.
        drop(tasks);
        let timers: Vec<_> = {
            let mut core = self.core.borrow_mut();
            let keys: Vec<_> = core
                .events
                .iter()
                .filter(|(_, (owner, _))| *owner == Some(incarnation))
                .map(|(key, _)| *key)
                .collect();
            keys.iter().filter_map(|key| core.events.remove(key)).collect()
        };
        drop(timers);
    }

    /// Lets the clock of `incarnation` go too fast by this many parts in a million from now on, or too slow.
    pub fn set_drift(&self, incarnation: IncarnationId, drift_ppm: i64) {
        let mut core = self.core.borrow_mut();
        let now = core.now;
        if let Some(life) = core.lives.get_mut(&incarnation) {
            let local = life.clock.local(now);
            life.clock = Clock {
                origin: (now.0, local.0),
                drift_ppm,
            };
        }
    }

    /// SIGSTOP: its tasks stop running; what it sent goes on.
    pub fn pause(&self, incarnation: IncarnationId) {
        let mut core = self.core.borrow_mut();
        let now = core.now;
        let life = core.lives.get_mut(&incarnation).expect("a known incarnation");
        if !life.paused && !life.dead {
            life.paused = true;
            life.pauses.push((now, None));
            core.paused += 1;
        }
    }

    /// SIGCONT.
    pub fn resume(&self, incarnation: IncarnationId) {
        let mut core = self.core.borrow_mut();
        let now = core.now;
        let life = core.lives.get_mut(&incarnation).expect("a known incarnation");
        if life.paused {
            life.paused = false;
            if let Some(pause) = life.pauses.last_mut() {
                pause.1 = Some(now);
            }
            core.paused -= 1;
        }
    }

    /// Whether `incarnation` is stopped now.
    #[must_use]
    pub fn is_paused(&self, incarnation: IncarnationId) -> bool {
        self.core
            .borrow()
            .lives
            .get(&incarnation)
            .is_some_and(|life| life.paused)
    }

    /// Whether `incarnation` has crashed.
    #[must_use]
    pub fn is_dead(&self, incarnation: IncarnationId) -> bool {
        self.core
            .borrow()
            .lives
            .get(&incarnation)
            .is_none_or(|life| life.dead)
    }

    /// Whether `incarnation` was stopped at `time`, so that it could send nothing then.
    pub(in crate::testing) fn was_paused(&self, incarnation: IncarnationId, time: Timestamp) -> bool {
        let core = self.core.borrow();
        core.lives.get(&incarnation).is_some_and(|life| {
            life.pauses
                .iter()
                .any(|(from, to)| *from <= time && to.is_none_or(|to| time < to))
        })
    }

    /// The incarnations that have not crashed.
    #[must_use]
    pub fn living(&self) -> BTreeSet<IncarnationId> {
        let core = self.core.borrow();
        core.lives
            .iter()
            .filter(|(_, life)| !life.dead)
            .map(|(id, _)| *id)
            .collect()
    }
}
