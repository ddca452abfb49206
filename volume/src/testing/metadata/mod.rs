//! The metadata service of the simulated world: its rules for epochs, bands and roots, without Raft.
//!
//! What a rule forbids is refused; what no correct engine asks for is noted as a violation. Engines reach it through
//! [`directory`](super::directory).
//!
//! The rules it enforces:
//! - epochs only grow; a command of any other than the current one is stale;
//! - a chunk belongs to one band, on drives of distinct failure domains, and is reused only when its writers have
//!   ended or are fenced on its drive;
//! - user bands leave the reserve alone;
//! - roots change by compare-and-swap, and never lie in a band that is freed;
//! - bands of a takeover that was not finished count for nothing;
//! - a chunk granted to a rebuild belongs to that attempt alone until it is installed, and nobody writes to it afterwards; what
//!   is written to it is what its column held.

mod operator;
pub(super) mod rebuilds;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use weft_proto::band::{
    Band, ChunkAddress, ChunkSize, Geometry, RootPointer, RootUpdate, WINDOW_ROWS_DEFAULT,
};
use weft_proto::id::{BandId, DriveId, Epoch, IncarnationId, LayerId, StripeNumber, VolumeId};

use self::rebuilds::Attempt;
use super::drive::{Health, SimDrive};
use super::monitor::BLOCKS_PER_MIB;
use super::rng::Rng;
use super::world::World;
use crate::seams::{BandPurpose, DirectoryError};

/// How the service behaves.
#[derive(Clone, Debug)]
pub struct MetadataSpec {
    /// MiB per drive that user bands never get.
    pub reserve_mib: u32,
    /// Window of the bands it grants.
    pub window_rows: u32,
    /// Shortest and longest time to commit, and the same again to answer, in microseconds.
    pub latency_us: (u64, u64),
    /// One call in so many is answered [`DirectoryError::Unavailable`], half of them after the commit; 0 for none.
    pub unavailable_one_in: u64,
}

impl Default for MetadataSpec {
    fn default() -> Self {
        Self {
            reserve_mib: 0,
            window_rows: WINDOW_ROWS_DEFAULT,
            latency_us: (300, 3000),
            unavailable_one_in: 0,
        }
    }
}

pub(super) type Commit = Box<dyn FnOnce(&Rc<World>)>;

/// The state, and the calls on their way to it.
pub(super) struct Metadata {
    pub(super) rng: Rng,
    pub(super) spec: MetadataSpec,
    pub(super) volumes: BTreeMap<VolumeId, Volume>,
    pub(super) bands: BTreeMap<BandId, Granted>,
    band_next: u64,
    /// Chunks granted to rebuilds and not installed.
    pub(super) attempts: Vec<Attempt>,
    /// Allocated chunks by drive and first MiB: their size, and whose they are. Quarantined ones stay here.
    pub(super) chunks: BTreeMap<(DriveId, u32), (u32, BandId)>,
    /// Freed chunks that may still be written by an incarnation that is not fenced there.
    pub(super) quarantine: Vec<(ChunkAddress, IncarnationId)>,
    /// Drives taken out of service by the operator.
    pub(super) out: BTreeSet<DriveId>,
    /// Calls on their way.
    pub(super) calls: BTreeMap<u64, (IncarnationId, Commit)>,
    pub(super) call_next: u64,
}

pub(super) struct Volume {
    layer: LayerId,
    /// The one that may command.
    epoch: Epoch,
    /// The last one that finished its takeover and was not handed over.
    serving: Option<Epoch>,
    owners: BTreeMap<Epoch, IncarnationId>,
    /// Epochs whose incarnation was replaced without a hand-over.
    superseded: BTreeSet<Epoch>,
    size_bytes: u64,
    geometry: Geometry,
    root_version: u64,
    root: Option<RootPointer>,
    ended: Vec<(Epoch, StripeNumber)>,
}

pub(super) struct Granted {
    pub(super) band: Band,
    pub(super) owner: IncarnationId,
    /// Chunks that were handed over with a write still under way.
    pub(super) unsettled: BTreeSet<ChunkAddress>,
    /// What was sent to each row of each column, for "a row is written once", wherever the column lay then.
    pub(super) written: BTreeMap<(u8, u32), Bytes>,
    /// Columns that a rebuild has replaced, and who wrote what is there now.
    pub(super) replaced: BTreeMap<u8, IncarnationId>,
}

impl Metadata {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            rng: Rng::new(seed).fork(2),
            spec: MetadataSpec::default(),
            volumes: BTreeMap::new(),
            bands: BTreeMap::new(),
            band_next: 1,
            attempts: Vec::new(),
            chunks: BTreeMap::new(),
            quarantine: Vec::new(),
            out: BTreeSet::new(),
            calls: BTreeMap::new(),
            call_next: 1,
        }
    }

    pub(super) fn volume(&mut self, id: VolumeId, epoch: Epoch) -> Result<&mut Volume, DirectoryError> {
        let volume = self.volumes.get_mut(&id).ok_or(DirectoryError::NoSuchVolume)?;
        if volume.epoch != epoch {
            return Err(DirectoryError::Stale {
                epoch,
                current: volume.epoch,
            });
        }
        Ok(volume)
    }

    /// Whether some replaced owner of any volume may still write to `drive`.
    pub(super) fn awaits_fence(&self, drive: &SimDrive) -> bool {
        let superseded: BTreeSet<IncarnationId> = self
            .volumes
            .values()
            .flat_map(|volume| volume.superseded.iter().map(|epoch| volume.owners[epoch]))
            .collect();
        let mut bands = self.bands.values();
        superseded.iter().any(|owner| !drive.is_fenced(*owner))
            && (bands.any(|granted| {
                superseded.contains(&granted.owner)
                    && !drive.is_fenced(granted.owner)
                    && granted.band.columns.iter().any(|chunk| chunk.drive == drive.id())
            }) || self
                .quarantine
                .iter()
                .any(|(chunk, owner)| chunk.drive == drive.id() && !drive.is_fenced(*owner)))
    }

    pub(super) fn release_quarantine(&mut self, world: &World) {
        let chunks = &mut self.chunks;
        self.quarantine.retain(|(chunk, writer)| {
            let released = world
                .find_drive(chunk.drive)
                .is_some_and(|drive| drive.is_fenced(*writer));
            if released {
                chunks.remove(&(chunk.drive, chunk.offset_mib));
            }
            !released
        });
    }

    pub(super) fn free_mib(&self, drive: &SimDrive) -> u32 {
        let used: u32 = self
            .chunks
            .range((drive.id(), 0)..=(drive.id(), u32::MAX))
            .map(|(_, (size, _))| size)
            .sum();
        // The label has the first MiB.
        drive.spec().size_mib - 1 - used
    }

    /// The first gap of `size` MiB, aligned to it past the label.
    pub(super) fn find_gap(&self, drive: &SimDrive, size: u32) -> Option<u32> {
        let mut at = 1;
        for ((_, offset), (taken, _)) in self.chunks.range((drive.id(), 0)..=(drive.id(), u32::MAX)) {
            if at + size <= *offset {
                break;
            }
            at = offset + taken;
        }
        (at + size <= drive.spec().size_mib).then_some(at)
    }

    fn grant_band(
        &mut self,
        world: &World,
        id: VolumeId,
        epoch: Epoch,
        chunk_size: ChunkSize,
        purpose: BandPurpose,
    ) -> Result<Band, DirectoryError> {
        self.release_quarantine(world);
        let (geometry, layer, owner) = {
            let volume = self.volume(id, epoch)?;
            (volume.geometry, volume.layer, volume.owners[&epoch])
        };
        let size = chunk_size.mib();
        let reserve = match purpose {
            BandPurpose::User => self.spec.reserve_mib,
            BandPurpose::Internal => 0,
        };
        // The emptiest drive of each domain, then the emptiest domains; ties by the seed.
        let mut domains: BTreeMap<u32, (u32, u64, Rc<SimDrive>)> = BTreeMap::new();
        let mut in_service = BTreeSet::new();
        for drive in world.all_drives() {
            if self.out.contains(&drive.id()) || drive.health() == Health::Dead || self.awaits_fence(&drive) {
                continue;
            }
            let domain = drive.spec().domain;
            in_service.insert(domain);
            let free = self.free_mib(&drive);
            if free < size + reserve || self.find_gap(&drive, size).is_none() {
                continue;
            }
            let tie = self.rng.next_u64();
            if domains
                .get(&domain)
                .is_none_or(|(most, other, _)| (free, tie) > (*most, *other))
            {
                domains.insert(domain, (free, tie, drive));
            }
        }
        let needed = 1 + u32::from(geometry.m);
        if (in_service.len() as u32) < needed {
            return Err(DirectoryError::TooFewDomains {
                available: in_service.len() as u32,
                needed,
            });
        }
        if (domains.len() as u32) < needed {
            return Err(DirectoryError::NoSpace);
        }
        let mut chosen: Vec<_> = domains.into_values().collect();
        chosen.sort_by_key(|(free, tie, _)| (std::cmp::Reverse(*free), *tie));
        chosen.truncate(usize::from(geometry.n()));
        let band_id = BandId(self.band_next);
        self.band_next += 1;
        let mut columns = Vec::new();
        for (_, _, drive) in &chosen {
            let offset_mib = self.find_gap(drive, size).expect("a drive chosen for its gap");
            if drive.has_writes_in_flight(
                u64::from(offset_mib) * BLOCKS_PER_MIB,
                u64::from(size) * BLOCKS_PER_MIB,
            ) {
                world.violation(format!(
                    "a chunk at {offset_mib} MiB of {} is granted again while a write to it is in flight",
                    drive.id()
                ));
            }
            let taken = self.chunks.insert((drive.id(), offset_mib), (size, band_id));
            assert!(taken.is_none(), "a chunk is never in two bands");
            columns.push(ChunkAddress {
                drive: drive.id(),
                offset_mib,
            });
        }
        self.rng.shuffle(&mut columns);
        let band = Band {
            id: band_id,
            volume: id,
            layer,
            epoch,
            geometry: Geometry {
                k: columns.len() as u8 - geometry.m,
                m: geometry.m,
            },
            chunk_size,
            window_rows: self.spec.window_rows,
            version: 1,
            columns,
        };
        let granted = Granted {
            band: band.clone(),
            owner,
            unsettled: BTreeSet::new(),
            written: BTreeMap::new(),
            replaced: BTreeMap::new(),
        };
        self.bands.insert(band_id, granted);
        Ok(band)
    }

    pub(super) fn serves(&self, id: VolumeId, epoch: Epoch) -> bool {
        self.volumes
            .get(&id)
            .is_some_and(|volume| volume.serving == Some(epoch))
    }

    /// Who holds the volume's current epoch.
    pub(super) fn owner(&self, id: VolumeId) -> Option<IncarnationId> {
        let volume = self.volumes.get(&id)?;
        volume.owners.get(&volume.epoch).copied()
    }

    /// Gives the chunks of a band back; those that a dead or replaced writer may still reach go to quarantine.
    fn free_band(&mut self, world: &World, id: BandId, unsettled: &[ChunkAddress]) {
        self.give_up(world, |attempt| attempt.replacement.band == id);
        let Some(granted) = self.bands.remove(&id) else {
            return;
        };
        for (column, chunk) in (0u8..).zip(&granted.band.columns) {
            let (writer, ended) = self.writes_of(world, &granted, column);
            let may_be_written = !ended || unsettled.contains(chunk);
            self.free_chunk(world, *chunk, granted.band.chunk_size, writer, may_be_written);
        }
    }

    /// Gives one chunk back, or keeps it in quarantine where a write of `writer` may still reach it.
    pub(super) fn free_chunk(
        &mut self,
        world: &World,
        chunk: ChunkAddress,
        size: ChunkSize,
        writer: IncarnationId,
        may_be_written: bool,
    ) {
        let drive = world.drive(chunk.drive);
        if may_be_written && !drive.is_fenced(writer) {
            self.quarantine.push((chunk, writer));
            return;
        }
        let start = u64::from(chunk.offset_mib) * BLOCKS_PER_MIB;
        let blocks = u64::from(size.mib()) * BLOCKS_PER_MIB;
        if !may_be_written && drive.has_writes_in_flight(start, blocks) {
            world.violation(format!(
                "a chunk at {} MiB of {} is freed while a write to it is in flight",
                chunk.offset_mib, chunk.drive
            ));
        }
        self.chunks.remove(&(chunk.drive, chunk.offset_mib));
    }

    pub(super) fn is_superseded(&self, incarnation: IncarnationId) -> bool {
        self.volumes.values().any(|volume| {
            volume
                .superseded
                .iter()
                .any(|epoch| volume.owners.get(epoch) == Some(&incarnation))
        })
    }

    pub(super) fn grant_bands(
        &mut self,
        world: &World,
        id: VolumeId,
        epoch: Epoch,
        chunk_size: ChunkSize,
        count: u32,
        purpose: BandPurpose,
    ) -> Result<Vec<Band>, DirectoryError> {
        let mut bands = Vec::new();
        for _ in 0..count {
            match self.grant_band(world, id, epoch, chunk_size, purpose) {
                Ok(band) => bands.push(band),
                // As many as there are; none at all is an error.
                Err(error) if bands.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(bands)
    }

    pub(super) fn publish_root(
        &mut self,
        world: &World,
        update: &RootUpdate,
        recovered: Option<(Option<Epoch>, StripeNumber)>,
    ) -> Result<u64, DirectoryError> {
        let volume = self.volume(update.volume, update.epoch)?;
        if volume.root_version == update.expected_version + 1 && volume.root == Some(update.root) {
            // The same request again: its answer was lost.
            return Ok(volume.root_version);
        }
        if volume.root_version != update.expected_version {
            return Err(DirectoryError::RootConflict {
                expected: update.expected_version,
                current: volume.root_version,
            });
        }
        if volume.serving != Some(update.epoch) {
            let Some((recovered, ended_at)) = recovered else {
                // Refused as well: nothing of this epoch counts yet.
                let current = volume.root_version;
                world.violation(format!(
                    "{} publishes a root before its takeover is finished",
                    update.epoch
                ));
                return Err(DirectoryError::RootConflict {
                    expected: update.expected_version,
                    current,
                });
            };
            if recovered != volume.serving {
                world.violation(format!(
                    "{} ends {recovered:?}, but {:?} is to be recovered",
                    update.epoch, volume.serving
                ));
            }
            if let Some(recovered) = recovered {
                volume.ended.push((recovered, ended_at));
            }
            volume.serving = Some(update.epoch);
        }
        volume.root_version += 1;
        volume.root = Some(update.root);
        let version = volume.root_version;
        match self.bands.get(&update.root.band) {
            Some(granted) if granted.band.volume == update.volume && granted.band.epoch == update.epoch => {}
            _ => world.violation(format!(
                "the root of {} lies in {}, which its epoch was not granted",
                update.volume, update.root.band
            )),
        }
        for id in &update.freed {
            if *id == update.root.band {
                world.violation(format!("{id} is freed with its root in it"));
            }
            match self.bands.get(id) {
                Some(granted) if granted.band.volume == update.volume => {
                    self.free_band(world, *id, &update.unsettled);
                }
                _ => world.violation(format!("{id} is freed and not a band of {}", update.volume)),
            }
        }
        Ok(version)
    }

    pub(super) fn return_bands(
        &mut self,
        world: &World,
        id: VolumeId,
        epoch: Epoch,
        bands: &[BandId],
    ) -> Result<(), DirectoryError> {
        self.volume(id, epoch)?;
        for band in bands {
            let Some(granted) = self.bands.get(band) else {
                // The same request again.
                continue;
            };
            if !granted.written.is_empty() || granted.band.epoch != epoch {
                world.violation(format!("{band} is returned as never written, and it was"));
                continue;
            }
            self.free_band(world, *band, &[]);
        }
        Ok(())
    }

    /// The bands that count: of the serving epoch, of ended ones, and of the current one.
    pub(super) fn listed(&self, id: VolumeId, with_current: bool) -> Vec<Band> {
        let Some(volume) = self.volumes.get(&id) else {
            return Vec::new();
        };
        let counts = |epoch: Epoch| {
            volume.serving == Some(epoch)
                || volume.ended.iter().any(|(ended, _)| *ended == epoch)
                || (with_current && epoch == volume.epoch)
        };
        let bands = self.bands.values();
        bands
            .filter(|granted| granted.band.volume == id && counts(granted.band.epoch))
            .map(|granted| granted.band.clone())
            .collect()
    }

    pub(super) fn judge_write(
        &mut self,
        sender: IncarnationId,
        drive: &SimDrive,
        start: u64,
        blocks: &[Option<Bytes>],
    ) -> Result<(), String> {
        if self.bands.is_empty() && self.volumes.is_empty() {
            // Drives without a metadata service: a test of the drives themselves.
            return Ok(());
        }
        if self.is_superseded(sender) {
            return Ok(());
        }
        let mib = u32::try_from(start / BLOCKS_PER_MIB).unwrap_or(u32::MAX);
        let found = self.chunks.range((drive.id(), 0)..=(drive.id(), mib)).next_back();
        let Some((offset_mib, size, id)) = found
            .filter(|((_, offset), (size, _))| mib < offset + size)
            .map(|((_, offset), (size, id))| (*offset, *size, *id))
        else {
            return Err("no band has a chunk there".into());
        };
        let chunk = ChunkAddress {
            drive: drive.id(),
            offset_mib,
        };
        if self.quarantine.contains(&(chunk, sender)) {
            // Late, and that is what the quarantine is for.
            return Ok(());
        }
        let first = start - u64::from(offset_mib) * BLOCKS_PER_MIB;
        if first + blocks.len() as u64 > u64::from(size) * BLOCKS_PER_MIB {
            return Err(format!("it ends past the chunk of {id}"));
        }
        let column = self.column_for(chunk, id, sender)?;
        let Some(granted) = self.bands.get_mut(&id) else {
            return Err(format!("{id} was freed"));
        };
        for (row, bytes) in (first as u32..).zip(blocks) {
            let Some(bytes) = bytes else {
                return Err(format!("row {row} of {id} is deallocated while it is granted"));
            };
            match granted.written.get(&(column, row)) {
                Some(before) if before != bytes => {
                    return Err(format!("row {row} of column {column} of {id} is written twice"));
                }
                Some(_) => {}
                None => {
                    granted.written.insert((column, row), bytes.clone());
                }
            }
        }
        Ok(())
    }
}
