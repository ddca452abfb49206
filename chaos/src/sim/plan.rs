//! What a seed stands for: the cluster, the volumes, the workload and the faults of one run.

use std::collections::BTreeSet;
use std::time::Duration;

use weft_proto::band::Geometry;
use weft_volume::testing::rng::Rng;

use super::steps::Fault;

/// Everything drawn before a run begins.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) nodes: u32,
    pub(super) geometry: Geometry,
    pub(super) volumes: u16,
    /// Per volume.
    pub(super) blocks: u32,
    pub(super) hosts: u16,
    /// Commands of one host at once.
    pub(super) depth: u64,
    /// Longest pause between two bursts of commands, in microseconds.
    pub(super) think_us: u64,
    pub(super) drive_mib: u32,
    pub(super) volatile_write_cache: bool,
    pub(super) tear_bytes: usize,
    pub(super) log_budget_bytes: u64,
    /// Share of dead blocks at which compaction begins.
    pub(super) garbage_max: f64,
    pub(super) faults: Vec<Fault>,
    pub(super) fault_count: u64,
    /// How long faults and workload last.
    pub(super) length: Duration,
    /// One drive is damaged for good; what else is hurt at once stays within the redundancy that is left.
    pub(super) damaged: Option<u32>,
    /// Whether everything is killed and started again at the end.
    pub(super) restart_all: bool,
    /// A node more joins in the middle.
    pub(super) joins: bool,
    /// Volumes that are made, written and deleted while others go on.
    pub(super) deletions: u16,
    /// Hosts with a path through every node.
    pub(super) multipath: u16,
    /// Commands of such a host at once, each in a lane of its own.
    pub(super) lanes: u64,
    /// Keep Alive Timeout of such a host.
    pub(super) kato: Duration,
    /// Pause of an owner between two columns that it rebuilds, in milliseconds.
    pub(super) rebuild_ms: u64,
    /// Whether a write of such a host is left in the socket of a server that stands still.
    pub(super) strands: bool,
    /// Of bands.
    pub(super) window_rows: u32,
}

/// Blocks that one task of a host with several paths has for itself in each volume.
pub(super) const LANE_BLOCKS: u64 = 4;

const GEOMETRIES: [(u8, u8); 6] = [(2, 1), (1, 1), (2, 2), (1, 2), (3, 2), (4, 2)];

impl Plan {
    pub(super) fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(seed).fork(11);
        let (k, m) = GEOMETRIES[rng.index(GEOMETRIES.len())];
        let nodes = (u32::from(k + m) + rng.between(0, 2) as u32).max(3);
        let mut faults: Vec<Fault> = Fault::ALL.to_vec();
        rng.shuffle(&mut faults);
        faults.truncate(rng.between(2, 6) as usize);
        let damages = |fault: &Fault| matches!(fault, Fault::LostWrite | Fault::Misdirected | Fault::BitFlip);
        let damaged = faults
            .iter()
            .any(damages)
            .then(|| rng.between(1, u64::from(nodes)) as u32);
        if damaged.is_some() {
            // What cannot be told from the loss of several drives would be more than is tolerated.
            let unbounded: BTreeSet<Fault> =
                [Fault::Messages, Fault::Many, Fault::Partition, Fault::OneWay].into();
            faults.retain(|fault| !unbounded.contains(fault));
        }
        Self {
            nodes,
            geometry: Geometry { k, m },
            volumes: rng.between(1, 2) as u16,
            blocks: [16, 64, 160][rng.index(3)],
            hosts: rng.between(2, 4) as u16,
            depth: rng.between(2, 6),
            think_us: [50_000, 150_000, 400_000][rng.index(3)],
            drive_mib: [24, 32, 40][rng.index(3)],
            garbage_max: [0.1, 0.3, 0.5][rng.index(3)],
            volatile_write_cache: rng.chance(1, 2),
            tear_bytes: if rng.chance(1, 2) { 512 } else { 4096 },
            log_budget_bytes: [256 << 10, 1 << 20, 4 << 20][rng.index(3)],
            fault_count: rng.between(3, 12),
            faults,
            length: Duration::from_millis(rng.between(6_000, 20_000)),
            damaged,
            restart_all: rng.chance(1, 3) && damaged.is_none(),
            joins: rng.chance(1, 4),
            deletions: if rng.chance(1, 3) {
                rng.between(1, 4) as u16
            } else {
                0
            },
            multipath: rng.between(0, 2) as u16,
            lanes: rng.between(1, 4),
            kato: Duration::from_millis([1_000, 2_000, 5_000][rng.index(3)]),
            strands: rng.chance(1, 2),
            rebuild_ms: [50, 300, 1_500][rng.index(3)],
            // A chunk of 1 MiB has 256 rows: the last is a window that never fills.
            window_rows: [64, 128, 256][rng.index(3)],
        }
    }

    /// Of a volume, with the lanes behind the blocks that everybody writes.
    pub(super) fn total_blocks(&self) -> u64 {
        self.lane(u64::from(self.multipath) * self.lanes)
    }

    /// The first block of a lane.
    pub(super) fn lane(&self, number: u64) -> u64 {
        u64::from(self.blocks) + number * LANE_BLOCKS
    }
}
