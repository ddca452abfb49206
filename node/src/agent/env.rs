//! The engine's clock, timers, tasks and randomness, as tokio's `current_thread` runtime gives them.

use std::cell::RefCell;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use rand::rngs::SmallRng;
use rand::{RngCore as _, SeedableRng as _};
use tokio::time::Instant;
use weft_volume::seams::{Env, Timestamp};

use super::alarm::Alarm;

/// Of one data thread. Tasks are spawned on that thread's `LocalSet`.
pub(crate) struct TokioEnv {
    origin: Instant,
    alarm: Alarm,
    random: RefCell<SmallRng>,
}

impl TokioEnv {
    /// Timestamps count from now.
    pub(crate) fn new() -> Self {
        Self {
            origin: Instant::now(),
            alarm: Alarm::default(),
            random: RefCell::new(SmallRng::from_os_rng()),
        }
    }
}

impl Env for TokioEnv {
    fn now(&self) -> Timestamp {
        Timestamp(0).after(self.origin.elapsed())
    }

    fn sleep_until(&self, deadline: Timestamp) -> LocalBoxFuture<'static, ()> {
        self.alarm
            .at(self.origin + Duration::from_nanos(deadline.0))
            .boxed_local()
    }

    fn spawn(&self, task: LocalBoxFuture<'static, ()>) {
        tokio::task::spawn_local(task);
    }

    fn random_u64(&self) -> u64 {
        self.random.borrow_mut().next_u64()
    }
}
