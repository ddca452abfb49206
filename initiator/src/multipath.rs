//! A namespace over several paths, as a host without any knowledge of Weft has it.
//!
//! Commands go to an optimized path, or a non-optimized one where there is none. What a path could not answer (Not
//! Ready, Unknown) is sent again on another one, and waits while no path is usable, until
//! [`MultipathOptions::retry_timeout`] has passed. The host only sees latency.
//!
//! # What the caller has to see to
//!
//! A write whose outcome is Unknown is sent again, and may then take effect twice. That is the same bytes, unless the
//! caller has sent newer ones to the same block in between: **no write may be started to a block while an older one to
//! it has no answer**, as a kernel's block layer sees to for its file systems. Dropping the future of an operation ends
//! its retries, not its effects.
//!
//! And so that the first attempt is over when the second one is answered, a write without an answer is sent again only
//! after the Command Quiesce Time of the controller that it was lost with.
//!
//! NVM Express Base Specification 2.0, "Asymmetric Namespace Access Reporting"; 2.1, "Command Quiesce Time".

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use weft_block::{BlockDevice, BlockError, DeviceInfo, Durability, Io};
use weft_proto::nvme::log::AnaState;
use weft_proto::units::{Lba, LbaRange};

use crate::discovery::{DiscoverError, discover};
use crate::metrics;
use crate::namespace::Namespace;
use crate::options::{ConnectError, ConnectOptions};
use crate::path::{Identity, Path, PathState};

/// Pause before an operation is sent to a path that refused it before, from one refusal to the next. A guess: the
/// access states say when a path is back; this bounds what a controller costs that contradicts itself.
const AGAIN_MIN: Duration = Duration::from_millis(2);
const AGAIN_MAX: Duration = Duration::from_millis(100);

/// How a multipath device is made.
#[derive(Clone, Debug)]
pub struct MultipathOptions {
    /// What all paths have in common; its address is not used.
    pub connect: ConnectOptions,
    /// Where the subsystem is reached: one path each.
    pub addresses: Vec<SocketAddr>,
    /// The namespace.
    pub nsid: u32,
    /// How long an operation is retried and waits for a path before it fails.
    pub retry_timeout: Duration,
}

impl MultipathOptions {
    /// Retry timeout where nothing else is said.
    pub const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

    /// Paths to `nsid` of the subsystem of `connect`, at `addresses`.
    #[must_use]
    pub fn new(connect: ConnectOptions, addresses: Vec<SocketAddr>, nsid: u32) -> Self {
        Self {
            connect,
            addresses,
            nsid,
            retry_timeout: Self::RETRY_TIMEOUT,
        }
    }

    /// The same, with the addresses that the discovery service at `service` knows for the subsystem.
    ///
    /// # Errors
    /// [`DiscoverError`]
    pub async fn discovered(mut self, service: SocketAddr) -> Result<Self, DiscoverError> {
        let entries = discover(service, self.connect.host.clone()).await?;
        let subnqn = &self.connect.subnqn;
        let known: BTreeSet<SocketAddr> = entries
            .iter()
            .filter(|entry| entry.subnqn().as_ref() == Some(subnqn))
            .filter_map(|entry| entry.socket_addr())
            .chain(self.addresses)
            .collect();
        self.addresses = known.into_iter().collect();
        Ok(self)
    }
}

/// One path, as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathStatus {
    /// Where to.
    pub address: SocketAddr,
    /// Connected or not.
    pub state: PathState,
    /// Access state; `None` while it is in doubt.
    pub ana: Option<AnaState>,
    /// Commands without an answer.
    pub outstanding: usize,
}

/// A namespace over several paths. Cheap to clone; the paths end with the last clone.
#[derive(Clone, Debug)]
pub struct Multipath(Rc<Paths>);

#[derive(Debug)]
struct Paths {
    paths: Vec<Path>,
    /// Index of the path used last, which is kept as long as it is among the best.
    current: Cell<usize>,
    changed: Rc<Notify>,
    info: Cell<DeviceInfo>,
    retry_timeout: Duration,
    retries: Cell<u64>,
    errors: Cell<u64>,
    outstanding: Cell<usize>,
}

impl Multipath {
    /// Opens every path and waits for the first. Runs on a `LocalSet`.
    ///
    /// # Errors
    /// [`ConnectError::Timeout`] if no path is up within the retry timeout.
    pub async fn connect(options: MultipathOptions) -> Result<Self, ConnectError> {
        let address = options
            .addresses
            .first()
            .copied()
            .unwrap_or(options.connect.address);
        let changed = Rc::new(Notify::new());
        let identity = Rc::new(Identity::default());
        let paths = options
            .addresses
            .iter()
            .map(|&address| {
                let connect = ConnectOptions {
                    address,
                    ..options.connect.clone()
                };
                let notify = changed.clone();
                let on_change = Rc::new(move || notify.notify_waiters());
                Path::open(connect, options.nsid, identity.clone(), on_change)
            })
            .collect::<Vec<_>>();
        let first = async {
            loop {
                let changed = changed.notified();
                if let Some(live) = paths.iter().find_map(Path::live) {
                    return live.namespace.info();
                }
                changed.await;
            }
        };
        let Ok(info) = tokio::time::timeout(options.retry_timeout, first).await else {
            return Err(ConnectError::Timeout { address });
        };
        Ok(Self(Rc::new(Paths {
            paths,
            current: Cell::new(0),
            changed,
            info: Cell::new(info),
            retry_timeout: options.retry_timeout,
            retries: Cell::new(0),
            errors: Cell::new(0),
            outstanding: Cell::new(0),
        })))
    }

    /// Operations that were sent again after a path failed.
    #[must_use]
    pub fn host_retries(&self) -> u64 {
        self.0.retries.get()
    }

    /// Operations that failed for their caller.
    #[must_use]
    pub fn io_errors(&self) -> u64 {
        self.0.errors.get()
    }

    /// Operations without an answer, waiting ones included.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.0.outstanding.get()
    }

    /// Every path.
    #[must_use]
    pub fn paths(&self) -> Vec<PathStatus> {
        let status = |path: &Path| PathStatus {
            address: path.options().address,
            state: path.state(),
            ana: path.ana(),
            outstanding: path.live().map_or(0, |live| live.controller.outstanding()),
        };
        self.0.paths.iter().map(status).collect()
    }

    /// The state of each path, to wait for one.
    #[must_use]
    pub fn watch_paths(&self) -> Vec<watch::Receiver<PathState>> {
        self.0.paths.iter().map(Path::watch).collect()
    }

    /// The UUID or NGUID of the namespace, while a path is up.
    #[must_use]
    pub fn uuid(&self) -> Option<[u8; 16]> {
        self.0.paths.iter().find_map(Path::live)?.namespace.uuid()
    }

    /// Whether the blocks at `start` hold `data`.
    pub fn compare(&self, start: Lba, data: Vec<Bytes>) -> Io<bool> {
        self.run(move |namespace| namespace.compare(start, data.clone()))
    }

    /// Has the controller check that `range` can be read.
    pub fn verify(&self, range: LbaRange) -> Io<()> {
        self.run(move |namespace| namespace.verify(range))
    }

    /// Starts an operation on the best path, and sees it through.
    fn run<T: 'static>(&self, operation: impl Fn(&Namespace) -> Io<T> + 'static) -> Io<T> {
        let paths = self.0.clone();
        // At once, as the contract has it, where a path is usable.
        let first = paths
            .best()
            .map(|(index, namespace)| (index, operation(&namespace)));
        let counted = Outstanding::new(paths.clone());
        Io::running(async move {
            let outcome = paths.see_through(first, operation).await;
            drop(counted);
            if outcome.is_err() {
                paths.errors.set(paths.errors.get() + 1);
                metrics::host_error();
            }
            outcome
        })
    }
}

impl Paths {
    /// The usable path with the best access state; the current one among equals.
    fn best(&self) -> Option<(usize, Rc<Namespace>)> {
        let current = self.current.get();
        let rank = |path: &Path| match path.ana() {
            Some(AnaState::OPTIMIZED) => Some(0),
            Some(AnaState::NON_OPTIMIZED) => Some(1),
            _ => None,
        };
        let (_, _, index, namespace) = self
            .paths
            .iter()
            .enumerate()
            .filter_map(|(index, path)| {
                let rank = rank(path)?;
                Some((rank, index != current, index, path.live()?.namespace))
            })
            .min_by_key(|(rank, other, index, _)| (*rank, *other, *index))?;
        self.current.set(index);
        self.info.set(namespace.info());
        Some((index, namespace))
    }

    async fn see_through<T>(
        &self,
        mut attempt: Option<(usize, Io<T>)>,
        operation: impl Fn(&Namespace) -> Io<T>,
    ) -> Result<T, BlockError> {
        let deadline = Instant::now() + self.retry_timeout;
        // What is known of the operation so far: once an attempt may have happened, that is what a failure means.
        let mut known = BlockError::NotReady;
        let mut pause = AGAIN_MIN;
        let mut refused_by = None;
        let mut quiet = None;
        loop {
            if let Some((index, answer)) = attempt.take() {
                match answer.await {
                    Err(error @ (BlockError::NotReady | BlockError::Unknown)) => {
                        if error == BlockError::Unknown {
                            known = BlockError::Unknown;
                            let until = Instant::now() + self.paths[index].command_quiesce();
                            quiet = quiet.max(Some(until));
                        }
                        self.paths[index].doubt();
                        refused_by = Some(index);
                    }
                    // The namespace left this path; others may still have it.
                    Err(BlockError::Gone) => {
                        self.paths[index].doubt();
                        refused_by = Some(index);
                    }
                    Ok(value) => return Ok(value),
                    // An earlier attempt may still take effect, whatever this one was told.
                    Err(_) if known == BlockError::Unknown => return Err(known),
                    Err(error) => return Err(error),
                }
                self.retries.set(self.retries.get() + 1);
                metrics::host_retry();
            }
            if let Some(until) = quiet.take() {
                tokio::time::sleep_until(until.min(deadline)).await;
            }
            if Instant::now() >= deadline {
                return Err(known);
            }
            let changed = self.changed.notified();
            if let Some((index, namespace)) = self.best() {
                if refused_by == Some(index) {
                    refused_by = None;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(AGAIN_MAX);
                    continue;
                }
                attempt = Some((index, operation(&namespace)));
                continue;
            }
            // An error is the deadline, which the next round sees.
            let _ = tokio::time::timeout_at(deadline, changed).await;
        }
    }
}

/// Counts an operation while it has no answer, or until its future is dropped.
struct Outstanding(Rc<Paths>);

impl Outstanding {
    fn new(paths: Rc<Paths>) -> Self {
        paths.outstanding.set(paths.outstanding.get() + 1);
        Self(paths)
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        self.0.outstanding.set(self.0.outstanding.get() - 1);
    }
}

impl BlockDevice for Multipath {
    fn info(&self) -> DeviceInfo {
        self.0.best();
        self.0.info.get()
    }

    fn read(&self, range: LbaRange) -> Io<Bytes> {
        self.run(move |namespace| namespace.read(range))
    }

    fn write(&self, start: Lba, data: Vec<Bytes>, durability: Durability) -> Io<()> {
        self.run(move |namespace| namespace.write(start, data.clone(), durability))
    }

    fn write_zeroes(&self, range: LbaRange, deallocate: bool, durability: Durability) -> Io<()> {
        self.run(move |namespace| namespace.write_zeroes(range, deallocate, durability))
    }

    fn deallocate(&self, ranges: Vec<LbaRange>) -> Io<()> {
        self.run(move |namespace| namespace.deallocate(ranges.clone()))
    }

    fn flush(&self) -> Io<()> {
        self.run(Namespace::flush)
    }
}
