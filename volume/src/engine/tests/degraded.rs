//! Columns that fail, stall, lie or are missing.

use std::time::Duration;

use super::*;

const GEOMETRY: Geometry = Geometry { k: 4, m: 2 };

#[test]
fn every_block_reads_with_any_m_drives_dead() {
    let mut fixture = Fixture::new(6, 128, GEOMETRY, 32 * MIB);
    let writes: Vec<(u64, u64)> = (0..150).map(|lba| (lba, lba + 1)).collect();
    fixture.write_all(&writes);
    for lba in 150..170 {
        fixture.write(lba, &[lba + 1]).unwrap();
    }
    for first in 1..=6 {
        for second in first..=6 {
            fixture.set_health(first, Health::Dead);
            fixture.set_health(second, Health::Dead);
            fixture.check_all();
            fixture.set_health(first, Health::Serving);
            fixture.set_health(second, Health::Serving);
        }
    }
    assert!(fixture.engine.stats().reconstructed > 0);
}

#[test]
fn a_drive_that_fails_in_the_middle_of_writes_costs_no_write() {
    for health in [Health::Dead, Health::Stalled] {
        let mut fixture = Fixture::new(6, 256, GEOMETRY, 32 * MIB);
        fixture.write(0, &[1]).unwrap();
        let futures: Vec<_> = (0..200u64)
            .map(|lba| {
                fixture
                    .engine
                    .write(Lba(lba), vec![block(lba + 5)], Durability::Cached)
            })
            .collect();
        let writes = fixture
            .world
            .start(fixture.owner.incarnation, futures_util::future::join_all(futures));
        fixture.world.run_for(Duration::from_micros(50)).unwrap();
        fixture.set_health(2, health);
        fixture.set_health(5, health);
        fixture.world.run_until(|| writes.is_done()).unwrap();
        assert!(writes.take().unwrap().iter().all(Result::is_ok));
        fixture.model.extend((0..200).map(|lba| (lba, lba + 5)));
        fixture.check_all();
        let stats = fixture.engine.stats();
        assert!(stats.stripes_abandoned > 0, "{stats:?}");
        fixture.fail_over();
        fixture.check_all();
        fixture.set_health(2, Health::Serving);
        fixture.set_health(5, Health::Serving);
        fixture.write(300, &[3]).unwrap();
        fixture.check_all();
    }
}

/// Stripes are abandoned because a drive hangs, and their blocks are written again while older stripes are still open. A
/// crash then leaves abandoned ones at or below the end of the epoch whose blocks lie in stripes above it: with one drive
/// more gone they cannot be decoded, and need not be.
#[test]
fn what_was_abandoned_below_the_end_of_an_epoch_and_lies_above_it_is_recovered() {
    for stalled_after in (2..60).step_by(3) {
        for crashed_after in 1..60 {
            let mut fixture = Fixture::new(3, 64, Geometry { k: 2, m: 1 }, 32 * MIB);
            fixture.write(0, &[1]).unwrap();
            let began = fixture.world.effects();
            for task in 0..6u64 {
                let engine = fixture.engine.clone();
                drop(fixture.world.start(fixture.owner.incarnation, async move {
                    for lba in (task..).step_by(6) {
                        let _ = engine
                            .write(Lba(lba), vec![block(lba + 5)], Durability::Cached)
                            .await;
                    }
                }));
            }
            let reached = |effects| fixture.world.effects() >= effects;
            fixture
                .world
                .run_until(|| reached(began + stalled_after))
                .unwrap();
            fixture.set_health(2, Health::Stalled);
            let stripes = fixture.engine.stats().stripes_abandoned;
            fixture
                .world
                .run_until(|| fixture.engine.stats().stripes_abandoned > stripes)
                .unwrap();
            let began = fixture.world.effects();
            fixture
                .world
                .run_until(|| reached(began + crashed_after))
                .unwrap();
            fixture.world.crash(fixture.owner.incarnation, InFlight::Lost);
            fixture.set_health(2, Health::Serving);
            fixture.set_health(1, Health::Dead);
            let opened = fixture.try_fail_over();
            assert_eq!(opened, Ok(()), "{stalled_after}, {crashed_after}");
        }
    }
}

/// What a hypervisor does that takes all processors away: the owner says nothing of drives that stood still with it.
#[test]
fn an_owner_that_stood_still_does_not_blame_its_drives() {
    let mut fixture = Fixture::new(6, 128, GEOMETRY, 32 * MIB);
    fixture.write(0, &[1]).unwrap();
    let before = fixture.engine.stats();
    let write = fixture.world.start(
        fixture.owner.incarnation,
        fixture.engine.write(Lba(1), vec![block(2)], Durability::Cached),
    );
    let read = fixture.world.start(
        fixture.owner.incarnation,
        fixture.engine.read(LbaRange {
            start: Lba(0),
            count: 1,
        }),
    );
    fixture.world.run_for(Duration::from_micros(1)).unwrap();
    for drive in 1..=6 {
        fixture.set_health(drive, Health::Stalled);
    }
    fixture.world.pause(fixture.owner.incarnation);
    fixture.world.run_for(Duration::from_secs(1)).unwrap();
    fixture.world.resume(fixture.owner.incarnation);
    fixture.world.run_for(Duration::from_millis(100)).unwrap();
    assert!(!write.is_done() && !read.is_done(), "both were under way");
    for drive in 1..=6 {
        fixture.set_health(drive, Health::Serving);
    }
    fixture
        .world
        .run_until(|| write.is_done() && read.is_done())
        .unwrap();
    assert_eq!(write.take().unwrap(), Ok(()));
    assert_eq!(read.take().unwrap(), Ok(block(1)));
    let after = fixture.engine.stats();
    assert_eq!(after.stripes_abandoned, before.stripes_abandoned);
    assert_eq!(after.drives_suspected, before.drives_suspected);
}

#[test]
fn below_one_plus_m_columns_writes_wait_and_go_on_by_themselves() {
    let mut fixture = Fixture::new(6, 128, GEOMETRY, 32 * MIB);
    fixture.write(0, &[1]).unwrap();
    for drive in 1..=4 {
        fixture.set_health(drive, Health::Dead);
    }
    let write = fixture.world.start(
        fixture.owner.incarnation,
        fixture.engine.write(Lba(1), vec![block(2)], Durability::Cached),
    );
    fixture.world.run_for(Duration::from_secs(20)).unwrap();
    assert!(!write.is_done(), "a write neither fails nor weakens");
    for drive in 1..=4 {
        fixture.set_health(drive, Health::Serving);
    }
    fixture.world.run_until(|| write.is_done()).unwrap();
    assert_eq!(write.take().unwrap(), Ok(()));
    fixture.model.insert(1, 2);
    fixture.check(0, 2);
}

#[test]
fn a_flipped_bit_is_noticed_served_around_and_repaired() {
    let mut fixture = Fixture::new(6, 128, GEOMETRY, 32 * MIB);
    let writes: Vec<(u64, u64)> = (0..64).map(|lba| (lba, lba + 1)).collect();
    fixture.write_all(&writes);
    // Every block of one drive is damaged.
    let drive = fixture.world.drive(DriveId(3));
    for at in 0..128 * 256 {
        if drive.holds(at) {
            drive.flip_bit(at, 77);
        }
    }
    fixture.check_all();
    fixture.world.run_for(Duration::from_secs(1)).unwrap();
    let stats = fixture.engine.stats();
    assert!(stats.checksum_mismatches > 0, "{stats:?}");
    assert_eq!(stats.repaired, stats.checksum_mismatches);
    fixture.check_all();
    assert_eq!(
        fixture.engine.stats().checksum_mismatches,
        stats.checksum_mismatches
    );
    fixture.fail_over();
    fixture.check_all();
}

/// A block that is read by itself takes a shorter way than several.
#[test]
fn a_single_block_is_served_around_a_drive_that_lies_fails_or_hangs() {
    for health in [Health::Serving, Health::Dead, Health::Stalled] {
        let mut fixture = Fixture::new(6, 128, GEOMETRY, 32 * MIB);
        let writes: Vec<(u64, u64)> = (0..64).map(|lba| (lba, lba + 1)).collect();
        fixture.write_all(&writes);
        let drive = fixture.world.drive(DriveId(3));
        drive.set_health(health);
        for at in (0..128 * 256).filter(|at| health == Health::Serving && drive.holds(*at)) {
            drive.flip_bit(at, 77);
        }
        for lba in 0..64 {
            fixture.check(lba, 1);
        }
        let stats = fixture.engine.stats();
        assert!(stats.reconstructed > 0, "{stats:?}");
        assert_eq!(
            stats.checksum_mismatches > 0,
            health == Health::Serving,
            "{stats:?}"
        );
        assert_eq!(stats.drives_suspected > 0, health == Health::Stalled, "{stats:?}");
    }
}

#[test]
fn recovery_needs_all_but_m_columns_and_says_which_are_missing() {
    for missing in 0..=3 {
        let mut fixture = Fixture::new(6, 128, GEOMETRY, 32 * MIB);
        for lba in 0..30 {
            fixture.write(lba, &[lba + 1]).unwrap();
        }
        for drive in 0..missing {
            fixture.set_health(2 * drive + 1, Health::Dead);
        }
        let result = fixture.try_fail_over();
        if missing <= 2 {
            result.unwrap();
            fixture.check_all();
            fixture.write(40, &[9]).unwrap();
            fixture.check_all();
        } else {
            assert!(
                matches!(result, Err(VolumeError::TooManyMissing { .. })),
                "{result:?}"
            );
        }
    }
}

#[test]
fn a_drive_that_is_away_does_not_make_the_owner_hoard_bands() {
    let mut fixture = Fixture::new(6, 256, Geometry { k: 4, m: 2 }, 64 * MIB);
    fixture.write(0, &[1]).unwrap();
    fixture.set_health(2, Health::Dead);
    for lba in 0..300 {
        fixture.write(lba, &[lba + 2]).unwrap();
    }
    let bands = fixture.engine.stats().bands;
    assert!(bands <= 12, "{bands} bands for 300 blocks");
    fixture.check_all();
}

#[test]
fn writes_go_on_when_drives_come_back_after_too_many_were_away() {
    let mut fixture = Fixture::new(6, 256, Geometry { k: 4, m: 2 }, 64 * MIB);
    fixture.write(0, &[1]).unwrap();
    for round in 0..4 {
        for drive in 1..=4 {
            fixture.set_health(drive, Health::Stalled);
        }
        let world = fixture.world.clone();
        let back = world.now().after(Duration::from_secs(5));
        world.at(back, None, |world| {
            for drive in 1..=4 {
                world.drive(DriveId(drive)).set_health(Health::Serving);
            }
        });
        fixture.write(round, &[round + 2]).unwrap();
    }
    fixture.check_all();
}

/// What a drive writes elsewhere lands over its other blocks: of any stripe two columns are wrong at most, on the one drive.
#[test]
fn a_drive_that_misdirects_writes_costs_no_read() {
    for seed in 0..300 {
        let world = World::new(seed);
        let drives = 6;
        add_drives(&world, drives, &DriveSpec::new(40, 0));
        world.create_volume(VOLUME, 16 * BLOCK_BYTES as u64, GEOMETRY);
        let settings = Settings {
            chunk_size_max: weft_proto::band::ChunkSize::Mib1,
            log_budget_bytes: MIB,
            garbage_max: crate::settings::GarbageMax::always(0.3),
            map: crate::map::MapSettings {
                cache_bytes: 64 << 10,
                runs_max: 4,
                merge_fan_in: 2,
                ..crate::map::MapSettings::default()
            },
            ..Settings::default()
        };
        let owner = take_over(&world, VOLUME).expect("not stopped");
        let engine = open(&world, &owner, &settings).expect("opens");
        let mut rng = Rng::new(seed).fork(77);
        let failed: Rc<std::cell::RefCell<Vec<String>>> = Rc::default();
        for task in 0..4 {
            let (engine, failed, mut rng) = (engine.clone(), Rc::clone(&failed), rng.fork(task));
            let env = world.env(owner.incarnation);
            drop(world.start(owner.incarnation, async move {
                for step in 0..400 {
                    let count = if rng.chance(1, 3) { rng.between(1, 8) } else { 1 };
                    let start = Lba(rng.below(16 - count + 1));
                    if rng.chance(1, 2) {
                        let data = (0..count).map(|index| block(step * 100 + index + task)).collect();
                        let _ = engine.write(start, data, Durability::Durable).await;
                    } else if rng.chance(1, 10) {
                        let _ = engine.deallocate(vec![LbaRange { start, count }]).await;
                    } else if let Err(error) = engine.0.read_range(LbaRange { start, count }).await {
                        failed
                            .borrow_mut()
                            .push(format!("read of {count} at {start}: {error:?}"));
                    }
                    let pause = Duration::from_micros(rng.between(0, 3_000));
                    crate::seams::Env::sleep_until(&*env, crate::seams::Env::now(&*env).after(pause)).await;
                }
            }));
        }
        for _ in 0..4 {
            world
                .run_for(Duration::from_millis(rng.between(50, 250)))
                .unwrap();
            let (by, count) = (rng.between(1, 600), rng.between(1, 20) as u32);
            world
                .drive(DriveId(5))
                .set_astray(crate::testing::drive::Astray::Misdirected(by), count);
        }
        world.run_for(Duration::from_millis(400)).unwrap();
        assert_eq!(*failed.borrow(), Vec::<String>::new(), "seed {seed}");
    }
}

#[test]
fn stripes_that_are_abandoned_again_and_again_do_not_fill_the_window_for_good() {
    // So large that chunks grow past 1 MiB, whose window is the whole band.
    let mut fixture = Fixture::new(6, 512, GEOMETRY, 4 << 30);
    let core = Rc::clone(&fixture.engine.0);
    let mut lba = 0;
    while core
        .host
        .current
        .borrow()
        .as_ref()
        .is_none_or(|band| band.rows <= 256)
    {
        let writes: Vec<(u64, u64)> = (lba..lba + 512).map(|lba| (lba, lba + 1)).collect();
        fixture.write_all(&writes);
        lba += 512;
    }
    let futures: Vec<_> = (0..512u64)
        .map(|lba| {
            fixture
                .engine
                .write(Lba(lba), vec![block(lba + 7)], Durability::Cached)
        })
        .collect();
    let writes = fixture
        .world
        .start(fixture.owner.incarnation, futures_util::future::join_all(futures));
    for _ in 0..4 {
        fixture.world.run_until(|| core.host.in_flight.get() > 0).unwrap();
        for drive in 1..=6 {
            fixture.set_health(drive, Health::Stalled);
        }
        fixture.world.run_for(Duration::from_millis(400)).unwrap();
        for drive in 1..=6 {
            fixture.set_health(drive, Health::Serving);
        }
    }
    fixture.world.run_for(Duration::from_secs(10)).unwrap();
    assert!(writes.is_done(), "{:?}", fixture.engine.stats());
    assert!(writes.take().unwrap().iter().all(Result::is_ok));
    fixture.model.extend((0..512).map(|lba| (lba, lba + 7)));
    fixture.check_all();
    fixture.fail_over();
    fixture.check_all();
}
