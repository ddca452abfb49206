//! One process of the cluster that `weft bench cluster` measures: a drive behind a target, or the owner of a volume on them.

use std::io::Read as _;
use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::ensure;
use weft_block::memory::MemoryDrive;
use weft_block::polling::{SPAN_DEFAULT, keep_awake};
use weft_block::{BlockDevice as _, Device};
use weft_initiator::{ConnectOptions, HostIdentity, RemoteDrive};
use weft_proto::band::Geometry;
use weft_proto::id::HostId;
use weft_proto::units::MIB;
use weft_target::{Source, serve};
use weft_volume::settings::Settings;

use super::load::{Clock, Load};
use super::target::{drive, present, subnqn};
use super::world::World;

/// Of the volume.
pub(super) const GEOMETRY: Geometry = Geometry { k: 4, m: 2 };
const DRIVE_BYTES: u64 = 256 * MIB;

/// Larger than the part of it that the host uses, which is that of the single target.
const VOLUME_BYTES: u64 = 64 * MIB;

/// A process of the cluster: a drive, or the owner of these drives. Prints its address, serves until its standard input
/// ends. Returns an exit code.
pub(crate) async fn peer(drives: Vec<SocketAddr>) -> u8 {
    std::thread::spawn(|| {
        // Whatever it was that ended the input, the parent is gone.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    match serve_peer(drives).await {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("weft: {error:#}");
            1
        }
    }
}

async fn serve_peer(addresses: Vec<SocketAddr>) -> anyhow::Result<()> {
    let source = if addresses.is_empty() {
        drive(MemoryDrive::preallocated(DRIVE_BYTES))?
    } else {
        volume(addresses).await?
    };
    tokio::task::spawn_local(keep_awake(SPAN_DEFAULT));
    let (listener, registry) = present(source).await?;
    println!("{}", listener.local_addr()?);
    serve(listener, registry).await?;
    Ok(())
}

/// A filled 4+2 volume on these drives.
async fn volume(addresses: Vec<SocketAddr>) -> anyhow::Result<Source> {
    let drives = connect_drives(&addresses).await?;
    let devices = drives.into_iter().map(|drive| drive as Device).collect();
    let engine = World::new(GEOMETRY, devices)
        .open(Settings::default(), VOLUME_BYTES)
        .await?;
    let device: Device = Rc::new(engine);
    Load::new(Rc::clone(&device), Clock::Wall).fill().await?;
    Ok(Source::PerAssociation(Rc::new(move |_, _| Rc::clone(&device))))
}

/// The drives of the cluster as its owner reaches them. Within a `LocalSet`.
///
/// # Errors
/// What listens there is no drive of the benchmark.
pub(super) async fn connect_drives(addresses: &[SocketAddr]) -> anyhow::Result<Vec<Rc<RemoteDrive>>> {
    let mut drives = Vec::new();
    for address in addresses {
        let host = HostIdentity {
            hostnqn: "nqn.2026-01.io.weft:bench-owner".parse()?,
            hostid: HostId([0x0e; 16]),
        };
        let drive = RemoteDrive::open(ConnectOptions::new(*address, subnqn(), host), 1);
        drive.connected().await;
        ensure!(
            drive.info().bytes() == DRIVE_BYTES,
            "{address} is no drive of the benchmark"
        );
        drives.push(drive);
    }
    Ok(drives)
}
