//! What hosts did and saw: one record for each block of each command, and the bytes that say which write a block holds.
//!
//! A block that a client writes carries volume, block, client and version in a header and a stream made of them in the
//! rest, so that a read names the one write it saw and every byte of it is compared. Zeroes carry nothing: never
//! written, written as zeroes and deallocated look the same, and are the same to whoever reads.
//!
//! Times are of one clock of one process, in nanoseconds since the run began.

use std::fmt;
use std::io::Write;

use bytes::Bytes;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;

/// Opens every block that a client wrote.
const MAGIC: [u8; 8] = *b"WEFTCHAO";

/// Of which this says whose it is: magic, place, client, version.
const HEADER_BYTES: usize = 24;

/// A block that nobody wrote.
static ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// A block of a volume of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block {
    /// The volume's index.
    pub volume: u16,
    /// The block's number.
    pub lba: u32,
}

/// What a block holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// Zeroes.
    Zero,
    /// What this client wrote with this version; the pair is used once in a run.
    Written {
        /// Who.
        client: u16,
        /// Which of its writes.
        version: u32,
    },
    /// Bytes that no client makes for this block.
    Foreign,
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("zeroes"),
            Self::Written { client, version } => write!(f, "c{client}v{version}"),
            Self::Foreign => f.write_str("foreign bytes"),
        }
    }
}

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Write Zeroes.
    WriteZeroes,
    /// Deallocate (TRIM); the volumes promise that deallocated blocks read as zeroes.
    Deallocate,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With success.
    Ok,
    /// With an error that promises no effect after it; there may have been one before.
    Refused,
    /// It may have happened, and may still happen.
    Unknown,
}

/// One block of one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which block.
    pub block: Block,
    /// Who asked.
    pub client: u16,
    /// For what.
    pub action: Action,
    /// How it ended.
    pub outcome: Outcome,
    /// What was written, or what a read saw.
    pub value: Value,
    /// When it was asked for.
    pub invoked_ns: u64,
    /// When the answer was there.
    pub completed_ns: u64,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>14.6} {:>14.6} client {:<3} volume {} block {:<6} {:?} {:?} {:?}",
            self.invoked_ns as f64 / 1e9,
            self.completed_ns as f64 / 1e9,
            self.client,
            self.block.volume,
            self.block.lba,
            self.action,
            self.value,
            self.outcome,
        )
    }
}

/// Writes a history, one line for each record: seconds of invocation and completion, who, where, what, how it ended.
///
/// # Errors
/// The writer's.
pub fn write_text(history: &[Record], to: &mut impl Write) -> std::io::Result<()> {
    history.iter().try_for_each(|record| writeln!(to, "{record}"))
}

/// The bytes of a block that `client` writes with `version`.
#[must_use]
pub fn stamp(block: Block, client: u16, version: u32) -> Bytes {
    let mut bytes = vec![0; BLOCK_BYTES];
    stamp_into(&mut bytes, block, client, version);
    bytes.into()
}

/// The same, into `bytes`.
///
/// # Panics
/// When they are not one block.
pub fn stamp_into(bytes: &mut [u8], block: Block, client: u16, version: u32) {
    assert_eq!(bytes.len(), BLOCK_BYTES, "one block is stamped");
    let (head, stream) = bytes.split_at_mut(HEADER_BYTES);
    head.copy_from_slice(&header(block, client, version));
    let mut count = first_count(block, client, version);
    for word in stream.as_chunks_mut::<8>().0 {
        *word = next_word(&mut count).to_le_bytes();
    }
}

/// Client and version that a block names, whatever the rest of it holds.
#[must_use]
pub fn named(bytes: &[u8]) -> Option<(u16, u32)> {
    if !bytes.starts_with(&MAGIC) {
        return None;
    }
    let client = u16::from_le_bytes(bytes.get(18..20)?.try_into().ok()?);
    let version = u32::from_le_bytes(bytes.get(20..24)?.try_into().ok()?);
    Some((client, version))
}

/// What a read of `block` saw in `bytes`.
#[must_use]
pub fn observe(block: Block, bytes: &[u8]) -> Value {
    if bytes == ZEROES {
        return Value::Zero;
    }
    let Some((client, version)) = named(bytes) else {
        return Value::Foreign;
    };
    // The whole block is compared: its place, and every byte of the stream.
    if bytes.len() != BLOCK_BYTES || !bytes.starts_with(&header(block, client, version)) {
        return Value::Foreign;
    }
    let mut count = first_count(block, client, version);
    let words = bytes[HEADER_BYTES..].as_chunks::<8>().0.iter();
    let differing = words.map(|word| u64::from_le_bytes(*word) ^ next_word(&mut count));
    // All of them, without a branch for each.
    if differing.fold(0, |all, differing| all | differing) == 0 {
        Value::Written { client, version }
    } else {
        Value::Foreign
    }
}

// A block is a header and a stream of words, which count from a start that is the block's and the write's own, mixed. It is made or compared for
// every block that is written, lands or is read, by far the most frequent thing that a simulated run does: nothing is allocated, and no word
// waits for the one before it.

fn header(block: Block, client: u16, version: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..16].copy_from_slice(&u64::from(block.lba).to_le_bytes());
    header[16..18].copy_from_slice(&block.volume.to_le_bytes());
    header[18..20].copy_from_slice(&client.to_le_bytes());
    header[20..].copy_from_slice(&version.to_le_bytes());
    header
}

fn first_count(block: Block, client: u16, version: u32) -> u64 {
    let identity = u64::from(block.lba) << 32 | u64::from(version);
    let who = u64::from(block.volume) << 16 | u64::from(client);
    let first = (identity ^ who.rotate_left(24)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    first ^ first >> 32
}

fn next_word(count: &mut u64) -> u64 {
    *count = count.wrapping_add(0xbf58_476d_1ce4_e5b9);
    *count ^ *count >> 29
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: Block = Block { volume: 1, lba: 77 };

    #[test]
    fn a_block_names_the_write_it_holds() {
        let bytes = stamp(BLOCK, 5, 9);
        assert_eq!(bytes.len(), BLOCK_BYTES);
        assert_eq!(
            observe(BLOCK, &bytes),
            Value::Written {
                client: 5,
                version: 9
            }
        );
        assert_eq!(observe(BLOCK, &[0; BLOCK_BYTES]), Value::Zero);
    }

    #[test]
    fn a_block_of_another_place_or_with_a_wrong_byte_is_foreign() {
        let bytes = stamp(BLOCK, 5, 9);
        for other in [Block { lba: 78, ..BLOCK }, Block { volume: 0, ..BLOCK }] {
            assert_eq!(observe(other, &bytes), Value::Foreign);
        }
        for at in [0, 9, 17, 18, 20, 24, 31, 32, 2048, BLOCK_BYTES - 1] {
            let mut wrong = bytes.to_vec();
            wrong[at] ^= 1;
            assert_eq!(observe(BLOCK, &wrong), Value::Foreign, "byte {at}");
        }
        for length in [0, 1, 19, 23, BLOCK_BYTES - 1] {
            assert_eq!(
                observe(BLOCK, &bytes[..length]),
                Value::Foreign,
                "length {length}"
            );
            assert_eq!(
                observe(BLOCK, &vec![0; length]),
                Value::Foreign,
                "length {length}"
            );
        }
    }
}
