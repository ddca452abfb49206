//! What can happen to the cluster: one enum of commands, one of replies, one of refusals.
//!
//! A command carries every identity and random number it needs; identifiers that count are assigned when it is
//! applied. Each is safe to repeat with the same content: where the first attempt has done its work, the answer is
//! the same again (a lost answer is the normal case, not the exception).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use weft_proto::band::{Band, ChunkAddress, ChunkSize, Geometry, Replacement, RootUpdate};
use weft_proto::id::{
    BandId, ClusterId, DriveId, DriveUuid, Epoch, HostId, IncarnationId, NodeId, PoolId, StripeNumber,
    VolumeId,
};
use weft_proto::nqn::Nqn;

use super::map::{DomainLevel, DriveClass, DriveHome, DriveState, Presentation, Settings};

/// Everything that changes the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Names the cluster. Once.
    Init {
        /// Drawn by the proposer.
        id: ClusterId,
        /// For people.
        name: String,
        /// Drawn by the proposer.
        authentication_key: [u8; 32],
        /// Of the cluster's own registration; drawn by the proposer.
        fencing_host_id: HostId,
        /// Of the cluster's own registration, never 0; drawn by the proposer.
        fencing_key: u64,
        /// As asked.
        settings: Settings,
    },
    /// Changes the settings.
    SetSettings(Settings),
    /// Adds a server. Replies [`Reply::Node`].
    AddNode(NewNode),
    /// Changes a server's addresses or rack.
    UpdateNode {
        /// Which.
        node: NodeId,
        /// Name, rack and addresses as they shall be.
        update: NewNode,
    },
    /// Forgets a server. Refused while it has drives in use or owns volumes.
    RemoveNode {
        /// Which.
        node: NodeId,
    },
    /// A new life of an agent; the node's previous one is dead. Replies [`Reply::Incarnation`].
    StartIncarnation {
        /// Where.
        node: NodeId,
        /// Drawn by the agent.
        host_id: HostId,
        /// Drawn by the agent, never 0.
        key: u64,
    },
    /// Declares an incarnation dead.
    MarkDead {
        /// Which.
        incarnation: IncarnationId,
    },
    /// Adds a drive. Replies [`Reply::Drive`].
    AddDrive(NewDrive),
    /// Changes whether a drive serves.
    SetDriveState {
        /// Which.
        drive: DriveId,
        /// As it shall be.
        state: DriveState,
    },
    /// `incarnation` has registered with these drives.
    RecordRegistrations {
        /// Who.
        incarnation: IncarnationId,
        /// Where.
        drives: BTreeSet<DriveId>,
    },
    /// `incarnation` has been preempted on these drives, and nothing of it is in execution there.
    RecordFenced {
        /// Who.
        incarnation: IncarnationId,
        /// Where.
        drives: BTreeSet<DriveId>,
    },
    /// Adds a pool. Replies [`Reply::Pool`].
    CreatePool(NewPool),
    /// Adds a volume. Replies [`Reply::Volume`].
    CreateVolume(NewVolume),
    /// Makes a volume larger.
    ResizeVolume {
        /// Which.
        volume: VolumeId,
        /// Not below the present size.
        size_bytes: u64,
    },
    /// Begins to delete a volume; ends it too where nobody can be writing.
    DeleteVolume {
        /// Which.
        volume: VolumeId,
    },
    /// Ends the deletion: the owner has stopped, or it is dead.
    FinishDelete {
        /// Which.
        volume: VolumeId,
        /// The last epoch.
        epoch: Epoch,
        /// From an owner that has stopped: the chunks that a write of it may still reach. All others of its epoch are
        /// settled. `None` from anybody who cannot know: then every chunk waits for the fencing of whoever wrote it.
        #[serde(default)]
        unsettled: Option<Vec<ChunkAddress>>,
    },
    /// Serves a host.
    AllowHost {
        /// Which volume.
        volume: VolumeId,
        /// The host's NQN.
        host: Nqn,
    },
    /// No longer serves a host.
    DisallowHost {
        /// Which volume.
        volume: VolumeId,
        /// The host's NQN.
        host: Nqn,
    },
    /// Says which nodes present a volume.
    SetPresentation {
        /// Which.
        volume: VolumeId,
        /// As it shall be.
        presentation: Presentation,
    },
    /// Grants bands where placement proposes. Replies [`Reply::Bands`].
    GrantBands {
        /// To whom.
        volume: VolumeId,
        /// The owner's.
        epoch: Epoch,
        /// Drawn by the owner: the same request is answered with the same bands.
        request: u64,
        /// Host writes leave the pool's reserve alone.
        purpose: Purpose,
        /// Of all chunks.
        chunk_size: ChunkSize,
        /// One band each.
        proposals: Vec<BandProposal>,
    },
    /// Gives back bands that were never written.
    ReturnBands {
        /// Whose.
        volume: VolumeId,
        /// The owner's.
        epoch: Epoch,
        /// Which.
        bands: Vec<BandId>,
    },
    /// Grants a fresh chunk for an attempt to rebuild one column of a band. Replies [`Reply::Replacement`]. An earlier attempt's
    /// chunk for the same column is given up.
    GrantReplacement {
        /// For which column.
        request: ReplacementRequest,
        /// Where placement proposes the chunk.
        drive: DriveId,
    },
    /// Puts a rebuilt chunk in its column's place, by compare-and-swap on the band's version. Replies [`Reply::Band`].
    InstallReplacement {
        /// Whose band.
        volume: VolumeId,
        /// The owner's.
        epoch: Epoch,
        /// As granted. Every write that was sent to its chunk has completed, durably, and no other will be sent.
        replacement: Replacement,
        /// Whether every write that this owner sent to the chunk that is replaced has completed too.
        settled: bool,
    },
    /// Gives back the chunk of an attempt that ended without an installation.
    ReturnReplacement {
        /// Whose band.
        volume: VolumeId,
        /// The owner's.
        epoch: Epoch,
        /// As granted.
        replacement: Replacement,
        /// Whether every write that was sent to it has completed; otherwise it waits for the writer's fence.
        settled: bool,
    },
    /// Records a checkpoint and frees bands. Replies [`Reply::Root`].
    PublishRoot {
        /// The checkpoint.
        update: RootUpdate,
    },
    /// Gives volumes of a dead owner, or of nobody, to a live incarnation. Replies [`Reply::Takeovers`].
    BeginTakeover {
        /// To.
        node: NodeId,
        /// To.
        incarnation: IncarnationId,
        /// Each with the epoch that it is expected to be at.
        volumes: Vec<(VolumeId, Epoch)>,
    },
    /// Ends the recovered epoch and makes the new one serve. Replies [`Reply::Root`].
    FinishTakeover {
        /// The recovered root, under the new epoch.
        update: RootUpdate,
        /// As the grant said.
        recovered: Option<Epoch>,
        /// Nothing of it above this stripe is ever valid again.
        ended_at: StripeNumber,
    },
    /// An operator's wish; the owner sees it in the map and hands over. `None` withdraws it.
    RequestMove {
        /// Which.
        volume: VolumeId,
        /// The new owner.
        to: Option<NodeId>,
    },
    /// The owner ends its epoch and gives the next one to `to`. Replies [`Reply::Epoch`].
    Handover {
        /// Which.
        volume: VolumeId,
        /// The owner's, which ends.
        epoch: Epoch,
        /// Its last stripe, up to which everything is complete.
        last_stripe: StripeNumber,
        /// A last checkpoint, where the published one does not cover everything.
        update: Option<RootUpdate>,
        /// The chunks that a write of this owner may still reach. All others of its epoch are settled.
        unsettled: Vec<ChunkAddress>,
        /// The new owner.
        to: NodeId,
    },
    /// Several commands, applied in order, each on its own: one that is refused does not stop the next.
    /// Replies [`Reply::Batch`].
    Batch(Vec<Command>),
}

/// A server as the operator names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewNode {
    /// Unique in the cluster.
    pub name: String,
    /// Failure domain above the node.
    pub rack: Option<String>,
    /// Where its agent serves gRPC, `host:port`.
    pub control_address: String,
    /// Where its agent serves NVMe/TCP, `host:port`.
    pub nvme_address: String,
}

/// A drive as its label describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDrive {
    /// The label's.
    pub uuid: DriveUuid,
    /// Unique in the cluster.
    pub name: String,
    /// Who serves it.
    pub home: DriveHome,
    /// Its class.
    pub class: DriveClass,
    /// Where the chunk area begins, in MiB; at least 1.
    pub start_mib: u32,
    /// Where it ends, exclusive.
    pub end_mib: u32,
    /// Registrants the drive takes, the cluster's own included.
    pub registrants_max: u32,
}

/// A pool as the operator asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewPool {
    /// Unique in the cluster.
    pub name: String,
    /// For volumes that ask for none.
    pub geometry: Geometry,
    /// What the chunks of a band must not share.
    pub domain: DomainLevel,
    /// At least one.
    pub classes: BTreeSet<DriveClass>,
}

/// A volume as the operator asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewVolume {
    /// Unique in the cluster.
    pub name: String,
    /// Where its bands lie.
    pub pool: PoolId,
    /// Whole 4096-byte blocks, at least one.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub block_bytes: u32,
    /// `None` takes the pool's.
    pub geometry: Option<Geometry>,
    /// Drawn by the proposer.
    pub uuid: [u8; 16],
    /// The subsystem that presents it.
    pub subnqn: Nqn,
    /// Hosts to serve.
    pub allowed_hosts: BTreeSet<Nqn>,
    /// Nodes that present it.
    pub presentation: Presentation,
    /// The owner of choice.
    pub preferred: Option<NodeId>,
}

/// Where one band should lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BandProposal {
    /// May have a smaller k than the volume's, never a smaller m.
    pub geometry: Geometry,
    /// By column, k + m of them in distinct failure domains.
    pub drives: Vec<DriveId>,
}

/// What a band is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Host writes: leave the pool's reserve.
    User,
    /// Compaction, takeover, checkpoints and TRIM records: may use it.
    Internal,
}

/// The column for which an owner asks for a fresh chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplacementRequest {
    /// Whose band.
    pub volume: VolumeId,
    /// The owner's.
    pub epoch: Epoch,
    /// Drawn by the owner: the same request is answered with the same chunk. Seeds the choice too.
    pub request: u64,
    /// Which band.
    pub band: BandId,
    /// Which column of it.
    pub column: u8,
    /// The version of the band that the owner knows.
    pub version: u64,
}

/// What a command answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Applied,
    /// The state was already so.
    Unchanged,
    /// To [`Command::AddNode`].
    Node(NodeId),
    /// To [`Command::StartIncarnation`].
    Incarnation(IncarnationId),
    /// To [`Command::AddDrive`].
    Drive(DriveId),
    /// To [`Command::CreatePool`].
    Pool(PoolId),
    /// To [`Command::CreateVolume`].
    Volume(VolumeId),
    /// To [`Command::GrantBands`].
    Bands(Vec<Band>),
    /// To [`Command::GrantReplacement`].
    Replacement(Replacement),
    /// To [`Command::InstallReplacement`]: the band as it is now.
    Band(Band),
    /// To [`Command::PublishRoot`] and [`Command::FinishTakeover`].
    Root {
        /// Of the root that was recorded.
        version: u64,
    },
    /// To [`Command::BeginTakeover`], in the order asked.
    Takeovers(Vec<(VolumeId, Result<Epoch, Refusal>)>),
    /// To [`Command::Handover`]: the new owner's.
    Epoch(Epoch),
    /// To [`Command::Batch`], in order.
    Batch(Vec<Reply>),
    /// A valid proposal that the state rejects. Nothing was changed.
    Refused(Refusal),
}

impl Reply {
    /// The refusal as an error.
    ///
    /// # Errors
    /// [`Refusal`] if this is one.
    pub fn accepted(self) -> Result<Self, Refusal> {
        match self {
            Self::Refused(refusal) => Err(refusal),
            reply => Ok(reply),
        }
    }
}

/// Why the state rejects a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// `Init` came a second time with another identity.
    #[error("the cluster has been initialised as {0}")]
    AlreadyInitialised(ClusterId),
    /// Nothing works before `Init`.
    #[error("the cluster has not been initialised")]
    NotInitialised,
    /// A value that no state would take.
    #[error("invalid {field}: {reason}")]
    Invalid {
        /// Which field.
        field: String,
        /// What would be accepted.
        reason: String,
    },
    /// Names are unique per kind.
    #[error("the name `{0}` is taken")]
    NameTaken(String),
    /// A label that is already part of the cluster.
    #[error("drive {uuid} is already part of the cluster as {drive}")]
    DriveKnown {
        /// The label.
        uuid: DriveUuid,
        /// Its id.
        drive: DriveId,
    },
    /// Unknown node.
    #[error("no such node: {0}")]
    NoSuchNode(NodeId),
    /// Unknown drive.
    #[error("no such drive: {0}")]
    NoSuchDrive(DriveId),
    /// Unknown pool.
    #[error("no such pool: {0}")]
    NoSuchPool(PoolId),
    /// Unknown volume, or one that is being deleted.
    #[error("no such volume: {0}")]
    NoSuchVolume(VolumeId),
    /// Unknown incarnation: it never was, or it is gone.
    #[error("no such incarnation: {0}")]
    NoSuchIncarnation(IncarnationId),
    /// A dead incarnation does nothing any more; its process must start a new one.
    #[error("incarnation {0} is dead")]
    IncarnationIsDead(IncarnationId),
    /// The node has no live incarnation.
    #[error("node {0} is down")]
    NodeIsDown(NodeId),
    /// The node still has drives that hold chunks, or owns volumes.
    #[error("node {node} still has {drives} drives in use and {volumes} volumes")]
    NodeInUse {
        /// Which.
        node: NodeId,
        /// Drives that are not removed.
        drives: u32,
        /// Volumes it owns.
        volumes: u32,
    },
    /// The drive holds chunks.
    #[error("drive {drive} still holds {allocated_mib} MiB of chunks")]
    DriveInUse {
        /// Which.
        drive: DriveId,
        /// In use or in quarantine.
        allocated_mib: u64,
    },
    /// A removed drive does not come back.
    #[error("drive {0} has been removed")]
    DriveIsRemoved(DriveId),
    /// An incarnation registers once per drive; it was fenced there.
    #[error("incarnation {incarnation} has been fenced on drive {drive}")]
    Fenced {
        /// Who.
        incarnation: IncarnationId,
        /// Where.
        drive: DriveId,
    },
    /// The drive takes no more registrants.
    #[error("drive {drive} takes {max} registrants and has no room")]
    TooManyRegistrants {
        /// Which.
        drive: DriveId,
        /// Its limit.
        max: u32,
    },
    /// The command is of an owner that has been replaced.
    #[error("epoch {epoch} is stale, the volume is at {current}")]
    Stale {
        /// The caller's.
        epoch: Epoch,
        /// The volume's.
        current: Epoch,
    },
    /// The command does not fit the volume's phase.
    #[error("volume {0} is not in the phase that this needs")]
    WrongPhase(VolumeId),
    /// A takeover from an owner that is not known to be dead.
    #[error("volume {volume} is owned by incarnation {incarnation}, which is live")]
    OwnerIsLive {
        /// Which.
        volume: VolumeId,
        /// The owner.
        incarnation: IncarnationId,
    },
    /// The recovered epoch's owner is not on record as fenced on enough drives of this band.
    #[error("the former owner is fenced on {fenced} drives of band {band}, {needed} needed")]
    NotFenced {
        /// A band of the recovered epoch.
        band: BandId,
        /// Drives it is fenced on.
        fenced: u32,
        /// n − m.
        needed: u32,
    },
    /// The root is not the one that was expected.
    #[error("root version {expected} expected, {current} found")]
    RootConflict {
        /// The caller's.
        expected: u64,
        /// The volume's.
        current: u64,
    },
    /// A band that this volume does not have, or that this command does not apply to.
    #[error("band {0} is not the volume's to use in this way")]
    NoSuchBand(BandId),
    /// The band is not at the version that was expected: a column of it was replaced in the meantime.
    #[error("version {expected} of band {band} expected, {current} found")]
    BandConflict {
        /// Which.
        band: BandId,
        /// The caller's.
        expected: u64,
        /// The band's.
        current: u64,
    },
    /// A band without this column.
    #[error("band {band} has no column {column}")]
    NoSuchColumn {
        /// Which.
        band: BandId,
        /// Asked for.
        column: u8,
    },
    /// The chunk of an attempt that was given up: the next one takes a fresh chunk.
    #[error("the attempt to rebuild column {column} of band {band} was given up")]
    NoSuchReplacement {
        /// Which.
        band: BandId,
        /// Its column.
        column: u8,
    },
    /// No space for the purpose asked.
    #[error(
        "no space left in the pool: its bands reach {free_mib} MiB of what is free, {reserve_mib} MiB are reserved"
    )]
    NoSpace {
        /// On drives in service, as far as bands of the pool's width reach it.
        free_mib: u64,
        /// Kept for rebuild, compaction and takeover.
        reserve_mib: u64,
    },
    /// Wider bands will be possible as soon as the owner has registered on more drives, and it asked not to get narrower ones.
    #[error(
        "bands of {width} data columns only: the owner has not registered on the drives for {possible} yet"
    )]
    AwaitsRegistration {
        /// k on the drives where it is registered; 0 for none.
        width: u8,
        /// k on all drives in service.
        possible: u8,
    },
    /// The pool has not enough failure domains for the geometry.
    #[error("{available} failure domains available, {needed} needed{}", suggestion(*fits))]
    TooFewDomains {
        /// With drives in service.
        available: u32,
        /// By the geometry.
        needed: u32,
        /// The widest geometry with the same m that would fit.
        fits: Option<Geometry>,
    },
    /// A proposal that the state cannot take as it is now: propose again from the present state.
    #[error("drive {drive} cannot take the chunk that was proposed for it")]
    ProposalConflict {
        /// The first drive that is not usable.
        drive: DriveId,
    },
    /// More than the settings allow, or than a volume of this geometry can keep account of.
    #[error("{size_bytes} bytes are more than the largest {geometry} volume, {max_bytes}")]
    VolumeTooLarge {
        /// The volume's; wider ones may be larger.
        geometry: Geometry,
        /// Asked for.
        size_bytes: u64,
        /// Allowed.
        max_bytes: u64,
    },
    /// Volumes only grow.
    #[error("volumes do not shrink: {size_bytes} bytes asked for, {current_bytes} in use")]
    WouldShrink {
        /// Asked for.
        size_bytes: u64,
        /// As it is.
        current_bytes: u64,
    },
    /// A batch within a batch.
    #[error("a batch cannot hold another")]
    NestedBatch,
}

fn suggestion(fits: Option<Geometry>) -> String {
    fits.map_or_else(String::new, |geometry| format!("; {geometry} would fit"))
}
