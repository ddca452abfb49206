use std::collections::HashMap;

use weft_proto::id::Epoch;

use super::*;

fn sequence(epoch: u64, counter: u64) -> Sequence {
    Sequence {
        epoch: Epoch(epoch),
        counter,
    }
}

/// Pseudo-random bytes, other ones for each seed.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..BLOCK_BYTES / 8).flat_map(|_| word()).collect()
}

/// Ends each piece of `bytes` with the CRC of the rest of it, as `algorithm` has it: little-endian and unmasked.
fn close(block: &mut [u8], bytes: usize, algorithm: CrcAlgorithm) {
    for piece in block.chunks_exact_mut(bytes) {
        let (data, end) = piece.split_at_mut(bytes - 4);
        end.copy_from_slice(&(checksum(algorithm, data) as u32).to_le_bytes());
    }
}

#[test]
fn the_crc_is_the_one_of_its_polynomial() {
    let mut crc = u32::MAX;
    for byte in b"123456789" {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0xd790_25c9 } else { 0 };
        }
    }
    assert_eq!(!crc, 0xeea8_baa4);
    assert_eq!(payload_crc(b"123456789"), 0xeea8_baa4);
    assert_eq!(PARAMS.check, 0xeea8_baa4);
    assert_eq!(payload_crc(b""), 0);
}

/// A polynomial divides x^(2^31) − x if and only if it is a product of different irreducible ones of degree 1 and 31. This one has
/// degree 32, a last coefficient, and 1 for a root: (x + 1) and one of degree 31, whose order can only be the prime 2^31 − 1.
/// So no two bits, and no odd number of bits, that are not further apart than that go unnoticed.
#[test]
fn the_polynomial_is_a_primitive_one_of_degree_31_times_x_plus_1() {
    let x = 1 << 30;
    let power = (0..31).fold(x, |power, _| product(power, power));
    assert_eq!(power, x);
    assert_eq!((POLYNOMIAL.count_ones() + 1) % 2, 0);
    assert_eq!(POLYNOMIAL & 1, 1);
}

#[test]
fn a_block_of_another_volume_place_or_version_does_not_match() {
    let block = noise(1);
    let crc =
        |writer, lba, epoch, counter| block_crc(VolumeId(writer), Lba(lba), sequence(epoch, counter), &block);
    let right = crc(1, 2, 3, 4);
    for other in (0..64).map(|bit| 1u64 << bit) {
        assert_ne!(right, crc(1 ^ other, 2, 3, 4));
        assert_ne!(right, crc(1, 2 ^ other, 3, 4));
        assert_ne!(right, crc(1, 2, 3 ^ other, 4));
        assert_ne!(right, crc(1, 2, 3, 4 ^ other));
    }
    let neighbours = (0..20).flat_map(|lba| (0..200).map(move |counter| crc(1, lba, 3, counter)));
    let different: std::collections::HashSet<u32> = neighbours.collect();
    assert_eq!(different.len(), 4000);
}

/// What a CRC with the polynomial of the closing one would say of them: they all look the same to it.
#[test]
fn blocks_that_are_closed_by_their_own_checksums_are_told_apart() {
    for algorithm in [CrcAlgorithm::Crc32Iscsi, CrcAlgorithm::Crc32IsoHdlc] {
        for bytes in [512, 1024, 2048, 4096] {
            let mut seen = HashMap::new();
            for seed in 0..3000 {
                let mut block = noise(seed);
                close(&mut block, bytes, algorithm);
                let crc = block_crc(VolumeId(1), Lba(2), sequence(3, 4), &block);
                let former = seen.insert(crc, seed);
                assert_eq!(former, None, "{algorithm:?} of {bytes} bytes: seed {seed}");
            }
        }
    }
}

/// A guest that writes sectors changes one of them, and its checksum with it.
#[test]
fn a_block_with_one_other_sector_that_is_closed_by_its_checksum_is_told_apart() {
    for bytes in [512, 1024, 2048] {
        let mut block = noise(7);
        close(&mut block, bytes, CrcAlgorithm::Crc32Iscsi);
        let mut seen = HashMap::from([(payload_crc(&block), (0, 0))]);
        for at in 0..BLOCK_BYTES / bytes {
            for seed in 0..500 {
                let mut other = block.clone();
                let sector = at * bytes..(at + 1) * bytes;
                other[sector.clone()].copy_from_slice(&noise(1000 + seed)[sector]);
                close(&mut other, bytes, CrcAlgorithm::Crc32Iscsi);
                assert_eq!(seen.insert(payload_crc(&other), (at, seed)), None);
            }
        }
    }
}

#[test]
fn the_checksums_of_blocks_make_that_of_their_row() {
    let blocks: Vec<Vec<u8>> = (0..3).map(noise).collect();
    let joined = blocks
        .iter()
        .fold(0, |crc, block| followed_by_block(crc, payload_crc(block)));
    assert_eq!(joined, payload_crc(&blocks.concat()));
}

/// As the format page has it.
#[test]
fn a_blocks_checksum_is_that_of_its_bytes_and_of_its_identity() {
    let block = noise(5);
    let mut identity = Vec::new();
    for part in [1u64, 2, 5, 6] {
        identity.extend_from_slice(&part.to_le_bytes());
    }
    let of_identity = checksum(CrcAlgorithm::Crc32Iscsi, &identity) as u32;
    let crc = block_crc(VolumeId(1), Lba(2), sequence(5, 6), &block);
    assert_eq!(crc, payload_crc(&block) ^ of_identity);
    assert_eq!(
        content_crc(VolumeId(1), Lba(2), sequence(5, 6), crc),
        payload_crc(&block)
    );
}
