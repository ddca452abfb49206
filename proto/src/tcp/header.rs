//! Layouts of the PDU headers. All integers are little-endian.
//!
//! ```text
//!  0         1       2      3      4            8                 HLEN        PDO
//! +----------+-------+------+------+------------+-----------------+-----------+-----+------+-------+
//! | PDU-Type | FLAGS | HLEN | PDO  | PLEN       | PDU specific    | HDGST (4) | PAD | DATA | DDGST |
//! +----------+-------+------+------+------------+-----------------+-----------+-----+------+-------+
//! ```
//!
//! NVMe/TCP Transport Specification, "Transport Specific PDUs".

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Digests, FatalErrorStatus};

/// PDU-Type. A newtype and not an `enum`, because the byte comes from the peer and an unknown value has to
/// survive parsing to be reported in a TermReq.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct PduType(pub u8);

impl PduType {
    /// Initialize Connection Request, host to controller.
    pub const IC_REQ: Self = Self(0x00);
    /// Initialize Connection Response, controller to host.
    pub const IC_RESP: Self = Self(0x01);
    /// Host to Controller Terminate Connection Request.
    pub const H2C_TERM_REQ: Self = Self(0x02);
    /// Controller to Host Terminate Connection Request.
    pub const C2H_TERM_REQ: Self = Self(0x03);
    /// Command Capsule, host to controller.
    pub const CAPSULE_CMD: Self = Self(0x04);
    /// Response Capsule, controller to host.
    pub const CAPSULE_RESP: Self = Self(0x05);
    /// Host to Controller Data.
    pub const H2C_DATA: Self = Self(0x06);
    /// Controller to Host Data.
    pub const C2H_DATA: Self = Self(0x07);
    /// Ready to Transfer, controller to host.
    pub const R2T: Self = Self(0x09);

    /// The longest HLEN of any type.
    pub const HLEN_MAX: usize = 128;

    /// HLEN of this type, which the specification fixes; `None` for a type it does not define.
    #[must_use]
    pub fn hlen(self) -> Option<u8> {
        match self {
            Self::IC_REQ | Self::IC_RESP => Some(128),
            Self::CAPSULE_CMD => Some(72),
            Self::H2C_TERM_REQ
            | Self::C2H_TERM_REQ
            | Self::CAPSULE_RESP
            | Self::H2C_DATA
            | Self::C2H_DATA
            | Self::R2T => Some(24),
            Self(_) => None,
        }
    }

    /// Whether a header digest follows the header when digests were negotiated.
    #[must_use]
    pub fn takes_header_digest(self) -> bool {
        !matches!(self, Self::IC_REQ | Self::IC_RESP) && !self.is_term_req()
    }

    /// Whether this is a Terminate Connection Request.
    #[must_use]
    pub fn is_term_req(self) -> bool {
        matches!(self, Self::H2C_TERM_REQ | Self::C2H_TERM_REQ)
    }

    /// Whether data with PDO, padding and digest may follow the header.
    #[must_use]
    pub fn takes_data(self) -> bool {
        matches!(self, Self::CAPSULE_CMD | Self::H2C_DATA | Self::C2H_DATA)
    }
}

/// FLAGS of the common header.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct PduFlags(pub u8);

impl PduFlags {
    /// HDGSTF: a header digest follows the header.
    pub const HEADER_DIGEST: Self = Self(1 << 0);
    /// DDGSTF: a data digest follows the data.
    pub const DATA_DIGEST: Self = Self(1 << 1);
    /// LAST_PDU of H2CData and C2HData: the last one of its R2T, or of its command.
    pub const LAST: Self = Self(1 << 2);
    /// SUCCESS of C2HData: the command completed successfully and no response capsule follows.
    pub const SUCCESS: Self = Self(1 << 3);

    /// Whether all of `flags` are set.
    #[must_use]
    pub fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// With `flags` set as well, if `set`.
    #[must_use]
    pub fn with(self, flags: Self, set: bool) -> Self {
        if set { Self(self.0 | flags.0) } else { self }
    }
}

/// PDU Common Header (CH): the first 8 bytes of every PDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CommonHeader {
    /// Which PDU.
    pub pdu_type: PduType,
    /// FLAGS.
    pub flags: PduFlags,
    /// Header Length (HLEN) in bytes, without the header digest.
    pub hlen: u8,
    /// PDU Data Offset (PDO) in bytes from the start of the PDU. Reserved where there is no data.
    pub pdo: u8,
    /// PDU Length (PLEN) in bytes, with header, padding, data and digests.
    pub plen: U32,
}

const _: () = assert!(size_of::<CommonHeader>() == 8);
const _: () = assert!(offset_of!(CommonHeader, plen) == 4);

/// The digest enables of ICReq and ICResp (DGST).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct DigestEnables(pub u8);

impl DigestEnables {
    /// Bit 0 is HDGST_ENABLE, bit 1 is DDGST_ENABLE.
    #[must_use]
    pub fn digests(self) -> Digests {
        Digests {
            header: self.0 & 1 != 0,
            data: self.0 & 2 != 0,
        }
    }
}

impl From<Digests> for DigestEnables {
    fn from(digests: Digests) -> Self {
        Self(u8::from(digests.header) | u8::from(digests.data) << 1)
    }
}

/// The PDU format version this crate speaks (PFV).
pub const PFV: u16 = 0;

/// Least value of MAXH2CDATA that a controller may announce.
pub const MAXH2CDATA_MIN: u32 = 4096;

/// Initialize Connection Request (ICReq), after the common header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IcReq {
    /// PDU Format Version.
    pub pfv: U16,
    /// Host PDU Data Alignment: the data of what the controller sends starts at a multiple of (HPDA + 1) dwords.
    pub hpda: u8,
    /// Digests that the host asks for.
    pub dgst: DigestEnables,
    /// Maximum outstanding R2T per command (MAXR2T), zero-based.
    pub maxr2t_z: U32,
    /// Reserved.
    pub rsvd16: [u8; 112],
}

const _: () = assert!(size_of::<IcReq>() == 128 - 8);
const _: () = assert!(offset_of!(IcReq, maxr2t_z) == 12 - 8);

impl IcReq {
    /// A request for `digests` that lets the controller keep `r2t_max` (one-based) R2T of a command outstanding.
    #[must_use]
    pub fn new(digests: Digests, r2t_max: u32) -> Self {
        Self {
            pfv: U16::new(PFV),
            hpda: 0,
            dgst: digests.into(),
            maxr2t_z: U32::new(r2t_max.saturating_sub(1)),
            rsvd16: [0; 112],
        }
    }
}

/// Initialize Connection Response (ICResp), after the common header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IcResp {
    /// PDU Format Version.
    pub pfv: U16,
    /// Controller PDU Data Alignment: the data of what the host sends starts at a multiple of (CPDA + 1) dwords.
    pub cpda: u8,
    /// Digests that will be used: at most those the host asked for.
    pub dgst: DigestEnables,
    /// Maximum data of one H2CData, in bytes (MAXH2CDATA).
    pub maxh2cdata: U32,
    /// Reserved.
    pub rsvd16: [u8; 112],
}

const _: () = assert!(size_of::<IcResp>() == 128 - 8);
const _: () = assert!(offset_of!(IcResp, maxh2cdata) == 12 - 8);

impl IcResp {
    /// A response that enables `digests` and takes `maxh2cdata` bytes in one H2CData.
    #[must_use]
    pub fn new(digests: Digests, maxh2cdata: u32) -> Self {
        Self {
            pfv: U16::new(PFV),
            cpda: 0,
            dgst: digests.into(),
            maxh2cdata: U32::new(maxh2cdata),
            rsvd16: [0; 112],
        }
    }
}

/// Largest HPDA or CPDA: 32 dwords.
pub const PDA_MAX: u8 = 31;

/// Terminate Connection Request, either direction, after the common header. The header of the PDU in error
/// follows as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TermReqHeader {
    /// Fatal Error Status (FES).
    pub fes: FatalErrorStatus,
    /// Fatal Error Information (FEI). It lies at byte 10, unaligned.
    pub fei: U32,
    /// Reserved.
    pub rsvd14: [u8; 10],
}

const _: () = assert!(size_of::<TermReqHeader>() == 24 - 8);
const _: () = assert!(offset_of!(TermReqHeader, fei) == 10 - 8);

/// Most bytes of the PDU in error that a TermReq may repeat.
pub const TERM_REQ_DATA_MAX: u32 = 128;

/// H2CData and C2HData, after the common header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataPduHeader {
    /// Command Capsule CID (CCCID): the command whose data this is.
    pub cccid: U16,
    /// Transfer Tag (TTAG) of the R2T that H2CData answers; reserved in C2HData.
    pub ttag: U16,
    /// Data Offset (DATAO) in bytes from the start of the command's data.
    pub datao: U32,
    /// Data Length (DATAL) in bytes.
    pub datal: U32,
    /// Reserved.
    pub rsvd20: [u8; 4],
}

const _: () = assert!(size_of::<DataPduHeader>() == 24 - 8);
const _: () = assert!(offset_of!(DataPduHeader, datal) == 16 - 8);

/// Ready to Transfer (R2T), after the common header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct R2T {
    /// Command Capsule CID (CCCID): the command whose data is asked for.
    pub cccid: U16,
    /// Transfer Tag (TTAG), to be repeated in the H2CData.
    pub ttag: U16,
    /// Requested Data Offset (R2TO) in bytes from the start of the command's data.
    pub r2to: U32,
    /// Requested Data Length (R2TL) in bytes.
    pub r2tl: U32,
    /// Reserved.
    pub rsvd20: [u8; 4],
}

const _: () = assert!(size_of::<R2T>() == 24 - 8);
const _: () = assert!(offset_of!(R2T, r2tl) == 16 - 8);

/// Bytes of the common header.
pub const COMMON_HEADER_BYTES: usize = size_of::<CommonHeader>();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_icreq_is_laid_out_as_specified() {
        let request = IcReq::new(
            Digests {
                header: true,
                data: true,
            },
            5,
        );
        let bytes = request.as_bytes();
        // PFV 0, HPDA 0, DGST 3, MAXR2T 4 (zero-based).
        assert_eq!(&bytes[..8], [0, 0, 0, 3, 4, 0, 0, 0]);
        assert!(bytes[8..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn an_icresp_is_laid_out_as_specified() {
        let response = IcResp::new(
            Digests {
                header: false,
                data: true,
            },
            0x0002_0000,
        );
        assert_eq!(&response.as_bytes()[..8], [0, 0, 0, 2, 0, 0, 2, 0]);
    }

    #[test]
    fn data_headers_and_r2t_are_laid_out_as_specified() {
        let bytes = [
            0x34, 0x12, 0x78, 0x56, 0x00, 0x10, 0, 0, 0x00, 0x20, 0, 0, 0, 0, 0, 0,
        ];
        let data = DataPduHeader::read_from_bytes(&bytes).unwrap();
        assert_eq!(
            (
                data.cccid.get(),
                data.ttag.get(),
                data.datao.get(),
                data.datal.get()
            ),
            (0x1234, 0x5678, 0x1000, 0x2000)
        );
        let r2t = R2T::read_from_bytes(&bytes).unwrap();
        assert_eq!(
            (r2t.cccid.get(), r2t.ttag.get(), r2t.r2to.get(), r2t.r2tl.get()),
            (0x1234, 0x5678, 0x1000, 0x2000)
        );
    }

    #[test]
    fn flags_are_the_bits_of_the_specification() {
        let flags = PduFlags::default()
            .with(PduFlags::LAST, true)
            .with(PduFlags::SUCCESS, true)
            .with(PduFlags::DATA_DIGEST, false);
        assert_eq!(flags, PduFlags(0b1100));
        assert!(flags.contains(PduFlags::LAST) && !flags.contains(PduFlags::HEADER_DIGEST));
    }
}
