//! The data thread: one `current_thread` runtime on which connections, drives and engines live.
//!
//! Others reach it by sending it work: a closure that runs there and whose answer comes back.

use futures_util::future::LocalBoxFuture;
use tokio::sync::{mpsc, oneshot};

type Work = Box<dyn FnOnce() -> LocalBoxFuture<'static, ()> + Send>;

/// A handle to the data thread. The thread ends when the last handle is gone and its work is done.
#[derive(Clone)]
pub(crate) struct DataThread {
    work: mpsc::UnboundedSender<Work>,
}

/// The data thread has ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the data thread has ended")]
pub(crate) struct Ended;

impl DataThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The operating system gives no thread or no event queue.
    pub(crate) fn spawn() -> std::io::Result<(Self, std::thread::JoinHandle<()>)> {
        let (sender, mut receiver) = mpsc::unbounded_channel::<Work>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("weft-data".to_owned()).spawn(move || {
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async move {
                while let Some(work) = receiver.recv().await {
                    tokio::task::spawn_local(work());
                }
            });
        })?;
        Ok((Self { work: sender }, thread))
    }

    /// Runs `work` on the thread and waits for its answer.
    ///
    /// # Errors
    /// [`Ended`] if the thread is gone, or ends before it has answered.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> LocalBoxFuture<'static, T> + Send + 'static,
    ) -> Result<T, Ended> {
        let (sender, receiver) = oneshot::channel();
        let work: Work = Box::new(move || {
            Box::pin(async move {
                // Whoever asked may have gone away; the work is done all the same.
                let _ = sender.send(work().await);
            })
        });
        self.work.send(work).map_err(|_| Ended)?;
        receiver.await.map_err(|_| Ended)
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[tokio::test]
    async fn work_runs_on_the_thread_and_may_keep_things_that_never_leave_it() {
        let (data, _thread) = DataThread::spawn().unwrap();
        let answer = data.call(|| Box::pin(async { *Rc::new(7) })).await.unwrap();
        assert_eq!(answer, 7);
    }
}
