//! The log's files from a fuzzer's bytes.

use std::path::PathBuf;

use openraft::EntryPayload;
use openraft::vote::RaftLeaderId;

use super::record::{self, RecordKind};
use super::{Cache, encode, load};
use crate::raft::Proposal;
use crate::raft::types::{Entry, LogId, Vote};
use crate::state::Command;

/// A folder for one log, in memory where the system has such a place, and of this process alone.
fn folder() -> PathBuf {
    let base = PathBuf::from("/dev/shm");
    let base = if base.is_dir() { base } else { std::env::temp_dir() };
    base.join(format!("weft-fuzz-log-{}", std::process::id()))
}

/// Opens a log of one segment with these bytes. What can be opened is the same when it is opened again, and what is written
/// then is found.
pub(crate) fn log(bytes: &[u8], framed: bool) {
    let segment = if framed { bytes.to_vec() } else { segment(bytes) };
    let folder = folder();
    // What an earlier input left.
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder in memory");
    std::fs::write(folder.join("0000000000000001.wal"), segment).expect("a file in memory");
    let Ok((cache, mut wal)) = load(&folder, 4096) else {
        return;
    };
    let vote = Vote::new(7, 7);
    wal.append(RecordKind::VOTE, &encode(&vote), 0);
    wal.flush().expect("a file in memory");
    drop(wal);
    let (again, _) = load(&folder, 4096).expect("a log that was opened opens again");
    assert_eq!(again.head.vote, Some(vote));
    assert_eq!(says(&again), says(&cache));
}

/// Everything but the vote, as bytes.
fn says(cache: &Cache) -> Vec<u8> {
    encode(&(&cache.head.committed, &cache.head.purged, &cache.entries))
}

/// A segment of records whose bodies are `bytes`: kind, length in two bytes, body.
fn segment(mut bytes: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    let mut sequence = 1;
    while let [kind, low, high, rest @ ..] = bytes {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, rest) = rest.split_at(length);
        bytes = rest;
        // A log begins with what earlier segments said.
        let kind = if sequence == 1 {
            RecordKind::SEGMENT
        } else {
            RecordKind(1 + kind % 6)
        };
        record::write(&mut segment, kind, sequence, sequence as u32, body);
        sequence += 1;
    }
    segment
}

/// Whether they are a segment's bytes, and they.
pub(crate) fn seeds() -> Vec<(bool, Vec<u8>)> {
    let id = |index| LogId::new(openraft::vote::leader_id_adv::CommittedLeaderId::new(3, 1), index);
    let entry = |index, payload| Entry {
        log_id: id(index),
        payload,
    };
    let command = Command::RemoveNode {
        node: weft_proto::id::NodeId(3),
    };
    let records = [
        (RecordKind::SEGMENT, encode(&Cache::default().head)),
        (RecordKind::VOTE, encode(&Vote::new(3, 1))),
        (RecordKind::ENTRY, encode(&entry(0, EntryPayload::Blank))),
        (
            RecordKind::ENTRY,
            encode(&entry(1, EntryPayload::Normal(Proposal(command)))),
        ),
        (RecordKind::ENTRY, encode(&entry(2, EntryPayload::Blank))),
        (RecordKind::COMMITTED, encode(&Some(id(1)))),
        (RecordKind::TRUNCATE, encode(&Some(id(1)))),
        (RecordKind::PURGE, encode(&id(0))),
    ];
    let mut bodies = Vec::new();
    let mut segment = Vec::new();
    for (sequence, (kind, body)) in (1..).zip(&records) {
        bodies.push(kind.0.wrapping_sub(1));
        bodies.extend((body.len() as u16).to_le_bytes());
        bodies.extend_from_slice(body);
        record::write(&mut segment, *kind, sequence, sequence as u32, body);
    }
    let mut zeroed = segment.clone();
    zeroed.resize(4096, 0);
    // Numbers that no log reaches.
    let mut last = Vec::new();
    record::write(&mut last, RecordKind::SEGMENT, u64::MAX, u32::MAX, &records[0].1);
    record::write(
        &mut last,
        RecordKind::TRUNCATE,
        0,
        0,
        &encode(&Some(id(u64::MAX))),
    );
    record::write(&mut last, RecordKind::PURGE, 1, 1, &encode(&id(u64::MAX)));
    vec![(true, segment), (true, zeroed), (true, last), (false, bodies)]
}
