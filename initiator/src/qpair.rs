//! A host's queue pair over NVMe/TCP, without a socket.
//!
//! Three kinds of method, named for what they do:
//! - `submit` and `handle_*` take an input: a command, received bytes, the time, the end of the connection;
//! - [`HostQueue::transmit`] and `poll_*` give an output that the caller must act on;
//! - anything else looks and changes nothing.
//!
//! After any input, take completions until there are none and write what is to be transmitted. The caller owns the
//! socket, the clock and the tasks. So does a test.
//!
//! What it promises: every submitted command comes out of [`HostQueue::poll_completion`] exactly once, with its
//! context. A controller that breaks the protocol ends the connection with an H2CTermReq and never makes us copy,
//! keep or send more than the commands in flight account for.
//!
//! What it does not do: reconnect, retry, or know what a command means.
//!
//! NVMe/TCP Transport Specification 1.0, "Command, Response and Data Transfer".

mod command;
mod received;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use weft_proto::fabrics::command::FabricsCommand;
use weft_proto::nvme::cqe::Cqe;
use weft_proto::nvme::sgl::SglDescriptor;
use weft_proto::nvme::status::Status;
use weft_proto::tcp::header::PDA_MAX;
use weft_proto::tcp::{
    C2HData, DataAt, Digests, Encoder, FatalErrorStatus, Framer, FramerLimits, FromController, IcReq, IcResp,
    R2T, TermReason, TransmitQueue,
};
use zerocopy::{FromBytes, IntoBytes};

use self::received::Received;

pub use self::command::{CloseReason, Command, CommandError, Completion, Payload, TRANSFER_BYTES_MAX};
pub(crate) use self::command::{scattered_len, slice_scattered};

/// In-capsule data that every controller takes for fabrics and Admin commands (NVMe/TCP, "Capsules and Data
/// Transfers").
pub const ADMIN_CAPSULE_BYTES: u32 = 8192;

/// R2T that a controller may keep outstanding per command. A guess: enough to hide a round trip per
/// MAXH2CDATA; each is answered at once and its bytes are only ever asked for once, so it bounds no memory.
const R2T_MAX: u32 = 16;

/// Bytes that a read of the socket can take at least. Measured elsewhere to be where larger reads gain nothing.
const RECEIVE_BYTES: usize = 64 * 1024;

/// Largest queue depth: twelve bits of a CID tell the slot, four its generation.
pub const QUEUE_DEPTH_MAX: u16 = 1 << CID_SLOT_BITS;
const CID_SLOT_BITS: u32 = 12;

/// How a queue pair is set up. Of the connection, not of the controller.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// Commands outstanding at most, 1 …= [`QUEUE_DEPTH_MAX`].
    pub depth: u16,
    /// Digests to ask for. A controller that declines one is refused.
    pub digests: Digests,
    /// From the start of a command to the end of the connection, for commands that expire.
    pub command_timeout: Duration,
    /// Most in-capsule data of a command that is not a fabrics one.
    pub capsule_bytes_max: u32,
}

/// What may legally arrive next.
#[derive(Debug)]
enum State {
    /// Only an ICResp; commands wait.
    ExpectIcResp,
    /// Answers and data of commands in flight.
    Ready { maxh2cdata: u32 },
    /// Nothing is taken or started any more.
    Closed(CloseReason),
}

/// What a command in flight still has to move.
#[derive(Debug)]
enum Transfer {
    None,
    /// Sent as R2T ask for it; `requested` bytes have been.
    Out {
        data: Vec<Bytes>,
        bytes: u32,
        requested: u32,
    },
    In {
        bytes: u32,
        received: Received,
    },
}

#[derive(Debug)]
struct InFlight<T> {
    context: T,
    started: Instant,
    /// Silence about it ends the connection.
    expires: bool,
    /// Where the capsule starts in the byte stream, to know whether any of it was written.
    stream_position: u64,
    transfer: Transfer,
    /// Data arrived with a wrong digest: the command fails whatever the controller says.
    damaged: bool,
}

#[derive(Debug)]
struct Slot<T> {
    /// Four bits, so that a late answer is not taken for the slot's next command.
    generation: u16,
    in_flight: Option<InFlight<T>>,
}

/// A queue pair. `T` is what the caller wants back with each completion.
#[derive(Debug)]
pub struct HostQueue<T> {
    state: State,
    options: QueueOptions,
    framer: Framer<FromController>,
    encoder: Encoder,
    transmit: TransmitQueue,
    /// Bytes of the stream that were handed to the socket.
    written: u64,
    slots: Vec<Slot<T>>,
    free: Vec<u16>,
    /// Commands that wait for ICResp or for a slot, in order.
    waiting: VecDeque<(Command, T)>,
    completions: VecDeque<(T, Result<Completion, CommandError>)>,
    /// When the youngest of the commands was started that have been answered.
    answered: Option<Instant>,
}

impl<T> HostQueue<T> {
    /// A queue pair on a fresh connection; its ICReq is ready to be transmitted.
    #[must_use]
    pub fn new(options: QueueOptions) -> Self {
        let depth = options.depth.clamp(1, QUEUE_DEPTH_MAX);
        let mut transmit = TransmitQueue::new();
        let encoder = Encoder::default();
        encoder.ic_req(&mut transmit, &IcReq::new(options.digests, R2T_MAX));
        Self {
            state: State::ExpectIcResp,
            options,
            framer: Framer::new(),
            encoder,
            transmit,
            written: 0,
            slots: (0..depth)
                .map(|_| Slot {
                    generation: 0,
                    in_flight: None,
                })
                .collect(),
            free: (0..depth).rev().collect(),
            waiting: VecDeque::new(),
            completions: VecDeque::new(),
            answered: None,
        }
    }

    /// Commands that have no answer yet, waiting ones included.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len() + self.waiting.len()
    }

    /// Why the connection ended, if it has.
    #[must_use]
    pub fn closed(&self) -> Option<CloseReason> {
        match self.state {
            State::Closed(reason) => Some(reason),
            State::ExpectIcResp | State::Ready { .. } => None,
        }
    }

    /// Takes a command. It starts when a slot is free; on a closed connection it completes as not sent.
    pub fn submit(&mut self, command: Command, context: T, now: Instant) {
        if self.closed().is_some() {
            self.completions.push_back((context, Err(CommandError::NotSent)));
            return;
        }
        self.waiting.push_back((command, context));
        self.start_waiting(now);
    }

    /// Where received bytes are appended; then [`HostQueue::handle_received`].
    pub fn receive_buffer(&mut self) -> &mut BytesMut {
        self.framer.buffer(RECEIVE_BYTES)
    }

    /// Takes every PDU that has been received.
    pub fn handle_received(&mut self, now: Instant) {
        while self.closed().is_none() {
            let handled = match self.framer.next_pdu() {
                Ok(Some(pdu)) => self.handle_pdu(pdu),
                Ok(None) => break,
                Err(error) => Err(error.term_reason()),
            };
            if let Err(reason) = handled {
                self.terminate(reason);
            }
        }
        self.start_waiting(now);
    }

    /// What is to be written to the socket; then [`HostQueue::handle_written`].
    #[must_use]
    pub fn transmit(&self) -> &TransmitQueue {
        &self.transmit
    }

    /// The socket took `bytes` of it.
    pub fn handle_written(&mut self, bytes: usize) {
        self.transmit.advance(bytes);
        self.written += bytes as u64;
    }

    /// Ends the connection if a command has expired.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.poll_timeout().is_some_and(|deadline| deadline <= now) {
            self.handle_closed(CloseReason::CommandTimeout);
        }
    }

    /// The earliest time at which [`HostQueue::handle_timeout`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.slots
            .iter()
            .filter_map(|slot| slot.in_flight.as_ref())
            .filter(|command| command.expires)
            .map(|command| command.started + self.options.command_timeout)
            .min()
    }

    /// When the youngest of the commands was started that have been answered: what was sent then has arrived.
    #[must_use]
    pub fn answered(&self) -> Option<Instant> {
        self.answered
    }

    /// The connection has ended. Commands without an answer complete as lost, or as not sent where no byte of them
    /// was handed to the socket. Only the first reason counts.
    pub fn handle_closed(&mut self, reason: CloseReason) {
        if self.closed().is_some() {
            return;
        }
        self.state = State::Closed(reason);
        for slot in &mut self.slots {
            if let Some(command) = slot.in_flight.take() {
                let error = if command.stream_position >= self.written {
                    CommandError::NotSent
                } else {
                    CommandError::Lost
                };
                self.completions.push_back((command.context, Err(error)));
            }
        }
        self.free.clear();
        self.slots.clear();
        for (_, context) in self.waiting.drain(..) {
            self.completions.push_back((context, Err(CommandError::NotSent)));
        }
    }

    /// The next finished command.
    pub fn poll_completion(&mut self) -> Option<(T, Result<Completion, CommandError>)> {
        self.completions.pop_front()
    }

    /// Ends the connection and tells the controller why.
    fn terminate(&mut self, reason: TermReason) {
        self.encoder
            .h2c_term_req(&mut self.transmit, reason, self.framer.offending());
        self.handle_closed(CloseReason::Protocol(reason));
    }

    fn start_waiting(&mut self, now: Instant) {
        if !matches!(self.state, State::Ready { .. }) {
            return;
        }
        while let Some(&index) = self.free.last() {
            let Some((command, context)) = self.waiting.pop_front() else {
                return;
            };
            self.free.pop();
            self.start(index, command, context, now);
        }
    }

    fn start(&mut self, index: u16, command: Command, context: T, now: Instant) {
        let slot = &mut self.slots[usize::from(index)];
        slot.generation = (slot.generation + 1) & 0xf;
        let cid = index | slot.generation << CID_SLOT_BITS;
        let mut sqe = command.sqe;
        sqe.cid = cid.into();
        let stream_position = self.written + self.transmit.len() as u64;
        let capsule_bytes_max = if FabricsCommand::is_fabrics(&sqe) {
            ADMIN_CAPSULE_BYTES
        } else {
            self.options.capsule_bytes_max
        };
        let mut in_capsule = Vec::new();
        let transfer = match command.payload {
            Payload::None => {
                sqe.sgl1 = SglDescriptor::transport(0);
                Transfer::None
            }
            Payload::Out(data) => {
                let bytes = scattered_len(&data);
                if bytes <= capsule_bytes_max {
                    sqe.sgl1 = SglDescriptor::in_capsule(bytes);
                    in_capsule = data;
                    Transfer::None
                } else {
                    sqe.sgl1 = SglDescriptor::transport(bytes);
                    Transfer::Out {
                        data,
                        bytes,
                        requested: 0,
                    }
                }
            }
            Payload::In(bytes) => {
                sqe.sgl1 = SglDescriptor::transport(bytes);
                Transfer::In {
                    bytes,
                    received: Received::Lent(Bytes::new()),
                }
            }
        };
        let mut entry = [0; 64];
        entry.copy_from_slice(sqe.as_bytes());
        self.encoder.capsule_cmd(&mut self.transmit, &entry, in_capsule);
        slot.in_flight = Some(InFlight {
            context,
            started: now,
            expires: command.expires,
            stream_position,
            transfer,
            damaged: false,
        });
    }

    fn handle_pdu(&mut self, pdu: FromController) -> Result<(), TermReason> {
        let sequence_error = Err(TermReason::new(FatalErrorStatus::PDU_SEQUENCE_ERROR));
        match (&self.state, pdu) {
            (_, FromController::TermReq(request)) => {
                self.handle_closed(CloseReason::PeerTerminated(request.reason));
                Ok(())
            }
            (State::ExpectIcResp, FromController::IcResp(response)) => self.handle_ic_resp(&response),
            (State::Ready { .. }, FromController::CapsuleResp(cqe)) => self.handle_response(&cqe),
            (State::Ready { .. }, FromController::C2HData(data)) => self.handle_data(data),
            (&State::Ready { maxh2cdata }, FromController::R2T(r2t)) => self.handle_r2t(&r2t, maxh2cdata),
            (State::Ready { .. }, FromController::IcResp(_)) => sequence_error,
            (State::ExpectIcResp, _) => sequence_error,
            // Nothing is taken from the framer after the end.
            (State::Closed(_), _) => Ok(()),
        }
    }

    fn handle_ic_resp(&mut self, response: &IcResp) -> Result<(), TermReason> {
        const PFV_OFFSET: u32 = 8;
        const CPDA_OFFSET: u32 = 10;
        const DGST_OFFSET: u32 = 11;
        const MAXH2CDATA_OFFSET: u32 = 12;
        let asked = self.options.digests;
        let agreed = response.dgst.digests();
        if response.pfv.get() != 0 {
            return Err(TermReason {
                fes: FatalErrorStatus::UNSUPPORTED_PARAMETER,
                fei: PFV_OFFSET,
            });
        }
        if response.cpda > PDA_MAX {
            return Err(TermReason::invalid_field(CPDA_OFFSET));
        }
        if (agreed.header && !asked.header) || (agreed.data && !asked.data) {
            return Err(TermReason::invalid_field(DGST_OFFSET));
        }
        if agreed != asked {
            self.handle_closed(CloseReason::DigestDeclined);
            return Ok(());
        }
        // Data PDUs carry whole dwords. Less than the specification's least value is taken, as long as it moves
        // anything.
        let maxh2cdata = response.maxh2cdata.get() & !3;
        if maxh2cdata == 0 {
            return Err(TermReason::invalid_field(MAXH2CDATA_OFFSET));
        }
        self.encoder = Encoder {
            digests: agreed,
            pda_z: response.cpda,
        };
        self.framer.set_limits(FramerLimits {
            digests: agreed,
            capsule_bytes_max: 0,
            data_bytes_max: TRANSFER_BYTES_MAX,
            pda_z: 0,
        });
        self.state = State::Ready { maxh2cdata };
        Ok(())
    }

    /// The command that `cid` names. An unknown one breaks the protocol: its data could be anybody's.
    fn in_flight(&mut self, cid: u16) -> Result<&mut InFlight<T>, TermReason> {
        const CCCID_OFFSET: u32 = 8;
        let unknown = TermReason::invalid_field(CCCID_OFFSET);
        let slot = self
            .slots
            .get_mut(usize::from(cid & (QUEUE_DEPTH_MAX - 1)))
            .ok_or(unknown)?;
        if slot.generation != cid >> CID_SLOT_BITS {
            return Err(unknown);
        }
        slot.in_flight.as_mut().ok_or(unknown)
    }

    fn handle_response(&mut self, cqe: &[u8; 16]) -> Result<(), TermReason> {
        let Ok(cqe) = Cqe::read_from_bytes(cqe) else {
            return Ok(());
        };
        let cid = cqe.cid.get();
        self.in_flight(cid)?;
        self.complete(cid, cqe.status(), cqe.result.get());
        Ok(())
    }

    fn handle_data(&mut self, pdu: C2HData) -> Result<(), TermReason> {
        let cid = pdu.header.cccid.get();
        let command = self.in_flight(cid)?;
        let Transfer::In { bytes, received } = &mut command.transfer else {
            return Err(TermReason::new(FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE));
        };
        let datal = pdu.header.datal.get();
        // Data of a command comes in order (NVMe/TCP, "C2HData").
        let in_order = pdu.header.datao.get() as usize == received.len();
        if !in_order || u64::from(pdu.header.datao.get()) + u64::from(datal) > u64::from(*bytes) {
            return Err(TermReason::new(FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE));
        }
        match pdu.data {
            Ok(data) => received.push(data, *bytes),
            Err(_) => {
                command.damaged = true;
                received.push(Bytes::from(vec![0; datal as usize]), *bytes);
            }
        }
        if pdu.last && pdu.success {
            self.complete(cid, Status::SUCCESS, 0);
        }
        Ok(())
    }

    fn handle_r2t(&mut self, r2t: &R2T, maxh2cdata: u32) -> Result<(), TermReason> {
        let out_of_range = TermReason::new(FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE);
        let cid = r2t.cccid.get();
        let encoder = self.encoder;
        let command = self.in_flight(cid)?;
        let Transfer::Out {
            data,
            bytes,
            requested,
        } = &mut command.transfer
        else {
            return Err(out_of_range);
        };
        let (offset, len) = (r2t.r2to.get(), r2t.r2tl.get());
        if len == 0 || u64::from(offset) + u64::from(len) > u64::from(*bytes) {
            return Err(out_of_range);
        }
        // No byte is asked for twice, so that what a controller can make us send is bounded.
        *requested = requested
            .checked_add(len)
            .filter(|requested| *requested <= *bytes)
            .ok_or(out_of_range)?;
        let mut pdus = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let piece = maxh2cdata.min(offset + len - at);
            pdus.push((at, piece, slice_scattered(data, at as usize, piece as usize)));
            at += piece;
        }
        let end = offset + len;
        for (datao, piece, data) in pdus {
            let at = DataAt { cccid: cid, datao };
            encoder.h2c_data(&mut self.transmit, at, r2t.ttag.get(), datao + piece == end, data);
        }
        Ok(())
    }

    fn complete(&mut self, cid: u16, status: Status, result: u64) {
        let index = cid & (QUEUE_DEPTH_MAX - 1);
        let Some(command) = self.slots[usize::from(index)].in_flight.take() else {
            return;
        };
        self.free.push(index);
        self.answered = self.answered.max(Some(command.started));
        let status = if command.damaged && status.is_success() {
            Status::TRANSIENT_TRANSPORT_ERROR
        } else {
            status
        };
        let data = match command.transfer {
            Transfer::In { received, .. } => received.into_bytes(),
            Transfer::None | Transfer::Out { .. } => Bytes::new(),
        };
        let completion = Completion { status, result, data };
        self.completions.push_back((command.context, Ok(completion)));
    }
}

#[cfg(test)]
mod tests;
