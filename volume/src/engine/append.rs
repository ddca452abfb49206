//! The batcher: from what waits to stripes.
//!
//! A stripe is formed when a slot of the pipeline is free, from everything that waits: at depth 1 that is one
//! block and m copies of it, at depth it is k wide. Of the shapes that carry the blocks, the one that
//! takes the fewest rows of its band per block is taken, and of equal ones the one that writes fewer.
//!
//! Order: what waits is taken first come, first served, so a stripe never holds an older version of a block than
//! an earlier stripe of the same stream did, re-appended stripes aside.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use weft_block::BlockError;

use super::work::Work;
use super::{Core, Life};
use crate::band::{BandState, Phase};
use crate::entry::ColumnSet;
use crate::format::header::{BLOCKS_MAX, StripeHeader};
use crate::seams::{BandPurpose, Timestamp};

/// Bands that a stream holds unopened before it asks for no more, while what it has passes over drives: one that was asked for
/// ahead, and one that was granted since the drives went away. When they are used up, others are asked for.
const READY_MAX: usize = 2;

/// One queue of work with the band it goes to. Host and internal work are apart because only the latter may use
/// the pool's reserve, and because blocks that survived a compaction should not lie among hot ones.
pub(crate) struct Stream {
    pub(crate) purpose: BandPurpose,
    pub(crate) queue: RefCell<VecDeque<Work>>,
    pub(crate) in_flight: Cell<usize>,
    pub(crate) in_flight_max: usize,
    pub(crate) current: RefCell<Option<Rc<BandState>>>,
    /// Granted and not opened yet.
    pub(crate) ready: RefCell<VecDeque<Rc<BandState>>>,
    /// A grant is being asked for.
    pub(crate) asking: Cell<bool>,
    /// The directory said that the pool has no space for this purpose.
    pub(crate) no_space: Cell<bool>,
    /// Since when work has waited for space.
    pub(crate) starved_since: Cell<Option<Timestamp>>,
    /// Bands granted so far, by which chunk sizes grow.
    pub(crate) granted: Cell<u32>,
    /// When the last band was opened.
    pub(crate) opened_at: Cell<Timestamp>,
}

/// What a stripe would look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) w: u8,
    pub(crate) d: u32,
    pub(crate) blocks: usize,
}

/// What can be done with the stream's bands now.
pub(crate) enum Opening {
    /// Append to this band, passing over these columns; longest transfer in blocks.
    Band(Rc<BandState>, ColumnSet, u32),
    /// Wait: a band was asked for, the window is full, or too few columns are in service.
    Wait,
    /// The pool is full and nothing can be gained: work that needs space fails.
    Full,
}

impl Stream {
    pub(crate) fn new(purpose: BandPurpose, in_flight_max: usize) -> Self {
        Self {
            purpose,
            queue: RefCell::default(),
            in_flight: Cell::new(0),
            in_flight_max: in_flight_max.max(1),
            current: RefCell::default(),
            ready: RefCell::default(),
            asking: Cell::new(false),
            no_space: Cell::new(false),
            starved_since: Cell::new(None),
            granted: Cell::new(0),
            opened_at: Cell::new(Timestamp(0)),
        }
    }

    /// Ends everything that waits.
    pub(crate) fn fail_all(&self) {
        for work in self.queue.take() {
            work.fail(BlockError::NotReady);
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.get() == 0 && self.queue.borrow().is_empty()
    }
}

impl Core {
    pub(crate) fn stream(&self, purpose: BandPurpose) -> &Stream {
        match purpose {
            BandPurpose::User => &self.host,
            BandPurpose::Internal => &self.internal,
        }
    }

    /// Adds work at the end of a queue.
    pub(crate) fn enqueue(&self, purpose: BandPurpose, work: Work) {
        if self.is_over() {
            work.fail(BlockError::NotReady);
            return;
        }
        self.stream(purpose).queue.borrow_mut().push_back(work);
        self.pump.notify();
    }

    /// Forms stripes for as long as the engine lives.
    pub(crate) async fn append_loop(self: Rc<Self>) {
        loop {
            let pump = self.pump.changed();
            if self.is_over() {
                return;
            }
            self.form_stripes(BandPurpose::Internal);
            self.form_stripes(BandPurpose::User);
            pump.await;
        }
    }

    fn form_stripes(self: &Rc<Self>, purpose: BandPurpose) {
        let stream = self.stream(purpose);
        while stream.in_flight.get() < stream.in_flight_max {
            self.drop_dead(stream);
            if stream.queue.borrow().is_empty() {
                return;
            }
            let (band, skipped, transfer) = match self.opening(stream) {
                Opening::Band(band, skipped, transfer) => (band, skipped, transfer),
                Opening::Wait => return,
                Opening::Full => {
                    self.fail_or_divert(stream);
                    continue;
                }
            };
            let (blocks, zeroes) = waiting(stream);
            let Some(plan) = plan(&band, skipped, transfer, blocks, zeroes) else {
                return;
            };
            let work = take(stream, plan.blocks);
            self.send_stripe(stream, &band, skipped, plan, work);
        }
    }

    /// Takes copies that are not wanted any more from the front of the queue.
    fn drop_dead(self: &Rc<Self>, stream: &Stream) {
        loop {
            let dead = {
                let mut queue = stream.queue.borrow_mut();
                match queue.front() {
                    Some(Work::Block(block)) if block.target.is_dead() => queue.pop_front(),
                    _ => None,
                }
            };
            match dead {
                Some(Work::Block(block)) => self.block_dropped(block),
                _ => return,
            }
        }
    }

    /// The band that the next stripe goes to, opening one if need be.
    pub(crate) fn opening(self: &Rc<Self>, stream: &Stream) -> Opening {
        loop {
            let current = stream.current.borrow().clone();
            let Some(band) = current else {
                if self.open_ready(stream, 0) {
                    continue;
                }
                return self.no_band(stream);
            };
            let (skipped, transfer) = self.service(&band);
            let healthy = band.geometry.n() - skipped.count();
            let needed = band.geometry.m + 1;
            if skipped != ColumnSet::NONE {
                // Narrow stripes are costly: a band on other drives is better, if there is one. This runs for every stripe,
                // and what is granted may pass over as many: without a bound the whole pool would end up here.
                if stream.ready.borrow().len() < READY_MAX {
                    self.ask_for_bands(stream);
                }
                if self.open_ready(stream, healthy) {
                    continue;
                }
            }
            if healthy < needed {
                self.look_again(stream);
                return Opening::Wait;
            }
            let writer = band.writer.borrow();
            let rows_needed = 2;
            let rows_left = writer.rows_left(needed, skipped);
            if rows_left < rows_needed {
                drop(writer);
                if self.open_ready(stream, 0) {
                    continue;
                }
                self.retire(stream);
                continue;
            }
            if writer.room(needed, skipped).unwrap_or(0) < rows_needed {
                drop(writer);
                if stream.in_flight.get() > 0 {
                    return Opening::Wait;
                }
                // Only abandoned stripes hold the window then, and what they wait for is in this queue.
                if !self.open_ready(stream, 0) {
                    self.retire(stream);
                }
                continue;
            }
            drop(writer);
            // Where none was asked for when this one was opened, in time for a search for space.
            let ahead = stream.purpose == BandPurpose::User && rows_left <= band.rows / 2;
            if ahead && stream.ready.borrow().is_empty() {
                self.ask_for_bands(stream);
            }
            return Opening::Band(band, skipped, transfer.max(2));
        }
    }

    fn no_band(self: &Rc<Self>, stream: &Stream) -> Opening {
        if stream.ready.borrow().len() < READY_MAX {
            self.ask_for_bands(stream);
        } else {
            self.look_again(stream);
        }
        // Without a band for internal work, nothing can be compacted either.
        let stuck = self.internal.no_space.get() && self.internal.current.borrow().is_none();
        if stream.purpose != BandPurpose::User || !stream.no_space.get() {
            return Opening::Wait;
        }
        let now = self.seams.env.now();
        let since = stream.starved_since.get().unwrap_or(now);
        stream.starved_since.set(Some(since));
        // An error that tells the host why is better than its own time-out, which does not.
        let too_long = now >= since.after(self.settings.space_wait);
        if stuck || too_long || self.space.is_exhausted() {
            return Opening::Full;
        }
        Opening::Wait
    }

    /// Drives come back without a word to the engine: looks again in a moment, unless a grant is awaited anyway.
    fn look_again(self: &Rc<Self>, stream: &Stream) {
        if stream.asking.replace(true) {
            return;
        }
        let core = Rc::clone(self);
        let purpose = stream.purpose;
        self.spawn(async move {
            core.sleep(core.settings.retry * 5).await;
            core.stream(purpose).asking.set(false);
            core.pump.notify();
        });
    }

    /// Opens the ready band with the most columns in service, if it has more than `better_than`.
    pub(crate) fn open_ready(self: &Rc<Self>, stream: &Stream, better_than: u8) -> bool {
        let best = stream
            .ready
            .borrow()
            .iter()
            .enumerate()
            .map(|(index, band)| (band.geometry.n() - self.service(band).0.count(), index))
            .max_by_key(|(healthy, index)| (*healthy, std::cmp::Reverse(*index)));
        let Some((_, index)) = best.filter(|(healthy, _)| *healthy > better_than) else {
            return false;
        };
        let Some(band) = stream.ready.borrow_mut().remove(index) else {
            return false;
        };
        band.phase.set(Phase::Open);
        stream.opened_at.set(self.seams.env.now());
        if let Some(former) = stream.current.replace(Some(band)) {
            self.seal(&former);
        }
        if let Some(full) = self.full_unsealed.take() {
            self.seal(&full);
        }
        // In a tight pool a band that is kept unused costs as much as if it were full: compaction waits for its next one, and
        // hosts ask for theirs when half of this one is used.
        if !self.space.tight.get() && stream.ready.borrow().is_empty() {
            self.ask_for_bands(stream);
        }
        true
    }

    /// Ends the stream's current band, in which there is no room. Without any other that takes appends it stays unsealed until
    /// there is one: the lease rests on unsealed bands, and reads are to go on while the pool or the metadata service grants nothing.
    pub(crate) fn retire(&self, stream: &Stream) {
        let Some(band) = stream.current.take() else {
            return;
        };
        if self.has_open_band() {
            self.seal(&band);
        } else {
            self.full_unsealed.replace(Some(band));
        }
    }

    fn has_open_band(&self) -> bool {
        self.host.current.borrow().is_some() || self.internal.current.borrow().is_some()
    }

    /// No more appends to `band`.
    fn seal(&self, band: &BandState) {
        debug_assert!(self.has_open_band(), "the lease has no band to rest on");
        tracing::debug!(volume = %self.volume, band = %band.id, "sealed");
        band.phase.set(Phase::Sealed);
        // The lease may rest on this band only while it is unsealed.
        self.lease_until.set(0);
        self.changed.notify();
        self.worth_compacting.notify();
    }

    /// The pool is full: a write at the front fails; a zero record goes on from the reserve.
    fn fail_or_divert(self: &Rc<Self>, stream: &Stream) {
        let Some(work) = stream.queue.borrow_mut().pop_front() else {
            return;
        };
        match work {
            Work::Block(block) if block.was_in.is_empty() => {
                self.counters.full.add(1);
                block.target.fail(BlockError::CapacityExceeded);
            }
            // What was promised a stripe before keeps the promise: it may have become durable already.
            work @ (Work::Block(_) | Work::Zeroes(_)) => {
                self.enqueue(BandPurpose::Internal, work);
            }
        }
    }

    /// Whether new host work is accepted.
    pub(crate) fn accepts(&self) -> bool {
        self.life.get() == Life::Serving
    }
}

/// How much of the queue's front fits one header, counted as blocks and zero records.
fn waiting(stream: &Stream) -> (usize, usize) {
    let (mut blocks, mut zeroes) = (0, 0);
    for work in stream.queue.borrow().iter() {
        let next = match work {
            Work::Block(_) => (blocks + 1, zeroes),
            Work::Zeroes(_) => (blocks, zeroes + 1),
        };
        if !StripeHeader::has_room(next.0, next.1) {
            break;
        }
        (blocks, zeroes) = next;
    }
    (blocks, zeroes)
}

/// The shape that takes the fewest rows of the band per block: those it writes, and its part of those beside it that are too
/// few columns for another such stripe, since the next one starts below them. A row that is lost costs a full pool as much as
/// one that is written. `None` when not even one row is free.
pub(crate) fn plan(
    band: &BandState,
    skipped: ColumnSet,
    transfer: u32,
    blocks: usize,
    zeroes: usize,
) -> Option<Plan> {
    let writer = band.writer.borrow();
    let m = band.geometry.m;
    if blocks == 0 {
        debug_assert!(zeroes > 0, "a stripe carries something");
        return (writer.room(1 + m, skipped)? >= 1).then_some(Plan {
            w: 1,
            d: 0,
            blocks: 0,
        });
    }
    let blocks = blocks.min(BLOCKS_MAX);
    let healthy = band.geometry.n() - skipped.count();
    let w_max = band.geometry.k.min(healthy.checked_sub(m)?);
    let mut best: Option<((u64, u64), Plan)> = None;
    for w in 1..=w_max {
        let room = writer.room(w + m, skipped).unwrap_or(0).min(transfer);
        let d = room.saturating_sub(1).min((blocks as u32).div_ceil(u32::from(w)));
        if d == 0 {
            continue;
        }
        let carried = blocks.min(d as usize * usize::from(w));
        // Per block, in 2^16ths. So many stripes of this width stand side by side.
        let abreast = healthy / (w + m);
        let per_block = |columns: u64| ((u64::from(d + 1) * columns) << 16) / carried as u64;
        let taken = per_block(u64::from(healthy)) / u64::from(abreast);
        let cost = (taken, per_block(u64::from(w + m)));
        let plan = Plan {
            w,
            d,
            blocks: carried,
        };
        if best.is_none_or(|(lowest, _)| cost < lowest) {
            best = Some((cost, plan));
        }
    }
    best.map(|(_, plan)| plan)
}

/// Takes `blocks` blocks, and the zero records before the one after them, from the front of the queue.
fn take(stream: &Stream, blocks: usize) -> Vec<Work> {
    let mut queue = stream.queue.borrow_mut();
    let mut taken = Vec::with_capacity(blocks);
    let (mut block_count, mut zero_count) = (0, 0);
    while let Some(work) = queue.front() {
        let next = match work {
            Work::Block(_) => (block_count + 1, zero_count),
            Work::Zeroes(_) => (block_count, zero_count + 1),
        };
        if next.0 > blocks || !StripeHeader::has_room(next.0, next.1) {
            break;
        }
        (block_count, zero_count) = next;
        taken.extend(queue.pop_front());
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::band::tests::open_band;
    use weft_proto::band::ChunkSize;

    fn shape(blocks: usize) -> (u8, u32) {
        let band = open_band(ChunkSize::Mib8, 256);
        let plan = plan(&band, ColumnSet::NONE, 256, blocks, 0).unwrap();
        assert_eq!(plan.blocks, blocks);
        (plan.w, plan.d)
    }

    #[test]
    fn stripes_widen_with_what_waits() {
        assert_eq!(shape(1), (1, 1));
        assert_eq!(shape(4), (4, 1));
        assert_eq!(shape(32), (4, 8));
        assert_eq!(shape(128), (4, 32));
    }

    #[test]
    fn rows_that_no_other_stripe_can_use_are_counted() {
        // Two columns would be left beside two rows of w = 2; two stripes of w = 1 stand side by side.
        assert_eq!(shape(2), (1, 2));
        // 60 rows are written either way, and w = 3 leaves a column of 12.
        assert_eq!(shape(33), (4, 9));
        // Nobody could use the rows beside w = 3, but w = 4 takes them too, and fills them with zeroes.
        assert_eq!(shape(3), (3, 1));
        assert_eq!(shape(6), (3, 2));
    }

    #[test]
    fn zero_records_alone_are_copies_of_a_header() {
        assert_eq!(shape(3), (3, 1));
        let band = open_band(ChunkSize::Mib1, 256);
        let plan = plan(&band, ColumnSet::NONE, 256, 0, 3);
        assert_eq!(
            plan,
            Some(Plan {
                w: 1,
                d: 0,
                blocks: 0
            })
        );
    }
}
