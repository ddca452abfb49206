//! A band in use: where its next stripe goes, what is in flight in it, and when it may be freed.
//!
//! Invariant: a row of a column is given to one stripe only (`Writer::reserve` moves the column's frontier past
//! it at once). Rows that an abandoned stripe held are never given again.
//!
//! Columns whose drives are out of service are passed over stripe by stripe; nothing of that is remembered
//! here, because a row that was skipped is simply never written.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use weft_block::BlockError;
use weft_proto::band::{Band, ChunkAddress, Geometry};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{BandId, StripeNumber};

use crate::entry::{ColumnSet, Shape};

/// Where a band is in its life. Freed bands are not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Granted, nothing written yet.
    Granted,
    /// Takes appends.
    Open,
    /// Takes no more appends.
    Sealed,
}

/// How far the rebuild of a column is; one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rebuild {
    /// None is under way.
    None,
    /// Its chunk is being asked for and filled: the band is as it was.
    Filling,
    /// The swap was asked for and has no answer yet: the old chunk may be somebody else's already.
    Installing,
}

/// One band of the volume, of this epoch or an earlier one.
pub(crate) struct BandState {
    pub(crate) id: BandId,
    pub(crate) geometry: Geometry,
    /// Rows of a column.
    pub(crate) rows: u32,
    /// As the directory has it; chunks may be replaced.
    pub(crate) band: RefCell<Rc<Band>>,
    pub(crate) phase: Cell<Phase>,
    pub(crate) writer: RefCell<Writer>,
    pub(crate) sent: Sent,
    pub(crate) rebuild: Cell<Rebuild>,
    /// Readers hold clones: a band is not freed under one.
    pub(crate) pin: Rc<()>,
    /// Compaction found nothing live in it.
    pub(crate) evacuated: Cell<bool>,
    /// Grows by one with each band that was opened: the age of its data.
    pub(crate) order: Cell<u64>,
}

/// The append side of a band.
pub(crate) struct Writer {
    geometry: Geometry,
    rows: u32,
    window: u32,
    /// By column: the first row never given to a stripe.
    frontier: Vec<u32>,
    /// The column after the last stripe's last one.
    next: u8,
    /// First rows of stripes not closed.
    open: BTreeMap<StripeNumber, u32>,
}

/// Rows and columns given to one stripe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reservation {
    /// The header row.
    pub(crate) row: u32,
    pub(crate) shape: Shape,
}

/// The writes sent to a band's chunks.
pub(crate) struct Sent {
    /// Not answered yet.
    unanswered: Cell<u32>,
    /// The same by column.
    by_column: Box<[Cell<u32>]>,
    /// Chunks to which a write ended with an unknown outcome: it may land at any time.
    unknown: RefCell<BTreeSet<ChunkAddress>>,
}

impl Sent {
    fn new(geometry: Geometry) -> Self {
        Self {
            unanswered: Cell::new(0),
            by_column: (0..geometry.n()).map(|_| Cell::new(0)).collect(),
            unknown: RefCell::default(),
        }
    }

    /// A write to `column` is on its way.
    pub(crate) fn begin(&self, column: u8) {
        let of_column = &self.by_column[usize::from(column)];
        of_column.set(of_column.get() + 1);
        self.unanswered.set(self.unanswered.get() + 1);
    }

    /// A write to `column`, which was `chunk` then, has ended.
    pub(crate) fn end(&self, column: u8, chunk: ChunkAddress, result: &Result<(), BlockError>) {
        let of_column = &self.by_column[usize::from(column)];
        of_column.set(of_column.get() - 1);
        self.unanswered.set(self.unanswered.get() - 1);
        if *result == Err(BlockError::Unknown) && !planted(Bug::ForgetUnsettled) {
            self.unknown.borrow_mut().insert(chunk);
        }
    }

    /// Whether every write has ended.
    pub(crate) fn is_answered(&self) -> bool {
        self.unanswered.get() == 0
    }

    fn is_answered_by(&self, column: u8) -> bool {
        self.by_column[usize::from(column)].get() == 0
    }

    /// Whether every write to `chunk` ended in a known way, of those that ended.
    pub(crate) fn is_known(&self, chunk: ChunkAddress) -> bool {
        !self.unknown.borrow().contains(&chunk)
    }

    /// The chunk is the band's no more, and the directory has been told what is known of it.
    pub(crate) fn forget(&self, chunk: ChunkAddress) {
        self.unknown.borrow_mut().remove(&chunk);
    }
}

impl BandState {
    pub(crate) fn new(band: Band, phase: Phase, order: u64) -> Rc<Self> {
        let rows = band.chunk_size.rows();
        Rc::new(Self {
            id: band.id,
            geometry: band.geometry,
            rows,
            phase: Cell::new(phase),
            writer: RefCell::new(Writer {
                geometry: band.geometry,
                rows,
                window: band.window_rows.min(rows),
                frontier: vec![0; usize::from(band.geometry.n())],
                next: 0,
                open: BTreeMap::new(),
            }),
            sent: Sent::new(band.geometry),
            rebuild: Cell::new(Rebuild::None),
            band: RefCell::new(Rc::new(band)),
            pin: Rc::new(()),
            evacuated: Cell::new(false),
            order: Cell::new(order),
        })
    }

    /// Where `column` lies now.
    pub(crate) fn chunk(&self, column: u8) -> Option<ChunkAddress> {
        self.band.borrow().columns.get(usize::from(column)).copied()
    }

    /// Chunks that a write of this engine may still reach: not reused before this incarnation has been fenced there.
    pub(crate) fn unsettled(&self) -> Vec<ChunkAddress> {
        let band = self.band.borrow();
        let columns = (0u8..).zip(&band.columns);
        let unanswered = columns.filter(|(column, _)| !self.sent.is_answered_by(*column));
        let mut chunks = self.sent.unknown.borrow().clone();
        chunks.extend(unanswered.map(|(_, chunk)| *chunk));
        chunks.into_iter().collect()
    }

    /// Blocks of payload that a band written only with full, deep stripes holds: what its live blocks are measured by.
    pub(crate) fn capacity_blocks(&self) -> u64 {
        u64::from(self.rows) * u64::from(self.geometry.k)
    }

    /// Whether nobody reads it or has a write to it unanswered.
    pub(crate) fn is_quiet(&self) -> bool {
        Rc::strong_count(&self.pin) == 1 && self.sent.is_answered()
    }
}

impl Writer {
    /// The rows that a stripe on `shards` columns could have at most, header included, and where it would start.
    /// `None` when too few columns are in service.
    pub(crate) fn room(&self, shards: u8, skipped: ColumnSet) -> Option<u32> {
        let (row, _) = self.lowest(shards, skipped)?;
        let window_end = self
            .open
            .values()
            .min()
            .map_or(self.rows, |base| base.saturating_add(self.window).min(self.rows));
        Some(window_end.saturating_sub(row).min(self.window))
    }

    /// Whether the window, and not the end of the chunks, is what leaves no room.
    pub(crate) fn waits_for_window(&self) -> bool {
        !self.open.is_empty()
    }

    /// The rows left on the columns that are least full, whatever is in flight.
    pub(crate) fn rows_left(&self, shards: u8, skipped: ColumnSet) -> u32 {
        self.lowest(shards, skipped)
            .map_or(0, |(row, _)| self.rows.saturating_sub(row))
    }

    /// Gives `rows` rows of w + m columns to stripe `number`.
    ///
    /// # Panics
    ///
    /// When [`Self::room`] said otherwise: our own mistake.
    pub(crate) fn reserve(
        &mut self,
        number: StripeNumber,
        w: u8,
        rows: u32,
        skipped: ColumnSet,
    ) -> Reservation {
        let shards = w + self.geometry.m;
        let room = self.room(shards, skipped).unwrap_or(0);
        assert!(rows <= room, "a stripe of {rows} rows was formed for {room}");
        let (row, start) = self
            .lowest(shards, skipped)
            .expect("room was found on these columns");
        let shape = Shape { start, w, skipped };
        let mut last = start;
        for column in shape.columns(self.geometry) {
            let frontier = &mut self.frontier[usize::from(column)];
            assert!(*frontier <= row, "a row is written once");
            if !(planted(Bug::RowGivenTwice) && w == 1 && column == start) {
                *frontier = row + rows;
            }
            last = column;
        }
        self.next = (last + 1) % self.geometry.n();
        self.open.insert(number, row);
        Reservation { row, shape }
    }

    /// Stripe `number` is closed.
    pub(crate) fn close(&mut self, number: StripeNumber) {
        self.open.remove(&number);
    }

    /// Whether a stripe of it is not closed.
    pub(crate) fn has_open_stripes(&self) -> bool {
        !self.open.is_empty()
    }

    /// The row from which a recovery has to look: below it, every stripe is closed.
    pub(crate) fn append_row(&self) -> u32 {
        let frontier = self.frontier.iter().copied().min().unwrap_or(0);
        self.open
            .values()
            .copied()
            .min()
            .map_or(frontier, |row| row.min(frontier))
    }

    /// Whether anything was ever given away.
    pub(crate) fn is_untouched(&self) -> bool {
        self.frontier.iter().all(|row| *row == 0)
    }

    /// The lowest row at which `shards` columns in cyclic order are free, and the first of them. Of equal
    /// rows the one next to the last stripe, so that stripes stand side by side.
    fn lowest(&self, shards: u8, skipped: ColumnSet) -> Option<(u32, u8)> {
        let n = self.geometry.n();
        if shards > n - skipped.count().min(n) {
            return None;
        }
        let mut best = None;
        for step in 0..n {
            let start = (self.next + step) % n;
            if skipped.contains(start) {
                continue;
            }
            let shape = Shape {
                start,
                w: shards - self.geometry.m,
                skipped,
            };
            let row = shape
                .columns(self.geometry)
                .map(|column| self.frontier[usize::from(column)])
                .max()?;
            if best.is_none_or(|(lowest, _)| row < lowest) {
                best = Some((row, start));
            }
        }
        best
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use weft_proto::band::ChunkSize;
    use weft_proto::id::{DriveId, Epoch, LayerId, VolumeId};

    /// A band of 4+2 that nothing has been appended to.
    pub(crate) fn open_band(chunk_size: ChunkSize, window_rows: u32) -> Rc<BandState> {
        let band = Band {
            id: BandId(1),
            volume: VolumeId(1),
            layer: LayerId(1),
            epoch: Epoch(1),
            geometry: Geometry { k: 4, m: 2 },
            chunk_size,
            window_rows,
            version: 1,
            columns: (0..6)
                .map(|drive| ChunkAddress {
                    drive: DriveId(drive),
                    offset_mib: 1,
                })
                .collect(),
        };
        BandState::new(band, Phase::Open, 0)
    }

    fn band() -> Rc<BandState> {
        open_band(ChunkSize::Mib1, 64)
    }

    #[test]
    fn narrow_stripes_stand_side_by_side() {
        let band = band();
        let mut writer = band.writer.borrow_mut();
        let first = writer.reserve(StripeNumber(1), 1, 2, ColumnSet::NONE);
        let second = writer.reserve(StripeNumber(2), 1, 2, ColumnSet::NONE);
        let third = writer.reserve(StripeNumber(3), 1, 2, ColumnSet::NONE);
        assert_eq!((first.row, first.shape.start), (0, 0));
        assert_eq!((second.row, second.shape.start), (0, 3));
        assert_eq!((third.row, third.shape.start), (2, 0));
        assert_eq!(writer.append_row(), 0);
    }

    #[test]
    fn columns_out_of_service_are_passed_over() {
        let band = band();
        let mut writer = band.writer.borrow_mut();
        let skipped = ColumnSet::NONE.with(1).with(4);
        assert_eq!(writer.room(5, skipped), None);
        let stripe = writer.reserve(StripeNumber(1), 2, 9, skipped);
        assert_eq!(
            stripe.shape.columns(Geometry { k: 4, m: 2 }).collect::<Vec<_>>(),
            [0, 2, 3, 5]
        );
        assert_eq!(
            writer.room(3, ColumnSet::NONE.with(0).with(2).with(3).with(5)),
            None
        );
    }

    #[test]
    fn writes_in_flight_stay_within_the_window() {
        let band = band();
        let mut writer = band.writer.borrow_mut();
        for number in 1..=8 {
            assert!(writer.room(6, ColumnSet::NONE).unwrap() >= 8);
            writer.reserve(StripeNumber(number), 4, 8, ColumnSet::NONE);
        }
        assert_eq!(writer.room(6, ColumnSet::NONE), Some(0));
        assert!(writer.waits_for_window());
        writer.close(StripeNumber(2));
        assert_eq!(writer.room(6, ColumnSet::NONE), Some(0));
        writer.close(StripeNumber(1));
        assert_eq!(writer.room(6, ColumnSet::NONE), Some(16));
        assert_eq!(writer.append_row(), 16);
    }

    #[test]
    fn a_chunk_ends() {
        let band = band();
        let mut writer = band.writer.borrow_mut();
        for number in 1..=4 {
            writer.reserve(StripeNumber(number), 4, 64, ColumnSet::NONE);
            writer.close(StripeNumber(number));
        }
        assert_eq!(writer.rows_left(6, ColumnSet::NONE), 0);
        assert!(!writer.waits_for_window());
    }
}
