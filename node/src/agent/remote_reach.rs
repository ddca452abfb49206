//! A drive of another server, or of a third party, reached over NVMe/TCP.

use std::rc::Rc;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_block::Device;
use weft_incarnation::fabric::{FENCE_TIMEOUT, Reach};
use weft_incarnation::local_drive::{RESERVATION, RESERVATION_CONFLICT, reservation_report};
use weft_initiator::{RemoteDrive, ReservationError};
use weft_volume::seams::{FenceError, Fencing, ReservationKey, ReservationReport};

/// See the module.
pub(crate) struct RemoteReach(pub(crate) Rc<RemoteDrive>);

impl Reach for RemoteReach {
    fn device(&self) -> Option<Device> {
        self.0.controller().map(|_| self.0.clone() as Device)
    }
}

impl Fencing for RemoteReach {
    fn register(&self, own: ReservationKey) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        let drive = self.0.clone();
        async move {
            drive
                .reservation_register(own.0, FENCE_TIMEOUT)
                .await
                .map_err(fence_error)
        }
        .boxed_local()
    }

    fn report(&self) -> LocalBoxFuture<'static, Result<ReservationReport, FenceError>> {
        let drive = self.0.clone();
        async move {
            Ok(reservation_report(
                &drive
                    .reservation_report(FENCE_TIMEOUT)
                    .await
                    .map_err(fence_error)?,
            ))
        }
        .boxed_local()
    }

    fn preempt_and_abort(
        &self,
        own: ReservationKey,
        victim: ReservationKey,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        let drive = self.0.clone();
        async move {
            drive
                .reservation_preempt_and_abort(RESERVATION, own.0, victim.0, FENCE_TIMEOUT)
                .await
                .map_err(fence_error)
        }
        .boxed_local()
    }
}

fn fence_error(error: ReservationError) -> FenceError {
    match error {
        ReservationError::Conflict => FenceError::Refused {
            status: RESERVATION_CONFLICT,
        },
        ReservationError::Refused(status) => FenceError::Refused { status: status.0 },
        ReservationError::NotConnected | ReservationError::Unknown | ReservationError::Malformed => {
            FenceError::Unreachable
        }
    }
}
