//! A controller: one host's association with a subsystem, or with the discovery subsystem.
//!
//! It holds what the properties, features and events say; it executes admin commands and opens namespaces. Queue
//! pairs come and go beneath it, of whichever [`Transport`]. Time is an argument.
//!
//! Lifetime: made by a Connect on an admin queue, gone when that connection ends or the host is silent past its
//! keep-alive timeout, and every connection of it ends then. A controller in a guest lives as long as the guest's
//! monitor is connected.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::task::Waker;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use weft_proto::fabrics::command::FabricsCommand;
use weft_proto::fabrics::property::{
    Capabilities, Configuration, ControllerStatus, Property, ShutdownNotification,
};
use weft_proto::nvme::command::AdminCommand;
use weft_proto::nvme::event::AsyncEvent;
use weft_proto::nvme::log::ReservationNotificationType;
use weft_proto::nvme::sqe::Sqe;
use weft_proto::nvme::status::Status;

use crate::metrics;
use crate::namespace::{Admitted, Association, OpenNamespace};
use crate::outstanding::Outstanding;
use crate::registry::{Registry, Subsystem};
use crate::request::{Completion, Pieces, Request};
use crate::silence::{Heard, ReadEmpty, Silence};

pub(crate) use feature::kato;

mod event;
mod feature;
mod identify;
mod log_page;

/// NVM Express 1.4: the revision whose mandatory parts are all here.
pub(crate) const VERSION: u32 = 0x0001_0400;

/// Bound of a change of CSTS.RDY, in units of 500 ms. It changes at once; hosts want a number that is not 0.
const READY_TIMEOUT_500MS: u8 = 15;

/// Granularity of the keep-alive timer (KAS), in units of 100 ms.
const KEEP_ALIVE_GRANULARITY_100MS: u16 = 1;

/// How a controller is reached: what it can say of itself and what a command may be depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// By capsules: properties instead of registers, Connect instead of queues in memory.
    Fabrics,
    /// By queues in the host's memory, as a PCI Express function.
    Memory {
        /// Doorbells may be in the host's memory too.
        doorbell_buffer: bool,
    },
}

/// A request as connections make them: with what it was admitted to, if it names a namespace that is there.
pub(crate) type IoRequest = Request<Option<Admitted>>;

/// What became of an admin command.
pub(crate) enum AdminAnswer {
    /// It is complete.
    Now(Completion),
    /// It will be.
    Later(LocalBoxFuture<'static, Completion>),
    /// It waits for an event; its completion comes from [`Controller::poll_event`].
    Parked,
}

/// See the module.
pub(crate) struct Controller {
    registry: Rc<Registry>,
    transport: Transport,
    association: Association,
    /// `None` for a discovery controller.
    subsystem: Option<Rc<Subsystem>>,
    cc: Cell<Configuration>,
    csts: Cell<ControllerStatus>,
    silence: Silence,
    features: RefCell<feature::Features>,
    events: RefCell<event::Events>,
    namespaces: RefCell<BTreeMap<u32, Rc<OpenNamespace>>>,
    /// Connections by QID, to wake them when there is something to do. One that is not here is to close.
    queues: RefCell<BTreeMap<u16, Option<Waker>>>,
    /// What the host's dropped connections have in devices; `None` for a discovery controller.
    outstanding: Option<Rc<Outstanding>>,
    closed: Cell<Option<&'static str>>,
    _open: metrics::Open,
}

impl Controller {
    /// A controller for an admin queue that has just connected, or for a PCI Express function.
    pub(crate) fn new(
        registry: Rc<Registry>,
        transport: Transport,
        association: Association,
        subsystem: Option<Rc<Subsystem>>,
        now: Instant,
    ) -> Rc<Self> {
        let outstanding = subsystem
            .as_ref()
            .map(|subsystem| subsystem.outstanding(&association.hostnqn, association.hostid));
        Rc::new(Self {
            registry,
            transport,
            outstanding,
            silence: Silence::new(association.kato, now),
            association,
            subsystem,
            cc: Cell::default(),
            csts: Cell::default(),
            features: RefCell::default(),
            events: RefCell::default(),
            namespaces: RefCell::default(),
            queues: RefCell::new(BTreeMap::from([(0, None)])),
            closed: Cell::new(None),
            _open: metrics::Open::controller(),
        })
    }

    pub(crate) fn association(&self) -> &Association {
        &self.association
    }

    pub(crate) fn is_discovery(&self) -> bool {
        self.subsystem.is_none()
    }

    pub(crate) fn is_of(&self, subsystem: &Rc<Subsystem>) -> bool {
        self.subsystem
            .as_ref()
            .is_some_and(|own| Rc::ptr_eq(own, subsystem))
    }

    pub(crate) fn subsystem(&self) -> Option<&Rc<Subsystem>> {
        self.subsystem.as_ref()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.csts.get().ready()
    }

    pub(crate) fn status(&self) -> ControllerStatus {
        self.csts.get()
    }

    /// Says that it cannot go on until it is reset (CFS).
    pub(crate) fn set_fatal(&self) {
        let csts = self.csts.get().0 | ControllerStatus::FATAL;
        self.csts.set(ControllerStatus(csts));
    }

    /// I/O queues the host may connect.
    pub(crate) fn io_queues(&self) -> u16 {
        let granted = self.features.borrow().io_queues;
        granted.unwrap_or(self.registry.config().io_queues_max)
    }

    // Life and death.

    /// Ends the association: every connection of it closes.
    pub(crate) fn close(&self, reason: &'static str) {
        if self.closed.get().is_none() {
            tracing::info!(cntlid = self.association.cntlid, reason, "association ends");
            self.closed.set(Some(reason));
            self.registry.remove_controller(self.association.cntlid);
            // Devices are closed now and not when the last connection has drained.
            self.namespaces.borrow_mut().clear();
            self.end_queues(0);
        }
    }

    /// Whether a queue's connection is to be closed.
    pub(crate) fn is_closed_for(&self, qid: u16) -> bool {
        !self.queues.borrow().contains_key(&qid)
    }

    /// What the host's dropped connections have in devices.
    pub(crate) fn outstanding(&self) -> Option<&Rc<Outstanding>> {
        self.outstanding.as_ref()
    }

    /// Ends queues from this side, from `first` on. Each counts as outstanding until its connection has said what it
    /// has in a device ([`Self::leave`]): its task has not run yet, and a Connect may come first.
    fn end_queues(&self, first: u16) {
        let ended = self.queues.borrow_mut().split_off(&first);
        if let Some(outstanding) = &self.outstanding {
            outstanding.add(ended.len());
        }
        for waker in ended.into_values().flatten() {
            waker.wake();
        }
    }

    /// Ends one I/O queue from this side (Disconnect).
    pub(crate) fn end_queue(&self, qid: u16) {
        if self.queues.borrow_mut().remove(&qid).is_some()
            && let Some(outstanding) = &self.outstanding
        {
            outstanding.add(1);
        }
    }

    /// Adds an I/O queue; `false` if it is connected already.
    pub(crate) fn add_queue(&self, qid: u16) -> bool {
        let mut queues = self.queues.borrow_mut();
        if queues.contains_key(&qid) {
            return false;
        }
        queues.insert(qid, None);
        true
    }

    /// A queue's connection has ended, with `running` commands in a device. Without its admin queue a controller is
    /// nothing.
    pub(crate) fn leave(&self, qid: u16, running: usize) {
        if let Some(outstanding) = &self.outstanding {
            outstanding.add(running);
        }
        if self.queues.borrow_mut().remove(&qid).is_none() {
            // It was ended from this side, and has been counted since.
            if let Some(outstanding) = &self.outstanding {
                outstanding.finish_one();
            }
        } else if qid == 0 {
            self.close("admin queue closed");
        } else {
            self.wake_admin();
        }
    }

    pub(crate) fn has_io_queues(&self) -> bool {
        self.queues.borrow().range(1..).next().is_some()
    }

    /// Sets whom to wake for a queue.
    pub(crate) fn set_waker(&self, qid: u16, waker: &Waker) {
        if let Some(slot) = self.queues.borrow_mut().get_mut(&qid)
            && !slot.as_ref().is_some_and(|known| known.will_wake(waker))
        {
            *slot = Some(waker.clone());
        }
    }

    fn wake_admin(&self) {
        if let Some(Some(waker)) = self.queues.borrow().get(&0) {
            waker.wake_by_ref();
        }
    }

    /// The host is heard, on a queue that has been read empty as `read_empty` says. Silence past its keep-alive timeout
    /// ends the association, whatever came then.
    pub(crate) fn handle_traffic(&self, now: Instant, read_empty: ReadEmpty) -> Heard {
        let heard = self.silence.hear(now, read_empty);
        if heard == Heard::Expired {
            self.handle_timeout(now);
        }
        heard
    }

    /// How a queue stands of which there is nothing left to be read.
    pub(crate) fn read_empty(&self) -> ReadEmpty {
        self.silence.read_empty()
    }

    /// When the host has been silent for too long.
    pub(crate) fn keep_alive_deadline(&self) -> Option<Instant> {
        self.silence.deadline()
    }

    /// Takes the time.
    pub(crate) fn handle_timeout(&self, now: Instant) {
        if self.closed.get().is_none() && self.keep_alive_deadline().is_some_and(|deadline| now >= deadline) {
            metrics::keep_alive_expired();
            self.close("keep-alive timeout");
        }
    }

    // Namespaces.

    /// A namespace, opened at its first use.
    pub(crate) fn namespace(&self, nsid: u32) -> Option<Rc<OpenNamespace>> {
        if let Some(open) = self.namespaces.borrow().get(&nsid) {
            return Some(Rc::clone(open));
        }
        if self.closed.get().is_some() {
            return None;
        }
        let namespace = self.subsystem.as_ref()?.namespaces.borrow().get(&nsid).cloned()?;
        // Not under a borrow: a factory may look at the registry.
        let open = Rc::new(OpenNamespace::open(namespace, &self.association));
        self.namespaces.borrow_mut().insert(nsid, Rc::clone(&open));
        Some(open)
    }

    pub(crate) fn forget_namespace(&self, nsid: u32) {
        self.namespaces.borrow_mut().remove(&nsid);
    }

    /// Admits an I/O command in the instant it arrives.
    pub(crate) fn admit(&self, sqe: &Sqe) -> Option<Admitted> {
        self.namespace(sqe.nsid.get()).map(|open| open.admit())
    }

    // Events.

    /// Something that a host may want to be told.
    pub(crate) fn raise(&self, event: AsyncEvent) {
        if self.events.borrow_mut().raise(event) {
            self.wake_admin();
        }
    }

    pub(crate) fn namespace_changed(&self, nsid: u32) {
        self.events.borrow_mut().namespace_changed(nsid);
        self.raise(AsyncEvent::NAMESPACE_CHANGED);
    }

    pub(crate) fn reservation_notice(&self, nsid: u32, kind: ReservationNotificationType) {
        if self.features.borrow().masks_reservation_notice(nsid, kind) {
            return;
        }
        self.events.borrow_mut().reservation_notice(nsid, kind);
        self.raise(AsyncEvent::RESERVATION_LOG);
    }

    /// The completion of an Asynchronous Event Request.
    pub(crate) fn poll_event(&self) -> Option<Completion> {
        let (cid, event) = self.events.borrow_mut().poll()?;
        Some(Completion {
            cid,
            status: Status::SUCCESS,
            result: u64::from(event.0),
            data: Pieces::new(),
        })
    }

    // Commands of the admin queue.

    /// Executes a command of the admin queue other than Connect.
    pub(crate) fn handle_admin(self: &Rc<Self>, request: &IoRequest) -> AdminAnswer {
        if self.transport == Transport::Fabrics && FabricsCommand::is_fabrics(&request.sqe) {
            return AdminAnswer::Now(self.handle_fabrics(request));
        }
        if !self.is_ready() {
            return AdminAnswer::Now(request.complete(Status::COMMAND_SEQUENCE_ERROR));
        }
        let command = match AdminCommand::parse(&request.sqe) {
            Ok(command) => command,
            Err(status) => return AdminAnswer::Now(request.complete(status)),
        };
        let answer = match command {
            AdminCommand::GetLogPage(page) => self.log_page(&page),
            AdminCommand::Identify { cns, csi, nsid, .. } => self.identify(cns, csi, nsid),
            // Best effort, and there is none: a command is in a device or complete. Bit 0 says "not aborted".
            AdminCommand::Abort { .. } => {
                return AdminAnswer::Now(request.complete(Status::SUCCESS).with_result(1));
            }
            AdminCommand::SetFeatures {
                fid,
                save,
                nsid,
                value,
            } => {
                return self.set_feature(request, fid, save, nsid, value);
            }
            AdminCommand::GetFeatures { fid, sel, nsid, .. } => {
                return AdminAnswer::Now(self.get_feature(request, fid, sel, nsid));
            }
            AdminCommand::AsyncEventRequest => {
                return if self.events.borrow_mut().park(request.cid()) {
                    AdminAnswer::Parked
                } else {
                    AdminAnswer::Now(request.complete(Status::ASYNC_EVENT_LIMIT_EXCEEDED.dnr()))
                };
            }
            AdminCommand::KeepAlive => Ok(Vec::new()),
        };
        AdminAnswer::Now(match answer {
            Ok(data) => request
                .complete(Status::SUCCESS)
                .with_data(cut(data, request.answer_bytes_max)),
            Err(status) => request.complete(status),
        })
    }

    fn handle_fabrics(&self, request: &IoRequest) -> Completion {
        let answer = FabricsCommand::parse(&request.sqe).and_then(|command| match command {
            FabricsCommand::PropertyGet { property, wide } => self.property(property, wide),
            FabricsCommand::PropertySet {
                property,
                wide: false,
                value,
            } if property == Property::CC => {
                self.configure(Configuration(value as u32));
                Ok(0)
            }
            FabricsCommand::PropertySet { .. } => Err(Status::INVALID_FIELD.dnr()),
            FabricsCommand::Connect(_) => Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
            // Of an I/O queue only.
            FabricsCommand::Disconnect => Err(Status::INVALID_QUEUE_TYPE.dnr()),
        });
        match answer {
            Ok(value) => request.complete(Status::SUCCESS).with_result(value),
            Err(status) => request.complete(status),
        }
    }

    fn property(&self, property: Property, wide: bool) -> Result<u64, Status> {
        match (property, wide) {
            (Property::CAP, true) => {
                let mqes_z = self.registry.config().queue_entries_max - 1;
                Ok(Capabilities::fabrics(mqes_z, READY_TIMEOUT_500MS).0)
            }
            (Property::VS, false) => Ok(u64::from(VERSION)),
            (Property::CC, false) => Ok(u64::from(self.cc.get().0)),
            (Property::CSTS, false) => Ok(u64::from(self.csts.get().0)),
            // Subsystem reset is not supported and reads as 0.
            (Property::NSSR, false) => Ok(0),
            _ => Err(Status::INVALID_FIELD.dnr()),
        }
    }

    /// Takes a new Controller Configuration (CC).
    pub(crate) fn configure(&self, cc: Configuration) {
        let before = self.cc.replace(cc);
        if cc.enabled() && !before.enabled() {
            // The NVM command set and 4 KiB pages are all there is.
            let supported = matches!(cc.command_set(), 0 | 0b110) && cc.page_shift() == 0;
            self.csts.set(ControllerStatus(if supported {
                ControllerStatus::READY
            } else {
                ControllerStatus::FATAL
            }));
        }
        if !cc.enabled() && before.enabled() {
            self.reset();
        }
        if cc.shutdown() == ShutdownNotification::Requested && before.shutdown() == ShutdownNotification::None
        {
            self.end_queues(1);
            self.csts.set(ControllerStatus(
                self.csts.get().0 | ControllerStatus::SHUTDOWN_COMPLETE,
            ));
        }
    }

    /// Controller reset: the association stays, its I/O queues and what was set do not.
    fn reset(&self) {
        self.end_queues(1);
        self.csts.set(ControllerStatus::default());
        self.features.take();
        self.events.take();
    }
}

/// Data for the host, not more than it takes.
fn cut(mut data: Vec<u8>, bytes_max: u32) -> Vec<Bytes> {
    data.truncate(bytes_max as usize);
    if data.is_empty() {
        Vec::new()
    } else {
        vec![Bytes::from(data)]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use weft_proto::id::HostId;

    use super::*;
    use crate::registry::RegistryConfig;

    fn controller(kato: Option<Duration>, now: Instant) -> Rc<Controller> {
        let registry = Registry::new(RegistryConfig::default());
        let association = Association {
            hostnqn: "nqn.host".parse().unwrap(),
            hostid: HostId([1; 16]),
            cntlid: 1,
            subsystem: "nqn.subsystem".parse().unwrap(),
            kato,
        };
        Controller::new(registry, Transport::Fabrics, association, None, now)
    }

    #[test]
    fn a_host_is_given_up_exactly_at_its_timeout_and_traffic_moves_it() {
        let start = Instant::now();
        let kato = Duration::from_secs(15);
        let controller = controller(Some(kato), start);
        controller.handle_timeout(start + kato - Duration::from_millis(1));
        assert!(!controller.is_closed_for(0));
        let heard = start + Duration::from_secs(10);
        assert_eq!(
            controller.handle_traffic(heard, controller.read_empty()),
            Heard::InTime
        );
        controller.handle_timeout(start + kato);
        assert!(!controller.is_closed_for(0));
        assert_eq!(controller.keep_alive_deadline(), Some(heard + kato));
        controller.handle_timeout(heard + kato);
        assert!(controller.is_closed_for(0));
    }

    #[test]
    fn without_a_timeout_a_host_may_be_silent_for_ever() {
        let start = Instant::now();
        let controller = controller(None, start);
        controller.handle_timeout(start + Duration::from_secs(1 << 20));
        assert!(!controller.is_closed_for(0));
    }

    #[test]
    fn queues_that_a_close_ends_are_outstanding_until_their_connections_have_left() {
        let registry = Registry::new(RegistryConfig::default());
        let subnqn: weft_proto::nqn::Nqn = "nqn.subsystem".parse().unwrap();
        registry
            .add_subsystem(crate::SubsystemConfig {
                nqn: subnqn.clone(),
                serial: "1".into(),
                model: "1".into(),
                hosts: crate::AllowedHosts::Any,
                namespaces_max: 1,
            })
            .unwrap();
        let subsystem = registry.subsystem(&subnqn);
        let association = controller(None, Instant::now()).association().clone();
        let controller = Controller::new(
            registry,
            Transport::Fabrics,
            association,
            subsystem,
            Instant::now(),
        );
        let dropped = || controller.outstanding().unwrap().dropped();
        assert!(controller.add_queue(1) && controller.add_queue(2));
        controller.leave(2, 0);
        assert_eq!(dropped(), 0, "it ended by itself, with nothing in a device");
        controller.leave(0, 0);
        assert_eq!(dropped(), 1, "queue 1 has not said anything yet");
        controller.leave(1, 3);
        assert_eq!(dropped(), 3, "its commands");
    }
}
