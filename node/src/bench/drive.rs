//! `weft bench drive`: a drive on a file, beside a bare io_uring loop on the same file.

use std::cell::RefCell;

use anyhow::Context as _;
use tokio::task::LocalSet;
use weft_block::buffer::AlignedBuf;
use weft_block::drive::{Drive, DriveOptions, create_file};
use weft_proto::units::MIB;

use super::floor::noise;
use super::load::{Clock, Load, PAYLOAD_BYTES, Pattern};
use super::pairs::measure;
use super::report::{Heading, Required, Row};
use super::ring_floor::RingFloor;
use super::{Output, Plan, machine};

/// Of the file, which is written whole first.
const FILE_BYTES: u64 = 256 * MIB;

/// Measures a drive on a temporary file.
///
/// # Errors
/// The file cannot be made, or an I/O fails.
pub(super) fn run(plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    machine::pin(machine::SUBJECT_CORE)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("drive");
    create_file(&path, FILE_BYTES)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = LocalSet::new();
    let drive = local.block_on(&runtime, Drive::open(&path, DriveOptions::default()))?;
    // Aligned, for both: what a drive copies because it is not is not the drive's.
    let payload = AlignedBuf::gather(&[noise(PAYLOAD_BYTES).into()]).freeze();
    let load = Load::of(payload.clone(), drive.device(), Clock::Wall);
    local
        .block_on(&runtime, load.fill())
        .context("filling the file")?;
    let floor = RefCell::new(RingFloor::open(&path, drive.is_direct(), payload)?);
    let drive_kind = match (drive.is_direct(), drive.uses_threads()) {
        (true, false) => "file, direct, io_uring",
        (false, false) => "file, page cache, io_uring",
        (_, true) => "file, threads",
    };

    for (random, depth) in [(true, 32), (false, 8)] {
        for read in [true, false] {
            let pattern = Pattern { read, random, depth };
            let paired = measure(
                plan.pairs,
                || Ok(floor.borrow_mut().run(pattern, plan.window)?),
                || local.block_on(&runtime, load.run(pattern, plan.window)),
            )?;
            let heading = Heading {
                stage: "drive",
                workload: format!(
                    "{} {}, depth {depth}",
                    if random {
                        "4 KiB random"
                    } else {
                        "128 KiB sequential"
                    },
                    if read { "read" } else { "durable write" },
                ),
                unit: pattern.unit(),
                floor_is: "bare io_uring loop on the same file, the same flags",
                required: Required::RatioAtLeast(0.9),
                processes: 1,
                drive_kind,
            };
            output.row(Row::new(heading, &paired));
        }
    }
    drop(load);
    local.block_on(&runtime, drive.drained());
    Ok(())
}
