//! NVMe controllers in guests: PCI Express functions over vfio-user.
//!
//! ```text
//!  socket ─ server ─ function (registers, lives) ─ engine (queues) ─┬─ controller model (admin)
//!                       │                            │              └─ io ─ namespace
//!                       └ pci, interrupt             └ transfer (PRPs, SGLs) ─ memory ─ mapping
//! ```
//!
//! A virtual machine monitor connects to a Unix socket, hands over its guest's memory as file descriptors, and the guest
//! finds an NVMe drive. It is the controller model of this crate with another transport, so identify data, log pages,
//! features, events and I/O are the same as over a network.
//!
//! What it promises besides the specifications: whatever a guest or its monitor writes ends in a specified error, in
//! Controller Fatal Status or in the end of the connection, never in a crash, a wait without end or an access outside of
//! the guest's memory; and an idle controller costs nothing.
//!
//! What it does not do: migration of a running guest's controller, memory that is not in memory files, page sizes other
//! than 4 KiB.
//!
//! One connection at a time: a monitor that ends may connect again and finds a controller that was just switched on.

use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;

mod dispatch;
mod doorbell_page;
mod engine;
mod function;
mod interrupt;
pub mod mapping;
mod memory;
pub mod message;
mod pci;
mod queue;
mod registers;
mod replies;
mod server;
mod transfer;
#[doc(hidden)]
pub mod unconnected;

pub use server::serve;

/// Which subsystem a guest finds, and who it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The subsystem. It has to be presented as long as this is served.
    pub subsystem: Nqn,
    /// The name by which access is granted.
    pub hostnqn: Nqn,
    /// The identifier by which reservations know the guest.
    pub hostid: HostId,
    /// How it rings.
    pub doorbells: Doorbells,
}

/// How a guest's doorbells reach the controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Doorbells {
    /// By messages of its monitor, and in the guest's own memory if its driver knows Doorbell Buffer Config, as Linux' does.
    /// An idle controller costs nothing.
    #[default]
    Trapped,
    /// In a page that the monitor maps into the guest: no driver ever traps. The thread looks at that page without a pause as
    /// long as the controller is enabled, which takes a core. Such a controller has no Doorbell Buffer Config.
    Mapped,
}
