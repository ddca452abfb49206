//! Bands ahead of need.
//!
//! A stream asks for the next band when it opens its last one, so a write waits for metadata only when it is
//! faster than Raft. In a tight pool hosts ask when half of that is used, and compaction when it has none. A volume starts with chunks of 1 MiB and grows, so a thousand small volumes stay small.

use std::rc::Rc;

use weft_proto::band::ChunkSize;
use weft_proto::id::BandId;

use super::Core;
use super::append::Stream;
use crate::band::Phase;
use crate::seams::{BandPurpose, DirectoryError};
use crate::sync::within;

/// Bands of 1 MiB chunks before 8 MiB ones are asked for, and of those before 64 MiB ones: an eighth of what the
/// next size takes. Guessed.
const SMALL_BANDS: u32 = 8;

impl Core {
    /// Sees to it that a band will be ready. Asks at most once at a time.
    pub(crate) fn ask_for_bands(self: &Rc<Self>, stream: &Stream) {
        if self.is_over() || stream.asking.replace(true) {
            return;
        }
        let core = Rc::clone(self);
        let purpose = stream.purpose;
        self.spawn(async move {
            core.ask(purpose).await;
        });
    }

    async fn ask(self: &Rc<Self>, purpose: BandPurpose) {
        let stream = self.stream(purpose);
        let mut size = self.chunk_size(stream);
        loop {
            if self.is_over() {
                return;
            }
            let freed = self.space.freed.changed();
            let answer = self
                .seams
                .directory
                .grant_bands(self.volume, self.epoch, size, 1, purpose)
                .await;
            match answer {
                Ok(bands) => {
                    for band in bands {
                        self.counters.bands_granted.add(1);
                        stream.granted.set(stream.granted.get() + 1);
                        let band = self.add_band(band, Phase::Granted);
                        stream.ready.borrow_mut().push_back(band);
                    }
                    stream.no_space.set(false);
                    stream.starved_since.set(None);
                    self.space.hope();
                    break;
                }
                Err(error) if self.directory_error(&error).is_some() => return,
                Err(DirectoryError::NoSpace | DirectoryError::TooFewDomains { .. })
                    if size != ChunkSize::Mib1 =>
                {
                    size = match size {
                        ChunkSize::Mib64 => ChunkSize::Mib8,
                        ChunkSize::Mib8 | ChunkSize::Mib1 => ChunkSize::Mib1,
                    };
                    continue;
                }
                Err(error) => {
                    if error == DirectoryError::NoSpace {
                        stream.no_space.set(true);
                        // Searched already, and nothing was trimmed, granted or freed since.
                        if !self.space.is_exhausted() {
                            self.space.request();
                            self.worth_compacting.notify();
                        }
                    }
                    // The waiters look at what was learnt, then this is asked again: space comes back.
                    self.changed.notify();
                    self.pump.notify();
                    // At once when something was freed here; from time to time because others free something too.
                    let deadline = self.seams.env.now().after(self.settings.retry * 5);
                    let _ = within(&*self.seams.env, deadline, Box::pin(freed)).await;
                    if stream.queue.borrow().is_empty() {
                        break;
                    }
                }
            }
        }
        stream.asking.set(false);
        self.changed.notify();
        self.pump.notify();
    }

    fn chunk_size(&self, stream: &Stream) -> ChunkSize {
        let grown = match stream.granted.get() {
            0..SMALL_BANDS => ChunkSize::Mib1,
            granted if granted < 2 * SMALL_BANDS => ChunkSize::Mib8,
            _ => ChunkSize::Mib64,
        };
        let by_size = ChunkSize::for_volume(self.size_bytes.get(), self.geometry);
        grown.min(by_size).min(self.settings.chunk_size_max)
    }

    /// Gives back what was granted and never opened.
    pub(crate) async fn return_unused(self: &Rc<Self>) {
        let unused: Vec<BandId> = [&self.host, &self.internal]
            .into_iter()
            .flat_map(|stream| stream.ready.take())
            .map(|band| band.id)
            .collect();
        if unused.is_empty() {
            return;
        }
        for band in &unused {
            self.bands.borrow_mut().remove(band);
        }
        let answer = self
            .seams
            .directory
            .return_bands(self.volume, self.epoch, unused)
            .await;
        if let Err(error) = answer {
            // They stay granted; the next owner frees them.
            self.directory_error(&error);
        }
    }
}
