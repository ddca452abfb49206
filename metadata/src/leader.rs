//! What a leader decides: who is dead, and who owns what. Pure: time comes in with each call.
//!
//! - An incarnation whose process has ended is dead at once: its session breaks, and its control port refuses.
//! - One that is silent for longer than [`SILENCE`] is dead. A new leader gives sessions as long to come, and asks every
//!   control port at once, that of the former leader among them.
//! - The volumes of the dead go to live nodes that are heard, evenly, in one batch with the declarations of death.
//! - Volumes without an owner get one: the node that they are to move to or prefer, or the one with the fewest.
//!
//! A decision is a command like any other: it is checked again when it is applied, and a wrong one costs time and never
//! data, because the dead are fenced on the drives before anybody serves in their place.
//!
//! Design section 5, "Unplanned".

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use weft_proto::id::{Epoch, IncarnationId, NodeId, VolumeId};

use crate::state::Command;
use crate::state::map::{ClusterMap, IncarnationState, NodeState, Phase, Volume};

/// An incarnation that is silent for longer is dead. Five heartbeats.
pub const SILENCE: Duration = Duration::from_millis(1000);
/// Between the heartbeats of a session.
pub const HEARTBEAT: Duration = Duration::from_millis(200);
/// Between probes of an incarnation that is missing: a process that ends may close its sessions before its listener.
const PROBE_AGAIN: Duration = Duration::from_millis(100);
/// Until a decision that has not been seen to take effect is made again.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between decisions, at most: well within what [`LeaderCore::awake`] takes for a pause.
const LOOK: Duration = Duration::from_millis(200);
const _: () = assert!(LOOK.as_millis() * 2 < SILENCE.as_millis());

/// Why an incarnation is held to be dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its session broke or never came, and its control port refuses connections: there is no process.
    Refused,
    /// Nothing was heard of it.
    Silent,
}

impl Cause {
    /// As a metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Silent => "silent",
        }
    }
}

/// What the driver shall do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decisions {
    /// Connect to these control ports, and tell [`LeaderCore::probed`].
    pub probes: Vec<(IncarnationId, String)>,
    /// Declared dead by `command`, and why.
    pub deaths: Vec<(IncarnationId, Cause)>,
    /// Propose this.
    pub command: Option<Command>,
}

/// The decisions of one leadership. A new leader begins with [`LeaderCore::default`].
#[derive(Debug, Default)]
pub struct LeaderCore {
    heard: BTreeMap<IncarnationId, Heard>,
    /// When each volume was last given to somebody, so that it is not given twice while the command is under way.
    assigned: BTreeMap<VolumeId, (Epoch, Duration)>,
    deleted: BTreeMap<VolumeId, Duration>,
    declared: BTreeMap<IncarnationId, Duration>,
    /// When this leader last ran.
    awake_at: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Heard {
    /// When this leader first knew of it: from then on it may be silent for as long as any other.
    since: Duration,
    /// Of the last heartbeat, `None` before the first.
    at: Option<Duration>,
    /// When it was last probed since its last heartbeat.
    probed_at: Option<Duration>,
    /// To be probed: its session broke.
    broken: bool,
    refused: bool,
}

impl Heard {
    fn new(since: Duration) -> Self {
        Self {
            since,
            at: None,
            probed_at: None,
            broken: false,
            refused: false,
        }
    }

    /// Whether it is to be probed.
    fn is_missing(&self) -> bool {
        self.at.is_none() || self.broken
    }

    /// When it was last known to be there.
    fn last(&self) -> Duration {
        self.at.unwrap_or(self.since)
    }
}

impl LeaderCore {
    /// This leader runs: to be called at least every [`SILENCE`] / 2, before what has happened since is told. After a longer
    /// pause it has heard nobody, which says nothing of them: everybody gets the time to be heard again.
    pub fn awake(&mut self, now: Duration) {
        let paused = self
            .awake_at
            .replace(now)
            .is_some_and(|at| now.saturating_sub(at) > SILENCE / 2);
        if paused {
            for heard in self.heard.values_mut() {
                heard.since = now;
                heard.at = heard.at.map(|_| now);
            }
        }
    }

    /// A heartbeat came. Answers whether that is news, after which there may be something to decide: the incarnation was
    /// missing until now.
    pub fn heartbeat(&mut self, now: Duration, incarnation: IncarnationId) -> bool {
        let heard = Heard {
            at: Some(now),
            ..Heard::new(now)
        };
        let before = self.heard.insert(incarnation, heard);
        before.is_none_or(|before| before.is_missing() || before.refused)
    }

    /// A session broke.
    pub fn broken(&mut self, now: Duration, incarnation: IncarnationId) {
        let heard = self.heard.entry(incarnation).or_insert(Heard::new(now));
        heard.broken = true;
        heard.probed_at = None;
    }

    /// A probe was answered: the control port refused, or not.
    pub fn probed(&mut self, now: Duration, incarnation: IncarnationId, refused: bool) {
        let heard = self.heard.entry(incarnation).or_insert(Heard::new(now));
        // A heartbeat that came after the probe was sent has the last word.
        heard.refused = refused && heard.probed_at.is_some();
    }

    /// When [`LeaderCore::decide`] is due again, just after it was asked at `now`, if by then nothing has happened: no news from
    /// an incarnation, no probe answered, no change of the map.
    #[must_use]
    pub fn due(&self, now: Duration) -> Duration {
        let silences = self.heard.values().map(|heard| heard.last() + SILENCE);
        let probes = self
            .heard
            .values()
            .filter(|heard| heard.is_missing())
            .filter_map(|heard| Some(heard.probed_at? + PROBE_AGAIN));
        let repeated = self
            .declared
            .values()
            .chain(self.deleted.values())
            .chain(self.assigned.values().map(|(_, at)| at))
            .map(|at| *at + PATIENCE);
        // What is past has been acted upon, or will not be.
        silences
            .chain(probes)
            .chain(repeated)
            .filter(|at| *at >= now)
            // The times above are to be exceeded.
            .map(|at| at + Duration::from_millis(1))
            .fold(now + LOOK, Duration::min)
    }

    /// What to do now.
    #[must_use]
    pub fn decide(&mut self, now: Duration, map: &ClusterMap) -> Decisions {
        self.heard.retain(|id, _| map.incarnations.contains_key(id));
        self.declared.retain(|id, _| map.is_live(*id));
        self.assigned.retain(|id, _| map.volumes.contains_key(id));
        self.deleted.retain(|id, _| map.volumes.contains_key(id));

        let mut decisions = Decisions::default();
        let mut alive = BTreeSet::new();
        let mut dead = BTreeSet::new();
        for incarnation in map.incarnations.values() {
            if incarnation.state == IncarnationState::Dead {
                continue;
            }
            let heard = self.heard.entry(incarnation.id).or_insert(Heard::new(now));
            let address = map
                .nodes
                .get(&incarnation.node)
                .map(|node| node.control_address.clone());
            let missing = heard.is_missing();
            let due = heard
                .probed_at
                .is_none_or(|at| now.saturating_sub(at) >= PROBE_AGAIN);
            if let (true, true, Some(address)) = (missing, due, address) {
                heard.probed_at = Some(now);
                decisions.probes.push((incarnation.id, address));
            }
            let cause = if heard.refused {
                Some(Cause::Refused)
            } else if now.saturating_sub(heard.last()) > SILENCE {
                Some(Cause::Silent)
            } else {
                None
            };
            match cause {
                Some(cause) => {
                    dead.insert(incarnation.id);
                    let declared = self.declared.get(&incarnation.id);
                    if declared.is_none_or(|at| now.saturating_sub(*at) > PATIENCE) {
                        self.declared.insert(incarnation.id, now);
                        decisions.deaths.push((incarnation.id, cause));
                    }
                }
                None if heard.at.is_some() => {
                    alive.insert(incarnation.id);
                }
                None => {}
            }
        }

        let mut commands: Vec<Command> = decisions
            .deaths
            .iter()
            .map(|(incarnation, _)| Command::MarkDead {
                incarnation: *incarnation,
            })
            .collect();
        commands.extend(self.assign(now, map, &alive, &dead));
        commands.extend(self.finish_deletions(now, map, &dead));
        decisions.command = match commands.len() {
            0 => None,
            1 => commands.pop(),
            _ => Some(Command::Batch(commands)),
        };
        decisions
    }

    /// Takeovers of all volumes without a live owner, one command for each new owner.
    fn assign(
        &mut self,
        now: Duration,
        map: &ClusterMap,
        alive: &BTreeSet<IncarnationId>,
        dead: &BTreeSet<IncarnationId>,
    ) -> Vec<Command> {
        let lives = |id: &IncarnationId| map.is_live(*id) && !dead.contains(id);
        let mut candidates: BTreeMap<NodeId, Candidate> = map
            .nodes
            .values()
            .filter(|node| node.state == NodeState::Up)
            .filter_map(|node| Some((node.id, node.incarnation?)))
            .filter(|(_, incarnation)| alive.contains(incarnation))
            .map(|(node, incarnation)| {
                let registered = map
                    .drives
                    .values()
                    .filter(|drive| drive.registrations.contains_key(&incarnation))
                    .count();
                let candidate = Candidate {
                    incarnation,
                    registered,
                    volumes: map.owned_by(incarnation).count(),
                };
                (node, candidate)
            })
            .collect();
        let mut takeovers: BTreeMap<NodeId, Vec<(VolumeId, Epoch)>> = BTreeMap::new();
        for volume in map.volumes.values() {
            let orphan = match volume.phase {
                Phase::Unowned => true,
                Phase::Recovering { owner, .. } | Phase::Serving { owner } => !lives(&owner.incarnation),
                Phase::Deleting { .. } => false,
            };
            let under_way = self
                .assigned
                .get(&volume.id)
                .is_some_and(|(epoch, at)| *epoch == volume.epoch && now.saturating_sub(*at) <= PATIENCE);
            if !orphan || under_way {
                continue;
            }
            let Some(node) = choose(volume, map, &candidates) else {
                continue;
            };
            if let Some(candidate) = candidates.get_mut(&node) {
                candidate.volumes += 1;
            }
            self.assigned.insert(volume.id, (volume.epoch, now));
            takeovers.entry(node).or_default().push((volume.id, volume.epoch));
        }
        takeovers
            .into_iter()
            .filter_map(|(node, volumes)| {
                Some(Command::BeginTakeover {
                    node,
                    incarnation: candidates.get(&node)?.incarnation,
                    volumes,
                })
            })
            .collect()
    }

    /// A dead owner cannot finish a deletion.
    fn finish_deletions(
        &mut self,
        now: Duration,
        map: &ClusterMap,
        dead: &BTreeSet<IncarnationId>,
    ) -> Vec<Command> {
        let mut commands = Vec::new();
        for volume in map.volumes.values() {
            let Phase::Deleting { owner } = volume.phase else {
                continue;
            };
            let stopped = owner
                .is_none_or(|owner| !map.is_live(owner.incarnation) || dead.contains(&owner.incarnation));
            let under_way = self
                .deleted
                .get(&volume.id)
                .is_some_and(|at| now.saturating_sub(*at) <= PATIENCE);
            if stopped && !under_way {
                self.deleted.insert(volume.id, now);
                commands.push(Command::FinishDelete {
                    volume: volume.id,
                    epoch: volume.epoch,
                    unsettled: None,
                });
            }
        }
        commands
    }
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    incarnation: IncarnationId,
    /// Drives it is registered with.
    registered: usize,
    /// It owns.
    volumes: usize,
}

/// The new owner of a volume. One that is registered with 1 + m drives can write at once and goes first.
fn choose(volume: &Volume, map: &ClusterMap, candidates: &BTreeMap<NodeId, Candidate>) -> Option<NodeId> {
    let drives = map.drives.values().filter(|drive| map.in_service(drive)).count();
    let enough = usize::from(volume.geometry.n()).min(drives);
    candidates
        .iter()
        .min_by_key(|(node, candidate)| {
            let wished = volume.move_to == Some(**node);
            let preferred = volume.phase == Phase::Unowned && volume.preferred == Some(**node);
            (
                candidate.registered < enough,
                !wished,
                !preferred,
                candidate.volumes,
                **node,
            )
        })
        .map(|(node, _)| *node)
}

#[cfg(test)]
mod tests;
