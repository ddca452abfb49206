//! The messages of the vfio-user protocol, version 0.1: bytes to typed requests, and replies to bytes.
//!
//! Everything a client sends is parsed here once. A header that cannot be trusted ends the connection; a message with a
//! sound header and a body that makes no sense is answered with an errno, and the next one is read.
//!
//! What this does not do: it touches no file descriptor and knows nothing of NVMe.
//!
//! QEMU's `docs/interop/vfio-user.rst`; the structures inside are those of `<linux/vfio.h>`. The protocol is in the
//! byte order of the machine, which is little-endian wherever this runs.

use rustix::io::Errno;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;

/// Most data of one region access. All of a region is smaller.
pub const TRANSFER_BYTES_MAX: u32 = 32 << 10;

/// Longest message: a write of that many bytes, or that many bytes of anything else.
pub const MESSAGE_BYTES_MAX: u32 = HEADER_BYTES as u32 + 32 + TRANSFER_BYTES_MAX;

/// Most file descriptors of one message: what clients send at most.
pub const MESSAGE_FDS_MAX: usize = 16;

/// Regions of a VFIO PCI device: six BARs, ROM, configuration space, VGA.
pub const REGIONS: u32 = 9;
/// Index of BAR 0.
pub const REGION_BAR0: u32 = 0;
/// Index of the configuration space.
pub const REGION_CONFIG: u32 = 7;

/// Interrupt kinds of a VFIO PCI device: INTx, MSI, MSI-X, error, request.
pub const INTERRUPTS: u32 = 5;
/// Index of INTx.
pub const INTERRUPT_INTX: u32 = 0;
/// Index of MSI-X.
pub const INTERRUPT_MSIX: u32 = 2;
/// Index of the interrupt that tells of errors of the bus.
pub const INTERRUPT_ERROR: u32 = 3;
/// Index of the interrupt that asks for the device back.
pub const INTERRUPT_REQUEST: u32 = 4;

/// The header of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireHeader {
    id: U16,
    command: U16,
    size: U32,
    flags: U32,
    error: U32,
}

const _: () = assert!(size_of::<WireHeader>() == HEADER_BYTES);

/// Flags of a header.
mod flag {
    pub(super) const TYPE: u32 = 0xf;
    pub(super) const COMMAND: u32 = 0;
    pub(super) const REPLY: u32 = 1;
    pub(super) const NO_REPLY: u32 = 1 << 4;
    pub(super) const ERROR: u32 = 1 << 5;
}

/// Commands that are understood.
mod command {
    pub(super) const VERSION: u16 = 1;
    pub(super) const DMA_MAP: u16 = 2;
    pub(super) const DMA_UNMAP: u16 = 3;
    pub(super) const DEVICE_GET_INFO: u16 = 4;
    pub(super) const DEVICE_GET_REGION_INFO: u16 = 5;
    pub(super) const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub(super) const DEVICE_SET_IRQS: u16 = 8;
    pub(super) const REGION_READ: u16 = 9;
    pub(super) const REGION_WRITE: u16 = 10;
    pub(super) const DEVICE_RESET: u16 = 13;
    pub(super) const REGION_WRITE_MULTI: u16 = 15;
}

/// Why a connection cannot go on: where the next message begins is not known any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Shorter than its own header or longer than anything understood.
    #[error("a message of {0} bytes")]
    Size(u32),
    /// A reply, or of no known type: this side asks nothing.
    #[error("a message with flags {0:#x}, which is not a command")]
    NotACommand(u32),
}

/// The header of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    id: u16,
    command: u16,
    size: u32,
    /// The client does not want a reply.
    pub no_reply: bool,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`HeaderError`]: the connection has to end.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        let wire = WireHeader::read_from_bytes(bytes).expect("a header is 16 bytes");
        let (size, flags) = (wire.size.get(), wire.flags.get());
        if !(HEADER_BYTES as u32..=MESSAGE_BYTES_MAX).contains(&size) {
            return Err(HeaderError::Size(size));
        }
        if flags & flag::TYPE != flag::COMMAND {
            return Err(HeaderError::NotACommand(flags));
        }
        Ok(Self {
            id: wire.id.get(),
            command: wire.command.get(),
            size,
            no_reply: flags & flag::NO_REPLY != 0,
        })
    }

    /// Bytes that follow.
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        self.size as usize - HEADER_BYTES
    }

    /// The reply to this command: its header and what follows, or the header alone with an errno.
    #[must_use]
    pub fn reply(&self, outcome: Result<&[u8], Errno>) -> Vec<u8> {
        let (flags, error, body) = match outcome {
            Ok(body) => (flag::REPLY, 0, body),
            Err(errno) => (
                flag::REPLY | flag::ERROR,
                errno.raw_os_error().unsigned_abs(),
                &[][..],
            ),
        };
        let size = HEADER_BYTES + body.len();
        let header = WireHeader {
            id: self.id.into(),
            command: self.command.into(),
            size: u32::try_from(size).expect("a reply is small").into(),
            flags: flags.into(),
            error: error.into(),
        };
        let mut reply = Vec::with_capacity(size);
        reply.extend_from_slice(header.as_bytes());
        reply.extend_from_slice(body);
        reply
    }
}

/// A range of guest memory that the client offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// The device may read it.
    pub readable: bool,
    /// The device may write it.
    pub writable: bool,
    /// Where it lies in the file that came along.
    pub offset: u64,
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A write to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionWrite<'a> {
    /// Which region.
    pub region: u32,
    /// Offset into it.
    pub offset: u64,
    /// What is written.
    pub data: &'a [u8],
}

/// What a client does to an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptAction {
    /// Sets the eventfds that are signalled; without any, takes them away.
    Connect,
    /// Takes away all of the kind.
    Disable,
    /// Signals it now.
    Trigger,
    /// Holds it back.
    Mask,
    /// Lets it through again.
    Unmask,
}

/// A parsed Set IRQs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetInterrupts<'a> {
    /// Kind of interrupt.
    pub index: u32,
    /// First one.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// What is done.
    pub action: InterruptAction,
    /// Which of them are meant; `None` is all.
    pub which: Option<&'a [u8]>,
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Negotiation.
    Version {
        /// Must be 0.
        major: u16,
        /// Proposed.
        minor: u16,
    },
    /// Memory comes.
    DmaMap(DmaMap),
    /// Memory goes.
    DmaUnmap {
        /// Guest address.
        address: u64,
        /// Bytes.
        bytes: u64,
    },
    /// What the device is.
    DeviceInfo,
    /// What a region is.
    RegionInfo {
        /// Which.
        index: u32,
        /// Bytes that the client has room for.
        argsz: u32,
    },
    /// What a kind of interrupt is.
    InterruptInfo {
        /// Which.
        index: u32,
    },
    /// See [`SetInterrupts`].
    SetInterrupts(SetInterrupts<'a>),
    /// A read of a region.
    RegionRead {
        /// Which.
        region: u32,
        /// Offset into it.
        offset: u64,
        /// Bytes.
        count: u32,
    },
    /// A write.
    RegionWrite(RegionWrite<'a>),
    /// Several writes, in order.
    RegionWriteMulti(Vec<RegionWrite<'a>>),
    /// Reset of the device.
    Reset,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireVersion {
    major: U16,
    minor: U16,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireDmaMap {
    argsz: U32,
    flags: U32,
    offset: U64,
    address: U64,
    size: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireDmaUnmap {
    argsz: U32,
    flags: U32,
    address: U64,
    size: U64,
}

/// Device info, and interrupt info, which has the same shape: argsz, flags and two numbers.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireInfo {
    argsz: U32,
    flags: U32,
    first: U32,
    second: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRegionInfo {
    argsz: U32,
    flags: U32,
    index: U32,
    cap_offset: U32,
    size: U64,
    offset: U64,
}

/// The capability that says which parts of a region may be mapped, with one area.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct WireSparseMmap {
    id: U16,
    version: U16,
    next: U32,
    areas: U32,
    reserved: U32,
    offset: U64,
    size: U64,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireSetIrqs {
    argsz: U32,
    flags: U32,
    index: U32,
    start: U32,
    count: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireAccess {
    offset: U64,
    region: U32,
    count: U32,
}

impl<'a> Request<'a> {
    /// Reads the body of a command.
    ///
    /// # Errors
    /// The errno to answer with; the connection goes on.
    pub fn parse(header: &Header, body: &'a [u8]) -> Result<Self, Errno> {
        Ok(match header.command {
            command::VERSION => {
                // Version data, a JSON text, follows: nothing in it changes what this side does.
                let (version, _) = prefix::<WireVersion>(body)?;
                Self::Version {
                    major: version.major.get(),
                    minor: version.minor.get(),
                }
            }
            command::DMA_MAP => {
                let (map, _) = prefix::<WireDmaMap>(body)?;
                let flags = map.flags.get();
                Self::DmaMap(DmaMap {
                    readable: flags & 1 != 0,
                    writable: flags & 2 != 0,
                    offset: map.offset.get(),
                    address: map.address.get(),
                    bytes: map.size.get(),
                })
            }
            command::DMA_UNMAP => {
                let (unmap, _) = prefix::<WireDmaUnmap>(body)?;
                if unmap.flags.get() != 0 {
                    return Err(Errno::NOTSUP);
                }
                Self::DmaUnmap {
                    address: unmap.address.get(),
                    bytes: unmap.size.get(),
                }
            }
            command::DEVICE_GET_INFO => Self::DeviceInfo,
            command::DEVICE_GET_REGION_INFO => {
                let (info, _) = prefix::<WireRegionInfo>(body)?;
                Self::RegionInfo {
                    index: info.index.get(),
                    argsz: info.argsz.get(),
                }
            }
            command::DEVICE_GET_IRQ_INFO => Self::InterruptInfo {
                index: prefix::<WireInfo>(body)?.0.first.get(),
            },
            command::DEVICE_SET_IRQS => Self::SetInterrupts(set_interrupts(body)?),
            command::REGION_READ => {
                let (access, _) = prefix::<WireAccess>(body)?;
                let count = access.count.get();
                if count > TRANSFER_BYTES_MAX {
                    return Err(Errno::INVAL);
                }
                Self::RegionRead {
                    region: access.region.get(),
                    offset: access.offset.get(),
                    count,
                }
            }
            command::REGION_WRITE => {
                let (access, data) = prefix::<WireAccess>(body)?;
                let data = data.get(..access.count.get() as usize).ok_or(Errno::INVAL)?;
                Self::RegionWrite(RegionWrite {
                    region: access.region.get(),
                    offset: access.offset.get(),
                    data,
                })
            }
            command::REGION_WRITE_MULTI => Self::RegionWriteMulti(write_multi(body)?),
            command::DEVICE_RESET => Self::Reset,
            _ => return Err(Errno::NOSYS),
        })
    }
}

fn prefix<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(body).map_err(|_| Errno::INVAL)
}

/// Flags of Set IRQs: what the data is, and what is done with it.
mod irq_set {
    pub(super) const DATA_NONE: u32 = 1 << 0;
    pub(super) const DATA_BOOL: u32 = 1 << 1;
    pub(super) const DATA_EVENTFD: u32 = 1 << 2;
    pub(super) const DATA: u32 = DATA_NONE | DATA_BOOL | DATA_EVENTFD;
    pub(super) const ACTION_MASK: u32 = 1 << 3;
    pub(super) const ACTION_UNMASK: u32 = 1 << 4;
    pub(super) const ACTION_TRIGGER: u32 = 1 << 5;
}

fn set_interrupts(body: &[u8]) -> Result<SetInterrupts<'_>, Errno> {
    use irq_set::{ACTION_MASK, ACTION_TRIGGER, ACTION_UNMASK, DATA, DATA_BOOL, DATA_EVENTFD, DATA_NONE};
    let (set, data) = prefix::<WireSetIrqs>(body)?;
    let (flags, count) = (set.flags.get(), set.count.get());
    let action = match (flags & DATA, flags & !DATA) {
        (DATA_NONE, ACTION_TRIGGER) if count == 0 => InterruptAction::Disable,
        (DATA_EVENTFD, ACTION_TRIGGER) => InterruptAction::Connect,
        (DATA_NONE | DATA_BOOL, ACTION_TRIGGER) => InterruptAction::Trigger,
        (DATA_NONE | DATA_BOOL, ACTION_MASK) => InterruptAction::Mask,
        (DATA_NONE | DATA_BOOL, ACTION_UNMASK) => InterruptAction::Unmask,
        // Eventfds that the client would mask and unmask by: nobody uses them.
        (DATA_EVENTFD, ACTION_MASK | ACTION_UNMASK) => return Err(Errno::NOTSUP),
        _ => return Err(Errno::INVAL),
    };
    let which = (flags & DATA == DATA_BOOL)
        .then(|| data.get(..count as usize).ok_or(Errno::INVAL))
        .transpose()?;
    Ok(SetInterrupts {
        index: set.index.get(),
        start: set.start.get(),
        count,
        action,
        which,
    })
}

/// Bytes of one write among several; its data is always eight bytes long, of which the first `count` count.
const MULTI_BYTES: usize = 24;

fn write_multi(body: &[u8]) -> Result<Vec<RegionWrite<'_>>, Errno> {
    let (count, writes) = prefix::<U64>(body)?;
    let count = usize::try_from(count.get()).map_err(|_| Errno::INVAL)?;
    // Checked against what there is before anything is allocated.
    let bytes = count.checked_mul(MULTI_BYTES).ok_or(Errno::INVAL)?;
    let writes = writes.get(..bytes).ok_or(Errno::INVAL)?;
    writes
        .chunks_exact(MULTI_BYTES)
        .map(|write| {
            let (access, data) = prefix::<WireAccess>(write)?;
            let data = data.get(..access.count.get() as usize).ok_or(Errno::INVAL)?;
            Ok(RegionWrite {
                region: access.region.get(),
                offset: access.offset.get(),
                data,
            })
        })
        .collect()
}

/// Minor version of the protocol that this side knows.
const MINOR: u16 = 1;

/// The body of the reply to a negotiation: the version, at most what the client proposed, and what this side can take.
#[must_use]
pub fn version_reply(minor_proposed: u16, dma_maps_max: usize) -> Vec<u8> {
    let version = WireVersion {
        major: 0.into(),
        minor: minor_proposed.min(MINOR).into(),
    };
    let mut body = version.as_bytes().to_vec();
    let capabilities = format!(
        r#"{{"capabilities":{{"max_msg_fds":{MESSAGE_FDS_MAX},"max_data_xfer_size":{TRANSFER_BYTES_MAX},"max_dma_maps":{dma_maps_max},"pgsizes":4096,"write_multiple":true}}}}"#
    );
    body.extend_from_slice(capabilities.as_bytes());
    body.push(0);
    body
}

/// The body of the reply to Device Info: a PCI device that can be reset.
#[must_use]
pub fn device_info_reply() -> Vec<u8> {
    const RESET_AND_PCI: u32 = 0b11;
    info(RESET_AND_PCI, REGIONS, INTERRUPTS)
}

/// The body of the reply to Interrupt Info.
#[must_use]
pub fn interrupt_info_reply(index: u32, count: u32) -> Vec<u8> {
    const EVENTFD: u32 = 1 << 0;
    const MASKABLE: u32 = 1 << 1;
    const AUTOMASKED: u32 = 1 << 2;
    let flags = match index {
        INTERRUPT_INTX => EVENTFD | MASKABLE | AUTOMASKED,
        _ => EVENTFD,
    };
    info(flags, index, count)
}

fn info(flags: u32, first: u32, second: u32) -> Vec<u8> {
    WireInfo {
        argsz: (size_of::<WireInfo>() as u32).into(),
        flags: flags.into(),
        first: first.into(),
        second: second.into(),
    }
    .as_bytes()
    .to_vec()
}

/// Flags of Region Info.
mod region_flag {
    pub(super) const READ: u32 = 1 << 0;
    pub(super) const WRITE: u32 = 1 << 1;
    pub(super) const MMAP: u32 = 1 << 2;
    pub(super) const CAPABILITIES: u32 = 1 << 3;
}

/// The body of the reply to Region Info: a region that is read and written by messages, or is absent with 0 bytes.
#[must_use]
pub fn region_info_reply(index: u32, bytes: u64) -> Vec<u8> {
    let flags = if bytes > 0 {
        region_flag::READ | region_flag::WRITE
    } else {
        0
    };
    region_info(index, bytes, flags, REGION_INFO_BYTES, 0)
        .as_bytes()
        .to_vec()
}

/// The same for a region of which `mapped` may be mapped, at the same offsets of the file that goes with it. Whoever has
/// less room for it than [`MAPPED_REGION_INFO_BYTES`] gets what says so, and asks again. That has no capability yet: QEMU
/// refuses one that has no place.
#[must_use]
pub fn mapped_region_info_reply(index: u32, bytes: u64, mapped: std::ops::Range<u64>, argsz: u32) -> Vec<u8> {
    let has_room = argsz >= MAPPED_REGION_INFO_BYTES;
    let (capabilities, cap_offset) = if has_room {
        (region_flag::CAPABILITIES, REGION_INFO_BYTES)
    } else {
        (0, 0)
    };
    let flags = region_flag::READ | region_flag::WRITE | region_flag::MMAP | capabilities;
    let mut reply = region_info(index, bytes, flags, MAPPED_REGION_INFO_BYTES, cap_offset)
        .as_bytes()
        .to_vec();
    if has_room {
        let capability = WireSparseMmap {
            id: 1.into(),
            version: 1.into(),
            next: 0.into(),
            areas: 1.into(),
            reserved: 0.into(),
            offset: mapped.start.into(),
            size: (mapped.end - mapped.start).into(),
        };
        reply.extend_from_slice(capability.as_bytes());
    }
    reply
}

const REGION_INFO_BYTES: u32 = size_of::<WireRegionInfo>() as u32;

/// Bytes of the reply about a region that may be mapped.
pub const MAPPED_REGION_INFO_BYTES: u32 = REGION_INFO_BYTES + size_of::<WireSparseMmap>() as u32;

fn region_info(index: u32, bytes: u64, flags: u32, argsz: u32, cap_offset: u32) -> WireRegionInfo {
    WireRegionInfo {
        argsz: argsz.into(),
        flags: flags.into(),
        index: index.into(),
        cap_offset: cap_offset.into(),
        size: bytes.into(),
        offset: 0.into(),
    }
}

/// The body of the reply to an unmap: the range again.
#[must_use]
pub fn unmap_reply(address: u64, bytes: u64) -> Vec<u8> {
    WireDmaUnmap {
        argsz: (size_of::<WireDmaUnmap>() as u32).into(),
        flags: 0.into(),
        address: address.into(),
        size: bytes.into(),
    }
    .as_bytes()
    .to_vec()
}

/// The body of the reply to a region access: what was accessed, and the data that was read.
#[must_use]
pub fn access_reply(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let access = WireAccess {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    };
    let mut body = access.as_bytes().to_vec();
    body.extend_from_slice(data);
    body
}

/// The body of the reply to several writes: how many were done.
#[must_use]
pub fn write_multi_reply(count: usize) -> Vec<u8> {
    U64::new(count as u64).as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(command: u8, size: u8, flags: u8) -> [u8; HEADER_BYTES] {
        [7, 0, command, 0, size, 0, 0, 0, flags, 0, 0, 0, 0, 0, 0, 0]
    }

    #[test]
    fn a_write_to_a_region_reads_as_the_specification_writes_it() {
        let header = Header::parse(&header(10, 36, 0x10)).unwrap();
        assert!(header.no_reply);
        assert_eq!(header.body_bytes(), 20);
        let body = [0x14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4];
        let write = RegionWrite {
            region: 0,
            offset: 0x14,
            data: &[1, 2, 3, 4],
        };
        assert_eq!(Request::parse(&header, &body), Ok(Request::RegionWrite(write)));
    }

    #[test]
    fn a_region_that_may_be_mapped_says_which_part_of_it() {
        let reply = mapped_region_info_reply(0, 0x4000, 0x1000..0x2000, 64);
        let mut expected = vec![64, 0, 0, 0, 0x0f, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0];
        expected.extend([0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        // VFIO_REGION_INFO_CAP_SPARSE_MMAP, version 1, one area.
        expected.extend([1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
        assert_eq!(reply, expected);
        let short = mapped_region_info_reply(0, 0x4000, 0x1000..0x2000, 32);
        expected.truncate(32);
        expected[4] = 0x07;
        expected[12] = 0;
        assert_eq!(short, expected, "asks for more room");
    }

    #[test]
    fn a_count_that_the_body_does_not_hold_is_refused() {
        let header = Header::parse(&header(10, 36, 0)).unwrap();
        let body = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 2, 3, 4];
        assert_eq!(Request::parse(&header, &body), Err(Errno::INVAL));
    }

    #[test]
    fn a_size_that_nothing_has_ends_the_connection() {
        assert_eq!(Header::parse(&header(1, 15, 0)), Err(HeaderError::Size(15)));
        let mut long = header(1, 0, 0);
        long[7] = 1;
        assert_eq!(Header::parse(&long), Err(HeaderError::Size(1 << 24)));
        assert_eq!(Header::parse(&header(1, 16, 1)), Err(HeaderError::NotACommand(1)));
    }

    #[test]
    fn an_unknown_command_is_answered_and_its_body_skipped() {
        let header = Header::parse(&header(99, 20, 0)).unwrap();
        assert_eq!(header.body_bytes(), 4);
        assert_eq!(Request::parse(&header, &[0; 4]), Err(Errno::NOSYS));
        let reply = header.reply(Err(Errno::NOSYS));
        assert_eq!(reply, [7, 0, 99, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 38, 0, 0, 0]);
    }

    #[test]
    fn several_writes_come_in_order_and_a_false_number_of_them_allocates_nothing() {
        let header = Header::parse(&header(15, 72, 0)).unwrap();
        let mut body = vec![2, 0, 0, 0, 0, 0, 0, 0];
        for at in [0x1000u64, 0x1008] {
            body.extend_from_slice(&at.to_le_bytes());
            body.extend_from_slice(&[0, 0, 0, 0, 4, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        }
        let Ok(Request::RegionWriteMulti(writes)) = Request::parse(&header, &body) else {
            panic!("not parsed")
        };
        let places: Vec<_> = writes.iter().map(|write| (write.offset, write.data)).collect();
        assert_eq!(places, [(0x1000, &[9, 0, 0, 0][..]), (0x1008, &[9, 0, 0, 0][..])]);
        body[7] = 0xff;
        assert_eq!(Request::parse(&header, &body), Err(Errno::INVAL));
    }

    #[test]
    fn interrupts_are_connected_disabled_and_unmasked() {
        let parse = |flags: u8, count: u8| {
            let body = [
                20, 0, 0, 0, flags, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, count, 0, 0, 0,
            ];
            set_interrupts(&body).map(|set| (set.action, set.index, set.start))
        };
        assert_eq!(parse(0x24, 1), Ok((InterruptAction::Connect, 2, 1)));
        assert_eq!(parse(0x21, 0), Ok((InterruptAction::Disable, 2, 1)));
        assert_eq!(parse(0x11, 1), Ok((InterruptAction::Unmask, 2, 1)));
        assert_eq!(parse(0x07, 1), Err(Errno::INVAL), "two kinds of data at once");
        assert_eq!(parse(0x22, 1), Err(Errno::INVAL), "booleans that are not there");
    }
}
