//! What a band survives, counted from where its shards lie.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::topology::{Domain, DomainLevel, Drive};

/// How many may fail at once, whichever they are, with every block still readable. Each figure is for failures of
/// that kind alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Survivable {
    /// Drives: m.
    pub drives: u8,
    /// Nodes and boxes.
    pub nodes: u8,
    /// Racks; a node or box without one counts as a rack of its own.
    pub racks: u8,
}

impl Survivable {
    /// Of a band with `m` parity shards, one shard on each of `drives`.
    #[must_use]
    pub fn of<'a>(m: u8, drives: impl Iterator<Item = &'a Drive> + Clone) -> Self {
        let at = |level| domains_survivable(m, drives.clone().map(|drive| drive.domain(level)));
        Self {
            drives: at(DomainLevel::Drive),
            nodes: at(DomainLevel::Node),
            racks: at(DomainLevel::Rack),
        }
    }

    /// What is survivable whichever of the two is hit.
    #[must_use]
    pub fn worse(self, other: Self) -> Self {
        Self {
            drives: self.drives.min(other.drives),
            nodes: self.nodes.min(other.nodes),
            racks: self.racks.min(other.racks),
        }
    }
}

impl std::fmt::Display for Survivable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { drives, nodes, racks } = self;
        write!(f, "any {drives} drives, any {nodes} nodes, any {racks} racks")
    }
}

/// The fullest domains fail first: how many of them hold at most `m` shards together.
fn domains_survivable(m: u8, shards: impl Iterator<Item = Domain>) -> u8 {
    let mut by_domain: BTreeMap<Domain, u32> = BTreeMap::new();
    for domain in shards {
        *by_domain.entry(domain).or_default() += 1;
    }
    let mut counts: Vec<u32> = by_domain.into_values().collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    let mut lost = 0;
    let survived = counts
        .iter()
        .take_while(|&&count| {
            lost += count;
            lost <= u32::from(m)
        })
        .count();
    // At most m domains with at least one shard each.
    u8::try_from(survived).unwrap_or(m)
}
