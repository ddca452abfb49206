//! The only place where an NVMe status becomes a [`BlockError`].
//!
//! A status is a newtype over what a controller chose, so the last arm is for codes that nobody foresaw. What may
//! have happened is told as Unknown: a path-related status other than an ANA state says that the path failed, not
//! that the command did.

use weft_block::BlockError;
use weft_proto::nvme::status::Status;
use weft_proto::units::Lba;

use crate::qpair::CommandError;

/// Whether a command changes what the namespace holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It may be repeated with the same result, whatever became of it.
    None,
    /// It may have happened.
    Writes,
}

/// What an error says about, to fill in its numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject {
    pub(crate) effect: Effect,
    pub(crate) start: Lba,
    pub(crate) count: u64,
    pub(crate) blocks: u64,
    pub(crate) block_bytes: u32,
}

/// What errno an unforeseen status becomes.
const EIO: i32 = 5;
const EACCES: i32 = 13;

/// What a caller is told about `status`, which is not success.
pub(crate) fn block_error(status: Status, subject: Subject) -> BlockError {
    /// "Attempted Write to Read Only Range", of the NVM command set.
    const WRITE_TO_READ_ONLY_RANGE: Status = Status::new(1, 0x82);
    /// "Deallocated or Unwritten Logical Block".
    const DEALLOCATED_BLOCK: Status = Status::new(2, 0x87);
    match status.code() {
        Status::LBA_OUT_OF_RANGE => BlockError::OutOfRange {
            start: subject.start,
            count: subject.count,
            blocks: subject.blocks,
        },
        Status::INVALID_FIELD | Status::INVALID_SGL_LENGTH | Status::DATA_TRANSFER_ERROR => {
            BlockError::InvalidLength {
                bytes: subject.count.saturating_mul(u64::from(subject.block_bytes)),
                block_bytes: subject.block_bytes,
            }
        }
        Status::CAPACITY_EXCEEDED => BlockError::CapacityExceeded,
        Status::RESERVATION_CONFLICT | Status::ABORTED_PREEMPT => BlockError::ReservationConflict,
        Status::WRITE_PROTECTED | WRITE_TO_READ_ONLY_RANGE => BlockError::WriteProtected,
        Status::UNRECOVERED_READ_ERROR | DEALLOCATED_BLOCK => {
            BlockError::Unrecovered { start: subject.start }
        }
        Status::ACCESS_DENIED => BlockError::Os { errno: EACCES },
        Status::INVALID_NAMESPACE => BlockError::Gone,
        // The controller says that it did not begin.
        Status::ANA_INACCESSIBLE
        | Status::ANA_TRANSITION
        | Status::ANA_PERSISTENT_LOSS
        | Status::NAMESPACE_NOT_READY
        | Status::TRANSIENT_TRANSPORT_ERROR => BlockError::NotReady,
        Status::ABORT_REQUESTED
        | Status::ABORTED_SQ_DELETION
        | Status::KEEP_ALIVE_EXPIRED
        | Status::INTERNAL_PATH_ERROR
        | Status::CONTROLLER_PATH_ERROR
        | Status::HOST_PATH_ERROR
        | Status::HOST_ABORTED => unanswered(subject.effect),
        _ if status.is_path_related() => unanswered(subject.effect),
        _ => BlockError::Os { errno: EIO },
    }
}

/// What a caller is told about a command that has no answer.
pub(crate) fn lost(error: CommandError, effect: Effect) -> BlockError {
    match error {
        CommandError::NotSent => BlockError::NotReady,
        CommandError::Lost => unanswered(effect),
    }
}

fn unanswered(effect: Effect) -> BlockError {
    match effect {
        Effect::None => BlockError::NotReady,
        Effect::Writes => BlockError::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(status: Status, effect: Effect) -> BlockError {
        let subject = Subject {
            effect,
            start: Lba(8),
            count: 2,
            blocks: 9,
            block_bytes: 512,
        };
        block_error(status, subject)
    }

    #[test]
    fn a_failed_path_leaves_a_write_unknown_and_a_read_to_be_repeated() {
        for status in [
            Status::INTERNAL_PATH_ERROR,
            Status::HOST_PATH_ERROR,
            Status::new(3, 0x55),
        ] {
            assert_eq!(told(status, Effect::Writes), BlockError::Unknown);
            assert_eq!(told(status, Effect::None), BlockError::NotReady);
        }
        assert_eq!(lost(CommandError::Lost, Effect::Writes), BlockError::Unknown);
        assert_eq!(lost(CommandError::NotSent, Effect::Writes), BlockError::NotReady);
    }

    #[test]
    fn an_inaccessible_namespace_did_nothing() {
        assert_eq!(
            told(Status::ANA_INACCESSIBLE, Effect::Writes),
            BlockError::NotReady
        );
        assert_eq!(
            told(Status::ANA_TRANSITION.dnr(), Effect::Writes),
            BlockError::NotReady
        );
    }

    #[test]
    fn what_a_host_can_act_on_keeps_its_meaning() {
        let table = [
            (Status::CAPACITY_EXCEEDED.dnr(), BlockError::CapacityExceeded),
            (Status::RESERVATION_CONFLICT, BlockError::ReservationConflict),
            (Status::ABORTED_PREEMPT, BlockError::ReservationConflict),
            (Status::WRITE_PROTECTED, BlockError::WriteProtected),
            (
                Status::UNRECOVERED_READ_ERROR.dnr(),
                BlockError::Unrecovered { start: Lba(8) },
            ),
            (Status::INVALID_NAMESPACE.dnr(), BlockError::Gone),
            (Status::INTERNAL_ERROR, BlockError::Os { errno: 5 }),
            (
                Status::LBA_OUT_OF_RANGE.dnr(),
                BlockError::OutOfRange {
                    start: Lba(8),
                    count: 2,
                    blocks: 9,
                },
            ),
        ];
        for (status, error) in table {
            assert_eq!(told(status, Effect::Writes), error);
        }
    }
}
