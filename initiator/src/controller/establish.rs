//! How a controller is made: Connect, enable, identify, and the I/O queues.
//!
//! NVM Express Base Specification 2.0, "Controller Initialization" (message-based) and "Fabrics Command Set".

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use weft_proto::fabrics::command::{CNTLID_DYNAMIC, Connect, ConnectData, FabricsCommand};
use weft_proto::fabrics::property::{Capabilities, Configuration, ControllerStatus, Property};
use weft_proto::nvme::command::{Cns, submit};
use weft_proto::nvme::feature::{AsyncEventConfig, FeatureId, NumberOfQueues};
use weft_proto::nvme::identify::{
    IDENTIFY_BYTES, IdentifyController, IdentifyControllerNvm, cmic, cntrltype, ctratt, oncs,
};
use weft_proto::nvme::sqe::Sqe;
use zerocopy::{FromBytes, IntoBytes};

use super::{Controller, ControllerInfo};
use crate::association::Association;
use crate::connection::Connection;
use crate::metrics::{self, Recorder};
use crate::options::{ConnectError, ConnectOptions};
use crate::qpair::{
    ADMIN_CAPSULE_BYTES, CloseReason, Command, Completion, Payload, QUEUE_DEPTH_MAX, QueueOptions,
    TRANSFER_BYTES_MAX,
};

/// Entries of the admin queue, zero-based: the least a controller has to take.
const ADMIN_SQSIZE_Z: u16 = 31;

/// Between two looks at CSTS.
pub(super) const READY_POLL: Duration = Duration::from_millis(5);

/// Connects, enables the controller, identifies it and opens its I/O queues. Dropped on the way, it leaves nothing behind.
pub(super) async fn establish(options: ConnectOptions) -> Result<Controller, ConnectError> {
    // Dropping the association on the way out, by an error or the timeout, closes what has been opened.
    let association = Association::new();
    let queue_options = QueueOptions {
        depth: ADMIN_SQSIZE_Z,
        digests: options.digests(),
        command_timeout: options.command_timeout,
        capsule_bytes_max: ADMIN_CAPSULE_BYTES,
    };
    let admin = open(&options, &association, queue_options).await?;
    let kato_ms = u32::try_from(options.kato.as_millis()).unwrap_or(u32::MAX);
    let connect = Connect {
        qid: 0,
        sqsize_z: ADMIN_SQSIZE_Z,
        cattr: 0,
        kato_ms,
    };
    let cntlid = fabrics_connect(&admin, connect, &options, CNTLID_DYNAMIC).await?;
    if !options.kato.is_zero() {
        association.keep_alive(admin.clone(), options.kato);
    }
    let cap = enable(&admin).await?;
    let identity = identify_controller(&admin).await?;
    if identity.ctratt.get() & ctratt::TBKAS != 0 {
        association.set_traffic_based();
    }
    let mut info = controller_info(&admin, &identity, cap, cntlid).await;

    let notices = identity.oaes.get()
        & (AsyncEventConfig::NAMESPACE_ATTRIBUTE
            | AsyncEventConfig::ANA_CHANGE
            | AsyncEventConfig::DISCOVERY_CHANGE);
    if notices != 0 {
        // Without it the host only learns of changes by errors, which it survives.
        let sqe = submit::set_features(FeatureId::ASYNC_EVENT_CONFIG, 0, notices);
        let _ = admin.submit(Command::new(sqe, Payload::None)).await;
    }
    let mut io = Vec::new();
    let discovery = identity.cntrltype == cntrltype::DISCOVERY
        || options.subnqn.as_str() == weft_proto::nqn::DISCOVERY_NQN;
    if !discovery {
        info.io_queues = ask_for_queues(&admin, options.io_queues).await?;
        let maxcmd = match identity.maxcmd.get() {
            0 => u16::MAX,
            maxcmd => maxcmd,
        };
        // One entry of a submission queue always stays empty.
        info.queue_depth = options
            .queue_depth
            .min(cap.mqes_z())
            .min(maxcmd)
            .clamp(1, QUEUE_DEPTH_MAX - 1);
        for qid in 1..=info.io_queues {
            let queue_options = QueueOptions {
                depth: info.queue_depth,
                capsule_bytes_max: info.capsule_bytes_max,
                ..queue_options
            };
            let connection = open(&options, &association, queue_options).await?;
            let connect = Connect {
                qid,
                sqsize_z: info.queue_depth,
                // Commands in flight are counted here anyway. A controller that goes along completes a read with its data, without a
                // response of its own; one that does not says so by its SQ Head Pointers, which nobody looks at.
                cattr: Connect::DISABLE_SQ_FLOW_CONTROL,
                kato_ms: 0,
            };
            fabrics_connect(&connection, connect, &options, cntlid).await?;
            io.push(connection);
        }
    }
    if notices != 0 || !discovery {
        association.listen(admin.clone());
    }
    metrics::controller_added();
    tracing::info!(address = %options.address, cntlid, io_queues = info.io_queues, "controller connected");
    Ok(Controller {
        info,
        options,
        admin,
        io,
        next_io: Cell::new(0),
        association,
        recorder: Recorder::new(),
    })
}

async fn open(
    options: &ConnectOptions,
    association: &Rc<Association>,
    queue_options: QueueOptions,
) -> Result<Rc<Connection>, ConnectError> {
    let address = options.address;
    let socket = |error: std::io::Error| ConnectError::Socket {
        address,
        kind: error.kind(),
    };
    let stream = TcpStream::connect(address).await.map_err(socket)?;
    // Batches are whole when they are written; waiting for more only adds latency.
    stream.set_nodelay(true).map_err(socket)?;
    let connection = Connection::spawn(stream, queue_options);
    association.add(connection.clone());
    Ok(connection)
}

/// A step of the set-up: a command that has to succeed.
async fn step(
    connection: &Connection,
    command: &'static str,
    sqe: Sqe,
    payload: Payload,
) -> Result<Completion, ConnectError> {
    match connection.submit(Command::new(sqe, payload)).await {
        Ok(completion) if completion.status.is_success() => Ok(completion),
        Ok(completion) => Err(ConnectError::Command {
            command,
            status: completion.status,
        }),
        Err(_) => Err(ConnectError::Closed(
            connection.closed().unwrap_or(CloseReason::PeerClosed),
        )),
    }
}

/// Fabrics Connect; answers the Controller Identifier.
async fn fabrics_connect(
    connection: &Connection,
    connect: Connect,
    options: &ConnectOptions,
    cntlid: u16,
) -> Result<u16, ConnectError> {
    /// AUTHREQ, in dword 0 of the answer: bits 17 and 18 of it ask for authentication.
    const AUTHREQ: u64 = 0b11 << 17;
    let data = ConnectData::new(
        options.host.hostid,
        cntlid,
        &options.subnqn,
        &options.host.hostnqn,
    );
    let data = Bytes::copy_from_slice(data.as_bytes());
    let sqe = FabricsCommand::Connect(connect).to_sqe();
    let completion = match step(connection, "Connect", sqe, Payload::Out(vec![data])).await {
        Err(ConnectError::Command { status, .. }) => return Err(ConnectError::Refused(status)),
        other => other?,
    };
    if completion.result & AUTHREQ != 0 {
        return Err(ConnectError::AuthenticationRequired);
    }
    Ok((completion.result & 0xffff) as u16)
}

pub(super) async fn property(
    connection: &Connection,
    property: Property,
    wide: bool,
) -> Result<u64, ConnectError> {
    let sqe = FabricsCommand::PropertyGet { property, wide }.to_sqe();
    let completion = step(connection, "Property Get", sqe, Payload::None).await?;
    Ok(if wide {
        completion.result
    } else {
        completion.result & 0xffff_ffff
    })
}

/// Enables the controller and waits until it is ready.
async fn enable(admin: &Connection) -> Result<Capabilities, ConnectError> {
    let cap = Capabilities(property(admin, Property::CAP, true).await?);
    let set = FabricsCommand::PropertySet {
        property: Property::CC,
        wide: false,
        value: u64::from(Configuration::ENABLED.0),
    };
    step(admin, "Property Set", set.to_sqe(), Payload::None).await?;
    // CAP.TO in units of 500 ms; 0 is taken as one unit, since some controllers report it.
    let patience = Duration::from_millis(500) * u32::from(cap.ready_timeout_500ms().max(1));
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let csts = ControllerStatus(property(admin, Property::CSTS, false).await? as u32);
        if csts.ready() && !csts.fatal() {
            return Ok(cap);
        }
        if csts.fatal() || tokio::time::Instant::now() >= deadline {
            return Err(ConnectError::NotReady { csts: csts.0 });
        }
        tokio::time::sleep(READY_POLL).await;
    }
}

async fn identify_controller(admin: &Connection) -> Result<IdentifyController, ConnectError> {
    const COMMAND: &str = "Identify Controller";
    let payload = Payload::In(IDENTIFY_BYTES as u32);
    let completion = step(admin, COMMAND, submit::identify(Cns::CONTROLLER, 0), payload).await?;
    IdentifyController::read_from_bytes(&completion.data)
        .map_err(|_| ConnectError::Malformed { command: COMMAND })
}

async fn controller_info(
    admin: &Connection,
    identity: &IdentifyController,
    cap: Capabilities,
    cntlid: u16,
) -> ControllerInfo {
    const VWC_PRESENT: u8 = 1;
    let transfer_bytes_max = match identity.mdts {
        0 => TRANSFER_BYTES_MAX,
        // A power of two of the smallest page.
        mdts => u64::from(cap.page_bytes_min())
            .checked_shl(u32::from(mdts))
            .filter(|bytes| *bytes > 0)
            .map_or(TRANSFER_BYTES_MAX, |bytes| {
                u32::try_from(bytes).map_or(TRANSFER_BYTES_MAX, |bytes| bytes.min(TRANSFER_BYTES_MAX))
            }),
    };
    // IOCCSZ counts 16-byte units with the entry itself. Data that does not follow it directly is not used.
    let capsule_bytes_max = if identity.icdoff.get() == 0 {
        identity.ioccsz.get().saturating_mul(16).saturating_sub(64)
    } else {
        0
    };
    let optional = |bit: u16| identity.oncs.get() & bit != 0;
    let dataset_management = optional(oncs::DATASET_MANAGEMENT);
    let (mut dsm_ranges_max, mut dsm_range_blocks_max) = (256, u32::MAX);
    if dataset_management {
        // Limits that only newer controllers have; others answer with an error, and have none.
        let sqe = submit::identify(Cns::CONTROLLER_CSI, 0);
        let command = Command::new(sqe, Payload::In(IDENTIFY_BYTES as u32));
        if let Ok(completion) = admin.submit(command).await
            && completion.status.is_success()
            && let Ok(limits) = IdentifyControllerNvm::read_from_bytes(&completion.data)
        {
            if limits.dmrl != 0 {
                dsm_ranges_max = u16::from(limits.dmrl);
            }
            if limits.dmrsl.get() != 0 {
                dsm_range_blocks_max = limits.dmrsl.get();
            }
        }
    }
    ControllerInfo {
        cntlid,
        serial: text(&identity.sn),
        model: text(&identity.mn),
        version: identity.ver.get(),
        transfer_bytes_max,
        volatile_write_cache: identity.vwc & VWC_PRESENT != 0,
        ana: identity.cmic & cmic::ANA != 0,
        write_zeroes: optional(oncs::WRITE_ZEROES),
        dataset_management,
        reservations: optional(oncs::RESERVATIONS),
        hostid_128: identity.ctratt.get() & ctratt::HOSTID_128 != 0,
        capsule_bytes_max: capsule_bytes_max.min(TRANSFER_BYTES_MAX),
        dsm_ranges_max,
        dsm_range_blocks_max,
        command_quiesce: Duration::from_millis(identity.cqt.get().into()),
        io_queues: 0,
        queue_depth: 0,
    }
}

async fn ask_for_queues(admin: &Connection, io_queues: u16) -> Result<u16, ConnectError> {
    const COMMAND: &str = "Set Features (Number of Queues)";
    let wanted = u32::from(io_queues.max(1));
    let ask = NumberOfQueues {
        submission: wanted,
        completion: wanted,
    };
    let sqe = submit::set_features(FeatureId::NUMBER_OF_QUEUES, 0, ask.to_dword());
    let completion = step(admin, COMMAND, sqe, Payload::None).await?;
    let granted = NumberOfQueues::from_dword((completion.result & 0xffff_ffff) as u32)
        .ok_or(ConnectError::Malformed { command: COMMAND })?;
    let granted = granted.submission.min(granted.completion).min(wanted);
    Ok(u16::try_from(granted).unwrap_or(u16::MAX))
}

/// A space-padded field.
fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field)
        .trim_end_matches(['\0', ' '])
        .to_owned()
}
