//! A value that changes, and those who wait for its next version. They are woken in the order in which they began to wait:
//! tokio's `watch` wakes them at random, and a simulated run would not be replayed poll by poll.

use std::cell::{Cell, Ref, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// See the module.
pub struct Published<T> {
    value: RefCell<T>,
    version: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

/// One who follows the value.
pub struct Subscriber<T> {
    published: Rc<Published<T>>,
    seen: u64,
}

impl<T> Published<T> {
    /// The first version.
    #[must_use]
    pub fn new(value: T) -> Rc<Self> {
        Rc::new(Self {
            value: RefCell::new(value),
            version: Cell::new(0),
            waiting: RefCell::default(),
        })
    }

    /// The version of now.
    pub fn borrow(&self) -> Ref<'_, T> {
        self.value.borrow()
    }

    /// The next version.
    pub fn replace(&self, value: T) {
        drop(self.value.replace(value));
        self.version.set(self.version.get() + 1);
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// A follower to whom everything is new.
    #[must_use]
    pub fn subscribe(self: &Rc<Self>) -> Subscriber<T> {
        Subscriber {
            published: Rc::clone(self),
            seen: u64::MAX,
        }
    }
}

impl<T> Subscriber<T> {
    /// The version of now, which has then been looked at.
    pub fn borrow_and_update(&mut self) -> Ref<'_, T> {
        self.seen = self.published.version.get();
        self.published.borrow()
    }

    /// Waits for a version that was not looked at.
    pub async fn changed(&self) {
        poll_fn(|context| {
            if self.published.version.get() != self.seen {
                return Poll::Ready(());
            }
            self.published.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
