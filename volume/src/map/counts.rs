//! How many references each band has: the live counts of the space accounting.
//!
//! A count is never lower than the truth. It may be higher: a write does not look up what it supersedes in a
//! run, because that could wait for a map page; the superseded entry is given back when a merge meets both.

use std::collections::BTreeMap;

use weft_proto::id::BandId;

/// References by band. A band that is not listed has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BandCounts(BTreeMap<BandId, u64>);

impl BandCounts {
    pub(crate) fn add(&mut self, band: BandId, count: u64) {
        if count > 0 {
            *self.0.entry(band).or_default() += count;
        }
    }

    /// A band that is not listed was forgotten, with all that still names it.
    pub(crate) fn subtract(&mut self, band: BandId, count: u64) {
        if let Some(found) = self.0.get_mut(&band) {
            *found = found.saturating_sub(count);
            if *found == 0 {
                self.0.remove(&band);
            }
        }
    }

    pub(crate) fn add_all(&mut self, other: &Self) {
        for (band, count) in other.iter() {
            self.add(band, count);
        }
    }

    pub(crate) fn subtract_all(&mut self, other: &Self) {
        for (band, count) in other.iter() {
            self.subtract(band, count);
        }
    }

    pub(crate) fn of(&self, band: BandId) -> u64 {
        self.0.get(&band).copied().unwrap_or(0)
    }

    pub(crate) fn forget(&mut self, band: BandId) {
        self.0.remove(&band);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (BandId, u64)> {
        self.0.iter().map(|(band, count)| (*band, *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forgotten_band_stays_at_none() {
        let mut counts = BandCounts::default();
        counts.add(BandId(1), 3);
        counts.forget(BandId(1));
        counts.subtract(BandId(1), 2);
        assert_eq!(counts, BandCounts::default());
    }
}
