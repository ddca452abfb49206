//! What both echoes share: when they work, and what they answer.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::wire::{
    C2H_DATA, CAPSULE_RESP, COMMAND_BYTES, LAST, SHORT_BYTES, SUCCESS, header, u16_at, u32_at,
};

/// Where the opcode, the command identifier and the number of blocks lie in a command capsule.
const OPCODE: usize = 8;
const CID: usize = 10;
const SLBA: usize = 8 + 40;
const NLB_Z: usize = 8 + 48;
const READ: u8 = 0x02;

/// What tells an echo's thread to poll, and to end.
#[derive(Clone, Default)]
pub(super) struct Signals {
    active: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Signals {
    /// What [`Self::wait`] waits for. The thread has to be unparked after it.
    pub(super) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
    }

    /// There is not going to be anything. The thread has to be unparked after it.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Sleeps until there is something to do. `false` when there is not going to be anything.
    pub(super) fn wait(&self) -> bool {
        while !self.ended.load(Ordering::Acquire) {
            if self.active.load(Ordering::Acquire) {
                return true;
            }
            std::thread::park();
        }
        false
    }
}

/// The header of the answer to a request, and which part of the table follows it.
pub(super) fn answer(request: &[u8; COMMAND_BYTES]) -> ([u8; SHORT_BYTES], Range<usize>) {
    let cid = u16_at(request, CID).to_le_bytes();
    let (long, data) = if request[OPCODE] == READ {
        let data_bytes = (u32_at(request, NLB_Z) as usize & 0xffff) * 4096 + 4096;
        let mut header = header(C2H_DATA, LAST | SUCCESS, SHORT_BYTES, data_bytes);
        header[8..10].copy_from_slice(&cid);
        let at = u32_at(request, SLBA) as usize * 4096;
        (header, at..at + data_bytes)
    } else {
        let mut header = header(CAPSULE_RESP, 0, SHORT_BYTES, 0);
        header[20..22].copy_from_slice(&cid);
        (header, 0..0)
    };
    let mut short = [0; SHORT_BYTES];
    short.copy_from_slice(&long[..SHORT_BYTES]);
    (short, data)
}
