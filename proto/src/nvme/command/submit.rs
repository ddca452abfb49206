//! The host's side: entries that ask for each command.
//!
//! Each has CID 0 and no data pointer; the queue pair that submits it sets both, since only it knows what fits
//! into a capsule.

use zerocopy::little_endian::U32;

use super::{Cns, LogPageId};
use crate::nvme::feature::FeatureId;
use crate::nvme::opcode::{AdminOpcode, NvmOpcode};
use crate::nvme::reservation::{
    AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationType,
};
use crate::nvme::sqe::Sqe;
use crate::units::{BlockCount, Lba};

/// Identify.
#[must_use]
pub fn identify(cns: Cns, nsid: u32) -> Sqe {
    Sqe {
        cdw10: U32::new(u32::from(cns.0)),
        ..Sqe::new(AdminOpcode::IDENTIFY.0, nsid)
    }
}

/// Get Log Page of `bytes` (a multiple of 4, at least 4) from `offset`.
#[must_use]
pub fn get_log_page(lid: LogPageId, nsid: u32, lsp: u8, retain_event: bool, offset: u64, bytes: u32) -> Sqe {
    let numd_z = (bytes / 4).saturating_sub(1);
    Sqe {
        cdw10: U32::new(
            u32::from(lid.0)
                | u32::from(lsp & 0x7f) << 8
                | u32::from(retain_event) << 15
                | (numd_z & 0xffff) << 16,
        ),
        cdw11: U32::new(numd_z >> 16),
        cdw12: U32::new(offset as u32),
        cdw13: U32::new((offset >> 32) as u32),
        ..Sqe::new(AdminOpcode::GET_LOG_PAGE.0, nsid)
    }
}

/// Abort.
#[must_use]
pub fn abort(sqid: u16, cid: u16) -> Sqe {
    Sqe {
        cdw10: U32::new(u32::from(sqid) | u32::from(cid) << 16),
        ..Sqe::new(AdminOpcode::ABORT.0, 0)
    }
}

/// Set Features with a value in dword 11.
#[must_use]
pub fn set_features(fid: FeatureId, nsid: u32, value: u32) -> Sqe {
    Sqe {
        cdw10: U32::new(u32::from(fid.0)),
        cdw11: U32::new(value),
        ..Sqe::new(AdminOpcode::SET_FEATURES.0, nsid)
    }
}

/// Get Features, the current value.
#[must_use]
pub fn get_features(fid: FeatureId, nsid: u32) -> Sqe {
    Sqe {
        cdw10: U32::new(u32::from(fid.0)),
        ..Sqe::new(AdminOpcode::GET_FEATURES.0, nsid)
    }
}

/// Asynchronous Event Request.
#[must_use]
pub fn async_event_request() -> Sqe {
    Sqe::new(AdminOpcode::ASYNC_EVENT_REQUEST.0, 0)
}

/// Keep Alive.
#[must_use]
pub fn keep_alive() -> Sqe {
    Sqe::new(AdminOpcode::KEEP_ALIVE.0, 0)
}

fn blocks(opcode: NvmOpcode, nsid: u32, start: Lba, count: BlockCount, cdw12_flags: u32) -> Sqe {
    Sqe {
        cdw12: U32::new(u32::from(count.to_nlb_z()) | cdw12_flags),
        ..Sqe::new(opcode.0, nsid).with_cdw10_11(start.0)
    }
}

const FUA: u32 = 1 << 30;
const DEAC: u32 = 1 << 25;

fn flag(set: bool, bit: u32) -> u32 {
    if set { bit } else { 0 }
}

/// Flush.
#[must_use]
pub fn flush(nsid: u32) -> Sqe {
    Sqe::new(NvmOpcode::FLUSH.0, nsid)
}

/// Read.
#[must_use]
pub fn read(nsid: u32, start: Lba, count: BlockCount) -> Sqe {
    blocks(NvmOpcode::READ, nsid, start, count, 0)
}

/// Write.
#[must_use]
pub fn write(nsid: u32, start: Lba, count: BlockCount, fua: bool) -> Sqe {
    blocks(NvmOpcode::WRITE, nsid, start, count, flag(fua, FUA))
}

/// Compare.
#[must_use]
pub fn compare(nsid: u32, start: Lba, count: BlockCount) -> Sqe {
    blocks(NvmOpcode::COMPARE, nsid, start, count, 0)
}

/// Verify.
#[must_use]
pub fn verify(nsid: u32, start: Lba, count: BlockCount) -> Sqe {
    blocks(NvmOpcode::VERIFY, nsid, start, count, 0)
}

/// Write Zeroes.
#[must_use]
pub fn write_zeroes(nsid: u32, start: Lba, count: BlockCount, deallocate: bool, fua: bool) -> Sqe {
    blocks(
        NvmOpcode::WRITE_ZEROES,
        nsid,
        start,
        count,
        flag(deallocate, DEAC) | flag(fua, FUA),
    )
}

/// Dataset Management that deallocates `ranges` (1 to 256) ranges; the data is that many
/// [`super::DsmRange`].
#[must_use]
pub fn deallocate(nsid: u32, ranges: u16) -> Sqe {
    Sqe {
        cdw10: U32::new(u32::from(ranges.saturating_sub(1)) & 0xff),
        cdw11: U32::new(1 << 2),
        ..Sqe::new(NvmOpcode::DATASET_MANAGEMENT.0, nsid)
    }
}

/// Reservation Register; the data is a [`crate::nvme::reservation::RegisterData`].
#[must_use]
pub fn reservation_register(
    nsid: u32,
    action: RegisterAction,
    ignore_existing_key: bool,
    persist: PersistChange,
) -> Sqe {
    let rrega = match action {
        RegisterAction::Register => 0,
        RegisterAction::Unregister => 1,
        RegisterAction::Replace => 2,
    };
    let cptpl: u32 = match persist {
        PersistChange::Keep => 0,
        PersistChange::Clear => 2,
        PersistChange::Set => 3,
    };
    Sqe {
        cdw10: U32::new(rrega | u32::from(ignore_existing_key) << 3 | cptpl << 30),
        ..Sqe::new(NvmOpcode::RESERVATION_REGISTER.0, nsid)
    }
}

/// Reservation Acquire; the data is a [`crate::nvme::reservation::AcquireData`].
#[must_use]
pub fn reservation_acquire(nsid: u32, action: AcquireAction, rtype: ReservationType) -> Sqe {
    let racqa = match action {
        AcquireAction::Acquire => 0,
        AcquireAction::Preempt => 1,
        AcquireAction::PreemptAndAbort => 2,
    };
    Sqe {
        cdw10: U32::new(racqa | u32::from(rtype.to_wire()) << 8),
        ..Sqe::new(NvmOpcode::RESERVATION_ACQUIRE.0, nsid)
    }
}

/// Reservation Release; the data is a [`crate::nvme::reservation::ReleaseData`].
#[must_use]
pub fn reservation_release(nsid: u32, action: ReleaseAction, rtype: ReservationType) -> Sqe {
    let rrela = match action {
        ReleaseAction::Release => 0,
        ReleaseAction::Clear => 1,
    };
    Sqe {
        cdw10: U32::new(rrela | u32::from(rtype.to_wire()) << 8),
        ..Sqe::new(NvmOpcode::RESERVATION_RELEASE.0, nsid)
    }
}

/// Reservation Report of `bytes` (a multiple of 4), with the extended data structure.
#[must_use]
pub fn reservation_report(nsid: u32, bytes: u32) -> Sqe {
    Sqe {
        cdw10: U32::new((bytes / 4).saturating_sub(1)),
        cdw11: U32::new(1),
        ..Sqe::new(NvmOpcode::RESERVATION_REPORT.0, nsid)
    }
}
