//! The engine against the oracle: random operations side by side, while drives fail and come back, checkpoints are
//! taken, and the volume is closed, killed and opened again. `WEFT_SEEDS=7` or `WEFT_SEEDS=0..1000` runs other seeds;
//! `WEFT_TRACE=1` prints every effect.

mod common;

use std::time::Duration;

use common::{Fabric, Host, Spec, VOLUME, random_operation, seeds};
use weft_block::BlockError;
use weft_proto::id::DriveId;
use weft_volume::testing::drive::Health;
use weft_volume::testing::rng::Rng;
use weft_volume::testing::world::InFlight;

/// `workers` tasks, each with `operations` random operations one after the other.
fn workload(
    fabric: &Fabric,
    owner: &common::Owner,
    rng: &mut Rng,
    workers: u64,
    operations: u64,
) -> Vec<Work> {
    let start = |worker| {
        let (host, blocks) = (owner.host.clone(), fabric.spec.blocks);
        let mut rng = rng.fork(worker);
        fabric.world.start(owner.incarnation(), async move {
            for _ in 0..operations {
                if !random_operation(&host, &mut rng, blocks).await {
                    return;
                }
            }
        })
    };
    let work = (1..=workers).map(start).collect();
    rng.next_u64();
    work
}

type Work = weft_volume::testing::world::Running<()>;

fn finish(fabric: &Fabric, work: &[Work]) {
    fabric
        .world
        .run_until(|| work.iter().all(Work::is_done))
        .expect("nobody asked to stop");
}

fn some_time(rng: &mut Rng) -> Duration {
    Duration::from_micros(rng.between(10, 20_000))
}

#[test]
fn random_operations_read_what_was_written() {
    for seed in seeds(0..6) {
        let fabric = Fabric::new(seed, Spec::new(2, 1, 4));
        let mut rng = Rng::new(seed).fork(99);
        let owner = fabric.open();
        let work = workload(&fabric, &owner, &mut rng, 4, 40);
        finish(&fabric, &work);
        fabric.verify(&owner, "after all operations");
    }
}

#[test]
fn up_to_m_drives_fail_and_come_back_under_load() {
    for seed in seeds(0..6) {
        let (k, m) = if seed % 2 == 0 { (2, 1) } else { (4, 2) };
        let fabric = Fabric::new(seed, Spec::new(k, m, u32::from(k + m) + 1));
        let mut rng = Rng::new(seed).fork(99);
        let owner = fabric.open();
        for _ in 0..3 {
            let work = workload(&fabric, &owner, &mut rng, 3, 15);
            let mut down = Vec::new();
            for _ in 0..rng.between(1, u64::from(m)) {
                fabric.world.run_for(some_time(&mut rng)).expect("no stop");
                let drive = DriveId(rng.between(1, u64::from(fabric.spec.drives)) as u32);
                let health = if rng.chance(1, 2) {
                    Health::Dead
                } else {
                    Health::Stalled
                };
                fabric.world.drive(drive).set_health(health);
                down.push(drive);
            }
            finish(&fabric, &work);
            fabric.verify(&owner, "with drives down");
            for drive in down {
                fabric.world.drive(drive).set_health(Health::Serving);
            }
            fabric.world.run_for(Duration::from_secs(3)).expect("no stop");
            fabric.verify(&owner, "with the drives back");
        }
    }
}

#[test]
fn a_volume_that_was_quiesced_opens_without_a_recovery() {
    for seed in seeds(0..6) {
        let fabric = Fabric::new(seed, Spec::new(2, 1, 4));
        let mut rng = Rng::new(seed).fork(99);
        for _ in 0..4 {
            let owner = fabric.open();
            assert_eq!(owner.takeover.grant.recover, None);
            fabric.verify(&owner, "after opening");
            let work = workload(&fabric, &owner, &mut rng, 3, 12);
            finish(&fabric, &work);
            let engine = owner.host.engine.clone();
            let quiesced = fabric.run(&owner, async move { engine.quiesce().await });
            let quiesced = quiesced.expect("nothing stands in the way");
            let epoch = owner.takeover.grant.epoch;
            fabric
                .world
                .hand_over(VOLUME, epoch, quiesced.last, &quiesced.unsettled)
                .expect("the current epoch");
            drop(owner);
        }
    }
}

#[test]
fn owners_killed_at_any_time_lose_nothing_that_was_acknowledged() {
    for seed in seeds(0..8) {
        let (k, m) = if seed % 2 == 0 { (2, 1) } else { (4, 2) };
        let mut spec = Spec::new(k, m, u32::from(k + m) + 1);
        spec.metadata.unavailable_one_in = 8;
        spec.drive.volatile_write_cache = seed % 3 == 0;
        let fabric = Fabric::new(seed, spec);
        let mut rng = Rng::new(seed).fork(99);
        for _ in 0..5 {
            let owner = fabric.open();
            fabric.verify(&owner, "after a takeover");
            let _work = workload(&fabric, &owner, &mut rng, 3, 1000);
            for _ in 0..rng.below(3) {
                fabric.world.run_for(some_time(&mut rng)).expect("no stop");
                checkpoint(&fabric, &owner.host, owner.incarnation());
            }
            fabric.world.run_for(some_time(&mut rng)).expect("no stop");
            fabric.crash(InFlight::Mixed);
            if fabric.spec.drive.volatile_write_cache {
                for drive in fabric.world.all_drives() {
                    drive.lose_power();
                }
            }
        }
        let owner = fabric.open();
        fabric.verify(&owner, "at the end");
    }
}

fn checkpoint(fabric: &Fabric, host: &Host, incarnation: weft_proto::id::IncarnationId) {
    let engine = host.engine.clone();
    drop(
        fabric
            .world
            .start(incarnation, async move { engine.checkpoint().await }),
    );
}

#[test]
fn a_stopped_owner_that_wakes_after_its_takeover_changes_and_answers_nothing() {
    for seed in seeds(0..8) {
        let fabric = Fabric::new(seed, Spec::new(2, 1, 4));
        let mut rng = Rng::new(seed).fork(99);
        let first = fabric.open();
        let _work = workload(&fabric, &first, &mut rng, 4, 1000);
        fabric.world.run_for(some_time(&mut rng)).expect("no stop");
        fabric.world.pause(first.incarnation());
        fabric.oracle.borrow_mut().all_unknown();
        let second = fabric.open();
        // One lease plus drift after its fence, as `node` waits before it serves.
        fabric
            .world
            .run_for(Duration::from_millis(1010))
            .expect("no stop");
        fabric.verify(&second, "after the takeover");
        let work = workload(&fabric, &second, &mut rng, 3, 10);
        fabric.world.resume(first.incarnation());
        finish(&fabric, &work);
        fabric.world.run_for(Duration::from_secs(3)).expect("no stop");
        fabric.verify(&second, "after the former owner woke up");
    }
}

/// It has nothing to write, so no drive tells it that it was fenced: only the lease does.
#[test]
fn a_stopped_owner_that_only_reads_serves_nothing_stale() {
    for seed in seeds(0..8) {
        let fabric = Fabric::new(seed, Spec::new(2, 1, 4));
        let mut rng = Rng::new(seed).fork(99);
        let first = fabric.open();
        let host = first.host.clone();
        fabric
            .run(&first, async move { host.write(0, 64).await })
            .expect("space");
        // Idle: no stripe is in flight when it is stopped.
        fabric.sleep_all();
        let second = fabric.open();
        fabric
            .world
            .run_for(Duration::from_millis(1010))
            .expect("no stop");
        let work = workload(&fabric, &second, &mut rng, 3, 10);
        finish(&fabric, &work);
        let host = first.host.clone();
        let _reading = fabric.world.start(first.incarnation(), async move {
            for start in (0..64).step_by(8) {
                if host.read(start, 8).await.is_err() {
                    return;
                }
            }
        });
        fabric.world.resume(first.incarnation());
        fabric.world.run_for(Duration::from_secs(5)).expect("no stop");
        fabric.verify(&second, "after the former owner woke up");
    }
}

/// What one drive holds is damaged, in every way a medium can be, under stripes of every age.
#[test]
fn damage_on_one_drive_is_read_around_and_survives_a_takeover() {
    for seed in seeds(0..8) {
        let (k, m) = if seed % 2 == 0 { (2, 1) } else { (4, 2) };
        let mut spec = Spec::new(k, m, u32::from(k + m) + 1);
        // Every checkpoint writes the whole map anew; see `rewrite_all`.
        spec.settings.map.runs_max = 1;
        let fabric = Fabric::new(seed, spec);
        let mut rng = Rng::new(seed).fork(99);
        let mut owner = fabric.open();
        for round in 0..4 {
            let work = workload(&fabric, &owner, &mut rng, 3, 12);
            finish(&fabric, &work);
            let drive = fabric
                .world
                .drive(DriveId(rng.between(1, u64::from(fabric.spec.drives)) as u32));
            let blocks = u64::from(drive.spec().size_mib) * 256;
            for block in (256..blocks).filter(|block| drive.holds(*block)) {
                match rng.below(12) {
                    0 => drive.flip_bit(block, rng.index(8 * 4096)),
                    1 => drive.lose(block, 1),
                    2 => drive.set_read_error(block),
                    _ => {}
                }
            }
            if round % 2 == 1 {
                fabric.crash(InFlight::Mixed);
                owner = fabric.open();
            }
            fabric.verify(&owner, "with a damaged drive");
            // Read twice: what was found damaged has been repaired elsewhere, or is read around again.
            fabric.verify(&owner, "with a damaged drive, again");
            rewrite_all(&fabric, &owner);
        }
    }
}

/// Gives every block new bytes, so that the next damage is not the second one to a stripe; map blocks move with a
/// checkpoint.
fn rewrite_all(fabric: &Fabric, owner: &common::Owner) {
    let host = owner.host.clone();
    let blocks = fabric.spec.blocks;
    fabric.run(owner, async move {
        for start in (0..blocks).step_by(32) {
            host.write(start, 32).await.expect("space");
        }
        host.engine.checkpoint().await.expect("metadata is there");
    });
}

/// A small pool at four fifths, overwritten again and again, with owners killed and space given back on the way.
#[test]
fn a_nearly_full_pool_survives_kills() {
    for seed in seeds(0..2) {
        let mut spec = Spec::new(2, 1, 4);
        spec.blocks = 5120;
        spec.metadata.reserve_mib = 3;
        let fabric = Fabric::new(seed, spec);
        let mut rng = Rng::new(seed).fork(99);
        let mut owner = fabric.open();
        for round in 0..6 {
            let work: Vec<Work> = (0..4)
                .map(|worker| {
                    let host = owner.host.clone();
                    let mut rng = rng.fork(worker + 10 * round);
                    fabric.world.start(owner.incarnation(), async move {
                        for _ in 0..40 {
                            let start = rng.below(4000);
                            match host.write(start, 32).await {
                                Ok(()) | Err(BlockError::CapacityExceeded) => {}
                                Err(BlockError::NotReady) => return,
                                Err(error) => panic!("{error}"),
                            }
                        }
                    })
                })
                .collect();
            if round % 2 == 0 {
                fabric.world.run_for(some_time(&mut rng) * 4).expect("no stop");
                fabric.crash(InFlight::Mixed);
                owner = fabric.open();
            } else {
                finish(&fabric, &work);
            }
            fabric.verify(&owner, "in a nearly full pool");
        }
        let host = owner.host.clone();
        fabric.run(&owner, async move {
            host.trim(0, 5120).await.expect("a trim needs no space");
            host.write(0, 64).await.expect("a trim gives space back");
        });
        fabric.verify(&owner, "after a trim");
    }
}
