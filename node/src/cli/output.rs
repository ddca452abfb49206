//! Tables for people, JSON for programs.

use std::io::Write as _;

use serde::Serialize;

/// How a command's answer is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

impl Output {
    /// Prints rows: one JSON array, or a table under a header.
    pub(crate) fn rows<T: Serialize>(self, header: &[&str], rows: &[T], cells: impl Fn(&T) -> Vec<String>) {
        if self.json {
            self.value(&rows);
        } else {
            let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
            print_all(&table(header, &cells));
        }
    }

    /// Prints one answer: a JSON object, or lines of text made by `text`.
    pub(crate) fn one<T: Serialize>(self, value: &T, text: impl Fn(&T) -> String) {
        if self.json {
            self.value(value);
        } else {
            print_all(&text(value));
        }
    }

    fn value<T: Serialize>(self, value: &T) {
        match serde_json::to_string(value) {
            Ok(line) => print_all(&format!("{line}\n")),
            Err(error) => print_all(&format!("{{\"error\":\"{error}\"}}\n")),
        }
    }
}

/// Writes to standard output; a reader that went away (a closed pipe) is not an error of ours.
pub(crate) fn print_all(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Columns aligned to their widest cell, two spaces apart.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .chain([header[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    let header: Vec<String> = header.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Bytes with a binary unit and at most one decimal.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() < 0.05 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_have_no_trailing_space() {
        let text = table(
            &["NAME", "SIZE"],
            &[
                vec!["a".into(), "1 GiB".into()],
                vec!["longer".into(), "2".into()],
            ],
        );
        assert_eq!(text, "NAME    SIZE\na       1 GiB\nlonger  2\n");
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1 << 30), "1 GiB");
        assert_eq!(bytes(1536), "1.5 KiB");
    }
}
