//! How deep bands can be stacked on domains of unequal space: what a pool really holds.
//!
//! Free space that lies on too few domains is out of reach for bands of k + m columns, however much of it there is. A pool that
//! counted it as its reserve would let hosts fill the domains that are scarce, and then have no band for itself.

/// The most MiB of each column that bands of `columns` columns, each on another domain, find room for on domains with so much
/// `space` each: the largest depth T with Σ min(space, T) ≥ `columns` · T. The bands then hold `columns` · T in all. 0 where there are
/// fewer domains than columns.
#[must_use]
pub fn depth_mib(space: impl IntoIterator<Item = u64>, columns: u8) -> u64 {
    let mut space: Vec<u64> = space.into_iter().collect();
    space.sort_unstable_by(|a, b| b.cmp(a));
    // Σ min(space, T) is the least, over j, of j · T and what all but the j largest hold: so T is bounded by each of them.
    let mut rest: u128 = space.iter().map(|&mib| u128::from(mib)).sum();
    let mut depth = u128::MAX;
    for larger in 0..columns {
        depth = depth.min(rest / u128::from(columns - larger));
        rest -= space.get(usize::from(larger)).map_or(0, |&mib| u128::from(mib));
    }
    u64::try_from(depth).unwrap_or(u64::MAX)
}
