//! Writing, reading, opening again.

use std::time::Duration;

use super::*;
use crate::seams::Timestamp;

fn fixture() -> Fixture {
    Fixture::new(6, 256, Geometry { k: 4, m: 2 }, 64 * MIB)
}

#[test]
fn what_was_never_written_reads_as_zeroes() {
    let fixture = fixture();
    fixture.check(0, 8);
    assert_eq!(fixture.engine.info().blocks, 64 * MIB / 4096);
}

#[test]
fn a_block_reads_back_after_its_write() {
    let mut fixture = fixture();
    fixture.write(5, &[1]).unwrap();
    fixture.write(6, &[2, 3, 0, 4]).unwrap();
    fixture.write(5, &[9]).unwrap();
    fixture.check(0, 16);
}

#[test]
fn depth_makes_stripes_wide() {
    let mut fixture = fixture();
    let writes: Vec<(u64, u64)> = (0..512).map(|lba| (lba * 3, lba + 1)).collect();
    fixture.write_all(&writes);
    fixture.check_all();
    let stats = fixture.engine.stats();
    assert!(
        stats.stripes.iter().any(|((w, d), _)| *w == 4 && *d >= 8),
        "{stats:?}"
    );
}

#[test]
fn a_range_outside_is_refused() {
    let fixture = fixture();
    let blocks = fixture.engine.info().blocks;
    for (start, count) in [(blocks, 1), (blocks - 1, 2), (u64::MAX, 2)] {
        let range = LbaRange {
            start: Lba(start),
            count,
        };
        assert!(matches!(
            fixture.run(fixture.engine.read(range)),
            Err(BlockError::OutOfRange { .. })
        ));
        assert!(matches!(
            fixture.run(fixture.engine.deallocate(vec![range])),
            Err(BlockError::OutOfRange { .. })
        ));
    }
    let odd = vec![Bytes::from_static(&[1; 100])];
    assert!(matches!(
        fixture.run(fixture.engine.write(Lba(0), odd, Durability::Durable)),
        Err(BlockError::InvalidLength { .. })
    ));
}

#[test]
fn trimmed_and_zeroed_blocks_read_as_zeroes_after_every_kind_of_reopening() {
    let mut fixture = fixture();
    let writes: Vec<(u64, u64)> = (0..200).map(|lba| (lba, lba + 1)).collect();
    fixture.write_all(&writes);
    fixture.checkpoint();
    let range = |start, count| LbaRange {
        start: Lba(start),
        count,
    };
    fixture
        .run(fixture.engine.deallocate(vec![range(10, 50), range(100, 1)]))
        .unwrap();
    fixture
        .run(
            fixture
                .engine
                .write_zeroes(range(120, 20), true, Durability::Durable),
        )
        .unwrap();
    for lba in (10..60).chain(100..101).chain(120..140) {
        fixture.model.insert(lba, 0);
    }
    fixture.check_all();
    fixture.fail_over();
    fixture.check_all();
    for _ in 0..4 {
        fixture.write(1000, &[7]).unwrap();
        fixture.checkpoint();
    }
    fixture.fail_over();
    fixture.check_all();
    fixture.move_over();
    fixture.check_all();
}

#[test]
fn everything_acknowledged_survives_a_crash_without_a_checkpoint() {
    let mut fixture = fixture();
    for round in 0..4 {
        for index in 0..50 {
            let lba = fixture.rng.below(400);
            fixture.write(lba, &[round * 1000 + index + 1]).unwrap();
        }
        fixture.fail_over();
        fixture.check_all();
    }
}

#[test]
fn everything_survives_checkpoints_crashes_and_moves() {
    let mut fixture = fixture();
    for round in 0..6 {
        let writes: Vec<(u64, u64)> = (0..300)
            .map(|index| (fixture.rng.below(3000), round * 1000 + index + 1))
            .collect();
        // One version of a block at a time: their order is another test's.
        let writes: Vec<(u64, u64)> = writes
            .into_iter()
            .collect::<BTreeMap<_, _>>()
            .into_iter()
            .collect();
        fixture.write_all(&writes);
        match round % 3 {
            0 => fixture.checkpoint(),
            1 => fixture.fail_over(),
            _ => fixture.move_over(),
        }
        fixture.check_all();
    }
    assert!(
        fixture.world.violations().is_empty(),
        "{:?}",
        fixture.world.violations()
    );
}

#[test]
fn a_planned_move_copies_nothing() {
    let mut fixture = fixture();
    let writes: Vec<(u64, u64)> = (0..2000).map(|lba| (lba, lba + 1)).collect();
    fixture.write_all(&writes);
    let before: u64 = fixture
        .world
        .all_drives()
        .iter()
        .map(|drive| drive.bytes_written())
        .sum();
    let start = fixture.world.now();
    fixture.move_over();
    let pause = fixture.world.now().0 - start.0;
    let after: u64 = fixture
        .world
        .all_drives()
        .iter()
        .map(|drive| drive.bytes_written())
        .sum();
    fixture.check_all();
    // The run of the changes, and two roots.
    assert!(after - before < 2 * MIB, "{} bytes", after - before);
    assert!(pause < 100_000_000, "{pause} ns");
}

#[test]
fn overlapping_writes_take_effect_in_the_order_of_arrival() {
    let mut fixture = fixture();
    for round in 0..20 {
        let futures: Vec<_> = (1..=10)
            .map(|version| {
                fixture
                    .engine
                    .write(Lba(3), vec![block(round * 100 + version)], Durability::Cached)
            })
            .collect();
        for result in fixture.run(futures_util::future::join_all(futures)) {
            result.unwrap();
        }
        fixture.model.insert(3, round * 100 + 10);
        fixture.check(3, 1);
    }
    fixture.fail_over();
    fixture.check(3, 1);
}

#[test]
fn without_a_lease_nothing_is_answered_until_it_is_back() {
    let mut fixture = fixture();
    fixture.write(1, &[1]).unwrap();
    fixture.owner.lease.expire();
    fixture.world.run_for(Duration::from_secs(2)).unwrap();
    let incarnation = fixture.owner.incarnation;
    let write = fixture.world.start(
        incarnation,
        fixture.engine.write(Lba(1), vec![block(2)], Durability::Cached),
    );
    let read = fixture.world.start(
        incarnation,
        fixture.engine.read(LbaRange {
            start: Lba(1),
            count: 1,
        }),
    );
    fixture.world.run_for(Duration::from_secs(5)).unwrap();
    assert!(!write.is_done());
    assert!(!read.is_done());
    fixture.owner.lease.renew();
    fixture
        .world
        .run_until(|| write.is_done() && read.is_done())
        .unwrap();
    assert_eq!(write.take().unwrap(), Ok(()));
    fixture.model.insert(1, 2);
    fixture.check(1, 1);
}

#[test]
fn a_fenced_engine_stops_and_says_so() {
    let mut fixture = fixture();
    fixture.write(1, &[1]).unwrap();
    let former = fixture.engine.clone();
    let former_owner = fixture.owner.incarnation;
    fixture.owner = take_over(&fixture.world, VOLUME).unwrap();
    let late = fixture.world.start(
        former_owner,
        former.write(Lba(1), vec![block(66)], Durability::Cached),
    );
    let said = fixture.world.start(former_owner, {
        let former = former.clone();
        async move { former.fenced().await }
    });
    fixture
        .world
        .run_until(|| late.is_done() && said.is_done())
        .unwrap();
    assert_eq!(late.take().unwrap(), Err(BlockError::NotReady));
    fixture.engine = open(&fixture.world, &fixture.owner, &fixture.settings).unwrap();
    fixture.check(0, 4);
    let read = former.read(LbaRange {
        start: Lba(1),
        count: 1,
    });
    assert_eq!(
        fixture.world.block_on(former_owner, read).unwrap(),
        Err(BlockError::NotReady)
    );
}

#[test]
fn a_volume_is_a_block_device_like_any_other() {
    let fixture = fixture();
    let engine = fixture.engine.clone();
    // The cases take a device that may hold anything at first. Blocks without data would be read in no time, and
    // virtual time would stand still for a case that polls.
    fixture.run(async move {
        weft_block::testing::conformance(async || {
            let data = (1..=256).map(block).collect();
            let written = engine.write(Lba(0), data, Durability::Cached).await;
            assert_eq!(written, Ok(()));
            Rc::new(engine.clone()) as weft_block::Device
        })
        .await;
    });
}

/// Reads of all bands at once wait for each other longer than a drive may take: sound drives are passed over, more than
/// m columns of a band are missing, and recovery begins again, for ever.
#[test]
fn recovery_does_not_flood_the_drives_with_the_bands_it_scans() {
    let settings = Settings {
        log_budget_bytes: 1 << 40,
        ..Settings::default()
    };
    let mut fixture = Fixture::with(6, 256, Geometry { k: 4, m: 2 }, 64 * MIB, settings);
    for round in 0..12 {
        let writes: Vec<(u64, u64)> = (0..512).map(|lba| (round * 512 + lba, lba + 1)).collect();
        fixture.write_all(&writes);
    }
    let bands = fixture.engine.stats().bands;
    assert!(bands >= 8, "only {bands} bands to scan");
    let drives: Vec<_> = (1..=6).map(|drive| fixture.world.drive(DriveId(drive))).collect();
    for drive in &drives {
        drive.take_in_flight_peak();
    }
    fixture.fail_over();
    let peak = drives.iter().map(|drive| drive.take_in_flight_peak()).max();
    assert!(
        peak.is_some_and(|peak| peak <= 4),
        "{peak:?} commands of {bands} bands at once"
    );
    fixture.check_all();
}

/// A deleted volume's chunks go to others. A write of it that a drive still holds would land in their data.
#[test]
fn a_deletion_waits_for_the_writes_under_way_and_names_the_bands_of_those_that_do_not_end() {
    for stalled in [false, true] {
        let mut fixture = fixture();
        fixture.write(0, &[1]).unwrap();
        if stalled {
            fixture.set_health(2, Health::Stalled);
        }
        let writes: Vec<_> = (0..64)
            .map(|lba| {
                fixture
                    .engine
                    .write(Lba(lba), vec![block(lba + 2)], Durability::Cached)
            })
            .collect();
        drop(
            fixture
                .world
                .start(fixture.owner.incarnation, futures_util::future::join_all(writes)),
        );
        fixture.world.run_for(Duration::from_micros(30)).unwrap();
        let engine = fixture.engine.clone();
        let began = fixture.world.now();
        let limit = Duration::from_secs(3);
        let unsettled = fixture.run(async move { engine.abort_and_drain(limit).await });
        let waited = fixture.world.now().0 - began.0;
        let in_flight: Vec<u32> = (1..=6)
            .filter(|drive| {
                let drive = fixture.world.drive(DriveId(*drive));
                drive.has_writes_in_flight(0, u64::MAX / 2)
            })
            .collect();
        if stalled {
            assert_eq!(in_flight, [2], "the drive that hangs holds a write for good");
            assert!(!unsettled.is_empty(), "and the chunk of that write is named");
            assert!(
                unsettled.iter().all(|chunk| chunk.drive == DriveId(2)),
                "{unsettled:?}"
            );
            assert!(waited >= limit.as_nanos() as u64);
        } else {
            assert!(waited > 0, "writes were under way");
            assert_eq!((in_flight, unsettled), (vec![], vec![]));
        }
    }
}

/// A deletion may come at any moment of an opening, before and after its first stripes are sent.
#[test]
fn an_opening_that_is_ended_names_the_chunks_that_a_write_may_still_reach() {
    let limit = Duration::from_secs(3);
    let (mut sent, mut named) = (0, 0);
    for moment in 1..100 {
        for stalled in [false, true] {
            let mut fixture = fixture();
            fixture.write(0, &[1, 2, 3]).unwrap();
            fixture.world.crash(fixture.owner.incarnation, InFlight::Mixed);
            let owner = take_over(&fixture.world, VOLUME).expect("not stopped");
            let opening_ends = fixture.world.now().after(Duration::from_micros(100 * moment));
            if stalled {
                // What is sent in the last moment before hangs.
                let drive = fixture.world.drive(DriveId(2));
                let hangs = Timestamp(opening_ends.0 - 50_000);
                let hang = move |_: &Rc<World>| drive.set_health(Health::Stalled);
                fixture.world.at(hangs, None, hang);
            }
            let before = written(&fixture);
            let opening = Opening::new(owner.seams.clone(), small(), identity(), owner.grant.clone());
            let opened = opening.clone();
            let env = Rc::clone(&owner.seams.env);
            let drained = async move {
                let cut = crate::sync::within(&*env, opening_ends, Box::pin(opened.open())).await;
                assert!(cut.is_none_or(|opened| opened.is_ok()));
                opening.abort_and_drain(limit).await
            };
            let unsettled = fixture
                .world
                .block_on(owner.incarnation, drained)
                .expect("not stopped");
            let in_flight = (1..=6).any(|drive| {
                let drive = fixture.world.drive(DriveId(drive));
                drive.has_writes_in_flight(0, u64::MAX / 2)
            });
            assert!(stalled || unsettled.is_empty(), "all writes have ended");
            assert_eq!(in_flight, !unsettled.is_empty(), "{moment}: {unsettled:?}");
            assert!(
                unsettled.iter().all(|chunk| chunk.drive == DriveId(2)),
                "no other hangs"
            );
            sent += u64::from(written(&fixture) > before);
            named += u64::from(in_flight);
        }
    }
    assert!(
        sent > 10 && named > 3,
        "{sent} openings had sent something, {named} to a drive that hangs"
    );
}

fn written(fixture: &Fixture) -> u64 {
    let drives = (1..=6).map(|drive| fixture.world.drive(DriveId(drive)));
    drives.map(|drive| drive.bytes_written()).sum()
}
