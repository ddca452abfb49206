//! The floor of a drive: an io_uring loop on the same file, with the same payload, its buffers made once and nothing around it.

#![allow(
    unsafe_code,
    reason = "io_uring entries point into the buffers of this module"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use io_uring::{IoUring, opcode, squeue, types};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use weft_block::buffer::AlignedBuf;

use super::floor::BLOCK;
use super::histogram::Histogram;
use super::load::{Pattern, payload_at};
use super::machine::CpuClock;
use super::pairs::{CpuPerIo, Window};

/// A durable write, as the drive's.
const RWF_DSYNC: u32 = 2;

/// A file and a ring.
pub(super) struct RingFloor {
    ring: IoUring,
    file: File,
    bytes: u64,
    payload: Bytes,
    random: SmallRng,
}

impl RingFloor {
    /// Opens the file past the page cache, if the drive was opened so.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn open(path: &Path, direct: bool, payload: Bytes) -> io::Result<Self> {
        let flags = if direct {
            rustix::fs::OFlags::DIRECT
        } else {
            rustix::fs::OFlags::empty()
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self {
            ring: IoUring::builder().setup_coop_taskrun().build(256)?,
            file,
            bytes,
            payload,
            random: SmallRng::seed_from_u64(5),
        })
    }

    /// Keeps `pattern` going for `window`.
    ///
    /// # Errors
    /// The system's, or a transfer that was cut short.
    pub(super) fn run(&mut self, pattern: Pattern, window: Duration) -> io::Result<Window> {
        let bytes = pattern.blocks() as usize * BLOCK;
        let mut buffers: Vec<AlignedBuf> = (0..pattern.depth).map(|_| AlignedBuf::zeroed(bytes)).collect();
        let outcome = self.keep_going(pattern, window, &mut buffers);
        if outcome.is_err() {
            // The kernel may still write into them.
            std::mem::forget(buffers);
        }
        outcome
    }

    fn keep_going(
        &mut self,
        pattern: Pattern,
        window: Duration,
        buffers: &mut [AlignedBuf],
    ) -> io::Result<Window> {
        let places = self.bytes / (pattern.blocks() * BLOCK as u64);
        let mut next = 0;
        let mut latency = Histogram::default();
        let mut sent_at = vec![Duration::ZERO; pattern.depth];
        let mut free: Vec<usize> = (0..pattern.depth).collect();
        let (clock, start) = (CpuClock::now(), Instant::now());
        let (mut done, mut measured) = (0u64, None);
        loop {
            let now = start.elapsed();
            if now >= window && done > 0 && measured.is_none() {
                measured = Some((done, now, clock.elapsed()));
            }
            if measured.is_none() {
                for slot in free.drain(..) {
                    let place = if pattern.random {
                        self.random.random_range(0..places)
                    } else {
                        next = (next + 1) % places;
                        next
                    };
                    sent_at[slot] = now;
                    let offset = place * pattern.blocks() * BLOCK as u64;
                    let buffer = &mut buffers[slot];
                    let entry = if pattern.read {
                        read(&self.file, buffer, offset)
                    } else {
                        let at = payload_at(place, buffer.len());
                        write(&self.file, &self.payload[at..at + buffer.len()], offset)
                    };
                    let entry = entry.user_data(slot as u64);
                    // SAFETY: the entry points into a buffer that lives until its completion was seen: this function
                    // returns before that only with an error, after which the caller leaks the buffers. What is written is
                    // part of a payload that nobody changes, and `RingFloor` has it as long as it has the ring.
                    unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
                }
            } else if free.len() == pattern.depth {
                break;
            }
            self.ring.submit_and_wait(1)?;
            let now = start.elapsed();
            for completion in self.ring.completion() {
                if completion.result() != buffers[0].len() as i32 {
                    return Err(io::Error::other(format!(
                        "a transfer answered {}",
                        completion.result()
                    )));
                }
                let slot = completion.user_data() as usize;
                latency.record((now - sent_at[slot]).as_nanos() as u64);
                free.push(slot);
                done += 1;
            }
        }
        let (done, elapsed, cpu) = measured.ok_or_else(|| io::Error::other("nothing was measured"))?;
        Ok(Window {
            value: pattern.rate(done, elapsed.as_secs_f64()),
            latency,
            cpu: CpuPerIo {
                host: None,
                target: Some((cpu.0 + cpu.1).as_secs_f64() * 1e6 / done as f64),
            },
        })
    }
}

fn read(file: &File, buffer: &mut [u8], offset: u64) -> squeue::Entry {
    opcode::Read::new(
        types::Fd(file.as_raw_fd()),
        buffer.as_mut_ptr(),
        buffer.len() as u32,
    )
    .offset(offset)
    .build()
}

fn write(file: &File, data: &[u8], offset: u64) -> squeue::Entry {
    opcode::Write::new(types::Fd(file.as_raw_fd()), data.as_ptr(), data.len() as u32)
        .offset(offset)
        .rw_flags(RWF_DSYNC as i32)
        .build()
}
