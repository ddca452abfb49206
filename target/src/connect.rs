//! Connect: who may join what.
//!
//! A Connect of queue 0 makes a controller; of any other queue it joins one. Both wait until what dropped
//! connections of the same host still have in a device is done (see [`crate::outstanding`]).
//!
//! NVM Express Base Specification 2.0, "Connect Command and Response".

use std::rc::Rc;
use std::time::Instant;

use weft_proto::fabrics::command::{
    CNTLID_DYNAMIC, Connect, ConnectData, FabricsCommand, InvalidConnectParameter,
};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::status::Status;
use zerocopy::FromBytes;

use crate::controller::{Controller, IoRequest, Transport, kato};
use crate::io::gather;
use crate::namespace::Association;
use crate::outstanding::CONNECT_WAIT_MAX;
use crate::registry::{Registry, Subsystem};
use crate::request::Completion;

/// A Connect that succeeded.
pub(crate) struct Connected {
    pub(crate) controller: Rc<Controller>,
    pub(crate) connect: Connect,
    pub(crate) completion: Completion,
}

/// Why a Connect failed, as the host is told.
struct Refusal {
    status: Status,
    dw0: u32,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { status, dw0: 0 }
    }
}

impl From<InvalidConnectParameter> for Refusal {
    fn from(parameter: InvalidConnectParameter) -> Self {
        Self {
            status: Status::CONNECT_INVALID_PARAMETERS.dnr(),
            dw0: parameter.to_dw0(),
        }
    }
}

/// Executes a Connect.
pub(crate) async fn connect(registry: Rc<Registry>, request: IoRequest) -> Result<Connected, Completion> {
    match try_connect(&registry, &request).await {
        Ok((controller, connect)) => {
            let cntlid = controller.association().cntlid;
            let completion = request.complete(Status::SUCCESS).with_result(u64::from(cntlid));
            Ok(Connected {
                controller,
                connect,
                completion,
            })
        }
        Err(Refusal { status, dw0 }) => {
            log_refusal(&registry, &request, status);
            Err(request.complete(status).with_result(u64::from(dw0)))
        }
    }
}

/// With the names, where the command has any.
fn log_refusal(registry: &Registry, request: &IoRequest, status: Status) {
    let names = ConnectData::read_from_bytes(&gather(&request.data))
        .ok()
        .and_then(|data| {
            Some((
                Nqn::from_field(&data.hostnqn).ok()?,
                Nqn::from_field(&data.subnqn).ok()?,
            ))
        });
    match names {
        Some((host, subsystem))
            if registry
                .refusals
                .is_news(&host, &subsystem, status, Instant::now()) =>
        {
            tracing::warn!(%status, %host, %subsystem, "connect refused; more of these within a minute are not logged");
        }
        Some(_) => tracing::debug!(%status, "connect refused"),
        None => tracing::debug!(%status, "malformed Connect refused"),
    }
}

async fn try_connect(
    registry: &Rc<Registry>,
    request: &IoRequest,
) -> Result<(Rc<Controller>, Connect), Refusal> {
    let FabricsCommand::Connect(connect) = FabricsCommand::parse(&request.sqe)? else {
        return Err(Status::COMMAND_SEQUENCE_ERROR.dnr().into());
    };
    let data =
        ConnectData::read_from_bytes(&gather(&request.data)).map_err(|_| Status::INVALID_SGL_LENGTH.dnr())?;
    let entries_max = registry.config().queue_entries_max;
    // A queue of one entry could never be used.
    if connect.sqsize_z == 0 || connect.sqsize_z >= entries_max {
        return Err(InvalidConnectParameter::SQSIZE.into());
    }
    let subnqn = Nqn::from_field(&data.subnqn).map_err(|_| InvalidConnectParameter::SUBNQN)?;
    let hostnqn = Nqn::from_field(&data.hostnqn).map_err(|_| InvalidConnectParameter::HOSTNQN)?;
    let hostid = HostId(data.hostid);
    let subsystem = if subnqn == Nqn::discovery() {
        None
    } else {
        let subsystem = registry
            .subsystem(&subnqn)
            .ok_or(InvalidConnectParameter::SUBNQN)?;
        if !subsystem.allows(&hostnqn) {
            return Err(Status::CONNECT_INVALID_HOST.dnr().into());
        }
        Some(subsystem)
    };
    let cntlid = data.cntlid.get();
    if connect.qid == 0 {
        // The dynamic model: the host takes the controller it is given.
        if cntlid != CNTLID_DYNAMIC {
            return Err(InvalidConnectParameter::CNTLID.into());
        }
        wait_for_dropped(subsystem.as_ref(), &hostnqn, hostid).await?;
        // While this waited the host may have been removed.
        if subsystem
            .as_ref()
            .is_some_and(|subsystem| !subsystem.allows(&hostnqn))
        {
            return Err(Status::CONNECT_INVALID_HOST.dnr().into());
        }
        let cntlid = registry.free_cntlid().ok_or(Status::CONNECT_CONTROLLER_BUSY)?;
        let association = Association {
            hostnqn,
            hostid,
            cntlid,
            subsystem: subnqn,
            kato: kato(connect.kato_ms),
        };
        tracing::info!(cntlid, subsystem = %association.subsystem, host = %association.hostnqn, "host connected");
        let controller = Controller::new(
            Rc::clone(registry),
            Transport::Fabrics,
            association,
            subsystem,
            Instant::now(),
        );
        registry.insert_controller(Rc::clone(&controller));
        return Ok((controller, connect));
    }
    let find = || {
        let controller = registry.controller(cntlid)?;
        let own = controller.association();
        (own.subsystem == subnqn && own.hostnqn == hostnqn && own.hostid == hostid).then_some(controller)
    };
    let controller = find().ok_or(InvalidConnectParameter::CNTLID)?;
    if controller.is_discovery() {
        return Err(InvalidConnectParameter::QID.into());
    }
    wait_for_dropped(subsystem.as_ref(), &hostnqn, hostid).await?;
    let controller = find().filter(|found| Rc::ptr_eq(found, &controller));
    let controller = controller.ok_or(InvalidConnectParameter::CNTLID)?;
    if !controller.is_ready() {
        return Err(Status::COMMAND_SEQUENCE_ERROR.into());
    }
    if connect.qid > controller.io_queues() || !controller.add_queue(connect.qid) {
        return Err(InvalidConnectParameter::QID.into());
    }
    Ok((controller, connect))
}

async fn wait_for_dropped(
    subsystem: Option<&Rc<Subsystem>>,
    hostnqn: &Nqn,
    hostid: HostId,
) -> Result<(), Refusal> {
    let Some(subsystem) = subsystem else { return Ok(()) };
    let outstanding = subsystem.outstanding(hostnqn, hostid);
    if outstanding
        .wait_until_none(tokio::time::sleep(CONNECT_WAIT_MAX))
        .await
    {
        Ok(())
    } else {
        Err(Status::CONNECT_CONTROLLER_BUSY.into())
    }
}
