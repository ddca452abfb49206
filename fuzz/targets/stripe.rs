//! `weft_fuzz::stripe` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::stripe::seeds),
    |data: &[u8]| weft_fuzz::stripe::run(data)
);
