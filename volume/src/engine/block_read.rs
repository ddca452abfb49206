//! The read of one block that is where the map says it is: nearly every read of a host that reads at random.
//!
//! Hundreds of them wait at once, so what one of them holds is kept small, and it is looked at twice: when its answer is first
//! asked for, and when that has come. Whatever is out of the ordinary is left to [`super::read`], in a box of its own.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_block::{BlockError, Io};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{DriveId, Sequence};
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use super::Core;
use crate::format::checksum::block_crc;
use crate::seams::Timestamp;
use crate::sync::{Patience, started};

/// A block that was asked of the drive that the map names.
pub(super) struct BlockRead {
    core: Rc<Core>,
    lba: Lba,
    sequence: Sequence,
    crc: u32,
    drive: DriveId,
    arrived: Timestamp,
    /// Its band is not freed meanwhile.
    pin: Rc<()>,
}

impl BlockRead {
    /// Starts it, without a read of the map. `None` where it takes more than that, which is for [`Core::read_range`].
    pub(super) fn start(core: &Rc<Core>, lba: Lba, arrived: Timestamp) -> Option<Io<Bytes>> {
        let entry = core.map().lookup_cached(lba)?.entry()?;
        let band = core.band(entry.band)?;
        let drive = band.chunk(entry.column)?.drive;
        let (device, range) = core.rows(&band, entry.column, entry.row, 1)?;
        core.counters.drive_reads.add(1);
        let io = device.read(range);
        let read = Self {
            core: Rc::clone(core),
            lba,
            sequence: entry.sequence,
            crc: entry.crc,
            drive,
            arrived,
            pin: Rc::clone(&band.pin),
        };
        Some(match io.take_ready() {
            Ok(answer) => match read.judge(Some(answer)) {
                Ok(bytes) => Io::ready(Ok(bytes)),
                Err(general) => started(general),
            },
            Err(io) => Io::running(Waiting::Asked {
                read,
                io,
                patience: None,
            }),
        })
    }

    /// What the host is told of the drive's answer, or of none in all the time there was; otherwise the general way to tell it.
    fn judge(
        &self,
        answer: Option<Result<Bytes, BlockError>>,
    ) -> Result<Bytes, LocalBoxFuture<'static, Result<Bytes, BlockError>>> {
        let (core, range) = (
            &self.core,
            LbaRange {
                start: self.lba,
                count: 1,
            },
        );
        let sound = match answer {
            Some(Ok(bytes)) if self.is_sound(&bytes) => {
                let now = core.seams.env.now();
                if core.accepts() && core.is_leased_at(now) {
                    core.count_read(range, self.arrived, now);
                    return Ok(bytes);
                }
                Some(bytes)
            }
            Some(Ok(_)) => None,
            Some(Err(error)) => {
                if !core.is_over() {
                    core.drive_error(self.drive, &error);
                }
                None
            }
            None => {
                core.suspect(self.drive);
                None
            }
        };
        let (core, arrived, pin) = (Rc::clone(core), self.arrived, Rc::clone(&self.pin));
        Err(async move {
            let result = match sound {
                Some(bytes) => Ok(bytes),
                None => core.read_range(range).await,
            };
            drop(pin);
            core.answer(range, result, arrived).await
        }
        .boxed_local())
    }

    /// Whether these are the bytes that were asked for.
    fn is_sound(&self, bytes: &[u8]) -> bool {
        let crc = block_crc(self.core.volume, self.lba, self.sequence, bytes);
        bytes.len() == BLOCK_BYTES && (crc == self.crc || planted(Bug::ForgetChecksum))
    }
}

/// For the drive, or for the general way.
enum Waiting {
    Asked {
        read: BlockRead,
        io: Io<Bytes>,
        /// As soon as the answer was looked for.
        patience: Option<Patience>,
    },
    General(LocalBoxFuture<'static, Result<Bytes, BlockError>>),
}

impl Future for Waiting {
    type Output = Result<Bytes, BlockError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let (read, io, patience) = match &mut *self {
            Self::Asked { read, io, patience } => (read, io, patience),
            Self::General(general) => return general.as_mut().poll(context),
        };
        let answer = match Pin::new(io).poll(context) {
            Poll::Ready(answer) => Some(answer),
            Poll::Pending => {
                let (env, stall) = (&*read.core.seams.env, read.core.settings.read_stall);
                let patience = patience.get_or_insert_with(|| Patience::new(env, read.arrived, stall));
                ready!(patience.poll(env, context));
                None
            }
        };
        match read.judge(answer) {
            Ok(bytes) => Poll::Ready(Ok(bytes)),
            Err(general) => {
                *self = Self::General(general);
                self.poll(context)
            }
        }
    }
}
