//! The metrics of this crate: the list, and the counters that engines record through.
//!
//! Sums over all engines of a process: no volume is a label, because their number is not bounded.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use weft_proto::metric::{Kind, Metric};

/// Every metric of this crate.
pub const METRICS: &[Metric] = &[
    count(
        USER_BYTES,
        "bytes",
        &[],
        "Bytes that hosts wrote and got acknowledged.",
    ),
    count(USER_READ_BYTES, "bytes", &[], "Bytes that hosts read."),
    count(
        DRIVE_BYTES,
        "bytes",
        &["kind"],
        "Bytes sent to drives, by what they are: user (first placement of what a host wrote), copy (compaction, repair, \
         re-appending), parity, header, map.",
    ),
    count(DRIVE_READS, "commands", &[], "Read commands sent to drives."),
    count(
        STRIPES,
        "stripes",
        &["w", "d"],
        "Stripes sent, by data shards and rows of payload.",
    ),
    count(
        ABANDONED,
        "stripes",
        &[],
        "Stripes abandoned because a column failed or stalled, and re-appended on others.",
    ),
    count(
        SUSPECTED,
        "events",
        &[],
        "Times that a drive failed or stalled a command and was passed over.",
    ),
    Metric {
        name: SUSPECT_DRIVES,
        kind: Kind::Gauge,
        unit: "drives",
        labels: &[],
        help: "Drives that engines pass over now, counted once for each engine.",
    },
    count(
        MISMATCHES,
        "blocks",
        &[],
        "Blocks whose bytes did not match their checksum, after band and map were asked again.",
    ),
    count(
        REPAIRED,
        "blocks",
        &[],
        "Blocks re-appended because of a checksum mismatch.",
    ),
    count(
        RECONSTRUCTED,
        "blocks",
        &[],
        "Blocks computed from other columns of their stripe.",
    ),
    count(
        REBUILT,
        "bytes",
        &[],
        "Bytes of chunks that were rebuilt and installed.",
    ),
    count(COMPACTED, "blocks", &[], "Live blocks that compaction moved."),
    count(
        CAPACITY_EXCEEDED,
        "blocks",
        &[],
        "Host blocks refused because the pool had no space and compaction could gain none.",
    ),
    count(CHECKPOINTS, "checkpoints", &[], "Page-map roots published."),
    count(
        BANDS_GRANTED,
        "bands",
        &[],
        "Bands granted to engines of this agent.",
    ),
    count(
        BANDS_FREED,
        "bands",
        &[],
        "Bands that engines of this agent freed.",
    ),
    count(
        RECOVERED,
        "stripes",
        &["outcome"],
        "Stripes that takeovers found: applied (where they lay), reappended (above H and whole), dropped (above H and \
         never acknowledged).",
    ),
    Metric {
        name: SECONDS,
        kind: Kind::Histogram,
        unit: "seconds",
        labels: &["op"],
        help: "Time from a host command's arrival at the engine to its answer.",
    },
];

const USER_BYTES: &str = "weft_volume_user_bytes_total";
const USER_READ_BYTES: &str = "weft_volume_user_read_bytes_total";
const DRIVE_BYTES: &str = "weft_volume_drive_bytes_total";
const DRIVE_READS: &str = "weft_volume_drive_reads_total";
const STRIPES: &str = "weft_volume_stripes_total";
const ABANDONED: &str = "weft_volume_stripes_abandoned_total";
const SUSPECTED: &str = "weft_volume_drives_suspected_total";
const SUSPECT_DRIVES: &str = "weft_volume_suspect_drives";
const MISMATCHES: &str = "weft_volume_checksum_mismatches_total";
const REPAIRED: &str = "weft_volume_repaired_blocks_total";
const RECONSTRUCTED: &str = "weft_volume_reconstructed_blocks_total";
const REBUILT: &str = "weft_volume_rebuilt_bytes_total";
const COMPACTED: &str = "weft_volume_compacted_blocks_total";
const CAPACITY_EXCEEDED: &str = "weft_volume_capacity_exceeded_blocks_total";
const CHECKPOINTS: &str = "weft_volume_checkpoints_total";
const BANDS_GRANTED: &str = "weft_volume_bands_granted_total";
const BANDS_FREED: &str = "weft_volume_bands_freed_total";
const RECOVERED: &str = "weft_volume_recovered_stripes_total";
const SECONDS: &str = "weft_volume_command_seconds";

const fn count(
    name: &'static str,
    unit: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Metric {
    Metric {
        name,
        kind: Kind::Counter,
        unit,
        labels,
        help,
    }
}

/// One engine's count of something, recorded as a metric too.
pub(crate) struct Tally {
    value: Cell<u64>,
    metric: Counter,
}

impl Tally {
    fn new(metric: Counter) -> Self {
        Self {
            value: Cell::new(0),
            metric,
        }
    }

    pub(crate) fn add(&self, count: u64) {
        self.value.set(self.value.get() + count);
        self.metric.increment(count);
    }

    pub(crate) fn get(&self) -> u64 {
        self.value.get()
    }
}

/// What bytes sent to a drive are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bytes {
    User,
    Copy,
    Parity,
    Header,
    Map,
}

/// What one engine counts.
pub(crate) struct Counters {
    pub(crate) user_bytes: Tally,
    pub(crate) user_read_bytes: Tally,
    drive_bytes: [Tally; 5],
    pub(crate) drive_reads: Tally,
    stripes: RefCell<BTreeMap<(u8, u32), Tally>>,
    pub(crate) abandoned: Tally,
    pub(crate) suspected: Tally,
    pub(crate) suspects: Gauge,
    pub(crate) mismatches: Tally,
    pub(crate) repaired: Tally,
    pub(crate) reconstructed: Tally,
    pub(crate) rebuilt: Tally,
    pub(crate) compacted: Tally,
    pub(crate) full: Tally,
    pub(crate) checkpoints: Tally,
    pub(crate) bands_granted: Tally,
    pub(crate) bands_freed: Tally,
    pub(crate) applied: Tally,
    pub(crate) reappended: Tally,
    pub(crate) dropped: Tally,
    pub(crate) read_seconds: Histogram,
    pub(crate) write_seconds: Histogram,
    pub(crate) zero_seconds: Histogram,
}

impl Default for Counters {
    fn default() -> Self {
        let tally = |name| Tally::new(counter!(name));
        let bytes = |kind| Tally::new(counter!(DRIVE_BYTES, "kind" => kind));
        let recovered = |outcome| Tally::new(counter!(RECOVERED, "outcome" => outcome));
        let seconds = |op| histogram!(SECONDS, "op" => op);
        Self {
            user_bytes: tally(USER_BYTES),
            user_read_bytes: tally(USER_READ_BYTES),
            drive_bytes: [
                bytes("user"),
                bytes("copy"),
                bytes("parity"),
                bytes("header"),
                bytes("map"),
            ],
            drive_reads: tally(DRIVE_READS),
            stripes: RefCell::default(),
            abandoned: tally(ABANDONED),
            suspected: tally(SUSPECTED),
            suspects: gauge!(SUSPECT_DRIVES),
            mismatches: tally(MISMATCHES),
            repaired: tally(REPAIRED),
            reconstructed: tally(RECONSTRUCTED),
            rebuilt: tally(REBUILT),
            compacted: tally(COMPACTED),
            full: tally(CAPACITY_EXCEEDED),
            checkpoints: tally(CHECKPOINTS),
            bands_granted: tally(BANDS_GRANTED),
            bands_freed: tally(BANDS_FREED),
            applied: recovered("applied"),
            reappended: recovered("reappended"),
            dropped: recovered("dropped"),
            read_seconds: seconds("read"),
            write_seconds: seconds("write"),
            zero_seconds: seconds("zero"),
        }
    }
}

impl Counters {
    fn tally(&self, kind: Bytes) -> &Tally {
        let [user, copy, parity, header, map] = &self.drive_bytes;
        match kind {
            Bytes::User => user,
            Bytes::Copy => copy,
            Bytes::Parity => parity,
            Bytes::Header => header,
            Bytes::Map => map,
        }
    }

    /// `bytes` of `kind` were sent to a drive.
    pub(crate) fn sent(&self, kind: Bytes, bytes: u64) {
        if bytes > 0 {
            self.tally(kind).add(bytes);
        }
    }

    /// Bytes of `kind` sent so far.
    pub(crate) fn bytes(&self, kind: Bytes) -> u64 {
        self.tally(kind).get()
    }

    /// A stripe was sent.
    pub(crate) fn stripe_sent(&self, w: u8, d: u32) {
        self.stripes
            .borrow_mut()
            .entry((w, d))
            .or_insert_with(|| Tally::new(counter!(STRIPES, "w" => w.to_string(), "d" => d.to_string())))
            .add(1);
    }

    /// Stripes sent so far, by w and d.
    pub(crate) fn stripes(&self) -> BTreeMap<(u8, u32), u64> {
        self.stripes
            .borrow()
            .iter()
            .map(|(shape, tally)| (*shape, tally.get()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_named_for_its_subject_and_kind() {
        for metric in METRICS {
            assert!(metric.name.starts_with("weft_volume_"), "{}", metric.name);
            let total = metric.name.ends_with("_total");
            assert_eq!(total, metric.kind == Kind::Counter, "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
    }
}
