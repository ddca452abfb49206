//! The Raft log: vote, committed position and entries, durable before they count.
//!
//! ```text
//!  openraft ──► LogStore ──► cache (entries not purged; read by everybody)
//!                  │
//!                  └──► writer thread: all writes that wait ──► one write, one fdatasync ──► answers
//! ```
//!
//! - [`record`], [`wal`]: the files;
//! - [`writer`]: the thread that owns them and groups what waits into one flush;
//! - here: openraft's `RaftLogStorage`, over both.
//!
//! A vote is durable when `save_vote` returns; entries are when their callback is called. Both are written in the order
//! in which openraft asked. The committed position is an optimisation and rides along with the next flush.

#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod record;
#[cfg(test)]
mod tests;
mod wal;
mod writer;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::raft::TypeConfig;
use crate::raft::types::{Entry, LogId, Vote};
use record::RecordKind;
pub(crate) use wal::SEGMENT_BYTES;
use wal::Wal;
use writer::{Done, Job, Write, Writer};

/// openraft's log storage. Cheap to clone; all clones are one log.
#[derive(Clone, Debug)]
pub(crate) struct LogStore {
    cache: Arc<Mutex<Cache>>,
    writer: Arc<Writer>,
}

/// The log as it will be when everything asked for is written.
#[derive(Debug, Default)]
struct Cache {
    head: Head,
    entries: BTreeMap<u64, Entry>,
}

/// Everything but the entries; begins each segment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Head {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
}

impl Cache {
    fn truncate_after(&mut self, last: Option<LogId>) {
        // No log gets to the last index; a file could name it.
        let next = last.map_or(0, |last| last.index.saturating_add(1));
        self.entries.split_off(&next);
    }

    fn purge(&mut self, purged: LogId) {
        self.entries = self.entries.split_off(&purged.index.saturating_add(1));
        if self.head.purged < Some(purged) {
            self.head.purged = Some(purged);
        }
    }

    /// Applies a record found at open; answers the index of an entry.
    fn replay(&mut self, kind: RecordKind, body: &[u8]) -> io::Result<u64> {
        match kind {
            RecordKind::SEGMENT => self.head = decode(body)?,
            RecordKind::VOTE => self.head.vote = Some(decode(body)?),
            RecordKind::COMMITTED => self.head.committed = decode(body)?,
            RecordKind::ENTRY => {
                let entry: Entry = decode(body)?;
                let index = entry.log_id.index;
                self.entries.insert(index, entry);
                return Ok(index);
            }
            RecordKind::TRUNCATE => self.truncate_after(decode(body)?),
            RecordKind::PURGE => self.purge(decode(body)?),
            RecordKind(unknown) => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("the Raft log has a record of kind {unknown}, written by a later version"),
                ));
            }
        }
        Ok(0)
    }
}

impl LogStore {
    /// Opens the log in `directory`, or begins one. One process at a time.
    pub(crate) fn open(directory: &Path, segment_bytes: u64) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let lock = writer::lock(directory)?;
        let (cache, wal) = load(directory, segment_bytes)?;
        let writer = Writer::start(wal, cache.head.clone(), lock)?;
        Ok(Self {
            cache: Arc::new(Mutex::new(cache)),
            writer: Arc::new(writer),
        })
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // Nothing panics while it holds the lock, and the cache is consistent between any two statements.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn write_and_wait(&self, write: Write) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        self.writer.send(Job {
            write,
            done: Done::Waiter(done),
        })?;
        answer.await.map_err(|_| writer::stopped())?
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        // An empty or inverted range would panic in the map.
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => u64::MAX,
        };
        if start >= end {
            return Ok(Vec::new());
        }
        Ok(self
            .cache()
            .entries
            .range(start..end)
            .map(|(_, entry)| entry.clone())
            .collect())
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.cache().head.vote)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let cache = self.cache();
        let last = cache.entries.last_key_value().map(|(_, entry)| entry.log_id);
        Ok(LogState {
            last_purged_log_id: cache.head.purged,
            last_log_id: last.or(cache.head.purged),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.write_and_wait(Write::Vote(*vote)).await?;
        self.cache().head.vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.cache().head.committed = committed;
        self.writer.send(Job {
            write: Write::Committed(committed),
            done: Done::Nobody,
        })
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.cache().head.committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut encoded = Vec::new();
        {
            let mut cache = self.cache();
            for entry in entries {
                let index = entry.log_id.index;
                encoded.push((index, encode(&entry)));
                cache.entries.insert(index, entry);
            }
        }
        self.writer.send(Job {
            write: Write::Entries(encoded),
            done: Done::Callback(callback),
        })
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.cache().truncate_after(last);
        self.write_and_wait(Write::Truncate(last)).await
    }

    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        self.write_and_wait(Write::Purge(log_id)).await?;
        self.cache().purge(log_id);
        Ok(())
    }
}

/// What the files in `directory` say, and they themselves, ready to be appended to.
fn load(directory: &Path, segment_bytes: u64) -> io::Result<(Cache, Wal)> {
    let mut cache = Cache::default();
    let mut wal = Wal::open(directory, segment_bytes, |kind, body| cache.replay(kind, body))?;
    // Segments are deleted as a whole: the oldest may begin with entries that are purged.
    if let Some(purged) = cache.head.purged {
        cache.purge(purged);
    }
    let indices = cache.entries.keys().copied();
    let first = cache
        .head
        .purged
        .map_or(0, |purged| purged.index.saturating_add(1));
    if indices.zip(first..).any(|(index, expected)| index != expected) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the Raft log is damaged: an entry between others is missing",
        ));
    }
    if wal.is_empty() {
        wal.begin(&encode(&cache.head))?;
    }
    Ok((cache, wal))
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).expect("our own types serialize, and a Vec takes all of it");
    bytes
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> io::Result<T> {
    ciborium::from_reader(body).map_err(|error| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a record of the Raft log does not decode: {error}"),
        )
    })
}
