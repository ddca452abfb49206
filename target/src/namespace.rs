//! Namespaces as a subsystem presents them, and as one association has them open.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use weft_block::{Device, DeviceInfo, Durability, Io};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::log::AnaState;
use weft_proto::units::{Lba, LbaRange};

use crate::arrival::Arrival;
use crate::reservation::ReservedNamespace;
use crate::reservation::namespace::{Admission, HostNamespace};

/// A host's association with a subsystem: one controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Association {
    /// The host's name.
    pub hostnqn: Nqn,
    /// The host's identifier, which reservations know it by.
    pub hostid: HostId,
    /// The controller.
    pub cntlid: u16,
    /// The subsystem.
    pub subsystem: Nqn,
    /// Keep Alive Timeout that was accepted; `None` if the host asked for none.
    pub kato: Option<Duration>,
}

/// Makes the device of one association, which is told of each command when it arrived.
pub type DeviceFactory = Rc<dyn Fn(&Association, &Arrival) -> Device>;

/// Where a namespace's blocks are.
#[derive(Clone)]
pub enum Source {
    /// A device under reservations, shared by all hosts: a drive.
    Reserved(ReservedNamespace),
    /// A device made once per association, without reservations of ours: a volume, which a non-owner forwards with
    /// that host's identity. Ownership that moves is the device's own affair; it stays open.
    PerAssociation(DeviceFactory),
}

/// What a namespace is.
#[derive(Clone)]
pub struct NamespaceConfig {
    /// The same on every node that presents it.
    pub nsid: u32,
    /// The same on every node that presents it.
    pub uuid: [u8; 16],
    /// ANA group, 1 and up.
    pub ana_group: u32,
    /// State of the group where this is its first namespace; otherwise the group's stays.
    pub ana_state: AnaState,
    /// Where the blocks are.
    pub source: Source,
}

/// The state of an ANA group on this node, shared by its namespaces.
#[derive(Debug)]
pub(crate) struct AnaGroupState {
    pub(crate) state: Cell<AnaState>,
    pub(crate) change_count: Cell<u64>,
}

/// A namespace of a subsystem.
pub(crate) struct Namespace {
    pub(crate) nsid: u32,
    pub(crate) uuid: [u8; 16],
    pub(crate) ana_group: u32,
    pub(crate) ana: Rc<AnaGroupState>,
    pub(crate) source: Source,
    pub(crate) fused: crate::fused::FusedGate,
}

/// A namespace as one association has it open.
pub(crate) struct OpenNamespace {
    pub(crate) namespace: Rc<Namespace>,
    pub(crate) backend: Backend,
}

pub(crate) enum Backend {
    Reserved(HostNamespace),
    Plain(AssociationDevice),
}

impl OpenNamespace {
    pub(crate) fn open(namespace: Rc<Namespace>, association: &Association) -> Self {
        let backend = match &namespace.source {
            Source::Reserved(reserved) => Backend::Reserved(reserved.of_host(association.hostid)),
            Source::PerAssociation(factory) => {
                let now = Instant::now();
                let arrival = Arrival::new(now);
                Backend::Plain(AssociationDevice {
                    device: factory(association, &arrival),
                    arrival,
                    kato: association.kato,
                })
            }
        };
        Self { namespace, backend }
    }

    pub(crate) fn info(&self) -> DeviceInfo {
        match &self.backend {
            Backend::Reserved(reserved) => reserved.parts().0.info(),
            Backend::Plain(plain) => plain.device.info(),
        }
    }

    pub(crate) fn reserved(&self) -> Option<(&ReservedNamespace, HostId)> {
        match &self.backend {
            Backend::Reserved(reserved) => Some(reserved.parts()),
            Backend::Plain(_) => None,
        }
    }

    /// Admits one command, of which the first part has just arrived.
    pub(crate) fn admit(self: &Rc<Self>) -> Admitted {
        Admitted {
            generation: match &self.backend {
                Backend::Reserved(reserved) => reserved.generation(),
                Backend::Plain(_) => 0,
            },
            open: Rc::clone(self),
        }
    }
}

/// What a command was admitted to when it arrived. There is one in each command: it is kept small.
#[derive(Clone)]
pub(crate) struct Admitted {
    pub(crate) open: Rc<OpenNamespace>,
    /// [`HostNamespace::generation`] of a drive.
    generation: u64,
}

impl Admitted {
    /// The namespace for the command, all of which had arrived at `arrived`.
    pub(crate) fn at(&self, arrived: Instant) -> CommandDevice<'_> {
        CommandDevice {
            open: &self.open,
            generation: self.generation,
            arrived,
        }
    }
}

/// A namespace for the operations of one command.
#[derive(Clone, Copy)]
pub(crate) struct CommandDevice<'a> {
    pub(crate) open: &'a OpenNamespace,
    generation: u64,
    arrived: Instant,
}

/// A device of one association.
pub(crate) struct AssociationDevice {
    device: Device,
    /// How the device is told when a command arrived.
    arrival: Arrival,
    kato: Option<Duration>,
}

/// What one command may do it with.
enum Access<'a> {
    Reserved(Admission),
    Plain(&'a Device),
}

impl<'a> CommandDevice<'a> {
    /// Begins an operation.
    fn access(&self) -> Access<'a> {
        match &self.open.backend {
            Backend::Reserved(reserved) => Access::Reserved(reserved.admitted_in(self.generation)),
            Backend::Plain(plain) => {
                plain.arrival.set(self.arrived);
                Access::Plain(&plain.device)
            }
        }
    }

    /// Whether the command has waited for others until its host may have given it up ([`crate::silence`]): nothing of it may begin any more.
    /// A drive needs no such limit, since who may not change it any more is fenced there.
    pub(crate) fn is_late(&self) -> bool {
        match &self.open.backend {
            Backend::Reserved(_) => false,
            Backend::Plain(plain) => plain.kato.is_some_and(|kato| self.arrived.elapsed() >= kato / 4),
        }
    }

    /// Whether a Preempt and Abort has ended the command.
    pub(crate) fn is_aborted(&self) -> bool {
        match &self.open.backend {
            Backend::Reserved(reserved) => reserved.generation() != self.generation,
            Backend::Plain(_) => false,
        }
    }

    pub(crate) fn read(&self, range: LbaRange) -> Io<Bytes> {
        match self.access() {
            Access::Reserved(admission) => admission.read(range),
            Access::Plain(device) => device.read(range),
        }
    }

    pub(crate) fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        match self.access() {
            Access::Reserved(admission) => admission.write(start, data, durability),
            Access::Plain(device) => device.write(start, data, durability),
        }
    }

    pub(crate) fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        match self.access() {
            Access::Reserved(admission) => admission.write_zeroes(range, deallocate, durability),
            Access::Plain(device) => device.write_zeroes(range, deallocate, durability),
        }
    }

    pub(crate) fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        match self.access() {
            Access::Reserved(admission) => admission.deallocate(ranges),
            Access::Plain(device) => device.deallocate(ranges),
        }
    }

    pub(crate) fn flush(&self) -> Io<()> {
        match self.access() {
            Access::Reserved(admission) => admission.flush(),
            Access::Plain(device) => device.flush(),
        }
    }
}
