//! Labels over devices: which copy counts, what is refused, and every point a change can be cut off at.

use std::cell::Cell;
use std::rc::Rc;

use super::*;
use crate::counted::Counted;
use crate::faulty::{Fault, Faulty, Ops, rot};
use crate::memory::MemoryDrive;
use crate::{BlockDevice, DeviceInfo, Io};

const SIZE: u64 = DRIVE_BYTES_MIN;
const LAST_BLOCK: Lba = Lba((SIZE - MIB) / 4096);

fn cluster(byte: u8) -> ClusterId {
    ClusterId([byte; 16])
}

fn label(bytes: u64) -> Label {
    let key = AuthenticationKey([9; 32]);
    Label::new(cluster(1), key, DriveUuid([2; 16]), DriveClass::Tlc, bytes).unwrap()
}

async fn formatted() -> (Device, Found) {
    let device = MemoryDrive::device(SIZE);
    let found = format(&device, &label(SIZE), Overwrite::Refused).await.unwrap();
    (device, found)
}

#[tokio::test]
async fn a_label_is_read_back_from_every_kind_of_device() {
    for block_bytes in [512, 4096] {
        let device: Device = MemoryDrive::new(block_bytes, SIZE / u64::from(block_bytes));
        let mut label = label(SIZE);
        label.body = Bytes::from(vec![5; BODY_BYTES_MAX]);
        let written = format(&device, &label, Overwrite::Refused).await.unwrap();
        assert_eq!(read(&device).await.unwrap(), written);
        assert_eq!((label.chunks_start_mib, label.chunks_end_mib), (1, 65));
    }
}

/// A third-party drive whose transfers are small.
struct SmallTransfers(Device);

impl BlockDevice for SmallTransfers {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            transfer_bytes_max: 64 << 10,
            ..self.0.info()
        }
    }
    fn read(&self, range: LbaRange) -> Io<Bytes> {
        assert!(self.info().check_read(range).is_ok());
        self.0.read(range)
    }
    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        assert!(self.info().check_write(start, &data).is_ok());
        self.0.write(start, data, durability)
    }
    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.0.write_zeroes(range, deallocate, durability)
    }
    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.0.deallocate(ranges)
    }
    fn flush(&self) -> Io<()> {
        self.0.flush()
    }
}

#[tokio::test]
async fn a_device_with_small_transfers_carries_a_label() {
    let device: Device = Rc::new(SmallTransfers(MemoryDrive::device(SIZE)));
    let mut label = label(SIZE);
    label.body = Bytes::from(vec![5; 300_001]);
    format(&device, &label, Overwrite::Refused).await.unwrap();
    assert_eq!(read(&device).await.unwrap().label, label);
}

#[tokio::test]
async fn an_empty_drive_has_no_label_and_a_small_one_no_room() {
    let device = MemoryDrive::device(SIZE);
    assert_eq!(read(&device).await, Err(LabelError::Absent));
    let small = Label::new(
        cluster(1),
        AuthenticationKey([0; 32]),
        DriveUuid([2; 16]),
        DriveClass::Scm,
        SIZE - 1,
    );
    let error = small.unwrap_err();
    assert_eq!(
        error,
        LabelError::TooSmall {
            bytes: SIZE - 1,
            minimum: SIZE
        }
    );
    assert!(error.to_string().contains(&SIZE.to_string()), "{error}");
}

#[tokio::test]
async fn another_clusters_drive_is_refused_with_both_names_and_nothing_is_written() {
    let (device, found) = formatted().await;
    let counted = Counted::new(device.clone());
    let device: Device = counted.clone();
    let error = open(&device, cluster(7)).await.unwrap_err();
    let expected = LabelError::OtherCluster {
        found: cluster(1),
        expected: cluster(7),
    };
    assert_eq!(error, expected);
    assert!(error.to_string().contains(&cluster(1).to_string()));
    assert!(error.to_string().contains(&cluster(7).to_string()));
    let refused = format(&device, &label(SIZE), Overwrite::Refused).await;
    assert!(
        matches!(refused, Err(LabelError::Formatted { .. })),
        "{refused:?}"
    );
    assert_eq!(counted.counts().writes + counted.counts().zeroes, 0);
    assert_eq!(read(&device).await.unwrap(), found);
}

#[tokio::test]
async fn a_drive_with_foreign_data_is_formatted_only_by_force() {
    let device = MemoryDrive::device(SIZE);
    rot(&device, Lba(17), 3).await.unwrap();
    let refused = format(&device, &label(SIZE), Overwrite::Refused).await;
    assert_eq!(refused, Err(LabelError::Foreign));
    assert_eq!(read(&device).await, Err(LabelError::Absent));
    format(&device, &label(SIZE), Overwrite::Forced).await.unwrap();
    assert!(read(&device).await.is_ok());
}

#[tokio::test]
async fn either_copy_alone_is_enough_and_repairs_the_other() {
    for (place, block) in [(CopyPlace::First, Lba(0)), (CopyPlace::Last, LAST_BLOCK)] {
        // In the magic, in the header, in the body.
        for (block, bit) in [(block, 0), (block, 8 * 900), (Lba(block.0 + 1), 3)] {
            let (device, mut found) = formatted().await;
            let mut label = found.label.clone();
            label.body = Bytes::from_static(b"some body");
            update(&device, &mut found, label).await.unwrap();
            rot(&device, block, bit).await.unwrap();
            let torn = read(&device).await.unwrap();
            assert_eq!(torn.worse, Some(place));
            assert_eq!(torn.label, found.label);
            assert_eq!(open(&device, cluster(1)).await.unwrap(), found);
            assert_eq!(read(&device).await.unwrap().worse, None);
        }
    }
}

#[tokio::test]
async fn an_unreadable_copy_is_damage_like_any_other() {
    let (device, found) = formatted().await;
    let (device, faults) = Faulty::wrap(device);
    let medium_error = Fault::Fail(BlockError::Unrecovered { start: Lba(0) });
    faults.next(Ops::READ, 1, medium_error);
    let read = read(&device).await.unwrap();
    assert_eq!((read.label, read.worse), (found.label, Some(CopyPlace::First)));
    faults.next(Ops::READ, 1, Fault::Fail(BlockError::NotReady));
    let error = super::read(&device).await.unwrap_err();
    assert_eq!(error, LabelError::Io(BlockError::NotReady));
}

#[tokio::test]
async fn two_damaged_copies_are_reported_as_such() {
    let (device, _) = formatted().await;
    rot(&device, Lba(0), 8 * 100).await.unwrap();
    rot(&device, LAST_BLOCK, 8 * 100).await.unwrap();
    assert_eq!(read(&device).await, Err(LabelError::Damaged));
    let refused = format(&device, &label(SIZE), Overwrite::Refused).await;
    assert_eq!(refused, Err(LabelError::Damaged), "it was a label once");
}

#[tokio::test]
async fn a_change_that_is_cut_off_anywhere_leaves_the_old_or_the_new_label() {
    // A body of several blocks, so that a copy is several writes.
    let bodies = |byte| Bytes::from(vec![byte; 200_000]);
    let done = Cell::new(false);
    for cut in 0.. {
        for torn in [None, Some(Lba(0)), Some(LAST_BLOCK)] {
            let device: Device = Rc::new(SmallTransfers(MemoryDrive::device(SIZE)));
            let mut old = label(SIZE);
            old.body = bodies(1);
            format(&device, &old, Overwrite::Refused).await.unwrap();
            if let Some(block) = torn {
                rot(&device, block, 77).await.unwrap();
            }
            let mut found = read(&device).await.unwrap();
            let (faulty, faults) = Faulty::wrap(device.clone());
            // Everything after the first `cut` writes is lost.
            faults.next(Ops::WRITE, cut, Fault::Delay(std::time::Duration::ZERO));
            faults.every(Ops::WRITE, Fault::Fail(BlockError::Gone));
            let mut new = old.clone();
            new.body = bodies(2);
            let updated = tokio::task::LocalSet::new()
                .run_until(update(&faulty, &mut found, new.clone()))
                .await;
            done.set(updated.is_ok());
            let after = read(&device).await.unwrap_or_else(|error| {
                panic!("no label after {cut} writes, {torn:?} damaged before: {error}")
            });
            assert!(after.label == old || after.label == new);
            if done.get() {
                assert_eq!(after.label, new);
            }
        }
        if done.get() {
            assert!(cut > 4, "several writes were cut");
            return;
        }
    }
}

#[tokio::test]
async fn a_later_version_is_not_overwritten_by_an_older_program() {
    let (device, _) = formatted().await;
    let range = LbaRange {
        start: LAST_BLOCK,
        count: 1,
    };
    let mut block = device.read(range).await.unwrap().to_vec();
    block[8] = 2;
    block[16..20].fill(0);
    let crc = crc_fast::crc32_iscsi(&block);
    block[16] = (crc & 0xff) as u8;
    block[17] = (crc >> 8 & 0xff) as u8;
    block[18] = (crc >> 16 & 0xff) as u8;
    block[19] = (crc >> 24) as u8;
    let written = device.write(LAST_BLOCK, vec![block.into()], Durability::Durable);
    written.await.unwrap();
    let expected = LabelError::FutureVersion { version: 2, known: 1 };
    assert_eq!(read(&device).await, Err(expected.clone()));
    assert_eq!(open(&device, cluster(1)).await, Err(expected));
}

#[tokio::test]
async fn a_drive_that_grew_keeps_its_label_and_one_that_shrank_is_refused() {
    for size in [SIZE + 10 * MIB, SIZE + 4096] {
        let device = MemoryDrive::device(size);
        let written = format(&device, &label(SIZE), Overwrite::Refused).await.unwrap();
        assert_eq!(read(&device).await.unwrap(), written);
        erase(&device).await.unwrap();
        assert_eq!(read(&device).await, Err(LabelError::Absent));
    }
    let device = MemoryDrive::device(SIZE);
    let refused = format(&device, &label(SIZE + MIB), Overwrite::Refused).await;
    assert!(matches!(refused, Err(LabelError::Shrunk { .. })));
}

#[tokio::test]
async fn a_last_copy_that_names_another_place_is_damage() {
    let larger = MemoryDrive::device(SIZE + 10 * MIB);
    format(&larger, &label(SIZE + 10 * MIB), Overwrite::Refused)
        .await
        .unwrap();
    let last = LbaRange {
        start: Lba(LAST_BLOCK.0 + 10 * MIB / 4096),
        count: 1,
    };
    let block = larger.read(last).await.unwrap();
    // The same copy at the end of a smaller drive, without a first one that would say how large the drive was.
    let device = MemoryDrive::device(SIZE);
    device
        .write(LAST_BLOCK, vec![block], Durability::Durable)
        .await
        .unwrap();
    assert_eq!(read(&device).await, Err(LabelError::Damaged));
}

#[tokio::test]
async fn a_label_of_the_last_generation_is_read_and_not_changed() {
    let (device, mut found) = formatted().await;
    found.generation = u64::MAX - 1;
    let changed = found.label.clone();
    update(&device, &mut found, changed.clone()).await.unwrap();
    assert_eq!(read(&device).await.unwrap().generation, u64::MAX);
    let refused = update(&device, &mut found, changed.clone()).await;
    assert_eq!(refused, Err(LabelError::LastGeneration));
    let refused = format(&device, &changed, Overwrite::Forced).await;
    assert_eq!(refused, Err(LabelError::LastGeneration));
    erase(&device).await.unwrap();
    format(&device, &changed, Overwrite::Refused).await.unwrap();
}

#[tokio::test]
async fn an_erased_drive_is_empty_again() {
    let (device, _) = formatted().await;
    erase(&device).await.unwrap();
    assert_eq!(read(&device).await, Err(LabelError::Absent));
    format(&device, &label(SIZE), Overwrite::Refused).await.unwrap();
}

#[test]
fn a_key_is_never_printed() {
    let printed = format!("{:?}", label(SIZE));
    assert!(!printed.contains("9, 9"), "{printed}");
}
