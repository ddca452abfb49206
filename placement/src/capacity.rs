//! How much a pool holds: what `weft status` prints, and what it keeps back.

use std::collections::BTreeMap;

use weft_proto::band::Geometry;

use crate::request::Policy;
use crate::topology::{Domain, DomainLevel, Drive, Home, Topology};

/// The engine's own part of the capacity, at least. Guessed.
const ENGINE_PERCENT_MIN: u64 = 2;
/// The engine's own part of the capacity, at most: many small volumes must not eat up a small pool. Guessed.
const ENGINE_PERCENT_MAX: u64 = 10;

/// The raw space that host writes never get, in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Reserve {
    /// The largest failure domain's capacity, so that it can be rebuilt on the others; 0 where there are no more domains
    /// than a band has columns, because there is nowhere to rebuild to.
    pub rebuild_mib: u64,
    /// For compaction, takeover, checkpoints and TRIM records.
    pub engine_mib: u64,
}

impl Reserve {
    /// Both.
    #[must_use]
    pub fn total_mib(self) -> u64 {
        self.rebuild_mib + self.engine_mib
    }
}

/// What a pool holds of one geometry, in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// The geometry in effect: k shrinks where domains are scarce. `None` when nothing fits, and then all else that
    /// depends on it is 0.
    pub geometry: Option<Geometry>,
    /// Failure domains in service.
    pub domains: u32,
    /// Chunk areas of all drives in service.
    pub raw_mib: u64,
    /// Of them, neither taken nor in quarantine.
    pub raw_free_mib: u64,
    /// What is kept back of [`Self::raw_mib`].
    pub reserve: Reserve,
    /// Data that an empty pool takes in full stripes, shard headers not deducted.
    pub usable_mib: u64,
    /// Data that the pool still takes in full stripes, likewise.
    pub usable_free_mib: u64,
}

/// What the drives in service that `policy` allows hold, in bands of `geometry`, when their engines need `engine` for
/// themselves.
#[must_use]
pub fn capacity(topology: &Topology, policy: &Policy, geometry: Geometry, engine: EngineNeed) -> Capacity {
    let drives: Vec<&Drive> = topology
        .drives()
        .filter(|drive| drive.in_service && policy.classes.contains(&drive.class))
        .collect();
    let raw = Columns::new(&drives, policy, |drive| drive.capacity_mib);
    let free = Columns::new(&drives, policy, |drive| drive.free_mib);
    let domains = u32::try_from(raw.domains()).unwrap_or(u32::MAX);
    let width = u8::try_from(raw.domains()).unwrap_or(u8::MAX);
    let geometry = Geometry::new(geometry.k.min(width.saturating_sub(geometry.m)), geometry.m);
    let raw_mib = raw.total_mib();
    let raw_free_mib = free.total_mib();
    let Some(geometry) = geometry else {
        return Capacity {
            geometry,
            domains,
            raw_mib,
            raw_free_mib,
            reserve: Reserve::default(),
            usable_mib: 0,
            usable_free_mib: 0,
        };
    };
    let n = u64::from(geometry.n());
    let reserve = Reserve {
        rebuild_mib: if u64::from(domains) > n {
            raw.largest_mib()
        } else {
            0
        },
        engine_mib: engine.wished_mib(geometry).clamp(
            raw_mib * ENGINE_PERCENT_MIN / 100,
            raw_mib * ENGINE_PERCENT_MAX / 100,
        ),
    };
    // The reserve is kept of the pool as a whole. It first lies in space that no band can reach, such as the far
    // end of a domain that is larger than all others together.
    let data_mib = |columns: &Columns| {
        let reachable = columns.deepest_mib(n) * n;
        let for_hosts = reachable.min(columns.total_mib().saturating_sub(reserve.total_mib()));
        for_hosts / n * u64::from(geometry.k)
    };
    Capacity {
        geometry: Some(geometry),
        domains,
        raw_mib,
        raw_free_mib,
        reserve,
        usable_mib: data_mib(&raw),
        usable_free_mib: data_mib(&free),
    }
}

/// What the engines need for themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineNeed {
    /// Volumes in the pool.
    pub volumes: u64,
    /// Bands that each may need for itself at one time.
    pub bands_per_volume: u64,
    /// Chunk size of those.
    pub chunk_mib: u64,
}

impl EngineNeed {
    fn wished_mib(self, geometry: Geometry) -> u64 {
        self.volumes
            .saturating_mul(self.bands_per_volume)
            .saturating_mul(self.chunk_mib)
            .saturating_mul(u64::from(geometry.n()))
    }
}

/// Space by what may hold one column of a band.
struct Columns {
    /// By domain, as one number; at the level of drives by node or box, a number for each drive.
    groups: BTreeMap<Domain, Vec<u64>>,
    /// Columns of one band that a group may hold, at most.
    per_group: usize,
}

impl Columns {
    fn new(drives: &[&Drive], policy: &Policy, mib: impl Fn(&Drive) -> u64) -> Self {
        let by_drive = policy.level == DomainLevel::Drive;
        let mut groups: BTreeMap<Domain, Vec<u64>> = BTreeMap::new();
        for drive in drives {
            if by_drive {
                let home: &Home = &drive.home;
                groups
                    .entry(Domain::Home(home.clone()))
                    .or_default()
                    .push(mib(drive));
            } else {
                // A domain is as one large drive: it holds one column of a band.
                let group = groups
                    .entry(drive.domain(policy.level))
                    .or_insert_with(|| vec![0]);
                group[0] += mib(drive);
            }
        }
        let per_group = match policy.shards_per_node_max {
            Some(bound) if by_drive => bound.into(),
            _ => usize::MAX,
        };
        Self { groups, per_group }
    }

    /// Columns that one band could have.
    fn domains(&self) -> usize {
        self.groups
            .values()
            .map(|group| group.len().min(self.per_group))
            .sum()
    }

    fn total_mib(&self) -> u64 {
        self.groups.values().flatten().sum()
    }

    /// Of one failure domain: at the level of drives that is a drive.
    fn largest_mib(&self) -> u64 {
        self.groups.values().flatten().copied().max().unwrap_or(0)
    }

    /// The largest depth at which bands of `n` columns fit: Σ min(space, depth) ≥ n · depth.
    fn deepest_mib(&self, n: u64) -> u64 {
        let fits = |depth: u64| {
            let reachable: u128 = self
                .groups
                .values()
                .map(|group| {
                    let space: u128 = group.iter().map(|&mib| u128::from(mib.min(depth))).sum();
                    space.min(u128::from(depth) * self.per_group.min(group.len()) as u128)
                })
                .sum();
            reachable >= u128::from(n) * u128::from(depth)
        };
        let (mut fitting, mut too_deep) = (0, self.total_mib() + 1);
        while fitting + 1 < too_deep {
            let middle = fitting + (too_deep - fitting) / 2;
            if fits(middle) {
                fitting = middle;
            } else {
                too_deep = middle;
            }
        }
        fitting
    }
}
