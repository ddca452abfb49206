//! The write-ahead log's files: segments, appended to by one writer, flushed once per batch.
//!
//! What is promised: once [`Wal::flush`] has returned, every record appended before it is found again by
//! [`Wal::open`], whatever happens to the process or the power. Records appended and not flushed may be found or not,
//! but never a later one without all earlier ones.
//!
//! Each segment is preallocated and zeroed, so that a flush writes data and no metadata of the file system (and
//! `fdatasync` is enough). It begins with a record that repeats everything said in earlier segments and still true, except
//! entries, so a segment can be deleted as soon as all its entries are purged.
//!
//! A torn tail (records after the last flush, in part) is cut off and zeroed at open. A broken record that must have
//! been flushed before is damage, and reported: nothing that was answered is dropped in silence.
//!
//! It knows neither Raft nor CBOR: bodies are bytes. `docs/format/raft.md`.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};

use super::record::{self, RecordKind};
use crate::disk::{self, DiskFile};

/// Bytes of a segment. Guessed: some thousand commands, and zeroed in some milliseconds.
pub(crate) const SEGMENT_BYTES: u64 = 4 << 20;

/// The files of one log, open for appending.
#[derive(Debug)]
pub(super) struct Wal {
    directory: PathBuf,
    segment_bytes: u64,
    /// Oldest first; the last one is appended to.
    segments: VecDeque<Segment>,
    file: DiskFile,
    /// Where the next batch goes in the last segment.
    offset: u64,
    /// Bytes of the last segment that are allocated.
    allocated: u64,
    sequence: u64,
    batch: u32,
    /// The batch being collected.
    pending: Vec<u8>,
    /// After a write or flush that did not succeed nothing is trusted any more.
    poisoned: bool,
}

#[derive(Clone, Debug)]
struct Segment {
    number: u64,
    path: PathBuf,
    /// The largest index of an entry in it, 0 for none.
    last_index: u64,
}

impl Wal {
    /// Opens the log in `directory`, or begins one; `found` is called with every record, in order, and answers the
    /// index of an entry (0 for anything else).
    pub(super) fn open(
        directory: &Path,
        segment_bytes: u64,
        mut found: impl FnMut(RecordKind, &[u8]) -> io::Result<u64>,
    ) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let name = entry?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_suffix(".wal"))
                .and_then(|digits| u64::from_str_radix(digits, 16).ok());
            numbers.extend(number);
        }
        numbers.sort_unstable();
        if numbers.windows(2).any(|pair| pair[1] != pair[0] + 1) {
            return Err(damaged("a segment between others is missing"));
        }

        let mut segments = VecDeque::new();
        let mut expected: Option<u64> = None;
        let mut batch = 0;
        let mut last: Option<(DiskFile, u64, u64)> = None;
        for (position, &number) in numbers.iter().enumerate() {
            let path = segment_path(directory, number);
            let bytes = std::fs::read(&path)?;
            let is_last = position + 1 == numbers.len();
            let first = record::read(&bytes).filter(|first| {
                first.kind == RecordKind::SEGMENT
                    && expected.is_none_or(|expected| first.sequence == expected)
            });
            if first.is_none() {
                // The crash came while the segment was being made: nothing was in it.
                if is_last && later_record(&bytes, 0, batch).is_none() {
                    disk::remove(&path)?;
                    continue;
                }
                return Err(damaged("a segment does not begin with its first record"));
            }
            let mut segment = Segment {
                number,
                path: path.clone(),
                last_index: 0,
            };
            let mut offset = 0;
            while let Some(record) = record::read(&bytes[offset..]) {
                if expected.is_some_and(|expected| record.sequence != expected) {
                    break;
                }
                expected = Some(record.sequence.wrapping_add(1));
                batch = record.batch;
                segment.last_index = segment.last_index.max(found(record.kind, record.body)?);
                offset += record.bytes;
                if offset >= bytes.len() {
                    break;
                }
            }
            if let Some(at) = later_record(&bytes, offset, batch) {
                return Err(damaged(&format!(
                    "segment {number} is broken at {offset}, and flushed records follow at {at}"
                )));
            }
            let file = DiskFile::open(&path)?;
            if is_last && bytes[offset.min(bytes.len())..].iter().any(|&byte| byte != 0) {
                zero(&file, offset as u64, bytes.len() as u64)?;
                file.sync_data()?;
            }
            segments.push_back(segment);
            last = Some((file, offset as u64, bytes.len() as u64));
        }

        let (file, offset, allocated) = match last {
            Some(last) => last,
            None => {
                let number = numbers.last().map_or(1, |number| number + 1);
                let path = segment_path(directory, number);
                let file = create(&path, segment_bytes)?;
                segments.push_back(Segment {
                    number,
                    path,
                    last_index: 0,
                });
                (file, 0, segment_bytes)
            }
        };
        Ok(Self {
            directory: directory.to_owned(),
            segment_bytes,
            segments,
            file,
            offset,
            allocated,
            sequence: expected.unwrap_or(1),
            batch: batch.wrapping_add(1),
            pending: Vec::new(),
            poisoned: false,
        })
    }

    /// Whether the last segment has nothing in it: its first record is still to come.
    pub(super) fn is_empty(&self) -> bool {
        self.offset == 0 && self.pending.is_empty()
    }

    /// Writes the first record of a log that was just begun.
    pub(super) fn begin(&mut self, first: &[u8]) -> io::Result<()> {
        self.append(RecordKind::SEGMENT, first, 0);
        self.flush()
    }

    /// Adds a record to the batch. `index` is that of an entry, 0 for anything else.
    pub(super) fn append(&mut self, kind: RecordKind, body: &[u8], index: u64) {
        record::write(&mut self.pending, kind, self.sequence, self.batch, body);
        self.sequence = self.sequence.wrapping_add(1);
        if let Some(segment) = self.segments.back_mut() {
            segment.last_index = segment.last_index.max(index);
        }
    }

    /// Whether the batch and another record of this size would leave the segment's preallocated space.
    pub(super) fn is_full(&self, body_bytes: usize) -> bool {
        self.offset + (self.pending.len() + record::size(body_bytes)) as u64 > self.allocated
    }

    /// Writes the batch and makes it durable. After an error the log answers nothing but errors.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.poisoned {
            return Err(io::Error::other("the log has failed to flush before"));
        }
        if self.pending.is_empty() {
            return Ok(());
        }
        let written = self
            .file
            .write_all_at(&self.pending, self.offset)
            .and_then(|()| self.file.sync_data());
        if written.is_err() {
            self.poisoned = true;
        }
        written?;
        self.offset += self.pending.len() as u64;
        self.pending.clear();
        self.batch = self.batch.wrapping_add(1);
        Ok(())
    }

    /// Ends the segment and begins a new one, with `first` as its first record. The batch must be empty.
    pub(super) fn roll(&mut self, first: &[u8]) -> io::Result<()> {
        debug_assert!(self.pending.is_empty(), "a batch lies within one segment");
        let number = self.segments.back().map_or(1, |segment| segment.number + 1);
        let path = segment_path(&self.directory, number);
        let created = create(&path, self.segment_bytes.max(record::size(first.len()) as u64));
        if created.is_err() {
            self.poisoned = true;
        }
        self.file = created?;
        self.allocated = self.file.bytes()?;
        self.offset = 0;
        self.segments.push_back(Segment {
            number,
            path,
            last_index: 0,
        });
        self.append(RecordKind::SEGMENT, first, 0);
        self.flush()
    }

    /// Deletes the oldest segments whose entries are all purged.
    pub(super) fn purge(&mut self, index: u64) -> io::Result<()> {
        while self.segments.len() > 1 && self.segments[0].last_index <= index {
            if let Some(segment) = self.segments.pop_front() {
                disk::remove(&segment.path)?;
                // One after the other: a gap between segments that are left is damage.
                disk::sync_directory(&self.directory)?;
            }
        }
        Ok(())
    }

    /// Bytes of the files.
    pub(super) fn disk_bytes(&self) -> u64 {
        (self.segments.len() as u64 - 1) * self.segment_bytes + self.allocated
    }
}

fn segment_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:016x}.wal"))
}

/// A zeroed file of this size, durable under its name.
fn create(path: &Path, bytes: u64) -> io::Result<DiskFile> {
    let file = DiskFile::create(path)?;
    // Written and not merely reserved: a flush must not have to change the file system's own metadata.
    zero(&file, 0, bytes)?;
    file.sync_all()?;
    if let Some(directory) = path.parent() {
        disk::sync_directory(directory)?;
    }
    Ok(file)
}

fn zero(file: &DiskFile, from: u64, to: u64) -> io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = from;
    while at < to {
        let count = (to - at).min(ZEROES.len() as u64);
        file.write_all_at(&ZEROES[..count as usize], at)?;
        at += count;
    }
    Ok(())
}

/// Where a record lies that was flushed after whatever stood at `offset`: two batches after `batch` or more.
fn later_record(bytes: &[u8], offset: usize, batch: u32) -> Option<usize> {
    (offset..bytes.len()).step_by(record::ALIGN).find(|&at| {
        record::read_header(&bytes[at..])
            .is_some_and(|(_, found)| found.wrapping_sub(batch).wrapping_sub(2) < u32::MAX / 2)
    })
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the Raft log is damaged: {what}"),
    )
}
