//! crc32c of blocks and shards.
//!
//! A block's checksum is seeded with who wrote it, which block it is and which version of it, so bytes of
//! another block, volume or version never match, however they came to lie there (design section 3, invariant 6).

use crc_fast::{CrcAlgorithm, Digest};
use weft_proto::id::{Sequence, VolumeId};
use weft_proto::units::Lba;

/// crc32c over (writer, LBA, sequence) and the block's bytes. `writer` is the volume that wrote the layer.
#[must_use]
pub fn block_crc(writer: VolumeId, lba: Lba, sequence: Sequence, block: &[u8]) -> u32 {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&writer.0.to_le_bytes());
    seed[8..16].copy_from_slice(&lba.0.to_le_bytes());
    seed[16..24].copy_from_slice(&sequence.epoch.0.to_le_bytes());
    seed[24..].copy_from_slice(&sequence.counter.to_le_bytes());
    crc32c([&seed[..], block])
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
}
