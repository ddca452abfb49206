//! Whether there is space, and who waits for it.
//!
//! A pool without space is not the end: garbage may be turned into space. Only when a compaction pass freed
//! nothing do writes that need space fail; a TRIM, or a band that was freed, starts the search again.

use std::cell::Cell;
use std::rc::Rc;

use super::Core;
use crate::band::BandState;
use crate::sync::Notify;

/// State of the search for space.
#[derive(Default)]
pub(crate) struct Space {
    wanted: Cell<bool>,
    exhausted: Cell<bool>,
    /// The pool has little left, for any volume.
    pub(crate) tight: Cell<bool>,
    /// Compaction is at work.
    pub(crate) busy: Cell<bool>,
    /// Bands of this volume were freed.
    pub(crate) freed: Rc<Notify>,
}

impl Space {
    /// A grant was refused: compaction is asked for space.
    pub(crate) fn request(&self) {
        self.wanted.set(true);
    }

    /// Whether compaction is asked for space.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.get()
    }

    /// Compaction has done what it could.
    pub(crate) fn settle(&self, found: bool) {
        self.wanted.set(false);
        self.exhausted.set(!found);
    }

    /// Something may be gained now: a TRIM, a freed band.
    pub(crate) fn hope(&self) {
        self.exhausted.set(false);
    }

    /// Nothing can be gained.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.exhausted.get()
    }
}

impl Core {
    /// Bytes of the drives that the volume's bands take.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.bands
            .borrow()
            .values()
            .map(|band| band.band.borrow().chunk_size.bytes() * u64::from(band.geometry.n()))
            .sum()
    }
}

/// The share of a band that moving `live` blocks out of it, into full stripes elsewhere, would gain.
pub(crate) fn gain(band: &BandState, live: u64) -> f64 {
    let capacity = band.capacity_blocks() as f64;
    // A full stripe is 32 rows of payload under a header row.
    let best = capacity * 32.0 / 33.0;
    (1.0 - live as f64 / best).max(0.0)
}
