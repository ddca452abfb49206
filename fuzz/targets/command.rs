//! `weft_fuzz::command` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::command::seeds),
    |data: &[u8]| weft_fuzz::command::run(data)
);
