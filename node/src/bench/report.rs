//! Rows: what was measured beside its floor, and whether that is enough. As JSON and as a table.

use serde::Serialize;

use super::machine::Machine;
use super::pairs::{CpuPerIo, Paired, Window};
use super::statistics::{Estimate, estimate};
use crate::cli::output::print_all;

/// What a row has to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Required {
    /// Value over floor, at least.
    RatioAtLeast(f64),
    /// Value over floor, at most: a latency.
    RatioAtMost(f64),
    /// The value itself, at least.
    ValueAtLeast(f64),
    /// The value itself, at most: a cost.
    ValueAtMost(f64),
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) stage: &'static str,
    pub(super) workload: String,
    /// Median of the repeats.
    pub(super) value: f64,
    pub(super) unit: &'static str,
    /// Median of the floor's repeats, in the same unit.
    pub(super) floor: f64,
    /// What the floor is.
    pub(super) floor_is: &'static str,
    /// Median of the pairs' ratios, value over floor. `null` where the floor is nothing.
    pub(super) ratio: Option<f64>,
    pub(super) required: f64,
    /// What `required` bounds: `ratio_min`, `ratio_max`, `value_min` or `value_max`.
    pub(super) required_of: &'static str,
    pub(super) pass: bool,
    /// Interval of what `required` bounds, over the repeats.
    pub(super) spread: [f64; 2],
    pub(super) pairs: usize,
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) p999_us: Option<f64>,
    pub(super) floor_p50_us: Option<f64>,
    pub(super) cpu_us_per_io: CpuPerIo,
    pub(super) floor_cpu_us_per_io: CpuPerIo,
    pub(super) processes: u32,
    pub(super) drive_kind: &'static str,
}

/// What a row is called and judged by.
pub(super) struct Heading {
    pub(super) stage: &'static str,
    pub(super) workload: String,
    pub(super) unit: &'static str,
    pub(super) floor_is: &'static str,
    pub(super) required: Required,
    pub(super) processes: u32,
    pub(super) drive_kind: &'static str,
}

impl Row {
    /// Judges what was measured.
    pub(super) fn new(heading: Heading, measured: &Paired) -> Self {
        let values: Vec<f64> = measured.subjects.iter().map(|window| window.value).collect();
        let floors: Vec<f64> = measured.floors.iter().map(|window| window.value).collect();
        let ratios: Vec<f64> = values
            .iter()
            .zip(&floors)
            .map(|(value, floor)| value / floor)
            .collect();
        let (value, floor, ratio) = (estimate(&values), estimate(&floors), estimate(&ratios));
        let (required, required_of, judged) = match heading.required {
            Required::RatioAtLeast(required) => (required, "ratio_min", ratio),
            Required::RatioAtMost(required) => (required, "ratio_max", ratio),
            Required::ValueAtLeast(required) => (required, "value_min", value),
            Required::ValueAtMost(required) => (required, "value_max", value),
        };
        let latency = measured.subject_latency();
        Self {
            stage: heading.stage,
            workload: heading.workload,
            value: value.median,
            unit: heading.unit,
            floor: floor.median,
            floor_is: heading.floor_is,
            ratio: Some(ratio.median).filter(|ratio| ratio.is_finite()),
            required,
            required_of,
            pass: passes(heading.required, judged),
            spread: [judged.low, judged.high],
            pairs: ratios.len(),
            p50_us: latency.quantile_us(0.5),
            p99_us: latency.quantile_us(0.99),
            p999_us: latency.quantile_us(0.999),
            floor_p50_us: measured.floor_latency().quantile_us(0.5),
            cpu_us_per_io: measured.subject_cpu(),
            floor_cpu_us_per_io: measured.floor_cpu(),
            processes: heading.processes,
            drive_kind: heading.drive_kind,
        }
    }
}

impl Row {
    /// Judges something that is counted, or measured once and long enough: repeats would say nothing more.
    pub(super) fn counted(heading: Heading, value: f64, floor: f64) -> Self {
        let window = |value| Window {
            value,
            ..Window::default()
        };
        let once = Paired {
            floors: vec![window(floor)],
            subjects: vec![window(value)],
        };
        Self::new(heading, &once)
    }
}

/// A row fails only if the whole interval does.
fn passes(required: Required, judged: Estimate) -> bool {
    match required {
        Required::RatioAtLeast(least) | Required::ValueAtLeast(least) => judged.high >= least,
        Required::RatioAtMost(most) | Required::ValueAtMost(most) => judged.low <= most,
    }
}

/// A run of the command.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    pub(super) machine: Machine,
    pub(super) quick: bool,
    pub(super) optimised: bool,
    /// Share of the machine's CPU that nobody used, just before the first row.
    pub(super) idle_before: Option<f64>,
    /// The same, just after the last one.
    pub(super) idle_after: Option<f64>,
    pub(super) seconds: f64,
    pub(super) rows: Vec<Row>,
    /// What rows do not tell, in sentences.
    pub(super) notes: Vec<String>,
    /// Stages that could not be measured at all, and why.
    pub(super) errors: Vec<String>,
}

impl Report {
    /// Whether every row was measured and passed.
    pub(super) fn passes(&self) -> bool {
        self.errors.is_empty() && self.rows.iter().all(|row| row.pass)
    }

    /// The head of the table.
    pub(super) fn print_head() {
        print_all(&format!(
            "{:<8} {:<40} {:>10} {:>10} {:<6} {:>6} {:>13} {:>8} {:<4} {:>8} {:>8} {:>8} {:>6} {:>6}\n",
            "stage",
            "workload",
            "value",
            "floor",
            "unit",
            "ratio",
            "interval",
            "required",
            "",
            "p50 µs",
            "p99",
            "p99.9",
            "host",
            "target"
        ));
    }

    /// What stands below the table.
    pub(super) fn print_foot(&self) {
        for note in &self.notes {
            print_all(&format!("{note}\n"));
        }
        for error in &self.errors {
            print_all(&format!("not measured: {error}\n"));
        }
        let idle = |share: Option<f64>| {
            share.map_or("unknown".to_owned(), |share| format!("{:.0} %", share * 100.0))
        };
        let failed = self.rows.iter().filter(|row| !row.pass).count();
        print_all(&format!(
            "{} rows, {failed} below what is required; {}, {} cores, Linux {}, commit {}; idle CPU before {} and after {}; {:.0} s\n",
            self.rows.len(),
            self.machine.machine,
            self.machine.cores,
            self.machine.kernel,
            self.machine.commit,
            idle(self.idle_before),
            idle(self.idle_after),
            self.seconds
        ));
        if !self.optimised {
            print_all("This is an unoptimised build: its figures mean nothing.\n");
        }
    }
}

impl Row {
    /// As a line of the table.
    pub(super) fn print(&self) {
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        let hundredths = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        let required = match self.required_of {
            "ratio_max" => format!("≤ {}", self.required),
            "value_min" => format!("≥ {}", figure(self.required)),
            "value_max" => format!("≤ {}", figure(self.required)),
            _ => format!("≥ {}", self.required),
        };
        let interval = match self.required_of {
            _ if self.pairs == 1 => "-".to_owned(),
            "value_min" | "value_max" => {
                format!("{}–{}", figure(self.spread[0]), figure(self.spread[1]))
            }
            _ => format!("{:.2}–{:.2}", self.spread[0], self.spread[1]),
        };
        print_all(&format!(
            "{:<8} {:<40} {:>10} {:>10} {:<6} {:>6} {:>13} {:>8} {:<4} {:>8} {:>8} {:>8} {:>6} {:>6}\n",
            self.stage,
            self.workload,
            figure(self.value),
            figure(self.floor),
            self.unit,
            hundredths(self.ratio),
            interval,
            required,
            if self.pass { "ok" } else { "FAIL" },
            number(self.p50_us),
            number(self.p99_us),
            number(self.p999_us),
            hundredths(self.cpu_us_per_io.host),
            hundredths(self.cpu_us_per_io.target),
        ));
    }
}

/// Thousands as k.
fn figure(value: f64) -> String {
    if value >= 1000.0 {
        format!("{:.1} k", value / 1000.0)
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(required: Required, values: [f64; 9]) -> Row {
        let window = |value| Window {
            value,
            ..Window::default()
        };
        let measured = Paired {
            floors: vec![window(100.0); 9],
            subjects: values.map(window).to_vec(),
        };
        let heading = Heading {
            stage: "target",
            workload: "4 KiB".into(),
            unit: "IOPS",
            floor_is: "echo",
            required,
            processes: 1,
            drive_kind: "memory",
        };
        Row::new(heading, &measured)
    }

    #[test]
    fn a_row_fails_only_when_its_whole_interval_does() {
        // The second highest still reaches it: not shown to be too slow.
        let values = [60.0, 61.0, 62.0, 63.0, 64.0, 65.0, 66.0, 75.0, 90.0];
        assert!(row(Required::RatioAtLeast(0.75), values).pass);
        let values = [60.0, 61.0, 62.0, 63.0, 64.0, 65.0, 66.0, 74.0, 90.0];
        let failed = row(Required::RatioAtLeast(0.75), values);
        assert!(!failed.pass);
        assert_eq!((failed.ratio, failed.spread), (Some(0.64), [0.61, 0.74]));
    }

    #[test]
    fn a_latency_fails_when_even_its_lower_end_is_too_long() {
        let values = [120.0, 126.0, 130.0, 130.0, 130.0, 130.0, 130.0, 130.0, 130.0];
        assert!(!row(Required::RatioAtMost(1.25), values).pass);
        assert!(row(Required::RatioAtMost(1.27), values).pass);
    }

    #[test]
    fn an_absolute_requirement_is_compared_with_the_value() {
        assert!(row(Required::ValueAtLeast(50.0), [50.0; 9]).pass);
        assert!(!row(Required::ValueAtLeast(51.0), [50.0; 9]).pass);
    }

    #[test]
    fn a_cost_without_a_floor_has_no_ratio_and_is_compared_with_the_most_it_may_be() {
        let heading = |required| Heading {
            stage: "idle",
            workload: "CPU".into(),
            unit: "%",
            floor_is: "nothing",
            required,
            processes: 1,
            drive_kind: "file",
        };
        let row = Row::counted(heading(Required::ValueAtMost(2.0)), 1.5, 0.0);
        assert!(row.pass && row.ratio.is_none());
        assert_eq!((row.value, row.spread), (1.5, [1.5, 1.5]));
        assert!(!Row::counted(heading(Required::ValueAtMost(1.0)), 1.5, 0.0).pass);
        assert!(Row::counted(heading(Required::RatioAtMost(1.25)), 2.5, 2.0).pass);
    }

    #[test]
    fn json_has_the_fields_that_programs_look_for() {
        let json = serde_json::to_value(row(Required::RatioAtLeast(0.5), [50.0; 9])).unwrap();
        for field in [
            "stage",
            "workload",
            "value",
            "unit",
            "floor",
            "ratio",
            "required",
            "pass",
            "spread",
            "p50_us",
            "p99_us",
            "p999_us",
            "cpu_us_per_io",
            "processes",
            "drive_kind",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
    }
}
