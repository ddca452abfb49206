//! `weft_fuzz::pdu` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: weft_fuzz::write_seeds(weft_fuzz::pdu::seeds),
    |data: &[u8]| weft_fuzz::pdu::run(data)
);
