//! Small clusters, drawn by hand: what is proposed, what is refused and in which words.

use std::collections::{BTreeMap, BTreeSet};

use weft_placement::{
    DomainLevel, Drive, DriveClass, FreeChunks, Home, Placement, Policy, Refusal, Request, Topology,
    WouldFit, propose, propose_replacement,
};
use weft_proto::band::{ChunkSize, Geometry};
use weft_proto::id::{DriveId, NodeId};

fn drive(id: u32, node: u32, free_mib: u64) -> Drive {
    Drive {
        id: DriveId(id),
        home: Home::Node(NodeId(node)),
        rack: None,
        class: DriveClass::Tlc,
        capacity_mib: 10_000,
        free_mib,
        free_chunks: FreeChunks::unfragmented(free_mib),
        in_service: true,
        registered: true,
        registrants: 1,
        registrants_max: 16,
        penalty_percent: 0,
    }
}

/// Drives 1 … nodes · each, `each` on every node.
fn cluster(nodes: u32, each: u32) -> Vec<Drive> {
    (0..nodes * each)
        .map(|index| drive(index + 1, index / each + 1, 10_000))
        .collect()
}

fn geometry(k: u8, m: u8) -> Geometry {
    Geometry { k, m }
}

fn request(geometry: Geometry, count: u32) -> Request {
    Request {
        geometry,
        k_min: 1,
        chunk_size: ChunkSize::Mib8,
        count,
        policy: Policy {
            level: DomainLevel::Node,
            shards_per_node_max: None,
            classes: BTreeSet::from([DriveClass::Tlc]),
        },
        excluded: BTreeSet::new(),
        registered_only: true,
        seed: 1,
    }
}

fn one(drives: Vec<Drive>, request: &Request) -> Placement {
    let mut placements = propose(&Topology::new(drives), request).expect("fits");
    assert_eq!(placements.len(), 1);
    placements.remove(0)
}

fn refused(drives: Vec<Drive>, request: &Request) -> Refusal {
    propose(&Topology::new(drives), request).expect_err("does not fit")
}

/// How often each drive occurs.
fn uses(placements: &[Placement]) -> BTreeMap<DriveId, u64> {
    let mut uses = BTreeMap::new();
    for drive in placements.iter().flat_map(|placement| &placement.drives) {
        *uses.entry(*drive).or_default() += 1;
    }
    uses
}

#[test]
fn a_band_has_one_column_on_each_of_n_nodes() {
    let band = one(cluster(7, 2), &request(geometry(4, 2), 1));
    assert_eq!(band.geometry, geometry(4, 2));
    let nodes: BTreeSet<u32> = band.drives.iter().map(|drive| (drive.0 - 1) / 2).collect();
    assert_eq!(nodes.len(), 6);
    assert_eq!(
        band.survivable.to_string(),
        "any 2 drives, any 2 nodes, any 2 racks"
    );
}

#[test]
fn with_too_few_nodes_k_shrinks_and_m_stays() {
    let band = one(cluster(5, 2), &request(geometry(4, 2), 1));
    assert_eq!(band.geometry, geometry(3, 2));
    assert_eq!(band.survivable.nodes, 2);
    let band = one(cluster(3, 2), &request(geometry(4, 2), 1));
    assert_eq!(band.geometry, geometry(1, 2));
}

#[test]
fn below_one_plus_m_nodes_the_refusal_says_what_would_fit() {
    let refusal = refused(cluster(2, 3), &request(geometry(4, 2), 1));
    assert_eq!(
        refusal,
        Refusal::TooFewDomains {
            geometry: geometry(4, 2),
            k_min: 1,
            level: DomainLevel::Node,
            with_space: 2,
            in_service: 2,
            would_fit: WouldFit {
                narrower: Some(geometry(1, 1)),
                by_drive: Some(geometry(4, 2)),
            },
        }
    );
    assert_eq!(
        refusal.to_string(),
        "4+2 needs 6 node domains, at the least 3, 2 have space: 1+1 would fit, or 4+2 with domain=drive"
    );
}

#[test]
fn whether_a_geometry_fits_as_it_is_can_be_asked() {
    let mut asked = request(geometry(4, 2), 1);
    asked.k_min = 4;
    assert_eq!(
        refused(cluster(5, 1), &asked).to_string(),
        "4+2 needs 6 node domains, 5 have space: 3+2 would fit, or 3+2 with domain=drive"
    );
    asked.k_min = 200;
    assert_eq!(one(cluster(6, 1), &asked).geometry, geometry(4, 2));
}

#[test]
fn a_single_drive_fits_nothing() {
    let refusal = refused(cluster(1, 1), &request(geometry(2, 1), 1));
    assert_eq!(
        refusal.to_string(),
        "2+1 needs 3 node domains, at the least 2, 1 have space: nothing would fit"
    );
    assert!(matches!(
        refused(vec![], &request(geometry(2, 1), 1)),
        Refusal::TooFewDomains { with_space: 0, .. }
    ));
}

#[test]
fn enough_domains_without_space_is_another_refusal() {
    let mut drives = cluster(7, 1);
    for drive in &mut drives[2..] {
        // 7 MiB free, but no chunk of 8.
        drive.free_chunks = FreeChunks::unfragmented(7);
    }
    let refusal = refused(drives, &request(geometry(4, 2), 1));
    assert_eq!(
        refusal.to_string(),
        "no space: 4+2 needs 6 node domains, at the least 3, 2 of 7 have space"
    );
}

#[test]
fn fragmented_space_counts_by_the_chunks_that_fit() {
    let mut drives = cluster(4, 1);
    drives[0].free_chunks = FreeChunks {
        mib1: 500,
        mib8: 0,
        mib64: 0,
    };
    let mut asked = request(geometry(2, 1), 50);
    let placements = propose(&Topology::new(drives.clone()), &asked).unwrap();
    assert!(!uses(&placements).contains_key(&DriveId(1)));
    asked.chunk_size = ChunkSize::Mib1;
    assert!(uses(&propose(&Topology::new(drives), &asked).unwrap()).contains_key(&DriveId(1)));
}

#[test]
fn what_must_not_be_used_is_not() {
    let mut drives = cluster(8, 1);
    drives[0].in_service = false;
    drives[1].class = DriveClass::Qlc;
    drives[2].registered = false;
    let mut asked = request(geometry(3, 1), 20);
    asked.excluded.insert(DriveId(4));
    let used = uses(&propose(&Topology::new(drives), &asked).unwrap());
    assert_eq!(used.keys().map(|drive| drive.0).collect::<Vec<_>>(), [5, 6, 7, 8]);
}

#[test]
fn a_drive_without_room_for_a_registrant_is_used_by_those_who_are_registered() {
    let mut drives = cluster(3, 1);
    for drive in &mut drives {
        drive.registered = false;
    }
    drives[2].registrants = 16;
    let mut asked = request(geometry(2, 1), 1);
    asked.registered_only = false;
    assert_eq!(one(drives.clone(), &asked).geometry, geometry(1, 1));
    drives[2].registered = true;
    assert_eq!(one(drives, &asked).geometry, geometry(2, 1));
}

#[test]
fn a_third_party_box_is_a_domain_of_its_own() {
    let mut drives = cluster(2, 1);
    for id in [3, 4, 5] {
        let mut third_party = drive(id, 0, 10_000);
        third_party.home = Home::Box("array".into());
        drives.push(third_party);
    }
    let band = one(drives.clone(), &request(geometry(2, 1), 1));
    assert_eq!(band.drives.iter().filter(|drive| drive.0 >= 3).count(), 1);
    assert_eq!(band.survivable.nodes, 1);

    // At the level of racks too, when nobody named one.
    let mut asked = request(geometry(2, 1), 1);
    asked.policy.level = DomainLevel::Rack;
    for drive in &mut drives[..2] {
        drive.rack = Some("r1".into());
    }
    assert_eq!(one(drives, &asked).geometry, geometry(1, 1));
}

#[test]
fn racks_are_kept_apart() {
    let mut drives = cluster(9, 2);
    for drive in &mut drives {
        drive.rack = Some(format!("r{}", (drive.id.0 - 1) / 6));
    }
    let mut asked = request(geometry(2, 1), 30);
    asked.policy.level = DomainLevel::Rack;
    let topology = Topology::new(drives);
    let placements = propose(&topology, &asked).unwrap();
    assert_eq!(placements.len(), 30);
    for placement in placements {
        let racks: BTreeSet<u32> = placement.drives.iter().map(|drive| (drive.0 - 1) / 6).collect();
        assert_eq!(racks.len(), 3);
        assert_eq!(placement.survivable.racks, 1);
    }
}

#[test]
fn on_few_nodes_drives_are_spread_evenly_and_what_survives_is_stated() {
    let mut asked = request(geometry(4, 2), 10);
    asked.policy.level = DomainLevel::Drive;
    for placement in propose(&Topology::new(cluster(3, 4)), &asked).unwrap() {
        let mut by_node = [0; 3];
        for drive in &placement.drives {
            by_node[(drive.0 as usize - 1) / 4] += 1;
        }
        assert_eq!(by_node, [2, 2, 2]);
        assert_eq!(
            placement.survivable.to_string(),
            "any 2 drives, any 1 nodes, any 1 racks"
        );
    }
    // Two nodes: three shards on each, so no node may fail. Stated, not hidden.
    let band = one(
        cluster(2, 4),
        &Request {
            count: 1,
            ..asked.clone()
        },
    );
    assert_eq!((band.survivable.drives, band.survivable.nodes), (2, 0));
}

#[test]
fn a_bound_on_the_shards_of_a_node_shrinks_k() {
    let mut asked = request(geometry(4, 2), 1);
    asked.policy.level = DomainLevel::Drive;
    asked.policy.shards_per_node_max = Some(2);
    let band = one(cluster(2, 4), &asked);
    assert_eq!(band.geometry, geometry(2, 2));
    assert_eq!(band.survivable.nodes, 1);
    asked.policy.shards_per_node_max = Some(1);
    assert_eq!(
        refused(cluster(2, 4), &asked).to_string(),
        "4+2 needs 6 drive domains, at the least 3, 2 have space: 1+1 would fit"
    );
}

#[test]
fn domains_are_used_in_proportion_to_their_free_space() {
    // Nodes of 1000, 2000, … 8000 MiB: n · free / total of 250 bands.
    let drives: Vec<Drive> = (1..=8).map(|id| drive(id, id, 1000 * u64::from(id))).collect();
    let placements = propose(&Topology::new(drives), &request(geometry(2, 1), 250)).unwrap();
    assert_eq!(placements.len(), 250);
    for (drive, uses) in uses(&placements) {
        let fair = 250 * 3 * u64::from(drive.0) / 36;
        assert!(uses.abs_diff(fair) <= 6, "{drive}: {uses}, fair were {fair}");
    }
}

#[test]
fn single_bands_of_many_seeds_are_spread_as_a_batch_is() {
    let topology = Topology::new((1..=8).map(|id| drive(id, id, 1000 * u64::from(id))));
    let placements: Vec<Placement> = (0..2000)
        .flat_map(|seed| {
            let asked = Request {
                seed,
                ..request(geometry(2, 1), 1)
            };
            propose(&topology, &asked).unwrap()
        })
        .collect();
    for (drive, uses) in uses(&placements) {
        let fair = 2000 * 3 * u64::from(drive.0) / 36;
        assert!(uses.abs_diff(fair) <= 120, "{drive}: {uses}, fair were {fair}");
    }
}

#[test]
fn a_new_drive_is_used_at_once_and_not_alone() {
    let mut drives = cluster(6, 2);
    for drive in &mut drives {
        drive.free_chunks = FreeChunks::unfragmented(1000);
    }
    drives.push(drive(13, 1, 3000));
    let placements = propose(&Topology::new(drives), &request(geometry(3, 2), 100)).unwrap();
    let used = uses(&placements);
    // Node 1 has 5000 of 15 000 MiB, which is more than a fifth: it is in every band, and its new drive in 3 of 5.
    assert_eq!(used[&DriveId(1)] + used[&DriveId(2)] + used[&DriveId(13)], 100);
    assert!(used[&DriveId(13)].abs_diff(60) <= 3, "{used:?}");
}

#[test]
fn a_penalised_drive_is_spared_until_it_is_needed() {
    let mut drives = cluster(4, 1);
    drives[0].penalty_percent = 90;
    let topology = Topology::new(drives.clone());
    let used = uses(&propose(&topology, &request(geometry(1, 1), 100)).unwrap());
    // 200 columns by weights 1 : 10 : 10 : 10.
    assert!(used[&DriveId(1)].abs_diff(200 / 31) <= 3, "{used:?}");

    drives.truncate(3);
    drives[0].penalty_percent = 100;
    let used = uses(&propose(&Topology::new(drives), &request(geometry(2, 1), 100)).unwrap());
    assert_eq!(used[&DriveId(1)], 100);
}

#[test]
fn a_batch_that_does_not_fit_whole_is_placed_as_far_as_it_does() {
    let mut drives = cluster(3, 1);
    for drive in &mut drives {
        drive.free_chunks = FreeChunks::unfragmented(40);
    }
    assert_eq!(
        propose(&Topology::new(drives), &request(geometry(2, 1), 9))
            .unwrap()
            .len(),
        5
    );
}

#[test]
fn a_replacement_lies_in_a_domain_of_its_own_and_moves_nothing_else() {
    let topology = Topology::new(cluster(7, 2));
    let mut asked = request(geometry(4, 2), 1);
    for seed in 0..50 {
        asked.seed = seed;
        let band = propose(&topology, &asked).unwrap().remove(0);
        let (&lost, others) = band.drives.split_first().unwrap();
        asked.excluded = BTreeSet::from([lost]);
        let replacement = propose_replacement(&topology, &asked, others).unwrap();
        let node = |drive: &DriveId| (drive.0 - 1) / 2;
        assert_ne!(replacement, lost);
        assert!(others.iter().all(|other| node(other) != node(&replacement)));
        asked.excluded.clear();
    }
}

#[test]
fn without_a_domain_to_spare_there_is_no_replacement() {
    let topology = Topology::new(cluster(6, 1));
    let mut asked = request(geometry(4, 2), 1);
    asked.excluded = BTreeSet::from([DriveId(6)]);
    let others: Vec<DriveId> = (1..=5).map(DriveId).collect();
    assert_eq!(
        propose_replacement(&topology, &asked, &others)
            .unwrap_err()
            .to_string(),
        "4+2 needs 6 node domains, 5 have space: 3+2 would fit, or 3+2 with domain=drive"
    );
    // Another drive of the lost drive's node will do.
    let mut drives = cluster(6, 1);
    drives.push(drive(7, 6, 100));
    let topology = Topology::new(drives);
    assert_eq!(propose_replacement(&topology, &asked, &others), Ok(DriveId(7)));
}

#[test]
fn on_few_nodes_a_replacement_keeps_the_spread_even() {
    let topology = Topology::new(cluster(3, 3));
    let mut asked = request(geometry(4, 2), 1);
    asked.policy.level = DomainLevel::Drive;
    asked.excluded = BTreeSet::from([DriveId(1)]);
    let others = [2, 4, 5, 7, 8].map(DriveId);
    assert_eq!(propose_replacement(&topology, &asked, &others), Ok(DriveId(3)));
}

#[test]
fn batches_of_different_seeds_pair_different_drives() {
    let topology = Topology::new(cluster(12, 1));
    let sets: BTreeSet<BTreeSet<DriveId>> = (0..40)
        .flat_map(|seed| {
            let asked = Request {
                seed,
                ..request(geometry(4, 2), 2)
            };
            propose(&topology, &asked).unwrap()
        })
        .map(|placement| placement.drives.into_iter().collect())
        .collect();
    // Declustered rebuild wants many partners: 924 sets are possible, 80 bands were placed.
    assert!(sets.len() > 60, "{} different sets", sets.len());
}
