//! Adaptive polling: a data thread that was just busy looks for more work before it goes to sleep.
//!
//! What decides the latency of a lone command is not the work but the wake-up: tens of microseconds from a processor's
//! idle state, on both ends. So for a moment after something arrived the thread asks its event queue again and
//! again instead of waiting for it. A thread on which nothing arrives sleeps, and costs nothing; and what arrives alone, as a
//! keep-alive or a lease check does, is answered and slept after: only what came soon after something else is a sign of more.
//!
//! Polling is for a processor that nobody else wants. A thread that gives way after some looks in vain and does not get the
//! processor back at once has company, and sleeps as usual for a while: waiting for one's turn is worse than being
//! woken, and worst for those one waits for.
//!
//! Whoever receives something on a data thread calls [`note_activity`]; whoever owns the thread runs
//! [`keep_awake`] on it. Without the latter the former does nothing.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// How long a data thread stays awake after the last activity, unless it is told otherwise. Some tens of microseconds: as long
/// as the wake-up that it saves, which is what the best fixed time is at (competitive) worst twice the optimum.
pub const SPAN_DEFAULT: Duration = Duration::from_micros(50);

/// An arrival after a longer silence is alone: the thread sleeps after it as if nothing had come. A guess: a host that waits for
/// each answer is back long before, and what an idle agent does for its leases and associations comes tens of milliseconds apart.
const SILENCE: Duration = Duration::from_millis(1);

/// A turn that takes longer to come back was somebody else's. A guess: far above a system call, below a time slice.
const COMPANY: Duration = Duration::from_micros(10);

/// Looks in vain after which others are given way to. Measured: giving way takes as long as a look, and there is no need to after one
/// that found something.
const LOOKS: u32 = 4;

/// How long a thread that has company does not poll.
const REST: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Activity {
    fresh: Cell<bool>,
    polling: Cell<bool>,
    sleeper: RefCell<Option<Waker>>,
}

thread_local! {
    static ACTIVITY: Activity = Activity::default();
}

/// Something arrived on this thread: a request, an answer, a completion.
pub fn note_activity() {
    ACTIVITY.with(|activity| {
        if !activity.fresh.replace(true)
            && let Some(waker) = activity.sleeper.take()
        {
            waker.wake();
        }
    });
}

/// Whether this thread looks again and again at the moment. Whoever has a place of its own to look at, such as memory that
/// another process writes, looks there as long as this says so, yielding in between, and no longer.
#[must_use]
pub fn is_polling() -> bool {
    ACTIVITY.with(|activity| activity.polling.get())
}

/// Keeps this thread's runtime awake for `span` after each activity, for ever. A task of a `current_thread` runtime;
/// one a thread. With a `span` of zero it never polls.
pub async fn keep_awake(span: Duration) {
    if span.is_zero() {
        return std::future::pending().await;
    }
    let mut until = Instant::now();
    let mut resting_until = until;
    let mut arrived: Option<Instant> = None;
    let mut in_vain = 0;
    loop {
        let now = Instant::now();
        let fresh = ACTIVITY.with(|activity| activity.fresh.take());
        if fresh {
            let before = arrived.replace(now);
            if before.is_some_and(|before| now - before <= SILENCE) {
                until = now + span;
            }
            in_vain = 0;
        }
        let polling = now < until && now >= resting_until;
        ACTIVITY.with(|activity| activity.polling.set(polling));
        if !polling {
            activity().await;
            continue;
        }
        // The runtime looks at its event queue, without waiting, before it comes back here.
        tokio::task::yield_now().await;
        if fresh {
            continue;
        }
        in_vain += 1;
        if in_vain % LOOKS == 0 {
            let before = Instant::now();
            std::thread::yield_now();
            let after = Instant::now();
            if after - before > COMPANY {
                resting_until = after + REST;
            }
        }
    }
}

/// Waits until something arrives.
async fn activity() {
    poll_fn(|context| {
        ACTIVITY.with(|activity| {
            if activity.fresh.get() {
                return Poll::Ready(());
            }
            *activity.sleeper.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often [`keep_awake`] wants to be polled, at most `most` times, when `activities` have arrived one by one.
    fn polls(runtime: &tokio::runtime::Runtime, activities: u32, most: u32) -> u32 {
        let local = tokio::task::LocalSet::new();
        local.block_on(runtime, async move {
            let mut future = std::pin::pin!(keep_awake(Duration::from_secs(3600)));
            let mut count = 0;
            for activity in 0..=activities {
                if activity > 0 {
                    note_activity();
                }
                let last = activity == activities;
                poll_fn(|context| {
                    assert!(future.as_mut().poll(context).is_pending());
                    count += u32::from(last);
                    if last && count < most && ACTIVITY.with(|activity| activity.sleeper.borrow().is_none()) {
                        return Poll::Pending;
                    }
                    Poll::Ready(())
                })
                .await;
            }
            count
        })
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn a_thread_on_which_nothing_arrives_sleeps() {
        assert_eq!(polls(&runtime(), 0, 10), 1);
    }

    #[test]
    fn after_a_lone_activity_it_sleeps() {
        assert_eq!(polls(&runtime(), 1, 10), 1);
    }

    #[test]
    fn after_activities_in_a_row_it_looks_again_and_again() {
        // It may rest when it has company, and a slow machine may let more than the silence pass between two activities: it sleeps
        // at once then, and one of many attempts is enough.
        assert!((0..1000).any(|_| polls(&runtime(), 2, 10) > 1));
    }

    #[test]
    fn an_activity_wakes_a_sleeper_once() {
        let runtime = runtime();
        runtime.block_on(async {
            let mut future = std::pin::pin!(keep_awake(Duration::from_nanos(1)));
            let (waker, count) = futures_test_waker();
            let mut context = std::task::Context::from_waker(&waker);
            assert!(future.as_mut().poll(&mut context).is_pending());
            note_activity();
            note_activity();
            assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), 1);
        });
    }

    fn futures_test_waker() -> (Waker, std::sync::Arc<std::sync::atomic::AtomicU32>) {
        struct Count(std::sync::Arc<std::sync::atomic::AtomicU32>);
        impl std::task::Wake for Count {
            fn wake(self: std::sync::Arc<Self>) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let count = std::sync::Arc::<std::sync::atomic::AtomicU32>::default();
        (std::sync::Arc::new(Count(count.clone())).into(), count)
    }
}
