//! Numbers of any width within a block: least significant bit first, as in a little-endian integer of the whole block.
//!
//! Reading touches the eight bytes around a number and never a byte outside of the block, whatever it is asked for.

use weft_proto::units::BLOCK_BYTES;

/// The bytes of a block.
pub(crate) type Block = [u8; BLOCK_BYTES];

/// Bits of a block.
pub(crate) const BLOCK_BITS: usize = BLOCK_BYTES * 8;
/// Wherever a number of so many bits begins, eight bytes hold it.
const WORD_BITS: u32 = 57;
/// Where the last eight bytes begin.
const LAST_WORD: usize = BLOCK_BYTES - 8;

/// How many bits `value` takes.
pub(crate) fn width(value: u64) -> u32 {
    u64::BITS - value.leading_zeros()
}

/// The highest number of `width` bits.
pub(crate) fn mask(width: u32) -> u64 {
    u64::MAX.checked_shr(u64::BITS - width).unwrap_or(0)
}

/// The number of `width` bits at bit `at`, which lies in the block.
#[inline]
pub(crate) fn read(block: &Block, at: usize, width: u32) -> u64 {
    if width > WORD_BITS {
        return read(block, at, 32) | read(block, at + 32, width - 32) << 32;
    }
    let (byte, shift) = word(at);
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[byte..byte + 8]);
    // At the very end, where nothing but a number of no bits can be, the shift wraps; the mask leaves nothing of it.
    u64::from_le_bytes(bytes).wrapping_shr(shift) & ((1 << width) - 1)
}

/// Puts `value`, of `width` bits, at bit `at` of a block that has zeroes there.
pub(crate) fn write(block: &mut Block, at: usize, width: u32, value: u64) {
    debug_assert!(value <= mask(width) && at + width as usize <= BLOCK_BITS);
    if width > WORD_BITS {
        write(block, at, 32, value & mask(32));
        write(block, at + 32, width - 32, value >> 32);
        return;
    }
    let (byte, shift) = word(at);
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[byte..byte + 8]);
    let word = u64::from_le_bytes(bytes) | value.wrapping_shl(shift);
    block[byte..byte + 8].copy_from_slice(&word.to_le_bytes());
}

/// The first of the eight bytes around bit `at`, and the bit within them.
fn word(at: usize) -> (usize, u32) {
    let byte = (at / 8).min(LAST_WORD);
    (byte, (at - byte * 8) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_are_counted_from_the_least_significant_one() {
        let mut block = [0; BLOCK_BYTES];
        write(&mut block, 4, 12, 0xabc);
        assert_eq!(block[..3], [0xc0, 0xab, 0]);
        assert_eq!(read(&block, 8, 4), 0xb);
    }

    #[test]
    fn a_number_of_no_bits_is_nothing_even_at_the_end() {
        assert_eq!(read(&[0xff; BLOCK_BYTES], BLOCK_BITS, 0), 0);
        assert_eq!((mask(0), mask(1), mask(64)), (0, 1, u64::MAX));
        assert_eq!((width(0), width(1), width(u64::MAX)), (0, 1, 64));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_beside_its_neighbours(
            numbers in prop::collection::vec((0u32..=64, any::<u64>()), 1..400),
            from_the_end in any::<bool>(),
        ) {
            let bits: usize = numbers.iter().map(|(width, _)| *width as usize).sum();
            let start = if from_the_end { BLOCK_BITS - bits } else { 0 };
            let mut block = [0; BLOCK_BYTES];
            let mut at = start;
            for (width, value) in &numbers {
                write(&mut block, at, *width, value & mask(*width));
                at += *width as usize;
            }
            let mut at = start;
            for (width, value) in &numbers {
                prop_assert_eq!(read(&block, at, *width), value & mask(*width));
                at += *width as usize;
            }
        }
    }
}
