//! Memory in huge pages where the system has them to give: for drives in memory, and for what is measured beside them.
//!
//! Who touches gigabytes at random in pages of 4 KiB waits for the tables of these pages more than for the memory, in a virtual
//! machine most of all. A drive's own memory would not be behind such tables, so one in memory should not be either.
//!
//! It is asked for, not reserved: without huge pages, or where the kernel does not know them, these are ordinary pages.
#![expect(unsafe_code, reason = "memory straight from the kernel")]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Zeroed memory, given back when it is dropped. The system gives it page by page as it is touched.
#[derive(Debug)]
pub struct HugeMemory {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is owned like a box: whoever has it may read it, whoever has it alone may write.
unsafe impl Send for HugeMemory {}
// SAFETY: as above.
unsafe impl Sync for HugeMemory {}

impl HugeMemory {
    /// So many bytes of zeroes.
    ///
    /// # Panics
    /// If there are none to be had, as any other allocation would, or if `bytes` is 0.
    #[must_use]
    pub fn zeroed(bytes: usize) -> Self {
        assert!(bytes > 0, "memory of no bytes");
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping, wherever the kernel wants it.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) };
        let start = start
            .ok()
            .and_then(|start| NonNull::new(start.cast::<u8>()))
            .unwrap_or_else(|| panic!("no memory for {bytes} bytes"));
        // SAFETY: the mapping just made; the advice changes nothing of what it holds. A kernel without huge pages refuses it.
        let _ = unsafe { madvise(start.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
        Self { start, bytes }
    }

    /// Its first byte.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Deref for HugeMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped, initialised by the kernel, and owned by this.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl DerefMut for HugeMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl AsRef<[u8]> for HugeMemory {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for HugeMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `zeroed`, and nobody has it any more. It cannot fail for a mapping of our own.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_zeroed_and_holds_what_is_written() {
        let mut memory = HugeMemory::zeroed(5000);
        assert!(memory.iter().all(|&byte| byte == 0));
        memory[4999] = 7;
        assert_eq!((memory.len(), memory[4999]), (5000, 7));
    }
}
