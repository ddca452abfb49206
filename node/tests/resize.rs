//! A volume grows under its hosts: what is new can be written and read at once, by every path.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{CHUNK_BLOCKS, HOSTNQN, chunk_start, cluster, folder, on_host, pattern, volume};
use weft_block::{BlockDevice as _, BlockError, Durability};
use weft_initiator::{ConnectOptions, Controller, HostIdentity};
use weft_proto::id::HostId;
use weft_proto::units::LbaRange;

/// The first chunk past 64 MiB, of 128 KiB each.
const NEW_CHUNK: u64 = 512;

#[test]
fn a_volume_that_grows_takes_commands_past_its_former_end_by_every_path() {
    let folder = folder();
    let agents = cluster(folder.path(), 6, 256);
    let subnqn = volume(&agents, "v", "64MiB");
    on_host(async {
        let mut paths = Vec::new();
        for agent in &agents.list {
            let host = HostIdentity {
                hostnqn: HOSTNQN.parse().unwrap(),
                hostid: HostId([0x7e; 16]),
            };
            let options = ConnectOptions::new(agent.config.nvme_listen, subnqn.clone(), host);
            let controller = Controller::connect(options).await.unwrap();
            let path = controller.namespace(1).await.unwrap();
            // A command, so that forwarders have their associations with the owner, and a size from before.
            path.write(chunk_start(0), vec![pattern(0, 1)], Durability::Cached)
                .await
                .unwrap();
            let past = path.write(chunk_start(NEW_CHUNK), vec![pattern(0, 1)], Durability::Cached);
            assert!(matches!(past.await, Err(BlockError::OutOfRange { .. })));
            paths.push((controller, path));
        }
        agents
            .weft_ok(&["volume", "resize", "v", "--size", "96MiB"])
            .unwrap();
        for (number, (_, path)) in paths.iter().enumerate() {
            // This node hears of it in its own time; from then on nothing refuses what it shows.
            while path.refresh().await.unwrap().bytes() < 96 << 20 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let range = LbaRange {
                start: chunk_start(NEW_CHUNK + number as u64),
                count: CHUNK_BLOCKS,
            };
            let data = pattern(NEW_CHUNK, number as u64);
            loop {
                match path
                    .write(range.start, vec![data.clone()], Durability::Cached)
                    .await
                {
                    Ok(()) => break,
                    // The owner may hear of it later than this node: a path that asks its host to try again.
                    Err(error) => assert_eq!(error, BlockError::NotReady),
                }
            }
            assert!(path.read(range).await.unwrap() == data);
        }
    });
}
