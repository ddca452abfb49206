//! The controller of a guest, from outside: a monitor and a guest written by hand ([`guest`]) against the server.

#![allow(unreachable_pub, clippy::unwrap_used, reason = "test code")]
#![allow(
    clippy::host_endian_bytes,
    reason = "a counter of the kernel has its own byte order"
)]

mod guest;
mod hostile;
mod lives;
mod mapped;
mod work;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::LocalSet;
use weft_block::Device;
use weft_block::memory::MemoryDrive;
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::log::AnaState;
use weft_target::vfio_user::{Attachment, Doorbells, serve};
use weft_target::{AllowedHosts, NamespaceConfig, Registry, RegistryConfig, Source, SubsystemConfig};

const SUBNQN: &str = "nqn.2026-01.io.weft:test";

/// What a test does on the server's thread.
type Job = Box<dyn FnOnce(&Rc<Registry>) + Send>;

/// A server on a thread of its own, with one controller and one namespace of 64 MiB.
struct Server {
    folder: TempDir,
    jobs: Option<UnboundedSender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

fn nqn() -> Nqn {
    SUBNQN.parse().unwrap()
}

fn namespace(nsid: u32, device: Device) -> NamespaceConfig {
    NamespaceConfig {
        nsid,
        uuid: [nsid as u8; 16],
        ana_group: 1,
        ana_state: AnaState::OPTIMIZED,
        source: Source::PerAssociation(Rc::new(move |_, _| Rc::clone(&device))),
    }
}

/// With one subsystem and one namespace.
fn registry(device: Device) -> Rc<Registry> {
    let registry = Registry::new(RegistryConfig::default());
    let subsystem = SubsystemConfig {
        nqn: nqn(),
        serial: "serial-1".into(),
        model: "Weft".into(),
        hosts: AllowedHosts::Any,
        namespaces_max: 4,
    };
    registry.add_subsystem(subsystem).unwrap();
    registry.add_namespace(&nqn(), namespace(1, device)).unwrap();
    registry
}

impl Server {
    fn start() -> Self {
        Self::with_device(|| MemoryDrive::device(64 << 20))
    }

    fn with_device(device: impl FnOnce() -> Device + Send + 'static) -> Self {
        Self::with(device, Doorbells::Trapped)
    }

    /// With doorbells that the monitor maps.
    fn mapped() -> Self {
        Self::with(|| MemoryDrive::device(64 << 20), Doorbells::Mapped)
    }

    fn with(device: impl FnOnce() -> Device + Send + 'static, doorbells: Doorbells) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (jobs, mut received) = tokio::sync::mpsc::unbounded_channel::<Job>();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            LocalSet::new().block_on(&runtime, async move {
                let registry = registry(device());
                let attachment = Attachment {
                    subsystem: nqn(),
                    hostnqn: "nqn.2014-08.org.nvmexpress:uuid:guest".parse().unwrap(),
                    hostid: HostId([7; 16]),
                    doorbells,
                };
                let listener = UnixListener::bind(&path).unwrap();
                let serving = tokio::task::spawn_local(serve(
                    listener,
                    Rc::clone(&registry),
                    attachment,
                    std::future::pending(),
                ));
                tokio::task::spawn_local(weft_block::polling::keep_awake(weft_block::polling::SPAN_DEFAULT));
                ready.send(()).unwrap();
                while let Some(job) = received.recv().await {
                    job(&registry);
                }
                registry.shutdown();
                serving.await.unwrap().unwrap();
            });
        });
        is_ready.recv().unwrap();
        Self {
            folder,
            jobs: Some(jobs),
            thread: Some(thread),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Does something with the registry, on its thread.
    fn on_registry(&self, job: impl FnOnce(&Rc<Registry>) + Send + 'static) {
        let (done, is_done) = std::sync::mpsc::channel();
        let job: Job = Box::new(move |registry| {
            job(registry);
            done.send(()).unwrap();
        });
        self.jobs.as_ref().unwrap().send(job).ok().unwrap();
        is_done.recv().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.jobs.take());
        let ended = self.thread.take().unwrap().join();
        // A server that panicked fails its test.
        assert!(std::thread::panicking() || ended.is_ok());
    }
}

/// Whether a server still serves whoever comes next.
fn assert_serves(path: &Path) {
    let mut guest = guest::Guest::start_next(path);
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 16);
    let read = guest.transfer(0x02, 0, 1, guest::DATA_AT);
    assert_eq!(guest.execute(&mut queue, read).status, 0);
}
