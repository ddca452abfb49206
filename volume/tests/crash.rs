//! A crash after every effect. Each script runs once to count its effects (writes that landed, commands that metadata
//! committed), and then once per effect: the world stops right after that effect, the owner dies, what it
//! had in flight is lost, lands, or lands in part or later; sometimes drives die with it, sometimes power fails.
//! A new epoch takes over, and the oracle judges what it reads; it goes on writing, drives come back, and the oracle
//! judges again.
//!
//! `WEFT_SEEDS=0..100` runs each script with more seeds; `WEFT_TRACE=1` prints every effect.

mod common;

use std::time::Duration;

use common::{Fabric, Host, Owner, Spec, seeds};
use futures_util::future::{LocalBoxFuture, join, join_all, join3};
use weft_proto::id::DriveId;
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
struct Crash {
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
            in_flight,
            missing: drives,
            power: rng.chance(1, 3),
        }
    }

    fn strike(&self, fabric: &Fabric) {
        fabric.crash(self.in_flight);
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

/// Verifies, writes on, gives the missing drives back, verifies again.
fn judge(fabric: &Fabric, missing: &[DriveId], what: &str) {
    let owner = fabric.open();
    fabric.verify(&owner, what);
    let host = owner.host.clone();
    let blocks = fabric.spec.blocks;
    let write_on = move || {
        let host = host.clone();
        async move {
            let writes = (0..4).map(|step| host.write(step * 7 % (blocks - 8), 1 + step));
            for result in join_all(writes).await {
                result.expect("the new owner takes writes");
            }
        }
    };
    fabric.run(&owner, write_on());
    for drive in missing {
        fabric.revive(&owner, *drive);
    }
    fabric.run(&owner, write_on());
    fabric.world.run_for(Duration::from_millis(100)).expect("no stop");
    fabric.verify(&owner, what);
    // And once more with everybody there: nothing that came back with a drive counts.
    fabric.crash(InFlight::Mixed);
    let owner = fabric.open();
    fabric.verify(&owner, what);
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
        let fabric = Fabric::new(seed, spec.clone());
        let Ok(owner) = run_script(&fabric, script) else {
            unreachable!("nobody asked to stop");
        };
        let (first, last) = (fabric.mark.get() + 1, fabric.world.effects());
        fabric.verify(&owner, name);
        drop(owner);
        for effect in first..=last {
            let fabric = Fabric::new(seed, spec.clone());
            let mut crash = Crash::draw(&mut Rng::new(seed).fork(effect), spec);
            if let Some(broken) = broken {
                crash.missing.truncate(usize::from(spec.geometry.m) - 1);
                crash.missing.retain(|drive| *drive != broken);
                crash.missing.push(broken);
            }
            let what = format!(
                "{name}: crash after effect {effect} of {last}, {:?}, {:?} missing, power {}",
                crash.in_flight, crash.missing, crash.power
            );
            fabric.world.note(|| what.clone());
            fabric.world.crash_after(effect);
            let stopped = run_script(&fabric, script);
            assert!(
                stopped.is_err(),
                "{what}: the script went another way than before"
            );
            crash.strike(&fabric);
            judge(&fabric, &crash.missing, &what);
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
            host.write(3, 1).await.expect("space");
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
                    host.write(lba, 1).await.expect("space");
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
                host.write(0, 64).await.expect("space");
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
            host.write(0, 16).await.expect("space");
            host.mark();
            for _ in 0..3 {
                let writes = (0..5).map(|step| host.write(step * 3 % 7, 1 + step % 3 * 2));
                join_all(writes).await;
            }
        })
    });
}

#[test]
fn trims_and_zeroes() {
    sweep("trims and zeroes", &small(), |host| {
        Box::pin(async move {
            host.write(0, 32).await.expect("space");
            host.mark();
            host.trim(0, 8).await.expect("a trim needs no space");
            host.write(4, 2).await.expect("space");
            let (trim, write) = (host.trim(16, 16), host.write(20, 4));
            let _ = join3(trim, write, host.zeroes(2, 20)).await;
            host.engine.checkpoint().await.expect("metadata is there");
            host.trim(0, 32).await.expect("a trim needs no space");
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
                host.write(round * 32 % 192, 64).await.expect("space");
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
    sweep("checkpoints", &small(), |host| {
        Box::pin(async move {
            host.write(0, 64).await.expect("space");
            host.mark();
            host.engine.checkpoint().await.expect("metadata is there");
            host.write(10, 3).await.expect("space");
            let writing = async {
                for step in 0..6 {
                    host.write(step * 5, 4).await.expect("space");
                }
            };
            let checkpoint = host.engine.checkpoint();
            let (_, result) = join(writing, checkpoint).await;
            result.expect("metadata is there");
            host.trim(0, 20).await.expect("a trim needs no space");
            host.engine.checkpoint().await.expect("metadata is there");
        })
    });
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
        host.write(0, 16).await.expect("space");
        host.mark();
        let writes = (0..6).map(|step| host.write(step * 4, 4));
        let failure = async {
            host.sleep(Duration::from_micros(60)).await;
            host.world().drive(DriveId(2)).set_health(health);
        };
        join(join_all(writes), failure).await;
        host.write(3, 9).await.expect("space");
    })
}

#[test]
fn compaction() {
    let mut spec = small();
    // Little space, so that it has to compact: 8 MiB on each of 4 drives for 4 MiB of data.
    spec.drive.size_mib = 8;
    spec.blocks = 1024;
    spec.settings.garbage_max = 0.1;
    sweep("compaction", &spec, |host| {
        Box::pin(async move {
            for start in (0..1024).step_by(64) {
                host.write(start, 64).await.expect("space");
            }
            for start in (0..1024).step_by(64) {
                host.write(start, 32).await.expect("space");
            }
            host.mark();
            host.sleep(Duration::from_millis(300)).await;
            for start in (0..256).step_by(64) {
                host.write(start, 32).await.expect("space");
            }
            host.sleep(Duration::from_millis(300)).await;
        })
    });
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
                    host.write(0, 32).await.expect("space");
                    host.engine.checkpoint().await.expect("metadata is there");
                    for round in 0..4 {
                        let writes = (0..6).map(|step| host.write((round * 5 + step * 4) % 60, 1 + step));
                        join_all(writes).await;
                        host.trim(round * 3, 4).await.expect("a trim needs no space");
                    }
                }));
                fabric
                    .world
                    .run_for(Duration::from_millis(8 + seed % 8))
                    .expect("no stop");
                let mut rng = Rng::new(seed).fork(5);
                let crash = Crash::draw(&mut rng, &fabric.spec);
                crash.strike(fabric);
                crash.missing
            };
            let fabric = Fabric::new(seed, spec.clone());
            start(&fabric);
            let first = fabric.world.effects() + 1;
            fabric.open();
            let last = fabric.world.effects();
            for effect in first..=last {
                let fabric = Fabric::new(seed, spec.clone());
                let missing = start(&fabric);
                fabric.world.crash_after(effect);
                let opened = fabric.try_open();
                let mut rng = Rng::new(seed).fork(effect);
                let in_flight = Crash::draw(&mut rng, &spec).in_flight;
                fabric.crash(in_flight);
                drop(opened);
                let what =
                    format!("takeover {effect} of {first}..={last}, {in_flight:?}, {missing:?} missing");
                judge(&fabric, &missing, &what);
                points += 1;
            }
        }
    }
    println!("takeovers during takeovers: {points} crash points");
    assert!(points > 0);
}
