//! A Linux guest under QEMU's software emulation: `chaos/guest/prepare` makes it, `chaos/guest/run` boots it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

/// How long a guest may take to say something. Emulated guests on a slow machine need minutes.
const PATIENCE: Duration = Duration::from_secs(600);

/// The folder of the guest's scripts.
fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guest")
}

/// Installs what the guest needs and makes it, once. Returns its kernel's version.
///
/// # Errors
/// What could not be installed or made.
pub fn prepare() -> anyhow::Result<String> {
    let output = Command::new(scripts().join("prepare"))
        .stderr(Stdio::inherit())
        .output()
        .context("prepare")?;
    ensure!(output.status.success(), "chaos/guest/prepare: {}", output.status);
    let folder = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    let version = folder.join("kernel");
    Ok(std::fs::read_to_string(&version)
        .with_context(|| version.display().to_string())?
        .trim()
        .to_owned())
}

/// Runs a script in a guest to its end, its output on ours.
///
/// # Errors
/// The guest did not boot, or the script failed: says with which status.
pub fn run(script: &str, variables: &[(&str, &str)]) -> anyhow::Result<()> {
    let status = command(script, variables).status().context("run a guest")?;
    ensure!(status.success(), "guest script {script}: {status}");
    Ok(())
}

/// A guest whose drives are volumes, or that has none.
#[derive(Default)]
pub struct Drives<'a> {
    /// As `weft vm qemu` prints them.
    pub options: &'a str,
    /// Of QEMU, besides.
    pub more: &'a [&'a str],
    /// The firmware that boots from the first of the drives, `efi` or `bios`; otherwise a kernel is given to QEMU.
    pub firmware: Option<&'a str>,
}

/// Runs a script in a guest whose drives are volumes; a guest that boots from one of them has its own. Its output goes to
/// ours, and `heard` is told each line.
///
/// # Errors
/// The guest did not boot, the script failed, or `heard` did.
pub fn run_with_drives(
    script: &str,
    variables: &[(&str, &str)],
    drives: &Drives<'_>,
    mut heard: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut command = command(script, variables);
    command.arg("--").args(drives.more);
    command.env("GUEST_OPTIONS", drives.options);
    if let Some(firmware) = drives.firmware {
        command.env("GUEST_BOOT", firmware);
    }
    let mut child = command.stdout(Stdio::piped()).spawn().context("run a guest")?;
    let output = child.stdout.take().context("a guest's output")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        println!("{line}");
        heard(&line)?;
    }
    let status = child.wait().context("wait for a guest")?;
    ensure!(status.success(), "guest script {script}: {status}");
    Ok(())
}

/// Sends one command to a QEMU whose monitor (QMP) listens at `path`.
///
/// # Errors
/// Nobody listens, or it is refused.
pub fn monitor(path: &Path, command: &serde_json::Value) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let negotiate = serde_json::json!({ "execute": "qmp_capabilities" });
    for command in [&negotiate, command] {
        writeln!(stream, "{command}")?;
        loop {
            let line = lines.next().context("the monitor hung up")??;
            let answer: serde_json::Value = serde_json::from_str(&line)?;
            ensure!(answer.get("error").is_none(), "{command}: {line}");
            // Greetings and events come in between.
            if answer.get("return").is_some() {
                break;
            }
        }
    }
    Ok(())
}

/// The disk with a system that boots from it.
#[must_use]
pub fn boot_image() -> PathBuf {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/guest");
    top.join("boot.img")
}

fn command(script: &str, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(scripts().join("run"));
    command.arg(scripts().join(script));
    command.args(variables.iter().map(|(name, value)| format!("{name}={value}")));
    command.stdin(Stdio::null());
    command
}

/// A guest that serves a namespace with the kernel's nvmet.
pub struct Nvmet {
    guest: Child,
    stop_port: u16,
    /// Where this machine reaches its NVMe/TCP listener.
    pub port: u16,
    /// Its subsystem.
    pub subnqn: &'static str,
}

impl Nvmet {
    /// Boots a guest whose nvmet serves `size_mib` MiB, with reservations or without, and waits until it listens.
    ///
    /// # Errors
    /// The guest did not boot, or nvmet could not be set up.
    pub fn boot(size_mib: u32, reservations: bool) -> anyhow::Result<Self> {
        let subnqn = "nqn.2026-11.io.weft.test:nvmet";
        let (port, stop_port) = (free_port()?, free_port()?);
        let reservations = if reservations { "1" } else { "0" };
        let mut command = command(
            "nvmet.sh",
            &[
                ("SUBNQN", subnqn),
                ("SIZE_MIB", &size_mib.to_string()),
                ("RESERVATIONS", reservations),
            ],
        );
        let forward =
            format!("user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:4420,hostfwd=tcp:127.0.0.1:{stop_port}-:4421");
        command.args(["--", "-netdev", &forward]).stdout(Stdio::piped());
        let mut guest = command.spawn().context("run a guest")?;
        let output = guest.stdout.take().context("the guest's output")?;
        let (lines, received) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                println!("  nvmet {line}");
                // Nobody listens any more once it is ready.
                let _ = lines.send(line);
            }
        });
        let nvmet = Self {
            guest,
            stop_port,
            port,
            subnqn,
        };
        loop {
            match received.recv_timeout(PATIENCE) {
                Ok(line) if line.contains("nvmet ready") => return Ok(nvmet),
                Ok(_) => {}
                Err(_) => bail!("the guest's nvmet did not become ready"),
            }
        }
    }

    /// Tells the guest to end.
    ///
    /// # Errors
    /// It ended badly.
    pub fn stop(mut self) -> anyhow::Result<()> {
        drop(TcpStream::connect((Ipv4Addr::LOCALHOST, self.stop_port)).context("tell the guest to end")?);
        let status = self.guest.wait().context("wait for the guest")?;
        ensure!(status.success(), "the nvmet guest ended with {status}");
        Ok(())
    }
}

impl Drop for Nvmet {
    fn drop(&mut self) {
        // Only after a failure: `stop` has waited for it otherwise.
        let _ = self.guest.kill();
        let _ = self.guest.wait();
    }
}

/// Lets guests, which reach this machine at 127.0.0.1 alone, reach `address`. Returns the port. It goes on until the process
/// ends, and when one side ends a connection, the other one hears of it after all that was sent.
///
/// # Errors
/// No port is free.
pub fn relay(address: SocketAddr) -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen for guests")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            // Where nobody listens, the guest's connection ends.
            let _ = TcpStream::connect(address).and_then(|far| {
                pump(near.try_clone()?, far.try_clone()?);
                pump(far, near);
                Ok(())
            });
        }
    });
    Ok(port)
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    std::thread::spawn(move || {
        // However it ends, it is over for both.
        let _ = to.set_nodelay(true);
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
}

fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}
