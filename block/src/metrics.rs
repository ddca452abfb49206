//! The metrics of this crate: the list, and the handles a drive records through.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use weft_proto::metric::{Kind, Metric};

/// Every metric of this crate.
pub const METRICS: &[Metric] = &[
    Metric {
        name: BYTES,
        kind: Kind::Counter,
        unit: "bytes",
        labels: &["drive", "op"],
        help: "Bytes that local drives read, wrote, zeroed or discarded.",
    },
    Metric {
        name: GONE,
        kind: Kind::Gauge,
        unit: "drives",
        labels: &["drive"],
        help: "1 once a local drive is gone (removed, deleted, truncated, or it failed to keep a write), else 0.",
    },
    Metric {
        name: ERRORS,
        kind: Kind::Counter,
        unit: "operations",
        labels: &["drive", "op"],
        help: "Operations that a local drive answered with an error.",
    },
    Metric {
        name: IN_FLIGHT,
        kind: Kind::Gauge,
        unit: "operations",
        labels: &["drive"],
        help: "Operations that a local drive is working on.",
    },
    Metric {
        name: SECONDS,
        kind: Kind::Histogram,
        unit: "seconds",
        labels: &["drive", "op"],
        help: "Time from the start of an operation to a local drive's answer, its wait in the queue included.",
    },
    Metric {
        name: OPERATIONS,
        kind: Kind::Counter,
        unit: "operations",
        labels: &["drive", "op"],
        help: "Operations that local drives answered.",
    },
];

const BYTES: &str = "weft_block_bytes_total";
const ERRORS: &str = "weft_block_errors_total";
const GONE: &str = "weft_block_drive_gone";
const IN_FLIGHT: &str = "weft_block_in_flight";
const OPERATIONS: &str = "weft_block_operations_total";
const SECONDS: &str = "weft_block_operation_seconds";

/// The label `op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Deallocate,
    Flush,
    Read,
    Write,
    WriteZeroes,
}

impl Op {
    const ALL: [Self; 5] = [
        Self::Deallocate,
        Self::Flush,
        Self::Read,
        Self::Write,
        Self::WriteZeroes,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Deallocate => "deallocate",
            Self::Flush => "flush",
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write_zeroes",
        }
    }
}

/// The handles of one drive, looked up once: a recorder installed later does not see them.
pub(crate) struct DriveMetrics {
    drive: String,
    gone: Gauge,
    in_flight: Gauge,
    /// By [`Op`], in the order of its variants.
    ops: [OpMetrics; 5],
}

struct OpMetrics {
    operations: Counter,
    bytes: Counter,
    errors: Counter,
    seconds: Histogram,
}

impl DriveMetrics {
    /// `drive` is the label's value.
    pub(crate) fn new(drive: &str) -> Self {
        let drive = drive.to_owned();
        let gone = gauge!(GONE, "drive" => drive.clone());
        gone.set(0);
        Self {
            in_flight: gauge!(IN_FLIGHT, "drive" => drive.clone()),
            ops: Op::ALL.map(|op| {
                let labels = [("drive", drive.clone()), ("op", op.label().to_owned())];
                OpMetrics {
                    operations: counter!(OPERATIONS, &labels),
                    bytes: counter!(BYTES, &labels),
                    errors: counter!(ERRORS, &labels),
                    seconds: histogram!(SECONDS, &labels),
                }
            }),
            gone,
            drive,
        }
    }

    pub(crate) fn drive(&self) -> &str {
        &self.drive
    }

    pub(crate) fn gone(&self) {
        self.gone.set(1);
    }

    pub(crate) fn in_flight(&self, count: usize) {
        self.in_flight.set(count as f64);
    }

    pub(crate) fn record(&self, op: Op, bytes: u64, elapsed: Duration, good: bool) {
        let metrics = &self.ops[op as usize];
        metrics.operations.increment(1);
        metrics.seconds.record(elapsed);
        if good {
            metrics.bytes.increment(bytes);
        } else {
            metrics.errors.increment(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_in_order_and_well_named() {
        assert!(METRICS.is_sorted_by_key(|metric| metric.name));
        for metric in METRICS {
            assert!(metric.name.starts_with("weft_block_"), "{}", metric.name);
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"));
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
    }

    #[test]
    fn each_op_has_its_own_handles() {
        for (index, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op as usize, index);
        }
    }
}
