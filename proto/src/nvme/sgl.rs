//! Scatter Gather List descriptors (Base Specification, "Scatter Gather List"), as far as NVMe/TCP uses them:
//! one descriptor, in the submission queue entry.

use std::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::status::Status;

/// An SGL descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SglDescriptor {
    /// An address, or an offset into the capsule's data for [`SglDescriptor::IN_CAPSULE`].
    pub address: U64,
    /// Length in bytes.
    pub length: U32,
    /// Reserved.
    pub rsvd12: [u8; 3],
    /// SGL Identifier: type in bits 7:4, sub type in bits 3:0.
    pub identifier: u8,
}

const _: () = assert!(size_of::<SglDescriptor>() == 16);
const _: () = assert!(offset_of!(SglDescriptor, length) == 8);
const _: () = assert!(offset_of!(SglDescriptor, identifier) == 15);

/// Where a command's data is, as far as a fabrics command can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPointer {
    /// In the capsule, at `offset` from the start of the in-capsule data.
    InCapsule {
        /// Bytes from the start of the capsule's data.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Moved by the transport: C2HData or R2T and H2CData.
    Transport {
        /// Bytes.
        length: u32,
    },
}

impl DataPointer {
    /// Bytes that the command offers or accepts.
    #[must_use]
    pub fn length(self) -> u32 {
        match self {
            Self::InCapsule { length, .. } | Self::Transport { length } => length,
        }
    }
}

impl SglDescriptor {
    /// SGL Data Block descriptor, sub type Offset: data in the capsule.
    pub const IN_CAPSULE: u8 = 0x01;
    /// Transport SGL Data Block descriptor, sub type NVMe Transport Specific.
    pub const TRANSPORT: u8 = 0x5a;

    /// SGL Data Block descriptor, sub type Address: data in memory, as the next two.
    pub const DATA_BLOCK: u8 = 0x00;
    /// SGL Segment descriptor: where more descriptors are, the last of which is a segment descriptor again.
    pub const SEGMENT: u8 = 0x20;
    /// SGL Last Segment descriptor: where the last descriptors are.
    pub const LAST_SEGMENT: u8 = 0x30;

    /// No data.
    pub const NONE: Self = Self {
        address: U64::ZERO,
        length: U32::ZERO,
        rsvd12: [0; 3],
        identifier: 0,
    };

    /// Data in the capsule, from its start.
    #[must_use]
    pub fn in_capsule(length: u32) -> Self {
        Self {
            length: U32::new(length),
            identifier: Self::IN_CAPSULE,
            ..Self::NONE
        }
    }

    /// Data that the transport moves.
    #[must_use]
    pub fn transport(length: u32) -> Self {
        Self {
            length: U32::new(length),
            identifier: Self::TRANSPORT,
            ..Self::NONE
        }
    }

    /// What the descriptor says.
    ///
    /// # Errors
    /// [`Status::INVALID_SGL_TYPE`] for a type that NVMe/TCP does not use. An all-zero descriptor is a
    /// transport block of no bytes, as a command without data carries it.
    pub fn data_pointer(&self) -> Result<DataPointer, Status> {
        let length = self.length.get();
        match self.identifier {
            Self::IN_CAPSULE => Ok(DataPointer::InCapsule {
                offset: self.address.get(),
                length,
            }),
            Self::TRANSPORT => Ok(DataPointer::Transport { length }),
            _ if length == 0 => Ok(DataPointer::Transport { length: 0 }),
            _ => Err(Status::INVALID_SGL_TYPE.dnr()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_descriptors_read_as_the_specification_writes_them() {
        let in_capsule = [0, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x10, 0, 0, 0, 0, 0, 0x01];
        assert_eq!(SglDescriptor::in_capsule(4096).as_bytes(), in_capsule);
        let transport = [0, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x00, 0x10, 0, 0, 0, 0, 0x5a];
        assert_eq!(SglDescriptor::transport(1 << 20).as_bytes(), transport);
        assert_eq!(
            SglDescriptor::read_from_bytes(&transport).unwrap().data_pointer(),
            Ok(DataPointer::Transport { length: 1 << 20 })
        );
    }

    #[test]
    fn a_keyed_block_is_not_for_tcp() {
        let keyed = SglDescriptor {
            identifier: 0x40,
            ..SglDescriptor::transport(8)
        };
        assert_eq!(keyed.data_pointer(), Err(Status::INVALID_SGL_TYPE.dnr()));
    }
}
