//! What the demo found, for people and for programs.

use std::collections::BTreeMap;

use serde::Serialize;

/// One single-line JSON object with `--json`; also on failure, with `error`.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Report {
    /// Why the demo failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    pub(crate) input: String,
    pub(crate) input_bytes: u64,
    pub(crate) sha256_written: String,
    pub(crate) sha256_read: String,
    pub(crate) nodes: usize,
    /// Names of the nodes whose agent got SIGKILL while commands were outstanding.
    pub(crate) killed: Vec<String>,
    /// Commands outstanding at each of those kills.
    pub(crate) outstanding_at_kill: Vec<u32>,
    pub(crate) io_errors: u64,
    pub(crate) host_retries: u64,
    /// From SIGKILL of the owner to the completion of a write and a read issued after it.
    pub(crate) failover_ms: f64,
    /// Longest gap of a 1 ms probe over the move.
    pub(crate) move_pause_ms: f64,
    /// Payload written because of the move.
    pub(crate) move_bytes_copied: u64,
    /// Payload that the host wrote during the move.
    pub(crate) move_bytes_host: u64,
    /// Parity, headers, page map and roots written during the move.
    pub(crate) move_bytes_metadata: u64,
    /// Everything the volume's engines wrote to drives during the move: the sum of the three above.
    pub(crate) move_bytes_drive: u64,
    pub(crate) bytes_per_user_byte: f64,
    /// Data shards of a stripe → stripes.
    pub(crate) stripe_width: BTreeMap<String, u64>,
    /// Payload blocks of a shard → stripes.
    pub(crate) stripe_depth: BTreeMap<String, u64>,
    pub(crate) capacity_before_bytes: u64,
    pub(crate) capacity_after_bytes: u64,
    /// Distinct series over all agents.
    pub(crate) metrics_series: usize,
    pub(crate) seconds: f64,
}

impl Report {
    /// The summary for people.
    pub(crate) fn summary(&self) -> String {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
        let histogram = |values: &BTreeMap<String, u64>| {
            let mut pairs: Vec<(u64, u64)> = values
                .iter()
                .filter_map(|(key, count)| Some((key.parse().ok()?, *count)))
                .collect();
            pairs.sort_unstable();
            pairs
                .iter()
                .map(|(key, count)| format!("{key}:{count}"))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let mut text = String::new();
        let mut line = |name: &str, value: String| text.push_str(&format!("  {name:<22} {value}\n"));
        line("input", format!("{} ({})", self.input, mib(self.input_bytes)));
        line("SHA-256 written", self.sha256_written.clone());
        line("SHA-256 read back", self.sha256_read.clone());
        line("nodes", self.nodes.to_string());
        line(
            "killed under I/O",
            format!(
                "{} ({:?} commands outstanding)",
                self.killed.join(", "),
                self.outstanding_at_kill
            ),
        );
        line("host I/O errors", self.io_errors.to_string());
        line("host path retries", self.host_retries.to_string());
        line("failover", format!("{:.0} ms", self.failover_ms));
        line("move: longest pause", format!("{:.1} ms", self.move_pause_ms));
        line(
            "move: bytes copied",
            format!(
                "{} (drives {} = host {} + metadata {} + copied)",
                self.move_bytes_copied,
                mib(self.move_bytes_drive),
                mib(self.move_bytes_host),
                mib(self.move_bytes_metadata)
            ),
        );
        line(
            "drive bytes/user byte",
            format!("{:.2}", self.bytes_per_user_byte),
        );
        line("stripe width w", histogram(&self.stripe_width));
        line("stripe depth d", histogram(&self.stripe_depth));
        line(
            "usable capacity",
            format!(
                "{} → {}",
                mib(self.capacity_before_bytes),
                mib(self.capacity_after_bytes)
            ),
        );
        line("metric series", self.metrics_series.to_string());
        line("time", format!("{:.1} s", self.seconds));
        text
    }
}
