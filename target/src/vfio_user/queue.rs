//! Submission and completion queues in guest memory: where they are and how far both sides have come.
//!
//! A command is taken from a submission queue only when its completion has a place: completions never wait for the
//! host, and what is in execution is bounded by the completion queue.

use weft_proto::nvme::cqe::Cqe;
use weft_proto::nvme::status::Status;

use super::memory::{Fault, GuestMemory};
use crate::controller::IoRequest;

/// Bytes of entries.
const SQE_BYTES: u64 = 64;
const CQE_BYTES: u64 = 16;

/// What a doorbell in memory has said. A host that has rung it there counts by it alone: what it writes to the register
/// too is of some moment before, and only says that there is something new. A host that never has counts by the register.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shadow {
    value: u32,
    rung: bool,
}

impl Shadow {
    /// A doorbell that was written by this side, to what is known.
    pub(super) fn adopted(value: u32) -> Self {
        Self { value, rung: false }
    }

    /// Takes note of what is in memory; answers it if the host rang there since the last look.
    pub(super) fn look(&mut self, value: u32) -> Option<u32> {
        let rung = value != self.value;
        self.value = value;
        self.rung |= rung;
        rung.then_some(value)
    }

    /// What counts when the register was written.
    pub(super) fn counts(&self, register: u32) -> u32 {
        if self.rung { self.value } else { register }
    }
}

/// A submission queue.
pub(super) struct SubmissionQueue {
    pub(super) address: u64,
    pub(super) entries: u32,
    pub(super) cqid: u16,
    /// Up to where commands were taken.
    pub(super) head: u32,
    /// Up to where the host has put commands, as far as is known.
    pub(super) tail: u32,
    /// The event index that was told last.
    pub(super) event: u32,
    pub(super) shadow: Shadow,
    /// Commands in execution.
    pub(super) running: usize,
    /// The first half of a fused pair, which waits for the second.
    pub(super) fused: Option<IoRequest>,
    /// The command that deletes the queue, once all others are done.
    pub(super) deleting: Option<u16>,
}

impl SubmissionQueue {
    pub(super) fn new(address: u64, entries: u32, cqid: u16) -> Self {
        Self {
            address,
            entries,
            cqid,
            head: 0,
            tail: 0,
            event: 0,
            shadow: Shadow::default(),
            running: 0,
            fused: None,
            deleting: None,
        }
    }

    /// Where the next command is.
    pub(super) fn next_at(&self) -> u64 {
        self.address.wrapping_add(u64::from(self.head) * SQE_BYTES)
    }

    /// Takes the host's word on its tail; `false` if it cannot be.
    pub(super) fn set_tail(&mut self, tail: u32) -> bool {
        let valid = tail < self.entries;
        if valid {
            self.tail = tail;
        }
        valid
    }

    /// The entry before the head, or after it, around the end.
    pub(super) fn before_head(&self) -> u32 {
        self.head.checked_sub(1).unwrap_or(self.entries - 1)
    }

    pub(super) fn after_head(&self) -> u32 {
        (self.head + 1) % self.entries
    }
}

/// A completion queue.
pub(super) struct CompletionQueue {
    pub(super) address: u64,
    pub(super) entries: u32,
    pub(super) vector: Option<u16>,
    /// Up to where the host has taken completions, as far as is known.
    pub(super) head: u32,
    pub(super) shadow: Shadow,
    /// Where the next completion goes.
    tail: u32,
    phase: bool,
    /// Places for commands in execution.
    reserved: u32,
    /// Submission queues that complete here.
    pub(super) submission_queues: u32,
    /// Something was posted that the host has not been interrupted for.
    pub(super) fresh: bool,
}

impl CompletionQueue {
    pub(super) fn new(address: u64, entries: u32, vector: Option<u16>) -> Self {
        Self {
            address,
            entries,
            vector,
            head: 0,
            shadow: Shadow::default(),
            tail: 0,
            phase: true,
            reserved: 0,
            submission_queues: 0,
            fresh: false,
        }
    }

    /// Places that are neither full nor spoken for.
    pub(super) fn room(&self) -> u32 {
        (self.entries - 1).saturating_sub(self.used() + self.reserved)
    }

    /// Completions that the host has not taken.
    pub(super) fn used(&self) -> u32 {
        (self.tail + self.entries - self.head) % self.entries
    }

    /// Takes the host's word on its head; `false` if it cannot be: it took what was not there.
    pub(super) fn set_head(&mut self, head: u32) -> bool {
        let taken = (head + self.entries - self.head) % self.entries;
        let valid = head < self.entries && taken <= self.used();
        if valid {
            self.head = head;
        }
        valid
    }

    pub(super) fn before_head(&self) -> u32 {
        self.head.checked_sub(1).unwrap_or(self.entries - 1)
    }

    pub(super) fn reserve(&mut self) {
        self.reserved += 1;
    }

    /// A command that was taken will not complete for now: an event request that waits.
    pub(super) fn release(&mut self) {
        self.reserved -= 1;
    }

    /// Writes a completion to a place that was reserved. After a fault it is still reserved.
    pub(super) fn post(
        &mut self,
        memory: &GuestMemory,
        sqid: u16,
        sqhd: u32,
        cid: u16,
        status: Status,
        result: u64,
    ) -> Result<(), Fault> {
        let mut cqe = Cqe::new(cid, sqhd as u16, status, result);
        cqe.sqid = sqid.into();
        cqe.status = (cqe.status.get() | u16::from(self.phase)).into();
        let second = u64::from(cqe.sqhd.get())
            | u64::from(cqe.sqid.get()) << 16
            | u64::from(cqe.cid.get()) << 32
            | u64::from(cqe.status.get()) << 48;
        let at = self.address.wrapping_add(u64::from(self.tail) * CQE_BYTES);
        memory.store_pair(at, result, second)?;
        self.reserved -= 1;
        self.fresh = true;
        self.tail += 1;
        if self.tail == self.entries {
            self.tail = 0;
            self.phase = !self.phase;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_cannot_take_completions_that_were_not_there() {
        let mut queue = CompletionQueue::new(0, 4, None);
        assert_eq!(queue.room(), 3);
        queue.reserve();
        queue.reserve();
        assert_eq!(queue.room(), 1);
        assert!(!queue.set_head(1));
        assert!(!queue.set_head(4));
        queue.tail = 2;
        assert!(queue.set_head(2));
        assert_eq!(queue.used(), 0);
    }

    #[test]
    fn a_doorbell_in_memory_counts_once_it_was_rung_there() {
        let mut shadow = Shadow::adopted(5);
        assert_eq!(shadow.look(5), None);
        assert_eq!(shadow.counts(7), 7, "a host that rings registers only");
        assert_eq!(shadow.look(9), Some(9));
        assert_eq!(shadow.counts(7), 9, "of before the ring in memory");
        assert_eq!(shadow.look(9), None);
    }

    #[test]
    fn a_tail_outside_of_the_queue_is_refused() {
        let mut queue = SubmissionQueue::new(0, 4, 1);
        assert!(queue.set_tail(3));
        assert!(!queue.set_tail(4));
        assert_eq!((queue.tail, queue.before_head(), queue.after_head()), (3, 3, 1));
    }
}
