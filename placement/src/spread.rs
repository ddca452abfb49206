//! Choosing some of many by weight: systematic sampling, in integers.
//!
//! Lay the weights end to end as intervals on a ruler, cut the ruler into as many equal parts as are to be chosen,
//! and choose the interval under the same place of every part. No interval is longer than a part (the longer ones
//! are chosen beforehand), so none is hit twice; and each is hit with a probability proportional to its length.
//!
//! Two properties that placement rests on:
//! - **Balance over a batch.** Places that step by the golden ratio fall evenly, so that each interval is hit as
//!   often as its length says, off by little even after few steps.
//! - **Nothing is wasted.** Where weights are chunks left, an interval that must be chosen every time, or its
//!   chunks could never be used up, is as long as a part and is. So a batch reaches the largest number B of bands
//!   with Σ min(chunks, B) ≥ n·B. (An interval of length B can be missed only in a part of length B + 1, and there
//!   are as many of these as there are chunks to spare.)

/// 2^64 divided by the golden ratio: successive multiples, modulo 2^64, lie as evenly as any sequence can.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The `turn`-th place of a sequence that begins at `origin`, as a fraction of 2^64.
pub(crate) fn place(origin: u64, turn: u64) -> u64 {
    origin.wrapping_add(turn.wrapping_mul(GOLDEN))
}

/// A well mixed number for each (seed, key): the finaliser of splitmix64, applied to both.
pub(crate) fn mix(seed: u64, key: u64) -> u64 {
    let mut value = seed ^ finalise(key.wrapping_add(GOLDEN));
    value = finalise(value.wrapping_add(GOLDEN));
    value
}

fn finalise(mut value: u64) -> u64 {
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// Chooses `count` different indices of `weights`, each with a probability proportional to its weight, as far as
/// that is below 1. `at` is the place within a part, as a fraction of 2^64. `None` when fewer than `count` weights
/// are above 0. Indices ascend.
pub(crate) fn choose(weights: &[u64], count: usize, at: u64) -> Option<Vec<usize>> {
    if weights.iter().filter(|&&weight| weight > 0).count() < count {
        return None;
    }
    // Weights longer than a part are chosen beforehand, which makes the parts of the others longer or shorter;
    // the heaviest first, so that one pass is enough.
    let mut by_weight: Vec<usize> = (0..weights.len()).collect();
    by_weight.sort_by_key(|&index| std::cmp::Reverse(weights[index]));
    let mut chosen = Vec::with_capacity(count);
    let mut length: u128 = weights.iter().copied().map(u128::from).sum();
    for &index in &by_weight {
        let parts = (count - chosen.len()) as u128;
        if parts == 0 || u128::from(weights[index]) * parts <= length {
            break;
        }
        chosen.push(index);
        length -= u128::from(weights[index]);
    }

    let parts = (count - chosen.len()) as u128;
    let beforehand = chosen.clone();
    let mut ruler = (0..weights.len())
        .filter(|index| !beforehand.contains(index))
        .scan(0u128, |end, index| {
            *end += u128::from(weights[index]);
            Some((index, *end))
        });
    for part in 0..parts {
        // (part + at) · length / parts, rounded down. Parts are at most 20, lengths below 2^64 · 2^32.
        let point = (part * length + ((u128::from(at >> 32) * length) >> 32)) / parts;
        if let Some((index, _)) = ruler.find(|&(_, end)| end > point) {
            chosen.push(index);
        }
    }
    debug_assert_eq!(chosen.len(), count, "one interval in every part");
    chosen.sort_unstable();
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_interval_is_hit_as_often_as_it_is_long() {
        let weights = [10, 20, 30, 40, 0, 50, 50];
        let mut hits = [0u64; 7];
        const TURNS: u64 = 1000;
        for turn in 0..TURNS {
            for index in choose(&weights, 3, place(7, turn)).unwrap() {
                hits[index] += 1;
            }
        }
        for (hits, weight) in hits.iter().zip(weights) {
            // 3 of 200 in each turn.
            assert!(
                hits.abs_diff(TURNS * 3 * weight / 200) <= 4,
                "{hits} for {weight}"
            );
        }
    }

    #[test]
    fn what_is_longer_than_a_part_is_always_chosen() {
        for turn in 0..100 {
            let chosen = choose(&[1, 1000, 1, 1, 900, 1], 3, place(3, turn)).unwrap();
            assert!(chosen.contains(&1) && chosen.contains(&4) && chosen.len() == 3);
        }
    }

    #[test]
    fn nothing_is_chosen_twice_and_no_weight_of_zero_ever() {
        assert_eq!(choose(&[0, 5, 0, 1], 2, u64::MAX), Some(vec![1, 3]));
        assert_eq!(choose(&[0, 5, 0, 1], 3, 0), None);
        assert_eq!(choose(&[], 0, 0), Some(vec![]));
        assert_eq!(choose(&[u64::MAX; 20], 20, u64::MAX), Some((0..20).collect()));
    }
}
