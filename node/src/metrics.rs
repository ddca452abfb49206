//! All metrics of an agent: the tables of the crates, in one list, described to the exporter.

use std::net::SocketAddr;

use anyhow::Context as _;
use serde::Serialize;

/// One metric, as `weft metrics list` prints it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) labels: &'static [&'static str],
    pub(crate) meaning: &'static str,
}
