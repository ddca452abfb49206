//! Reads: the page map says where, one drive read brings it, the checksum says whether to believe it.
//!
//! A column that is out of service, fails, stalls or brings the wrong bytes is replaced by reconstruction from the
//! same row of the stripe's other columns. Before a mismatch is believed, the map is asked again (compaction may
//! have moved the block) and so is the directory (a rebuild may have moved the chunk).
//!
//! One block that is where the map says takes a shorter way, [`super::block_read`], and comes here if it does not work out.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use weft_block::{BlockError, Device};
use weft_erasure::Codec;
use weft_proto::deliberate::{Bug, planted};
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use super::flight::ZERO_BLOCK;
use super::{Core, Life};
use crate::band::BandState;
use crate::entry::MapEntry;
use crate::error::VolumeError;
use crate::format::checksum::block_crc;
use crate::map::{HOST_LBA_END, Mapping};
use crate::sync::patiently;

/// What came of asking one column.
enum Column {
    /// The rows' bytes.
    Read(Bytes),
    /// The medium says that it lost them.
    Lost,
    /// No answer, or none worth waiting for.
    Unreachable,
}

/// Blocks that one drive read brings: consecutive LBAs on consecutive rows of one column.
struct Piece {
    lba: Lba,
    entries: Vec<MapEntry>,
}

impl Core {
    /// The blocks of `range` as of the last write that was visible when this was called, or a later one.
    pub(crate) async fn read_range(self: &Rc<Self>, range: LbaRange) -> Result<Bytes, VolumeError> {
        let mappings = self.map().lookup_range(range).await?;
        let pieces = pieces(range.start, &mappings);
        if let [only] = &pieces[..]
            && only.entries.len() == mappings.len()
        {
            let mut blocks = self.read_piece(only).await?;
            if let [bytes] = &mut blocks[..] {
                return Ok(std::mem::take(bytes));
            }
            return Ok(concat(&blocks));
        }
        let read = join_all(pieces.iter().map(|piece| self.read_piece(piece))).await;
        let mut bytes = BytesMut::zeroed(mappings.len() * BLOCK_BYTES);
        for (piece, blocks) in pieces.iter().zip(read) {
            let mut at = (piece.lba.0 - range.start.0) as usize * BLOCK_BYTES;
            for block in blocks? {
                bytes[at..at + block.len()].copy_from_slice(&block);
                at += block.len();
            }
        }
        Ok(bytes.freeze())
    }

    /// In one slice when all went well, otherwise block by block.
    async fn read_piece(self: &Rc<Self>, piece: &Piece) -> Result<Vec<Bytes>, VolumeError> {
        let first = piece.entries[0];
        let count = piece.entries.len() as u32;
        let read = match self.band(first.band) {
            Some(band) => self.read_column(&band, first.column, first.row, count).await,
            None => Column::Unreachable,
        };
        let Column::Read(bytes) = read else {
            let mut blocks = Vec::with_capacity(piece.entries.len());
            for (index, entry) in piece.entries.iter().enumerate() {
                blocks.push(
                    self.recover_block(Lba(piece.lba.0 + index as u64), *entry)
                        .await?,
                );
            }
            return Ok(blocks);
        };
        let mut bad = Vec::new();
        for (index, entry) in piece.entries.iter().enumerate() {
            let block = &bytes[index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES];
            let lba = Lba(piece.lba.0 + index as u64);
            let crc = block_crc(self.volume, lba, entry.sequence, block);
            if crc != entry.crc && !planted(Bug::ForgetChecksum) {
                bad.push(index);
            }
        }
        if bad.is_empty() {
            return Ok(vec![bytes]);
        }
        let mut blocks = Vec::with_capacity(piece.entries.len());
        for (index, entry) in piece.entries.iter().enumerate() {
            if bad.contains(&index) {
                let lba = Lba(piece.lba.0 + index as u64);
                blocks.push(self.mismatch(lba, *entry).await?);
            } else {
                blocks.push(bytes.slice(index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES));
            }
        }
        Ok(blocks)
    }

    /// One block by its entry, checked. For the page map and for compaction.
    pub(crate) async fn read_entry(self: &Rc<Self>, lba: Lba, entry: MapEntry) -> Result<Bytes, VolumeError> {
        let piece = Piece {
            lba,
            entries: vec![entry],
        };
        let blocks = self.read_piece(&piece).await?;
        Ok(concat(&blocks))
    }

    /// The drive's bytes are not what the map says.
    async fn mismatch(self: &Rc<Self>, lba: Lba, entry: MapEntry) -> Result<Bytes, VolumeError> {
        self.refresh_bands().await;
        self.still_owner().await?;
        if let Some(band) = self.band(entry.band)
            && let Column::Read(bytes) = self.read_column(&band, entry.column, entry.row, 1).await
            && block_crc(self.volume, lba, entry.sequence, &bytes) == entry.crc
        {
            return Ok(bytes);
        }
        if self.still_maps(lba, &entry).await? {
            tracing::warn!(volume = %self.volume, %lba, band = %entry.band, column = entry.column, row = entry.row, "checksum mismatch");
            self.counters.mismatches.add(1);
        }
        let bytes = self.recover_block(lba, entry).await?;
        self.repair(lba, entry, bytes.clone());
        Ok(bytes)
    }

    /// A block whose own column brings another block of the same checksum, from the other columns of its stripe.
    pub(crate) async fn read_around(
        self: &Rc<Self>,
        lba: Lba,
        entry: MapEntry,
    ) -> Result<Bytes, VolumeError> {
        self.refresh_bands().await;
        self.still_owner().await?;
        tracing::warn!(volume = %self.volume, %lba, band = %entry.band, column = entry.column, row = entry.row, "another block in its place");
        self.counters.mismatches.add(1);
        // The first choice of columns is without its own.
        let bytes = self.recover_block(lba, entry).await?;
        self.repair(lba, entry, bytes.clone());
        Ok(bytes)
    }

    /// Before bad bytes are believed: they may be a successor's, in a chunk that is not ours any more.
    async fn still_owner(self: &Rc<Self>) -> Result<(), VolumeError> {
        match self.life.get() {
            // No lease yet, and none needed: nothing is answered before the takeover is committed.
            Life::Opening => Ok(()),
            Life::Serving | Life::Quiescing | Life::Closed | Life::Fenced => self.leased().await,
        }
    }

    /// Whether the map still means this copy of `lba`. Map blocks are asked for by their place.
    async fn still_maps(&self, lba: Lba, entry: &MapEntry) -> Result<bool, VolumeError> {
        if lba >= HOST_LBA_END {
            return Ok(true);
        }
        Ok(self.map().lookup(lba).await? == Mapping::Data(*entry))
    }

    /// The block without its own column; or, if the map means another copy of it by now, that one.
    async fn recover_block(self: &Rc<Self>, lba: Lba, entry: MapEntry) -> Result<Bytes, VolumeError> {
        let mut entry = entry;
        loop {
            let changed = self.changed.changed();
            if lba < HOST_LBA_END {
                match self.map().lookup(lba).await? {
                    Mapping::Data(found) if found == entry => {}
                    Mapping::Data(found) => {
                        entry = found;
                        let Some(band) = self.band(found.band) else {
                            continue;
                        };
                        if let Column::Read(bytes) = self.read_column(&band, found.column, found.row, 1).await
                            && block_crc(self.volume, lba, found.sequence, &bytes) == found.crc
                        {
                            return Ok(bytes);
                        }
                    }
                    Mapping::Zero(_) | Mapping::Unwritten => return Ok(Bytes::from_static(&ZERO_BLOCK)),
                }
            }
            let Some(band) = self.band(entry.band) else {
                return Err(VolumeError::UnknownBand { band: entry.band });
            };
            self.refresh_soon();
            match self.reconstruct(&band, lba, &entry).await {
                Ok(bytes) => {
                    self.counters.reconstructed.add(1);
                    return Ok(bytes);
                }
                // Every column answered and they do not add up: waiting would not help.
                Err(error @ VolumeError::BlockLost { .. }) => {
                    self.still_owner().await?;
                    return Err(error);
                }
                Err(error) if self.life.get() == Life::Opening => return Err(error),
                Err(_) => {}
            }
            match self.life.get() {
                Life::Opening | Life::Serving | Life::Quiescing => {}
                Life::Fenced => return Err(VolumeError::Fenced),
                Life::Closed => return Err(VolumeError::Closed),
            }
            self.changed_or_retry(changed).await;
        }
    }

    /// One block of a stripe that the map does not know (yet), checked.
    pub(crate) async fn read_unmapped(
        self: &Rc<Self>,
        lba: Lba,
        entry: &MapEntry,
    ) -> Result<Bytes, VolumeError> {
        let band = self
            .band(entry.band)
            .ok_or(VolumeError::UnknownBand { band: entry.band })?;
        if let Column::Read(bytes) = self.read_column(&band, entry.column, entry.row, 1).await
            && block_crc(self.volume, lba, entry.sequence, &bytes) == entry.crc
        {
            return Ok(bytes);
        }
        self.reconstruct(&band, lba, entry).await
    }

    async fn reconstruct(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        lba: Lba,
        entry: &MapEntry,
    ) -> Result<Bytes, VolumeError> {
        let geometry = band.geometry;
        let shape = entry.shape();
        if !shape.fits(geometry) {
            return Err(VolumeError::BlockLost {
                lba,
                present: 0,
                needed: entry.w,
            });
        }
        let wanted = shape.shard_index(geometry, entry.column);
        let columns: Vec<(u8, u8)> = (0u8..).zip(shape.columns(geometry)).collect();
        let w = usize::from(entry.w);
        // In service first: the others cost a stall time each.
        let mut order: Vec<(u8, u8)> = columns.clone();
        order.sort_by_key(|(index, column)| {
            let suspect = band
                .chunk(*column)
                .is_none_or(|chunk| self.health.is_suspect(chunk.drive));
            (Some(*index) == wanted, suspect, *index)
        });
        let mut present: Vec<(u8, Bytes)> = Vec::new();
        let mut unreachable = 0;
        // The first w others; then all that is left, the block's own column too.
        let (first, rest) = order.split_at(w.min(order.len()));
        for batch in [first, rest] {
            let reads = batch.iter().map(|(index, column)| async {
                let read = self.read_column(band, *column, entry.row, 1).await;
                (*index, read)
            });
            for (index, read) in join_all(reads).await {
                match read {
                    Column::Read(bytes) => present.push((index, bytes)),
                    Column::Lost => {}
                    Column::Unreachable => unreachable += 1,
                }
            }
            let Some(wanted) = wanted else { break };
            if let Some(found) = solve(entry, lba, self, geometry.m, wanted, &present) {
                return Ok(found);
            }
        }
        if unreachable > 0 {
            return Err(VolumeError::TooManyMissing {
                band: band.id,
                missing: unreachable,
                tolerated: geometry.m,
            });
        }
        Err(VolumeError::BlockLost {
            lba,
            present: present.len() as u8,
            needed: entry.w,
        })
    }

    /// Rows of one column, within the stall time.
    async fn read_column(self: &Rc<Self>, band: &Rc<BandState>, column: u8, row: u32, count: u32) -> Column {
        match self.read_rows(band, column, row, count).await {
            Some(Ok(bytes)) => Column::Read(bytes),
            Some(Err(BlockError::Unrecovered { .. })) => Column::Lost,
            Some(Err(_)) | None => Column::Unreachable,
        }
    }

    /// The same, with the drive's own error; `None` when the drive is out of service or stalls.
    pub(crate) async fn read_rows(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        column: u8,
        row: u32,
        count: u32,
    ) -> Option<Result<Bytes, BlockError>> {
        let chunk = band.chunk(column)?;
        let (device, range) = self.rows(band, column, row, count)?;
        let _pin = Rc::clone(&band.pin);
        // A chunk may have moved to a drive with shorter transfers than what the stripe was written with.
        let rows_max = (device.info().transfer_bytes_max / BLOCK_BYTES as u32).max(1);
        if count > rows_max {
            let mut bytes = BytesMut::with_capacity(count as usize * BLOCK_BYTES);
            for first in (0..count).step_by(rows_max as usize) {
                let part = self.read_rows(band, column, row + first, rows_max.min(count - first));
                match Box::pin(part).await? {
                    Ok(part) => bytes.extend_from_slice(&part),
                    Err(error) => return Some(Err(error)),
                }
            }
            return Some(Ok(bytes.freeze()));
        }
        self.counters.drive_reads.add(1);
        match patiently(&*self.seams.env, self.settings.read_stall, device.read(range)).await {
            Some(Ok(bytes)) if bytes.len() == count as usize * BLOCK_BYTES => Some(Ok(bytes)),
            Some(Ok(_)) => None,
            Some(Err(error)) => {
                if !self.is_over() {
                    self.drive_error(chunk.drive, &error);
                }
                Some(Err(error))
            }
            None => {
                self.suspect(chunk.drive);
                None
            }
        }
    }

    /// Where rows of a column are; `None` when its drive is out of service.
    pub(super) fn rows(
        &self,
        band: &BandState,
        column: u8,
        row: u32,
        count: u32,
    ) -> Option<(Device, LbaRange)> {
        let chunk = band.chunk(column)?;
        if self.health.is_suspect(chunk.drive) || row.checked_add(count)? > band.rows {
            return None;
        }
        let device = self.seams.drives.device(chunk.drive)?;
        let block_bytes = u64::from(device.info().block_bytes);
        let range = LbaRange {
            start: Lba(chunk.row_byte_offset(row) / block_bytes),
            count: u64::from(count) * BLOCK_BYTES as u64 / block_bytes,
        };
        Some((device, range))
    }

    /// Asks the directory in the background where chunks are, unless it was asked a moment ago.
    fn refresh_soon(self: &Rc<Self>) {
        let due = self.refreshed.get().after(self.settings.suspect * 5);
        if self.life.get() == Life::Serving && self.seams.env.now() >= due {
            self.refreshed.set(self.seams.env.now());
            let core = Rc::clone(self);
            self.spawn(async move { core.refresh_bands().await });
        }
    }

    /// Asks the directory where the bands' chunks are now.
    pub(crate) async fn refresh_bands(&self) {
        self.refreshed.set(self.seams.env.now());
        match self.seams.directory.bands(self.volume).await {
            Ok(bands) => {
                for band in bands {
                    if let Some(state) = self.band(band.id)
                        && state.band.borrow().version < band.version
                    {
                        *state.band.borrow_mut() = Rc::new(band);
                    }
                }
            }
            // What is known stands until there is an answer.
            Err(error) => {
                self.directory_error(&error);
            }
        }
    }
}

/// Tries the readable shards in every choice of w until the checksum agrees: one of them may be wrong itself.
fn solve(
    entry: &MapEntry,
    lba: Lba,
    core: &Core,
    m: u8,
    wanted: u8,
    present: &[(u8, Bytes)],
) -> Option<Bytes> {
    let codec = Codec::new(m)?;
    let matches = |block: &[u8]| block_crc(core.volume, lba, entry.sequence, block) == entry.crc;
    if let Some((_, block)) = present.iter().find(|(index, _)| *index == wanted)
        && matches(block)
    {
        return Some(block.clone());
    }
    let others: Vec<(u8, &[u8])> = present
        .iter()
        .filter(|(index, _)| *index != wanted)
        .map(|(index, block)| (*index, &block[..]))
        .collect();
    let w = usize::from(entry.w);
    let mut output = BytesMut::zeroed(BLOCK_BYTES);
    // At most 19 shards, of which at most 3 are left out: bit sets are small.
    for choice in 0u32..1 << others.len() {
        if choice.count_ones() as usize != w {
            continue;
        }
        let shards: Vec<(u8, &[u8])> = others
            .iter()
            .enumerate()
            .filter(|(index, _)| choice >> index & 1 == 1)
            .map(|(_, shard)| *shard)
            .collect();
        if codec
            .reconstruct(entry.w, &shards, &[wanted], &mut [&mut output])
            .is_ok()
            && matches(&output)
        {
            return Some(output.freeze());
        }
    }
    None
}

/// Splits a lookup's answer into drive reads. Blocks without data are left out.
fn pieces(start: Lba, mappings: &[Mapping]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (index, mapping) in mappings.iter().enumerate() {
        let Mapping::Data(entry) = mapping else {
            continue;
        };
        let lba = Lba(start.0 + index as u64);
        if let Some(last) = pieces.last_mut() {
            let length = last.entries.len() as u64;
            let first = &last.entries[0];
            if last.lba.0 + length == lba.0
                && first.band == entry.band
                && first.column == entry.column
                && u64::from(first.row) + length == u64::from(entry.row)
            {
                last.entries.push(*entry);
                continue;
            }
        }
        pieces.push(Piece {
            lba,
            entries: vec![*entry],
        });
    }
    pieces
}

fn concat(blocks: &[Bytes]) -> Bytes {
    match blocks {
        [] => Bytes::new(),
        [only] => only.clone(),
        many => {
            let mut bytes = BytesMut::with_capacity(many.iter().map(Bytes::len).sum());
            for block in many {
                bytes.extend_from_slice(block);
            }
            bytes.freeze()
        }
    }
}
