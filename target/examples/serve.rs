//! Serves one drive in memory over NVMe/TCP, for a first look with a real host:
//!
//! ```text
//! cargo run -p weft-target --example serve -- 127.0.0.1:4420
//! nvme connect -t tcp -a 127.0.0.1 -s 4420 -n nqn.2026-01.io.weft:example
//! ```

use std::error::Error;
use std::net::SocketAddr;
use std::rc::Rc;

use tokio::net::TcpListener;
use tokio::task::LocalSet;
use weft_block::memory::MemoryDrive;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::log::AnaState;
use weft_target::reservation::ReservedNamespace;
use weft_target::{
    AllowedHosts, DiscoveryRecord, NamespaceConfig, Registry, RegistryConfig, Source, SubsystemConfig, serve,
};

const SIZE_BYTES: u64 = 1 << 30;
const UUID: [u8; 16] = *b"weft-example-ns1";

async fn example(address: SocketAddr) -> Result<(), Box<dyn Error>> {
    let subnqn: Nqn = "nqn.2026-01.io.weft:example".parse()?;
    let registry = Registry::new(RegistryConfig::default());
    registry.add_subsystem(SubsystemConfig {
        nqn: subnqn.clone(),
        serial: "example-1".into(),
        model: "Weft example".into(),
        hosts: AllowedHosts::Any,
        namespaces_max: 16,
    })?;
    let drive = ReservedNamespace::open(MemoryDrive::device(SIZE_BYTES), UUID, None)?;
    registry.add_namespace(
        &subnqn,
        NamespaceConfig {
            nsid: 1,
            uuid: UUID,
            ana_group: 1,
            ana_state: AnaState::OPTIMIZED,
            source: Source::Reserved(drive),
        },
    )?;
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    registry.set_discovery(vec![DiscoveryRecord {
        subnqn: subnqn.clone(),
        address,
        portid: 1,
        hosts: AllowedHosts::Any,
    }]);
    println!(
        "nvme connect -t tcp -a {} -s {} -n {subnqn}",
        address.ip(),
        address.port()
    );
    let stopping = Rc::clone(&registry);
    tokio::task::spawn_local(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            stopping.shutdown();
        }
    });
    serve(listener, registry).await?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:4420".to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, example(address.parse()?))
}
