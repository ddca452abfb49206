//! One NVMe/TCP queue pair, without a socket.
//!
//! Three kinds of method, named for what they do:
//! - `handle_*` takes an input: a PDU, a completion, or the time;
//! - `poll_*` gives an output that the caller must act on;
//! - anything else looks and changes nothing.
//!
//! The caller owns the socket, the clock and the devices. It reads bytes into a framer, gives the PDUs here, executes
//! the requests that come of them, gives the completions here, and writes [`QueuePair::transmits`]. It applies
//! [`QueuePair::framer_limits`] after every PDU.
//!
//! Legal bytes at the wrong time are as fatal as malformed ones: the connection ends with a TermReq, that connection
//! only. Whatever a peer sizes is bounded: commands in flight by the queue's entries, data by [`TRANSFER_BYTES_MAX`] for a
//! command and [`R2T_BYTES_MAX`] for all of them.
//!
//! NVMe/TCP Transport Specification 1.0, "TCP Transport Protocol"; NVM Express Base, "Command Submission and
//! Completion" for fabrics.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use weft_proto::fabrics::command::{Connect, ConnectData, FabricsCommand, fctype};
use weft_proto::nvme::cqe::Cqe;
use weft_proto::nvme::sgl::DataPointer;
use weft_proto::nvme::sqe::{Fuse, Sqe};
use weft_proto::nvme::status::Status;
use weft_proto::tcp::header::PDA_MAX;
use weft_proto::tcp::{
    CapsuleCmd, DataAt, Digests, Encoder, FatalErrorStatus, FramerLimits, FromHost, H2CData, IcReq, IcResp,
    PduError, R2T, TermReason, TransmitQueue,
};
use zerocopy::transmute_ref;

pub use crate::request::{Completion, Pieces, Request, TRANSFER_BYTES_MAX};
use crate::request::{Transfer, direction};

/// Most data in a command capsule of an I/O queue: a shard of 32 blocks with its header, and what most hosts write at once,
/// go without the round trip of an R2T. Longer writes are asked for, so that they do not hold up what is behind them.
pub const CAPSULE_BYTES_MAX: u32 = 136 << 10;

/// The same before a queue is connected, and on the admin queue: what hosts may always send there.
pub const ADMIN_CAPSULE_BYTES_MAX: u32 = 8192;

/// Most data of one H2CData (MAXH2CDATA). A guess: long enough that headers cost nothing, short enough that a
/// connection's receive buffer stays small.
pub const H2C_DATA_BYTES_MAX: u32 = 128 << 10;

/// Most data that R2Ts ask for at any time on one connection; further writes wait for their R2T.
pub const R2T_BYTES_MAX: u32 = 8 << 20;

/// From accept to a successful Connect. A guess: generous to a slow host, and short enough that silent sockets do not
/// pile up.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What may legally arrive next.
#[derive(Debug)]
enum State {
    /// Only an ICReq. Nothing is negotiated yet.
    ExpectIcReq,
    /// Only a Fabrics Connect.
    ExpectConnect,
    /// Nothing, until the Connect is answered.
    Connecting,
    /// Commands, and data that was asked for.
    Ready,
    /// A TermReq is queued or sent, or the peer has ended it; what still arrives is ignored.
    Closing,
}

/// One queue pair. `T` is what the caller attaches to a command when it arrives.
#[derive(Debug)]
pub struct QueuePair<T> {
    state: State,
    encoder: Encoder,
    limits: FramerLimits,
    transmits: TransmitQueue,
    /// Commands in flight, by CID.
    inflight: CidSet,
    /// Commands whose data is on its way, by CID, which is their transfer tag too.
    receiving: BTreeMap<u16, Receiving<T>>,
    /// Commands that wait until R2Ts may ask for more.
    waiting: VecDeque<u16>,
    r2t_bytes: u32,
    fused: Fused<T>,
    /// Of the submission queue; 0 until connected.
    entries: u16,
    sqhd: u16,
    flow_control: bool,
    /// Until connected.
    deadline: Option<Instant>,
}

/// A command that waits for data.
#[derive(Debug)]
struct Receiving<T> {
    request: Request<T>,
    length: u32,
    received: u32,
    asked: bool,
    damaged: bool,
}

/// Fused pairs under way. The two halves arrive back to back; their data may not.
#[derive(Debug)]
struct Fused<T> {
    /// A first half arrived last: the next command has to be its second.
    open: Option<u16>,
    /// Second half by first half.
    pairs: BTreeMap<u16, u16>,
    /// Halves that have all their data.
    ready: BTreeMap<u16, Request<T>>,
}

impl<T> QueuePair<T> {
    /// For a connection just accepted.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            state: State::ExpectIcReq,
            encoder: Encoder::default(),
            limits: FramerLimits::default(),
            transmits: TransmitQueue::new(),
            inflight: CidSet::default(),
            receiving: BTreeMap::new(),
            waiting: VecDeque::new(),
            r2t_bytes: 0,
            fused: Fused {
                open: None,
                pairs: BTreeMap::new(),
                ready: BTreeMap::new(),
            },
            entries: 0,
            sqhd: 0,
            flow_control: true,
            deadline: Some(now + CONNECT_TIMEOUT),
        }
    }

    /// Takes a PDU; answers the request that it completes, which is to be executed. `admit` is called once for a command, in the
    /// instant it arrives.
    #[must_use]
    pub fn handle_pdu(
        &mut self,
        pdu: FromHost,
        now: Instant,
        admit: impl FnOnce(&Sqe) -> T,
    ) -> Option<Request<T>> {
        match (&self.state, pdu) {
            (State::Ready, FromHost::CapsuleCmd(capsule)) => return self.handle_command(capsule, now, admit),
            (State::Ready, FromHost::H2CData(data)) => return self.handle_data(data, now),
            (State::ExpectConnect, FromHost::CapsuleCmd(capsule)) => {
                return self.handle_connect(capsule, now, admit);
            }
            (State::Closing, _) => {}
            (_, FromHost::TermReq(term)) => {
                tracing::debug!(reason = %term.reason, "the host ended the connection");
                self.state = State::Closing;
            }
            (State::ExpectIcReq, FromHost::IcReq(request)) => self.initialize(&request),
            // A well-formed PDU in the wrong state is as fatal as a malformed one.
            (
                State::ExpectIcReq | State::ExpectConnect | State::Connecting | State::Ready,
                FromHost::IcReq(_) | FromHost::CapsuleCmd(_) | FromHost::H2CData(_),
            ) => self.out_of_sequence(),
        }
        None
    }

    /// Takes the framer's verdict on bytes that no state could accept.
    pub fn handle_pdu_error(&mut self, error: PduError, offending: &[u8]) {
        if !self.is_closing() {
            tracing::warn!(%error, "malformed PDU");
            self.terminate(error.term_reason(), offending);
        }
    }

    /// Takes the time.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.deadline = None;
            self.state = State::Closing;
        }
    }

    /// Takes the success of a Connect: commands may follow. Give its completion afterwards.
    pub fn handle_connected(&mut self, connect: Connect) {
        if matches!(self.state, State::Connecting) {
            self.state = State::Ready;
            self.entries = connect.sqsize_z.saturating_add(1);
            if connect.qid > 0 {
                self.limits.capsule_bytes_max = CAPSULE_BYTES_MAX;
            }
            self.flow_control = !connect.disables_sq_flow_control();
            // The Connect itself was the queue's first entry.
            self.sqhd = 1 % self.entries;
            self.deadline = None;
        }
    }

    /// Takes the end of a command that was answered by [`Self::handle_pdu`].
    pub fn handle_completion(&mut self, completion: Completion) {
        let Completion {
            cid,
            status,
            result,
            data,
        } = completion;
        if !self.inflight.remove(cid) || self.is_closing() {
            return;
        }
        if matches!(self.state, State::Connecting) {
            // The Connect failed. The host may correct itself on this connection.
            self.state = State::ExpectConnect;
        }
        let mut answered = false;
        if status.is_success() && !data.is_empty() {
            // Without SQ flow control a response with nothing to say can be left out.
            answered = !self.flow_control && result == 0;
            let at = DataAt { cccid: cid, datao: 0 };
            let transmits = &mut self.transmits;
            // One piece is what nearly all have, and is handed on without a loop around it.
            match data.into_inner() {
                Ok(one) => self.encoder.c2h_data(transmits, at, true, answered, one),
                Err(pieces) => self.encoder.c2h_data(transmits, at, true, answered, pieces),
            }
        }
        if !answered {
            let sqhd = if self.flow_control { self.sqhd } else { 0xffff };
            let cqe = Cqe::new(cid, sqhd, status, result);
            self.encoder
                .capsule_resp(&mut self.transmits, transmute_ref!(&cqe));
        }
    }

    /// Ends the connection from this side, without an accusation: the controller is gone.
    pub fn handle_close(&mut self) {
        self.state = State::Closing;
    }

    /// When [`Self::handle_timeout`] has to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    /// What is to be written.
    pub fn transmits(&mut self) -> &mut TransmitQueue {
        &mut self.transmits
    }

    /// What the framer may accept from now on.
    #[must_use]
    pub fn framer_limits(&self) -> FramerLimits {
        self.limits
    }

    /// Whether the connection is to be closed once [`Self::transmits`] has been written.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        matches!(self.state, State::Closing)
    }

    fn initialize(&mut self, request: &IcReq) {
        if request.pfv.get() != 0 {
            let reason = TermReason {
                fes: FatalErrorStatus::UNSUPPORTED_PARAMETER,
                fei: 8,
            };
            return self.terminate(reason, &[]);
        }
        if request.hpda > PDA_MAX {
            return self.terminate(TermReason::invalid_field(10), &[]);
        }
        let digests: Digests = request.dgst.digests();
        // The response itself carries no digest.
        self.encoder
            .ic_resp(&mut self.transmits, &IcResp::new(digests, H2C_DATA_BYTES_MAX));
        self.encoder = Encoder {
            digests,
            pda_z: request.hpda,
        };
        self.limits = FramerLimits {
            digests,
            capsule_bytes_max: ADMIN_CAPSULE_BYTES_MAX,
            data_bytes_max: H2C_DATA_BYTES_MAX,
            pda_z: 0,
        };
        self.state = State::ExpectConnect;
    }

    fn handle_connect(
        &mut self,
        capsule: CapsuleCmd,
        now: Instant,
        admit: impl FnOnce(&Sqe) -> T,
    ) -> Option<Request<T>> {
        let sqe: &Sqe = transmute_ref!(&capsule.sqe.0);
        if !FabricsCommand::is_fabrics(sqe) || sqe.nsid.get() as u8 != fctype::CONNECT {
            self.out_of_sequence();
            return None;
        }
        let cid = sqe.cid.get();
        self.inflight.insert(cid);
        self.state = State::Connecting;
        let Ok(data) = capsule.data else {
            return self.refuse(cid, Status::TRANSIENT_TRANSPORT_ERROR);
        };
        match sqe.data_pointer().and_then(|pointer| in_capsule(pointer, data)) {
            Ok(Some(data)) if data.len() == size_of::<ConnectData>() => {
                Some(Request::new(sqe, vec![data], 0, admit(sqe), now))
            }
            Ok(_) => self.refuse(cid, Status::INVALID_SGL_LENGTH.dnr()),
            Err(status) => self.refuse(cid, status),
        }
    }

    fn handle_command(
        &mut self,
        capsule: CapsuleCmd,
        now: Instant,
        admit: impl FnOnce(&Sqe) -> T,
    ) -> Option<Request<T>> {
        let sqe: &Sqe = transmute_ref!(&capsule.sqe.0);
        let cid = sqe.cid.get();
        if self.inflight.len() >= usize::from(self.entries) || !self.inflight.insert(cid) {
            // More commands than the queue has entries, or one identifier for two of them: completions could not be
            // told apart any more.
            self.out_of_sequence();
            return None;
        }
        self.sqhd = (self.sqhd + 1) % self.entries;
        let fuse = match sqe.fuse() {
            Ok(fuse) => fuse,
            Err(status) => return self.refuse(cid, status),
        };
        if !self.pair_up(cid, fuse) {
            return self.refuse(cid, Status::ABORTED_MISSING_FUSED.dnr());
        }
        let admitted = admit(sqe);
        let pointer = match sqe.data_pointer() {
            Ok(pointer) => pointer,
            Err(status) => return self.refuse(cid, status),
        };
        if pointer.length() > TRANSFER_BYTES_MAX {
            return self.refuse(cid, Status::INVALID_FIELD.dnr());
        }
        let mut asked_for = None;
        let (data, answer_bytes_max) = match direction(sqe) {
            Transfer::None => (Vec::new(), 0),
            Transfer::ToHost => (Vec::new(), pointer.length()),
            Transfer::FromHost => {
                let Ok(data) = capsule.data else {
                    return self.refuse(cid, Status::TRANSIENT_TRANSPORT_ERROR);
                };
                match (in_capsule(pointer, data), pointer) {
                    (Err(status), _) => return self.refuse(cid, status),
                    (Ok(Some(data)), _) => (vec![data], 0),
                    (Ok(None), DataPointer::Transport { length }) => {
                        asked_for = Some(length).filter(|&length| length > 0);
                        (Vec::new(), 0)
                    }
                    (Ok(None), _) => (Vec::new(), 0),
                }
            }
        };
        // Made in each of the places it goes to, for the reason that `Request::new` gives.
        match (asked_for, fuse) {
            (None, Fuse::Normal) => Some(Request::new(sqe, data, answer_bytes_max, admitted, now)),
            (None, Fuse::First | Fuse::Second) => {
                self.accept_half(Request::new(sqe, data, answer_bytes_max, admitted, now))
            }
            (Some(length), _) => {
                self.receive(Request::new(sqe, data, answer_bytes_max, admitted, now), length);
                None
            }
        }
    }

    /// Keeps a command until its data has come, which is asked for as soon as there is room.
    fn receive(&mut self, request: Request<T>, length: u32) {
        let cid = request.cid();
        let receiving = Receiving {
            request,
            length,
            received: 0,
            asked: false,
            damaged: false,
        };
        self.receiving.insert(cid, receiving);
        self.waiting.push_back(cid);
        self.ask_for_data();
    }

    fn handle_data(&mut self, pdu: H2CData, now: Instant) -> Option<Request<T>> {
        let (cid, ttag) = (pdu.header.cccid.get(), pdu.header.ttag.get());
        let Some(receiving) = self.receiving.get_mut(&cid).filter(|receiving| receiving.asked) else {
            return self.refuse_data(TermReason::invalid_field(8));
        };
        if ttag != cid {
            return self.refuse_data(TermReason::invalid_field(10));
        }
        let (offset, length) = (pdu.header.datao.get(), pdu.header.datal.get());
        if offset != receiving.received || length > receiving.length - receiving.received {
            return self.refuse_data(TermReason::new(FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE));
        }
        receiving.received += length;
        match pdu.data {
            Ok(data) => receiving.request.data.push(data),
            Err(_) => receiving.damaged = true,
        }
        if receiving.received < receiving.length {
            if pdu.last {
                // The end of the R2T's data before all of it has come.
                self.out_of_sequence();
            }
            return None;
        }
        let receiving = self.receiving.remove(&cid)?;
        self.r2t_bytes -= receiving.length;
        let request = if receiving.damaged {
            self.refuse(cid, Status::TRANSIENT_TRANSPORT_ERROR)
        } else {
            let mut request = receiving.request;
            request.arrived = now;
            match request.sqe.fuse() {
                Ok(Fuse::Normal) | Err(_) => Some(request),
                Ok(Fuse::First | Fuse::Second) => self.accept_half(request),
            }
        };
        self.ask_for_data();
        request
    }

    /// Sends the R2Ts that there is room for.
    fn ask_for_data(&mut self) {
        while let Some(&cid) = self.waiting.front() {
            let Some(receiving) = self.receiving.get_mut(&cid) else {
                self.waiting.pop_front();
                continue;
            };
            if self.r2t_bytes + receiving.length > R2T_BYTES_MAX {
                return;
            }
            self.r2t_bytes += receiving.length;
            receiving.asked = true;
            self.waiting.pop_front();
            let r2t = R2T {
                cccid: cid.into(),
                ttag: cid.into(),
                r2to: 0.into(),
                r2tl: receiving.length.into(),
                rsvd20: [0; 4],
            };
            self.encoder.r2t(&mut self.transmits, &r2t);
        }
    }

    /// Whether a command may stand where it does in the order of fused halves.
    fn pair_up(&mut self, cid: u16, fuse: Fuse) -> bool {
        let first = self.fused.open.take();
        match (first, fuse) {
            (Some(first), Fuse::Second) => {
                self.fused.pairs.insert(first, cid);
                true
            }
            (None, Fuse::Second) => false,
            (first, Fuse::Normal | Fuse::First) => {
                if let Some(first) = first {
                    self.fail(first, Status::ABORTED_MISSING_FUSED.dnr());
                }
                if fuse == Fuse::First {
                    self.fused.open = Some(cid);
                }
                true
            }
        }
    }

    /// Keeps one half of a fused pair until the other has its data too, and yields both then.
    fn accept_half(&mut self, request: Request<T>) -> Option<Request<T>> {
        let cid = request.cid();
        let mut pairs = self.fused.pairs.iter();
        let pair = pairs
            .find(|&(&first, &second)| cid == first || cid == second)
            .map(|(&first, &second)| (first, second));
        self.fused.ready.insert(cid, request);
        let (first, second) = pair?;
        if !self.fused.ready.contains_key(&first) {
            return None;
        }
        let mut request = self.fused.ready.remove(&second)?;
        self.fused.pairs.remove(&first);
        request.fused_first = self.fused.ready.remove(&first).map(Box::new);
        Some(request)
    }

    /// Completes a command with an error instead of yielding it.
    fn refuse(&mut self, cid: u16, status: Status) -> Option<Request<T>> {
        self.fail(cid, status);
        None
    }

    /// Ends the connection for data that nobody asked for.
    fn refuse_data(&mut self, reason: TermReason) -> Option<Request<T>> {
        self.terminate(reason, &[]);
        None
    }

    /// Completes a command that was not yielded, and its other half if it is one.
    fn fail(&mut self, cid: u16, status: Status) {
        self.forget(cid);
        self.complete(cid, status);
        if self.fused.open == Some(cid) {
            self.fused.open = None;
        }
        let other = match self.fused.pairs.remove(&cid) {
            Some(second) => Some(second),
            None => self
                .fused
                .pairs
                .iter()
                .find(|&(_, &second)| second == cid)
                .map(|(&first, _)| first),
        };
        if let Some(other) = other {
            self.fused.pairs.remove(&other);
            self.forget(other);
            self.complete(other, Status::ABORTED_FAILED_FUSED);
        }
    }

    /// Drops what is kept of a command. Data that was asked for goes on being expected by nobody, which ends the
    /// connection when it comes; only a fused pair whose half failed can meet that.
    fn forget(&mut self, cid: u16) {
        self.fused.ready.remove(&cid);
        if let Some(receiving) = self.receiving.remove(&cid)
            && receiving.asked
        {
            self.r2t_bytes -= receiving.length;
        }
    }

    fn complete(&mut self, cid: u16, status: Status) {
        self.handle_completion(Completion {
            cid,
            status,
            result: 0,
            data: Pieces::new(),
        });
    }

    fn out_of_sequence(&mut self) {
        self.terminate(TermReason::new(FatalErrorStatus::PDU_SEQUENCE_ERROR), &[]);
    }

    fn terminate(&mut self, reason: TermReason, offending: &[u8]) {
        tracing::warn!(%reason, "ending the connection");
        crate::metrics::connection_terminated();
        self.encoder.c2h_term_req(&mut self.transmits, reason, offending);
        self.state = State::Closing;
        self.receiving.clear();
    }
}

/// The command's data where it is in the capsule; `None` where the transport moves it or there is none.
fn in_capsule(pointer: DataPointer, mut data: Bytes) -> Result<Option<Bytes>, Status> {
    match pointer {
        DataPointer::Transport { .. } => Ok(None),
        DataPointer::InCapsule { offset, length } => {
            let start = usize::try_from(offset).map_err(|_| Status::INVALID_SGL_OFFSET.dnr())?;
            let end = start
                .checked_add(length as usize)
                .filter(|&end| end <= data.len());
            data.truncate(end.ok_or(Status::INVALID_SGL_OFFSET.dnr())?);
            data.advance(start);
            Ok((!data.is_empty()).then_some(data))
        }
    }
}

/// A set of command identifiers: one bit each.
#[derive(Debug)]
struct CidSet {
    bits: Box<[u64; 1024]>,
    len: usize,
}

impl Default for CidSet {
    fn default() -> Self {
        Self {
            bits: Box::new([0; 1024]),
            len: 0,
        }
    }
}

impl CidSet {
    fn len(&self) -> usize {
        self.len
    }

    fn at(cid: u16) -> (usize, u64) {
        (usize::from(cid / 64), 1 << (cid % 64))
    }

    fn insert(&mut self, cid: u16) -> bool {
        let (word, bit) = Self::at(cid);
        let new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        self.len += usize::from(new);
        new
    }

    fn remove(&mut self, cid: u16) -> bool {
        let (word, bit) = Self::at(cid);
        let known = self.bits[word] & bit != 0;
        self.bits[word] &= !bit;
        self.len -= usize::from(known);
        known
    }
}

#[cfg(test)]
mod tests;
