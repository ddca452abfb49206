//! Stripe numbers: which are given, which are closed, and H.
//!
//! A stripe is closed when it is complete, or when every block of it is in other stripes that are. H is the highest
//! number up to which all are closed; every header carries it, and recovery believes it.

use std::collections::BTreeSet;

use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::StripeNumber;

/// The stripe numbers of one epoch.
#[derive(Debug, Default)]
pub(crate) struct StripeNumbers {
    last: u64,
    open: BTreeSet<u64>,
    /// The highest number given to a stripe that re-appends an abandoned one.
    reappended: u64,
}

impl StripeNumbers {
    /// The next number. It is open until [`Self::close`].
    pub(crate) fn next(&mut self, reappends: bool) -> StripeNumber {
        self.last += 1;
        self.open.insert(self.last);
        if reappends {
            self.reappended = self.last;
        }
        StripeNumber(self.last)
    }

    /// Every block of it is durable, there or elsewhere.
    pub(crate) fn close(&mut self, number: StripeNumber) {
        let was_open = self.open.remove(&number.0);
        assert!(was_open, "a stripe number is given once and closed once");
    }

    /// H.
    pub(crate) fn closed_through(&self) -> StripeNumber {
        if planted(Bug::ClosedThroughTooHigh) {
            return self.last();
        }
        StripeNumber(self.open.first().map_or(self.last, |lowest| lowest - 1))
    }

    /// The last number given.
    pub(crate) fn last(&self) -> StripeNumber {
        StripeNumber(self.last)
    }

    /// The highest number that was given to a stripe with re-appended blocks.
    pub(crate) fn reappended(&self) -> StripeNumber {
        StripeNumber(self.reappended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h_stops_below_the_lowest_open_stripe() {
        let mut numbers = StripeNumbers::default();
        assert_eq!(numbers.closed_through(), StripeNumber(0));
        let [first, second, third] = [(); 3].map(|()| numbers.next(false));
        numbers.close(first);
        numbers.close(third);
        assert_eq!(numbers.closed_through(), first);
        numbers.close(second);
        assert_eq!(numbers.closed_through(), third);
    }
}
