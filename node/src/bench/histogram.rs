//! Latencies, counted in buckets of about 1.6 % width.
//!
//! Recording is an index and an increment, so it costs the load generator nothing that would show. Promises that a
//! quantile is never below the true one by more than a bucket; keeps no single values.

/// Buckets per power of two.
const SUB_BUCKETS: u64 = 64;
const SUB_BITS: u32 = SUB_BUCKETS.trailing_zeros();
/// Enough for any u64 of nanoseconds.
const BUCKETS: usize = (65 - SUB_BITS as usize) * SUB_BUCKETS as usize;

/// See the module.
#[derive(Clone)]
pub(super) struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            total: 0,
        }
    }
}

impl Histogram {
    /// Counts one latency.
    pub(super) fn record(&mut self, nanoseconds: u64) {
        self.counts[bucket(nanoseconds)] += 1;
        self.total += 1;
    }

    /// Adds what another one counted.
    pub(super) fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// How many were counted.
    pub(super) fn count(&self) -> u64 {
        self.total
    }

    /// The upper edge, in microseconds, of the bucket that holds this quantile (0 to 1); `None` where nothing was
    /// counted.
    pub(super) fn quantile_us(&self, quantile: f64) -> Option<f64> {
        let rank = ((self.total as f64 * quantile).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        let index = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(upper_edge(index) as f64 / 1000.0)
    }
}

fn bucket(value: u64) -> usize {
    if value < SUB_BUCKETS {
        return value as usize;
    }
    // The leading bit says which power of two, the next ones which part of it.
    let power = value.ilog2() - SUB_BITS;
    ((u64::from(power) + 1) * SUB_BUCKETS + (value >> power) - SUB_BUCKETS) as usize
}

fn upper_edge(index: usize) -> u64 {
    let (group, sub) = (index as u64 / SUB_BUCKETS, index as u64 % SUB_BUCKETS);
    match group {
        0 => sub,
        _ => ((SUB_BUCKETS + sub + 1) << (group - 1)) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_bucket_of_the_truth() {
        let mut histogram = Histogram::default();
        (1..=100_000).for_each(|value| histogram.record(value));
        for (quantile, truth) in [(0.5, 50.0), (0.99, 99.0), (0.999, 99.9)] {
            let found = histogram.quantile_us(quantile).unwrap();
            assert!((truth..truth * 1.016).contains(&found), "{quantile}: {found}");
        }
        assert_eq!(Histogram::default().quantile_us(0.5), None);
    }

    #[test]
    fn every_value_lies_in_a_bucket_whose_edge_is_not_below_it() {
        for value in (0..5000).chain([1 << 20, (1 << 40) + 12345, u64::MAX / 2]) {
            let edge = upper_edge(bucket(value));
            assert!(edge >= value && edge - value <= value / 64 + 1, "{value} {edge}");
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn merged_histograms_count_what_both_counted() {
        let (mut one, mut other) = (Histogram::default(), Histogram::default());
        one.record(10);
        other.record(1000);
        other.record(1001);
        one.merge(&other);
        assert!(one.quantile_us(0.5).unwrap() >= 1.0);
    }
}
