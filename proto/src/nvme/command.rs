//! Commands: what a submission queue entry asks for, typed, and the entry that asks for it.
//!
//! [`AdminCommand::parse`] and [`NvmCommand::parse`] are the only places that read command dwords; a value that
//! they refuse becomes the status to answer with. The functions of [`submit`] are the host's side.

use super::feature::FeatureId;
use super::opcode::{AdminOpcode, NvmOpcode};
use super::reservation::{AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationType};
use super::sqe::Sqe;
use super::status::Status;
use crate::units::{BlockCount, Lba, LbaRange};

pub mod submit;

/// Controller or Namespace Structure (CNS): what an Identify returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cns(pub u8);

impl Cns {
    /// Identify Namespace.
    pub const NAMESPACE: Self = Self(0x00);
    /// Identify Controller.
    pub const CONTROLLER: Self = Self(0x01);
    /// Active Namespace ID list.
    pub const ACTIVE_NAMESPACES: Self = Self(0x02);
    /// Namespace Identification Descriptor list.
    pub const NAMESPACE_DESCRIPTORS: Self = Self(0x03);
    /// I/O Command Set specific Identify Namespace.
    pub const NAMESPACE_CSI: Self = Self(0x05);
    /// I/O Command Set specific Identify Controller.
    pub const CONTROLLER_CSI: Self = Self(0x06);
    /// I/O Command Set specific Active Namespace ID list.
    pub const ACTIVE_NAMESPACES_CSI: Self = Self(0x07);
    /// I/O Command Set independent Identify Namespace.
    pub const NAMESPACE_INDEPENDENT: Self = Self(0x08);
    /// I/O Command Set data structure.
    pub const COMMAND_SETS: Self = Self(0x1c);
}

/// Log Page Identifier (LID).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogPageId(pub u8);

impl LogPageId {
    /// Supported Log Pages.
    pub const SUPPORTED: Self = Self(0x00);
    /// Error Information.
    pub const ERROR: Self = Self(0x01);
    /// SMART / Health Information.
    pub const SMART: Self = Self(0x02);
    /// Firmware Slot Information.
    pub const FIRMWARE_SLOT: Self = Self(0x03);
    /// Changed Namespace List.
    pub const CHANGED_NAMESPACES: Self = Self(0x04);
    /// Commands Supported and Effects.
    pub const COMMANDS_SUPPORTED: Self = Self(0x05);
    /// Asymmetric Namespace Access.
    pub const ANA: Self = Self(0x0c);
    /// Discovery.
    pub const DISCOVERY: Self = Self(0x70);
    /// Reservation Notification.
    pub const RESERVATION_NOTIFICATION: Self = Self(0x80);
}

/// A parsed Get Log Page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetLogPage {
    /// Which page.
    pub lid: LogPageId,
    /// Log Specific Parameter.
    pub lsp: u8,
    /// Retain Asynchronous Event: reading does not clear the event.
    pub retain_event: bool,
    /// Bytes asked for.
    pub bytes: u64,
    /// Byte offset into the page; a multiple of 4.
    pub offset: u64,
}

/// An Admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminCommand {
    /// Get Log Page.
    GetLogPage(GetLogPage),
    /// Identify.
    Identify {
        /// What to return.
        cns: Cns,
        /// Controller Identifier, for the lists that take one.
        cntid: u16,
        /// Command Set Identifier, for the structures that take one.
        csi: u8,
        /// Namespace, or where a list begins.
        nsid: u32,
    },
    /// Abort a command, best effort.
    Abort {
        /// Its queue.
        sqid: u16,
        /// Its identifier.
        cid: u16,
    },
    /// Set Features.
    SetFeatures {
        /// Which.
        fid: FeatureId,
        /// Whether the value is to survive a reset.
        save: bool,
        /// Namespace, for the features that have one.
        nsid: u32,
        /// The value, as dword 11 carries it.
        value: u32,
    },
    /// Get Features.
    GetFeatures {
        /// Which.
        fid: FeatureId,
        /// Select: 0 current, 1 default, 2 saved, 3 supported capabilities.
        sel: u8,
        /// Namespace, for the features that have one.
        nsid: u32,
        /// Dword 11, for the features that take one.
        value: u32,
    },
    /// Asynchronous Event Request.
    AsyncEventRequest,
    /// Keep Alive.
    KeepAlive,
}

impl AdminCommand {
    /// Reads an Admin command.
    ///
    /// # Errors
    /// The status to answer with.
    pub fn parse(sqe: &Sqe) -> Result<Self, Status> {
        let (cdw10, cdw11) = (sqe.cdw10.get(), sqe.cdw11.get());
        let nsid = sqe.nsid.get();
        Ok(match AdminOpcode(sqe.opcode) {
            AdminOpcode::GET_LOG_PAGE => {
                let numd_z = u64::from(cdw10 >> 16) | u64::from(cdw11 & 0xffff) << 16;
                let offset = u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32;
                if offset % 4 != 0 {
                    return Err(Status::INVALID_FIELD.dnr());
                }
                Self::GetLogPage(GetLogPage {
                    lid: LogPageId(cdw10 as u8),
                    lsp: (cdw10 >> 8) as u8 & 0x7f,
                    retain_event: cdw10 & 1 << 15 != 0,
                    bytes: (numd_z + 1) * 4,
                    offset,
                })
            }
            AdminOpcode::IDENTIFY => Self::Identify {
                cns: Cns(cdw10 as u8),
                cntid: (cdw10 >> 16) as u16,
                csi: (cdw11 >> 24) as u8,
                nsid,
            },
            AdminOpcode::ABORT => Self::Abort {
                sqid: cdw10 as u16,
                cid: (cdw10 >> 16) as u16,
            },
            AdminOpcode::SET_FEATURES => Self::SetFeatures {
                fid: FeatureId(cdw10 as u8),
                save: cdw10 >> 31 != 0,
                nsid,
                value: cdw11,
            },
            AdminOpcode::GET_FEATURES => Self::GetFeatures {
                fid: FeatureId(cdw10 as u8),
                sel: (cdw10 >> 8) as u8 & 0x7,
                nsid,
                value: cdw11,
            },
            AdminOpcode::ASYNC_EVENT_REQUEST => Self::AsyncEventRequest,
            AdminOpcode::KEEP_ALIVE => Self::KeepAlive,
            _ => return Err(Status::INVALID_OPCODE.dnr()),
        })
    }
}

/// The blocks of a Read, Write, Compare, Verify or Write Zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// Starting LBA, unchecked.
    pub start: Lba,
    /// One-based.
    pub count: BlockCount,
}

impl BlockRange {
    fn parse(sqe: &Sqe) -> Self {
        Self {
            start: Lba(sqe.cdw10_11()),
            count: BlockCount::from_nlb_z(sqe.cdw12.get() as u16),
        }
    }

    /// As the block contract takes it.
    #[must_use]
    pub fn lba_range(self) -> LbaRange {
        LbaRange {
            start: self.start,
            count: u64::from(self.count.get()),
        }
    }
}

/// An I/O command of the NVM command set, reservations included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NvmCommand {
    /// Flush.
    Flush,
    /// Write.
    Write {
        /// Where.
        range: BlockRange,
        /// Force Unit Access.
        fua: bool,
    },
    /// Read. FUA has no effect: what was acknowledged is what is read.
    Read {
        /// Where.
        range: BlockRange,
    },
    /// Compare.
    Compare {
        /// Where.
        range: BlockRange,
    },
    /// Write Zeroes.
    WriteZeroes {
        /// Where.
        range: BlockRange,
        /// Deallocate (DEAC).
        deallocate: bool,
        /// Force Unit Access.
        fua: bool,
    },
    /// Dataset Management.
    DatasetManagement {
        /// Ranges in the data, 1 to 256.
        ranges: u16,
        /// Attribute – Deallocate. Without it the command is a hint only.
        deallocate: bool,
    },
    /// Verify.
    Verify {
        /// Where.
        range: BlockRange,
    },
    /// Reservation Register.
    ReservationRegister {
        /// RREGA.
        action: RegisterAction,
        /// Ignore Existing Key.
        ignore_existing_key: bool,
        /// CPTPL.
        persist: PersistChange,
    },
    /// Reservation Report.
    ReservationReport {
        /// Bytes asked for.
        bytes: u64,
        /// Extended Data Structure: 128-bit host identifiers.
        extended: bool,
    },
    /// Reservation Acquire.
    ReservationAcquire {
        /// RACQA.
        action: AcquireAction,
        /// RTYPE.
        rtype: ReservationType,
    },
    /// Reservation Release.
    ReservationRelease {
        /// RRELA.
        action: ReleaseAction,
        /// RTYPE; `None` for 0 or an unknown value, which only Clear may carry.
        rtype: Option<ReservationType>,
    },
}

impl NvmCommand {
    /// Reads an I/O command.
    ///
    /// # Errors
    /// The status to answer with.
    pub fn parse(sqe: &Sqe) -> Result<Self, Status> {
        let (cdw10, cdw11, cdw12) = (sqe.cdw10.get(), sqe.cdw11.get(), sqe.cdw12.get());
        let invalid_field = Status::INVALID_FIELD.dnr();
        let fua = cdw12 & 1 << 30 != 0;
        let ignore_existing_key = cdw10 & 1 << 3 != 0;
        let rtype = ReservationType::from_wire((cdw10 >> 8) as u8);
        // Namespaces have no protection information: PRACT and PRCHK (bits 29:26) have nothing to check, as
        // the NVM command set says for them.
        let range = BlockRange::parse(sqe);
        Ok(match NvmOpcode(sqe.opcode) {
            NvmOpcode::FLUSH => Self::Flush,
            NvmOpcode::WRITE => Self::Write { range, fua },
            NvmOpcode::READ => Self::Read { range },
            NvmOpcode::COMPARE => Self::Compare { range },
            NvmOpcode::WRITE_ZEROES => Self::WriteZeroes {
                range,
                deallocate: cdw12 & 1 << 25 != 0,
                fua,
            },
            NvmOpcode::DATASET_MANAGEMENT => Self::DatasetManagement {
                ranges: (cdw10 & 0xff) as u16 + 1,
                deallocate: cdw11 & 1 << 2 != 0,
            },
            NvmOpcode::VERIFY => Self::Verify { range },
            NvmOpcode::RESERVATION_REGISTER => Self::ReservationRegister {
                action: match cdw10 & 0x7 {
                    0 => RegisterAction::Register,
                    1 => RegisterAction::Unregister,
                    2 => RegisterAction::Replace,
                    _ => return Err(invalid_field),
                },
                ignore_existing_key,
                persist: match cdw10 >> 30 {
                    0 => PersistChange::Keep,
                    2 => PersistChange::Clear,
                    3 => PersistChange::Set,
                    _ => return Err(invalid_field),
                },
            },
            NvmOpcode::RESERVATION_REPORT => Self::ReservationReport {
                bytes: (u64::from(cdw10) + 1) * 4,
                extended: cdw11 & 1 != 0,
            },
            // Acquire and Release have no Ignore Existing Key: the bit is refused.
            NvmOpcode::RESERVATION_ACQUIRE => {
                if ignore_existing_key {
                    return Err(invalid_field);
                }
                Self::ReservationAcquire {
                    action: match cdw10 & 0x7 {
                        0 => AcquireAction::Acquire,
                        1 => AcquireAction::Preempt,
                        2 => AcquireAction::PreemptAndAbort,
                        _ => return Err(invalid_field),
                    },
                    rtype: rtype.ok_or(invalid_field)?,
                }
            }
            NvmOpcode::RESERVATION_RELEASE => {
                if ignore_existing_key {
                    return Err(invalid_field);
                }
                let action = match cdw10 & 0x7 {
                    0 => ReleaseAction::Release,
                    1 => ReleaseAction::Clear,
                    _ => return Err(invalid_field),
                };
                Self::ReservationRelease { action, rtype }
            }
            _ => return Err(Status::INVALID_OPCODE.dnr()),
        })
    }
}

/// One range of a Dataset Management.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
    zerocopy::Unaligned,
)]
#[repr(C)]
pub struct DsmRange {
    /// Context Attributes: hints, not used.
    pub cattr: zerocopy::little_endian::U32,
    /// Length in logical blocks, one-based; 0 is an empty range.
    pub nlb: zerocopy::little_endian::U32,
    /// Starting LBA.
    pub slba: zerocopy::little_endian::U64,
}

const _: () = assert!(size_of::<DsmRange>() == 16);

/// Most ranges of one Dataset Management.
pub const DSM_RANGES_MAX: usize = 256;

#[cfg(test)]
mod tests;
