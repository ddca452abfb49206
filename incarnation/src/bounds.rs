//! What all volumes of a node may take together: bytes of log, so that a takeover of all of them stays within its time, and
//! memory for their page maps, so that a server knows what its agent takes.
//!
//! Each volume has a limit of its own as well; these are for nodes with many.

use weft_volume::engine::Engine;

/// A cache that is this close to its limit would hold more if it might.
const HUNGRY_WITHIN: usize = 256 << 10;

/// What the volumes of a node may take together, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of log.
    pub log_bytes: u64,
    /// Of the caches of their page maps.
    pub cache_bytes: usize,
}

impl Bounds {
    /// The engine to write a checkpoint, when the logs are too long together: the one with the longest.
    pub(crate) fn longest_log<'a>(
        &self,
        engines: impl Iterator<Item = &'a Engine> + Clone,
    ) -> Option<&'a Engine> {
        let sum: u64 = engines.clone().map(Engine::log_bytes).sum();
        engines
            .max_by_key(|engine| engine.log_bytes())
            .filter(|_| sum > self.log_bytes)
    }

    /// The limit of every engine's cache, given that `limit` holds now and that none may have more than `most`.
    pub(crate) fn cache_limit<'a>(
        &self,
        engines: impl Iterator<Item = &'a Engine>,
        limit: usize,
        most: usize,
    ) -> usize {
        let wanted = engines.map(|engine| {
            let held = engine.cached_bytes();
            if held.saturating_add(HUNGRY_WITHIN) >= limit {
                most
            } else {
                held
            }
        });
        level(wanted.collect(), self.cache_bytes).min(most)
    }
}

/// The highest level at which everybody has what they want, or the level, and all together no more than there is. Who wants
/// little leaves the rest to the others.
fn level(mut wanted: Vec<usize>, there_is: usize) -> usize {
    wanted.sort_unstable();
    let (mut left, mut others) = (there_is, wanted.len());
    for want in wanted {
        let share = left / others;
        if want > share {
            return share;
        }
        left -= want;
        others -= 1;
    }
    usize::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_wants_little_leaves_the_rest_to_the_others() {
        assert_eq!(level(vec![], 100), usize::MAX);
        assert_eq!(level(vec![100], 100), usize::MAX);
        assert_eq!(level(vec![10, 60, 30], 100), usize::MAX, "enough for all");
        assert_eq!(level(vec![90, 10, 90], 100), 45);
        assert_eq!(level(vec![90, 90, 90], 100), 33);
        assert_eq!(level(vec![0, 5, 5, 500], 100), 90);
    }

    #[test]
    fn all_together_take_no_more_than_there_is() {
        for wanted in [vec![1, 2, 300, 4], vec![50, 51, 52], vec![7; 40], vec![99, 1]] {
            for there_is in [3, 40, 100] {
                let level = level(wanted.clone(), there_is);
                let taken: usize = wanted.iter().map(|want| *want.min(&level)).sum();
                assert!(taken <= there_is, "{wanted:?} of {there_is} up to {level}");
            }
        }
    }
}
