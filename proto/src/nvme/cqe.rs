//! The completion queue entry (Base Specification, "Common Completion Queue Entry"; fabrics, "Response
//! Capsule").

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::status::Status;

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Cqe {
    /// Dwords 0 and 1: the command's result.
    pub result: U64,
    /// SQ Head Pointer; `0xffff` where SQ flow control is disabled.
    pub sqhd: U16,
    /// SQ Identifier; reserved on fabrics.
    pub sqid: U16,
    /// Command Identifier.
    pub cid: U16,
    /// Status in bits 15:1; bit 0 is the phase tag, 0 on fabrics.
    pub status: U16,
}

const _: () = assert!(size_of::<Cqe>() == 16);
const _: () = assert!(offset_of!(Cqe, sqhd) == 8);
const _: () = assert!(offset_of!(Cqe, cid) == 12);
const _: () = assert!(offset_of!(Cqe, status) == 14);

impl Cqe {
    /// A completion of `cid`.
    #[must_use]
    pub fn new(cid: u16, sqhd: u16, status: Status, result: u64) -> Self {
        Self {
            result: U64::new(result),
            sqhd: U16::new(sqhd),
            sqid: U16::ZERO,
            cid: U16::new(cid),
            status: U16::new(status.0 << 1),
        }
    }

    /// How the command ended.
    #[must_use]
    pub fn status(&self) -> Status {
        Status(self.status.get() >> 1)
    }

    /// Dword 0 of the result.
    #[must_use]
    pub fn dw0(&self) -> u32 {
        (self.result.get() & 0xffff_ffff) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_reads_as_the_specification_writes_it() {
        let bytes = [
            0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0x05, 0x00, 0, 0, 0x22, 0x11, 0x06, 0x81,
        ];
        let cqe = Cqe::new(0x1122, 5, Status::RESERVATION_CONFLICT.dnr(), 0x1234_5678);
        // SC 83h in bits 8:1 and DNR in bit 15 of the last word: 0x8106.
        assert_eq!(cqe.as_bytes(), bytes);
        let read = Cqe::read_from_bytes(&bytes).unwrap();
        assert_eq!(read.status(), Status::RESERVATION_CONFLICT.dnr());
        assert_eq!(read.dw0(), 0x1234_5678);
    }
}
