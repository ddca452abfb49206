//! How many round trips to the drives a write waits for, counted and not timed: the owner's part of `weft bench
//! cluster`'s latency at depth 1.
//!
//! A drive's command that is sent after others were answered may have waited for them, so it stands one trip further
//! down the chain than the longest of those; commands that are sent together stand side by side. A write whose data
//! does not fit its capsule takes two trips, since the target asks for the data first. What counts for a host's write is
//! the longest chain that was complete when the write was.
//!
//! With one write outstanding at a time a chain can be longer than what the write waited for, when background work got
//! in between, but never shorter.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::Context as _;
use bytes::Bytes;
use tokio::task::LocalSet;
use weft_block::{BlockDevice, Device, DeviceInfo, Durability, Io};
use weft_initiator::RemoteDrive;
use weft_proto::band::Geometry;
use weft_proto::units::{Lba, LbaRange, MIB};
use weft_volume::settings::Settings;

use super::floor::noise;
use super::peer::connect_drives;
use super::world::World;

/// Of the volume that is written to.
const VOLUME_BYTES: u64 = 16 * MIB;

/// Writes that are counted.
const WRITES: u64 = 500;

/// What a write asked of the drives.
pub(super) struct WriteTrips {
    /// The longest chain of 99 % of the writes.
    pub(super) trips: u64,
    /// Commands of a write, on average.
    pub(super) commands: f64,
}

/// Writes blocks one after the other to a volume on these drives, which nobody else uses.
///
/// # Errors
/// A drive cannot be reached, or the engine refuses a write.
pub(super) fn count(geometry: Geometry, addresses: &[SocketAddr]) -> anyhow::Result<WriteTrips> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, async {
        let chain = Rc::new(Chain::default());
        let drives = connect_drives(addresses).await?;
        let devices = drives.into_iter().map(|drive| Tracked::device(drive, &chain));
        let world = World::new(geometry, devices.collect());
        let engine = world.open(Settings::default(), VOLUME_BYTES).await?;
        let payload = Bytes::from(noise(4096));
        let mut trips = Vec::new();
        let mut commands = 0;
        for index in 0..WRITES {
            let lba = Lba(index * 37 % engine.info().blocks);
            chain.begin();
            engine
                .write(lba, vec![payload.clone()], Durability::Durable)
                .await
                .context("a write at depth 1")?;
            trips.push(chain.trips.get());
            commands += chain.commands.get();
        }
        engine.abort();
        trips.sort_unstable();
        Ok(WriteTrips {
            trips: trips[trips.len() * 99 / 100],
            commands: commands as f64 / WRITES as f64,
        })
    })
}

/// What has been answered since a write began.
#[derive(Default)]
struct Chain {
    /// Of the longest chain.
    trips: Cell<u64>,
    commands: Cell<u64>,
}

impl Chain {
    fn begin(&self) {
        self.trips.set(0);
        self.commands.set(0);
    }

    /// Follows a command that takes `trips` by itself.
    fn follow<T: 'static>(self: &Rc<Self>, trips: u64, command: Io<T>) -> Io<T> {
        let chain = Rc::clone(self);
        self.commands.set(self.commands.get() + 1);
        let end = self.trips.get() + trips;
        Io::running(async move {
            let answer = command.await;
            chain.trips.set(chain.trips.get().max(end));
            answer
        })
    }
}

/// A remote drive whose commands are followed.
struct Tracked {
    drive: Rc<RemoteDrive>,
    chain: Rc<Chain>,
}

impl Tracked {
    fn device(drive: Rc<RemoteDrive>, chain: &Rc<Chain>) -> Device {
        Rc::new(Self {
            drive,
            chain: Rc::clone(chain),
        })
    }

    fn trips_of_write(&self, bytes: usize) -> u64 {
        let controller = self.drive.controller();
        let in_capsule = controller.is_some_and(|found| bytes <= found.info().capsule_bytes_max as usize);
        if in_capsule { 1 } else { 2 }
    }
}

impl BlockDevice for Tracked {
    fn info(&self) -> DeviceInfo {
        self.drive.info()
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.chain.follow(1, self.drive.read(range))
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        let trips = self.trips_of_write(data.iter().map(Bytes::len).sum());
        self.chain
            .follow(trips, self.drive.write(start, data, durability))
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.chain
            .follow(1, self.drive.write_zeroes(range, deallocate, durability))
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.chain.follow(1, self.drive.deallocate(ranges))
    }

    fn flush(&self) -> Io<()> {
        self.chain.follow(1, self.drive.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn commands_sent_together_are_one_trip_and_one_after_an_answer_is_another() {
        let chain = Rc::new(Chain::default());
        chain.begin();
        let answered = || Io::ready(Ok(()));
        let together = [chain.follow(1, answered()), chain.follow(1, answered())];
        for command in together {
            command.await.unwrap();
        }
        assert_eq!((chain.trips.get(), chain.commands.get()), (1, 2));
        chain.follow(2, answered()).await.unwrap();
        assert_eq!(chain.trips.get(), 3);
        chain.begin();
        assert_eq!((chain.trips.get(), chain.commands.get()), (0, 0));
    }
}
