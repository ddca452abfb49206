//! Who connects, to what, and how; and why a connection could not be made.

use std::net::SocketAddr;
use std::time::Duration;

use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::status::Status;
use weft_proto::tcp::Digests;

use crate::qpair::{CloseReason, CommandError};

/// The host that a controller sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostIdentity {
    /// Host NQN: the node's, for life.
    pub hostnqn: Nqn,
    /// Host Identifier: what reservations are checked against. An incarnation's own.
    pub hostid: HostId,
}

/// How to reach one controller. Start from [`ConnectOptions::new`].
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Where the subsystem listens.
    pub address: SocketAddr,
    /// Subsystem NQN.
    pub subnqn: Nqn,
    /// Who connects.
    pub host: HostIdentity,
    /// I/O queues to ask for, each a TCP connection. The controller may grant fewer.
    pub io_queues: u16,
    /// Commands outstanding per I/O queue. The controller may take fewer.
    pub queue_depth: u16,
    /// Keep Alive Timeout. Zero turns keep alive off.
    pub kato: Duration,
    /// Whether to ask for header digests; a controller that declines is refused.
    pub header_digest: bool,
    /// Whether to ask for data digests; a controller that declines is refused.
    pub data_digest: bool,
    /// Silence about a command after which the association is ended.
    pub command_timeout: Duration,
    /// For the whole of connecting, all queues included.
    pub connect_timeout: Duration,
}

impl ConnectOptions {
    /// I/O queues where nothing else is said: one core drives them, and one connection batches best.
    pub const IO_QUEUES: u16 = 1;
    /// Queue depth where nothing else is said.
    pub const QUEUE_DEPTH: u16 = 128;
    /// Keep alive where nothing else is said: silence has to be noticed within about a second.
    pub const KATO: Duration = Duration::from_secs(1);
    /// Command timeout where nothing else is said. A guess: longer than a drive's own error recovery of some
    /// seconds, since a timeout costs the whole association.
    pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
    /// Connect timeout where nothing else is said. A guess.
    pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

    /// The usual way to reach `subnqn` at `address`: no digests, and the constants above.
    #[must_use]
    pub fn new(address: SocketAddr, subnqn: Nqn, host: HostIdentity) -> Self {
        Self {
            address,
            subnqn,
            host,
            io_queues: Self::IO_QUEUES,
            queue_depth: Self::QUEUE_DEPTH,
            kato: Self::KATO,
            header_digest: false,
            data_digest: false,
            command_timeout: Self::COMMAND_TIMEOUT,
            connect_timeout: Self::CONNECT_TIMEOUT,
        }
    }

    pub(crate) fn digests(&self) -> Digests {
        Digests {
            header: self.header_digest,
            data: self.data_digest,
        }
    }
}

/// Why a controller could not be reached or set up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// No TCP connection.
    #[error("connect to {address}: {kind}")]
    Socket {
        /// Where to.
        address: SocketAddr,
        /// What the system said.
        kind: std::io::ErrorKind,
    },
    /// Not finished within the connect timeout.
    #[error("{address} did not answer in time")]
    Timeout {
        /// Where to.
        address: SocketAddr,
    },
    /// The connection ended while it was being set up.
    #[error(transparent)]
    Closed(#[from] CloseReason),
    /// The subsystem refused the Connect: unknown subsystem, host not allowed, no controller left.
    #[error("subsystem refused the connection: {0}")]
    Refused(Status),
    /// The subsystem wants the host to authenticate, which this host does not.
    #[error("subsystem requires authentication")]
    AuthenticationRequired,
    /// The controller did not become ready, or reports a fatal status.
    #[error("controller did not become ready (CSTS {csts:#x})")]
    NotReady {
        /// Controller Status, as last read.
        csts: u32,
    },
    /// A command of the set-up failed.
    #[error("{command}: {status}")]
    Command {
        /// Which.
        command: &'static str,
        /// How.
        status: Status,
    },
    /// The controller answered with a structure that is cut short or says what cannot be.
    #[error("controller answered {command} with a malformed structure")]
    Malformed {
        /// Which.
        command: &'static str,
    },
}

/// Why an Admin command had no useful answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// The controller answered with another status than success.
    #[error("{command}: {status}")]
    Status {
        /// Which.
        command: &'static str,
        /// How.
        status: Status,
    },
    /// The association ended before the answer.
    #[error("{command}: {error}")]
    Lost {
        /// Which.
        command: &'static str,
        /// Whether it was sent.
        error: CommandError,
    },
    /// The answer is cut short or says what cannot be.
    #[error("{command}: malformed answer")]
    Malformed {
        /// Which.
        command: &'static str,
    },
}
