//! One way to a namespace, kept open for ever.
//!
//! A task connects, watches, and connects again with back-off when the association ends. What is live is replaced as a
//! whole; a handle that was taken before answers as its lost connection does. A path never registers, acquires or
//! writes anything by itself.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::{Notify, watch};
use weft_proto::nvme::event::AsyncEvent;
use weft_proto::nvme::log::AnaState;

use crate::controller::Controller;
use crate::namespace::Namespace;
use crate::options::{AdminError, ConnectError, ConnectOptions};
use crate::qpair::CloseReason;

/// First and longest pause between attempts to connect. A reset peer is back within milliseconds; one that is down
/// costs an attempt a second.
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// While access states are unsettled they are read again this often, events or not. A guess: an event tells sooner,
/// where the controller sends any.
const UNSETTLED_POLL: Duration = Duration::from_millis(100);

/// Where a path stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathState {
    /// The first attempt is not finished.
    Connecting,
    /// Commands can be submitted.
    Connected,
    /// Commands are answered Not Ready at once; attempts go on.
    Disconnected(DisconnectReason),
}

/// Why a path is not connected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DisconnectReason {
    /// The association ended.
    #[error(transparent)]
    Closed(#[from] CloseReason),
    /// The last attempt failed.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The controller is there, the namespace is not.
    #[error(transparent)]
    Namespace(#[from] AdminError),
    /// The namespace is not the one that was there before: another UUID or block size.
    #[error("namespace {nsid} is another one than before")]
    Replaced {
        /// Where it was looked for.
        nsid: u32,
    },
}

/// What is connected now.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) controller: Rc<Controller>,
    pub(crate) namespace: Rc<Namespace>,
}

/// What every path to one namespace has to agree on. Set by the first that connects.
#[derive(Debug, Default)]
pub(crate) struct Identity(Cell<Option<(Option<[u8; 16]>, u32)>>);

impl Identity {
    fn accepts(&self, namespace: &Namespace) -> bool {
        use weft_block::BlockDevice as _;
        let found = (namespace.uuid(), namespace.info().block_bytes);
        match self.0.get() {
            None => {
                self.0.set(Some(found));
                true
            }
            Some(known) => known == found,
        }
    }
}

/// A path. Dropping it ends its task and its association.
pub(crate) struct Path {
    shared: Rc<Shared>,
    task: tokio::task::AbortHandle,
}

/// What a path's handle and its task both look at.
struct Shared {
    options: ConnectOptions,
    nsid: u32,
    identity: Rc<Identity>,
    live: RefCell<Option<Live>>,
    state: watch::Sender<PathState>,
    /// Of the namespace on this path; optimized where the controller has no such states.
    ana: Cell<AnaState>,
    /// Of the controller that was connected last.
    command_quiesce: Cell<Duration>,
    /// The access state is in doubt: a command was refused, and the log has not been read since.
    in_doubt: Cell<bool>,
    /// Wakes the task to look at the access state.
    look: Notify,
    /// Called after any change that may make a path usable or unusable.
    changed: Rc<dyn Fn()>,
}

impl std::fmt::Debug for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Path")
            .field("address", &self.shared.options.address)
            .field("state", &*self.shared.state.borrow())
            .field("ana", &self.shared.ana.get())
            .finish_non_exhaustive()
    }
}

impl Path {
    /// Starts to keep a path. Runs on a `LocalSet`.
    pub(crate) fn open(
        options: ConnectOptions,
        nsid: u32,
        identity: Rc<Identity>,
        changed: Rc<dyn Fn()>,
    ) -> Self {
        let shared = Rc::new(Shared {
            options,
            nsid,
            identity,
            live: RefCell::default(),
            state: watch::Sender::new(PathState::Connecting),
            ana: Cell::new(AnaState::OPTIMIZED),
            command_quiesce: Cell::default(),
            in_doubt: Cell::new(false),
            look: Notify::new(),
            changed,
        });
        let task = tokio::task::spawn_local(keep(shared.clone())).abort_handle();
        Self { shared, task }
    }

    pub(crate) fn options(&self) -> &ConnectOptions {
        &self.shared.options
    }

    /// What is connected, if anything is.
    pub(crate) fn live(&self) -> Option<Live> {
        let live = self.shared.live.borrow().clone()?;
        live.controller.closed_reason().is_none().then_some(live)
    }

    /// Where it stands now, which its watchers hear of a moment later.
    pub(crate) fn state(&self) -> PathState {
        let live = self.shared.live.borrow();
        let closed = live.as_ref().and_then(|live| live.controller.closed_reason());
        closed.map_or_else(
            || self.shared.state.borrow().clone(),
            |reason| PathState::Disconnected(reason.into()),
        )
    }

    pub(crate) fn watch(&self) -> watch::Receiver<PathState> {
        self.shared.state.subscribe()
    }

    /// Access state on this path; `None` while it is in doubt.
    pub(crate) fn ana(&self) -> Option<AnaState> {
        (!self.shared.in_doubt.get()).then(|| self.shared.ana.get())
    }

    /// How long what was lost on this path may still take effect, by what its controller said last.
    pub(crate) fn command_quiesce(&self) -> Duration {
        self.shared.command_quiesce.get()
    }

    /// A command was refused on this path: nothing is sent there until the access state has been read again.
    pub(crate) fn doubt(&self) {
        self.shared.in_doubt.set(true);
        self.shared.look.notify_one();
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.live.replace(None);
    }
}

impl Shared {
    async fn connect(&self) -> Result<Live, DisconnectReason> {
        let controller = Controller::connect(self.options.clone()).await?;
        let namespace = controller.namespace(self.nsid).await?;
        if !self.identity.accepts(&namespace) {
            return Err(DisconnectReason::Replaced { nsid: self.nsid });
        }
        Ok(Live {
            controller,
            namespace,
        })
    }

    fn set_state(&self, state: PathState) {
        self.state.send_replace(state);
        (self.changed)();
    }

    /// Reads the access state. Answers whether it is one that stays by itself.
    async fn read_ana(&self, live: &Live) -> bool {
        let state = if live.controller.info().ana {
            match live.controller.ana_log().await {
                Ok(log) => log
                    .groups
                    .iter()
                    .find(|group| group.nsids.contains(&self.nsid))
                    .map_or(AnaState::INACCESSIBLE, |group| group.state),
                Err(error) => {
                    tracing::debug!(%error, "access state unknown");
                    AnaState::INACCESSIBLE
                }
            }
        } else {
            AnaState::OPTIMIZED
        };
        self.ana.set(state);
        self.in_doubt.set(false);
        state.is_accessible()
    }
}

/// Keeps a path until it is aborted.
async fn keep(path: Rc<Shared>) {
    let mut backoff = BACKOFF_MIN;
    let mut random = SmallRng::from_os_rng();
    loop {
        match path.connect().await {
            Ok(live) => {
                let reason = serve(&path, live).await;
                path.live.replace(None);
                tracing::warn!(address = %path.options.address, nsid = path.nsid, %reason, "path lost");
                path.set_state(PathState::Disconnected(reason));
                backoff = BACKOFF_MIN;
            }
            Err(reason) => {
                // Told once: an address that is down would fill the log.
                let told = *path.state.borrow() == PathState::Disconnected(reason.clone());
                if !told {
                    tracing::warn!(address = %path.options.address, nsid = path.nsid, %reason, "no path");
                    path.set_state(PathState::Disconnected(reason));
                }
            }
        }
        // Jitter, so that many paths to a node that returns do not come at once.
        let pause = backoff.mul_f64(random.random_range(0.75..1.25));
        tokio::time::sleep(pause).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Watches a connected path until it ends.
async fn serve(path: &Shared, live: Live) -> DisconnectReason {
    let mut events = live.controller.events();
    let mut closed = pin!(live.controller.closed());
    let mut settled = path.read_ana(&live).await;
    path.command_quiesce.set(live.controller.info().command_quiesce);
    path.live.replace(Some(live.clone()));
    tracing::info!(address = %path.options.address, nsid = path.nsid, ana = ?path.ana.get(), "path up");
    path.set_state(PathState::Connected);
    loop {
        let event = tokio::select! {
            reason = &mut closed => return reason.into(),
            () = path.look.notified() => Some(AsyncEvent::ANA_CHANGE),
            () = tokio::time::sleep(UNSETTLED_POLL), if !settled => Some(AsyncEvent::ANA_CHANGE),
            event = events.next() => event,
        };
        match event {
            None => return closed.await.into(),
            Some(AsyncEvent::ANA_CHANGE) => {
                settled = path.read_ana(&live).await;
                (path.changed)();
            }
            Some(AsyncEvent::NAMESPACE_CHANGED) => {
                // Which ones does not matter: this one is looked at. Reading the list clears the event.
                let _ = live.controller.changed_namespaces().await;
                match live.namespace.refresh().await {
                    Ok(_) => (path.changed)(),
                    Err(AdminError::Lost { .. }) => {}
                    Err(error) => {
                        live.controller.abandon(CloseReason::Disconnected);
                        return error.into();
                    }
                }
            }
            Some(_) => {}
        }
    }
}
