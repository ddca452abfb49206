//! NVM Express structures: entries, commands, identify data, features, log pages, reservations.
//!
//! Little-endian by type, sizes and offsets asserted where they are declared. A value that a peer chooses is a
//! newtype with constants until it has been matched; [`command::AdminCommand`] and [`command::NvmCommand`] are
//! where a submission queue entry becomes a typed command, and nothing later reads its dwords.
//!
//! What this does not hold: controller state, what a command means, transports.
//!
//! NVM Express Base Specification 2.0 and NVM Command Set Specification 1.0.

pub mod command;
pub mod cqe;
pub mod event;
pub mod feature;
pub mod identify;
pub mod log;
pub mod opcode;
pub mod queue;
pub mod reservation;
pub mod sgl;
pub mod sqe;
pub mod status;

/// The NSID that stands for every namespace of the controller.
pub const NSID_ALL: u32 = 0xffff_ffff;
