//! `weft bench vfio-user`: an emulated controller with a memory drive on one core, beside a loop on the same core that takes
//! the same entries from the same memory, copies a block and completes; the guest polls on the other core.
//!
//! And 128 enabled controllers on one thread while their guests do nothing.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::LocalSet;
use weft_block::memory::MemoryDrive;
use weft_block::polling::{SPAN_DEFAULT, keep_awake};
use weft_block::{Device, Durability};
use weft_proto::id::HostId;
use weft_proto::units::{Lba, MIB};
use weft_target::vfio_user::mapping::Mapping;
use weft_target::vfio_user::{Attachment, Doorbells, serve};

use super::floor::{BLOCK, noise};
use super::guest::{ENTRIES, Guest, HEAD, Load, Memory, TAIL, at, map};
use super::machine::{self, CpuClock};
use super::pairs::{Paired, Window, measure};
use super::report::{Heading, Required, Row};
use super::target::{drive, registry, subnqn};
use super::{Output, Plan};

const DRIVE_BYTES: u64 = 256 * MIB;
const BLOCKS: u64 = DRIVE_BYTES / BLOCK as u64;

/// Idle controllers.
const MANY: usize = 128;

/// For what settles after the last controller was enabled.
const SETTLE: Duration = Duration::from_millis(500);

const COPY: &str = "a loop on the same core that copies a block for each entry of the same queue, same guest";

/// Measures controllers of guests.
///
/// # Errors
/// A controller or a command fails, or a core cannot be had.
pub(super) fn run(plan: &Plan, output: &mut Output) -> anyhow::Result<()> {
    machine::pin(machine::host_core())?;
    let bench = Bench::new()?;
    for (read, name) in [(true, "read"), (false, "write")] {
        let load = Load {
            read,
            depth: 128,
            blocks: BLOCKS,
        };
        let paired = bench.measure(plan, load, |_| {})?;
        let workload = format!("4 KiB random {name}, depth 128");
        output.row(Row::new(
            heading(workload, "IOPS", Required::ValueAtLeast(1e6)),
            &paired,
        ));
    }
    for (read, name) in [(true, "read"), (false, "write")] {
        let load = Load {
            read,
            depth: 1,
            blocks: BLOCKS,
        };
        let paired = bench.measure(plan, load, |window| {
            window.value = window.latency.quantile_us(0.5).unwrap_or(f64::NAN);
        })?;
        let workload = format!("4 KiB random {name}, depth 1, p50");
        output.row(Row::new(
            heading(workload, "µs", Required::ValueAtMost(5.0)),
            &paired,
        ));
    }
    drop(bench);
    let percent = idle(plan.idle)? * 100.0;
    let heading = Heading {
        floor_is: "nothing",
        ..heading(
            format!("{MANY} idle controllers, CPU"),
            "% core",
            Required::ValueAtMost(2.0),
        )
    };
    output.row(Row::counted(heading, percent, 0.0));
    Ok(())
}

fn heading(workload: String, unit: &'static str, required: Required) -> Heading {
    Heading {
        stage: "vfio-user",
        workload,
        unit,
        floor_is: COPY,
        required,
        processes: 1,
        drive_kind: "memory",
    }
}

/// A controller and its floor, with a guest each.
struct Bench {
    // Guests go before what serves them.
    guests: std::cell::RefCell<(Guest, Guest)>,
    floor: Floor,
    _controllers: Controllers,
}

impl Bench {
    fn new() -> anyhow::Result<Self> {
        let memory = Memory::new()?;
        let floor = Floor::start(&memory)?;
        let controllers = Controllers::start(1, BLOCKS)?;
        let guests = (Guest::on(memory), Guest::connect(&controllers.path(0))?);
        Ok(Self {
            guests: guests.into(),
            floor,
            _controllers: controllers,
        })
    }

    fn measure(&self, plan: &Plan, load: Load, value: impl Fn(&mut Window)) -> anyhow::Result<Paired> {
        let floor = || {
            self.floor.set_active(true);
            let window = self.guests.borrow_mut().0.run(load, plan.window);
            self.floor.set_active(false);
            let mut window = window.context("floor")?;
            value(&mut window);
            Ok(window)
        };
        let subject = || {
            let window = self.guests.borrow_mut().1.run(load, plan.window);
            let mut window = window.context("controller")?;
            value(&mut window);
            Ok(window)
        };
        measure(plan.pairs, floor, subject)
    }
}

/// Share of a core that enabled controllers take whose guests do nothing.
fn idle(window: Duration) -> anyhow::Result<f64> {
    let controllers = Controllers::start(MANY, MIB / BLOCK as u64)?;
    let guests = (0..MANY)
        .map(|number| {
            let mut guest = Guest::connect(&controllers.path(number))?;
            // Each has worked before.
            let load = Load {
                read: true,
                depth: 4,
                blocks: 1,
            };
            guest.run(load, Duration::from_millis(1))?;
            Ok(guest)
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    std::thread::sleep(SETTLE);
    let (clock, start) = (CpuClock::now(), Instant::now());
    std::thread::sleep(window);
    let share = clock.elapsed().1.as_secs_f64() / start.elapsed().as_secs_f64();
    drop(guests);
    Ok(share)
}

/// Controllers of one memory drive on a thread of their own.
struct Controllers {
    folder: TempDir,
    stop: Option<oneshot::Sender<()>>,
    join: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Controllers {
    fn start(count: usize, blocks: u64) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let paths: Vec<PathBuf> = (0..count).map(|number| path(&folder, number)).collect();
        let join = std::thread::Builder::new()
            .name("controllers".into())
            .spawn(move || {
                machine::pin(machine::SUBJECT_CORE)?;
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                LocalSet::new().block_on(&runtime, async move {
                    let device = MemoryDrive::preallocated(blocks * BLOCK as u64);
                    fill(&device, blocks).await?;
                    let registry = registry(drive(device)?)?;
                    for path in paths {
                        let attachment = Attachment {
                            subsystem: subnqn(),
                            hostnqn: "nqn.2014-08.org.nvmexpress:uuid:bench-guest".parse()?,
                            hostid: HostId([9; 16]),
                            doorbells: Doorbells::Trapped,
                        };
                        let listener = UnixListener::bind(&path)?;
                        let registry = Rc::clone(&registry);
                        // Ends with this thread.
                        drop(tokio::task::spawn_local(serve(
                            listener,
                            registry,
                            attachment,
                            std::future::pending(),
                        )));
                    }
                    tokio::task::spawn_local(keep_awake(SPAN_DEFAULT));
                    ready.send(())?;
                    // An error is the end of its sender.
                    let _ = stopped.await;
                    Ok(())
                })
            })?;
        if is_ready.recv_timeout(Duration::from_secs(30)).is_err() {
            match join.join() {
                Ok(Err(error)) => return Err(error),
                _ => bail!("the controllers did not start"),
            }
        }
        Ok(Self {
            folder,
            stop: Some(stop),
            join: Some(join),
        })
    }

    fn path(&self, number: usize) -> PathBuf {
        path(&self.folder, number)
    }
}

fn path(folder: &TempDir, number: usize) -> PathBuf {
    folder.path().join(format!("{number}.sock"))
}

impl Drop for Controllers {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(join) = self.join.take() {
            // What it answered has been measured already.
            let _ = join.join();
        }
    }
}

async fn fill(device: &Device, blocks: u64) -> anyhow::Result<()> {
    let payload = bytes::Bytes::from(noise(BLOCK));
    for block in 0..blocks {
        device
            .write(Lba(block), vec![payload.clone()], Durability::Durable)
            .await?;
    }
    Ok(())
}

/// What cannot be avoided: entries are taken, blocks copied, completions written.
struct Floor {
    active: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    join: Option<JoinHandle<()>>,
}

impl Floor {
    fn start(memory: &Memory) -> anyhow::Result<Self> {
        let file = memory.file()?;
        let (active, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (is_active, has_ended) = (Arc::clone(&active), Arc::clone(&ended));
        // Far from any doorbell: this side never has to be told.
        memory.mapping.store_u32(at::EVENTS + TAIL, 0x8000);
        memory.mapping.store_u32(at::EVENTS + HEAD, 0x8000);
        let join = std::thread::Builder::new().name("copy".into()).spawn(move || {
            // The guest notices that nothing completes.
            let (Ok(()), Ok(memory)) = (machine::pin(machine::SUBJECT_CORE), map(&file)) else {
                return;
            };
            let mut drive = noise(DRIVE_BYTES as usize);
            let mut queue = FloorQueue::default();
            while !has_ended.load(Ordering::Acquire) {
                if is_active.load(Ordering::Acquire) {
                    queue.turn(&memory, &mut drive);
                } else {
                    std::thread::park();
                }
            }
        })?;
        Ok(Self {
            active,
            ended,
            join: Some(join),
        })
    }

    fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        self.join.iter().for_each(|join| join.thread().unpark());
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        self.wake();
        if let Some(join) = self.join.take() {
            // The guest has noticed if it panicked.
            let _ = join.join();
        }
    }
}

#[derive(Default)]
struct FloorQueue {
    head: u32,
    completions: u32,
}

impl FloorQueue {
    fn turn(&mut self, memory: &Mapping, drive: &mut [u8]) {
        let tail = memory.load_u32(at::DOORBELLS + TAIL);
        while self.head != tail {
            let mut entry = [0; 64];
            memory.read(at::SQ + self.head as usize * 64, &mut entry);
            self.head = (self.head + 1) % ENTRIES;
            let word = |at: usize| entry[at..at + 8].try_into().map_or(0, u64::from_le_bytes) as usize;
            let (page, lba) = (word(24), word(40));
            let block = &mut drive[lba * BLOCK..(lba + 1) * BLOCK];
            if entry[0] == 0x02 {
                memory.write(page, block);
            } else {
                memory.read(page, block);
            }
            let cid = u64::from(u16::from_le_bytes([entry[2], entry[3]]));
            let phase = u64::from((self.completions / ENTRIES).is_multiple_of(2));
            let second = u64::from(self.head) | 1 << 16 | cid << 32 | phase << 48;
            let place = self.completions % ENTRIES;
            memory.store_pair(at::CQ + place as usize * 16, 0, second);
            self.completions = (self.completions + 1) % (2 * ENTRIES);
        }
    }
}
