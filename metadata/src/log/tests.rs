//! Crash tests of the log: what was flushed is found again, whatever became of the tail.

use std::io;
use std::path::Path;

use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogStorage, RaftLogStorageExt};
use openraft::vote::RaftLeaderId;
use openraft::{EntryPayload, RaftLogReader};

use super::LogStore;
use super::record::{self, RecordKind};
use super::wal::Wal;
use crate::raft::Proposal;
use crate::raft::types::{Entry, LogId, Vote};
use crate::state::Command;

/// Small, so that a few records cross segments.
const SEGMENT: u64 = 512;

fn records(directory: &Path) -> io::Result<Vec<(u8, Vec<u8>)>> {
    let mut found = Vec::new();
    Wal::open(directory, SEGMENT, |kind, body| {
        found.push((kind.0, body.to_vec()));
        Ok(0)
    })?;
    found.retain(|(kind, _)| *kind != RecordKind::SEGMENT.0);
    Ok(found)
}

fn begin(directory: &Path) -> Wal {
    let mut wal = Wal::open(directory, SEGMENT, |_, _| Ok(0)).unwrap();
    if wal.is_empty() {
        wal.begin(b"first").unwrap();
    }
    wal
}

fn add(wal: &mut Wal, body: &[u8], index: u64) {
    if wal.is_full(body.len()) {
        wal.flush().unwrap();
        wal.roll(b"next").unwrap();
    }
    wal.append(RecordKind::ENTRY, body, index);
}

fn only_file(directory: &Path) -> std::path::PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.pop().unwrap()
}

#[test]
fn what_was_flushed_is_found_again_over_many_segments() {
    let directory = tempfile::tempdir().unwrap();
    let mut expected = Vec::new();
    for round in 0..10_u64 {
        // Opened anew each time, as after a crash: nothing is closed.
        let mut wal = begin(directory.path());
        for index in 0..7 {
            let body = vec![round as u8; (round * 11 + index) as usize];
            add(&mut wal, &body, round * 7 + index + 1);
            expected.push((RecordKind::ENTRY.0, body));
        }
        wal.flush().unwrap();
        assert_eq!(records(directory.path()).unwrap(), expected);
    }
}

#[test]
fn a_tail_cut_or_zeroed_at_any_byte_loses_only_what_was_not_flushed() {
    let source = tempfile::tempdir().unwrap();
    let mut wal = begin(source.path());
    add(&mut wal, b"flushed and answered", 1);
    wal.flush().unwrap();
    let path = only_file(source.path());
    let whole_until = 32 + 8 + 32 + 24;
    // A batch of three records that the crash may have torn anywhere.
    for body in [&b"one"[..], b"twotwotwo", b"three"] {
        add(&mut wal, body, 2);
    }
    wal.flush().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let ends = [
        whole_until,
        whole_until + 40,
        whole_until + 40 + 48,
        whole_until + 40 + 48 + 40,
    ];
    for cut in whole_until..=ends[3] {
        for zeroed in [true, false] {
            let crashed = tempfile::tempdir().unwrap();
            let mut torn = bytes.clone();
            if zeroed {
                torn[cut..].fill(0);
            } else {
                torn.truncate(cut);
            }
            std::fs::write(crashed.path().join(path.file_name().unwrap()), &torn).unwrap();
            // The padding of a record may be missing, its body may not.
            let bodies = [whole_until + 32 + 3, ends[1] + 32 + 9, ends[2] + 32 + 5];
            let whole = bodies.iter().filter(|end| **end <= cut).count();
            let found = records(crashed.path()).unwrap();
            // A zeroed body byte may be equal to what was there only in padding.
            assert_eq!(found.len(), 1 + whole, "cut at {cut}, zeroed: {zeroed}");
            assert_eq!(found[0].1, b"flushed and answered");

            // And the log goes on from there, without the torn rest coming back.
            let mut wal = begin(crashed.path());
            add(&mut wal, b"after", 9);
            wal.flush().unwrap();
            let again = records(crashed.path()).unwrap();
            assert_eq!(again.len(), 2 + whole);
            assert_eq!(again.last().unwrap().1, b"after");
        }
    }
}

#[test]
fn a_later_record_of_the_same_torn_batch_does_not_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let mut wal = begin(directory.path());
    add(&mut wal, b"flushed", 1);
    wal.flush().unwrap();
    add(&mut wal, b"torn..", 2);
    add(&mut wal, b"stale.", 3);
    wal.flush().unwrap();
    drop(wal);
    let path = only_file(directory.path());
    let mut bytes = std::fs::read(&path).unwrap();
    let torn_at = 40 + 40;
    bytes[torn_at + 33] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let mut wal = begin(directory.path());
    // The same size as the torn one: the stale record would follow it seamlessly.
    add(&mut wal, b"new...", 2);
    wal.flush().unwrap();
    let found = records(directory.path()).unwrap();
    let bodies: Vec<&[u8]> = found.iter().map(|(_, body)| &body[..]).collect();
    assert_eq!(bodies, [&b"flushed"[..], b"new..."]);
}

#[test]
fn damage_to_what_was_flushed_is_reported_and_not_cut_off() {
    let directory = tempfile::tempdir().unwrap();
    let mut wal = begin(directory.path());
    for index in 1..=4 {
        add(&mut wal, b"batch", index);
        wal.flush().unwrap();
    }
    drop(wal);
    let path = only_file(directory.path());
    let intact = std::fs::read(&path).unwrap();
    // The second of four batches.
    let mut bytes = intact.clone();
    bytes[40 + 40 + 33] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(
        records(directory.path()).unwrap_err().kind(),
        io::ErrorKind::InvalidData
    );
    assert_eq!(
        std::fs::read(&path).unwrap(),
        bytes,
        "nothing is repaired in silence"
    );
    std::fs::write(&path, &intact).unwrap();
    assert_eq!(records(directory.path()).unwrap().len(), 4);
}

#[test]
fn a_segment_that_was_being_made_is_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let mut wal = begin(directory.path());
    add(&mut wal, b"flushed", 1);
    wal.flush().unwrap();
    for length in [0, 17, 512] {
        std::fs::write(directory.path().join(format!("{:016x}.wal", 2)), vec![0; length]).unwrap();
        assert_eq!(records(directory.path()).unwrap().len(), 1);
    }
}

#[test]
fn a_missing_segment_is_damage() {
    let directory = tempfile::tempdir().unwrap();
    let mut wal = begin(directory.path());
    for index in 0..40 {
        add(&mut wal, b"0123456789012345678901234567890123456789", index + 1);
        wal.flush().unwrap();
    }
    std::fs::remove_file(directory.path().join(format!("{:016x}.wal", 3))).unwrap();
    assert!(records(directory.path()).is_err());
}

#[test]
fn purged_segments_are_deleted_from_the_front() {
    let directory = tempfile::tempdir().unwrap();
    let mut wal = begin(directory.path());
    for index in 1..=40 {
        add(&mut wal, &[7; 60], index);
        wal.flush().unwrap();
    }
    let before = std::fs::read_dir(directory.path()).unwrap().count();
    wal.purge(20).unwrap();
    let after = std::fs::read_dir(directory.path()).unwrap().count();
    assert!(after < before && after > 1, "{before} segments became {after}");
    let found = records(directory.path()).unwrap();
    assert!(found.len() >= 20 && found.len() < 40, "{}", found.len());
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(
        openraft::impls::leader_id_adv::LeaderId::new(term, 1).to_committed(),
        index,
    )
}

fn entry(term: u64, index: u64) -> Entry {
    let command = Command::MarkDead {
        incarnation: weft_proto::id::IncarnationId(index),
    };
    Entry::new(log_id(term, index), EntryPayload::Normal(Proposal(command)))
}

/// The files as a crash at this moment would leave them to the next process.
fn crash(directory: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(directory).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    copy
}

#[test]
fn a_crash_after_any_answer_loses_nothing_that_was_answered() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let directory = tempfile::tempdir().unwrap();
        // Small segments: the crashes come in every state of their change too.
        let mut log = LogStore::open(directory.path(), 1024).unwrap();
        let mut expected: Vec<Entry> = Vec::new();
        let mut vote = None;
        let mut purged = None;
        for step in 0..120_u64 {
            let term = 1 + step / 30;
            // Raft's first entry has index 0.
            let next = expected.last().map_or(0, |entry| entry.log_id.index + 1);
            match step % 10 {
                3 => {
                    let new = Vote::new(term, step);
                    log.save_vote(&new).await.unwrap();
                    vote = Some(new);
                }
                6 if expected.len() > 3 => {
                    let keep = expected[expected.len() - 3].log_id;
                    log.truncate_after(Some(keep)).await.unwrap();
                    expected.truncate(expected.len() - 2);
                }
                8 if expected.len() > 8 => {
                    let upto = expected[3].log_id;
                    log.purge(upto).await.unwrap();
                    expected.drain(..4);
                    purged = Some(upto);
                }
                9 => log
                    .save_committed(expected.last().map(|entry| entry.log_id))
                    .await
                    .unwrap(),
                _ => {
                    let new: Vec<Entry> = (0..1 + step % 3).map(|i| entry(term, next + i)).collect();
                    log.blocking_append(new.clone()).await.unwrap();
                    expected.extend(new);
                }
            }
            let copy = crash(directory.path());
            let mut found = LogStore::open(copy.path(), 1024).unwrap();
            let entries = found.try_get_log_entries(..).await.unwrap();
            assert_eq!(entries, expected, "after step {step}");
            assert_eq!(found.read_vote().await.unwrap(), vote, "after step {step}");
            let state = found.get_log_state().await.unwrap();
            assert_eq!(state.last_purged_log_id, purged, "after step {step}");
        }
        let files = std::fs::read_dir(directory.path()).unwrap().count();
        assert!(files > 2, "the test is to cross segments");
    });
}

#[test]
fn a_second_process_on_the_same_log_is_kept_out() {
    let directory = tempfile::tempdir().unwrap();
    let _first = LogStore::open(directory.path(), 1024).unwrap();
    assert_eq!(
        LogStore::open(directory.path(), 1024).unwrap_err().kind(),
        io::ErrorKind::ResourceBusy
    );
}

#[test]
fn an_append_is_readable_before_it_is_durable() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let mut log = LogStore::open(directory.path(), 1 << 20).unwrap();
        log.append([entry(1, 1), entry(1, 2)], IOFlushed::noop())
            .await
            .unwrap();
        assert_eq!(log.try_get_log_entries(1..=2).await.unwrap().len(), 2);
        assert_eq!(log.try_get_log_entries(2..2).await.unwrap().len(), 0);
    });
}

#[test]
fn a_log_that_names_the_last_index_opens() {
    let directory = tempfile::tempdir().unwrap();
    let last = |index| Some(log_id(1, index));
    let mut segment = Vec::new();
    let head = super::encode(&super::Head::default());
    record::write(&mut segment, RecordKind::SEGMENT, u64::MAX, u32::MAX, &head);
    record::write(
        &mut segment,
        RecordKind::TRUNCATE,
        0,
        0,
        &super::encode(&last(u64::MAX)),
    );
    record::write(
        &mut segment,
        RecordKind::PURGE,
        1,
        1,
        &super::encode(&log_id(1, u64::MAX)),
    );
    std::fs::write(directory.path().join("0000000000000001.wal"), segment).unwrap();
    let (cache, _) = super::load(directory.path(), 4096).unwrap();
    assert_eq!(cache.head.purged, last(u64::MAX));
}
