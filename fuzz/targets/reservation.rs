//! `weft_fuzz::reservation` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::reservation::seeds),
    |data: &[u8]| weft_fuzz::reservation::run(data)
);
