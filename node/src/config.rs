//! The agent's configuration: one TOML file, typed and then valid.
//!
//! Unknown keys are refused with the nearest known name. Every key is documented on its field, and
//! `docs/operating/configuration.md` shows a complete file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use weft_block::polling::SPAN_DEFAULT;
use weft_incarnation::bounds::Bounds;
use weft_volume::settings::Settings;

/// What the operator wrote. Defaults are in the functions below.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The node's name, unique in the cluster: lower-case letters, digits and hyphens, at most 32.
    pub name: String,
    /// The rack, a failure domain above the node.
    #[serde(default = "default_rack")]
    pub rack: String,
    /// Folder for the agent's identity, Raft log and reservation tables. One agent per folder.
    pub data_dir: PathBuf,
    /// gRPC for cluster, administration and watch. Bind beyond loopback only on a trusted network: there is no TLS yet.
    #[serde(default = "default_control")]
    pub control_listen: SocketAddr,
    /// NVMe/TCP for drives and volumes.
    #[serde(default = "default_nvme")]
    pub nvme_listen: SocketAddr,
    /// NVMe/TCP discovery subsystem.
    #[serde(default = "default_discovery")]
    pub discovery_listen: SocketAddr,
    /// Prometheus metrics over HTTP, at `/metrics`.
    #[serde(default = "default_metrics")]
    pub metrics_listen: SocketAddr,
    /// The drives of this server.
    #[serde(default, rename = "drive")]
    pub drives: Vec<DriveConfig>,
    /// The volume engines of this node.
    #[serde(default)]
    pub engine: EngineConfig,
    /// The associations of this node with the drives of others.
    #[serde(default)]
    pub fabric: FabricConfig,
}

/// One drive of this server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveConfig {
    /// A raw block device, or a file of fixed size (sparse is fine). It must exist.
    pub path: PathBuf,
    /// `scm`, `tlc` or `qlc`.
    #[serde(default = "default_class")]
    pub class: String,
}

/// Bounds of the volume engines.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Page-map cache of one volume, in MiB.
    pub cache_mib: u32,
    /// Page-map caches of all volumes of this node, in MiB: beyond it the largest have less.
    pub node_cache_mib: u32,
    /// Bytes of log after which a volume writes a checkpoint, in MiB.
    pub log_budget_mib: u32,
    /// Bytes of log of all volumes of this node, in MiB: beyond it the volume with the longest writes a checkpoint.
    pub node_log_budget_mib: u32,
    /// A column that has not answered for this long is skipped, in milliseconds.
    pub stall_ms: u64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            cache_mib: 64,
            node_cache_mib: 1024,
            log_budget_mib: 64,
            node_log_budget_mib: 2048,
            stall_ms: 300,
        }
    }
}

impl EngineConfig {
    /// For every engine of this node.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let stall = Duration::from_millis(self.stall_ms);
        let mut settings = Settings {
            stall,
            read_stall: stall,
            log_budget_bytes: u64::from(self.log_budget_mib) << 20,
            ..Settings::default()
        };
        settings.map.cache_bytes = bytes(self.cache_mib);
        settings
    }

    /// For all of them together.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        Bounds {
            log_bytes: u64::from(self.node_log_budget_mib) << 20,
            cache_bytes: bytes(self.node_cache_mib),
        }
    }
}

fn bytes(mib: u32) -> usize {
    usize::try_from(mib).unwrap_or(usize::MAX >> 20) << 20
}

/// How this node speaks to others, and serves them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FabricConfig {
    /// Keep-alive time-out of an association with a drive, in milliseconds: after so much silence each side ends it.
    pub keep_alive_ms: u64,
    /// How long the data thread looks for more work after something arrived before it sleeps, in microseconds. 0: not at
    /// all.
    pub polling_us: u64,
}

impl Default for FabricConfig {
    fn default() -> Self {
        Self {
            keep_alive_ms: 1000,
            polling_us: SPAN_DEFAULT.as_micros() as u64,
        }
    }
}

fn default_rack() -> String {
    "rack1".to_owned()
}

fn default_class() -> String {
    "tlc".to_owned()
}

const fn loopback(port: u16) -> SocketAddr {
    SocketAddr::V4(std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, port))
}

fn default_control() -> SocketAddr {
    loopback(DEFAULT_CONTROL_PORT)
}

fn default_nvme() -> SocketAddr {
    loopback(4420)
}

fn default_discovery() -> SocketAddr {
    loopback(8009)
}

fn default_metrics() -> SocketAddr {
    loopback(9420)
}

/// Where the command line looks for an agent if it is told nothing.
pub const DEFAULT_CONTROL_PORT: u16 = 7420;

/// Longest node, pool or volume name in bytes, so that every NQN made of one fits.
pub const NAME_BYTES_MAX: usize = 32;

/// Known keys by table, to name the nearest one when a key is unknown.
const KEYS: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "name",
            "rack",
            "data_dir",
            "control_listen",
            "nvme_listen",
            "discovery_listen",
            "metrics_listen",
            "drive",
            "engine",
            "fabric",
        ],
    ),
    ("drive", &["path", "class"]),
    (
        "engine",
        &[
            "cache_mib",
            "node_cache_mib",
            "log_budget_mib",
            "node_log_budget_mib",
            "stall_ms",
        ],
    ),
    ("fabric", &["keep_alive_ms", "polling_us"]),
];

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// A sentence that names the file, the key and the way out.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("configuration {}", path.display()))
    }

    /// Parses and checks the text of a configuration.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let table: toml::Table = text.parse()?;
        refuse_unknown_keys("", &table)?;
        let config: Self = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        check_name("name", &self.name)?;
        check_name("rack", &self.rack)?;
        for drive in &self.drives {
            ensure!(
                matches!(drive.class.as_str(), "scm" | "tlc" | "qlc"),
                "drive {}: class `{}` is not one of scm, tlc, qlc",
                drive.path.display(),
                drive.class
            );
        }
        for (index, drive) in self.drives.iter().enumerate() {
            if self.drives[..index]
                .iter()
                .any(|earlier| earlier.path == drive.path)
            {
                bail!("drive {} is listed twice", drive.path.display());
            }
        }
        ensure!(
            self.engine.cache_mib >= 1,
            "engine.cache_mib is 0, at least 1 is needed"
        );
        ensure!(
            self.engine.node_cache_mib >= self.engine.cache_mib,
            "engine.node_cache_mib is {}, less than the {} of one volume (engine.cache_mib)",
            self.engine.node_cache_mib,
            self.engine.cache_mib
        );
        ensure!(
            self.engine.log_budget_mib >= 1,
            "engine.log_budget_mib is 0, at least 1 is needed"
        );
        ensure!(
            self.engine.node_log_budget_mib >= 1,
            "engine.node_log_budget_mib is 0, at least 1 is needed"
        );
        ensure!(
            (20..=10_000).contains(&self.engine.stall_ms),
            "engine.stall_ms is {}, expected 20 to 10000",
            self.engine.stall_ms
        );
        ensure!(
            (200..=60_000).contains(&self.fabric.keep_alive_ms),
            "fabric.keep_alive_ms is {}, expected 200 to 60000",
            self.fabric.keep_alive_ms
        );
        ensure!(
            self.fabric.polling_us <= 1_000_000,
            "fabric.polling_us is {}, expected 0 (never) to 1000000",
            self.fabric.polling_us
        );
        Ok(())
    }
}

/// Checks a name that becomes part of NQNs and file names.
///
/// # Errors
/// Says what `what` is, its value and what is allowed.
pub fn check_name(what: &str, name: &str) -> anyhow::Result<()> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        !name.is_empty()
            && name.len() <= NAME_BYTES_MAX
            && name.chars().all(allowed)
            && !name.starts_with('-'),
        "{what} `{name}`: use 1 to {NAME_BYTES_MAX} lower-case letters, digits and hyphens, not beginning with a hyphen"
    );
    Ok(())
}

fn refuse_unknown_keys(table_name: &str, table: &toml::Table) -> anyhow::Result<()> {
    let Some((_, known)) = KEYS.iter().find(|(name, _)| *name == table_name) else {
        return Ok(());
    };
    for (key, value) in table {
        if !known.contains(&key.as_str()) {
            let shown = if table_name.is_empty() {
                key.clone()
            } else {
                format!("{table_name}.{key}")
            };
            let nearest = known
                .iter()
                .map(|name| (strsim::damerau_levenshtein(name, key), *name))
                .min()
                .filter(|(distance, name)| *distance <= name.len() / 2)
                .map_or_else(
                    || format!("known keys: {}", known.join(", ")),
                    |(_, name)| format!("did you mean `{name}`?"),
                );
            bail!("unknown key `{shown}`; {nearest}");
        }
        let tables: Vec<&toml::Table> = match value {
            toml::Value::Table(inner) => vec![inner],
            toml::Value::Array(items) => items.iter().filter_map(toml::Value::as_table).collect(),
            _ => Vec::new(),
        };
        for inner in tables {
            refuse_unknown_keys(key, inner)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = "name = \"n1\"\ndata_dir = \"/var/lib/weft\"\n";

    #[test]
    fn the_smallest_configuration_listens_on_loopback_only() {
        let config = Config::parse(SMALLEST).unwrap();
        for address in [
            config.control_listen,
            config.nvme_listen,
            config.discovery_listen,
            config.metrics_listen,
        ] {
            assert!(address.ip().is_loopback());
        }
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_name() {
        let error = Config::parse(&format!("{SMALLEST}nvme_listne = \"127.0.0.1:1\"\n")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown key `nvme_listne`; did you mean `nvme_listen`?"
        );
        let error = Config::parse(&format!("{SMALLEST}[[drive]]\npaht = \"/x\"\n")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown key `drive.paht`; did you mean `path`?"
        );
        let error = Config::parse(&format!("{SMALLEST}zzz = 1\n")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("unknown key `zzz`; known keys: name, rack")
        );
    }

    #[test]
    fn every_documented_key_is_known_and_every_known_key_is_a_field() {
        // A new field that is missing in KEYS would be refused as unknown; a stale key would pass the table and fail here.
        let config = Config::parse(&format!(
            "{SMALLEST}rack = \"r1\"\ncontrol_listen = \"127.0.0.1:1\"\nnvme_listen = \"127.0.0.1:2\"\n\
             discovery_listen = \"127.0.0.1:3\"\nmetrics_listen = \"127.0.0.1:4\"\n\
             [engine]\ncache_mib = 1\nnode_cache_mib = 2\nlog_budget_mib = 2\nnode_log_budget_mib = 3\nstall_ms = 30\n[fabric]\nkeep_alive_ms = 500\npolling_us = 0\n[[drive]]\npath = \"/d\"\nclass = \"qlc\"\n"
        ))
        .unwrap();
        let shown = toml::Table::try_from(&config).unwrap();
        let keys: Vec<&str> = shown.keys().map(String::as_str).collect();
        for key in KEYS[0].1 {
            assert!(keys.contains(key), "{key} is not a field");
        }
    }

    #[test]
    fn bad_values_name_the_key_the_value_and_what_is_allowed() {
        let error = Config::parse("name = \"N 1\"\ndata_dir = \"/x\"\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("`N 1`") && error.contains("lower-case"), "{error}");
        let error = Config::parse(&format!("{SMALLEST}[[drive]]\npath = \"/d\"\nclass = \"ssd\"\n"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/d") && error.contains("`ssd`") && error.contains("scm, tlc, qlc"),
            "{error}"
        );
    }
}
