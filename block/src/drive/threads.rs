//! Worker threads: for what io_uring cannot do, and for where it is not permitted (containers often forbid it).
//!
//! The same promise as the ring's: an operation is held until the system call has returned, and what is in
//! flight is waited for when the runtime ends.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use rustix::io::Errno;

use super::operation::Operation;
use super::port::Ticket;

/// Worker threads for each data thread. A guess: enough to keep a few drives busy, few enough to forget about.
const WORKERS: usize = 8;

type Job = (u64, Operation);
type Done = (u64, Operation, Result<usize, Errno>);

/// See the module.
pub(super) struct Threads {
    jobs: RefCell<Option<mpsc::Sender<Job>>>,
    done: mpsc::Receiver<Done>,
    tickets: RefCell<BTreeMap<u64, Ticket>>,
    next: Cell<u64>,
    wake: Arc<AtomicWaker>,
}

thread_local! {
    static CURRENT: RefCell<Weak<Threads>> = const { RefCell::new(Weak::new()) };
}

impl Threads {
    /// The workers of this thread, started when they are first needed. Must be called within the thread's
    /// `LocalSet`.
    pub(super) fn current() -> Rc<Self> {
        let current = CURRENT.with_borrow(Weak::upgrade);
        if let Some(threads) = current.filter(|threads| threads.jobs.borrow().is_some()) {
            return threads;
        }
        let (jobs, queue) = mpsc::channel::<Job>();
        let (done_sender, done) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let wake = Arc::new(AtomicWaker::new());
        for index in 0..WORKERS {
            let (queue, done, wake) = (queue.clone(), done_sender.clone(), wake.clone());
            let name = format!("drive-io-{index}");
            let spawned = std::thread::Builder::new()
                .name(name)
                .spawn(move || work(&queue, &done, &wake));
            if let Err(error) = spawned {
                // Fewer will do; with none, operations stay unanswered and the caller's deadline decides.
                tracing::error!(%error, "cannot start a worker thread for drives");
            }
        }
        let threads = Rc::new(Self {
            jobs: RefCell::new(Some(jobs)),
            done,
            tickets: RefCell::default(),
            next: Cell::new(0),
            wake,
        });
        tokio::task::spawn_local(Driver(threads.clone()));
        CURRENT.set(Rc::downgrade(&threads));
        threads
    }

    /// Takes an operation; gives the ticket back if the runtime is ending.
    pub(super) fn start(&self, ticket: Ticket, operation: Operation) -> Result<(), Box<Ticket>> {
        let jobs = self.jobs.borrow();
        let Some(jobs) = &*jobs else {
            return Err(Box::new(ticket));
        };
        let id = self.next.get();
        self.next.set(id + 1);
        if jobs.send((id, operation)).is_err() {
            return Err(Box::new(ticket));
        }
        self.tickets.borrow_mut().insert(id, ticket);
        Ok(())
    }

    fn finish(&self, (id, operation, result): Done) {
        let ticket = self.tickets.borrow_mut().remove(&id);
        if let Some(ticket) = ticket {
            ticket.finish(operation, result);
        }
    }

    /// Starts nothing any more, and waits for what is in flight.
    fn close(&self) {
        *self.jobs.borrow_mut() = None;
        // The workers end when their queue is empty, and the channel with the last of them.
        while !self.tickets.borrow().is_empty() {
            match self.done.recv() {
                Ok(done) => self.finish(done),
                Err(mpsc::RecvError) => return,
            }
        }
    }
}

fn work(queue: &Mutex<mpsc::Receiver<Job>>, done: &mpsc::Sender<Done>, wake: &AtomicWaker) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((id, mut operation)) = job else {
            return;
        };
        let result = operation.run();
        if done.send((id, operation, result)).is_err() {
            return;
        }
        wake.wake();
    }
}

/// The task that takes results. Lives as long as the thread's `LocalSet`.
struct Driver(Rc<Threads>);

impl Future for Driver {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // Registered before looking, so that a result in between wakes the task.
        self.0.wake.register(context.waker());
        while let Ok(done) = self.0.done.try_recv() {
            self.0.finish(done);
        }
        Poll::Pending
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.close();
    }
}
