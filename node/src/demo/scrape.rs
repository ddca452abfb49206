//! Reads an agent's metrics as Prometheus does: HTTP and text.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// The samples of one or several agents.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    /// Series with their labels, each with the sum over the agents scraped.
    sums: BTreeMap<String, f64>,
    /// Agent and series.
    series: BTreeSet<(SocketAddr, String)>,
}

impl Samples {
    /// Scrapes one agent and adds its samples.
    ///
    /// # Errors
    /// The agent does not answer, or with something else than metrics.
    pub(crate) async fn scrape(&mut self, address: SocketAddr) -> anyhow::Result<()> {
        let text = tokio::time::timeout(Duration::from_secs(10), get(address))
            .await
            .with_context(|| format!("metrics of {address}: no answer in 10 s"))?
            .with_context(|| format!("metrics of {address}"))?;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else {
                continue;
            };
            let value: f64 = value
                .parse()
                .with_context(|| format!("metrics of {address}: `{line}`"))?;
            *self.sums.entry(series.to_owned()).or_default() += value;
            self.series.insert((address, series.to_owned()));
        }
        Ok(())
    }

    /// Distinct series over all agents scraped.
    pub(crate) fn series_count(&self) -> usize {
        self.series.len()
    }

    /// Sum of a metric over all its labels.
    pub(crate) fn sum(&self, name: &str) -> f64 {
        self.matching(name).map(|(_, value)| value).sum()
    }

    /// Sum of a metric's series that have `label="value"`.
    pub(crate) fn sum_where(&self, name: &str, label: &str, value: &str) -> f64 {
        let wanted = format!("{label}=\"{value}\"");
        self.matching(name)
            .filter(|(series, _)| series.contains(&wanted))
            .map(|(_, value)| value)
            .sum()
    }

    /// A metric's values by one of its labels.
    pub(crate) fn by_label(&self, name: &str, label: &str) -> BTreeMap<String, f64> {
        let mut values = BTreeMap::new();
        let opening = format!("{label}=\"");
        for (series, value) in self.matching(name) {
            if let Some((label_value, _)) = series
                .split_once(&opening)
                .and_then(|(_, rest)| rest.split_once('"'))
            {
                *values.entry(label_value.to_owned()).or_default() += value;
            }
        }
        values
    }

    fn matching<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a String, f64)> {
        self.sums.iter().filter_map(move |(series, value)| {
            let rest = series.strip_prefix(name)?;
            (rest.is_empty() || rest.starts_with('{')).then_some((series, *value))
        })
    }
}

async fn get(address: SocketAddr) -> anyhow::Result<String> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8(answer).context("not text")?;
    ensure!(
        answer.starts_with("HTTP/1.1 200"),
        "{}",
        answer.lines().next().unwrap_or("no answer")
    );
    let (head, body) = answer.split_once("\r\n\r\n").context("no body")?;
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        unchunk(body)
    } else {
        Ok(body.to_owned())
    }
}

/// Joins the chunks of a chunked body (RFC 9112, section 7.1).
fn unchunk(mut body: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").context("chunk without a size")?;
        let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16)
            .context("chunk size")?;
        if size == 0 {
            return Ok(text);
        }
        text.push_str(rest.get(..size).context("short chunk")?);
        body = rest.get(size + 2..).context("short chunk")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(lines: &[(&str, f64)]) -> Samples {
        let address = ([127, 0, 0, 1], 1).into();
        Samples {
            sums: lines
                .iter()
                .map(|(series, value)| ((*series).to_owned(), *value))
                .collect(),
            series: lines
                .iter()
                .map(|(series, _)| (address, (*series).to_owned()))
                .collect(),
        }
    }

    #[test]
    fn a_metric_is_summed_over_its_labels_and_not_over_longer_names() {
        let samples = samples(&[
            ("a{op=\"read\"}", 1.0),
            ("a{op=\"write\",x=\"y\"}", 2.0),
            ("ab", 4.0),
        ]);
        assert_eq!(samples.sum("a"), 3.0);
        assert_eq!(samples.sum_where("a", "op", "write"), 2.0);
        assert_eq!(
            samples.by_label("a", "op"),
            BTreeMap::from([("read".into(), 1.0), ("write".into(), 2.0)])
        );
    }

    #[test]
    fn chunks_are_joined() {
        assert_eq!(unchunk("3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\n").unwrap(), "abcde");
        assert!(unchunk("9\r\nabc\r\n").is_err());
    }
}
