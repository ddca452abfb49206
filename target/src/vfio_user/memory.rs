//! The guest's memory: which addresses there are, and checked access to them.
//!
//! Every access looks its address up anew, because firmware maps and unmaps memory while queues are live. What is not
//! mapped, or not for this kind of access, is a [`Fault`] and never a read outside of the guest.
//!
//! How a range is reached depends on the file that came with it:
//! - a memory file sealed against shrinking is mapped; if it can still be sealed, this side does it;
//! - any other file on tmpfs is read and written by system calls: slower, but a file that is cut short is an error
//!   then and not a SIGBUS, which would end every volume of this process;
//! - any other file (of a disk, of a network, of FUSE) is refused: an access could wait for ever;
//! - a range without a file takes part in no transfer. QEMU has such ranges for what is not memory.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs};
use rustix::io::Errno;

use super::mapping::Mapping;
use super::message::DmaMap;

/// Most ranges of one guest. Machines have tens; each costs this process a mapping, of which Linux allows 65530.
pub(super) const RANGES_MAX: usize = 1024;

/// Guest addresses and sizes are multiples of this.
const PAGE_BYTES: u64 = 4096;

/// How long after memory went an address that is not mapped may be about to come back: a map that is rearranged takes
/// ranges away and gives them back, cut otherwise, while the guest runs. A guess, far above what QEMU needs for it.
const SETTLE: Duration = Duration::from_millis(200);

/// File systems whose pages are memory: `TMPFS_MAGIC` (memory files too) and `HUGETLBFS_MAGIC`.
const TMPFS: u64 = 0x0102_1994;
const HUGETLBFS: u64 = 0x9584_58f6;

/// An access to what is not mapped, or not for this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no access to guest address {address:#x}")]
pub(super) struct Fault {
    pub(super) address: u64,
}

#[derive(Debug)]
enum Backing {
    Mapped(Mapping),
    /// By system calls, at this offset of the file.
    Copied(OwnedFd, u64),
    Absent,
}

#[derive(Debug)]
struct Range {
    address: u64,
    bytes: u64,
    readable: bool,
    writable: bool,
    backing: Backing,
}

impl Range {
    fn end(&self) -> u64 {
        self.address + self.bytes
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct GuestMemory {
    /// By address; they do not overlap.
    ranges: Vec<Range>,
    /// Where the last access was: the next one is likely there too.
    last: Cell<usize>,
    unmapped: Option<Instant>,
}

impl GuestMemory {
    /// Takes a range.
    pub(super) fn map(&mut self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), Errno> {
        let end = map.address.checked_add(map.bytes).ok_or(Errno::INVAL)?;
        let aligned = [map.address, map.bytes, map.offset]
            .iter()
            .all(|value| value.is_multiple_of(PAGE_BYTES));
        if map.bytes == 0 || !aligned {
            return Err(Errno::INVAL);
        }
        let at = self.ranges.partition_point(|range| range.end() <= map.address);
        if self.ranges.get(at).is_some_and(|next| next.address < end) {
            return Err(Errno::EXIST);
        }
        if self.ranges.len() == RANGES_MAX {
            return Err(Errno::NOSPC);
        }
        let backing = match file {
            Some(file) => back(map, file)?,
            None => Backing::Absent,
        };
        let range = Range {
            address: map.address,
            bytes: map.bytes,
            readable: map.readable,
            writable: map.writable,
            backing,
        };
        self.ranges.insert(at, range);
        Ok(())
    }

    /// Gives up whole ranges that lie in `address` to `address + bytes`.
    pub(super) fn unmap(&mut self, address: u64, bytes: u64, now: Instant) -> Result<(), Errno> {
        let end = address.checked_add(bytes).ok_or(Errno::INVAL)?;
        let first = self.ranges.partition_point(|range| range.end() <= address);
        let past = self.ranges.partition_point(|range| range.address < end);
        let inside = self.ranges.get(first..past).filter(|ranges| !ranges.is_empty());
        let inside = inside.ok_or(Errno::NOENT)?;
        if inside
            .iter()
            .any(|range| range.address < address || range.end() > end)
        {
            return Err(Errno::INVAL);
        }
        self.ranges.drain(first..past);
        self.unmapped = Some(now);
        Ok(())
    }

    /// Until when a fault may be a rearrangement and not the guest's doing.
    pub(super) fn settled_at(&self) -> Option<Instant> {
        self.unmapped.map(|unmapped| unmapped + SETTLE)
    }

    /// The range of an address, and the offset of the address in it.
    fn find(&self, address: u64) -> Result<(&Range, u64), Fault> {
        let holds = |range: &&Range| range.address <= address && address < range.end();
        let last = self.ranges.get(self.last.get()).filter(holds);
        let range = match last {
            Some(range) => range,
            None => {
                let at = self.ranges.partition_point(|range| range.end() <= address);
                let range = self.ranges.get(at).filter(holds).ok_or(Fault { address })?;
                self.last.set(at);
                range
            }
        };
        Ok((range, address - range.address))
    }

    /// Calls `each` for the pieces of an access that lie in one range: the range, the offset in it, and which bytes.
    fn pieces(
        &self,
        address: u64,
        bytes: usize,
        mut each: impl FnMut(&Range, u64, std::ops::Range<usize>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut done = 0;
        while done < bytes {
            let at = address.checked_add(done as u64).ok_or(Fault { address })?;
            let (range, offset) = self.find(at)?;
            let here = usize::try_from(range.bytes - offset).unwrap_or(usize::MAX);
            let end = done + here.min(bytes - done);
            each(range, offset, done..end)?;
            done = end;
        }
        Ok(())
    }

    /// Copies bytes out of the guest.
    pub(super) fn read(&self, address: u64, to: &mut [u8]) -> Result<(), Fault> {
        self.pieces(address, to.len(), |range, offset, piece| {
            let fault = Fault {
                address: range.address + offset,
            };
            if !range.readable {
                return Err(fault);
            }
            match &range.backing {
                Backing::Mapped(mapping) => mapping.read(offset as usize, &mut to[piece]),
                Backing::Copied(file, start) => {
                    read_exact(file, start + offset, &mut to[piece]).map_err(|_| fault)?;
                }
                Backing::Absent => return Err(fault),
            }
            Ok(())
        })
    }

    /// Copies bytes into the guest.
    pub(super) fn write(&self, address: u64, from: &[u8]) -> Result<(), Fault> {
        self.pieces(address, from.len(), |range, offset, piece| {
            let fault = Fault {
                address: range.address + offset,
            };
            if !range.writable {
                return Err(fault);
            }
            match &range.backing {
                Backing::Mapped(mapping) => mapping.write(offset as usize, &from[piece]),
                Backing::Copied(file, start) => {
                    write_exact(file, start + offset, &from[piece]).map_err(|_| fault)?;
                }
                Backing::Absent => return Err(fault),
            }
            Ok(())
        })
    }

    /// Whether all of an access would succeed.
    pub(super) fn check(&self, address: u64, bytes: usize, write: bool) -> Result<(), Fault> {
        self.pieces(address, bytes, |range, offset, _| {
            let allowed = if write { range.writable } else { range.readable };
            if allowed && !matches!(range.backing, Backing::Absent) {
                Ok(())
            } else {
                Err(Fault {
                    address: range.address + offset,
                })
            }
        })
    }

    /// Reads a word that the guest changes. What is read afterwards is at least as new.
    pub(super) fn load_u32(&self, address: u64) -> Result<u32, Fault> {
        let (range, offset) = self.find(address)?;
        match &range.backing {
            Backing::Mapped(mapping) if range.readable && offset.is_multiple_of(4) => {
                Ok(mapping.load_u32(offset as usize))
            }
            _ => {
                let mut word = [0; 4];
                self.read(address, &mut word)?;
                Ok(u32::from_le_bytes(word))
            }
        }
    }

    /// Writes a word that the guest reads. What was written before is seen before.
    pub(super) fn store_u32(&self, address: u64, value: u32) -> Result<(), Fault> {
        let (range, offset) = self.find(address)?;
        match &range.backing {
            Backing::Mapped(mapping) if range.writable && offset.is_multiple_of(4) => {
                mapping.store_u32(offset as usize, value);
                Ok(())
            }
            _ => self.write(address, &value.to_le_bytes()),
        }
    }

    /// Writes two words at a multiple of 16, the second after the first: a completion, whose last word has the phase tag.
    pub(super) fn store_pair(&self, address: u64, first: u64, second: u64) -> Result<(), Fault> {
        let (range, offset) = self.find(address)?;
        match &range.backing {
            Backing::Mapped(mapping) if range.writable && offset.is_multiple_of(16) => {
                mapping.store_pair(offset as usize, first, second);
                Ok(())
            }
            _ => {
                self.write(address, &first.to_le_bytes())?;
                self.write(address + 8, &second.to_le_bytes())
            }
        }
    }

    /// Whatever was written before is visible before anything that is read afterwards is looked up: for the moment
    /// between telling the guest that this side sleeps and looking once more.
    pub(super) fn fence() {
        fence(Ordering::SeqCst);
    }
}

/// Decides how a file is accessed. See the module.
fn back(map: &DmaMap, file: OwnedFd) -> Result<Backing, Errno> {
    let stat = fstat(&file)?;
    let magic = fstatfs(&file)?.f_type as u64;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || !matches!(magic, TMPFS | HUGETLBFS) {
        tracing::warn!(
            file_system = format_args!("{magic:#x}"),
            "guest memory is not in memory (use memory-backend-memfd)"
        );
        return Err(Errno::INVAL);
    }
    let end = map.offset.checked_add(map.bytes).ok_or(Errno::INVAL)?;
    if u64::try_from(stat.st_size).map_err(|_| Errno::INVAL)? < end {
        tracing::warn!(size = stat.st_size, end, "the file of guest memory is too short");
        return Err(Errno::INVAL);
    }
    if is_sealed(&file) {
        // The size cannot get less between the two: it was looked at before, so once more.
        if u64::try_from(fstat(&file)?.st_size).map_err(|_| Errno::INVAL)? < end {
            return Err(Errno::INVAL);
        }
        let bytes = usize::try_from(map.bytes).map_err(|_| Errno::INVAL)?;
        let mapping = Mapping::new(file.as_fd(), map.offset, bytes, map.writable)?;
        return Ok(Backing::Mapped(mapping));
    }
    if magic == HUGETLBFS {
        // Cannot be written by system calls.
        tracing::warn!("huge pages without a seal (use memory-backend-memfd,hugetlb=on)");
        return Err(Errno::INVAL);
    }
    tracing::info!(
        "guest memory is not a sealed memory file: it is accessed by system calls, which is slower"
    );
    Ok(Backing::Copied(file, map.offset))
}

/// Whether a file cannot shrink any more; seals it if it lets itself be.
fn is_sealed(file: &OwnedFd) -> bool {
    let sealed = || fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    sealed() || (fcntl_add_seals(file, SealFlags::SHRINK).is_ok() && sealed())
}

fn read_exact(file: &OwnedFd, mut offset: u64, mut to: &mut [u8]) -> Result<(), Errno> {
    while !to.is_empty() {
        match rustix::io::pread(file, &mut *to, offset) {
            // Cut short.
            Ok(0) => return Err(Errno::FAULT),
            Ok(count) => {
                offset += count as u64;
                to = &mut to[count..];
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_exact(file: &OwnedFd, mut offset: u64, mut from: &[u8]) -> Result<(), Errno> {
    while !from.is_empty() {
        match rustix::io::pwrite(file, from, offset) {
            Ok(0) => return Err(Errno::FAULT),
            Ok(count) => {
                offset += count as u64;
                from = &from[count..];
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn memory_file(bytes: u64, flags: MemfdFlags) -> OwnedFd {
        let file = memfd_create("guest", flags).unwrap();
        ftruncate(&file, bytes).unwrap();
        file
    }

    fn range(address: u64, bytes: u64) -> DmaMap {
        DmaMap {
            readable: true,
            writable: true,
            offset: 0,
            address,
            bytes,
        }
    }

    fn mapped(ranges: &[(u64, u64)]) -> GuestMemory {
        let mut memory = GuestMemory::default();
        for &(address, bytes) in ranges {
            let file = memory_file(bytes, MemfdFlags::ALLOW_SEALING);
            memory.map(&range(address, bytes), Some(file)).unwrap();
        }
        memory
    }

    #[test]
    fn an_access_crosses_from_one_range_to_the_next_but_not_a_hole() {
        let memory = mapped(&[(0, MIB), (MIB, MIB), (4 * MIB, MIB)]);
        let sent: Vec<u8> = (0..64).collect();
        memory.write(MIB - 32, &sent).unwrap();
        let mut found = [0; 64];
        memory.read(MIB - 32, &mut found).unwrap();
        assert_eq!(&found[..], sent);
        let hole = Fault { address: 2 * MIB };
        assert_eq!(memory.read(2 * MIB - 32, &mut found), Err(hole));
        assert_eq!(memory.write(2 * MIB - 32, &sent), Err(hole));
        assert!(
            memory.read(u64::MAX - 8, &mut found).is_err(),
            "past the end of all addresses"
        );
    }

    #[test]
    fn ranges_neither_overlap_nor_come_apart() {
        let mut memory = mapped(&[(MIB, MIB)]);
        let file = || memory_file(2 * MIB, MemfdFlags::ALLOW_SEALING);
        assert_eq!(memory.map(&range(MIB / 2, MIB), Some(file())), Err(Errno::EXIST));
        assert_eq!(memory.map(&range(0, 2 * MIB), Some(file())), Err(Errno::EXIST));
        assert_eq!(memory.map(&range(8 * MIB, 100), Some(file())), Err(Errno::INVAL));
        assert_eq!(memory.map(&range(8 * MIB, 0), Some(file())), Err(Errno::INVAL));
        assert_eq!(
            memory.map(&range(u64::MAX - 4095, 8192), Some(file())),
            Err(Errno::INVAL)
        );
        let now = Instant::now();
        assert_eq!(memory.unmap(MIB, MIB / 2, now), Err(Errno::INVAL));
        assert_eq!(memory.unmap(4 * MIB, MIB, now), Err(Errno::NOENT));
        memory.unmap(MIB, MIB, now).unwrap();
        assert!(memory.read(MIB, &mut [0]).is_err());
    }

    #[test]
    fn what_is_read_only_is_not_written() {
        let mut memory = GuestMemory::default();
        let map = DmaMap {
            writable: false,
            ..range(0, 4096)
        };
        let file = memory_file(4096, MemfdFlags::ALLOW_SEALING);
        memory.map(&map, Some(file)).unwrap();
        assert!(memory.read(0, &mut [0; 8]).is_ok());
        assert!(memory.write(0, &[1]).is_err());
        assert!(memory.store_u32(0, 1).is_err());
        assert!(memory.store_pair(0, 1, 2).is_err());
    }

    #[test]
    fn a_file_shorter_than_its_range_is_refused() {
        let mut memory = GuestMemory::default();
        let file = memory_file(4096, MemfdFlags::ALLOW_SEALING);
        assert_eq!(memory.map(&range(0, 8192), Some(file)), Err(Errno::INVAL));
    }

    #[test]
    fn a_mapped_file_cannot_be_cut_short_any_more() {
        let mut memory = GuestMemory::default();
        let file = memory_file(MIB, MemfdFlags::ALLOW_SEALING);
        let other = file.try_clone().unwrap();
        memory.map(&range(0, MIB), Some(file)).unwrap();
        assert_eq!(ftruncate(&other, 0), Err(Errno::PERM));
        memory.write(MIB - 4, &[1; 4]).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_sealed_is_copied_and_its_loss_is_a_fault() {
        let mut memory = GuestMemory::default();
        let file = memory_file(MIB, MemfdFlags::empty());
        let other = file.try_clone().unwrap();
        memory.map(&range(0, MIB), Some(file)).unwrap();
        memory.store_u32(8, 0x0403_0201).unwrap();
        assert_eq!(memory.load_u32(8), Ok(0x0403_0201));
        ftruncate(&other, 4096).unwrap();
        assert!(memory.read(0, &mut [0; 4096]).is_ok());
        assert!(memory.read(8192, &mut [0; 4]).is_err());
    }

    #[test]
    fn a_file_on_a_disk_is_refused() {
        let mut memory = GuestMemory::default();
        let (reader, _writer) = std::io::pipe().unwrap();
        assert_eq!(
            memory.map(&range(0, 4096), Some(reader.into())),
            Err(Errno::INVAL)
        );
        let folder = rustix::fs::open(
            "/proc/self/status",
            rustix::fs::OFlags::RDONLY,
            rustix::fs::Mode::empty(),
        );
        assert_eq!(
            memory.map(&range(0, 4096), Some(folder.unwrap())),
            Err(Errno::INVAL)
        );
    }
}
