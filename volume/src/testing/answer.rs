//! A value that arrives once, between a simulated device and the task that waits for it.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The giving end. Dropped without giving, it leaves the other side waiting for ever, as a lost answer does.
pub struct Giver<T>(Rc<RefCell<Slot<T>>>);

/// The waiting end. Dropped, it abandons the answer and nothing else.
pub struct Answer<T>(Rc<RefCell<Slot<T>>>);

struct Slot<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

/// Both ends.
#[must_use]
pub fn answer<T>() -> (Giver<T>, Answer<T>) {
    let slot = Rc::new(RefCell::new(Slot {
        value: None,
        waker: None,
    }));
    (Giver(Rc::clone(&slot)), Answer(slot))
}

impl<T> Giver<T> {
    /// Gives it.
    pub fn give(self, value: T) {
        let waker = {
            let mut slot = self.0.borrow_mut();
            slot.value = Some(value);
            slot.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Answer<T> {
    /// The value, if it is there.
    #[must_use]
    pub fn take(&self) -> Option<T> {
        self.0.borrow_mut().value.take()
    }

    /// Whether there is a value that was not taken.
    #[must_use]
    pub fn is_given(&self) -> bool {
        self.0.borrow().value.is_some()
    }
}

impl<T> Future for Answer<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut slot = self.0.borrow_mut();
        match slot.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                slot.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}
