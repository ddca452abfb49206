//! Hot paths of the codec, for their instruction counts; `codec.rs` has the rates of all kernels. See
//! `benches/harness.rs`.

#[path = "../../benches/harness.rs"]
mod harness;

use std::hint::black_box;
use std::process::ExitCode;

use weft_erasure::Codec;

const BYTES: usize = 4096;

fn main() -> ExitCode {
    harness::main(
        env!("CARGO_MANIFEST_DIR"),
        &[
            ("encode 4+2, shards of 4 KiB", || encode(4, 2)),
            ("encode 8+3, shards of 4 KiB", || encode(8, 3)),
            ("encode 1+2, shards of 4 KiB", || encode(1, 2)),
            ("reconstruct 2 of 4+2, shards of 4 KiB", || reconstruct(4, 2)),
        ],
    )
}

fn shards(count: u8) -> Vec<Vec<u8>> {
    let shard = |index| (0..BYTES).map(|at| (at * 7 + at / 64 + index) as u8).collect();
    (0..usize::from(count)).map(shard).collect()
}

fn encode(k: u8, m: u8) -> Box<dyn FnMut()> {
    let codec = Codec::new(m).expect("1 to 4 parity shards");
    let (data, mut parity) = (shards(k), shards(m));
    Box::new(move || {
        let data: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
        let mut parity: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
        codec.encode(black_box(&data), black_box(&mut parity));
    })
}

fn reconstruct(k: u8, m: u8) -> Box<dyn FnMut()> {
    let codec = Codec::new(m).expect("1 to 4 parity shards");
    let (sources, mut found) = (shards(k), shards(m));
    let present: Vec<u8> = (m..k + m).collect();
    let lost: Vec<u8> = (0..m).collect();
    Box::new(move || {
        let sources: Vec<&[u8]> = sources.iter().map(Vec::as_slice).collect();
        let mut found: Vec<&mut [u8]> = found.iter_mut().map(Vec::as_mut_slice).collect();
        // The plan is made anew for each block, as for a single degraded read.
        let plan = codec.reconstruction(k, &present, &lost).expect("k present");
        plan.run(black_box(&sources), black_box(&mut found));
    })
}
