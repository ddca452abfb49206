//! The only place where a device's error, or a reservation's, becomes an NVMe status.
//!
//! There is no `_` arm: a new variant has to choose what hosts will see. Whatever another path may serve is
//! path-related (SCT 3) and may be retried, so that a host with multipath fails over instead of failing.

use weft_block::BlockError;
use weft_proto::nvme::status::Status;

use crate::reservation::ReservationError;
use crate::reservation::table::Refused;

/// What a host is told about a device's error.
#[must_use]
pub fn of_block_error(error: &BlockError) -> Status {
    match error {
        BlockError::OutOfRange { .. } => Status::LBA_OUT_OF_RANGE.dnr(),
        BlockError::InvalidLength { .. } => Status::INVALID_FIELD.dnr(),
        BlockError::CapacityExceeded => Status::CAPACITY_EXCEEDED.dnr(),
        BlockError::Unrecovered { .. } => Status::UNRECOVERED_READ_ERROR.dnr(),
        // Without Do Not Retry, as the specification's own table of conflicts has it: the holder may release.
        BlockError::ReservationConflict => Status::RESERVATION_CONFLICT,
        // The device says that nothing was done and that a retry or another path serves it.
        BlockError::NotReady => Status::ANA_TRANSITION,
        BlockError::WriteProtected => Status::WRITE_PROTECTED.dnr(),
        // The namespace will not come back on this path; another path may have another way to it.
        BlockError::Gone => Status::INTERNAL_PATH_ERROR,
        // May have happened: a host that retries the same bytes is right in either case.
        BlockError::Unknown => Status::INTERNAL_PATH_ERROR,
        BlockError::Os { .. } => Status::INTERNAL_ERROR,
    }
}

/// What a host is told about a reservation command.
#[must_use]
pub fn of_reservation_error(error: &ReservationError) -> Status {
    match error {
        ReservationError::Refused(Refused::Conflict) => Status::RESERVATION_CONFLICT,
        ReservationError::Refused(Refused::InvalidField) => Status::INVALID_FIELD.dnr(),
        ReservationError::Refused(Refused::Full) => Status::CAPACITY_EXCEEDED.dnr(),
        ReservationError::NotPersisted(_) => Status::INTERNAL_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_path_may_serve_is_path_related_and_may_be_retried() {
        for error in [BlockError::NotReady, BlockError::Gone, BlockError::Unknown] {
            let status = of_block_error(&error);
            assert!(status.is_path_related() && !status.is_dnr(), "{error}");
        }
    }

    #[test]
    fn a_full_pool_is_told_as_such() {
        assert_eq!(
            of_block_error(&BlockError::CapacityExceeded).code(),
            Status::CAPACITY_EXCEEDED
        );
    }
}
