//! Pools and volumes as an operator changes them.

use std::collections::BTreeSet;

use weft_proto::band::{ChunkAddress, ChunkSize, Geometry};
use weft_proto::id::{Epoch, LayerId, NodeId, PoolId, VolumeId};
use weft_proto::nqn::Nqn;
use weft_proto::units::BLOCK_BYTES;

use super::command::{NewPool, NewVolume, Refusal, Reply};
use super::layout::VolumeLayout;
use super::map::{Domain, DriveState, Phase, Pool, Presentation, Volume};
use super::{ClusterState, check_name, invalid};

/// Bands that a volume's live blocks may fill. Hosts leave as much garbage beside them, and a root, which names every band, has room for
/// some 550,000 (the engine's checkpoint: 20 bytes a band in 2,700 blocks).
const FULL_BANDS_MAX: u64 = 1 << 18;

impl ClusterState {
    pub(super) fn create_pool(&mut self, new: NewPool) -> Result<Reply, Refusal> {
        check_name("name", &new.name)?;
        check_geometry(new.geometry)?;
        if new.classes.is_empty() {
            return Err(invalid("classes", "at least one"));
        }
        if let Some(known) = self.map.pool_named(&new.name) {
            let same =
                known.geometry == new.geometry && known.domain == new.domain && known.classes == new.classes;
            return if same {
                Ok(Reply::Pool(known.id))
            } else {
                Err(Refusal::NameTaken(new.name))
            };
        }
        let id = PoolId(self.next.pool);
        self.next.pool += 1;
        let NewPool {
            name,
            geometry,
            domain,
            classes,
        } = new;
        self.map.pools.insert(
            id,
            Pool {
                id,
                name,
                geometry,
                domain,
                classes,
                tight: false,
            },
        );
        self.map_changed();
        Ok(Reply::Pool(id))
    }

    pub(super) fn create_volume(&mut self, new: NewVolume) -> Result<Reply, Refusal> {
        if let Some(known) = self.map.volume_named(&new.name) {
            return if known.uuid == new.uuid {
                Ok(Reply::Volume(known.id))
            } else {
                Err(Refusal::NameTaken(new.name))
            };
        }
        check_name("name", &new.name)?;
        if !matches!(new.block_bytes, 512 | 4096) {
            return Err(invalid("block_bytes", "512 or 4096"));
        }
        let pool = self
            .map
            .pools
            .get(&new.pool)
            .ok_or(Refusal::NoSuchPool(new.pool))?;
        let geometry = new.geometry.unwrap_or(pool.geometry);
        check_geometry(geometry)?;
        self.check_size(new.size_bytes, geometry)?;
        if self
            .map
            .volumes
            .values()
            .any(|volume| volume.subnqn == new.subnqn)
        {
            return Err(Refusal::NameTaken(new.subnqn.to_string()));
        }
        if let Some(node) = new.preferred {
            self.check_node_known(node)?;
        }
        self.check_presentation(&new.presentation)?;
        // Drives that are down for the moment count: a volume may be created while a server restarts.
        let domains: BTreeSet<Domain> = self
            .map
            .drives
            .values()
            .filter(|drive| {
                matches!(drive.state, DriveState::Online | DriveState::Offline)
                    && pool.classes.contains(&drive.class)
            })
            .map(|drive| self.map.domain(drive, pool.domain))
            .collect();
        if domains.len() < usize::from(geometry.n()) {
            return Err(too_few_domains(domains.len(), geometry));
        }
        let id = VolumeId(self.next.volume);
        self.next.volume += 1;
        let layer = LayerId(self.next.layer);
        self.next.layer += 1;
        let NewVolume {
            name,
            pool,
            size_bytes,
            block_bytes,
            geometry: _,
            uuid,
            subnqn,
            allowed_hosts,
            presentation,
            preferred,
        } = new;
        self.map.volumes.insert(
            id,
            Volume {
                id,
                name,
                pool,
                size_bytes,
                block_bytes,
                geometry,
                uuid,
                subnqn,
                allowed_hosts,
                presentation,
                layer,
                epoch: Epoch(0),
                phase: Phase::Unowned,
                preferred,
                move_to: None,
            },
        );
        self.layouts.insert(id, VolumeLayout::default());
        self.touched.volumes.insert(id);
        self.map_changed();
        Ok(Reply::Volume(id))
    }

    pub(super) fn resize_volume(&mut self, id: VolumeId, size_bytes: u64) -> Result<Reply, Refusal> {
        let geometry = self.volume_mut(id)?.geometry;
        self.check_size(size_bytes, geometry)?;
        let volume = self.volume_mut(id)?;
        if size_bytes < volume.size_bytes {
            return Err(Refusal::WouldShrink {
                size_bytes,
                current_bytes: volume.size_bytes,
            });
        }
        if size_bytes == volume.size_bytes {
            return Ok(Reply::Unchanged);
        }
        volume.size_bytes = size_bytes;
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn delete_volume(&mut self, id: VolumeId) -> Result<Reply, Refusal> {
        let Some(volume) = self.map.volumes.get_mut(&id) else {
            return self.absent_volume(id);
        };
        match volume.phase {
            Phase::Deleting { .. } => return Ok(Reply::Unchanged),
            Phase::Unowned => self.forget_volume(id),
            Phase::Recovering { owner, .. } | Phase::Serving { owner } => {
                volume.phase = Phase::Deleting { owner: Some(owner) };
                volume.move_to = None;
            }
        }
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn finish_delete(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        unsettled: Option<&[ChunkAddress]>,
    ) -> Result<Reply, Refusal> {
        let Some(volume) = self.map.volumes.get(&id) else {
            return self.absent_volume(id);
        };
        let Phase::Deleting { owner } = volume.phase else {
            return Err(Refusal::WrongPhase(id));
        };
        if epoch != volume.epoch {
            return Err(Refusal::Stale {
                epoch,
                current: volume.epoch,
            });
        }
        // Only the owner knows what has completed of all it ever sent, and only while it counts: from a dead one the
        // word may be of any age, and its chunks wait for its fencing.
        if let (Some(owner), Some(unsettled)) = (owner, unsettled)
            && self.map.is_live(owner.incarnation)
        {
            self.layout_mut(id).settle_epoch(owner.epoch, unsettled);
        }
        self.forget_volume(id);
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn allow_host(&mut self, id: VolumeId, host: Nqn) -> Result<Reply, Refusal> {
        if !self.volume_mut(id)?.allowed_hosts.insert(host) {
            return Ok(Reply::Unchanged);
        }
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn disallow_host(&mut self, id: VolumeId, host: &Nqn) -> Result<Reply, Refusal> {
        if !self.volume_mut(id)?.allowed_hosts.remove(host) {
            return Ok(Reply::Unchanged);
        }
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn set_presentation(
        &mut self,
        id: VolumeId,
        presentation: Presentation,
    ) -> Result<Reply, Refusal> {
        self.check_presentation(&presentation)?;
        let volume = self.volume_mut(id)?;
        if volume.presentation == presentation {
            return Ok(Reply::Unchanged);
        }
        volume.presentation = presentation;
        self.map_changed();
        Ok(Reply::Applied)
    }

    pub(super) fn request_move(&mut self, id: VolumeId, to: Option<NodeId>) -> Result<Reply, Refusal> {
        if let Some(node) = to {
            self.check_node_up(node)?;
        }
        let volume = self.volume_mut(id)?;
        let already_there = volume.phase.owner().map(|owner| owner.node) == to;
        let wish = to.filter(|_| !already_there);
        if volume.move_to == wish {
            return Ok(Reply::Unchanged);
        }
        volume.move_to = wish;
        self.map_changed();
        Ok(Reply::Applied)
    }

    /// A deletion that is asked for again has been done.
    fn absent_volume(&self, id: VolumeId) -> Result<Reply, Refusal> {
        if id.0 != 0 && id.0 < self.next.volume {
            Ok(Reply::Unchanged)
        } else {
            Err(Refusal::NoSuchVolume(id))
        }
    }

    fn forget_volume(&mut self, id: VolumeId) {
        let bands: Vec<_> = self
            .layouts
            .get(&id)
            .map(|layout| layout.bands.keys().copied().collect())
            .unwrap_or_default();
        for band in bands {
            self.free_band(id, band, &[]);
        }
        debug_assert!(
            self.layouts
                .get(&id)
                .is_none_or(|layout| layout.replacements.is_empty()),
            "a replacement goes with its band"
        );
        self.layouts.remove(&id);
        self.touched.volumes.insert(id);
        self.map.volumes.remove(&id);
    }

    fn check_size(&self, size_bytes: u64, geometry: Geometry) -> Result<(), Refusal> {
        if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(invalid("size_bytes", "whole blocks of 4096 bytes, at least one"));
        }
        let by_settings = self
            .map
            .cluster
            .as_ref()
            .map_or(u64::MAX, |cluster| cluster.settings.volume_bytes_max);
        let max_bytes = by_settings.min(FULL_BANDS_MAX * u64::from(geometry.k) * ChunkSize::Mib64.bytes());
        if size_bytes > max_bytes {
            return Err(Refusal::VolumeTooLarge {
                geometry,
                size_bytes,
                max_bytes,
            });
        }
        Ok(())
    }

    fn check_presentation(&self, presentation: &Presentation) -> Result<(), Refusal> {
        match presentation {
            Presentation::All => Ok(()),
            Presentation::Nodes(nodes) => nodes.iter().try_for_each(|node| self.check_node_known(*node)),
        }
    }

    fn check_node_known(&self, node: NodeId) -> Result<(), Refusal> {
        match self.map.nodes.contains_key(&node) {
            true => Ok(()),
            false => Err(Refusal::NoSuchNode(node)),
        }
    }
}

/// The refusal that says what would fit: the same m, and as many data shards as there are domains for.
pub(super) fn too_few_domains(available: usize, geometry: Geometry) -> Refusal {
    let available = u32::try_from(available).unwrap_or(u32::MAX);
    let k = u8::try_from(available)
        .unwrap_or(u8::MAX)
        .saturating_sub(geometry.m)
        .min(geometry.k);
    Refusal::TooFewDomains {
        available,
        needed: u32::from(geometry.n()),
        fits: Geometry::new(k, geometry.m),
    }
}

/// A geometry that came over the wire has not been through its constructor.
fn check_geometry(geometry: Geometry) -> Result<(), Refusal> {
    match Geometry::new(geometry.k, geometry.m) {
        Some(_) => Ok(()),
        None => Err(invalid("geometry", "1 to 16 data and 1 to 4 parity shards")),
    }
}
