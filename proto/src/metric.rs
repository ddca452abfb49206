//! What a metric is. Each crate lists its own as one table of these, and `weft metrics list`, the exporter and the tests
//! of the dashboards read the tables.

use std::fmt;

use serde::Serialize;

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Metric {
    /// As Prometheus sees it.
    pub name: &'static str,
    /// How its values relate.
    pub kind: Kind,
    /// Of a value; a count of things is named for the things, and a bare number has none.
    pub unit: &'static str,
    /// Names of its labels, each with a closed set of values.
    pub labels: &'static [&'static str],
    /// What it says, in a sentence.
    #[serde(rename = "meaning")]
    pub help: &'static str,
}

/// How a metric's values relate: Prometheus' kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Only grows, until the process restarts.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations by size.
    Histogram,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        })
    }
}
