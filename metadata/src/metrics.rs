//! The metrics of this crate: one table, and the functions that count.

use std::time::Duration;
use weft_proto::metric::{Kind, Metric};

macro_rules! metrics {
    ($($const:ident = $name:literal, $kind:ident, $unit:literal, [$($label:literal),*], $help:literal;)*) => {
        $(const $const: &str = $name;)*

        /// Every metric of this crate.
        pub const METRICS: &[Metric] = &[$(Metric {
            name: $name,
            kind: Kind::$kind,
            unit: $unit,
            labels: &[$($label),*],
            help: $help,
        }),*];
    };
}

metrics! {
    APPLIED_INDEX = "weft_raft_applied_index", Gauge, "", [],
        "Index of the last log entry applied to this member's state.";
    COMMANDS = "weft_metadata_commands_total", Counter, "", ["result"],
        "Commands applied, by result (applied, unchanged, refused).";
    DEATHS = "weft_metadata_incarnations_declared_dead_total", Counter, "", ["cause"],
        "Incarnations that this member, as leader, declared dead, by cause (refused, silent).";
    IS_LEADER = "weft_raft_is_leader", Gauge, "", [],
        "1 while this member leads the Raft group.";
    LOG_BYTES = "weft_raft_log_bytes", Gauge, "bytes", [],
        "Size of the write-ahead log's files.";
    LOG_FLUSH = "weft_raft_log_flush_seconds", Histogram, "seconds", [],
        "Time to write and flush one batch of the write-ahead log.";
    MAP_VERSION = "weft_metadata_map_version", Gauge, "", [],
        "Version of the cluster map, as this member has applied it.";
    SNAPSHOTS = "weft_raft_snapshots_total", Counter, "", ["origin"],
        "Snapshots made durable, by origin (built, installed).";
    TERM = "weft_raft_term", Gauge, "", [],
        "Raft term of this member.";
    TAKEOVERS = "weft_metadata_takeovers_total", Counter, "", [],
        "Epochs that this member, as leader, gave to a new owner.";
}

pub(crate) fn log_flushed(elapsed: Duration, disk_bytes: u64) {
    metrics::histogram!(LOG_FLUSH).record(elapsed.as_secs_f64());
    metrics::gauge!(LOG_BYTES).set(disk_bytes as f64);
}

pub(crate) fn applied(index: u64, map_version: u64) {
    metrics::gauge!(APPLIED_INDEX).set(index as f64);
    metrics::gauge!(MAP_VERSION).set(map_version as f64);
}

pub(crate) fn command(result: &'static str) {
    metrics::counter!(COMMANDS, "result" => result).increment(1);
}

pub(crate) fn snapshot(origin: &'static str) {
    metrics::counter!(SNAPSHOTS, "origin" => origin).increment(1);
}

pub(crate) fn declared_dead(cause: &'static str) {
    metrics::counter!(DEATHS, "cause" => cause).increment(1);
}

pub(crate) fn takeovers(count: u64) {
    metrics::counter!(TAKEOVERS).increment(count);
}

pub(crate) fn raft(term: u64, is_leader: bool) {
    metrics::gauge!(TERM).set(term as f64);
    metrics::gauge!(IS_LEADER).set(if is_leader { 1.0 } else { 0.0 });
}
