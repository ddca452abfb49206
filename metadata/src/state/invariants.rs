//! What is true of every state that commands have led to. Each invariant is one function with a name that states it;
//! violations are values, so that all of them can be printed.

use std::collections::{BTreeMap, BTreeSet};

use weft_proto::id::{BandId, DriveId};

use super::ClusterState;
use super::map::{DriveState, IncarnationState, NodeState, Phase, Registration};

/// One sentence with the numbers.
pub type Violation = String;

/// Every violation of every invariant of one state.
#[must_use]
pub fn violations(state: &ClusterState) -> Vec<Violation> {
    [
        chunks_are_allocated_once,
        space_accounting_agrees,
        columns_lie_in_distinct_failure_domains,
        names_are_unique,
        phases_agree_with_epochs,
        the_root_lies_in_a_band_of_the_volume,
        quarantine_waits_for_somebody,
        replacements_belong_to_the_owner_and_a_column,
        identifiers_are_below_the_next,
        a_node_is_up_while_its_incarnation_is_live,
        the_dead_are_on_record_somewhere,
    ]
    .into_iter()
    .flat_map(|invariant| invariant(state))
    .collect()
}

/// Every violation of every invariant between a state and a later one.
#[must_use]
pub fn violations_between(before: &ClusterState, after: &ClusterState) -> Vec<Violation> {
    [
        epochs_never_go_back,
        the_map_version_counts_changes,
        the_fenced_never_come_back,
        identifiers_are_never_reused,
    ]
    .into_iter()
    .flat_map(|invariant| invariant(before, after))
    .collect()
}

/// A chunk is held by one band, by one attempt of a rebuild or is in quarantine, never two of these, and overlaps no other.
#[must_use]
pub fn chunks_are_allocated_once(state: &ClusterState) -> Vec<Violation> {
    let mut found = Vec::new();
    // Every MiB of every drive that somebody holds.
    let mut held: BTreeMap<(DriveId, u32), String> = BTreeMap::new();
    let bands = state.layouts.values().flat_map(|layout| layout.bands.values());
    let in_bands = bands.flat_map(|record| {
        let size = record.band.chunk_size;
        let holder = format!("band {}", record.band.id);
        record
            .band
            .columns
            .iter()
            .map(move |chunk| (chunk.drive, chunk.offset_mib, size, holder.clone()))
    });
    let in_quarantine = state.chunks.iter().flat_map(|(drive, chunks)| {
        chunks
            .quarantine
            .iter()
            .map(|(offset, chunk)| (*drive, *offset, chunk.size, "quarantine".to_owned()))
    });
    let layouts = state.layouts.values();
    let in_rebuilds = layouts.flat_map(|layout| &layout.replacements).map(|granted| {
        let chunk = granted.replacement.chunk;
        let holder = format!("a rebuild of band {}", granted.replacement.band);
        (chunk.drive, chunk.offset_mib, granted.size, holder)
    });
    for (drive, offset, size, holder) in in_bands.chain(in_quarantine).chain(in_rebuilds) {
        let known = state
            .chunks
            .get(&drive)
            .is_some_and(|chunks| chunks.space.is_allocated(offset, size));
        if !known {
            found.push(format!(
                "{holder} holds {drive}+{offset} MiB, which is not allocated"
            ));
        }
        for mib in offset..offset + size.mib() {
            if let Some(other) = held.insert((drive, mib), holder.clone()) {
                found.push(format!("{drive}+{mib} MiB is held by {other} and by {holder}"));
            }
        }
    }
    found
}

/// Each allocator's total is the sum of its chunks and of what bands, rebuilds and quarantine hold.
#[must_use]
pub fn space_accounting_agrees(state: &ClusterState) -> Vec<Violation> {
    let mut held: BTreeMap<DriveId, u64> = BTreeMap::new();
    for record in state.layouts.values().flat_map(|layout| layout.bands.values()) {
        for chunk in &record.band.columns {
            *held.entry(chunk.drive).or_default() += u64::from(record.band.chunk_size.mib());
        }
    }
    for granted in state.layouts.values().flat_map(|layout| &layout.replacements) {
        *held.entry(granted.replacement.chunk.drive).or_default() += u64::from(granted.size.mib());
    }
    for (drive, chunks) in &state.chunks {
        *held.entry(*drive).or_default() += chunks.quarantined_mib();
    }
    let mut found = Vec::new();
    for (drive, chunks) in &state.chunks {
        let (counted, total) = (chunks.space.counted_mib(), chunks.space.allocated_mib());
        let held = held.get(drive).copied().unwrap_or(0);
        if counted != total || held != total {
            found.push(format!(
                "{drive} has {total} MiB allocated, {counted} in slabs, {held} in bands, rebuilds and quarantine"
            ));
        }
    }
    found
}

/// A band's columns are k + m, on distinct drives.
///
/// The rule of distinct nodes or racks holds when a band is granted; an operator may move a node to another rack later.
#[must_use]
pub fn columns_lie_in_distinct_failure_domains(state: &ClusterState) -> Vec<Violation> {
    let mut found = Vec::new();
    for record in state.layouts.values().flat_map(|layout| layout.bands.values()) {
        let band = &record.band;
        let drives: BTreeSet<DriveId> = band.columns.iter().map(|chunk| chunk.drive).collect();
        if band.columns.len() != usize::from(band.geometry.n()) || drives.len() != band.columns.len() {
            found.push(format!(
                "band {} of {} has {} columns on {} drives",
                band.id,
                band.geometry,
                band.columns.len(),
                drives.len()
            ));
        }
    }
    found
}

/// Names are unique per kind.
#[must_use]
pub fn names_are_unique(state: &ClusterState) -> Vec<Violation> {
    let map = &state.map;
    let mut seen = BTreeSet::new();
    let nodes = map.nodes.values().map(|node| ("node", node.name.as_str()));
    let drives = map
        .drives
        .values()
        .filter(|drive| drive.state != DriveState::Removed)
        .map(|drive| ("drive", drive.name.as_str()));
    let pools = map.pools.values().map(|pool| ("pool", pool.name.as_str()));
    let volumes = map.volumes.values().flat_map(|volume| {
        [
            ("volume", volume.name.as_str()),
            ("subsystem", volume.subnqn.as_str()),
        ]
    });
    nodes
        .chain(drives)
        .chain(pools)
        .chain(volumes)
        .filter(|named| !seen.insert(*named))
        .map(|(kind, name)| format!("two of kind {kind} are called {name}"))
        .collect()
}

/// The owner's epoch is the volume's, the epoch to recover and every ended one is earlier, and no band is of a later one.
#[must_use]
pub fn phases_agree_with_epochs(state: &ClusterState) -> Vec<Violation> {
    let mut found = Vec::new();
    for volume in state.map.volumes.values() {
        if let Some(owner) = volume.phase.owner()
            && owner.epoch != volume.epoch
        {
            found.push(format!(
                "{} is at {} and its owner at {}",
                volume.id, volume.epoch, owner.epoch
            ));
        }
        if let Phase::Recovering {
            recover: Some(recover),
            ..
        } = volume.phase
            && recover >= volume.epoch
        {
            found.push(format!("{} at {} recovers {recover}", volume.id, volume.epoch));
        }
        let Some(layout) = state.layouts.get(&volume.id) else {
            found.push(format!("{} has no layout", volume.id));
            continue;
        };
        if let Some((ended, _)) = layout.ended.iter().find(|(ended, _)| *ended >= volume.epoch) {
            found.push(format!(
                "{} is at {}, and {ended} has ended",
                volume.id, volume.epoch
            ));
        }
        for record in layout.bands.values() {
            if record.band.epoch > volume.epoch || record.band.volume != volume.id {
                found.push(format!(
                    "band {} does not belong to {}",
                    record.band.id, volume.id
                ));
            }
        }
    }
    let orphans = state
        .layouts
        .keys()
        .filter(|id| !state.map.volumes.contains_key(id));
    found.extend(orphans.map(|id| format!("a layout of {id}, which does not exist")));
    found
}

/// A published root is a stripe of a band that is still there.
#[must_use]
pub fn the_root_lies_in_a_band_of_the_volume(state: &ClusterState) -> Vec<Violation> {
    state
        .layouts
        .iter()
        .filter_map(|(id, layout)| Some((id, layout.root?, layout)))
        .filter(|(_, root, layout)| !layout.bands.contains_key(&root.band))
        .map(|(id, root, _)| format!("the root of {id} lies in {}, which is not there", root.band))
        .collect()
}

/// A chunk in quarantine waits for an incarnation that is neither gone nor fenced on that drive.
#[must_use]
pub fn quarantine_waits_for_somebody(state: &ClusterState) -> Vec<Violation> {
    let mut found = Vec::new();
    for (drive, chunks) in &state.chunks {
        for (offset, chunk) in &chunks.quarantine {
            if state.map.is_fenced(chunk.writer, *drive) {
                found.push(format!(
                    "{drive}+{offset} MiB waits for {}, which is fenced",
                    chunk.writer
                ));
            }
        }
    }
    found
}

/// A chunk granted to a rebuild is for a column that there is, one for each, of the volume's owner, and not of a version to come.
#[must_use]
pub fn replacements_belong_to_the_owner_and_a_column(state: &ClusterState) -> Vec<Violation> {
    let mut found = Vec::new();
    for (id, layout) in &state.layouts {
        let owner = state.map.volumes.get(id).and_then(|volume| volume.phase.owner());
        let mut columns = BTreeSet::new();
        for granted in &layout.replacements {
            let wanted = &granted.replacement;
            let fits = layout.bands.get(&wanted.band).is_some_and(|record| {
                wanted.version <= record.band.version
                    && wanted.column < record.band.geometry.n()
                    && granted.size == record.band.chunk_size
            });
            if !fits || !columns.insert((wanted.band, wanted.column)) {
                found.push(format!(
                    "{id} has a chunk for {wanted:?}, which no column waits for"
                ));
            }
            if owner.is_none_or(|owner| owner.incarnation != granted.writer) {
                found.push(format!(
                    "{} rebuilds a band of {id}, which it does not own",
                    granted.writer
                ));
            }
        }
        for record in layout.bands.values() {
            let last = record
                .replaced
                .values()
                .map(|replaced| replaced.installed.version + 1)
                .max();
            let shown = record.replaced.iter().all(|(column, replaced)| {
                record.band.columns.get(usize::from(*column)) == Some(&replaced.installed.chunk)
            });
            if !shown || last.unwrap_or(0) != record.band.version {
                found.push(format!(
                    "band {} at version {} does not show its replaced columns",
                    record.band.id, record.band.version
                ));
            }
        }
    }
    found
}

/// Identifiers in use are below the next one.
#[must_use]
pub fn identifiers_are_below_the_next(state: &ClusterState) -> Vec<Violation> {
    let (map, next) = (&state.map, &state.next);
    let bands = state.layouts.values().flat_map(|layout| layout.bands.keys());
    let largest = |found: Option<u64>| found.unwrap_or(0);
    [
        (
            "node",
            largest(map.nodes.keys().map(|id| u64::from(id.0)).max()),
            u64::from(next.node),
        ),
        (
            "drive",
            largest(map.drives.keys().map(|id| u64::from(id.0)).max()),
            u64::from(next.drive),
        ),
        (
            "pool",
            largest(map.pools.keys().map(|id| u64::from(id.0)).max()),
            u64::from(next.pool),
        ),
        (
            "volume",
            largest(map.volumes.keys().map(|id| id.0).max()),
            next.volume,
        ),
        (
            "incarnation",
            largest(map.incarnations.keys().map(|id| id.0).max()),
            next.incarnation,
        ),
        ("band", largest(bands.map(|BandId(id)| *id).max()), next.band),
    ]
    .into_iter()
    .filter(|(_, largest, next)| largest >= next)
    .map(|(kind, largest, next)| format!("{kind} {largest} exists and {next} is the next"))
    .collect()
}

/// A node is up exactly while its latest incarnation is live.
#[must_use]
pub fn a_node_is_up_while_its_incarnation_is_live(state: &ClusterState) -> Vec<Violation> {
    let mut found = Vec::new();
    for node in state.map.nodes.values() {
        let live = node.incarnation.is_some_and(|id| state.map.is_live(id));
        if live != (node.state == NodeState::Up) {
            found.push(format!(
                "{} is {:?} and its incarnation {:?}",
                node.id, node.state, node.incarnation
            ));
        }
    }
    for incarnation in state.map.incarnations.values() {
        let current = state
            .map
            .nodes
            .get(&incarnation.node)
            .and_then(|node| node.incarnation);
        if incarnation.state == IncarnationState::Live && current != Some(incarnation.id) {
            found.push(format!("{} is live and not its node's latest", incarnation.id));
        }
    }
    found
}

/// A dead incarnation is kept only while a drive has it on record as registered, and no record outlives it.
#[must_use]
pub fn the_dead_are_on_record_somewhere(state: &ClusterState) -> Vec<Violation> {
    let mut registered = BTreeSet::new();
    let mut found = Vec::new();
    for drive in state.map.drives.values() {
        for (incarnation, registration) in &drive.registrations {
            if *registration == Registration::Registered {
                registered.insert(*incarnation);
            }
            if !state.map.incarnations.contains_key(incarnation) {
                found.push(format!("{} has {incarnation} on record, which is gone", drive.id));
            }
        }
    }
    let forgotten = state.map.incarnations.values().filter(|incarnation| {
        incarnation.state == IncarnationState::Dead && !registered.contains(&incarnation.id)
    });
    found.extend(forgotten.map(|incarnation| format!("{} is fenced everywhere and kept", incarnation.id)));
    found
}

/// An epoch is never granted twice.
#[must_use]
pub fn epochs_never_go_back(before: &ClusterState, after: &ClusterState) -> Vec<Violation> {
    before
        .map
        .volumes
        .iter()
        .filter_map(|(id, before)| Some((id, before.epoch, after.map.volumes.get(id)?.epoch)))
        .filter(|(_, before, after)| after < before)
        .map(|(id, before, after)| format!("{id} went from {before} to {after}"))
        .collect()
}

/// Two maps with one version are equal.
#[must_use]
pub fn the_map_version_counts_changes(before: &ClusterState, after: &ClusterState) -> Vec<Violation> {
    let same = before.map.version == after.map.version;
    if (same && before.map != after.map) || after.map.version < before.map.version {
        vec![format!(
            "the map changed from {} to {}",
            before.map.version, after.map.version
        )]
    } else {
        Vec::new()
    }
}

/// Neither the dead nor the fenced are undone.
#[must_use]
pub fn the_fenced_never_come_back(before: &ClusterState, after: &ClusterState) -> Vec<Violation> {
    let mut found = Vec::new();
    for id in after.map.incarnations.keys() {
        let was_there = before.map.incarnations.contains_key(id);
        if !was_there && id.0 < before.next.incarnation {
            found.push(format!("{id} was gone and is back"));
        }
        if was_there && !before.map.is_live(*id) && after.map.is_live(*id) {
            found.push(format!("{id} was dead and is live"));
        }
        for drive in after.map.drives.values() {
            let fenced = before
                .map
                .drives
                .get(&drive.id)
                .is_some_and(|drive| drive.registrations.get(id) == Some(&Registration::Fenced));
            if fenced && drive.registrations.get(id) == Some(&Registration::Registered) {
                found.push(format!("{id} was fenced on {} and is registered", drive.id));
            }
        }
    }
    found
}

/// The next identifiers only grow.
#[must_use]
pub fn identifiers_are_never_reused(before: &ClusterState, after: &ClusterState) -> Vec<Violation> {
    let (old, new) = (&before.next, &after.next);
    let grew = new.node >= old.node
        && new.drive >= old.drive
        && new.pool >= old.pool
        && new.volume >= old.volume
        && new.layer >= old.layer
        && new.band >= old.band
        && new.incarnation >= old.incarnation;
    if grew {
        Vec::new()
    } else {
        vec![format!("identifiers went back: {old:?} to {new:?}")]
    }
}
