//! A crash after every single effect of the Raft log, of votes, of snapshots and of an installed snapshot.
//!
//! A script of everything that openraft asks of its storage runs once over real files, with a journal of every call that changes
//! one. Then, for each prefix of the journal, the files are made again as a crash there may leave them: all of what was not
//! synced, none of it, and subsets of it by seed. Log and state machine are opened on them, as openraft does at a start, and compared
//! with the model: what was answered is there, of what was under way all or a beginning, nothing else; and the log goes on.
//!
//! sled is not modelled: nothing answered rests on it, so every start here finds it empty, which is the worst that it can do.

use std::collections::BTreeMap;
use std::path::Path;

use futures_util::stream;
use openraft::entry::RaftEntry;
use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::vote::RaftLeaderId;
use openraft::{EntryPayload, RaftLogReader, RaftSnapshotBuilder, StorageHelper};
use weft_proto::id::{ClusterId, HostId};

use crate::disk::journal::{self, Survives};
use crate::log::LogStore;
use crate::raft::types::{Entry, LogId, Snapshot, Vote};
use crate::raft::{Proposal, TypeConfig};
use crate::state::map::Settings;
use crate::state::{ClusterState, Command};
use crate::store::StateMachine;

/// Small, so that the script crosses segments.
const SEGMENT: u64 = 1024;

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(
        openraft::impls::leader_id_adv::LeaderId::new(term, 1).to_committed(),
        index,
    )
}

fn command(index: u64) -> Command {
    if index == 0 {
        return Command::Init {
            id: ClusterId([1; 16]),
            name: "crash".into(),
            authentication_key: [2; 32],
            fencing_host_id: HostId([3; 16]),
            fencing_key: 4,
            settings: Settings::default(),
        };
    }
    Command::AddNode(crate::state::command::NewNode {
        name: format!("node-{index}"),
        rack: None,
        control_address: format!("127.0.0.1:{index}"),
        nvme_address: format!("127.0.0.2:{index}"),
    })
}

fn entry(term: u64, index: u64) -> Entry {
    Entry::new(
        log_id(term, index),
        EntryPayload::Normal(Proposal(command(index))),
    )
}

/// What has been asked for and answered.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    vote: Option<Vote>,
    entries: BTreeMap<u64, Entry>,
    purged: Option<LogId>,
    committed: Option<LogId>,
    snapshot: Option<LogId>,
}

/// What a step of the script does.
#[derive(Clone, Copy, Debug)]
enum Step {
    Vote(u64),
    Append {
        term: u64,
        count: u64,
    },
    Truncate {
        keep: u64,
    },
    /// Says that everything is committed, and applies it.
    Apply,
    Snapshot,
    PurgeTo {
        behind: u64,
    },
    /// A leader's snapshot, so much further than the log.
    Install {
        ahead: u64,
    },
}

const SCRIPT: &[Step] = &[
    Step::Vote(1),
    Step::Append { term: 1, count: 3 },
    Step::Apply,
    Step::Append { term: 1, count: 4 },
    Step::Vote(2),
    Step::Truncate { keep: 5 },
    Step::Append { term: 2, count: 2 },
    Step::Apply,
    Step::Snapshot,
    Step::PurgeTo { behind: 2 },
    Step::Append { term: 2, count: 6 },
    Step::Apply,
    Step::Snapshot,
    Step::PurgeTo { behind: 0 },
    Step::Append { term: 2, count: 3 },
    Step::Vote(3),
    Step::Install { ahead: 5 },
    Step::PurgeTo { behind: 0 },
    Step::Append { term: 3, count: 5 },
    Step::Apply,
];

struct Member {
    log: LogStore,
    machine: StateMachine,
}

impl Member {
    fn open(directory: &Path) -> Self {
        Self {
            log: LogStore::open(&directory.join("log"), SEGMENT).expect("the log opens"),
            machine: StateMachine::open(directory).expect("the state machine opens"),
        }
    }

    async fn apply(&mut self, entries: Vec<Entry>) {
        let entries = entries.into_iter().map(|entry| Ok((entry, None)));
        self.machine.apply(stream::iter(entries)).await.expect("applied");
    }

    async fn take(&mut self, step: Step, model: &mut Model) {
        let next = |model: &Model| {
            let last = model.entries.last_key_value().map(|(index, _)| *index);
            last.max(model.purged.map(|purged| purged.index))
                .map_or(0, |last| last + 1)
        };
        match step {
            Step::Vote(term) => {
                let vote = Vote::new(term, 1);
                self.log.save_vote(&vote).await.expect("saved");
                model.vote = Some(vote);
            }
            Step::Append { term, count } => {
                let first = next(model);
                let entries: Vec<Entry> = (first..first + count).map(|index| entry(term, index)).collect();
                self.log.blocking_append(entries.clone()).await.expect("appended");
                model
                    .entries
                    .extend(entries.into_iter().map(|entry| (entry.log_id.index, entry)));
            }
            Step::Truncate { keep } => {
                let last = model.entries[&keep].log_id;
                self.log.truncate_after(Some(last)).await.expect("truncated");
                model.entries.split_off(&(keep + 1));
            }
            Step::Apply => {
                let last = model.entries.last_key_value().map(|(_, entry)| entry.log_id);
                self.log.save_committed(last).await.expect("saved");
                let (applied, _) = self.machine.applied_state().await.expect("read");
                let from = applied.map_or(0, |applied| applied.index + 1);
                let entries = model.entries.range(from..).map(|(_, entry)| entry.clone());
                self.apply(entries.collect()).await;
                model.committed = last;
            }
            Step::Snapshot => {
                let mut builder = self.machine.get_snapshot_builder().await;
                let built = builder.build_snapshot().await.expect("built");
                model.snapshot = built.meta.last_log_id;
            }
            Step::PurgeTo { behind } => {
                let snapshot = model.snapshot.expect("a snapshot comes first");
                let upto = match model.entries.get(&(snapshot.index - behind)) {
                    Some(entry) => entry.log_id,
                    None => snapshot,
                };
                self.log.purge(upto).await.expect("purged");
                model.entries = model.entries.split_off(&(upto.index + 1));
                model.purged = Some(upto);
            }
            Step::Install { ahead } => {
                let last = log_id(3, next(model) - 1 + ahead);
                let snapshot = leaders_snapshot(last).await;
                self.machine
                    .install_snapshot(&snapshot.meta, snapshot.snapshot)
                    .await
                    .expect("installed");
                model.snapshot = Some(last);
            }
        }
    }
}

/// A snapshot as of `last`, made by another member.
async fn leaders_snapshot(last: LogId) -> Snapshot {
    let directory = tempfile::tempdir().unwrap();
    let mut machine = StateMachine::open(directory.path()).unwrap();
    let entries = (0..=last.index).map(|index| {
        let log_id = if index == last.index {
            last
        } else {
            log_id(1, index)
        };
        let payload = EntryPayload::Normal(Proposal(command(index)));
        Ok((Entry::new(log_id, payload), None))
    });
    machine.apply(stream::iter(entries)).await.unwrap();
    let mut builder = machine.get_snapshot_builder().await;
    builder.build_snapshot().await.unwrap()
}

/// The state after all commands up to `last`.
fn state_at(last: Option<LogId>) -> ClusterState {
    let mut state = ClusterState::default();
    for index in 0..last.map_or(0, |last| last.index + 1) {
        state.apply(command(index));
    }
    state.take_touched();
    state
}

/// Opens what a crash left, and compares it with what was answered before it and what was under way.
async fn judge(directory: &Path, answered: &Model, under_way: &Model, what: &str) {
    let mut member = Member::open(directory);
    let either =
        |found: bool, name: &str| assert!(found, "{what}: {name} is neither as answered nor as asked for");
    let vote = member.log.read_vote().await.unwrap();
    either(vote == answered.vote || vote == under_way.vote, "the vote");
    let purged = member.log.get_log_state().await.unwrap().last_purged_log_id;
    either(
        purged == answered.purged || purged == under_way.purged,
        "the purged position",
    );
    let snapshot = member.machine.get_current_snapshot().await.unwrap();
    let snapshot = snapshot.and_then(|snapshot| snapshot.meta.last_log_id);
    either(
        snapshot == answered.snapshot || snapshot == under_way.snapshot,
        "the snapshot",
    );
    assert!(
        purged <= snapshot,
        "{what}: purged to {purged:?}, and the snapshot is of {snapshot:?}"
    );
    let found = member.log.try_get_log_entries(..).await.unwrap();
    let from = |model: &Model| -> Vec<Entry> {
        let first = purged.map_or(0, |purged| purged.index + 1);
        model
            .entries
            .range(first..)
            .map(|(_, entry)| entry.clone())
            .collect()
    };
    let (before, after) = (from(answered), from(under_way));
    let grows = found.starts_with(&before) && after.starts_with(&found);
    either(found == before || found == after || grows, "the log");

    // As openraft starts: the snapshot, then what is known to be committed.
    let started = StorageHelper::<TypeConfig, _, _>::new(&mut member.log, &mut member.machine)
        .with_id(1)
        .get_initial_state()
        .await;
    started.unwrap_or_else(|error| panic!("{what}: {error}"));
    let (applied, _) = member.machine.applied_state().await.unwrap();
    assert!(applied >= snapshot, "{what}");
    assert!(
        applied <= under_way.committed.max(under_way.snapshot),
        "{what}: {applied:?} was never committed"
    );
    member
        .machine
        .shared()
        .read(|state| assert!(*state == state_at(applied), "{what}: another state"));

    // It goes on, and what it says now is found by the next life.
    let vote = Vote::new(9, 1);
    member.log.save_vote(&vote).await.unwrap();
    drop(member);
    let mut again = LogStore::open(&directory.join("log"), SEGMENT).unwrap();
    assert_eq!(again.read_vote().await.unwrap(), Some(vote), "{what}");
    // The start may have purged what a snapshot covers.
    let purged = again.get_log_state().await.unwrap().last_purged_log_id;
    let kept = |entry: &Entry| Some(entry.log_id) > purged;
    let expected: Vec<Entry> = found.into_iter().filter(kept).collect();
    assert_eq!(again.try_get_log_entries(..).await.unwrap(), expected, "{what}");
}

#[test]
fn a_crash_after_any_effect_of_raft_storage_loses_nothing_that_was_answered() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let source = tempfile::tempdir().unwrap();
        let root = source.path();
        journal::begin(root);
        let mut member = Member::open(root);
        let mut model = Model::default();
        // Effects at each answer, the model from then on, and the step that was answered.
        let mut answers = vec![(journal::len(root), model.clone(), "the beginning".to_owned())];
        for step in SCRIPT {
            member.take(*step, &mut model).await;
            answers.push((journal::len(root), model.clone(), format!("{step:?}")));
        }
        drop(member);
        let effects = journal::end(root);
        let mut points: BTreeMap<&str, u64> = BTreeMap::new();
        let mut crashes = 0;
        for count in 0..=effects.len() {
            let next = answers
                .iter()
                .position(|(at, ..)| *at > count)
                .unwrap_or(answers.len() - 1);
            let answered = answers.iter().rposition(|(at, ..)| *at <= count);
            let (before, after) = (answered.map(|index| &answers[index].1), &answers[next]);
            let none = Model::default();
            let kind = after.2.split([' ', '(']).next().unwrap_or_default();
            *points.entry(kind).or_default() += 1;
            let subsets = (0..4).map(|seed| Survives::Some(count as u64 * 16 + seed));
            for survives in [Survives::Nothing, Survives::Everything]
                .into_iter()
                .chain(subsets)
            {
                let left = tempfile::tempdir().unwrap();
                journal::crash(&effects[..count], root, left.path(), survives);
                let what = format!(
                    "effect {count} of {}, in {}, {survives:?}",
                    effects.len(),
                    after.2
                );
                judge(left.path(), before.unwrap_or(&none), &after.1, &what).await;
                crashes += 1;
            }
        }
        println!(
            "Raft storage: {} crash points, {crashes} crashes: {points:?}",
            effects.len() + 1
        );
        assert!(effects.len() > SCRIPT.len());
    });
}
