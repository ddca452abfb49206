//! Who owns a volume: takeover and planned hand-over.
//!
//! ```text
//!            BeginTakeover              FinishTakeover
//!  Unowned ───────────────► Recovering ───────────────► Serving
//!                            ▲   │ ▲                      │ │
//!                            └───┘ └──────────────────────┘ │
//!                       BeginTakeover   BeginTakeover       │
//!                         (again from       (from E)        │
//!                          the same E)                      │
//!                            ▲          Handover            │
//!                            └──────────────────────────────┘
//!                               (recover: None, E is settled)
//! ```
//!
//! Epochs only grow. A takeover is refused while the former owner is live: the leader declares it dead in the same
//! batch, so that two incarnations cannot both be right. Whether the dead one can still write is not decided here but
//! on the drives; [`ClusterState::finish_takeover`] checks that the fence is on record where it has to be.

use weft_proto::band::{ChunkAddress, EpochGrant, RootUpdate};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{BandId, Epoch, IncarnationId, NodeId, StripeNumber, VolumeId};

use super::ClusterState;
use super::command::{Refusal, Reply};
use super::map::{NodeState, Owner, Phase};

impl ClusterState {
    pub(super) fn begin_takeover(
        &mut self,
        node: NodeId,
        incarnation: IncarnationId,
        volumes: &[(VolumeId, Epoch)],
    ) -> Result<Reply, Refusal> {
        let found = self
            .map
            .incarnations
            .get(&incarnation)
            .ok_or(Refusal::NoSuchIncarnation(incarnation))?;
        if found.node != node {
            return Err(Refusal::NoSuchIncarnation(incarnation));
        }
        if !self.map.is_live(incarnation) {
            return Err(Refusal::IncarnationIsDead(incarnation));
        }
        let version = self.map.version;
        let answers = volumes
            .iter()
            .map(|&(volume, expected)| (volume, self.take_over_one(node, incarnation, volume, expected)))
            .collect();
        debug_assert!(self.map.version >= version);
        Ok(Reply::Takeovers(answers))
    }

    fn take_over_one(
        &mut self,
        node: NodeId,
        incarnation: IncarnationId,
        id: VolumeId,
        expected: Epoch,
    ) -> Result<Epoch, Refusal> {
        let volume = self.volume(id)?;
        let recover = match volume.phase {
            Phase::Unowned => None,
            Phase::Serving { owner } => Some(owner.epoch),
            Phase::Recovering { recover, .. } => recover,
            Phase::Deleting { .. } => return Err(Refusal::NoSuchVolume(id)),
        };
        if let (Phase::Recovering { owner, .. }, true) = (volume.phase, volume.epoch.0 == expected.0 + 1)
            && owner.incarnation == incarnation
        {
            // The answer of the first attempt was lost.
            return Ok(volume.epoch);
        }
        if volume.epoch != expected {
            return Err(Refusal::Stale {
                epoch: expected,
                current: volume.epoch,
            });
        }
        if let Some(owner) = volume.phase.owner()
            && self.map.is_live(owner.incarnation)
        {
            return Err(Refusal::OwnerIsLive {
                volume: id,
                incarnation: owner.incarnation,
            });
        }
        if matches!(volume.phase, Phase::Recovering { .. }) {
            self.abandon_epoch(id, expected);
        }
        Ok(self.grant_epoch(id, node, incarnation, recover))
    }

    /// Frees the bands of an epoch that never began to serve: nothing of it counts. Their chunks stay in quarantine
    /// until its owner is fenced.
    fn abandon_epoch(&mut self, id: VolumeId, epoch: Epoch) {
        let bands: Vec<BandId> = self
            .layout_mut(id)
            .bands
            .values()
            .filter(|record| record.band.epoch == epoch)
            .map(|record| record.band.id)
            .collect();
        for band in bands {
            self.free_band(id, band, &[]);
        }
    }

    fn grant_epoch(
        &mut self,
        id: VolumeId,
        node: NodeId,
        incarnation: IncarnationId,
        recover: Option<Epoch>,
    ) -> Epoch {
        self.layout_mut(id).answered.clear();
        // What the former epoch's rebuilds were writing counts no more, and is not known to have ended.
        self.give_up_replacements(id, |_| true);
        let Some(volume) = self.map.volumes.get_mut(&id) else {
            unreachable!("the caller has just found volume {id}");
        };
        if !(planted(Bug::ReuseEpoch) && matches!(volume.phase, Phase::Recovering { .. })) {
            volume.epoch.0 += 1;
        }
        volume.move_to = volume.move_to.filter(|wish| *wish != node);
        let epoch = volume.epoch;
        volume.phase = Phase::Recovering {
            owner: Owner {
                epoch,
                node,
                incarnation,
            },
            recover,
        };
        self.map_changed();
        epoch
    }

    pub(super) fn finish_takeover(
        &mut self,
        update: &RootUpdate,
        recovered: Option<Epoch>,
        ended_at: StripeNumber,
    ) -> Result<Reply, Refusal> {
        let id = update.volume;
        let owner = self.owner_at(id, update.epoch)?;
        let recover = match self.volume(id)?.phase {
            Phase::Recovering { recover, .. } => recover,
            Phase::Serving { .. } => {
                return self.repeated_root(update).ok_or(Refusal::WrongPhase(id));
            }
            Phase::Unowned | Phase::Deleting { .. } => return Err(Refusal::WrongPhase(id)),
        };
        if recover != recovered {
            return Err(Refusal::WrongPhase(id));
        }
        if let Some(recovered) = recovered {
            self.check_fenced(id, recovered)?;
        }
        let reply = self.record_root(update)?;
        if let Some(recovered) = recovered {
            self.end_epoch(id, recovered, ended_at);
        }
        self.volume_mut(id)?.phase = Phase::Serving { owner };
        self.map_changed();
        Ok(reply)
    }

    /// The writer of the recovered epoch must be on record as fenced on n − m drives of each of its bands: then it
    /// has no m + 1 drives left to complete a write or to hold a lease with (design section 5).
    fn check_fenced(&self, id: VolumeId, recovered: Epoch) -> Result<(), Refusal> {
        let records = self
            .layouts
            .get(&id)
            .into_iter()
            .flat_map(|layout| layout.bands.values());
        for record in records.filter(|record| record.band.epoch == recovered) {
            let fenced = record
                .band
                .columns
                .iter()
                .filter(|chunk| self.map.is_fenced(record.writer, chunk.drive))
                .count();
            let needed = usize::from(record.band.geometry.k);
            if fenced < needed {
                return Err(Refusal::NotFenced {
                    band: record.band.id,
                    fenced: u32::try_from(fenced).unwrap_or(u32::MAX),
                    needed: u32::try_from(needed).unwrap_or(u32::MAX),
                });
            }
        }
        Ok(())
    }

    pub(super) fn handover(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        last_stripe: StripeNumber,
        update: Option<&RootUpdate>,
        unsettled: &[ChunkAddress],
        to: NodeId,
    ) -> Result<Reply, Refusal> {
        if let Some(reply) = self.repeated_handover(id, epoch, last_stripe, to) {
            return Ok(reply);
        }
        self.owner_at(id, epoch)?;
        if !matches!(self.volume(id)?.phase, Phase::Serving { .. }) {
            return Err(Refusal::WrongPhase(id));
        }
        let incarnation = self.check_node_up(to)?;
        if let Some(update) = update {
            if update.volume != id || update.epoch != epoch {
                return Err(Refusal::Stale {
                    epoch: update.epoch,
                    current: epoch,
                });
            }
            self.record_root(update)?;
        }
        self.layout_mut(id).settle_epoch(epoch, unsettled);
        self.end_epoch(id, epoch, last_stripe);
        let volume = self.volume_mut(id)?;
        volume.move_to = None;
        Ok(Reply::Epoch(self.grant_epoch(id, to, incarnation, None)))
    }

    fn repeated_handover(
        &self,
        id: VolumeId,
        epoch: Epoch,
        last_stripe: StripeNumber,
        to: NodeId,
    ) -> Option<Reply> {
        let volume = self.map.volumes.get(&id)?;
        let owner = volume.phase.owner()?;
        let ended = self.layouts.get(&id)?.ended.last()? == &(epoch, last_stripe);
        (ended && volume.epoch.0 == epoch.0 + 1 && owner.node == to).then_some(Reply::Epoch(volume.epoch))
    }

    fn end_epoch(&mut self, id: VolumeId, epoch: Epoch, at: StripeNumber) {
        let layout = self.layout_mut(id);
        layout.ended.push((epoch, at));
        layout.forget_ended_without_bands();
    }

    /// The live incarnation of a node that is up.
    pub(super) fn check_node_up(&self, id: NodeId) -> Result<IncarnationId, Refusal> {
        let node = self.map.nodes.get(&id).ok_or(Refusal::NoSuchNode(id))?;
        match (node.state, node.incarnation) {
            (NodeState::Up, Some(incarnation)) => Ok(incarnation),
            (NodeState::Up, None) | (NodeState::Down, _) => Err(Refusal::NodeIsDown(id)),
        }
    }

    /// Everything the owner of the current epoch needs to recover and serve; `None` if the volume is not
    /// [`Phase::Recovering`].
    #[must_use]
    pub fn epoch_grant(&self, id: VolumeId) -> Option<EpochGrant> {
        let volume = self.map.volumes.get(&id)?;
        let Phase::Recovering { owner, recover } = volume.phase else {
            return None;
        };
        let layout = self.layouts.get(&id)?;
        Some(EpochGrant {
            volume: id,
            layer: volume.layer,
            epoch: owner.epoch,
            recover,
            size_bytes: volume.size_bytes,
            geometry: volume.geometry,
            root_version: layout.root_version,
            root: layout.root,
            bands: layout
                .bands
                .values()
                .filter(|record| record.band.epoch != owner.epoch)
                .map(|record| record.band.clone())
                .collect(),
            ended: layout.ended.clone(),
        })
    }
}
