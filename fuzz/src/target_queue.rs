//! The target's queue pair under a hostile host: commands and data of any kind in any order, and any bytes at all.
//!
//! - Each command of the host is answered at most once, and only commands that it sent.
//! - A request that is yielded has exactly the data that its entry announced, and is yielded once.
//! - R2Ts never ask for more than [`R2T_BYTES_MAX`] at a time.
//! - What is transmitted is a stream of PDUs that a host of this connection accepts.
//! - Memory is bounded by what was received.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use weft_proto::fabrics::command::{CNTLID_DYNAMIC, Connect, ConnectData, FabricsCommand};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::cqe::Cqe;
use weft_proto::nvme::sgl::SglDescriptor;
use weft_proto::nvme::sqe::Sqe;
use weft_proto::nvme::status::Status;
use weft_proto::tcp::{
    DataAt, Encoder, FatalErrorStatus, Framer, FramerLimits, FromController, FromHost, IcReq, TermReason,
    TransmitQueue,
};
use weft_target::qpair::{QueuePair, R2T_BYTES_MAX, Request, TRANSFER_BYTES_MAX};
use zerocopy::{FromBytes, IntoBytes};

use crate::input::Input;
use crate::memory::measured;
use crate::pdu::{digests, written};

/// One step of the host, by its first byte.
mod step {
    pub(super) const BYTES: u8 = 0;
    pub(super) const IC_REQ: u8 = 1;
    pub(super) const CONNECT: u8 = 2;
    pub(super) const COMMAND: u8 = 3;
    pub(super) const DATA: u8 = 4;
    /// Not the host's: the oldest, or another, request ends.
    pub(super) const COMPLETE: u8 = 5;
    pub(super) const TIME: u8 = 6;
    pub(super) const TERM_REQ: u8 = 7;
    pub(super) const CLOSE: u8 = 8;
    pub(super) const COUNT: u8 = 9;
}

/// What the host sent and has no answer to.
#[derive(Debug, Default)]
struct Sent {
    /// Asked for by R2T, until the command is yielded or answered.
    asked: u32,
    yielded: bool,
}

struct Host {
    framer: Framer<FromHost>,
    queue: QueuePair<()>,
    now: Instant,
    /// As the last ICReq asked.
    encoder: Encoder,
    /// What the queue pair transmits.
    answers: Framer<FromController>,
    hpda: u8,
    requests: Vec<Request<()>>,
    sent: BTreeMap<u16, Sent>,
    /// Whether every byte was sent by a step that knows what it is.
    known: bool,
    /// Bytes.
    received: usize,
}

/// Steps, one after the other.
pub fn run(data: &[u8]) {
    let (received, most) = measured(|| {
        let mut input = Input::new(data);
        let mut host = Host::new();
        while !input.is_empty() {
            host.step(&mut input);
        }
        host.received
    });
    // What was received (a few times: this side's copies of it, the framer's buffer, what requests keep), and a receive
    // buffer as long as the longest PDU.
    let bound = 6 * received + 64 * data.len() + (2 << 20);
    assert!(most <= bound, "{most} bytes of memory for {received} received");
}

impl Host {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            framer: Framer::new(),
            queue: QueuePair::new(now),
            now,
            encoder: Encoder::default(),
            answers: Framer::new(),
            hpda: 0,
            requests: Vec::new(),
            sent: BTreeMap::new(),
            known: true,
            received: 0,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let mut out = TransmitQueue::new();
        match input.u8() % step::COUNT {
            step::BYTES => {
                self.known = false;
                let count = usize::from(input.u8());
                self.receive(&input.bytes(count).to_vec());
            }
            step::IC_REQ => {
                let flags = input.u8();
                let mut request = IcReq::new(digests(flags), 1 + u32::from(flags >> 4));
                request.hpda = input.u8() % 40;
                request.pfv = u16::from(flags & 0xc == 0xc).into();
                self.hpda = request.hpda;
                // It carries no digest itself.
                Encoder::default().ic_req(&mut out, &request);
                self.receive(&written(&mut out));
                self.encoder.digests = self.queue.framer_limits().digests;
            }
            step::CONNECT => self.connect(input, &mut out),
            step::COMMAND => self.command(input, &mut out),
            step::DATA => {
                let cid = u16::from(input.u8());
                let at = DataAt {
                    cccid: cid,
                    datao: u32::from(input.u16()) * 512,
                };
                let bytes = usize::from(input.u8()) * 512 + 1;
                let flags = input.u8();
                let ttag = if flags & 2 == 0 { cid } else { input.u16() };
                let data = Bytes::from(vec![flags; bytes - usize::from(flags & 4 == 0)]);
                self.encoder.h2c_data(&mut out, at, ttag, flags & 1 != 0, [data]);
                self.receive(&written(&mut out));
            }
            step::COMPLETE => self.complete(input),
            step::TIME => {
                self.now += Duration::from_millis(u64::from(input.u16()));
                self.queue.handle_timeout(self.now);
            }
            step::TERM_REQ => {
                let reason = TermReason::new(FatalErrorStatus::PDU_SEQUENCE_ERROR);
                self.encoder.h2c_term_req(&mut out, reason, input.bytes(24));
                self.receive(&written(&mut out));
            }
            step::CLOSE => self.queue.handle_close(),
            _ => unreachable!("a step is one of the above"),
        }
        self.check_answers();
    }

    fn connect(&mut self, input: &mut Input<'_>, out: &mut TransmitQueue) {
        let cid = u16::from(input.u8());
        let flags = input.u8();
        let connect = Connect {
            qid: u16::from(flags & 3),
            sqsize_z: input.u16(),
            cattr: flags & Connect::DISABLE_SQ_FLOW_CONTROL,
            kato_ms: 0,
        };
        let nqn = Nqn::discovery();
        let data = ConnectData::new(HostId([1; 16]), CNTLID_DYNAMIC, &nqn, &nqn);
        let mut data = Bytes::copy_from_slice(data.as_bytes());
        if flags & 0x40 != 0 {
            data.truncate(usize::from(input.u16()));
        }
        let mut sqe = FabricsCommand::Connect(connect).to_sqe();
        sqe.cid = cid.into();
        sqe.sgl1 = SglDescriptor::in_capsule(data.len() as u32);
        self.send(&sqe, data, out);
    }

    fn command(&mut self, input: &mut Input<'_>, out: &mut TransmitQueue) {
        let mut sqe = Sqe::new(input.u8(), 1);
        let flags = input.u8();
        sqe.flags = sqe.flags & !3 | flags & 3;
        sqe.cid = u16::from(input.u8()).into();
        sqe.cdw10 = u32::from(input.u8()).into();
        let length = input.u32() % (TRANSFER_BYTES_MAX + 4096);
        let data = Bytes::copy_from_slice(input.bytes(usize::from(flags >> 4)));
        sqe.sgl1 = match flags & 0xc {
            0 => SglDescriptor::transport(length),
            4 => SglDescriptor::in_capsule(data.len() as u32),
            8 => SglDescriptor {
                address: u64::from(length).into(),
                ..SglDescriptor::in_capsule(length >> 8)
            },
            _ => SglDescriptor {
                identifier: length as u8,
                ..SglDescriptor::transport(length)
            },
        };
        self.send(&sqe, data, out);
    }

    fn send(&mut self, sqe: &Sqe, data: Bytes, out: &mut TransmitQueue) {
        let mut entry = [0; 64];
        entry.copy_from_slice(sqe.as_bytes());
        self.encoder.capsule_cmd(out, &entry, [data]);
        // A second command with the identifier of one in flight ends the connection, so no entry is lost.
        self.sent.entry(sqe.cid.get()).or_default();
        self.receive(&written(out));
    }

    /// As the connection does it.
    fn receive(&mut self, bytes: &[u8]) {
        self.received += bytes.len();
        self.framer.buffer(bytes.len()).extend_from_slice(bytes);
        self.framer.set_limits(self.queue.framer_limits());
        while !self.queue.is_closing() {
            match self.framer.next_pdu() {
                Ok(Some(pdu)) => {
                    if let Some(request) = self.queue.handle_pdu(pdu, self.now, |_| ()) {
                        self.take_request(request);
                    }
                    self.framer.set_limits(self.queue.framer_limits());
                }
                Ok(None) => break,
                Err(error) => {
                    let offending = self.framer.offending().to_vec();
                    self.queue.handle_pdu_error(error, &offending);
                }
            }
        }
    }

    fn take_request(&mut self, request: Request<()>) {
        for half in [Some(&request), request.fused_first.as_deref()]
            .into_iter()
            .flatten()
        {
            let bytes: usize = half.data.iter().map(Bytes::len).sum();
            let length = half
                .sqe
                .data_pointer()
                .expect("checked before it was yielded")
                .length();
            assert!(length <= TRANSFER_BYTES_MAX);
            assert!(
                bytes == 0 || bytes == length as usize,
                "{bytes} bytes of a command that announced {length}"
            );
            assert!(half.answer_bytes_max <= length);
            if self.known {
                let sent = self.sent.get_mut(&half.cid()).expect("yielded, so it was sent");
                assert!(!sent.yielded, "yielded twice");
                sent.yielded = true;
                sent.asked = 0;
            }
        }
        self.requests.push(request);
    }

    fn complete(&mut self, input: &mut Input<'_>) {
        let flags = input.u8();
        if self.requests.is_empty() {
            return;
        }
        let index = usize::from(flags >> 4) % self.requests.len();
        let request = self.requests.remove(index);
        let status = if flags & 1 == 0 {
            Status::SUCCESS
        } else {
            Status::INVALID_FIELD
        };
        if let Some(first) = &request.fused_first {
            self.queue.handle_completion(first.complete(status));
        }
        let connect = FabricsCommand::parse(&request.sqe);
        if let (Ok(FabricsCommand::Connect(connect)), true) = (connect, status.is_success()) {
            self.queue.handle_connected(connect);
        }
        let bytes = request.answer_bytes_max.min(u32::from(input.u16()));
        let mut completion = request.complete(status).with_result(u64::from(flags & 2));
        if bytes > 0 {
            completion = completion.with_data(vec![Bytes::from(vec![7; bytes as usize])]);
        }
        self.queue.handle_completion(completion);
    }

    /// Reads what is transmitted as a host does.
    fn check_answers(&mut self) {
        let bytes = written(self.queue.transmits());
        // The ICResp is the first and carries no digests; before it, nothing but a TermReq is sent.
        self.answers.buffer(bytes.len()).extend_from_slice(&bytes);
        loop {
            let pdu = self
                .answers
                .next_pdu()
                .expect("what a target sends is well-formed");
            let Some(pdu) = pdu else { break };
            match pdu {
                FromController::IcResp(response) => self.answers.set_limits(FramerLimits {
                    digests: response.dgst.digests(),
                    capsule_bytes_max: 0,
                    data_bytes_max: TRANSFER_BYTES_MAX,
                    pda_z: self.hpda,
                }),
                FromController::TermReq(_) => assert!(self.queue.is_closing()),
                FromController::CapsuleResp(cqe) => {
                    let cqe = Cqe::read_from_bytes(&*cqe).expect("16 bytes");
                    self.answered(cqe.cid.get());
                }
                FromController::C2HData(data) => {
                    assert!(data.data.is_ok(), "digests are right");
                    assert!(data.last, "one PDU a command");
                    if data.success {
                        self.answered(data.header.cccid.get());
                    }
                }
                FromController::R2T(r2t) => {
                    assert_eq!(r2t.cccid, r2t.ttag);
                    assert!((1..=TRANSFER_BYTES_MAX).contains(&r2t.r2tl.get()));
                    if self.known {
                        let sent = self
                            .sent
                            .get_mut(&r2t.cccid.get())
                            .expect("asked for what was sent");
                        assert_eq!(sent.asked, 0, "one R2T a command");
                        sent.asked = r2t.r2tl.get();
                    }
                }
            }
        }
        assert_eq!(self.answers.pending_bytes(), 0, "whole PDUs");
        let asked: u32 = self.sent.values().map(|sent| sent.asked).sum();
        assert!(asked <= R2T_BYTES_MAX, "{asked} bytes asked for at a time");
    }

    fn answered(&mut self, cid: u16) {
        if self.known {
            assert!(
                self.sent.remove(&cid).is_some(),
                "answered what was not sent, or twice"
            );
        }
    }
}

/// A connection that lives: writes in capsules and by R2T, reads, a fused pair, an error.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for digests in 0..4 {
        let start = [
            &[step::IC_REQ, digests, 0][..],
            // qid 1, 128 entries, without flow control in half of them.
            &[step::CONNECT, 0, 1 | (digests & 1) << 2, 127, 0],
            &[step::COMPLETE, 0, 0, 0],
        ]
        .concat();
        let write = |cid| [&[step::COMMAND, 1, 0, cid, 0], &4096_u32.to_le_bytes()[..]].concat();
        let read = |cid| [&[step::COMMAND, 2, 0, cid, 0], &4096_u32.to_le_bytes()[..]].concat();
        let in_capsule = [&[step::COMMAND, 1, 4 | 8 << 4, 3, 0, 0, 0, 0, 0], &[9; 8][..]].concat();
        let data = |cid| vec![step::DATA, cid, 0, 0, 8, 1];
        let complete = vec![step::COMPLETE, 0, 0, 16];
        let fused = |fuse, cid| [&[step::COMMAND, 5, fuse, cid, 0], &512_u32.to_le_bytes()[..]].concat();
        let half = |cid| vec![step::DATA, cid, 0, 0, 1, 1];
        seeds.push([start.clone(), write(1), data(1), complete.clone()].concat());
        seeds.push(
            [
                start.clone(),
                read(2),
                read(4),
                complete.clone(),
                complete.clone(),
            ]
            .concat(),
        );
        seeds.push([start.clone(), in_capsule, complete.clone()].concat());
        seeds.push(
            [
                start.clone(),
                fused(1, 5),
                fused(2, 6),
                half(5),
                half(6),
                complete.clone(),
            ]
            .concat(),
        );
        seeds.push([start.clone(), write(1), write(2), write(1)].concat());
        seeds.push([start.clone(), vec![step::BYTES, 8, 4, 0, 72, 0, 72, 0, 0, 0]].concat());
        seeds.push([start, write(1), vec![step::TERM_REQ], vec![step::CLOSE]].concat());
    }
    seeds.push(
        [
            &[step::IC_REQ, 0, 31][..],
            &[step::TIME, 0xff, 0xff, step::TIME, 0xff, 0xff],
        ]
        .concat(),
    );
    seeds
}
