//! The demo's host: a plain NVMe/TCP host with multipath. It knows addresses of discovery services and a subsystem's
//! name, and reaches data only through sockets.

use std::rc::Rc;

use anyhow::Context as _;
use weft_block::Device;
use weft_initiator::{ConnectOptions, HostIdentity, Multipath, MultipathOptions};
use weft_metadata::state::map::Volume;
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;

use crate::local_cluster::Agents;

/// Bytes that engines sent to drives, by kind.
pub(super) const DRIVE_BYTES: &str = "weft_volume_drive_bytes_total";
/// Bytes that hosts wrote.
pub(super) const USER_BYTES: &str = "weft_volume_user_bytes_total";
/// Stripes by width and depth.
pub(super) const STRIPES: &str = "weft_volume_stripes_total";

/// The host's name.
pub(super) fn host_nqn() -> Nqn {
    "nqn.2014-08.org.nvmexpress:uuid:f1d0b5b6-5f1e-4b0a-9f0e-0000000de0a0"
        .parse()
        .expect("a well-formed name")
}

/// A connected host.
pub(super) struct Host {
    multipath: Multipath,
}

impl Host {
    /// Discovers all paths of the volume and connects them.
    pub(super) async fn connect(volume: &Volume, agents: &Agents) -> anyhow::Result<Self> {
        let first = agents.list.first().context("no agents")?;
        let host = HostIdentity {
            hostnqn: host_nqn(),
            hostid: HostId(*b"weft-demo-host-1"),
        };
        let connect = ConnectOptions::new(first.config.nvme_listen, volume.subnqn.clone(), host);
        let options = MultipathOptions::new(connect, Vec::new(), 1)
            .discovered(first.config.discovery_listen)
            .await
            .context("discover the volume's paths")?;
        let multipath = Multipath::connect(options).await.context("connect the host")?;
        Ok(Self { multipath })
    }

    /// The volume as a block device.
    pub(super) fn device(&self) -> Device {
        Rc::new(self.multipath.clone())
    }

    /// Commands that were sent again on another path.
    pub(super) fn retries(&self) -> u64 {
        self.multipath.host_retries()
    }
}
