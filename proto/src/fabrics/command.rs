//! Fabrics commands: opcode 7Fh, told apart by the Fabrics Command Type (FCTYPE) in byte 4.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::property::Property;
use crate::id::HostId;
use crate::nqn::Nqn;
use crate::nvme::opcode::AdminOpcode;
use crate::nvme::sqe::Sqe;
use crate::nvme::status::Status;

/// Fabrics Command Types.
pub mod fctype {
    /// Property Set.
    pub const PROPERTY_SET: u8 = 0x00;
    /// Connect.
    pub const CONNECT: u8 = 0x01;
    /// Property Get.
    pub const PROPERTY_GET: u8 = 0x04;
    /// Authentication Send.
    pub const AUTH_SEND: u8 = 0x05;
    /// Authentication Receive.
    pub const AUTH_RECEIVE: u8 = 0x06;
    /// Disconnect, of one I/O queue.
    pub const DISCONNECT: u8 = 0x08;
}

/// A Connect, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect {
    /// 0 makes a controller; any other joins a queue to one.
    pub qid: u16,
    /// Submission queue size, zero-based.
    pub sqsize_z: u16,
    /// Connect Attributes; bit 2 disables SQ flow control.
    pub cattr: u8,
    /// Keep Alive Timeout, milliseconds; 0 disables it. Of the admin queue only.
    pub kato_ms: u32,
}

impl Connect {
    /// Bit of CATTR: Disable SQ Flow Control.
    pub const DISABLE_SQ_FLOW_CONTROL: u8 = 1 << 2;

    /// Whether the submission queue head is not reported.
    #[must_use]
    pub fn disables_sq_flow_control(self) -> bool {
        self.cattr & Self::DISABLE_SQ_FLOW_CONTROL != 0
    }
}

/// A Fabrics command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FabricsCommand {
    /// Property Set.
    PropertySet {
        /// Which.
        property: Property,
        /// Whether the host wrote 8 bytes, else 4.
        wide: bool,
        /// What.
        value: u64,
    },
    /// Connect.
    Connect(Connect),
    /// Property Get.
    PropertyGet {
        /// Which.
        property: Property,
        /// Whether the host reads 8 bytes, else 4.
        wide: bool,
    },
    /// Disconnect.
    Disconnect,
}

impl FabricsCommand {
    /// Whether an entry is a Fabrics command.
    #[must_use]
    pub fn is_fabrics(sqe: &Sqe) -> bool {
        sqe.opcode == AdminOpcode::FABRICS.0
    }

    /// Reads a Fabrics command.
    ///
    /// # Errors
    /// The status to answer with.
    pub fn parse(sqe: &Sqe) -> Result<Self, Status> {
        let invalid_field = Status::INVALID_FIELD.dnr();
        let attrib = sqe.cdw10.get() as u8 & 0x7;
        let wide = || match attrib {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(invalid_field),
        };
        Ok(match sqe.nsid.get() as u8 {
            fctype::PROPERTY_SET => Self::PropertySet {
                property: Property(sqe.cdw11.get()),
                wide: wide()?,
                value: u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32,
            },
            fctype::CONNECT => {
                let recfmt = sqe.cdw10.get() as u16;
                if recfmt != 0 {
                    return Err(Status::CONNECT_INCOMPATIBLE_FORMAT.dnr());
                }
                Self::Connect(Connect {
                    qid: (sqe.cdw10.get() >> 16) as u16,
                    sqsize_z: sqe.cdw11.get() as u16,
                    cattr: (sqe.cdw11.get() >> 16) as u8,
                    kato_ms: sqe.cdw12.get(),
                })
            }
            fctype::PROPERTY_GET => Self::PropertyGet {
                property: Property(sqe.cdw11.get()),
                wide: wide()?,
            },
            fctype::DISCONNECT => {
                if sqe.cdw10.get() as u16 != 0 {
                    return Err(Status::CONNECT_INCOMPATIBLE_FORMAT.dnr());
                }
                Self::Disconnect
            }
            _ => return Err(Status::INVALID_OPCODE.dnr()),
        })
    }

    /// The entry that asks for it, with CID 0. A Connect's data pointer is the submitter's to set.
    #[must_use]
    pub fn to_sqe(self) -> Sqe {
        let entry = |fctype: u8| Sqe::new(AdminOpcode::FABRICS.0, u32::from(fctype));
        match self {
            Self::PropertySet {
                property,
                wide,
                value,
            } => Sqe {
                cdw10: U32::new(u32::from(wide)),
                cdw11: U32::new(property.0),
                cdw12: U32::new(value as u32),
                cdw13: U32::new((value >> 32) as u32),
                ..entry(fctype::PROPERTY_SET)
            },
            Self::Connect(connect) => Sqe {
                cdw10: U32::new(u32::from(connect.qid) << 16),
                cdw11: U32::new(u32::from(connect.sqsize_z) | u32::from(connect.cattr) << 16),
                cdw12: U32::new(connect.kato_ms),
                ..entry(fctype::CONNECT)
            },
            Self::PropertyGet { property, wide } => Sqe {
                cdw10: U32::new(u32::from(wide)),
                cdw11: U32::new(property.0),
                ..entry(fctype::PROPERTY_GET)
            },
            Self::Disconnect => entry(fctype::DISCONNECT),
        }
    }
}

/// The Controller ID that asks for any (dynamic model).
pub const CNTLID_DYNAMIC: u16 = 0xffff;

/// Data of a Connect.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ConnectData {
    /// Host Identifier.
    pub hostid: [u8; 16],
    /// Controller ID: [`CNTLID_DYNAMIC`] to make one, the one made for an I/O queue.
    pub cntlid: U16,
    /// Reserved.
    pub rsvd18: [u8; 238],
    /// Subsystem NQN, NUL-padded.
    pub subnqn: [u8; 256],
    /// Host NQN, NUL-padded.
    pub hostnqn: [u8; 256],
    /// Reserved.
    pub rsvd768: [u8; 256],
}

const _: () = assert!(size_of::<ConnectData>() == 1024);
const _: () = assert!(offset_of!(ConnectData, subnqn) == 256);
const _: () = assert!(offset_of!(ConnectData, hostnqn) == 512);

impl ConnectData {
    /// Data of a Connect.
    #[must_use]
    pub fn new(hostid: HostId, cntlid: u16, subnqn: &Nqn, hostnqn: &Nqn) -> Self {
        let mut data = Self::new_zeroed();
        data.hostid = hostid.0;
        data.cntlid = U16::new(cntlid);
        data.subnqn[..subnqn.as_str().len()].copy_from_slice(subnqn.as_str().as_bytes());
        data.hostnqn[..hostnqn.as_str().len()].copy_from_slice(hostnqn.as_str().as_bytes());
        data
    }
}

/// Dword 0 of a Connect that failed with Connect Invalid Parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidConnectParameter {
    /// Byte offset into the submission queue entry.
    Entry(u16),
    /// Byte offset into the data.
    Data(u16),
}

impl InvalidConnectParameter {
    /// The host's Controller ID.
    pub const CNTLID: Self = Self::Data(16);
    /// The Subsystem NQN.
    pub const SUBNQN: Self = Self::Data(256);
    /// The Host NQN.
    pub const HOSTNQN: Self = Self::Data(512);
    /// The queue's identifier.
    pub const QID: Self = Self::Entry(42);
    /// The queue's size.
    pub const SQSIZE: Self = Self::Entry(44);

    /// IPO in bits 15:0, IATTR in bit 16.
    #[must_use]
    pub fn to_dw0(self) -> u32 {
        match self {
            Self::Entry(offset) => u32::from(offset),
            Self::Data(offset) => u32::from(offset) | 1 << 16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(fctype: u8, from_40: &[u8]) -> Sqe {
        let mut bytes = [0; 64];
        bytes[0] = 0x7f;
        bytes[1] = 0x40;
        bytes[4] = fctype;
        bytes[40..40 + from_40.len()].copy_from_slice(from_40);
        Sqe::read_from_bytes(&bytes).unwrap()
    }

    #[test]
    fn a_connect_reads_as_the_specification_writes_it() {
        // RECFMT 0, QID 1, SQSIZE 127, CATTR 4, reserved, KATO 5000 ms.
        let sqe = entry(0x01, &[0, 0, 1, 0, 127, 0, 4, 0, 0x88, 0x13, 0, 0]);
        let connect = Connect {
            qid: 1,
            sqsize_z: 127,
            cattr: 4,
            kato_ms: 5000,
        };
        assert_eq!(FabricsCommand::parse(&sqe), Ok(FabricsCommand::Connect(connect)));
        assert_eq!(FabricsCommand::Connect(connect).to_sqe(), sqe);
        assert!(connect.disables_sq_flow_control());
        let other_format = entry(0x01, &[1, 0]);
        assert_eq!(
            FabricsCommand::parse(&other_format),
            Err(Status::CONNECT_INCOMPATIBLE_FORMAT.dnr())
        );
    }

    #[test]
    fn properties_carry_size_offset_and_value() {
        let set = entry(
            0x00,
            &[0, 0, 0, 0, 0x14, 0, 0, 0, 0x01, 0x00, 0x46, 0, 0, 0, 0, 0],
        );
        let command = FabricsCommand::PropertySet {
            property: Property::CC,
            wide: false,
            value: 0x0046_0001,
        };
        assert_eq!(FabricsCommand::parse(&set), Ok(command));
        assert_eq!(command.to_sqe(), set);
        let get = entry(0x04, &[1, 0, 0, 0, 0, 0, 0, 0]);
        let command = FabricsCommand::PropertyGet {
            property: Property::CAP,
            wide: true,
        };
        assert_eq!(FabricsCommand::parse(&get), Ok(command));
        assert_eq!(command.to_sqe(), get);
        assert_eq!(
            FabricsCommand::parse(&entry(0x04, &[2])),
            Err(Status::INVALID_FIELD.dnr())
        );
    }

    #[test]
    fn connect_data_holds_identities_at_their_offsets() {
        let (subnqn, hostnqn): (Nqn, Nqn) = ("nqn.s".parse().unwrap(), "nqn.h".parse().unwrap());
        let data = ConnectData::new(HostId([9; 16]), CNTLID_DYNAMIC, &subnqn, &hostnqn);
        let bytes = data.as_bytes();
        assert_eq!(
            &bytes[..18],
            &[9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 0xff, 0xff]
        );
        assert_eq!(&bytes[256..262], b"nqn.s\0");
        assert_eq!(&bytes[512..518], b"nqn.h\0");
        assert_eq!(Nqn::from_field(&data.subnqn), Ok(subnqn));
    }

    #[test]
    fn an_invalid_parameter_says_where() {
        assert_eq!(InvalidConnectParameter::SUBNQN.to_dw0(), 0x0001_0100);
        assert_eq!(InvalidConnectParameter::QID.to_dw0(), 42);
    }

    #[test]
    fn authentication_is_not_a_command_we_know() {
        assert_eq!(
            FabricsCommand::parse(&entry(0x05, &[])),
            Err(Status::INVALID_OPCODE.dnr())
        );
    }
}
