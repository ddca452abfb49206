//! The state machine: the state in memory, its parts in sled, snapshots in files.
//!
//! **Nothing that was answered rests on sled**, whose flush does not reach the disk. What was answered is in the log, which
//! is durable before it counts; a log is purged only up to a snapshot, and a snapshot counts once its file has been synced.
//! Sled holds the state as of some entry, so that a restart has little to replay. Each batch of entries is one atomic
//! sled batch, with the position up to which it has been applied; a store that does not read back whole is emptied,
//! and snapshot and log make it again.
//!
//! ```text
//!  sled tree "state":  "applied"    position in the log, and membership
//!                      "map"        cluster map and next identifiers
//!                      "d" + id     chunks of a drive   (id big-endian: sled's order)
//!                      "v" + id     layout of a volume
//! ```
//!
//! `docs/format/raft.md`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use weft_proto::id::{DriveId, VolumeId};

use crate::disk::{self, DiskFile};
use crate::envelope::{self, Kind};
use crate::metrics;
use crate::raft::TypeConfig;
use crate::raft::types::{LogId, Snapshot, SnapshotMeta, StoredMembership};
use crate::state::{ClusterMap, ClusterState, NextIds, Reply, Touched};

const KEY_APPLIED: &[u8] = b"applied";
const KEY_MAP: &[u8] = b"map";
const PREFIX_DRIVE: u8 = b'd';
const PREFIX_VOLUME: u8 = b'v';
const SNAPSHOT_FILE: &str = "current.snapshot";

/// How far the log has been applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Applied {
    last: Option<LogId>,
    membership: StoredMembership,
}

/// The map with what belongs to no single drive or volume.
#[derive(Serialize, Deserialize)]
struct MapPart {
    map: ClusterMap,
    next: NextIds,
}

/// The body of a snapshot.
#[derive(Serialize, Deserialize)]
struct SnapshotBody {
    applied: Applied,
    state: ClusterState,
}

/// State and position, read by the service while openraft applies.
#[derive(Debug)]
pub(crate) struct Shared {
    inner: RwLock<Inner>,
    map: watch::Sender<Arc<ClusterMap>>,
}

#[derive(Debug, Default)]
struct Inner {
    state: ClusterState,
    applied: Applied,
}

impl Shared {
    /// Looks at the state, between two commands.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&ClusterState) -> T) -> T {
        // A panic while applying leaves the lock poisoned and stops the member; what was applied before is whole.
        look(&self.inner.read().unwrap_or_else(PoisonError::into_inner).state)
    }

    /// The map as it changes.
    pub(crate) fn watch_map(&self) -> watch::Receiver<Arc<ClusterMap>> {
        self.map.subscribe()
    }

    fn write<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        change(&mut self.inner.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn publish(&self) {
        self.map.send_if_modified(|current| {
            let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
            let changed = current.version != inner.state.map.version;
            if changed {
                *current = Arc::new(inner.state.map.clone());
            }
            changed
        });
    }
}

/// openraft's state machine.
#[derive(Debug)]
pub(crate) struct StateMachine {
    shared: Arc<Shared>,
    tree: sled::Tree,
    snapshots: Snapshots,
    // Held so that the database outlives its tree.
    _database: sled::Db,
}

impl StateMachine {
    /// Opens the state machine in `directory`, or begins one.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let snapshots = Snapshots::open(&directory.join("snapshots"))?;
        let database = open_database(&directory.join("state"))?;
        let tree = database.open_tree("state").map_err(io::Error::other)?;
        let inner = match load(&tree) {
            Ok(inner) => inner,
            Err(error) => {
                tracing::warn!(%error, "the stored state does not read back; snapshot and log replace it");
                tree.clear().map_err(io::Error::other)?;
                Inner::default()
            }
        };
        let (map, _) = watch::channel(Arc::new(inner.state.map.clone()));
        Ok(Self {
            shared: Arc::new(Shared {
                inner: RwLock::new(inner),
                map,
            }),
            tree,
            snapshots,
            _database: database,
        })
    }

    /// For readers.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Writes what has changed since the last time, with the position, as one atomic batch.
    async fn store_changes(&self) -> io::Result<()> {
        let batch = self.shared.write(|inner| {
            let Touched { map, drives, volumes } = inner.state.take_touched();
            let mut batch = sled::Batch::default();
            let state = &inner.state;
            if map {
                insert_map(&mut batch, state);
            }
            for drive in drives {
                insert_drive(&mut batch, state, drive);
            }
            for volume in volumes {
                insert_volume(&mut batch, state, volume);
            }
            batch.insert(KEY_APPLIED, envelope::seal(Kind::PART, &inner.applied));
            batch
        });
        let tree = self.tree.clone();
        beside_tasks(move || tree.apply_batch(batch).map_err(io::Error::other)).await
    }
}

/// Does what waits for a disk where no task waits behind it: elections and leases do not wait for a slow file system.
async fn beside_tasks<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

/// Opens sled; a database that does not open is set aside, for it can be made again.
fn open_database(path: &Path) -> io::Result<sled::Db> {
    let open = || {
        sled::Config::new()
            .path(path)
            .cache_capacity(16 << 20)
            .flush_every_ms(Some(1000))
            .open()
    };
    match open() {
        Ok(database) => Ok(database),
        Err(error @ sled::Error::Corruption { .. }) => {
            let aside = path.with_extension("corrupt");
            tracing::warn!(%error, aside = %aside.display(), "the state's database is corrupt; it is made again");
            let _ = std::fs::remove_dir_all(&aside);
            std::fs::rename(path, &aside)?;
            open().map_err(io::Error::other)
        }
        Err(error) => Err(io::Error::other(error)),
    }
}

fn load(tree: &sled::Tree) -> io::Result<Inner> {
    let Some(applied) = tree.get(KEY_APPLIED).map_err(io::Error::other)? else {
        return Ok(Inner::default());
    };
    let applied = envelope::open(Kind::PART, &applied)?;
    let mut state = ClusterState::default();
    if let Some(part) = tree.get(KEY_MAP).map_err(io::Error::other)? {
        let MapPart { map, next } = envelope::open(Kind::PART, &part)?;
        state.map = map;
        state.next = next;
    }
    for pair in tree.scan_prefix([PREFIX_DRIVE]) {
        let (key, part) = pair.map_err(io::Error::other)?;
        if let Ok(id) = <[u8; 4]>::try_from(&key[1..]) {
            let drive = DriveId(u32::from_be_bytes(id));
            state.chunks.insert(drive, envelope::open(Kind::PART, &part)?);
        }
    }
    for pair in tree.scan_prefix([PREFIX_VOLUME]) {
        let (key, part) = pair.map_err(io::Error::other)?;
        if let Ok(id) = <[u8; 8]>::try_from(&key[1..]) {
            let volume = VolumeId(u64::from_be_bytes(id));
            state.layouts.insert(volume, envelope::open(Kind::PART, &part)?);
        }
    }
    Ok(Inner { state, applied })
}

fn insert_map(batch: &mut sled::Batch, state: &ClusterState) {
    // Borrowed, so that the map is not copied to be written.
    #[derive(Serialize)]
    struct MapPartRef<'a> {
        map: &'a ClusterMap,
        next: &'a NextIds,
    }
    let part = MapPartRef {
        map: &state.map,
        next: &state.next,
    };
    batch.insert(KEY_MAP, envelope::seal(Kind::PART, &part));
}

fn insert_drive(batch: &mut sled::Batch, state: &ClusterState, drive: DriveId) {
    let mut key = vec![PREFIX_DRIVE];
    key.extend(drive.0.to_be_bytes());
    match state.chunks.get(&drive) {
        Some(chunks) => batch.insert(key, envelope::seal(Kind::PART, chunks)),
        None => batch.remove(key),
    }
}

fn insert_volume(batch: &mut sled::Batch, state: &ClusterState, volume: VolumeId) {
    let mut key = vec![PREFIX_VOLUME];
    key.extend(volume.0.to_be_bytes());
    match state.layouts.get(&volume) {
        Some(layout) => batch.insert(key, envelope::seal(Kind::PART, layout)),
        None => batch.remove(key),
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = Bytes;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let applied = self.shared.write(|inner| inner.applied.clone());
        Ok((applied.last, applied.membership))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        let mut answers = Vec::new();
        while let Some((entry, responder)) = entries.try_next().await? {
            let log_id = entry.log_id;
            let reply = self.shared.write(|inner| {
                inner.applied.last = Some(log_id);
                match entry.payload {
                    EntryPayload::Blank => Reply::Unchanged,
                    EntryPayload::Normal(proposal) => {
                        let reply = inner.state.apply(proposal.0);
                        metrics::command(result_label(&reply));
                        reply
                    }
                    EntryPayload::Membership(membership) => {
                        inner.applied.membership = StoredMembership::new(Some(log_id), membership);
                        Reply::Applied
                    }
                }
            });
            answers.extend(responder.map(|responder| (responder, reply)));
        }
        self.store_changes().await?;
        // The map is out before the answer: whoever proposed a change finds it in the map it watches here.
        self.shared.publish();
        for (responder, reply) in answers {
            responder.send(reply);
        }
        let (index, version) = self.shared.write(|inner| {
            (
                inner.applied.last.map_or(0, |last| last.index),
                inner.state.map.version.0,
            )
        });
        metrics::applied(index, version);
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        let body = self.shared.write(|inner| SnapshotBody {
            applied: inner.applied.clone(),
            state: inner.state.clone(),
        });
        SnapshotBuilder {
            body: Arc::new(body),
            snapshots: self.snapshots.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Bytes) -> io::Result<()> {
        let SnapshotBody { applied, state } = envelope::open(Kind::SNAPSHOT, &snapshot)?;
        if applied.last != meta.last_log_id {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the snapshot is not the one that was announced",
            ));
        }
        let (snapshots, tree) = (self.snapshots.clone(), self.tree.clone());
        beside_tasks(move || {
            snapshots.save(&snapshot)?;
            tree.clear().map_err(io::Error::other)
        })
        .await?;
        metrics::snapshot("installed");
        let batch = self.shared.write(|inner| {
            *inner = Inner { state, applied };
            let state = &inner.state;
            let mut batch = sled::Batch::default();
            insert_map(&mut batch, state);
            state
                .chunks
                .keys()
                .for_each(|drive| insert_drive(&mut batch, state, *drive));
            state
                .layouts
                .keys()
                .for_each(|volume| insert_volume(&mut batch, state, *volume));
            batch.insert(KEY_APPLIED, envelope::seal(Kind::PART, &inner.applied));
            batch
        });
        let tree = self.tree.clone();
        beside_tasks(move || tree.apply_batch(batch).map_err(io::Error::other)).await?;
        self.shared.publish();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        self.snapshots.current()
    }
}

fn result_label(reply: &Reply) -> &'static str {
    match reply {
        Reply::Refused(_) => "refused",
        Reply::Unchanged => "unchanged",
        _ => "applied",
    }
}

/// Writes a snapshot of the state as it was when the builder was made.
#[derive(Debug)]
pub(crate) struct SnapshotBuilder {
    body: Arc<SnapshotBody>,
    snapshots: Snapshots,
}

impl std::fmt::Debug for SnapshotBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotBody")
            .field("applied", &self.applied)
            .finish_non_exhaustive()
    }
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let (body, snapshots) = (Arc::clone(&self.body), self.snapshots.clone());
        beside_tasks(move || {
            let snapshot = Bytes::from(envelope::seal(Kind::SNAPSHOT, &*body));
            snapshots.save(&snapshot)?;
            metrics::snapshot("built");
            Ok(Snapshot {
                meta: meta(&body.applied),
                snapshot,
            })
        })
        .await
    }
}

fn meta(applied: &Applied) -> SnapshotMeta {
    SnapshotMeta {
        last_log_id: applied.last,
        last_membership: applied.membership.clone(),
    }
}

/// The snapshot files: one that counts, replaced atomically.
#[derive(Clone, Debug)]
struct Snapshots {
    directory: PathBuf,
}

impl Snapshots {
    fn open(directory: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    /// Makes `snapshot` the current one, durably.
    fn save(&self, snapshot: &[u8]) -> io::Result<()> {
        let new = self.directory.join("new");
        let file = DiskFile::create(&new)?;
        file.write_all_at(snapshot, 0)?;
        file.sync_all()?;
        disk::rename(&new, &self.directory.join(SNAPSHOT_FILE))?;
        disk::sync_directory(&self.directory)
    }

    fn current(&self) -> io::Result<Option<Snapshot>> {
        let snapshot = match std::fs::read(self.directory.join(SNAPSHOT_FILE)) {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let body: SnapshotBody = envelope::open(Kind::SNAPSHOT, &snapshot)?;
        Ok(Some(Snapshot {
            meta: meta(&body.applied),
            snapshot,
        }))
    }
}

/// Judges bytes as the envelope of a snapshot or of a stored part, by `survives`.
#[cfg(fuzzing)]
pub(crate) fn fuzz(kind: u8, survives: &mut crate::fuzzing::judge::Judge<'_>) {
    match kind {
        0 => survives.judge::<SnapshotBody>(Kind::SNAPSHOT),
        1 => survives.judge::<MapPart>(Kind::PART),
        _ => survives.judge::<Applied>(Kind::PART),
    }
}

/// The envelope of a snapshot of `state`, and of the map's part.
#[cfg(fuzzing)]
pub(crate) fn fuzz_seeds(state: &ClusterState) -> [Vec<u8>; 3] {
    let applied = Applied::default();
    let part = MapPart {
        map: state.map.clone(),
        next: state.next,
    };
    let snapshot = SnapshotBody {
        applied: applied.clone(),
        state: state.clone(),
    };
    [
        envelope::seal(Kind::SNAPSHOT, &snapshot),
        envelope::seal(Kind::PART, &part),
        envelope::seal(Kind::PART, &applied),
    ]
}

#[cfg(test)]
mod tests {
    use openraft::testing::log::{StoreBuilder, Suite};
    use tempfile::TempDir;

    use super::*;
    use crate::log::LogStore;

    struct Builder;

    impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
        async fn build(
            &self,
        ) -> Result<(TempDir, LogStore, StateMachine), openraft::StorageError<TypeConfig>> {
            let directory = tempfile::tempdir().unwrap();
            // Small segments, so that the suite crosses many.
            let log = LogStore::open(&directory.path().join("log"), 4096).unwrap();
            let machine = StateMachine::open(directory.path()).unwrap();
            Ok((directory, log, machine))
        }
    }

    #[test]
    fn log_and_state_machine_keep_openrafts_contract() {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
            .block_on(Suite::test_all(Builder))
            .unwrap();
    }
}
