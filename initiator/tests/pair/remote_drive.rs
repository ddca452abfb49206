//! A drive of another node: it answers at once while it is away, comes back by itself, and is reserved by keys.

use std::time::Duration;

use weft_block::faulty::{Fault, Ops};
use weft_block::memory::MemoryDrive;
use weft_block::{BlockDevice, BlockError, Durability};
use weft_initiator::{ConnectOptions, Controller, PathState, RemoteDrive, ReservationError};
use weft_proto::nvme::log::AnaState;
use weft_proto::nvme::reservation::{
    AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationType,
};
use weft_proto::units::Lba;

use crate::rig::{
    Node, PATIENCE, faulty_node, host, memory_node, options, pattern, range, run, until, until_state,
};

#[test]
fn a_remote_drive_answers_at_once_and_comes_back() {
    run(async {
        let device = MemoryDrive::device(64 << 20);
        let node = Node::start(device.clone(), AnaState::OPTIMIZED).await;
        let address = node.address;
        let drive = RemoteDrive::open(options(address), 1);
        assert_eq!(
            drive.read(range(0, 1)).await,
            Err(BlockError::NotReady),
            "not connected yet"
        );
        drive.connected().await;
        drive
            .write(Lba(3), vec![pattern(3, 4096)], Durability::Durable)
            .await
            .unwrap();
        let key = 0x1234;
        drive.reservation_register(key, PATIENCE).await.unwrap();

        node.kill().await;
        until_state(drive.watch(), |state| matches!(state, PathState::Disconnected(_))).await;
        assert_eq!(drive.read(range(3, 1)).await, Err(BlockError::NotReady));
        assert_eq!(
            drive
                .write(Lba(3), vec![pattern(9, 4096)], Durability::Durable)
                .await,
            Err(BlockError::NotReady)
        );
        assert_eq!(drive.info().blocks, (64 << 20) / 4096, "as last seen");
        assert_eq!(
            drive.reservation_report(PATIENCE).await,
            Err(ReservationError::NotConnected)
        );

        let node = Node::start_at(address, device, AnaState::OPTIMIZED, 1).await;
        until_state(drive.watch(), |state| *state == PathState::Connected).await;
        assert_eq!(drive.read(range(3, 1)).await.unwrap(), pattern(3, 4096));
        // This target forgot its registrations, and nobody registered on our behalf.
        let report = drive.reservation_report(PATIENCE).await.unwrap();
        assert!(report.registrants.is_empty());
        drop(drive);
        until("association gone", || node.registry.associations().is_empty()).await;
    });
}

#[test]
fn a_preempted_host_meets_a_conflict() {
    run(async {
        let node = memory_node().await;
        let drive = |number: u8| {
            let options = ConnectOptions {
                host: host(number),
                ..options(node.address)
            };
            RemoteDrive::open(options, 1)
        };
        let (victim, successor, stranger) = (drive(1), drive(2), drive(3));
        for drive in [&victim, &successor, &stranger] {
            drive.connected().await;
        }
        let rtype = ReservationType::WriteExclusiveAllRegistrants;
        victim.reservation_register(0x11, PATIENCE).await.unwrap();
        victim.reservation_acquire(rtype, 0x11, PATIENCE).await.unwrap();
        successor.reservation_register(0x22, PATIENCE).await.unwrap();
        let write = |drive: &RemoteDrive| drive.write(Lba(0), vec![pattern(1, 4096)], Durability::Durable);
        write(&victim).await.unwrap();
        write(&successor).await.unwrap();
        assert_eq!(write(&stranger).await, Err(BlockError::ReservationConflict));
        stranger.read(range(0, 1)).await.unwrap();

        let report = successor.reservation_report(PATIENCE).await.unwrap();
        assert_eq!(report.rtype, Some(rtype));
        let mut known: Vec<_> = report
            .registrants
            .iter()
            .map(|one| (one.hostid, one.key))
            .collect();
        known.sort();
        assert_eq!(known, [(host(1).hostid, 0x11), (host(2).hostid, 0x22)]);

        successor
            .reservation_preempt_and_abort(rtype, 0x22, 0x11, PATIENCE)
            .await
            .unwrap();
        assert_eq!(write(&victim).await, Err(BlockError::ReservationConflict));
        write(&successor).await.unwrap();
        assert_eq!(
            successor
                .reservation_preempt_and_abort(rtype, 0x22, 0x11, PATIENCE)
                .await,
            Err(ReservationError::Conflict),
            "the key is gone"
        );
        let report = victim.reservation_report(PATIENCE).await.unwrap();
        assert_eq!(report.registrants.len(), 1);
        successor
            .reservation_release(ReleaseAction::Clear, rtype, 0x22, PATIENCE)
            .await
            .unwrap();
        write(&victim).await.unwrap();
    });
}

#[test]
fn a_preempt_waits_no_longer_than_its_deadline() {
    run(async {
        let (node, faults) = faulty_node().await;
        let victim = Controller::connect(options(node.address)).await.unwrap();
        let successor = RemoteDrive::open(
            ConnectOptions {
                host: host(2),
                ..options(node.address)
            },
            1,
        );
        successor.connected().await;
        let rtype = ReservationType::WriteExclusiveAllRegistrants;
        victim
            .reservation_register(1, RegisterAction::Register, 0, 0x11, false, PersistChange::Keep)
            .await
            .unwrap();
        victim
            .reservation_acquire(1, AcquireAction::Acquire, rtype, 0x11, 0)
            .await
            .unwrap();
        successor.reservation_register(0x22, PATIENCE).await.unwrap();
        let namespace = victim.namespace(1).await.unwrap();
        faults.next(Ops::WRITE, 1, Fault::Hold);
        let write = namespace.write(Lba(0), vec![pattern(1, 4096)], Durability::Durable);
        faults.wait_held(1).await;
        let preempt = successor.reservation_preempt_and_abort(rtype, 0x22, 0x11, Duration::from_millis(100));
        assert_eq!(
            preempt.await,
            Err(ReservationError::Unknown),
            "the write is in execution"
        );
        faults.release();
        // It was in execution when it was preempted: either answer is true to what happened.
        assert!(matches!(
            write.await,
            Ok(()) | Err(BlockError::ReservationConflict)
        ));
        let refused = loop {
            let write = namespace.write(Lba(0), vec![pattern(1, 4096)], Durability::Durable);
            match write.await {
                // Its target had stood still for so long that the host might have given it up.
                Err(BlockError::NotReady) => tokio::time::sleep(Duration::from_millis(5)).await,
                other => break other,
            }
        };
        assert_eq!(refused, Err(BlockError::ReservationConflict));
    });
}
