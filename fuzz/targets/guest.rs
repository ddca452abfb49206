//! `weft_fuzz::guest` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::guest::seeds),
    |data: &[u8]| weft_fuzz::guest::run(data)
);
