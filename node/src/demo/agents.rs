//! The demo's agents: real processes of this same program, each with its own loopback address, data folder
//! and drive files.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, bail, ensure};

use crate::config::{Config, DriveConfig, EngineConfig};

/// One agent, running or not.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) config: Config,
    config_path: PathBuf,
    log_path: PathBuf,
    child: Option<Child>,
}

/// All agents of the demo and the folder they live in.
#[derive(Debug)]
pub(crate) struct Agents {
    folder: PathBuf,
    subnet: [u8; 3],
    keep: bool,
    drives: u32,
    drive_bytes: u64,
    pub(crate) list: Vec<Agent>,
}

impl Agents {
    /// Chooses a loopback subnet nobody listens on.
    ///
    /// # Errors
    /// All candidates are taken.
    pub(crate) fn new(folder: &Path, keep: bool, drives: u32, drive_bytes: u64) -> anyhow::Result<Self> {
        for attempt in 0..64_u32 {
            let mix = std::process::id().wrapping_mul(2_654_435_761).wrapping_add(attempt * 7919);
            let subnet = [127, 64 + (mix % 128) as u8, ((mix >> 8) % 250) as u8];
            let probe = Ipv4Addr::new(subnet[0], subnet[1], subnet[2], 1);
            let free = [7420, 4420, 8009, 9420].iter().all(|port| TcpListener::bind((probe, *port)).is_ok());
            if free {
                return Ok(Self { folder: folder.to_owned(), subnet, keep, drives, drive_bytes, list: Vec::new() });
            }
        }
        bail!("no free loopback subnet found for the demo's agents")
    }

    /// Makes the files of one more node and starts its agent. Returns its index.
    ///
    /// # Errors
    /// The files cannot be made or the process cannot be started.
    pub(crate) fn add(&mut self) -> anyhow::Result<usize> {
        let index = self.list.len();
        let name = format!("n{}", index + 1);
        let host = u8::try_from(index + 1).context("too many nodes")?;
        let address = |port| {
            SocketAddr::from((Ipv4Addr::new(self.subnet[0], self.subnet[1], self.subnet[2], host), port))
        };
        let folder = self.folder.join(&name);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let mut drives = Vec::new();
        for drive in 1..=self.drives {
            let path = folder.join(format!("drive{drive}.img"));
            let file = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
            file.set_len(self.drive_bytes).with_context(|| format!("size {}", path.display()))?;
            drives.push(DriveConfig { path, class: "tlc".to_owned() });
        }
        let config = Config {
            name,
            rack: "rack1".to_owned(),
            data_dir: folder.join("data"),
            control_listen: address(7420),
            nvme_listen: address(4420),
            discovery_listen: address(8009),
            metrics_listen: address(9420),
            drives,
            engine: EngineConfig::default(),
        };
        let config_path = folder.join("agent.toml");
        fs::write(&config_path, toml::to_string(&config).context("write configuration")?)
            .with_context(|| format!("write {}", config_path.display()))?;
        self.list.push(Agent { config, config_path, log_path: folder.join("agent.log"), child: None });
        self.start(index)?;
        Ok(index)
    }

    /// Starts the agent of one node.
    ///
    /// # Errors
    /// It runs already, or the process cannot be started.
    pub(crate) fn start(&mut self, index: usize) -> anyhow::Result<()> {
        let keep = self.keep;
        let agent = &mut self.list[index];
        ensure!(agent.child.is_none(), "agent {} runs already", agent.config.name);
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&agent.log_path)
            .with_context(|| format!("open {}", agent.log_path.display()))?;
        let program = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(program);
        command.arg("agent").arg("--config").arg(&agent.config_path);
        command.stdout(Stdio::null()).stderr(log);
        if keep {
            command.stdin(Stdio::null());
        } else {
            // The agents end with the demo, even if it is killed: they watch their standard input.
            command.arg("--exit-with-stdin").stdin(Stdio::piped());
        }
        agent.child = Some(command.spawn().with_context(|| format!("start agent {}", agent.config.name))?);
        Ok(())
    }

    /// SIGKILL, and waits until the process is gone.
    ///
    /// # Errors
    /// It does not run.
    pub(crate) fn kill(&mut self, index: usize) -> anyhow::Result<()> {
        let agent = &mut self.list[index];
        let mut child = agent.child.take().with_context(|| format!("agent {} does not run", agent.config.name))?;
        child.kill().with_context(|| format!("kill agent {}", agent.config.name))?;
        child.wait().with_context(|| format!("wait for agent {}", agent.config.name))?;
        Ok(())
    }

    /// Names an agent that ended by itself, with the last lines of its log.
    pub(crate) fn first_dead(&mut self) -> Option<String> {
        self.list.iter_mut().find_map(|agent| {
            let status = agent.child.as_mut()?.try_wait().ok()??;
            Some(format!("agent {} ended with {status}; its log ends:\n{}", agent.config.name, agent.log_tail(12)))
        })
    }

    /// Position of a node by name.
    pub(crate) fn index_of(&self, name: &str) -> Option<usize> {
        self.list.iter().position(|agent| agent.config.name == name)
    }

    /// Control addresses of all agents.
    pub(crate) fn control_addresses(&self) -> Vec<String> {
        self.list.iter().map(|agent| agent.config.control_listen.to_string()).collect()
    }
}

impl Agent {
    /// Whether the process has been started and not been killed.
    pub(crate) fn runs(&self) -> bool {
        self.child.is_some()
    }

    /// Where the agent's log is.
    pub(crate) fn log_path(&self) -> &Path {
        &self.log_path
    }

    fn log_tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(&self.log_path).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        for agent in &mut self.list {
            if let Some(mut child) = agent.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
