//! What holds for every cluster and every request.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use weft_placement::{
    Domain, DomainLevel, Drive, DriveClass, FreeChunks, Home, Policy, Refusal, Request, Topology, propose,
    propose_replacement,
};
use weft_proto::band::{ChunkSize, Geometry};
use weft_proto::id::{DriveId, NodeId};

fn a_drive() -> impl Strategy<Value = Drive> {
    let home = prop_oneof![
        4 => (1u32..12).prop_map(|node| Home::Node(NodeId(node))),
        1 => (0u32..3).prop_map(|number| Home::Box(format!("box{number}"))),
    ];
    let class = prop_oneof![4 => Just(DriveClass::Tlc), 1 => Just(DriveClass::Qlc)];
    let chunks = prop_oneof![1 => Just(0u64), 3 => 1u64..6, 3 => 6u64..200];
    let flags = (
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.8),
        0u32..4,
        1u32..4,
    );
    let penalty = prop_oneof![4 => Just(0u8), 1 => 0u8..=100];
    (home, class, chunks, flags, penalty).prop_map(|(home, class, chunks, flags, penalty_percent)| {
        let (in_service, registered, registrants, registrants_max) = flags;
        // The home decides the rack, as in a cluster.
        let rack = match &home {
            Home::Node(node) if node.0 % 3 != 0 => Some(format!("r{}", node.0 % 4)),
            _ => None,
        };
        Drive {
            id: DriveId(0),
            home,
            rack,
            class,
            capacity_mib: 2000,
            free_mib: chunks * 8,
            free_chunks: FreeChunks::unfragmented(chunks * 8),
            in_service,
            registered,
            registrants,
            registrants_max,
            penalty_percent,
        }
    })
}

fn drives() -> impl Strategy<Value = Vec<Drive>> {
    prop::collection::vec(a_drive(), 0..30).prop_map(|mut drives| {
        for (index, drive) in drives.iter_mut().enumerate() {
            drive.id = DriveId(index as u32 + 1);
        }
        drives
    })
}

fn a_request() -> impl Strategy<Value = Request> {
    let level = prop_oneof![
        Just(DomainLevel::Drive),
        Just(DomainLevel::Node),
        Just(DomainLevel::Rack)
    ];
    (
        (1u8..=8, 1u8..=4, 1u8..=8),
        1u32..60,
        level,
        prop::option::of(1u8..4),
        prop::collection::btree_set((1u32..30).prop_map(DriveId), 0..3),
        any::<bool>(),
        any::<u64>(),
    )
        .prop_map(
            |((k, m, k_min), count, level, bound, excluded, registered_only, seed)| Request {
                geometry: Geometry { k, m },
                k_min: k_min.min(k),
                chunk_size: ChunkSize::Mib8,
                count,
                policy: Policy {
                    level,
                    shards_per_node_max: bound,
                    classes: BTreeSet::from([DriveClass::Tlc]),
                },
                excluded,
                registered_only,
                seed,
            },
        )
}

/// Said again here, so that the crate cannot agree with itself on a mistake.
fn usable(drive: &Drive, request: &Request) -> bool {
    drive.in_service
        && drive.class == DriveClass::Tlc
        && !request.excluded.contains(&drive.id)
        && (drive.registered || !request.registered_only && drive.registrants < drive.registrants_max)
}

/// Chunks left by domain.
fn chunks_by_domain(drives: &[Drive], request: &Request) -> BTreeMap<Domain, u64> {
    let mut chunks = BTreeMap::new();
    for drive in drives.iter().filter(|drive| usable(drive, request)) {
        *chunks.entry(drive.domain(request.policy.level)).or_default() += drive.free_chunks.mib8;
    }
    chunks
}

/// Domains that could hold a shard of one band.
fn domains(drives: &[Drive], request: &Request, with_space: bool) -> u32 {
    let candidates = drives
        .iter()
        .filter(|drive| usable(drive, request) && (!with_space || drive.free_chunks.mib8 > 0));
    match (request.policy.level, request.policy.shards_per_node_max) {
        (DomainLevel::Drive, Some(bound)) => {
            let mut by_home: BTreeMap<&Home, u32> = BTreeMap::new();
            for drive in candidates {
                *by_home.entry(&drive.home).or_default() += 1;
            }
            by_home.values().map(|&drives| drives.min(bound.into())).sum()
        }
        (level, _) => candidates
            .map(|drive| drive.domain(level))
            .collect::<BTreeSet<_>>()
            .len() as u32,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bands_keep_every_rule(drives in drives(), request in a_request()) {
        let topology = Topology::new(drives.clone());
        let Ok(placements) = propose(&topology, &request) else { return Ok(()) };
        prop_assert!(!placements.is_empty() && placements.len() <= request.count as usize);
        let mut taken: BTreeMap<DriveId, u64> = BTreeMap::new();
        for placement in &placements {
            let geometry = placement.geometry;
            prop_assert_eq!(geometry.m, request.geometry.m);
            prop_assert!((request.k_min..=request.geometry.k).contains(&geometry.k));
            prop_assert_eq!(placement.drives.len(), usize::from(geometry.n()));

            let mut domains = BTreeSet::new();
            let mut by_home: BTreeMap<&Home, u8> = BTreeMap::new();
            for id in &placement.drives {
                let drive = topology.drive(*id).unwrap();
                prop_assert!(usable(drive, &request));
                prop_assert!(domains.insert(drive.domain(request.policy.level)), "a domain holds two shards");
                *by_home.entry(&drive.home).or_default() += 1;
                *taken.entry(*id).or_default() += 1;
            }
            if let (DomainLevel::Drive, Some(bound)) = (request.policy.level, request.policy.shards_per_node_max) {
                prop_assert!(by_home.values().all(|&shards| shards <= bound));
            }

            // As many of the fullest homes as stated hold at most m shards, and one more would hold more.
            let mut shards: Vec<u8> = by_home.into_values().collect();
            shards.sort_unstable_by(|a, b| b.cmp(a));
            let nodes = usize::from(placement.survivable.nodes);
            prop_assert!(shards[..nodes].iter().sum::<u8>() <= geometry.m);
            prop_assert!(nodes == shards.len() || shards[..=nodes].iter().sum::<u8>() > geometry.m);
            prop_assert_eq!(placement.survivable.drives, geometry.m);
        }
        for (drive, taken) in taken {
            prop_assert!(taken <= topology.drive(drive).unwrap().free_chunks.mib8, "more than {} has", drive);
        }
    }

    #[test]
    fn equal_input_gives_equal_output_in_any_order(mut drives in drives(), request in a_request()) {
        let first = propose(&Topology::new(drives.clone()), &request);
        drives.reverse();
        prop_assert_eq!(first, propose(&Topology::new(drives), &request));
    }

    #[test]
    fn a_refusal_is_right_and_counts_right(drives in drives(), request in a_request()) {
        let (with_space, in_service) = (domains(&drives, &request, true), domains(&drives, &request, false));
        let least = u32::from(request.k_min + request.geometry.m);
        match propose(&Topology::new(drives), &request) {
            Ok(placements) => {
                prop_assert!(with_space >= least);
                // The first band is as wide as it can be.
                let n = u32::from(placements[0].geometry.n());
                prop_assert_eq!(n, with_space.min(request.geometry.n().into()));
            }
            Err(Refusal::NoSpace { with_space: said, in_service: said_in_service, .. }) => {
                prop_assert_eq!((said, said_in_service), (with_space, in_service));
                prop_assert!(with_space < least && in_service >= least);
            }
            Err(Refusal::TooFewDomains { with_space: said, in_service: said_in_service, would_fit, .. }) => {
                prop_assert_eq!((said, said_in_service), (with_space, in_service));
                prop_assert!(in_service < least);
                prop_assert_eq!(would_fit.narrower.is_some(), with_space >= 2);
            }
        }
    }

    /// What the refusal says would fit does.
    #[test]
    fn what_would_fit_fits(drives in drives(), request in a_request()) {
        let topology = Topology::new(drives);
        let Err(Refusal::TooFewDomains { would_fit, .. }) = propose(&topology, &request) else { return Ok(()) };
        if let Some(geometry) = would_fit.narrower {
            let narrower = Request { geometry, k_min: geometry.k, ..request.clone() };
            prop_assert!(propose(&topology, &narrower).is_ok());
        }
        if let Some(geometry) = would_fit.by_drive {
            let mut by_drive = Request { geometry, k_min: geometry.k, ..request };
            by_drive.policy.level = DomainLevel::Drive;
            by_drive.policy.shards_per_node_max = None;
            prop_assert!(propose(&topology, &by_drive).is_ok());
        }
    }

    /// The most bands that can be placed is the largest B with Σ min(chunks, B) ≥ n·B: every one of them is.
    #[test]
    fn a_batch_that_fits_in_any_way_is_placed(drives in drives(), request in a_request()) {
        let mut request = request;
        if request.policy.level == DomainLevel::Drive {
            // There an even spread over nodes comes first.
            request.policy.level = DomainLevel::Node;
        }
        let chunks = chunks_by_domain(&drives, &request);
        let n = u64::from(request.geometry.n());
        let most = (0..=u64::from(request.count))
            .rev()
            .find(|&bands| chunks.values().map(|&chunks| chunks.min(bands)).sum::<u64>() >= n * bands)
            .unwrap();
        let asked = Request { k_min: request.geometry.k, ..request };
        let placed = propose(&Topology::new(drives), &asked).map_or(0, |placements| placements.len() as u64);
        prop_assert_eq!(placed, most);
    }

    /// No domain gets more or less than its share by more than a few shards, while none runs out.
    #[test]
    fn a_batch_is_balanced(
        // So even that no domain's share is above one shard a band.
        free in prop::collection::vec(1000u64..2000, 6..16),
        k in 1u8..=2,
        count in 1u32..200,
        seed in any::<u64>(),
    ) {
        let drives = free.iter().enumerate().map(|(index, &chunks)| Drive {
            id: DriveId(index as u32),
            home: Home::Node(NodeId(index as u32)),
            rack: None,
            class: DriveClass::Tlc,
            capacity_mib: 20_000,
            free_mib: chunks * 8,
            free_chunks: FreeChunks::unfragmented(chunks * 8),
            in_service: true,
            registered: true,
            registrants: 1,
            registrants_max: 1,
            penalty_percent: 0,
        });
        let request = Request {
            geometry: Geometry { k, m: 1 },
            k_min: k,
            chunk_size: ChunkSize::Mib8,
            count,
            policy: Policy {
                level: DomainLevel::Node,
                shards_per_node_max: None,
                classes: BTreeSet::from([DriveClass::Tlc]),
            },
            excluded: BTreeSet::new(),
            registered_only: true,
            seed,
        };
        let mut taken = vec![0u64; free.len()];
        for placement in propose(&Topology::new(drives), &request).unwrap() {
            for drive in placement.drives {
                taken[drive.0 as usize] += 1;
            }
        }
        let total: u64 = free.iter().sum();
        for (taken, free) in taken.iter().zip(&free) {
            let fair = u64::from(count) * u64::from(k + 1) * free / total;
            prop_assert!(taken.abs_diff(fair) <= 8, "{} taken, fair were {}", taken, fair);
        }
    }

    #[test]
    fn a_replacement_keeps_the_rules_and_is_found_where_there_is_one(
        drives in drives(),
        request in a_request(),
        column in any::<prop::sample::Index>(),
    ) {
        let topology = Topology::new(drives.clone());
        let Ok(placements) = propose(&topology, &Request { count: 1, ..request.clone() }) else { return Ok(()) };
        let mut others = placements[0].drives.clone();
        let lost = others.remove(column.index(others.len()));
        let mut asked = Request { geometry: placements[0].geometry, ..request };
        asked.excluded.insert(lost);

        let domain = |id: DriveId| topology.drive(id).unwrap().domain(asked.policy.level);
        let on_home = |home: &Home| others.iter().filter(|&&id| topology.drive(id).unwrap().home == *home).count();
        let fits = |drive: &Drive| {
            let bound = match asked.policy.level {
                DomainLevel::Drive => asked.policy.shards_per_node_max,
                _ => None,
            };
            usable(drive, &asked)
                && drive.free_chunks.mib8 > 0
                && others.iter().all(|&other| domain(other) != drive.domain(asked.policy.level))
                && bound.is_none_or(|bound| on_home(&drive.home) < usize::from(bound))
        };
        match propose_replacement(&topology, &asked, &others) {
            Ok(drive) => prop_assert!(fits(topology.drive(drive).unwrap())),
            Err(_) => prop_assert!(!drives.iter().any(fits)),
        }
    }
}
