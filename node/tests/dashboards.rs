//! The dashboards and alert rules use only metrics that exist, and are what their sources say.
//!
//! `dashboards/source/*.toml` are written by hand; `dashboards/grafana/*.json` and `dashboards/alerts/weft.yml` are
//! generated from them: by this test, when WEFT_WRITE_DASHBOARDS is set.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use serde_json::{Value, json};

/// Labels that Prometheus adds by itself.
const SCRAPE_LABELS: [&str; 3] = ["instance", "job", "le"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Dashboard {
    uid: String,
    title: String,
    row: Vec<Row>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    title: String,
    panel: Vec<Panel>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Panel {
    title: String,
    /// Grafana's name of the visualization.
    #[serde(default = "timeseries")]
    kind: String,
    /// Grafana's name of the unit.
    #[serde(default = "plain_number")]
    unit: String,
    /// What a bad value means.
    #[serde(default)]
    help: String,
    query: Vec<Query>,
}

fn timeseries() -> String {
    "timeseries".into()
}

fn plain_number() -> String {
    "short".into()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Query {
    expr: String,
    #[serde(default)]
    legend: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Alerts {
    alert: Vec<Alert>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Alert {
    name: String,
    expr: String,
    #[serde(rename = "for", default)]
    pending: Option<String>,
    severity: String,
    summary: String,
}

/// A line of `weft metrics list --json`.
#[derive(Deserialize)]
struct Metric {
    name: String,
    kind: String,
    labels: Vec<String>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../dashboards")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// By file name without its ending.
fn dashboards() -> BTreeMap<String, Dashboard> {
    let sources = std::fs::read_dir(folder().join("source")).expect("dashboards/source");
    sources
        .map(|entry| entry.expect("a folder entry").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "toml"))
        .filter(|path| path.file_stem().is_some_and(|stem| stem != "alerts"))
        .map(|path| {
            let name = path.file_stem().expect("filtered").to_string_lossy().into_owned();
            let dashboard = toml::from_str(&read(&path)).unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, dashboard)
        })
        .collect()
}

fn alerts() -> Vec<Alert> {
    let alerts: Alerts = toml::from_str(&read(&folder().join("source/alerts.toml"))).expect("alerts.toml");
    alerts.alert
}

/// Every expression, with where it stands.
fn expressions() -> Vec<(String, String)> {
    let mut expressions = Vec::new();
    for (name, dashboard) in dashboards() {
        for row in dashboard.row {
            for panel in row.panel {
                let place = format!("{name}: {}", panel.title);
                expressions.extend(panel.query.into_iter().map(|query| (place.clone(), query.expr)));
            }
        }
    }
    expressions.extend(alerts().into_iter().map(|alert| (alert.name, alert.expr)));
    expressions
}

/// The metrics of the program under test, as it lists them itself.
fn metrics() -> BTreeMap<String, Metric> {
    let output = Command::new(env!("CARGO_BIN_EXE_weft"))
        .args(["--json", "metrics", "list"])
        .output()
        .expect("weft runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metrics: Vec<Metric> = serde_json::from_slice(&output.stdout).expect("a JSON array of metrics");
    assert!(!metrics.is_empty());
    metrics
        .into_iter()
        .map(|metric| (metric.name.clone(), metric))
        .collect()
}

/// The metric that a series belongs to: a histogram has three.
fn metric_of<'a>(series: &str, metrics: &'a BTreeMap<String, Metric>) -> Option<&'a Metric> {
    metrics.get(series).or_else(|| {
        ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| metrics.get(series.strip_suffix(suffix)?))
            .find(|metric| metric.kind == "histogram")
    })
}

/// Names of series in an expression.
fn series(expr: &str) -> BTreeSet<&str> {
    words(expr).filter(|word| word.starts_with("weft_")).collect()
}

fn words(expr: &str) -> impl Iterator<Item = &str> {
    expr.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
}

/// Label names in an expression: of `by (…)`, and before `=`, `!=`, `=~` and `!~` within braces.
fn labels(expr: &str) -> BTreeSet<&str> {
    let grouped = expr
        .split("by (")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .flat_map(|(list, _)| words(list));
    let matched = expr
        .split('{')
        .skip(1)
        .filter_map(|rest| rest.split_once('}'))
        .flat_map(|(list, _)| list.split("\","))
        .filter_map(|matcher| matcher.split_once(['=', '!']))
        .map(|(label, _)| label.trim());
    grouped.chain(matched).collect()
}

#[test]
fn every_metric_used_exists() {
    let metrics = metrics();
    for (place, expr) in expressions() {
        let series = series(&expr);
        assert!(!series.is_empty(), "{place}: no metric of ours in `{expr}`");
        for name in series {
            let metric = metric_of(name, &metrics);
            let metric = metric.unwrap_or_else(|| panic!("{place}: `{name}` is not in `weft metrics list`"));
            if metric.kind == "histogram" {
                assert_ne!(
                    metric.name, name,
                    "{place}: a histogram is read by its _bucket, _sum or _count"
                );
            }
        }
    }
}

#[test]
fn every_label_used_exists_on_a_metric_of_the_expression() {
    let metrics = metrics();
    for (place, expr) in expressions() {
        let known: BTreeSet<&str> = series(&expr)
            .into_iter()
            .filter_map(|name| metric_of(name, &metrics))
            .flat_map(|metric| metric.labels.iter().map(String::as_str))
            .chain(SCRAPE_LABELS)
            .collect();
        for label in labels(&expr) {
            assert!(
                known.contains(label),
                "{place}: no metric of `{expr}` has a label `{label}`"
            );
        }
    }
}

#[test]
fn counters_are_shown_as_rates() {
    let metrics = metrics();
    for (place, expr) in expressions() {
        for name in series(&expr) {
            let Some(metric) = metric_of(name, &metrics) else {
                continue;
            };
            if metric.kind == "gauge" {
                continue;
            }
            let is_rate = ["rate(", "increase("]
                .iter()
                .any(|function| expr.contains(&format!("{function}{name}")));
            assert!(
                is_rate,
                "{place}: `{name}` only grows, and its value says nothing: `{expr}`"
            );
        }
    }
}

#[test]
fn every_label_in_a_legend_is_left_by_its_expression() {
    for (name, dashboard) in dashboards() {
        for panel in dashboard.row.iter().flat_map(|row| &row.panel) {
            for query in &panel.query {
                // Without an aggregation a series keeps all its labels.
                let Some((_, rest)) = query.expr.split_once("by (") else {
                    continue;
                };
                let kept: BTreeSet<&str> = rest.split(')').next().into_iter().flat_map(words).collect();
                for label in query
                    .legend
                    .split("{{")
                    .skip(1)
                    .filter_map(|rest| rest.split("}}").next())
                {
                    assert!(
                        kept.contains(label),
                        "{name}: {}: `{label}` is summed away",
                        panel.title
                    );
                }
            }
        }
    }
}

#[test]
fn every_alert_has_a_paragraph_for_the_operator() {
    let page = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operating/alerts.md"));
    let headings: BTreeSet<&str> = page.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    let alerts = alerts();
    let names: BTreeSet<&str> = alerts.iter().map(|alert| alert.name.as_str()).collect();
    assert_eq!(headings, names);
    assert_eq!(alerts.len(), names.len(), "an alert is there twice");
}

#[test]
fn what_is_checked_in_is_what_the_sources_give() {
    let mut files: BTreeMap<PathBuf, String> = dashboards()
        .iter()
        .map(|(name, dashboard)| {
            let text = serde_json::to_string_pretty(&grafana(dashboard)).expect("JSON");
            (folder().join("grafana").join(format!("{name}.json")), text + "\n")
        })
        .collect();
    files.insert(folder().join("alerts/weft.yml"), rules(&alerts()));
    for (path, expected) in &files {
        if std::env::var_os("WEFT_WRITE_DASHBOARDS").is_some() {
            std::fs::write(path, expected).expect("dashboards can be written");
        }
        assert!(
            std::fs::read_to_string(path).is_ok_and(|found| found == *expected),
            "{} is not what its source gives: run with WEFT_WRITE_DASHBOARDS=1",
            path.display()
        );
    }
    for entry in std::fs::read_dir(folder().join("grafana")).expect("dashboards/grafana") {
        let path = entry.expect("a folder entry").path();
        assert!(files.contains_key(&path), "{} has no source", path.display());
    }
}

#[test]
fn expressions_are_taken_apart_as_written() {
    let expr =
        r#"histogram_quantile(0.9, sum by (le, drive) (rate(weft_x_seconds_bucket{a=~"b, c", d!="e"}[5m])))"#;
    assert_eq!(series(expr), BTreeSet::from(["weft_x_seconds_bucket"]));
    assert_eq!(labels(expr), BTreeSet::from(["a", "d", "drive", "le"]));
}

/// A dashboard as Grafana imports it.
fn grafana(dashboard: &Dashboard) -> Value {
    const COLUMNS: u32 = 24;
    let mut panels = Vec::new();
    let (mut y, mut id) = (0, 0);
    let mut next_id = || {
        id += 1;
        id
    };
    for row in &dashboard.row {
        panels.push(json!({
            "id": next_id(), "type": "row", "title": row.title, "collapsed": false, "panels": [],
            "gridPos": { "x": 0, "y": y, "w": COLUMNS, "h": 1 },
        }));
        y += 1;
        let mut x = 0;
        let mut row_height = 0;
        for panel in &row.panel {
            let (w, h) = if panel.kind == "stat" { (6, 4) } else { (12, 8) };
            if x + w > COLUMNS {
                (x, y, row_height) = (0, y + row_height, 0);
            }
            panels.push(grafana_panel(
                panel,
                next_id(),
                json!({ "x": x, "y": y, "w": w, "h": h }),
            ));
            x += w;
            row_height = row_height.max(h);
        }
        y += row_height;
    }
    json!({
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["weft"],
        "schemaVersion": 39,
        "editable": true,
        "refresh": "10s",
        "time": { "from": "now-1h", "to": "now" },
        "templating": { "list": [
            { "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus" },
            {
                "name": "agent", "label": "Agent", "type": "query", "datasource": data_source(),
                "query": { "query": "label_values(weft_target_connections, instance)", "refId": "agent" },
                "refresh": 2, "multi": true, "includeAll": true, "allValue": ".*",
                "current": { "text": ["All"], "value": ["$__all"] },
            },
        ] },
        "panels": panels,
    })
}

fn grafana_panel(panel: &Panel, id: u32, position: Value) -> Value {
    let targets: Vec<Value> = panel
        .query
        .iter()
        .zip('A'..)
        .map(|(query, letter)| {
            json!({
                "refId": letter.to_string(), "datasource": data_source(), "expr": query.expr,
                "legendFormat": if query.legend.is_empty() { "__auto" } else { &query.legend },
            })
        })
        .collect();
    json!({
        "id": id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": data_source(),
        "gridPos": position,
        "fieldConfig": { "defaults": { "unit": panel.unit, "min": 0 }, "overrides": [] },
        "targets": targets,
    })
}

fn data_source() -> Value {
    json!({ "type": "prometheus", "uid": "${datasource}" })
}

/// A rule file of Prometheus. Strings are quoted as JSON, which YAML reads as it is.
fn rules(alerts: &[Alert]) -> String {
    let quoted = |text: &str| Value::from(text).to_string();
    let mut text = String::from("# Generated from ../source/alerts.toml: see README.md.\n");
    text += "groups:\n  - name: weft\n    rules:\n";
    for alert in alerts {
        text += &format!(
            "      - alert: {}\n        expr: {}\n",
            alert.name,
            quoted(&alert.expr)
        );
        if let Some(pending) = &alert.pending {
            text += &format!("        for: {pending}\n");
        }
        text += &format!("        labels:\n          severity: {}\n", alert.severity);
        text += &format!(
            "        annotations:\n          summary: {}\n",
            quoted(&alert.summary)
        );
        let page = format!("docs/operating/alerts.md#{}", alert.name.to_ascii_lowercase());
        text += &format!("          runbook: {}\n", quoted(&page));
    }
    text
}
