//! Interrupts: eventfds that the client hands over, MSI-X vectors and the line of INTx.
//!
//! The virtual machine monitor keeps the MSI-X table and masks vectors itself. INTx is a level: it masks itself when it
//! was signalled, and when the client unmasks it while the level is still up it is signalled again.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::message::{
    INTERRUPT_ERROR, INTERRUPT_INTX, INTERRUPT_MSIX, INTERRUPT_REQUEST, InterruptAction, SetInterrupts,
};

/// An eventfd.
#[derive(Debug)]
struct Signal(OwnedFd);

impl Signal {
    /// Takes a descriptor of a client, if it is an eventfd: a write to anything else could wait, or do harm.
    fn new(file: OwnedFd) -> Result<Self, Errno> {
        let name = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())?;
        if name.as_bytes() != b"anon_inode:[eventfd]" {
            return Err(Errno::INVAL);
        }
        // A counter that is full makes a write wait, and everybody on this thread with it.
        fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        Ok(Self(file))
    }

    #[expect(
        clippy::host_endian_bytes,
        reason = "the kernel reads a number of its own byte order"
    )]
    fn raise(&self) {
        // A full counter says what one more would say.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Interrupts {
    msix: Vec<Option<Signal>>,
    intx: Option<Signal>,
    intx_masked: bool,
    intx_level: bool,
}

impl Interrupts {
    pub(super) fn new(vectors: u16) -> Self {
        Self {
            msix: (0..vectors).map(|_| None).collect(),
            intx: None,
            intx_masked: false,
            intx_level: false,
        }
    }

    /// Interrupts of a kind.
    pub(super) fn count(&self, index: u32) -> u32 {
        match index {
            INTERRUPT_INTX => 1,
            INTERRUPT_MSIX => self.msix.len() as u32,
            // Clients ask for them and are never signalled.
            INTERRUPT_ERROR | INTERRUPT_REQUEST => 1,
            _ => 0,
        }
    }

    /// Does what a client asks for. `files` are the eventfds that came along.
    pub(super) fn set(&mut self, set: &SetInterrupts<'_>, files: Vec<OwnedFd>) -> Result<(), Errno> {
        let end = set.start.checked_add(set.count).ok_or(Errno::INVAL)?;
        if end > self.count(set.index) {
            return Err(Errno::INVAL);
        }
        if set.action == InterruptAction::Disable {
            match set.index {
                INTERRUPT_INTX => self.intx = None,
                INTERRUPT_MSIX => self.msix.iter_mut().for_each(|signal| *signal = None),
                _ => {}
            }
            return Ok(());
        }
        let meant = |at: u32| set.which.is_none_or(|which| which[at as usize] != 0);
        let mut files = match files.len() {
            // Takes them away.
            0 => Vec::new(),
            given if given == set.count as usize => files,
            _ => return Err(Errno::INVAL),
        }
        .into_iter()
        .map(Signal::new)
        .collect::<Result<Vec<_>, _>>()?
        .into_iter();
        for at in 0..set.count {
            let number = (set.start + at) as usize;
            match (set.index, set.action) {
                (INTERRUPT_INTX, InterruptAction::Connect) => {
                    self.intx = files.next();
                    self.intx_masked = false;
                    self.raise_line();
                }
                (INTERRUPT_INTX, InterruptAction::Mask) if meant(at) => self.intx_masked = true,
                (INTERRUPT_INTX, InterruptAction::Unmask) if meant(at) => {
                    self.intx_masked = false;
                    self.raise_line();
                }
                (INTERRUPT_INTX, InterruptAction::Trigger) if meant(at) => {
                    self.intx.iter().for_each(Signal::raise);
                }
                (INTERRUPT_MSIX, InterruptAction::Connect) => self.msix[number] = files.next(),
                (INTERRUPT_MSIX, InterruptAction::Trigger) if meant(at) => self.raise(number as u16),
                (INTERRUPT_MSIX, InterruptAction::Mask | InterruptAction::Unmask) => {
                    return Err(Errno::NOTSUP);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether vectors are in use, and not the line.
    pub(super) fn uses_vectors(&self) -> bool {
        self.msix.iter().any(Option::is_some)
    }

    /// Signals a vector.
    pub(super) fn raise(&self, vector: u16) {
        if let Some(Some(signal)) = self.msix.get(usize::from(vector)) {
            signal.raise();
        }
    }

    /// Sets the level of the line.
    pub(super) fn set_line(&mut self, level: bool) {
        self.intx_level = level;
        self.raise_line();
    }

    fn raise_line(&mut self) {
        if self.intx_level
            && !self.intx_masked
            && let Some(signal) = &self.intx
        {
            self.intx_masked = true;
            signal.raise();
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::host_endian_bytes,
    reason = "a counter of the kernel has its own byte order"
)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn set(index: u32, count: u32, action: InterruptAction) -> SetInterrupts<'static> {
        SetInterrupts {
            index,
            start: 0,
            count,
            action,
            which: None,
        }
    }

    fn event() -> (OwnedFd, OwnedFd) {
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        (event.try_clone().unwrap(), event)
    }

    fn raised(event: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(event, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    #[test]
    fn a_vector_signals_its_eventfd_until_it_is_taken_away() {
        let mut interrupts = Interrupts::new(4);
        let (mine, theirs) = event();
        interrupts
            .set(&set(INTERRUPT_MSIX, 1, InterruptAction::Connect), vec![mine])
            .unwrap();
        assert!(interrupts.uses_vectors());
        interrupts.raise(0);
        interrupts.raise(3);
        interrupts.raise(100);
        assert_eq!(raised(&theirs), 1);
        interrupts
            .set(&set(INTERRUPT_MSIX, 0, InterruptAction::Disable), Vec::new())
            .unwrap();
        interrupts.raise(0);
        assert_eq!(raised(&theirs), 0);
    }

    #[test]
    fn a_line_is_signalled_once_until_it_is_unmasked() {
        let mut interrupts = Interrupts::new(4);
        let (mine, theirs) = event();
        interrupts
            .set(&set(INTERRUPT_INTX, 1, InterruptAction::Connect), vec![mine])
            .unwrap();
        interrupts.set_line(true);
        interrupts.set_line(true);
        assert_eq!(raised(&theirs), 1);
        let unmask = set(INTERRUPT_INTX, 1, InterruptAction::Unmask);
        interrupts.set(&unmask, Vec::new()).unwrap();
        assert_eq!(raised(&theirs), 1, "the level is still up");
        interrupts.set_line(false);
        interrupts.set(&unmask, Vec::new()).unwrap();
        assert_eq!(raised(&theirs), 0);
    }

    #[test]
    fn what_is_no_eventfd_or_no_vector_is_refused() {
        let mut interrupts = Interrupts::new(4);
        let (reader, _writer) = std::io::pipe().unwrap();
        let connect = set(INTERRUPT_MSIX, 1, InterruptAction::Connect);
        assert_eq!(interrupts.set(&connect, vec![reader.into()]), Err(Errno::INVAL));
        let (first, second) = event();
        assert_eq!(interrupts.set(&connect, vec![first, second]), Err(Errno::INVAL));
        let many = set(INTERRUPT_MSIX, 5, InterruptAction::Connect);
        assert_eq!(interrupts.set(&many, Vec::new()), Err(Errno::INVAL));
    }

    #[test]
    fn a_full_counter_delays_nobody() {
        let mut interrupts = Interrupts::new(1);
        let event = eventfd(0, EventfdFlags::empty()).unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        interrupts
            .set(&set(INTERRUPT_MSIX, 1, InterruptAction::Connect), vec![event])
            .unwrap();
        interrupts.raise(0);
    }
}
