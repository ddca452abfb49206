//! The PCI Express function: registers, reset, and what of the guest's doings reaches the controller model.
//!
//! Whoever owns the connection calls [`Function::poll`] until it has nothing more to do. Nothing here waits and nothing
//! knows the socket.
//!
//! A reset ends a life. Commands of a former life stay in execution until the device has done them, their answers are
//! dropped, and the controller gets ready again only when none is left: otherwise an old write could land on top of a new
//! one. The same goes for what a former connection of the same host left behind.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustix::io::Errno;
use weft_proto::fabrics::property::{Capabilities, Configuration, ControllerStatus, ShutdownNotification};
use weft_proto::nvme::event::AsyncEvent;

use super::doorbell_page::DoorbellPage;
use super::engine::Engine;
use super::interrupt::Interrupts;
use super::memory::GuestMemory;
use super::pci::Config;
use super::queue::{CompletionQueue, SubmissionQueue};
use super::registers::{BAR0_BYTES, DOORBELLS_AT, Doorbell, MSIX_PENDING_AT, MSIX_TABLE_AT, at};
use crate::controller::{Controller, VERSION};
use crate::metrics;

/// Most entries of a queue. As many as hosts ask for.
pub(super) const QUEUE_ENTRIES_MAX: u32 = 1024;

/// How long hosts wait for a controller to get ready (CAP.TO): the most there is, since a former life may have commands
/// in a volume that waits for a drive.
const READY_TIMEOUT_500MS: u8 = 255;

/// Everything that a reset of the controller throws away.
#[derive(Default)]
struct Registers {
    cc: Configuration,
    /// Interrupt mask of the line (INTMS, INTMC).
    mask: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
}

/// See the module.
pub(super) struct Function {
    controller: Rc<Controller>,
    config: Config,
    registers: Registers,
    /// The MSI-X table as it was written: the virtual machine monitor has the one that counts.
    msix_table: Vec<u8>,
    vectors: u16,
    pub(super) memory: GuestMemory,
    pub(super) interrupts: Interrupts,
    engine: Engine,
    /// Enabled, and not ready yet: waits for what is left of former lives.
    enabling: bool,
    /// Waits for what former connections of the host left behind; `None` once there is nothing.
    dropped: Option<LocalBoxFuture<'static, bool>>,
    closed: bool,
}

/// However it ends: a controller and its registry hold each other until it is closed. Commands that are dropped here count as
/// ones that may yet land.
impl Drop for Function {
    fn drop(&mut self) {
        self.close();
    }
}

impl Function {
    /// For a client that has just connected.
    /// With doorbells in a page, if there is one.
    pub(super) fn new(controller: Rc<Controller>, io_queues: u16, doorbells: Option<DoorbellPage>) -> Self {
        let vectors = io_queues + 1;
        let dropped = controller.outstanding().map(|outstanding| {
            let outstanding = Rc::clone(outstanding);
            async move { outstanding.wait_until_none(std::future::pending()).await }.boxed_local()
        });
        Self {
            engine: Engine::new(Rc::clone(&controller), io_queues, doorbells),
            config: Config::new(vectors),
            registers: Registers::default(),
            msix_table: vec![0; usize::from(vectors) * 16],
            vectors,
            memory: GuestMemory::default(),
            interrupts: Interrupts::new(vectors),
            enabling: false,
            dropped,
            closed: false,
            controller,
        }
    }

    /// Does what there is to do; answers whether there was something.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let mut progress = self.engine.poll_running(cx, &self.memory, now);
        if self.enabling {
            progress |= self.poll_enable(cx);
        }
        if self.registers.cc.shutdown() == ShutdownNotification::Requested
            && !self.controller.status().shutdown_complete()
            && self.engine.is_idle()
        {
            self.controller.configure(self.registers.cc);
            progress = true;
        }
        if self.may_access_memory() {
            progress |= self.engine.poll_queues(&self.memory, now);
        }
        self.interrupt();
        progress
    }

    /// Whether commands are taken and completed.
    fn may_access_memory(&self) -> bool {
        let status = self.controller.status();
        status.ready() && !status.fatal() && self.config.is_bus_master()
    }

    /// Looks at doorbells that a host rings without telling; answers whether one was rung.
    pub(super) fn poll_doorbells(&mut self) -> bool {
        self.may_access_memory()
            && (self.engine.poll_mapped(&self.memory) | self.engine.poll_shadow(&self.memory))
    }

    /// Whether doorbells are rung in a way that nobody is ever told of.
    pub(super) fn is_never_told(&self) -> bool {
        self.engine.has_mapped_doorbells() && self.may_access_memory() && !self.engine.is_stopped()
    }

    /// The page of doorbells that a client may map: its file, if there is one.
    pub(super) fn doorbell_file(&self) -> Option<Result<OwnedFd, Errno>> {
        self.engine.doorbell_file()
    }

    /// Asks the host to tell when it rings a doorbell in memory, from now on; answers whether one was rung before that.
    pub(super) fn prepare_to_sleep(&mut self) -> bool {
        self.may_access_memory() && self.engine.prepare_to_sleep(&self.memory)
    }

    /// Whether there are doorbells in memory.
    pub(super) fn has_shadow(&self) -> bool {
        self.engine.has_shadow()
    }

    /// When [`Self::poll`] has to be called if nothing else happens.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.engine.poll_timeout().filter(|_| self.may_access_memory())
    }

    fn interrupt(&mut self) {
        if self.interrupts.uses_vectors() {
            self.engine.take_fresh(|vector| self.interrupts.raise(vector));
        } else {
            self.engine.take_fresh(|_| {});
            let level =
                self.registers.mask & 1 == 0 && self.config.allows_intx() && self.engine.has_untaken();
            self.interrupts.set_line(level);
        }
    }

    // Lives.

    fn poll_enable(&mut self, cx: &mut Context<'_>) -> bool {
        if let Some(dropped) = &mut self.dropped {
            match dropped.poll_unpin(cx) {
                Poll::Ready(_) => self.dropped = None,
                Poll::Pending => return false,
            }
        }
        if !self.engine.is_idle() {
            return false;
        }
        self.enabling = false;
        self.controller.configure(self.registers.cc);
        let Registers { aqa, asq, acq, .. } = self.registers;
        let (sq_entries, cq_entries) = ((aqa & 0xfff) + 1, (aqa >> 16 & 0xfff) + 1);
        if sq_entries < 2 || cq_entries < 2 {
            tracing::warn!(aqa, "an admin queue of one entry");
            self.controller.set_fatal();
        }
        let admin = (
            SubmissionQueue::new(asq & !0xfff, sq_entries, 0),
            CompletionQueue::new(acq & !0xfff, cq_entries, Some(0)),
        );
        self.engine.begin(admin.0, admin.1);
        true
    }

    /// Ends a life: queues and features are gone.
    fn end_life(&mut self) {
        self.enabling = false;
        self.engine.end();
        self.controller.configure(Configuration::default());
        self.interrupt();
    }

    /// A reset of the function (FLR) or of the device: as new, but for the memory and eventfds of the client.
    pub(super) fn reset(&mut self) {
        tracing::debug!("function reset");
        self.end_life();
        self.registers = Registers::default();
        self.config = Config::new(self.vectors);
        self.msix_table.fill(0);
    }

    /// Ends everything; the commands in execution are to be waited for with [`Self::drain`].
    pub(super) fn close(&mut self) {
        if !std::mem::replace(&mut self.closed, true) {
            self.engine.end();
            self.controller.leave(0, self.engine.running());
        }
    }

    /// Waits until the last command has left the device, after [`Self::close`].
    pub(super) async fn drain(&mut self) {
        while self.engine.next_done().await {
            if let Some(outstanding) = self.controller.outstanding() {
                outstanding.finish_one();
            }
        }
    }

    // Regions.

    /// A read of the configuration space.
    pub(super) fn read_config(&self, offset: u64, count: usize) -> Option<&[u8]> {
        self.config.read(offset, count)
    }

    /// A write to it.
    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) -> Option<()> {
        if self.config.write(offset, data)? {
            self.reset();
        }
        Some(())
    }

    /// A read of BAR 0.
    pub(super) fn read_bar(&self, offset: u64, data: &mut [u8]) -> Option<()> {
        let end = offset.checked_add(data.len() as u64)?;
        if end > BAR0_BYTES {
            return None;
        }
        for (at, byte) in (offset..end).zip(data) {
            let register = self.register(at & !3);
            *byte = register.to_le_bytes()[(at & 3) as usize];
        }
        Some(())
    }

    fn register(&self, offset: u64) -> u32 {
        let capabilities = || Capabilities::memory((QUEUE_ENTRIES_MAX - 1) as u16, READY_TIMEOUT_500MS).0;
        let Registers {
            cc,
            mask,
            aqa,
            asq,
            acq,
        } = &self.registers;
        match offset {
            at::CAP => capabilities() as u32,
            at::CAP_HIGH => (capabilities() >> 32) as u32,
            at::VS => VERSION,
            at::INTMS | at::INTMC => *mask,
            at::CC => cc.0,
            at::CSTS => self.csts(),
            at::AQA => *aqa,
            at::ASQ => *asq as u32,
            at::ASQ_HIGH => (*asq >> 32) as u32,
            at::ACQ => *acq as u32,
            at::ACQ_HIGH => (*acq >> 32) as u32,
            MSIX_TABLE_AT..MSIX_PENDING_AT => {
                let at = (offset - MSIX_TABLE_AT) as usize;
                let word = self.msix_table.get(at..at + 4);
                word.and_then(|word| word.try_into().ok())
                    .map_or(0, u32::from_le_bytes)
            }
            _ => 0,
        }
    }

    fn csts(&self) -> u32 {
        let status = self.controller.status();
        let occurring =
            self.registers.cc.shutdown() == ShutdownNotification::Requested && !status.shutdown_complete();
        status.0
            | if occurring {
                ControllerStatus::SHUTDOWN_OCCURRING
            } else {
                0
            }
    }

    /// A write to BAR 0: one word or two, as hosts write registers. Anything else has no effect.
    pub(super) fn write_bar(&mut self, offset: u64, data: &[u8]) -> Option<()> {
        let end = offset.checked_add(data.len() as u64)?;
        if end > BAR0_BYTES {
            return None;
        }
        if !offset.is_multiple_of(4) {
            return Some(());
        }
        let (words, _) = data.as_chunks::<4>();
        for (at, word) in (offset..end).step_by(4).zip(words) {
            self.write_register(at, u32::from_le_bytes(*word));
        }
        Some(())
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let registers = &mut self.registers;
        // The admin queues are where they were when the controller was enabled.
        let enabled = registers.cc.enabled();
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            at::INTMS => registers.mask |= value,
            at::INTMC => registers.mask &= !value,
            at::CC => self.configure(Configuration(value)),
            at::AQA if !enabled => registers.aqa = value & 0x0fff_0fff,
            at::ASQ if !enabled => registers.asq = low(registers.asq),
            at::ASQ_HIGH if !enabled => registers.asq = high(registers.asq),
            at::ACQ if !enabled => registers.acq = low(registers.acq),
            at::ACQ_HIGH if !enabled => registers.acq = high(registers.acq),
            DOORBELLS_AT..MSIX_TABLE_AT => self.ring(offset, value),
            MSIX_TABLE_AT..MSIX_PENDING_AT => {
                let at = (offset - MSIX_TABLE_AT) as usize;
                if let Some(word) = self.msix_table.get_mut(at..at + 4) {
                    word.copy_from_slice(&value.to_le_bytes());
                }
            }
            _ => {}
        }
    }

    fn configure(&mut self, cc: Configuration) {
        let before = std::mem::replace(&mut self.registers.cc, cc);
        match (before.enabled(), cc.enabled()) {
            (false, true) => self.enabling = true,
            (true, false) => self.end_life(),
            _ => {}
        }
        if cc.shutdown() == ShutdownNotification::Requested {
            // No more commands are taken; it is over when the last one is done.
            self.engine.stop();
        }
    }

    fn ring(&mut self, offset: u64, value: u32) {
        metrics::doorbell_trapped();
        if !self.controller.is_ready() {
            return;
        }
        let rung = match Doorbell::at(offset) {
            Some(doorbell) => self.engine.ring(doorbell, value, &self.memory),
            None => Err(AsyncEvent::INVALID_DOORBELL),
        };
        if let Err(event) = rung {
            tracing::debug!(offset, value, "a doorbell that cannot be");
            self.controller.raise(event);
        }
    }
}
