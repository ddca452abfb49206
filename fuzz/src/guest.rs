//! The controller of a guest under a hostile guest and a hostile monitor: any messages, any memory, any queues, commands whose
//! PRPs and SGLs lead anywhere, memory that comes and goes in between.
//!
//! - Nothing panics, and every turn ends.
//! - Memory that was never given to the device is not written.
//! - What the server holds is bounded.
//! - Whatever came before, a device reset leaves a controller that gets ready and identifies itself.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use weft_block::memory::MemoryDrive;
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::log::AnaState;
use weft_target::vfio_user::message::{HEADER_BYTES, Header, Request};
use weft_target::vfio_user::unconnected::Unconnected;
use weft_target::vfio_user::{Attachment, Doorbells};
use weft_target::{AllowedHosts, NamespaceConfig, Registry, RegistryConfig, Source, SubsystemConfig};

use crate::input::Input;
use crate::memory::measured;

const PAGE: u64 = 4096;

/// The file of the guest's memory: pages that are never offered, those that may be, and more that never are.
const APART_PAGES: u64 = 4;
const OFFERED_PAGES: u64 = 32;
const FILE_PAGES: u64 = 2 * APART_PAGES + OFFERED_PAGES;

/// What is in pages that are never offered.
const APART: u8 = 0xa5;

const ADMIN_SQ: u64 = PAGE;
const ADMIN_CQ: u64 = 2 * PAGE;
const ADMIN_ENTRIES: u32 = 32;

/// Turns in a row after which a guest has built something that goes on for ever: completions that ring doorbells. A
/// server gives others their turn in between.
const TURNS_MAX: u32 = 200;

/// Commands of vfio-user.
mod message {
    pub(super) const MAP: u16 = 2;
    pub(super) const UNMAP: u16 = 3;
    pub(super) const REGION_READ: u16 = 9;
    pub(super) const REGION_WRITE: u16 = 10;
    pub(super) const RESET: u16 = 13;
}

const BAR0: u32 = 0;
const CONFIG: u32 = 7;

/// One step, by its first byte.
mod step {
    pub(super) const MESSAGE: u8 = 0;
    pub(super) const MAP: u8 = 1;
    pub(super) const UNMAP: u8 = 2;
    pub(super) const CONFIG: u8 = 3;
    pub(super) const REGISTER: u8 = 4;
    pub(super) const ENABLE: u8 = 5;
    pub(super) const MEMORY: u8 = 6;
    pub(super) const ADMIN: u8 = 7;
    pub(super) const IO: u8 = 8;
    pub(super) const LIST: u8 = 9;
    pub(super) const TURN: u8 = 10;
    pub(super) const SLEEP: u8 = 11;
    pub(super) const QUEUES: u8 = 12;
    pub(super) const RING: u8 = 13;
    pub(super) const COUNT: u8 = 14;
}

struct Guest {
    device: Unconnected,
    file: File,
    now: Instant,
    /// Of the admin queue, and of I/O queues by QID.
    tails: [u32; 4],
    _registry: Rc<Registry>,
}

/// Steps, one after the other, and then a guest that behaves.
pub fn run(data: &[u8]) {
    let ((), most) = measured(|| {
        let mut input = Input::new(data);
        let mut guest = Guest::new();
        while !input.is_empty() {
            guest.step(&mut input);
        }
        guest.behave();
        guest.check_apart();
    });
    // The drive's memory, data of commands in execution, one more of them, and replies.
    let bound = (40 << 20) + 64 * data.len();
    assert!(
        most <= bound,
        "{most} bytes of memory for {} of input",
        data.len()
    );
}

fn memory_file() -> File {
    let file = memfd_create("guest", MemfdFlags::ALLOW_SEALING).expect("a memory file");
    ftruncate(&file, FILE_PAGES * PAGE).expect("a size");
    let file = File::from(file);
    let apart = vec![APART; (APART_PAGES * PAGE) as usize];
    for at in [0, (APART_PAGES + OFFERED_PAGES) * PAGE] {
        file.write_all_at(&apart, at).expect("a memory file is written");
    }
    file
}

fn registry(subsystem: &Nqn) -> Rc<Registry> {
    let registry = Registry::new(RegistryConfig::default());
    registry
        .add_subsystem(SubsystemConfig {
            nqn: subsystem.clone(),
            serial: "fuzz".into(),
            model: "Weft".into(),
            hosts: AllowedHosts::Any,
            namespaces_max: 1,
        })
        .expect("a new registry takes a subsystem");
    let drive = MemoryDrive::device(1 << 20);
    let namespace = NamespaceConfig {
        nsid: 1,
        uuid: [1; 16],
        ana_group: 1,
        ana_state: AnaState::OPTIMIZED,
        source: Source::PerAssociation(Rc::new(move |_, _| Rc::clone(&drive))),
    };
    registry
        .add_namespace(subsystem, namespace)
        .expect("a new subsystem takes a namespace");
    registry
}

impl Guest {
    fn new() -> Self {
        let subsystem: Nqn = "nqn.2026-01.io.weft:fuzz".parse().expect("well-formed");
        let registry = registry(&subsystem);
        let attachment = Attachment {
            subsystem,
            hostnqn: "nqn.2026-01.io.weft:guest".parse().expect("well-formed"),
            hostid: HostId([1; 16]),
            doorbells: Doorbells::Trapped,
        };
        let device = Unconnected::new(&registry, &attachment).expect("the subsystem is presented");
        let mut guest = Self {
            device,
            file: memory_file(),
            now: Instant::now(),
            tails: [0; 4],
            _registry: registry,
        };
        guest.map(0, OFFERED_PAGES, 0, 3);
        guest
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % step::COUNT {
            step::MESSAGE => {
                let (command, flags) = (u16::from(input.u8() % 24), input.u8());
                let count = usize::from(input.u8());
                let body = input.bytes(count).to_vec();
                // Offsets into what is never offered are taken away.
                if command != message::MAP {
                    self.send(command, &body, flags & 1 == 1);
                }
            }
            step::MAP => {
                let (address, pages) = (u64::from(input.u8()), u64::from(input.u8()));
                let (offset, flags) = (u64::from(input.u8()) % OFFERED_PAGES, input.u8());
                let pages = pages.min(OFFERED_PAGES - offset);
                self.map(address * PAGE, pages, offset, u32::from(flags));
            }
            step::UNMAP => {
                let (address, bytes) = (u64::from(input.u8()) * PAGE, u64::from(input.u8()) * PAGE);
                self.unmap(address, bytes);
            }
            step::CONFIG => {
                let at = u64::from(input.u8());
                let count = 1 + usize::from(input.u8() % 8);
                self.write(CONFIG, at, &input.bytes(count).to_vec());
            }
            step::REGISTER => {
                let at = u64::from(input.u16() % 0x4010);
                self.write(BAR0, at, &input.array::<4>());
            }
            step::ENABLE => self.enable(),
            step::MEMORY => {
                let at = u64::from(input.u16()) * 4 % (OFFERED_PAGES * PAGE);
                let count = usize::from(input.u8());
                self.poke(at, &input.bytes(count).to_vec());
            }
            step::ADMIN => {
                let opcodes = [
                    0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x0c, 0x18, 0x7c, 0x7f,
                ];
                let command = entry(input, &opcodes);
                self.submit(0, command);
            }
            step::IO => {
                let qid = 1 + usize::from(input.u8() % 3);
                let opcodes = [
                    0x00, 0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0c, 0x0d, 0x0e, 0x11, 0x15,
                ];
                let command = entry(input, &opcodes);
                self.submit(qid, command);
            }
            step::LIST => {
                // PRPs, or the descriptors of an SGL.
                let at = address(input);
                for _ in 0..input.u8() % 64 {
                    let mut item = address(input).to_le_bytes().to_vec();
                    if input.u8() & 1 == 1 {
                        item.extend(u32::from(input.u16()).to_le_bytes());
                        item.extend([0, 0, 0, input.u8()]);
                    }
                    self.poke(at % (OFFERED_PAGES * PAGE), &item);
                }
            }
            step::TURN => {
                self.now += Duration::from_millis(u64::from(input.u8()));
                self.turns();
            }
            step::SLEEP => {
                if !self.device.sleep() {
                    self.turns();
                }
            }
            step::QUEUES => {
                let (qid, shadow) = (1 + u32::from(input.u8() % 3), input.u8());
                self.queues(qid, 2 + u32::from(input.u8()));
                if shadow & 1 == 1 {
                    let mut command = [0; 64];
                    command[0] = 0x7c;
                    set(&mut command, 24, &(3 * PAGE).to_le_bytes());
                    set(&mut command, 32, &(4 * PAGE).to_le_bytes());
                    self.submit(0, command);
                }
            }
            _ => {
                // A doorbell in memory.
                let (qid, value) = (u64::from(input.u8() % 8), input.u16());
                self.poke(3 * PAGE + qid * 4, &u32::from(value).to_le_bytes());
                self.turns();
            }
        }
    }

    /// A message as bytes, through the parser.
    fn send(&mut self, command: u16, body: &[u8], with_file: bool) -> Option<Vec<u8>> {
        let mut header = [0; HEADER_BYTES];
        header[2..4].copy_from_slice(&command.to_le_bytes());
        header[4..8].copy_from_slice(&((HEADER_BYTES + body.len()) as u32).to_le_bytes());
        let header = Header::parse(&header).ok()?;
        assert_eq!(header.body_bytes(), body.len());
        let files = if with_file {
            vec![OwnedFd::from(self.file.try_clone().expect("a descriptor"))]
        } else {
            Vec::new()
        };
        let reply = Request::parse(&header, body)
            .and_then(|request| self.device.handle(request, files, self.now))
            .ok()?;
        assert!(header.reply(Ok(&reply)).len() == HEADER_BYTES + reply.len());
        Some(reply)
    }

    fn map(&mut self, address: u64, pages: u64, page: u64, flags: u32) -> Option<Vec<u8>> {
        let mut body = [32u32, flags].map(u32::to_le_bytes).concat();
        let offset = (APART_PAGES + page) * PAGE;
        body.extend([offset, address, pages * PAGE].map(u64::to_le_bytes).concat());
        self.send(message::MAP, &body, true)
    }

    fn unmap(&mut self, address: u64, bytes: u64) {
        let mut body = [24u32, 0].map(u32::to_le_bytes).concat();
        body.extend([address, bytes].map(u64::to_le_bytes).concat());
        self.send(message::UNMAP, &body, false);
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let mut body = offset.to_le_bytes().to_vec();
        body.extend([region, data.len() as u32].map(u32::to_le_bytes).concat());
        body.extend_from_slice(data);
        self.send(message::REGION_WRITE, &body, false);
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        let room = (OFFERED_PAGES * PAGE - at).min(bytes.len() as u64) as usize;
        let written = self.file.write_all_at(&bytes[..room], APART_PAGES * PAGE + at);
        written.expect("a memory file is written");
    }

    fn turns(&mut self) {
        for _ in 0..TURNS_MAX {
            if !self.device.turn(self.now) {
                break;
            }
        }
    }

    fn enable(&mut self) {
        self.write(CONFIG, 4, &[6, 4]);
        self.write(BAR0, 0x14, &0x0046_0000u32.to_le_bytes());
        let entries = (ADMIN_ENTRIES - 1) << 16 | (ADMIN_ENTRIES - 1);
        self.write(BAR0, 0x24, &entries.to_le_bytes());
        self.write(BAR0, 0x28, &ADMIN_SQ.to_le_bytes());
        self.write(BAR0, 0x30, &ADMIN_CQ.to_le_bytes());
        self.write(BAR0, 0x14, &0x0046_0001u32.to_le_bytes());
        self.tails = [0; 4];
        self.turns();
    }

    fn queues(&mut self, qid: u32, entries: u32) {
        let size = (entries - 1) << 16 | qid;
        for (opcode, at, flags) in [(0x05, 24 + qid, 0b11), (0x01, 16 + 2 * qid, qid << 16 | 1)] {
            let mut command = [0; 64];
            command[0] = opcode;
            set(&mut command, 24, &(u64::from(at) * PAGE).to_le_bytes());
            set(&mut command, 40, &size.to_le_bytes());
            set(&mut command, 44, &flags.to_le_bytes());
            self.submit(0, command);
        }
        self.tails[qid as usize] = 0;
    }

    /// Puts a command where its queue is by this side's account, rings, and lets the device work.
    fn submit(&mut self, qid: usize, command: [u8; 64]) {
        let (at, entries) = if qid == 0 {
            (ADMIN_SQ, ADMIN_ENTRIES)
        } else {
            ((16 + 2 * qid as u64) * PAGE, 64)
        };
        let tail = &mut self.tails[qid];
        let place = at + u64::from(*tail) * 64;
        *tail = (*tail + 1) % entries;
        let value = *tail;
        self.poke(place, &command);
        self.write(BAR0, 0x1000 + 8 * qid as u64, &value.to_le_bytes());
        self.turns();
        // What has completed has been taken.
        if qid == 0 {
            self.write(BAR0, 0x1004, &value.to_le_bytes());
        }
    }

    /// A monitor that resets the device, and a guest that identifies it.
    fn behave(&mut self) {
        self.send(message::RESET, &[], false);
        self.unmap(0, u64::MAX / PAGE * PAGE);
        self.map(0, OFFERED_PAGES, 0, 3)
            .expect("an empty map takes a range");
        self.poke(ADMIN_CQ, &[0; PAGE as usize]);
        self.enable();
        let mut body = 0x1cu64.to_le_bytes().to_vec();
        body.extend([BAR0, 4].map(u32::to_le_bytes).concat());
        let status = self
            .send(message::REGION_READ, &body, false)
            .expect("a register is read");
        assert_eq!(
            status[16..20],
            [1, 0, 0, 0],
            "ready after a reset, and nothing else"
        );
        let mut identify = [0; 64];
        identify[0] = 0x06;
        set(&mut identify, 2, &77u16.to_le_bytes());
        set(&mut identify, 24, &(8 * PAGE).to_le_bytes());
        set(&mut identify, 40, &1u32.to_le_bytes());
        self.submit(0, identify);
        let mut completion = [0; 16];
        let at = APART_PAGES * PAGE + ADMIN_CQ;
        self.file
            .read_exact_at(&mut completion, at)
            .expect("a memory file is read");
        assert_eq!(completion[12..], [77, 0, 1, 0], "identified");
    }

    fn check_apart(&self) {
        let mut apart = vec![0; (APART_PAGES * PAGE) as usize];
        for at in [0, (APART_PAGES + OFFERED_PAGES) * PAGE] {
            self.file
                .read_exact_at(&mut apart, at)
                .expect("a memory file is read");
            assert!(
                apart.iter().all(|&byte| byte == APART),
                "memory that was never offered was written"
            );
        }
    }
}

fn set(entry: &mut [u8; 64], at: usize, bytes: &[u8]) {
    entry[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Somewhere in memory, mostly; at a page, mostly.
fn address(input: &mut Input<'_>) -> u64 {
    let (page, within) = (input.u8(), input.u8());
    match within {
        0x00..0xc0 => u64::from(page) * PAGE,
        0xc0..0xf0 => u64::from(page) * PAGE + u64::from(within & 0x3f) * 64,
        0xf0..0xf8 => u64::from(page) * PAGE + PAGE - 8,
        0xf8..0xfe => u64::from(page) * PAGE + u64::from(within),
        _ => !u64::from(page),
    }
}

/// A command of one of the opcodes, or of any.
fn entry(input: &mut Input<'_>, opcodes: &[u8]) -> [u8; 64] {
    let mut entry = [0; 64];
    let opcode = input.u8();
    entry[0] = opcodes.get(usize::from(opcode)).copied().unwrap_or(opcode);
    entry[1] = input.u8();
    entry[2] = input.u8();
    entry[4] = input.u8() % 3;
    set(&mut entry, 24, &address(input).to_le_bytes());
    let second = address(input);
    if entry[1] & 0xc0 == 0 {
        set(&mut entry, 32, &second.to_le_bytes());
    } else {
        // The rest of a descriptor.
        set(&mut entry, 32, &u32::from(input.u16()).to_le_bytes());
        entry[39] = input.u8();
    }
    set(&mut entry, 40, &input.array::<4>());
    set(&mut entry, 44, &input.array::<4>());
    set(&mut entry, 48, &[input.u8(), input.u8() & 1, 0, input.u8()]);
    entry
}

/// A guest that works: enables, makes queues, identifies, writes, reads, by PRPs and by SGLs, resets.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let command = |kind: u8, queue: &[u8], opcode: u8, flags: u8, rest: &[u8]| {
        let mut step = vec![kind];
        step.extend_from_slice(queue);
        // CID, namespace, first and second address.
        step.extend_from_slice(&[opcode, flags, 1, 1, 8, 0, 9, 0]);
        step.extend_from_slice(rest);
        step
    };
    let begin = [vec![step::ENABLE], vec![step::QUEUES, 0, 0, 62]].concat();
    let shadow = [vec![step::ENABLE], vec![step::QUEUES, 0, 1, 62]].concat();
    let words = [0; 12];
    // Places in the list of opcodes: identify, write, read, compare.
    let identify = command(step::ADMIN, &[], 5, 0, &words);
    let io = |opcode, blocks: u8| {
        let mut words = words;
        words[8] = blocks;
        command(step::IO, &[0], opcode, 0, &words)
    };
    let list = [vec![step::LIST, 9, 0, 4], [10, 0, 0].repeat(4)].concat();
    let mut scattered = words.to_vec();
    scattered.splice(0..0, [0, 0x10, 0]);
    let sgl = command(step::IO, &[0], 2, 0x40, &scattered);
    vec![
        [begin.clone(), identify, io(1, 0), io(2, 0), io(4, 1)].concat(),
        [begin.clone(), list, io(2, 7), io(1, 7)].concat(),
        [begin.clone(), sgl, vec![step::TURN, 0]].concat(),
        [
            shadow,
            io(2, 0),
            vec![step::RING, 2, 1, 0],
            vec![step::SLEEP],
            vec![step::UNMAP, 0, 32],
            vec![step::TURN, 255],
        ]
        .concat(),
        [
            begin,
            vec![step::UNMAP, 0, 32],
            vec![step::MAP, 0, 16, 0, 3],
            vec![step::MAP, 16, 16, 16, 1],
            io(2, 0),
            vec![step::CONFIG, 0x61, 0, 0x80],
            vec![step::REGISTER, 0x14, 0, 0, 0, 0, 0],
            vec![step::MEMORY, 0, 4, 4, 1, 2, 3, 4],
            vec![step::MESSAGE, 4, 0, 16],
        ]
        .concat(),
    ]
}
