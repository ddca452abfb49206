//! What it takes root to do to a real agent: a network namespace of its own, cut off from others in one direction or both; a
//! file system of its own that fills up; I/O that is held to a few bytes a second.
//!
//! A cut is silent, as a switch that drops frames is: whoever is cut off sends to a hardware address that nobody has. Nothing is
//! refused and no connection is reset.
//!
//! Everything made here has a name with this process's number in it and is taken away when it is dropped.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

/// A hardware address that no interface has.
const NOBODY: &str = "02:00:00:ff:ff:ff";

/// Runs a program that has to succeed.
fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// As [`run`], for what may be gone already.
fn try_run(program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    command.args(arguments);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // Taking away what is not there any more is no failure.
    let _ = command.status();
}

/// One network namespace for each node, on one bridge that this machine is on as well.
#[derive(Debug)]
pub struct Networks {
    bridge: String,
    subnet: [u8; 3],
    names: Vec<String>,
}

impl Networks {
    /// Makes them for `nodes` nodes.
    ///
    /// # Errors
    /// Not root, or no `ip`.
    pub fn new(nodes: usize) -> anyhow::Result<Self> {
        let id = std::process::id();
        let subnet = [10, 128 + (id % 96) as u8, (id / 96 % 250) as u8];
        let mut networks = Self {
            bridge: format!("wf{id}"),
            subnet,
            names: Vec::new(),
        };
        let [a, b, c] = subnet;
        let bridge = networks.bridge.clone();
        run("ip", &["link", "add", &bridge, "type", "bridge"])?;
        run(
            "ip",
            &["addr", "add", &format!("{a}.{b}.{c}.254/24"), "dev", &bridge],
        )?;
        run("ip", &["link", "set", &bridge, "up"])?;
        for index in 0..nodes {
            networks.add(index)?;
        }
        for from in 0..nodes {
            for to in 0..nodes {
                networks.mend(from, to)?;
            }
        }
        Ok(networks)
    }

    fn add(&mut self, index: usize) -> anyhow::Result<()> {
        let name = format!("{}n{}", self.bridge, index + 1);
        // Interface names have at most 15 bytes.
        let (outer, inner) = (format!("{}o{}", self.bridge, index + 1), "eth0");
        run("ip", &["netns", "add", &name])?;
        self.names.push(name.clone());
        run(
            "ip",
            &[
                "link", "add", &outer, "type", "veth", "peer", "name", inner, "netns", &name,
            ],
        )?;
        run("ip", &["link", "set", &outer, "master", &self.bridge, "up"])?;
        let address = format!("{}/24", self.address(index));
        run("ip", &["-n", &name, "link", "set", inner, "address", &mac(index)])?;
        run("ip", &["-n", &name, "addr", "add", &address, "dev", inner])?;
        run("ip", &["-n", &name, "link", "set", inner, "up"])?;
        run("ip", &["-n", &name, "link", "set", "lo", "up"])
    }

    /// The namespace of each node, and its address there.
    #[must_use]
    pub fn hosts(&self) -> Vec<(String, Ipv4Addr)> {
        let hosts = self.names.iter().enumerate();
        hosts
            .map(|(index, name)| (name.clone(), self.address(index)))
            .collect()
    }

    fn address(&self, index: usize) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, index as u8 + 1)
    }

    /// From now on nothing that `from` sends to `to` arrives.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn cut(&self, from: usize, to: usize) -> anyhow::Result<()> {
        self.neighbour(from, to, NOBODY)
    }

    /// Ends a cut.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn mend(&self, from: usize, to: usize) -> anyhow::Result<()> {
        self.neighbour(from, to, &mac(to))
    }

    fn neighbour(&self, from: usize, to: usize, hardware: &str) -> anyhow::Result<()> {
        if from == to {
            return Ok(());
        }
        let (name, to) = (&self.names[from], self.address(to).to_string());
        let known = [
            "neigh",
            "replace",
            &to,
            "lladdr",
            hardware,
            "nud",
            "permanent",
            "dev",
            "eth0",
        ];
        run("ip", &[&["-n", name][..], &known].concat())
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        for name in &self.names {
            try_run("ip", &["netns", "del", name]);
        }
        try_run("ip", &["link", "del", &self.bridge]);
    }
}

fn mac(index: usize) -> String {
    format!("02:00:00:00:00:{:02x}", index + 1)
}

/// A file system on a loop device, for a drive file that is to meet a full one.
#[derive(Debug)]
pub struct SmallFileSystem {
    mounted: PathBuf,
}

impl SmallFileSystem {
    /// Mounts one of `bytes` bytes at `at`, which is made; its image lies beside.
    ///
    /// # Errors
    /// Not root, or no loop device.
    pub fn new(at: &Path, bytes: u64) -> anyhow::Result<Self> {
        fs::create_dir_all(at)?;
        let image = at.with_extension("ext4");
        fs::File::create(&image)?.set_len(bytes)?;
        let (image, mounted) = (image.display().to_string(), at.display().to_string());
        run("mkfs.ext4", &["-q", "-m", "0", &image])?;
        run("mount", &["-o", "loop", &image, &mounted])?;
        Ok(Self {
            mounted: at.to_owned(),
        })
    }

    /// Takes every free block of it.
    ///
    /// # Errors
    /// The file system's, but that it is full.
    pub fn fill(&self) -> anyhow::Result<()> {
        let mut file = fs::File::create(self.filler())?;
        let megabyte = vec![0xff; 1 << 20];
        loop {
            match std::io::Write::write_all(&mut file, &megabyte) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Gives them back.
    ///
    /// # Errors
    /// The file system's.
    pub fn drain(&self) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.mounted.join("filler")
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        try_run("umount", &["-l", &self.mounted.display().to_string()]);
    }
}

/// A group of processes whose I/O on one device is slow.
#[derive(Debug)]
pub struct Throttle {
    group: PathBuf,
    device: String,
}

impl Throttle {
    /// For I/O on the device that holds `file`.
    ///
    /// # Errors
    /// Not root, or the kernel has no such groups.
    pub fn new(file: &Path) -> anyhow::Result<Self> {
        let device = fs::metadata(file)?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let group = Path::new("/sys/fs/cgroup/blkio").join(format!("weft-chaos-{}", std::process::id()));
        fs::create_dir_all(&group).with_context(|| format!("make {}", group.display()))?;
        let throttle = Self {
            group,
            device: format!("{major}:{minor}"),
        };
        // Tries it, so that a kernel that cannot is found out now.
        throttle.limit(0)?;
        Ok(throttle)
    }

    /// Holds whoever is in it to so many operations a second in each direction; 0 is no limit.
    ///
    /// # Errors
    /// The kernel's.
    pub fn limit(&self, operations: u64) -> anyhow::Result<()> {
        for what in ["read_iops_device", "write_iops_device"] {
            let file = self.group.join(format!("blkio.throttle.{what}"));
            fs::write(&file, format!("{} {operations}", self.device))
                .with_context(|| format!("write {}", file.display()))?;
        }
        Ok(())
    }

    /// Takes a process in.
    ///
    /// # Errors
    /// It has ended.
    pub fn take(&self, process: u32) -> anyhow::Result<()> {
        Ok(fs::write(self.group.join("cgroup.procs"), process.to_string())?)
    }

    /// Lets a process go.
    ///
    /// # Errors
    /// It has ended.
    pub fn release(&self, process: u32) -> anyhow::Result<()> {
        let all = self.group.with_file_name("cgroup.procs");
        Ok(fs::write(all, process.to_string())?)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // Its processes have ended by now, or belong to the group above.
        let _ = fs::remove_dir(&self.group);
    }
}
