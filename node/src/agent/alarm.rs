//! Deadlines of which hardly any is ever reached, behind one timer of the runtime.
//!
//! An engine waits for each read of a drive with a deadline that is seconds away, and drops the deadline when the answer comes,
//! less than a millisecond later. A timer of the runtime takes a lock and a place in a wheel for that, and a lock to give it
//! back. Here it is an entry in a table: one task sleeps until the earliest deadline that it knew, and whoever comes with a later
//! one wakes nobody. That task looks at the whole table when it wakes, once for each such sleep.
//!
//! One thread's; its tasks are of the `LocalSet` that deadlines are waited for on.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use tokio::task::AbortHandle;
use tokio::time::Instant;

/// See the module.
#[derive(Default)]
pub(crate) struct Alarm(Rc<Table>);

#[derive(Default)]
struct Table {
    entries: RefCell<Vec<Entry>>,
    /// Of entries that can be taken.
    free: RefCell<Vec<usize>>,
    /// The sleep under way: until when, and its task.
    sleep: RefCell<Option<(Instant, AbortHandle)>>,
    sleeps: Cell<u64>,
}

enum Entry {
    Free,
    Waiting(Instant, Waker),
    Due,
}

impl Alarm {
    /// Waits until then.
    pub(crate) fn at(&self, deadline: Instant) -> Deadline {
        Deadline {
            table: Rc::clone(&self.0),
            deadline,
            entry: None,
        }
    }
}

/// [`Alarm::at`]. Nobody is woken for one that was dropped.
pub(crate) struct Deadline {
    table: Rc<Table>,
    deadline: Instant,
    entry: Option<usize>,
}

impl Future for Deadline {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let Some(index) = self.entry else {
            self.entry = Some(self.table.add(self.deadline, context.waker()));
            return Poll::Pending;
        };
        let mut entries = self.table.entries.borrow_mut();
        let Entry::Waiting(_, waker) = &mut entries[index] else {
            return Poll::Ready(());
        };
        if !waker.will_wake(context.waker()) {
            let stale = std::mem::replace(waker, context.waker().clone());
            // Not under the borrow, here and below: what goes with a waker may have a deadline too.
            drop(entries);
            drop(stale);
        }
        Poll::Pending
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        if let Some(index) = self.entry {
            let _entry = std::mem::replace(&mut self.table.entries.borrow_mut()[index], Entry::Free);
            self.table.free.borrow_mut().push(index);
        }
    }
}

impl Table {
    /// Answers the index of the new entry.
    fn add(self: &Rc<Self>, deadline: Instant, waker: &Waker) -> usize {
        let entry = Entry::Waiting(deadline, waker.clone());
        let index = match self.free.borrow_mut().pop() {
            Some(index) => {
                self.entries.borrow_mut()[index] = entry;
                index
            }
            None => {
                let mut entries = self.entries.borrow_mut();
                entries.push(entry);
                entries.len() - 1
            }
        };
        let sleeps_longer = |(until, _): &(Instant, AbortHandle)| *until > deadline;
        if self.sleep.borrow().as_ref().is_none_or(sleeps_longer) {
            self.sleep_until(deadline);
        }
        index
    }

    /// Looks at the table then, instead of when it was going to be looked at.
    fn sleep_until(self: &Rc<Self>, deadline: Instant) {
        self.sleeps.set(self.sleeps.get() + 1);
        let table: Weak<Self> = Rc::downgrade(self);
        let task = tokio::task::spawn_local(async move {
            tokio::time::sleep_until(deadline).await;
            if let Some(table) = table.upgrade() {
                table.look();
            }
        });
        if let Some((_, before)) = self.sleep.replace(Some((deadline, task.abort_handle()))) {
            before.abort();
        }
    }

    /// Wakes whoever is due, and sleeps until the next one is.
    fn look(self: &Rc<Self>) {
        self.sleep.take();
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        let mut due = Vec::new();
        for entry in self.entries.borrow_mut().iter_mut() {
            match entry {
                Entry::Waiting(deadline, _) if *deadline > now => {
                    next = Some(next.map_or(*deadline, |next| next.min(*deadline)));
                }
                Entry::Waiting(..) => {
                    if let Entry::Waiting(_, waker) = std::mem::replace(entry, Entry::Due) {
                        due.push(waker);
                    }
                }
                Entry::Free | Entry::Due => {}
            }
        }
        if let Some(next) = next {
            self.sleep_until(next);
        }
        due.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use tokio::task::LocalSet;

    use super::*;

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        LocalSet::new().block_on(&runtime, test);
    }

    #[test]
    fn nobody_is_woken_early_whatever_order_deadlines_come_in() {
        run(async {
            let alarm = Alarm::default();
            let start = Instant::now();
            let wait = async |ms| {
                let deadline = start + Duration::from_millis(ms);
                alarm.at(deadline).await;
                assert!(Instant::now() >= deadline);
            };
            tokio::join!(wait(30), wait(10), wait(20), wait(10), wait(40), wait(0));
        });
    }

    #[test]
    fn deadlines_that_are_dropped_take_no_timer_and_no_place() {
        run(async {
            let alarm = Alarm::default();
            let far = Instant::now() + Duration::from_secs(3600);
            for later in 0..1000 {
                let deadline = alarm.at(far + Duration::from_micros(later));
                assert!(deadline.now_or_never().is_none());
            }
            assert_eq!(alarm.0.sleeps.get(), 1);
            assert_eq!(alarm.0.entries.borrow().len(), 1);
        });
    }
}
