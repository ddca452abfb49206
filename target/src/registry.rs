//! What this node presents: subsystems, namespaces, who may connect, and the discovery log.
//!
//! One registry per data thread, shared by all its listeners and connections; the owner (the agent) changes it at
//! run time and every change reaches the hosts concerned as an asynchronous event.
//!
//! What this does not do: it opens no socket, and decides nothing about where a volume is owned.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::watch;
use weft_proto::fabrics::discovery::DiscoveryEntry;
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::event::AsyncEvent;
use weft_proto::nvme::log::{AnaGroup, AnaLog, AnaState};

use crate::controller::Controller;
use crate::namespace::{AnaGroupState, Association, Namespace, NamespaceConfig, Source};
use crate::outstanding::Outstanding;
use crate::refusals::Refusals;
use crate::reservation::table::Notice;

/// Limits and identity of this node's controllers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryConfig {
    /// First controller identifier this node gives. Nodes that present the same subsystem need ranges that do not
    /// meet.
    pub cntlid_min: u16,
    /// Last one, at most `0xffef`.
    pub cntlid_max: u16,
    /// Most I/O queues of a controller.
    pub io_queues_max: u16,
    /// Most entries of a queue, 2 to 1024.
    pub queue_entries_max: u16,
    /// Highest ANA group identifier, and the number of groups: sizes a host's ANA log.
    pub ana_group_max: u32,
    /// Firmware revision that hosts are shown, at most 8 bytes.
    pub firmware: String,
    /// Command Quiesce Time, in whole milliseconds: how long after a host lost an association a command of it may still
    /// begin. For devices that send commands on to others; what this crate does itself needs none.
    pub command_quiesce: Duration,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            cntlid_min: 1,
            cntlid_max: 0xffef,
            io_queues_max: 16,
            queue_entries_max: 128,
            ana_group_max: 1024,
            firmware: env!("CARGO_PKG_VERSION").to_owned(),
            command_quiesce: Duration::ZERO,
        }
    }
}

/// Which hosts a subsystem or a discovery record is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedHosts {
    /// Every host.
    Any,
    /// These; an empty list is nobody.
    List(BTreeSet<Nqn>),
}

impl AllowedHosts {
    /// Whether `hostnqn` is one of them.
    #[must_use]
    pub fn contains(&self, hostnqn: &Nqn) -> bool {
        match self {
            Self::Any => true,
            Self::List(hosts) => hosts.contains(hostnqn),
        }
    }
}

/// A subsystem.
#[derive(Clone, Debug)]
pub struct SubsystemConfig {
    /// Its name.
    pub nqn: Nqn,
    /// Serial number, at most 20 bytes; the same on every node that presents it.
    pub serial: String,
    /// Model number, at most 40 bytes; the same on every node that presents it.
    pub model: String,
    /// Who may connect.
    pub hosts: AllowedHosts,
    /// Highest NSID, and most namespaces; at most 1024.
    pub namespaces_max: u32,
}

/// An entry of the discovery log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryRecord {
    /// The subsystem.
    pub subnqn: Nqn,
    /// Where a node presents it.
    pub address: SocketAddr,
    /// A number of the port, the same for one address in all records.
    pub portid: u16,
    /// Who is shown the record.
    pub hosts: AllowedHosts,
}

/// Why a change of the registry was refused. The caller's mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The subsystem is there already.
    #[error("subsystem {0} exists")]
    SubsystemExists(Nqn),
    /// No such subsystem.
    #[error("no subsystem {0}")]
    NoSuchSubsystem(Nqn),
    /// The namespace is there already.
    #[error("namespace {nsid} of {subnqn} exists")]
    NamespaceExists {
        /// Subsystem.
        subnqn: Nqn,
        /// Namespace.
        nsid: u32,
    },
    /// No such namespace.
    #[error("no namespace {nsid} in {subnqn}")]
    NoSuchNamespace {
        /// Subsystem.
        subnqn: Nqn,
        /// Namespace.
        nsid: u32,
    },
    /// An NSID of 0 or above the subsystem's most, or an ANA group of 0 or above the registry's.
    #[error("{what} {value} is outside of 1 to {max}")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// As given.
        value: u32,
        /// Limit.
        max: u32,
    },
}

/// What this node presents. See the module.
pub struct Registry {
    config: RegistryConfig,
    subsystems: RefCell<BTreeMap<Nqn, Rc<Subsystem>>>,
    discovery: RefCell<Discovery>,
    controllers: RefCell<BTreeMap<u16, Rc<Controller>>>,
    cntlid_last: Cell<u16>,
    pub(crate) refusals: Refusals,
    shutdown: watch::Sender<bool>,
}

#[derive(Default)]
struct Discovery {
    genctr: u64,
    records: Vec<DiscoveryRecord>,
}

/// A subsystem and what it holds.
pub(crate) struct Subsystem {
    pub(crate) config: SubsystemConfig,
    hosts: RefCell<AllowedHosts>,
    pub(crate) namespaces: RefCell<BTreeMap<u32, Rc<Namespace>>>,
    ana_groups: RefCell<BTreeMap<u32, Rc<AnaGroupState>>>,
    ana_change_count: Cell<u64>,
    outstanding: RefCell<BTreeMap<(Nqn, HostId), Rc<Outstanding>>>,
}

impl Registry {
    /// An empty registry.
    ///
    /// # Panics
    /// If the configuration's limits contradict themselves.
    #[must_use]
    pub fn new(config: RegistryConfig) -> Rc<Self> {
        assert!(
            config.cntlid_min >= 1 && config.cntlid_min <= config.cntlid_max,
            "an empty range of cntlids"
        );
        assert!(config.cntlid_max <= 0xffef, "cntlids above 0xffef are reserved");
        assert!(
            (2..=1024).contains(&config.queue_entries_max),
            "queues of 2 to 1024 entries"
        );
        assert!(
            config.io_queues_max >= 1 && config.ana_group_max >= 1,
            "at least one queue and one group"
        );
        Rc::new(Self {
            cntlid_last: Cell::new(config.cntlid_max),
            config,
            subsystems: RefCell::default(),
            discovery: RefCell::default(),
            controllers: RefCell::default(),
            refusals: Refusals::default(),
            shutdown: watch::Sender::new(false),
        })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &RegistryConfig {
        &self.config
    }

    /// Presents a subsystem.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn add_subsystem(&self, config: SubsystemConfig) -> Result<(), RegistryError> {
        if !(1..=1024).contains(&config.namespaces_max) {
            return Err(RegistryError::OutOfRange {
                what: "number of namespaces",
                value: config.namespaces_max,
                max: 1024,
            });
        }
        let mut subsystems = self.subsystems.borrow_mut();
        if subsystems.contains_key(&config.nqn) {
            return Err(RegistryError::SubsystemExists(config.nqn));
        }
        let subsystem = Subsystem {
            hosts: RefCell::new(config.hosts.clone()),
            namespaces: RefCell::default(),
            ana_groups: RefCell::default(),
            ana_change_count: Cell::new(0),
            outstanding: RefCell::default(),
            config,
        };
        subsystems.insert(subsystem.config.nqn.clone(), Rc::new(subsystem));
        Ok(())
    }

    /// Withdraws a subsystem and drops its associations.
    ///
    /// # Errors
    /// [`RegistryError::NoSuchSubsystem`].
    pub fn remove_subsystem(&self, subnqn: &Nqn) -> Result<(), RegistryError> {
        let removed = self.subsystems.borrow_mut().remove(subnqn);
        let removed = removed.ok_or_else(|| RegistryError::NoSuchSubsystem(subnqn.clone()))?;
        for controller in self.controllers_of(&removed) {
            controller.close("subsystem removed");
        }
        Ok(())
    }

    /// Names of the subsystems presented.
    #[must_use]
    pub fn subsystems(&self) -> Vec<Nqn> {
        self.subsystems.borrow().keys().cloned().collect()
    }

    /// Changes who may connect; the associations of hosts that may not any more are dropped.
    ///
    /// # Errors
    /// [`RegistryError::NoSuchSubsystem`].
    pub fn set_hosts(&self, subnqn: &Nqn, hosts: AllowedHosts) -> Result<(), RegistryError> {
        let subsystem = self.expect_subsystem(subnqn)?;
        subsystem.hosts.replace(hosts);
        for controller in self.controllers_of(&subsystem) {
            if !subsystem
                .hosts
                .borrow()
                .contains(&controller.association().hostnqn)
            {
                controller.close("host removed");
            }
        }
        Ok(())
    }

    /// Whether a subsystem is presented and a host may connect to it.
    #[must_use]
    pub fn allows(&self, subnqn: &Nqn, hostnqn: &Nqn) -> bool {
        self.subsystem(subnqn)
            .is_some_and(|subsystem| subsystem.allows(hostnqn))
    }

    /// Presents a namespace; hosts are told.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn add_namespace(
        self: &Rc<Self>,
        subnqn: &Nqn,
        config: NamespaceConfig,
    ) -> Result<(), RegistryError> {
        let subsystem = self.expect_subsystem(subnqn)?;
        let NamespaceConfig {
            nsid,
            uuid,
            ana_group,
            ana_state,
            source,
        } = config;
        in_range("NSID", nsid, subsystem.config.namespaces_max)?;
        in_range("ANA group", ana_group, self.config.ana_group_max)?;
        if subsystem.namespaces.borrow().contains_key(&nsid) {
            return Err(RegistryError::NamespaceExists {
                subnqn: subnqn.clone(),
                nsid,
            });
        }
        if let Source::Reserved(reserved) = &source {
            self.subscribe(reserved, &subsystem, nsid);
        }
        let ana = Rc::clone(
            subsystem
                .ana_groups
                .borrow_mut()
                .entry(ana_group)
                .or_insert_with(|| {
                    Rc::new(AnaGroupState {
                        state: Cell::new(ana_state),
                        change_count: Cell::new(0),
                    })
                }),
        );
        let namespace = Namespace {
            nsid,
            uuid,
            ana_group,
            ana,
            source,
            fused: Default::default(),
        };
        subsystem.namespaces.borrow_mut().insert(nsid, Rc::new(namespace));
        self.namespace_event(&subsystem, nsid);
        Ok(())
    }

    /// Withdraws a namespace; hosts are told, and commands in execution finish.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn remove_namespace(&self, subnqn: &Nqn, nsid: u32) -> Result<(), RegistryError> {
        let subsystem = self.expect_subsystem(subnqn)?;
        let removed = subsystem.namespaces.borrow_mut().remove(&nsid);
        let removed = removed.ok_or_else(|| RegistryError::NoSuchNamespace {
            subnqn: subnqn.clone(),
            nsid,
        })?;
        let mut namespaces = subsystem
            .namespaces
            .borrow()
            .values()
            .map(|n| n.ana_group)
            .collect::<Vec<_>>();
        namespaces.dedup();
        if !namespaces.contains(&removed.ana_group) {
            subsystem.ana_groups.borrow_mut().remove(&removed.ana_group);
        }
        for controller in self.controllers_of(&subsystem) {
            controller.forget_namespace(nsid);
        }
        self.namespace_event(&subsystem, nsid);
        Ok(())
    }

    /// Says that a namespace's device has another size now; hosts are told.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn namespace_resized(&self, subnqn: &Nqn, nsid: u32) -> Result<(), RegistryError> {
        let subsystem = self.expect_subsystem(subnqn)?;
        self.expect_namespace(&subsystem, nsid)?;
        self.namespace_event(&subsystem, nsid);
        Ok(())
    }

    /// Sets the ANA state of the group that a namespace belongs to; hosts are told if it changes.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn set_ana_state(&self, subnqn: &Nqn, nsid: u32, state: AnaState) -> Result<(), RegistryError> {
        let subsystem = self.expect_subsystem(subnqn)?;
        let namespace = self.expect_namespace(&subsystem, nsid)?;
        if namespace.ana.state.replace(state) == state {
            return Ok(());
        }
        namespace
            .ana
            .change_count
            .set(namespace.ana.change_count.get() + 1);
        subsystem
            .ana_change_count
            .set(subsystem.ana_change_count.get() + 1);
        for controller in self.controllers_of(&subsystem) {
            controller.raise(AsyncEvent::ANA_CHANGE);
        }
        Ok(())
    }

    /// Replaces the discovery log; hosts of the discovery subsystem are told if it changes.
    pub fn set_discovery(&self, records: Vec<DiscoveryRecord>) {
        {
            let mut discovery = self.discovery.borrow_mut();
            if discovery.records == records {
                return;
            }
            discovery.records = records;
            discovery.genctr += 1;
        }
        for controller in self.all_controllers() {
            if controller.is_discovery() {
                controller.raise(AsyncEvent::DISCOVERY_CHANGE);
            }
        }
    }

    /// Every association with a subsystem (the discovery subsystem's included).
    #[must_use]
    pub fn associations(&self) -> Vec<Association> {
        self.all_controllers()
            .iter()
            .map(|controller| controller.association().clone())
            .collect()
    }

    /// Drops an association.
    pub fn drop_association(&self, cntlid: u16) {
        let controller = self.controllers.borrow().get(&cntlid).cloned();
        if let Some(controller) = controller {
            controller.close("association dropped");
        }
    }

    /// Ends every `serve` of this registry: no more connections are accepted, commands in execution finish and are
    /// answered, connections close.
    pub fn shutdown(&self) {
        self.shutdown.send_replace(true);
    }

    pub(crate) fn shutdown_receiver(&self) -> watch::Receiver<bool> {
        self.shutdown.subscribe()
    }

    pub(crate) fn subsystem(&self, subnqn: &Nqn) -> Option<Rc<Subsystem>> {
        self.subsystems.borrow().get(subnqn).cloned()
    }

    /// The discovery log as `hostnqn` sees it.
    pub(crate) fn discovery_log(&self, hostnqn: &Nqn) -> (u64, Vec<DiscoveryEntry>) {
        let discovery = self.discovery.borrow();
        let entries = discovery
            .records
            .iter()
            .filter(|record| record.hosts.contains(hostnqn))
            .map(|record| DiscoveryEntry::tcp(&record.subnqn, record.address, record.portid))
            .collect();
        (discovery.genctr, entries)
    }

    /// A controller identifier that is free, the one given last comes last.
    pub(crate) fn free_cntlid(&self) -> Option<u16> {
        let controllers = self.controllers.borrow();
        let (min, max) = (self.config.cntlid_min, self.config.cntlid_max);
        let last = self.cntlid_last.get();
        let after = last.saturating_add(1).max(min)..=max;
        let cntlid = after
            .chain(min..=last)
            .find(|cntlid| !controllers.contains_key(cntlid))?;
        self.cntlid_last.set(cntlid);
        Some(cntlid)
    }

    pub(crate) fn insert_controller(&self, controller: Rc<Controller>) {
        self.controllers
            .borrow_mut()
            .insert(controller.association().cntlid, controller);
    }

    pub(crate) fn remove_controller(&self, cntlid: u16) {
        self.controllers.borrow_mut().remove(&cntlid);
    }

    pub(crate) fn controller(&self, cntlid: u16) -> Option<Rc<Controller>> {
        self.controllers.borrow().get(&cntlid).cloned()
    }

    fn all_controllers(&self) -> Vec<Rc<Controller>> {
        self.controllers.borrow().values().cloned().collect()
    }

    fn controllers_of(&self, subsystem: &Rc<Subsystem>) -> Vec<Rc<Controller>> {
        let mut controllers = self.all_controllers();
        controllers.retain(|controller| controller.is_of(subsystem));
        controllers
    }

    fn namespace_event(&self, subsystem: &Rc<Subsystem>, nsid: u32) {
        for controller in self.controllers_of(subsystem) {
            controller.namespace_changed(nsid);
        }
    }

    fn expect_subsystem(&self, subnqn: &Nqn) -> Result<Rc<Subsystem>, RegistryError> {
        self.subsystem(subnqn)
            .ok_or_else(|| RegistryError::NoSuchSubsystem(subnqn.clone()))
    }

    fn expect_namespace(&self, subsystem: &Subsystem, nsid: u32) -> Result<Rc<Namespace>, RegistryError> {
        let namespace = subsystem.namespaces.borrow().get(&nsid).cloned();
        namespace.ok_or_else(|| RegistryError::NoSuchNamespace {
            subnqn: subsystem.config.nqn.clone(),
            nsid,
        })
    }

    /// Passes reservation notices on to the controllers of the hosts concerned, as long as the namespace is
    /// presented.
    fn subscribe(
        self: &Rc<Self>,
        reserved: &crate::reservation::ReservedNamespace,
        subsystem: &Rc<Subsystem>,
        nsid: u32,
    ) {
        let registry: Weak<Self> = Rc::downgrade(self);
        let subsystem = Rc::downgrade(subsystem);
        reserved.subscribe(move |notice: Notice| {
            let (Some(registry), Some(subsystem)) = (registry.upgrade(), subsystem.upgrade()) else {
                return false;
            };
            if !subsystem.namespaces.borrow().contains_key(&nsid) {
                return false;
            }
            for controller in registry.controllers_of(&subsystem) {
                if controller.association().hostid == notice.host {
                    controller.reservation_notice(nsid, notice.kind);
                }
            }
            true
        });
    }
}

impl Subsystem {
    pub(crate) fn allows(&self, hostnqn: &Nqn) -> bool {
        self.hosts.borrow().contains(hostnqn)
    }

    /// What dropped connections of a host still have in a device.
    pub(crate) fn outstanding(&self, hostnqn: &Nqn, hostid: HostId) -> Rc<Outstanding> {
        let mut all = self.outstanding.borrow_mut();
        // Hosts come and go with fresh identifiers: forget those with neither connections nor commands.
        all.retain(|_, outstanding| Rc::strong_count(outstanding) > 1 || outstanding.dropped() > 0);
        Rc::clone(all.entry((hostnqn.clone(), hostid)).or_default())
    }

    /// The ANA log page of this node.
    pub(crate) fn ana_log(&self, groups_only: bool) -> AnaLog {
        let namespaces = self.namespaces.borrow();
        let groups = self.ana_groups.borrow();
        let groups = groups
            .iter()
            .map(|(&anagrpid, group)| AnaGroup {
                anagrpid,
                change_count: group.change_count.get(),
                state: group.state.get(),
                nsids: namespaces
                    .values()
                    .filter(|namespace| !groups_only && namespace.ana_group == anagrpid)
                    .map(|namespace| namespace.nsid)
                    .collect(),
            })
            .collect();
        AnaLog {
            change_count: self.ana_change_count.get(),
            groups,
        }
    }
}

fn in_range(what: &'static str, value: u32, max: u32) -> Result<(), RegistryError> {
    if (1..=max).contains(&value) {
        Ok(())
    } else {
        Err(RegistryError::OutOfRange { what, value, max })
    }
}
