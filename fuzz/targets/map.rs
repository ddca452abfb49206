//! `weft_fuzz::map` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::map::seeds),
    |data: &[u8]| weft_fuzz::map::run(data)
);
