//! How fast each kernel codes, in GB/s of data, beside a plain copy: `cargo bench -p weft-erasure`.
//!
//! "Hot" codes one stripe again and again; "cold" goes on through 1 GiB and touches every byte of it on the way, so that
//! memory is what is measured. Each figure is the best of seven runs of about 40 ms, single thread.

use std::hint::black_box;
use std::time::{Duration, Instant};

use weft_erasure::{Codec, Kernel};

/// Stripes lie in it one right behind the other. Larger than any last-level cache that is common, and more than is coded
/// in a few runs.
const COLD_BYTES: usize = 1 << 30;

fn main() {
    println!("{:<22} {:>9} {:>9}", "", "hot", "cold");
    let mut memory: Vec<u8> = (0..COLD_BYTES).map(|at| (at * 7 + at / 4096) as u8).collect();
    report("copy 4 KiB", 4096, 2 * 4096, &mut memory, &mut |at, memory| {
        let (from, to) = memory[at..at + 2 * 4096].split_at_mut(4096);
        to.copy_from_slice(from);
    });
    for kernel in Kernel::available() {
        println!("{kernel:?}");
        for (k, m) in [(1, 2), (4, 2), (8, 2), (16, 4)] {
            let codec = Codec::with_kernel(m, kernel).expect("available");
            for bytes in [4096, 65536] {
                let name = format!("  encode {k}+{m} {:>2} KiB", bytes / 1024);
                let stripe = (k + usize::from(m)) * bytes;
                report(&name, k * bytes, stripe, &mut memory, &mut |at, memory| {
                    let (data, rest) = memory[at..at + stripe].split_at_mut(k * bytes);
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
            let stripe = usize::from(k + m) * bytes;
            report(
                &name,
                usize::from(k) * bytes,
                stripe,
                &mut memory,
                &mut |at, memory| {
                    // The plan is made anew for each block, as for a single degraded read.
                    let plan = codec.reconstruction(k, &present, &lost).expect("k present");
                    let (sources, rest) = memory[at..at + stripe].split_at_mut(usize::from(k) * bytes);
                    let mut slices: [&[u8]; 16] = [&[]; 16];
                    for (slice, chunk) in slices.iter_mut().zip(sources.chunks_exact(bytes)) {
                        *slice = chunk;
                    }
                    let (first, second) = rest[..2 * bytes].split_at_mut(bytes);
                    plan.run(&slices[..k.into()], &mut [first, second]);
                },
            );
        }
    }
}

/// Prints one line: `step` handles `bytes` of data of a stripe of `stripe` bytes at an offset, all of which it touches.
fn report(
    name: &str,
    bytes: usize,
    stripe: usize,
    memory: &mut [u8],
    step: &mut dyn FnMut(usize, &mut [u8]),
) {
    let hot = best(bytes, &mut |_| step(0, black_box(memory)));
    let places = COLD_BYTES / stripe;
    let cold = best(bytes, &mut |turn| {
        step(turn % places * stripe, black_box(memory));
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
