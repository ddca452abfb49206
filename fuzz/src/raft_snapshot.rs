//! Snapshots of the cluster state, its stored parts, proposals, queries and messages between members: everything that comes
//! in an envelope. `weft_metadata::fuzzing` does the work.

use crate::input::Input;
use crate::memory::bounded;

/// Byte 0: which kind. Byte 1: whether the envelope is made right. Then the envelope's bytes, or its body.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    let sealed = input.u8() & 1 == 0;
    let bytes = input.rest();
    // As for the log.
    bounded(64 * bytes.len() + (32 << 20), || {
        weft_metadata::fuzzing::envelope(kind, bytes, sealed);
    });
}

/// A state with something of everything, and one of each kind of message.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    weft_metadata::fuzzing::envelope_seeds()
        .into_iter()
        .flat_map(|(kind, envelope)| {
            let body = envelope[weft_metadata::fuzzing::ENVELOPE_HEADER_BYTES..].to_vec();
            [(0, envelope), (1, body)].map(|(bare, bytes)| {
                let mut seed = vec![kind, bare];
                seed.extend(bytes);
                seed
            })
        })
        .collect()
}
