//! Doorbells and event indices: in registers, in a page that the client maps, in guest memory, and before this side sleeps.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use weft_proto::nvme::event::AsyncEvent;

use super::Engine;
use crate::vfio_user::doorbell_page::DoorbellPage;
use crate::vfio_user::memory::GuestMemory;
use crate::vfio_user::queue::{self, CompletionQueue};
use crate::vfio_user::registers::Doorbell;

impl Engine {
    /// A doorbell was written to a register.
    pub(in crate::vfio_user) fn ring(
        &mut self,
        doorbell: Doorbell,
        value: u32,
        memory: &GuestMemory,
    ) -> Result<(), AsyncEvent> {
        let value = value & 0xffff;
        // The admin queue's are not looked at in memory.
        let shadow = self
            .shadow
            .filter(|_| !matches!(doorbell, Doorbell::Tail(0) | Doorbell::Head(0)));
        let in_memory = |known: &mut queue::Shadow| {
            if let Some(shadow) = shadow
                && let Ok(value) = memory.load_u32(shadow.doorbells + doorbell.offset())
            {
                known.look(value);
            }
        };
        let valid = match doorbell {
            Doorbell::Tail(sqid) => {
                let queue = self
                    .submission
                    .get_mut(usize::from(sqid))
                    .and_then(Option::as_mut);
                let queue = queue.ok_or(AsyncEvent::INVALID_DOORBELL)?;
                in_memory(&mut queue.shadow);
                queue.set_tail(queue.shadow.counts(value))
            }
            Doorbell::Head(cqid) => {
                let queue = self
                    .completion
                    .get_mut(usize::from(cqid))
                    .and_then(Option::as_mut);
                let queue = queue.ok_or(AsyncEvent::INVALID_DOORBELL)?;
                in_memory(&mut queue.shadow);
                queue.set_head(queue.shadow.counts(value))
            }
        };
        if valid {
            Ok(())
        } else {
            Err(AsyncEvent::INVALID_DOORBELL_VALUE)
        }
    }

    pub(in crate::vfio_user) fn has_mapped_doorbells(&self) -> bool {
        self.mapped.is_some()
    }

    /// The file of mapped doorbells, if there are.
    pub(in crate::vfio_user) fn doorbell_file(&self) -> Option<Result<OwnedFd, Errno>> {
        self.mapped.as_ref().map(DoorbellPage::file)
    }

    /// Makes the doorbell of a new queue one that was never rung.
    pub(super) fn begin_doorbell(&mut self, doorbell: Doorbell) {
        if let Some(page) = &mut self.mapped {
            page.clear(doorbell);
        }
    }

    /// Looks at the doorbells in the page that the client maps, of queues that exist; answers whether one was rung.
    pub(in crate::vfio_user) fn poll_mapped(&mut self, memory: &GuestMemory) -> bool {
        let Some(mut page) = self.mapped.take() else {
            return false;
        };
        let mut any = false;
        for qid in 0..self.submission.len() as u16 {
            let at = usize::from(qid);
            let doorbells = [
                (self.submission[at].is_some(), Doorbell::Tail(qid)),
                (self.completion[at].is_some(), Doorbell::Head(qid)),
            ];
            for doorbell in doorbells
                .into_iter()
                .filter_map(|(is, doorbell)| is.then_some(doorbell))
            {
                if let Some(value) = page.rung(doorbell) {
                    any = true;
                    if let Err(event) = self.ring(doorbell, value, memory) {
                        tracing::debug!(?doorbell, value, "a doorbell that cannot be");
                        self.controller.raise(event);
                    }
                }
            }
        }
        self.mapped = Some(page);
        any
    }

    pub(in crate::vfio_user) fn has_shadow(&self) -> bool {
        self.shadow.is_some()
    }

    /// Looks at the tails in memory. The admin queue's is not looked at: hosts ring its register.
    pub(in crate::vfio_user) fn poll_shadow(&mut self, memory: &GuestMemory) -> bool {
        let Some(shadow) = self.shadow else { return false };
        let mut rung = false;
        for (sqid, queue) in self.submission.iter_mut().enumerate().skip(1) {
            let Some(queue) = queue else { continue };
            let at = shadow.doorbells + Doorbell::Tail(sqid as u16).offset();
            // What cannot be read or cannot be is not a new tail.
            if let Ok(value) = memory.load_u32(at)
                && let Some(tail) = queue.shadow.look(value)
                && tail != queue.tail
                && queue.set_tail(tail)
            {
                rung = true;
            }
        }
        rung
    }

    /// Asks to be told of the next command of each queue; answers whether one came before.
    pub(in crate::vfio_user) fn prepare_to_sleep(&mut self, memory: &GuestMemory) -> bool {
        let Some(shadow) = self.shadow else { return false };
        let mut told = false;
        for (sqid, queue) in self.submission.iter_mut().enumerate().skip(1) {
            let Some(queue) = queue else { continue };
            if queue.event != queue.tail {
                let at = shadow.events + Doorbell::Tail(sqid as u16).offset();
                if memory.store_u32(at, queue.tail).is_ok() {
                    queue.event = queue.tail;
                    told = true;
                }
            }
        }
        if told {
            GuestMemory::fence();
            return self.poll_shadow(memory);
        }
        false
    }

    /// Moves a queue's event index behind the head, half a queue at a time, where no tail meets it: while this side is
    /// awake nobody has to tell it anything.
    pub(super) fn trail_event(&mut self, sqid: u16, memory: &GuestMemory) {
        let Some(shadow) = self.shadow.filter(|_| sqid > 0) else {
            return;
        };
        let Some(queue) = &mut self.submission[usize::from(sqid)] else {
            return;
        };
        let behind = (queue.head + queue.entries - queue.event % queue.entries) % queue.entries;
        if behind > queue.entries / 2 {
            let event = queue.before_head();
            let at = shadow.events + Doorbell::Tail(sqid).offset();
            if memory.store_u32(at, event).is_ok() {
                queue.event = event;
            }
        }
    }

    /// Whether a completion queue has a place; looks at its head in memory when it seems not to.
    pub(super) fn has_room(&mut self, cqid: u16, memory: &GuestMemory) -> bool {
        let Some(queue) = &mut self.completion[usize::from(cqid)] else {
            return false;
        };
        if queue.room() > 0 {
            return true;
        }
        let Some(shadow) = self.shadow.filter(|_| cqid > 0) else {
            return false;
        };
        let offset = Doorbell::Head(cqid).offset();
        let look = |queue: &mut CompletionQueue| {
            if let Ok(value) = memory.load_u32(shadow.doorbells + offset)
                && let Some(head) = queue.shadow.look(value)
            {
                // One that cannot be is not a new head.
                queue.set_head(head);
            }
            queue.room() > 0
        };
        if look(queue) {
            let _ = memory.store_u32(shadow.events + offset, queue.before_head());
            return true;
        }
        // The host has to say when it takes the next one.
        let _ = memory.store_u32(shadow.events + offset, queue.head);
        GuestMemory::fence();
        look(queue)
    }
}
