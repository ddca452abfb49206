//! What waits to be written: blocks and zero records, and what each is for.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;

use bytes::Bytes;
use weft_block::BlockError;
use weft_proto::band::RootPointer;
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{Sequence, StripeNumber};
use weft_proto::units::{Lba, LbaRange};

use crate::band::BandState;
use crate::entry::MapEntry;
use crate::map::Generation;
use crate::sync::Reply;

/// One operation of the host (or of recovery): answered once all its parts are durable and in the map.
pub(crate) struct Op {
    remaining: Cell<usize>,
    /// A part was refused for want of space.
    refused: Cell<bool>,
    reply: Reply<Result<(), BlockError>>,
}

impl Op {
    /// Of `parts` parts. One without parts is done at once.
    pub(crate) fn new(parts: usize) -> Rc<Self> {
        let op = Rc::new(Self {
            remaining: Cell::new(parts),
            refused: Cell::new(false),
            reply: Reply::default(),
        });
        if parts == 0 {
            op.reply.give(Ok(()));
        }
        op
    }

    /// Waits for the answer. One waiter only.
    pub(crate) async fn answer(&self) -> Result<(), BlockError> {
        poll_fn(|context| self.reply.poll(context)).await
    }

    /// A part is durable and visible.
    pub(crate) fn part_done(&self) {
        let remaining = self.remaining.get() - 1;
        self.remaining.set(remaining);
        if remaining == 0 {
            let refused = self.refused.get().then_some(BlockError::CapacityExceeded);
            self.reply.give(refused.map_or(Ok(()), Err));
        }
    }

    /// A part will not be written. The first error is the answer: at once where the outcome is open anyway, and only when
    /// every other part has ended where the answer promises that nothing takes effect after it.
    pub(crate) fn fail(&self, error: BlockError) {
        if error == BlockError::CapacityExceeded {
            self.refused.set(true);
            self.part_done();
        } else {
            self.reply.give(Err(error));
        }
    }
}

/// Map blocks that were appended together.
pub(crate) struct PageAppend {
    pub(crate) entries: Vec<Cell<Option<MapEntry>>>,
    remaining: Cell<usize>,
    pub(crate) reply: Rc<Reply<Result<Vec<MapEntry>, BlockError>>>,
}

impl PageAppend {
    pub(crate) fn new(blocks: usize) -> Rc<Self> {
        let reply = Reply::new();
        if blocks == 0 {
            reply.give(Ok(Vec::new()));
        }
        Rc::new(Self {
            entries: vec![Cell::new(None); blocks],
            remaining: Cell::new(blocks),
            reply,
        })
    }

    fn done(&self, index: usize, entry: MapEntry) {
        self.entries[index].set(Some(entry));
        let remaining = self.remaining.get() - 1;
        self.remaining.set(remaining);
        if remaining == 0 {
            self.reply
                .give(Ok(self.entries.iter().filter_map(Cell::get).collect()));
        }
    }
}

/// A block that compaction or repair moves. It is registered by LBA before it is looked up, and every newer
/// version that becomes visible from then on kills it; so no stripe formed after a TRIM became visible holds
/// an older copy, which is what lets TRIM records be forgotten.
pub(crate) struct Copy {
    pub(crate) lba: Lba,
    /// The version that is copied, once it has been looked up.
    pub(crate) sequence: Cell<Option<Sequence>>,
    /// The highest version that became visible since the copy was registered.
    pub(crate) newest: Cell<Option<Sequence>>,
    pub(crate) group: RefCell<Rc<CopyGroup>>,
}

impl Copy {
    /// Whether a newer version is visible.
    pub(crate) fn is_dead(&self) -> bool {
        self.sequence.get().is_some()
            && self.newest.get() > self.sequence.get()
            && !planted(Bug::CopyWinsOverNewer)
    }
}

/// Copies that are waited for together.
pub(crate) struct CopyGroup {
    pub(crate) remaining: Cell<usize>,
    pub(crate) reply: Rc<Reply<Result<(), BlockError>>>,
}

impl CopyGroup {
    pub(crate) fn new(copies: usize) -> Rc<Self> {
        let reply = Reply::new();
        if copies == 0 {
            reply.give(Ok(()));
        }
        Rc::new(Self {
            remaining: Cell::new(copies),
            reply,
        })
    }

    pub(crate) fn done(&self) {
        let remaining = self.remaining.get() - 1;
        self.remaining.set(remaining);
        if remaining == 0 {
            self.reply.give(Ok(()));
        }
    }
}

/// Whom a block belongs to.
#[derive(Clone)]
pub(crate) enum Target {
    /// The host, or recovery.
    Host(Rc<Op>),
    /// The page map.
    Page(Rc<PageAppend>, usize),
    /// Compaction or repair: `expected` was found by a lookup since `seen`.
    Copy {
        copy: Rc<Copy>,
        expected: MapEntry,
        seen: Generation,
    },
    /// A root. Not re-appended when its stripe is abandoned: the checkpoint writes another one.
    Root(Rc<Reply<Result<RootPointer, BlockError>>>),
}

impl Target {
    /// Whether it need not be written any more.
    pub(crate) fn is_dead(&self) -> bool {
        matches!(self, Self::Copy { copy, .. } if copy.is_dead())
    }

    /// It will never be written.
    pub(crate) fn fail(&self, error: BlockError) {
        match self {
            Self::Host(op) => op.fail(error),
            Self::Page(append, _) => append.reply.give(Err(error)),
            Self::Copy { copy, .. } => copy.group.borrow().reply.give(Err(error)),
            Self::Root(reply) => reply.give(Err(error)),
        }
    }

    pub(crate) fn page_done(&self, entry: MapEntry) {
        if let Self::Page(append, index) = self {
            append.done(*index, entry);
        }
    }
}

/// An abandoned stripe: closed when each of its parts is in a stripe that is.
pub(crate) struct Abandoned {
    pub(crate) number: StripeNumber,
    pub(crate) band: Rc<BandState>,
    pub(crate) remaining: Cell<usize>,
}

/// A block to be written.
pub(crate) struct BlockWork {
    pub(crate) lba: Lba,
    pub(crate) sequence: Sequence,
    pub(crate) crc: u32,
    pub(crate) data: Bytes,
    pub(crate) target: Target,
    /// Stripes it was in before. Empty but for the unlucky.
    pub(crate) was_in: Vec<Rc<Abandoned>>,
}

/// A range to be zeroed.
pub(crate) struct ZeroWork {
    pub(crate) range: LbaRange,
    pub(crate) sequence: Sequence,
    pub(crate) op: Rc<Op>,
    pub(crate) was_in: Vec<Rc<Abandoned>>,
}

/// One entry of a queue.
pub(crate) enum Work {
    Block(BlockWork),
    Zeroes(ZeroWork),
}

impl Work {
    /// It will never be written.
    pub(crate) fn fail(&self, error: BlockError) {
        match self {
            Self::Block(block) => block.target.fail(error),
            Self::Zeroes(zeroes) => zeroes.op.fail(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[test]
    fn a_write_that_is_refused_for_space_is_answered_when_its_other_parts_have_ended() {
        let op = Op::new(3);
        op.part_done();
        op.fail(BlockError::CapacityExceeded);
        assert_eq!(
            op.answer().now_or_never(),
            None,
            "a part is in flight and may land"
        );
        op.part_done();
        assert_eq!(
            op.answer().now_or_never(),
            Some(Err(BlockError::CapacityExceeded))
        );
    }

    #[test]
    fn an_error_of_unknown_outcome_is_answered_at_once() {
        let op = Op::new(2);
        op.fail(BlockError::NotReady);
        assert_eq!(op.answer().now_or_never(), Some(Err(BlockError::NotReady)));
    }
}
