//! Waiting within one thread: a condition that changed, and the answer to one question.
//!
//! Nothing here is `Send` and nothing can be missed: a [`Changed`] is made after its condition was looked at,
//! with no await in between.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{Either, LocalBoxFuture, select};
use weft_block::{BlockError, Io};

use crate::seams::{Env, Timestamp};

/// Wakes everyone who waits for something to change.
#[derive(Default)]
pub(crate) struct Notify {
    generation: Cell<u64>,
    wakers: RefCell<Vec<Waker>>,
}

impl Notify {
    /// Something changed.
    pub(crate) fn notify(&self) {
        self.generation.set(self.generation.get().wrapping_add(1));
        for waker in self.wakers.take() {
            waker.wake();
        }
    }

    /// Completes at the first [`Self::notify`] after this call.
    pub(crate) fn changed(self: &Rc<Self>) -> Changed {
        Changed {
            seen: self.generation.get(),
            notify: Rc::clone(self),
        }
    }
}

/// The future of [`Notify::changed`].
pub(crate) struct Changed {
    notify: Rc<Notify>,
    seen: u64,
}

impl Future for Changed {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.notify.generation.get() != self.seen {
            return Poll::Ready(());
        }
        let mut wakers = self.notify.wakers.borrow_mut();
        if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            wakers.push(context.waker().clone());
        }
        Poll::Pending
    }
}

/// An answer that is given once. The first one counts.
pub(crate) struct Reply<T> {
    value: RefCell<Option<T>>,
    given: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl<T> Default for Reply<T> {
    fn default() -> Self {
        Self {
            value: RefCell::new(None),
            given: Cell::new(false),
            waker: RefCell::new(None),
        }
    }
}

impl<T> Reply<T> {
    pub(crate) fn new() -> Rc<Self> {
        Rc::default()
    }

    /// Gives the answer unless there is one.
    pub(crate) fn give(&self, value: T) {
        if self.given.replace(true) {
            return;
        }
        *self.value.borrow_mut() = Some(value);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// The answer, or a wake-up when there is one. One waiter only.
    pub(crate) fn poll(&self, context: &mut Context<'_>) -> Poll<T> {
        match self.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                let mut waker = self.waker.borrow_mut();
                if !waker
                    .as_ref()
                    .is_some_and(|known| known.will_wake(context.waker()))
                {
                    *waker = Some(context.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    /// Waits for it. One waiter only.
    pub(crate) fn wait(self: &Rc<Self>) -> ReplyWait<T> {
        ReplyWait(Rc::clone(self))
    }
}

/// The future of [`Reply::wait`].
pub(crate) struct ReplyWait<T>(Rc<Reply<T>>);

impl<T> Future for ReplyWait<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        self.0.poll(context)
    }
}

/// Starts `work` now and lets it run to its end whatever becomes of the answer's future, as the block contract asks of
/// what changes a device. Work that needs no waiting is done when this returns.
pub(crate) fn detached<T: 'static>(
    env: &dyn Env,
    work: impl Future<Output = Result<T, BlockError>> + 'static,
) -> Io<T> {
    let mut work: LocalBoxFuture<'static, Result<T, BlockError>> = Box::pin(work);
    // The waker of this first poll wakes nobody; the task's own poll replaces it.
    match work.as_mut().now_or_never() {
        Some(output) => Io::ready(output),
        None => {
            let reply = Reply::new();
            let answer = Rc::clone(&reply);
            env.spawn(Box::pin(async move { answer.give(work.await) }));
            Io::running(reply.wait())
        }
    }
}

/// Starts `work` now; it goes on as its answer is waited for, and ends with it: for what changes nothing.
pub(crate) fn started<T: 'static>(work: impl Future<Output = Result<T, BlockError>> + 'static) -> Io<T> {
    let mut work: LocalBoxFuture<'static, Result<T, BlockError>> = Box::pin(work);
    match work.as_mut().now_or_never() {
        Some(output) => Io::ready(output),
        None => work.into(),
    }
}

/// Lets every other task that can run have its turn: for long work on devices that never make it wait.
pub(crate) async fn give_way() {
    let mut given = false;
    poll_fn(|context| {
        if std::mem::replace(&mut given, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Parts in which a wait for others is measured. A guess: after a stop of this process at least three of four are left.
const PATIENCE_PARTS: u32 = 4;

/// Time in which this process ran. A machine that stands still stops its clock of nothing: whoever was asked may have stood still
/// with it, so a part that took too long counts as one part, and blames nobody.
pub(crate) struct Patience {
    part: Duration,
    /// After the one under way.
    left: u32,
    sleep: LocalBoxFuture<'static, ()>,
}

impl Patience {
    /// For `time` from `start` on, which is now.
    pub(crate) fn new(env: &dyn Env, start: Timestamp, time: Duration) -> Self {
        let part = time / PATIENCE_PARTS;
        Self {
            part,
            left: PATIENCE_PARTS - 1,
            sleep: env.sleep_until(start.after(part)),
        }
    }

    /// Ready when it has come to its end, once.
    pub(crate) fn poll(&mut self, env: &dyn Env, context: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.sleep.as_mut().poll(context));
            if self.left == 0 {
                return Poll::Ready(());
            }
            self.left -= 1;
            self.sleep = env.sleep_until(env.now().after(self.part));
        }
    }
}

/// Completes after `time` in which this process ran, see [`Patience`].
pub(crate) async fn patience(env: &dyn Env, time: Duration) {
    let mut patience = Patience::new(env, env.now(), time);
    poll_fn(|context| patience.poll(env, context)).await;
}

/// The output of `future`, or `None` when [`patience`] for `time` ends first. The future is dropped then.
pub(crate) async fn patiently<T>(
    env: &dyn Env,
    time: Duration,
    future: impl Future<Output = T> + Unpin,
) -> Option<T> {
    match select(future, pin!(patience(env, time))).await {
        Either::Left((output, _)) => Some(output),
        Either::Right(_) => None,
    }
}

/// The output of `future`, or `None` when `deadline` comes first. The future is dropped then.
pub(crate) async fn within<T>(
    env: &dyn Env,
    deadline: Timestamp,
    future: impl Future<Output = T> + Unpin,
) -> Option<T> {
    match select(future, env.sleep_until(deadline)).await {
        Either::Left((output, _)) => Some(output),
        Either::Right(_) => None,
    }
}
