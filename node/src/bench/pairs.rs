//! Floor and subject measured in turn, so that whatever else the machine does meets both.

use serde::Serialize;

use super::histogram::Histogram;
use super::statistics::estimate;

/// Microseconds of CPU per I/O on each side.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct CpuPerIo {
    /// The load generator.
    pub(super) host: Option<f64>,
    /// Everything else.
    pub(super) target: Option<f64>,
}

/// One repeat of one side.
#[derive(Clone, Default)]
pub(super) struct Window {
    /// What is compared: a rate, or a latency.
    pub(super) value: f64,
    pub(super) latency: Histogram,
    pub(super) cpu: CpuPerIo,
}

/// The repeats, pair by pair.
pub(super) struct Paired {
    pub(super) floors: Vec<Window>,
    pub(super) subjects: Vec<Window>,
}

/// Measures `count` pairs. Which of the two goes first changes with every pair, so that a drift favours neither. A pair
/// before them is not counted.
pub(super) fn measure(
    count: usize,
    mut floor: impl FnMut() -> anyhow::Result<Window>,
    mut subject: impl FnMut() -> anyhow::Result<Window>,
) -> anyhow::Result<Paired> {
    floor()?;
    subject()?;
    let mut paired = Paired {
        floors: Vec::with_capacity(count),
        subjects: Vec::with_capacity(count),
    };
    for pair in 0..count {
        if pair % 2 == 0 {
            paired.floors.push(floor()?);
            paired.subjects.push(subject()?);
        } else {
            paired.subjects.push(subject()?);
            paired.floors.push(floor()?);
        }
    }
    Ok(paired)
}

impl Paired {
    pub(super) fn subject_latency(&self) -> Histogram {
        latency(&self.subjects)
    }

    pub(super) fn floor_latency(&self) -> Histogram {
        latency(&self.floors)
    }

    pub(super) fn subject_cpu(&self) -> CpuPerIo {
        cpu(&self.subjects)
    }

    pub(super) fn floor_cpu(&self) -> CpuPerIo {
        cpu(&self.floors)
    }
}

fn latency(windows: &[Window]) -> Histogram {
    let mut all = Histogram::default();
    for window in windows {
        all.merge(&window.latency);
    }
    all
}

fn cpu(windows: &[Window]) -> CpuPerIo {
    let median = |side: fn(&CpuPerIo) -> Option<f64>| {
        let values: Vec<f64> = windows.iter().filter_map(|window| side(&window.cpu)).collect();
        (!values.is_empty()).then(|| estimate(&values).median)
    };
    CpuPerIo {
        host: median(|cpu| cpu.host),
        target: median(|cpu| cpu.target),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn the_sides_take_turns_in_going_first() {
        let order = RefCell::new(String::new());
        let side = |name| {
            order.borrow_mut().push(name);
            Ok(Window::default())
        };
        let paired = measure(3, || side('f'), || side('s')).unwrap();
        assert_eq!(*order.borrow(), "fsfssffs");
        assert_eq!((paired.floors.len(), paired.subjects.len()), (3, 3));
    }
}
