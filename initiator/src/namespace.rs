//! A namespace of a controller as a block device.
//!
//! Commands start when they are asked for, as the block contract wants it. Transfers longer than the controller takes
//! are split; all parts are waited for before an error is told, so that nothing takes effect after it. Data is moved
//! where it lies: writes leave from the caller's buffers, a read that one C2HData answers is lent from the buffer it
//! was received in.
//!
//! What it does not do: wait for a lost controller, retry, order overlapping writes.
//!
//! NVM Command Set Specification 1.0, "NVM Commands".

mod parts;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use futures_util::future::join_all;
use weft_block::{BlockDevice, BlockError, DeviceInfo, Durability, Io};
use weft_proto::nvme::command::{DsmRange, submit};
use weft_proto::nvme::identify::{IdentifyNamespace, rescap};
use weft_proto::nvme::sqe::Sqe;
use weft_proto::nvme::status::Status;
use weft_proto::units::{BlockCount, Lba, LbaRange};
use zerocopy::IntoBytes;

use self::parts::{Failure, Outcomes, Started, some_at_a_time};
use crate::controller::Controller;
use crate::metrics::Op;
use crate::options::AdminError;
use crate::qpair::{Payload, TRANSFER_BYTES_MAX, scattered_len, slice_scattered};
use crate::status::{Effect, Subject};

/// A namespace through one controller.
#[derive(Debug)]
pub struct Namespace {
    controller: Rc<Controller>,
    nsid: u32,
    uuid: Option<[u8; 16]>,
    anagrpid: u32,
    rescap: u8,
    info: Cell<DeviceInfo>,
}

impl Namespace {
    /// `None` if the format is not whole blocks of 512 or 4096 bytes without metadata.
    pub(crate) fn new(
        controller: Rc<Controller>,
        nsid: u32,
        identity: &IdentifyNamespace,
        uuid: Option<[u8; 16]>,
    ) -> Option<Rc<Self>> {
        let info = device_info(&controller, identity)?;
        Some(Rc::new(Self {
            controller,
            nsid,
            uuid,
            anagrpid: identity.anagrpid.get(),
            rescap: identity.rescap,
            info: Cell::new(info),
        }))
    }

    /// Its identifier on this controller's subsystem.
    #[must_use]
    pub fn nsid(&self) -> u32 {
        self.nsid
    }

    /// Its UUID or NGUID.
    #[must_use]
    pub fn uuid(&self) -> Option<[u8; 16]> {
        self.uuid
    }

    /// Its ANA group.
    #[must_use]
    pub fn anagrpid(&self) -> u32 {
        self.anagrpid
    }

    /// Whether its registrations can persist through power loss (RESCAP).
    #[must_use]
    pub fn reservations_persist(&self) -> bool {
        self.rescap & rescap::PTPL != 0
    }

    /// Its controller.
    #[must_use]
    pub fn controller(&self) -> &Rc<Controller> {
        &self.controller
    }

    /// Reads size and properties again, after a Namespace Attribute Changed event.
    ///
    /// # Errors
    /// [`AdminError`]; also if the block size changed, which no device may.
    pub async fn refresh(&self) -> Result<DeviceInfo, AdminError> {
        let identity = self.controller.identify_namespace(self.nsid).await?;
        match device_info(&self.controller, &identity) {
            Some(info) if info.block_bytes == self.info.get().block_bytes => {
                self.info.set(info);
                Ok(info)
            }
            _ => Err(AdminError::Malformed {
                command: "Identify Namespace",
            }),
        }
    }

    /// Whether the blocks at `start` hold `data`.
    pub fn compare(&self, start: Lba, data: Vec<Bytes>) -> Io<bool> {
        let range = match self.range_of(start, &data) {
            Ok(range) if range.count == 0 => return Io::ready(Ok(true)),
            Ok(range) => range,
            Err(error) => return Io::ready(Err(error)),
        };
        let parts: Vec<_> = self
            .parts(range)
            .map(|(at, count)| {
                let payload = Payload::Out(self.piece(&data, range.start, at, count));
                let sqe = submit::compare(self.nsid, at, count);
                self.start(Op::Compare, Effect::None, range, sqe, payload)
            })
            .collect();
        Io::running(async move {
            let mut equal = true;
            for outcome in join_all(parts).await {
                match outcome {
                    Ok(_) => {}
                    Err(Failure::Status(status, _)) if status.code() == Status::COMPARE_FAILURE => {
                        equal = false
                    }
                    Err(failure) => return Err(failure.into()),
                }
            }
            Ok(equal)
        })
    }

    /// Has the controller check that `range` can be read, without moving it.
    pub fn verify(&self, range: LbaRange) -> Io<()> {
        if let Err(error) = self.check(range) {
            return Io::ready(Err(error));
        }
        self.each_part(range, Op::Verify, Effect::None, |namespace, at, count| {
            (submit::verify(namespace.nsid, at, count), Payload::None)
        })
    }

    /// Starts one command.
    fn start(&self, op: Op, effect: Effect, range: LbaRange, sqe: Sqe, payload: Payload) -> Started {
        let info = self.info.get();
        let subject = Subject {
            effect,
            start: range.start,
            count: range.count,
            blocks: info.blocks,
            block_bytes: info.block_bytes,
        };
        let bytes = match &payload {
            Payload::None => 0,
            Payload::Out(data) => scattered_len(data),
            Payload::In(bytes) => *bytes,
        };
        let asked = if matches!(payload, Payload::In(_)) {
            bytes
        } else {
            0
        };
        let at = Instant::now();
        Started {
            answer: self.controller.submit_io(sqe, payload, at),
            controller: self.controller.clone(),
            op,
            subject,
            bytes,
            asked,
            at,
        }
    }

    /// Runs a command over each part of a range that may be as long as the device, some at a time.
    fn each_part(
        &self,
        range: LbaRange,
        op: Op,
        effect: Effect,
        command: impl Fn(&Handle, Lba, BlockCount) -> (Sqe, Payload) + 'static,
    ) -> Io<()> {
        let namespace = self.handle();
        let mut parts = self.parts(range);
        some_at_a_time(move || {
            let (at, count) = parts.next()?;
            let (sqe, payload) = command(&namespace, at, count);
            let part = LbaRange {
                start: at,
                count: u64::from(count.get()),
            };
            Some(namespace.device.start(op, effect, part, sqe, payload))
        })
    }

    /// A copy of this device's identity that a future can own.
    fn handle(&self) -> Handle {
        Handle {
            nsid: self.nsid,
            device: Rc::new(Self {
                controller: self.controller.clone(),
                nsid: self.nsid,
                uuid: self.uuid,
                anagrpid: self.anagrpid,
                rescap: self.rescap,
                info: self.info.clone(),
            }),
        }
    }

    /// The commands that cover `range`: (start, count) of each.
    fn parts(&self, range: LbaRange) -> impl Iterator<Item = (Lba, BlockCount)> + use<> {
        let info = self.info.get();
        let blocks_max = (self.controller.info().transfer_bytes_max / info.block_bytes).clamp(1, 1 << 16);
        let mut done = 0;
        std::iter::from_fn(move || {
            let left = (range.count - done).min(u64::from(blocks_max));
            let count = BlockCount::new(u32::try_from(left).ok()?)?;
            let at = Lba(range.start.0 + done);
            done += left;
            Some((at, count))
        })
    }

    /// The part of `data` (which starts at `start`) that belongs to `count` blocks at `at`.
    fn piece(&self, data: &[Bytes], start: Lba, at: Lba, count: BlockCount) -> Vec<Bytes> {
        let block_bytes = self.info.get().block_bytes as usize;
        let offset = (at.0 - start.0) as usize * block_bytes;
        slice_scattered(data, offset, count.get() as usize * block_bytes)
    }

    fn check(&self, range: LbaRange) -> Result<(), BlockError> {
        let blocks = self.info.get().blocks;
        if range.is_within(blocks) {
            return Ok(());
        }
        Err(BlockError::OutOfRange {
            start: range.start,
            count: range.count,
            blocks,
        })
    }

    fn check_transfer(&self, bytes: u64) -> Result<(), BlockError> {
        let block_bytes = self.info.get().block_bytes;
        if bytes.is_multiple_of(u64::from(block_bytes)) && bytes <= u64::from(TRANSFER_BYTES_MAX) {
            return Ok(());
        }
        Err(BlockError::InvalidLength { bytes, block_bytes })
    }

    fn range_of(&self, start: Lba, data: &[Bytes]) -> Result<LbaRange, BlockError> {
        let bytes: u64 = data.iter().map(|piece| piece.len() as u64).sum();
        self.check_transfer(bytes)?;
        let range = LbaRange {
            start,
            count: bytes / u64::from(self.info.get().block_bytes),
        };
        self.check(range)?;
        Ok(range)
    }

    /// FUA only where a cache would make a difference: some controllers flush everything for it.
    fn fua(&self, durability: Durability) -> bool {
        durability == Durability::Durable && self.info.get().volatile_write_cache
    }
}

/// What the parts of an operation need when they start later.
struct Handle {
    nsid: u32,
    device: Rc<Namespace>,
}

impl BlockDevice for Namespace {
    fn info(&self) -> DeviceInfo {
        self.info.get()
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        let bytes = range.count.saturating_mul(u64::from(self.info.get().block_bytes));
        if let Err(error) = self.check(range).and_then(|()| self.check_transfer(bytes)) {
            return Io::ready(Err(error));
        }
        let start = |(at, count): (Lba, BlockCount)| {
            let payload = Payload::In(count.get() * self.info.get().block_bytes);
            let part = LbaRange {
                start: at,
                count: u64::from(count.get()),
            };
            let sqe = submit::read(self.nsid, at, count);
            self.start(Op::Read, Effect::None, part, sqe, payload)
        };
        let mut parts = self.parts(range);
        let Some(first) = parts.next().map(&start) else {
            return Io::ready(Ok(Bytes::new()));
        };
        let Some(second) = parts.next() else {
            return Io::running(first.map(|outcome| Ok(outcome?.data)));
        };
        let parts: Vec<_> = std::iter::once(second).chain(parts).map(&start).collect();
        Io::running(async move {
            let mut data = BytesMut::with_capacity(bytes as usize);
            data.extend_from_slice(&first.await?.data);
            for part in parts {
                data.extend_from_slice(&part.await?.data);
            }
            Ok(data.freeze())
        })
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        let range = match self.range_of(start, &data) {
            Ok(range) => range,
            Err(error) => return Io::ready(Err(error)),
        };
        let fua = self.fua(durability);
        let mut parts = self.parts(range).peekable();
        let Some((at, count)) = parts.next() else {
            return Io::ready(Ok(()));
        };
        if parts.peek().is_none() {
            let sqe = submit::write(self.nsid, at, count, fua);
            let whole = self.start(Op::Write, Effect::Writes, range, sqe, Payload::Out(data));
            return Io::running(whole.map(|outcome| Ok(outcome.map(drop)?)));
        }
        let started: Vec<_> = std::iter::once((at, count))
            .chain(parts)
            .map(|(at, count)| {
                let payload = Payload::Out(self.piece(&data, start, at, count));
                let sqe = submit::write(self.nsid, at, count, fua);
                self.start(Op::Write, Effect::Writes, range, sqe, payload)
            })
            .collect();
        Io::running(async move {
            let mut result = Outcomes::default();
            for outcome in join_all(started).await {
                result.add(outcome.map(drop));
            }
            result.finish()
        })
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        if let Err(error) = self.check(range) {
            return Io::ready(Err(error));
        }
        let fua = self.fua(durability);
        if self.controller.info().write_zeroes {
            return self.each_part(
                range,
                Op::WriteZeroes,
                Effect::Writes,
                move |namespace, at, count| {
                    let sqe = submit::write_zeroes(namespace.nsid, at, count, deallocate, fua);
                    (sqe, Payload::None)
                },
            );
        }
        // A controller without the command gets the zeroes.
        static ZEROES: [u8; TRANSFER_BYTES_MAX as usize] = [0; TRANSFER_BYTES_MAX as usize];
        let block_bytes = self.info.get().block_bytes;
        self.each_part(range, Op::Write, Effect::Writes, move |namespace, at, count| {
            let zeroes = Bytes::from_static(&ZEROES[..(count.get() * block_bytes) as usize]);
            let sqe = submit::write(namespace.nsid, at, count, fua);
            (sqe, Payload::Out(vec![zeroes]))
        })
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        for range in &ranges {
            if let Err(error) = self.check(*range) {
                return Io::ready(Err(error));
            }
        }
        let limits = self.controller.info();
        if !limits.dataset_management {
            // A hint that the controller cannot take.
            return Io::ready(Ok(()));
        }
        let entries = dsm_ranges(&ranges, limits.dsm_range_blocks_max);
        let nsid = self.nsid;
        let namespace = self.handle();
        let per_command = usize::from(limits.dsm_ranges_max.clamp(1, 256));
        let commands: Vec<Vec<DsmRange>> = entries.chunks(per_command).map(<[DsmRange]>::to_vec).collect();
        let mut commands = commands.into_iter();
        some_at_a_time(move || {
            let ranges = commands.next()?;
            let about = LbaRange {
                start: Lba(ranges[0].slba.get()),
                count: u64::from(ranges[0].nlb.get()),
            };
            let sqe = submit::deallocate(nsid, u16::try_from(ranges.len()).unwrap_or(u16::MAX));
            let payload = Payload::Out(vec![Bytes::copy_from_slice(ranges.as_bytes())]);
            Some(
                namespace
                    .device
                    .start(Op::Deallocate, Effect::Writes, about, sqe, payload),
            )
        })
    }

    fn flush(&self) -> Io<()> {
        if !self.info.get().volatile_write_cache {
            return Io::ready(Ok(()));
        }
        let whole = LbaRange {
            start: Lba(0),
            count: 0,
        };
        let sqe = submit::flush(self.nsid);
        let flush = self.start(Op::Flush, Effect::Writes, whole, sqe, Payload::None);
        Io::running(async move {
            flush.await?;
            Ok(())
        })
    }
}

/// The ranges of Dataset Management commands, empty ones left out and long ones cut.
fn dsm_ranges(ranges: &[LbaRange], blocks_max: u32) -> Vec<DsmRange> {
    let mut entries = Vec::new();
    for range in ranges {
        let mut done = 0;
        while done < range.count {
            let count = (range.count - done).min(u64::from(blocks_max.max(1)));
            entries.push(DsmRange {
                cattr: 0.into(),
                nlb: (count as u32).into(),
                slba: (range.start.0 + done).into(),
            });
            done += count;
        }
    }
    entries
}

fn device_info(controller: &Controller, identity: &IdentifyNamespace) -> Option<DeviceInfo> {
    /// DLFEAT bits 2:0: deallocated blocks read as zeroes.
    const READS_ZERO: u8 = 1;
    let block_bytes = identity.block_bytes()?;
    let index = usize::from(identity.flbas & 0xf) | usize::from(identity.flbas >> 5 & 0x3) << 4;
    let metadata_bytes = identity.lbaf.get(index)?.ms.get();
    if !matches!(block_bytes, 512 | 4096) || metadata_bytes != 0 {
        return None;
    }
    Some(DeviceInfo {
        block_bytes,
        blocks: identity.nsze.get(),
        transfer_bytes_max: TRANSFER_BYTES_MAX,
        volatile_write_cache: controller.info().volatile_write_cache,
        deallocated_reads_zero: identity.dlfeat & 0x7 == READS_ZERO,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_longer_than_a_command_takes_are_cut() {
        let ranges = [
            LbaRange {
                start: Lba(5),
                count: 10,
            },
            LbaRange {
                start: Lba(100),
                count: 0,
            },
            LbaRange {
                start: Lba(200),
                count: 4,
            },
        ];
        let cut: Vec<_> = dsm_ranges(&ranges, 4)
            .iter()
            .map(|range| (range.slba.get(), range.nlb.get()))
            .collect();
        assert_eq!(cut, [(5, 4), (9, 4), (13, 2), (200, 4)]);
    }
}
