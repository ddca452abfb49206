//! Finding stripes in a band by their headers.
//!
//! A band is walked in pieces, all columns of a piece at once. Where a header stands, the walk jumps over its shard;
//! where none does (payload of a lost header, a hole, the end), it goes on row by row. An open band ends when a whole
//! window has no shard on any column: writes in flight never span more.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::join_all;
use weft_block::BlockError;
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::StripeNumber;
use weft_proto::units::BLOCK_BYTES;

use super::Core;
use crate::band::{BandState, Rebuild};
use crate::entry::{ColumnSet, MapEntry};
use crate::error::VolumeError;
use crate::format::checksum::{followed_by_block, payload_crc};
use crate::format::header::{ShardPart, StripeHeader};

/// A stripe of which at least one header was found.
pub(crate) struct Found {
    pub(crate) header: Rc<StripeHeader>,
    /// Columns whose shard is whole; without `verify`, whose header is.
    pub(crate) valid: ColumnSet,
}

impl Found {
    /// Whether the payload can be computed.
    pub(crate) fn is_decodable(&self) -> bool {
        self.valid.count() >= self.header.shape.w
    }

    /// Where block `index` of it lies.
    pub(crate) fn entry(&self, index: usize) -> Option<MapEntry> {
        let header = &self.header;
        let record = header.blocks.get(index)?;
        let d = usize::from(header.d);
        let column = header.shape.columns(header.geometry).nth(index / d)?;
        Some(MapEntry {
            band: header.band,
            row: header.row + 1 + (index % d) as u32,
            column,
            start: header.shape.start,
            w: header.shape.w,
            skipped: header.shape.skipped,
            sequence: record.sequence,
            crc: record.crc,
        })
    }
}

/// How a band is walked.
#[derive(Clone, Copy)]
pub(crate) struct Walk {
    /// First row.
    pub(crate) from: u32,
    /// Headers are looked for up to this row, exclusive.
    pub(crate) until: u32,
    /// Rows read at once.
    pub(crate) piece: u32,
    /// Stop after this many rows without a shard; `None` walks on to `until`.
    pub(crate) window: Option<u32>,
    /// Whether payloads are checked.
    pub(crate) verify: bool,
}

/// One column's walk.
struct Cursor {
    column: u8,
    row: u32,
    missing: bool,
}

/// Headers of a piece by their row, and the blocks that they were parsed from: one of each stripe is authenticated whole.
type Known = RefCell<BTreeMap<u32, (Bytes, Rc<StripeHeader>)>>;

/// Rows of a column as they were read.
enum Rows {
    /// At once.
    Whole(Bytes),
    /// Each by itself, where the medium lost some of them.
    Single(Vec<Option<Bytes>>),
}

impl Rows {
    fn len(&self) -> usize {
        match self {
            Self::Whole(bytes) => bytes.len() / BLOCK_BYTES,
            Self::Single(rows) => rows.len(),
        }
    }

    /// The row at `index`, below [`Rows::len`]; `None` if the medium lost it.
    fn get(&self, index: usize) -> Option<&[u8]> {
        match self {
            Self::Whole(bytes) => bytes.get(index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES),
            Self::Single(rows) => rows.get(index)?.as_deref(),
        }
    }

    /// The bytes of `row`, which is one of these, without copying them.
    fn keep(&self, index: usize) -> Option<Bytes> {
        match self {
            Self::Whole(bytes) => Some(bytes.slice(index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES)),
            Self::Single(rows) => rows.get(index)?.clone(),
        }
    }
}

impl Core {
    /// Every stripe of `band` with a readable header, by number. More than m unreachable columns are an error.
    ///
    /// A scan believes what is absent. A chunk that a rebuild has replaced may be somebody else's before a read of it that was under way
    /// is answered, so a scan that met an installation is made again.
    pub(crate) async fn scan_band(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        walk: Walk,
    ) -> Result<BTreeMap<StripeNumber, Found>, VolumeError> {
        loop {
            while band.rebuild.get() == Rebuild::Installing {
                self.alive()?;
                self.sleep(self.settings.retry).await;
            }
            let version = band.band.borrow().version;
            let found = self.scan_once(band, &walk).await?;
            if band.band.borrow().version == version && band.rebuild.get() != Rebuild::Installing {
                return Ok(found);
            }
        }
    }

    async fn scan_once(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        walk: &Walk,
    ) -> Result<BTreeMap<StripeNumber, Found>, VolumeError> {
        let mut found: BTreeMap<StripeNumber, Found> = BTreeMap::new();
        let mut cursors: Vec<Cursor> = (0..band.geometry.n())
            .map(|column| Cursor {
                column,
                row: walk.from,
                missing: false,
            })
            .collect();
        let mut last_end = walk.from;
        let mut at = walk.from;
        let rows = walk.until.min(band.rows);
        while at < rows
            && walk
                .window
                .is_none_or(|window| at < last_end.saturating_add(window))
        {
            self.alive()?;
            let end = at.saturating_add(walk.piece).min(rows);
            let known = Known::default();
            let pieces = join_all(
                cursors
                    .iter_mut()
                    .map(|cursor| self.walk_piece(band, cursor, end, walk.verify, &known)),
            )
            .await;
            for (header, part, whole) in pieces.into_iter().flatten() {
                last_end = last_end.max(header.row + 1 + u32::from(header.d));
                let stripe = found.entry(header.stripe).or_insert_with(|| Found {
                    header,
                    valid: ColumnSet::NONE,
                });
                if whole {
                    stripe.valid = stripe.valid.with(part.column);
                }
            }
            let missing = cursors.iter().filter(|cursor| cursor.missing).count() as u8;
            if missing > band.geometry.m && !planted(Bug::RecoverFromTooFew) {
                return Err(VolumeError::TooManyMissing {
                    band: band.id,
                    missing,
                    tolerated: band.geometry.m,
                });
            }
            // Where every column stands past the piece, nothing in between need be read.
            let reached = cursors
                .iter()
                .filter(|cursor| !cursor.missing)
                .map(|cursor| cursor.row)
                .min();
            at = reached.unwrap_or(end).max(end);
        }
        Ok(found)
    }

    /// Walks one column up to `end`.
    async fn walk_piece(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        cursor: &mut Cursor,
        end: u32,
        verify: bool,
        known: &Known,
    ) -> Vec<(Rc<StripeHeader>, ShardPart, bool)> {
        let mut found = Vec::new();
        if cursor.missing || cursor.row >= end {
            return found;
        }
        let start = cursor.row;
        let Some(rows) = self.piece(band, cursor, end - start).await else {
            cursor.missing = true;
            return found;
        };
        while cursor.row < end {
            let Some((header, part)) = self.header_at(band, cursor, &rows, start, known) else {
                cursor.row += 1;
                continue;
            };
            let shard = cursor.row + 1..cursor.row + 1 + u32::from(header.d);
            cursor.row = shard.end;
            let whole = !verify
                || self.shard_crc(band, cursor.column, shard, &rows, start).await == Some(part.payload_crc);
            found.push((header, part, whole));
        }
        found
    }

    /// The header where the cursor stands, in `rows` from row `start` on.
    fn header_at(
        &self,
        band: &BandState,
        cursor: &Cursor,
        rows: &Rows,
        start: u32,
        known: &Known,
    ) -> Option<(Rc<StripeHeader>, ShardPart)> {
        let index = (cursor.row - start) as usize;
        let block = rows.get(index)?;
        let key = &self.identity.key;
        if let Some((sibling, header)) = known.borrow().get(&cursor.row)
            && let Some(part) = header.parse_sibling(sibling, block, key, cursor.column)
        {
            return Some((Rc::clone(header), part));
        }
        let place = band.band.borrow();
        let parsed = StripeHeader::parse(
            block,
            key,
            self.identity.cluster,
            &place,
            cursor.row,
            cursor.column,
        );
        let (header, part) = parsed.ok()?;
        let header = Rc::new(header);
        known
            .borrow_mut()
            .insert(cursor.row, (rows.keep(index)?, Rc::clone(&header)));
        Some((header, part))
    }

    /// The checksum of the payload in the rows `shard`, of which `rows` has those from row `start` on; others are read. `None`
    /// when one of them is lost.
    async fn shard_crc(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        column: u8,
        shard: Range<u32>,
        rows: &Rows,
        start: u32,
    ) -> Option<u32> {
        let mut crc = 0;
        for row in shard {
            let index = (row - start) as usize;
            let block = if index < rows.len() {
                payload_crc(rows.get(index)?)
            } else {
                payload_crc(&self.read_rows(band, column, row, 1).await?.ok()?)
            };
            crc = followed_by_block(crc, block);
        }
        Some(crc)
    }

    /// The rows of a piece, each by itself where the medium lost some of them. `None` when the column is
    /// unreachable.
    async fn piece(self: &Rc<Self>, band: &Rc<BandState>, cursor: &Cursor, count: u32) -> Option<Rows> {
        match self.read_rows(band, cursor.column, cursor.row, count).await? {
            Ok(bytes) => Some(Rows::Whole(bytes)),
            Err(BlockError::Unrecovered { .. }) => {
                let mut rows = Vec::with_capacity(count as usize);
                for row in cursor.row..cursor.row + count {
                    match self.read_rows(band, cursor.column, row, 1).await? {
                        Ok(bytes) => rows.push(Some(bytes)),
                        Err(BlockError::Unrecovered { .. }) => rows.push(None),
                        Err(_) => return None,
                    }
                }
                Some(Rows::Single(rows))
            }
            Err(_) => None,
        }
    }
}
