//! All metrics of an agent: the tables of the crates in one list, and the exporter that serves them.

use std::net::SocketAddr;

use anyhow::Context as _;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use weft_proto::metric::{Kind, Metric};

/// Volumes that this node owns and does not answer for: a gauge.
pub(crate) const SILENCED_VOLUMES: &str = "weft_agent_silenced_volumes";

/// The agent's own.
const METRICS: &[Metric] = &[Metric {
    name: SILENCED_VOLUMES,
    kind: Kind::Gauge,
    unit: "",
    labels: &[],
    help: "Volumes whose hosts are sent to other paths, because their owner here has been without a lease for a while: it has lost the drives.",
}];

/// Every metric that an agent can export, by name.
#[must_use]
pub fn list() -> Vec<Metric> {
    let tables = [
        weft_block::metrics::METRICS,
        weft_initiator::METRICS,
        weft_metadata::metrics::METRICS,
        weft_target::metrics::METRICS,
        weft_volume::metrics::METRICS,
        METRICS,
    ];
    let mut metrics = tables.concat();
    metrics.sort_by_key(|metric| metric.name);
    metrics
}

/// Latency buckets in seconds: from a memory copy to a host's patience.
const SECONDS: [f64; 16] = [
    10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.5, 2.0, 10.0,
];

/// Serves `/metrics` and describes every metric, so that a dashboard finds it before its first event.
///
/// # Errors
/// The address is not free.
pub(crate) fn serve(listen: SocketAddr) -> anyhow::Result<()> {
    PrometheusBuilder::new()
        .with_http_listener(listen)
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .context("histogram buckets")?
        .install()
        .with_context(|| format!("metrics_listen = \"{listen}\": cannot listen"))?;
    for metric in list() {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
    Ok(())
}
