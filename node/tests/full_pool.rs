//! A pool that fills up: what needs space is refused with Capacity Exceeded, everything else works, and at 80 % it takes
//! overwrites and kills without end.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{
    CHUNK_BLOCKS, chunk_start, cluster, connect, expect_chunk, folder, on_host, owner, volume, write_chunk,
};
use weft_block::BlockError;
use weft_proto::units::LbaRange;

#[test]
fn a_full_pool_refuses_what_needs_space_and_takes_it_again_after_trim() {
    let folder = folder();
    let agents = cluster(folder.path(), 6, 128);
    let subnqn = volume(&agents, "v", "2GiB");
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        let mut written = 0;
        let full = loop {
            match write_chunk(&device, written, 1).await {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
            assert!(written < 16_384, "the pool never became full");
        };
        assert_eq!(full, BlockError::CapacityExceeded);
        assert!(
            written * CHUNK_BLOCKS * 4096 > 100 << 20,
            "full after {written} chunks only"
        );
        for chunk in (0..written).step_by(7) {
            expect_chunk(&device, chunk, 1).await;
        }
        let half = written / 2;
        let range = LbaRange {
            start: chunk_start(0),
            count: half * CHUNK_BLOCKS,
        };
        for start in (0..range.count).step_by(65_536) {
            let part = LbaRange {
                start: weft_proto::units::Lba(start),
                count: (range.count - start).min(65_536),
            };
            device.deallocate(vec![part]).await.unwrap();
        }
        // Space returns by compaction; until then writes that need it are still refused.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
        let mut chunk = 0;
        while chunk < half / 2 {
            match write_chunk(&device, chunk, 2).await {
                Ok(()) => chunk += 1,
                Err(BlockError::CapacityExceeded) => {
                    assert!(
                        std::time::Instant::now() < deadline,
                        "space did not return after TRIM"
                    );
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
        for chunk in 0..half / 2 {
            expect_chunk(&device, chunk, 2).await;
        }
        for chunk in half..written {
            expect_chunk(&device, chunk, 1).await;
        }
    });
}

#[test]
fn a_small_pool_survives_five_times_its_capacity_and_kills_at_80_percent_full() {
    let folder = folder();
    let mut agents = cluster(folder.path(), 7, 72);
    let subnqn = volume(&agents, "v", "1GiB");
    let status = agents.weft_json(&["status"]).unwrap();
    let usable = status["pools"][0]["usable_bytes"].as_u64().unwrap();
    let chunks = usable * 8 / 10 / (CHUNK_BLOCKS * 4096);
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        let mut rounds = vec![0_u64; usize::try_from(chunks).unwrap()];
        let total = 5 * usable / (CHUNK_BLOCKS * 4096);
        let mut state = 7_u64;
        for step in 0..total.max(chunks) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let chunk = if step < chunks {
                step
            } else {
                (state >> 33) % chunks
            };
            let round = &mut rounds[usize::try_from(chunk).unwrap()];
            *round += 1;
            write_chunk(&device, chunk, *round).await.unwrap();
            if step == total / 2 {
                let killed = owner(&agents, "v");
                agents.kill(killed).unwrap();
                agents.start(killed).unwrap();
            }
        }
        for (chunk, round) in rounds.iter().enumerate() {
            expect_chunk(&device, chunk as u64, *round).await;
        }
    });
}
