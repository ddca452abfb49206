//! Hot paths of a target, without sockets: a command as the framer gives it, through the queue pair and a drive under
//! reservations, to the bytes of its answer. See `benches/harness.rs`.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../../benches/harness.rs"]
mod harness;

use std::hint::black_box;
use std::io::IoSlice;
use std::process::ExitCode;
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt as _;
use weft_block::Durability;
use weft_block::memory::MemoryDrive;
use weft_proto::fabrics::command::{Connect, FabricsCommand};
use weft_proto::id::HostId;
use weft_proto::nvme::command::{NvmCommand, submit};
use weft_proto::nvme::sgl::SglDescriptor;
use weft_proto::nvme::sqe::Sqe;
use weft_proto::nvme::status::Status;
use weft_proto::tcp::{Aligned, CapsuleCmd, Digests, FromHost, IcReq};
use weft_proto::units::{BlockCount, Lba, LbaRange, MIB};
use weft_target::qpair::{Pieces, QueuePair};
use weft_target::reservation::ReservedNamespace;
use weft_target::reservation::namespace::Admission;
use zerocopy::IntoBytes as _;

const HOST: HostId = HostId([7; 16]);
const DRIVE_BYTES: u64 = 16 * MIB;
const BLOCKS: u64 = DRIVE_BYTES / 4096;

/// Commands of one read of the socket, about.
const BATCH: u16 = 16;

fn main() -> ExitCode {
    harness::main(
        env!("CARGO_MANIFEST_DIR"),
        &[
            ("16 reads of 4 KiB", || commands(true)),
            ("16 writes of 4 KiB", || commands(false)),
        ],
    )
}

fn capsule(sqe: &Sqe, data: &Bytes) -> FromHost {
    let mut bytes = [0; 64];
    bytes.copy_from_slice(sqe.as_bytes());
    FromHost::CapsuleCmd(CapsuleCmd {
        sqe: Aligned(bytes),
        data: Ok(data.clone()),
    })
}

/// An I/O queue that takes commands, without flow control, as our own hosts ask for it.
fn connected(now: Instant) -> QueuePair<Option<Admission>> {
    let mut queue = QueuePair::new(now);
    let nothing = queue.handle_pdu(FromHost::IcReq(IcReq::new(Digests::default(), 1)), now, |_| None);
    assert!(nothing.is_none());
    let connect = Connect {
        qid: 1,
        sqsize_z: 127,
        cattr: Connect::DISABLE_SQ_FLOW_CONTROL,
        kato_ms: 0,
    };
    let sqe = FabricsCommand::Connect(connect)
        .to_sqe()
        .with_data(SglDescriptor::in_capsule(1024));
    let request = queue.handle_pdu(capsule(&sqe, &vec![0; 1024].into()), now, |_| None);
    let request = request.unwrap();
    queue.handle_connected(connect);
    queue.handle_completion(request.complete(Status::SUCCESS));
    let queued = queue.transmits().len();
    queue.transmits().advance(queued);
    queue
}

fn commands(read: bool) -> Box<dyn FnMut()> {
    let now = Instant::now();
    let namespace = ReservedNamespace::open(MemoryDrive::device(DRIVE_BYTES), [1; 16], None).unwrap();
    let block: Bytes = (0..4096u32).map(|at| (at * 7 + at / 64) as u8).collect();
    let local = namespace.local(HOST);
    for lba in 0..BLOCKS {
        let data = vec![block.clone()];
        let written = local.write(Lba(lba), data, Durability::Durable).now_or_never();
        written.expect("memory never waits").unwrap();
    }
    let mut queue = connected(now);
    let host = namespace.of_host(HOST);
    let mut lba = 0;
    let one = BlockCount::new(1).unwrap();
    Box::new(move || {
        for cid in 0..BATCH {
            lba = (lba + 1021) % BLOCKS;
            let (sqe, data) = if read {
                let sqe = submit::read(1, Lba(lba), one).with_data(SglDescriptor::transport(4096));
                (sqe, Bytes::new())
            } else {
                let sqe = submit::write(1, Lba(lba), one, true).with_data(SglDescriptor::in_capsule(4096));
                (sqe, block.clone())
            };
            let sqe = Sqe {
                cid: cid.into(),
                ..sqe
            };
            let admit = |_: &Sqe| Some(host.admit());
            let mut request = queue.handle_pdu(capsule(&sqe, &data), now, admit).unwrap();
            let data = std::mem::take(&mut request.data);
            let answer = execute(&request.sqe, request.admitted.as_ref().unwrap(), data);
            queue.handle_completion(request.complete(Status::SUCCESS).with_data(answer));
        }
        let mut slices = [IoSlice::new(&[]); 64];
        black_box(queue.transmits().fill(&mut slices));
        let queued = queue.transmits().len();
        queue.transmits().advance(queued);
    })
}

/// The device's part, which never waits here.
fn execute(sqe: &Sqe, admitted: &Admission, data: Vec<Bytes>) -> Pieces {
    match NvmCommand::parse(sqe).unwrap() {
        NvmCommand::Read { range } => {
            let range: LbaRange = range.lba_range();
            Pieces::from_buf([admitted.read(range).now_or_never().unwrap().unwrap()])
        }
        NvmCommand::Write { range, .. } => {
            let start = range.lba_range().start;
            let written = admitted.write(start, data, Durability::Durable);
            written.now_or_never().unwrap().unwrap();
            Pieces::new()
        }
        other => panic!("{other:?} is not measured"),
    }
}
