//! One shard of a stripe as it was, computed from the others: for a rebuild, which has to know and not to guess.
//!
//! A source counts if its header is authentic, of this stripe and in its place, and its payload has the checksum that this
//! header says; so any w of them prove the rest. What cannot be proven is a hole if nothing refers to it, and an error otherwise.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use weft_block::BlockError;
use weft_erasure::Codec;
use weft_proto::deliberate::{Bug, planted};
use weft_proto::units::BLOCK_BYTES;

use super::Core;
use super::scan::Found;
use crate::band::BandState;
use crate::error::VolumeError;
use crate::format::checksum::{block_crc, payload_crc};
use crate::format::header::{ShardPart, StripeHeader};
use crate::map::{HOST_LBA_END, Mapping, PageState, is_map_lba};

/// What one column has of a stripe.
enum Shard {
    /// Header and payload check.
    Whole(Bytes),
    /// Something else lies there, or the medium lost it.
    Absent,
    /// No answer.
    Unreachable,
}

impl Core {
    /// The shard of a stripe on `column`, header and payload. `None` for a stripe that cannot be decoded and that nothing
    /// refers to.
    pub(crate) async fn reconstruct_shard(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        column: u8,
        found: &Found,
    ) -> Result<Option<Vec<Bytes>>, VolumeError> {
        let header = &found.header;
        let shape = header.shape;
        let Some(wanted) = shape.shard_index(band.geometry, column) else {
            return Ok(None);
        };
        let mut columns: Vec<(u8, u8)> = (0u8..).zip(shape.columns(band.geometry)).collect();
        // In service first; the column's own last, for what the others cannot prove.
        columns.sort_by_key(|(index, column)| {
            let chunk = band.chunk(*column);
            let suspect = chunk.is_none_or(|chunk| self.health.is_suspect(chunk.drive));
            (*index == wanted, suspect, *index)
        });
        let (first, rest) = columns.split_at(usize::from(shape.w).min(columns.len()));
        let mut present: Vec<(u8, Bytes)> = Vec::new();
        let mut unreachable = 0;
        for batch in [first, rest] {
            let reads = batch.iter().map(|(index, column)| async {
                (*index, self.read_shard(band, *column, *index, header).await)
            });
            for (index, shard) in join_all(reads).await {
                match shard {
                    Shard::Whole(payload) => present.push((index, payload)),
                    Shard::Absent => {}
                    Shard::Unreachable => unreachable += 1,
                }
            }
            if let Some(payload) = self.solve_shard(header, wanted, &present) {
                let part = ShardPart {
                    index: wanted,
                    column,
                    payload_crc: payload_crc(&payload),
                };
                let mut shard = vec![header.template(&self.identity.key).shard(part)];
                if !payload.is_empty() {
                    shard.push(payload);
                }
                return Ok(Some(shard));
            }
        }
        // What reads as zeroes is in every header, and nobody can ask the map for it.
        let needed = (unreachable > 0 && !header.zeroes.is_empty()) || self.is_referred_to(found).await?;
        if !needed {
            return Ok(None);
        }
        if unreachable > 0 {
            return Err(VolumeError::TooManyMissing {
                band: band.id,
                missing: unreachable,
                tolerated: band.geometry.m,
            });
        }
        Err(VolumeError::Undecodable {
            epoch: header.epoch,
            band: band.id,
            stripe: header.stripe,
            valid: present.len() as u8,
            needed: shape.w,
        })
    }

    /// One column's shard of a stripe, checked against its own header.
    async fn read_shard(
        self: &Rc<Self>,
        band: &Rc<BandState>,
        column: u8,
        index: u8,
        header: &StripeHeader,
    ) -> Shard {
        let bytes = match self
            .read_rows(band, column, header.row, 1 + u32::from(header.d))
            .await
        {
            Some(Ok(bytes)) => bytes,
            Some(Err(BlockError::Unrecovered { .. })) => return Shard::Absent,
            Some(Err(_)) | None => return Shard::Unreachable,
        };
        let parsed = StripeHeader::parse(
            &bytes[..BLOCK_BYTES],
            &self.identity.key,
            self.identity.cluster,
            &band.band.borrow(),
            header.row,
            column,
        );
        let payload = bytes.slice(BLOCK_BYTES..);
        match parsed {
            Ok((parsed, part))
                if parsed == *header
                    && part.index == index
                    && (part.payload_crc == payload_crc(&payload) || planted(Bug::RebuildUnproven)) =>
            {
                Shard::Whole(payload)
            }
            Ok(_) | Err(_) => Shard::Absent,
        }
    }

    /// The payload of shard `wanted` from those present, each of which has been proven by its own header.
    fn solve_shard(&self, header: &StripeHeader, wanted: u8, present: &[(u8, Bytes)]) -> Option<Bytes> {
        if let Some((_, payload)) = present.iter().find(|(index, _)| *index == wanted) {
            return Some(payload.clone());
        }
        let shards: Vec<(u8, &[u8])> = present
            .iter()
            .map(|(index, payload)| (*index, &payload[..]))
            .collect();
        let d = usize::from(header.d);
        let mut payload = BytesMut::zeroed(d * BLOCK_BYTES);
        Codec::new(header.geometry.m)?
            .reconstruct(header.shape.w, &shards, &[wanted], &mut [&mut payload])
            .ok()?;
        let blocks = payload.chunks_exact(BLOCK_BYTES).enumerate();
        let sound = wanted >= header.shape.w
            || blocks.into_iter().all(|(depth, block)| {
                let record = header.blocks.get(usize::from(wanted) * d + depth);
                record.is_none_or(|record| {
                    block_crc(self.volume, record.lba, record.sequence, block) == record.crc
                })
            });
        sound.then(|| payload.freeze())
    }

    /// Whether anything in use lies in this stripe: a block that the map means, or the root.
    async fn is_referred_to(&self, found: &Found) -> Result<bool, VolumeError> {
        let header = &found.header;
        if let (_, Some(root)) = self.root.get()
            && (root.band, root.row, root.stripe) == (header.band, header.row, header.stripe)
        {
            return Ok(true);
        }
        for (index, record) in header.blocks.iter().enumerate() {
            let Some(place) = found.entry(index) else { continue };
            let referred = if is_map_lba(record.lba) {
                self.map().page_state(record.lba, &place).await? != PageState::Dead
            } else if record.lba < HOST_LBA_END {
                let mapping = self.map().lookup(record.lba).await?;
                matches!(mapping, Mapping::Data(entry) if entry.same_place(&place))
            } else {
                false
            };
            if referred {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
