//! Hot paths of the wire formats: bytes to PDUs and back. See `benches/harness.rs`.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../../benches/harness.rs"]
mod harness;

use std::hint::black_box;
use std::io::IoSlice;
use std::process::ExitCode;

use bytes::Bytes;
use weft_proto::nvme::command::submit;
use weft_proto::nvme::sgl::SglDescriptor;
use weft_proto::tcp::{
    DataAt, Digests, Encoder, Framer, FramerLimits, FromController, FromHost, TransmitQueue, crc32c,
};
use weft_proto::units::{BlockCount, Lba};
use zerocopy::IntoBytes as _;

/// PDUs of one read of the socket, about.
const BATCH: usize = 16;

fn main() -> ExitCode {
    harness::main(
        env!("CARGO_MANIFEST_DIR"),
        &[
            ("framer, 16 writes of 4 KiB in their capsules", || {
                framer(Digests::default())
            }),
            ("framer, the same with digests", || {
                framer(Digests {
                    header: true,
                    data: true,
                })
            }),
            ("framer, 16 answers of 4 KiB", answers),
            ("encoder, 16 answers of 4 KiB", encode_answers),
            ("crc32c of 4 KiB", || {
                let block = noise();
                Box::new(move || {
                    black_box(crc32c(black_box(&block)));
                })
            }),
        ],
    )
}

fn noise() -> Bytes {
    (0..4096u32).map(|at| (at * 7 + at / 64) as u8).collect()
}

/// What is in the queue, as one.
fn drained(queue: &mut TransmitQueue) -> Vec<u8> {
    let mut slices = [IoSlice::new(&[]); 4 * BATCH];
    let count = queue.fill(&mut slices);
    let bytes = slices[..count].iter().flat_map(|slice| slice.iter().copied());
    let bytes: Vec<u8> = bytes.collect();
    queue.advance(bytes.len());
    assert!(queue.is_empty(), "a batch fits the slices");
    bytes
}

fn framer(digests: Digests) -> Box<dyn FnMut()> {
    let encoder = Encoder { digests, pda_z: 0 };
    let write = submit::write(1, Lba(77), BlockCount::new(1).unwrap(), true);
    let sqe = write.with_data(SglDescriptor::in_capsule(4096));
    let mut entry = [0; 64];
    entry.copy_from_slice(sqe.as_bytes());
    let mut queue = TransmitQueue::new();
    (0..BATCH).for_each(|_| encoder.capsule_cmd(&mut queue, &entry, [noise()]));
    let received = drained(&mut queue);
    let mut framer = Framer::<FromHost>::new();
    framer.set_limits(FramerLimits {
        digests,
        capsule_bytes_max: 8192,
        data_bytes_max: 128 << 10,
        pda_z: 0,
    });
    Box::new(move || {
        framer.buffer(received.len()).extend_from_slice(&received);
        for _ in 0..BATCH {
            black_box(framer.next_pdu().unwrap().unwrap());
        }
    })
}

fn answers() -> Box<dyn FnMut()> {
    let mut queue = TransmitQueue::new();
    let data = [noise()];
    for cccid in 0..BATCH as u16 {
        let at = DataAt { cccid, datao: 0 };
        Encoder::default().c2h_data(&mut queue, at, true, true, data.clone());
    }
    let received = drained(&mut queue);
    let mut framer = Framer::<FromController>::new();
    framer.set_limits(FramerLimits {
        data_bytes_max: 128 << 10,
        ..FramerLimits::default()
    });
    Box::new(move || {
        framer.buffer(received.len()).extend_from_slice(&received);
        for _ in 0..BATCH {
            black_box(framer.next_pdu().unwrap().unwrap());
        }
    })
}

fn encode_answers() -> Box<dyn FnMut()> {
    let mut queue = TransmitQueue::new();
    let data = [noise()];
    Box::new(move || {
        for cccid in 0..BATCH as u16 {
            let at = DataAt { cccid, datao: 0 };
            Encoder::default().c2h_data(&mut queue, at, true, true, black_box(&data).clone());
        }
        let mut slices = [IoSlice::new(&[]); 4 * BATCH];
        black_box(queue.fill(&mut slices));
        queue.advance(queue.len());
    })
}
