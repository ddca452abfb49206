//! One association and its commands: every operation, in pieces of any size, beyond the depth of the queues; what is refused
//! before it is sent, and what a device's errors mean to a host.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::join_all;
use weft_block::faulty::{Fault, Ops};
use weft_block::memory::MemoryDrive;
use weft_block::{BlockDevice, BlockError, Device, DeviceInfo, Durability, Io};
use weft_initiator::{ConnectOptions, Controller};
use weft_proto::nvme::log::AnaState;
use weft_proto::units::{Lba, LbaRange};

use crate::rig::{Node, UUID, faulty_node, memory_node, options, pattern, range, run};

const MIB: usize = 1 << 20;

#[test]
fn every_operation_does_what_it_says() {
    run(async {
        for (header_digest, data_digest, io_queues, block_bytes) in [
            (false, false, 1, 4096),
            (true, false, 2, 512),
            (false, true, 3, 4096),
            (true, true, 1, 512),
        ] {
            let device = MemoryDrive::new(block_bytes, (64 << 20) / u64::from(block_bytes));
            let node = Node::start(device, AnaState::OPTIMIZED).await;
            let controller = Controller::connect(ConnectOptions {
                header_digest,
                data_digest,
                io_queues,
                ..options(node.address)
            })
            .await
            .unwrap();
            assert_eq!(controller.info().io_queues, io_queues);
            let namespace = controller.namespace(1).await.unwrap();
            assert_eq!(namespace.uuid(), Some(UUID));
            let info = namespace.info();
            assert_eq!((info.block_bytes, info.bytes()), (block_bytes, 64 << 20));

            // In the capsule, by R2T, and with several pieces cut anywhere.
            for (seed, blocks) in [(1, 1), (2, 2), (3, 16), (4, 200)] {
                let data = pattern(seed, blocks as usize * block_bytes as usize);
                let cut = data.len() / 3 + 1;
                let pieces = vec![data.slice(..cut), data.slice(cut..)];
                let at = Lba(seed * 1000);
                namespace
                    .write(at, pieces.clone(), Durability::Durable)
                    .await
                    .unwrap();
                assert_eq!(namespace.read(range(at.0, blocks)).await.unwrap(), data);
                assert!(namespace.compare(at, pieces).await.unwrap());
                let mut other = data.to_vec();
                *other.last_mut().unwrap() ^= 1;
                assert!(!namespace.compare(at, vec![other.into()]).await.unwrap());
                namespace.verify(range(at.0, blocks)).await.unwrap();
            }
            let zeroes = |blocks: usize| Bytes::from(vec![0; blocks * block_bytes as usize]);
            namespace
                .write_zeroes(range(3000, 8), false, Durability::Durable)
                .await
                .unwrap();
            assert_eq!(namespace.read(range(3000, 8)).await.unwrap(), zeroes(8));
            assert_eq!(
                namespace.read(range(3008, 8)).await.unwrap(),
                pattern(3, 16 * block_bytes as usize).slice(8 * block_bytes as usize..)
            );
            namespace
                .deallocate(vec![range(3000, 16), range(4000, 200), range(5000, 0)])
                .await
                .unwrap();
            assert_eq!(namespace.read(range(4000, 200)).await.unwrap(), zeroes(200));
            namespace.flush().await.unwrap();
            // The whole device, in as many commands as it takes.
            namespace
                .write_zeroes(range(0, info.blocks), true, Durability::Durable)
                .await
                .unwrap();
            assert_eq!(namespace.read(range(1000, 1)).await.unwrap(), zeroes(1));
            assert_eq!(controller.outstanding(), 0);
            controller.disconnect().await;
            node.kill().await;
        }
    });
}

#[test]
fn a_mebibyte_travels_whole_both_ways() {
    run(async {
        let node = memory_node().await;
        for digests in [false, true] {
            let controller = Controller::connect(ConnectOptions {
                header_digest: digests,
                data_digest: digests,
                ..options(node.address)
            })
            .await
            .unwrap();
            let namespace = controller.namespace(1).await.unwrap();
            let writes = (0..8).map(|index| {
                let data = pattern(index, MIB);
                let pieces = data.chunks(100_000).map(|piece| data.slice_ref(piece)).collect();
                namespace.write(Lba(index * 256), pieces, Durability::Durable)
            });
            for outcome in join_all(writes).await {
                outcome.unwrap();
            }
            let reads = join_all((0..8).map(|index| namespace.read(range(index * 256, 256)))).await;
            for (index, data) in reads.into_iter().enumerate() {
                assert!(data.unwrap() == pattern(index as u64, MIB), "mebibyte {index}");
            }
        }
    });
}

#[test]
fn more_commands_than_the_queues_are_deep_wait_their_turn() {
    run(async {
        let node = memory_node().await;
        let controller = Controller::connect(ConnectOptions {
            io_queues: 4,
            queue_depth: 8,
            ..options(node.address)
        })
        .await
        .unwrap();
        let namespace = controller.namespace(1).await.unwrap();
        let writes = (0..1000)
            .map(|index| namespace.write(Lba(index), vec![pattern(index, 4096)], Durability::Durable));
        let writes: Vec<_> = writes.collect();
        assert_eq!(controller.outstanding(), 1000, "they start when they are made");
        assert!(join_all(writes).await.into_iter().all(|outcome| outcome.is_ok()));
        let reads = join_all((0..1000).map(|index| namespace.read(range(index, 1)))).await;
        for (index, data) in reads.into_iter().enumerate() {
            assert_eq!(data.unwrap(), pattern(index as u64, 4096));
        }
    });
}

#[test]
fn what_lies_outside_is_refused_before_it_is_sent() {
    run(async {
        let node = memory_node().await;
        let controller = Controller::connect(options(node.address)).await.unwrap();
        let namespace = controller.namespace(1).await.unwrap();
        let blocks = namespace.info().blocks;
        assert!(matches!(
            namespace.read(range(blocks, 1)).await,
            Err(BlockError::OutOfRange { .. })
        ));
        assert!(matches!(
            namespace
                .write(Lba(0), vec![Bytes::from(vec![0; 100])], Durability::Durable)
                .await,
            Err(BlockError::InvalidLength { bytes: 100, .. })
        ));
        assert!(matches!(
            namespace.read(range(0, 257)).await,
            Err(BlockError::InvalidLength { .. })
        ));
        assert_eq!(namespace.read(range(0, 0)).await, Ok(Bytes::new()));
        assert!(
            controller.namespace(2).await.is_err(),
            "there is no second namespace"
        );
    });
}

#[test]
fn a_device_s_errors_arrive_with_their_meaning() {
    run(async {
        let (node, faults) = faulty_node().await;
        let controller = Controller::connect(options(node.address)).await.unwrap();
        let namespace = controller.namespace(1).await.unwrap();
        let write = || namespace.write(Lba(5), vec![pattern(1, 4096)], Durability::Durable);
        for (told, heard) in [
            (BlockError::CapacityExceeded, BlockError::CapacityExceeded),
            (BlockError::WriteProtected, BlockError::WriteProtected),
            (BlockError::ReservationConflict, BlockError::ReservationConflict),
            (BlockError::NotReady, BlockError::NotReady),
            (BlockError::Unknown, BlockError::Unknown),
            (BlockError::Os { errno: 28 }, BlockError::Os { errno: 5 }),
        ] {
            faults.next(Ops::WRITE, 1, Fault::Fail(told));
            assert_eq!(write().await, Err(heard));
        }
        faults.next(
            Ops::READ,
            1,
            Fault::Fail(BlockError::Unrecovered { start: Lba(5) }),
        );
        assert_eq!(
            namespace.read(range(5, 1)).await,
            Err(BlockError::Unrecovered { start: Lba(5) })
        );
        faults.next(Ops::READ, 1, Fault::Fail(BlockError::Unknown));
        assert_eq!(namespace.read(range(5, 1)).await, Err(BlockError::NotReady));
        write().await.unwrap();
    });
}

/// A device with a volatile cache that remembers how it was written.
struct Caching {
    device: Device,
    durabilities: RefCell<Vec<Durability>>,
    flushes: Cell<u32>,
}

impl BlockDevice for Caching {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            volatile_write_cache: true,
            ..self.device.info()
        }
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.device.read(range)
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        self.durabilities.borrow_mut().push(durability);
        self.device.write(start, data, durability)
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.durabilities.borrow_mut().push(durability);
        self.device.write_zeroes(range, deallocate, durability)
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.device.deallocate(ranges)
    }

    fn flush(&self) -> Io<()> {
        self.flushes.set(self.flushes.get() + 1);
        self.device.flush()
    }
}

#[test]
fn durable_reaches_a_drive_with_a_volatile_cache() {
    run(async {
        let caching = Rc::new(Caching {
            device: MemoryDrive::device(1 << 20),
            durabilities: RefCell::default(),
            flushes: Cell::new(0),
        });
        let node = Node::start(caching.clone(), AnaState::OPTIMIZED).await;
        let controller = Controller::connect(options(node.address)).await.unwrap();
        assert!(controller.info().volatile_write_cache);
        let namespace = controller.namespace(1).await.unwrap();
        for durability in [Durability::Durable, Durability::Cached] {
            namespace
                .write(Lba(0), vec![pattern(1, 4096)], durability)
                .await
                .unwrap();
            namespace
                .write_zeroes(range(0, 1), false, durability)
                .await
                .unwrap();
        }
        let (durable, cached) = (Durability::Durable, Durability::Cached);
        assert_eq!(*caching.durabilities.borrow(), [durable, durable, cached, cached]);
        namespace.flush().await.unwrap();
        assert_eq!(caching.flushes.get(), 1);
    });
}
