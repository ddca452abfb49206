//! The host's load: writes the input in order, and all the while reads back and rewrites what it has written.
//!
//! Every read is compared with the input. A block is never written while another write to it is unresolved, as a
//! kernel's block layer would have it, so a retried write can never undo a later one.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use weft_block::{BlockError, Device, Durability};
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use super::input::Input;

/// Bytes of one command of the sequential writer: a common size for a host's large writes …
const CHUNK_BYTES_MAX: u64 = 128 << 10;
/// … but a small input is cut into so many that there is always something outstanding.
const CHUNKS_WISHED: u64 = 256;
/// Writes of the input in flight.
const WRITERS: usize = 8;
/// Checking reads in flight.
const READERS: usize = 6;
/// Rewrites in flight: of 4 KiB, so that narrow stripes are written too.
const REWRITERS: usize = 2;

/// Counters and progress of the load, shared by its tasks.
pub(crate) struct Load {
    device: Device,
    input: Input,
    /// Whole blocks, the same for all chunks.
    chunk_bytes: u64,
    /// Chunks of the input, the last one padded.
    chunks: u64,
    /// Next chunk to write for the first time.
    next: Cell<u64>,
    /// The writers stop before this chunk until it is raised.
    quota: Cell<u64>,
    done: RefCell<Vec<u64>>,
    /// Chunks that some task is using: no two writes to a block at once.
    busy: RefCell<BTreeSet<u64>>,
    hasher: RefCell<Sha256>,
    changed: Notify,
    stop: Cell<bool>,
    paused: Cell<bool>,
    pub(crate) writes_outstanding: Cell<u32>,
    pub(crate) reads_outstanding: Cell<u32>,
    pub(crate) io_errors: Cell<u64>,
    pub(crate) host_bytes_written: Cell<u64>,
    mismatch: RefCell<Option<String>>,
    slowest: Cell<Duration>,
    random: Cell<u64>,
}

impl Load {
    /// A load of `input` on `device`; nothing starts yet.
    pub(crate) fn new(device: Device, input: Input) -> Rc<Self> {
        let chunk_bytes = chunk_bytes(input.bytes());
        let chunks = input.bytes().div_ceil(chunk_bytes);
        Rc::new(Self {
            device,
            input,
            chunk_bytes,
            chunks,
            next: Cell::new(0),
            quota: Cell::new(0),
            done: RefCell::default(),
            busy: RefCell::default(),
            hasher: RefCell::default(),
            changed: Notify::new(),
            stop: Cell::new(false),
            paused: Cell::new(false),
            writes_outstanding: Cell::new(0),
            reads_outstanding: Cell::new(0),
            io_errors: Cell::new(0),
            host_bytes_written: Cell::new(0),
            mismatch: RefCell::default(),
            slowest: Cell::new(Duration::ZERO),
            random: Cell::new(0x9e37_79b9_7f4a_7c15),
        })
    }

    /// Starts its tasks on this thread.
    pub(crate) fn start(self: &Rc<Self>) -> Vec<tokio::task::JoinHandle<()>> {
        let mut tasks = Vec::new();
        for _ in 0..WRITERS {
            tasks.push(tokio::task::spawn_local(Self::write_input(self.clone())));
        }
        for _ in 0..READERS {
            tasks.push(tokio::task::spawn_local(Self::read_back(self.clone())));
        }
        for _ in 0..REWRITERS {
            tasks.push(tokio::task::spawn_local(Self::rewrite(self.clone())));
        }
        tasks
    }

    /// Lets the writers go on up to `percent` of the input, and waits until they are there.
    pub(crate) async fn write_up_to(&self, percent: u64) {
        let quota = self.quota_of(percent);
        self.quota.set(quota.max(self.quota.get()));
        self.changed.notify_waiters();
        while (self.done.borrow().len() as u64) < quota && self.failure().is_none() {
            let changed = self.changed.notified();
            if self.done.borrow().len() as u64 >= quota {
                break;
            }
            let _ = tokio::time::timeout(Duration::from_millis(100), changed).await;
        }
    }

    /// Lets the writers go on up to `percent` and returns at once.
    pub(crate) fn allow_up_to(&self, percent: u64) {
        self.quota.set(self.quota_of(percent).max(self.quota.get()));
        self.changed.notify_waiters();
    }

    /// Bytes of the input written so far.
    pub(crate) fn written_bytes(&self) -> u64 {
        (self.done.borrow().len() as u64 * self.chunk_bytes).min(self.input.bytes())
    }

    /// Why the load cannot be called good: an error or a difference.
    pub(crate) fn failure(&self) -> Option<String> {
        self.mismatch.borrow().clone()
    }

    /// The longest time any command took.
    pub(crate) fn slowest(&self) -> Duration {
        self.slowest.get()
    }

    /// Ends all tasks after the command each has in flight.
    pub(crate) fn stop(&self) {
        self.stop.set(true);
        self.changed.notify_waiters();
    }

    /// Stops issuing commands and waits until none is outstanding.
    pub(crate) async fn pause(&self) {
        self.paused.set(true);
        while self.writes_outstanding.get() + self.reads_outstanding.get() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Issues commands again.
    pub(crate) fn resume(&self) {
        self.paused.set(false);
        self.changed.notify_waiters();
    }

    /// SHA-256 of the input as it was handed to the first writes, in order.
    pub(crate) fn sha256_written(&self) -> String {
        hex(&self.hasher.borrow().clone().finalize())
    }

    /// Reads the whole input back through `device` and returns its SHA-256.
    ///
    /// # Errors
    /// The first read that failed.
    pub(crate) async fn read_all(
        &self,
        device: &Device,
        progress: impl Fn(u64),
    ) -> Result<String, BlockError> {
        use futures_util::StreamExt as _;
        let mut hasher = Sha256::new();
        let mut chunks = futures_util::stream::iter(0..self.chunks)
            .map(|chunk| device.read(self.range(chunk)))
            .buffered(WRITERS);
        let mut at = 0;
        while let Some(data) = chunks.next().await {
            let data = data?;
            let within =
                usize::try_from((self.input.bytes() - at).min(self.chunk_bytes)).unwrap_or(data.len());
            hasher.update(&data[..within]);
            at += within as u64;
            progress(at);
        }
        Ok(hex(&hasher.finalize()))
    }

    async fn write_input(self: Rc<Self>) {
        while !self.stop.get() {
            let chunk = self.next.get();
            if chunk >= self.quota.get() || self.paused.get() {
                let _ = tokio::time::timeout(Duration::from_millis(20), self.changed.notified()).await;
                continue;
            }
            self.next.set(chunk + 1);
            let data = self.expected(chunk);
            // Chunks are taken in order on one thread with no await since, so the hash sees them in order.
            let within = (self.input.bytes() - chunk * self.chunk_bytes).min(self.chunk_bytes);
            self.hasher
                .borrow_mut()
                .update(&data[..usize::try_from(within).unwrap_or(data.len())]);
            self.busy.borrow_mut().insert(chunk);
            if self.write(self.range(chunk).start, data).await {
                self.done.borrow_mut().push(chunk);
            }
            self.busy.borrow_mut().remove(&chunk);
            self.changed.notify_waiters();
        }
    }

    async fn read_back(self: Rc<Self>) {
        while !self.stop.get() {
            let Some(chunk) = self.pick().filter(|_| !self.paused.get()) else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            let range = self.range(chunk);
            self.reads_outstanding.set(self.reads_outstanding.get() + 1);
            let start = Instant::now();
            let answer = self.device.read(range).await;
            self.reads_outstanding.set(self.reads_outstanding.get() - 1);
            self.slowest.set(self.slowest.get().max(start.elapsed()));
            match answer {
                Ok(data) if data == self.expected(chunk) => {}
                Ok(data) => {
                    let expected = self.expected(chunk);
                    let at = data.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(0);
                    self.fail(format!(
                        "read of {range:?} differs from what was written, first at byte {at}"
                    ));
                }
                Err(error) => {
                    self.io_errors.set(self.io_errors.get() + 1);
                    self.fail(format!("read of {range:?} failed: {error}"));
                }
            }
        }
    }

    async fn rewrite(self: Rc<Self>) {
        while !self.stop.get() {
            let Some(chunk) = self
                .pick()
                .filter(|chunk| !self.paused.get() && self.busy.borrow_mut().insert(*chunk))
            else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            let block = self.draw() % (self.chunk_bytes / BLOCK_BYTES as u64);
            let at = usize::try_from(block).unwrap_or(0) * BLOCK_BYTES;
            let data = self.expected(chunk).slice(at..at + BLOCK_BYTES);
            self.write(Lba(self.range(chunk).start.0 + block), data).await;
            self.busy.borrow_mut().remove(&chunk);
        }
    }

    async fn write(&self, start: Lba, data: Bytes) -> bool {
        let bytes = data.len() as u64;
        self.writes_outstanding.set(self.writes_outstanding.get() + 1);
        let began = Instant::now();
        let answer = self.device.write(start, vec![data], Durability::Cached).await;
        self.writes_outstanding.set(self.writes_outstanding.get() - 1);
        self.slowest.set(self.slowest.get().max(began.elapsed()));
        match answer {
            Ok(()) => {
                self.host_bytes_written.set(self.host_bytes_written.get() + bytes);
                true
            }
            Err(error) => {
                self.io_errors.set(self.io_errors.get() + 1);
                self.fail(format!("write at {start} failed: {error}"));
                false
            }
        }
    }

    /// Chunks in `percent` of the input; of a short one at least the first.
    fn quota_of(&self, percent: u64) -> u64 {
        (self.chunks * percent).div_ceil(100)
    }

    /// The blocks of a chunk.
    fn range(&self, chunk: u64) -> LbaRange {
        let count = self.chunk_bytes / BLOCK_BYTES as u64;
        LbaRange {
            start: Lba(chunk * count),
            count,
        }
    }

    fn expected(&self, chunk: u64) -> Bytes {
        let mut data = vec![0; usize::try_from(self.chunk_bytes).expect("a chunk fits in memory")];
        if let Err(error) = self.input.read_at(chunk * self.chunk_bytes, &mut data) {
            self.fail(format!("{error:#}"));
        }
        data.into()
    }

    fn pick(&self) -> Option<u64> {
        let draw = self.draw();
        let done = self.done.borrow();
        let count = done.len() as u64;
        (count > 0).then(|| done[usize::try_from(draw % count).unwrap_or(0)])
    }

    /// xorshift: which block is checked next matters little, that it varies does.
    fn draw(&self) -> u64 {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        x
    }

    fn fail(&self, sentence: String) {
        self.mismatch.borrow_mut().get_or_insert(sentence);
        self.stop();
    }
}

/// Bytes of a chunk of an input of so many.
fn chunk_bytes(input_bytes: u64) -> u64 {
    (input_bytes / CHUNKS_WISHED)
        .next_multiple_of(BLOCK_BYTES as u64)
        .clamp(BLOCK_BYTES as u64, CHUNK_BYTES_MAX)
}

/// Bytes of volume that a load of `input_bytes` uses, without the probe's blocks.
pub(crate) fn span_bytes(input_bytes: u64) -> u64 {
    input_bytes.next_multiple_of(chunk_bytes(input_bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes and reads one block again and again, one millisecond apart, and measures the longest time between two
/// completions: what a guest would feel as a pause.
pub(crate) struct Probe {
    stop: Cell<bool>,
    longest: Cell<Duration>,
    last: Cell<Instant>,
    pub(crate) commands: Cell<u64>,
    pub(crate) bytes_written: Cell<u64>,
    error: RefCell<Option<String>>,
}

impl Probe {
    /// Starts probing `block` of `device`.
    pub(crate) fn start(device: Device, block: Lba) -> Rc<Self> {
        let probe = Rc::new(Self {
            stop: Cell::new(false),
            longest: Cell::new(Duration::ZERO),
            last: Cell::new(Instant::now()),
            commands: Cell::new(0),
            bytes_written: Cell::new(0),
            error: RefCell::default(),
        });
        let task = probe.clone();
        tokio::task::spawn_local(async move {
            let mut value = 0_u8;
            while !task.stop.get() {
                value = value.wrapping_add(1);
                if let Err(sentence) = round_trip(&device, block, value).await {
                    task.error.borrow_mut().get_or_insert(sentence);
                    return;
                }
                task.commands.set(task.commands.get() + 2);
                task.bytes_written
                    .set(task.bytes_written.get() + BLOCK_BYTES as u64);
                task.longest.set(
                    task.longest
                        .get()
                        .max(task.last.replace(Instant::now()).elapsed()),
                );
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        probe
    }

    /// Forgets the gaps so far.
    pub(crate) fn reset(&self) {
        self.longest.set(Duration::ZERO);
    }

    /// Ends the probe and returns the longest gap.
    ///
    /// # Errors
    /// A command failed, or a read did not return the write before it.
    pub(crate) fn finish(&self) -> anyhow::Result<Duration> {
        self.stop.set(true);
        if let Some(sentence) = self.error.borrow().clone() {
            anyhow::bail!(sentence);
        }
        // A gap that is still open counts too.
        Ok(self.longest.get().max(self.last.get().elapsed()))
    }
}

/// Writes a block of `value` and reads it back.
pub(crate) async fn round_trip(device: &Device, block: Lba, value: u8) -> Result<(), String> {
    let data = Bytes::from(vec![value; BLOCK_BYTES]);
    device
        .write(block, vec![data.clone()], Durability::Cached)
        .await
        .map_err(|error| format!("probe write failed: {error}"))?;
    let back = device
        .read(LbaRange {
            start: block,
            count: 1,
        })
        .await
        .map_err(|error| format!("probe read failed: {error}"))?;
    if back == data {
        Ok(())
    } else {
        Err(format!("probe read {} after writing {value}", back[0]))
    }
}
