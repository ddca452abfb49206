//! The write-ahead log of Raft: its records, and what they say of vote and entries. `weft_metadata::fuzzing` does the work,
//! since a log's bytes are nobody else's business.

use crate::input::Input;
use crate::memory::bounded;

/// Byte 0: whether the rest is a segment's bytes, or the bodies of records whose headers are made right.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let framed = input.u8() & 1 == 0;
    let bytes = input.rest();
    // CBOR reserves up to a MiB for a sequence before it has seen its elements, at every level of nesting.
    bounded(64 * bytes.len() + (32 << 20), || {
        weft_metadata::fuzzing::raft_log(bytes, framed);
    });
}

/// A log with every kind of record.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    weft_metadata::fuzzing::raft_log_seeds()
        .into_iter()
        .map(|(framed, bytes)| {
            let mut seed = vec![u8::from(!framed)];
            seed.extend(bytes);
            seed
        })
        .collect()
}
