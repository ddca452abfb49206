//! A crash after every effect. Each script runs once to count its effects (writes that landed, commands that metadata
//! committed), and then once per effect: the world stops right after that effect, the owner dies, what it
//! had in flight is lost, lands, or lands in part or later; sometimes drives die with it, sometimes power fails.
//! A new epoch takes over, and the oracle judges what it reads; it goes on writing, drives come back, and the oracle
//! judges again.
//!
//! `WEFT_SEEDS=0..100` runs each script with more seeds; `WEFT_ALL_POINTS=1` takes all effects of the longest scripts as well;
//! `WEFT_TRACE=1` prints every effect.

mod common;

use std::time::Duration;

use common::{Fabric, Host, Owner, Spec, seeds};
use futures_util::future::{LocalBoxFuture, join, join_all, join3};
use weft_proto::id::DriveId;
use weft_volume::settings::GarbageMax;
use weft_volume::testing::drive::Health;
use weft_volume::testing::rng::Rng;
use weft_volume::testing::world::{InFlight, Stopped};

type Script = fn(Host) -> LocalBoxFuture<'static, ()>;

/// Opens the volume and runs the script.
fn run_script(fabric: &Fabric, script: Script) -> Result<Owner, Stopped> {
    let owner = fabric.try_open()?.expect("drives and metadata are well");
    let running = script(owner.host.clone());
    fabric.world.block_on(owner.incarnation(), running)?;
    Ok(owner)
}

/// What happens around one crash.
#[derive(Debug)]
struct Crash {
    /// The owner does not die: it is stopped, and wakes up after its successor has begun to serve.
    sleeps: bool,
    in_flight: InFlight,
    /// Drives that die with the owner, at most m.
    missing: Vec<DriveId>,
    power: bool,
}

impl Crash {
    fn draw(rng: &mut Rng, spec: &Spec) -> Self {
        let in_flight = match rng.below(4) {
            0 => InFlight::Lost,
            1 => InFlight::Landed,
            _ => InFlight::Mixed,
        };
        let mut drives: Vec<DriveId> = (1..=spec.drives).map(DriveId).collect();
        rng.shuffle(&mut drives);
        drives.truncate(rng.below(u64::from(spec.geometry.m) + 1) as usize);
        Self {
            sleeps: rng.chance(1, 5),
            in_flight,
            missing: drives,
            power: rng.chance(1, 3),
        }
    }

    fn strike(&self, fabric: &Fabric) {
        if self.sleeps {
            fabric.sleep_all();
        } else {
            fabric.crash(self.in_flight);
        }
        for drive in fabric.world.all_drives() {
            if self.power {
                drive.lose_power();
            }
            if self.missing.contains(&drive.id()) {
                drive.set_health(Health::Dead);
            }
        }
    }
}

/// Takes over and judges, writes on, and does it once more with other drives missing.
///
/// Drives that were missing come back either to the successor or to the one after it, which has never heard of what
/// they hold.
fn judge(fabric: &Fabric, crash: &Crash, rng: &mut Rng, what: &str) {
    let owner = fabric.open();
    if crash.sleeps {
        // One lease plus drift after the fence, as `node` waits before it serves.
        fabric
            .world
            .run_for(Duration::from_millis(1010))
            .expect("no stop");
    }
    fabric.verify(&owner, what);
    write_on(fabric, &owner);
    for incarnation in fabric.world.living() {
        fabric.world.resume(incarnation);
    }
    let mut missing = crash.missing.clone();
    if rng.chance(1, 2) {
        for drive in std::mem::take(&mut missing) {
            fabric.revive(&owner, drive);
        }
    }
    write_on(fabric, &owner);
    fabric.world.run_for(Duration::from_millis(100)).expect("no stop");
    fabric.verify(&owner, what);

    let mut again = Crash::draw(rng, &fabric.spec);
    if !missing.is_empty() {
        again.missing = missing;
    }
    again.sleeps = false;
    fabric.world.note(|| format!("again: {again:?}"));
    again.strike(fabric);
    let owner = fabric.open();
    fabric.verify(&owner, what);
    for drive in &again.missing {
        fabric.revive(&owner, *drive);
    }
    write_on(fabric, &owner);
    fabric.verify(&owner, what);
}

fn write_on(fabric: &Fabric, owner: &Owner) {
    let host = owner.host.clone();
    let blocks = fabric.spec.blocks;
    fabric.run(owner, async move {
        let writes = (0..4).map(|step| host.write(step * 7 % (blocks - 8), 1 + step));
        for result in join_all(writes).await {
            result.expect("the new owner takes writes");
        }
    });
}

/// Most crash points of one script under one seed; `WEFT_ALL_POINTS=1` takes every one. Only compaction has a few more.
const POINTS_MAX: u64 = 100;

fn points_max() -> u64 {
    match std::env::var_os("WEFT_ALL_POINTS") {
        Some(_) => u64::MAX,
        None => POINTS_MAX,
    }
}

/// Every effect of `script`, each with one crash drawn by the seed.
fn sweep(name: &str, spec: &Spec, script: Script) {
    sweep_with_broken(name, spec, script, None);
}

/// The same for a script that breaks the drive `broken` itself: it stays away until the end, and the crash takes
/// one drive less.
fn sweep_with_broken(name: &str, spec: &Spec, script: Script, broken: Option<DriveId>) {
    let mut points = 0;
    for seed in seeds(0..1) {
        let mut spec = spec.clone();
        if seed % 3 == 1 {
            spec.drive.volatile_write_cache = true;
            spec.drive.tear_bytes = 512;
        }
        if seed % 4 == 2 {
            spec.metadata.unavailable_one_in = 4;
        }
        let fabric = Fabric::new(seed, spec.clone());
        let Ok(owner) = run_script(&fabric, script) else {
            unreachable!("nobody asked to stop");
        };
        let (first, last) = (fabric.mark.get() + 1, fabric.world.effects());
        fabric.verify(&owner, name);
        drop(owner);
        // Long scripts take every so many effects, others with each seed.
        let stride = (last - first) / points_max() + 1;
        for effect in (first + seed % stride..=last).step_by(stride as usize) {
            let fabric = Fabric::new(seed, spec.clone());
            let mut rng = Rng::new(seed).fork(effect);
            let mut crash = Crash::draw(&mut rng, &spec);
            if let Some(broken) = broken {
                crash.missing.truncate(usize::from(spec.geometry.m) - 1);
                crash.missing.retain(|drive| *drive != broken);
                crash.missing.push(broken);
            }
            let what = format!("{name}: effect {effect} of {last}, {crash:?}");
            fabric.world.note(|| what.clone());
            fabric.world.crash_after(effect);
            let stopped = run_script(&fabric, script);
            assert!(
                stopped.is_err(),
                "{what}: the script went another way than before"
            );
            crash.strike(&fabric);
            judge(&fabric, &crash, &mut rng, &what);
            points += 1;
        }
    }
    println!("{name}: {points} crash points");
    assert!(points > 0);
}

fn small() -> Spec {
    Spec::new(2, 1, 4)
}

fn wide() -> Spec {
    Spec::new(4, 2, 7)
}

#[test]
fn creation() {
    sweep("creation", &small(), |host| {
        Box::pin(async move {
            host.put(3, 1).await;
        })
    });
}

#[test]
fn single_writes() {
    for spec in [small(), wide()] {
        sweep("single writes", &spec, |host| {
            Box::pin(async move {
                host.mark();
                for lba in [5, 6, 5, 7] {
                    host.put(lba, 1).await;
                }
            })
        });
    }
}

#[test]
fn wide_writes() {
    for spec in [small(), wide()] {
        sweep("wide writes", &spec, |host| {
            Box::pin(async move {
                host.mark();
                host.put(0, 64).await;
                let writes = (0..8).map(|step| host.write(step * 8, 8));
                join_all(writes).await;
            })
        });
    }
}

#[test]
fn overlapping_writes() {
    sweep("overlapping writes", &small(), |host| {
        Box::pin(async move {
            host.put(0, 16).await;
            host.mark();
            for _ in 0..3 {
                let writes = (0..5).map(|step| host.write(step * 3 % 7, 1 + step % 3 * 2));
                join_all(writes).await;
            }
        })
    });
}

/// Later stripes are acknowledged while earlier ones have left nothing anywhere: recovery has to look past the hole.
#[test]
fn writes_that_overtake_each_other() {
    let mut spec = small();
    spec.drive.latency_us = (5, 5000);
    spec.metadata.window_rows = 16;
    spec.settings.stripes_in_flight_max = 8;
    sweep("writes that overtake each other", &spec, |host| {
        Box::pin(async move {
            host.put(0, 3).await;
            host.mark();
            let writer = |first: u64| {
                let host = host.clone();
                async move {
                    for step in 0..4 {
                        host.put(first + step * 8, 1).await;
                    }
                }
            };
            join_all((0..8).map(writer)).await;
        })
    });
}

/// The same with the hole where it hurts: across the end of the first window that recovery reads.
#[test]
fn an_acknowledged_write_behind_a_hole_is_found() {
    let mut spec = small();
    spec.metadata.window_rows = 40;
    let fabric = Fabric::new(1, spec);
    let owner = fabric.open();
    let host = owner.host.clone();
    fabric.run(&owner, async move { host.put(0, 32).await });
    let all_slower = |factor| {
        fabric
            .world
            .all_drives()
            .iter()
            .for_each(|drive| drive.set_slowness(factor))
    };
    // 31 rows of all three columns, on their way for longer than this test lasts, but no stall yet.
    all_slower(500);
    let host = owner.host.clone();
    drop(
        fabric
            .world
            .start(owner.incarnation(), async move { host.put(64, 60).await }),
    );
    fabric.world.run_for(Duration::from_millis(1)).expect("no stop");
    all_slower(1);
    let host = owner.host.clone();
    fabric.run(&owner, async move { host.put(200, 1).await });
    fabric.crash(InFlight::Lost);
    let owner = fabric.open();
    fabric.verify(&owner, "behind a hole");
}

/// A write that a stalled drive still holds may land at any time: until it has ended, its chunk is nobody else's.
#[test]
fn a_band_is_not_freed_under_a_write_in_flight() {
    let fabric = Fabric::new(1, small());
    let owner = fabric.open();
    let host = owner.host.clone();
    fabric.run(&owner, async move { host.put(0, 8).await });
    let stalled = fabric.world.drive(DriveId(2));
    stalled.set_health(Health::Stalled);
    let overwrite = || {
        let host = owner.host.clone();
        fabric.run(&owner, async move {
            for _ in 0..8 {
                join_all((0..4).map(|step| host.put(step * 64, 64))).await;
                host.checkpoint().await;
            }
        });
        fabric.check("bands freed meanwhile");
    };
    overwrite();
    stalled.set_health(Health::Serving);
    fabric.world.run_for(Duration::from_secs(2)).expect("no stop");
    overwrite();
    let stats = owner.host.engine.stats();
    assert!(stats.stripes_abandoned > 0 && stats.bands_freed > 0, "{stats:?}");
    fabric.verify(&owner, "after the drive came back");
}

#[test]
fn trims_and_zeroes() {
    sweep("trims and zeroes", &small(), |host| {
        Box::pin(async move {
            host.put(0, 32).await;
            host.mark();
            host.discard(0, 8).await;
            host.put(4, 2).await;
            let (trim, write) = (host.trim(16, 16), host.write(20, 4));
            let _ = join3(trim, write, host.zeroes(2, 20)).await;
            host.checkpoint().await;
            host.discard(0, 32).await;
        })
    });
}

#[test]
fn seal_and_the_next_band() {
    let mut spec = small();
    spec.metadata.window_rows = 32;
    sweep("seal and the next band", &spec, |host| {
        Box::pin(async move {
            // 256 rows of three columns: about 500 blocks fill the first band.
            for round in 0..6 {
                host.put(round * 32 % 192, 64).await;
            }
            host.mark();
            for round in 0..5 {
                let writes = (0..4).map(|step| host.write((round * 40 + step * 16) % 192, 16));
                join_all(writes).await;
            }
        })
    });
}

#[test]
fn checkpoints() {
    // On slow drives writes are in flight for longer than metadata takes to commit a root.
    let mut slow = small();
    slow.drive.latency_us = (5, 8000);
    for (name, spec) in [("checkpoints", small()), ("checkpoints, slow drives", slow)] {
        sweep(name, &spec, |host| {
            Box::pin(async move {
                host.put(0, 64).await;
                host.mark();
                host.checkpoint().await;
                host.put(10, 3).await;
                let writing = async {
                    for step in 0..6 {
                        host.put(step * 5, 4).await;
                    }
                };
                join(writing, host.checkpoint()).await;
                host.discard(0, 20).await;
                host.checkpoint().await;
            })
        });
    }
}

#[test]
fn a_column_that_fails_in_mid_write() {
    for health in [Health::Dead, Health::Stalled] {
        let script: Script = match health {
            Health::Dead => |host| failing_column(host, Health::Dead),
            _ => |host| failing_column(host, Health::Stalled),
        };
        let mut spec = wide();
        spec.drives = 8;
        sweep_with_broken(&format!("a column {health:?}"), &spec, script, Some(DriveId(2)));
    }
}

fn failing_column(host: Host, health: Health) -> LocalBoxFuture<'static, ()> {
    Box::pin(async move {
        host.put(0, 16).await;
        host.mark();
        let writes = (0..6).map(|step| host.write(step * 4, 4));
        let failure = async {
            host.sleep(Duration::from_micros(60)).await;
            host.world().drive(DriveId(2)).set_health(health);
        };
        join(join_all(writes), failure).await;
        host.put(3, 9).await;
    })
}

#[test]
fn compaction() {
    let mut spec = small();
    // Four bands of data, and two of garbage when it begins.
    spec.blocks = 2048;
    spec.settings.garbage_max = GarbageMax::always(0.2);
    sweep("compaction", &spec, |host| {
        Box::pin(async move {
            join_all((0..2048).step_by(64).map(|start| host.put(start, 64))).await;
            // Half of every band dies.
            for start in (0..2048).step_by(64) {
                host.put(start, 32).await;
            }
            host.mark();
            // Until blocks were moved, and a band that they were moved out of is freed.
            let before = host.engine.stats();
            let done = || {
                let now = host.engine.stats();
                now.compacted_blocks >= before.compacted_blocks + 60 && now.bands_freed > before.bands_freed
            };
            let mut start = 32;
            while !done() {
                assert!(start < 100 * 64, "it compacts when half of everything is dead");
                host.put(start % 2048, 32).await;
                host.sleep(Duration::from_millis(1)).await;
                start += 64;
            }
        })
    });
}

/// Columns of sealed bands are rebuilt, on a drive that serves and on one that is dead, while a host writes and checkpoints
/// free bands.
#[test]
fn rebuild_step() {
    let mut cached = small();
    cached.drive.volatile_write_cache = true;
    cached.drive.tear_bytes = 512;
    sweep("rebuild step", &cached, |host| rebuilds(host, None));
    let broken = DriveId(2);
    sweep_with_broken(
        "rebuild step, dead drive",
        &wide(),
        |host| rebuilds(host, Some(DriveId(2))),
        Some(broken),
    );
}

fn rebuilds(host: Host, dead: Option<DriveId>) -> LocalBoxFuture<'static, ()> {
    Box::pin(async move {
        // Narrow stripes and wide ones, and a TRIM, until bands are sealed.
        for lba in 0..12 {
            host.put(lba, 1).await;
        }
        while host.engine.sealed_bands().len() < 3 {
            join_all((0..4).map(|step| host.put(step * 64, 64))).await;
        }
        host.discard(16, 8).await;
        if let Some(dead) = dead {
            host.world().drive(dead).set_health(Health::Dead);
            host.put(40, 3).await;
        }
        host.mark();
        let rebuilding = async {
            for band in host.engine.sealed_bands() {
                let column = band
                    .columns
                    .iter()
                    .position(|chunk| dead.is_none_or(|dead| chunk.drive == dead));
                if let Some(column) = column {
                    host.rebuild(band.id, column as u8).await;
                }
            }
        };
        let writing = async {
            for step in 0..3 {
                host.put(step * 50, 9).await;
                host.checkpoint().await;
            }
        };
        join(rebuilding, writing).await;
    })
}

/// A volume with writes in flight moves: quiesced, handed over, opened by the next owner.
fn move_away(fabric: &Fabric) -> Result<Owner, Stopped> {
    let owner = fabric.try_open()?.expect("drives and metadata are well");
    let host = owner.host.clone();
    fabric.world.block_on(owner.incarnation(), async move {
        host.put(0, 48).await;
        host.checkpoint().await;
        host.put(16, 40).await;
        host.discard(20, 8).await;
    })?;
    owner.host.mark();
    let host = owner.host.clone();
    let quiesced = fabric.world.block_on(owner.incarnation(), async move {
        let writes = (0..6).map(|step| host.write(step * 9, 1 + step * 2));
        let (_, quiesced) = join(join_all(writes), async {
            host.sleep(Duration::from_micros(40)).await;
            host.engine.quiesce().await
        })
        .await;
        quiesced
    })?;
    let quiesced = quiesced.expect("nothing keeps the owner from handing over");
    let epoch = owner.host.engine.epoch();
    fabric
        .world
        .hand_over(common::VOLUME, epoch, quiesced.last, &quiesced.unsettled)
        .expect("the epoch is its own");
    Ok(fabric.try_open()?.expect("what was handed over opens"))
}

/// A move, with a crash of both owners after every effect, from the first write that it waits for to the first root of
/// the next owner.
#[test]
fn planned_moves() {
    let mut points = 0;
    for seed in seeds(0..3) {
        for spec in [small(), wide()] {
            let fabric = Fabric::new(seed, spec.clone());
            let Ok(owner) = move_away(&fabric) else {
                unreachable!("nobody asked to stop");
            };
            let (first, last) = (fabric.mark.get() + 1, fabric.world.effects());
            fabric.verify(&owner, "a move");
            drop(owner);
            for effect in first..=last {
                let fabric = Fabric::new(seed, spec.clone());
                let mut rng = Rng::new(seed).fork(effect);
                let crash = Crash::draw(&mut rng, &spec);
                let what = format!("move: effect {effect} of {first}..={last}, {crash:?}");
                fabric.world.note(|| what.clone());
                fabric.world.crash_after(effect);
                assert!(
                    move_away(&fabric).is_err(),
                    "{what}: the script went another way than before"
                );
                crash.strike(&fabric);
                judge(&fabric, &crash, &mut rng, &what);
                points += 1;
            }
        }
    }
    println!("planned moves: {points} crash points");
    assert!(points > 0);
}

/// The owner dies with writes in flight, and then each of its successors during its takeover, after every effect.
#[test]
fn takeovers_during_takeovers() {
    let mut points = 0;
    for seed in seeds(0..2) {
        for spec in [small(), wide()] {
            let start = |fabric: &Fabric| {
                let owner = fabric.open();
                let host = owner.host.clone();
                drop(fabric.world.start(owner.incarnation(), async move {
                    host.put(0, 32).await;
                    host.checkpoint().await;
                    for round in 0..4 {
                        let writes = (0..6).map(|step| host.write((round * 5 + step * 4) % 60, 1 + step));
                        join_all(writes).await;
                        host.discard(round * 3, 4).await;
                    }
                }));
                fabric
                    .world
                    .run_for(Duration::from_millis(8 + seed % 8))
                    .expect("no stop");
                let mut rng = Rng::new(seed).fork(5);
                let mut crash = Crash::draw(&mut rng, &fabric.spec);
                crash.sleeps = false;
                crash.strike(fabric);
                crash
            };
            let fabric = Fabric::new(seed, spec.clone());
            start(&fabric);
            let first = fabric.world.effects() + 1;
            fabric.open();
            let last = fabric.world.effects();
            for effect in first..=last {
                let fabric = Fabric::new(seed, spec.clone());
                let crash = start(&fabric);
                fabric.world.crash_after(effect);
                let opened = fabric.try_open();
                let mut rng = Rng::new(seed).fork(effect);
                let in_flight = Crash::draw(&mut rng, &spec).in_flight;
                fabric.crash(in_flight);
                drop(opened);
                let what = format!("takeover {effect} of {first}..={last}, {in_flight:?} after {crash:?}");
                judge(&fabric, &crash, &mut rng, &what);
                points += 1;
            }
        }
    }
    println!("takeovers during takeovers: {points} crash points");
    assert!(points > 0);
}
