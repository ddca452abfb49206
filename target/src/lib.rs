//! NVMe controllers presented to hosts and peers over NVMe/TCP, and to guests over vfio-user.
//!
//! ```text
//!  socket ─ connection ─ qpair (no socket, no clock) ─┬─ controller (admin queue)
//!                                                     └─ io ─ namespace ─┬─ reservation ─ device   (a drive)
//!                                                                        └─ device of an association (a volume)
//! ```
//!
//! - [`Registry`]: what is presented, to whom, in which ANA state; changed at run time by its owner;
//! - [`serve`]: connections on a listener; [`vfio_user`]: the same controllers as PCI Express functions of guests;
//! - [`reservation`]: NVMe reservations over a device, with or without a socket;
//! - [`qpair`]: the queue pair's state machine; [`silence`]: what the words of a host are worth that was not heard for long;
//!   [`arrival`]: how old a command is when its device gets it;
//! - [`status`]: the one mapping of errors to NVMe statuses; [`metrics`]: the one list of metrics.
//!
//! Architecture invariant: this crate never learns what a stripe is. A namespace is a range of blocks.
//!
//! What it promises besides the specifications: no ghost writes (a dropped connection's commands are done before
//! the same host's next connection executes any), and a Preempt and Abort that completes only when nothing of the
//! preempted host is in execution. What it does not do: authentication, TLS, namespace management, metadata and
//! protection information.
//!
//! Everything runs on one `current_thread` runtime inside a `LocalSet`.

pub mod arrival;
mod connect;
mod connection;
mod controller;
mod fused;
mod io;
pub mod metrics;
mod namespace;
mod outstanding;
pub mod qpair;
mod refusals;
mod registry;
mod request;
pub mod reservation;
mod running_set;
mod serve;
pub mod silence;
pub mod status;
pub mod vfio_user;

pub use namespace::{Association, DeviceFactory, NamespaceConfig, Source};
pub use registry::{AllowedHosts, DiscoveryRecord, Registry, RegistryConfig, RegistryError, SubsystemConfig};
pub use serve::serve;

/// An error and its causes as one line.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}
