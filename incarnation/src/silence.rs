//! An engine that nobody should wait for: it has been without its lease for a while, so it answers nobody, and may never again.
//!
//! Whoever waits for it then is told that the outcome is unknown. That is no less than a host finds out that gives the path up by
//! itself, and it comes as safely: what is still under way takes effect before a successor serves, or never; and if this
//! engine goes on, in the order in which it arrived, so before whatever the host repeats or sends after that.

use std::cell::Cell;
use std::pin::pin;

use futures_util::future::{Either, select};
use tokio::sync::Notify;
use weft_block::BlockError;

/// See the module.
#[derive(Default)]
pub struct Silence {
    holds: Cell<bool>,
    begun: Notify,
}

impl Silence {
    /// Nobody should wait from now on.
    pub fn begin(&self) {
        self.holds.set(true);
        self.begun.notify_waiters();
    }

    /// The engine may be waited for.
    pub fn end(&self) {
        self.holds.set(false);
    }

    /// Whether nobody should wait.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.holds.get()
    }

    /// What the engine answers.
    ///
    /// # Errors
    /// Its own; [`BlockError::Unknown`] if it was silenced first.
    pub async fn or_answer<T>(
        &self,
        answer: impl Future<Output = Result<T, BlockError>>,
    ) -> Result<T, BlockError> {
        let silenced = async {
            if !self.holds.get() {
                self.begun.notified().await;
            }
        };
        match select(pin!(answer), pin!(silenced)).await {
            Either::Left((answer, _)) => answer,
            Either::Right(_) => Err(BlockError::Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use futures_util::future::{pending, ready};

    use super::*;

    #[test]
    fn who_waits_is_told_that_the_outcome_is_unknown() {
        let silence = Silence::default();
        let mut waiting = Box::pin(silence.or_answer(pending::<Result<(), _>>()));
        let mut not_yet_polled = Box::pin(silence.or_answer(pending::<Result<(), _>>()));
        assert_eq!(waiting.as_mut().now_or_never(), None);
        silence.begin();
        assert_eq!(waiting.as_mut().now_or_never(), Some(Err(BlockError::Unknown)));
        assert_eq!(
            not_yet_polled.as_mut().now_or_never(),
            Some(Err(BlockError::Unknown))
        );
        assert_eq!(
            silence.or_answer(ready(Ok(1))).now_or_never(),
            Some(Ok(1)),
            "an answer is an answer"
        );
        silence.end();
        assert_eq!(silence.or_answer(pending::<Result<(), _>>()).now_or_never(), None);
    }
}
