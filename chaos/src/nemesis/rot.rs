//! A drive that rots: bits flip in what it holds, under the agent that has it open.

use std::fs;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::Context as _;
use rand::Rng as _;
use rand::rngs::SmallRng;

use crate::history::BLOCK_BYTES;

/// Bytes at either end of a drive that are not its chunk area.
const LABEL_BYTES: u64 = 1 << 20;

/// Flips one bit in about one of eight blocks of the chunk area that hold anything. Returns how many.
///
/// Past the page cache, as the agent reads and writes: dirty pages in its way would fail its flushes. A block that the agent
/// writes in the same moment may keep older bytes: no more than a drive may do that counts as hurt.
///
/// # Errors
/// The file's.
pub(super) fn flip_bits(drive: &Path, random: &mut SmallRng) -> anyhow::Result<u64> {
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).context("O_DIRECT")?;
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(direct)
        .open(drive)
        .with_context(|| format!("open {}", drive.display()))?;
    let end = file.metadata()?.len() - LABEL_BYTES;
    // Direct I/O takes aligned memory only.
    let mut memory = vec![0; 2 * BLOCK_BYTES];
    let aligned = memory.as_ptr().align_offset(BLOCK_BYTES);
    let block = &mut memory[aligned..aligned + BLOCK_BYTES];
    let mut flipped = 0;
    for offset in (LABEL_BYTES..end).step_by(BLOCK_BYTES) {
        file.read_exact_at(block, offset)?;
        if block.iter().all(|byte| *byte == 0) || random.random_range(0..8) != 0 {
            continue;
        }
        block[random.random_range(0..BLOCK_BYTES)] ^= 1 << random.random_range(0..8);
        file.write_all_at(block, offset)?;
        flipped += 1;
    }
    Ok(flipped)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn flips_hit_blocks_that_hold_something_and_no_label() {
        // Beside the sources: a temporary folder may be in memory, where direct I/O does not go.
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let bytes = LABEL_BYTES * 2 + 64 * 4096;
        file.as_file().set_len(bytes).unwrap();
        file.as_file().write_all_at(&[7; 32 * 4096], LABEL_BYTES).unwrap();
        let before = fs::read(file.path()).unwrap();
        let flipped = flip_bits(file.path(), &mut SmallRng::seed_from_u64(1)).unwrap();
        let after = fs::read(file.path()).unwrap();
        let differ: Vec<usize> = (0..before.len()).filter(|at| before[*at] != after[*at]).collect();
        assert_eq!(differ.len() as u64, flipped);
        assert!(flipped > 0);
        let held = LABEL_BYTES as usize..LABEL_BYTES as usize + 32 * 4096;
        assert!(
            differ
                .iter()
                .all(|at| held.contains(at) && (before[*at] ^ after[*at]).count_ones() == 1)
        );
    }
}
