//! Cluster, nodes, incarnations, drives and registrations.

use std::collections::{BTreeMap, BTreeSet};

use weft_proto::band::WINDOW_ROWS_DEFAULT;
use weft_proto::id::{DriveId, HostId, IncarnationId, NodeId};

use super::command::{NewDrive, NewNode, Refusal, Reply};
use super::layout::DriveChunks;
use super::map::{
    Cluster, Drive, DriveHome, DriveState, Incarnation, IncarnationState, Node, NodeState, Presentation,
    Registration, Settings,
};
use super::space::DriveSpace;
use super::{ClusterState, check_name, invalid};

impl ClusterState {
    pub(super) fn init(&mut self, cluster: Cluster) -> Result<Reply, Refusal> {
        if let Some(current) = &self.map.cluster {
            return if current.id == cluster.id {
                Ok(Reply::Unchanged)
            } else {
                Err(Refusal::AlreadyInitialised(current.id))
            };
        }
        check_name("name", &cluster.name)?;
        check_settings(&cluster.settings)?;
        if cluster.fencing_key == 0 {
            return Err(invalid("fencing_key", "not 0"));
        }
        self.map.cluster = Some(cluster);
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn set_settings(&mut self, settings: Settings) -> Result<Reply, Refusal> {
        check_settings(&settings)?;
        let cluster = self.map.cluster.as_mut().ok_or(Refusal::NotInitialised)?;
        if cluster.settings == settings {
            return Ok(Reply::Unchanged);
        }
        cluster.settings = settings;
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn add_node(&mut self, new: NewNode) -> Result<Reply, Refusal> {
        check_node(&new)?;
        if let Some(known) = self.map.node_named(&new.name) {
            // The same name from the same address is the same agent asking again.
            return if known.control_address == new.control_address {
                Ok(Reply::Node(known.id))
            } else {
                Err(Refusal::NameTaken(new.name))
            };
        }
        let id = NodeId(self.next.node);
        self.next.node += 1;
        let NewNode {
            name,
            rack,
            control_address,
            nvme_address,
        } = new;
        self.map.nodes.insert(
            id,
            Node {
                id,
                name,
                rack,
                control_address,
                nvme_address,
                state: NodeState::Down,
                incarnation: None,
            },
        );
        self.map_changed();
        Ok(Reply::Node(id))
    }

    pub(super) fn update_node(&mut self, id: NodeId, update: NewNode) -> Result<Reply, Refusal> {
        check_node(&update)?;
        if self
            .map
            .node_named(&update.name)
            .is_some_and(|other| other.id != id)
        {
            return Err(Refusal::NameTaken(update.name));
        }
        let node = self.map.nodes.get_mut(&id).ok_or(Refusal::NoSuchNode(id))?;
        let NewNode {
            name,
            rack,
            control_address,
            nvme_address,
        } = update;
        let updated = Node {
            name,
            rack,
            control_address,
            nvme_address,
            ..node.clone()
        };
        if *node == updated {
            return Ok(Reply::Unchanged);
        }
        *node = updated;
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn remove_node(&mut self, id: NodeId) -> Result<Reply, Refusal> {
        let Some(node) = self.map.nodes.get(&id) else {
            return if id.0 < self.next.node {
                Ok(Reply::Unchanged)
            } else {
                Err(Refusal::NoSuchNode(id))
            };
        };
        let incarnation = node.incarnation;
        let homed: Vec<DriveId> = self
            .map
            .drives
            .values()
            .filter(|drive| drive.home == DriveHome::Node(id) && drive.state != DriveState::Removed)
            .map(|drive| drive.id)
            .collect();
        let in_use = homed
            .iter()
            .filter(|drive| {
                self.chunks
                    .get(drive)
                    .is_some_and(|chunks| chunks.space.allocated_mib() > 0)
            })
            .count();
        let volumes = self
            .map
            .volumes
            .values()
            .filter(|volume| volume.phase.owner().is_some_and(|owner| owner.node == id))
            .count();
        if in_use > 0 || volumes > 0 {
            return Err(Refusal::NodeInUse {
                node: id,
                drives: u32::try_from(in_use).unwrap_or(u32::MAX),
                volumes: u32::try_from(volumes).unwrap_or(u32::MAX),
            });
        }
        for drive in homed {
            self.take_out(drive);
        }
        self.map.nodes.remove(&id);
        for volume in self.map.volumes.values_mut() {
            volume.preferred = volume.preferred.filter(|node| *node != id);
            volume.move_to = volume.move_to.filter(|node| *node != id);
            if let Presentation::Nodes(nodes) = &mut volume.presentation {
                nodes.remove(&id);
            }
        }
        if let Some(incarnation) = incarnation {
            self.kill(incarnation);
        }
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn start_incarnation(
        &mut self,
        node: NodeId,
        host_id: HostId,
        key: u64,
    ) -> Result<Reply, Refusal> {
        if key == 0 {
            return Err(invalid("key", "not 0"));
        }
        let previous = self
            .map
            .nodes
            .get(&node)
            .ok_or(Refusal::NoSuchNode(node))?
            .incarnation;
        let same = |found: &Incarnation| found.host_id == host_id && found.key == key;
        if let Some(known) = self.map.incarnations.values().find(|found| same(found)) {
            // The same draw is the same process asking again; it may have been declared dead since.
            return match known.state {
                IncarnationState::Live if known.node == node => Ok(Reply::Incarnation(known.id)),
                IncarnationState::Live | IncarnationState::Dead => Err(Refusal::IncarnationIsDead(known.id)),
            };
        }
        if let Some(previous) = previous {
            self.kill(previous);
        }
        let id = IncarnationId(self.next.incarnation);
        self.next.incarnation += 1;
        self.map.incarnations.insert(
            id,
            Incarnation {
                id,
                node,
                host_id,
                key,
                state: IncarnationState::Live,
            },
        );
        if let Some(node) = self.map.nodes.get_mut(&node) {
            node.incarnation = Some(id);
            node.state = NodeState::Up;
        }
        self.map_changed();
        Ok(Reply::Incarnation(id))
    }

    pub(super) fn mark_dead(&mut self, id: IncarnationId) -> Result<Reply, Refusal> {
        if !self.map.is_live(id) {
            return if id.0 < self.next.incarnation {
                Ok(Reply::Unchanged)
            } else {
                Err(Refusal::NoSuchIncarnation(id))
            };
        }
        self.kill(id);
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn add_drive(&mut self, new: NewDrive) -> Result<Reply, Refusal> {
        check_name("name", &new.name)?;
        if new.start_mib == 0 {
            return Err(invalid("start_mib", "at least 1, the label is before it"));
        }
        if new.end_mib <= new.start_mib {
            return Err(invalid("end_mib", "more than start_mib"));
        }
        if new.registrants_max < 2 {
            return Err(invalid(
                "registrants_max",
                "at least 2: the cluster and one incarnation",
            ));
        }
        if let DriveHome::Node(node) = &new.home
            && !self.map.nodes.contains_key(node)
        {
            return Err(Refusal::NoSuchNode(*node));
        }
        let in_cluster = |drive: &&Drive| drive.uuid == new.uuid && drive.state != DriveState::Removed;
        if let Some(known) = self.map.drives.values().find(in_cluster) {
            return if known.home == new.home && known.name == new.name {
                Ok(Reply::Drive(known.id))
            } else {
                Err(Refusal::DriveKnown {
                    uuid: known.uuid,
                    drive: known.id,
                })
            };
        }
        if self.map.drive_named(&new.name).is_some() {
            return Err(Refusal::NameTaken(new.name));
        }
        let id = DriveId(self.next.drive);
        self.next.drive += 1;
        let NewDrive {
            uuid,
            name,
            home,
            class,
            start_mib,
            end_mib,
            registrants_max,
        } = new;
        self.map.drives.insert(
            id,
            Drive {
                id,
                uuid,
                name,
                home,
                class,
                start_mib,
                end_mib,
                state: DriveState::Online,
                registrants_max,
                registrations: BTreeMap::new(),
            },
        );
        self.chunks.insert(
            id,
            DriveChunks {
                space: DriveSpace::new(start_mib, end_mib),
                quarantine: BTreeMap::new(),
            },
        );
        self.touched.drives.insert(id);
        self.map_changed();
        Ok(Reply::Drive(id))
    }

    pub(super) fn set_drive_state(&mut self, id: DriveId, state: DriveState) -> Result<Reply, Refusal> {
        let drive = self.map.drives.get_mut(&id).ok_or(Refusal::NoSuchDrive(id))?;
        match (drive.state, state) {
            (current, state) if current == state => return Ok(Reply::Unchanged),
            (DriveState::Removed, _) => return Err(Refusal::DriveIsRemoved(id)),
            (_, DriveState::Removed) => {
                let allocated_mib = self
                    .chunks
                    .get(&id)
                    .map_or(0, |chunks| chunks.space.allocated_mib());
                if allocated_mib > 0 {
                    return Err(Refusal::DriveInUse {
                        drive: id,
                        allocated_mib,
                    });
                }
                self.take_out(id);
            }
            (_, state) => drive.state = state,
        }
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn record_registrations(
        &mut self,
        incarnation: IncarnationId,
        drives: &BTreeSet<DriveId>,
    ) -> Result<Reply, Refusal> {
        if !self.map.is_live(incarnation) {
            return Err(Refusal::IncarnationIsDead(incarnation));
        }
        for id in drives {
            let drive = self.map.drives.get(id).ok_or(Refusal::NoSuchDrive(*id))?;
            match drive.registrations.get(&incarnation) {
                Some(Registration::Registered) => continue,
                Some(Registration::Fenced) => {
                    return Err(Refusal::Fenced {
                        incarnation,
                        drive: *id,
                    });
                }
                None => {}
            }
            if drive.state == DriveState::Removed {
                return Err(Refusal::DriveIsRemoved(*id));
            }
            let registered = drive
                .registrations
                .values()
                .filter(|registration| **registration == Registration::Registered)
                .count();
            // One place is the cluster's own registration.
            if registered + 1 >= drive.registrants_max as usize {
                return Err(Refusal::TooManyRegistrants {
                    drive: *id,
                    max: drive.registrants_max,
                });
            }
        }
        let mut changed = false;
        for id in drives {
            if let Some(drive) = self.map.drives.get_mut(id) {
                changed |= drive
                    .registrations
                    .insert(incarnation, Registration::Registered)
                    .is_none();
            }
        }
        if !changed {
            return Ok(Reply::Unchanged);
        }
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn record_fenced(
        &mut self,
        incarnation: IncarnationId,
        drives: &BTreeSet<DriveId>,
    ) -> Result<Reply, Refusal> {
        if !self.map.incarnations.contains_key(&incarnation) {
            return if incarnation.0 < self.next.incarnation {
                Ok(Reply::Unchanged)
            } else {
                Err(Refusal::NoSuchIncarnation(incarnation))
            };
        }
        if let Some(unknown) = drives.iter().find(|id| !self.map.drives.contains_key(id)) {
            return Err(Refusal::NoSuchDrive(*unknown));
        }
        let mut changed = false;
        for id in drives {
            // Fencing is recorded even where no registration was on record: the incarnation may have registered
            // and died before it could say so.
            if let Some(drive) = self.map.drives.get_mut(id) {
                let before = drive.registrations.insert(incarnation, Registration::Fenced);
                changed |= before != Some(Registration::Fenced);
            }
            if let Some(chunks) = self.chunks_mut(*id) {
                chunks.release_quarantine(incarnation);
            }
        }
        changed |= self.bury_if_fenced(incarnation);
        if !changed {
            return Ok(Reply::Unchanged);
        }
        self.map_changed();
        Ok(Reply::Applied)
    }

    /// Declares an incarnation dead, and gone at once where it is on record nowhere.
    fn kill(&mut self, id: IncarnationId) {
        let Some(incarnation) = self.map.incarnations.get_mut(&id) else {
            return;
        };
        incarnation.state = IncarnationState::Dead;
        if let Some(node) = self.map.nodes.get_mut(&incarnation.node)
            && node.incarnation == Some(id)
        {
            node.state = NodeState::Down;
        }
        self.bury_if_fenced(id);
    }

    /// A dead incarnation that no drive has on record as registered is gone: it and its records are forgotten.
    fn bury_if_fenced(&mut self, id: IncarnationId) -> bool {
        let dead = self
            .map
            .incarnations
            .get(&id)
            .is_some_and(|incarnation| incarnation.state == IncarnationState::Dead);
        let registered = self
            .map
            .drives
            .values()
            .any(|drive| drive.registrations.get(&id) == Some(&Registration::Registered));
        if !dead || registered {
            return false;
        }
        self.map.incarnations.remove(&id);
        let mut recorded = Vec::new();
        for drive in self.map.drives.values_mut() {
            if drive.registrations.remove(&id).is_some() {
                recorded.push(drive.id);
            }
        }
        for drive in recorded {
            if let Some(chunks) = self.chunks_mut(drive) {
                chunks.release_quarantine(id);
            }
        }
        true
    }

    /// Removes a drive without chunks, and lets go of the dead that only it had on record.
    fn take_out(&mut self, id: DriveId) {
        let Some(drive) = self.map.drives.get_mut(&id) else {
            return;
        };
        drive.state = DriveState::Removed;
        let recorded = std::mem::take(&mut drive.registrations);
        self.chunks.remove(&id);
        self.touched.drives.insert(id);
        for incarnation in recorded.into_keys() {
            self.bury_if_fenced(incarnation);
        }
    }
}

fn check_settings(settings: &Settings) -> Result<(), Refusal> {
    if !matches!(settings.voters, 1 | 3 | 5) {
        return Err(invalid("voters", "1, 3 or 5"));
    }
    if settings.volume_bytes_max == 0 {
        return Err(invalid("volume_bytes_max", "more than 0"));
    }
    if settings.window_rows < WINDOW_ROWS_DEFAULT {
        return Err(invalid("window_rows", "256 or more"));
    }
    Ok(())
}

fn check_node(new: &NewNode) -> Result<(), Refusal> {
    check_name("name", &new.name)?;
    if let Some(rack) = &new.rack {
        check_name("rack", rack)?;
    }
    for (field, address) in [
        ("control_address", &new.control_address),
        ("nvme_address", &new.nvme_address),
    ] {
        let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(_))) || address.len() > 255 {
            return Err(invalid(field, "host:port"));
        }
    }
    Ok(())
}
