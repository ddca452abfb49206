//! Reservations, Preempt and Abort, ghost writes: what has to hold when hosts die and come back.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::rc::Rc;

use bytes::Bytes;
use common::*;
use futures_util::FutureExt;
use weft_block::faulty::{Fault, Faulty, Ops};
use weft_block::memory::MemoryDrive;
use weft_block::{BlockError, Durability};
use weft_proto::id::HostId;
use weft_proto::nvme::reservation::{PersistChange, RegisterAction, ReservationType};
use weft_proto::units::{Lba, LbaRange};
use weft_target::reservation::ReservedNamespace;
use weft_target::reservation::table::Refused;
use weft_target::{NamespaceConfig, Source};

const ALL_REGISTRANTS: ReservationType = ReservationType::WriteExclusiveAllRegistrants;
const VICTIM: HostId = HostId([0xbb; 16]);
const CLUSTER: HostId = HostId([0xcc; 16]);
const VICTIM_KEY: u64 = 0xb;
const CLUSTER_KEY: u64 = 0xc;

async fn register(namespace: &ReservedNamespace, host: HostId, key: u64) {
    let persist = if namespace.can_persist() {
        PersistChange::Set
    } else {
        PersistChange::Keep
    };
    namespace
        .register(host, RegisterAction::Register, false, 0, key, persist)
        .await
        .unwrap();
}

/// The victim and the cluster registered, the cluster's reservation in force.
async fn reserve(namespace: &ReservedNamespace) {
    register(namespace, CLUSTER, CLUSTER_KEY).await;
    register(namespace, VICTIM, VICTIM_KEY).await;
    namespace
        .acquire(CLUSTER, CLUSTER_KEY, ALL_REGISTRANTS)
        .await
        .unwrap();
}

fn block(byte: u8) -> Vec<Bytes> {
    vec![Bytes::from(vec![byte; 4096])]
}

const FIRST: LbaRange = LbaRange {
    start: Lba(0),
    count: 1,
};

fn victim() -> Identity {
    Identity {
        hostid: VICTIM.0,
        ..Identity::default()
    }
}

#[test]
fn preempt_and_abort_waits_for_a_write_inside_the_drive_and_late_writes_change_nothing() {
    run(async {
        let memory = MemoryDrive::device(8 << 20);
        let (device, faults) = Faulty::wrap(Rc::clone(&memory));
        let (target, namespace) = target(device).await;
        reserve(&namespace).await;
        let mut host = victim().connect(target.address).await;

        // One write is inside the drive, another still waits for its data.
        faults.next(Ops::WRITE, 1, Fault::Hold);
        host.io
            .command(inline(write_sqe(1, 0, 1, false), 4096), &[1; 4096])
            .await;
        faults.wait_held(1).await;
        host.io
            .command(transport(write_sqe(2, 1, 1, false), 4096), &[])
            .await;
        let r2t = host.io.receive().await.unwrap();
        let ttag = u16::from_le_bytes([r2t.header[2], r2t.header[3]]);

        let preempting = namespace.clone();
        let preempt = tokio::task::spawn_local(async move {
            preempting
                .preempt_and_abort(CLUSTER, CLUSTER_KEY, VICTIM_KEY, ALL_REGISTRANTS)
                .await
        });
        until(|| namespace.report().registrants.len() == 1).await;
        // Refused from now on, before the preempt has completed.
        let late = host
            .io
            .execute(inline(write_sqe(3, 2, 1, false), 4096), &[3; 4096])
            .await;
        assert_eq!(late.status, 0x83, "reservation conflict");
        // Even if the host registers again, the command that waited for its data is over.
        register(&namespace, VICTIM, VICTIM_KEY).await;
        host.io.send(&h2c_data(2, ttag, 0, true, &[2; 4096])).await;
        let aborted = host.io.answer().await;
        assert_eq!((aborted.cid, aborted.status), (2, 0x1b), "aborted by preempt");
        assert!(
            !preempt.is_finished(),
            "a write of the victim is inside the drive"
        );

        faults.release();
        preempt.await.unwrap().unwrap();
        assert_eq!(
            host.io.answer().await.ok().cid,
            1,
            "it happened before the preempt completed"
        );
        let after = memory
            .read(LbaRange {
                start: Lba(0),
                count: 3,
            })
            .await
            .unwrap();
        let first_bytes: Vec<u8> = after.chunks(4096).map(|block| block[0]).collect();
        assert_eq!(first_bytes, [1, 0, 0]);
    });
}

#[test]
fn preempt_and_abort_waits_for_io_whose_caller_is_gone() {
    run(async {
        let (device, faults) = Faulty::wrap(MemoryDrive::device(8 << 20));
        let namespace = ReservedNamespace::open(device, UUID, None).unwrap();
        reserve(&namespace).await;
        let local = namespace.local(VICTIM);
        faults.every(Ops::WRITE, Fault::Hold);
        // Never polled at all, and polled once: both are in the device.
        drop(local.write(Lba(0), block(1), Durability::Durable));
        let mut polled = local.write(Lba(1), block(1), Durability::Durable);
        assert!((&mut polled).now_or_never().is_none());
        drop(polled);
        let preempting = namespace.clone();
        let preempt = tokio::task::spawn_local(async move {
            preempting
                .preempt_and_abort(CLUSTER, CLUSTER_KEY, VICTIM_KEY, ALL_REGISTRANTS)
                .await
        });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!preempt.is_finished());
        let refused = local.write(Lba(2), block(1), Durability::Durable).await;
        assert_eq!(refused, Err(BlockError::ReservationConflict));
        assert_eq!(faults.held(), 2);
        faults.release();
        preempt.await.unwrap().unwrap();
    });
}

/// Two nodes take over from the same dead host: the second one finds its key gone while the first one still waits.
#[test]
fn a_key_that_is_not_found_is_not_reported_while_its_host_is_still_being_aborted() {
    run(async {
        let (device, faults) = Faulty::wrap(MemoryDrive::device(8 << 20));
        let namespace = ReservedNamespace::open(device, UUID, None).unwrap();
        reserve(&namespace).await;
        faults.next(Ops::WRITE, 1, Fault::Hold);
        drop(
            namespace
                .local(VICTIM)
                .write(Lba(0), block(1), Durability::Durable),
        );
        let preempts = [1, 2].map(|_| {
            let preempting = namespace.clone();
            tokio::task::spawn_local(async move {
                preempting
                    .preempt_and_abort(CLUSTER, CLUSTER_KEY, VICTIM_KEY, ALL_REGISTRANTS)
                    .await
            })
        });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(preempts.iter().all(|preempt| !preempt.is_finished()));
        faults.release();
        let [first, second] = preempts;
        first.await.unwrap().unwrap();
        assert_eq!(second.await.unwrap(), Err(Refused::Conflict.into()));
    });
}

#[test]
fn several_preempts_at_once_all_complete() {
    run(async {
        let (device, faults) = Faulty::wrap(MemoryDrive::device(8 << 20));
        let namespace = ReservedNamespace::open(device, UUID, None).unwrap();
        reserve(&namespace).await;
        faults.every(Ops::WRITE, Fault::Hold);
        let mut preempts = Vec::new();
        for id in 1..=5_u8 {
            let host = HostId([id; 16]);
            register(&namespace, host, u64::from(id)).await;
            drop(
                namespace
                    .local(host)
                    .write(Lba(0), block(id), Durability::Durable),
            );
            let preempting = namespace.clone();
            preempts.push(tokio::task::spawn_local(async move {
                preempting
                    .preempt_and_abort(CLUSTER, CLUSTER_KEY, id.into(), ALL_REGISTRANTS)
                    .await
            }));
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(preempts.iter().all(|preempt| !preempt.is_finished()));
        faults.release();
        for preempt in preempts {
            preempt.await.unwrap().unwrap();
        }
    });
}

#[test]
fn a_preempt_without_abort_waits_for_nothing() {
    run(async {
        let (device, faults) = Faulty::wrap(MemoryDrive::device(8 << 20));
        let namespace = ReservedNamespace::open(device, UUID, None).unwrap();
        reserve(&namespace).await;
        faults.next(Ops::WRITE, 1, Fault::Hold);
        let held = namespace
            .local(VICTIM)
            .write(Lba(0), block(1), Durability::Durable);
        namespace
            .preempt(CLUSTER, CLUSTER_KEY, VICTIM_KEY, ALL_REGISTRANTS)
            .await
            .unwrap();
        faults.release();
        held.await.unwrap();
    });
}

#[test]
fn a_local_device_and_a_socket_pass_the_same_check() {
    run(async {
        let (target, namespace) = memory_target().await;
        reserve(&namespace).await;
        let stranger = namespace.local(HostId([9; 16]));
        assert_eq!(
            stranger.write(Lba(0), block(1), Durability::Durable).await,
            Err(BlockError::ReservationConflict)
        );
        assert!(
            stranger.read(FIRST).await.is_ok(),
            "reads are free under Write Exclusive"
        );
        namespace
            .local(VICTIM)
            .write(Lba(0), block(1), Durability::Durable)
            .await
            .unwrap();
        let mut host = Identity::hostid(9).connect(target.address).await;
        let refused = host
            .io
            .execute(inline(write_sqe(1, 0, 1, false), 4096), &[2; 4096])
            .await;
        assert_eq!(refused.status, 0x83);
        host.io.execute(read_sqe(1, 0, 1), &[]).await.ok();
    });
}

#[test]
fn reservation_commands_work_over_the_wire() {
    run(async {
        let (target, namespace) = memory_target().await;
        let mut a = Identity::hostid(1).connect(target.address).await;
        let mut b = Identity::hostid(2).connect(target.address).await;
        // Register both; acquire type 5 (Write Exclusive - All Registrants) from A.
        let register = inline(sqe(0x0d, 1, 1, &[0]), 16);
        a.io.execute(register, &keys(0, 0xa)).await.ok();
        b.io.execute(register, &keys(0, 0xb)).await.ok();
        let acquire = inline(sqe(0x11, 1, 1, &[5 << 8]), 16);
        a.io.execute(acquire, &keys(0xa, 0)).await.ok();

        let report =
            a.io.execute(transport(sqe(0x0e, 1, 1, &[1023, 1]), 4096), &[])
                .await
                .ok()
                .data;
        assert_eq!(report[..7], [2, 0, 0, 0, 5, 2, 0], "GEN, RTYPE, REGCTL");
        assert_eq!(report[66], 1, "a holder");
        assert_eq!(report[80..96], [1; 16]);
        assert_eq!(report[64 + 64 + 16..64 + 64 + 32], [2; 16]);
        let short =
            a.io.execute(transport(sqe(0x0e, 1, 1, &[1023, 0]), 4096), &[])
                .await;
        assert_eq!(short.code(), 0x18, "host identifier inconsistent format");
        let persist = inline(sqe(0x0d, 1, 1, &[3 << 30]), 16);
        assert_eq!(
            a.io.execute(persist, &keys(0xa, 0xa)).await.code(),
            0x02,
            "nothing to persist in"
        );

        // B preempts and aborts A; A is told, and refused.
        a.admin.command(sqe(0x0c, 20, 0, &[]), &[]).await;
        a.admin.execute(sqe(0x18, 2, 0, &[]), &[]).await.ok();
        let preempt_abort = inline(sqe(0x11, 1, 1, &[2 | 5 << 8]), 16);
        b.io.execute(preempt_abort, &keys(0xb, 0xa)).await.ok();
        assert_eq!(a.admin.answer().await.ok().result, 0x0080_0006);
        let page = a
            .admin
            .execute(transport(sqe(0x02, 3, 0, &[0x80 | 15 << 16]), 64), &[])
            .await
            .ok()
            .data;
        assert_eq!(
            (page[0], page[8], page[12]),
            (1, 1, 1),
            "registration preempted, namespace 1"
        );
        let refused =
            a.io.execute(inline(write_sqe(1, 0, 1, false), 4096), &[2; 4096])
                .await;
        assert_eq!(refused.status, 0x83);
        let again = b.io.execute(preempt_abort, &keys(0xb, 0xa)).await;
        assert_eq!(again.status, 0x83, "key not found");

        let release = inline(sqe(0x15, 1, 1, &[5 << 8]), 8);
        b.io.execute(release, &0xb_u64.to_le_bytes()).await.ok();
        assert_eq!(namespace.report().rtype, None);
        a.io.execute(inline(write_sqe(1, 0, 1, false), 4096), &[2; 4096])
            .await
            .ok();
    });
}

#[test]
fn registrations_and_the_reservation_survive_a_restart() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d1.reservations");
        let memory = MemoryDrive::device(8 << 20);
        let open = || ReservedNamespace::open(Rc::clone(&memory), UUID, Some(path.clone())).unwrap();
        let before = {
            let namespace = open();
            reserve(&namespace).await;
            namespace
                .preempt_and_abort(CLUSTER, CLUSTER_KEY, VICTIM_KEY, ALL_REGISTRANTS)
                .await
                .unwrap();
            namespace.report()
        };
        assert!(before.ptpl);
        let namespace = open();
        assert_eq!(namespace.report(), before);
        let late = namespace
            .local(VICTIM)
            .write(Lba(0), block(1), Durability::Durable)
            .await;
        assert_eq!(late, Err(BlockError::ReservationConflict), "fenced for good");
        // Without persistence a restart forgets.
        namespace.set_ptpl(false).await.unwrap();
        assert!(open().report().registrants.is_empty());
        // Another namespace's file is refused.
        let other = ReservedNamespace::open(Rc::clone(&memory), [1; 16], Some(path.clone()));
        assert!(other.is_err());
    });
}

#[test]
fn a_change_that_cannot_be_persisted_is_not_answered_with_success() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gone").join("d1.reservations");
        let namespace = ReservedNamespace::open(MemoryDrive::device(8 << 20), UUID, Some(path)).unwrap();
        let action = RegisterAction::Register;
        let refused = namespace
            .register(VICTIM, action, false, 0, 1, PersistChange::Set)
            .await;
        assert!(matches!(
            refused,
            Err(weft_target::reservation::ReservationError::NotPersisted(_))
        ));
    });
}

#[test]
fn concurrent_changes_are_all_on_the_medium_when_they_are_answered() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d1.reservations");
        let memory = MemoryDrive::device(8 << 20);
        let namespace = ReservedNamespace::open(Rc::clone(&memory), UUID, Some(path.clone())).unwrap();
        let registering = (1..=20_u8).map(|id| {
            let (namespace, memory, path) = (namespace.clone(), Rc::clone(&memory), path.clone());
            async move {
                register(&namespace, HostId([id; 16]), id.into()).await;
                let reopened = ReservedNamespace::open(memory, UUID, Some(path)).unwrap();
                assert!(
                    reopened
                        .report()
                        .registrants
                        .iter()
                        .any(|r| r.hostid == HostId([id; 16]))
                );
            }
        });
        futures_util::future::join_all(registering).await;
    });
}

#[test]
fn the_local_device_keeps_the_block_contract() {
    run(async {
        weft_block::testing::conformance(async || {
            let namespace = ReservedNamespace::open(MemoryDrive::device(8 << 20), UUID, None).unwrap();
            reserve(&namespace).await;
            namespace.local(VICTIM)
        })
        .await;
    });
}

#[test]
fn a_dropped_connections_write_is_done_before_the_hosts_next_one() {
    run(async {
        let memory = MemoryDrive::device(8 << 20);
        let (device, faults) = Faulty::wrap(Rc::clone(&memory));
        let (target, _) = target(device).await;
        let mut host = Identity::default().connect(target.address).await;
        faults.next(Ops::WRITE, 1, Fault::Hold);
        host.io
            .command(inline(write_sqe(1, 0, 1, false), 4096), &[1; 4096])
            .await;
        faults.wait_held(1).await;
        drop(host);
        until(|| target.registry.associations().is_empty()).await;

        // The same host waits; another one does not.
        let address = target.address;
        let reconnect = tokio::task::spawn_local(async move {
            let mut host = Identity::default().connect(address).await;
            host.io
                .execute(inline(write_sqe(1, 0, 1, false), 4096), &[2; 4096])
                .await
                .ok();
        });
        let _other = Identity::hostid(7).connect(address).await;
        assert!(!reconnect.is_finished());
        assert_eq!(target.registry.associations().len(), 1);
        faults.release();
        reconnect.await.unwrap();
        assert_eq!(
            memory.read(FIRST).await.unwrap()[0],
            2,
            "the newer write is on top"
        );
    });
}

#[test]
fn each_association_has_a_device_of_its_own_with_the_hosts_identity() {
    run(async {
        let target = empty_target().await;
        let opened = Rc::new(std::cell::RefCell::new(Vec::new()));
        let log = Rc::clone(&opened);
        let memory = MemoryDrive::device(8 << 20);
        let config = NamespaceConfig {
            nsid: 1,
            uuid: UUID,
            ana_group: 7,
            ana_state: weft_proto::nvme::log::AnaState::OPTIMIZED,
            source: Source::PerAssociation(Rc::new(move |association, _| {
                log.borrow_mut().push((association.hostid, association.cntlid));
                Rc::clone(&memory)
            })),
        };
        target.registry.add_namespace(&nqn(SUBNQN), config).unwrap();
        let mut a = Identity::hostid(1).connect(target.address).await;
        let mut b = Identity::hostid(2).connect(target.address).await;
        for host in [&mut a, &mut b] {
            host.io.execute(read_sqe(1, 0, 1), &[]).await.ok();
            host.io.execute(read_sqe(1, 0, 1), &[]).await.ok();
        }
        assert_eq!(
            *opened.borrow(),
            [(HostId([1; 16]), a.cntlid), (HostId([2; 16]), b.cntlid)]
        );
        let register = a.io.execute(inline(sqe(0x0d, 1, 1, &[0]), 16), &keys(0, 1)).await;
        assert_eq!(register.code(), 0x01, "no reservations of ours on a volume");
    });
}
