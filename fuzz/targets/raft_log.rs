//! `weft_fuzz::raft_log` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::raft_log::seeds),
    |data: &[u8]| weft_fuzz::raft_log::run(data)
);
