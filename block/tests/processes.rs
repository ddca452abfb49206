//! What takes a process of its own: a lock that outlives nobody, and a process that may have no ring.
//!
//! A child is this very test binary, asked to run one test that does nothing unless it is a child.
#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use weft_block::drive::{Drive, DriveError, DriveOptions, create_file};
use weft_block::{BlockDevice, Durability};
use weft_proto::units::{Lba, LbaRange};

/// Tells a child which drive to use.
const DRIVE: &str = "WEFT_TEST_DRIVE";

/// What a child says once its drive is open and works.
const WORKS: &str = "the drive works";

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

fn drive_file() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("drive");
    create_file(&path, 16 << 20).unwrap();
    (folder, path)
}

/// A child, which does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `role`, one of the tests below, in a child, and waits until its drive works.
fn child(role: &str, drive: &Path) -> Running {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", role, "--nocapture"])
        .env(DRIVE, drive)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = Running(child);
    let stdout = child.0.stdout.as_mut().unwrap();
    let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
    let works = lines.any(|line| line.contains(WORKS));
    drop(lines);
    assert!(works, "{role} ended without a drive: {:?}", child.0.wait());
    child
}

async fn write_one(drive: &Drive, byte: u8) {
    let data = vec![Bytes::from(vec![byte; 4096])];
    drive.write(Lba(1), data, Durability::Durable).await.unwrap();
}

/// A role: keeps writes in flight until it is killed.
#[test]
fn role_writes_until_killed() {
    let Some(path) = std::env::var_os(DRIVE) else {
        return;
    };
    run(async {
        let drive = Drive::open(Path::new(&path), DriveOptions::default())
            .await
            .unwrap();
        write_one(&drive, 1).await;
        println!("{WORKS}");
        loop {
            for _ in 0..64 {
                drop(drive.write(Lba(2), vec![vec![2; 1 << 20].into()], Durability::Durable));
            }
            drive.drained().await;
        }
    });
}

#[test]
fn a_killed_agents_drives_are_free_for_the_next_one() {
    let (_folder, path) = drive_file();
    let mut writer = child("role_writes_until_killed", &path);
    run(async {
        let at_once = DriveOptions {
            lock_wait: Duration::ZERO,
            ..DriveOptions::default()
        };
        let refused = Drive::open(&path, at_once).await.err().unwrap();
        assert!(matches!(refused, DriveError::Locked { .. }), "{refused}");
        // SIGKILL, with writes in the kernel.
        writer.0.kill().unwrap();
        let patient = DriveOptions {
            lock_wait: Duration::from_secs(60),
            ..DriveOptions::default()
        };
        let drive = Drive::open(&path, patient).await.unwrap();
        let block = drive
            .read(LbaRange {
                start: Lba(1),
                count: 1,
            })
            .await
            .unwrap();
        assert!(block.iter().all(|byte| *byte == 1));
    });
}

/// A role: may open the drive's file and nothing more, so that there is no descriptor for a ring.
#[test]
fn role_has_no_ring() {
    let Some(path) = std::env::var_os(DRIVE) else {
        return;
    };
    run(async {
        // The lowest descriptor that is free is the file's.
        let next = std::fs::File::open("/dev/null").unwrap();
        let limit = std::os::fd::AsRawFd::as_raw_fd(&next) as u64 + 1;
        drop(next);
        let limit = rustix::process::Rlimit {
            current: Some(limit),
            maximum: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
        };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        let drive = Drive::open(Path::new(&path), DriveOptions::default())
            .await
            .unwrap();
        assert!(drive.uses_threads());
        write_one(&drive, 7).await;
        println!("{WORKS}");
    });
}

#[test]
fn without_a_ring_a_drive_works_through_threads() {
    let (_folder, path) = drive_file();
    let mut without = child("role_has_no_ring", &path);
    assert!(without.0.wait().unwrap().success());
    assert_eq!(std::fs::read(&path).unwrap()[4096], 7);
}
