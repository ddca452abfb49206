//! Every metric of this crate, declared once.
//!
//! [`METRICS`] is the list that `weft metrics list` prints; the functions below are the only places that record.
//! Labels come from closed enums: no host's name, no LBA, no NSID.

use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use weft_proto::metric::{Kind, Metric};

const COMMANDS: &str = "weft_target_commands_total";
const COMMAND_ERRORS: &str = "weft_target_command_errors_total";
const COMMAND_SECONDS: &str = "weft_target_command_seconds";
const BYTES: &str = "weft_target_bytes_total";
const INFLIGHT: &str = "weft_target_commands_in_flight";
const CONNECTIONS: &str = "weft_target_connections";
const CONNECTIONS_TERMINATED: &str = "weft_target_connections_terminated_total";
const CONTROLLERS: &str = "weft_target_controllers";
const KEEP_ALIVE_EXPIRED: &str = "weft_target_keep_alive_expired_total";
const COMMANDS_LATE: &str = "weft_target_commands_late_total";
const RESERVATION_CONFLICTS: &str = "weft_target_reservation_conflicts_total";
const DOORBELLS_TRAPPED: &str = "weft_target_doorbells_trapped_total";

/// Every metric of this crate.
pub const METRICS: &[Metric] = &[
    Metric {
        name: COMMANDS,
        kind: Kind::Counter,
        unit: "commands",
        labels: &["op"],
        help: "Commands completed, whatever their status.",
    },
    Metric {
        name: COMMAND_ERRORS,
        kind: Kind::Counter,
        unit: "commands",
        labels: &["op"],
        help: "Commands completed with a status other than success.",
    },
    Metric {
        name: COMMAND_SECONDS,
        kind: Kind::Histogram,
        unit: "seconds",
        labels: &["op"],
        help: "Time from a command's arrival, with its data, to its completion being queued.",
    },
    Metric {
        name: BYTES,
        kind: Kind::Counter,
        unit: "bytes",
        labels: &["op"],
        help: "Payload moved for commands that succeeded.",
    },
    Metric {
        name: INFLIGHT,
        kind: Kind::Gauge,
        unit: "commands",
        labels: &[],
        help: "Commands received and not yet completed, over all connections.",
    },
    Metric {
        name: CONNECTIONS,
        kind: Kind::Gauge,
        unit: "connections",
        labels: &[],
        help: "NVMe/TCP connections open.",
    },
    Metric {
        name: CONNECTIONS_TERMINATED,
        kind: Kind::Counter,
        unit: "connections",
        labels: &[],
        help: "Connections that this side ended with a TermReq.",
    },
    Metric {
        name: CONTROLLERS,
        kind: Kind::Gauge,
        unit: "controllers",
        labels: &[],
        help: "Controllers with a host.",
    },
    Metric {
        name: KEEP_ALIVE_EXPIRED,
        kind: Kind::Counter,
        unit: "controllers",
        labels: &[],
        help: "Controllers that ended because their host was silent past its keep-alive timeout.",
    },
    Metric {
        name: COMMANDS_LATE,
        kind: Kind::Counter,
        unit: "commands",
        labels: &[],
        help: "Commands refused because they may have waited for longer than their host does.",
    },
    Metric {
        name: RESERVATION_CONFLICTS,
        kind: Kind::Counter,
        unit: "commands",
        labels: &[],
        help: "Operations refused because of a reservation: late writes of a fenced host among them.",
    },
    Metric {
        name: DOORBELLS_TRAPPED,
        kind: Kind::Counter,
        unit: "doorbells",
        labels: &[],
        help: "Doorbells of guests that came as messages of their monitors: each stopped a processor of its guest.",
    },
];

/// The label `op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Admin and fabrics commands.
    Admin,
    /// Read.
    Read,
    /// Write.
    Write,
    /// Flush.
    Flush,
    /// Write Zeroes.
    WriteZeroes,
    /// Dataset Management.
    Deallocate,
    /// Compare, alone or fused.
    Compare,
    /// Verify.
    Verify,
    /// Reservation commands.
    Reservation,
    /// An I/O command that was not understood.
    Other,
}

impl Op {
    const ALL: [(Self, &'static str); 10] = [
        (Self::Admin, "admin"),
        (Self::Read, "read"),
        (Self::Write, "write"),
        (Self::Flush, "flush"),
        (Self::WriteZeroes, "write_zeroes"),
        (Self::Deallocate, "deallocate"),
        (Self::Compare, "compare"),
        (Self::Verify, "verify"),
        (Self::Reservation, "reservation"),
        (Self::Other, "other"),
    ];
}

struct OpHandles {
    commands: Counter,
    errors: Counter,
    bytes: Counter,
    seconds: Histogram,
}

/// Handles, looked up once per thread: the lookup is dearer than the count. The recorder has to be installed before
/// the thread serves its first command.
struct Handles {
    by_op: [OpHandles; Op::ALL.len()],
    inflight: Gauge,
}

thread_local! {
    static HANDLES: Handles = Handles {
        by_op: Op::ALL.map(|(_, op)| OpHandles {
            commands: counter!(COMMANDS, "op" => op),
            errors: counter!(COMMAND_ERRORS, "op" => op),
            bytes: counter!(BYTES, "op" => op),
            seconds: histogram!(COMMAND_SECONDS, "op" => op),
        }),
        inflight: gauge!(INFLIGHT),
    };
}

/// A command has arrived.
pub(crate) fn command_started() {
    HANDLES.with(|handles| handles.inflight.increment(1));
}

/// A command has left without a completion: its connection is gone.
pub(crate) fn command_dropped() {
    HANDLES.with(|handles| handles.inflight.decrement(1));
}

/// A command is completed. `bytes` is its payload.
pub(crate) fn command_completed(op: Op, success: bool, bytes: u64, took: Duration) {
    HANDLES.with(|handles| {
        let by_op = &handles.by_op[op as usize];
        by_op.commands.increment(1);
        if success {
            by_op.bytes.increment(bytes);
        } else {
            by_op.errors.increment(1);
        }
        by_op.seconds.record(took);
        handles.inflight.decrement(1);
    });
}

/// Commands that were answered in the instant in which they arrived, to be counted together: nobody could have seen them in flight,
/// and one look at the clock does for all.
#[derive(Default)]
pub(crate) struct Tally {
    by_op: [Answered; Op::ALL.len()],
    any: bool,
}

#[derive(Clone, Copy, Default)]
struct Answered {
    commands: usize,
    errors: u64,
    bytes: u64,
}

impl Tally {
    /// A command that has not been counted as started is completed. `bytes` is its payload.
    pub(crate) fn add(&mut self, op: Op, success: bool, bytes: u64) {
        let answered = &mut self.by_op[op as usize];
        answered.commands += 1;
        if success {
            answered.bytes += bytes;
        } else {
            answered.errors += 1;
        }
        self.any = true;
    }

    /// Counts all of them. They arrived at `arrived`.
    pub(crate) fn count(&mut self, arrived: Instant) {
        if !std::mem::take(&mut self.any) {
            return;
        }
        let took = arrived.elapsed();
        HANDLES.with(|handles| {
            for (by_op, answered) in handles.by_op.iter().zip(&mut self.by_op) {
                let Answered {
                    commands,
                    errors,
                    bytes,
                } = std::mem::take(answered);
                if commands == 0 {
                    continue;
                }
                by_op.commands.increment(commands as u64);
                by_op.bytes.increment(bytes);
                by_op.errors.increment(errors);
                by_op.seconds.record_many(took, commands);
            }
        });
    }
}

/// Counts a thing that is open while it lives.
pub(crate) struct Open(Gauge);

impl Open {
    pub(crate) fn connection() -> Self {
        Self::new(gauge!(CONNECTIONS))
    }

    pub(crate) fn controller() -> Self {
        Self::new(gauge!(CONTROLLERS))
    }

    fn new(gauge: Gauge) -> Self {
        gauge.increment(1);
        Self(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}

/// This side ended a connection with a TermReq.
pub(crate) fn connection_terminated() {
    counter!(CONNECTIONS_TERMINATED).increment(1);
}

/// A host was silent for too long.
pub(crate) fn command_late() {
    counter!(COMMANDS_LATE).increment(1);
}

pub(crate) fn keep_alive_expired() {
    counter!(KEEP_ALIVE_EXPIRED).increment(1);
}

/// An operation was refused because of a reservation.
pub(crate) fn reservation_conflict() {
    counter!(RESERVATION_CONFLICTS).increment(1);
}

/// A guest's doorbell came as a message.
pub(crate) fn doorbell_trapped() {
    counter!(DOORBELLS_TRAPPED).increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_the_crate_as_its_subject_and_a_sentence() {
        for metric in METRICS {
            assert!(metric.name.starts_with("weft_target_"), "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
            assert_eq!(
                metric.kind == Kind::Counter,
                metric.name.ends_with("_total"),
                "{}",
                metric.name
            );
        }
    }

    #[test]
    fn the_label_table_is_in_the_order_of_the_enum() {
        for (index, (op, _)) in Op::ALL.iter().enumerate() {
            assert_eq!(*op as usize, index);
        }
    }
}
