//! What this node presents, as the cluster map says: its drives to members, and volumes to the hosts they list.
//!
//! Each map is compared with what is presented, and only differences are acted upon: nothing here remembers how it
//! came about.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;

use metrics::gauge;
use weft_block::{Device, DeviceInfo};
use weft_initiator::HostIdentity;
use weft_metadata::state::ClusterMap;
use weft_metadata::state::map::{Phase, Volume};
use weft_proto::id::{ClusterId, DriveId, DriveUuid, NodeId, VolumeId};
use weft_proto::nqn::Nqn;
use weft_proto::nvme::log::AnaState;
use weft_target::reservation::ReservedNamespace;
use weft_target::{
    AllowedHosts, DeviceFactory, DiscoveryRecord, NamespaceConfig, Registry, RegistryError, Source,
    SubsystemConfig,
};

use super::route::{Served, Slot};
use crate::metrics::SILENCED_VOLUMES;
use crate::view;

/// NSID of the one namespace of every subsystem we present.
const NSID: u32 = 1;

/// What a volume's device says of itself; its size follows the map.
fn volume_info(volume: &Volume) -> DeviceInfo {
    DeviceInfo {
        block_bytes: volume.block_bytes,
        blocks: volume.size_bytes / u64::from(volume.block_bytes),
        transfer_bytes_max: 1 << 20,
        volatile_write_cache: false,
        deallocated_reads_zero: true,
    }
}

struct Presented {
    slot: Rc<Slot>,
    subnqn: Nqn,
    hosts: BTreeSet<Nqn>,
    size_bytes: u64,
}

/// An engine of this node.
struct Engine {
    device: Device,
    /// Whether it has been without its lease for so long that hosts should not wait for it.
    silenced: bool,
}

impl Engine {
    /// Where its volume is served as long as it is here, and what hosts are told of this path.
    fn path(&self) -> (Served, AnaState) {
        if self.silenced {
            (Served::Nowhere, AnaState::INACCESSIBLE)
        } else {
            (Served::Here(self.device.clone()), AnaState::OPTIMIZED)
        }
    }
}

/// The presenter of one node.
pub(crate) struct Presenter {
    registry: Rc<Registry>,
    cluster: ClusterId,
    node: NodeId,
    volumes: RefCell<BTreeMap<VolumeId, Presented>>,
    /// Volumes with an engine here.
    engines: RefCell<BTreeMap<VolumeId, Engine>>,
    drives: RefCell<BTreeMap<DriveId, DriveUuid>>,
    members: RefCell<BTreeSet<Nqn>>,
}

impl Presenter {
    /// Presents nothing yet.
    pub(crate) fn new(registry: Rc<Registry>, cluster: ClusterId, node: NodeId) -> Rc<Self> {
        gauge!(SILENCED_VOLUMES).set(0);
        Rc::new(Self {
            registry,
            cluster,
            node,
            volumes: RefCell::default(),
            engines: RefCell::default(),
            drives: RefCell::default(),
            members: RefCell::default(),
        })
    }

    /// Presents a drive of this server to members.
    ///
    /// # Errors
    /// It is presented already.
    pub(crate) fn add_drive(
        &self,
        drive: DriveId,
        uuid: DriveUuid,
        namespace: ReservedNamespace,
    ) -> Result<(), RegistryError> {
        let subnqn = view::drive_subnqn(self.cluster, uuid);
        self.registry.add_subsystem(SubsystemConfig {
            nqn: subnqn.clone(),
            serial: serial(uuid.0),
            model: "Weft drive".to_owned(),
            hosts: AllowedHosts::List(self.members.borrow().clone()),
            namespaces_max: NSID,
        })?;
        self.drives.borrow_mut().insert(drive, uuid);
        self.registry.add_namespace(
            &subnqn,
            NamespaceConfig {
                nsid: NSID,
                uuid: uuid.0,
                ana_group: 1,
                ana_state: AnaState::OPTIMIZED,
                source: Source::Reserved(namespace),
            },
        )
    }

    /// An engine of this node serves the volume from now on.
    pub(crate) fn engine_serves(&self, volume: VolumeId, device: Device) {
        let engine = Engine {
            device,
            silenced: false,
        };
        self.engines.borrow_mut().insert(volume, engine);
        self.follow_engine(volume);
    }

    /// No engine of this node serves the volume any more.
    pub(crate) fn engine_stopped(&self, volume: VolumeId) {
        self.engines.borrow_mut().remove(&volume);
        self.follow_engine(volume);
    }

    /// The engine of this node has no lease. What waits for it ends with an unknown outcome, and its path says that it does not serve.
    pub(crate) fn engine_silenced(&self, volume: VolumeId) {
        if self.set_silenced(volume, true)
            && let Some(presented) = self.volumes.borrow().get(&volume)
        {
            presented.slot.silence();
        }
    }

    /// It has its lease again.
    pub(crate) fn engine_speaks_again(&self, volume: VolumeId) {
        let _ = self.set_silenced(volume, false);
    }

    /// Whether there is such an engine: one that has stopped serving, in a hand-over, says nothing of the volume's path any more.
    fn set_silenced(&self, volume: VolumeId, silenced: bool) -> bool {
        match self.engines.borrow_mut().get_mut(&volume) {
            Some(engine) => engine.silenced = silenced,
            None => return false,
        }
        self.follow_engine(volume);
        true
    }

    /// Makes a volume's path agree with its engine here, or with there being none. Not left to the next map: that may have named this owner
    /// long before, and not change again.
    fn follow_engine(&self, volume: VolumeId) {
        self.count_silenced();
        let volumes = self.volumes.borrow();
        let Some(presented) = volumes.get(&volume) else {
            return;
        };
        let (served, state) = self
            .engines
            .borrow()
            .get(&volume)
            .map_or((Served::Nowhere, AnaState::NON_OPTIMIZED), Engine::path);
        presented.slot.set_served(served);
        if let Err(error) = self.registry.set_ana_state(&presented.subnqn, NSID, state) {
            tracing::error!(subnqn = %presented.subnqn, %error, "access state not changed");
        }
    }

    fn count_silenced(&self) {
        let engines = self.engines.borrow();
        let silenced = engines.values().filter(|engine| engine.silenced).count();
        gauge!(SILENCED_VOLUMES).set(silenced as f64);
    }

    /// Makes what is presented agree with the map.
    pub(crate) fn follow(&self, map: &ClusterMap) {
        self.follow_members(map);
        let wanted: BTreeMap<VolumeId, &Volume> = map
            .volumes
            .iter()
            .filter(|(_, volume)| {
                volume.presentation.includes(self.node) && !matches!(volume.phase, Phase::Deleting { .. })
            })
            .map(|(id, volume)| (*id, volume))
            .collect();
        let gone: Vec<VolumeId> = self
            .volumes
            .borrow()
            .keys()
            .filter(|id| !wanted.contains_key(id))
            .copied()
            .collect();
        for volume in gone {
            self.withdraw(volume, map);
        }
        for (id, volume) in &wanted {
            if let Err(error) = self.present(*id, volume, map) {
                // Two volumes never share a name, so this would be our own mistake; the other volumes go on.
                tracing::error!(volume = %volume.name, %error, "volume not presented");
            }
        }
        self.registry.set_discovery(discovery_records(map));
    }

    fn follow_members(&self, map: &ClusterMap) {
        let members: BTreeSet<Nqn> = map
            .nodes
            .values()
            .map(|node| view::node_host_nqn(self.cluster, &node.name))
            .collect();
        if *self.members.borrow() == members {
            return;
        }
        self.members.borrow_mut().clone_from(&members);
        for uuid in self.drives.borrow().values() {
            let subnqn = view::drive_subnqn(self.cluster, *uuid);
            if let Err(error) = self
                .registry
                .set_hosts(&subnqn, AllowedHosts::List(members.clone()))
            {
                tracing::error!(%subnqn, %error, "members not updated");
            }
        }
    }

    fn present(&self, id: VolumeId, volume: &Volume, map: &ClusterMap) -> Result<(), RegistryError> {
        let subnqn = &volume.subnqn;
        let owner_subnqn = view::owner_subnqn(subnqn);
        let known = self.volumes.borrow().contains_key(&id);
        if !known {
            let slot = Slot::new(owner_subnqn.clone(), volume_info(volume));
            let routed = slot.clone();
            self.add_volume_subsystem(
                subnqn,
                volume,
                Rc::new(move |association, arrival| {
                    let host = HostIdentity {
                        hostnqn: association.hostnqn.clone(),
                        hostid: association.hostid,
                    };
                    routed.device(host, association.kato, arrival)
                }),
            )?;
            let owned = slot.clone();
            self.add_volume_subsystem(&owner_subnqn, volume, Rc::new(move |_, _| owned.owner_device()))?;
            let presented = Presented {
                slot,
                subnqn: subnqn.clone(),
                hosts: volume.allowed_hosts.clone(),
                size_bytes: volume.size_bytes,
            };
            self.volumes.borrow_mut().insert(id, presented);
        }
        let mut volumes = self.volumes.borrow_mut();
        let presented = volumes.get_mut(&id).expect("presented above");
        if presented.hosts != volume.allowed_hosts {
            presented.hosts.clone_from(&volume.allowed_hosts);
            let hosts = AllowedHosts::List(volume.allowed_hosts.clone());
            self.registry.set_hosts(subnqn, hosts.clone())?;
            self.registry.set_hosts(&owner_subnqn, hosts)?;
        }
        if presented.size_bytes != volume.size_bytes {
            presented.size_bytes = volume.size_bytes;
            presented.slot.set_info(volume_info(volume));
            self.registry.namespace_resized(subnqn, NSID)?;
            self.registry.namespace_resized(&owner_subnqn, NSID)?;
        }
        let (served, state) = match (self.engines.borrow().get(&id), volume.phase) {
            (Some(engine), _) => engine.path(),
            (None, Phase::Serving { owner }) if owner.node != self.node => {
                let address = map
                    .nodes
                    .get(&owner.node)
                    .and_then(|node| node.nvme_address.parse().ok());
                (
                    address.map_or(Served::Nowhere, Served::By),
                    AnaState::NON_OPTIMIZED,
                )
            }
            // Being taken over: this path will serve again in a moment, so it does not pretend to be gone.
            (None, _) => (Served::Nowhere, AnaState::NON_OPTIMIZED),
        };
        presented.slot.set_served(served);
        self.registry.set_ana_state(subnqn, NSID, state)
    }

    fn add_volume_subsystem(
        &self,
        subnqn: &Nqn,
        volume: &Volume,
        factory: DeviceFactory,
    ) -> Result<(), RegistryError> {
        self.registry.add_subsystem(SubsystemConfig {
            nqn: subnqn.clone(),
            serial: serial(volume.uuid),
            model: "Weft volume".to_owned(),
            hosts: AllowedHosts::List(volume.allowed_hosts.clone()),
            namespaces_max: NSID,
        })?;
        self.registry.add_namespace(
            subnqn,
            NamespaceConfig {
                nsid: NSID,
                uuid: volume.uuid,
                ana_group: 1,
                ana_state: AnaState::NON_OPTIMIZED,
                source: Source::PerAssociation(factory),
            },
        )
    }

    fn withdraw(&self, id: VolumeId, map: &ClusterMap) {
        self.volumes.borrow_mut().remove(&id);
        let kept: BTreeSet<Nqn> = {
            let volumes = self.volumes.borrow();
            let named = map.volumes.iter().filter(|(id, _)| volumes.contains_key(id));
            named
                .flat_map(|(_, volume)| [volume.subnqn.clone(), view::owner_subnqn(&volume.subnqn)])
                .collect()
        };
        let drives: BTreeSet<Nqn> = self
            .drives
            .borrow()
            .values()
            .map(|uuid| view::drive_subnqn(self.cluster, *uuid))
            .collect();
        for subnqn in self.registry.subsystems() {
            if !kept.contains(&subnqn)
                && !drives.contains(&subnqn)
                && let Err(error) = self.registry.remove_subsystem(&subnqn)
            {
                tracing::error!(%subnqn, %error, "subsystem not withdrawn");
            }
        }
    }
}

/// One record for each path of each volume, shown to the volume's hosts.
fn discovery_records(map: &ClusterMap) -> Vec<DiscoveryRecord> {
    let mut records = Vec::new();
    for volume in map.volumes.values() {
        for node in map
            .nodes
            .values()
            .filter(|node| volume.presentation.includes(node.id))
        {
            let Ok(address) = node.nvme_address.parse::<SocketAddr>() else {
                continue;
            };
            records.push(DiscoveryRecord {
                subnqn: volume.subnqn.clone(),
                address,
                portid: u16::try_from(node.id.0).unwrap_or(u16::MAX),
                hosts: AllowedHosts::List(volume.allowed_hosts.clone()),
            });
        }
    }
    records
}

/// The first 20 hexadecimal digits of a UUID: as many as a serial number holds.
fn serial(uuid: [u8; 16]) -> String {
    uuid.iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}
