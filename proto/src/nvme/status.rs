//! The Status field of a completion (Base Specification, "Status Field Definition").

use std::fmt;

/// A completion's status without the phase tag: bits 7:0 are the Status Code (SC), 10:8 the Status Code Type
/// (SCT), 12:11 the Command Retry Delay (CRD), 13 More (M), 14 Do Not Retry (DNR).
///
/// Equality compares all bits; [`Status::code`] leaves type and code only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Status(pub u16);

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $sct:literal, $sc:literal;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Self = Self::new($sct, $sc);)*

            /// The constant's name, for messages.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                match self.code() {
                    $(Self::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// Successful Completion.
    SUCCESS = 0, 0x00;
    /// Invalid Command Opcode.
    INVALID_OPCODE = 0, 0x01;
    /// Invalid Field in Command.
    INVALID_FIELD = 0, 0x02;
    /// Command ID Conflict.
    CID_CONFLICT = 0, 0x03;
    /// Data Transfer Error.
    DATA_TRANSFER_ERROR = 0, 0x04;
    /// Internal Error.
    INTERNAL_ERROR = 0, 0x06;
    /// Command Abort Requested.
    ABORT_REQUESTED = 0, 0x07;
    /// Command Aborted due to SQ Deletion.
    ABORTED_SQ_DELETION = 0, 0x08;
    /// Command Aborted due to Failed Fused Command.
    ABORTED_FAILED_FUSED = 0, 0x09;
    /// Command Aborted due to Missing Fused Command.
    ABORTED_MISSING_FUSED = 0, 0x0a;
    /// Invalid Namespace or Format.
    INVALID_NAMESPACE = 0, 0x0b;
    /// Command Sequence Error.
    COMMAND_SEQUENCE_ERROR = 0, 0x0c;
    /// Invalid SGL Segment Descriptor.
    INVALID_SGL_SEGMENT = 0, 0x0d;
    /// Invalid Number of SGL Descriptors.
    INVALID_SGL_COUNT = 0, 0x0e;
    /// Data SGL Length Invalid.
    INVALID_SGL_LENGTH = 0, 0x0f;
    /// SGL Descriptor Type Invalid.
    INVALID_SGL_TYPE = 0, 0x11;
    /// PRP Offset Invalid.
    INVALID_PRP_OFFSET = 0, 0x13;
    /// SGL Offset Invalid.
    INVALID_SGL_OFFSET = 0, 0x16;
    /// Host Identifier Inconsistent Format.
    HOSTID_INCONSISTENT_FORMAT = 0, 0x18;
    /// Keep Alive Timer Expired.
    KEEP_ALIVE_EXPIRED = 0, 0x19;
    /// Keep Alive Timeout Invalid.
    KATO_INVALID = 0, 0x1a;
    /// Command Aborted due to Preempt and Abort.
    ABORTED_PREEMPT = 0, 0x1b;
    /// Namespace is Write Protected.
    WRITE_PROTECTED = 0, 0x20;
    /// Transient Transport Error.
    TRANSIENT_TRANSPORT_ERROR = 0, 0x22;
    /// LBA Out of Range.
    LBA_OUT_OF_RANGE = 0, 0x80;
    /// Capacity Exceeded.
    CAPACITY_EXCEEDED = 0, 0x81;
    /// Namespace Not Ready.
    NAMESPACE_NOT_READY = 0, 0x82;
    /// Reservation Conflict.
    RESERVATION_CONFLICT = 0, 0x83;

    /// Completion Queue Invalid.
    COMPLETION_QUEUE_INVALID = 1, 0x00;
    /// Invalid Queue Identifier.
    INVALID_QUEUE_IDENTIFIER = 1, 0x01;
    /// Invalid Queue Size.
    INVALID_QUEUE_SIZE = 1, 0x02;
    /// Abort Command Limit Exceeded.
    ABORT_LIMIT_EXCEEDED = 1, 0x03;
    /// Asynchronous Event Request Limit Exceeded.
    ASYNC_EVENT_LIMIT_EXCEEDED = 1, 0x05;
    /// Invalid Interrupt Vector.
    INVALID_INTERRUPT_VECTOR = 1, 0x08;
    /// Invalid Log Page.
    INVALID_LOG_PAGE = 1, 0x09;
    /// Invalid Queue Deletion.
    INVALID_QUEUE_DELETION = 1, 0x0c;
    /// Feature Identifier Not Saveable.
    FEATURE_NOT_SAVEABLE = 1, 0x0d;
    /// Feature Not Changeable.
    FEATURE_NOT_CHANGEABLE = 1, 0x0e;
    /// Connect Incompatible Format (fabrics).
    CONNECT_INCOMPATIBLE_FORMAT = 1, 0x80;
    /// Connect Controller Busy (fabrics).
    CONNECT_CONTROLLER_BUSY = 1, 0x81;
    /// Connect Invalid Parameters (fabrics); DW0 says which.
    CONNECT_INVALID_PARAMETERS = 1, 0x82;
    /// Connect Restart Discovery (fabrics).
    CONNECT_RESTART_DISCOVERY = 1, 0x83;
    /// Connect Invalid Host (fabrics).
    CONNECT_INVALID_HOST = 1, 0x84;
    /// Invalid Queue Type (fabrics).
    INVALID_QUEUE_TYPE = 1, 0x85;

    /// Write Fault.
    WRITE_FAULT = 2, 0x80;
    /// Unrecovered Read Error.
    UNRECOVERED_READ_ERROR = 2, 0x81;
    /// Compare Failure.
    COMPARE_FAILURE = 2, 0x85;
    /// Access Denied.
    ACCESS_DENIED = 2, 0x86;

    /// Internal Path Error.
    INTERNAL_PATH_ERROR = 3, 0x00;
    /// Asymmetric Access Persistent Loss.
    ANA_PERSISTENT_LOSS = 3, 0x01;
    /// Asymmetric Access Inaccessible.
    ANA_INACCESSIBLE = 3, 0x02;
    /// Asymmetric Access Transition.
    ANA_TRANSITION = 3, 0x03;
    /// Controller Pathing Error.
    CONTROLLER_PATH_ERROR = 3, 0x60;
    /// Host Pathing Error.
    HOST_PATH_ERROR = 3, 0x70;
    /// Command Aborted By Host.
    HOST_ABORTED = 3, 0x71;
}

impl Status {
    const DNR: u16 = 1 << 14;
    const CODE_MASK: u16 = 0x07ff;

    /// From Status Code Type and Status Code.
    #[must_use]
    pub const fn new(sct: u8, sc: u8) -> Self {
        Self(((sct as u16) << 8) | sc as u16)
    }

    /// Status Code Type: 0 generic, 1 command specific, 2 media and data integrity, 3 path related.
    #[must_use]
    pub const fn sct(self) -> u8 {
        ((self.0 >> 8) & 0x7) as u8
    }

    /// Status Code.
    #[must_use]
    pub const fn sc(self) -> u8 {
        (self.0 & 0xff) as u8
    }

    /// Type and code alone, without retry delay, More and Do Not Retry.
    #[must_use]
    pub const fn code(self) -> Self {
        Self(self.0 & Self::CODE_MASK)
    }

    /// With Do Not Retry set: the same command would fail again.
    #[must_use]
    pub const fn dnr(self) -> Self {
        Self(self.0 | Self::DNR)
    }

    /// Whether Do Not Retry is set.
    #[must_use]
    pub const fn is_dnr(self) -> bool {
        self.0 & Self::DNR != 0
    }

    /// Whether the command succeeded.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.code().0 == 0
    }

    /// Whether another path may serve the command (SCT 3).
    #[must_use]
    pub const fn is_path_related(self) -> bool {
        self.sct() == 3
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}/{:02x}", self.sct(), self.sc())?;
        if let Some(name) = self.name() {
            write!(f, " {name}")?;
        }
        if self.is_dnr() {
            f.write_str(" DNR")
        } else {
            Ok(())
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_code_and_do_not_retry_have_their_own_bits() {
        let status = Status::COMPARE_FAILURE.dnr();
        assert_eq!(status.0, 0x4285);
        assert_eq!((status.sct(), status.sc(), status.is_dnr()), (2, 0x85, true));
        assert_eq!(status.code(), Status::COMPARE_FAILURE);
        assert_eq!(status.to_string(), "2/85 COMPARE_FAILURE DNR");
    }

    #[test]
    fn path_related_statuses_say_so() {
        assert!(Status::ANA_TRANSITION.is_path_related());
        assert!(!Status::INTERNAL_ERROR.is_path_related());
    }
}
