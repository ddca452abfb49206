//! What a drive keeps: blocks on the medium, and before them what its volatile cache holds.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};
use weft_block::BlockError;
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use crate::testing::rng::Rng;

/// See the module. Absent blocks are zeroes.
#[derive(Default)]
pub(super) struct Medium {
    kept: BTreeMap<u64, Bytes>,
    /// Completed writes that power can still take, oldest first, with the number of the command that made them.
    cache: BTreeMap<u64, Vec<(u64, Bytes)>>,
    /// Blocks that cannot be read until they are written.
    pub(super) read_errors: BTreeSet<u64>,
}

impl Medium {
    /// What a read of `block` sees.
    pub(super) fn current(&self, block: u64) -> Bytes {
        let cached = self.cache.get(&block).and_then(|versions| versions.last());
        cached
            .map(|(_, bytes)| bytes)
            .or_else(|| self.kept.get(&block))
            .cloned()
            .unwrap_or_else(zero_block)
    }

    /// Whether any byte of `block` was ever written and not lost.
    pub(super) fn holds(&self, block: u64) -> bool {
        self.kept.contains_key(&block) || self.cache.contains_key(&block)
    }

    /// Whether a loss of power now would take nothing that was written to these blocks.
    pub(super) fn is_durable(&self, start: u64, count: u64) -> bool {
        self.cache.range(start..start + count).next().is_none()
    }

    pub(super) fn read(&self, range: LbaRange) -> Result<Bytes, BlockError> {
        let blocks = range.start.0..range.start.0 + range.count;
        if let Some(block) = blocks.clone().find(|block| self.read_errors.contains(block)) {
            return Err(BlockError::Unrecovered { start: Lba(block) });
        }
        if range.count == 1 {
            return Ok(self.current(range.start.0));
        }
        let mut bytes = BytesMut::with_capacity(range.count as usize * BLOCK_BYTES);
        for block in blocks {
            bytes.extend_from_slice(&self.current(block));
        }
        Ok(bytes.freeze())
    }

    /// Command `id` writes; `None` is zeroes.
    pub(super) fn land(&mut self, id: u64, start: u64, blocks: &[Option<Bytes>], durable: bool) {
        for (block, bytes) in (start..).zip(blocks) {
            self.read_errors.remove(&block);
            if durable {
                // What the cache held of this block is older, and gone with it.
                self.cache.remove(&block);
                match bytes {
                    Some(bytes) => self.kept.insert(block, bytes.clone()),
                    None => self.kept.remove(&block),
                };
            } else {
                let bytes = bytes.clone().unwrap_or_else(zero_block);
                self.cache.entry(block).or_default().push((id, bytes));
            }
        }
    }

    /// Makes durable what completed before the flush was sent. Command numbers grow with the time of sending, so
    /// a later number may have completed before as well; that it stays volatile is the harder case.
    pub(super) fn flush_before(&mut self, id: u64) {
        let kept = &mut self.kept;
        self.cache.retain(|block, versions| {
            let flushed = versions.iter().rposition(|(writer, _)| *writer < id);
            if let Some(last) = flushed {
                let (_, bytes) = versions.drain(..=last).next_back().expect("an element at `last`");
                kept.insert(*block, bytes);
            }
            !versions.is_empty()
        });
    }

    /// Power fails: of what only the cache held, any subset of blocks is lost.
    pub(super) fn lose_power(&mut self, rng: &mut Rng, tear_bytes: usize) {
        for (block, versions) in std::mem::take(&mut self.cache) {
            // The medium has one of the versions it was given, or still the old one.
            let kept = rng.index(versions.len() + 1);
            if let Some((_, bytes)) = kept.checked_sub(1).and_then(|index| versions.get(index)) {
                let old = self.kept.get(&block).cloned().unwrap_or_else(zero_block);
                let bytes = if tear_bytes < BLOCK_BYTES && rng.chance(1, 4) {
                    tear(rng, &old, bytes, tear_bytes)
                } else {
                    bytes.clone()
                };
                self.kept.insert(block, bytes);
            }
        }
    }

    pub(super) fn flip_bit(&mut self, block: u64, bit: usize) {
        let mut bytes = BytesMut::from(&self.current(block)[..]);
        bytes[bit / 8 % BLOCK_BYTES] ^= 1 << (bit % 8);
        self.kept.insert(block, bytes.freeze());
        self.cache.remove(&block);
    }

    pub(super) fn lose(&mut self, start: u64, count: u64) {
        for block in start..start + count {
            self.kept.remove(&block);
            self.cache.remove(&block);
        }
    }
}

pub(super) fn zero_block() -> Bytes {
    Bytes::from_static(&[0; BLOCK_BYTES])
}

/// Sectors of `new` and `old`, each by the seed.
pub(super) fn tear(rng: &mut Rng, old: &Bytes, new: &Bytes, tear_bytes: usize) -> Bytes {
    let mut torn = BytesMut::from(&old[..]);
    for offset in (0..BLOCK_BYTES).step_by(tear_bytes) {
        if rng.chance(1, 2) {
            torn[offset..offset + tear_bytes].copy_from_slice(&new[offset..offset + tear_bytes]);
        }
    }
    torn.freeze()
}
