//! The simulated metadata service's rules for rebuilds: one chunk for each attempt, installed by compare-and-swap.
//!
//! Written apart from the product's state machine, so that both have to agree. What no correct engine does is a violation: to
//! have a chunk installed with a write to it in flight or before it is durable, to say that writes have ended that have not, to write another
//! column's rows, or anything at all after the installation.

use weft_proto::band::{Band, ChunkAddress, ChunkSize, Replacement};
use weft_proto::id::{BandId, Epoch, IncarnationId, VolumeId};

use super::{Granted, Metadata};
use crate::seams::DirectoryError;
use crate::testing::drive::{Health, SimDrive};
use crate::testing::monitor::BLOCKS_PER_MIB;
use crate::testing::world::World;

/// A chunk granted to an attempt to rebuild a column.
pub(in crate::testing) struct Attempt {
    pub(in crate::testing) replacement: Replacement,
    pub(in crate::testing) volume: VolumeId,
    size: ChunkSize,
    writer: IncarnationId,
}

/// A column of a band at one version.
#[derive(Clone, Copy)]
pub(in crate::testing) struct Column {
    pub(in crate::testing) band: BandId,
    pub(in crate::testing) column: u8,
    pub(in crate::testing) version: u64,
}

impl Metadata {
    /// Who wrote a column's chunk, and whether all its writes have ended as far as the service knows.
    pub(in crate::testing) fn writes_of(
        &self,
        world: &World,
        granted: &Granted,
        column: u8,
    ) -> (IncarnationId, bool) {
        match granted.replaced.get(&column) {
            Some(writer) => (*writer, true),
            None => {
                let owner = granted.owner;
                let chunk = granted.band.columns[usize::from(column)];
                let lost =
                    granted.unsettled.contains(&chunk) || world.is_dead(owner) || self.is_superseded(owner);
                (owner, !lost)
            }
        }
    }

    pub(in crate::testing) fn grant_replacement(
        &mut self,
        world: &World,
        id: VolumeId,
        epoch: Epoch,
        wanted: Column,
    ) -> Result<Replacement, DirectoryError> {
        self.release_quarantine(world);
        self.volume(id, epoch)?;
        let Column {
            band,
            column,
            version,
        } = wanted;
        let writer = self.owner(id).ok_or(DirectoryError::NoSuchVolume)?;
        let changed = DirectoryError::BandChanged { band };
        let granted = self.bands.get(&band).ok_or_else(|| changed.clone())?;
        if granted.band.version != version || granted.band.volume != id || !self.serves(id, epoch) {
            return Err(changed);
        }
        let size = granted.band.chunk_size;
        let columns = granted.band.columns.clone();
        let lost = columns[usize::from(column)].drive;
        let others: Vec<u32> = columns
            .iter()
            .filter(|chunk| chunk.drive != lost)
            .map(|chunk| world.drive(chunk.drive).spec().domain)
            .collect();
        let fits = |drive: &SimDrive| {
            drive.id() != lost
                && !others.contains(&drive.spec().domain)
                && !self.out.contains(&drive.id())
                && drive.health() != Health::Dead
                && !self.awaits_fence(drive)
        };
        let in_service: Vec<_> = world
            .all_drives()
            .into_iter()
            .filter(|drive| fits(drive))
            .collect();
        if in_service.is_empty() {
            return Err(DirectoryError::TooFewDomains {
                available: columns.len() as u32 - 1,
                needed: columns.len() as u32,
            });
        }
        let chosen = in_service
            .into_iter()
            .filter(|drive| self.find_gap(drive, size.mib()).is_some())
            .max_by_key(|drive| (self.free_mib(drive), std::cmp::Reverse(drive.id())))
            .ok_or(DirectoryError::NoSpace)?;
        let offset_mib = self
            .find_gap(&chosen, size.mib())
            .expect("a drive chosen for its gap");
        let chunk = ChunkAddress {
            drive: chosen.id(),
            offset_mib,
        };
        if has_writes_in_flight(world, chunk, size) {
            world.violation(format!(
                "a chunk at {offset_mib} MiB of {} is granted again while a write to it is in flight",
                chosen.id()
            ));
        }
        self.give_up(world, |attempt| {
            (attempt.replacement.band, attempt.replacement.column) == (band, column)
        });
        self.chunks.insert((chunk.drive, offset_mib), (size.mib(), band));
        let replacement = Replacement {
            request: self.rng.next_u64(),
            band,
            column,
            version,
            chunk,
        };
        self.attempts.push(Attempt {
            replacement,
            volume: id,
            size,
            writer,
        });
        Ok(replacement)
    }

    pub(in crate::testing) fn install_replacement(
        &mut self,
        world: &World,
        id: VolumeId,
        epoch: Epoch,
        replacement: Replacement,
        settled: bool,
    ) -> Result<Band, DirectoryError> {
        self.volume(id, epoch)?;
        let Replacement {
            band,
            column,
            version,
            chunk,
            ..
        } = replacement;
        let changed = DirectoryError::BandChanged { band };
        let granted = self.bands.get(&band).ok_or_else(|| changed.clone())?;
        let old = granted.band.columns[usize::from(column)];
        if old == chunk && granted.band.version == version + 1 {
            // The same request again: its answer was lost.
            return Ok(granted.band.clone());
        }
        let attempt = self
            .attempt(replacement)
            .filter(|_| granted.band.version == version)
            .ok_or(changed)?;
        let (writer, ended) = self.writes_of(world, granted, column);
        let of_this_epoch = granted.band.epoch == epoch && !granted.replaced.contains_key(&column);
        let may_be_written = !ended || of_this_epoch && !settled;
        let attempt = self.attempts.remove(attempt);
        if has_writes_in_flight(world, chunk, attempt.size) {
            world.violation(format!(
                "a chunk of {band} is installed while a write to it is in flight"
            ));
        }
        let start = u64::from(chunk.offset_mib) * BLOCKS_PER_MIB;
        let blocks = u64::from(attempt.size.mib()) * BLOCKS_PER_MIB;
        if !world.drive(chunk.drive).is_durable(start, blocks) {
            world.violation(format!("a chunk of {band} is installed before it is durable"));
        }
        let granted = self.bands.get_mut(&band).expect("found above");
        granted.band.columns[usize::from(column)] = chunk;
        granted.band.version += 1;
        granted.replaced.insert(column, attempt.writer);
        let band = granted.band.clone();
        self.free_chunk(world, old, attempt.size, writer, may_be_written);
        Ok(band)
    }

    pub(in crate::testing) fn return_replacement(
        &mut self,
        world: &World,
        id: VolumeId,
        epoch: Epoch,
        replacement: Replacement,
        settled: bool,
    ) -> Result<(), DirectoryError> {
        self.volume(id, epoch)?;
        if let Some(attempt) = self.attempt(replacement) {
            let attempt = self.attempts.remove(attempt);
            self.free_chunk(world, replacement.chunk, attempt.size, attempt.writer, !settled);
        }
        Ok(())
    }

    /// Where the attempt that was granted `replacement` is, unless it counts no more.
    fn attempt(&self, replacement: Replacement) -> Option<usize> {
        let mut attempts = self.attempts.iter();
        attempts.position(|attempt| attempt.replacement == replacement)
    }

    /// Attempts that count no more: whether their writes have ended, nobody says.
    pub(in crate::testing) fn give_up(&mut self, world: &World, ends: impl Fn(&Attempt) -> bool) {
        let (ended, kept): (Vec<Attempt>, Vec<Attempt>) =
            std::mem::take(&mut self.attempts).into_iter().partition(ends);
        self.attempts = kept;
        for attempt in ended {
            self.free_chunk(
                world,
                attempt.replacement.chunk,
                attempt.size,
                attempt.writer,
                true,
            );
        }
    }

    /// The column that a write of `sender` to `chunk`, which is of `band`, belongs to, or why it does not.
    pub(in crate::testing) fn column_for(
        &self,
        chunk: ChunkAddress,
        band: BandId,
        sender: IncarnationId,
    ) -> Result<u8, String> {
        if let Some(attempt) = self
            .attempts
            .iter()
            .find(|attempt| attempt.replacement.chunk == chunk)
        {
            return if attempt.writer == sender {
                Ok(attempt.replacement.column)
            } else {
                Err(format!(
                    "it was granted to {} for a rebuild of {band}",
                    attempt.writer
                ))
            };
        }
        let Some(granted) = self.bands.get(&band) else {
            return Err(format!("{band} was freed"));
        };
        let columns = &granted.band.columns;
        let column = columns.iter().position(|other| *other == chunk);
        let column = column.ok_or_else(|| format!("{band} has no column there"))? as u8;
        if granted.replaced.contains_key(&column) {
            return Err(format!(
                "column {column} of {band} is rebuilt, and nobody writes to it"
            ));
        }
        if granted.owner != sender {
            return Err(format!("{band} was granted to {}", granted.owner));
        }
        Ok(column)
    }
}

fn has_writes_in_flight(world: &World, chunk: ChunkAddress, size: ChunkSize) -> bool {
    world.drive(chunk.drive).has_writes_in_flight(
        u64::from(chunk.offset_mib) * BLOCKS_PER_MIB,
        u64::from(size.mib()) * BLOCKS_PER_MIB,
    )
}
