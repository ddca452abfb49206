//! One io_uring per thread, shared by the thread's drives and driven inside its tokio runtime.
//!
//! Operations are put into the submission queue as they are started, without a system call; the driver, a local
//! task, then submits all of a turn with one. It sleeps in the runtime like any other task: the ring's
//! file descriptor is readable when there are completions.
//!
//! Promise: an operation, with its buffers and its file, stays here until its completion has been seen. When
//! the runtime ends, what is in flight is waited for. If the process ends instead, the kernel does that.
//!
//! COOP_TASKRUN with the ring's own descriptor was chosen over DEFER_TASKRUN with an eventfd: measured equal,
//! and the ring's descriptor never becomes readable under the latter.
#![expect(
    unsafe_code,
    reason = "entries of the submission queue point to memory, and the ring's descriptor is watched"
)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use io_uring::IoUring;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::operation::{IoVec, Operation};
use super::port::Ticket;
use crate::polling::note_activity;

/// Entries of the submission queue: what one turn submits with one system call. More are submitted with
/// several.
const SUBMISSION_ENTRIES: u32 = 256;

/// Entries of the completion queue. Overflow is kept by the kernel and costs only time.
const COMPLETION_ENTRIES: u32 = 4096;

/// See the module.
pub(super) struct Ring {
    ring: RefCell<IoUring>,
    slots: RefCell<Slots>,
    /// Slots whose entry did not fit into the submission queue yet.
    backlog: RefCell<VecDeque<usize>>,
    driver: RefCell<Option<Waker>>,
    /// The runtime is ending: nothing is started any more.
    closed: Cell<bool>,
}

/// What is with the kernel, by the `user_data` of its entry.
#[derive(Default)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

#[derive(Default)]
struct Slot {
    work: Option<(Ticket, Operation)>,
    /// Kept with the slot, so that its memory is used again.
    vectors: Vec<IoVec>,
}

impl Slots {
    fn insert(&mut self, work: (Ticket, Operation)) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        self.slots[index].work = Some(work);
        index
    }

    fn take(&mut self, index: usize) -> Option<(Ticket, Operation)> {
        let work = self.slots.get_mut(index)?.work.take()?;
        self.free.push(index);
        Some(work)
    }

    fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

thread_local! {
    static CURRENT: RefCell<Weak<Ring>> = const { RefCell::new(Weak::new()) };
}

impl Ring {
    /// The thread's ring, made when it is first needed. Must be called within the thread's `LocalSet`.
    ///
    /// # Errors
    /// Where io_uring does not exist or is not permitted.
    pub(super) fn current() -> io::Result<Rc<Self>> {
        if let Some(ring) = CURRENT
            .with_borrow(Weak::upgrade)
            .filter(|ring| !ring.closed.get())
        {
            return Ok(ring);
        }
        let ring = Rc::new(Self {
            ring: RefCell::new(build()?),
            slots: RefCell::default(),
            backlog: RefCell::default(),
            driver: RefCell::default(),
            closed: Cell::new(false),
        });
        let fd = RingFd(ring.ring.borrow().as_raw_fd());
        // SAFETY: the descriptor is the ring's own and stays open as long as the ring, of which the driver
        // holds a handle that it drops after `events`.
        let events = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        tokio::task::spawn_local(Driver {
            events,
            ring: ring.clone(),
        });
        CURRENT.set(Rc::downgrade(&ring));
        Ok(ring)
    }

    /// Takes an operation; gives the ticket back if the runtime is ending.
    pub(super) fn start(&self, ticket: Ticket, operation: Operation) -> Result<(), Box<Ticket>> {
        if self.closed.get() {
            return Err(Box::new(ticket));
        }
        let index = self.slots.borrow_mut().insert((ticket, operation));
        // Those that wait already come first.
        if !self.backlog.borrow().is_empty() || !self.push(index) {
            self.backlog.borrow_mut().push_back(index);
        }
        if let Some(driver) = self.driver.borrow_mut().take() {
            driver.wake();
        }
        Ok(())
    }

    /// Puts a slot's entry into the submission queue; `false` if it is full.
    fn push(&self, index: usize) -> bool {
        let mut ring = self.ring.borrow_mut();
        let mut slots = self.slots.borrow_mut();
        let Slot { work, vectors } = &mut slots.slots[index];
        let Some((_, operation)) = work else {
            return true;
        };
        let entry = operation.entry(vectors).user_data(index as u64);
        // SAFETY: the entry points into buffers that `operation` owns and into `vectors`. Both stay in this
        // slot, unchanged, until `reap` has seen the completion: moving the slot moves none of their memory.
        unsafe { ring.submission().push(&entry) }.is_ok()
    }

    /// Hands everything to the kernel that it takes now. `false` if it has to be tried again.
    fn submit(&self) -> bool {
        loop {
            let next = self.backlog.borrow_mut().pop_front();
            if let Some(index) = next
                && self.push(index)
            {
                continue;
            }
            let submitted = if self.has_work_for_kernel() {
                self.ring.borrow().submit()
            } else {
                Ok(0)
            };
            if let Some(index) = next {
                self.backlog.borrow_mut().push_front(index);
            }
            match submitted {
                Ok(_) if next.is_none() => return true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Out of memory for requests, or completions have to be taken first.
                Err(_) => return false,
            }
        }
    }

    /// Whether there are entries to submit, or completions that the kernel could not put into the queue and
    /// hands over only when it is entered.
    fn has_work_for_kernel(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        let submission = ring.submission();
        !submission.is_empty() || submission.cq_overflow()
    }

    /// Takes the completions that are there, and finishes their operations.
    fn reap(&self) {
        loop {
            // One at a time: finishing one may start another, which needs the ring.
            let completion = {
                let mut ring = self.ring.borrow_mut();
                ring.completion().next()
            };
            let Some(completion) = completion else {
                return;
            };
            let work = usize::try_from(completion.user_data())
                .ok()
                .and_then(|index| self.slots.borrow_mut().take(index));
            if let Some((ticket, operation)) = work {
                let result = match completion.result() {
                    negative @ ..0 => Err(Errno::from_raw_os_error(-negative)),
                    count => Ok(count as usize),
                };
                ticket.finish(operation, result);
            }
        }
    }

    /// Starts nothing any more, and waits for what is in flight.
    fn close(&self) {
        self.closed.set(true);
        // Operations that the kernel has not seen can still be seen: they were started.
        while self.slots.borrow().in_use() > 0 {
            let submitted = self.submit();
            if submitted {
                let waited = self.ring.borrow().submit_and_wait(1);
                if let Err(error) = waited
                    && !matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ResourceBusy
                    )
                {
                    // Cannot happen to a ring that works. Rather leak the buffers than free them under the
                    // kernel.
                    tracing::error!(%error, "cannot wait for drives; their buffers are leaked");
                    std::mem::forget(std::mem::take(&mut *self.slots.borrow_mut()));
                    return;
                }
            }
            self.reap();
        }
    }
}

fn build() -> io::Result<IoUring> {
    let cooperative = IoUring::builder()
        .setup_coop_taskrun()
        .setup_cqsize(COMPLETION_ENTRIES)
        .dontfork()
        .build(SUBMISSION_ENTRIES);
    match cooperative {
        // Before Linux 5.19.
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => IoUring::builder()
            .setup_cqsize(COMPLETION_ENTRIES)
            .dontfork()
            .build(SUBMISSION_ENTRIES),
        built => built,
    }
}

/// The ring's descriptor, which the [`Ring`] owns.
struct RingFd(RawFd);

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// The task that submits and reaps. Lives as long as the thread's `LocalSet`.
struct Driver {
    /// Before `ring`: the descriptor is deregistered before it is closed.
    events: AsyncFd<RingFd>,
    ring: Rc<Ring>,
}

impl Future for Driver {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let ring = &self.ring;
        loop {
            if !ring.submit() {
                // Tried again in the next turn, when completions have made room.
                context.waker().wake_by_ref();
            }
            // Some complete while they are submitted.
            ring.reap();
            match self.events.poll_read_ready(context) {
                Poll::Pending => break,
                Poll::Ready(Ok(mut ready)) => {
                    // Before the reap that follows: a completion that comes in between is announced again.
                    ready.clear_ready();
                    note_activity();
                    ring.reap();
                }
                // The runtime is shutting down, and drops this task next.
                Poll::Ready(Err(_)) => return Poll::Pending,
            }
        }
        // Finishing operations may have started others.
        if !ring.submit() {
            context.waker().wake_by_ref();
        }
        // Only now: until here, whatever is started is submitted by this very poll.
        *ring.driver.borrow_mut() = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.ring.close();
    }
}
