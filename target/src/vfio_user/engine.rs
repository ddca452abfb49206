//! The queues of one controller at work: commands taken from guest memory, executed, and completed there.
//!
//! Doorbells come in two ways: written to a register, which the client passes on, or into guest memory (Doorbell Buffer
//! Config), where this side looks while it is awake, and says where it stopped looking before it sleeps.
//!
//! Guest memory that is gone is no reason to fail at once: see [`GuestMemory::settled_at`]. Until then whatever met a fault
//! waits; after it a command fails, and a queue that cannot be reached is fatal for the controller.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use weft_block::polling::note_activity;
use weft_proto::nvme::sqe::{Fuse, Sqe};
use weft_proto::nvme::status::Status;
use zerocopy::FromBytes;

use super::doorbell_page::DoorbellPage;
use super::memory::{Fault, GuestMemory};
use super::queue::{CompletionQueue, SubmissionQueue};
use super::registers::Doorbell;
use super::transfer::{Refusal, Segments, admin_bytes, io_bytes};
use crate::controller::{Controller, IoRequest};
use crate::io::{self as nvm, Finished};
use crate::metrics::{self, Op};
use crate::request::{Completion, Request, Transfer, direction};

mod admin;
mod again;
mod doorbell;

use again::{Again, is_passing};

/// Commands taken from one queue in one turn, so that other queues have theirs.
const COMMANDS_PER_TURN: u32 = 64;

/// Data of commands in execution beyond which no more are taken. As much as on a connection of NVMe/TCP.
const EXECUTING_BYTES_MAX: u64 = 8 << 20;

/// A command in execution: whose it is, and where its answer goes.
struct Ticket {
    life: u64,
    sqid: u16,
    segments: Segments,
    /// Counted against [`EXECUTING_BYTES_MAX`].
    bytes: u64,
}

/// A command that is done.
struct Done {
    ticket: Ticket,
    finished: Finished,
}

/// What became of the command at a queue's head.
enum Taken {
    /// It is on its way, or done.
    Yes,
    /// It stays where it is, for memory that may come back.
    NotYet,
}

/// Where doorbells and event indices are in guest memory.
#[derive(Clone, Copy)]
struct Shadow {
    doorbells: u64,
    events: u64,
}

/// See the module.
pub(super) struct Engine {
    controller: Rc<Controller>,
    /// By QID; the admin queue is 0.
    submission: Vec<Option<SubmissionQueue>>,
    completion: Vec<Option<CompletionQueue>>,
    shadow: Option<Shadow>,
    /// Doorbells that the client maps. Then there is no shadow.
    mapped: Option<DoorbellPage>,
    running: FuturesUnordered<LocalBoxFuture<'static, Done>>,
    /// Done, and not answered: the guest's memory may come back.
    stalled: VecDeque<Done>,
    /// Changes with every reset; shared with commands that are tried again.
    life: Rc<Cell<u64>>,
    executing_bytes: u64,
    /// No more commands are taken.
    stopped: bool,
    /// Something met a fault that may pass.
    retry_at: Option<Instant>,
}

impl Engine {
    pub(super) fn new(controller: Rc<Controller>, io_queues: u16, mapped: Option<DoorbellPage>) -> Self {
        let queues = usize::from(io_queues) + 1;
        Self {
            controller,
            submission: (0..queues).map(|_| None).collect(),
            completion: (0..queues).map(|_| None).collect(),
            shadow: None,
            mapped,
            running: FuturesUnordered::new(),
            stalled: VecDeque::new(),
            life: Rc::default(),
            executing_bytes: 0,
            stopped: true,
            retry_at: None,
        }
    }

    /// Begins a life with its admin queues.
    pub(super) fn begin(&mut self, submission: SubmissionQueue, mut completion: CompletionQueue) {
        completion.submission_queues = 1;
        self.submission[0] = Some(submission);
        self.completion[0] = Some(completion);
        self.begin_doorbell(Doorbell::Tail(0));
        self.begin_doorbell(Doorbell::Head(0));
        self.stopped = false;
    }

    /// Ends a life: queues are forgotten, and the answers of what is in execution will be.
    pub(super) fn end(&mut self) {
        self.life.set(self.life.get() + 1);
        for queue in self.submission.iter_mut().filter_map(Option::take) {
            if queue.fused.is_some() {
                metrics::command_dropped();
            }
        }
        self.completion.iter_mut().for_each(|queue| *queue = None);
        self.shadow = None;
        self.stopped = true;
        for done in self.stalled.drain(..) {
            self.executing_bytes -= done.ticket.bytes;
        }
        self.retry_at = None;
    }

    /// Takes no more commands.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
    }

    /// Whether no more commands are taken.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Whether nothing is in execution, of whichever life.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.stalled.is_empty()
    }

    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// Waits for the next command to be done, whatever its answer; `false` if there is none.
    pub(super) async fn next_done(&mut self) -> bool {
        self.running.next().await.is_some()
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.retry_at
    }

    // Turns.

    /// Answers what the device has done.
    pub(super) fn poll_running(&mut self, cx: &mut Context<'_>, memory: &GuestMemory, now: Instant) -> bool {
        let mut progress = false;
        while let Poll::Ready(Some(done)) = self.running.poll_next_unpin(cx) {
            progress = true;
            self.finish(done, memory, now);
        }
        progress
    }

    /// Takes commands and tells events.
    pub(super) fn poll_queues(&mut self, memory: &GuestMemory, now: Instant) -> bool {
        let mut progress = false;
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
        }
        for _ in 0..self.stalled.len() {
            let Some(done) = self.stalled.pop_front() else {
                break;
            };
            let waiting = self.stalled.len();
            self.finish(done, memory, now);
            progress |= self.stalled.len() == waiting;
        }
        for sqid in 0..self.submission.len() as u16 {
            progress |= self.take_commands(sqid, memory, now);
        }
        progress | self.poll_events(memory, now)
    }

    fn take_commands(&mut self, sqid: u16, memory: &GuestMemory, now: Instant) -> bool {
        let mut taken = 0;
        while taken < COMMANDS_PER_TURN && !self.stopped && self.executing_bytes <= EXECUTING_BYTES_MAX {
            let Some(queue) = &self.submission[usize::from(sqid)] else {
                break;
            };
            if queue.deleting.is_some() || queue.head == queue.tail || !self.has_room(queue.cqid, memory) {
                break;
            }
            let Some(queue) = &mut self.submission[usize::from(sqid)] else {
                break;
            };
            let mut entry = [0; 64];
            if let Err(fault) = memory.read(queue.next_at(), &mut entry) {
                self.queue_fault(fault, memory, now);
                break;
            }
            let sqe = Sqe::read_from_bytes(&entry).expect("an entry is 64 bytes");
            let head = queue.head;
            queue.head = queue.after_head();
            match self.take(sqid, sqe, memory, now) {
                Taken::Yes => taken += 1,
                Taken::NotYet => {
                    if let Some(queue) = &mut self.submission[usize::from(sqid)] {
                        queue.head = head;
                    }
                    self.wait_for_memory(memory, now);
                    break;
                }
            }
        }
        if taken > 0 {
            note_activity();
            self.trail_event(sqid, memory);
        }
        taken > 0
    }

    /// Takes one command, whose completion has a place.
    fn take(&mut self, sqid: u16, sqe: Sqe, memory: &GuestMemory, now: Instant) -> Taken {
        let admitted = (sqid > 0).then(|| self.controller.admit(&sqe)).flatten();
        let bytes = if sqid == 0 {
            admin_bytes(&sqe)
        } else {
            io_bytes(&sqe, admitted.as_ref().map(|admitted| admitted.open.info()))
        };
        let mut request = Request::new(&sqe, Vec::new(), 0, admitted, now);
        let gathered = bytes.map_err(Refusal::Status).and_then(|bytes| {
            if sqid == 0 && sqe.uses_sgl()? {
                return Err(Status::INVALID_FIELD.dnr().into());
            }
            let segments = Segments::resolve(&sqe, bytes, memory)?;
            match direction(&sqe) {
                Transfer::FromHost if bytes > 0 => request.data.push(segments.read(memory)?),
                Transfer::ToHost => request.answer_bytes_max = bytes,
                Transfer::FromHost | Transfer::None => {}
            }
            Ok(segments)
        });
        let refused = match gathered {
            Ok(segments) => {
                self.reserve(sqid);
                metrics::command_started();
                self.start(sqid, request, segments, memory, now);
                return Taken::Yes;
            }
            Err(Refusal::Fault(_)) if may_settle(memory, now) => return Taken::NotYet,
            Err(Refusal::Fault(fault)) => {
                tracing::debug!(%fault, "a data pointer to where no memory is");
                Status::DATA_TRANSFER_ERROR.dnr()
            }
            // The admin commands that the model does not know are tried by those who do.
            Err(Refusal::Status(status)) if sqid == 0 && status.code() == Status::INVALID_OPCODE => {
                self.reserve(sqid);
                metrics::command_started();
                self.start(sqid, request, Segments::default(), memory, now);
                return Taken::Yes;
            }
            Err(Refusal::Status(status)) => status,
        };
        self.reserve(sqid);
        metrics::command_started();
        self.break_pair(sqid, memory, now);
        self.complete_now(sqid, &request, refused, memory, now);
        Taken::Yes
    }

    fn start(
        &mut self,
        sqid: u16,
        request: IoRequest,
        segments: Segments,
        memory: &GuestMemory,
        now: Instant,
    ) {
        if sqid == 0 {
            return self.start_admin(request, segments, memory, now);
        }
        match request.sqe.fuse() {
            Ok(Fuse::Normal) => {
                self.break_pair(sqid, memory, now);
                self.start_io(sqid, request, segments, memory, now);
            }
            Ok(Fuse::First) => {
                self.break_pair(sqid, memory, now);
                if let Some(queue) = &mut self.submission[usize::from(sqid)] {
                    queue.fused = Some(request);
                }
            }
            Ok(Fuse::Second) => {
                let first = self.submission[usize::from(sqid)]
                    .as_mut()
                    .and_then(|queue| queue.fused.take());
                match first {
                    Some(first) => {
                        let pair = Request {
                            fused_first: Some(Box::new(first)),
                            ..request
                        };
                        self.start_io(sqid, pair, segments, memory, now);
                    }
                    None => {
                        let status = Status::ABORTED_MISSING_FUSED.dnr();
                        self.complete_now(sqid, &request, status, memory, now);
                    }
                }
            }
            Err(status) => {
                self.break_pair(sqid, memory, now);
                self.complete_now(sqid, &request, status, memory, now);
            }
        }
    }

    /// Fails the first half of a fused pair whose second did not follow.
    fn break_pair(&mut self, sqid: u16, memory: &GuestMemory, now: Instant) {
        let first = self.submission[usize::from(sqid)]
            .as_mut()
            .and_then(|queue| queue.fused.take());
        if let Some(first) = first {
            let status = Status::ABORTED_MISSING_FUSED.dnr();
            self.complete_now(sqid, &first, status, memory, now);
        }
    }

    fn start_io(
        &mut self,
        sqid: u16,
        request: IoRequest,
        segments: Segments,
        memory: &GuestMemory,
        now: Instant,
    ) {
        let bytes = u64::from(segments.bytes());
        let ticket = Ticket {
            life: self.life.get(),
            sqid,
            segments,
            bytes,
        };
        let again = Again::new(&request, Rc::clone(&self.controller), Rc::clone(&self.life));
        let attempt = match nvm::start(request, None) {
            nvm::Execution::Finished(completion) if !is_passing(&completion) => {
                self.executing_bytes += bytes;
                self.running_on(sqid, 1);
                let finished = completion.into();
                return self.finish(Done { ticket, finished }, memory, now);
            }
            attempt => attempt,
        };
        self.executing_bytes += bytes;
        self.running_on(sqid, 1);
        self.running.push(Box::pin(async move {
            let finished = match attempt {
                nvm::Execution::Finished(completion) => completion.into(),
                nvm::Execution::Running(running) => running.await,
            };
            let finished = if is_passing(&finished.completion) {
                again.until_served(finished).await
            } else {
                finished
            };
            Done { ticket, finished }
        }));
    }

    // Completions.

    /// Answers a command that is done, if its life is not over.
    fn finish(&mut self, mut done: Done, memory: &GuestMemory, now: Instant) {
        let Ticket {
            life, sqid, bytes, ..
        } = done.ticket;
        if life != self.life.get() {
            self.executing_bytes -= bytes;
            return;
        }
        let completion = &mut done.finished.completion;
        if completion.status.is_success() && !completion.data.is_empty() {
            match done.ticket.segments.write(&completion.data, memory) {
                Ok(()) => completion.data.clear(),
                Err(_) if may_settle(memory, now) => return self.stall(done, memory, now),
                Err(fault) => {
                    tracing::debug!(%fault, "no memory for an answer");
                    completion.status = Status::DATA_TRANSFER_ERROR.dnr();
                    completion.data.clear();
                }
            }
        }
        while let Some(completion) = done.finished.first.take() {
            if let Err(fault) = self.post(sqid, &completion, memory) {
                done.finished.first = Some(completion);
                return self.cannot_post(done, fault, memory, now);
            }
        }
        if let Err(fault) = self.post(sqid, &done.finished.completion, memory) {
            return self.cannot_post(done, fault, memory, now);
        }
        self.executing_bytes -= bytes;
        self.running_on(sqid, -1);
        self.deletion_due(sqid, memory, now);
    }

    fn cannot_post(&mut self, done: Done, fault: Fault, memory: &GuestMemory, now: Instant) {
        if may_settle(memory, now) {
            return self.stall(done, memory, now);
        }
        self.executing_bytes -= done.ticket.bytes;
        self.running_on(done.ticket.sqid, -1);
        self.queue_fault(fault, memory, now);
    }

    fn stall(&mut self, done: Done, memory: &GuestMemory, now: Instant) {
        self.stalled.push_back(done);
        self.wait_for_memory(memory, now);
    }

    /// Completes a command that was not executed.
    fn complete_now(
        &mut self,
        sqid: u16,
        request: &IoRequest,
        status: Status,
        memory: &GuestMemory,
        now: Instant,
    ) {
        let op = if sqid == 0 { Op::Admin } else { Op::Other };
        metrics::command_completed(op, status.is_success(), 0, request.arrived.elapsed());
        self.answer(sqid, request.complete(status), Segments::default(), memory, now);
    }

    /// Answers a command that never was with a device.
    fn answer(
        &mut self,
        sqid: u16,
        completion: Completion,
        segments: Segments,
        memory: &GuestMemory,
        now: Instant,
    ) {
        let ticket = Ticket {
            life: self.life.get(),
            sqid,
            segments,
            bytes: 0,
        };
        let finished = completion.into();
        self.running_on(sqid, 1);
        self.finish(Done { ticket, finished }, memory, now);
    }

    fn post(&mut self, sqid: u16, completion: &Completion, memory: &GuestMemory) -> Result<(), Fault> {
        // Of a queue that is gone, nobody waits for an answer.
        let Some(queue) = &self.submission[usize::from(sqid)] else {
            return Ok(());
        };
        let (cqid, sqhd) = (usize::from(queue.cqid), queue.head);
        let Some(target) = &mut self.completion[cqid] else {
            return Ok(());
        };
        let Completion {
            cid, status, result, ..
        } = *completion;
        target.post(memory, sqid, sqhd, cid, status, result)
    }

    fn running_on(&mut self, sqid: u16, change: isize) {
        if let Some(queue) = &mut self.submission[usize::from(sqid)] {
            queue.running = queue.running.saturating_add_signed(change);
        }
    }

    fn reserve(&mut self, sqid: u16) {
        if let Some(queue) = &self.submission[usize::from(sqid)]
            && let Some(target) = &mut self.completion[usize::from(queue.cqid)]
        {
            target.reserve();
        }
    }

    fn poll_events(&mut self, memory: &GuestMemory, now: Instant) -> bool {
        let mut progress = false;
        while !self.stopped && self.has_room(0, memory) {
            let Some(completion) = self.controller.poll_event() else {
                break;
            };
            self.reserve(0);
            self.answer(0, completion, Segments::default(), memory, now);
            progress = true;
        }
        progress
    }

    /// Calls `raise` for the vector of every queue with new completions.
    pub(super) fn take_fresh(&mut self, mut raise: impl FnMut(u16)) {
        for queue in self.completion.iter_mut().flatten() {
            if std::mem::take(&mut queue.fresh)
                && let Some(vector) = queue.vector
            {
                raise(vector);
            }
        }
    }

    /// Whether the host has completions to take from a queue that interrupts.
    pub(super) fn has_untaken(&self) -> bool {
        let mut queues = self.completion.iter().flatten();
        queues.any(|queue| queue.vector.is_some() && queue.used() > 0)
    }

    // Faults.

    fn wait_for_memory(&mut self, memory: &GuestMemory, now: Instant) {
        let settled = memory.settled_at().unwrap_or(now);
        // Looked at again when it has settled, and at every map that comes.
        self.retry_at = Some(settled.max(now));
    }

    /// A queue's own memory is not there.
    fn queue_fault(&mut self, fault: Fault, memory: &GuestMemory, now: Instant) {
        if may_settle(memory, now) {
            self.wait_for_memory(memory, now);
        } else {
            tracing::warn!(%fault, "a queue is where no memory is: controller fatal status");
            self.controller.set_fatal();
        }
    }
}

/// Whether a fault may pass.
fn may_settle(memory: &GuestMemory, now: Instant) -> bool {
    memory.settled_at().is_some_and(|settled| now < settled)
}
