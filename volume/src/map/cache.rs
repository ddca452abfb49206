//! A bounded cache of leaf and index blocks: the only part of the page map whose memory is not in proportion
//! to what changed since the last checkpoint.
//!
//! Replacement is by clock (second chance): a hit costs one bit, no list is reordered on the read path.

use std::collections::HashMap;

use foldhash::fast::FixedState;
use weft_proto::units::BLOCK_BYTES;

use super::address::PageId;
use super::page::Page;

/// What one cached block is reckoned at: its bytes and its place in the tables.
pub(crate) const CACHED_PAGE_BYTES: usize = BLOCK_BYTES + 128;

/// How the cache is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Lookups of a block that was there.
    pub hits: u64,
    /// Lookups of a block that had to be read.
    pub misses: u64,
    /// Bytes held now.
    pub resident_bytes: usize,
}

#[derive(Debug)]
struct Frame {
    id: PageId,
    page: Page,
    referenced: bool,
}

/// Blocks by identity, at most as many as the limit has room for, and at least one.
#[derive(Debug)]
pub(crate) struct Cache {
    frames: Vec<Frame>,
    /// With a fast hash: a lookup asks for a block per run and level, and nobody outside chooses their numbers.
    by_id: HashMap<PageId, usize, FixedState>,
    hand: usize,
    frames_max: usize,
    hits: u64,
    misses: u64,
}

impl Cache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            frames: Vec::new(),
            by_id: HashMap::default(),
            hand: 0,
            frames_max: frames(bytes_max),
            hits: 0,
            misses: 0,
        }
    }

    /// Another limit. What does not fit any more is dropped, the rest stays.
    pub(crate) fn set_limit(&mut self, bytes_max: usize) {
        let before = std::mem::replace(&mut self.frames_max, frames(bytes_max));
        if self.frames_max >= before {
            return;
        }
        while self.frames.len() > self.frames_max {
            self.turn();
            self.remove(self.frames[self.hand].id);
        }
        // Memory of half of the frames or less is worth a copy.
        if self.frames.len() < self.frames.capacity() / 2 {
            self.frames.shrink_to_fit();
            self.by_id.shrink_to_fit();
        }
    }

    pub(crate) fn resident_bytes(&self) -> usize {
        self.frames.len() * CACHED_PAGE_BYTES
    }

    pub(crate) fn find(&mut self, id: PageId) -> Option<Page> {
        let Some(index) = self.by_id.get(&id) else {
            self.misses += 1;
            return None;
        };
        self.hits += 1;
        let frame = &mut self.frames[*index];
        frame.referenced = true;
        Some(frame.page.clone())
    }

    pub(crate) fn insert(&mut self, id: PageId, page: Page) {
        if let Some(index) = self.by_id.get(&id) {
            self.frames[*index].page = page;
            return;
        }
        let frame = Frame {
            id,
            page,
            referenced: false,
        };
        if self.frames.len() < self.frames_max {
            self.by_id.insert(id, self.frames.len());
            self.frames.push(frame);
            return;
        }
        self.turn();
        self.by_id.remove(&self.frames[self.hand].id);
        self.by_id.insert(id, self.hand);
        self.frames[self.hand] = frame;
        self.hand = (self.hand + 1) % self.frames.len();
    }

    /// Brings the hand to a block that was not asked for since it last came by. Ends: a full turn clears every bit.
    fn turn(&mut self) {
        while self.frames[self.hand].referenced {
            self.frames[self.hand].referenced = false;
            self.hand = (self.hand + 1) % self.frames.len();
        }
    }

    pub(crate) fn remove(&mut self, id: PageId) {
        let Some(index) = self.by_id.remove(&id) else {
            return;
        };
        self.frames.swap_remove(index);
        if let Some(moved) = self.frames.get(index) {
            self.by_id.insert(moved.id, index);
        }
        if self.hand >= self.frames.len() {
            self.hand = 0;
        }
    }

    /// Drops every block of a run that is no longer read.
    pub(crate) fn remove_run(&mut self, run: u32) {
        let ids: Vec<PageId> = self.by_id.keys().filter(|id| id.run == run).copied().collect();
        for id in ids {
            self.remove(id);
        }
    }

    pub(crate) fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits,
            misses: self.misses,
            resident_bytes: self.resident_bytes(),
        }
    }
}

/// Blocks that so many bytes have room for; at least one.
fn frames(bytes_max: usize) -> usize {
    (bytes_max / CACHED_PAGE_BYTES).max(1)
}
