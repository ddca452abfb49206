//! The data thread: one `current_thread` runtime on which connections, drives and engines live.
//!
//! Others reach it by sending it work: a closure that runs there and whose answer comes back.

use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;
use tokio::sync::{mpsc, oneshot};
use weft_block::polling::keep_awake;

type Work<S> = Box<dyn FnOnce(Rc<S>) -> LocalBoxFuture<'static, ()> + Send>;

/// A handle to the data thread, which holds an `S`. The thread ends when the last handle is gone.
pub(crate) struct DataThread<S> {
    work: mpsc::UnboundedSender<Work<S>>,
}

impl<S> Clone for DataThread<S> {
    fn clone(&self) -> Self {
        Self {
            work: self.work.clone(),
        }
    }
}

/// The thread itself, for whoever waits for its end.
pub(crate) struct Running(JoinHandle<()>);

impl Running {
    /// Waits until the thread has ended, for `limit` at most. Returns whether it has.
    pub(crate) fn joined_within(self, limit: Duration) -> bool {
        const POLL: Duration = Duration::from_millis(1);
        let deadline = Instant::now() + limit;
        while !self.0.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
        if self.0.join().is_err() {
            tracing::error!("the data thread has panicked");
        }
        true
    }
}

/// The data thread has ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the data thread has ended")]
pub(crate) struct Ended;

impl<S: 'static> DataThread<S> {
    /// Starts the thread, which stays awake for `polling` after each activity; `make` runs on it.
    ///
    /// # Errors
    /// The operating system gives no thread or no event queue.
    pub(crate) fn spawn(
        polling: Duration,
        make: impl FnOnce() -> S + Send + 'static,
    ) -> std::io::Result<(Self, Running)> {
        let (sender, mut receiver) = mpsc::unbounded_channel::<Work<S>>();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::Builder::new()
            .name("weft-data".to_owned())
            .spawn(move || {
                let local = tokio::task::LocalSet::new();
                local.block_on(&runtime, async move {
                    tokio::task::spawn_local(keep_awake(polling));
                    let state = Rc::new(make());
                    while let Some(work) = receiver.recv().await {
                        tokio::task::spawn_local(work(state.clone()));
                    }
                });
            })?;
        Ok((Self { work: sender }, Running(thread)))
    }

    /// Runs `work` on the thread and waits for its answer.
    ///
    /// # Errors
    /// [`Ended`] if the thread is gone, or ends before it has answered.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(Rc<S>) -> LocalBoxFuture<'static, T> + Send + 'static,
    ) -> Result<T, Ended> {
        let (sender, receiver) = oneshot::channel();
        let work: Work<S> = Box::new(move |state| {
            Box::pin(async move {
                // Whoever asked may have gone away; the work is done all the same.
                let _ = sender.send(work(state).await);
            })
        });
        self.work.send(work).map_err(|_| Ended)?;
        receiver.await.map_err(|_| Ended)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn work_runs_on_the_thread_and_may_keep_things_that_never_leave_it() {
        let (data, thread) = DataThread::spawn(Duration::ZERO, || Cell::new(6)).unwrap();
        let answer = data
            .call(|state| Box::pin(async move { state.replace(state.get() + 1) }))
            .await
            .unwrap();
        assert_eq!(answer, 6);
        assert_eq!(
            data.call(|state| Box::pin(async move { state.get() }))
                .await
                .unwrap(),
            7
        );
        drop(data);
        assert!(thread.joined_within(Duration::from_secs(20)));
    }

    #[tokio::test]
    async fn a_thread_that_somebody_may_still_send_work_to_is_not_waited_for_in_vain() {
        let (_data, thread) = DataThread::spawn(Duration::ZERO, || ()).unwrap();
        assert!(!thread.joined_within(Duration::from_millis(5)));
    }
}
