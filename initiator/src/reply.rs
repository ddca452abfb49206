//! Where the answer to one command is left for whoever waits for it. One thread, one allocation.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::qpair::{CommandError, Completion};

/// How a command ended.
pub(crate) type Outcome = Result<Completion, CommandError>;

#[derive(Debug)]
enum State {
    Pending(Option<Waker>),
    Done(Outcome),
    Taken,
}

/// The queue pair's end: completed once.
#[derive(Debug)]
pub(crate) struct Reply(RefCell<State>);

impl Reply {
    /// A reply and the future that waits for it.
    pub(crate) fn new() -> (Rc<Self>, Answer) {
        let reply = Rc::new(Self(RefCell::new(State::Pending(None))));
        (reply.clone(), Answer(reply))
    }

    /// Leaves the outcome and wakes whoever waits.
    pub(crate) fn complete(&self, outcome: Outcome) {
        let before = std::mem::replace(&mut *self.0.borrow_mut(), State::Done(outcome));
        if let State::Pending(Some(waker)) = before {
            waker.wake();
        }
    }
}

/// The waiting end. Dropping it abandons the answer, never the command.
#[derive(Debug)]
pub(crate) struct Answer(Rc<Reply>);

impl Future for Answer {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let state = &mut *self.0.0.borrow_mut();
        if let State::Pending(waker) = state {
            match waker {
                Some(known) => known.clone_from(cx.waker()),
                None => *waker = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        match std::mem::replace(state, State::Taken) {
            State::Done(outcome) => Poll::Ready(outcome),
            State::Pending(_) | State::Taken => panic!("an answer was polled after it had been taken"),
        }
    }
}
