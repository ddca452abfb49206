//! What every type in an envelope has to keep.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::envelope::{self, Kind};

/// Judges one input as an envelope of a type that its caller names.
#[derive(Debug)]
pub(crate) struct Judge<'a> {
    bytes: &'a [u8],
    /// Whether they are an envelope; otherwise its body.
    sealed: bool,
}

impl<'a> Judge<'a> {
    pub(super) fn new(bytes: &'a [u8], sealed: bool) -> Self {
        Self { bytes, sealed }
    }

    /// Whatever opens is sealed and opened to the same bytes.
    pub(crate) fn judge<T: Serialize + DeserializeOwned>(&mut self, kind: Kind) {
        let _ = self.open::<T>(kind);
    }

    /// As [`Self::judge`], and answers what it held.
    pub(super) fn open<T: Serialize + DeserializeOwned>(&mut self, kind: Kind) -> Option<T> {
        let opened = if self.sealed {
            envelope::open::<T>(kind, self.bytes).ok()
        } else {
            envelope::open::<T>(kind, &envelope::wrap(kind, self.bytes)).ok()
        };
        let value = opened?;
        let once = envelope::seal(kind, &value);
        let again: T = envelope::open(kind, &once).expect("what was sealed opens");
        assert!(envelope::seal(kind, &again) == once, "the same after sealing");
        Some(value)
    }
}
