//! What cannot be avoided: passes over memory that move, check and code bytes and do nothing else. They check with crc32c, the
//! fastest there is, whatever the engine takes.

use std::hint::black_box;

use rand::rngs::SmallRng;
use rand::{RngCore as _, SeedableRng as _};
use weft_block::copy::copy_cold_slice;
use weft_block::huge::HugeMemory;
use weft_erasure::Codec;
use weft_proto::tcp::crc32c;

/// A block.
pub(super) const BLOCK: usize = weft_proto::units::BLOCK_BYTES;

/// Bytes that are no zeroes and do not repeat.
pub(super) fn noise(bytes: usize) -> Vec<u8> {
    let mut memory = vec![0; bytes];
    SmallRng::seed_from_u64(7).fill_bytes(&mut memory);
    memory
}

/// The same, as large as a drive and in memory as of one.
pub(super) fn noise_in_huge_pages(bytes: usize) -> HugeMemory {
    let mut memory = HugeMemory::zeroed(bytes);
    SmallRng::seed_from_u64(7).fill_bytes(&mut memory);
    memory
}

/// Reads every source and writes every output, with as little work as there can be: as many sources as there are
/// outputs are copied, the others are only read.
pub(super) fn move_bytes(sources: &[&[u8]], outputs: &mut [&mut [u8]]) {
    for (output, source) in outputs.iter_mut().zip(sources) {
        output.copy_from_slice(source);
    }
    for source in sources.iter().skip(outputs.len()) {
        black_box(sum(source));
    }
}

/// Adds up the words of `bytes`, which the compiler makes vector instructions of.
fn sum(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks::<8>();
    words
        .iter()
        .fold(0, |sum, word| u64::wrapping_add(sum, u64::from_le_bytes(*word)))
}

/// What writing one full 4+2 stripe costs at the very least, done in one thread over preallocated memory: the blocks
/// are copied in, each is checksummed; parity is computed; every shard is checksummed and copied, behind a header
/// block, to its device.
pub(super) struct StripeFloor {
    k: usize,
    m: usize,
    /// Blocks of a shard.
    d: usize,
    codec: Codec,
    staging: Vec<u8>,
    /// One region per column, written round and round; of the memory that memory drives are made of.
    devices: Vec<HugeMemory>,
    at: usize,
}

impl StripeFloor {
    /// `device_bytes` should exceed the caches: a drive's memory is cold.
    pub(super) fn new(k: u8, m: u8, d: usize, device_bytes: usize) -> Option<Self> {
        let (columns, k) = (usize::from(k + m), usize::from(k));
        Some(Self {
            k,
            m: usize::from(m),
            d,
            codec: Codec::new(m)?,
            staging: vec![0; columns * d * BLOCK],
            devices: std::iter::repeat_with(|| noise_in_huge_pages(device_bytes))
                .take(columns)
                .collect(),
            at: 0,
        })
    }

    /// Blocks of one stripe.
    pub(super) fn blocks(&self) -> usize {
        self.k * self.d
    }

    /// Writes one stripe of these blocks.
    pub(super) fn write(&mut self, blocks: &[&[u8]]) {
        let shard_bytes = self.d * BLOCK;
        let mut checksums = 0u32;
        for (to, block) in self.staging.chunks_exact_mut(BLOCK).zip(blocks) {
            to.copy_from_slice(block);
            checksums ^= crc32c(block);
        }
        let (data, parity) = self.staging.split_at_mut(self.k * shard_bytes);
        let sources: Vec<&[u8]> = data.chunks_exact(shard_bytes).collect();
        let mut outputs: Vec<&mut [u8]> = parity.chunks_exact_mut(shard_bytes).collect();
        self.codec.encode(&sources, &mut outputs);
        debug_assert_eq!(outputs.len(), self.m);
        let mut header = [0; BLOCK];
        header[..4].copy_from_slice(&checksums.to_le_bytes());
        if self.at + BLOCK + shard_bytes > self.devices[0].len() {
            self.at = 0;
        }
        for (device, shard) in self
            .devices
            .iter_mut()
            .zip(self.staging.chunks_exact(shard_bytes))
        {
            header[4..8].copy_from_slice(&crc32c(shard).to_le_bytes());
            let place = &mut device[self.at..self.at + BLOCK + shard_bytes];
            place[..BLOCK].copy_from_slice(&header);
            copy_cold_slice(shard, &mut place[BLOCK..]);
        }
        self.at += BLOCK + shard_bytes;
    }

    /// Reads the block at a place (taken modulo what there is): one copy out of a device and its checksum.
    pub(super) fn read(&self, place: u64, out: &mut [u8]) {
        let device = &self.devices[place as usize % self.devices.len()];
        let block = (place / self.devices.len() as u64) as usize % (device.len() / BLOCK);
        copy_cold_slice(&device[block * BLOCK..(block + 1) * BLOCK], out);
        black_box(crc32c(out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stripe_floor_writes_header_and_shard_to_every_device() {
        let mut floor = StripeFloor::new(4, 2, 2, 8 * BLOCK).unwrap();
        let block = noise(BLOCK);
        let blocks = vec![&block[..]; floor.blocks()];
        floor.write(&blocks);
        for device in &floor.devices[..4] {
            assert_eq!(device[BLOCK..2 * BLOCK], block[..]);
        }
        let mut out = vec![0; BLOCK];
        // Device 0, its second block: the first after the header.
        floor.read(6, &mut out);
        assert_eq!(out, block);
    }

    #[test]
    fn moving_bytes_fills_every_output() {
        let source = noise(64);
        let mut output = vec![0; 64];
        move_bytes(&[&source, &source], &mut [&mut output]);
        assert_eq!(output, source);
    }
}
