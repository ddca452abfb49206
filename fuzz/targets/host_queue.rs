//! `weft_fuzz::host_queue` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::host_queue::seeds),
    |data: &[u8]| weft_fuzz::host_queue::run(data)
);
