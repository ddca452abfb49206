//! The log between checkpoints is bounded for a node, however many volumes it owns: it is what a takeover has to scan.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{cluster_with, connect, expect_chunk, folder, metric, on_host, volume, write_chunk};
use weft_node::config::EngineConfig;

#[test]
fn volumes_below_their_own_budget_write_checkpoints_for_the_nodes() {
    const CHECKPOINTS: &str = "weft_volume_checkpoints_total";
    let folder = folder();
    let engine = EngineConfig {
        log_budget_mib: 1024,
        node_log_budget_mib: 4,
        ..EngineConfig::default()
    };
    let agents = cluster_with(folder.path(), 6, 256, engine);
    let subnqn = volume(&agents, "v", "64MiB");
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        let before = metric(&agents, CHECKPOINTS);
        for chunk in 0..64 {
            write_chunk(&device, chunk, 1).await.unwrap();
        }
        agents
            .wait_until("a checkpoint is written", |agents| {
                metric(agents, CHECKPOINTS) > before
            })
            .unwrap();
        for chunk in 0..64 {
            expect_chunk(&device, chunk, 1).await;
        }
    });
}
