//! Invariants checked at every write that reaches for a drive, whoever sent it (design section 3, points 3 and 4):
//! a write goes into a chunk of a band that its sender's epoch was granted, stays inside of it, and gives a row
//! the bytes it gave it before, if it did.
//!
//! A superseded incarnation may write what it likes: fencing, not good behaviour, makes it harmless.

use std::rc::Rc;

use bytes::Bytes;
use weft_proto::id::IncarnationId;

use super::drive::SimDrive;
use super::world::World;

/// Blocks of 4 KiB in a MiB.
pub(super) const BLOCKS_PER_MIB: u64 = 256;

pub(super) fn write_sent(
    world: &World,
    sender: IncarnationId,
    drive: &SimDrive,
    start: u64,
    blocks: &[Option<Bytes>],
) {
    let verdict = world
        .metadata
        .borrow_mut()
        .judge_write(sender, drive, start, blocks);
    if let Err(what) = verdict {
        let count = blocks.len();
        world.violation(format!(
            "{sender} writes {count} blocks at {start} of {}: {what}",
            drive.id()
        ));
    }
}

/// Panics with every invariant that was broken, if any was.
///
/// # Panics
/// When one was.
pub fn assert_clean(world: &Rc<World>) {
    let violations = world.violations();
    assert!(
        violations.is_empty(),
        "seed {}: {} violations:\n{}",
        world.seed(),
        violations.len(),
        violations.join("\n")
    );
}
