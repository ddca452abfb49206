//! Doorbells that the client maps into its guest: writing one is a store to memory, and nobody is told.
//!
//! For hosts that have no doorbells in their own memory (Doorbell Buffer Config), where a setting asks for it: this side has
//! to look at the page for as long as the controller is enabled. What is in it is the guest's to write at any time, so
//! each word is read once, and checked by whoever uses it as one that came in a message is.
//!
//! A doorbell of a queue that does not exist goes unnoticed here: looking at all of the page for mistakes would cost more
//! than telling of them is worth.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;

use super::mapping::Mapping;
use super::registers::{DOORBELLS_AT, DOORBELLS_BYTES, Doorbell};

/// See the module.
pub(super) struct DoorbellPage {
    /// Mapped by the client at the offsets of BAR 0.
    file: OwnedFd,
    mapping: Mapping,
    /// What was found at the last look, by place.
    seen: Vec<u32>,
}

impl DoorbellPage {
    /// A page of zeroes.
    ///
    /// # Errors
    /// The kernel has no memory or no file descriptor left.
    pub(super) fn new() -> Result<Self, Errno> {
        let file = memfd_create("weft-doorbells", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)?;
        ftruncate(&file, DOORBELLS_AT + DOORBELLS_BYTES)?;
        // The client gets the file: it must not be able to take the page from under this side.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mapping = Mapping::new(file.as_fd(), DOORBELLS_AT, DOORBELLS_BYTES as usize, true)?;
        Ok(Self {
            file,
            mapping,
            seen: vec![0; DOORBELLS_BYTES as usize / 4],
        })
    }

    /// The file, for a client.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub(super) fn file(&self) -> Result<OwnedFd, Errno> {
        rustix::io::fcntl_dupfd_cloexec(&self.file, 0)
    }

    /// The doorbell of a queue that begins: what was rung for another queue of that number counts no more.
    pub(super) fn clear(&mut self, doorbell: Doorbell) {
        let at = doorbell.offset() as usize;
        self.mapping.store_u32(at, 0);
        self.seen[at / 4] = 0;
    }

    /// What was written to a doorbell since the last look.
    pub(super) fn rung(&mut self, doorbell: Doorbell) -> Option<u32> {
        let at = doorbell.offset() as usize;
        let value = self.mapping.load_u32(at);
        let before = std::mem::replace(&mut self.seen[at / 4], value);
        (value != before).then_some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doorbell_counts_when_it_changes_and_not_across_lives_of_its_queue() {
        let mut page = DoorbellPage::new().unwrap();
        let file = page.file().unwrap();
        let ring = |value: u32| {
            let at = 0x1000 + 8;
            assert_eq!(rustix::io::pwrite(&file, &value.to_le_bytes(), at), Ok(4));
        };
        assert_eq!(page.rung(Doorbell::Tail(1)), None);
        ring(5);
        assert_eq!(page.rung(Doorbell::Tail(1)), Some(5));
        assert_eq!(page.rung(Doorbell::Tail(1)), None);
        assert_eq!(page.rung(Doorbell::Head(1)), None);
        page.clear(Doorbell::Tail(1));
        assert_eq!(page.rung(Doorbell::Tail(1)), None);
        ring(5);
        assert_eq!(page.rung(Doorbell::Tail(1)), Some(5), "of the next queue");
    }

    #[test]
    fn whoever_has_the_file_cannot_cut_it_short() {
        let page = DoorbellPage::new().unwrap();
        let file = page.file().unwrap();
        assert_eq!(ftruncate(&file, 0), Err(Errno::PERM));
    }
}
