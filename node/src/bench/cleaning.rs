//! A model of greedy cleaning: how often a block is written on average when uniform random overwrites are kept going
//! in a log of equal bands, of which always the one with the fewest live blocks is emptied next.
//!
//! It is simulated, and not taken from a formula, because formulas are for logs of very many bands. With those it
//! agrees with the known fixed point (see the tests): where a share `u` of a log is live, a band is emptied when `x`
//! of it is, (x − 1) ⁄ ln x = u, and every block is written 1 ⁄ (1 − x) times. `docs/performance.md` has figures.
//!
//! What it leaves out: headers, parity, the map, checkpoints, age. It knows which band has the fewest live blocks, which
//! an engine can only estimate.

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// Times each block is written, the host's own write included, when `live` blocks are overwritten at random in a log of
/// `bands` bands of `blocks` blocks each. Emptying goes on until one band is free, and has a band of its own for what it
/// moves.
///
/// # Panics
/// If `live` blocks leave less than four bands of room: there would be nothing to work with.
pub(super) fn greedy(bands: usize, blocks: usize, live: usize) -> f64 {
    assert!(
        live + 4 * blocks <= bands * blocks,
        "{live} live blocks in {bands} bands of {blocks} leave nothing to clean with"
    );
    let mut log = Log::new(bands, blocks, live);
    for lba in 0..live {
        log.write(lba);
    }
    let mut random = SmallRng::seed_from_u64(3);
    let all = bands * blocks;
    for _ in 0..2 * all {
        log.write(random.random_range(0..live));
    }
    log.placed = 0;
    for _ in 0..all {
        log.write(random.random_range(0..live));
    }
    log.placed as f64 / all as f64
}

/// Never written.
const NOWHERE: usize = usize::MAX;

struct Log {
    blocks: usize,
    /// Position of each block of the volume, counted through all bands.
    places: Vec<usize>,
    /// Block at each position of the bands.
    contents: Vec<usize>,
    live: Vec<usize>,
    used: Vec<usize>,
    sealed: Vec<usize>,
    free: Vec<usize>,
    /// Where the host's blocks go, and where moved ones do.
    open: [Option<usize>; 2],
    placed: u64,
}

impl Log {
    fn new(bands: usize, blocks: usize, volume: usize) -> Self {
        Self {
            blocks,
            places: vec![NOWHERE; volume],
            contents: vec![0; bands * blocks],
            live: vec![0; bands],
            used: vec![0; bands],
            sealed: Vec::new(),
            free: (0..bands).collect(),
            open: [None; 2],
            placed: 0,
        }
    }

    fn write(&mut self, lba: usize) {
        while self.free.len() <= 1 {
            self.empty_one();
        }
        self.place(lba, 0);
    }

    fn place(&mut self, lba: usize, stream: usize) {
        let band = match self.open[stream] {
            Some(band) if self.used[band] < self.blocks => band,
            full => {
                self.sealed.extend(full);
                let band = self.free.pop().expect("a band is kept free");
                (self.used[band], self.live[band]) = (0, 0);
                self.open[stream] = Some(band);
                band
            }
        };
        let place = band * self.blocks + self.used[band];
        self.contents[place] = lba;
        if self.places[lba] != NOWHERE {
            self.live[self.places[lba] / self.blocks] -= 1;
        }
        self.places[lba] = place;
        self.used[band] += 1;
        self.live[band] += 1;
        self.placed += 1;
    }

    fn empty_one(&mut self) {
        let victim = (0..self.sealed.len())
            .min_by_key(|index| self.live[self.sealed[*index]])
            .expect("bands that are not free are sealed");
        let band = self.sealed.swap_remove(victim);
        for place in band * self.blocks..(band + 1) * self.blocks {
            let lba = self.contents[place];
            if self.places[lba] == place {
                self.place(lba, 1);
            }
        }
        self.free.push(band);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a log of infinitely many bands.
    fn fixed_point(share_live: f64) -> f64 {
        let (mut low, mut high) = (1e-9, 1.0 - 1e-9);
        for _ in 0..60 {
            let x: f64 = (low + high) / 2.0;
            if (x - 1.0) / x.ln() < share_live {
                low = x;
            } else {
                high = x;
            }
        }
        1.0 / (1.0 - low)
    }

    #[test]
    fn the_fixed_point_is_as_in_the_literature() {
        for (share, cost) in [(0.7, 1.88), (0.8, 2.69), (0.85, 3.52)] {
            assert!((fixed_point(share) - cost).abs() < 0.01, "{share}");
        }
    }

    #[test]
    fn many_bands_agree_with_the_fixed_point() {
        for share in [0.6, 0.7, 0.8] {
            let (bands, blocks) = (512, 64);
            // What is open or kept free takes part in nothing.
            let live = ((bands - 3) * blocks) as f64 * share;
            let (simulated, known) = (greedy(bands, blocks, live as usize), fixed_point(share));
            assert!(
                (simulated / known - 1.0).abs() < 0.04,
                "{share}: {simulated} simulated, {known} known"
            );
        }
    }

    #[test]
    fn few_bands_cost_more_than_many() {
        assert!(greedy(64, 64, 64 * 45) > greedy(512, 64, 512 * 45));
    }
}
