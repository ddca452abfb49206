//! The median of repeats, with an interval that assumes nothing of their distribution.

/// A median with the interval that holds the true one with at least 95 % confidence, where the repeats allow it.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(super) struct Estimate {
    /// Middle value.
    pub(super) median: f64,
    /// Lower end of the interval.
    pub(super) low: f64,
    /// Upper end of the interval.
    pub(super) high: f64,
}

/// Estimates the median of what `values` were drawn from. The interval lies between two of the values: those as
/// far inside as 95 % confidence allows (2nd and 8th of nine), else the outermost.
///
/// # Panics
/// Without values.
pub(super) fn estimate(values: &[f64]) -> Estimate {
    assert!(!values.is_empty(), "a median of something");
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    let inside = values_outside(count);
    Estimate {
        median: (sorted[(count - 1) / 2] + sorted[count / 2]) / 2.0,
        low: sorted[inside],
        high: sorted[count - 1 - inside],
    }
}

/// How many of the smallest values, and of the largest, lie outside of the interval. That the median lies below the
/// r-th smallest has the probability of fewer than r heads in `count` throws.
fn values_outside(count: usize) -> usize {
    let mut probability = 0.5f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut tail = 0.0;
    for heads in 0..count / 2 {
        tail += probability;
        if 2.0 * tail > 0.05 {
            return heads.saturating_sub(1);
        }
        probability *= (count - heads) as f64 / (heads + 1) as f64;
    }
    (count / 2).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nine_repeats_give_the_second_and_the_eighth() {
        let values: Vec<f64> = [5, 1, 9, 2, 8, 3, 7, 4, 6].map(f64::from).to_vec();
        let estimate = estimate(&values);
        assert_eq!((estimate.low, estimate.median, estimate.high), (2.0, 5.0, 8.0));
    }

    #[test]
    fn few_repeats_give_their_whole_range_and_many_a_narrow_one() {
        assert_eq!(
            estimate(&[3.0]),
            Estimate {
                median: 3.0,
                low: 3.0,
                high: 3.0
            }
        );
        let three = estimate(&[1.0, 3.0, 2.0]);
        assert_eq!((three.low, three.median, three.high), (1.0, 2.0, 3.0));
        // Of 25, the 8th and the 18th: the textbook's ranks of a sign test.
        let many: Vec<f64> = (1..=25).map(f64::from).collect();
        let many = estimate(&many);
        assert_eq!((many.low, many.median, many.high), (8.0, 13.0, 18.0));
    }
}
