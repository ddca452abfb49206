//! What `node` does around an engine, in the simulated world: an incarnation, its seams, the fence, the grant.

use std::collections::BTreeSet;
use std::rc::Rc;

use weft_proto::band::EpochGrant;
use weft_proto::id::{DriveId, IncarnationId, VolumeId};

use super::directory::SimDirectory;
use super::drive::{DriveSpec, SimDrives};
use super::lease::SimLease;
use super::world::{Stopped, World};
use crate::seams::Seams;

/// A new owner, ready to run an engine.
pub struct Takeover {
    /// Its life.
    pub incarnation: IncarnationId,
    /// What it was granted.
    pub grant: EpochGrant,
    /// What its engine is given.
    pub seams: Seams,
    /// Its lease, to expire it.
    pub lease: Rc<SimLease>,
    /// The drives on which every predecessor is fenced; the others it does not reach.
    pub fenced: BTreeSet<DriveId>,
}

/// The seams of `incarnation`.
#[must_use]
pub fn seams(world: &Rc<World>, incarnation: IncarnationId) -> (Seams, Rc<SimLease>) {
    let lease = SimLease::new(world, incarnation);
    let seams = Seams {
        env: world.env(incarnation),
        drives: SimDrives::new(world, incarnation),
        lease: Rc::<SimLease>::clone(&lease),
        directory: SimDirectory::new(world, incarnation),
    };
    (seams, lease)
}

/// Adds `count` drives of `spec`, each in a failure domain of its own, numbered from 1.
pub fn add_drives(world: &Rc<World>, count: u32, spec: &DriveSpec) {
    for number in 1..=count {
        let spec = DriveSpec {
            domain: number,
            ..spec.clone()
        };
        world.add_drive(DriveId(number), spec);
    }
}

/// Makes a new incarnation the owner of `volume`: the epoch is granted, and its predecessors are fenced on every drive that
/// answers. A drive that does not stays cut off from the new owner until [`readmit`].
///
/// # Errors
/// [`Stopped`] when a ghost write was the effect to stop at.
pub fn take_over(world: &Rc<World>, volume: VolumeId) -> Result<Takeover, Stopped> {
    let incarnation = world.incarnation();
    let grant = world.begin_takeover(volume, incarnation);
    let mut fenced = BTreeSet::new();
    for drive in world.all_drives() {
        if fence_predecessors(world, volume, incarnation, drive.id())? {
            fenced.insert(drive.id());
        } else {
            drive.set_cut(incarnation, true);
        }
    }
    let (seams, lease) = seams(world, incarnation);
    Ok(Takeover {
        incarnation,
        grant,
        seams,
        lease,
        fenced,
    })
}

/// A drive came back: it is fenced before `owner` may reach it. False when it still gives no answer.
///
/// # Errors
/// [`Stopped`] when a ghost write was the effect to stop at.
pub fn readmit(
    world: &Rc<World>,
    volume: VolumeId,
    owner: IncarnationId,
    drive: DriveId,
) -> Result<bool, Stopped> {
    let fenced = fence_predecessors(world, volume, owner, drive)?;
    world.drive(drive).set_cut(owner, !fenced);
    Ok(fenced)
}

fn fence_predecessors(
    world: &Rc<World>,
    volume: VolumeId,
    owner: IncarnationId,
    drive: DriveId,
) -> Result<bool, Stopped> {
    let drive = world.drive(drive);
    let predecessors = world.superseded(volume);
    // Without a predecessor, nobody asked the drive anything: a dead one is found out by the engine.
    for victim in predecessors.into_iter().filter(|victim| *victim != owner) {
        if drive.is_fenced(victim) {
            continue;
        }
        let fence = Rc::clone(&drive).fence(victim);
        if world.block_on(owner, fence)?.is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}
