//! An operating system boots from an erasure-coded volume: installed over NVMe/TCP, started through an emulated controller
//! by UEFI and by BIOS, from 512-byte blocks, which is what some firmware needs. Each boots twice, so the guest's reboot
//! goes through the firmware too.

use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use weft_block::{Device, Durability};
use weft_chaos::guest::{self, Drives};
use weft_initiator::{ConnectOptions, HostIdentity, Multipath, MultipathOptions};
use weft_node::local_cluster::Agents;
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::units::Lba;

use super::{GUEST_HOSTNQN, attach_guest, attach_host, cluster, vm_options};

const BLOCK_BYTES: usize = 512;

/// Of one write of the installation.
const PIECE_BYTES: usize = 128 << 10;

pub(super) fn test(program: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let agents = cluster(program, folder.path(), 6)?;
    let image = Bytes::from(std::fs::read(guest::boot_image()).context("the disk that prepare made")?);
    for firmware in ["efi", "bios"] {
        let create = ["volume", "create", firmware, "--size", "80MiB", "--ec", "4+2"];
        agents.weft_ok(&[&create[..], &["--block-bytes", "512"]].concat())?;
        install(&agents, firmware, &image).with_context(|| format!("install on {firmware}"))?;
        let socket = attach_guest(&agents, folder.path(), firmware, 0)?;
        let drives = Drives {
            options: &vm_options(&agents, &[socket])?,
            more: &[],
            firmware: Some(firmware),
        };
        let mut boots = 0;
        guest::run_with_drives("boot-system", &[], &drives, |line| {
            boots +=
                u32::from(line.contains(&format!("guest: system booted from /dev/nvme0n1p2 by {firmware}")));
            Ok(())
        })
        .with_context(|| format!("boot by {firmware}"))?;
        ensure!(boots == 2, "{boots} boots by {firmware} instead of 2");
    }
    Ok(())
}

/// Writes a disk's image to a volume as a host does.
fn install(agents: &Agents, volume: &str, image: &Bytes) -> anyhow::Result<()> {
    let subnqn: Nqn = attach_host(agents, volume)?.parse()?;
    let addresses: Vec<_> = agents.list.iter().map(|agent| agent.config.nvme_listen).collect();
    let identity = HostIdentity {
        hostnqn: GUEST_HOSTNQN.parse()?,
        hostid: HostId([0x5b; 16]),
    };
    let connect = ConnectOptions::new(addresses[0], subnqn, identity);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let device: Device = Rc::new(Multipath::connect(MultipathOptions::new(connect, addresses, 1)).await?);
        ensure!(
            device.info().block_bytes as usize == BLOCK_BYTES,
            "a host sees blocks of {} bytes",
            device.info().block_bytes
        );
        for at in (0..image.len()).step_by(PIECE_BYTES) {
            let piece = image.slice(at..image.len().min(at + PIECE_BYTES));
            // A new volume reads as zeroes.
            if piece.iter().any(|&byte| byte != 0) {
                let lba = Lba((at / BLOCK_BYTES) as u64);
                device.write(lba, vec![piece], Durability::Cached).await?;
            }
        }
        anyhow::Ok(())
    })?;
    agents.weft_ok(&["volume", "detach", volume, "--host", GUEST_HOSTNQN])?;
    Ok(())
}
