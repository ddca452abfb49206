//! A controller, as a host holds it: made by Connect, enabled, identified, kept alive.
//!
//! It lives until its association ends, which [`Controller::closed`] tells, or until the last handle of it and of its
//! namespaces is dropped. It never reconnects: [`crate::RemoteDrive`] and [`crate::Multipath`] make a new one.
//!
//! NVM Express Base Specification 2.0, "Controller Initialization" (message-based) and "Fabrics Command Set".

mod establish;

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use weft_proto::fabrics::command::FabricsCommand;
use weft_proto::fabrics::property::{Configuration, ControllerStatus, Property};
use weft_proto::nvme::NSID_ALL;
use weft_proto::nvme::command::{Cns, LogPageId, submit};
use weft_proto::nvme::identify::{self, IDENTIFY_BYTES, IdentifyNamespace};
use weft_proto::nvme::log::AnaLog;
use weft_proto::nvme::sqe::Sqe;
use zerocopy::FromBytes;

use crate::association::{Association, Events};
use crate::connection::Connection;
use crate::metrics::{self, Recorder};
use crate::namespace::Namespace;
use crate::options::{AdminError, ConnectError, ConnectOptions};
use crate::qpair::{CloseReason, Command, CommandError, Completion, Payload};
use crate::reply::Answer;

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
        let result = match tokio::time::timeout(timeout, establish::establish(options)).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError::Timeout { address }),
        };
        metrics::connect_finished(result.is_ok());
        result.map(Rc::new)
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
            while let Ok(csts) = establish::property(&self.admin, Property::CSTS, false).await {
                if ControllerStatus(csts as u32).shutdown_complete() {
                    return;
                }
                tokio::time::sleep(establish::READY_POLL).await;
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
