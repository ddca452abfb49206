//! Admin commands about queues in memory, which only memory-based transports have (Base Specification, "Create I/O
//! Completion Queue command" and its neighbours).

use super::opcode::AdminOpcode;
use super::sqe::Sqe;

/// A queue to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateQueue {
    /// Queue Identifier.
    pub qid: u16,
    /// Entries, one-based; 1 is too few for a queue.
    pub entries: u32,
    /// Physically Contiguous.
    pub contiguous: bool,
    /// PRP Entry 1: where it is.
    pub address: u64,
}

/// A command about queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueCommand {
    /// Create I/O Submission Queue.
    CreateSubmission {
        /// The queue.
        queue: CreateQueue,
        /// Where its commands complete.
        cqid: u16,
    },
    /// Create I/O Completion Queue.
    CreateCompletion {
        /// The queue.
        queue: CreateQueue,
        /// Interrupt Vector; `None` where interrupts are not enabled.
        vector: Option<u16>,
    },
    /// Delete I/O Submission Queue.
    DeleteSubmission {
        /// Queue Identifier.
        qid: u16,
    },
    /// Delete I/O Completion Queue.
    DeleteCompletion {
        /// Queue Identifier.
        qid: u16,
    },
    /// Doorbell Buffer Config: where shadow doorbells and event indices are.
    DoorbellBuffers {
        /// PRP Entry 1: the shadow doorbells, a page.
        shadow: u64,
        /// PRP Entry 2: the event indices, a page.
        events: u64,
    },
}

impl QueueCommand {
    /// Reads a command; `None` if it is about something else.
    #[must_use]
    pub fn parse(sqe: &Sqe) -> Option<Self> {
        let (cdw10, cdw11) = (sqe.cdw10.get(), sqe.cdw11.get());
        let qid = cdw10 as u16;
        let (prp1, prp2) = sqe.prps();
        let queue = CreateQueue {
            qid,
            entries: (cdw10 >> 16) + 1,
            contiguous: cdw11 & 1 != 0,
            address: prp1,
        };
        let high = (cdw11 >> 16) as u16;
        Some(match AdminOpcode(sqe.opcode) {
            AdminOpcode::CREATE_SUBMISSION_QUEUE => Self::CreateSubmission { queue, cqid: high },
            AdminOpcode::CREATE_COMPLETION_QUEUE => Self::CreateCompletion {
                queue,
                vector: (cdw11 & 0b10 != 0).then_some(high),
            },
            AdminOpcode::DELETE_SUBMISSION_QUEUE => Self::DeleteSubmission { qid },
            AdminOpcode::DELETE_COMPLETION_QUEUE => Self::DeleteCompletion { qid },
            AdminOpcode::DOORBELL_BUFFER_CONFIG => Self::DoorbellBuffers {
                shadow: prp1,
                events: prp2,
            },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromBytes;

    use super::*;

    #[test]
    fn a_completion_queue_is_created_as_the_specification_writes_it() {
        let mut bytes = [0; 64];
        bytes[0] = 0x05;
        bytes[24..32].copy_from_slice(&[0, 0x20, 0, 0, 0, 0, 0, 0]);
        bytes[40..44].copy_from_slice(&[3, 0, 0xff, 3]);
        bytes[44..48].copy_from_slice(&[0b11, 0, 5, 0]);
        let sqe = Sqe::read_from_bytes(&bytes).unwrap();
        let queue = CreateQueue {
            qid: 3,
            entries: 1024,
            contiguous: true,
            address: 0x2000,
        };
        let created = QueueCommand::CreateCompletion {
            queue,
            vector: Some(5),
        };
        assert_eq!(QueueCommand::parse(&sqe), Some(created));
    }
}
