//! A volume follows its guest: it comes to a running guest by hot-plug, grows under a mounted file system, and goes along to
//! another node, where it is attached and has not changed; nothing is copied for that.

use std::path::Path;

use anyhow::{Context as _, ensure};
use weft_chaos::guest::{self, Drives};
use weft_node::local_cluster::Agents;

use super::{attach_guest, cluster, serial, vm_options, wait_until_served};

/// What the volume grows to.
const BYTES: u64 = 48 << 20;

pub(super) fn test(program: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let agents = cluster(program, folder.path(), 3)?;
    for volume in ["first", "follows"] {
        agents.weft_ok(&["volume", "create", volume, "--size", "32MiB", "--ec", "2+1"])?;
        wait_until_served(&agents, volume)?;
    }
    let serial = serial(&agents, "follows")?;
    let bytes = BYTES.to_string();
    let first = attach_guest(&agents, folder.path(), "first", 0)?;

    let control = folder.path().join("qmp");
    let qmp = format!("unix:{},server=on,wait=off", control.display());
    let drives = Drives {
        options: &vm_options(&agents, &[first])?,
        more: &["-device", "pcie-root-port,id=port0,chassis=1", "-qmp", &qmp],
        firmware: None,
    };
    let mut sum = None;
    let variables = [
        ("BOOT", "1"),
        ("SERIAL", serial.as_str()),
        ("BYTES", bytes.as_str()),
    ];
    guest::run_with_drives("follow.sh", &variables, &drives, |line| {
        match line {
            "guest: ready for a drive" => {
                let socket = attach_guest(&agents, folder.path(), "follows", 0)?;
                let path = socket.display().to_string();
                let printed = agents.weft_json(&["vm", "qmp", &path, "--port", "port0"])?;
                guest::monitor(&control, &printed["qmp"]).context("hot-plug")?;
            }
            "guest: ready for a larger drive" => {
                agents.weft_ok(&["volume", "resize", "follows", "--size", &bytes])?;
            }
            _ => sum = line.strip_prefix("guest: sum ").map(str::to_owned).or(sum.take()),
        }
        Ok(())
    })?;
    let sum = sum.context("the guest told what it wrote")?;

    let from = agents.list[0].config.name.clone();
    let to = agents.list[1].config.name.clone();
    let copied = drive_bytes(&agents, "copy")?;
    let written = drive_bytes(&agents, "user")?;
    let socket = folder.path().join("follows-0.sock").display().to_string();
    agents.weft_ok(&["volume", "detach", "follows", "--vfio-user", &socket])?;
    for node in [&from, &to] {
        // Wherever it was: it goes from one to the other.
        agents.weft_ok(&["volume", "move", "follows", "--to", node])?;
        agents.wait_until("the volume has moved", |agents| {
            agents.weft_ok(&["volume", "show", "follows"]).is_ok_and(|shown| {
                let mut lines = shown.lines();
                shown.contains("serving")
                    && lines.any(|line| line.starts_with("owner") && line.contains(node.as_str()))
            })
        })?;
    }
    let moved = attach_guest(&agents, folder.path(), "follows", 1)?;
    let drives = Drives {
        options: &vm_options(&agents, &[moved])?,
        more: &[],
        firmware: None,
    };
    let variables = [("BOOT", "2"), ("SERIAL", serial.as_str()), ("SUM", sum.as_str())];
    guest::run_with_drives("follow.sh", &variables, &drives, |_| Ok(()))?;
    let copied = drive_bytes(&agents, "copy")? - copied;
    let written = drive_bytes(&agents, "user")? - written;
    println!("moved from {from} to {to}: {copied} bytes copied, {written} bytes written by guests");
    ensure!(copied == 0.0, "{copied} bytes were copied for a move");
    Ok(())
}

/// Bytes that the agents' engines have written to drives, of a kind.
fn drive_bytes(agents: &Agents, kind: &str) -> anyhow::Result<f64> {
    let label = format!("kind=\"{kind}\"");
    let of_agent = |index| {
        let bytes = agents.metric(index, "weft_volume_drive_bytes_total", &label);
        bytes.context("an agent's metrics")
    };
    (0..agents.list.len()).map(of_agent).sum()
}
