//! A decorator that fails as it is told.
//!
//! A test wraps a device, keeps the [`Faults`] handle, and scripts: which operations ([`Ops`]), how many, what
//! goes wrong. Faults are kept in the order they were set; an operation meets the first that matches and has
//! uses left. What no fault matches passes through unchanged.
//!
//! | fault | the operation | its answer |
//! |---|---|---|
//! | [`Fault::Fail`] | not done | the error |
//! | [`Fault::Forget`] | not done: a lost write | success |
//! | [`Fault::AnswerUnknown`] | done | [`BlockError::Unknown`] |
//! | [`Fault::Misdirect`] | done, elsewhere | success |
//! | [`Fault::FlipBit`] | done; a bit of a read's answer, or of a write's data, is wrong | success |
//! | [`Fault::Hold`] | done when released: it is in execution until then | as the device says |
//! | [`Fault::Delay`] | done later | as the device says |
//!
//! [`Faults::kill`] makes everything answer [`BlockError::Gone`], operations held included.
//!
//! ```
//! use weft_block::faulty::{Fault, Faulty, Ops};
//! use weft_block::{Durability, memory::MemoryDrive};
//! use weft_proto::units::Lba;
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let (device, faults) = Faulty::wrap(MemoryDrive::device(16 << 20));
//! faults.next(Ops::WRITE, 1, Fault::Hold);
//! let write = device.write(Lba(0), vec![vec![1; 4096].into()], Durability::Durable);
//! faults.wait_held(1).await;
//! // The write is in execution. Whatever must not complete before it can be looked at here.
//! faults.release();
//! assert_eq!(write.await, Ok(()));
//! # });
//! ```

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, oneshot};
use weft_proto::units::{Lba, LbaRange};

use crate::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};

/// Which operations a fault is for. Sets are joined with `|`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ops(u8);

impl Ops {
    /// Reads.
    pub const READ: Self = Self(1);
    /// Writes of data.
    pub const WRITE: Self = Self(2);
    /// Write Zeroes.
    pub const WRITE_ZEROES: Self = Self(4);
    /// Deallocations.
    pub const DEALLOCATE: Self = Self(8);
    /// Flushes.
    pub const FLUSH: Self = Self(16);
    /// Everything that changes the device.
    pub const CHANGES: Self = Self(2 | 4 | 8);
    /// Everything.
    pub const ALL: Self = Self(31);

    fn contains(self, op: Self) -> bool {
        self.0 & op.0 != 0
    }
}

impl std::ops::BitOr for Ops {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What goes wrong. See the module's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Done, but the answer is [`BlockError::Unknown`].
    AnswerUnknown,
    /// Done after this time on tokio's clock.
    Delay(Duration),
    /// Not done, and answered with this error.
    Fail(BlockError),
    /// This bit, counted from the first bit of the first byte, of the data that passes is inverted. Beyond the
    /// data, and for operations without any, nothing happens.
    FlipBit(u64),
    /// Not done, and answered with success. A read forgets to be filled: zeroes.
    Forget,
    /// Held until [`Faults::release`].
    Hold,
    /// Done this many blocks further on.
    Misdirect(u64),
}

struct Rule {
    ops: Ops,
    fault: Fault,
    /// Uses left; `None` has no end.
    uses: Option<u64>,
}

type Start = Box<dyn FnOnce()>;

#[derive(Default)]
struct State {
    rules: RefCell<Vec<Rule>>,
    held: RefCell<VecDeque<Start>>,
    held_changed: Notify,
    dead: Cell<bool>,
    fault_count: Cell<u64>,
}

/// The handle of the test. Clones control the same device.
#[derive(Clone, Default)]
pub struct Faults(Rc<State>);

impl Faults {
    /// The next `count` operations of `ops` meet `fault`.
    pub fn next(&self, ops: Ops, count: u64, fault: Fault) {
        self.add(ops, fault, Some(count));
    }

    /// Every operation of `ops` meets `fault`, until [`Faults::clear`].
    pub fn every(&self, ops: Ops, fault: Fault) {
        self.add(ops, fault, None);
    }

    fn add(&self, ops: Ops, fault: Fault, uses: Option<u64>) {
        self.0.rules.borrow_mut().push(Rule { ops, fault, uses });
    }

    /// Forgets all faults. Operations that are held stay so until released.
    pub fn clear(&self) {
        self.0.rules.borrow_mut().clear();
    }

    /// Operations that are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.0.held.borrow().len()
    }

    /// Waits until at least `count` operations are held.
    pub async fn wait_held(&self, count: usize) {
        loop {
            let changed = self.0.held_changed.notified();
            if self.held() >= count {
                return;
            }
            changed.await;
        }
    }

    /// Starts every operation that is held, oldest first. Also those whose future was dropped: abandoning an
    /// answer never abandons the I/O.
    pub fn release(&self) {
        // One at a time: starting one may hold another.
        for _ in 0..self.held() {
            let start = self.0.held.borrow_mut().pop_front();
            if let Some(start) = start {
                start();
            }
        }
    }

    /// From now on everything answers [`BlockError::Gone`], what is held included.
    pub fn kill(&self) {
        self.0.dead.set(true);
        self.release();
    }

    /// The device is back, with what it held.
    pub fn revive(&self) {
        self.0.dead.set(false);
    }

    /// How often a fault was met.
    #[must_use]
    pub fn fault_count(&self) -> u64 {
        self.0.fault_count.get()
    }

    /// The fault that an operation meets, which uses it up.
    fn meet(&self, op: Ops) -> Option<Fault> {
        let mut rules = self.0.rules.borrow_mut();
        let index = rules
            .iter()
            .position(|rule| rule.ops.contains(op) && rule.uses != Some(0))?;
        let fault = rules[index].fault.clone();
        if let Some(uses) = &mut rules[index].uses {
            *uses -= 1;
            if *uses == 0 {
                rules.remove(index);
            }
        }
        self.0.fault_count.set(self.0.fault_count.get() + 1);
        Some(fault)
    }

    fn check_alive(&self) -> Result<(), BlockError> {
        if self.0.dead.get() {
            Err(BlockError::Gone)
        } else {
            Ok(())
        }
    }
}

/// See the module.
pub struct Faulty {
    device: Device,
    faults: Faults,
}

impl Faulty {
    /// Wraps `device`; faults are set through the handle.
    #[must_use]
    pub fn wrap(device: Device) -> (Device, Faults) {
        let faults = Faults::default();
        let faulty = Rc::new(Self {
            device,
            faults: faults.clone(),
        });
        (faulty, faults)
    }

    /// Runs an operation past the faults. `start` begins it on the device, `bent` begins it with its data or
    /// place bent, and `forgotten` is the answer of an operation that was never begun.
    fn run<T: 'static>(
        &self,
        op: Ops,
        operation: impl FnOnce(&Device, Option<&Fault>) -> Io<T> + 'static,
        forgotten: impl FnOnce() -> T,
    ) -> Io<T> {
        if let Err(gone) = self.faults.check_alive() {
            return Io::ready(Err(gone));
        }
        let device = self.device.clone();
        match self.faults.meet(op) {
            None => operation(&device, None),
            Some(Fault::Fail(error)) => Io::ready(Err(error)),
            Some(Fault::Forget) => Io::ready(Ok(forgotten())),
            Some(Fault::AnswerUnknown) => {
                let done = operation(&device, None);
                Io::running(async move {
                    let _ = done.await;
                    Err(BlockError::Unknown)
                })
            }
            Some(fault @ (Fault::FlipBit(_) | Fault::Misdirect(_))) => operation(&device, Some(&fault)),
            Some(Fault::Hold) => {
                let (start, started) = self.later(operation);
                self.faults.0.held.borrow_mut().push_back(start);
                self.faults.0.held_changed.notify_waiters();
                started
            }
            Some(Fault::Delay(delay)) => {
                let (start, started) = self.later(operation);
                // A task of its own: the operation happens whether its future is polled or not.
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(delay).await;
                    start();
                });
                started
            }
        }
    }

    /// An operation that begins when the closure is called.
    fn later<T: 'static>(
        &self,
        operation: impl FnOnce(&Device, Option<&Fault>) -> Io<T> + 'static,
    ) -> (Start, Io<T>) {
        let (sender, receiver) = oneshot::channel::<Io<T>>();
        let (device, faults) = (self.device.clone(), self.faults.clone());
        let start = Box::new(move || {
            let io = match faults.check_alive() {
                Ok(()) => operation(&device, None),
                Err(gone) => Io::ready(Err(gone)),
            };
            // Nobody may be waiting any more.
            let _ = sender.send(io);
        });
        let started = async move {
            match receiver.await {
                Ok(io) => io.await,
                // Held for ever: the handle and its queue are gone.
                Err(_) => Err(BlockError::Unknown),
            }
        };
        (start, Io::running(started))
    }
}

fn misdirected(range: LbaRange, fault: Option<&Fault>) -> LbaRange {
    match fault {
        Some(Fault::Misdirect(blocks)) => LbaRange {
            start: Lba(range.start.0.wrapping_add(*blocks)),
            count: range.count,
        },
        _ => range,
    }
}

/// `data` with the bit of the fault inverted.
fn bent(data: &[Bytes], fault: Option<&Fault>) -> Option<Bytes> {
    let Some(Fault::FlipBit(bit)) = fault else {
        return None;
    };
    let mut bytes = BytesMut::new();
    data.iter().for_each(|segment| bytes.extend_from_slice(segment));
    *bytes.get_mut(usize::try_from(bit / 8).ok()?)? ^= 1 << (bit % 8);
    Some(bytes.freeze())
}

impl BlockDevice for Faulty {
    fn info(&self) -> DeviceInfo {
        self.device.info()
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        let info = self.device.info();
        if let Err(error) = info.check_read(range) {
            return Io::ready(Err(error));
        }
        let operation = move |device: &Device, fault: Option<&Fault>| {
            let data = device.read(misdirected(range, fault));
            let fault = fault.cloned();
            Io::running(async move {
                let data = data.await?;
                Ok(bent(std::slice::from_ref(&data), fault.as_ref()).unwrap_or(data))
            })
        };
        let len = info.check_read(range).unwrap_or(0);
        self.run(Ops::READ, operation, || Bytes::from(vec![0; len]))
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        let range = match self.device.info().check_write(start, &data) {
            Ok(range) => range,
            Err(error) => return Io::ready(Err(error)),
        };
        let operation = move |device: &Device, fault: Option<&Fault>| {
            let data = bent(&data, fault).map_or(data, |bent| vec![bent]);
            device.write(misdirected(range, fault).start, data, durability)
        };
        self.run(Ops::WRITE, operation, || ())
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        let operation = move |device: &Device, fault: Option<&Fault>| {
            device.write_zeroes(misdirected(range, fault), deallocate, durability)
        };
        self.run(Ops::WRITE_ZEROES, operation, || ())
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        let operation = move |device: &Device, fault: Option<&Fault>| {
            let ranges = ranges.into_iter().map(|range| misdirected(range, fault));
            device.deallocate(ranges.collect())
        };
        self.run(Ops::DEALLOCATE, operation, || ())
    }

    fn flush(&self) -> Io<()> {
        self.run(Ops::FLUSH, |device, _| device.flush(), || ())
    }
}

/// Inverts one bit of what `device` holds: rot on the medium, which a checksum has to find.
///
/// # Errors
/// Those of the read and the write.
pub async fn rot(device: &Device, block: Lba, bit: u64) -> Result<(), BlockError> {
    let range = LbaRange {
        start: block,
        count: 1,
    };
    let mut data = BytesMut::from(&device.read(range).await?[..]);
    let index = usize::try_from(bit / 8).unwrap_or(usize::MAX) % data.len().max(1);
    data[index] ^= 1 << (bit % 8);
    device
        .write(block, vec![data.freeze()], Durability::Durable)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryDrive;
    use crate::testing;

    const DRIVE_BYTES: u64 = 16 << 20;

    fn range(start: u64, count: u64) -> LbaRange {
        LbaRange {
            start: Lba(start),
            count,
        }
    }

    fn block(byte: u8) -> Vec<Bytes> {
        vec![Bytes::from(vec![byte; 4096])]
    }

    fn drive() -> (Device, Faults) {
        Faulty::wrap(MemoryDrive::device(DRIVE_BYTES))
    }

    async fn first_byte(drive: &Device, start: u64) -> u8 {
        drive.read(range(start, 1)).await.unwrap()[0]
    }

    #[tokio::test]
    async fn without_faults_it_keeps_the_contract() {
        testing::conformance(async || drive().0).await;
    }

    #[tokio::test]
    async fn exactly_the_next_operations_fail() {
        let (drive, faults) = drive();
        faults.next(
            Ops::WRITE | Ops::FLUSH,
            2,
            Fault::Fail(BlockError::CapacityExceeded),
        );
        assert_eq!(first_byte(&drive, 0).await, 0);
        let failed = drive.write(Lba(0), block(1), Durability::Durable).await;
        assert_eq!(failed, Err(BlockError::CapacityExceeded));
        assert_eq!(drive.flush().await, Err(BlockError::CapacityExceeded));
        assert_eq!(first_byte(&drive, 0).await, 0);
        assert_eq!(drive.write(Lba(0), block(1), Durability::Durable).await, Ok(()));
        assert_eq!(first_byte(&drive, 0).await, 1);
        assert_eq!(faults.fault_count(), 2);
    }

    #[tokio::test]
    async fn a_held_write_happens_when_released_even_if_nobody_waits() {
        let (drive, faults) = drive();
        faults.next(Ops::WRITE, 2, Fault::Hold);
        let waited = drive.write(Lba(0), block(1), Durability::Durable);
        drop(drive.write(Lba(1), block(2), Durability::Durable));
        faults.wait_held(2).await;
        assert_eq!(first_byte(&drive, 0).await, 0);
        faults.release();
        assert_eq!(waited.await, Ok(()));
        assert_eq!(first_byte(&drive, 0).await, 1);
        assert_eq!(first_byte(&drive, 1).await, 2);
        assert_eq!(faults.held(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_delayed_operation_happens_though_its_future_is_dropped() {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let (drive, faults) = drive();
                faults.next(Ops::WRITE, 1, Fault::Delay(Duration::from_secs(5)));
                drop(drive.write(Lba(0), block(1), Durability::Durable));
                tokio::time::sleep(Duration::from_secs(4)).await;
                assert_eq!(first_byte(&drive, 0).await, 0);
                tokio::time::sleep(Duration::from_secs(2)).await;
                assert_eq!(first_byte(&drive, 0).await, 1);
            })
            .await;
    }

    #[tokio::test]
    async fn lost_misdirected_and_unknown_writes_do_what_their_names_say() {
        let (drive, faults) = drive();
        faults.next(Ops::WRITE, 1, Fault::Forget);
        faults.next(Ops::WRITE, 1, Fault::Misdirect(7));
        faults.next(Ops::WRITE, 1, Fault::AnswerUnknown);
        assert_eq!(drive.write(Lba(0), block(1), Durability::Durable).await, Ok(()));
        assert_eq!(first_byte(&drive, 0).await, 0);
        assert_eq!(drive.write(Lba(1), block(2), Durability::Durable).await, Ok(()));
        assert_eq!(first_byte(&drive, 1).await, 0);
        assert_eq!(first_byte(&drive, 8).await, 2);
        let unknown = drive.write(Lba(2), block(3), Durability::Durable).await;
        assert_eq!(unknown, Err(BlockError::Unknown));
        assert_eq!(first_byte(&drive, 2).await, 3);
    }

    #[tokio::test]
    async fn one_bit_is_flipped_on_the_way_or_on_the_medium() {
        let (drive, faults) = drive();
        faults.next(Ops::READ, 1, Fault::FlipBit(3));
        assert_eq!(first_byte(&drive, 0).await, 8);
        assert_eq!(first_byte(&drive, 0).await, 0);
        faults.next(Ops::WRITE, 1, Fault::FlipBit(8 + 1));
        drive.write(Lba(0), block(0), Durability::Durable).await.unwrap();
        assert_eq!(drive.read(range(0, 1)).await.unwrap()[..3], [0, 2, 0]);
        rot(&drive, Lba(5), 0).await.unwrap();
        assert_eq!(first_byte(&drive, 5).await, 1);
    }

    #[tokio::test]
    async fn a_dead_drive_answers_gone_also_to_what_it_held() {
        let (drive, faults) = drive();
        faults.next(Ops::WRITE, 1, Fault::Hold);
        let held = drive.write(Lba(0), block(1), Durability::Durable);
        faults.kill();
        assert_eq!(held.await, Err(BlockError::Gone));
        assert_eq!(drive.flush().await, Err(BlockError::Gone));
        faults.revive();
        assert_eq!(first_byte(&drive, 0).await, 0);
    }
}
