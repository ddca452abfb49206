//! A drive of the simulated world: what it keeps, what it loses, and who may still write to it.
//!
//! What it models, each by the seed:
//! - a latency for every command, so that commands complete in any order;
//! - a volatile write cache: a write that was not durable may be lost with power, block by block or torn inside of one;
//! - commands in flight when their sender dies ([`InFlight`]): lost, landed, partly landed, or landing later, until
//!   the sender is fenced;
//! - a fence ([`SimDrive::fence`]) that completes only when nothing of the fenced incarnation is left in
//!   execution (Preempt and Abort), after which its writes get [`BlockError::ReservationConflict`];
//! - faults: dead (and back again with what it held), stalled, slow, full, cut off from one incarnation, bit flips, lost blocks,
//!   read errors, writes that are answered and never land or land elsewhere.
//!
//! Blocks are 4096 bytes. The write of one block is atomic, as NVMe's AWUPF of 0 promises, unless
//! [`DriveSpec::tear_bytes`] says 512.

mod fencing;
mod handle;
mod medium;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use weft_block::{BlockError, Device, DeviceInfo, Durability, Io};
use weft_proto::id::{DriveId, IncarnationId};
use weft_proto::units::{BLOCK_BYTES, LbaRange};

use self::handle::Handle;
pub use self::handle::SimDrives;
use self::medium::{Medium, tear, zero_block};
use super::answer::{Giver, answer};
use super::rng::Rng;
use super::world::{InFlight, Landed, World};
use crate::seams::Timestamp;

/// What kind of drive.
#[derive(Clone, Debug)]
pub struct DriveSpec {
    /// Size in MiB.
    pub size_mib: u32,
    /// Failure domain: bands take distinct ones.
    pub domain: u32,
    /// Whether completed writes that are not durable can be lost with power.
    pub volatile_write_cache: bool,
    /// What is written as a whole or not at all when power fails: 4096 or 512.
    pub tear_bytes: usize,
    /// Shortest and longest time a command takes, in microseconds.
    pub latency_us: (u64, u64),
    /// Longest transfer.
    pub transfer_bytes_max: u32,
}

impl DriveSpec {
    /// A drive of `size_mib` without a volatile cache, alone in its failure domain.
    #[must_use]
    pub fn new(size_mib: u32, domain: u32) -> Self {
        Self {
            size_mib,
            domain,
            volatile_write_cache: false,
            tear_bytes: BLOCK_BYTES,
            latency_us: (20, 200),
            transfer_bytes_max: 1 << 20,
        }
    }
}

/// How a drive answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// As it should.
    Serving,
    /// It takes commands and answers none of them, until it serves again.
    Stalled,
    /// It is not there. What it holds stays.
    Dead,
}

/// A drive. Engines reach it through [`SimDrive::handle`] or [`SimDrives`].
pub struct SimDrive {
    world: Weak<World>,
    id: DriveId,
    spec: DriveSpec,
    state: RefCell<State>,
}

struct State {
    rng: Rng,
    health: Health,
    medium: Medium,
    in_flight: BTreeMap<u64, Command>,
    command_next: u64,
    fenced: BTreeMap<IncarnationId, Timestamp>,
    /// Fences that wait for the commands in execution.
    fencing: Vec<(IncarnationId, Giver<()>)>,
    cut: BTreeSet<IncarnationId>,
    /// Multiplies latencies, for a slow drive.
    slowness: u64,
    /// Bytes written over its life, for write amplification.
    bytes_written: u64,
    reads: u64,
    /// Most commands in flight at once.
    in_flight_peak: usize,
    /// Refuses writes: a thin drive whose pool is full.
    full: bool,
    /// How many of the next writes go wrong, and how.
    astray: Option<(Astray, u32)>,
}

/// How a drive betrays a write that it answers as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Astray {
    /// It never reaches the medium.
    Lost,
    /// It lands this many blocks further on, over what is there.
    Misdirected(u64),
}

struct Command {
    sender: IncarnationId,
    kind: Kind,
    reply: Option<Reply>,
    /// Due while the drive was stalled.
    overdue: bool,
}

enum Kind {
    Read(LbaRange),
    /// `None` is zeroes.
    Write {
        start: u64,
        blocks: Vec<Option<Bytes>>,
        durable: bool,
    },
    Flush,
}

enum Reply {
    Bytes(Giver<Result<Bytes, BlockError>>),
    Done(Giver<Result<(), BlockError>>),
}

impl Reply {
    fn refuse(self, error: BlockError) {
        match self {
            Self::Bytes(giver) => giver.give(Err(error)),
            Self::Done(giver) => giver.give(Err(error)),
        }
    }
}

impl SimDrive {
    pub(super) fn new(world: Weak<World>, id: DriveId, spec: DriveSpec, rng: Rng) -> Rc<Self> {
        Rc::new(Self {
            world,
            id,
            spec,
            state: RefCell::new(State {
                rng,
                health: Health::Serving,
                medium: Medium::default(),
                in_flight: BTreeMap::new(),
                command_next: 1,
                fenced: BTreeMap::new(),
                fencing: Vec::new(),
                cut: BTreeSet::new(),
                slowness: 1,
                bytes_written: 0,
                in_flight_peak: 0,
                reads: 0,
                full: false,
                astray: None,
            }),
        })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> DriveId {
        self.id
    }

    /// What it was made as.
    #[must_use]
    pub fn spec(&self) -> &DriveSpec {
        &self.spec
    }

    /// The device as `incarnation` reaches it.
    #[must_use]
    pub fn handle(self: &Rc<Self>, incarnation: IncarnationId) -> Device {
        Rc::new(Handle {
            drive: Rc::clone(self),
            incarnation,
        })
    }

    /// How it answers now.
    #[must_use]
    pub fn health(&self) -> Health {
        self.state.borrow().health
    }

    /// Bytes written since it was made.
    #[must_use]
    pub fn bytes_written(&self) -> u64 {
        self.state.borrow().bytes_written
    }

    /// Reads since it was made.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.state.borrow().reads
    }

    /// Most commands it had in flight at once since this was asked last.
    pub fn take_in_flight_peak(&self) -> usize {
        let mut state = self.state.borrow_mut();
        let now = state.in_flight.len();
        std::mem::replace(&mut state.in_flight_peak, now)
    }

    // Faults.

    /// Changes how it answers. Commands in flight at a death are answered [`BlockError::Unknown`] and may have landed; those
    /// that waited for a stalled drive go on when it serves again.
    pub fn set_health(&self, health: Health) {
        self.state.borrow_mut().health = health;
        match health {
            Health::Serving => self.resume_overdue(),
            Health::Stalled => {}
            Health::Dead => {
                let ids: Vec<u64> = self.state.borrow().in_flight.keys().copied().collect();
                for id in ids {
                    let landed = self.state.borrow_mut().rng.chance(1, 2);
                    self.abort(id, landed);
                }
            }
        }
    }

    /// Cuts the way between `incarnation` and this drive, or mends it. Commands under way are answered
    /// [`BlockError::Unknown`] and go on.
    pub fn set_cut(&self, incarnation: IncarnationId, cut: bool) {
        let replies: Vec<Reply> = {
            let mut state = self.state.borrow_mut();
            if cut {
                state.cut.insert(incarnation);
                let commands = state.in_flight.values_mut();
                commands
                    .filter(|command| command.sender == incarnation)
                    .filter_map(|command| command.reply.take())
                    .collect()
            } else {
                state.cut.remove(&incarnation);
                Vec::new()
            }
        };
        for reply in replies {
            reply.refuse(BlockError::Unknown);
        }
    }

    /// Ends every command in flight without an answer, as the death of the server that runs the drive does: landed, partly
    /// landed or lost. With `power` lost, the volatile cache is gone as well.
    pub fn restart(&self, power: bool) {
        if power {
            self.lose_power();
        } else {
            self.abort_all();
        }
    }

    fn abort_all(&self) {
        let ids: Vec<u64> = self.state.borrow().in_flight.keys().copied().collect();
        for id in ids {
            let landed = self.state.borrow_mut().rng.chance(2, 3);
            self.abort(id, landed);
        }
    }

    /// Lets it refuse writes for want of space, or take them again.
    pub fn set_full(&self, full: bool) {
        self.state.borrow_mut().full = full;
    }

    /// Lets the next `count` writes go wrong although they are answered as done.
    pub fn set_astray(&self, how: Astray, count: u32) {
        self.state.borrow_mut().astray = (count > 0).then_some((how, count));
    }

    /// Multiplies every latency from now on.
    pub fn set_slowness(&self, factor: u64) {
        self.state.borrow_mut().slowness = factor.max(1);
    }

    /// Flips one bit of `block` on the medium.
    pub fn flip_bit(&self, block: u64, bit: usize) {
        self.state.borrow_mut().medium.flip_bit(block, bit);
    }

    /// Loses `count` blocks: they read as zeroes, as after a misplaced deallocate.
    pub fn lose(&self, start: u64, count: u64) {
        self.state.borrow_mut().medium.lose(start, count);
    }

    /// Makes reads of `block` fail, until it is written.
    pub fn set_read_error(&self, block: u64) {
        self.state.borrow_mut().medium.read_errors.insert(block);
    }

    /// Whether any byte of `block` was ever written and not lost.
    #[must_use]
    pub fn holds(&self, block: u64) -> bool {
        self.state.borrow().medium.holds(block)
    }

    /// What a read of `block` would see.
    #[must_use]
    pub fn peek(&self, block: u64) -> Bytes {
        self.state.borrow().medium.current(block)
    }

    /// Power fails and comes back: of what only the cache held, any subset of blocks is lost; commands in
    /// flight land, partly land or are lost, and nobody hears of them.
    pub fn lose_power(&self) {
        let ids: Vec<u64> = self.state.borrow().in_flight.keys().copied().collect();
        for id in ids {
            let landed = self.state.borrow_mut().rng.chance(1, 2);
            self.abort(id, landed);
        }
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        state.medium.lose_power(&mut state.rng, self.spec.tear_bytes);
    }

    /// Whether a loss of power now would take nothing that was written to these blocks.
    #[must_use]
    pub fn is_durable(&self, start: u64, count: u64) -> bool {
        self.state.borrow().medium.is_durable(start, count)
    }

    /// Whether a write or deallocate of anybody that touches these blocks has been sent and has not ended.
    #[must_use]
    pub fn has_writes_in_flight(&self, start: u64, count: u64) -> bool {
        self.state
            .borrow()
            .in_flight
            .values()
            .any(|command| match &command.kind {
                Kind::Write {
                    start: first, blocks, ..
                } => *first < start + count && start < *first + blocks.len() as u64,
                Kind::Read(_) | Kind::Flush => false,
            })
    }

    /// Meets the fate of a crashed sender's commands.
    pub(super) fn crash(self: &Rc<Self>, sender: IncarnationId, in_flight: InFlight) {
        let ids: Vec<u64> = {
            let mut state = self.state.borrow_mut();
            for command in state
                .in_flight
                .values_mut()
                .filter(|command| command.sender == sender)
            {
                command.reply = None;
            }
            let commands = state.in_flight.iter();
            commands
                .filter(|(_, command)| command.sender == sender)
                .map(|(id, _)| *id)
                .collect()
        };
        for id in ids {
            match in_flight {
                InFlight::Lost => {
                    self.state.borrow_mut().in_flight.remove(&id);
                }
                InFlight::Landed => self.settle(id),
                InFlight::Mixed => {
                    let choice = self.state.borrow_mut().rng.below(4);
                    match choice {
                        0 => {
                            self.state.borrow_mut().in_flight.remove(&id);
                        }
                        1 => self.settle(id),
                        2 => self.abort(id, true),
                        // Up to 50 ms: past most takeovers' first steps, unless the fence comes first.
                        _ => {
                            let delay = self.state.borrow_mut().rng.between(1, 50_000);
                            self.settle_later(id, Duration::from_micros(delay));
                        }
                    }
                }
            }
        }
        self.answer_fences();
    }

    // Commands.

    fn latency(&self, state: &mut State) -> Duration {
        let (low, high) = self.spec.latency_us;
        // One in 64 takes ten times as long: the tail that makes commands overtake each other.
        let tail = if state.rng.chance(1, 64) { 10 } else { 1 };
        Duration::from_micros(state.rng.between(low, high) * tail * state.slowness)
    }

    fn submit(self: &Rc<Self>, sender: IncarnationId, kind: Kind, reply: Reply) {
        let (id, latency) = {
            let mut state = self.state.borrow_mut();
            let latency = self.latency(&mut state);
            let refusal = if state.health == Health::Dead {
                Some(BlockError::Gone)
            } else if state.cut.contains(&sender) {
                Some(BlockError::Unknown)
            } else if matches!(kind, Kind::Write { .. }) && state.fenced.contains_key(&sender) {
                Some(BlockError::ReservationConflict)
            } else if matches!(kind, Kind::Write { .. }) && state.full {
                Some(BlockError::CapacityExceeded)
            } else {
                None
            };
            if let Some(error) = refusal {
                drop(state);
                if let Some(world) = self.world.upgrade() {
                    world.at(world.now().after(latency), None, |_| reply.refuse(error));
                }
                return;
            }
            let id = state.command_next;
            state.command_next += 1;
            let command = Command {
                sender,
                kind,
                reply: Some(reply),
                overdue: false,
            };
            state.in_flight.insert(id, command);
            let now = state.in_flight.len();
            state.in_flight_peak = state.in_flight_peak.max(now);
            (id, latency)
        };
        self.settle_later(id, latency);
    }

    fn settle_later(self: &Rc<Self>, id: u64, latency: Duration) {
        let Some(world) = self.world.upgrade() else {
            return;
        };
        let drive = Rc::downgrade(self);
        world.at(world.now().after(latency), None, move |_| {
            if let Some(drive) = drive.upgrade() {
                drive.due(id);
            }
        });
    }

    fn due(&self, id: u64) {
        {
            let mut state = self.state.borrow_mut();
            if state.health == Health::Stalled {
                if let Some(command) = state.in_flight.get_mut(&id) {
                    command.overdue = true;
                }
                return;
            }
        }
        self.settle(id);
        self.answer_fences();
    }

    fn resume_overdue(&self) {
        let ids: Vec<u64> = {
            let state = self.state.borrow();
            let commands = state.in_flight.iter();
            commands
                .filter(|(_, command)| command.overdue)
                .map(|(id, _)| *id)
                .collect()
        };
        for id in ids {
            self.settle(id);
        }
        self.answer_fences();
    }

    /// A command takes effect and is answered.
    fn settle(&self, id: u64) {
        let Some(command) = self.state.borrow_mut().in_flight.remove(&id) else {
            return;
        };
        match command.kind {
            Kind::Read(range) => {
                let read = {
                    let mut state = self.state.borrow_mut();
                    state.reads += 1;
                    state.medium.read(range)
                };
                if let Some(Reply::Bytes(giver)) = command.reply {
                    giver.give(read);
                }
            }
            Kind::Write {
                start,
                blocks,
                durable,
            } => {
                let count = blocks.len();
                self.tell_landing(command.sender, start, &blocks, true);
                let durable = durable || !self.spec.volatile_write_cache;
                let blocks_end = self.info().blocks;
                let mut state = self.state.borrow_mut();
                match state.next_astray() {
                    None => state.land(id, start, &blocks, durable),
                    Some(Astray::Lost) => {}
                    Some(Astray::Misdirected(by)) => {
                        let start = (start + by).min(blocks_end - count as u64);
                        state.land(id, start, &blocks, durable);
                    }
                }
                drop(state);
                self.count(|| {
                    format!(
                        "{} of {} writes {count} blocks at {start}",
                        command.sender, self.id
                    )
                });
                if let Some(Reply::Done(giver)) = command.reply {
                    giver.give(Ok(()));
                }
            }
            Kind::Flush => {
                self.state.borrow_mut().medium.flush_before(id);
                self.count(|| format!("{} flushes {}", command.sender, self.id));
                if let Some(Reply::Done(giver)) = command.reply {
                    giver.give(Ok(()));
                }
            }
        }
    }

    /// A command ends without an answer that says how; with `landed`, part of a write took effect.
    fn abort(&self, id: u64, landed: bool) {
        let Some(command) = self.state.borrow_mut().in_flight.remove(&id) else {
            return;
        };
        if let (Kind::Write { start, blocks, .. }, true) = (&command.kind, landed) {
            self.tell_landing(command.sender, *start, blocks, false);
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            for (block, bytes) in (*start..).zip(blocks) {
                if state.rng.chance(1, 2) {
                    continue;
                }
                let new = bytes.clone().unwrap_or_else(zero_block);
                let bytes = if self.spec.tear_bytes < BLOCK_BYTES && state.rng.chance(1, 2) {
                    let old = state.medium.current(block);
                    tear(&mut state.rng, &old, &new, self.spec.tear_bytes)
                } else {
                    new
                };
                state.land(id, block, &[Some(bytes)], true);
            }
        }
        if let Some(reply) = command.reply {
            reply.refuse(BlockError::Unknown);
        }
    }

    fn tell_landing(&self, sender: IncarnationId, start: u64, blocks: &[Option<Bytes>], whole: bool) {
        if let Some(world) = self.world.upgrade() {
            world.landed(&Landed {
                sender,
                drive: self.id,
                start,
                blocks,
                whole,
            });
        }
    }

    fn count(&self, what: impl FnOnce() -> String) {
        if let Some(world) = self.world.upgrade() {
            world.effect(what);
        }
    }

    fn check(&self, range: LbaRange) -> Result<(), BlockError> {
        let blocks = self.info().blocks;
        if !range.is_within(blocks) {
            return Err(BlockError::OutOfRange {
                start: range.start,
                count: range.count,
                blocks,
            });
        }
        Ok(())
    }

    fn check_transfer(&self, range: LbaRange) -> Result<(), BlockError> {
        self.check(range)?;
        let bytes = range.count * BLOCK_BYTES as u64;
        if bytes > u64::from(self.spec.transfer_bytes_max) {
            return Err(BlockError::InvalidLength {
                bytes,
                block_bytes: BLOCK_BYTES as u32,
            });
        }
        Ok(())
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            block_bytes: BLOCK_BYTES as u32,
            blocks: u64::from(self.spec.size_mib) * 256,
            transfer_bytes_max: self.spec.transfer_bytes_max,
            volatile_write_cache: self.spec.volatile_write_cache,
            deallocated_reads_zero: true,
        }
    }

    fn write(
        self: &Rc<Self>,
        sender: IncarnationId,
        start: u64,
        blocks: Vec<Option<Bytes>>,
        durability: Durability,
    ) -> Io<()> {
        if let Some(world) = self.world.upgrade() {
            super::monitor::write_sent(&world, sender, self, start, &blocks);
        }
        let (giver, done) = answer();
        let kind = Kind::Write {
            start,
            blocks,
            durable: durability == Durability::Durable,
        };
        self.submit(sender, kind, Reply::Done(giver));
        Io::running(done)
    }
}

impl State {
    fn land(&mut self, id: u64, start: u64, blocks: &[Option<Bytes>], durable: bool) {
        self.bytes_written += (blocks.len() * BLOCK_BYTES) as u64;
        self.medium.land(id, start, blocks, durable);
    }

    fn next_astray(&mut self) -> Option<Astray> {
        let (how, left) = self.astray?;
        self.astray = (left > 1).then_some((how, left - 1));
        Some(how)
    }
}
