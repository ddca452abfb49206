//! The replicated cluster state: pure, deterministic, without a clock.
//!
//! [`ClusterState`] changes by [`ClusterState::apply`] alone. Equal states that apply equal commands are equal
//! again, on every voter and at every replay: nothing here reads a clock, draws a random number or iterates over
//! anything unordered.
//!
//! - [`map`]: what every agent follows; [`layout`] and [`space`]: what only voters hold;
//! - [`command`]: what can happen, what is answered and why it is refused;
//! - `nodes`, `volumes`, `ownership`, `bands`, `rebuild`: how each command is applied;
//! - [`reserve`]: the space that host writes never get;
//! - [`invariants`]: what is true after every command, each as one function.
//!
//! It proposes nothing and decides no policy: which drives a band should take is for `propose`, who should
//! own a volume for `leader`. `apply` checks what they proposed against what is true when it is committed.
//!
//! Design sections 3, 5 and 6; `docs/design/metadata-commands.md`.

pub mod command;
pub mod invariants;
pub mod layout;
pub mod map;
pub mod reserve;
pub mod space;

mod bands;
mod nodes;
mod ownership;
mod rebuild;
#[cfg(test)]
pub(crate) mod tests;
mod volumes;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{DriveId, Epoch, VolumeId};

pub use command::{Command, Refusal, Reply};
pub use map::ClusterMap;

pub(crate) use bands::BANDS_PER_GRANT_MAX;

use layout::{DriveChunks, VolumeLayout};
use map::{Cluster, Owner, Phase, Volume};

/// Everything the Raft group agrees on.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClusterState {
    /// What every agent follows.
    pub map: ClusterMap,
    /// Chunks, by drive. A removed drive has none.
    pub chunks: BTreeMap<DriveId, DriveChunks>,
    /// Bands and roots, by volume.
    pub layouts: BTreeMap<VolumeId, VolumeLayout>,
    /// The next identifiers.
    pub next: NextIds,
    /// Parts changed since they were last taken.
    #[serde(skip)]
    touched: Touched,
}

/// The next identifier of each kind. They are never reused, so they only grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NextIds {
    /// Of a node.
    pub node: u32,
    /// Of a drive.
    pub drive: u32,
    /// Of a pool.
    pub pool: u32,
    /// Of a volume.
    pub volume: u64,
    /// Of a layer.
    pub layer: u64,
    /// Of a band.
    pub band: u64,
    /// Of an incarnation.
    pub incarnation: u64,
}

impl Default for NextIds {
    fn default() -> Self {
        Self {
            node: 1,
            drive: 1,
            pool: 1,
            volume: 1,
            layer: 1,
            band: 1,
            incarnation: 1,
        }
    }
}

/// Parts of the state that a store has to write again. Not part of the state itself.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    /// The map or the next identifiers.
    pub map: bool,
    /// Chunks of these drives.
    pub drives: BTreeSet<DriveId>,
    /// Layouts of these volumes.
    pub volumes: BTreeSet<VolumeId>,
}

impl PartialEq for Touched {
    // Two states are equal whatever has been stored of them.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Touched {}

impl ClusterState {
    /// Applies one committed command. A refusal changes nothing.
    pub fn apply(&mut self, command: Command) -> Reply {
        if let Command::Batch(commands) = command {
            if commands
                .iter()
                .any(|command| matches!(command, Command::Batch(_)))
            {
                return Reply::Refused(Refusal::NestedBatch);
            }
            return Reply::Batch(
                commands
                    .into_iter()
                    .map(|command| self.apply_one(command))
                    .collect(),
            );
        }
        self.apply_one(command)
    }

    fn apply_one(&mut self, command: Command) -> Reply {
        if self.map.cluster.is_none() && !matches!(command, Command::Init { .. }) {
            return Reply::Refused(Refusal::NotInitialised);
        }
        match self.dispatch(command) {
            Ok(reply) => {
                self.note_tightness();
                reply
            }
            Err(refusal) => Reply::Refused(refusal),
        }
    }

    fn dispatch(&mut self, command: Command) -> Result<Reply, Refusal> {
        match command {
            Command::Init {
                id,
                name,
                authentication_key,
                fencing_host_id,
                fencing_key,
                settings,
            } => self.init(Cluster {
                id,
                name,
                authentication_key,
                fencing_host_id,
                fencing_key,
                settings,
            }),
            Command::SetSettings(settings) => self.set_settings(settings),
            Command::AddNode(new) => self.add_node(new),
            Command::UpdateNode { node, update } => self.update_node(node, update),
            Command::RemoveNode { node } => self.remove_node(node),
            Command::StartIncarnation { node, host_id, key } => self.start_incarnation(node, host_id, key),
            Command::MarkDead { incarnation } => self.mark_dead(incarnation),
            Command::AddDrive(new) => self.add_drive(new),
            Command::SetDriveState { drive, state } => self.set_drive_state(drive, state),
            Command::RecordRegistrations { incarnation, drives } => {
                self.record_registrations(incarnation, &drives)
            }
            Command::RecordFenced { incarnation, drives } => self.record_fenced(incarnation, &drives),
            Command::CreatePool(new) => self.create_pool(new),
            Command::CreateVolume(new) => self.create_volume(new),
            Command::ResizeVolume { volume, size_bytes } => self.resize_volume(volume, size_bytes),
            Command::DeleteVolume { volume } => self.delete_volume(volume),
            Command::FinishDelete {
                volume,
                epoch,
                unsettled,
            } => self.finish_delete(volume, epoch, unsettled.as_deref()),
            Command::AllowHost { volume, host } => self.allow_host(volume, host),
            Command::DisallowHost { volume, host } => self.disallow_host(volume, &host),
            Command::SetPresentation { volume, presentation } => self.set_presentation(volume, presentation),
            Command::GrantBands {
                volume,
                epoch,
                request,
                purpose,
                chunk_size,
                proposals,
            } => self.grant_bands(volume, epoch, request, purpose, chunk_size, &proposals),
            Command::ReturnBands { volume, epoch, bands } => self.return_bands(volume, epoch, &bands),
            Command::GrantReplacement { request, drive } => self.grant_replacement(&request, drive),
            Command::InstallReplacement {
                volume,
                epoch,
                replacement,
                settled,
            } => self.install_replacement(volume, epoch, &replacement, settled),
            Command::ReturnReplacement {
                volume,
                epoch,
                replacement,
                settled,
            } => self.return_replacement(volume, epoch, &replacement, settled),
            Command::PublishRoot { update } => self.publish_root(&update),
            Command::BeginTakeover {
                node,
                incarnation,
                volumes,
            } => self.begin_takeover(node, incarnation, &volumes),
            Command::FinishTakeover {
                update,
                recovered,
                ended_at,
            } => self.finish_takeover(&update, recovered, ended_at),
            Command::RequestMove { volume, to } => self.request_move(volume, to),
            Command::Handover {
                volume,
                epoch,
                last_stripe,
                update,
                unsettled,
                to,
            } => self.handover(volume, epoch, last_stripe, update.as_ref(), &unsettled, to),
            Command::Batch(_) => Err(Refusal::NestedBatch),
        }
    }

    /// The parts changed since the last call.
    pub fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }

    /// The volume, unless it is being deleted.
    fn volume(&self, id: VolumeId) -> Result<&Volume, Refusal> {
        self.map
            .volumes
            .get(&id)
            .filter(|volume| !matches!(volume.phase, Phase::Deleting { .. }))
            .ok_or(Refusal::NoSuchVolume(id))
    }

    /// The same, to change it. The caller says that the map changed.
    fn volume_mut(&mut self, id: VolumeId) -> Result<&mut Volume, Refusal> {
        self.map
            .volumes
            .get_mut(&id)
            .filter(|volume| !matches!(volume.phase, Phase::Deleting { .. }))
            .ok_or(Refusal::NoSuchVolume(id))
    }

    /// The one gate of every owner's command: the epoch is the volume's, and its holder is live.
    fn owner_at(&self, id: VolumeId, epoch: Epoch) -> Result<Owner, Refusal> {
        let volume = self.volume(id)?;
        let stale = Refusal::Stale {
            epoch,
            current: volume.epoch,
        };
        let owner = volume.phase.owner().ok_or(stale.clone())?;
        if planted(Bug::AcceptStaleEpoch) {
            return Ok(owner);
        }
        if volume.epoch != epoch || owner.epoch != epoch {
            return Err(stale);
        }
        if !self.map.is_live(owner.incarnation) {
            return Err(Refusal::IncarnationIsDead(owner.incarnation));
        }
        Ok(owner)
    }

    fn layout_mut(&mut self, volume: VolumeId) -> &mut VolumeLayout {
        self.touched.volumes.insert(volume);
        self.layouts.entry(volume).or_default()
    }

    fn chunks_mut(&mut self, drive: DriveId) -> Option<&mut DriveChunks> {
        self.touched.drives.insert(drive);
        self.chunks.get_mut(&drive)
    }

    /// Every change of the map ends here, so that its version counts changes.
    fn map_changed(&mut self) {
        self.map.version.0 += 1;
        self.touched.map = true;
    }
}

fn invalid(field: &str, reason: &str) -> Refusal {
    Refusal::Invalid {
        field: field.to_owned(),
        reason: reason.to_owned(),
    }
}

/// Names are for people and for metric labels: short, and without anything a terminal or a label would have to quote.
fn check_name(field: &str, name: &str) -> Result<(), Refusal> {
    let accepted = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || !name.chars().all(accepted) {
        return Err(invalid(field, "1 to 64 letters, digits, `-`, `_` or `.`"));
    }
    Ok(())
}
