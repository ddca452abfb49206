//! Checksums of blocks and of the payloads of shards.
//!
//! A block's checksum is a CRC-32 of its bytes, with a polynomial that nobody else uses, and who wrote it, which block it is and
//! which version of it, mixed in by exclusive or. So content that its writer closed with its own checksum (crc32c, zlib's CRC-32,
//! in a block, in each sector of it) is told apart like any other: `docs/design/block-checksum.md`.
//!
//! It finds every change of up to 32 bits in a row, of up to three bits anywhere in a payload of any length that occurs, and others but
//! for one in 2^32 (one in 2^31 between blocks that are closed by crc32c). What it does not do: withstand somebody who makes up
//! blocks for it. Nobody gains by that: such blocks are the guest's own, and are mistaken only where a drive lost or misplaced a write.

use std::sync::LazyLock;

use crc_fast::{CrcAlgorithm, CrcParams, checksum, checksum_with_params};
use weft_proto::id::{Sequence, VolumeId};
use weft_proto::units::{BLOCK_BYTES, Lba};

/// Checksum of a block's bytes as this version of this block by this writer, the volume that wrote the layer.
#[must_use]
pub fn block_crc(writer: VolumeId, lba: Lba, sequence: Sequence, block: &[u8]) -> u32 {
    debug_assert_eq!(block.len(), BLOCK_BYTES);
    payload_crc(block) ^ identity_crc(writer, lba, sequence)
}

/// [`payload_crc`] of a block, from its [`block_crc`]: its bytes need not be read again.
#[must_use]
pub fn content_crc(writer: VolumeId, lba: Lba, sequence: Sequence, block_crc: u32) -> u32 {
    block_crc ^ identity_crc(writer, lba, sequence)
}

/// Checksum of bytes alone: of a block, or of all of a shard's payload.
#[must_use]
pub fn payload_crc(bytes: &[u8]) -> u32 {
    checksum_with_params(*PARAMS, bytes) as u32
}

/// [`payload_crc`] of some bytes and of the block behind them, each alone, as one. Of no bytes it is 0.
#[must_use]
pub fn followed_by_block(before: u32, block: u32) -> u32 {
    shifted_by_block(before) ^ block
}

/// crc32c, not the payload's CRC: that it is fast for few bytes is all that matters here.
fn identity_crc(writer: VolumeId, lba: Lba, sequence: Sequence) -> u32 {
    let mut identity = [0; 32];
    identity[..8].copy_from_slice(&writer.0.to_le_bytes());
    identity[8..16].copy_from_slice(&lba.0.to_le_bytes());
    identity[16..24].copy_from_slice(&sequence.epoch.0.to_le_bytes());
    identity[24..].copy_from_slice(&sequence.counter.to_le_bytes());
    checksum(CrcAlgorithm::Crc32Iscsi, &identity) as u32
}

/// The polynomial, without x^32. It is (x + 1) times a primitive one of degree 31, as Castagnoli's is, so it finds as
/// much (P. Koopman, "32-Bit Cyclic Redundancy Codes for Internet Applications", 2002, has it as 0xC9D204F5); no catalogue
/// lists a use of it, which is why it was taken.
const POLYNOMIAL: u32 = 0x93a4_09eb;

/// Reflected, and all ones before and after, as usual.
static PARAMS: LazyLock<CrcParams> = LazyLock::new(|| {
    let ones = u64::from(u32::MAX);
    CrcParams::new("CRC-32/WEFT", 32, POLYNOMIAL.into(), ones, true, ones, CHECK)
});

/// The CRC of `123456789`, in the manner of the catalogues of CRCs.
const CHECK: u64 = 0xeea8_baa4;

/// What a CRC becomes when [`BLOCK_BYTES`] zero bytes follow: a linear function of its bits, so four look-ups.
fn shifted_by_block(crc: u32) -> u32 {
    let [a, b, c, d] = crc.to_le_bytes();
    SHIFT[0][usize::from(a)] ^ SHIFT[1][usize::from(b)] ^ SHIFT[2][usize::from(c)] ^ SHIFT[3][usize::from(d)]
}

/// By place and value of a byte of the CRC.
static SHIFT: [[u32; 256]; 4] = shift_tables();

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

/// The product of two polynomials modulo [`POLYNOMIAL`]. Bit 31 is the coefficient of x^0, as everywhere in a reflected CRC.
const fn product(a: u32, mut b: u32) -> u32 {
    let (mut sum, mut bit) = (0, 32);
    while bit > 0 {
        bit -= 1;
        if a >> bit & 1 == 1 {
            sum ^= b;
        }
        b = (b >> 1) ^ if b & 1 == 1 { POLYNOMIAL.reverse_bits() } else { 0 };
    }
    sum
}

#[cfg(test)]
mod tests;
