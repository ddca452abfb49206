//! The leader's duties: [`LeaderCore`] decides, this does. It runs on every member and rests on all but the leader.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft::{BasicNode, ChangeMembers, ReadPolicy};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use weft_proto::id::{IncarnationId, NodeId};

use super::{RaftGroup, voters_among};
use crate::leader::{Decisions, LeaderCore};
use crate::metrics;
use crate::raft::Proposal;
use crate::state::map::{ClusterMap, NodeState};
use crate::state::{Command, Reply};
use crate::store::Shared;

/// Until a leader that could not be confirmed looks again.
const UNCONFIRMED: Duration = Duration::from_millis(50);
/// Between looks of a member that does not lead. It is told when it does: this is for the case that it is not.
const FOLLOWER_LOOK: Duration = Duration::from_secs(1);
/// Between steps of a membership that is not yet as wanted.
const MEMBERSHIP_STEP: Duration = Duration::from_millis(50);
/// Between looks at the membership.
const MEMBERSHIP_TICK: Duration = Duration::from_millis(300);
/// Until a probed control port counts as one that does not refuse.
const PROBE: Duration = Duration::from_millis(500);

/// What sessions and probes tell.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// A heartbeat of a session.
    Heartbeat(IncarnationId),
    /// A session broke.
    Broken(IncarnationId),
    /// A probe was answered.
    Probed(IncarnationId, bool),
}

/// Whether this member has the duties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leadership {
    /// It leads in this term, and has applied everything that was committed before it.
    Confirmed(u64),
    /// It leads as far as it knows, and not all of the above was shown.
    Unconfirmed,
    /// Somebody else leads, or nobody.
    Elsewhere,
}

/// What the duties need.
#[derive(Clone, Debug)]
pub(super) struct Driver {
    pub(super) raft: RaftGroup,
    pub(super) shared: Arc<Shared>,
    pub(super) events: mpsc::UnboundedSender<Event>,
}

impl Driver {
    /// Decides who is dead and who owns what, for as long as the service lives: when something has happened that a decision
    /// may depend on, and when [`LeaderCore::due`] says so. A heartbeat of an incarnation that is there is no reason.
    pub(super) async fn run(self, mut events: mpsc::UnboundedReceiver<Event>) {
        let started = Instant::now();
        let mut maps = self.shared.watch_map();
        let mut leadership = self.raft.server_metrics();
        let mut leader = None;
        let mut leading: Option<(u64, LeaderCore)> = None;
        let (finished, mut proposals) = mpsc::unbounded_channel::<()>();
        let mut under_way = false;
        let mut due = started;
        loop {
            let mut news = true;
            let mut received = Vec::new();
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                event = events.recv() => match event {
                    Some(event) => {
                        news = false;
                        received.push(event);
                    }
                    None => return,
                },
                _ = proposals.recv() => under_way = false,
                changed = maps.changed() => if changed.is_err() { return },
                changed = leadership.changed() => match changed {
                    Ok(()) => self.tell_leader(&mut leader),
                    Err(_) => return,
                },
            }
            while let Ok(event) = events.try_recv() {
                received.push(event);
            }
            let now = started.elapsed();
            if let Some((_, core)) = &mut leading {
                core.awake(now);
                for event in received {
                    news |= match event {
                        Event::Heartbeat(incarnation) => core.heartbeat(now, incarnation),
                        Event::Broken(incarnation) => {
                            core.broken(now, incarnation);
                            true
                        }
                        Event::Probed(incarnation, refused) => {
                            core.probed(now, incarnation, refused);
                            true
                        }
                    };
                }
            }
            if !news {
                continue;
            }
            match (self.leadership().await, &leading) {
                (Leadership::Confirmed(term), Some((known, _))) if *known == term => {}
                (Leadership::Confirmed(term), _) => leading = Some((term, LeaderCore::default())),
                (Leadership::Unconfirmed, _) => {
                    // What was heard stays true: nobody else leads in between if the term turns out to be the same.
                    due = Instant::now() + UNCONFIRMED;
                    continue;
                }
                (Leadership::Elsewhere, _) => {
                    leading = None;
                    due = Instant::now() + FOLLOWER_LOOK;
                }
            }
            let Some((_, core)) = &mut leading else {
                continue;
            };
            let now = started.elapsed();
            core.awake(now);
            if under_way {
                // Only so that the core is awake: the end of the proposal is waited for above.
                due = started + core.due(now);
                continue;
            }
            let Decisions {
                probes,
                deaths,
                command,
            } = self.shared.read(|state| core.decide(now, &state.map));
            due = started + core.due(now);
            for (incarnation, address) in probes {
                tokio::spawn(probe(incarnation, address, self.events.clone()));
            }
            for (incarnation, cause) in deaths {
                tracing::info!(%incarnation, cause = cause.label(), "incarnation declared dead");
                metrics::declared_dead(cause.label());
            }
            if let Some(command) = command {
                under_way = true;
                let (driver, finished) = (self.clone(), finished.clone());
                tokio::spawn(async move {
                    driver.propose(command).await;
                    let _ = finished.send(());
                });
            }
        }
    }

    /// Logs who leads, if that is another one than `known`.
    fn tell_leader(&self, known: &mut Option<u64>) {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        if std::mem::replace(known, metrics.current_leader) == metrics.current_leader {
            return;
        }
        let term = metrics.vote.leader_id().term;
        match metrics.current_leader {
            Some(node) => tracing::info!(node, term, "leads the metadata service"),
            None => tracing::warn!(term, "nobody is known to lead the metadata service"),
        }
    }

    async fn leadership(&self) -> Leadership {
        let (term, leads) = {
            // Not `metrics()`, which is published after what the duties wait for.
            let metrics = self.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            (
                metrics.vote.leader_id().term,
                metrics.current_leader == Some(metrics.id),
            )
        };
        metrics::raft(term, leads);
        if !leads {
            return Leadership::Elsewhere;
        }
        // By lease: it asks nobody, and waits until this member has applied what it must know.
        let read = self.raft.ensure_linearizable(ReadPolicy::LeaseRead);
        match tokio::time::timeout(PROBE, read).await {
            Ok(Ok(_)) => Leadership::Confirmed(term),
            Ok(Err(_)) | Err(_) => Leadership::Unconfirmed,
        }
    }

    async fn propose(&self, command: Command) {
        match self.raft.client_write(Proposal(command)).await {
            Ok(response) => log_reply(&response.data),
            // Another leader decides anew.
            Err(error) => tracing::debug!(%error, "decision of the leader not committed"),
        }
    }

    /// Brings the membership to the number of voters that the settings ask for.
    pub(super) async fn run_membership(self) {
        let mut ticks = tokio::time::interval(MEMBERSHIP_TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // A group that has just formed hangs on its first member: one step follows the other at once.
        let mut go_on = false;
        loop {
            if go_on {
                tokio::time::sleep(MEMBERSHIP_STEP).await;
            } else {
                ticks.tick().await;
            }
            go_on = false;
            if !matches!(self.leadership().await, Leadership::Confirmed(_)) {
                continue;
            }
            let members = {
                let metrics = self.raft.metrics().borrow_watched().clone();
                let membership = metrics.membership_config.membership().clone();
                Members {
                    this: metrics.id,
                    voters: membership.voter_ids().collect(),
                    learners: membership.learner_ids().collect(),
                    stable: membership.get_joint_config().len() == 1,
                }
            };
            let change = self.shared.read(|state| next_change(&state.map, &members));
            let changed = match change {
                None => continue,
                Some(Change::AddLearner(node, address)) => {
                    tracing::info!(node, %address, "member joins the Raft group");
                    // Blocking would hold up every other duty while the member catches up.
                    let node_at = BasicNode { addr: address };
                    self.raft.add_learner(node, node_at, false).await.map(drop)
                }
                Some(Change::Voters(voters)) => {
                    tracing::info!(?voters, "voters of the Raft group change");
                    let change = ChangeMembers::ReplaceAllVoters(voters);
                    self.raft.change_membership(change, true).await.map(drop)
                }
                Some(Change::Remove(node)) => {
                    tracing::info!(node, "member leaves the Raft group");
                    let change = ChangeMembers::RemoveNodes(BTreeSet::from([node]));
                    self.raft.change_membership(change, false).await.map(drop)
                }
            };
            match changed {
                Ok(()) => go_on = true,
                Err(error) => tracing::debug!(%error, "membership not changed"),
            }
        }
    }
}

fn log_reply(reply: &Reply) {
    match reply {
        Reply::Batch(replies) => replies.iter().for_each(log_reply),
        Reply::Takeovers(answers) => {
            let granted = answers.iter().filter(|(_, answer)| answer.is_ok()).count();
            metrics::takeovers(granted as u64);
            for (volume, answer) in answers {
                match answer {
                    Ok(epoch) => tracing::info!(%volume, %epoch, "epoch granted"),
                    Err(refusal) => tracing::debug!(%volume, %refusal, "epoch not granted"),
                }
            }
        }
        Reply::Refused(refusal) => tracing::debug!(%refusal, "decision of the leader refused"),
        _ => {}
    }
}

/// Whether anybody listens there. Only a refusal proves that there is no process; silence proves nothing.
async fn probe(incarnation: IncarnationId, address: String, events: mpsc::UnboundedSender<Event>) {
    let refused = match tokio::time::timeout(PROBE, TcpStream::connect(&address)).await {
        Ok(Err(error)) => error.kind() == io::ErrorKind::ConnectionRefused,
        Ok(Ok(_)) | Err(_) => false,
    };
    let _ = events.send(Event::Probed(incarnation, refused));
}

/// The membership as it is.
#[derive(Clone, Debug)]
struct Members {
    this: u64,
    voters: BTreeSet<u64>,
    learners: BTreeSet<u64>,
    /// No change is under way.
    stable: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    AddLearner(u64, String),
    Voters(BTreeSet<u64>),
    Remove(u64),
}

/// The next step towards the wanted number of voters. Only odd numbers vote: a second voter of two would only add a
/// way to fail. Members come as learners first, so that no vote depends on one that has nothing yet.
fn next_change(map: &ClusterMap, members: &Members) -> Option<Change> {
    let target = usize::from(map.cluster.as_ref()?.settings.voters);
    if !members.stable {
        return None;
    }
    let id = |node: &NodeId| u64::from(node.0);
    let known: BTreeMap<u64, &str> = map
        .nodes
        .iter()
        .map(|(node, found)| (id(node), found.control_address.as_str()))
        .collect();
    let mut all = members.voters.iter().chain(&members.learners);
    if let Some(gone) = all.find(|member| !known.contains_key(member)) {
        // A leader that has been removed hands over before it goes.
        return (*gone != members.this).then_some(Change::Remove(*gone));
    }
    let up: Vec<u64> = map
        .nodes
        .values()
        .filter(|node| node.state == NodeState::Up)
        .map(|node| id(&node.id))
        .filter(|node| !members.voters.contains(node))
        .collect();
    let reachable = members.voters.len() + up.len();
    let wanted = voters_among(target, reachable)?;
    if members.voters.len() >= wanted {
        return None;
    }
    let joining: Vec<u64> = up.into_iter().take(wanted - members.voters.len()).collect();
    if let Some(first) = joining.iter().find(|node| !members.learners.contains(node)) {
        return Some(Change::AddLearner(*first, (*known.get(first)?).to_owned()));
    }
    Some(Change::Voters(
        members.voters.iter().copied().chain(joining).collect(),
    ))
}
