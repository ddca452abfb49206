//! What pools hold, calculated by hand.

use std::collections::BTreeSet;

use weft_placement::{
    Capacity, DomainLevel, Drive, DriveClass, EngineNeed, FreeChunks, Home, Policy, Topology, capacity,
};
use weft_proto::band::Geometry;
use weft_proto::id::{DriveId, NodeId};

/// (node, capacity, free) each.
fn pool(drives: &[(u32, u64, u64)], level: DomainLevel, geometry: Geometry) -> Capacity {
    let drives = drives
        .iter()
        .enumerate()
        .map(|(index, &(node, capacity_mib, free_mib))| Drive {
            id: DriveId(index as u32 + 1),
            home: Home::Node(NodeId(node)),
            rack: None,
            class: DriveClass::Tlc,
            capacity_mib,
            free_mib,
            free_chunks: FreeChunks::unfragmented(free_mib),
            in_service: true,
            registered: false,
            registrants: 0,
            registrants_max: 16,
            penalty_percent: 0,
        });
    let policy = Policy {
        level,
        shards_per_node_max: (level == DomainLevel::Drive).then_some(2),
        classes: BTreeSet::from([DriveClass::Tlc]),
    };
    let engine = EngineNeed {
        volumes: 1,
        bands_per_volume: 4,
        chunk_mib: 8,
    };
    capacity(&Topology::new(drives), &policy, geometry, engine)
}

const FOUR_PLUS_TWO: Geometry = Geometry { k: 4, m: 2 };

#[test]
fn a_pool_keeps_one_node_and_the_engines_part() {
    let seven = [1, 2, 3, 4, 5, 6, 7].map(|node| (node, 6000, 5000));
    let pool = pool(&seven, DomainLevel::Node, FOUR_PLUS_TWO);
    assert_eq!(pool.geometry, Some(FOUR_PLUS_TWO));
    assert_eq!(
        (pool.domains, pool.raw_mib, pool.raw_free_mib),
        (7, 42_000, 35_000)
    );
    assert_eq!(pool.reserve.rebuild_mib, 6000);
    // 4 bands of 6 chunks of 8 MiB are 192; 2 % are 840.
    assert_eq!(pool.reserve.engine_mib, 840);
    assert_eq!(pool.usable_mib, (42_000 - 6840) / 6 * 4);
    assert_eq!(pool.usable_free_mib, (35_000 - 6840) / 6 * 4);
}

#[test]
fn where_no_node_is_to_spare_none_is_kept() {
    let six = [1, 2, 3, 4, 5, 6].map(|node| (node, 6000, 6000));
    let pool = pool(&six, DomainLevel::Node, FOUR_PLUS_TWO);
    assert_eq!(pool.reserve.rebuild_mib, 0);
    assert_eq!(pool.usable_mib, (36_000 - 720) / 6 * 4);
}

#[test]
fn a_node_larger_than_its_share_of_a_band_does_not_count_whole() {
    // Three columns on three nodes: the smallest one decides.
    let pool = pool(
        &[(1, 1000, 1000), (2, 2000, 2000), (3, 90_000, 90_000)],
        DomainLevel::Node,
        Geometry { k: 2, m: 1 },
    );
    assert_eq!(pool.usable_mib, 2000);
}

#[test]
fn with_few_nodes_the_geometry_in_effect_is_stated() {
    let four = [1, 2, 3, 4].map(|node| (node, 600, 600));
    let shrunk = pool(&four, DomainLevel::Node, FOUR_PLUS_TWO);
    assert_eq!(shrunk.geometry, Some(Geometry { k: 2, m: 2 }));
    assert_eq!(shrunk.usable_mib, (2400 - 128) / 4 * 2);
    let none = pool(&four[..2], DomainLevel::Node, FOUR_PLUS_TWO);
    assert_eq!((none.geometry, none.usable_mib, none.raw_mib), (None, 0, 1200));
}

#[test]
fn at_the_level_of_drives_a_node_counts_up_to_its_bound() {
    // Three nodes of three drives, two shards of a band on each: 4+2 fits, all drives take part.
    let nine: Vec<(u32, u64, u64)> = (0..9).map(|index| (index / 3, 1000, 1000)).collect();
    let pool = pool(&nine, DomainLevel::Drive, FOUR_PLUS_TWO);
    assert_eq!(pool.geometry, Some(FOUR_PLUS_TWO));
    assert_eq!(pool.domains, 6);
    // Six columns can be had, six are needed: the bound leaves none to rebuild on.
    assert_eq!(pool.reserve.rebuild_mib, 0);
    assert_eq!(pool.usable_mib, (9000 - 192) / 6 * 4);
}

#[test]
fn an_empty_cluster_holds_nothing() {
    let pool = pool(&[], DomainLevel::Node, FOUR_PLUS_TWO);
    assert_eq!((pool.geometry, pool.domains, pool.usable_mib), (None, 0, 0));
}
