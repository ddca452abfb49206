//! Drives as one incarnation reaches them: as block devices, under its name.

use std::rc::{Rc, Weak};

use bytes::Bytes;
use weft_block::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};
use weft_proto::id::{DriveId, IncarnationId};
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

use super::{Health, Kind, Reply, SimDrive};
use crate::seams::Drives;
use crate::testing::answer::answer;
use crate::testing::world::World;

/// A drive as one incarnation reaches it.
pub(super) struct Handle {
    pub(super) drive: Rc<SimDrive>,
    pub(super) incarnation: IncarnationId,
}

fn refused<T: 'static>(error: BlockError) -> Io<T> {
    Io::ready(Err(error))
}

impl BlockDevice for Handle {
    fn info(&self) -> DeviceInfo {
        self.drive.info()
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        if let Err(error) = self.drive.check_transfer(range) {
            return refused(error);
        }
        let (giver, bytes) = answer();
        self.drive
            .submit(self.incarnation, Kind::Read(range), Reply::Bytes(giver));
        Io::running(bytes)
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        let length: usize = data.iter().map(Bytes::len).sum();
        if !length.is_multiple_of(BLOCK_BYTES) {
            return refused(BlockError::InvalidLength {
                bytes: length as u64,
                block_bytes: BLOCK_BYTES as u32,
            });
        }
        let count = (length / BLOCK_BYTES) as u64;
        if let Err(error) = self.drive.check_transfer(LbaRange { start, count }) {
            return refused(error);
        }
        let whole = data.iter().all(|piece| piece.len().is_multiple_of(BLOCK_BYTES));
        let pieces = if whole {
            data
        } else {
            vec![Bytes::from(data.concat())]
        };
        let blocks = |mut piece: Bytes| {
            let count = piece.len() / BLOCK_BYTES;
            (0..count).map(move |_| Some(piece.split_to(BLOCK_BYTES)))
        };
        let blocks = pieces.into_iter().flat_map(blocks).collect();
        self.drive.write(self.incarnation, start.0, blocks, durability)
    }

    fn write_zeroes(&self, range: LbaRange, _deallocate: bool, durability: Durability) -> Io<()> {
        if let Err(error) = self.drive.check(range) {
            return refused(error);
        }
        let blocks = (0..range.count).map(|_| None).collect();
        self.drive
            .write(self.incarnation, range.start.0, blocks, durability)
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        if let Some(error) = ranges.iter().find_map(|range| self.drive.check(*range).err()) {
            return refused(error);
        }
        let writes: Vec<Io<()>> = ranges
            .into_iter()
            .map(|range| self.write_zeroes(range, true, Durability::Cached))
            .collect();
        Io::running(async move {
            for write in writes {
                write.await?;
            }
            Ok(())
        })
    }

    fn flush(&self) -> Io<()> {
        let (giver, done) = answer();
        self.drive
            .submit(self.incarnation, Kind::Flush, Reply::Done(giver));
        Io::running(done)
    }
}

/// [`Drives`] as one incarnation reaches them.
pub struct SimDrives {
    world: Weak<World>,
    incarnation: IncarnationId,
}

impl SimDrives {
    /// Every drive of `world`, with the identity of `incarnation`.
    #[must_use]
    pub fn new(world: &Rc<World>, incarnation: IncarnationId) -> Rc<Self> {
        Rc::new(Self {
            world: Rc::downgrade(world),
            incarnation,
        })
    }
}

impl Drives for SimDrives {
    fn device(&self, drive: DriveId) -> Option<Device> {
        let drive = self.world.upgrade()?.find_drive(drive)?;
        let reachable = {
            let state = drive.state.borrow();
            state.health != Health::Dead && !state.cut.contains(&self.incarnation)
        };
        reachable.then(|| drive.handle(self.incarnation))
    }
}
