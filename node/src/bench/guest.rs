//! A guest that measures: one I/O queue in shared memory that it fills and polls, doorbells in that memory, no interrupts.
//! The same loop drives a controller and its floor, so that what differs is the other side.
//!
//! It speaks as much vfio-user as it takes to enable a controller (QEMU's `docs/interop/vfio-user.rst`), and shares no code
//! with the server but the mapping.

use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use weft_target::vfio_user::mapping::Mapping;

use super::floor::BLOCK;
use super::histogram::Histogram;
use super::machine::CpuClock;
use super::pairs::{CpuPerIo, Window};

/// Commands outstanding at most; each has a page of its own.
pub(super) const DEPTH_MAX: usize = 128;

/// Entries of the I/O queues, as the Linux driver has them.
pub(super) const ENTRIES: u32 = 1024;

/// What lies where in the guest's memory.
pub(super) mod at {
    pub(super) const ADMIN_SQ: usize = 0x1000;
    pub(super) const ADMIN_CQ: usize = 0x2000;
    pub(in crate::bench) const DOORBELLS: usize = 0x3000;
    pub(in crate::bench) const EVENTS: usize = 0x4000;
    pub(in crate::bench) const SQ: usize = 0x10000;
    pub(in crate::bench) const CQ: usize = 0x20000;
    pub(in crate::bench) const DATA: usize = 0x30000;
}

/// Of the shadow doorbells of queue 1.
pub(super) const TAIL: usize = 8;
pub(super) const HEAD: usize = 12;

const MEMORY_BYTES: usize = at::DATA + DEPTH_MAX * BLOCK;

/// Messages.
const VERSION: u16 = 1;
const DMA_MAP: u16 = 2;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;

const BAR0: u32 = 0;
const CONFIG: u32 = 7;

/// How long the controller may take for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// The memory of a guest.
#[derive(Clone)]
pub(super) struct Memory {
    file: Rc<OwnedFd>,
    pub(super) mapping: Rc<Mapping>,
}

impl Memory {
    /// # Errors
    /// The kernel's.
    pub(super) fn new() -> anyhow::Result<Self> {
        let file = memfd_create("bench-guest", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)?;
        ftruncate(&file, MEMORY_BYTES as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK)?;
        let mapping = map(&file)?;
        // All of it there before it is measured.
        mapping.write(0, &vec![0; MEMORY_BYTES]);
        Ok(Self {
            file: Rc::new(file),
            mapping: Rc::new(mapping),
        })
    }

    /// What another thread maps the same memory by.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn file(&self) -> anyhow::Result<OwnedFd> {
        Ok(self.file.try_clone()?)
    }
}

/// Maps the memory of a guest.
///
/// # Errors
/// The kernel's.
pub(super) fn map(file: &OwnedFd) -> anyhow::Result<Mapping> {
    Ok(Mapping::new(file.as_fd(), 0, MEMORY_BYTES, true)?)
}

/// What is asked.
#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) read: bool,
    pub(super) depth: usize,
    /// Blocks of the namespace that are read and written, at random.
    pub(super) blocks: u64,
}

/// A connection that has enabled a controller.
struct Monitor {
    socket: UnixStream,
    id: u16,
}

/// See the module.
pub(super) struct Guest {
    memory: Memory,
    /// `None` where nobody has to be told of doorbells.
    monitor: Option<Monitor>,
    random: SmallRng,
    tail: u32,
    head: u32,
    phase: u32,
    free: Vec<u16>,
    began: Vec<Instant>,
}

impl Guest {
    /// Of a floor that looks into the same memory.
    pub(super) fn on(memory: Memory) -> Self {
        let now = Instant::now();
        Self {
            memory,
            monitor: None,
            random: SmallRng::seed_from_u64(3),
            tail: 0,
            head: 0,
            phase: 1,
            free: (0..DEPTH_MAX as u16).rev().collect(),
            began: vec![now; DEPTH_MAX],
        }
    }

    /// Connects, enables the controller, and makes an I/O queue pair with doorbells in memory.
    ///
    /// # Errors
    /// The socket's, or the controller refuses something.
    pub(super) fn connect(path: &Path) -> anyhow::Result<Self> {
        let memory = Memory::new()?;
        let mut guest = Self::on(memory.clone());
        let socket = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Monitor { socket, id: 0 };
        monitor.request(VERSION, b"\0\0\x01\0", None)?;
        let mut map = [32u32, 3].map(u32::to_le_bytes).concat();
        map.extend([0, 0, MEMORY_BYTES as u64].map(u64::to_le_bytes).concat());
        monitor.request(DMA_MAP, &map, Some(&memory.file))?;
        // Memory space and bus master.
        monitor.write(CONFIG, 4, &[6, 0])?;
        monitor.write(BAR0, 0x24, &(31u32 << 16 | 31).to_le_bytes())?;
        monitor.write(BAR0, 0x28, &(at::ADMIN_SQ as u64).to_le_bytes())?;
        monitor.write(BAR0, 0x30, &(at::ADMIN_CQ as u64).to_le_bytes())?;
        monitor.write(BAR0, 0x14, &0x0046_0001u32.to_le_bytes())?;
        let began = Instant::now();
        while monitor.read_u32(BAR0, 0x1c)? & 1 == 0 {
            ensure!(began.elapsed() < PATIENCE, "the controller does not get ready");
        }
        let size = (ENTRIES - 1) << 16 | 1;
        let commands = [
            // Create I/O Completion Queue, contiguous and without an interrupt; create I/O Submission Queue; Doorbell Buffer Config.
            admin(0x05, [at::CQ, 0], [size, 1]),
            admin(0x01, [at::SQ, 0], [size, 1 << 16 | 1]),
            admin(0x7c, [at::DOORBELLS, at::EVENTS], [0, 0]),
        ];
        for (number, command) in commands.iter().enumerate() {
            guest.memory.mapping.write(at::ADMIN_SQ + number * 64, command);
            monitor.write(BAR0, 0x1000, &(number as u32 + 1).to_le_bytes())?;
            let began = Instant::now();
            let status = loop {
                let word = guest.memory.mapping.load_u32(at::ADMIN_CQ + number * 16 + 12);
                if word >> 16 & 1 == 1 {
                    break word >> 17;
                }
                ensure!(began.elapsed() < PATIENCE, "an admin command never completes");
                std::thread::yield_now();
            };
            ensure!(status == 0, "admin command {:#x}: status {status:#x}", command[0]);
        }
        guest.monitor = Some(monitor);
        Ok(guest)
    }

    /// Keeps `load.depth` commands outstanding for `window`.
    ///
    /// # Errors
    /// A command fails, or none completes any more.
    pub(super) fn run(&mut self, load: Load, window: Duration) -> anyhow::Result<Window> {
        let mut latency = Histogram::default();
        let (clock, start) = (CpuClock::now(), Instant::now());
        let (mut done, mut outstanding, mut last) = (0u64, 0, start);
        loop {
            let now = Instant::now();
            if now - start < window {
                let more = load.depth - outstanding;
                self.submit(load, more, now)?;
                outstanding += more;
            }
            if outstanding == 0 {
                break;
            }
            let completed = self.take(&mut latency)?;
            done += completed as u64;
            outstanding -= completed;
            if completed > 0 {
                last = now;
            } else if now - last > PATIENCE {
                anyhow::bail!("{outstanding} commands never complete");
            } else {
                std::hint::spin_loop();
            }
        }
        let (seconds, cpu) = (start.elapsed().as_secs_f64(), clock.elapsed());
        let per_io = |time: Duration| Some(time.as_secs_f64() * 1e6 / done as f64);
        Ok(Window {
            value: done as f64 / seconds,
            latency,
            cpu: CpuPerIo {
                host: per_io(cpu.0),
                target: per_io(cpu.1),
            },
        })
    }

    /// Puts `count` commands into the queue and rings once.
    fn submit(&mut self, load: Load, count: usize, now: Instant) -> anyhow::Result<()> {
        if count == 0 {
            return Ok(());
        }
        let before = self.tail;
        for _ in 0..count {
            let cid = self.free.pop().context("as many identifiers as commands")?;
            self.began[usize::from(cid)] = now;
            let mut entry = [0; 64];
            entry[0] = if load.read { 0x02 } else { 0x01 };
            entry[2..4].copy_from_slice(&cid.to_le_bytes());
            entry[4] = 1;
            let page = (at::DATA + usize::from(cid) * BLOCK) as u64;
            entry[24..32].copy_from_slice(&page.to_le_bytes());
            let lba = self.random.random_range(0..load.blocks);
            entry[40..48].copy_from_slice(&lba.to_le_bytes());
            self.memory
                .mapping
                .write(at::SQ + self.tail as usize * 64, &entry);
            self.tail = (self.tail + 1) % ENTRIES;
        }
        self.ring(TAIL, before, self.tail)
    }

    /// Takes what has completed; answers how many.
    fn take(&mut self, latency: &mut Histogram) -> anyhow::Result<usize> {
        let before = self.head;
        let mut taken = 0;
        let mut now = None;
        loop {
            let word = self
                .memory
                .mapping
                .load_u32(at::CQ + self.head as usize * 16 + 12);
            if word >> 16 & 1 != self.phase {
                break;
            }
            let (cid, status) = (word as u16, word >> 17);
            ensure!(status == 0, "command {cid}: status {status:#x}");
            let now = *now.get_or_insert_with(Instant::now);
            latency.record((now - self.began[usize::from(cid)]).as_nanos() as u64);
            self.free.push(cid);
            taken += 1;
            self.head += 1;
            if self.head == ENTRIES {
                self.head = 0;
                self.phase ^= 1;
            }
        }
        if taken > 0 {
            self.ring(HEAD, before, self.head)?;
        }
        Ok(taken)
    }

    /// Rings a doorbell in memory, and the register's if the other side asked to be told: as the Linux driver does.
    fn ring(&mut self, doorbell: usize, before: u32, now: u32) -> anyhow::Result<()> {
        self.memory.mapping.store_u32(at::DOORBELLS + doorbell, now);
        fence(Ordering::SeqCst);
        let event = self.memory.mapping.load_u32(at::EVENTS + doorbell);
        let (event, now_u16, before) = (event as u16, now as u16, before as u16);
        if now_u16.wrapping_sub(event).wrapping_sub(1) < now_u16.wrapping_sub(before)
            && let Some(monitor) = &mut self.monitor
        {
            monitor.post(0x1000 + doorbell as u64, now)?;
        }
        Ok(())
    }
}

impl Monitor {
    fn send(&mut self, command: u16, flags: u32, body: &[u8], file: Option<&OwnedFd>) -> anyhow::Result<()> {
        self.id = self.id.wrapping_add(1);
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend_from_slice(&self.id.to_le_bytes());
        message.extend_from_slice(&command.to_le_bytes());
        message.extend_from_slice(&(16 + body.len() as u32).to_le_bytes());
        message.extend_from_slice(&flags.to_le_bytes());
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = file.map(|file| [file.as_fd()]);
        if let Some(files) = &files {
            ensure!(
                control.push(SendAncillaryMessage::ScmRights(files)),
                "room for a descriptor"
            );
        }
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(&message)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        ensure!(sent == message.len(), "a message was sent in part");
        Ok(())
    }

    fn request(&mut self, command: u16, body: &[u8], file: Option<&OwnedFd>) -> anyhow::Result<Vec<u8>> {
        self.send(command, 0, body, file)?;
        let mut header = [0; 16];
        self.socket.read_exact(&mut header)?;
        let word = |at: usize| header[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
        let mut body = vec![0; (word(4) as usize).saturating_sub(16)];
        self.socket.read_exact(&mut body)?;
        ensure!(
            word(8) & 0x20 == 0,
            "message {command} refused: errno {}",
            word(12)
        );
        Ok(body)
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        self.request(REGION_WRITE, &access(region, offset, data), None)
            .map(drop)
    }

    fn read_u32(&mut self, region: u32, offset: u64) -> anyhow::Result<u32> {
        let mut body = access(region, offset, &[]);
        body[12] = 4;
        let reply = self.request(REGION_READ, &body, None)?;
        let word = reply.get(16..20).context("a reply with a word")?;
        Ok(word.try_into().map_or(0, u32::from_le_bytes))
    }

    /// Writes a register of BAR 0 and wants no reply.
    fn post(&mut self, offset: u64, value: u32) -> anyhow::Result<()> {
        self.send(
            REGION_WRITE,
            1 << 4,
            &access(BAR0, offset, &value.to_le_bytes()),
            None,
        )
    }
}

fn access(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend([region, data.len() as u32].map(u32::to_le_bytes).concat());
    body.extend_from_slice(data);
    body
}

fn admin(opcode: u8, pointers: [usize; 2], words: [u32; 2]) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = opcode;
    for (at, pointer) in [24, 32].into_iter().zip(pointers) {
        entry[at..at + 8].copy_from_slice(&(pointer as u64).to_le_bytes());
    }
    for (at, word) in [40, 44].into_iter().zip(words) {
        entry[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    entry
}
