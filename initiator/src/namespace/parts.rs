//! An operation in parts: commands that have started, and what their outcomes make of the whole.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use weft_block::{BlockError, Io};
use weft_proto::nvme::status::Status;

use crate::controller::Controller;
use crate::metrics::Op;
use crate::qpair::Completion;
use crate::reply::Answer;
use crate::status::{Subject, block_error, lost};

/// Parts of one long operation that are in flight at once. A guess: enough to keep a drive busy, few enough to leave
/// room for others in the queue.
const PARTS_IN_FLIGHT: usize = 16;

/// Runs the commands that `next` starts, [`PARTS_IN_FLIGHT`] at a time, the first of them now; after an error it starts no more, and
/// waits for those that are in flight.
pub(super) fn some_at_a_time(mut next: impl FnMut() -> Option<Started> + 'static) -> Io<()> {
    let mut in_flight: VecDeque<_> = std::iter::from_fn(&mut next).take(PARTS_IN_FLIGHT).collect();
    Io::running(async move {
        let mut result = Outcomes::default();
        while let Some(part) = in_flight.pop_front() {
            result.add(part.await.map(drop));
            if result.error.is_none() {
                in_flight.extend(next());
            }
        }
        result.finish()
    })
}

/// A command on its way. Its answer is checked for success and counted when it is polled.
pub(super) struct Started {
    pub(super) answer: Answer,
    pub(super) controller: Rc<Controller>,
    pub(super) op: Op,
    pub(super) subject: Subject,
    /// Moved either way.
    pub(super) bytes: u32,
    /// The least that has to come.
    pub(super) asked: u32,
    pub(super) at: Instant,
}

impl Future for Started {
    type Output = Result<Completion, Failure>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = match ready!(Pin::new(&mut self.answer).poll(context)) {
            Ok(completion) if !completion.status.is_success() => {
                Err(Failure::Status(completion.status, self.subject))
            }
            // A read that succeeded without all of its data is no read.
            Ok(completion) if completion.data.len() < self.asked as usize => {
                Err(Failure::Block(BlockError::NotReady))
            }
            Ok(completion) => Ok(completion),
            Err(error) => Err(Failure::Block(lost(error, self.subject.effect))),
        };
        let recorder = &self.controller.recorder;
        recorder.finished(self.op, u64::from(self.bytes), self.at.elapsed(), outcome.is_ok());
        Poll::Ready(outcome)
    }
}

/// Why one command failed.
#[derive(Debug)]
pub(super) enum Failure {
    Status(Status, Subject),
    Block(BlockError),
}

impl From<Failure> for BlockError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Status(status, subject) => block_error(status, subject),
            Failure::Block(error) => error,
        }
    }
}

/// The outcome of an operation from those of its parts.
#[derive(Debug, Default)]
pub(super) struct Outcomes {
    /// Whether any part was done.
    done: bool,
    error: Option<BlockError>,
}

impl Outcomes {
    pub(super) fn add(&mut self, outcome: Result<(), Failure>) {
        match outcome.map_err(BlockError::from) {
            Ok(()) => self.done = true,
            // Unknown says the least, so it is what the whole is.
            Err(BlockError::Unknown) => self.error = Some(BlockError::Unknown),
            Err(error) => {
                self.error.get_or_insert(error);
            }
        }
    }

    pub(super) fn finish(self) -> Result<(), BlockError> {
        match self.error {
            None => Ok(()),
            // Not Ready would say that nothing was done.
            Some(BlockError::NotReady) if self.done => Err(BlockError::Unknown),
            Some(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_was_partly_done_is_not_called_undone() {
        let outcome = |parts: Vec<Result<(), BlockError>>| {
            let mut outcomes = Outcomes::default();
            for part in parts {
                outcomes.add(part.map_err(Failure::Block));
            }
            outcomes.finish()
        };
        let not_ready = || Err(BlockError::NotReady);
        assert_eq!(outcome(vec![not_ready(), not_ready()]), Err(BlockError::NotReady));
        assert_eq!(outcome(vec![Ok(()), not_ready()]), Err(BlockError::Unknown));
        assert_eq!(
            outcome(vec![Err(BlockError::CapacityExceeded), Err(BlockError::Unknown)]),
            Err(BlockError::Unknown)
        );
        assert_eq!(
            outcome(vec![Ok(()), Err(BlockError::CapacityExceeded)]),
            Err(BlockError::CapacityExceeded)
        );
    }
}
