//! Bytes that no state could accept, and what a Terminate Connection Request says of them.
//!
//! NVMe/TCP Transport Specification, "Terminate Connection Request" and "Error Handling Model".

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian::U16};

use super::PduType;

/// Fatal Error Status (FES).
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct FatalErrorStatus(pub U16);

impl FatalErrorStatus {
    /// A header field is invalid; FEI is its byte offset.
    pub const INVALID_PDU_HEADER_FIELD: Self = Self(U16::new(1));
    /// A PDU at a time when it may not come.
    pub const PDU_SEQUENCE_ERROR: Self = Self(U16::new(2));
    /// The header digest does not match; FEI is the digest received.
    pub const HEADER_DIGEST_ERROR: Self = Self(U16::new(3));
    /// Data outside of the command's, or of what the R2T asked for.
    pub const DATA_TRANSFER_OUT_OF_RANGE: Self = Self(U16::new(4));
    /// More data than MAXH2CDATA (from the controller), or more R2T than MAXR2T (from the host).
    pub const LIMIT_EXCEEDED: Self = Self(U16::new(5));
    /// A parameter that is legal and not supported; FEI is its byte offset.
    pub const UNSUPPORTED_PARAMETER: Self = Self(U16::new(6));

    /// As a number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0.get()
    }
}

impl std::fmt::Debug for FatalErrorStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for FatalErrorStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::INVALID_PDU_HEADER_FIELD => f.write_str("invalid PDU header field"),
            Self::PDU_SEQUENCE_ERROR => f.write_str("PDU sequence error"),
            Self::HEADER_DIGEST_ERROR => f.write_str("header digest error"),
            Self::DATA_TRANSFER_OUT_OF_RANGE => f.write_str("data transfer out of range"),
            Self::LIMIT_EXCEEDED => f.write_str("limit exceeded"),
            Self::UNSUPPORTED_PARAMETER => f.write_str("unsupported parameter"),
            Self(other) => write!(f, "fatal error status {:#06x}", other.get()),
        }
    }
}

/// Why a connection ends: what a TermReq carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TermReason {
    /// Fatal Error Status.
    pub fes: FatalErrorStatus,
    /// Fatal Error Information, whose meaning depends on `fes`; 0 where it has none.
    pub fei: u32,
}

impl TermReason {
    /// A status without information.
    #[must_use]
    pub fn new(fes: FatalErrorStatus) -> Self {
        Self { fes, fei: 0 }
    }

    /// A header field at byte `offset` of the PDU is invalid.
    #[must_use]
    pub fn invalid_field(offset: u32) -> Self {
        Self {
            fes: FatalErrorStatus::INVALID_PDU_HEADER_FIELD,
            fei: offset,
        }
    }
}

impl std::fmt::Display for TermReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (FEI {:#x})", self.fes, self.fei)
    }
}

/// What is wrong with a PDU by itself. Always the peer's fault, always the end of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PduError {
    /// A type that is not defined, or that this side may not receive.
    #[error("PDU type {:#04x} may not be sent to this side", .pdu_type.0)]
    Type {
        /// As received.
        pdu_type: PduType,
    },
    /// A digest flag that contradicts what was negotiated.
    #[error("flags {flags:#04x} contradict the digests that were negotiated")]
    Flags {
        /// As received.
        flags: u8,
    },
    /// HLEN is not the one of this type.
    #[error("HLEN {hlen} instead of {expected}")]
    Hlen {
        /// As received.
        hlen: u8,
        /// What the specification fixes.
        expected: u8,
    },
    /// PDO lies inside the header, past the end, or off the negotiated alignment.
    #[error("PDO {pdo} is no place for data")]
    Pdo {
        /// As received.
        pdo: u8,
    },
    /// PLEN is shorter than the header, or longer than a PDU that takes no data.
    #[error("PLEN {plen} does not fit a header of {expected} bytes")]
    Plen {
        /// As received.
        plen: u32,
        /// Header and header digest.
        expected: u32,
    },
    /// A command capsule or a TermReq with more data than this side takes.
    #[error("PLEN {plen} is above the {plen_max} that this side takes")]
    PlenTooLong {
        /// As received.
        plen: u32,
        /// Limit.
        plen_max: u32,
    },
    /// A data PDU with more data than this side takes.
    #[error("{bytes} bytes of data are above the {bytes_max} that this side takes")]
    DataTooLong {
        /// As PLEN says.
        bytes: u32,
        /// MAXH2CDATA, or the largest read.
        bytes_max: u32,
    },
    /// DATAL differs from the data that PLEN leaves, or is zero.
    #[error("DATAL {datal} differs from the {bytes} bytes that PLEN leaves")]
    Datal {
        /// As received.
        datal: u32,
        /// As PLEN says.
        bytes: u32,
    },
    /// The header was damaged on its way.
    #[error("header digest {received:#010x}, computed {computed:#010x}")]
    HeaderDigest {
        /// From the peer.
        received: u32,
        /// Over the bytes received.
        computed: u32,
    },
}

impl PduError {
    /// What the TermReq says.
    #[must_use]
    pub fn term_reason(self) -> TermReason {
        match self {
            Self::Type { .. } => TermReason::invalid_field(0),
            Self::Flags { .. } => TermReason::invalid_field(1),
            Self::Hlen { .. } => TermReason::invalid_field(2),
            Self::Pdo { .. } => TermReason::invalid_field(3),
            Self::Plen { .. } | Self::PlenTooLong { .. } => TermReason::invalid_field(4),
            Self::Datal { .. } => TermReason::invalid_field(16),
            Self::DataTooLong { .. } => TermReason::new(FatalErrorStatus::LIMIT_EXCEEDED),
            Self::HeaderDigest { received, .. } => TermReason {
                fes: FatalErrorStatus::HEADER_DIGEST_ERROR,
                fei: received,
            },
        }
    }
}
