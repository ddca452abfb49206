//! The queue in front of one drive: bounds what is in flight, knows the drive's health, counts.
//!
//! ```text
//!  BlockDevice call ── Operation ──▶ Port: waiting ──▶ in flight (≤ depth) ──▶ ring or worker threads
//!        ▲                                                        │
//!        └──────────────── reply ◀── finish ◀─────────────────────┘
//! ```
//!
//! Whatever happens to the caller's future, an operation that was started is finished here: only then does its
//! place in the queue free up, and only here is the drive's health decided.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use tokio::sync::{Notify, oneshot, watch};

use super::error::{Asked, GoneReason, Health, interpret};
use super::operation::{Operation, Step};
use super::ring::Ring;
use super::threads::Threads;
use crate::BlockError;
use crate::buffer::AlignedBuf;
use crate::metrics::{DriveMetrics, Op};

/// What an operation answers: the buffer of a read.
pub(super) type Answer = Result<Option<AlignedBuf>, BlockError>;

/// Who waits for an operation, and what it was, while the operation itself is with the kernel.
pub(super) struct Ticket {
    port: Rc<Port>,
    reply: oneshot::Sender<Answer>,
    asked: Asked,
    op: Op,
    bytes: u64,
    started: Instant,
}

impl Ticket {
    /// Takes the kernel's answer in, and starts the rest of the operation or the next one.
    pub(super) fn finish(self, operation: Operation, result: Result<usize, rustix::io::Errno>) {
        let port = self.port.clone();
        port.finish(self, operation, result);
    }
}

/// Who does the work.
#[derive(Clone)]
pub(super) enum Backend {
    Ring(Rc<Ring>),
    Threads(Rc<Threads>),
}

/// See the module.
pub(super) struct Port {
    backend: Backend,
    /// Operations in flight at most.
    depth: usize,
    /// Alignment of direct I/O on this drive.
    align: usize,
    in_flight: Cell<usize>,
    waiting: RefCell<VecDeque<(Ticket, Operation)>>,
    health: watch::Sender<Health>,
    /// Told when nothing is in flight any more.
    idle: Notify,
    metrics: DriveMetrics,
}

impl Port {
    pub(super) fn new(backend: Backend, depth: usize, align: usize, metrics: DriveMetrics) -> Rc<Self> {
        Rc::new(Self {
            backend,
            depth: depth.max(1),
            align,
            in_flight: Cell::new(0),
            waiting: RefCell::default(),
            health: watch::Sender::new(Health::Good),
            idle: Notify::new(),
            metrics,
        })
    }

    pub(super) fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    pub(super) fn check(&self) -> Result<(), BlockError> {
        match *self.health.borrow() {
            Health::Good => Ok(()),
            Health::Gone(_) => Err(BlockError::Gone),
        }
    }

    /// From now on the drive is gone. The first reason stays.
    pub(super) fn condemn(&self, reason: GoneReason) {
        let changed = self.health.send_if_modified(|health| match health {
            Health::Good => {
                *health = Health::Gone(reason);
                true
            }
            Health::Gone(_) => false,
        });
        if changed {
            self.metrics.gone();
            tracing::error!(drive = self.metrics.drive(), %reason, "drive is gone");
        }
    }

    /// Starts an operation, or queues it behind those in flight.
    pub(super) fn start(
        self: &Rc<Self>,
        operation: Operation,
        asked: Asked,
        op: Op,
        bytes: u64,
    ) -> oneshot::Receiver<Answer> {
        let (reply, answer) = oneshot::channel();
        let ticket = Ticket {
            port: self.clone(),
            reply,
            asked,
            op,
            bytes,
            started: Instant::now(),
        };
        self.waiting.borrow_mut().push_back((ticket, operation));
        self.pump();
        answer
    }

    /// Waits until nothing is in flight or waiting.
    pub(super) async fn drained(&self) {
        loop {
            let idle = self.idle.notified();
            if self.in_flight.get() == 0 && self.waiting.borrow().is_empty() {
                return;
            }
            idle.await;
        }
    }

    pub(super) fn uses_threads(&self) -> bool {
        matches!(self.backend, Backend::Threads(_))
    }

    /// Which ring it uses, if it uses one.
    #[cfg(test)]
    pub(super) fn ring_address(&self) -> Option<*const Ring> {
        match &self.backend {
            Backend::Ring(ring) => Some(Rc::as_ptr(ring)),
            Backend::Threads(_) => None,
        }
    }

    fn pump(self: &Rc<Self>) {
        while self.in_flight.get() < self.depth {
            let Some((ticket, operation)) = self.waiting.borrow_mut().pop_front() else {
                break;
            };
            // A drive that went while this one waited gets no more work.
            if let Err(gone) = self.check() {
                self.answer(ticket, Err(gone));
                continue;
            }
            match self.submit(ticket, operation) {
                Ok(()) => self.in_flight.set(self.in_flight.get() + 1),
                // The runtime of this thread is ending. Nothing was done.
                Err(ticket) => self.answer(*ticket, Err(BlockError::NotReady)),
            }
        }
        self.metrics.in_flight(self.in_flight.get());
        if self.in_flight.get() == 0 {
            self.idle.notify_waiters();
        }
    }

    fn submit(&self, ticket: Ticket, operation: Operation) -> Result<(), Box<Ticket>> {
        match &self.backend {
            Backend::Ring(ring) if !operation.needs_thread() => ring.start(ticket, operation),
            Backend::Ring(_) => Threads::current().start(ticket, operation),
            Backend::Threads(threads) => threads.start(ticket, operation),
        }
    }

    fn finish(
        self: &Rc<Self>,
        ticket: Ticket,
        mut operation: Operation,
        result: Result<usize, rustix::io::Errno>,
    ) {
        let (ticket, answer) = match operation.advance(result, self.align) {
            Step::Done => (ticket, Ok(operation.into_buffer())),
            // Keeps its place in the queue.
            Step::Again => match self.submit(ticket, operation) {
                Ok(()) => return,
                // The runtime is ending, and part of it may have been done.
                Err(ticket) => (*ticket, Err(BlockError::Unknown)),
            },
            Step::Failed(errno) => {
                let (error, gone) = interpret(errno, ticket.asked);
                if let Some(reason) = gone {
                    self.condemn(reason);
                }
                (ticket, Err(error))
            }
            // Ranges were checked against the size at opening, so the file has shrunk. The health check
            // finds it too; this is sooner.
            Step::Ended => {
                let (bytes, expected) = operation.reached();
                self.condemn(GoneReason::Shrunk { expected, bytes });
                (ticket, Err(BlockError::Gone))
            }
        };
        self.in_flight.set(self.in_flight.get() - 1);
        self.answer(ticket, answer);
        self.pump();
    }

    fn answer(&self, ticket: Ticket, answer: Answer) {
        let elapsed = ticket.started.elapsed();
        self.metrics
            .record(ticket.op, ticket.bytes, elapsed, answer.is_ok());
        // Nobody may be waiting any more: a dropped future abandons the answer only.
        let _ = ticket.reply.send(answer);
    }
}
