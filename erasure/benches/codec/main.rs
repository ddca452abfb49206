//! How fast each kernel codes beside what memory can do, and beside ISA-L where it is installed:
//! `cargo bench -p weft-erasure [-- WORD]`, where WORD picks the lines that contain it.
//!
//! "Hot" codes one stripe again and again; "cold" walks through 256 MiB from end to end. "Memory" reads the same shards
//! and writes the same, without arithmetic. All that is on one line takes turns, in windows of some milliseconds by the CPU time
//! of this thread; a figure is the median, in GB/s of source shards, and behind it the median of its ratios to memory.
//!
//! ISA-L is not a dependency: `libisal.so.2` is loaded if there is one (`LD_LIBRARY_PATH` can name another than the
//! system's), and its parity is compared with ours byte by byte before it is measured.

mod isal;

use std::hint::black_box;

use rustix::time::{ClockId, clock_gettime};
use weft_erasure::{Codec, Kernel};

use isal::IsaL;

/// Larger than any last-level cache that is common.
const COLD_BYTES: usize = 256 << 20;
/// Of every competitor of a line, one is not counted.
const ROUNDS: usize = 10;
const WINDOW_NS: u64 = 8_000_000;

fn main() {
    let wanted = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let isal = IsaL::load();
    if isal.is_none() {
        println!("no libisal.so.2: ISA-L is not compared with");
    }
    let mut arena = noise(COLD_BYTES);
    for (k, m) in [(1, 2), (4, 2), (8, 2), (8, 3), (16, 4)] {
        for bytes in [4 << 10, 64 << 10, 1 << 20] {
            for (temperature, stripes) in [("hot", 1), ("cold", COLD_BYTES / ((k + m) * bytes))] {
                for reconstruct in [false, true] {
                    let work = Work {
                        k,
                        m,
                        bytes,
                        stripes,
                        reconstruct,
                    };
                    let name = format!(
                        "{} {k}+{m} {} KiB {temperature}",
                        if reconstruct { "reconstruct" } else { "encode" },
                        bytes >> 10
                    );
                    if wanted.as_ref().is_none_or(|wanted| name.contains(wanted)) {
                        println!("{name:<28} {}", work.line(isal.as_ref(), &mut arena));
                    }
                }
            }
        }
    }
}

/// One line: k shards make m others, stripe by stripe.
struct Work {
    k: usize,
    m: usize,
    bytes: usize,
    stripes: usize,
    /// The first shards are lost, as many as can be, and a plan is made for each stripe; otherwise parity is made.
    reconstruct: bool,
}

/// Makes outputs of sources.
type Step<'a> = dyn FnMut(&[&[u8]], &mut [&mut [u8]]) + 'a;

/// Who does it.
type Competitor<'a> = (String, Box<Step<'a>>);

impl Work {
    fn line(&self, isal: Option<&IsaL>, arena: &mut [u8]) -> String {
        let mut competitors = self.competitors(isal, arena);
        let mut rates = vec![Vec::new(); competitors.len()];
        let mut stripe = 0;
        for round in 0..=ROUNDS {
            for ((_, step), rates) in competitors.iter_mut().zip(&mut rates) {
                let rate = self.window(arena, &mut stripe, step);
                if round > 0 {
                    rates.push(rate);
                }
            }
        }
        let memory = rates[0].clone();
        let columns = competitors.iter().zip(&rates).map(|((name, _), rates)| {
            let ratios = rates.iter().zip(&memory).map(|(rate, memory)| rate / memory);
            format!(
                "{name} {:5.1} ({:.2})",
                median(rates.iter().copied()),
                median(ratios)
            )
        });
        columns.collect::<Vec<_>>().join("  ")
    }

    fn competitors<'a>(&self, isal: Option<&'a IsaL>, arena: &mut [u8]) -> Vec<Competitor<'a>> {
        let (k, m) = (self.k as u8, self.m as u8);
        let mut competitors: Vec<Competitor<'a>> = vec![("memory".into(), Box::new(move_bytes))];
        // A byte at a time takes seconds for long shards and is of no interest.
        for kernel in Kernel::available().filter(|kernel| *kernel != Kernel::Scalar || self.bytes == 4096) {
            let codec = Codec::with_kernel(m, kernel).expect("available");
            let lost: Vec<u8> = (0..m.min(k)).collect();
            let present: Vec<u8> = (lost.len() as u8..k + m).collect();
            let step: Box<Step<'a>> = if self.reconstruct {
                Box::new(move |sources, outputs| {
                    let plan = codec.reconstruction(k, &present, &lost).expect("k are present");
                    plan.run(sources, &mut outputs[..lost.len()]);
                })
            } else {
                Box::new(move |sources, outputs| codec.encode(sources, outputs))
            };
            competitors.push((format!("{kernel:?}"), step));
        }
        if let Some(isal) = isal.filter(|_| !self.reconstruct) {
            let encoder = isal.encoder(self.k, self.m);
            self.with_stripe(arena, 0, &mut |sources, outputs| {
                Codec::new(m).expect("1 to 4").encode(sources, outputs);
                let ours: Vec<Vec<u8>> = outputs.iter().map(|shard| shard.to_vec()).collect();
                outputs.iter_mut().for_each(|shard| shard.fill(0));
                encoder.encode(sources, outputs);
                assert!(
                    outputs.iter().zip(&ours).all(|(theirs, ours)| **theirs == **ours),
                    "the same parity"
                );
            });
            let step = move |sources: &[&[u8]], outputs: &mut [&mut [u8]]| encoder.encode(sources, outputs);
            competitors.push(("ISA-L".into(), Box::new(step)));
        }
        competitors
    }

    /// GB/s of source shards by the CPU time of this thread.
    fn window(&self, arena: &mut [u8], stripe: &mut usize, step: &mut Step<'_>) -> f64 {
        let start = cpu_ns();
        let mut coded = 0;
        loop {
            // The clock costs as much as a small stripe.
            for _ in 0..(65536 / (self.k * self.bytes)).max(1) {
                self.with_stripe(arena, *stripe % self.stripes, step);
                *stripe += 1;
                coded += self.k * self.bytes;
            }
            let elapsed = cpu_ns() - start;
            if elapsed >= WINDOW_NS {
                return coded as f64 / elapsed as f64;
            }
        }
    }

    fn with_stripe(&self, arena: &mut [u8], index: usize, step: &mut Step<'_>) {
        let stripe_bytes = (self.k + self.m) * self.bytes;
        let stripe = &mut arena[index * stripe_bytes..(index + 1) * stripe_bytes];
        let (data, parity) = stripe.split_at_mut(self.k * self.bytes);
        let mut sources: [&[u8]; 16] = [&[]; 16];
        for (source, shard) in sources.iter_mut().zip(data.chunks_exact(self.bytes)) {
            *source = shard;
        }
        let mut outputs: [&mut [u8]; 4] = Default::default();
        for (output, shard) in outputs.iter_mut().zip(parity.chunks_exact_mut(self.bytes)) {
            *output = shard;
        }
        step(black_box(&sources[..self.k]), black_box(&mut outputs[..self.m]));
    }
}

/// As many sources as there are outputs are copied, the others are only read.
fn move_bytes(sources: &[&[u8]], outputs: &mut [&mut [u8]]) {
    for (output, source) in outputs.iter_mut().zip(sources.iter().cycle()) {
        output.copy_from_slice(source);
    }
    for source in sources.iter().skip(outputs.len()) {
        let (words, _) = source.as_chunks::<8>();
        black_box(
            words
                .iter()
                .fold(0, |sum, word| u64::wrapping_add(sum, u64::from_le_bytes(*word))),
        );
    }
}

fn cpu_ns() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Bytes that are no zeroes and do not repeat soon.
fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| (at.wrapping_mul(0x9e37_79b1) >> 13) as u8)
        .collect()
}
