//! A command with its data, and how it ends: what every transport hands to the controller model and takes from it.
//!
//! Where the data came from (capsules, R2Ts, a guest's memory) is the transport's affair and is over when a
//! [`Request`] is made.

use std::time::Instant;

use bytes::Bytes;
use smallvec::SmallVec;
use weft_proto::fabrics::command::FabricsCommand;
use weft_proto::nvme::sqe::Sqe;
use weft_proto::nvme::status::Status;

/// Most data of one command (MDTS). The largest transfer a Linux host asks for, and enough for a shard.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 20;

/// Data for a host, scattered: mostly one piece, which takes no memory of its own.
pub type Pieces = SmallVec<[Bytes; 1]>;

/// A command with all its data, to be executed.
#[derive(Debug)]
pub struct Request<T> {
    /// Its entry.
    pub sqe: Sqe,
    /// What the host sent along.
    pub data: Vec<Bytes>,
    /// Bytes that the host will take in answer.
    pub answer_bytes_max: u32,
    /// What the caller attached when the command arrived.
    pub admitted: T,
    /// When the last of it arrived.
    pub arrived: Instant,
    /// The first command of a fused pair, whose second this is.
    pub fused_first: Option<Box<Request<T>>>,
}

impl<T> Request<T> {
    /// A command that is no part of a fused pair.
    ///
    /// Inlined where it is made: what is moved right after it was stored in parts stalls the processor.
    #[inline(always)]
    pub(crate) fn new(
        sqe: &Sqe,
        data: Vec<Bytes>,
        answer_bytes_max: u32,
        admitted: T,
        arrived: Instant,
    ) -> Self {
        Self {
            sqe: *sqe,
            data,
            answer_bytes_max,
            admitted,
            arrived,
            fused_first: None,
        }
    }

    /// Command Identifier.
    #[must_use]
    pub fn cid(&self) -> u16 {
        self.sqe.cid.get()
    }

    /// A completion of this command.
    #[must_use]
    pub fn complete(&self, status: Status) -> Completion {
        Completion::new(self.cid(), status)
    }
}

/// The end of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Command Identifier.
    pub cid: u16,
    /// Status.
    pub status: Status,
    /// Dwords 0 and 1.
    pub result: u64,
    /// For the host; only with success.
    pub data: Pieces,
}

impl Completion {
    /// Of the command with this identifier, without a result or data.
    #[must_use]
    pub fn new(cid: u16, status: Status) -> Self {
        Self {
            cid,
            status,
            result: 0,
            data: Pieces::new(),
        }
    }

    /// With a result.
    #[must_use]
    pub fn with_result(mut self, result: u64) -> Self {
        self.result = result;
        self
    }

    /// With data for the host.
    #[must_use]
    #[inline]
    pub fn with_data(mut self, data: impl Into<Pieces>) -> Self {
        self.data = data.into();
        self
    }
}

/// Which way a command moves data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    None,
    FromHost,
    ToHost,
}

/// By the two low bits of the opcode, or of FCTYPE for fabrics commands ("Opcodes", data transfer).
pub(crate) fn direction(sqe: &Sqe) -> Transfer {
    let code = if FabricsCommand::is_fabrics(sqe) {
        sqe.nsid.get() as u8
    } else {
        sqe.opcode
    };
    match code & 0b11 {
        0b01 => Transfer::FromHost,
        0b10 => Transfer::ToHost,
        _ => Transfer::None,
    }
}
