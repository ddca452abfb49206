//! A controller, as a host holds it: made by Connect, enabled, identified, kept alive.
//!
//! It lives until its association ends, which [`Controller::closed`] tells, or until the last handle of it and of its
//! namespaces is dropped. It never reconnects: [`crate::RemoteDrive`] and [`crate::Multipath`] make a new one.
//!
//! NVM Express Base Specification 2.0, "Controller Initialization" (message-based) and "Fabrics Command Set".

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;
use weft_proto::fabrics::command::{CNTLID_DYNAMIC, Connect, ConnectData, FabricsCommand};
use weft_proto::fabrics::property::{Capabilities, Configuration, ControllerStatus, Property};
use weft_proto::nvme::NSID_ALL;
use weft_proto::nvme::command::{Cns, LogPageId, submit};
use weft_proto::nvme::feature::{AsyncEventConfig, FeatureId, NumberOfQueues};
use weft_proto::nvme::identify::{
    self, IDENTIFY_BYTES, IdentifyController, IdentifyControllerNvm, IdentifyNamespace, cmic, cntrltype,
    ctratt, oncs,
};
use weft_proto::nvme::log::AnaLog;
use weft_proto::nvme::sqe::Sqe;
use zerocopy::{FromBytes, IntoBytes};

use crate::association::{Association, Events};
use crate::connection::Connection;
use crate::metrics::{self, Recorder};
use crate::namespace::Namespace;
use crate::options::{AdminError, ConnectError, ConnectOptions};
use crate::qpair::{
    ADMIN_CAPSULE_BYTES, CloseReason, Command, CommandError, Completion, Payload, QUEUE_DEPTH_MAX,
    QueueOptions, TRANSFER_BYTES_MAX,
};
use crate::reply::Answer;

/// Entries of the admin queue, zero-based: the least a controller has to take.
const ADMIN_SQSIZE_Z: u16 = 31;

/// Between two looks at CSTS.
const READY_POLL: Duration = Duration::from_millis(5);

/// Longest log page that is read: a bound on what a controller can make us fetch.
const LOG_BYTES_MAX: u32 = 4 << 20;

/// What a controller said of itself.
#[derive(Clone, Debug)]
pub struct ControllerInfo {
    /// Controller Identifier.
    pub cntlid: u16,
    /// Serial Number.
    pub serial: String,
    /// Model Number.
    pub model: String,
    /// Version (VS).
    pub version: u32,
    /// Longest transfer of one command, in bytes: MDTS, at most [`TRANSFER_BYTES_MAX`].
    pub transfer_bytes_max: u32,
    /// Whether a completed write can be lost with power.
    pub volatile_write_cache: bool,
    /// Whether namespaces have access states on this controller.
    pub ana: bool,
    /// Whether it takes Write Zeroes.
    pub write_zeroes: bool,
    /// Whether it takes Dataset Management.
    pub dataset_management: bool,
    /// Whether it takes reservations.
    pub reservations: bool,
    /// Whether it tells hosts apart by 128-bit identifiers.
    pub hostid_128: bool,
    /// Most in-capsule data of an I/O command, in bytes.
    pub capsule_bytes_max: u32,
    /// Most ranges of one Dataset Management.
    pub dsm_ranges_max: u16,
    /// Most blocks of one range of a Dataset Management.
    pub dsm_range_blocks_max: u32,
    /// How long after the association was lost its commands may still begin (Command Quiesce Time).
    pub command_quiesce: Duration,
    /// I/O queues granted.
    pub io_queues: u16,
    /// Commands outstanding per I/O queue.
    pub queue_depth: u16,
}

/// A connected controller.
pub struct Controller {
    info: ControllerInfo,
    options: ConnectOptions,
    admin: Rc<Connection>,
    io: Vec<Rc<Connection>>,
    next_io: Cell<usize>,
    association: Rc<Association>,
    pub(crate) recorder: Recorder,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller")
            .field("info", &self.info)
            .field("closed", &self.closed_reason())
            .finish_non_exhaustive()
    }
}

impl Controller {
    /// Connects, enables the controller and opens its I/O queues. Runs on a `LocalSet`.
    ///
    /// # Errors
    /// [`ConnectError`]; nothing is left behind.
    pub async fn connect(options: ConnectOptions) -> Result<Rc<Self>, ConnectError> {
        let address = options.address;
        let timeout = options.connect_timeout;
        let result = match tokio::time::timeout(timeout, Self::establish(options)).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError::Timeout { address }),
        };
        metrics::connect_finished(result.is_ok());
        result.map(Rc::new)
    }

    async fn establish(options: ConnectOptions) -> Result<Self, ConnectError> {
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
                    cattr: 0,
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
        Ok(Self {
            info,
            options,
            admin,
            io,
            next_io: Cell::new(0),
            association,
            recorder: Recorder::new(),
        })
    }

    /// What the controller said of itself.
    #[must_use]
    pub fn info(&self) -> &ControllerInfo {
        &self.info
    }

    /// How it was connected.
    #[must_use]
    pub fn options(&self) -> &ConnectOptions {
        &self.options
    }

    /// Why the association ended, if it has.
    #[must_use]
    pub fn closed_reason(&self) -> Option<CloseReason> {
        self.association.closed()
    }

    /// Waits until the association has ended. The future does not keep the controller alive.
    pub fn closed(&self) -> impl Future<Output = CloseReason> + use<> {
        let mut closed = self.association.watch_closed();
        async move {
            match closed.wait_for(Option::is_some).await {
                Ok(reason) => reason.unwrap_or(CloseReason::Disconnected),
                Err(_) => CloseReason::Disconnected,
            }
        }
    }

    /// I/O commands without an answer.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.io.iter().map(|connection| connection.outstanding()).sum()
    }

    /// Asynchronous events from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        self.association.events()
    }

    /// Ends the association without a word, as a lost network would. Commands in flight are lost.
    pub fn abandon(&self, reason: CloseReason) {
        self.association.close(reason);
    }

    /// Shuts the controller down in order (CC.SHN) and ends the association. Commands in flight are finished by the
    /// controller or lost. Never longer than the connect timeout.
    pub async fn disconnect(&self) {
        self.association.set_ending();
        let shutdown = async {
            let sqe = FabricsCommand::PropertySet {
                property: Property::CC,
                wide: false,
                value: u64::from(Configuration::SHUTDOWN.0),
            };
            let command = Command::new(sqe.to_sqe(), Payload::None);
            if !matches!(self.admin.submit(command).await, Ok(done) if done.status.is_success()) {
                return;
            }
            while let Ok(csts) = property(&self.admin, Property::CSTS, false).await {
                if ControllerStatus(csts as u32).shutdown_complete() {
                    return;
                }
                tokio::time::sleep(READY_POLL).await;
            }
        };
        // Either way the association ends here; an orderly end only spares the controller a surprise.
        let _ = tokio::time::timeout(self.options.connect_timeout, shutdown).await;
        self.association.close(CloseReason::Disconnected);
    }

    /// A namespace as a device. It keeps the controller alive.
    ///
    /// # Errors
    /// If it is not there, or has a format this host does not take.
    pub async fn namespace(self: &Rc<Self>, nsid: u32) -> Result<Rc<Namespace>, AdminError> {
        let identity = self.identify_namespace(nsid).await?;
        let uuid = self.namespace_uuid(nsid).await.ok().flatten();
        Namespace::new(self.clone(), nsid, &identity, uuid).ok_or(AdminError::Malformed {
            command: "Identify Namespace",
        })
    }

    /// Identify Namespace.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn identify_namespace(&self, nsid: u32) -> Result<IdentifyNamespace, AdminError> {
        const COMMAND: &str = "Identify Namespace";
        let data = self.identify(COMMAND, Cns::NAMESPACE, nsid).await?;
        IdentifyNamespace::read_from_bytes(&data).map_err(|_| AdminError::Malformed { command: COMMAND })
    }

    /// The namespace's UUID, or its NGUID where it has none; `None` where it has neither.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn namespace_uuid(&self, nsid: u32) -> Result<Option<[u8; 16]>, AdminError> {
        const COMMAND: &str = "Identify Namespace Descriptors";
        let data = self.identify(COMMAND, Cns::NAMESPACE_DESCRIPTORS, nsid).await?;
        Ok(identify::uuid_of_descriptors(&data))
    }

    /// Every active namespace, ascending.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn active_namespaces(&self) -> Result<Vec<u32>, AdminError> {
        const COMMAND: &str = "Identify Active Namespaces";
        let mut nsids: Vec<u32> = Vec::new();
        loop {
            let after = nsids.last().copied().unwrap_or(0);
            let data = self.identify(COMMAND, Cns::ACTIVE_NAMESPACES, after).await?;
            let before = nsids.len();
            // Only ascending identifiers are taken, so a controller cannot make this go round for ever.
            for nsid in identify::namespaces_of_list(&data) {
                if nsid > nsids.last().copied().unwrap_or(0) {
                    nsids.push(nsid);
                }
            }
            if nsids.len() - before < IDENTIFY_BYTES / 4 {
                return Ok(nsids);
            }
        }
    }

    /// Namespaces whose identity changed since this was last asked; `None` for more than the list holds. Clears the
    /// event.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn changed_namespaces(&self) -> Result<Option<Vec<u32>>, AdminError> {
        let page = self
            .log_page(
                LogPageId::CHANGED_NAMESPACES,
                NSID_ALL,
                0,
                0,
                IDENTIFY_BYTES as u32,
            )
            .await?;
        let nsids: Vec<u32> = identify::namespaces_of_list(&page).collect();
        Ok((nsids.first() != Some(&NSID_ALL)).then_some(nsids))
    }

    /// The ANA log page. Clears the event.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn ana_log(&self) -> Result<AnaLog, AdminError> {
        const COMMAND: &str = "Get Log Page (ANA)";
        // How long the page is follows from its own counts: read more until it is whole.
        let mut bytes = IDENTIFY_BYTES as u32;
        loop {
            let page = self.log_page(LogPageId::ANA, NSID_ALL, 0, 0, bytes).await?;
            if let Some(log) = AnaLog::parse(&page) {
                return Ok(log);
            }
            bytes *= 4;
            if bytes > LOG_BYTES_MAX {
                return Err(AdminError::Malformed { command: COMMAND });
            }
        }
    }

    /// Reads `bytes` of a log page from `offset`, in as many commands as the controller's transfer size asks for.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn log_page(
        &self,
        lid: LogPageId,
        nsid: u32,
        lsp: u8,
        offset: u64,
        bytes: u32,
    ) -> Result<Bytes, AdminError> {
        const COMMAND: &str = "Get Log Page";
        let mut page = BytesMut::new();
        while (page.len() as u32) < bytes {
            let at = page.len() as u32;
            let piece = (bytes - at).min(self.info.transfer_bytes_max);
            let more = at + piece < bytes;
            let sqe = submit::get_log_page(lid, nsid, lsp, more, offset + u64::from(at), piece);
            let data = self.admin(COMMAND, sqe, Payload::In(piece)).await?.data;
            let short = data.len() < piece as usize;
            if at == 0 && !more {
                return Ok(data);
            }
            page.extend_from_slice(&data);
            if short {
                break;
            }
        }
        Ok(page.freeze())
    }

    /// An Identify, whole.
    async fn identify(&self, command: &'static str, cns: Cns, nsid: u32) -> Result<Bytes, AdminError> {
        let payload = Payload::In(IDENTIFY_BYTES as u32);
        let data = self
            .admin(command, submit::identify(cns, nsid), payload)
            .await?
            .data;
        if data.len() == IDENTIFY_BYTES {
            Ok(data)
        } else {
            Err(AdminError::Malformed { command })
        }
    }

    /// Any Admin command; answers it if it succeeded.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn admin(
        &self,
        command: &'static str,
        sqe: Sqe,
        payload: Payload,
    ) -> Result<Completion, AdminError> {
        answered(command, self.admin.submit(Command::new(sqe, payload)).await)
    }

    /// Starts an I/O command on the next queue.
    pub(crate) fn submit_io(&self, sqe: Sqe, payload: Payload, now: Instant) -> Answer {
        let index = self.next_io.get();
        self.next_io.set((index + 1) % self.io.len().max(1));
        // A discovery controller has no I/O queue: its admin queue refuses the opcode.
        let connection = self.io.get(index).unwrap_or(&self.admin);
        connection.submit_at(Command::new(sqe, payload), now)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let reason = match self.closed_reason() {
            None | Some(CloseReason::Disconnected) => "disconnected",
            Some(CloseReason::PeerClosed) => "peer_closed",
            Some(CloseReason::Socket(_)) => "socket",
            Some(CloseReason::PeerTerminated(_)) => "peer_terminated",
            Some(CloseReason::Protocol(_) | CloseReason::DigestDeclined) => "protocol",
            Some(CloseReason::CommandTimeout) => "command_timeout",
            Some(CloseReason::KeepAliveTimeout | CloseReason::KeepAliveRefused(_)) => "keep_alive",
        };
        metrics::controller_removed(reason);
    }
}

fn answered(
    command: &'static str,
    outcome: Result<Completion, CommandError>,
) -> Result<Completion, AdminError> {
    match outcome {
        Ok(completion) if completion.status.is_success() => Ok(completion),
        Ok(completion) => Err(AdminError::Status {
            command,
            status: completion.status,
        }),
        Err(error) => Err(AdminError::Lost { command, error }),
    }
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

async fn property(connection: &Connection, property: Property, wide: bool) -> Result<u64, ConnectError> {
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
