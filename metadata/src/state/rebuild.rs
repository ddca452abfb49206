//! Rebuild: a fresh chunk for one lost column of a band, and its installation.
//!
//! ```text
//!  GrantReplacement ──► granted ── InstallReplacement ──► the column's chunk, version + 1
//!                          │                               (the old one: free, or in quarantine of its writer)
//!                          └── ReturnReplacement, another grant, the band freed, the epoch ended
//!                                  ──► free, or in quarantine of the rebuilder
//! ```
//!
//! What it promises: (band, row, column) keeps its meaning while the chunk behind a column changes; a chunk is granted to one
//! attempt only, and is reused only when every write ever sent to it has completed or its sender is fenced on that drive
//! (design section 3, invariant 3). The compare-and-swap on the band's version keeps two replacements, each of which was checked
//! against the other's former column, from ending in one failure domain.
//!
//! What it does not do: reconstruct a byte, or decide which column is lost. Only the owner of the volume rebuilds, and only
//! while it serves. `docs/design/rebuild-step.md` says what another rebuilder would take.

use weft_proto::band::{ChunkAddress, Replacement};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{BandId, DriveId, Epoch, IncarnationId, VolumeId};

use super::ClusterState;
use super::command::{Refusal, ReplacementRequest, Reply};
use super::layout::{BandRecord, GrantedReplacement, Replaced};
use super::map::{Owner, Phase, Registration};

impl ClusterState {
    pub(super) fn grant_replacement(
        &mut self,
        wanted: &ReplacementRequest,
        drive: DriveId,
    ) -> Result<Reply, Refusal> {
        let ReplacementRequest {
            volume: id,
            epoch,
            request,
            band,
            column,
            version,
        } = *wanted;
        let owner = self.serving_owner(id, epoch)?;
        if let Some(answer) = self.granted_before(wanted) {
            return Ok(Reply::Replacement(answer));
        }
        let record = self.band_at(id, band, version)?;
        let size = record.band.chunk_size;
        if usize::from(column) >= record.band.columns.len() {
            return Err(Refusal::NoSuchColumn { band, column });
        }
        self.check_replacement(id, record, column, drive, owner.incarnation)?;
        let pool = &self.map.pools[&self.volume(id)?.pool];
        let space = self.pool_space(pool);
        // Redundancy comes first: the reserve is there for it.
        if space.free_mib < u64::from(size.mib()) {
            return Err(Refusal::NoSpace {
                free_mib: space.free_reach_mib,
                reserve_mib: space.reserve_mib(),
            });
        }
        let chunk = self
            .chunks_mut(drive)
            .and_then(|chunks| chunks.space.allocate(size))
            .map(|offset_mib| ChunkAddress { drive, offset_mib })
            .ok_or(Refusal::ProposalConflict { drive })?;
        // Each attempt takes a fresh chunk, and an earlier one for this column may still be writing to its own.
        self.give_up_replacements(id, |other| other.band == band && other.column == column);
        let replacement = Replacement {
            request,
            band,
            column,
            version,
            chunk,
        };
        self.layout_mut(id).replacements.push(GrantedReplacement {
            replacement,
            size,
            writer: owner.incarnation,
        });
        Ok(Reply::Replacement(replacement))
    }

    pub(super) fn install_replacement(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        replacement: &Replacement,
        settled: bool,
    ) -> Result<Reply, Refusal> {
        let owner = self.serving_owner(id, epoch)?;
        let Replacement { band, column, .. } = *replacement;
        let layout = self.layouts.get(&id).ok_or(Refusal::NoSuchBand(band))?;
        let record = layout.bands.get(&band).ok_or(Refusal::NoSuchBand(band))?;
        let installed = record.replaced.get(&column).map(|replaced| replaced.installed);
        if installed == Some(*replacement) {
            // The answer was lost.
            return Ok(Reply::Band(record.band.clone()));
        }
        if record.band.version != replacement.version {
            return Err(Refusal::BandConflict {
                band,
                expected: replacement.version,
                current: record.band.version,
            });
        }
        let granted = layout
            .replacements
            .iter()
            .position(|granted| granted.replacement == *replacement && granted.writer == owner.incarnation)
            .ok_or(Refusal::NoSuchReplacement { band, column })?;
        let old = *record
            .band
            .columns
            .get(usize::from(column))
            .ok_or(Refusal::NoSuchColumn { band, column })?;
        let size = record.band.chunk_size;
        // The live owner knows how its own writes of this epoch have ended, and of nobody else's.
        let own = settled && record.writer == owner.incarnation && record.band.epoch == epoch;
        let unsettled = record
            .unsettled_writer(column)
            .filter(|_| !own && !planted(Bug::ReplacedChunkIsFree));

        let layout = self.layout_mut(id);
        let granted = layout.replacements.remove(granted);
        let Some(record) = layout.bands.get_mut(&band) else {
            unreachable!("band {band} has just been found");
        };
        record.band.columns[usize::from(column)] = replacement.chunk;
        record.band.version += 1;
        record.replaced.insert(
            column,
            Replaced {
                writer: granted.writer,
                installed: *replacement,
            },
        );
        let band = record.band.clone();
        match unsettled {
            Some(writer) => self.quarantine(old, size, writer),
            None => self.release(old, size),
        }
        Ok(Reply::Band(band))
    }

    pub(super) fn return_replacement(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        replacement: &Replacement,
        settled: bool,
    ) -> Result<Reply, Refusal> {
        let owner = self.owner_at(id, epoch)?;
        let layout = self.layout_mut(id);
        let of_this = |granted: &GrantedReplacement| granted.replacement == *replacement;
        let Some(index) = layout.replacements.iter().position(of_this) else {
            // Installed, returned before, or given up and in quarantine.
            return Ok(Reply::Unchanged);
        };
        let granted = layout.replacements.remove(index);
        if settled && granted.writer == owner.incarnation {
            self.release(replacement.chunk, granted.size);
        } else {
            self.quarantine(replacement.chunk, granted.size, granted.writer);
        }
        Ok(Reply::Applied)
    }

    /// Ends attempts to rebuild: a write of theirs may be under way, so their chunks wait for the fence of whoever got them.
    pub(super) fn give_up_replacements(&mut self, id: VolumeId, ends: impl Fn(&Replacement) -> bool) {
        let Some(layout) = self.layouts.get(&id) else {
            return;
        };
        if !layout
            .replacements
            .iter()
            .any(|granted| ends(&granted.replacement))
        {
            return;
        }
        let layout = self.layout_mut(id);
        let (ended, kept) = std::mem::take(&mut layout.replacements)
            .into_iter()
            .partition(|granted| ends(&granted.replacement));
        layout.replacements = kept;
        let ended: Vec<GrantedReplacement> = ended;
        for granted in ended {
            if planted(Bug::GivenUpChunkIsFree) {
                self.release(granted.replacement.chunk, granted.size);
            } else {
                self.quarantine(granted.replacement.chunk, granted.size, granted.writer);
            }
        }
    }

    /// The gate of a rebuild: an epoch that does not serve yet has bands of its own to recover first.
    fn serving_owner(&self, id: VolumeId, epoch: Epoch) -> Result<Owner, Refusal> {
        let owner = self.owner_at(id, epoch)?;
        match self.volume(id)?.phase {
            Phase::Serving { .. } => Ok(owner),
            Phase::Unowned | Phase::Recovering { .. } | Phase::Deleting { .. } => {
                Err(Refusal::WrongPhase(id))
            }
        }
    }

    /// The chunk that answered this request before, while its attempt counts.
    fn granted_before(&self, wanted: &ReplacementRequest) -> Option<Replacement> {
        let replacements = &self.layouts.get(&wanted.volume)?.replacements;
        replacements
            .iter()
            .map(|granted| granted.replacement)
            .find(|known| {
                (known.request, known.band, known.column, known.version)
                    == (wanted.request, wanted.band, wanted.column, wanted.version)
            })
    }

    fn band_at(&self, id: VolumeId, band: BandId, version: u64) -> Result<&BandRecord, Refusal> {
        let record = self
            .layouts
            .get(&id)
            .and_then(|layout| layout.bands.get(&band))
            .ok_or(Refusal::NoSuchBand(band))?;
        if record.band.version == version {
            Ok(record)
        } else {
            Err(Refusal::BandConflict {
                band,
                expected: version,
                current: record.band.version,
            })
        }
    }

    /// The rules for the drives of a band, for one column beside the others as they lie now.
    fn check_replacement(
        &self,
        id: VolumeId,
        record: &BandRecord,
        column: u8,
        drive: DriveId,
        incarnation: IncarnationId,
    ) -> Result<(), Refusal> {
        let pool = self.volume(id)?.pool;
        let pool = self.map.pools.get(&pool).ok_or(Refusal::NoSuchPool(pool))?;
        let found = self.map.drives.get(&drive).ok_or(Refusal::NoSuchDrive(drive))?;
        let domain = self.map.domain(found, pool.domain);
        let columns = (0u8..).zip(&record.band.columns);
        let apart = columns
            .filter(|(other, _)| *other != column)
            .filter_map(|(_, chunk)| self.map.drives.get(&chunk.drive))
            .all(|other| other.id != drive && self.map.domain(other, pool.domain) != domain);
        let usable = self.map.in_service(found)
            && pool.classes.contains(&found.class)
            && found.registrations.get(&incarnation) == Some(&Registration::Registered)
            && apart;
        if usable {
            Ok(())
        } else {
            Err(Refusal::ProposalConflict { drive })
        }
    }
}
