//! Where a command's data lies in the guest: PRPs and SGLs become a list of segments.
//!
//! The list is read from the guest once, its length is bounded by the command's data, and a chain of lists that leads
//! nowhere ends: each list of PRPs after the first is a whole page of them, and descriptors of SGLs are counted.
//!
//! NVM Express Base Specification, "Physical Region Page Entry and List" and "Scatter Gather List".

use bytes::Bytes;
use weft_block::DeviceInfo;
use weft_block::buffer::AlignedBuf;
use weft_proto::nvme::command::{AdminCommand, BlockRange, DsmRange, NvmCommand};
use weft_proto::nvme::feature::{FeatureId, HOST_BEHAVIOR_BYTES};
use weft_proto::nvme::identify::IDENTIFY_BYTES;
use weft_proto::nvme::reservation::{AcquireData, RegisterData, ReleaseData};
use weft_proto::nvme::sgl::SglDescriptor;
use weft_proto::nvme::sqe::Sqe;
use weft_proto::nvme::status::Status;
use zerocopy::FromBytes;

use super::memory::{Fault, GuestMemory};
use crate::request::TRANSFER_BYTES_MAX;

/// Bytes of a memory page, the unit of PRPs.
pub(super) const PAGE_BYTES: u64 = 4096;

/// PRP entries of a list, which fills a page.
const LIST_ENTRIES: usize = 512;

/// Most descriptors of one SGL, in all its segments: a page each for the longest transfer, and as many again.
const DESCRIPTORS_MAX: usize = 512;

/// Why a data pointer cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It makes no sense.
    Status(Status),
    /// It leads to where no memory is.
    Fault(Fault),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Segment {
    address: u64,
    bytes: u32,
}

/// The guest memory of one command's data, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Segments {
    /// Most commands have only this one, and no allocation.
    first: Segment,
    rest: Vec<Segment>,
    bytes: u32,
}

impl Segments {
    fn push(&mut self, address: u64, bytes: u32) {
        let last = self.rest.last_mut().unwrap_or(&mut self.first);
        if self.bytes > 0 && last.address.wrapping_add(u64::from(last.bytes)) == address {
            last.bytes += bytes;
        } else if self.bytes == 0 {
            self.first = Segment { address, bytes };
        } else {
            self.rest.push(Segment { address, bytes });
        }
        self.bytes += bytes;
    }

    fn iter(&self) -> impl Iterator<Item = &Segment> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    /// Bytes in all.
    pub(super) fn bytes(&self) -> u32 {
        self.bytes
    }

    /// What a command's data pointer says, for `bytes` of data.
    pub(super) fn resolve(sqe: &Sqe, bytes: u32, memory: &GuestMemory) -> Result<Self, Refusal> {
        let mut segments = Self::default();
        if bytes == 0 {
            return Ok(segments);
        }
        if sqe.uses_sgl()? {
            segments.resolve_sgl(sqe, bytes, memory)?;
        } else {
            let (first, second) = sqe.prps();
            segments.resolve_prps(first, second, bytes, memory)?;
        }
        Ok(segments)
    }

    fn resolve_prps(
        &mut self,
        first: u64,
        second: u64,
        bytes: u32,
        memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        if !first.is_multiple_of(4) {
            return Err(Status::INVALID_PRP_OFFSET.dnr().into());
        }
        let in_page = (PAGE_BYTES - first % PAGE_BYTES) as u32;
        self.push(first, bytes.min(in_page));
        let left = bytes - self.bytes;
        if left == 0 {
            return Ok(());
        }
        if u64::from(left) <= PAGE_BYTES {
            return self.push_page(second, left);
        }
        let mut list_at = second;
        if !list_at.is_multiple_of(8) {
            return Err(Status::INVALID_PRP_OFFSET.dnr().into());
        }
        loop {
            let pages = u64::from(bytes - self.bytes).div_ceil(PAGE_BYTES) as usize;
            let room = (PAGE_BYTES - list_at % PAGE_BYTES) as usize / 8;
            let mut list = [0; LIST_ENTRIES * 8];
            let list = &mut list[..pages.min(room) * 8];
            memory.read(list_at, list)?;
            let (entries, _) = list.as_chunks::<8>();
            // The last entry of a page that does not hold all is where the next page is.
            let (here, next) = match entries {
                [here @ .., next] if pages > room => (here, Some(u64::from_le_bytes(*next))),
                all => (all, None),
            };
            for &entry in here {
                let left = (bytes - self.bytes).min(PAGE_BYTES as u32);
                self.push_page(u64::from_le_bytes(entry), left)?;
            }
            let Some(next) = next else { return Ok(()) };
            // Only the first list may begin inside of a page. So each further one brings the end nearer.
            if !next.is_multiple_of(PAGE_BYTES) {
                return Err(Status::INVALID_PRP_OFFSET.dnr().into());
            }
            list_at = next;
        }
    }

    fn push_page(&mut self, address: u64, bytes: u32) -> Result<(), Refusal> {
        if !address.is_multiple_of(PAGE_BYTES) {
            return Err(Status::INVALID_PRP_OFFSET.dnr().into());
        }
        self.push(address, bytes);
        Ok(())
    }

    fn resolve_sgl(&mut self, sqe: &Sqe, bytes: u32, memory: &GuestMemory) -> Result<(), Refusal> {
        let mut counted = 1;
        let mut descriptor = sqe.sgl1;
        loop {
            let is_last = match descriptor.identifier {
                SglDescriptor::DATA_BLOCK => {
                    self.push_block(&descriptor, bytes);
                    break;
                }
                SglDescriptor::SEGMENT => false,
                SglDescriptor::LAST_SEGMENT => true,
                _ => return Err(Status::INVALID_SGL_TYPE.dnr().into()),
            };
            let (address, length) = (descriptor.address.get(), descriptor.length.get() as usize);
            if length == 0 || !length.is_multiple_of(16) {
                return Err(Status::INVALID_SGL_SEGMENT.dnr().into());
            }
            counted += length / 16;
            if counted > DESCRIPTORS_MAX {
                return Err(Status::INVALID_SGL_COUNT.dnr().into());
            }
            let mut list = [0; DESCRIPTORS_MAX * 16];
            let list = &mut list[..length];
            memory.read(address, list)?;
            let (descriptors, _) = list.as_chunks::<16>();
            let (blocks, next) = match descriptors {
                [blocks @ .., next] if !is_last => (blocks, Some(next)),
                all => (all, None),
            };
            for block in blocks {
                let block = SglDescriptor::read_from_bytes(block).expect("a descriptor is 16 bytes");
                match block.identifier {
                    SglDescriptor::DATA_BLOCK => self.push_block(&block, bytes),
                    SglDescriptor::SEGMENT | SglDescriptor::LAST_SEGMENT => {
                        return Err(Status::INVALID_SGL_SEGMENT.dnr().into());
                    }
                    _ => return Err(Status::INVALID_SGL_TYPE.dnr().into()),
                }
            }
            let Some(next) = next else { break };
            descriptor = SglDescriptor::read_from_bytes(next).expect("a descriptor is 16 bytes");
        }
        if self.bytes < bytes {
            return Err(Status::INVALID_SGL_LENGTH.dnr().into());
        }
        Ok(())
    }

    /// Takes a block, or what of it is needed: an SGL may be longer than the data.
    fn push_block(&mut self, descriptor: &SglDescriptor, bytes: u32) {
        let length = descriptor.length.get().min(bytes - self.bytes);
        if length > 0 {
            self.push(descriptor.address.get(), length);
        }
    }

    /// Copies the data out of the guest.
    pub(super) fn read(&self, memory: &GuestMemory) -> Result<Bytes, Fault> {
        let mut buffer = AlignedBuf::new(self.bytes as usize);
        let mut at = 0;
        for segment in self.iter() {
            let end = at + segment.bytes as usize;
            memory.read(segment.address, &mut buffer[at..end])?;
            at = end;
        }
        Ok(buffer.freeze())
    }

    /// Copies data into the guest, as much as it has room for.
    pub(super) fn write(&self, data: &[Bytes], memory: &GuestMemory) -> Result<(), Fault> {
        let mut segments = self.iter().copied();
        let mut room = segments.next().unwrap_or_default();
        for piece in data {
            let mut piece = &piece[..];
            while !piece.is_empty() {
                while room.bytes == 0 {
                    let Some(next) = segments.next() else {
                        return Ok(());
                    };
                    room = next;
                }
                let (now, later) = piece.split_at(piece.len().min(room.bytes as usize));
                memory.write(room.address, now)?;
                room.address += now.len() as u64;
                room.bytes -= now.len() as u32;
                piece = later;
            }
        }
        Ok(())
    }
}

/// Bytes of an I/O command's data, in either direction: its entry does not say, other than by what it asks for.
pub(super) fn io_bytes(sqe: &Sqe, info: Option<DeviceInfo>) -> Result<u32, Status> {
    let blocks = |range: BlockRange| {
        // Without its namespace a command fails before it moves anything.
        let block_bytes = info.map_or(0, |info| info.block_bytes);
        u64::from(range.count.get()) * u64::from(block_bytes)
    };
    let bytes = match NvmCommand::parse(sqe)? {
        NvmCommand::Read { range } | NvmCommand::Write { range, .. } | NvmCommand::Compare { range } => {
            blocks(range)
        }
        NvmCommand::Flush | NvmCommand::WriteZeroes { .. } | NvmCommand::Verify { .. } => 0,
        NvmCommand::DatasetManagement { ranges, .. } => u64::from(ranges) * size_of::<DsmRange>() as u64,
        NvmCommand::ReservationRegister { .. } => size_of::<RegisterData>() as u64,
        NvmCommand::ReservationAcquire { .. } => size_of::<AcquireData>() as u64,
        NvmCommand::ReservationRelease { .. } => size_of::<ReleaseData>() as u64,
        NvmCommand::ReservationReport { bytes, .. } => bytes,
    };
    bounded(bytes)
}

/// Bytes of an admin command's data.
pub(super) fn admin_bytes(sqe: &Sqe) -> Result<u32, Status> {
    let bytes = match AdminCommand::parse(sqe)? {
        AdminCommand::GetLogPage(page) => page.bytes,
        AdminCommand::Identify { .. } => IDENTIFY_BYTES as u64,
        AdminCommand::SetFeatures { fid, .. } if fid == FeatureId::HOST_BEHAVIOR => {
            HOST_BEHAVIOR_BYTES as u64
        }
        AdminCommand::GetFeatures { fid, .. } => match fid {
            FeatureId::HOST_BEHAVIOR => HOST_BEHAVIOR_BYTES as u64,
            FeatureId::HOST_IDENTIFIER => 16,
            _ => 0,
        },
        AdminCommand::SetFeatures { .. }
        | AdminCommand::Abort { .. }
        | AdminCommand::AsyncEventRequest
        | AdminCommand::KeepAlive => 0,
    };
    bounded(bytes)
}

fn bounded(bytes: u64) -> Result<u32, Status> {
    match u32::try_from(bytes) {
        Ok(bytes) if bytes <= TRANSFER_BYTES_MAX => Ok(bytes),
        _ => Err(Status::INVALID_FIELD.dnr()),
    }
}
