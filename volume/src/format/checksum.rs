//! crc32c of blocks and shards.
//!
//! A block's checksum is seeded with who wrote it, which block it is and which version of it, so the checksum of another block,
//! volume or version never matches (design section 3, invariant 6).
//!
//! What it does not do: tell two blocks apart that have the same crc32c. A CRC is linear, so whatever ends with its own crc32c,
//! unmasked, has one and the same: for such content a write that a drive lost or put elsewhere goes unnoticed. Map blocks
//! are of that kind in their headers and are told apart by what these say.

use crc_fast::{CrcAlgorithm, Digest};
use weft_proto::id::{Sequence, VolumeId};
use weft_proto::units::{BLOCK_BYTES, Lba};

/// crc32c over (writer, LBA, sequence) and the block's bytes. `writer` is the volume that wrote the layer.
#[must_use]
pub fn block_crc(writer: VolumeId, lba: Lba, sequence: Sequence, block: &[u8]) -> u32 {
    debug_assert_eq!(block.len(), BLOCK_BYTES);
    followed_by_block(seed_crc(writer, lba, sequence), crc32c([block]))
}

/// crc32c of a block's bytes alone, from its [`block_crc`]: they need not be read again.
#[must_use]
pub fn content_crc(writer: VolumeId, lba: Lba, sequence: Sequence, block_crc: u32) -> u32 {
    block_crc ^ shifted_by_block(seed_crc(writer, lba, sequence))
}

/// crc32c of some bytes and of the block behind them, each alone, as one.
#[must_use]
pub fn followed_by_block(before: u32, block: u32) -> u32 {
    shifted_by_block(before) ^ block
}

fn seed_crc(writer: VolumeId, lba: Lba, sequence: Sequence) -> u32 {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&writer.0.to_le_bytes());
    seed[8..16].copy_from_slice(&lba.0.to_le_bytes());
    seed[16..24].copy_from_slice(&sequence.epoch.0.to_le_bytes());
    seed[24..].copy_from_slice(&sequence.counter.to_le_bytes());
    crc32c([&seed[..]])
}

/// crc32c over several slices as if they were one.
#[must_use]
pub fn crc32c<'a>(slices: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for slice in slices {
        digest.update(slice);
    }
    digest.finalize() as u32
}

/// What a CRC becomes when [`BLOCK_BYTES`] zero bytes follow: a linear function of its bits, so four look-ups.
fn shifted_by_block(crc: u32) -> u32 {
    let [a, b, c, d] = crc.to_le_bytes();
    SHIFT[0][usize::from(a)] ^ SHIFT[1][usize::from(b)] ^ SHIFT[2][usize::from(c)] ^ SHIFT[3][usize::from(d)]
}

/// By place and value of a byte of the CRC.
static SHIFT: [[u32; 256]; 4] = shift_tables();

/// Castagnoli's polynomial. Bit 31 is the coefficient of x^0, as everywhere in a reflected CRC.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const fn shift_tables() -> [[u32; 256]; 4] {
    // x to the number of bits of a block, which is a power of two: x squared often enough.
    let mut power = 1 << 30;
    let mut squarings = 0;
    while squarings < (8 * BLOCK_BYTES).trailing_zeros() {
        power = product(power, power);
        squarings += 1;
    }
    let mut tables = [[0; 256]; 4];
    let mut place = 0;
    while place < 4 {
        let mut value = 0;
        while value < 256 {
            tables[place][value] = product(power, (value as u32) << (8 * place));
            value += 1;
        }
        place += 1;
    }
    tables
}

/// The product of two polynomials, modulo Castagnoli's.
const fn product(a: u32, mut b: u32) -> u32 {
    let (mut sum, mut bit) = (0, 32);
    while bit > 0 {
        bit -= 1;
        if a >> bit & 1 == 1 {
            sum ^= b;
        }
        b = (b >> 1) ^ if b & 1 == 1 { POLYNOMIAL } else { 0 };
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_proto::id::Epoch;

    #[test]
    fn crc32c_is_castagnoli() {
        // The check value of CRC-32C (RFC 3720 appendix B.4 uses the same polynomial).
        assert_eq!(crc32c([&b"1234"[..], b"56789"]), 0xe306_9283);
    }

    #[test]
    fn a_block_of_another_volume_place_or_version_does_not_match() {
        let sequence = |epoch, counter| Sequence {
            epoch: Epoch(epoch),
            counter,
        };
        let block = [7; 4096];
        let crc = block_crc(VolumeId(1), Lba(2), sequence(3, 4), &block);
        assert_ne!(crc, block_crc(VolumeId(9), Lba(2), sequence(3, 4), &block));
        assert_ne!(crc, block_crc(VolumeId(1), Lba(9), sequence(3, 4), &block));
        assert_ne!(crc, block_crc(VolumeId(1), Lba(2), sequence(9, 4), &block));
        assert_ne!(crc, block_crc(VolumeId(1), Lba(2), sequence(3, 9), &block));
    }

    /// A limit, not a wish: what a drive lost or misdirected is not noticed where both blocks end like this.
    #[test]
    fn blocks_that_end_with_their_own_crc32c_cannot_be_told_apart() {
        let sealed = |fill: u8| {
            let mut block = vec![fill; BLOCK_BYTES];
            let crc = crc32c([&block[..BLOCK_BYTES - 4]]);
            block[BLOCK_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
            block
        };
        let sequence = Sequence {
            epoch: Epoch(3),
            counter: 4,
        };
        let crc = |block: &[u8]| block_crc(VolumeId(1), Lba(2), sequence, block);
        assert_ne!(sealed(1), sealed(2));
        assert_eq!(crc(&sealed(1)), crc(&sealed(2)));
    }

    #[test]
    fn the_checksums_of_blocks_make_that_of_their_row() {
        let blocks: Vec<Vec<u8>> = (0..3u8)
            .map(|block| {
                (0..BLOCK_BYTES)
                    .map(|at| (at / 3) as u8 ^ block.wrapping_mul(85))
                    .collect()
            })
            .collect();
        let whole = crc32c(blocks.iter().map(Vec::as_slice));
        let joined = blocks.iter().fold(crc32c([]), |crc, block| {
            followed_by_block(crc, crc32c([&block[..]]))
        });
        assert_eq!(joined, whole);
        let sequence = Sequence {
            epoch: Epoch(5),
            counter: 6,
        };
        let seeded = block_crc(VolumeId(1), Lba(2), sequence, &blocks[1]);
        // As the format page has it: the seed's 32 bytes and the block, in one.
        let mut bytes = Vec::new();
        for part in [1u64, 2, 5, 6] {
            bytes.extend_from_slice(&part.to_le_bytes());
        }
        bytes.extend_from_slice(&blocks[1]);
        assert_eq!(seeded, crc32c([&bytes[..]]));
        assert_eq!(
            content_crc(VolumeId(1), Lba(2), sequence, seeded),
            crc32c([&blocks[1][..]])
        );
    }
}
