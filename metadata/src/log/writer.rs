//! The thread that owns the log's files.
//!
//! Everything that waits when a flush ends goes into the next one: under load one `fdatasync` serves many proposals,
//! without a timer that would make a single one wait.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use openraft::storage::IOFlushed;
use tokio::sync::oneshot;

use super::record::RecordKind;
use super::wal::Wal;
use super::{Head, encode};
use crate::metrics;
use crate::raft::TypeConfig;
use crate::raft::types::{LogId, Vote};

/// Writes of one flush. Bounds the memory of a batch, and how late its first one is answered.
const BATCH_MAX: usize = 256;
/// How long a former process on the same log may take to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// What to write.
#[derive(Debug)]
pub(super) enum Write {
    Vote(Vote),
    Committed(Option<LogId>),
    /// Each with its index, encoded.
    Entries(Vec<(u64, Vec<u8>)>),
    Truncate(Option<LogId>),
    Purge(LogId),
}

/// Who waits for it.
pub(super) enum Done {
    Nobody,
    Callback(IOFlushed<TypeConfig>),
    Waiter(oneshot::Sender<io::Result<()>>),
}

/// A write and who waits for it.
pub(super) struct Job {
    pub(super) write: Write,
    pub(super) done: Done,
}

/// The way to the thread. It ends when this is dropped and all that was sent is written.
#[derive(Debug)]
pub(super) struct Writer {
    jobs: Sender<Job>,
}

impl Writer {
    pub(super) fn start(wal: Wal, head: Head, lock: File) -> io::Result<Self> {
        let (jobs, received) = mpsc::channel();
        std::thread::Builder::new()
            .name("weft-raft-log".into())
            .spawn(move || {
                let _held_until_the_end = lock;
                Files { wal, head }.run(&received);
            })?;
        Ok(Self { jobs })
    }

    pub(super) fn send(&self, job: Job) -> io::Result<()> {
        self.jobs.send(job).map_err(|_| stopped())
    }
}

/// The error of a log whose thread is gone.
pub(super) fn stopped() -> io::Error {
    io::Error::other("the Raft log has stopped")
}

/// Keeps other processes out of `directory`.
pub(super) fn lock(directory: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(directory.join("lock"))?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    format!(
                        "the Raft log in {} is in use by another process",
                        directory.display()
                    ),
                ));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The files, and what of the log has been handed to them.
struct Files {
    wal: Wal,
    head: Head,
}

impl Files {
    fn run(mut self, jobs: &Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            let mut waiting = Vec::new();
            let mut purged = None;
            let mut result = Ok(());
            let mut must_flush = false;
            for job in std::iter::once(first).chain(jobs.try_iter().take(BATCH_MAX - 1)) {
                must_flush |= !matches!(job.done, Done::Nobody);
                if let Write::Purge(log_id) = &job.write {
                    purged = Some(log_id.index);
                }
                if result.is_ok() {
                    result = self.add(job.write);
                }
                waiting.push(job.done);
            }
            if must_flush && result.is_ok() {
                let started = Instant::now();
                result = self.wal.flush();
                metrics::log_flushed(started.elapsed(), self.wal.disk_bytes());
            }
            if let (Ok(()), Some(index)) = (&result, purged) {
                // The purge position is durable: now the files may go.
                result = self.wal.purge(index);
            }
            if let Err(error) = &result {
                tracing::error!(%error, "the Raft log cannot be written; this member stops");
            }
            for done in waiting {
                let answer = match &result {
                    Ok(()) => Ok(()),
                    Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
                };
                match done {
                    Done::Nobody => {}
                    Done::Callback(callback) => callback.io_completed(answer),
                    Done::Waiter(waiter) => {
                        // Whoever asked may have gone.
                        let _ = waiter.send(answer);
                    }
                }
            }
        }
        if let Err(error) = self.wal.flush() {
            tracing::error!(%error, "the Raft log could not be written at its end");
        }
    }

    fn add(&mut self, write: Write) -> io::Result<()> {
        match write {
            Write::Vote(vote) => {
                self.head.vote = Some(vote);
                self.record(RecordKind::VOTE, &encode(&vote), 0)
            }
            Write::Committed(committed) => {
                self.head.committed = committed;
                self.record(RecordKind::COMMITTED, &encode(&committed), 0)
            }
            Write::Entries(entries) => entries
                .iter()
                .try_for_each(|(index, body)| self.record(RecordKind::ENTRY, body, *index)),
            Write::Truncate(last) => self.record(RecordKind::TRUNCATE, &encode(&last), 0),
            Write::Purge(log_id) => {
                self.head.purged = self.head.purged.max(Some(log_id));
                self.record(RecordKind::PURGE, &encode(&log_id), 0)
            }
        }
    }

    fn record(&mut self, kind: RecordKind, body: &[u8], index: u64) -> io::Result<()> {
        if self.wal.is_full(body.len()) {
            self.wal.flush()?;
            let first = encode(&self.head);
            self.wal.roll(&first)?;
        }
        self.wal.append(kind, body, index);
        Ok(())
    }
}
