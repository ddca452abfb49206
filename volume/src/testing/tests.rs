//! The simulation itself: it must keep its promises, and its checkers must find what is planted.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use weft_block::{BlockError, Device, Durability};
use weft_proto::band::{Band, ChunkSize, Geometry, RootPointer, RootUpdate};
use weft_proto::id::{BandId, DriveId, Epoch, IncarnationId, StripeNumber, VolumeId};
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use super::cluster::{Takeover, add_drives, readmit, seams, take_over};
use super::drive::{DriveSpec, Health};
use super::metadata::MetadataSpec;
use super::world::{InFlight, Stopped, World};
use crate::seams::{BandPurpose, DirectoryError, Env, FenceError, Seams};

const VOLUME: VolumeId = VolumeId(7);
const DRIVE: DriveId = DriveId(1);

fn filled(byte: u8) -> Bytes {
    vec![byte; BLOCK_BYTES].into()
}

fn block(lba: u64) -> LbaRange {
    LbaRange {
        start: Lba(lba),
        count: 1,
    }
}

/// A world with one drive, and one incarnation that reaches it.
fn one_drive(seed: u64, spec: DriveSpec) -> (Rc<World>, IncarnationId, Device) {
    let world = World::new(seed);
    world.add_drive(DRIVE, spec);
    let incarnation = world.incarnation();
    let device = world.drive(DRIVE).handle(incarnation);
    (world, incarnation, device)
}

/// A world with drives and a volume of 2+1.
fn volume(seed: u64, drives: u32) -> Rc<World> {
    let world = World::new(seed);
    add_drives(&world, drives, &DriveSpec::new(16, 0));
    world.create_volume(VOLUME, 1 << 20, Geometry { k: 2, m: 1 });
    world
}

fn grant(world: &World, seams: &Seams, who: IncarnationId, epoch: u64) -> Result<Band, DirectoryError> {
    let bands = seams
        .directory
        .grant_bands(VOLUME, Epoch(epoch), ChunkSize::Mib1, 1, BandPurpose::User);
    let mut bands = world.block_on(who, bands).unwrap()?;
    Ok(bands.remove(0))
}

/// Takes over, and finishes with a root in a band of its own.
fn serve(world: &Rc<World>, ended_at: u64) -> (Takeover, Band) {
    let owner = take_over(world, VOLUME).unwrap();
    let band = grant(world, &owner.seams, owner.incarnation, owner.grant.epoch.0).unwrap();
    let (epoch, version) = (owner.grant.epoch.0, owner.grant.root_version);
    let finish = owner.seams.directory.finish_takeover(
        update(epoch, version, root_in(band.id, 1), &[]),
        owner.grant.recover,
        StripeNumber(ended_at),
    );
    world.block_on(owner.incarnation, finish).unwrap().unwrap();
    (owner, band)
}

fn root_in(band: BandId, stripe: u64) -> RootPointer {
    RootPointer {
        band,
        row: 0,
        start: 0,
        w: 1,
        d: 1,
        stripe: StripeNumber(stripe),
    }
}

fn update(epoch: u64, expected_version: u64, root: RootPointer, freed: &[BandId]) -> RootUpdate {
    RootUpdate {
        volume: VOLUME,
        epoch: Epoch(epoch),
        expected_version,
        root,
        freed: freed.to_vec(),
        unsettled: vec![],
    }
}

// Clock and tasks.

#[test]
fn time_passes_only_when_nothing_can_run() {
    let world = World::new(1);
    let who = world.incarnation();
    let env = world.env(who);
    let before = world.now();
    let slept = {
        let env = Rc::clone(&env);
        async move {
            env.sleep_until(env.now().after(Duration::from_secs(30))).await;
            env.now()
        }
    };
    let woken = world.block_on(who, slept).unwrap();
    assert_eq!(woken, before.after(Duration::from_secs(30)));
}

#[test]
fn a_seed_decides_the_order_of_tasks_and_nothing_else_does() {
    let order = |seed| {
        let world = World::new(seed);
        let who = world.incarnation();
        let order = Rc::new(RefCell::new(Vec::new()));
        for task in 0..16 {
            let order = Rc::clone(&order);
            world
                .env(who)
                .spawn(Box::pin(async move { order.borrow_mut().push(task) }));
        }
        world.run_until(|| order.borrow().len() == 16).unwrap();
        order.take()
    };
    assert_eq!(order(3), order(3));
    assert_ne!(order(3), order(4));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_wait_for_nothing_is_a_deadlock() {
    let world = World::new(1);
    let who = world.incarnation();
    let _ = world.block_on(who, std::future::pending::<()>());
}

#[test]
fn a_crash_drops_the_tasks_of_that_incarnation_only() {
    let world = World::new(1);
    let (dies, lives) = (world.incarnation(), world.incarnation());
    let ticks: Vec<Rc<Cell<u32>>> = [dies, lives]
        .into_iter()
        .map(|who| {
            let count = Rc::new(Cell::new(0));
            let (env, ticks) = (world.env(who), Rc::clone(&count));
            world.env(who).spawn(Box::pin(async move {
                loop {
                    env.sleep_until(env.now().after(Duration::from_millis(1))).await;
                    ticks.set(ticks.get() + 1);
                }
            }));
            count
        })
        .collect();
    world.run_for(Duration::from_millis(10)).unwrap();
    world.crash(dies, InFlight::Lost);
    let before = ticks[0].get();
    assert!(before > 0);
    world.run_for(Duration::from_millis(10)).unwrap();
    assert_eq!(ticks[0].get(), before);
    assert!(ticks[1].get() > before);
}

#[test]
fn a_paused_incarnation_goes_on_when_it_is_resumed() {
    let world = World::new(1);
    let who = world.incarnation();
    let env = world.env(who);
    let running = world.start(who, async move {
        env.sleep_until(env.now().after(Duration::from_millis(1))).await;
    });
    world.pause(who);
    world.run_for(Duration::from_secs(5)).unwrap();
    assert!(!running.is_done());
    world.resume(who);
    world.run_until(|| running.is_done()).unwrap();
}

// Drives.

#[test]
fn a_drive_reads_what_was_written() {
    let (world, who, device) = one_drive(1, DriveSpec::new(4, 1));
    let pieces = vec![filled(1), filled(2)];
    world
        .block_on(who, device.write(Lba(3), pieces, Durability::Durable))
        .unwrap()
        .unwrap();
    let range = LbaRange {
        start: Lba(2),
        count: 4,
    };
    let read = world.block_on(who, device.read(range)).unwrap().unwrap();
    let firsts: Vec<u8> = read.chunks(BLOCK_BYTES).map(|block| block[0]).collect();
    assert_eq!(firsts, [0, 1, 2, 0]);
    assert_eq!(world.effects(), 1);
    let outside = world.block_on(who, device.read(block(1024))).unwrap();
    assert!(matches!(outside, Err(BlockError::OutOfRange { .. })));
}

#[test]
fn power_takes_what_was_only_cached_and_nothing_that_was_durable() {
    let mut survived = 0;
    for seed in 0..40 {
        let spec = DriveSpec {
            volatile_write_cache: true,
            ..DriveSpec::new(4, 1)
        };
        let (world, who, device) = one_drive(seed, spec);
        let write = |lba, byte, durability| {
            let write = device.write(Lba(lba), vec![filled(byte)], durability);
            world.block_on(who, write).unwrap().unwrap();
        };
        write(1, 1, Durability::Durable);
        write(2, 2, Durability::Cached);
        world.block_on(who, device.flush()).unwrap().unwrap();
        write(3, 3, Durability::Cached);
        let drive = world.drive(DRIVE);
        assert_eq!(drive.peek(3)[0], 3, "a cached write is read back");
        drive.lose_power();
        assert_eq!((drive.peek(1)[0], drive.peek(2)[0]), (1, 2));
        survived += u32::from(drive.peek(3)[0] == 3);
    }
    assert!(
        survived > 0 && survived < 40,
        "both fates occur: {survived} of 40 survived"
    );
}

#[test]
fn a_crash_leaves_writes_in_flight_landed_torn_lost_or_late() {
    let (mut none, mut all, mut part, mut late) = (0, 0, 0, 0);
    for seed in 0..200 {
        let (world, who, device) = one_drive(seed, DriveSpec::new(4, 1));
        drop(device.write(Lba(8), vec![filled(1); 4], Durability::Durable));
        world.crash(who, InFlight::Mixed);
        let drive = world.drive(DRIVE);
        let landed = || (8..12).filter(|lba| drive.holds(*lba)).count();
        let at_once = landed();
        world.run_for(Duration::from_secs(1)).unwrap();
        match (at_once, landed()) {
            (0, 0) => none += 1,
            (0, 4) => late += 1,
            (4, 4) => all += 1,
            (few, same) if few == same => part += 1,
            other => panic!("seed {seed}: {other:?}"),
        }
    }
    assert!(
        none > 10 && all > 10 && part > 10 && late > 10,
        "{none} {all} {part} {late}"
    );
}

#[test]
fn nothing_lands_after_a_fence_completed() {
    for seed in 0..100 {
        let (world, who, device) = one_drive(seed, DriveSpec::new(4, 1));
        for lba in 0..8 {
            drop(device.write(Lba(lba), vec![filled(1)], Durability::Durable));
        }
        world.crash(who, InFlight::Mixed);
        let successor = world.incarnation();
        let drive = world.drive(DRIVE);
        world
            .block_on(successor, Rc::clone(&drive).fence(who))
            .unwrap()
            .unwrap();
        assert!(drive.is_fenced(who));
        let landed = || -> Vec<bool> { (0..8).map(|lba| drive.holds(lba)).collect() };
        let at_fence = landed();
        world.run_for(Duration::from_secs(1)).unwrap();
        assert_eq!(landed(), at_fence, "seed {seed}");
    }
}

#[test]
fn a_fenced_incarnation_gets_reservation_conflict_and_changes_nothing() {
    let (world, who, device) = one_drive(1, DriveSpec::new(4, 1));
    let other = world.incarnation();
    let drive = world.drive(DRIVE);
    world
        .block_on(other, Rc::clone(&drive).fence(who))
        .unwrap()
        .unwrap();
    let write = device.write(Lba(1), vec![filled(1)], Durability::Durable);
    assert_eq!(
        world.block_on(who, write).unwrap(),
        Err(BlockError::ReservationConflict)
    );
    assert!(!drive.holds(1));
    let write = drive
        .handle(other)
        .write(Lba(1), vec![filled(2)], Durability::Durable);
    assert_eq!(world.block_on(other, write).unwrap(), Ok(()));
}

#[test]
fn a_stalled_drive_holds_its_commands_and_cannot_be_fenced() {
    let (world, who, device) = one_drive(1, DriveSpec::new(4, 1));
    let drive = world.drive(DRIVE);
    drive.set_health(Health::Stalled);
    let write = world.start(who, device.write(Lba(1), vec![filled(1)], Durability::Durable));
    world.run_for(Duration::from_secs(5)).unwrap();
    assert!(!write.is_done());
    let other = world.incarnation();
    let fence = world.block_on(other, Rc::clone(&drive).fence(who)).unwrap();
    assert_eq!(fence, Err(FenceError::Unreachable));
    drive.set_health(Health::Serving);
    world.run_until(|| write.is_done()).unwrap();
    assert!(drive.holds(1));
}

#[test]
fn a_dead_drive_keeps_what_it_held() {
    let (world, who, device) = one_drive(1, DriveSpec::new(4, 1));
    let write = device.write(Lba(1), vec![filled(1)], Durability::Durable);
    world.block_on(who, write).unwrap().unwrap();
    let (seams, _) = seams(&world, who);
    let drive = world.drive(DRIVE);
    drive.set_health(Health::Dead);
    assert!(seams.drives.device(DRIVE).is_none());
    assert_eq!(
        world.block_on(who, device.read(block(1))).unwrap(),
        Err(BlockError::Gone)
    );
    drive.set_health(Health::Serving);
    assert_eq!(world.block_on(who, device.read(block(1))).unwrap(), Ok(filled(1)));
}

#[test]
fn faults_on_the_medium_are_seen_by_reads() {
    let (world, who, device) = one_drive(1, DriveSpec::new(4, 1));
    let write = device.write(Lba(1), vec![filled(1); 3], Durability::Durable);
    world.block_on(who, write).unwrap().unwrap();
    let drive = world.drive(DRIVE);
    drive.flip_bit(1, 8);
    drive.lose(2, 1);
    drive.set_read_error(3);
    let read = |lba| world.block_on(who, device.read(block(lba))).unwrap();
    assert_eq!(read(1).unwrap()[..3], [1, 0, 1]);
    assert_eq!(read(2).unwrap()[0], 0);
    assert_eq!(read(3), Err(BlockError::Unrecovered { start: Lba(3) }));
}

#[test]
fn the_world_stops_right_after_the_effect_it_was_told() {
    let (world, who, device) = one_drive(5, DriveSpec::new(4, 1));
    world.crash_after(2);
    let script = async move {
        for lba in 0..3 {
            let _ = device.write(Lba(lba), vec![filled(1)], Durability::Durable).await;
        }
    };
    assert_eq!(world.block_on(who, script), Err(Stopped));
    let drive = world.drive(DRIVE);
    assert_eq!(
        [drive.holds(0), drive.holds(1), drive.holds(2)],
        [true, true, false]
    );
}

// The metadata service.

#[test]
fn a_band_lies_on_distinct_drives_and_never_on_the_label() {
    let world = volume(1, 4);
    let owner = take_over(&world, VOLUME).unwrap();
    let mut taken = std::collections::BTreeSet::new();
    while let Ok(band) = grant(&world, &owner.seams, owner.incarnation, 1) {
        let drives: std::collections::BTreeSet<_> = band.columns.iter().map(|chunk| chunk.drive).collect();
        assert_eq!(drives.len(), 3);
        for chunk in band.columns {
            assert!(chunk.offset_mib > 0 && chunk.offset_mib < 16);
            assert!(taken.insert(chunk), "a chunk in two bands");
        }
    }
    // 15 MiB on each of 4 drives, three at a time.
    assert_eq!(taken.len(), 60);
}

#[test]
fn user_bands_leave_the_reserve_to_internal_ones() {
    let world = volume(1, 3);
    world.configure_metadata(MetadataSpec {
        reserve_mib: 5,
        ..MetadataSpec::default()
    });
    let owner = take_over(&world, VOLUME).unwrap();
    let mut count = 0;
    let error = loop {
        match grant(&world, &owner.seams, owner.incarnation, 1) {
            Ok(_) => count += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((count, error), (10, DirectoryError::NoSpace));
    let internal =
        owner
            .seams
            .directory
            .grant_bands(VOLUME, Epoch(1), ChunkSize::Mib1, 9, BandPurpose::Internal);
    let bands = world.block_on(owner.incarnation, internal).unwrap().unwrap();
    assert_eq!(bands.len(), 5);
}

#[test]
fn a_former_epoch_is_refused_everything() {
    let world = volume(1, 3);
    let (first, band) = serve(&world, 0);
    let second = take_over(&world, VOLUME).unwrap();
    assert_eq!(second.grant.recover, Some(Epoch(1)));
    assert_eq!(second.grant.bands, std::slice::from_ref(&band));
    let stale = DirectoryError::Stale {
        epoch: Epoch(1),
        current: Epoch(2),
    };
    assert_eq!(
        grant(&world, &first.seams, first.incarnation, 1),
        Err(stale.clone())
    );
    let publish = first
        .seams
        .directory
        .publish_root(update(1, 1, root_in(band.id, 2), &[]));
    assert_eq!(world.block_on(first.incarnation, publish).unwrap(), Err(stale));
    super::monitor::assert_clean(&world);
}

#[test]
fn a_takeover_that_was_not_finished_counts_for_nothing() {
    let world = volume(1, 3);
    let nobody = take_over(&world, VOLUME).unwrap();
    grant(&world, &nobody.seams, nobody.incarnation, 1).unwrap();
    world.crash(nobody.incarnation, InFlight::Mixed);
    let (first, band) = serve(&world, 0);
    assert_eq!((first.grant.epoch, first.grant.recover), (Epoch(2), None));
    let third = take_over(&world, VOLUME).unwrap();
    grant(&world, &third.seams, third.incarnation, 3).unwrap();
    world.crash(third.incarnation, InFlight::Mixed);
    let fourth = take_over(&world, VOLUME).unwrap();
    assert_eq!(
        fourth.grant.recover,
        Some(Epoch(2)),
        "starts again from the one that served"
    );
    assert_eq!(fourth.grant.bands, [band]);
    let fresh = grant(&world, &fourth.seams, fourth.incarnation, 4).unwrap();
    let finish = || {
        fourth.seams.directory.finish_takeover(
            update(4, 1, root_in(fresh.id, 1), &[]),
            Some(Epoch(2)),
            StripeNumber(9),
        )
    };
    assert_eq!(world.block_on(fourth.incarnation, finish()).unwrap(), Ok(2));
    assert_eq!(
        world.block_on(fourth.incarnation, finish()).unwrap(),
        Ok(2),
        "the same request again"
    );
    let fifth = take_over(&world, VOLUME).unwrap();
    assert_eq!(fifth.grant.recover, Some(Epoch(4)));
    assert_eq!(fifth.grant.ended, [(Epoch(2), StripeNumber(9))]);
    super::monitor::assert_clean(&world);
}

#[test]
fn a_root_before_the_takeover_is_finished_is_noticed() {
    let world = volume(1, 3);
    let owner = take_over(&world, VOLUME).unwrap();
    let band = grant(&world, &owner.seams, owner.incarnation, 1).unwrap();
    let publish = owner
        .seams
        .directory
        .publish_root(update(1, 0, root_in(band.id, 1), &[]));
    assert!(world.block_on(owner.incarnation, publish).unwrap().is_err());
    assert_eq!(world.violations().len(), 1);
}

#[test]
fn a_clean_hand_over_leaves_nothing_to_recover() {
    let world = volume(1, 3);
    serve(&world, 0);
    world.hand_over(VOLUME, Epoch(1), StripeNumber(4), &[]).unwrap();
    let (second, _) = serve(&world, 0);
    assert_eq!((second.grant.recover, second.grant.root_version), (None, 1));
    assert_eq!(second.grant.ended, [(Epoch(1), StripeNumber(4))]);
    assert_eq!(second.grant.bands.len(), 1);
    assert!(world.superseded(VOLUME).is_empty(), "nobody has to be fenced");
    let third = take_over(&world, VOLUME).unwrap();
    assert_eq!(third.grant.recover, Some(Epoch(2)));
}

#[test]
fn chunks_a_dead_owner_may_still_reach_are_not_granted_again() {
    let world = volume(3, 4);
    let (first, band) = serve(&world, 0);
    let lost = band.columns[0].drive;
    world.drive(lost).set_health(Health::Dead);
    world.crash(first.incarnation, InFlight::Mixed);
    let second = take_over(&world, VOLUME).unwrap();
    let fresh = grant(&world, &second.seams, second.incarnation, 2).unwrap();
    let update = update(2, 1, root_in(fresh.id, 1), &[band.id]);
    let finish = second
        .seams
        .directory
        .finish_takeover(update, Some(Epoch(1)), StripeNumber(0));
    world.block_on(second.incarnation, finish).unwrap().unwrap();
    world.drive(lost).set_health(Health::Serving);
    let uses = |band: &Band| band.columns.iter().any(|chunk| chunk.drive == lost);
    for _ in 0..4 {
        assert!(!uses(
            &grant(&world, &second.seams, second.incarnation, 2).unwrap()
        ));
    }
    assert!(readmit(&world, VOLUME, second.incarnation, lost).unwrap());
    assert_eq!(
        world.free_mib(lost),
        15,
        "its chunk is free once its writer is fenced"
    );
    assert!(uses(
        &grant(&world, &second.seams, second.incarnation, 2).unwrap()
    ));
    super::monitor::assert_clean(&world);
}

#[test]
fn a_lost_answer_is_cured_by_the_same_request() {
    for seed in 0..20 {
        let world = volume(seed, 3);
        let (owner, band) = serve(&world, 0);
        world.configure_metadata(MetadataSpec {
            unavailable_one_in: 2,
            ..MetadataSpec::default()
        });
        let version = loop {
            let publish = owner
                .seams
                .directory
                .publish_root(update(1, 1, root_in(band.id, 2), &[]));
            match world.block_on(owner.incarnation, publish).unwrap() {
                Err(DirectoryError::Unavailable) => {}
                other => break other,
            }
        };
        assert_eq!(version, Ok(2), "seed {seed}");
    }
}

// The monitor.

#[test]
fn writes_where_nobody_was_granted_anything_are_noticed() {
    let world = volume(1, 3);
    let owner = take_over(&world, VOLUME).unwrap();
    let band = grant(&world, &owner.seams, owner.incarnation, 1).unwrap();
    let chunk = band.columns[0];
    let first = u64::from(chunk.offset_mib) * 256;
    let write = |who: IncarnationId, lba: u64, byte: u8| {
        let device = world.drive(chunk.drive).handle(who);
        let before = world.violations().len();
        let write = device.write(Lba(lba), vec![filled(byte)], Durability::Durable);
        world.block_on(who, write).unwrap().unwrap();
        world.violations().len() - before
    };
    assert_eq!(write(owner.incarnation, first, 1), 0);
    assert_eq!(write(owner.incarnation, first, 1), 0, "the same bytes again");
    assert_eq!(write(owner.incarnation, first, 2), 1, "a row is written once");
    assert_eq!(write(owner.incarnation, first + 256, 1), 1, "past the chunk");
    let other = world.incarnation();
    assert_eq!(write(other, first + 1, 1), 1, "another incarnation's band");
}

#[test]
fn a_band_freed_under_its_own_writes_is_noticed() {
    let world = volume(1, 3);
    let (owner, kept) = serve(&world, 0);
    let freed = grant(&world, &owner.seams, owner.incarnation, 1).unwrap();
    let chunk = freed.columns[1];
    let drive = world.drive(chunk.drive);
    drive.set_health(Health::Stalled);
    let device = drive.handle(owner.incarnation);
    drop(device.write(
        Lba(u64::from(chunk.offset_mib) * 256),
        vec![filled(1)],
        Durability::Durable,
    ));
    let publish = owner
        .seams
        .directory
        .publish_root(update(1, 1, root_in(kept.id, 2), &[freed.id]));
    world.block_on(owner.incarnation, publish).unwrap().unwrap();
    assert_eq!(world.violations().len(), 1, "{:?}", world.violations());
}

// The lease.

#[test]
fn the_lease_stands_still_while_its_owner_does_and_after_it_is_fenced() {
    let (world, who, _) = one_drive(1, DriveSpec::new(4, 1));
    let (seams, lease) = seams(&world, who);
    let age_ms = || {
        let confirmed = seams.lease.confirmed_at(DRIVE).expect("a check that succeeded");
        (world.now().0 - confirmed.0) / 1_000_000
    };
    world.run_for(Duration::from_secs(2)).unwrap();
    assert!(age_ms() <= 300);
    world.pause(who);
    world.run_for(Duration::from_secs(2)).unwrap();
    world.resume(who);
    assert!(age_ms() >= 1700, "{}", age_ms());
    world.run_for(Duration::from_millis(300)).unwrap();
    assert!(age_ms() <= 300, "checks go on after a pause");
    lease.expire();
    world.run_for(Duration::from_secs(2)).unwrap();
    assert!(age_ms() >= 1700);
    lease.renew();
    let other = world.incarnation();
    world
        .block_on(other, world.drive(DRIVE).fence(who))
        .unwrap()
        .unwrap();
    world.run_for(Duration::from_secs(2)).unwrap();
    assert!(age_ms() >= 1700);
}
