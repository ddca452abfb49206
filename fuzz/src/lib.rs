//! What the fuzz targets do with their bytes.
//!
//! Every module is one target: `run` takes bytes that a hostile or broken peer, drive or file could hand us and asserts
//! what must hold of whatever comes out, beyond that nothing panics: what was decoded is encoded and decoded to the same
//! value, memory stays bounded, a queue pair keeps its promises to the side that behaves. `seeds` makes valid inputs by
//! code, so that the fuzzer begins behind magics and checksums instead of guessing them.
//!
//! Where a format is under a checksum or a tag, one bit of the input says whether it is made right before the bytes are
//! parsed. Without that nothing behind a checksum would ever be reached; with it the parser meets what only a bug of
//! ours, or somebody who holds the key, can write.
//!
//! `fuzz/run SECONDS` runs all of them.

pub mod command;
pub mod guest;
pub mod host_queue;
pub mod input;
pub mod label;
pub mod map;
pub mod memory;
pub mod pdu;
pub mod raft_log;
pub mod raft_snapshot;
pub mod reservation;
pub mod stripe;
pub mod target_queue;

/// Writes seeds to the folder that `WEFT_FUZZ_SEEDS` names, if it names one. libFuzzer calls it before it reads its corpus.
///
/// # Panics
/// If they cannot be written.
pub fn write_seeds(seeds: fn() -> Vec<Vec<u8>>) {
    let Some(folder) = std::env::var_os("WEFT_FUZZ_SEEDS") else {
        return;
    };
    for (number, seed) in seeds().iter().enumerate() {
        let file = std::path::Path::new(&folder).join(format!("seed-{number}"));
        std::fs::write(file, seed).expect("the folder for seeds takes them");
    }
}
