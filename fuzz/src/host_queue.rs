//! The initiator's queue pair under a hostile controller: answers, data and R2Ts of any kind in any order, and any bytes at
//! all.
//!
//! - Every command that was submitted completes exactly once, and a closed connection leaves none.
//! - What is transmitted is a stream of PDUs that a controller of this connection accepts; data that an R2T asked for is the
//!   command's, and never more than the command has.
//! - A read never completes with more bytes than it asked for, and undamaged ones are those that were sent.
//! - Memory is bounded by what was received and what the commands in flight ask for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use weft_initiator::qpair::{CloseReason, Command, CommandError, HostQueue, Payload, QueueOptions};
use weft_proto::nvme::cqe::Cqe;
use weft_proto::nvme::sqe::Sqe;
use weft_proto::nvme::status::Status;
use weft_proto::tcp::{
    DataAt, Encoder, FatalErrorStatus, Framer, FramerLimits, FromHost, IcResp, R2T, TermReason, TransmitQueue,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::input::Input;
use crate::memory::measured;
use crate::pdu::{digests, written};

/// One step, by its first byte.
mod step {
    pub(super) const BYTES: u8 = 0;
    pub(super) const IC_RESP: u8 = 1;
    /// Of this side: a command.
    pub(super) const SUBMIT: u8 = 2;
    pub(super) const ANSWER: u8 = 3;
    pub(super) const DATA: u8 = 4;
    pub(super) const R2T: u8 = 5;
    /// Of this side: the socket takes some of what is queued.
    pub(super) const WRITE: u8 = 6;
    pub(super) const TIME: u8 = 7;
    pub(super) const TERM_REQ: u8 = 8;
    pub(super) const CLOSE: u8 = 9;
    pub(super) const COUNT: u8 = 10;
}

/// Longest transfer here, so that many fit into an input.
const TRANSFER_BYTES: u32 = 40 << 10;
const TIMEOUT: Duration = Duration::from_secs(5);

/// A command as this side knows it, by its context.
#[derive(Clone, Copy, Debug)]
enum Asked {
    Nothing,
    Out(u32),
    In(u32),
}

struct Controller {
    queue: HostQueue<u32>,
    now: Instant,
    /// What the controller negotiated, and encodes with.
    encoder: Encoder,
    /// What the queue pair transmits.
    framer: Framer<FromHost>,
    commands: BTreeMap<u32, Asked>,
    submitted: u32,
    /// Identifiers as the queue pair chose them, with the command's context, oldest first.
    cids: Vec<(u16, u32)>,
    /// Bytes of commands that were sent after R2Ts, by context.
    sent: BTreeMap<u32, usize>,
    /// Whether the response that opens the connection was taken.
    ready: bool,
    /// Whether every byte was sent by a step that knows what it is. Otherwise only the completions are judged.
    known: bool,
    received: usize,
}

/// Byte 0: digests and depth. Then steps.
pub fn run(data: &[u8]) {
    let ((received, asked), most) = measured(|| {
        let mut input = Input::new(data);
        let mut controller = Controller::new(input.u8());
        while !input.is_empty() {
            controller.step(&mut input);
        }
        let asked = controller.submitted as usize * TRANSFER_BYTES as usize;
        (controller.end(), asked)
    });
    let bound = 6 * received + 2 * asked + 64 * data.len() + (4 << 20);
    assert!(most <= bound, "{most} bytes of memory for {received} received");
}

impl Controller {
    fn new(flags: u8) -> Self {
        let options = QueueOptions {
            depth: 1 + u16::from(flags >> 4),
            digests: digests(flags),
            command_timeout: TIMEOUT,
            capsule_bytes_max: 8192,
        };
        Self {
            queue: HostQueue::new(options),
            now: Instant::now(),
            encoder: Encoder::default(),
            framer: Framer::new(),
            commands: BTreeMap::new(),
            submitted: 0,
            cids: Vec::new(),
            sent: BTreeMap::new(),
            ready: false,
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
                self.receive(input.bytes(count));
            }
            step::IC_RESP => {
                let flags = input.u8();
                let mut response = IcResp::new(digests(flags), input.u32());
                response.cpda = input.u8() % 40;
                response.pfv = u16::from(flags & 0xc == 0xc).into();
                Encoder::default().ic_resp(&mut out, &response);
                self.receive(&written(&mut out));
                // A second response ends the connection.
                if !self.ready && self.queue.closed().is_none() {
                    self.ready = true;
                    self.encoder.digests = response.dgst.digests();
                    self.framer.set_limits(FramerLimits {
                        digests: response.dgst.digests(),
                        capsule_bytes_max: 8192,
                        data_bytes_max: TRANSFER_BYTES,
                        pda_z: response.cpda,
                    });
                }
            }
            step::SUBMIT => self.submit(input),
            step::ANSWER => {
                let cid = self.cid(input);
                let status = if input.u8() & 1 == 0 {
                    Status::SUCCESS
                } else {
                    Status::INVALID_FIELD
                };
                let mut bytes = [0; 16];
                bytes.copy_from_slice(Cqe::new(cid, 0, status, 3).as_bytes());
                self.encoder.capsule_resp(&mut out, &bytes);
                self.receive(&written(&mut out));
            }
            step::DATA => {
                let at = DataAt {
                    cccid: self.cid(input),
                    datao: u32::from(input.u16()),
                };
                let bytes = u32::from(input.u16()) + 1;
                let flags = input.u8();
                let data: Vec<u8> = (at.datao..at.datao + bytes).map(pattern).collect();
                self.encoder
                    .c2h_data(&mut out, at, flags & 1 != 0, flags & 2 != 0, [data.into()]);
                let mut pdu = written(&mut out);
                if flags & 4 != 0
                    && let Some(last) = pdu.last_mut()
                {
                    // Damage, where there is a digest, and another byte where there is none.
                    *last ^= u8::from(self.encoder.digests.data);
                }
                self.receive(&pdu);
            }
            step::R2T => {
                let r2t = R2T {
                    cccid: self.cid(input).into(),
                    ttag: input.u16().into(),
                    r2to: (u32::from(input.u16())).into(),
                    r2tl: (u32::from(input.u16())).into(),
                    rsvd20: [0; 4],
                };
                self.encoder.r2t(&mut out, &r2t);
                self.receive(&written(&mut out));
            }
            step::WRITE => {
                let share = usize::from(input.u8());
                self.write(share);
            }
            step::TIME => {
                self.now += Duration::from_millis(u64::from(input.u16()));
                self.queue.handle_timeout(self.now);
            }
            step::TERM_REQ => {
                let reason = TermReason::new(FatalErrorStatus::PDU_SEQUENCE_ERROR);
                self.encoder.c2h_term_req(&mut out, reason, input.bytes(24));
                self.receive(&written(&mut out));
            }
            step::CLOSE => self.queue.handle_closed(CloseReason::PeerClosed),
            _ => unreachable!("a step is one of the above"),
        }
        self.take_completions();
    }

    /// Mostly one in flight, sometimes any.
    fn cid(&self, input: &mut Input<'_>) -> u16 {
        let choice = input.u8();
        match self.cids.len() {
            0 => input.u16(),
            _ if choice == 0xff => input.u16(),
            count => self.cids[count - 1 - usize::from(choice) % count].0,
        }
    }

    fn submit(&mut self, input: &mut Input<'_>) {
        let context = self.submitted;
        self.submitted += 1;
        let flags = input.u8();
        let bytes = u32::from(input.u16()) % TRANSFER_BYTES + 1;
        let (asked, payload) = match flags % 3 {
            0 => (Asked::Nothing, Payload::None),
            1 => {
                let data: Vec<u8> = (0..bytes).map(pattern).collect();
                let mut data = Bytes::from(data);
                let first = data.split_to(usize::from(flags) % (bytes as usize));
                (Asked::Out(bytes), Payload::Out(vec![first, data]))
            }
            _ => (Asked::In(bytes), Payload::In(bytes)),
        };
        self.commands.insert(context, asked);
        // The context travels in an unused dword, so that the transmitted entry tells it.
        let mut sqe = Sqe::new(1, 1);
        sqe.cdw10 = context.into();
        let mut command = Command::new(sqe, payload);
        command.expires = flags & 0x80 == 0;
        self.queue.submit(command, context, self.now);
    }

    fn receive(&mut self, bytes: &[u8]) {
        self.received += bytes.len();
        self.queue.receive_buffer().extend_from_slice(bytes);
        self.queue.handle_received(self.now);
    }

    /// The socket takes `share` of 255 of what is queued; what it took is read as a controller does.
    fn write(&mut self, share: usize) {
        let queue = self.queue.transmit();
        let mut bytes = Vec::with_capacity(queue.len());
        let mut slices = vec![std::io::IoSlice::new(&[]); queue.len().min(4096) + 1];
        let count = queue.fill(&mut slices);
        slices[..count]
            .iter()
            .for_each(|slice| bytes.extend_from_slice(slice));
        bytes.truncate((bytes.len() * share).div_ceil(255));
        self.queue.handle_written(bytes.len());
        if !self.known {
            return;
        }
        self.framer.buffer(bytes.len()).extend_from_slice(&bytes);
        loop {
            let pdu = self.framer.next_pdu().expect("what a host sends is well-formed");
            let Some(pdu) = pdu else { break };
            match pdu {
                FromHost::IcReq(_) | FromHost::TermReq(_) => {}
                FromHost::CapsuleCmd(capsule) => {
                    let sqe = Sqe::read_from_bytes(&*capsule.sqe).expect("64 bytes");
                    let context = sqe.cdw10.get();
                    let data = capsule.data.expect("digests are right");
                    if let Some(Asked::Out(bytes)) = self.commands.get(&context)
                        && !data.is_empty()
                    {
                        assert_eq!(data.len(), *bytes as usize, "all of it in the capsule, or none");
                        check_pattern(0, &data);
                    }
                    self.cids.push((sqe.cid.get(), context));
                }
                FromHost::H2CData(data) => {
                    let cid = data.header.cccid.get();
                    let bytes = data.data.expect("digests are right");
                    let (_, context) = *self
                        .cids
                        .iter()
                        .rev()
                        .find(|(known, _)| *known == cid)
                        .expect("data of a command that was sent");
                    check_pattern(data.header.datao.get(), &bytes);
                    let Some(Asked::Out(all)) = self.commands.get(&context).copied() else {
                        // It completed while its data was queued.
                        continue;
                    };
                    let end = data.header.datao.get() + bytes.len() as u32;
                    assert!(end <= all, "data past the command's end");
                    let sent = self.sent.entry(context).or_default();
                    *sent += bytes.len();
                    assert!(*sent <= all as usize, "more sent than the command has");
                }
            }
        }
    }

    fn take_completions(&mut self) {
        while let Some((context, outcome)) = self.queue.poll_completion() {
            let asked = self
                .commands
                .remove(&context)
                .expect("completes once, and was submitted");
            match outcome {
                Ok(completion) => {
                    let bytes = match asked {
                        Asked::In(bytes) => bytes as usize,
                        Asked::Nothing | Asked::Out(_) => 0,
                    };
                    assert!(completion.data.len() <= bytes, "more data than was asked for");
                    if completion.status.is_success() && self.known && self.encoder.digests.data {
                        check_pattern(0, &completion.data);
                    }
                }
                Err(CommandError::NotSent | CommandError::Lost) => {
                    assert!(self.queue.closed().is_some(), "lost on a connection that lives");
                }
            }
        }
        assert_eq!(self.queue.outstanding(), self.commands.len());
    }

    /// Everything comes out when the connection ends. Answers what was received.
    fn end(mut self) -> usize {
        self.write(255);
        self.queue.handle_closed(CloseReason::PeerClosed);
        self.take_completions();
        assert!(self.commands.is_empty(), "a closed connection leaves no command");
        assert_eq!(self.queue.poll_timeout(), None);
        self.received
    }
}

/// The byte at an offset of any transfer.
fn pattern(offset: u32) -> u8 {
    (offset ^ offset >> 8) as u8
}

fn check_pattern(start: u32, data: &[u8]) {
    for (offset, byte) in (start..).zip(data) {
        assert_eq!(*byte, pattern(offset), "a byte of another place, at {offset}");
    }
}

/// Connections that live: a write in a capsule and by R2T, a read in one PDU and in several, an error, a time-out.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for digests in 0..4 {
        let start = [
            &[0x30 | digests, step::WRITE, 255, step::IC_RESP, digests][..],
            &8192_u32.to_le_bytes(),
            &[0],
        ]
        .concat();
        let submit = |kind, bytes: u16| {
            [
                &[step::SUBMIT, kind][..],
                &(bytes - 1).to_le_bytes(),
                &[step::WRITE, 255],
            ]
            .concat()
        };
        let answer = |back| vec![step::ANSWER, back, 0];
        let r2t = |offset: u16, bytes: u16| {
            [
                &[step::R2T, 0, 7, 0][..],
                &offset.to_le_bytes(),
                &bytes.to_le_bytes(),
                &[step::WRITE, 100, step::WRITE, 255],
            ]
            .concat()
        };
        let data = |offset: u16, bytes: u16, flags| {
            [
                &[step::DATA, 0][..],
                &offset.to_le_bytes(),
                &(bytes - 1).to_le_bytes(),
                &[flags],
            ]
            .concat()
        };
        seeds.push([start.clone(), submit(0, 1), answer(0)].concat());
        seeds.push([start.clone(), submit(1, 4096), answer(0)].concat());
        seeds.push(
            [
                start.clone(),
                submit(1, 20000),
                r2t(0, 12000),
                r2t(12000, 8000),
                answer(0),
            ]
            .concat(),
        );
        seeds.push([start.clone(), submit(2, 4096), data(0, 4096, 3)].concat());
        seeds.push(
            [
                start.clone(),
                submit(2, 9000),
                data(0, 5000, 0),
                data(5000, 4000, 5),
                answer(0),
            ]
            .concat(),
        );
        seeds.push(
            [
                start.clone(),
                submit(0, 1),
                submit(2, 100),
                submit(0, 1),
                answer(1),
                answer(2),
            ]
            .concat(),
        );
        seeds.push([start.clone(), submit(0, 1), vec![step::TIME, 0xff, 0xff]].concat());
        seeds.push(
            [
                start,
                submit(1, 20000),
                vec![step::BYTES, 8, 5, 0, 24, 0, 24, 0, 0, 0],
                vec![step::CLOSE],
            ]
            .concat(),
        );
    }
    seeds
}
