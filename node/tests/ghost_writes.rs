//! Ghost writes: a command that its host has given up and repeated elsewhere never takes effect afterwards, wherever
//! it waited meanwhile.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::rc::Rc;
use std::time::Duration;

use common::{HOSTNQN, cluster, connect, expect_chunk, folder, on_host, owner, pattern, volume, write_chunk};
use weft_block::{Device, Durability};
use weft_initiator::{ConnectOptions, Controller, HostIdentity};
use weft_proto::id::HostId;

/// What each test writes, in commands.
const CHUNKS: u64 = 48;

/// The same host's volume by one path alone, that of the agent at `index`.
async fn one_path(
    agents: &weft_node::local_cluster::Agents,
    subnqn: &weft_proto::nqn::Nqn,
    index: usize,
) -> (Rc<Controller>, Device) {
    let host = HostIdentity {
        hostnqn: HOSTNQN.parse().unwrap(),
        hostid: HostId([0x7e; 16]),
    };
    let options = ConnectOptions::new(agents.list[index].config.nvme_listen, subnqn.clone(), host);
    let controller = Controller::connect(options).await.unwrap();
    let device: Device = controller.namespace(1).await.unwrap();
    (controller, device)
}

/// Stops `stopped` with writes in its sockets, repeats and overwrites them on other paths, resumes it, and looks.
fn writes_left_in_a_socket_never_land(stopped: impl Fn(&weft_node::local_cluster::Agents) -> usize) {
    let folder = folder();
    let agents = cluster(folder.path(), 7, 256);
    let subnqn = volume(&agents, "v", "64MiB");
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        for chunk in 0..CHUNKS {
            write_chunk(&device, chunk, 1).await.unwrap();
        }
        for round in [2, 5, 8] {
            let stopped = stopped(&agents);
            let (_controller, path) = one_path(&agents, &subnqn, stopped).await;
            agents.signal(stopped, "STOP").unwrap();
            // Nobody reads them for now: they are small enough for the sockets.
            let left: Vec<_> = (0..CHUNKS)
                .map(|chunk| {
                    let block = pattern(chunk, round).slice(..4096);
                    path.write(common::chunk_start(chunk), vec![block], Durability::Cached)
                })
                .collect();
            for write in left {
                // The host gives the path up, when its keep alive has not been answered.
                write.await.unwrap_err();
            }
            for chunk in 0..CHUNKS {
                write_chunk(&device, chunk, round + 1).await.unwrap();
                write_chunk(&device, chunk, round + 2).await.unwrap();
            }
            agents.signal(stopped, "CONT").unwrap();
            for _ in 0..20 {
                for chunk in 0..CHUNKS {
                    expect_chunk(&device, chunk, round + 2).await;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            agents.wait_for_drives(7).unwrap();
        }
    });
}

#[test]
fn what_lay_in_the_sockets_of_a_stopped_owner_never_lands() {
    writes_left_in_a_socket_never_land(|agents| owner(agents, "v"));
}

#[test]
fn what_lay_in_the_sockets_of_a_stopped_forwarder_never_lands() {
    writes_left_in_a_socket_never_land(|agents| (owner(agents, "v") + 1) % agents.list.len());
}
