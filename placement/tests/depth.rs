//! How deep bands can be stacked, by hand and by stacking them.

use proptest::prelude::*;
use weft_placement::depth_mib;

#[test]
fn equal_domains_are_used_to_the_end() {
    assert_eq!(depth_mib([600; 6], 6), 600);
    assert_eq!(depth_mib([600; 9], 6), 900, "each band leaves three of them out");
}

#[test]
fn a_domain_larger_than_its_share_does_not_count_whole() {
    // Three columns on three domains: the smallest one decides. Two columns: the two small ones are the other side of the large one.
    assert_eq!(depth_mib([1000, 2000, 90_000], 3), 1000);
    assert_eq!(depth_mib([1000, 2000, 90_000], 2), 3000);
    assert_eq!(depth_mib([1000, 2000, 90_000], 1), 93_000);
}

#[test]
fn fewer_domains_than_columns_hold_nothing() {
    assert_eq!(depth_mib([5000, 5000], 3), 0);
    assert_eq!(depth_mib([5000, 5000, 0], 3), 0, "a full one is none");
    assert_eq!(depth_mib([], 1), 0);
}

/// Bands one after the other, each on the domains with most space: as many as fit in any way.
fn stacked(mut space: Vec<u64>, columns: usize) -> u64 {
    let mut bands = 0;
    loop {
        space.sort_unstable_by(|a, b| b.cmp(a));
        let Some(chosen) = space.get_mut(..columns) else {
            return bands;
        };
        if chosen.contains(&0) {
            return bands;
        }
        for mib in chosen {
            *mib -= 1;
        }
        bands += 1;
    }
}

proptest! {
    #[test]
    fn the_depth_is_as_many_bands_as_can_be_stacked(
        space in proptest::collection::vec(0_u64..60, 0..9),
        columns in 1_u8..8,
    ) {
        prop_assert_eq!(depth_mib(space.clone(), columns), stacked(space, columns.into()));
    }
}
