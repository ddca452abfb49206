//! `weft_fuzz::label` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::label::seeds),
    |data: &[u8]| weft_fuzz::label::run(data)
);
