//! Commands that waited in a socket for longer than their host did: a host repeats them elsewhere, so they must have no
//! effect any more.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::time::Duration;

use common::*;

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
