//! Bands: granted, returned, freed; roots: recorded by compare-and-swap.

use std::collections::{BTreeMap, BTreeSet};

use weft_proto::band::{Band, ChunkAddress, ChunkSize, Geometry, RootUpdate};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{BandId, DriveId, Epoch, IncarnationId, VolumeId};

use super::command::{BandProposal, Purpose, Refusal, Reply};
use super::layout::{ANSWERS_KEPT, BandRecord, Quarantined, VolumeLayout};
use super::map::{Pool, Registration};
use super::{ClusterState, invalid};

/// Bands in one command: bounds what a peer makes the log carry.
pub(crate) const BANDS_PER_GRANT_MAX: usize = 256;

impl VolumeLayout {
    /// An ended epoch without bands has no stripes left to judge. The last one stays: it tells a repeated
    /// hand-over from a new one.
    pub(super) fn forget_ended_without_bands(&mut self) {
        let Some(last) = self.ended.last().copied() else {
            return;
        };
        let with_bands: BTreeSet<Epoch> = self.bands.values().map(|record| record.band.epoch).collect();
        self.ended
            .retain(|ended| *ended == last || with_bands.contains(&ended.0));
    }
}

impl ClusterState {
    pub(super) fn grant_bands(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        request: u64,
        purpose: Purpose,
        size: ChunkSize,
        proposals: &[BandProposal],
    ) -> Result<Reply, Refusal> {
        let owner = self.owner_at(id, epoch)?;
        if let Some(bands) = self.answered(id, request) {
            return Ok(Reply::Bands(bands));
        }
        if proposals.is_empty() || proposals.len() > BANDS_PER_GRANT_MAX {
            return Err(invalid("proposals", "1 to 256 bands"));
        }
        let cluster = self.map.cluster.as_ref().ok_or(Refusal::NotInitialised)?;
        let window_rows = cluster.settings.window_rows;
        let volume = self.volume(id)?;
        let (layer, geometry) = (volume.layer, volume.geometry);
        let pool = self
            .map
            .pools
            .get(&volume.pool)
            .ok_or(Refusal::NoSuchPool(volume.pool))?;
        for proposal in proposals {
            self.check_proposal(proposal, geometry, pool, owner.incarnation)?;
        }
        let columns: u64 = proposals
            .iter()
            .map(|proposal| proposal.drives.len() as u64)
            .sum();
        let space = self.pool_space(pool);
        let needed_mib = columns * u64::from(size.mib());
        let kept_mib = match purpose {
            Purpose::User => space.reserve_mib(),
            Purpose::Internal => 0,
        };
        let free_mib = match purpose {
            Purpose::User => space.free_reach_mib,
            Purpose::Internal => space.free_mib,
        };
        if free_mib < needed_mib + kept_mib {
            return Err(Refusal::NoSpace {
                free_mib: space.free_reach_mib,
                reserve_mib: space.reserve_mib(),
            });
        }
        let chunks = self.allocate(proposals, size)?;
        let mut granted = Vec::with_capacity(proposals.len());
        for (proposal, columns) in proposals.iter().zip(chunks) {
            let band = Band {
                id: BandId(self.next.band),
                volume: id,
                layer,
                epoch,
                geometry: proposal.geometry,
                chunk_size: size,
                window_rows: window_rows.min(size.rows()),
                version: 0,
                columns,
            };
            self.next.band += 1;
            granted.push(band);
        }
        // The next band's number is kept with the map.
        self.touched.map = true;
        let layout = self.layout_mut(id);
        for band in &granted {
            layout.bands.insert(
                band.id,
                BandRecord {
                    band: band.clone(),
                    writer: owner.incarnation,
                    settled: false,
                    unsettled: BTreeSet::new(),
                    replaced: BTreeMap::new(),
                },
            );
        }
        if layout.answered.len() >= ANSWERS_KEPT {
            layout.answered.remove(0);
        }
        let ids = granted.iter().map(|band| band.id).collect();
        layout.answered.push((request, ids));
        Ok(Reply::Bands(granted))
    }

    /// The bands that answered this request before, as they are now.
    fn answered(&self, id: VolumeId, request: u64) -> Option<Vec<Band>> {
        let layout = self.layouts.get(&id)?;
        let (_, bands) = layout.answered.iter().find(|(known, _)| *known == request)?;
        Some(
            bands
                .iter()
                .filter_map(|band| layout.bands.get(band))
                .map(|record| record.band.clone())
                .collect(),
        )
    }

    fn check_proposal(
        &self,
        proposal: &BandProposal,
        wanted: Geometry,
        pool: &Pool,
        incarnation: IncarnationId,
    ) -> Result<(), Refusal> {
        let BandProposal { geometry, drives } = proposal;
        // Short of domains k shrinks and m stays: redundancy never silently drops.
        if geometry.m != wanted.m || geometry.k == 0 || geometry.k > wanted.k {
            return Err(invalid("geometry", "the volume's m, and at most its k"));
        }
        if drives.len() != usize::from(geometry.n()) {
            return Err(invalid("drives", "one for each of k + m columns"));
        }
        let mut domains = BTreeSet::new();
        for id in drives {
            let conflict = Refusal::ProposalConflict { drive: *id };
            let drive = self.map.drives.get(id).ok_or(Refusal::NoSuchDrive(*id))?;
            let usable = self.map.in_service(drive)
                && pool.classes.contains(&drive.class)
                && drive.registrations.get(&incarnation) == Some(&Registration::Registered)
                && domains.insert(self.map.domain(drive, pool.domain));
            if !usable {
                return Err(conflict);
            }
        }
        Ok(())
    }

    /// All chunks of all proposals, or none.
    fn allocate(
        &mut self,
        proposals: &[BandProposal],
        size: ChunkSize,
    ) -> Result<Vec<Vec<ChunkAddress>>, Refusal> {
        let mut bands: Vec<Vec<ChunkAddress>> = Vec::with_capacity(proposals.len());
        for proposal in proposals {
            let mut columns = Vec::with_capacity(proposal.drives.len());
            for &drive in &proposal.drives {
                let offset = self
                    .chunks_mut(drive)
                    .and_then(|chunks| chunks.space.allocate(size));
                match offset {
                    Some(offset_mib) => columns.push(ChunkAddress { drive, offset_mib }),
                    None => {
                        for chunk in bands.iter().flatten().chain(&columns) {
                            self.release(*chunk, size);
                        }
                        return Err(Refusal::ProposalConflict { drive });
                    }
                }
            }
            bands.push(columns);
        }
        Ok(bands)
    }

    pub(super) fn release(&mut self, chunk: ChunkAddress, size: ChunkSize) {
        if let Some(chunks) = self.chunks_mut(chunk.drive) {
            let released = chunks.space.release(chunk.offset_mib, size);
            debug_assert!(released, "a chunk is held by one band, which gives it back once");
        }
    }

    pub(super) fn return_bands(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        bands: &[BandId],
    ) -> Result<Reply, Refusal> {
        self.owner_at(id, epoch)?;
        let layout = self.layout_mut(id);
        let root = layout.root.map(|root| root.band);
        let mut present = Vec::new();
        for band in bands {
            match layout.bands.get(band) {
                // It was written after all.
                Some(_) if root == Some(*band) => return Err(Refusal::NoSuchBand(*band)),
                Some(record) if record.band.epoch == epoch => present.push(*band),
                Some(_) => return Err(Refusal::NoSuchBand(*band)),
                // Returned before: the answer was lost.
                None => {}
            }
        }
        if present.is_empty() {
            return Ok(Reply::Unchanged);
        }
        for band in &present {
            if let Some(record) = layout.bands.get_mut(band) {
                record.settled = true;
            }
        }
        for band in present {
            self.free_band(id, band, &[]);
        }
        Ok(Reply::Applied)
    }

    pub(super) fn publish_root(&mut self, update: &RootUpdate) -> Result<Reply, Refusal> {
        self.owner_at(update.volume, update.epoch)?;
        if !matches!(
            self.volume(update.volume)?.phase,
            super::map::Phase::Serving { .. }
        ) {
            // A root of an epoch that does not serve yet comes with the end of its takeover.
            return Err(Refusal::WrongPhase(update.volume));
        }
        self.record_root(update)
    }

    /// Compare-and-swap of the root, and the bands freed with it. The caller has checked the epoch.
    pub(super) fn record_root(&mut self, update: &RootUpdate) -> Result<Reply, Refusal> {
        if let Some(reply) = self.repeated_root(update) {
            return Ok(reply);
        }
        let id = update.volume;
        let owner = self.owner_at(id, update.epoch)?;
        let layout = self.layout_mut(id);
        if layout.root_version != update.expected_version && !planted(Bug::NoCompareAndSwap) {
            return Err(Refusal::RootConflict {
                expected: update.expected_version,
                current: layout.root_version,
            });
        }
        // The root is a stripe of a band that stays.
        if !layout.bands.contains_key(&update.root.band) || update.freed.contains(&update.root.band) {
            return Err(Refusal::NoSuchBand(update.root.band));
        }
        if let Some(unknown) = update.freed.iter().find(|band| !layout.bands.contains_key(band)) {
            return Err(Refusal::NoSuchBand(*unknown));
        }
        layout.root = Some(update.root);
        layout.root_version += 1;
        let version = layout.root_version;
        for band in &update.freed {
            // The live owner frees what it wrote under this epoch only when all of it has completed, but for the chunks
            // it lists. Of earlier epochs it knows nothing, even where it was the owner then: what was under way at their
            // end waits for the fencing of whoever wrote it, and so does what others wrote.
            if let Some(record) = self.layout_mut(id).bands.get_mut(band) {
                record.settled |= record.writer == owner.incarnation && record.band.epoch == update.epoch;
            }
            self.free_band(id, *band, &update.unsettled);
        }
        self.layout_mut(id).forget_ended_without_bands();
        Ok(Reply::Root { version })
    }

    /// The answer to a root that is already the current one.
    pub(super) fn repeated_root(&self, update: &RootUpdate) -> Option<Reply> {
        let layout = self.layouts.get(&update.volume)?;
        let version = update.expected_version.checked_add(1)?;
        (layout.root == Some(update.root) && layout.root_version == version)
            .then_some(Reply::Root { version })
    }

    /// Takes a band out of the directory; its chunks are free, or in quarantine where a write of its writer may
    /// still be under way.
    pub(super) fn free_band(&mut self, id: VolumeId, band: BandId, unsettled: &[ChunkAddress]) {
        let Some(record) = self.layout_mut(id).bands.remove(&band) else {
            return;
        };
        self.give_up_replacements(id, |replacement| replacement.band == band);
        let size = record.band.chunk_size;
        for (column, chunk) in (0u8..).zip(&record.band.columns) {
            if record.unsettled_writer(column).is_none() && !unsettled.contains(chunk) {
                self.release(*chunk, size);
            } else {
                self.quarantine(*chunk, size, record.writer_of(column));
            }
        }
    }

    /// Keeps a chunk from reuse until `writer` is fenced on its drive; free at once where it is.
    pub(super) fn quarantine(&mut self, chunk: ChunkAddress, size: ChunkSize, writer: IncarnationId) {
        if self.map.is_fenced(writer, chunk.drive) || planted(Bug::NoQuarantine) {
            self.release(chunk, size);
        } else if let Some(chunks) = self.chunks_mut(chunk.drive) {
            chunks
                .quarantine
                .insert(chunk.offset_mib, Quarantined { size, writer });
        }
    }

    /// The volume's bands as they are now: chunks may have been replaced by a rebuild.
    #[must_use]
    pub fn bands(&self, id: VolumeId) -> Option<Vec<Band>> {
        let layout = self.layouts.get(&id)?;
        Some(layout.bands.values().map(|record| record.band.clone()).collect())
    }

    /// The drives on which a band could be granted to `incarnation` now, as far as registrations go.
    #[must_use]
    pub fn registered_drives(&self, incarnation: IncarnationId) -> BTreeSet<DriveId> {
        self.map
            .drives
            .values()
            .filter(|drive| drive.registrations.get(&incarnation) == Some(&Registration::Registered))
            .map(|drive| drive.id)
            .collect()
    }
}
