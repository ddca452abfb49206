//! A drive of this server, reached without a socket: through the same reservation check as everybody. And what its server does
//! in the cluster's own name: the reservation is put in force, and what is dead is fenced.

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_block::Device;
use weft_metadata::state::map::Cluster;
use weft_proto::id::HostId;
use weft_proto::nvme::reservation::{PersistChange, RegisterAction, ReservationStatus, ReservationType};
use weft_target::reservation::table::Refused;
use weft_target::reservation::{ReservationError, ReservedNamespace};
use weft_volume::seams::{FenceError, Fencing, ReservationKey, ReservationReport};

use crate::fabric::Reach;

/// The reservation every drive of a cluster holds (design section 5).
pub const RESERVATION: ReservationType = ReservationType::WriteExclusiveAllRegistrants;

/// NVMe status "Reservation Conflict", type and code, as [`FenceError::Refused`] carries it.
pub const RESERVATION_CONFLICT: u16 = 0x083;

/// See the module.
pub struct LocalReach {
    /// The drive under its reservations.
    pub namespace: ReservedNamespace,
    /// Who this incarnation is to it.
    pub host: HostId,
}

impl Reach for LocalReach {
    fn device(&self) -> Option<Device> {
        Some(self.namespace.local(self.host))
    }
}

impl Fencing for LocalReach {
    fn register(&self, own: ReservationKey) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        let (namespace, host) = (self.namespace.clone(), self.host);
        async move {
            namespace
                .register(
                    host,
                    RegisterAction::Register,
                    false,
                    0,
                    own.0,
                    PersistChange::Keep,
                )
                .await
                .map_err(fence_error)
        }
        .boxed_local()
    }

    fn report(&self) -> LocalBoxFuture<'static, Result<ReservationReport, FenceError>> {
        let report = reservation_report(&self.namespace.report());
        async move { Ok(report) }.boxed_local()
    }

    fn preempt_and_abort(
        &self,
        own: ReservationKey,
        victim: ReservationKey,
    ) -> LocalBoxFuture<'static, Result<(), FenceError>> {
        let (namespace, host) = (self.namespace.clone(), self.host);
        async move {
            namespace
                .preempt_and_abort(host, own.0, victim.0, RESERVATION)
                .await
                .map_err(fence_error)
        }
        .boxed_local()
    }
}

/// Puts the cluster's reservation in force on a drive of this server, with the cluster's own registration, which is
/// never removed: so the reservation never lapses, whoever is preempted. `persist` is [`PersistChange::Set`] but where the table of
/// a drive has no file.
///
/// # Errors
/// Somebody else holds a reservation on the drive, or it could not be made to survive power loss.
pub async fn enforce(
    namespace: &ReservedNamespace,
    cluster: &Cluster,
    persist: PersistChange,
) -> Result<(), ReservationError> {
    let report = namespace.report();
    let (host, key) = (cluster.fencing_host_id, cluster.fencing_key);
    if !report
        .registrants
        .iter()
        .any(|found| found.hostid == host && found.key == key)
    {
        namespace
            .register(host, RegisterAction::Register, true, 0, key, persist)
            .await?;
    }
    if report.rtype != Some(RESERVATION) {
        namespace.acquire(host, key, RESERVATION).await?;
    }
    Ok(())
}

/// Fences an incarnation that has died on a drive of this server. Done when nothing of it is left in execution there.
///
/// # Errors
/// Its registration could not be removed for good.
pub async fn fence_dead(
    namespace: &ReservedNamespace,
    cluster: &Cluster,
    dead: ReservationKey,
) -> Result<(), ReservationError> {
    let report = namespace.report();
    if report.registrants.iter().any(|found| found.key == dead.0) {
        // In the cluster's own name, which is registered on every drive from its first day.
        let (host, key) = (cluster.fencing_host_id, cluster.fencing_key);
        namespace.preempt_and_abort(host, key, dead.0, RESERVATION).await
    } else {
        // Preempted by somebody else, whose command may still wait for what is in execution.
        namespace.drain_preempted().await;
        Ok(())
    }
}

/// A Reservation Report as the fencing contract has it.
#[must_use]
pub fn reservation_report(status: &ReservationStatus) -> ReservationReport {
    ReservationReport {
        in_force: status.rtype == Some(RESERVATION),
        persists: status.ptpl,
        registrants: status
            .registrants
            .iter()
            .map(|registrant| (registrant.hostid, ReservationKey(registrant.key)))
            .collect(),
    }
}

fn fence_error(error: ReservationError) -> FenceError {
    match error {
        ReservationError::Refused(Refused::Conflict) => FenceError::Refused {
            status: RESERVATION_CONFLICT,
        },
        ReservationError::Refused(_) => FenceError::NotRegistered,
        // The victim is out now and might be back after power loss: not good enough to build on.
        ReservationError::NotPersisted(reason) => {
            tracing::error!(%reason, "a drive's reservation table could not be stored");
            FenceError::Unreachable
        }
    }
}
