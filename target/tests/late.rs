//! Commands that waited in a socket for longer than their host did: a host repeats them elsewhere, so they must have no
//! effect any more.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use common::*;
use weft_block::faulty::{Fault, Faults, Faulty, Ops};
use weft_block::memory::MemoryDrive;
use weft_proto::nvme::log::AnaState;
use weft_target::arrival::Arrival;
use weft_target::{NamespaceConfig, Source};

/// A host with this keep-alive timeout.
async fn host(target: &Target, kato_ms: u32) -> Host {
    let identity = Identity {
        kato_ms,
        ..Identity::default()
    };
    identity.connect(target.address).await
}

/// Sends a write of sevens to the first block, and does not wait for its answer.
async fn send_write(host: &mut Host) {
    let write = inline(write_sqe(1, 0, 1, false), 4096);
    host.io.command(write, &[7; 4096]).await;
}

/// The same with a Keep Alive on the other queue: that one lies there says nothing, its host has waited for the answer in
/// vain.
async fn send_keep_alive_and_write(host: &mut Host) {
    host.admin.command(sqe(0x18, 1, 0, &[]), &[]).await;
    send_write(host).await;
}

/// What another host reads first.
async fn first_byte(target: &Target) -> u8 {
    let mut host = Identity::hostid(0xb2).connect(target.address).await;
    host.io.execute(read_sqe(1, 0, 1), &[]).await.ok().data[0]
}

/// Holds up host and target, which have one thread, as a stopped process is held up.
fn stop(duration: Duration) {
    std::thread::sleep(duration);
}

#[test]
fn what_lay_in_a_socket_past_the_keep_alive_timeout_is_not_executed() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = host(&target, 500).await;
        send_keep_alive_and_write(&mut host).await;
        stop(Duration::from_millis(600));
        assert_eq!(host.io.receive().await, None);
        assert_eq!(host.admin.receive().await, None);
        assert!(target.registry.associations().is_empty());
        assert_eq!(first_byte(&target).await, 0);
    });
}

#[test]
fn what_may_have_been_given_up_is_refused_as_not_begun_on_every_queue() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = host(&target, 4000).await;
        send_keep_alive_and_write(&mut host).await;
        stop(Duration::from_millis(3100));
        // On a machine that held it up for longer still, the association has ended, which is as good.
        if let Some(answer) = host.io.receive().await {
            assert_eq!(answer.pdu_type, 0x05);
            let status = u16::from_le_bytes(answer.header[14..16].try_into().unwrap()) >> 1;
            assert_eq!(status, ANA_TRANSITION, "it may be sent again");
            assert_eq!(first_byte(&target).await, 0);
            let again = host
                .io
                .execute(inline(write_sqe(2, 0, 1, false), 4096), &[8; 4096])
                .await;
            again.ok();
            assert_eq!(first_byte(&target).await, 8);
        } else {
            assert_eq!(first_byte(&target).await, 0);
        }
    });
}

#[test]
fn what_a_host_sent_before_it_closed_the_connection_is_not_begun_any_more() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = host(&target, 0).await;
        send_write(&mut host).await;
        // Before the target has had its turn.
        drop(host.io);
        assert_eq!(first_byte(&target).await, 0);
    });
}

/// A namespace without reservations, as volumes have, whose device fails as told; and how old its commands are.
async fn volume_target() -> (Target, Faults, Rc<RefCell<Option<Arrival>>>) {
    let (device, faults) = Faulty::wrap(MemoryDrive::device(1 << 20));
    let told: Rc<RefCell<Option<Arrival>>> = Rc::default();
    let teller = Rc::clone(&told);
    let target = empty_target().await;
    let config = NamespaceConfig {
        nsid: 1,
        uuid: UUID,
        ana_group: 1,
        ana_state: AnaState::OPTIMIZED,
        source: Source::PerAssociation(Rc::new(move |_, arrival| {
            *teller.borrow_mut() = Some(arrival.clone());
            Rc::clone(&device)
        })),
    };
    target.registry.add_namespace(&nqn(SUBNQN), config).unwrap();
    (target, faults, told)
}

/// Sends a fused pair (commands 1 and 2) whose comparison takes until the faults are released, and behind it a write and a Write Zeroes (3
/// and 4). All are in when this returns.
async fn fill_the_gate(host: &mut Host, faults: &Faults) {
    faults.next(Ops::READ, 1, Fault::Hold);
    let mut compare = inline(sqe(0x05, 1, 1, &[0, 0, 0]), 4096);
    compare[1] = 0b01;
    let mut second = inline(write_sqe(2, 0, 1, false), 4096);
    second[1] = 0b10;
    host.io.command(compare, &[0; 4096]).await;
    host.io.command(second, &[7; 4096]).await;
    until(|| faults.held() == 1).await;
    let write = inline(write_sqe(3, 1, 1, false), 4096);
    host.io.command(write, &[8; 4096]).await;
    let mut write_zeroes = write_sqe(4, 1, 1, false);
    write_zeroes[0] = 0x08;
    host.io.command(write_zeroes, &[]).await;
    // What is sent before this is in when this is answered.
    assert_eq!(host.io.execute(read_sqe(5, 2, 1), &[]).await.ok().cid, 5);
}

/// Commands that arrive in time and are begun late: the device may hand them on to another node, where the host has repeated them.
#[test]
fn a_device_is_told_when_a_command_arrived_however_long_it_waited_since() {
    run(async {
        let (target, faults, told) = volume_target().await;
        let mut host = host(&target, 0).await;
        fill_the_gate(&mut host, &faults).await;
        let arrived_before = Instant::now();
        stop(Duration::from_millis(20));
        faults.release();
        for cid in 1..=4 {
            assert_eq!(host.io.answer().await.ok().cid, cid);
            let arrived = told.borrow().as_ref().unwrap().get();
            assert!(arrived <= arrived_before, "command {cid} is as old as it is");
        }
    });
}

#[test]
fn what_waited_for_a_fused_pair_for_too_long_is_refused_as_not_begun() {
    run(async {
        let (target, faults, _) = volume_target().await;
        let mut host = host(&target, 8000).await;
        fill_the_gate(&mut host, &faults).await;
        stop(Duration::from_millis(2100));
        faults.release();
        let mut ended = Vec::new();
        for _ in 1..=4 {
            let Some(answer) = host.io.answer_if_any().await else {
                break; // A machine that stood still for longer: the association has ended, which is as good.
            };
            ended.push((answer.cid, answer.status));
        }
        let refused = [
            (1, 0),
            (2, ANA_TRANSITION),
            (3, ANA_TRANSITION),
            (4, ANA_TRANSITION),
        ];
        assert_eq!(ended, refused[..ended.len()]);
        assert_eq!(first_bytes(&target).await, [0, 0], "no write has begun");
    });
}

/// The first bytes of two blocks, as another host reads them.
async fn first_bytes(target: &Target) -> [u8; 2] {
    let mut host = Identity::hostid(0xb2).connect(target.address).await;
    let read = host.io.execute(read_sqe(1, 0, 2), &[]).await.ok();
    [read.data[0], read.data[4096]]
}
