//! Reservation commands, typed.
//!
//! A host is known by its Host Identifier, which the association carries; keys say which registration is meant. Every
//! operation is one command and nothing is retried: whoever fences has to know what became of it.
//!
//! NVM Express Base Specification 2.0, "Reservations".

use std::time::Instant;

use bytes::Bytes;
use weft_proto::nvme::command::submit;
use weft_proto::nvme::reservation::{
    AcquireAction, AcquireData, PersistChange, RegisterAction, RegisterData, ReleaseAction, ReleaseData,
    ReservationStatus, ReservationType,
};
use weft_proto::nvme::sqe::Sqe;
use weft_proto::nvme::status::Status;
use zerocopy::IntoBytes;

use crate::controller::Controller;
use crate::qpair::{CommandError, Payload};

/// Bytes of the first Reservation Report: header and 63 registrants. A second one is sized by the first.
const REPORT_BYTES: u32 = 4096;

/// Why a reservation command did not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReservationError {
    /// Reservation Conflict: not registered, another key, or another host's reservation. For Preempt: the key to
    /// preempt is not registered.
    #[error("reservation conflict")]
    Conflict,
    /// The controller refused it in another way.
    #[error("refused: {0}")]
    Refused(Status),
    /// Not connected, or the connection ended before it was sent: nothing was done.
    #[error("not connected")]
    NotConnected,
    /// No answer: it may have been done, or may still be.
    #[error("outcome unknown")]
    Unknown,
    /// The report is cut short or says what cannot be.
    #[error("malformed reservation report")]
    Malformed,
}

impl Controller {
    /// Registers, replaces or removes this host's key on `nsid`. `current` is ignored with `ignore_existing`.
    ///
    /// # Errors
    /// [`ReservationError`]
    pub async fn reservation_register(
        &self,
        nsid: u32,
        action: RegisterAction,
        current: u64,
        new: u64,
        ignore_existing: bool,
        persist: PersistChange,
    ) -> Result<(), ReservationError> {
        let data = RegisterData {
            crkey: current.into(),
            nrkey: new.into(),
        };
        let sqe = submit::reservation_register(nsid, action, ignore_existing, persist);
        self.reservation_command(sqe, data.as_bytes()).await
    }

    /// Acquires a reservation, or preempts the registrants with key `preempted` (0 but for the preempts; with a
    /// reservation of all registrants, 0 preempts every other one).
    ///
    /// # Errors
    /// [`ReservationError`]
    pub async fn reservation_acquire(
        &self,
        nsid: u32,
        action: AcquireAction,
        rtype: ReservationType,
        current: u64,
        preempted: u64,
    ) -> Result<(), ReservationError> {
        let data = AcquireData {
            crkey: current.into(),
            prkey: preempted.into(),
        };
        let sqe = submit::reservation_acquire(nsid, action, rtype);
        self.reservation_command(sqe, data.as_bytes()).await
    }

    /// Preempt and Abort: removes the registrants with key `victim`, and completes when none of their commands is
    /// left in execution.
    ///
    /// # Errors
    /// [`ReservationError`]
    pub async fn reservation_preempt_and_abort(
        &self,
        nsid: u32,
        rtype: ReservationType,
        current: u64,
        victim: u64,
    ) -> Result<(), ReservationError> {
        self.reservation_acquire(nsid, AcquireAction::PreemptAndAbort, rtype, current, victim)
            .await
    }

    /// Releases the reservation, or clears it with every registration.
    ///
    /// # Errors
    /// [`ReservationError`]
    pub async fn reservation_release(
        &self,
        nsid: u32,
        action: ReleaseAction,
        rtype: ReservationType,
        current: u64,
    ) -> Result<(), ReservationError> {
        let data = ReleaseData {
            crkey: current.into(),
        };
        let sqe = submit::reservation_release(nsid, action, rtype);
        self.reservation_command(sqe, data.as_bytes()).await
    }

    /// Who is registered on `nsid`, and what is held.
    ///
    /// # Errors
    /// [`ReservationError`]
    pub async fn reservation_report(&self, nsid: u32) -> Result<ReservationStatus, ReservationError> {
        let mut bytes = REPORT_BYTES;
        loop {
            let payload = Payload::In(bytes);
            let outcome = self
                .submit_io(submit::reservation_report(nsid, bytes), payload, Instant::now())
                .await;
            let data = answered(outcome)?;
            let needed = ReservationStatus::bytes_needed(&data).ok_or(ReservationError::Malformed)?;
            let needed = u32::try_from(needed).map_err(|_| ReservationError::Malformed)?;
            if needed <= bytes {
                // Not all controllers send the unused end of what was asked for.
                return ReservationStatus::parse(&data).ok_or(ReservationError::Malformed);
            }
            // Registrants may be added between the two; grow for certain, and not for ever.
            bytes = needed.max(bytes * 2).next_multiple_of(4);
            if bytes > self.info().transfer_bytes_max {
                return Err(ReservationError::Malformed);
            }
        }
    }

    fn reservation_command(
        &self,
        sqe: Sqe,
        data: &[u8],
    ) -> impl Future<Output = Result<(), ReservationError>> + use<> {
        let answer = self.submit_io(
            sqe,
            Payload::Out(vec![Bytes::copy_from_slice(data)]),
            Instant::now(),
        );
        async move { answered(answer.await).map(drop) }
    }
}

fn answered(outcome: crate::reply::Outcome) -> Result<Bytes, ReservationError> {
    match outcome {
        Ok(completion) if completion.status.is_success() => Ok(completion.data),
        Ok(completion) => Err(refused(completion.status)),
        Err(CommandError::NotSent) => Err(ReservationError::NotConnected),
        Err(CommandError::Lost) => Err(ReservationError::Unknown),
    }
}

fn refused(status: Status) -> ReservationError {
    match status.code() {
        Status::RESERVATION_CONFLICT => ReservationError::Conflict,
        // The path failed, not the command.
        code if code.is_path_related() => ReservationError::Unknown,
        _ => ReservationError::Refused(status),
    }
}
