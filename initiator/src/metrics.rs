//! Every metric of this crate, declared once.
//!
//! [`METRICS`] is the list that `weft metrics list` prints; [`Recorder`] and the functions below are the only places
//! that record. Labels come from closed enums: no address, no NQN, no LBA.

use std::time::Duration;

use metrics::{Counter, Histogram, counter, gauge, histogram};
use weft_proto::metric::{Kind, Metric};

const COMMANDS: &str = "weft_initiator_commands_total";
const COMMAND_ERRORS: &str = "weft_initiator_command_errors_total";
const COMMAND_SECONDS: &str = "weft_initiator_command_seconds";
const BYTES: &str = "weft_initiator_bytes_total";
const CONTROLLERS: &str = "weft_initiator_controllers";
const CONNECTS: &str = "weft_initiator_connects_total";
const DISCONNECTS: &str = "weft_initiator_disconnects_total";
const HOST_RETRIES: &str = "weft_initiator_host_retries_total";
const HOST_ERRORS: &str = "weft_initiator_host_errors_total";

/// Every metric of this crate.
pub const METRICS: &[Metric] = &[
    Metric {
        name: COMMANDS,
        kind: Kind::Counter,
        unit: "commands",
        labels: &["op"],
        help: "I/O commands answered by a controller or lost with a connection, whatever their status.",
    },
    Metric {
        name: COMMAND_ERRORS,
        kind: Kind::Counter,
        unit: "commands",
        labels: &["op"],
        help: "I/O commands lost, or answered with a status other than success.",
    },
    Metric {
        name: COMMAND_SECONDS,
        kind: Kind::Histogram,
        unit: "seconds",
        labels: &["op"],
        help: "Time from submission to the answer, waiting for a free slot included.",
    },
    Metric {
        name: BYTES,
        kind: Kind::Counter,
        unit: "bytes",
        labels: &["op"],
        help: "Payload of I/O commands that succeeded.",
    },
    Metric {
        name: CONTROLLERS,
        kind: Kind::Gauge,
        unit: "controllers",
        labels: &[],
        help: "Controllers this agent is connected to.",
    },
    Metric {
        name: CONNECTS,
        kind: Kind::Counter,
        unit: "attempts",
        labels: &["result"],
        help: "Attempts to connect to a controller, by result: connected or failed.",
    },
    Metric {
        name: DISCONNECTS,
        kind: Kind::Counter,
        unit: "associations",
        labels: &["reason"],
        help: "Associations that ended, by reason.",
    },
    Metric {
        name: HOST_RETRIES,
        kind: Kind::Counter,
        unit: "retries",
        labels: &[],
        help: "Operations that a multipath device sent again after a path failed.",
    },
    Metric {
        name: HOST_ERRORS,
        kind: Kind::Counter,
        unit: "operations",
        labels: &[],
        help: "Operations that a multipath device gave up on or that failed on every path.",
    },
];

/// An I/O command, as the label `op` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Flush,
    Write,
    Read,
    Compare,
    WriteZeroes,
    Deallocate,
    Verify,
    Reservation,
}

impl Op {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Flush, "flush"),
        (Self::Write, "write"),
        (Self::Read, "read"),
        (Self::Compare, "compare"),
        (Self::WriteZeroes, "write_zeroes"),
        (Self::Deallocate, "deallocate"),
        (Self::Verify, "verify"),
        (Self::Reservation, "reservation"),
    ];
}

/// Handles of one controller's metrics, looked up once.
pub(crate) struct Recorder {
    ops: [OpRecorder; Op::ALL.len()],
}

struct OpRecorder {
    commands: Counter,
    errors: Counter,
    bytes: Counter,
    seconds: Histogram,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        Self {
            ops: Op::ALL.map(|(_, op)| OpRecorder {
                commands: counter!(COMMANDS, "op" => op),
                errors: counter!(COMMAND_ERRORS, "op" => op),
                bytes: counter!(BYTES, "op" => op),
                seconds: histogram!(COMMAND_SECONDS, "op" => op),
            }),
        }
    }

    pub(crate) fn finished(&self, op: Op, bytes: u64, took: Duration, succeeded: bool) {
        let recorder = &self.ops[op as usize];
        recorder.commands.increment(1);
        recorder.seconds.record(took);
        if succeeded {
            recorder.bytes.increment(bytes);
        } else {
            recorder.errors.increment(1);
        }
    }
}

pub(crate) fn connect_finished(connected: bool) {
    let result = if connected { "connected" } else { "failed" };
    counter!(CONNECTS, "result" => result).increment(1);
}

pub(crate) fn controller_added() {
    gauge!(CONTROLLERS).increment(1.0);
}

pub(crate) fn controller_removed(reason: &'static str) {
    gauge!(CONTROLLERS).decrement(1.0);
    counter!(DISCONNECTS, "reason" => reason).increment(1);
}

pub(crate) fn host_retry() {
    counter!(HOST_RETRIES).increment(1);
}

pub(crate) fn host_error() {
    counter!(HOST_ERRORS).increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_numbered_as_they_are_listed() {
        for (index, (op, _)) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op as usize, index);
        }
    }

    #[test]
    fn names_are_unique_and_say_their_crate() {
        let names: std::collections::BTreeSet<_> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());
        assert!(names.iter().all(|name| name.starts_with("weft_initiator_")));
    }
}
