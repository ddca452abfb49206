//! The answer of one operation.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::future::LocalBoxFuture;

use crate::BlockError;

/// The future of one operation; see the contract of the crate, point 3.
///
/// What is done when it is asked for is an answer without an allocation, and whoever passes it on can see that with
/// [`Io::take_ready`] and need not wait for it: on a device in memory that is every operation.
#[must_use = "an operation happens without it, but its answer is lost"]
pub struct Io<T>(State<T>);

enum State<T> {
    Ready(Option<Result<T, BlockError>>),
    Running(LocalBoxFuture<'static, Result<T, BlockError>>),
}

// No future is pinned inside: a running one has a box of its own.
impl<T> Unpin for Io<T> {}

impl<T> Io<T> {
    /// An operation that is over.
    pub fn ready(result: Result<T, BlockError>) -> Self {
        Self(State::Ready(Some(result)))
    }

    /// An operation whose answer `future` brings. It has been started: polling only waits for it.
    pub fn running(future: impl Future<Output = Result<T, BlockError>> + 'static) -> Self {
        Self(State::Running(Box::pin(future)))
    }

    /// Whether the operation was over when it was asked for, and its answer was not taken.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self.0, State::Ready(Some(_)))
    }

    /// The answer, if the operation was over when it was asked for.
    ///
    /// # Errors
    /// Itself, if it has to be waited for.
    pub fn take_ready(self) -> Result<Result<T, BlockError>, Self> {
        match self.0 {
            State::Ready(Some(result)) => Ok(result),
            state => Err(Self(state)),
        }
    }
}

impl<T> From<LocalBoxFuture<'static, Result<T, BlockError>>> for Io<T> {
    fn from(future: LocalBoxFuture<'static, Result<T, BlockError>>) -> Self {
        Self(State::Running(future))
    }
}

impl<T> Future for Io<T> {
    type Output = Result<T, BlockError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Ready(result) => Poll::Ready(result.take().expect("not polled after it was ready")),
            State::Running(future) => future.as_mut().poll(context),
        }
    }
}
