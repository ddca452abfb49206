//! One column at a time into a fresh chunk: what is rebuilt, what is refused, and what an attempt leaves behind.

use futures_util::future::{Either, select};
use weft_proto::band::{Band, ChunkAddress, ChunkSize};
use weft_proto::id::{BandId, StripeNumber};

use super::*;
use crate::engine::Rebuilt;
use crate::engine::scan::Walk;
use crate::sync::Reply;
use crate::testing::monitor::assert_clean;

fn mib1() -> Settings {
    let mut settings = Settings {
        chunk_size_max: ChunkSize::Mib1,
        ..small()
    };
    settings.map.runs_max = 1; // merged at every checkpoint, so that band counts are exact
    settings
}

/// A volume of `geometry` on `drives` drives with some bands full of stripes of every width.
fn filled(drives: u32, geometry: Geometry) -> Fixture {
    let mut fixture = Fixture::with(drives, 64, geometry, 32 * MIB, mib1());
    for lba in 0..20 {
        fixture.write(lba, &[lba + 1]).unwrap();
    }
    for round in 0..6u64 {
        let writes: Vec<(u64, u64)> = (0..400)
            .map(|at| (20 + round * 200 + at, 1000 * round + at + 1))
            .collect();
        fixture.write_all(&writes);
    }
    let trimmed = LbaRange {
        start: Lba(30),
        count: 40,
    };
    fixture
        .run(fixture.engine.deallocate(vec![trimmed]))
        .expect("trimmed");
    fixture.model.extend((30..70).map(|lba| (lba, 0)));
    fixture
}

impl Fixture {
    fn rebuild(&self, band: BandId, column: u8) -> Result<Rebuilt, VolumeError> {
        let engine = self.engine.clone();
        self.run(async move { engine.rebuild(band, column).await })
    }

    /// Sealed bands with a column on `drive`, and which column.
    fn lost_on(&self, drive: u32) -> Vec<(Band, u8)> {
        let on = |band: &Band| {
            band.columns
                .iter()
                .position(|chunk| chunk.drive == DriveId(drive))
        };
        let sealed = self.engine.sealed_bands();
        sealed
            .into_iter()
            .filter_map(|band| on(&band).map(|column| (band, column as u8)))
            .collect()
    }

    fn band(&self, id: BandId) -> Band {
        let bands = self.world.bands_of(VOLUME);
        bands
            .into_iter()
            .find(|band| band.id == id)
            .expect("a band that is there")
    }

    /// The stripes that a scan of a band finds, with every column read at once from its first row to its last.
    fn scan(&self, id: BandId) -> impl Future<Output = Vec<StripeNumber>> + use<> {
        let core = Rc::clone(&self.engine.0);
        async move {
            let band = core.band(id).expect("a band of the engine");
            let walk = Walk {
                from: 0,
                until: band.rows,
                piece: band.rows,
                window: None,
                verify: false,
            };
            let found = core.scan_band(&band, walk).await.expect("scanned");
            found.into_keys().collect()
        }
    }

    /// What stands in a chunk is somebody else's.
    fn overwrite(&self, chunk: ChunkAddress) {
        let drive = self.world.drive(chunk.drive);
        for row in 0..256 {
            let block = u64::from(chunk.offset_mib) * 256 + row;
            if drive.holds(block) {
                drive.flip_bit(block, 5);
            }
        }
    }

    /// Everything reads, whichever `count` of `drives` are dead.
    fn check_without(&self, drives: &[u32], count: usize) {
        let (Some((drive, others)), true) = (drives.split_first(), count > 0) else {
            return self.check_all();
        };
        self.check_without(others, count);
        self.set_health(*drive, Health::Dead);
        self.check_without(others, count - 1);
        self.set_health(*drive, Health::Serving);
    }
}

#[test]
fn when_a_dead_drives_columns_are_rebuilt_m_further_drives_may_die() {
    let mut fixture = filled(9, Geometry { k: 4, m: 2 });
    fixture.set_health(3, Health::Dead);
    // Whatever was open is sealed, and the next owner's bands are elsewhere.
    fixture.move_over();
    let lost = fixture.lost_on(3);
    assert!(lost.len() > 1, "{} bands", lost.len());
    let before = fixture.engine.stats();
    for (band, column) in &lost {
        let done = fixture.rebuild(band.id, *column).expect("rebuilt");
        assert!(done.shards > 0, "{done:?}");
        let now = fixture.band(band.id);
        assert_eq!(now.version, band.version + 1);
        assert!(now.columns.iter().all(|chunk| chunk.drive != DriveId(3)));
        // Byte for byte what lay there, headers too.
        let (old, new) = (
            band.columns[usize::from(*column)],
            now.columns[usize::from(*column)],
        );
        let blocks = |chunk: ChunkAddress| u64::from(chunk.offset_mib) * 256;
        let (from, to) = (fixture.world.drive(old.drive), fixture.world.drive(new.drive));
        for row in 0..u64::from(band.chunk_size.rows()) {
            if from.holds(blocks(old) + row) {
                assert_eq!(
                    from.peek(blocks(old) + row),
                    to.peek(blocks(new) + row),
                    "row {row}"
                );
            }
        }
    }
    assert!(fixture.engine.stats().rebuilt_bytes > before.rebuilt_bytes);
    assert_eq!(fixture.lost_on(3), []);
    fixture.check_without(&[1, 2, 4, 5, 6, 7, 8, 9], 2);
    // And once more, of a chunk that was rebuilt itself.
    fixture.set_health(9, Health::Dead);
    fixture.move_over();
    for (band, column) in fixture.lost_on(9) {
        fixture.rebuild(band.id, column).expect("rebuilt");
    }
    fixture.check_without(&[1, 2, 4, 5, 6, 7, 8], 2);
    fixture.fail_over();
    fixture.check_all();
    assert_clean(&fixture.world);
}

#[test]
fn a_second_failure_ends_the_attempt_by_name_and_changes_nothing() {
    let mut fixture = filled(4, Geometry { k: 2, m: 1 });
    fixture.set_health(2, Health::Dead);
    fixture.move_over();
    let (band, column) = fixture.lost_on(2).remove(0);
    let spare = (1..=4)
        .find(|drive| band.columns.iter().all(|chunk| chunk.drive != DriveId(*drive)))
        .expect("four drives, three columns");
    let other = (1..=4).find(|drive| ![2, spare].contains(drive)).unwrap();
    // The new owner's bands are granted.
    fixture.world.run_for(std::time::Duration::from_secs(1)).unwrap();
    let free = fixture.world.free_mib(DriveId(spare));
    fixture.set_health(other, Health::Dead);
    assert!(matches!(
        fixture.rebuild(band.id, column),
        Err(VolumeError::TooManyMissing {
            missing: 2,
            tolerated: 1,
            ..
        })
    ));
    assert_eq!(fixture.band(band.id), band);
    assert_eq!(
        fixture.world.free_mib(DriveId(spare)),
        free,
        "its chunk went back"
    );
    fixture.set_health(other, Health::Serving);
    fixture.world.run_for(std::time::Duration::from_secs(20)).unwrap();
    fixture.rebuild(band.id, column).expect("rebuilt when it is back");
    fixture.check_all();
    assert_clean(&fixture.world);
}

#[test]
fn a_fresh_chunk_that_stalls_is_left_alone_and_the_next_attempt_takes_another() {
    let mut fixture = filled(4, Geometry { k: 2, m: 1 });
    fixture.move_over();
    let band = fixture.engine.sealed_bands().remove(0);
    let spare = (1..=4)
        .find(|drive| band.columns.iter().all(|chunk| chunk.drive != DriveId(*drive)))
        .expect("four drives, three columns");
    fixture.set_health(spare, Health::Stalled);
    let refused = fixture.rebuild(band.id, 1);
    assert!(
        matches!(
            &refused,
            Err(VolumeError::ReplacementNotWritten {
                error: BlockError::Unknown,
                ..
            })
        ),
        "{refused:?}"
    );
    assert_eq!(fixture.band(band.id), band);
    let free = fixture.world.free_mib(DriveId(spare));
    // What it held lands, where nobody else is.
    fixture.set_health(spare, Health::Serving);
    fixture.world.run_for(std::time::Duration::from_secs(20)).unwrap();
    fixture.rebuild(band.id, 1).expect("rebuilt into another chunk");
    assert_eq!(
        fixture.world.free_mib(DriveId(spare)),
        free - 1,
        "the first one waits for a fence"
    );
    fixture.fail_over();
    fixture.check_all();
    assert_clean(&fixture.world);
}

#[test]
fn only_a_column_of_a_sealed_band_is_rebuilt() {
    let fixture = filled(4, Geometry { k: 2, m: 1 });
    let sealed = fixture.engine.sealed_bands();
    let open = fixture
        .world
        .bands_of(VOLUME)
        .into_iter()
        .find(|band| sealed.iter().all(|other| other.id != band.id))
        .expect("a band that takes appends");
    assert_eq!(
        fixture.rebuild(open.id, 0),
        Err(VolumeError::NotSealed { band: open.id })
    );
    let first = sealed[0].id;
    assert_eq!(
        fixture.rebuild(first, 3),
        Err(VolumeError::NoSuchColumn {
            band: first,
            column: 3
        })
    );
    assert_eq!(
        fixture.rebuild(BandId(999), 0),
        Err(VolumeError::UnknownBand { band: BandId(999) })
    );
    // Of this epoch, sealed and not yet in a root: its writes have ended, and its old chunk is free at once.
    let old = sealed[0].columns[0];
    // No band is being granted.
    fixture.world.run_for(std::time::Duration::from_secs(1)).unwrap();
    let free = fixture.world.free_mib(old.drive);
    fixture.rebuild(first, 0).expect("rebuilt");
    assert_eq!(fixture.world.free_mib(old.drive), free + 1);
    fixture.check_all();
    assert_clean(&fixture.world);
}

#[test]
fn two_columns_of_one_band_take_turns() {
    let fixture = filled(5, Geometry { k: 2, m: 1 });
    let band = fixture.engine.sealed_bands().remove(0);
    let (first, second) = (fixture.engine.clone(), fixture.engine.clone());
    let id = band.id;
    let (one, other) = fixture
        .run(async move { futures_util::future::join(first.rebuild(id, 0), second.rebuild(id, 1)).await });
    assert!(one.is_ok(), "{one:?}");
    assert_eq!(other, Err(VolumeError::RebuildUnderWay { band: id }));
    fixture.rebuild(id, 1).expect("now");
    assert_eq!(fixture.band(id).version, band.version + 2);
    fixture.check_all();
    assert_clean(&fixture.world);
}

#[test]
fn a_band_that_is_freed_while_it_is_rebuilt_ends_the_attempt() {
    let mut fixture = filled(4, Geometry { k: 2, m: 1 });
    let band = fixture.engine.sealed_bands().remove(0);
    // Everything in it is overwritten: the next checkpoint frees it.
    for start in (0..1700).step_by(400) {
        let writes: Vec<(u64, u64)> = (start..start + 400).map(|lba| (lba, 50_000 + lba)).collect();
        fixture.write_all(&writes);
    }
    let (rebuilding, engine) = (fixture.engine.clone(), fixture.engine.clone());
    let (rebuilt, _) = fixture.run(async move {
        let freeing = async {
            while engine.sealed_bands().iter().any(|other| other.id == band.id) {
                engine.checkpoint().await.expect("checkpoint");
            }
        };
        futures_util::future::join(rebuilding.rebuild(band.id, 0), freeing).await
    });
    assert_eq!(rebuilt, Err(VolumeError::BandChanged { band: band.id }));
    fixture.check_all();
    fixture.fail_over();
    fixture.check_all();
    assert_clean(&fixture.world);
}

#[test]
fn an_attempt_that_is_dropped_or_outlived_by_its_epoch_changes_nothing() {
    let mut fixture = filled(4, Geometry { k: 2, m: 1 });
    fixture.move_over();
    let band = fixture.engine.sealed_bands().remove(0);
    let (engine, id) = (fixture.engine.clone(), band.id);
    let running = fixture.world.start(
        fixture.owner.incarnation,
        async move { engine.rebuild(id, 0).await },
    );
    fixture
        .world
        .run_for(std::time::Duration::from_millis(8))
        .unwrap();
    assert!(!running.is_done());
    fixture.move_over();
    fixture.world.run_for(std::time::Duration::from_secs(2)).unwrap();
    assert_eq!(running.take(), Some(Err(VolumeError::Closed)));
    assert_eq!(fixture.band(id), band);
    fixture.rebuild(id, 0).expect("the next owner rebuilds it");
    fixture.check_all();
    assert_clean(&fixture.world);
}

/// Found by the simulator, seed 6301534: compaction emptied a band without having seen one stripe of it.
#[test]
fn a_scan_does_not_believe_a_chunk_whose_replacement_was_asked_for() {
    let mut fixture = filled(3, Geometry { k: 1, m: 1 });
    fixture.move_over();
    let band = fixture.engine.sealed_bands().remove(0);
    let whole = fixture.run(fixture.scan(band.id));
    assert!(whole.len() > 1, "{whole:?}");
    let (engine, id) = (fixture.engine.clone(), band.id);
    let rebuilding = async move { engine.rebuild(id, 0).await };
    let running = fixture.world.start(fixture.owner.incarnation, rebuilding);
    while fixture.band(id).version == band.version {
        fixture
            .world
            .run_for(std::time::Duration::from_micros(1))
            .unwrap();
    }
    assert!(!running.is_done(), "installed, and the answer is under way");
    fixture.overwrite(band.columns[0]);
    fixture.set_health(band.columns[1].drive.0, Health::Dead);
    assert_eq!(fixture.run(fixture.scan(id)), whole);
    assert!(matches!(running.take(), Some(Ok(_))));
}

/// The same, and nobody waits for the rebuild any more.
#[test]
fn a_rebuild_that_was_dropped_is_not_forgotten_once_it_asked() {
    let mut fixture = filled(3, Geometry { k: 1, m: 1 });
    fixture.move_over();
    let band = fixture.engine.sealed_bands().remove(0);
    let whole = fixture.run(fixture.scan(band.id));
    let (engine, id) = (fixture.engine.clone(), band.id);
    let dropped = Reply::new();
    let drop_it = dropped.wait();
    let rebuilding = async move {
        let rebuild = std::pin::pin!(engine.rebuild(id, 0));
        matches!(select(rebuild, drop_it).await, Either::Right(_))
    };
    let running = fixture.world.start(fixture.owner.incarnation, rebuilding);
    while fixture.band(id).version == band.version {
        fixture
            .world
            .run_for(std::time::Duration::from_micros(1))
            .unwrap();
    }
    dropped.give(());
    fixture.overwrite(band.columns[0]);
    fixture.set_health(band.columns[1].drive.0, Health::Dead);
    assert_eq!(fixture.run(fixture.scan(id)), whole);
    assert_eq!(running.take(), Some(true), "dropped before its answer");
}

/// The same, with the read of the old chunk under way before.
#[test]
fn a_scan_that_met_an_installation_is_made_again() {
    let mut fixture = filled(3, Geometry { k: 1, m: 1 });
    fixture.move_over();
    let band = fixture.engine.sealed_bands().remove(0);
    let whole = fixture.run(fixture.scan(band.id));
    let [old, other] = [band.columns[0], band.columns[1]];
    // One column does not answer, and the other one late.
    fixture.set_health(other.drive.0, Health::Dead);
    fixture.world.drive(old.drive).set_slowness(1000);
    let scan = fixture.scan(band.id);
    let running = fixture.world.start(fixture.owner.incarnation, scan);
    fixture
        .world
        .run_for(std::time::Duration::from_micros(5))
        .unwrap();
    fixture.world.drive(old.drive).set_slowness(1);
    fixture.set_health(other.drive.0, Health::Serving);
    fixture.rebuild(band.id, 0).expect("rebuilt");
    assert!(!running.is_done(), "a read of the old chunk is under way");
    fixture.overwrite(old);
    fixture
        .world
        .run_for(std::time::Duration::from_millis(500))
        .unwrap();
    assert_eq!(running.take(), Some(whole));
}
