//! What goes into a queue pair, and what comes out of it.

use bytes::Bytes;
use weft_proto::nvme::sqe::Sqe;
use weft_proto::nvme::status::Status;
use weft_proto::tcp::TermReason;

/// Most data of one command, in bytes, whatever the controller would take: a bound on what a peer can make us
/// buffer. Longer transfers are split.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 20;

/// Data of a command.
#[derive(Debug)]
pub enum Payload {
    /// None.
    None,
    /// Host to controller: scattered, at most [`TRANSFER_BYTES_MAX`] in total.
    Out(Vec<Bytes>),
    /// Controller to host: at most this many bytes, at most [`TRANSFER_BYTES_MAX`].
    In(u32),
}

/// A command to submit. CID and data pointer are the queue pair's to set.
#[derive(Debug)]
pub struct Command {
    /// Submission queue entry.
    pub sqe: Sqe,
    /// Its data.
    pub payload: Payload,
    /// Whether the command timeout applies. Not to Asynchronous Event Requests.
    pub expires: bool,
}

impl Command {
    /// A command that expires.
    #[must_use]
    pub fn new(sqe: Sqe, payload: Payload) -> Self {
        Self {
            sqe,
            payload,
            expires: true,
        }
    }
}

/// An answered command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// How it ended.
    pub status: Status,
    /// Dwords 0 and 1 of the completion.
    pub result: u64,
    /// What the controller sent, of a command with [`Payload::In`]; may be shorter than asked for.
    pub data: Bytes,
}

/// Why a command was not answered. The connection has ended either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No byte of it was handed to the socket: it will never be executed.
    #[error("command was not sent")]
    NotSent,
    /// It may have been executed, or may still be.
    #[error("connection lost before the answer")]
    Lost,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// End of stream.
    #[error("controller closed the connection")]
    PeerClosed,
    /// The socket failed.
    #[error("socket: {0}")]
    Socket(std::io::ErrorKind),
    /// The controller sent a C2HTermReq.
    #[error("controller ended the connection: {0}")]
    PeerTerminated(TermReason),
    /// The controller broke the protocol and was sent an H2CTermReq.
    #[error("controller broke the protocol: {0}")]
    Protocol(TermReason),
    /// The controller declined a digest that was asked for.
    #[error("controller declined a digest")]
    DigestDeclined,
    /// A command had no answer in time. NVMe/TCP has no safe way to go on: its data may still move.
    #[error("command timed out")]
    CommandTimeout,
    /// A Keep Alive had no answer in time.
    #[error("keep alive timed out")]
    KeepAliveTimeout,
    /// The controller stopped accepting this association's commands.
    #[error("controller refused a keep alive: {0}")]
    KeepAliveRefused(Status),
    /// This side ended it.
    #[error("disconnected")]
    Disconnected,
}

/// Bytes of scattered data.
///
/// # Panics
/// Above 4 GiB: callers split at [`TRANSFER_BYTES_MAX`].
pub(crate) fn scattered_len(data: &[Bytes]) -> u32 {
    let len: usize = data.iter().map(Bytes::len).sum();
    u32::try_from(len).expect("transfers are split long before 4 GiB")
}

/// `len` bytes from `offset` of scattered data, shared.
pub(crate) fn slice_scattered(data: &[Bytes], mut offset: usize, mut len: usize) -> Vec<Bytes> {
    let mut slices = Vec::new();
    for piece in data {
        if len == 0 {
            break;
        }
        if offset >= piece.len() {
            offset -= piece.len();
            continue;
        }
        let take = len.min(piece.len() - offset);
        slices.push(piece.slice(offset..offset + take));
        offset = 0;
        len -= take;
    }
    slices
}
