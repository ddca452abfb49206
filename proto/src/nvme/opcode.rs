//! Opcodes of the Admin and the NVM command sets.
//!
//! Newtypes and not enums: the byte comes from a host, and an unknown value is answered, not refused to parse.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// An Admin command's opcode (Base Specification, "Opcodes for Admin Commands").
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct AdminOpcode(pub u8);

impl AdminOpcode {
    /// Delete I/O Submission Queue: of memory-based transports, as are the next three.
    pub const DELETE_SUBMISSION_QUEUE: Self = Self(0x00);
    /// Create I/O Submission Queue.
    pub const CREATE_SUBMISSION_QUEUE: Self = Self(0x01);
    /// Delete I/O Completion Queue.
    pub const DELETE_COMPLETION_QUEUE: Self = Self(0x04);
    /// Create I/O Completion Queue.
    pub const CREATE_COMPLETION_QUEUE: Self = Self(0x05);
    /// Doorbell Buffer Config: of memory-based transports.
    pub const DOORBELL_BUFFER_CONFIG: Self = Self(0x7c);
    /// Get Log Page.
    pub const GET_LOG_PAGE: Self = Self(0x02);
    /// Identify.
    pub const IDENTIFY: Self = Self(0x06);
    /// Abort.
    pub const ABORT: Self = Self(0x08);
    /// Set Features.
    pub const SET_FEATURES: Self = Self(0x09);
    /// Get Features.
    pub const GET_FEATURES: Self = Self(0x0a);
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT_REQUEST: Self = Self(0x0c);
    /// Keep Alive.
    pub const KEEP_ALIVE: Self = Self(0x18);
    /// Fabrics commands, on either kind of queue; which one is in FCTYPE.
    pub const FABRICS: Self = Self(0x7f);
}

/// An I/O command's opcode (NVM Command Set, "Opcodes for NVM Commands"; reservations are in the Base
/// Specification).
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct NvmOpcode(pub u8);

impl NvmOpcode {
    /// Flush.
    pub const FLUSH: Self = Self(0x00);
    /// Write.
    pub const WRITE: Self = Self(0x01);
    /// Read.
    pub const READ: Self = Self(0x02);
    /// Compare.
    pub const COMPARE: Self = Self(0x05);
    /// Write Zeroes.
    pub const WRITE_ZEROES: Self = Self(0x08);
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: Self = Self(0x09);
    /// Verify.
    pub const VERIFY: Self = Self(0x0c);
    /// Reservation Register.
    pub const RESERVATION_REGISTER: Self = Self(0x0d);
    /// Reservation Report.
    pub const RESERVATION_REPORT: Self = Self(0x0e);
    /// Reservation Acquire.
    pub const RESERVATION_ACQUIRE: Self = Self(0x11);
    /// Reservation Release.
    pub const RESERVATION_RELEASE: Self = Self(0x15);
}
