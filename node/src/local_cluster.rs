//! Agents on one machine: real processes, each with its own loopback address, data folder and drive files. What the
//! demo, the cluster tests and the guest tests stand on.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use weft_metadata::service::voters_among;

use crate::config::{Config, DriveConfig, EngineConfig, FabricConfig};

/// Clusters that this process has made.
static CLUSTERS: AtomicU32 = AtomicU32::new(0);

/// One agent, running or not.
#[derive(Debug)]
pub struct Agent {
    /// As its file says.
    pub config: Config,
    config_path: PathBuf,
    log_path: PathBuf,
    child: Option<Child>,
}

/// All agents of the demo and the folder they live in.
#[derive(Debug)]
pub struct Agents {
    folder: PathBuf,
    subnet: [u8; 3],
    options: Options,
    /// By index, in the order they were added.
    pub list: Vec<Agent>,
}

/// What the agents are made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// The `weft` program.
    pub program: PathBuf,
    /// Leave the agents running when this process ends.
    pub keep: bool,
    /// Drive files of each node.
    pub drives: u32,
    /// Bytes of each drive file (sparse).
    pub drive_bytes: u64,
    /// As in the configuration.
    pub engine: EngineConfig,
    /// As in the configuration.
    pub fabric: FabricConfig,
    /// The address of the first node instead of one from the chosen subnet: a guest's way to this machine ends
    /// at 127.0.0.1. Its ports are free ones then.
    pub first_address: Option<Ipv4Addr>,
    /// Network namespaces that exist, and the address of this machine's nodes in them, by index: each of these nodes lives in one
    /// instead of at a loopback address.
    pub namespaces: Vec<(String, Ipv4Addr)>,
}

impl Agents {
    /// Chooses a loopback subnet nobody listens on.
    ///
    /// # Errors
    /// All candidates are taken.
    pub fn new(folder: &Path, options: Options) -> anyhow::Result<Self> {
        for attempt in 0..64_u32 {
            // Clusters of one process must not meet either: their agents have not bound yet when the next one looks.
            let cluster = CLUSTERS.fetch_add(1, Ordering::Relaxed);
            let mix = std::process::id()
                .wrapping_mul(2_654_435_761)
                .wrapping_add((cluster * 64 + attempt) * 7919);
            let subnet = [127, 64 + (mix % 128) as u8, ((mix >> 8) % 250) as u8];
            let probe = Ipv4Addr::new(subnet[0], subnet[1], subnet[2], 1);
            let free = [7420, 4420, 8009, 9420]
                .iter()
                .all(|port| TcpListener::bind((probe, *port)).is_ok());
            if free {
                return Ok(Self {
                    folder: folder.to_owned(),
                    subnet,
                    options,
                    list: Vec::new(),
                });
            }
        }
        bail!("no free loopback subnet found for the agents")
    }

    /// Makes the files of one more node and starts its agent. Returns its index.
    ///
    /// # Errors
    /// The files cannot be made or the process cannot be started.
    pub fn add(&mut self) -> anyhow::Result<usize> {
        let index = self.list.len();
        let name = format!("n{}", index + 1);
        let host = u8::try_from(index + 1).context("too many nodes")?;
        let [a, b, c] = self.subnet;
        let namespace = self.options.namespaces.get(index);
        let own = namespace.map_or(Ipv4Addr::new(a, b, c, host), |(_, address)| *address);
        let addresses = match self.options.first_address.filter(|_| index == 0) {
            Some(address) => free_ports(address)?,
            None => [7420, 4420, 8009, 9420].map(|port| SocketAddr::from((own, port))),
        };
        let [control_listen, nvme_listen, discovery_listen, metrics_listen] = addresses;
        let folder = self.folder.join(&name);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let mut drives = Vec::new();
        for drive in 1..=self.options.drives {
            let path = folder.join(format!("drive{drive}.img"));
            let file = fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
            file.set_len(self.options.drive_bytes)
                .with_context(|| format!("size {}", path.display()))?;
            drives.push(DriveConfig {
                path,
                class: "tlc".to_owned(),
            });
        }
        let config = Config {
            name,
            rack: "rack1".to_owned(),
            data_dir: folder.join("data"),
            control_listen,
            nvme_listen,
            discovery_listen,
            metrics_listen,
            drives,
            engine: self.options.engine.clone(),
            fabric: self.options.fabric.clone(),
        };
        let config_path = folder.join("agent.toml");
        fs::write(
            &config_path,
            toml::to_string(&config).context("write configuration")?,
        )
        .with_context(|| format!("write {}", config_path.display()))?;
        self.list.push(Agent {
            config,
            config_path,
            log_path: folder.join("agent.log"),
            child: None,
        });
        self.start(index)?;
        Ok(index)
    }

    /// Starts the agent of one node.
    ///
    /// # Errors
    /// It runs already, or the process cannot be started.
    pub fn start(&mut self, index: usize) -> anyhow::Result<()> {
        let keep = self.options.keep;
        let program = self.options.program.clone();
        let namespace = self.options.namespaces.get(index).cloned();
        let agent = &mut self.list[index];
        ensure!(agent.child.is_none(), "agent {} runs already", agent.config.name);
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&agent.log_path)
            .with_context(|| format!("open {}", agent.log_path.display()))?;
        let mut command = match namespace {
            // It becomes the agent: the process is the one that is signalled.
            Some((name, _)) => {
                let mut inside = Command::new("ip");
                inside.args(["netns", "exec", &name]).arg(program);
                inside
            }
            None => Command::new(program),
        };
        command.arg("agent").arg("--config").arg(&agent.config_path);
        command.stdout(Stdio::null()).stderr(log);
        if keep {
            command.stdin(Stdio::null());
        } else {
            // The agents end with the demo, even if it is killed: they watch their standard input.
            command.arg("--exit-with-stdin").stdin(Stdio::piped());
        }
        agent.child = Some(
            command
                .spawn()
                .with_context(|| format!("start agent {}", agent.config.name))?,
        );
        Ok(())
    }

    /// SIGKILL, and waits until the process is gone.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self, index: usize) -> anyhow::Result<()> {
        let agent = &mut self.list[index];
        let mut child = agent
            .child
            .take()
            .with_context(|| format!("agent {} does not run", agent.config.name))?;
        child
            .kill()
            .with_context(|| format!("kill agent {}", agent.config.name))?;
        child
            .wait()
            .with_context(|| format!("wait for agent {}", agent.config.name))?;
        Ok(())
    }

    /// Runs `weft --cluster <all agents> ARGUMENTS` and waits for it.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn weft(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        self.command(arguments).output().context("run weft")
    }

    /// `weft --cluster <all agents> ARGUMENTS`, for whoever does not want to wait for it.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.options.program);
        command
            .arg("--cluster")
            .arg(self.control_addresses().join(","))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// As [`Agents::weft`], for a command that has to succeed. Returns its standard output.
    ///
    /// # Errors
    /// It failed; says what it printed.
    pub fn weft_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.weft(arguments)?;
        ensure!(
            output.status.success(),
            "weft {}: {}\n{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// As [`Agents::weft_ok`] with `--json`.
    ///
    /// # Errors
    /// As [`Agents::weft_ok`], or what it printed is not JSON.
    pub fn weft_json(&self, arguments: &[&str]) -> anyhow::Result<serde_json::Value> {
        let text = self.weft_ok(&[&["--json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("weft {}: {text}", arguments.join(" ")))
    }

    /// `weft init` on the first agent and `weft join` on the others, then waits until all drives are online.
    ///
    /// # Errors
    /// What a command printed, or that it takes too long.
    pub fn form(&self, voters: u32) -> anyhow::Result<()> {
        let addresses = self.control_addresses();
        let first = addresses.first().context("no agents")?;
        // An agent that was just started may not listen yet.
        self.wait_until("the first agent answers", |agents| {
            let voters = voters.to_string();
            agents
                .weft(&["init", "--agent", first, "--name", "test", "--voters", &voters])
                .is_ok_and(|output| output.status.success())
        })?;
        for address in &addresses[1..] {
            self.wait_until("an agent joins", |agents| {
                agents
                    .weft(&["join", "--agent", address])
                    .is_ok_and(|output| output.status.success())
            })?;
        }
        self.wait_for_drives(self.list.len() * self.options.drives as usize)?;
        let wanted = voters_among(voters as usize, addresses.len()).context("no voters")?;
        self.wait_until("the voters vote", |agents| {
            agents
                .weft_json(&["status"])
                .is_ok_and(|status| status["voters"].as_array().map_or(0, Vec::len) >= wanted)
        })?;
        // Bands are granted on drives where the owner is on record only: before that they would be narrower.
        let nodes = self.list.len();
        self.wait_until("every agent is registered on every drive", |agents| {
            agents.weft_json(&["drive", "list"]).is_ok_and(|drives| {
                drives.as_array().is_some_and(|drives| {
                    drives.iter().all(|drive| {
                        drive["registrations"]
                            .as_object()
                            .is_some_and(|known| known.len() >= nodes)
                    })
                })
            })
        })
    }

    /// Waits until `count` drives are online.
    ///
    /// # Errors
    /// It takes too long.
    pub fn wait_for_drives(&self, count: usize) -> anyhow::Result<()> {
        self.wait_until("all drives are online", |agents| {
            agents
                .weft_json(&["status"])
                .is_ok_and(|status| status["drives_online"] == count)
        })
    }

    /// What the threads of the agents do, as far as the kernel tells: for whoever has to find out why one does not answer.
    fn threads(&self) -> String {
        let of_agent = |agent: &Agent| {
            let Some(child) = &agent.child else {
                return format!("{} does not run", agent.config.name);
            };
            let process = PathBuf::from(format!("/proc/{}", child.id()));
            let mut threads = Vec::new();
            for task in fs::read_dir(process.join("task")).into_iter().flatten().flatten() {
                let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
                let stat = read("stat");
                // After the name, which may hold anything: the state.
                let state = stat.rsplit_once(") ").map_or("?", |(_, rest)| &rest[..1]);
                threads.push(format!(
                    "{} {state} {}",
                    read("comm").trim(),
                    read("wchan").trim()
                ));
            }
            format!("{}: {}", agent.config.name, threads.join(", "))
        };
        self.list.iter().map(of_agent).collect::<Vec<_>>().join("; ")
    }

    /// Waits until a condition holds, for as long as a slow machine may need.
    ///
    /// # Errors
    /// It does not come to hold, or an agent has ended by itself.
    pub fn wait_until(&self, what: &str, condition: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !condition(self) {
            ensure!(
                Instant::now() < deadline,
                "waited two minutes until {what}, in vain; {}",
                self.threads()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Sends a signal by name, such as STOP and CONT.
    ///
    /// # Errors
    /// The agent does not run.
    pub fn signal(&self, index: usize, name: &str) -> anyhow::Result<()> {
        let agent = &self.list[index];
        let child = agent
            .child
            .as_ref()
            .with_context(|| format!("agent {} does not run", agent.config.name))?;
        let signal = match name {
            "STOP" => rustix::process::Signal::STOP,
            "CONT" => rustix::process::Signal::CONT,
            other => bail!("signal {other}: STOP and CONT are known"),
        };
        let pid = rustix::process::Pid::from_child(child);
        rustix::process::kill_process(pid, signal)
            .with_context(|| format!("signal agent {}", agent.config.name))
    }

    /// The sum of a metric's series at one agent whose labels have `label` in them; `None` if the agent does not answer.
    pub fn metric(&self, index: usize, name: &str, label: &str) -> Option<f64> {
        let mut stream = TcpStream::connect(self.list[index].config.metrics_listen).ok()?;
        // An agent that is stopped accepts and says nothing.
        stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        stream
            .write_all(b"GET /metrics HTTP/1.0\r\nConnection: close\r\n\r\n")
            .ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let values = text.lines().filter_map(|line| {
            let labels = line.strip_prefix(name)?;
            let (labels, value) = labels.rsplit_once(' ')?;
            let is_series = labels.is_empty() || labels.starts_with('{');
            (is_series && labels.contains(label)).then(|| value.parse::<f64>().ok())?
        });
        Some(values.sum())
    }

    /// The process of an agent that runs.
    pub fn process_id(&self, index: usize) -> Option<u32> {
        self.list[index].child.as_ref().map(Child::id)
    }

    /// Names an agent that ended by itself, with the last lines of its log.
    pub fn first_dead(&mut self) -> Option<String> {
        self.list.iter_mut().find_map(|agent| {
            let status = agent.child.as_mut()?.try_wait().ok()??;
            Some(format!(
                "agent {} ended with {status}; its log ends:\n{}",
                agent.config.name,
                agent.log_tail(12)
            ))
        })
    }

    /// Position of a node by name.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.list.iter().position(|agent| agent.config.name == name)
    }

    /// Control addresses of all agents.
    pub fn control_addresses(&self) -> Vec<String> {
        self.list
            .iter()
            .map(|agent| agent.config.control_listen.to_string())
            .collect()
    }
}

impl Agent {
    /// Whether the process has been started and not been killed.
    pub fn runs(&self) -> bool {
        self.child.is_some()
    }

    /// Where the agent's log is.
    pub fn log_path(&self) -> &Path {
        &self.log_path
    }

    fn log_tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(&self.log_path).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

/// Four free ports of an address.
fn free_ports(address: Ipv4Addr) -> anyhow::Result<[SocketAddr; 4]> {
    // All four are held until all are known, so that they differ.
    let listeners = [0; 4].map(|port| TcpListener::bind((address, port)));
    let mut addresses = [SocketAddr::from((address, 0)); 4];
    for (listener, found) in listeners.into_iter().zip(&mut addresses) {
        *found = listener
            .and_then(|listener| listener.local_addr())
            .context("find a free port")?;
    }
    Ok(addresses)
}

impl Drop for Agents {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The logs go with their folder, and what failed may not fail again.
            let logs = self.list.iter().map(|agent| agent.log_tail(40));
            eprintln!("{}\n\n{}", self.threads(), logs.collect::<Vec<_>>().join("\n\n"));
        }
        if self.options.keep {
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
