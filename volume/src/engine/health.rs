//! Which drives are in service, as this engine experiences them.
//!
//! A drive that fails or stalls a command is passed over at once by every band, and probed with a read until
//! it answers. Nothing of it is remembered on drives or told to metadata: a wrong suspicion costs width for a
//! second, never safety.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use weft_block::{BlockError, Device};
use weft_proto::id::DriveId;
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use super::Core;
use crate::band::BandState;
use crate::entry::ColumnSet;
use crate::sync::patiently;

/// The drives that are passed over.
#[derive(Default)]
pub(crate) struct Health {
    suspects: RefCell<BTreeSet<DriveId>>,
}

impl Health {
    /// Whether `drive` is passed over.
    pub(crate) fn is_suspect(&self, drive: DriveId) -> bool {
        self.suspects.borrow().contains(&drive)
    }

    /// How many are.
    pub(crate) fn suspects(&self) -> usize {
        self.suspects.borrow().len()
    }
}

impl Core {
    /// The columns of `band` that a stripe passes over now, and the longest transfer the others take, in blocks.
    pub(crate) fn service(&self, band: &BandState) -> (ColumnSet, u32) {
        let band = band.band.borrow();
        let mut skipped = ColumnSet::NONE;
        let mut transfer = u32::MAX;
        for (column, chunk) in band.columns.iter().enumerate() {
            let device = if self.health.is_suspect(chunk.drive) {
                None
            } else {
                self.seams.drives.device(chunk.drive)
            };
            match device {
                Some(device) => transfer = transfer.min(device.info().transfer_bytes_max),
                None => skipped = skipped.with(column as u8),
            }
        }
        (skipped, transfer / BLOCK_BYTES as u32)
    }

    /// `drive` failed or stalled a command: pass it over until it answers a probe.
    pub(crate) fn suspect(self: &Rc<Self>, drive: DriveId) {
        if !self.health.suspects.borrow_mut().insert(drive) {
            return;
        }
        tracing::warn!(volume = %self.volume, %drive, "drive passed over");
        self.counters.suspected.add(1);
        self.counters.suspects.increment(1.0);
        self.changed.notify();
        let core = Rc::clone(self);
        self.spawn(async move {
            let mut pause = core.settings.suspect;
            loop {
                core.sleep(pause).await;
                if core.is_over() {
                    core.counters.suspects.decrement(1.0);
                    return;
                }
                if let Some(device) = core.seams.drives.device(drive)
                    && core.answers(&device).await
                {
                    break;
                }
                pause = (pause * 2).min(core.settings.suspect * 16);
            }
            tracing::info!(volume = %core.volume, %drive, "drive back in service");
            core.health.suspects.borrow_mut().remove(&drive);
            core.counters.suspects.decrement(1.0);
            core.changed.notify();
            // Stripes may have waited for enough columns.
            core.pump.notify();
        });
    }

    async fn answers(&self, device: &Device) -> bool {
        let info = device.info();
        let range = LbaRange {
            start: Lba(0),
            count: BLOCK_BYTES as u64 / u64::from(info.block_bytes),
        };
        let answer = patiently(&*self.seams.env, self.settings.stall, device.read(range)).await;
        matches!(answer, Some(Ok(_)))
    }

    /// What an error of a drive means for the engine.
    pub(crate) fn drive_error(self: &Rc<Self>, drive: DriveId, error: &BlockError) {
        match error {
            BlockError::ReservationConflict => self.fence(),
            BlockError::OutOfRange { .. }
            | BlockError::InvalidLength { .. }
            | BlockError::CapacityExceeded
            | BlockError::NotReady
            | BlockError::WriteProtected
            | BlockError::Gone
            | BlockError::Unknown
            | BlockError::Os { .. } => self.suspect(drive),
            // A medium error is about these blocks, not about the drive.
            BlockError::Unrecovered { .. } => {}
        }
    }
}
