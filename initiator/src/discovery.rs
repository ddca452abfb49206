//! Asks a discovery service which subsystems it knows.
//!
//! NVM Express Base Specification 2.0, "Discovery Service".

use std::net::SocketAddr;
use std::time::Duration;

use weft_proto::fabrics::discovery::{DiscoveryEntry, DiscoveryHeader};
use weft_proto::nqn::Nqn;
use weft_proto::nvme::command::LogPageId;
use zerocopy::FromBytes;

use crate::controller::Controller;
use crate::options::{AdminError, ConnectError, ConnectOptions, HostIdentity};

/// Most entries that are read: a bound on what a service can make us fetch.
const ENTRIES_MAX: u64 = 1024;

/// Readings before a page that keeps changing is given up. A guess.
const READINGS: usize = 5;

/// Why a discovery had no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiscoverError {
    /// No connection to the service.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It did not give its log page.
    #[error(transparent)]
    Log(#[from] AdminError),
}

/// The entries of the discovery service at `address`, as it shows them to `host`.
///
/// # Errors
/// [`DiscoverError`]
pub async fn discover(address: SocketAddr, host: HostIdentity) -> Result<Vec<DiscoveryEntry>, DiscoverError> {
    // Not a persistent connection: no keep alive.
    let options = ConnectOptions {
        kato: Duration::ZERO,
        ..ConnectOptions::new(address, Nqn::discovery(), host)
    };
    let controller = Controller::connect(options).await?;
    let entries = read(&controller).await;
    controller.disconnect().await;
    Ok(entries?)
}

async fn read(controller: &Controller) -> Result<Vec<DiscoveryEntry>, AdminError> {
    const MALFORMED: AdminError = AdminError::Malformed {
        command: "Get Log Page (discovery)",
    };
    let page = async |offset: u64, bytes: u32| {
        controller
            .log_page(LogPageId::DISCOVERY, 0, 0, offset, bytes)
            .await
    };
    let header_of = |bytes: &[u8]| {
        DiscoveryHeader::read_from_prefix(bytes)
            .map(|(header, _)| header)
            .map_err(|_| MALFORMED)
    };
    for _ in 0..READINGS {
        let header = header_of(&page(0, size_of::<DiscoveryHeader>() as u32).await?)?;
        let count = header.numrec.get().min(ENTRIES_MAX) as u32;
        let bytes = size_of::<DiscoveryHeader>() as u32 + count * size_of::<DiscoveryEntry>() as u32;
        let whole = page(0, bytes).await?;
        // A page that changed while it was read may hold halves of two states.
        let after = header_of(&page(0, size_of::<DiscoveryHeader>() as u32).await?)?;
        if after.genctr != header.genctr {
            continue;
        }
        let mut rest = whole.get(size_of::<DiscoveryHeader>()..).ok_or(MALFORMED)?;
        let mut entries = Vec::new();
        for _ in 0..count {
            let (entry, after) = DiscoveryEntry::read_from_prefix(rest).map_err(|_| MALFORMED)?;
            entries.push(entry);
            rest = after;
        }
        return Ok(entries);
    }
    Err(MALFORMED)
}
