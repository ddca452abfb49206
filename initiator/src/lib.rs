//! NVMe-oF host: what reaches namespaces of other machines, ours or anybody's.
//!
//! ```text
//!   RemoteDrive   Multipath        reconnect for ever; one path, or several by ANA
//!         │          │
//!        Namespace (block contract)
//!             │
//!         Controller                Connect, properties, Identify, logs, reservations
//!             │
//!        Association                the queues of one controller, keep alive, events
//!             │
//!        Connection                 a socket and its task: one vectored write a turn
//!             │
//!         HostQueue                 the queue pair, without socket or clock
//! ```
//!
//! Everything lives on one `current_thread` runtime inside a `LocalSet`; nothing is `Send`.
//!
//! Architecture invariant: this crate knows no stripe, no volume and no cluster. It assumes nothing of a target that
//! the specification does not promise, and treats silence as Unknown.

mod association;
mod connection;
mod controller;
mod discovery;
mod metrics;
mod multipath;
mod namespace;
mod options;
mod path;
pub mod qpair;
mod remote_drive;
mod reply;
mod reservation;
mod status;

pub use association::Events;
pub use controller::{Controller, ControllerInfo};
pub use discovery::{DiscoverError, discover};
pub use metrics::METRICS;
pub use multipath::{Multipath, MultipathOptions, PathStatus};
pub use namespace::Namespace;
pub use options::{AdminError, ConnectError, ConnectOptions, HostIdentity};
pub use path::{DisconnectReason, PathState};
pub use qpair::CloseReason;
pub use remote_drive::RemoteDrive;
pub use reservation::ReservationError;
