//! A file that holds what the volumes must hold: written with every acknowledged write of the blocks that one host at a time
//! writes, and compared byte for byte with what is read at the end. It knows nothing of histories and versions, so it would see
//! what the checker's idea of them hides.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, PoisonError};

use crate::history::{BLOCK_BYTES, Block};

/// See the module.
#[derive(Debug)]
pub struct Mirror {
    file: File,
    /// Of each volume: they lie one after the other.
    volume_bytes: u64,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    /// Blocks of which nobody knows what they hold: a write of them has no answer.
    doubted: BTreeSet<Block>,
    compared: u64,
    failures: Vec<String>,
}

impl Mirror {
    /// An empty one, which nobody else sees, of volumes of `volume_bytes`.
    ///
    /// # Errors
    /// The file's.
    pub fn new(volume_bytes: u64) -> std::io::Result<Self> {
        Ok(Self {
            file: tempfile::tempfile()?,
            volume_bytes,
            found: Mutex::default(),
        })
    }

    fn with<T>(&self, change: impl FnOnce(&mut Found) -> T) -> T {
        change(&mut self.found.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn offset(&self, block: Block) -> u64 {
        u64::from(block.volume) * self.volume_bytes + u64::from(block.lba) * BLOCK_BYTES as u64
    }

    fn fail(&self, block: Block, what: &str) {
        let sentence = format!("block {} of volume {}: {what}", block.lba, block.volume);
        self.with(|found| found.failures.push(sentence));
    }

    /// A write of a whole block was acknowledged.
    pub fn write(&self, block: Block, bytes: &[u8]) {
        self.with(|found| found.doubted.remove(&block));
        if let Err(error) = self.file.write_all_at(bytes, self.offset(block)) {
            self.fail(block, &format!("the mirror was not written: {error}"));
        }
    }

    /// A write of a block has no answer.
    pub fn doubt(&self, block: Block) {
        self.with(|found| found.doubted.insert(block));
    }

    /// A block was read when nobody writes any more.
    pub fn compare(&self, block: Block, bytes: &[u8]) {
        if self.with(|found| found.doubted.contains(&block)) {
            return;
        }
        self.with(|found| found.compared += 1);
        let mut expected = vec![0; BLOCK_BYTES];
        // Past the end of the file nothing was ever written.
        match self.file.read_at(&mut expected, self.offset(block)) {
            Ok(_) if expected == bytes => {}
            Ok(_) => self.fail(block, "not what the mirror holds"),
            Err(error) => self.fail(block, &format!("the mirror was not read: {error}")),
        }
    }

    /// Blocks compared, and what was wrong.
    #[must_use]
    pub fn result(&self) -> (u64, Vec<String>) {
        self.with(|found| (found.compared, found.failures.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_differs_is_told_and_one_in_doubt_is_not_compared() {
        let mirror = Mirror::new(1 << 20).unwrap();
        let block = |lba| Block { volume: 1, lba };
        mirror.write(block(3), &[7; BLOCK_BYTES]);
        mirror.doubt(block(4));
        mirror.compare(block(2), &[0; BLOCK_BYTES]);
        mirror.compare(block(3), &[7; BLOCK_BYTES]);
        mirror.compare(block(4), &[9; BLOCK_BYTES]);
        assert_eq!(mirror.result(), (2, vec![]));
        let mut wrong = [7; BLOCK_BYTES];
        wrong[4095] = 6;
        mirror.compare(block(3), &wrong);
        assert_eq!(mirror.result().1.len(), 1);
        mirror.write(block(4), &[9; BLOCK_BYTES]);
        mirror.compare(block(4), &[9; BLOCK_BYTES]);
        assert_eq!(mirror.result().0, 4);
    }
}
