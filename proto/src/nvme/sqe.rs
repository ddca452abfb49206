//! The submission queue entry (Base Specification, "Submission Queue Entry").
//!
//! This is the raw entry. A controller parses it into [`super::command`]; a host makes one with the
//! constructors there, which fill the same fields.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::sgl::{DataPointer, SglDescriptor};
use super::status::Status;

/// A command as it is submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Sqe {
    /// Opcode.
    pub opcode: u8,
    /// FUSE in bits 1:0, PSDT in bits 7:6.
    pub flags: u8,
    /// Command Identifier, unique among the commands in flight on the queue.
    pub cid: U16,
    /// Namespace Identifier.
    pub nsid: U32,
    /// Command dword 2.
    pub cdw2: U32,
    /// Command dword 3.
    pub cdw3: U32,
    /// Metadata Pointer.
    pub mptr: U64,
    /// Data Pointer: on fabrics always one SGL descriptor.
    pub sgl1: SglDescriptor,
    /// Command dword 10.
    pub cdw10: U32,
    /// Command dword 11.
    pub cdw11: U32,
    /// Command dword 12.
    pub cdw12: U32,
    /// Command dword 13.
    pub cdw13: U32,
    /// Command dword 14.
    pub cdw14: U32,
    /// Command dword 15.
    pub cdw15: U32,
}

const _: () = assert!(size_of::<Sqe>() == 64);
const _: () = assert!(offset_of!(Sqe, nsid) == 4);
const _: () = assert!(offset_of!(Sqe, mptr) == 16);
const _: () = assert!(offset_of!(Sqe, sgl1) == 24);
const _: () = assert!(offset_of!(Sqe, cdw10) == 40);
const _: () = assert!(offset_of!(Sqe, cdw15) == 60);

/// FUSE, the two bits that join a command to its neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fuse {
    /// A command of its own.
    Normal,
    /// First of a fused pair.
    First,
    /// Second of a fused pair.
    Second,
}

impl Sqe {
    /// PSDT 01b: the data pointer is an SGL, as fabrics require of every command.
    const PSDT_SGL: u8 = 0b01 << 6;

    /// An entry with an opcode, a namespace and no data. CID 0: the queue pair that submits it sets its own.
    #[must_use]
    pub fn new(opcode: u8, nsid: u32) -> Self {
        Self {
            opcode,
            flags: Self::PSDT_SGL,
            nsid: U32::new(nsid),
            ..Self::new_zeroed()
        }
    }

    /// The same entry with another data pointer.
    #[must_use]
    pub fn with_data(mut self, sgl: SglDescriptor) -> Self {
        self.sgl1 = sgl;
        self
    }

    /// The same entry as a part of a fused pair.
    #[must_use]
    pub fn with_fuse(mut self, fuse: Fuse) -> Self {
        let bits = match fuse {
            Fuse::Normal => 0b00,
            Fuse::First => 0b01,
            Fuse::Second => 0b10,
        };
        self.flags = (self.flags & !0b11) | bits;
        self
    }

    /// FUSE.
    ///
    /// # Errors
    /// [`Status::INVALID_FIELD`] for the reserved value.
    pub fn fuse(&self) -> Result<Fuse, Status> {
        match self.flags & 0b11 {
            0b00 => Ok(Fuse::Normal),
            0b01 => Ok(Fuse::First),
            0b10 => Ok(Fuse::Second),
            _ => Err(Status::INVALID_FIELD.dnr()),
        }
    }

    /// Where the data is.
    ///
    /// # Errors
    /// A status where the descriptor is of a type that NVMe/TCP does not use.
    pub fn data_pointer(&self) -> Result<DataPointer, Status> {
        self.sgl1.data_pointer()
    }

    /// PRP Entries 1 and 2: the data pointer of a memory-based transport, where PSDT says so.
    #[must_use]
    pub fn prps(&self) -> (u64, u64) {
        let second = U64::read_from_bytes(&self.sgl1.as_bytes()[8..]).expect("half of 16 bytes");
        (self.sgl1.address.get(), second.get())
    }

    /// What the data pointer is on a memory-based transport (PSDT).
    ///
    /// # Errors
    /// [`Status::INVALID_FIELD`] for the reserved value.
    pub fn uses_sgl(&self) -> Result<bool, Status> {
        match self.flags >> 6 {
            0b00 => Ok(false),
            0b01 | 0b10 => Ok(true),
            _ => Err(Status::INVALID_FIELD.dnr()),
        }
    }

    /// Dwords 10 and 11 as one number: the starting LBA of an NVM command.
    #[must_use]
    pub fn cdw10_11(&self) -> u64 {
        u64::from(self.cdw10.get()) | u64::from(self.cdw11.get()) << 32
    }

    /// Sets dwords 10 and 11.
    #[must_use]
    pub fn with_cdw10_11(mut self, value: u64) -> Self {
        self.cdw10 = U32::new(value as u32);
        self.cdw11 = U32::new((value >> 32) as u32);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let mut bytes = [0; 64];
        bytes[0] = 0x01;
        bytes[1] = 0x41; // PSDT SGL, first of a fused pair
        bytes[2..4].copy_from_slice(&[0x34, 0x12]);
        bytes[4..8].copy_from_slice(&[0x07, 0, 0, 0]);
        bytes[32..36].copy_from_slice(&[0x00, 0x10, 0, 0]);
        bytes[39] = 0x5a;
        bytes[40..48].copy_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
        let sqe = Sqe::read_from_bytes(&bytes).unwrap();
        assert_eq!((sqe.opcode, sqe.cid.get(), sqe.nsid.get()), (1, 0x1234, 7));
        assert_eq!(sqe.fuse(), Ok(Fuse::First));
        assert_eq!(sqe.data_pointer(), Ok(DataPointer::Transport { length: 4096 }));
        assert_eq!(sqe.cdw10_11(), 0x2_0000_0001);
        let built = Sqe {
            cid: U16::new(0x1234),
            ..Sqe::new(1, 7)
        }
        .with_data(SglDescriptor::transport(4096))
        .with_fuse(Fuse::First)
        .with_cdw10_11(0x2_0000_0001);
        assert_eq!(built.as_bytes(), bytes);
    }
}
