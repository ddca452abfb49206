//! The guests of this server: volumes presented as emulated NVMe controllers on vfio-user sockets.
//!
//! An attachment outlives the agent: it is on record in the data folder (`guest_record`) until it is detached, and after a
//! restart its socket is there again as soon as this node presents the volume. A monitor cannot reconnect to a guest's
//! running controller, so the guest itself has to be started anew.
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
use weft_metadata::state::map::Volume;
use weft_proto::id::{ClusterId, HostId};
use weft_target::Registry;
use weft_target::vfio_user::{Attachment, Doorbells, serve};

use super::guest_record::{self, Recorded, Records};
use crate::view;

/// How long an attachment waits for this node to hear of the volume and of its guest.
const MAP_WAIT: Duration = Duration::from_secs(10);

/// Longest path of a socket: `sun_path` with its end.
const PATH_BYTES_MAX: usize = 107;

struct Guest {
    recorded: Recorded,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<anyhow::Result<()>>,
}

/// The guests of one member.
pub(crate) struct Guests {
    presented: Presented,
    /// Where they are on record.
    record: PathBuf,
    /// By volume.
    guests: RefCell<BTreeMap<String, Guest>>,
}

/// What this node presents, and to which guests.
#[derive(Clone)]
struct Presented {
    registry: Rc<Registry>,
    cluster: ClusterId,
    map: watch::Receiver<Arc<ClusterMap>>,
}

impl Guests {
    pub(crate) fn new(
        registry: Rc<Registry>,
        cluster: ClusterId,
        map: watch::Receiver<Arc<ClusterMap>>,
        record: PathBuf,
    ) -> Self {
        Self {
            presented: Presented {
                registry,
                cluster,
                map,
            },
            record,
            guests: RefCell::default(),
        }
    }

    /// Serves what is on record, each as soon as its volume is presented.
    pub(crate) fn restore(&self) {
        let records = guest_record::read(&self.record).unwrap_or_else(|error| {
            tracing::error!("guests have to be attached again: {error:#}");
            Records::new()
        });
        for (volume, recorded) in records {
            let (stop, stopped) = oneshot::channel::<()>();
            let presented = self.presented.clone();
            let name = volume.clone();
            let Recorded {
                uuid,
                path: socket,
                map_doorbells,
            } = recorded.clone();
            let serving = tokio::task::spawn_local(async move {
                let registry = Rc::clone(&presented.registry);
                let mut stopped = stopped;
                let attachment = tokio::select! {
                    // The end of its sender too.
                    _ = &mut stopped => return Ok(()),
                    attachment = presented.wait(&name, map_doorbells) => attachment,
                };
                // Without one this member has ended.
                let Some(attachment) = attachment else {
                    return Ok(());
                };
                if attachment.hostid.0 != uuid {
                    tracing::warn!(
                        volume = name,
                        "not attached again: this is another volume of that name"
                    );
                    return Ok(());
                }
                let listener = listen(&socket).inspect_err(|error| {
                    tracing::error!(volume = name, "not attached again: {error:#}");
                })?;
                tracing::info!(volume = name, path = %socket.display(), "attached again");
                serve(listener, registry, attachment, async { drop(stopped.await) })
                    .await
                    .context("a guest's socket")
            });
            let guest = Guest {
                recorded,
                stop,
                serving,
            };
            self.guests.borrow_mut().insert(volume, guest);
        }
    }

    /// Presents a volume on a socket.
    ///
    /// # Errors
    /// The volume is not there or has a guest, there can be no socket at that path, or it cannot be put on record.
    pub(crate) async fn attach(
        &self,
        volume: &str,
        path: PathBuf,
        map_doorbells: bool,
    ) -> anyhow::Result<()> {
        if let Some(guest) = self.guests.borrow().get(volume)
            && !guest.serving.is_finished()
        {
            bail!(
                "volume {volume} has a guest on this node already, at {}; detach it first",
                guest.recorded.path.display()
            );
        }
        let attachment = self.presented.attachment(volume, map_doorbells).await?;
        let listener = listen(&path)?;
        let recorded = Recorded {
            uuid: attachment.hostid.0,
            path: path.clone(),
            map_doorbells,
        };
        let (stop, stopped) = oneshot::channel();
        // The end of its sender is the end of this member.
        let stopped = async move { drop(stopped.await) };
        let registry = Rc::clone(&self.presented.registry);
        let serving = tokio::task::spawn_local(async move {
            serve(listener, registry, attachment, stopped)
                .await
                .context("a guest's socket")
        });
        let guest = Guest {
            recorded,
            stop,
            serving,
        };
        self.guests.borrow_mut().insert(volume.to_owned(), guest);
        if let Err(error) = self.write_record() {
            // As it was before: an attachment that a restart forgets is none.
            let guest = self.guests.borrow_mut().remove(volume);
            guest.into_iter().for_each(|guest| drop(guest.stop));
            remove_socket(&path);
            return Err(error);
        }
        Ok(())
    }

    /// Ends a guest's controller, removes its socket and takes it off the record.
    ///
    /// # Errors
    /// There is none, or the record cannot be written.
    pub(crate) async fn detach(&self, volume: &str, path: &Path) -> anyhow::Result<()> {
        let guest = {
            let mut guests = self.guests.borrow_mut();
            let found = guests.get(volume).filter(|guest| guest.recorded.path == path);
            ensure!(
                found.is_some(),
                "volume {volume} has no guest at {} on this node",
                path.display()
            );
            guests.remove(volume).expect("found above")
        };
        // Whoever is gone already needs no telling.
        let _ = guest.stop.send(());
        let served = guest.serving.await.context("the guest's controller")?;
        remove_socket(&guest.recorded.path);
        self.write_record()?;
        served
    }

    fn write_record(&self) -> anyhow::Result<()> {
        let guests = self.guests.borrow();
        let records = guests
            .iter()
            .map(|(volume, guest)| (volume.clone(), guest.recorded.clone()));
        guest_record::write(&self.record, &records.collect())
    }

    /// The live state as a tree.
    pub(crate) fn inspect(&self) -> serde_json::Value {
        let guests = self.guests.borrow();
        let paths = guests
            .iter()
            .map(|(volume, guest)| (volume, guest.recorded.path.display().to_string()));
        serde_json::json!(paths.collect::<BTreeMap<_, _>>())
    }
}

impl Presented {
    /// Waits until this node presents the volume to its guest, for a while.
    async fn attachment(&self, volume: &str, map_doorbells: bool) -> anyhow::Result<Attachment> {
        let found = tokio::time::timeout(MAP_WAIT, self.wait(volume, map_doorbells)).await;
        found.ok().flatten().with_context(|| {
            format!(
                "this node does not present volume {volume} to {}; see `weft volume show {volume}`",
                view::guest_nqn(self.cluster, volume)
            )
        })
    }

    /// Waits until this node presents the volume to its guest; `None` if the map ends.
    async fn wait(&self, volume: &str, map_doorbells: bool) -> Option<Attachment> {
        let hostnqn = view::guest_nqn(self.cluster, volume);
        let mut map = self.map.clone();
        loop {
            let known = map.borrow_and_update().volume_named(volume).cloned();
            let known: Option<Volume> = known.filter(|known| known.allowed_hosts.contains(&hostnqn));
            let Some(known) = known else {
                map.changed().await.ok()?;
                continue;
            };
            if self.registry.allows(&known.subnqn, &hostnqn) {
                return Some(Attachment {
                    subsystem: known.subnqn,
                    hostnqn,
                    hostid: HostId(known.uuid),
                    doorbells: if map_doorbells {
                        Doorbells::Mapped
                    } else {
                        Doorbells::Trapped
                    },
                });
            }
            // The registry follows the map a moment later.
            tokio::select! {
                changed = map.changed() => changed.ok()?,
                () = tokio::time::sleep(Duration::from_millis(10)) => {}
            }
        }
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        for guest in self.guests.borrow().values() {
            remove_socket(&guest.recorded.path);
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
