//! How fast each kernel codes, in GB/s of data, beside a plain copy: `cargo bench -p weft-erasure`.
//!
//! "Hot" codes one stripe again and again; "cold" walks through 128 MiB, so that memory is what is measured.
//! Each figure is the best of seven runs of about 40 ms, single thread.

use std::hint::black_box;
use std::time::{Duration, Instant};

use weft_erasure::{Codec, Kernel};

/// Larger than any cache, and enough stripes that none is met twice soon.
const COLD_BYTES: usize = 128 << 20;

fn main() {
    println!("{:<22} {:>9} {:>9}", "", "hot", "cold");
    report("copy 4 KiB", 4096, &mut |at, memory| {
        let (from, to) = memory[at..at + 2 * 4096].split_at_mut(4096);
        to.copy_from_slice(from);
    });
    for kernel in Kernel::available() {
        println!("{kernel:?}");
        for (k, m) in [(1, 2), (4, 2), (8, 2), (16, 4)] {
            let codec = Codec::with_kernel(m, kernel).expect("available");
            for bytes in [4096, 65536] {
                let name = format!("  encode {k}+{m} {:>2} KiB", bytes / 1024);
                report(&name, k * bytes, &mut |at, memory| {
                    let (data, rest) = memory[at..].split_at_mut(k * bytes);
                    let mut parity: [&mut [u8]; 4] = Default::default();
                    for (slice, chunk) in parity.iter_mut().zip(rest.chunks_exact_mut(bytes)).take(m.into()) {
                        *slice = chunk;
                    }
                    let mut sources: [&[u8]; 16] = [&[]; 16];
                    for (slice, chunk) in sources.iter_mut().zip(data.chunks_exact(bytes)) {
                        *slice = chunk;
                    }
                    codec.encode(&sources[..k], &mut parity[..m.into()]);
                });
            }
        }
        for (k, m) in [(4u8, 2u8), (8, 2)] {
            let codec = Codec::with_kernel(m, kernel).expect("available");
            let present: Vec<u8> = (m..k + m).collect();
            let lost: Vec<u8> = (0..m).collect();
            let bytes = 4096;
            let name = format!("  decode {k}+{m} lost {m}");
            report(&name, usize::from(k) * bytes, &mut |at, memory| {
                // The plan is made anew for each block, as for a single degraded read.
                let plan = codec.reconstruction(k, &present, &lost).expect("k present");
                let (sources, rest) = memory[at..].split_at_mut(usize::from(k) * bytes);
                let mut slices: [&[u8]; 16] = [&[]; 16];
                for (slice, chunk) in slices.iter_mut().zip(sources.chunks_exact(bytes)) {
                    *slice = chunk;
                }
                let (first, second) = rest[..2 * bytes].split_at_mut(bytes);
                plan.run(&slices[..k.into()], &mut [first, second]);
            });
        }
    }
}

/// Prints one line: `step` handles `bytes` of data at an offset, and may write up to as much again, or 4 shards.
fn report(name: &str, bytes: usize, step: &mut dyn FnMut(usize, &mut [u8])) {
    let stride = bytes + bytes.max(4 * 65536);
    let mut memory: Vec<u8> = (0..COLD_BYTES + stride)
        .map(|at| (at * 7 + at / 4096) as u8)
        .collect();
    let hot = best(bytes, &mut |_| step(0, black_box(&mut memory)));
    let places = COLD_BYTES / stride;
    let cold = best(bytes, &mut |turn| {
        step(turn % places * stride, black_box(&mut memory))
    });
    println!("{name:<22} {hot:>6.1} GB/s {cold:>4.1}");
}

fn best(bytes: usize, step: &mut dyn FnMut(usize)) -> f64 {
    let mut best = 0f64;
    let mut turn = 0;
    for _ in 0..7 {
        let start = Instant::now();
        let first = turn;
        while start.elapsed() < Duration::from_millis(40) {
            // The clock costs as much as a small block.
            for _ in 0..16 {
                step(turn);
                turn += 1;
            }
        }
        best = best.max(((turn - first) * bytes) as f64 / start.elapsed().as_nanos() as f64);
    }
    best
}
