//! Drives over real files: direct where the file system allows, with io_uring and with threads.

use tempfile::TempDir;

use super::*;
use crate::testing;

const MIB: u64 = 1 << 20;

/// Beside the test's binary rather than in `/tmp`, which may be memory and then takes no direct I/O.
fn folder() -> TempDir {
    let binary = std::env::current_exe().unwrap();
    tempfile::tempdir_in(binary.parent().unwrap()).unwrap()
}

async fn open(path: &Path, engine: Engine) -> Drive {
    let options = DriveOptions {
        engine,
        ..DriveOptions::default()
    };
    Drive::open(path, options).await.unwrap()
}

/// Runs on a runtime as the data path has it.
fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

fn range(start: u64, count: u64) -> LbaRange {
    LbaRange {
        start: Lba(start),
        count,
    }
}

fn block(byte: u8) -> Vec<Bytes> {
    vec![Bytes::from(vec![byte; 4096])]
}

async fn conformance_in(folder: &TempDir, engine: Engine, depth: usize) {
    let count = std::cell::Cell::new(0);
    testing::conformance(async || {
        count.set(count.get() + 1);
        let path = folder
            .path()
            .join(format!("drive{}-{engine:?}-{depth}", count.get()));
        create_file(&path, 16 * MIB).unwrap();
        let options = DriveOptions {
            engine,
            queue_depth: depth,
            ..DriveOptions::default()
        };
        Drive::open(&path, options).await.unwrap().device()
    })
    .await;
}

#[test]
fn a_file_keeps_the_contract_through_io_uring() {
    run(conformance_in(&folder(), Engine::Auto, 128));
}

#[test]
fn a_file_keeps_the_contract_with_one_operation_at_a_time() {
    run(conformance_in(&folder(), Engine::Auto, 1));
}

#[test]
fn a_file_keeps_the_contract_through_threads() {
    run(conformance_in(&folder(), Engine::Threads, 128));
}

#[test]
fn a_file_keeps_the_contract_through_the_page_cache() {
    // As on a file system that takes no direct I/O: nothing is copied, whatever its alignment, and a write may
    // have more segments than a system call.
    let folder = folder();
    for engine in [Engine::Auto, Engine::Threads] {
        let count = std::cell::Cell::new(0);
        run(testing::conformance(async || {
            count.set(count.get() + 1);
            let path = folder.path().join(format!("drive{}-{engine:?}", count.get()));
            create_file(&path, 16 * MIB).unwrap();
            let mut probed = probe::open(&path).unwrap().unwrap();
            rustix::fs::fcntl_setfl(&probed.file, rustix::fs::OFlags::empty()).unwrap();
            probed.direct = false;
            let options = DriveOptions {
                engine,
                ..DriveOptions::default()
            };
            Drive(Inner::start(&path, probed, &options)).device()
        }));
    }
}

#[test]
fn a_file_in_memory_keeps_the_contract() {
    // tmpfs: takes no ZERO_RANGE, and before Linux 6.6 no direct I/O.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    run(conformance_in(&folder, Engine::Auto, 128));
}

#[test]
fn a_second_opener_is_refused_and_told_the_path() {
    run(async {
        let folder = folder();
        let path = folder.path().join("drive");
        create_file(&path, 16 * MIB).unwrap();
        let first = open(&path, Engine::Auto).await;
        let options = DriveOptions {
            lock_wait: Duration::from_millis(50),
            ..DriveOptions::default()
        };
        let error = Drive::open(&path, options.clone()).await.err().unwrap();
        assert!(matches!(&error, DriveError::Locked { path: locked } if *locked == path));
        assert!(error.to_string().contains(path.to_str().unwrap()));
        drop(first);
        let options = DriveOptions {
            lock_wait: Duration::from_secs(10),
            ..options
        };
        Drive::open(&path, options).await.unwrap();
    });
}

#[test]
fn what_is_not_a_drive_is_refused_by_path() {
    run(async {
        let folder = folder();
        let options = DriveOptions::default;
        let error = Drive::open(folder.path(), options()).await.err().unwrap();
        assert!(matches!(error, DriveError::NotADrive { .. }), "{error}");
        let missing = folder.path().join("missing");
        let error = Drive::open(&missing, options()).await.err().unwrap();
        assert!(error.to_string().contains("missing"), "{error}");
        let empty = folder.path().join("empty");
        create_file(&empty, 4095).unwrap();
        let error = Drive::open(&empty, options()).await.err().unwrap();
        assert!(matches!(error, DriveError::Empty { .. }), "{error}");
        assert!(
            create_file(&empty, MIB).is_err(),
            "never over something that exists"
        );
    });
}

#[test]
fn a_file_that_is_deleted_is_gone() {
    run(async {
        let folder = folder();
        let path = folder.path().join("drive");
        create_file(&path, 16 * MIB).unwrap();
        let options = DriveOptions {
            health_interval: Duration::from_millis(10),
            ..DriveOptions::default()
        };
        let drive = Drive::open(&path, options).await.unwrap();
        let mut health = drive.health();
        assert_eq!(*health.borrow_and_update(), Health::Good);
        std::fs::remove_file(&path).unwrap();
        health.changed().await.unwrap();
        assert_eq!(*health.borrow(), Health::Gone(GoneReason::Unlinked));
        assert_eq!(drive.read(range(0, 1)).await, Err(BlockError::Gone));
        let written = drive.write(Lba(0), block(1), Durability::Durable).await;
        assert_eq!(written, Err(BlockError::Gone));
        assert_eq!(drive.flush().await, Err(BlockError::Gone));
    });
}

#[test]
fn a_truncated_file_is_gone_at_the_first_read_that_misses_it() {
    run(async {
        let folder = folder();
        let path = folder.path().join("drive");
        create_file(&path, 16 * MIB).unwrap();
        let options = DriveOptions {
            health_interval: Duration::from_secs(3600),
            ..DriveOptions::default()
        };
        let drive = Drive::open(&path, options).await.unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(MIB).unwrap();
        assert_eq!(drive.read(range(0, 1)).await.unwrap().len(), 4096);
        assert_eq!(drive.read(range(255, 2)).await, Err(BlockError::Gone));
        let gone = GoneReason::Shrunk {
            expected: 257 * 4096,
            bytes: MIB,
        };
        assert_eq!(*drive.health().borrow(), Health::Gone(gone));
    });
}

#[test]
fn a_deallocated_range_gives_its_space_back() {
    use std::os::unix::fs::MetadataExt;
    run(async {
        let folder = folder();
        let path = folder.path().join("drive");
        create_file(&path, 16 * MIB).unwrap();
        let drive = open(&path, Engine::Auto).await;
        let used = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let data = vec![Bytes::from(vec![7; MIB as usize])];
        for at in 0..4 {
            let written = drive.write(Lba(at * 256), data.clone(), Durability::Durable);
            written.await.unwrap();
        }
        let full = used();
        assert!(full >= 4 * MIB);
        drive.deallocate(vec![range(0, 512)]).await.unwrap();
        assert!(used() <= full - 2 * MIB, "two of four mebibytes are free");
        let zeroed = drive.write_zeroes(range(512, 512), true, Durability::Durable);
        zeroed.await.unwrap();
        assert!(used() <= full - 4 * MIB, "Write Zeroes frees too, where asked");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 16 * MIB);
    });
}

#[test]
fn operations_in_flight_are_waited_for_when_the_runtime_ends() {
    for engine in [Engine::Auto, Engine::Threads] {
        let folder = folder();
        let path = folder.path().join("drive");
        create_file(&path, 64 * MIB).unwrap();
        run(async {
            let drive = open(&path, engine).await;
            for at in 0..32 {
                // Made, and never looked at again.
                drop(drive.write(Lba(at), block(at as u8 + 1), Durability::Durable));
            }
        });
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..32 {
            assert_eq!(bytes[at * 4096], at as u8 + 1, "{engine:?}");
        }
        // Nobody holds the lock any more.
        run(async { drop(open(&path, engine).await) });
    }
}

#[test]
fn a_thread_can_run_one_runtime_after_another() {
    let folder = folder();
    let path = folder.path().join("drive");
    create_file(&path, 16 * MIB).unwrap();
    let old = run(async {
        let drive = open(&path, Engine::Auto).await;
        drive.write(Lba(3), block(9), Durability::Durable).await.unwrap();
        drive
    });
    // A handle of the runtime that ended answers, and does nothing.
    assert_eq!(run(old.read(range(3, 1))), Err(BlockError::NotReady));
    drop(old);
    run(async {
        let drive = open(&path, Engine::Auto).await;
        assert_eq!(drive.read(range(3, 1)).await.unwrap()[0], 9);
    });
}

#[test]
fn a_failed_durable_write_or_flush_poisons_the_drive() {
    run(async {
        let folder = folder();
        // Neither a file opened for reading nor a pipe takes what is asked here: errors without a bad drive.
        let (pipe, _other_end) = std::io::pipe().unwrap();
        for (durable, poisoned) in [(false, false), (true, true)] {
            let path = folder.path().join(format!("drive-{durable}"));
            create_file(&path, 16 * MIB).unwrap();
            let drive = open(&path, Engine::Auto).await;
            let file = OwnedFd::from(std::fs::File::open(&path).unwrap());
            let action = Action::Write {
                pieces: align_pieces(block(1), 4096, 4096),
                durable,
            };
            let operation = Operation::new(Arc::new(file), 0, action);
            let port = &drive.0.port;
            let write = port.start(operation, Asked::Write { durable }, Op::Write, 4096);
            let error = write.await.unwrap().unwrap_err();
            assert_eq!(error == BlockError::Gone, poisoned);
            let read = drive.read(range(0, 1)).await;
            assert_eq!(read.is_err(), poisoned);
        }
        let path = folder.path().join("drive-flush");
        create_file(&path, 16 * MIB).unwrap();
        let drive = open(&path, Engine::Auto).await;
        let operation = Operation::new(Arc::new(pipe.into()), 0, Action::Sync);
        let flush = drive.0.port.start(operation, Asked::Flush, Op::Flush, 0);
        assert_eq!(flush.await.unwrap().unwrap_err(), BlockError::Gone);
        assert_eq!(drive.flush().await, Err(BlockError::Gone));
        let reason = *drive.health().borrow();
        assert!(
            matches!(reason, Health::Gone(GoneReason::FlushFailed { .. })),
            "{reason:?}"
        );
    });
}

#[test]
fn more_operations_than_the_ring_has_entries_are_all_done() {
    run(async {
        let folder = folder();
        let path = folder.path().join("drive");
        create_file(&path, 64 * MIB).unwrap();
        let options = DriveOptions {
            queue_depth: 10_000,
            ..DriveOptions::default()
        };
        let drive = Drive::open(&path, options).await.unwrap();
        let count = 6000;
        let writes: Vec<_> = (0..count)
            .map(|at| drive.write(Lba(at), block(at as u8), Durability::Cached))
            .collect();
        assert!(join_all(writes).await.iter().all(Result::is_ok));
        let reads: Vec<_> = (0..count).map(|at| drive.read(range(at, 1))).collect();
        for (at, read) in join_all(reads).await.into_iter().enumerate() {
            assert_eq!(read.unwrap()[4095], at as u8);
        }
    });
}

#[test]
fn two_drives_of_a_thread_share_its_ring() {
    run(async {
        let folder = folder();
        let mut drives = Vec::new();
        for index in 0..2u8 {
            let path = folder.path().join(format!("drive{index}"));
            create_file(&path, 16 * MIB).unwrap();
            drives.push(open(&path, Engine::Auto).await);
        }
        let rings: Vec<_> = drives.iter().map(|drive| drive.0.port.ring_address()).collect();
        assert!(rings[0].is_some() && rings[0] == rings[1]);
        let writes = drives
            .iter()
            .zip(1..)
            .map(|(drive, byte)| drive.write(Lba(5), block(byte), Durability::Durable));
        assert!(
            join_all(writes.collect::<Vec<_>>())
                .await
                .iter()
                .all(Result::is_ok)
        );
        for (drive, byte) in drives.iter().zip(1..) {
            assert_eq!(drive.read(range(5, 1)).await.unwrap()[0], byte);
        }
    });
}

#[test]
fn draining_waits_for_everything_that_was_started() {
    run(async {
        let folder = folder();
        let path = folder.path().join("drive");
        create_file(&path, 16 * MIB).unwrap();
        let options = DriveOptions {
            queue_depth: 2,
            ..DriveOptions::default()
        };
        let drive = Drive::open(&path, options).await.unwrap();
        drive.drained().await;
        for at in 0..64 {
            drop(drive.write(Lba(at), block(1), Durability::Cached));
        }
        drive.drained().await;
        let bytes = drive.read(range(0, 64)).await.unwrap();
        assert!(bytes.iter().all(|byte| *byte == 1));
    });
}

/// Keeps every counter under its name and labels; the other kinds only as names.
#[derive(Default)]
struct Recorder {
    counters: std::sync::Mutex<std::collections::BTreeMap<String, Arc<std::sync::atomic::AtomicU64>>>,
    seen: std::sync::Mutex<Vec<metrics::Key>>,
}

impl Recorder {
    fn counter(&self, name: &str, op: &str) -> u64 {
        let counters = self.counters.lock().unwrap();
        let counter = &counters[&format!("{name} drive=d op={op}")];
        counter.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        self.seen.lock().unwrap().push(key.clone());
        let mut name = key.name().to_owned();
        for label in key.labels() {
            name += &format!(" {}={}", label.key(), label.value());
        }
        let counter = self.counters.lock().unwrap().entry(name).or_default().clone();
        metrics::Counter::from_arc(counter)
    }

    fn register_gauge(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        self.seen.lock().unwrap().push(key.clone());
        metrics::Gauge::noop()
    }

    fn register_histogram(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        self.seen.lock().unwrap().push(key.clone());
        metrics::Histogram::noop()
    }
}

#[test]
fn operations_bytes_and_errors_are_counted_under_listed_names() {
    let recorder = Recorder::default();
    metrics::with_local_recorder(&recorder, || {
        run(async {
            let folder = folder();
            let path = folder.path().join("drive");
            create_file(&path, 16 * MIB).unwrap();
            let options = DriveOptions {
                name: Some("d".to_owned()),
                ..DriveOptions::default()
            };
            let drive = Drive::open(&path, options).await.unwrap();
            drive.write(Lba(0), block(1), Durability::Durable).await.unwrap();
            drive.read(range(0, 3)).await.unwrap();
            std::fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(0)
                .unwrap();
            assert!(drive.read(range(0, 1)).await.is_err());
        });
    });
    assert_eq!(recorder.counter("weft_block_operations_total", "write"), 1);
    assert_eq!(recorder.counter("weft_block_bytes_total", "write"), 4096);
    assert_eq!(recorder.counter("weft_block_operations_total", "read"), 2);
    assert_eq!(recorder.counter("weft_block_bytes_total", "read"), 3 * 4096);
    assert_eq!(recorder.counter("weft_block_errors_total", "read"), 1);
    for key in recorder.seen.lock().unwrap().iter() {
        let listed = crate::metrics::METRICS
            .iter()
            .find(|metric| metric.name == key.name());
        let listed = listed.unwrap_or_else(|| panic!("{} is not listed", key.name()));
        let labels: Vec<&str> = key.labels().map(metrics::Label::key).collect();
        assert_eq!(labels, listed.labels, "{}", key.name());
    }
}
