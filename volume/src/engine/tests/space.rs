//! Compaction, full pools, TRIM.

use super::*;
use crate::band::{BandState, Phase};

const GEOMETRY: Geometry = Geometry { k: 4, m: 2 };

/// Settings for a pool so small that a big chunk would take it whole.
fn tight() -> Settings {
    Settings {
        log_budget_bytes: 8 * MIB,
        chunk_size_max: weft_proto::band::ChunkSize::Mib1,
        ..Settings::default()
    }
}

#[test]
fn a_pool_at_eighty_percent_takes_five_times_its_size_in_overwrites() {
    // 6 drives of 24 MiB, of which user bands may take 18 on each: 4 columns of data, less a row in 33 for headers.
    let mut fixture = Fixture::with(6, 24, GEOMETRY, 256 * MIB, tight());
    fixture
        .world
        .configure_metadata(crate::testing::metadata::MetadataSpec {
            reserve_mib: 4,
            ..Default::default()
        });
    let usable_blocks = 18 * 256 * 4 * 32 / 33;
    let live = usable_blocks * 8 / 10;
    let mut version = 0;
    for start in (0..live).step_by(64) {
        let writes: Vec<(u64, u64)> = (start..(start + 64).min(live))
            .map(|lba| {
                version += 1;
                (lba, version)
            })
            .collect();
        fixture.write_all(&writes);
    }
    let mut written = 0;
    while written < 5 * usable_blocks {
        let mut writes = BTreeMap::new();
        for _ in 0..128 {
            version += 1;
            writes.insert(fixture.rng.below(live), version);
        }
        written += writes.len() as u64;
        let writes: Vec<(u64, u64)> = writes.into_iter().collect();
        fixture.write_all(&writes);
    }
    fixture.check_all();
    let stats = fixture.engine.stats();
    assert!(stats.compacted_blocks > 0, "{stats:?}");
    fixture.fail_over();
    fixture.check_all();
    fixture.write(0, &[1]).unwrap();
    assert!(
        fixture.world.violations().is_empty(),
        "{:?}",
        fixture.world.violations()
    );
}

/// A volume that has filled its pool, and how many blocks were taken before one write was refused.
fn full_pool() -> (Fixture, u64) {
    let mut fixture = Fixture::with(6, 16, GEOMETRY, 256 * MIB, tight());
    fixture
        .world
        .configure_metadata(crate::testing::metadata::MetadataSpec {
            reserve_mib: 4,
            ..Default::default()
        });
    let mut lba = 0;
    let refused = loop {
        let fills: Vec<u64> = (lba..lba + 64).map(|lba| lba + 1).collect();
        match fixture.write(lba, &fills) {
            Ok(()) => lba += 64,
            Err(error) => break error,
        }
        assert!(lba < 256 * 256, "the pool never fills");
    };
    assert_eq!(refused, BlockError::CapacityExceeded);
    assert!(lba > 4 * 1024, "only {lba} blocks were taken");
    (fixture, lba)
}

/// TRIM brings back the space of a pool that was filled with `taken` blocks.
fn recovers_with_trim(mut fixture: Fixture, taken: u64) {
    let range = |start, count| LbaRange {
        start: Lba(start),
        count,
    };
    // What was refused may have been written in part: those blocks are nobody's.
    fixture
        .run(fixture.engine.deallocate(vec![range(taken, 64)]))
        .unwrap();
    fixture.check_all();
    fixture
        .run(fixture.engine.deallocate(vec![range(0, taken / 2)]))
        .unwrap();
    for trimmed in 0..taken / 2 {
        fixture.model.insert(trimmed, 0);
    }
    fixture.check_all();
    let mut tries = 0;
    while fixture.write(taken, &[1, 2, 3]).is_err() {
        tries += 1;
        assert!(tries < 50, "space does not come back");
        fixture
            .world
            .run_for(std::time::Duration::from_millis(200))
            .unwrap();
    }
    for again in (0..taken / 4).step_by(64) {
        let fills: Vec<u64> = (again..again + 64).map(|lba| lba + 7).collect();
        fixture.write(again, &fills).unwrap();
    }
    fixture.check_all();
    fixture.fail_over();
    fixture.check_all();
}

#[test]
fn a_full_pool_refuses_only_what_needs_space_and_recovers_with_trim() {
    let (fixture, taken) = full_pool();
    recovers_with_trim(fixture, taken);
}

#[test]
fn a_full_pool_is_read_and_trimmed_though_no_band_takes_appends() {
    let (fixture, taken) = full_pool();
    // What the internal stream last had to write filled its band, and nothing asks for another.
    let core = Rc::clone(&fixture.engine.0);
    core.space.tight.set(true);
    for stream in [&core.host, &core.internal] {
        while core.open_ready(stream, 0) {}
    }
    core.retire(&core.host);
    core.retire(&core.internal);
    fixture.world.run_for(std::time::Duration::from_secs(2)).unwrap();
    let unsealed = |band: &&Rc<BandState>| band.phase.get() != Phase::Sealed;
    assert_eq!(core.bands.borrow().values().filter(unsealed).count(), 1);
    assert!(fixture.engine.is_leased());
    recovers_with_trim(fixture, taken);
}

#[test]
fn narrow_stripes_of_a_quiet_host_are_made_wide() {
    let mut fixture = Fixture::with(6, 128, GEOMETRY, 64 * MIB, tight());
    for lba in 0..3000 {
        fixture.write(lba, &[lba + 1]).unwrap();
    }
    fixture.world.run_for(std::time::Duration::from_secs(5)).unwrap();
    fixture.checkpoint();
    fixture.checkpoint();
    fixture.check_all();
    let stats = fixture.engine.stats();
    assert!(stats.compacted_blocks > 0, "{stats:?}");
    assert!(stats.bands_freed > 0, "{stats:?}");
}

#[test]
fn a_trim_that_comes_during_a_checkpoint_is_not_freed_with_its_band() {
    // The band that takes the TRIM's record is filled, dies and is sealed while a checkpoint is under way: the
    // checkpoint's map does not have the TRIM, so its root must keep the band.
    let mut fixture = Fixture::with(6, 128, GEOMETRY, 256 * MIB, tight());
    for start in (0..16_384).step_by(64) {
        let fills: Vec<u64> = (start..start + 64).map(|lba| lba + 1).collect();
        fixture.write(start, &fills).unwrap();
    }
    let engine = fixture.engine.clone();
    let trim = |start, count| {
        engine.deallocate(vec![LbaRange {
            start: Lba(start),
            count,
        }])
    };
    let scratch = |at: u64| {
        let writes = (0..2048).step_by(64).map(|start| {
            let data = (start..start + 64).map(|fill| block(fill + 1)).collect();
            engine.write(Lba(at + start), data, Durability::Cached)
        });
        futures_util::future::try_join_all(writes)
    };
    // Away from the band that was open at the capture; the TRIM; and all that lies around its record dies. The first
    // writes pass the log budget, so a checkpoint captures just before the TRIM.
    let (before, trimmed, after) = (scratch(20_000), trim(0, 16_384), scratch(30_000));
    let rest = [trim(20_000, 2_048), trim(30_000, 2_048)];
    let published = engine.stats().checkpoints;
    fixture.run(async move {
        before.await.unwrap();
        trimmed.await.unwrap();
        after.await.unwrap();
        for trimmed in rest {
            trimmed.await.unwrap();
        }
    });
    for trimmed in 0..16_384 {
        fixture.model.insert(trimmed, 0);
    }
    // At the next publication: a later one would have the TRIM in its map.
    while engine.stats().checkpoints == published {
        fixture
            .world
            .run_for(std::time::Duration::from_micros(100))
            .unwrap();
    }
    fixture.fail_over();
    fixture.check_all();
}

#[test]
fn garbage_that_a_busy_volume_keeps_goes_once_it_is_quiet() {
    let mut settings = tight();
    settings.map.runs_max = 1; // merged at every checkpoint, so that band counts are exact
    let mut fixture = Fixture::with(6, 128, GEOMETRY, 256 * MIB, settings);
    // Everything once and, all over, twice more: two thirds are dead in the end, some of every band.
    let mut rng = Rng::new(11);
    for pass in 1..=3_u64 {
        for start in (0..4_096).step_by(64) {
            let lba = |at: u64, rng: &mut Rng| if pass == 1 { at } else { rng.below(4_096) };
            let writes: BTreeMap<u64, u64> = (start..start + 64)
                .map(|at| (lba(at, &mut rng), pass * 1_000_000 + at))
                .collect();
            fixture.write_all(&writes.into_iter().collect::<Vec<_>>());
        }
    }
    fixture.checkpoint();
    fixture.world.run_for(std::time::Duration::from_secs(2)).unwrap();
    let kept = fixture.engine.stats();
    assert_eq!(kept.compacted_blocks, 0, "while hosts fill bands: {kept:?}");
    fixture.world.run_for(std::time::Duration::from_secs(8)).unwrap();
    fixture.checkpoint();
    let quiet = fixture.engine.stats();
    assert!(quiet.compacted_blocks > 0, "{quiet:?}");
    assert!(
        quiet.allocated_bytes < kept.allocated_bytes,
        "{} of {} bytes are still held",
        quiet.allocated_bytes,
        kept.allocated_bytes
    );
    fixture.check_all();
}

#[test]
fn a_tight_pool_makes_a_volume_give_up_garbage_that_it_would_keep() {
    let mut settings = tight();
    settings.map.runs_max = 1; // merged at every checkpoint, so that band counts are exact
    let mut fixture = Fixture::with(6, 128, GEOMETRY, 256 * MIB, settings);
    let write = |fixture: &mut Fixture, from: u64, version: u64| {
        for start in (from..from + 8_192).step_by(64) {
            let writes: Vec<(u64, u64)> = (start..start + 64)
                .map(|lba| (lba, version * 1_000_000 + lba + 1))
                .collect();
            fixture.write_all(&writes);
        }
    };
    write(&mut fixture, 0, 1);
    // A third of what was written is dead, spread over all bands.
    let overwrites: Vec<(u64, u64)> = (0..8_192).step_by(3).map(|lba| (lba, 2_000_000 + lba)).collect();
    for writes in overwrites.chunks(64) {
        fixture.write_all(writes);
    }
    fixture.checkpoint();
    fixture.world.run_for(std::time::Duration::from_secs(2)).unwrap();
    let kept = fixture.engine.stats();
    assert_eq!(kept.compacted_blocks, 0, "{kept:?}");
    fixture.engine.set_tight(true);
    fixture.world.run_for(std::time::Duration::from_secs(2)).unwrap();
    let busy = fixture.engine.stats();
    assert_eq!(busy.compacted_blocks, 0, "while hosts fill bands: {busy:?}");
    fixture.world.run_for(std::time::Duration::from_secs(8)).unwrap();
    fixture.checkpoint();
    let given_up = fixture.engine.stats();
    assert!(given_up.compacted_blocks > 0, "{given_up:?}");
    assert!(
        given_up.allocated_bytes < kept.allocated_bytes,
        "{} of {} bytes are still held",
        given_up.allocated_bytes,
        kept.allocated_bytes
    );
    fixture.check_all();
}
