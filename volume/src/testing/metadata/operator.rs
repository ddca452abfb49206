//! What a harness does to the metadata service: the operator's and the other nodes' part.

use std::collections::{BTreeMap, BTreeSet};

use weft_proto::band::{Band, ChunkAddress, EpochGrant, Geometry, RootPointer};
use weft_proto::id::{BandId, DriveId, Epoch, IncarnationId, LayerId, StripeNumber, VolumeId};

use super::{MetadataSpec, Volume};
use crate::seams::DirectoryError;
use crate::testing::world::World;

impl World {
    /// Changes how the service behaves.
    pub fn configure_metadata(&self, spec: MetadataSpec) {
        self.metadata.borrow_mut().spec = spec;
    }

    /// Creates a volume. Its first epoch recovers nothing.
    pub fn create_volume(&self, id: VolumeId, size_bytes: u64, geometry: Geometry) {
        let volume = Volume {
            layer: LayerId(id.0),
            epoch: Epoch(0),
            serving: None,
            owners: BTreeMap::new(),
            superseded: BTreeSet::new(),
            size_bytes,
            geometry,
            root_version: 0,
            root: None,
            ended: Vec::new(),
        };
        self.metadata.borrow_mut().volumes.insert(id, volume);
    }

    /// Grants `incarnation` the next epoch of a volume. From now on everybody before it is stale; that they are fenced is
    /// the caller's part ([`World::superseded`]).
    ///
    /// It serves once its takeover is finished, also where there is nothing to recover: before that nothing of it counts.
    ///
    /// # Panics
    /// When there is no such volume.
    pub fn begin_takeover(&self, id: VolumeId, incarnation: IncarnationId) -> EpochGrant {
        let mut guard = self.metadata.borrow_mut();
        let metadata = &mut *guard;
        metadata.give_up(self, |attempt| attempt.volume == id);
        let volume = metadata.volumes.get_mut(&id).expect("a volume that was created");
        let before = volume.epoch;
        if before.0 > 0 && !volume.ended.iter().any(|(ended, _)| *ended == before) {
            volume.superseded.insert(before);
        }
        // A takeover that was not finished counts for nothing.
        let abandoned = (before.0 > 0 && volume.serving != Some(before)).then_some(before);
        let abandoned = abandoned.filter(|epoch| !volume.ended.iter().any(|(ended, _)| ended == epoch));
        volume.epoch = Epoch(before.0 + 1);
        volume.owners.insert(volume.epoch, incarnation);
        let recover = volume.serving;
        let (epoch, layer, size_bytes, geometry) =
            (volume.epoch, volume.layer, volume.size_bytes, volume.geometry);
        let (root_version, root, ended) = (volume.root_version, volume.root, volume.ended.clone());
        if let Some(abandoned) = abandoned {
            let bands: Vec<BandId> = metadata
                .bands
                .values()
                .filter(|granted| granted.band.volume == id && granted.band.epoch == abandoned)
                .map(|granted| granted.band.id)
                .collect();
            for band in bands {
                metadata.free_band(self, band, &[]);
            }
        }
        EpochGrant {
            volume: id,
            layer,
            epoch,
            recover,
            size_bytes,
            geometry,
            root_version,
            root,
            bands: metadata.listed(id, false),
            ended,
        }
    }

    /// Records a clean hand-over: `epoch` ended at its last stripe, and there is nothing to recover.
    ///
    /// # Errors
    /// [`DirectoryError::Stale`] when it is not the volume's epoch.
    pub fn hand_over(
        &self,
        id: VolumeId,
        epoch: Epoch,
        last: StripeNumber,
        unsettled: &[ChunkAddress],
    ) -> Result<(), DirectoryError> {
        let mut metadata = self.metadata.borrow_mut();
        let volume = metadata.volume(id, epoch)?;
        volume.ended.push((epoch, last));
        volume.serving = None;
        metadata.give_up(self, |attempt| attempt.volume == id);
        for granted in metadata
            .bands
            .values_mut()
            .filter(|granted| granted.band.volume == id)
        {
            let of_band = unsettled
                .iter()
                .filter(|chunk| granted.band.columns.contains(chunk));
            granted.unsettled.extend(of_band);
        }
        Ok(())
    }

    /// The incarnations that must be fenced before the current epoch of a volume may serve.
    #[must_use]
    pub fn superseded(&self, id: VolumeId) -> BTreeSet<IncarnationId> {
        let metadata = self.metadata.borrow();
        metadata.volumes.get(&id).map_or_else(BTreeSet::new, |volume| {
            volume
                .superseded
                .iter()
                .map(|epoch| volume.owners[epoch])
                .collect()
        })
    }

    /// Takes a drive out of service for new bands, or back in.
    pub fn set_out(&self, drive: DriveId, out: bool) {
        let mut metadata = self.metadata.borrow_mut();
        if out {
            metadata.out.insert(drive);
        } else {
            metadata.out.remove(&drive);
        }
    }

    /// The bands of a volume that count, the current epoch's included.
    #[must_use]
    pub fn bands_of(&self, id: VolumeId) -> Vec<Band> {
        self.metadata.borrow().listed(id, true)
    }

    /// The version of the volume's root, and where it lies.
    #[must_use]
    pub fn root_of(&self, id: VolumeId) -> Option<(u64, RootPointer)> {
        let metadata = self.metadata.borrow();
        let volume = metadata.volumes.get(&id)?;
        volume.root.map(|root| (volume.root_version, root))
    }

    /// MiB of a drive that no band has.
    #[must_use]
    pub fn free_mib(&self, drive: DriveId) -> u32 {
        let drive = self.drive(drive);
        let mut metadata = self.metadata.borrow_mut();
        metadata.release_quarantine(self);
        metadata.free_mib(&drive)
    }
}
