//! Bad days: drives that vanish or rot, agents that are stopped or killed, one or all. After each, every
//! acknowledged byte is there.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use common::{
    PATIENCE, cluster, connect, connect_by, expect_chunk, folder, metric, on_host, owner, path_options,
    patient_cluster, volume, wait_until_served, write_chunk,
};
use weft_block::{BlockError, Device};
use weft_initiator::{Controller, Multipath};
use weft_node::local_cluster::Agents;
use weft_proto::nvme::log::AnaState;

/// What the test of a stopped owner writes, in commands.
const CHUNKS: u64 = 64;

#[test]
fn all_agents_killed_at_once_lose_nothing() {
    let folder = folder();
    let mut agents = cluster(folder.path(), 6, 256);
    let subnqn = volume(&agents, "v", "128MiB");
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        for chunk in 0..64 {
            write_chunk(&device, chunk, 1).await.unwrap();
        }
        for chunk in (0..64).step_by(3) {
            write_chunk(&device, chunk, 2).await.unwrap();
        }
    });
    for index in 0..agents.list.len() {
        agents.kill(index).unwrap();
    }
    for index in 0..agents.list.len() {
        agents.start(index).unwrap();
    }
    wait_until_served(&agents, "v");
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        for chunk in 0..64 {
            expect_chunk(&device, chunk, if chunk % 3 == 0 { 2 } else { 1 }).await;
        }
    });
}

#[test]
fn an_owner_that_was_stopped_past_its_takeover_changes_nothing_when_it_resumes() {
    const CONFLICTS: &str = "weft_target_reservation_conflicts_total";
    let folder = folder();
    let agents = patient_cluster(folder.path(), 7, 256);
    let subnqn = volume(&agents, "v", "64MiB");
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        for chunk in 0..CHUNKS {
            write_chunk(&device, chunk, 1).await.unwrap();
        }
        // Where the owner stops is for the scheduler to say: now and then it has nothing left to write.
        let mut round = 1;
        while metric(&agents, CONFLICTS) == 0.0 {
            assert!(round < 20, "a stopped owner never wrote late");
            let stopped = owner(&agents, "v");
            // Writes are under way when the owner stops: what becomes of them is for the host's multipath to find out.
            let writes: Vec<_> = (0..CHUNKS)
                .map(|chunk| {
                    let device = device.clone();
                    let write = async move { write_chunk(&device, chunk, round + 1).await };
                    tokio::task::spawn_local(write)
                })
                .collect();
            tokio::time::sleep(Duration::from_millis(3 * round)).await;
            agents.signal(stopped, "STOP").unwrap();
            for write in writes {
                write.await.unwrap().unwrap();
            }
            round += 2;
            for chunk in 0..CHUNKS {
                write_chunk(&device, chunk, round).await.unwrap();
            }
            assert_ne!(owner(&agents, "v"), stopped, "the volume has not been taken over");
            let lives = former_lives(&agents, stopped);
            agents.signal(stopped, "CONT").unwrap();
            // What it still has under way must change nothing, and it must not serve again as who it was.
            agents
                .wait_until("the former owner has come back as a new incarnation", |agents| {
                    former_lives(agents, stopped) > lives
                })
                .unwrap();
            agents.wait_for_drives(7).unwrap();
            for chunk in 0..CHUNKS {
                expect_chunk(&device, chunk, round).await;
            }
        }
    });
}

#[test]
fn an_owner_that_has_lost_its_drives_sends_its_hosts_to_other_paths() {
    let folder = folder();
    let agents = cluster(folder.path(), 7, 256);
    let subnqn = volume(&agents, "v", "64MiB");
    let owning = owner(&agents, "v");
    let address = agents.list[owning].config.nvme_listen;
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        for chunk in 0..CHUNKS {
            write_chunk(&device, chunk, 1).await.unwrap();
        }
        // A host that does not give up by itself what it has sent to the owner, and one that says how it sees that path.
        let mut options = path_options(address, &subnqn);
        options.command_timeout = 10 * PATIENCE;
        let patient = Controller::connect(options).await.unwrap();
        let patient: Device = patient.namespace(1).await.unwrap();
        let watching = connect_by(vec![address], &subnqn).await;
        seen_as(&watching, AnaState::OPTIMIZED).await;
        // The lease of a 4+2 volume rests on three drives; two are left.
        let others: Vec<usize> = (0..7).filter(|index| *index != owning).skip(1).collect();
        for index in &others {
            agents.signal(*index, "STOP").unwrap();
        }
        // What the owner had begun has no known outcome, and then it begins nothing. On a machine that is slow for seconds
        // it may take its silence back for a moment.
        let mut refused = 0;
        loop {
            let answer = tokio::time::timeout(PATIENCE, write_chunk(&patient, refused, 2)).await;
            match answer.expect("the owner says something") {
                Err(BlockError::NotReady) => break,
                Err(BlockError::Unknown) => refused += 1,
                other => panic!("{other:?} without drives"),
            }
            assert!(refused < CHUNKS, "the owner begins everything");
        }
        seen_as(&watching, AnaState::INACCESSIBLE).await;
        for index in &others {
            agents.signal(*index, "CONT").unwrap();
        }
        agents.wait_for_drives(7).unwrap();
        // What was refused has changed nothing; what is repeated is what counts.
        expect_chunk(&device, refused, 1).await;
        for round in [2, 3] {
            for chunk in 0..=refused {
                write_chunk(&device, chunk, round).await.unwrap();
            }
        }
        for chunk in 0..CHUNKS {
            expect_chunk(&device, chunk, if chunk <= refused { 3 } else { 1 }).await;
        }
    });
}

#[test]
fn after_a_takeover_the_new_owners_path_is_the_optimized_one() {
    let folder = folder();
    let mut agents = cluster(folder.path(), 7, 256);
    let subnqn = volume(&agents, "v", "64MiB");
    let former = owner(&agents, "v");
    agents.kill(former).unwrap();
    agents
        .wait_until("the volume has another owner", |agents| {
            let shown = agents.weft_ok(&["volume", "show", "v"]);
            shown.is_ok_and(|text| text.contains("serving")) && owner(agents, "v") != former
        })
        .unwrap();
    // The map may name the new owner before its engine serves, and does not change afterwards.
    let address = agents.list[owner(&agents, "v")].config.nvme_listen;
    on_host(async {
        let host = connect_by(vec![address], &subnqn).await;
        seen_as(&host, AnaState::OPTIMIZED).await;
    });
}

/// Waits until the host sees its only path in this state.
async fn seen_as(host: &Multipath, state: AnaState) {
    let seen = async {
        while host.paths()[0].ana != Some(state) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let seen = tokio::time::timeout(PATIENCE, seen).await;
    assert!(seen.is_ok(), "{:?} instead of {state:?}", host.paths());
}

/// How often an agent was fenced and came back.
fn former_lives(agents: &Agents, index: usize) -> usize {
    let log = fs::read_to_string(agents.list[index].log_path()).unwrap();
    log.matches("coming back as a new incarnation").count()
}

#[test]
fn a_drive_file_that_vanishes_under_the_agent_costs_no_io_error() {
    let folder = folder();
    let agents = cluster(folder.path(), 7, 256);
    let subnqn = volume(&agents, "v", "64MiB");
    let victim = (owner(&agents, "v") + 1) % agents.list.len();
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        for chunk in 0..16 {
            write_chunk(&device, chunk, 1).await.unwrap();
        }
        fs::remove_file(&agents.list[victim].config.drives[0].path).unwrap();
        for round in 2..5 {
            for chunk in 0..16 {
                write_chunk(&device, chunk, round).await.unwrap();
            }
        }
        agents
            .wait_until("the drive is reported as failed", |agents| {
                agents
                    .weft_ok(&["drive", "list"])
                    .is_ok_and(|text| text.contains("failed"))
            })
            .unwrap();
        for chunk in 0..16 {
            expect_chunk(&device, chunk, 4).await;
        }
    });
}

/// Flips one bit in every block of the drive's chunk area; a second time undoes it.
fn rot(drive: &Path) {
    let file = fs::OpenOptions::new().read(true).write(true).open(drive).unwrap();
    let mut byte = [0];
    for offset in ((1 << 20) + 100..(255 << 20)).step_by(4096) {
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
    }
    file.sync_all().unwrap();
}

#[test]
fn a_flipped_bit_is_corrected_repaired_and_counted() {
    let folder = folder();
    let agents = cluster(folder.path(), 6, 256);
    let subnqn = volume(&agents, "v", "64MiB");
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        for chunk in 0..16 {
            write_chunk(&device, chunk, 1).await.unwrap();
        }
        // A drive may hold nothing but parity, which no read looks at: then the rot is undone and the next one has it.
        let mut counted = false;
        for agent in &agents.list {
            let path = &agent.config.drives[0].path;
            rot(path);
            for chunk in 0..16 {
                expect_chunk(&device, chunk, 1).await;
            }
            counted = metric(&agents, "weft_volume_checksum_mismatches_total") > 0.0;
            if counted {
                break;
            }
            rot(path);
        }
        assert!(counted, "no mismatch was counted");
        agents
            .wait_until("the blocks are repaired", |agents| {
                metric(agents, "weft_volume_repaired_blocks_total") > 0.0
            })
            .unwrap();
        for chunk in 0..16 {
            expect_chunk(&device, chunk, 1).await;
        }
    });
}
