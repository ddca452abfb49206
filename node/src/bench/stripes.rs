//! The shapes of the stripes that an engine sent between two looks at it.

use std::collections::BTreeMap;

use weft_volume::engine::Stats;

/// Stripes by (w, d).
pub(super) struct Stripes(BTreeMap<(u8, u32), u64>);

impl Stripes {
    pub(super) fn between(before: &Stats, after: &Stats) -> Self {
        let sent = after.stripes.iter().map(|(shape, count)| {
            let earlier = before.stripes.get(shape).copied().unwrap_or(0);
            (*shape, count - earlier)
        });
        Self(sent.filter(|(_, count)| *count > 0).collect())
    }

    /// Places for blocks, padding included.
    fn blocks(&self, which: impl Fn(u8, u32) -> bool) -> u64 {
        let chosen = self.0.iter().filter(|((w, d), _)| which(*w, *d));
        chosen
            .map(|((w, d), count)| count * u64::from(*w) * u64::from(*d))
            .sum()
    }

    /// Of all blocks, those in stripes of such shapes.
    pub(super) fn share(&self, which: impl Fn(u8, u32) -> bool) -> f64 {
        self.blocks(which) as f64 / self.blocks(|_, _| true).max(1) as f64
    }

    /// Blocks of a stripe, on average.
    pub(super) fn blocks_each(&self) -> f64 {
        self.blocks(|_, _| true) as f64 / self.0.values().sum::<u64>().max(1) as f64
    }

    /// Rows of payload for each row of headers, among stripes of width `w`.
    pub(super) fn depth(&self, w: u8) -> f64 {
        let wide = self.0.iter().filter(|((width, _), _)| *width == w);
        let (rows, stripes) = wide.fold((0, 0), |(rows, stripes), ((_, d), count)| {
            (rows + u64::from(*d) * count, stripes + count)
        });
        rows as f64 / stripes.max(1) as f64
    }

    /// Shares of blocks by w, and by d in powers of two, for people.
    pub(super) fn histograms(&self) -> String {
        let mut widths: Vec<u8> = self.0.keys().map(|(w, _)| *w).collect();
        widths.dedup();
        let percent = |share: f64| format!("{:.1} %", share * 100.0);
        let widths = widths
            .into_iter()
            .map(|width| format!("{width}: {}", percent(self.share(|w, _| w == width))));
        let depths = [(1, 3), (4, 7), (8, 15), (16, 31), (32, u32::MAX)]
            .into_iter()
            .map(|(from, to)| {
                let share = percent(self.share(|_, d| (from..=to).contains(&d)));
                if to == u32::MAX {
                    format!("{from} and more: {share}")
                } else {
                    format!("{from}–{to}: {share}")
                }
            });
        format!(
            "blocks by w {}; by d {}",
            widths.collect::<Vec<_>>().join(", "),
            depths.collect::<Vec<_>>().join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_blocks_and_only_of_those_sent_in_between() {
        let before = Stats {
            stripes: BTreeMap::from([((1, 1), 7), ((4, 8), 5)]),
            ..Stats::default()
        };
        let mut after = before.clone();
        after.stripes.insert((4, 8), 6);
        after.stripes.insert((4, 24), 2);
        after.stripes.insert((1, 32), 1);
        let stripes = Stripes::between(&before, &after);
        // 32 + 192 + 32 blocks.
        assert_eq!(stripes.share(|w, _| w == 4), 224.0 / 256.0);
        assert_eq!(stripes.blocks_each(), 64.0);
        assert_eq!(stripes.depth(4), 56.0 / 3.0);
        assert!(
            stripes
                .histograms()
                .starts_with("blocks by w 1: 12.5 %, 4: 87.5 %; by d 1–3: 0.0 %")
        );
    }
}
