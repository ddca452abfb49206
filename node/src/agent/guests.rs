//! The guests of this server: volumes presented as emulated NVMe controllers on vfio-user sockets.
//!
//! An attachment lasts as long as this incarnation: a monitor cannot reconnect to a guest's running controller, so after a
//! restart of the agent the guest is started anew, and the volume attached again before.
//!
//! A guest is known by a name and an identifier that belong to the volume and not to the node, so that what it had reserved is
//! still its own after it moved. Hence one guest for each volume of a node.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use weft_metadata::state::ClusterMap;
use weft_proto::id::{ClusterId, HostId};
use weft_target::Registry;
use weft_target::vfio_user::{Attachment, serve};

use crate::view;

/// How long an attachment waits for this node to hear of the volume and of its guest.
const MAP_WAIT: Duration = Duration::from_secs(10);

/// Longest path of a socket: `sun_path` with its end.
const PATH_BYTES_MAX: usize = 107;

struct Guest {
    path: PathBuf,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<std::io::Result<()>>,
}

/// The guests of one member.
pub(crate) struct Guests {
    registry: Rc<Registry>,
    cluster: ClusterId,
    map: watch::Receiver<Arc<ClusterMap>>,
    /// By volume.
    guests: RefCell<BTreeMap<String, Guest>>,
}

impl Guests {
    pub(crate) fn new(
        registry: Rc<Registry>,
        cluster: ClusterId,
        map: watch::Receiver<Arc<ClusterMap>>,
    ) -> Self {
        Self {
            registry,
            cluster,
            map,
            guests: RefCell::default(),
        }
    }

    /// Presents a volume on a socket.
    ///
    /// # Errors
    /// The volume is not there or has a guest, or there can be no socket at that path.
    pub(crate) async fn attach(&self, volume: &str, path: PathBuf) -> anyhow::Result<()> {
        if let Some(guest) = self.guests.borrow().get(volume)
            && !guest.serving.is_finished()
        {
            bail!(
                "volume {volume} has a guest on this node already, at {}; detach it first",
                guest.path.display()
            );
        }
        let attachment = self.attachment(volume).await?;
        let listener = listen(&path)?;
        let (stop, stopped) = oneshot::channel();
        // The end of its sender is the end of this member.
        let stopped = async move { drop(stopped.await) };
        let registry = Rc::clone(&self.registry);
        let serving = tokio::task::spawn_local(serve(listener, registry, attachment, stopped));
        let guest = Guest { path, stop, serving };
        self.guests.borrow_mut().insert(volume.to_owned(), guest);
        Ok(())
    }

    /// Ends a guest's controller and removes its socket.
    ///
    /// # Errors
    /// There is none.
    pub(crate) async fn detach(&self, volume: &str, path: &Path) -> anyhow::Result<()> {
        let guest = {
            let mut guests = self.guests.borrow_mut();
            let found = guests.get(volume).filter(|guest| guest.path == path);
            ensure!(
                found.is_some(),
                "volume {volume} has no guest at {} on this node",
                path.display()
            );
            guests.remove(volume).expect("found above")
        };
        // Whoever is gone already needs no telling.
        let _ = guest.stop.send(());
        guest.serving.await.context("the guest's controller")??;
        remove_socket(&guest.path);
        Ok(())
    }

    /// The live state as a tree.
    pub(crate) fn inspect(&self) -> serde_json::Value {
        let guests = self.guests.borrow();
        let paths = guests
            .iter()
            .map(|(volume, guest)| (volume, guest.path.display().to_string()));
        serde_json::json!(paths.collect::<BTreeMap<_, _>>())
    }

    /// Waits until this node presents the volume to its guest.
    async fn attachment(&self, volume: &str) -> anyhow::Result<Attachment> {
        let hostnqn = view::guest_nqn(self.cluster, volume);
        let mut map = self.map.clone();
        let found = tokio::time::timeout(MAP_WAIT, async {
            loop {
                let known = map.borrow_and_update().volume_named(volume).cloned();
                if let Some(known) = known.filter(|known| known.allowed_hosts.contains(&hostnqn))
                    && self.registry.allows(&known.subnqn, &hostnqn)
                {
                    return Some(known);
                }
                // The registry follows the map a moment later.
                tokio::select! {
                    changed = map.changed() => changed.ok()?,
                    () = tokio::time::sleep(Duration::from_millis(10)) => {}
                }
            }
        });
        let known = found.await.ok().flatten();
        let known = known.with_context(|| {
            format!(
                "this node does not present volume {volume} to {hostnqn}; see `weft volume show {volume}`"
            )
        })?;
        Ok(Attachment {
            subsystem: known.subnqn,
            hostnqn,
            hostid: HostId(known.uuid),
        })
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        for guest in self.guests.borrow().values() {
            remove_socket(&guest.path);
        }
    }
}

/// A socket at `path`, in place of one that nobody listens on.
fn listen(path: &Path) -> anyhow::Result<tokio::net::UnixListener> {
    let shown = path.display();
    ensure!(path.is_absolute(), "{shown} is not an absolute path");
    ensure!(
        path.as_os_str().len() <= PATH_BYTES_MAX,
        "{shown} is longer than the {PATH_BYTES_MAX} bytes that a socket's path may have"
    );
    if let Ok(found) = std::fs::symlink_metadata(path) {
        ensure!(
            found.file_type().is_socket(),
            "{shown} exists and is not a socket"
        );
        ensure!(
            UnixStream::connect(path).is_err(),
            "somebody listens at {shown} already"
        );
        remove_socket(path);
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listen at {shown}"))?;
    // Whoever may connect has the volume.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("set the permissions of {shown}"))?;
    listener
        .set_nonblocking(true)
        .context("a socket that does not block")?;
    tokio::net::UnixListener::from_std(listener).context("a socket on the data thread")
}

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "socket not removed");
    }
}
