//! The guest tests: `chaos/guest/test`, or `guest PATH-OF-WEFT`.
//!
//! 1. The Linux kernel as a host: discovery, connect, `nvme list`, `nvme id-ctrl`, fio with verify, mkfs.ext4, write,
//!    disconnect, reconnect, fsck, compare.
//! 2. The Linux kernel's nvmet as a third-party drive: refused by name without reservations; with them it completes a
//!    4+2 that five nodes cannot hold, and data written through it comes back when a node is gone.
//! 3. The Linux kernel's own multipath, with the owner stopped under its writes: what it left in sockets never lands.
//! 4. Volumes as NVMe drives of a guest, through emulated controllers: four at once, resets, fio with verify while a storage
//!    node is killed, mkfs.ext4, and a second boot that finds it all.
//! 5. A volume that follows its guest: hot-plug, resize, move (`follow`).
//! 6. An operating system that boots from a volume, by UEFI and by BIOS (`boot`).
//!
//! `guest PATH-OF-WEFT NAME…` runs those that are named.

mod boot;
mod follow;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use weft_block::{Device, Durability};
use weft_chaos::guest::{self, Drives, Nvmet};
use weft_initiator::{ConnectOptions, HostIdentity, Multipath, MultipathOptions};
use weft_node::config::EngineConfig;
use weft_node::local_cluster::{Agents, Options};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::units::{Lba, LbaRange};

/// As `chaos/guest/init` writes it.
const GUEST_HOSTNQN: &str = "nqn.2014-08.org.nvmexpress:uuid:6b1f2c3d-0000-4000-8000-000000000001";

/// A test of a program.
type Test = fn(&Path) -> anyhow::Result<()>;

const TESTS: [(&str, &str, Test); 6] = [
    ("host", "the Linux kernel as a host", linux_is_a_host),
    ("nvmet", "nvmet as a third-party drive", nvmet_is_a_drive),
    (
        "multipath",
        "the Linux kernel with several paths, owners stopped and resumed",
        linux_fails_over,
    ),
    ("drives", "volumes as drives of a guest", volumes_are_drives),
    ("follow", "a volume that follows its guest", follow::test),
    ("boot", "an operating system that boots from a volume", boot::test),
];

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let program = arguments
        .next()
        .map(PathBuf::from)
        .context("usage: guest PATH-OF-WEFT [TEST…]")?;
    let wanted: Vec<_> = arguments.collect();
    ensure!(
        wanted
            .iter()
            .all(|wanted| TESTS.iter().any(|(name, ..)| wanted == name)),
        "the tests are {}",
        TESTS.map(|(name, ..)| name).join(", ")
    );
    let kernel = guest::prepare()?;
    println!("guest kernel: Linux {kernel}");
    let mut passed = 0;
    for (name, title, test) in TESTS {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            let began = Instant::now();
            test(&program).context(title)?;
            println!("passed: {title}, Linux {kernel}, {} s", began.elapsed().as_secs());
            passed += 1;
        }
    }
    println!("{passed} passed, 0 failed");
    Ok(())
}

fn cluster(program: &Path, folder: &Path, nodes: u32) -> anyhow::Result<Agents> {
    let mut agents = Agents::new(
        folder,
        Options {
            program: program.to_owned(),
            keep: false,
            drives: 1,
            drive_bytes: 1 << 30,
            engine: EngineConfig::default(),
            fabric: Default::default(),
            first_address: Some(Ipv4Addr::LOCALHOST),
            namespaces: Vec::new(),
        },
    )?;
    for _ in 0..nodes {
        agents.add()?;
    }
    agents.form(3)?;
    Ok(agents)
}

fn linux_is_a_host(program: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let agents = cluster(program, folder.path(), 6)?;
    let subnqn = create_disk(&agents, "256MiB")?;
    let config = &agents.list[0].config;
    guest::run(
        "host.sh",
        &[
            ("SUBNQN", &subnqn),
            ("PORT", &config.nvme_listen.port().to_string()),
            ("DISCOVERY_PORT", &config.discovery_listen.port().to_string()),
        ],
    )
}

fn nvmet_is_a_drive(program: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let mut agents = cluster(program, folder.path(), 5)?;
    let nsid = "1";

    let without = Nvmet::boot(768, false)?;
    let address = format!("127.0.0.1:{}", without.port);
    let add = [
        "drive",
        "add",
        "--nvme-tcp",
        &address,
        "--subnqn",
        without.subnqn,
        "--nsid",
        nsid,
        "--force",
    ];
    let refused = agents.weft(&add)?;
    let sentence = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        refused.status.code() == Some(4)
            && sentence.contains("does not support reservations")
            && sentence.contains(&address),
        "a target without reservations has to be refused by name: {} {sentence}",
        refused.status
    );
    println!("refused, as it must be: {}", sentence.trim());
    without.stop()?;

    let nvmet = Nvmet::boot(768, true)?;
    let address = format!("127.0.0.1:{}", nvmet.port);
    agents.weft_ok(&[
        "drive",
        "add",
        "--nvme-tcp",
        &address,
        "--subnqn",
        nvmet.subnqn,
        "--nsid",
        nsid,
    ])?;
    agents.wait_for_drives(6)?;
    let subnqn: Nqn = create_disk(&agents, "256MiB")?.parse()?;

    let addresses = agents
        .list
        .iter()
        .map(|agent| agent.config.nvme_listen)
        .collect::<Vec<_>>();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    let host = HostIdentity {
        hostnqn: GUEST_HOSTNQN.parse()?,
        hostid: HostId([0x5a; 16]),
    };
    let connect = ConnectOptions::new(addresses[0], subnqn, host);
    local.block_on(&runtime, async {
        let device: Device = Rc::new(Multipath::connect(MultipathOptions::new(connect, addresses, 1)).await?);
        for chunk in 0..CHUNKS {
            device
                .write(chunk_start(chunk), vec![chunk_bytes(chunk)], Durability::Cached)
                .await?;
        }
        compare(&device).await?;
        let drives = agents.weft_json(&["drive", "list"])?;
        println!("drives: {drives}");
        // Without any one of the five nodes, every stripe needs the third-party drive's shards or parity.
        let killed = agents.list.len() - 1;
        agents.kill(killed)?;
        compare(&device).await?;
        agents.start(killed)?;
        anyhow::Ok(())
    })?;
    agents.wait_for_drives(6)?;
    let status = agents.weft_json(&["status"])?;
    ensure!(
        status["pools"][0]["domains"] == 6,
        "the third-party box is no failure domain of its own: {status}"
    );
    nvmet.stop()
}

/// How often the owner is stopped.
const ROUNDS: usize = 3;

fn linux_fails_over(program: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let agents = cluster(program, folder.path(), 7)?;
    let subnqn = create_disk(&agents, "64MiB")?;
    let ports = agents
        .list
        .iter()
        .map(|agent| Ok(guest::relay(agent.config.nvme_listen)?.to_string()))
        .collect::<anyhow::Result<Vec<_>>>()?
        .join(" ");
    let rounds = ROUNDS.to_string();
    let variables = [
        ("SUBNQN", subnqn.as_str()),
        ("PORTS", &ports),
        ("ROUNDS", &rounds),
    ];
    let mut stopped = None;
    guest::run_with_drives("multipath.sh", &variables, &Drives::default(), |line| {
        if line.starts_with("guest: writing") {
            // Not before the writes are under way.
            std::thread::sleep(Duration::from_millis(1500));
            let owner = owner(&agents, "disk")?;
            println!("the owner, {}, is stopped", agents.list[owner].config.name);
            agents.signal(owner, "STOP")?;
            stopped = Some(owner);
        } else if line.starts_with("guest: overwritten") {
            let owner = stopped.take().context("nobody was stopped")?;
            println!("and resumed");
            agents.signal(owner, "CONT")?;
        }
        Ok(())
    })?;
    agents.wait_for_drives(7)
}

fn owner(agents: &Agents, volume: &str) -> anyhow::Result<usize> {
    let shown = agents.weft_ok(&["volume", "show", volume])?;
    let mut words = shown.split_whitespace().skip_while(|word| *word != "owner");
    let name = words.nth(1).with_context(|| format!("no owner: {shown}"))?;
    agents.index_of(name).with_context(|| format!("no agent {name}"))
}

/// Drives of the guest that has volumes for drives.
const DRIVES: usize = 4;

/// The one of them whose doorbells are mapped.
const MAPPED: usize = 3;

fn volumes_are_drives(program: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let mut agents = cluster(program, folder.path(), 7)?;
    let mut sockets = Vec::new();
    for number in 0..DRIVES {
        let name = format!("disk{number}");
        agents.weft_ok(&["volume", "create", &name, "--size", "128MiB", "--ec", "4+2"])?;
        // One of them rings in a page that QEMU maps, at an agent of its own, which then hears of no doorbell.
        let (agent, doorbells): (_, &[_]) = match number {
            MAPPED => (1, &["--map-doorbells"]),
            _ => (0, &[]),
        };
        sockets.push(attach_guest_with(
            &agents,
            folder.path(),
            &name,
            agent,
            doorbells,
        )?);
    }
    let serial = serial(&agents, "disk0")?;
    let options = vm_options(&agents, &sockets)?;
    let attached = Drives {
        options: &options,
        more: &[],
        firmware: None,
    };
    let drives = DRIVES.to_string();
    let variables = |boot| {
        [
            ("DRIVES", drives.as_str()),
            ("SERIAL", serial.as_str()),
            ("BOOT", boot),
        ]
    };
    let killed = agents.list.len() - 1;
    guest::run_with_drives("vfio.sh", &variables("1"), &attached, |line| {
        if line == "guest: writing" {
            println!("a storage node is killed");
            agents.kill(killed)?;
        }
        Ok(())
    })?;
    let trapped = |agent| {
        let trapped = agents.metric(agent, "weft_target_doorbells_trapped_total", "");
        trapped.context("an agent's metrics")
    };
    let (by_message, mapped) = (trapped(0)?, trapped(1)?);
    println!(
        "doorbells that trapped: {by_message} of three drives, {mapped} of the one whose doorbells are mapped"
    );
    // QEMU takes the map away for a moment when a line interrupt comes, which is before the driver has its vectors.
    ensure!(
        mapped < 100.0,
        "mapped doorbells trap: {mapped} of a thousand commands"
    );
    agents.start(killed)?;
    guest::run_with_drives("vfio.sh", &variables("2"), &attached, |_| Ok(()))?;
    let path = sockets[0].display().to_string();
    agents.weft_ok(&["volume", "detach", "disk0", "--vfio-user", &path])?;
    ensure!(!sockets[0].exists(), "a detached volume leaves no socket");
    Ok(())
}

/// Creates the volume `disk`, which is attached to the guest as a host and served; answers its subsystem.
fn create_disk(agents: &Agents, size: &str) -> anyhow::Result<String> {
    agents.weft_ok(&["volume", "create", "disk", "--size", size, "--ec", "4+2"])?;
    attach_host(agents, "disk")
}

/// Attaches a volume to the guest as a host, and waits until it is served; answers its subsystem.
fn attach_host(agents: &Agents, volume: &str) -> anyhow::Result<String> {
    let attached = agents.weft_json(&["volume", "attach", volume, "--host", GUEST_HOSTNQN])?;
    let subnqn = attached["subnqn"]
        .as_str()
        .context("attach prints the subsystem")?;
    wait_until_served(agents, volume)?;
    Ok(subnqn.to_owned())
}

/// Attaches a volume to a guest at an agent, and waits until it is served; answers the socket.
fn attach_guest(agents: &Agents, folder: &Path, volume: &str, agent: usize) -> anyhow::Result<PathBuf> {
    attach_guest_with(agents, folder, volume, agent, &[])
}

/// The same with further options.
fn attach_guest_with(
    agents: &Agents,
    folder: &Path,
    volume: &str,
    agent: usize,
    options: &[&str],
) -> anyhow::Result<PathBuf> {
    let socket = folder.join(format!("{volume}-{agent}.sock"));
    let path = socket.display().to_string();
    let control = &agents.control_addresses()[agent];
    let attach = [
        "volume",
        "attach",
        volume,
        "--vfio-user",
        &path,
        "--agent",
        control,
    ];
    let attached = agents.weft_json(&[&attach, options].concat())?;
    ensure!(
        attached["qemu"].to_string().contains("vfio-user-pci"),
        "attach prints the options of QEMU: {attached}"
    );
    wait_until_served(agents, volume)?;
    Ok(socket)
}

/// The options of a guest with these drives, as they are printed for people.
fn vm_options(agents: &Agents, sockets: &[PathBuf]) -> anyhow::Result<String> {
    let paths: Vec<_> = sockets.iter().map(|path| path.display().to_string()).collect();
    let mut arguments = vec!["vm", "qemu", "--memory-mib", "1536"];
    arguments.extend(paths.iter().map(String::as_str));
    agents.weft_ok(&arguments)
}

/// The serial number that a volume's controllers show.
fn serial(agents: &Agents, volume: &str) -> anyhow::Result<String> {
    let shown = agents.weft_json(&["volume", "show", volume])?;
    let uuid: Vec<u8> = serde_json::from_value(shown["uuid"].clone()).context("a volume has a uuid")?;
    Ok(uuid.iter().take(10).map(|byte| format!("{byte:02x}")).collect())
}

const CHUNKS: u64 = 256;
const CHUNK_BLOCKS: u64 = 16;

fn chunk_start(chunk: u64) -> Lba {
    Lba(chunk * CHUNK_BLOCKS)
}

fn chunk_bytes(chunk: u64) -> Bytes {
    let byte = |index: u64| (index.wrapping_mul(2_654_435_761).wrapping_add(chunk * 97) >> 7) as u8;
    (0..CHUNK_BLOCKS * 4096).map(byte).collect::<Vec<u8>>().into()
}

async fn compare(device: &Device) -> anyhow::Result<()> {
    for chunk in 0..CHUNKS {
        let data = device
            .read(LbaRange {
                start: chunk_start(chunk),
                count: CHUNK_BLOCKS,
            })
            .await?;
        ensure!(data == chunk_bytes(chunk), "chunk {chunk} differs");
    }
    Ok(())
}

fn wait_until_served(agents: &Agents, volume: &str) -> anyhow::Result<()> {
    agents.wait_until("the volume is served", |agents| {
        agents
            .weft_ok(&["volume", "show", volume])
            .is_ok_and(|text| text.contains("serving"))
    })
}
