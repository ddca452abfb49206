//! A guest and its monitor written by hand: messages, registers and entries are bytes from the specifications, so that
//! the server and its tests cannot agree on the same mistake. It knows nothing of the code under test.
//!
//! Guest memory is a memory file; this side reads and writes it by system calls.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

pub const MIB: u64 = 1 << 20;
/// Bytes of the guest's memory, which begins at address 0.
pub const MEMORY_BYTES: u64 = 64 * MIB;
/// Where the tests put data; queues are below.
pub const DATA_AT: u64 = 16 * MIB;

pub const CONFIG: u32 = 7;
pub const BAR0: u32 = 0;
const MSIX: u32 = 2;

pub const CC: u64 = 0x14;
pub const CSTS: u64 = 0x1c;

/// EN, 64-byte and 16-byte entries.
pub const CC_ENABLE: u32 = 0x0046_0001;

/// Long enough for any machine; a test that waits for this fails.
const LIMIT: Duration = Duration::from_secs(60);

pub struct Guest {
    pub socket: UnixStream,
    pub memory: OwnedFd,
    /// The file with the doorbells, once it was asked for.
    doorbells: Option<OwnedFd>,
    vectors: Vec<OwnedFd>,
    id: u16,
}

/// A pair of a submission and a completion queue.
pub struct Queue {
    pub qid: u16,
    pub entries: u32,
    pub sq_at: u64,
    pub cq_at: u64,
    pub tail: u32,
    head: u32,
    phase: u16,
    cid: u16,
    /// Completions that were seen while another was looked for.
    seen: VecDeque<Completion>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    pub cid: u16,
    /// Status code type and status code.
    pub status: u16,
    pub result: u32,
    pub sqhd: u16,
}

pub fn memory_file(bytes: u64) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, bytes).unwrap();
    file
}

impl Guest {
    /// Connects without a word.
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self {
            socket,
            memory: memory_file(MEMORY_BYTES),
            doorbells: None,
            vectors: Vec::new(),
            id: 0,
        }
    }

    /// Connects, agrees on the version, maps memory, connects interrupts and becomes bus master.
    pub fn start(path: &Path) -> Self {
        let mut guest = Self::connect(path);
        let reply = guest.negotiate().unwrap();
        assert_eq!(reply[..4], [0, 0, 1, 0]);
        guest.set_up()
    }

    /// The same, once the server has noticed that the guest before is gone.
    pub fn start_next(path: &Path) -> Self {
        loop {
            let mut guest = Self::connect(path);
            if guest.try_request(1, b"\0\0\x01\0", &[]).is_some() {
                return guest.set_up();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn set_up(mut self) -> Self {
        let guest = &mut self;
        guest.map(0, MEMORY_BYTES, 0).unwrap();
        guest.connect_vectors(4);
        guest.write(CONFIG, 4, &[0x06, 0x04]);
        self
    }

    pub fn negotiate(&mut self) -> Result<Vec<u8>, i32> {
        self.request(1, b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8}}\0", &[])
    }

    /// Sends a command and answers its reply's body, or the errno.
    pub fn request(&mut self, command: u16, body: &[u8], files: &[BorrowedFd<'_>]) -> Result<Vec<u8>, i32> {
        self.try_request(command, body, files)
            .expect("the server answers")
    }

    /// The same; `None` if the server ends the connection.
    pub fn try_request(
        &mut self,
        command: u16,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Option<Result<Vec<u8>, i32>> {
        self.id += 1;
        let mut message = Vec::new();
        message.extend_from_slice(&self.id.to_le_bytes());
        message.extend_from_slice(&command.to_le_bytes());
        message.extend_from_slice(&(16 + body.len() as u32).to_le_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(body);
        self.send(&message, files).then_some(())?;
        let mut header = [0; 16];
        self.socket.read_exact(&mut header).ok()?;
        assert_eq!(header[..2], self.id.to_le_bytes(), "the reply to this command");
        assert_eq!(header[2..4], command.to_le_bytes());
        let bytes = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
        let flags = u32::from_le_bytes(header[8..12].try_into().unwrap());
        let mut body = vec![0; bytes - 16];
        self.socket.read_exact(&mut body).ok()?;
        assert_eq!(flags & 0xf, 1, "a reply");
        if flags & 0x20 != 0 {
            return Some(Err(i32::from_le_bytes(header[12..].try_into().unwrap())));
        }
        Some(Ok(body))
    }

    /// Sends bytes as they are; `false` if nobody takes them.
    pub fn send(&mut self, message: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        }
        sendmsg(
            self.socket.as_fd(),
            &[IoSlice::new(message)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .is_ok_and(|sent| sent == message.len())
    }

    pub fn is_hung_up(&mut self) -> bool {
        matches!(self.socket.read(&mut [0; 1]), Ok(0) | Err(_))
    }

    /// Asks for the region of the registers, with room for `argsz` bytes of answer: what it is, and the files that come along.
    pub fn region_info(&mut self, argsz: u32) -> (Vec<u8>, Vec<OwnedFd>) {
        self.id += 1;
        let mut message = self.id.to_le_bytes().to_vec();
        message.extend([5, 0, 48, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        message.extend([argsz, 0, BAR0, 0].map(u32::to_le_bytes).concat());
        message.extend([0; 16]);
        assert!(self.send(&message, &[]));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut header = [0; 16];
        let received = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        assert_eq!(received.unwrap().bytes, 16);
        let files = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => files.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let files = files.collect();
        let bytes = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
        let mut body = vec![0; bytes - 16];
        self.socket.read_exact(&mut body).unwrap();
        (body, files)
    }

    /// From now on doorbells are rung in the file that came with the region of the registers.
    pub fn map_doorbells(&mut self) {
        let (_, mut files) = self.region_info(64);
        self.doorbells = files.pop();
        assert!(self.doorbells.is_some());
    }

    /// Writes a doorbell: by a message, or in the page.
    pub fn set_doorbell(&mut self, offset: u64, value: u32) {
        match &self.doorbells {
            Some(page) => assert_eq!(rustix::io::pwrite(page, &value.to_le_bytes(), offset), Ok(4)),
            None => self.set_register(offset, value),
        }
    }

    // Memory.

    pub fn map(&mut self, address: u64, bytes: u64, offset: u64) -> Result<(), i32> {
        let memory = self.memory.try_clone().unwrap();
        self.map_file(address, bytes, offset, 3, &memory)
    }

    pub fn map_file(
        &mut self,
        address: u64,
        bytes: u64,
        offset: u64,
        flags: u32,
        file: &OwnedFd,
    ) -> Result<(), i32> {
        let mut body = [32u32, flags].map(u32::to_le_bytes).concat();
        body.extend([offset, address, bytes].map(u64::to_le_bytes).concat());
        self.request(2, &body, &[file.as_fd()]).map(|_| ())
    }

    pub fn unmap(&mut self, address: u64, bytes: u64) -> Result<(), i32> {
        let mut body = [24u32, 0].map(u32::to_le_bytes).concat();
        body.extend([address, bytes].map(u64::to_le_bytes).concat());
        self.request(3, &body, &[]).map(|_| ())
    }

    pub fn poke(&self, at: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.memory, bytes, at), Ok(bytes.len()));
    }

    pub fn peek(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        assert_eq!(rustix::io::pread(&self.memory, &mut bytes, at), Ok(count));
        bytes
    }

    pub fn peek_u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.peek(at, 4).try_into().unwrap())
    }

    // Regions and interrupts.

    pub fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        let mut body = offset.to_le_bytes().to_vec();
        body.extend([region, count].map(u32::to_le_bytes).concat());
        let reply = self.request(9, &body, &[]).unwrap();
        assert_eq!(reply.len(), 16 + count as usize);
        reply[16..].to_vec()
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.try_write(region, offset, data).unwrap();
    }

    pub fn try_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), i32> {
        let mut body = offset.to_le_bytes().to_vec();
        body.extend([region, data.len() as u32].map(u32::to_le_bytes).concat());
        body.extend_from_slice(data);
        self.request(10, &body, &[]).map(|_| ())
    }

    pub fn register(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(BAR0, offset, 4).try_into().unwrap())
    }

    pub fn set_register(&mut self, offset: u64, value: u32) {
        self.write(BAR0, offset, &value.to_le_bytes());
    }

    fn connect_vectors(&mut self, count: u32) {
        self.vectors = (0..count)
            .map(|_| eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap())
            .collect();
        let files: Vec<OwnedFd> = self
            .vectors
            .iter()
            .map(|file| file.try_clone().unwrap())
            .collect();
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let body = [20, 0x24, MSIX, 0, count].map(u32::to_le_bytes).concat();
        self.request(8, &body, &files).unwrap();
    }

    /// How often a vector was signalled since this was asked last.
    pub fn interrupts(&self, vector: usize) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.vectors[vector], &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    // The controller.

    /// Waits until bits of CSTS are as wanted.
    pub fn wait_status(&mut self, mask: u32, wanted: u32) -> u32 {
        let start = Instant::now();
        loop {
            let status = self.register(CSTS);
            if status & mask == wanted {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "CSTS stays {status:#x}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sets up the admin queues of 32 entries at 0x1000 and 0x2000 and enables the controller.
    pub fn enable(&mut self) -> Queue {
        self.poke(0x1000, &[0; 0x2000]);
        self.set_register(0x24, 31 << 16 | 31);
        self.write(BAR0, 0x28, &0x1000u64.to_le_bytes());
        self.write(BAR0, 0x30, &0x2000u64.to_le_bytes());
        self.set_register(CC, CC_ENABLE);
        self.wait_status(1, 1);
        Queue::new(0, 32, 0x1000, 0x2000)
    }

    /// Creates I/O queue pair `qid` with interrupts on vector `qid`.
    pub fn create(&mut self, admin: &mut Queue, qid: u16, entries: u32) -> Queue {
        let queue = Queue::at(qid, entries);
        self.poke(queue.cq_at, &vec![0; entries as usize * 16]);
        let size = (entries - 1) << 16 | u32::from(qid);
        let mut create = entry(0x05, 0);
        set(&mut create, 24, &queue.cq_at.to_le_bytes());
        set(&mut create, 40, &size.to_le_bytes());
        set(&mut create, 44, &(u32::from(qid) << 16 | 0b11).to_le_bytes());
        assert_eq!(self.execute(admin, create).status, 0);
        let mut create = entry(0x01, 0);
        set(&mut create, 24, &queue.sq_at.to_le_bytes());
        set(&mut create, 40, &size.to_le_bytes());
        set(&mut create, 44, &(u32::from(qid) << 16 | 1).to_le_bytes());
        assert_eq!(self.execute(admin, create).status, 0);
        queue
    }

    /// Puts a command into a queue without ringing; answers its identifier.
    pub fn place(&mut self, queue: &mut Queue, mut command: [u8; 64]) -> u16 {
        queue.cid = queue.cid.wrapping_add(1);
        set(&mut command, 2, &queue.cid.to_le_bytes());
        self.poke(queue.sq_at + u64::from(queue.tail) * 64, &command);
        queue.tail = (queue.tail + 1) % queue.entries;
        queue.cid
    }

    pub fn ring(&mut self, queue: &Queue) {
        self.set_doorbell(0x1000 + u64::from(queue.qid) * 8, queue.tail);
    }

    pub fn submit(&mut self, queue: &mut Queue, command: [u8; 64]) -> u16 {
        let cid = self.place(queue, command);
        self.ring(queue);
        cid
    }

    /// The next completion, if there is one.
    pub fn poll(&mut self, queue: &mut Queue) -> Option<Completion> {
        let entry = self.peek(queue.cq_at + u64::from(queue.head) * 16, 16);
        let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        if word(14) & 1 != queue.phase {
            return None;
        }
        assert_eq!(word(10), queue.qid);
        queue.head = (queue.head + 1) % queue.entries;
        if queue.head == 0 {
            queue.phase ^= 1;
        }
        Some(Completion {
            cid: word(12),
            status: word(14) >> 1 & 0x7ff,
            result: u32::from_le_bytes(entry[..4].try_into().unwrap()),
            sqhd: word(8),
        })
    }

    pub fn ring_head(&mut self, queue: &Queue) {
        self.set_doorbell(0x1004 + u64::from(queue.qid) * 8, queue.head);
    }

    /// Waits for the completion of a command.
    pub fn wait(&mut self, queue: &mut Queue, cid: u16) -> Completion {
        let start = Instant::now();
        loop {
            if let Some(at) = queue.seen.iter().position(|seen| seen.cid == cid) {
                return queue.seen.remove(at).unwrap();
            }
            match self.poll(queue) {
                Some(completion) => {
                    queue.seen.push_back(completion);
                    self.ring_head(queue);
                }
                None => std::thread::sleep(Duration::from_micros(100)),
            }
            assert!(
                start.elapsed() < LIMIT,
                "command {cid} of queue {} never completes",
                queue.qid
            );
        }
    }

    pub fn execute(&mut self, queue: &mut Queue, command: [u8; 64]) -> Completion {
        let cid = self.submit(queue, command);
        self.wait(queue, cid)
    }

    /// Writes PRPs for `bytes` at `at` into a command, with a list at `list_at` where one is needed.
    pub fn set_prps(&self, command: &mut [u8; 64], at: u64, bytes: u64, list_at: u64) {
        set(command, 24, &at.to_le_bytes());
        let pages: Vec<u64> = (1..)
            .map(|page| at / 4096 * 4096 + page * 4096)
            .take_while(|&page| page < at + bytes)
            .collect();
        match pages[..] {
            [] => {}
            [page] => set(command, 32, &page.to_le_bytes()),
            _ => {
                let list: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
                self.poke(list_at, &list);
                set(command, 32, &list_at.to_le_bytes());
            }
        }
    }

    /// A read or write of `blocks` blocks of 4 KiB at `lba`, to or from `at`.
    pub fn transfer(&self, opcode: u8, lba: u64, blocks: u16, at: u64) -> [u8; 64] {
        let mut command = entry(opcode, 1);
        self.set_prps(&mut command, at, u64::from(blocks) * 4096, 8 * MIB);
        set(&mut command, 40, &lba.to_le_bytes());
        set(&mut command, 48, &(blocks - 1).to_le_bytes());
        command
    }
}

impl Queue {
    pub fn new(qid: u16, entries: u32, sq_at: u64, cq_at: u64) -> Self {
        Self {
            qid,
            entries,
            sq_at,
            cq_at,
            tail: 0,
            head: 0,
            phase: 1,
            cid: 0,
            seen: VecDeque::new(),
        }
    }

    /// An I/O queue at the place that tests use for it.
    pub fn at(qid: u16, entries: u32) -> Self {
        let at = u64::from(qid) * 0x20000;
        Self::new(qid, entries, at, at + 0x10000)
    }

    /// Forgets a cid's turn, so that the next is `cid`.
    pub fn head(&self) -> u32 {
        self.head
    }
}

/// An entry with an opcode and a namespace.
pub fn entry(opcode: u8, nsid: u32) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = opcode;
    set(&mut entry, 4, &nsid.to_le_bytes());
    entry
}

pub fn set(entry: &mut [u8; 64], at: usize, bytes: &[u8]) {
    entry[at..at + bytes.len()].copy_from_slice(bytes);
}
