//! `weft_fuzz::raft_snapshot` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::raft_snapshot::seeds),
    |data: &[u8]| weft_fuzz::raft_snapshot::run(data)
);
