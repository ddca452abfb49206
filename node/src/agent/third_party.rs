//! A third-party NVMe/TCP namespace as a drive: proved before it is trusted.
//!
//! Safety rests on the drive refusing a preempted host. So before anything of the cluster is written there, two test
//! identifiers show that it does; a target without working reservations is refused by name, and no flag
//! overrides that. Design section 5, "Third-party drives".

use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use rand::RngCore as _;
use weft_block::label::{self, LabelError, Overwrite};
use weft_block::{BlockError, Device, Durability};
use weft_incarnation::local_drive::RESERVATION;
use weft_initiator::{ConnectOptions, Controller, HostIdentity, ReservationError};
use weft_metadata::state::command::NewDrive;
use weft_metadata::state::map::{Cluster, DriveHome};
use weft_proto::grpc::admin::ThirdParty;
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::reservation::{
    AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationStatus,
};
use weft_proto::units::Lba;

use super::local_drives::{new_label, parse_class};

/// Registrants assumed of a target that does not say: some allow 16.
const REGISTRANTS_MAX: u32 = 16;

/// Proves, labels and reserves a third-party namespace. Returns the drive as metadata is to record it.
///
/// # Errors
/// Names the target, the namespace and what it does not do. Nothing has been written then, but for a block of an
/// unlabelled drive that the proof used.
pub(crate) async fn prove(
    source: ThirdParty,
    class: &str,
    cluster: &Cluster,
    host: HostIdentity,
    force: bool,
) -> anyhow::Result<NewDrive> {
    let ThirdParty {
        address,
        subnqn,
        nsid,
        box_name,
    } = source;
    let name = format!("target {address}, subsystem {subnqn}, namespace {nsid}");
    let address: SocketAddr = address
        .parse()
        .with_context(|| format!("`{address}` is not HOST:PORT"))?;
    let subnqn: Nqn = subnqn.parse().with_context(|| format!("subsystem `{subnqn}`"))?;
    let target = Target {
        address,
        subnqn: subnqn.clone(),
        nsid,
        hostnqn: host.hostnqn,
    };
    let own = target.connect(host.hostid).await.with_context(|| name.clone())?;
    own.expect_reservations().await.with_context(|| name.clone())?;
    let found = label::read(&own.device).await;
    match &found {
        Ok(found) if !force => found
            .label
            .expect_cluster(cluster.id)
            .with_context(|| format!("{name}; use --force to overwrite it"))?,
        Ok(_) | Err(LabelError::Absent) => {}
        Err(error) if force => tracing::warn!(%error, "overwritten by force"),
        Err(error) => bail!("{name}: {error}"),
    }
    let key = cluster.fencing_key;
    own.register(key).await.with_context(|| name.clone())?;
    let report = own.acquire(key).await.with_context(|| name.clone())?;
    let proof = prove_fencing(&target, &own, key)
        .await
        .with_context(|| name.clone());
    if let Err(error) = proof {
        // Leave the drive as it was found.
        let _ = own
            .controller
            .reservation_release(nsid, ReleaseAction::Clear, RESERVATION, key)
            .await;
        return Err(error);
    }
    if !report.ptpl {
        tracing::warn!("{name}: registrations do not survive its power loss; it then counts as failed");
    }
    let label = match found {
        Ok(found) if found.label.cluster == cluster.id => found.label,
        _ => {
            let overwrite = if force {
                Overwrite::Forced
            } else {
                Overwrite::Refused
            };
            let fresh = new_label(cluster, parse_class(class)?, own.device.info().bytes())?;
            label::format(&own.device, &fresh, overwrite)
                .await
                .with_context(|| name.clone())?
                .label
        }
    };
    own.controller.disconnect().await;
    Ok(NewDrive {
        uuid: label.drive_uuid,
        name: format!("{box_name}-{nsid}"),
        home: DriveHome::ThirdParty {
            address: address.to_string(),
            subnqn,
            nsid,
            box_name,
        },
        class: label.class,
        start_mib: label.chunks_start_mib,
        end_mib: label.chunks_end_mib,
        registrants_max: REGISTRANTS_MAX,
    })
}

struct Target {
    address: SocketAddr,
    subnqn: Nqn,
    nsid: u32,
    hostnqn: Nqn,
}

/// One host's connection to the namespace.
struct Connected {
    controller: Rc<Controller>,
    device: Device,
    nsid: u32,
}

impl Target {
    async fn connect(&self, hostid: HostId) -> anyhow::Result<Connected> {
        let host = HostIdentity {
            hostnqn: self.hostnqn.clone(),
            hostid,
        };
        let controller =
            Controller::connect(ConnectOptions::new(self.address, self.subnqn.clone(), host)).await?;
        let device: Device = controller
            .namespace(self.nsid)
            .await
            .with_context(|| format!("no namespace {}", self.nsid))?;
        Ok(Connected {
            controller,
            device,
            nsid: self.nsid,
        })
    }
}

impl Connected {
    /// Refuses a target that does not even claim to have the reservation that is needed.
    async fn expect_reservations(&self) -> anyhow::Result<()> {
        let identify = self.controller.identify_namespace(self.nsid).await?;
        let needed = 1 << RESERVATION.to_wire();
        ensure!(
            self.controller.info().reservations && identify.rescap & needed != 0,
            "it does not support reservations (RESCAP {:#04x}); the cluster could not fence a failed node there",
            identify.rescap
        );
        Ok(())
    }

    async fn register(&self, key: u64) -> anyhow::Result<()> {
        let register = |persist| {
            self.controller
                .reservation_register(self.nsid, RegisterAction::Register, 0, key, true, persist)
        };
        match register(PersistChange::Set).await {
            // Not all targets can persist; what that means is said in the report.
            Err(ReservationError::Refused(_)) => register(PersistChange::Keep).await,
            answer => answer,
        }
        .context("Reservation Register")
    }

    async fn acquire(&self, key: u64) -> anyhow::Result<ReservationStatus> {
        let report = self
            .controller
            .reservation_report(self.nsid)
            .await
            .context("Reservation Report")?;
        if report.rtype != Some(RESERVATION) {
            self.controller
                .reservation_acquire(self.nsid, AcquireAction::Acquire, RESERVATION, key, 0)
                .await
                .context("Reservation Acquire (Write Exclusive - All Registrants)")?;
        }
        let report = self
            .controller
            .reservation_report(self.nsid)
            .await
            .context("Reservation Report")?;
        ensure!(
            report.rtype == Some(RESERVATION),
            "it answered Reservation Acquire with success, and its report shows {:?}",
            report.rtype
        );
        Ok(report)
    }
}

/// Two test identifiers: one is registered, writes, is preempted, and must not write any more.
async fn prove_fencing(target: &Target, own: &Connected, key: u64) -> anyhow::Result<()> {
    let victim = target
        .connect(draw_host_id())
        .await
        .context("connect as a test host")?;
    let victim_key = super::member::draw_key().0;
    let info = own.device.info();
    // The block before the last MiB: label copies are in the first and the last one, and no chunk is granted yet.
    let scratch = Lba((info.bytes() - (1 << 20)) / u64::from(info.block_bytes) - 1);
    let block = Bytes::from(vec![0; info.block_bytes as usize]);
    let write = |device: &Device| device.write(scratch, vec![block.clone()], Durability::Durable);
    let before = write(&victim.device).await;
    ensure!(
        before == Err(BlockError::ReservationConflict),
        "a host that is not registered may write there (it answered {before:?})"
    );
    victim
        .register(victim_key)
        .await
        .context("register a test host")?;
    write(&victim.device)
        .await
        .context("write as a registered test host")?;
    own.controller
        .reservation_preempt_and_abort(own.nsid, RESERVATION, key, victim_key)
        .await
        .context("Preempt and Abort of a test host")?;
    let after = write(&victim.device).await;
    ensure!(
        after == Err(BlockError::ReservationConflict),
        "a host that was preempted may still write there (it answered {after:?})"
    );
    let report = own
        .controller
        .reservation_report(own.nsid)
        .await
        .context("Reservation Report")?;
    ensure!(
        report.registrants.iter().all(|found| found.key != victim_key) && report.rtype == Some(RESERVATION),
        "Preempt and Abort left the test host registered, or ended the reservation"
    );
    victim.controller.disconnect().await;
    Ok(())
}

fn draw_host_id() -> HostId {
    let mut bytes = [0; 16];
    rand::rng().fill_bytes(&mut bytes);
    HostId(bytes)
}
