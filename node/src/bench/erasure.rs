//! `weft bench erasure`: encoding and reconstruction of cold memory, beside a pass that only moves the same bytes.

use std::cell::RefCell;
use std::time::Instant;

use anyhow::Context as _;
use weft_erasure::Codec;

use super::floor;
use super::histogram::Histogram;
use super::machine::CpuClock;
use super::pairs::{Window, measure};
use super::report::{Heading, Required, Row};
use super::{Output, Plan, machine};

/// Of memory bandwidth. `cargo bench -p weft-erasure` compares with ISA-L, where it is installed.
const REQUIRED: f64 = 0.9;

/// A window is so much shorter than those of other stages: there are many rows, and nobody else takes part.
const WINDOW_PART: u32 = 3;

/// Walked through from end to end: several times any last-level cache that is common.
const COLD_BYTES: usize = 256 << 20;

/// Measures all geometries and sizes.
///
/// # Errors
/// A core cannot be had.
pub(super) fn run(plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    machine::pin(machine::SUBJECT_CORE)?;
    let arena = RefCell::new(floor::noise(COLD_BYTES));
    for (k, m) in [(4u8, 2u8), (8, 2), (8, 3)] {
        let codec = Codec::new(m).context("1 to 4 parity shards")?;
        for shard_bytes in [4 << 10, 64 << 10, 1 << 20] {
            let stripe = Stripe {
                k: usize::from(k),
                m: usize::from(m),
                shard_bytes,
            };
            let floor = || {
                Ok(stripe.walk(plan, &mut arena.borrow_mut(), |data, parity| {
                    floor::move_bytes(data, parity);
                }))
            };
            let encode = || {
                Ok(stripe.walk(plan, &mut arena.borrow_mut(), |data, parity| {
                    codec.encode(data, parity);
                }))
            };
            // The first m data shards are lost; the last m of the sources are the parities.
            let present: Vec<u8> = (m..k + m).collect();
            let lost: Vec<u8> = (0..m).collect();
            let reconstruct = || {
                Ok(
                    stripe.walk(plan, &mut arena.borrow_mut(), |sources, lost_shards| {
                        // A new plan for each stripe, as a degraded read makes one.
                        let plan = codec.reconstruction(k, &present, &lost);
                        plan.expect("k shards are present").run(sources, lost_shards);
                    }),
                )
            };
            let encoded = measure(plan.pairs, floor, encode)?;
            output.row(Row::new(stripe.heading("encode"), &encoded));
            let reconstructed = measure(plan.pairs, floor, reconstruct)?;
            output.row(Row::new(stripe.heading("reconstruct"), &reconstructed));
        }
    }
    Ok(())
}

struct Stripe {
    k: usize,
    m: usize,
    shard_bytes: usize,
}

impl Stripe {
    fn heading(&self, what: &str) -> Heading {
        let size = match self.shard_bytes >> 10 {
            1024 => "1 MiB".to_owned(),
            kib => format!("{kib} KiB"),
        };
        Heading {
            stage: "erasure",
            workload: format!("{what} {}+{}, shards of {size}, cold", self.k, self.m),
            unit: "GB/s",
            floor_is: "reads the same k shards and writes the same m, without arithmetic",
            required: Required::RatioAtLeast(REQUIRED),
            processes: 1,
            drive_kind: "none",
        }
    }

    /// GB/s of source shards by the CPU time of this thread, which does it alone: walking through `arena` stripe by stripe for one window.
    fn walk(
        &self,
        plan: &Plan,
        arena: &mut [u8],
        mut step: impl FnMut(&[&[u8]], &mut [&mut [u8]]),
    ) -> Window {
        let (k, m, bytes) = (self.k, self.m, self.shard_bytes);
        let mut coded = 0usize;
        let mut latency = Histogram::default();
        let (clock, start) = (CpuClock::now(), Instant::now());
        'window: loop {
            let mut last = start.elapsed();
            // The clock is read once for about 64 KiB.
            let stripes_per_look = (65536 / (k * bytes)).max(1);
            for (index, stripe) in arena.chunks_exact_mut((k + m) * bytes).enumerate() {
                let (data, parity) = stripe.split_at_mut(k * bytes);
                let mut sources: [&[u8]; 16] = [&[]; 16];
                for (source, shard) in sources.iter_mut().zip(data.chunks_exact(bytes)) {
                    *source = shard;
                }
                let mut outputs: [&mut [u8]; 4] = Default::default();
                for (output, shard) in outputs.iter_mut().zip(parity.chunks_exact_mut(bytes)) {
                    *output = shard;
                }
                step(&sources[..k], &mut outputs[..m]);
                coded += k * bytes;
                if index % stripes_per_look == stripes_per_look - 1 {
                    let now = start.elapsed();
                    latency.record((now - last).as_nanos() as u64 / stripes_per_look as u64);
                    last = now;
                    if now >= plan.window / WINDOW_PART {
                        break 'window;
                    }
                }
            }
        }
        Window {
            value: coded as f64 / clock.elapsed().0.as_nanos() as f64,
            latency,
            ..Window::default()
        }
    }
}
