//! Admin commands: those about queues, which only a controller with queues in memory has, and the way of the others to
//! the controller model.

use std::time::Instant;

use weft_proto::fabrics::command::FabricsCommand;
use weft_proto::nvme::command::AdminCommand;
use weft_proto::nvme::feature::FeatureId;
use weft_proto::nvme::queue::{CreateQueue, QueueCommand};
use weft_proto::nvme::status::Status;

use super::{Done, Engine, Shadow, Ticket};
use crate::controller::{AdminAnswer, IoRequest};
use crate::metrics::{self, Op};
use crate::request::{Completion, Pieces};
use crate::vfio_user::function::QUEUE_ENTRIES_MAX;
use crate::vfio_user::memory::GuestMemory;
use crate::vfio_user::queue::{self, CompletionQueue, SubmissionQueue};
use crate::vfio_user::registers::Doorbell;
use crate::vfio_user::transfer::{PAGE_BYTES, Segments};

impl Engine {
    /// Starts an admin command whose data pointer has been looked at.
    pub(super) fn start_admin(
        &mut self,
        request: IoRequest,
        segments: Segments,
        memory: &GuestMemory,
        now: Instant,
    ) {
        if FabricsCommand::is_fabrics(&request.sqe) {
            return self.complete_now(0, &request, Status::INVALID_OPCODE.dnr(), memory, now);
        }
        if self.start_queue_command(&request, memory, now) {
            return;
        }
        match self.controller.handle_admin(&request) {
            AdminAnswer::Now(completion) => {
                let success = completion.status.is_success();
                metrics::command_completed(Op::Admin, success, 0, request.arrived.elapsed());
                self.answer(0, completion, segments, memory, now);
            }
            AdminAnswer::Parked => {
                metrics::command_dropped();
                if let Some(queue) = &mut self.completion[0] {
                    queue.release();
                }
            }
            AdminAnswer::Later(completion) => {
                let arrived = request.arrived;
                let ticket = Ticket {
                    life: self.life.get(),
                    sqid: 0,
                    segments,
                    bytes: 0,
                };
                self.running_on(0, 1);
                self.running.push(Box::pin(async move {
                    let completion = completion.await;
                    let success = completion.status.is_success();
                    metrics::command_completed(Op::Admin, success, 0, arrived.elapsed());
                    let finished = completion.into();
                    Done { ticket, finished }
                }));
            }
        }
    }

    /// Executes a command about queues; `false` if it is about something else.
    fn start_queue_command(&mut self, request: &IoRequest, memory: &GuestMemory, now: Instant) -> bool {
        let status = match QueueCommand::parse(&request.sqe) {
            Some(QueueCommand::CreateCompletion { queue, vector }) => {
                self.create_completion(&queue, vector, memory)
            }
            Some(QueueCommand::CreateSubmission { queue, cqid }) => {
                self.create_submission(&queue, cqid, memory)
            }
            Some(QueueCommand::DeleteCompletion { qid }) => self.delete_completion(qid),
            Some(QueueCommand::DeleteSubmission { qid }) => match self.io_submission(qid) {
                Some(queue) if queue.deleting.is_none() => {
                    queue.deleting = Some(request.cid());
                    self.break_pair(qid, memory, now);
                    self.deletion_due(qid, memory, now);
                    return true;
                }
                _ => Err(Status::INVALID_QUEUE_IDENTIFIER.dnr()),
            },
            Some(QueueCommand::DoorbellBuffers { .. }) if self.mapped.is_some() => {
                Err(Status::INVALID_OPCODE.dnr())
            }
            Some(QueueCommand::DoorbellBuffers { shadow, events }) => {
                self.configure_shadow(shadow, events, memory)
            }
            None if self.sets_number_of_queues_too_late(request) => Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
            None => return false,
        };
        let status = status.err().unwrap_or(Status::SUCCESS);
        self.complete_now(0, request, status, memory, now);
        true
    }

    /// The number of I/O queues is settled before there are any.
    fn sets_number_of_queues_too_late(&self, request: &IoRequest) -> bool {
        let sets = matches!(
            AdminCommand::parse(&request.sqe),
            Ok(AdminCommand::SetFeatures {
                fid: FeatureId::NUMBER_OF_QUEUES,
                ..
            })
        );
        sets && self.completion.iter().skip(1).any(Option::is_some)
    }

    /// Completes the deletion of a submission queue once its last command is done.
    pub(super) fn deletion_due(&mut self, sqid: u16, memory: &GuestMemory, now: Instant) {
        let Some(queue) = &self.submission[usize::from(sqid)] else {
            return;
        };
        let Some(cid) = queue.deleting.filter(|_| queue.running == 0) else {
            return;
        };
        if let Some(target) = &mut self.completion[usize::from(queue.cqid)] {
            target.submission_queues -= 1;
        }
        self.submission[usize::from(sqid)] = None;
        metrics::command_completed(Op::Admin, true, 0, std::time::Duration::ZERO);
        let completion = Completion {
            cid,
            status: Status::SUCCESS,
            result: 0,
            data: Pieces::new(),
        };
        self.answer(0, completion, Segments::default(), memory, now);
    }

    fn io_submission(&mut self, qid: u16) -> Option<&mut SubmissionQueue> {
        let queues = self.submission.get_mut(1..)?;
        queues.get_mut(usize::from(qid.checked_sub(1)?))?.as_mut()
    }

    /// Whether a new queue's identifier is one that was granted, and free.
    fn check_new(
        &self,
        queue: &CreateQueue,
        exists: impl Fn(usize) -> bool,
        memory: &GuestMemory,
        written: bool,
    ) -> Result<usize, Status> {
        let qid = usize::from(queue.qid);
        let granted = usize::from(self.controller.io_queues());
        if qid == 0 || qid > granted || qid >= self.submission.len() || exists(qid) {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.dnr());
        }
        if !(2..=QUEUE_ENTRIES_MAX).contains(&queue.entries) {
            return Err(Status::INVALID_QUEUE_SIZE.dnr());
        }
        // Contiguous queues are required (CAP.CQR).
        if !queue.contiguous {
            return Err(Status::INVALID_FIELD.dnr());
        }
        if !queue.address.is_multiple_of(PAGE_BYTES) {
            return Err(Status::INVALID_PRP_OFFSET.dnr());
        }
        let entry_bytes = if written { 16 } else { 64 };
        let bytes = queue.entries as usize * entry_bytes;
        memory
            .check(queue.address, bytes, written)
            .map_err(|_| Status::DATA_TRANSFER_ERROR.dnr())?;
        Ok(qid)
    }

    fn create_completion(
        &mut self,
        queue: &CreateQueue,
        vector: Option<u16>,
        memory: &GuestMemory,
    ) -> Result<(), Status> {
        let exists = |qid: usize| self.completion[qid].is_some();
        let qid = self.check_new(queue, exists, memory, true)?;
        // As many vectors as queues, the admin queue's included.
        if vector.is_some_and(|vector| usize::from(vector) >= self.completion.len()) {
            return Err(Status::INVALID_INTERRUPT_VECTOR.dnr());
        }
        self.completion[qid] = Some(CompletionQueue::new(queue.address, queue.entries, vector));
        self.begin_doorbell(Doorbell::Head(queue.qid));
        if let Some(shadow) = self.shadow {
            self.adopt(Doorbell::Head(queue.qid), shadow, memory);
        }
        Ok(())
    }

    fn create_submission(
        &mut self,
        queue: &CreateQueue,
        cqid: u16,
        memory: &GuestMemory,
    ) -> Result<(), Status> {
        let exists = |qid: usize| self.submission[qid].is_some();
        let qid = self.check_new(queue, exists, memory, false)?;
        let target = self
            .completion
            .get_mut(usize::from(cqid))
            .and_then(Option::as_mut);
        let Some(target) = target.filter(|_| cqid > 0) else {
            return Err(Status::COMPLETION_QUEUE_INVALID.dnr());
        };
        target.submission_queues += 1;
        self.submission[qid] = Some(SubmissionQueue::new(queue.address, queue.entries, cqid));
        self.begin_doorbell(Doorbell::Tail(queue.qid));
        if let Some(shadow) = self.shadow {
            self.adopt(Doorbell::Tail(queue.qid), shadow, memory);
        }
        Ok(())
    }

    fn delete_completion(&mut self, qid: u16) -> Result<(), Status> {
        let slot = self.completion.get_mut(usize::from(qid)).filter(|_| qid > 0);
        match slot {
            Some(slot @ Some(_)) if slot.as_ref().is_some_and(|queue| queue.submission_queues == 0) => {
                *slot = None;
                Ok(())
            }
            Some(Some(_)) => Err(Status::INVALID_QUEUE_DELETION.dnr()),
            _ => Err(Status::INVALID_QUEUE_IDENTIFIER.dnr()),
        }
    }

    fn configure_shadow(&mut self, doorbells: u64, events: u64, memory: &GuestMemory) -> Result<(), Status> {
        for page in [doorbells, events] {
            if !page.is_multiple_of(PAGE_BYTES) {
                return Err(Status::INVALID_FIELD.dnr());
            }
            // Also that sums with offsets into the page do not overflow later.
            memory
                .check(page, PAGE_BYTES as usize, true)
                .map_err(|_| Status::INVALID_FIELD.dnr())?;
        }
        let shadow = Shadow { doorbells, events };
        self.shadow = Some(shadow);
        // What was rung in registers so far is what the shadows begin with.
        for qid in 1..self.submission.len() as u16 {
            self.adopt(Doorbell::Tail(qid), shadow, memory);
            self.adopt(Doorbell::Head(qid), shadow, memory);
        }
        Ok(())
    }

    /// Makes a doorbell's shadow and event index say what is known of it.
    fn adopt(&mut self, doorbell: Doorbell, shadow: Shadow, memory: &GuestMemory) {
        let known = match doorbell {
            Doorbell::Tail(qid) => self.submission[usize::from(qid)].as_mut().map(|queue| {
                queue.event = queue.tail;
                queue.shadow = queue::Shadow::adopted(queue.tail);
                queue.tail
            }),
            Doorbell::Head(qid) => self.completion[usize::from(qid)].as_mut().map(|queue| {
                queue.shadow = queue::Shadow::adopted(queue.head);
                queue.head
            }),
        };
        if let Some(known) = known {
            // A page that went away since it was checked is met again at the next look.
            let _ = memory.store_u32(shadow.doorbells + doorbell.offset(), known);
            let _ = memory.store_u32(shadow.events + doorbell.offset(), known);
        }
    }
}
