//! Shards that consist of several slices, coded without assembling them.

use crate::coefficients::{DATA_SHARDS_MAX, PARITY_SHARDS_MAX, Row};
use crate::kernel::{Kernel, Mode};

/// Where a walk over a list of slices has come to.
struct Cursor<'a, S> {
    /// Not yet passed; the first one is being read.
    slices: &'a [S],
    /// Bytes read of the first one.
    read: usize,
}

impl<'a, S: AsRef<[u8]>> Cursor<'a, S> {
    /// The bytes up to the end of the current slice; `None` at the end of the list.
    fn rest(&mut self) -> Option<&'a [u8]> {
        while let Some((first, others)) = self.slices.split_first() {
            let rest = &first.as_ref()[self.read..];
            if !rest.is_empty() {
                return Some(rest);
            }
            *self = Self {
                slices: others,
                read: 0,
            };
        }
        None
    }
}

/// [`Kernel::combine`] over lists of slices, cut wherever one of them ends. A list shorter than the outputs
/// counts as followed by zeroes.
///
/// # Panics
/// When outputs differ in length, a list is longer than they are, or there are too many lists.
pub(crate) fn combine<S: AsRef<[u8]>>(
    kernel: Kernel,
    rows: &[Row],
    sources: &[&[S]],
    outputs: &mut [&mut [u8]],
) {
    assert!(sources.len() <= DATA_SHARDS_MAX, "more sources than coefficients");
    assert_eq!(rows.len(), outputs.len(), "one row of coefficients per output");
    for (rows, outputs) in rows
        .chunks(PARITY_SHARDS_MAX)
        .zip(outputs.chunks_mut(PARITY_SHARDS_MAX))
    {
        combine_group(kernel, rows, sources, outputs);
    }
}

/// [`combine`] for at most [`PARITY_SHARDS_MAX`] outputs.
fn combine_group<S: AsRef<[u8]>>(kernel: Kernel, rows: &[Row], sources: &[&[S]], outputs: &mut [&mut [u8]]) {
    let bytes = outputs.first().map_or(0, |output| output.len());
    let mut cursors: [Cursor<S>; DATA_SHARDS_MAX] = std::array::from_fn(|source| Cursor {
        slices: sources.get(source).copied().unwrap_or_default(),
        read: 0,
    });
    let cursors = &mut cursors[..sources.len()];

    let mut at = 0;
    loop {
        // The lists that have not ended, side by side, with their coefficients beside them.
        let mut live: [&[u8]; DATA_SHARDS_MAX] = [&[]; DATA_SHARDS_MAX];
        let mut live_rows = [[0; DATA_SHARDS_MAX]; PARITY_SHARDS_MAX];
        let mut count = 0;
        let mut step = usize::MAX;
        for (source, cursor) in cursors.iter_mut().enumerate() {
            if let Some(rest) = cursor.rest() {
                live[count] = rest;
                for (live_row, row) in live_rows.iter_mut().zip(rows) {
                    live_row[count] = row[source];
                }
                step = step.min(rest.len());
                count += 1;
            }
        }
        if count == 0 {
            break;
        }
        assert!(step <= bytes - at, "a shard is longer than the output");
        for slice in &mut live[..count] {
            *slice = &slice[..step];
        }
        let mut parts = parts(outputs, at, step);
        kernel.combine(
            Mode::Assign,
            &live_rows[..rows.len()],
            &live[..count],
            &mut parts[..rows.len()],
        );
        for cursor in cursors.iter_mut() {
            if cursor.rest().is_some() {
                cursor.read += step;
            }
        }
        at += step;
    }
    for output in outputs {
        output[at..].fill(0);
    }
}

/// Bytes `at` … `at + step` of each output.
fn parts<'a>(outputs: &'a mut [&mut [u8]], at: usize, step: usize) -> [&'a mut [u8]; PARITY_SHARDS_MAX] {
    let mut parts: [&mut [u8]; PARITY_SHARDS_MAX] = Default::default();
    for (part, output) in parts.iter_mut().zip(outputs) {
        *part = &mut output[at..at + step];
    }
    parts
}
