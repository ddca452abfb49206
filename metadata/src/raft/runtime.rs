//! The runtime that openraft is given: tokio's, on which its clock ticks less often.
//!
//! At each tick openraft looks whether a heartbeat or an election is due, in a task of its own that tells another one. It has
//! ticks a fifth of a heartbeat apart, and no setting for that; a member that has nothing to do spent more on them than on the
//! heartbeats. A tick that is slept past is left out, and so it is enough to sleep longer: the period becomes a multiple of
//! openraft's own, and each member's ticks stay where they are among those of the others, as elections need it.

use std::future::Future;
use std::io;
use std::time::Duration;

use openraft::OptionalSend;
use openraft::async_runtime::{AsyncRuntime, Instant};
use openraft_rt_tokio::TokioRuntime;

/// Added to a wait for a tick: two and a half of openraft's periods at [`super::super::service::Timing`]'s heartbeats, so
/// that every third one is taken, up to half of a period early or late.
const TICK_DELAY: Duration = Duration::from_micros(52_500);

/// A wait until a deadline nearer than this is not one for a tick: openraft collects what was written to the log for 1 µs.
/// Hardly more than that, because a clock that was woken 10 ms late is near its next deadline.
const SOON: Duration = Duration::from_micros(100);

/// When to wake whoever wants to sleep until `deadline`.
fn later<I: Instant>(now: I, deadline: I) -> I {
    if deadline > now + SOON {
        deadline + TICK_DELAY
    } else {
        deadline
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct RareTicks(TokioRuntime);

impl AsyncRuntime for RareTicks {
    type JoinError = <TokioRuntime as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <TokioRuntime as AsyncRuntime>::Sleep;
    type Instant = <TokioRuntime as AsyncRuntime>::Instant;
    type TimeoutError = <TokioRuntime as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = <TokioRuntime as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = <TokioRuntime as AsyncRuntime>::ThreadLocalRng;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = <TokioRuntime as AsyncRuntime>::Watch;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        TokioRuntime::sleep_until(later(Self::Instant::now(), deadline))
    }

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        TokioRuntime::spawn(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        TokioRuntime::sleep(duration)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(
        duration: Duration,
        future: F,
    ) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        TokioRuntime::timeout_at(deadline, future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        TokioRuntime::is_panic(join_error)
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        TokioRuntime::thread_rng()
    }

    fn new(threads: usize) -> Self {
        Self(TokioRuntime::new(threads))
    }

    fn block_on<F: Future<Output = T>, T>(&mut self, future: F) -> T {
        self.0.block_on(future)
    }

    fn spawn_blocking<F, T>(work: F) -> impl Future<Output = Result<T, io::Error>> + Send
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        TokioRuntime::spawn_blocking(work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Timing;

    /// openraft's period, by its documentation of `heartbeat_interval`.
    fn period() -> Duration {
        let heartbeat = Timing::default().heartbeat.as_millis() as u64;
        Duration::from_millis(heartbeat * 13 / 64)
    }

    /// When a clock that is woken `late` after each deadline ticks, as openraft's does: at the next multiple of its period after
    /// it was woken.
    fn ticks(late: impl Fn(u32) -> Duration, count: u32) -> Vec<Duration> {
        let start = <RareTicks as AsyncRuntime>::Instant::now();
        let mut now = start;
        let mut deadline = start + period();
        (0..count)
            .map(|tick| {
                now = later(now, deadline) + late(tick);
                let periods = (now - start).as_micros() / period().as_micros() + 1;
                deadline = start + period() * u32::try_from(periods).unwrap();
                now - start
            })
            .collect()
    }

    #[test]
    fn every_third_tick_is_taken_and_every_second_of_these_sends_a_heartbeat() {
        // Late by up to 9 ms, and differently each time.
        let ticks = ticks(|tick| Duration::from_millis(u64::from(tick * 7 % 10)), 200);
        for pair in ticks[1..].windows(2) {
            let apart = (pair[1] - pair[0]).as_millis();
            assert!((53..=73).contains(&apart), "{apart} ms apart");
        }
        let heartbeat = Timing::default().heartbeat;
        for three in ticks[1..].windows(3) {
            assert!(three[1] - three[0] < heartbeat);
            assert!(three[2] - three[0] >= heartbeat);
        }
    }

    #[test]
    fn a_clock_that_was_stopped_goes_on_where_it_would_have_been() {
        let stopped = Duration::from_secs(3);
        let late = |tick| if tick == 5 { stopped } else { Duration::ZERO };
        let ticks = ticks(late, 12);
        for pair in ticks[6..].windows(2) {
            assert_eq!(pair[1] - pair[0], period() * 3);
        }
        assert!(ticks[6] - ticks[5] <= period() * 4, "and soon");
    }

    #[test]
    fn what_waits_for_the_log_is_not_delayed() {
        let now = <RareTicks as AsyncRuntime>::Instant::now();
        let deadline = now + Duration::from_micros(1);
        assert_eq!(later(now, deadline), deadline);
    }
}
