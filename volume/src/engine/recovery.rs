//! Opening: create, load after a hand-over, or recover what a fenced owner left.
//!
//! Recovery of epoch E by a later one (design section 4):
//! 1. The former owner is fenced before this is called; the grant lists the root and every band.
//! 2. Every band of E that the root does not list as sealed is scanned, from the append row it recorded. At most m
//!    columns of each may be missing.
//! 3. H is the highest that any header or the root claims. Stripes up to H are applied where they lie; of
//!    equal sequences the later stripe is the one that is complete.
//! 4. Stripes above H with w valid shards are re-appended in order under their own sequences; the others were
//!    never acknowledged and are dropped. One command ends E at H and makes the new root count.
//!
//! Nothing of the new epoch counts before that command is committed, so a crash anywhere in here is
//! repaired by recovering E again.

use std::collections::BTreeMap;
use std::rc::Rc;

use futures_util::StreamExt as _;
use weft_proto::band::{EpochGrant, RootPointer};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{Epoch, Sequence, StripeNumber};
use weft_proto::units::Lba;

use super::Core;
use super::checkpoint::Purpose;
use super::scan::{Found, Walk};
use super::work::{BlockWork, Op, Target, Work, ZeroWork};
use crate::band::{BandState, Phase};
use crate::error::VolumeError;
use crate::format::header::{StripeHeader, ZeroRecord};
use crate::map::{
    BandState as RootBandState, HOST_LBA_END, MapError, MapIdentity, Mapping, PageMap, Root, RootHead,
};
use crate::seams::BandPurpose;

/// Bands that recovery scans at once. Each has a piece of every column in flight, a megabyte or so; with all bands at once
/// the reads wait for each other longer than a drive may take, sound drives are passed over, and recovery begins
/// again, for ever. A guess: enough to keep n drives busy, and few enough to be answered within a stall.
const SCANS: usize = 2;

impl Core {
    pub(crate) async fn open(self: &Rc<Self>, grant: EpochGrant) -> Result<(), VolumeError> {
        for band in &grant.bands {
            self.add_band(band.clone(), Phase::Sealed);
        }
        let root = match grant.root {
            Some(pointer) => Some(self.load_root(pointer).await?),
            None => None,
        };
        let identity = MapIdentity {
            volume: self.volume,
            layer: self.layer,
        };
        let store = self.page_store();
        let map = match &root {
            Some(root) => PageMap::load(identity, store, self.settings.map, &root.map),
            None => PageMap::new(identity, store, self.settings.map),
        };
        if self.map.set(map).is_err() {
            unreachable!("an engine is opened once");
        }
        if let Some(root) = &root {
            self.take_over_bands(root);
        }
        let core = Rc::clone(self);
        self.spawn(core.append_loop());
        let mut ended_at = StripeNumber(0);
        if let Some(epoch) = grant.recover {
            ended_at = self.recover(epoch, grant.root, root.as_ref()).await?;
            self.ended.borrow_mut().push((epoch, ended_at));
        }
        self.checkpoint(Purpose::Takeover {
            recovered: grant.recover,
            ended_at,
        })
        .await?;
        self.ask_for_bands(&self.host);
        Ok(())
    }

    /// Ages of bands.
    fn take_over_bands(&self, root: &Root) {
        for listed in &root.bands {
            let Some(band) = self.band(listed.band.id) else {
                continue;
            };
            band.order.set(listed.stripe_last.0);
            self.bands_opened
                .set(self.bands_opened.get().max(listed.stripe_last.0));
        }
    }

    /// Reads the root that the directory names.
    async fn load_root(self: &Rc<Self>, pointer: RootPointer) -> Result<Root, VolumeError> {
        let band = self
            .band(pointer.band)
            .ok_or(VolumeError::UnknownBand { band: pointer.band })?;
        let header = self.root_header(&band, pointer).await?;
        let found = Found {
            header: Rc::new(header),
            valid: crate::entry::ColumnSet::NONE,
        };
        let mut payload = Vec::new();
        for (index, record) in found.header.blocks.iter().enumerate() {
            let entry = found
                .entry(index)
                .ok_or(VolumeError::RootUnreadable { band: band.id })?;
            payload.extend_from_slice(&self.read_unmapped(record.lba, &entry).await?);
        }
        let identity = MapIdentity {
            volume: self.volume,
            layer: self.layer,
        };
        let head = RootHead::read(&payload, Some(identity))?;
        Ok(head.load(&*self.page_store()).await?)
    }

    /// The header of the root's stripe, from any column that has one.
    async fn root_header(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        pointer: RootPointer,
    ) -> Result<StripeHeader, VolumeError> {
        let n = band.geometry.n();
        let mut unreachable = 0;
        for step in 0..n {
            let column = (pointer.start % n + step) % n;
            let block = match self.read_rows(band, column, pointer.row, 1).await {
                Some(Ok(block)) => block,
                Some(Err(weft_block::BlockError::Unrecovered { .. })) => continue,
                Some(Err(_)) | None => {
                    unreachable += 1;
                    continue;
                }
            };
            let parsed = StripeHeader::parse(
                &block,
                &self.identity.key,
                self.identity.cluster,
                &band.band.borrow(),
                pointer.row,
                column,
            );
            if let Ok((header, _)) = parsed
                && header.stripe == pointer.stripe
            {
                return Ok(header);
            }
        }
        if unreachable > band.geometry.m {
            return Err(VolumeError::TooManyMissing {
                band: band.id,
                missing: unreachable,
                tolerated: band.geometry.m,
            });
        }
        Err(VolumeError::RootUnreadable { band: band.id })
    }

    /// Brings everything that `epoch` acknowledged into the map, and answers where the epoch ends.
    async fn recover(
        self: &Rc<Self>,
        epoch: Epoch,
        pointer: Option<RootPointer>,
        root: Option<&Root>,
    ) -> Result<StripeNumber, VolumeError> {
        let replayed = root
            .filter(|root| root.epoch == epoch)
            .map_or(StripeNumber(0), |root| root.complete);
        let mut stripes = self.scan_epoch(epoch, root).await?;
        // What the root covers is in the map already, and may have been trimmed since.
        stripes.retain(|number, _| *number > replayed);
        let published = pointer
            .filter(|_| root.is_some_and(|root| root.epoch == epoch))
            .map_or(StripeNumber(0), |pointer| pointer.stripe);
        let claimed = stripes.values().map(|found| found.header.closed_through).max();
        let ended_at = published.max(claimed.unwrap_or(StripeNumber(0)));
        let mut above = stripes.split_off(&StripeNumber(ended_at.0 + 1));
        if planted(Bug::DropLastStripe) {
            above.pop_last();
        }
        tracing::info!(volume = %self.volume, %epoch, %ended_at, replayed = stripes.len(), above = above.len(), "recovery scan done");
        // From here on the new epoch writes.
        self.ask_for_bands(&self.internal);
        self.counters.applied.add(stripes.len() as u64);
        self.replay(epoch, &stripes, &above).await?;
        self.reappend(above).await?;
        Ok(ended_at)
    }

    async fn scan_epoch(
        self: &Rc<Self>,
        epoch: Epoch,
        root: Option<&Root>,
    ) -> Result<BTreeMap<StripeNumber, Found>, VolumeError> {
        let bands: Vec<Rc<BandState>> = self.bands.borrow().values().cloned().collect();
        let scans = bands.iter().filter_map(|band| {
            if band.band.borrow().epoch != epoch {
                return None;
            }
            let listed = root.and_then(|root| root.bands.iter().find(|listed| listed.band.id == band.id));
            let from = match listed {
                Some(listed) if listed.state == RootBandState::Sealed => return None,
                Some(listed) if planted(Bug::RecoverFromTooHigh) => listed.append_row + 2,
                Some(listed) => listed.append_row,
                None => 0,
            };
            let window = band.band.borrow().window_rows.clamp(1, band.rows);
            let walk = Walk {
                from,
                until: band.rows,
                piece: window,
                window: Some(window),
                verify: true,
            };
            Some(self.scan_band(band, walk))
        });
        let mut scans = futures_util::stream::iter(scans).buffered(SCANS);
        let mut stripes = BTreeMap::new();
        while let Some(scan) = scans.next().await {
            stripes.extend(scan?);
        }
        Ok(stripes)
    }

    /// Applies stripes up to H where they lie. Those `above` are for [`Self::reappend`].
    async fn replay(
        &self,
        epoch: Epoch,
        stripes: &BTreeMap<StripeNumber, Found>,
        above: &BTreeMap<StripeNumber, Found>,
    ) -> Result<(), VolumeError> {
        let map = self.map();
        for found in stripes.values() {
            for record in &found.header.zeroes {
                map.zero_range(record.range, record.sequence);
            }
            if !found.is_decodable() {
                continue;
            }
            for (index, record) in found.header.blocks.iter().enumerate() {
                if record.lba < HOST_LBA_END
                    && let Some(entry) = found.entry(index)
                {
                    map.insert(record.lba, entry);
                }
            }
        }
        // What cannot be decoded was abandoned and re-appended, superseded, or lost: the map tells, and what comes into it
        // next. An abandoned stripe is closed by the stripe its blocks went to, which is above H while any before it is open.
        let above = Versions::of(above);
        for (number, found) in stripes.iter().filter(|(_, found)| !found.is_decodable()) {
            for record in &found.header.blocks {
                if record.lba >= HOST_LBA_END {
                    continue;
                }
                let known = match map.lookup(record.lba).await? {
                    Mapping::Data(entry) => entry.sequence >= record.sequence,
                    Mapping::Zero(sequence) => sequence >= record.sequence,
                    Mapping::Unwritten => false,
                };
                if !known && !above.supersede(record.lba, record.sequence) {
                    return Err(VolumeError::Undecodable {
                        epoch,
                        band: found.header.band,
                        stripe: *number,
                        valid: found.valid.count(),
                        needed: found.header.shape.w,
                    });
                }
            }
        }
        Ok(())
    }

    /// Writes stripes above H again, under this epoch.
    async fn reappend(self: &Rc<Self>, stripes: BTreeMap<StripeNumber, Found>) -> Result<(), VolumeError> {
        // Read everything first: what fails here fails before this epoch has written anything.
        let mut whole = Vec::new();
        for (number, found) in stripes {
            if !found.is_decodable() {
                self.counters.dropped.add(1);
                tracing::debug!(volume = %self.volume, stripe = %number, valid = found.valid.count(), "never acknowledged: dropped");
                continue;
            }
            let mut blocks = Vec::new();
            for (index, record) in found.header.blocks.iter().enumerate() {
                if let Some(entry) = found.entry(index)
                    && record.lba < HOST_LBA_END
                {
                    blocks.push((*record, self.read_unmapped(record.lba, &entry).await?));
                }
            }
            whole.push((blocks, found.header.zeroes.clone()));
        }
        self.counters.reappended.add(whole.len() as u64);
        let mut ops = Vec::new();
        for (blocks, zeroes) in whole {
            let op = Op::new(blocks.len() + zeroes.len());
            for (record, data) in blocks {
                let block = BlockWork {
                    lba: record.lba,
                    sequence: record.sequence,
                    crc: record.crc,
                    data,
                    target: Target::Host(Rc::clone(&op)),
                    was_in: Vec::new(),
                };
                self.enqueue(BandPurpose::Internal, Work::Block(block));
            }
            for record in zeroes {
                let pending = &self.checkpoints.zeroes_pending;
                pending.borrow_mut().insert(record.sequence);
                let zeroes = ZeroWork {
                    range: record.range,
                    sequence: record.sequence,
                    op: Rc::clone(&op),
                    was_in: Vec::new(),
                };
                self.enqueue(BandPurpose::Internal, Work::Zeroes(zeroes));
            }
            ops.push(op);
        }
        for op in ops {
            op.answer()
                .await
                .map_err(|error| VolumeError::Map(MapError::Store(error)))?;
        }
        Ok(())
    }
}

/// What decodable stripes say of blocks.
struct Versions {
    /// The last version of each block.
    blocks: BTreeMap<Lba, Sequence>,
    zeroes: Vec<ZeroRecord>,
}

impl Versions {
    fn of(stripes: &BTreeMap<StripeNumber, Found>) -> Self {
        let mut versions = Self {
            blocks: BTreeMap::new(),
            zeroes: Vec::new(),
        };
        for found in stripes.values().filter(|found| found.is_decodable()) {
            for record in &found.header.blocks {
                let last = versions.blocks.entry(record.lba).or_insert(record.sequence);
                *last = record.sequence.max(*last);
            }
            versions.zeroes.extend_from_slice(&found.header.zeroes);
        }
        versions
    }

    /// Whether one of them is `sequence` of the block at `lba`, or a later version.
    fn supersede(&self, lba: Lba, sequence: Sequence) -> bool {
        let zeroed = |record: &ZeroRecord| {
            let is_within = record.range.start <= lba && record.range.end().is_none_or(|end| lba < end);
            is_within && record.sequence >= sequence
        };
        self.blocks.get(&lba).is_some_and(|last| *last >= sequence) || self.zeroes.iter().any(zeroed)
    }
}
