//! Proposals: bands onto drives, and a fresh drive for one column.

use std::collections::BTreeMap;

use weft_proto::band::Geometry;
use weft_proto::id::DriveId;

use crate::request::{Placement, Refusal, Request, WouldFit};
use crate::spread::{choose, mix, place};
use crate::survivable::Survivable;
use crate::topology::{Domain, DomainLevel, Drive, Home, Topology};

/// Proposes up to `request.count` bands; fewer when space ends within the batch, in which case the answer holds as
/// many as fit: for domains of nodes or racks, that is as many as fit in any way.
///
/// Where fewer than k + m domains have space, k shrinks, down to `request.k_min`; m and the distance of shards never do.
///
/// # Errors
/// [`Refusal`] when not one band fits.
pub fn propose(topology: &Topology, request: &Request) -> Result<Vec<Placement>, Refusal> {
    let wanted = request.count as usize;
    let mut placements = Batch::new(topology, request, Penalties::Heeded).place();
    if placements.len() < wanted {
        // To spare a penalised drive may cost bands: rather use it.
        let without = Batch::new(topology, request, Penalties::Ignored).place();
        if without.len() > placements.len() {
            placements = without;
        }
    }
    if placements.is_empty() && wanted > 0 {
        return Err(refusal(topology, request));
    }
    Ok(placements)
}

/// Proposes a drive for one column of a band whose other columns lie on `others`: nothing else moves. Another drive in
/// the domain of the lost one will do, so the lost drive itself belongs in `request.excluded`. The request's count
/// is of no account; its geometry is the band's.
///
/// # Errors
/// [`Refusal`] when no drive is left in a domain of its own.
pub fn propose_replacement(
    topology: &Topology,
    request: &Request,
    others: &[DriveId],
) -> Result<DriveId, Refusal> {
    let others: Vec<&Drive> = others.iter().filter_map(|&id| topology.drive(id)).collect();
    let level = request.policy.level;
    for penalties in [Penalties::Heeded, Penalties::Ignored] {
        let mut batch = Batch::new(topology, request, penalties);
        for group in &mut batch.groups {
            if others.iter().any(|other| other.domain(level) == group.domain) {
                group.slots.clear();
            }
        }
        let chosen = match level {
            DomainLevel::Drive => {
                let mut on_home: BTreeMap<&Home, u32> = BTreeMap::new();
                for other in &others {
                    *on_home.entry(&other.home).or_default() += 1;
                }
                batch.evenly(1, on_home)
            }
            DomainLevel::Node | DomainLevel::Rack => batch.by_weight(1, 0),
        };
        if let Some(&(group, slot)) = chosen.as_deref().and_then(|chosen| chosen.first()) {
            return Ok(batch.groups[group].slots[slot].drive.id);
        }
    }
    let whole = Request {
        k_min: request.geometry.k,
        ..request.clone()
    };
    Err(refusal(topology, &whole))
}

/// Whether penalties make free space count for less.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Penalties {
    Heeded,
    Ignored,
}

/// The drives that may be used, and what the bands placed so far left of them.
struct Batch<'a> {
    request: &'a Request,
    /// Where the places of the batch's bands begin. Seeds may be small numbers in a row; this is none.
    origin: u64,
    /// By domain, in an order that the seed shuffles, so that neighbours on the ruler change from batch to batch.
    groups: Vec<Group<'a>>,
}

/// A failure domain.
struct Group<'a> {
    domain: Domain,
    /// The same for equal domains whatever else there is, so that a new domain leaves the order of the others.
    key: u64,
    /// Bands of this batch that it holds a shard of.
    uses: u64,
    /// By drive id.
    slots: Vec<Slot<'a>>,
}

struct Slot<'a> {
    drive: &'a Drive,
    chunks_left: u64,
    /// Percent of `chunks_left` that counts.
    percent: u64,
}

impl Slot<'_> {
    /// At least 1 while there is a chunk: what has space may be chosen.
    fn weight(&self) -> u64 {
        let weight = u128::from(self.chunks_left) * u128::from(self.percent) / 100;
        u64::try_from(weight)
            .unwrap_or(u64::MAX)
            .max(u64::from(self.chunks_left > 0))
    }
}

impl Group<'_> {
    fn weight(&self) -> u64 {
        self.slots.iter().map(Slot::weight).fold(0, u64::saturating_add)
    }

    fn has_space(&self) -> bool {
        self.slots.iter().any(|slot| slot.chunks_left > 0)
    }
}

impl<'a> Batch<'a> {
    fn new(topology: &'a Topology, request: &'a Request, penalties: Penalties) -> Self {
        let mut by_domain: BTreeMap<Domain, Vec<Slot<'a>>> = BTreeMap::new();
        for drive in topology.drives().filter(|drive| request.allows(drive)) {
            by_domain
                .entry(drive.domain(request.policy.level))
                .or_default()
                .push(Slot {
                    drive,
                    chunks_left: drive.free_chunks.of(request.chunk_size),
                    percent: match penalties {
                        Penalties::Heeded => 100 - u64::from(drive.penalty_percent.min(100)),
                        Penalties::Ignored => 100,
                    },
                });
        }
        let mut groups: Vec<Group<'a>> = by_domain
            .into_iter()
            .map(|(domain, slots)| Group {
                key: mix(request.seed, domain_key(&domain)),
                domain,
                uses: 0,
                slots,
            })
            .collect();
        groups.sort_by(|a, b| (a.key, &a.domain).cmp(&(b.key, &b.domain)));
        Self {
            request,
            origin: mix(request.seed, u64::MAX),
            groups,
        }
    }

    fn place(mut self) -> Vec<Placement> {
        let mut placements = Vec::new();
        for turn in 0..u64::from(self.request.count) {
            let Some(geometry) = self.geometry() else { break };
            let count = usize::from(geometry.n());
            let chosen = match self.request.policy.level {
                DomainLevel::Drive => self.evenly(count, BTreeMap::new()),
                DomainLevel::Node | DomainLevel::Rack => self.by_weight(count, turn),
            };
            let Some(chosen) = chosen else { break };
            placements.push(self.take(geometry, &chosen, turn));
        }
        placements
    }

    /// The widest that fits what is left, or `None`.
    fn geometry(&self) -> Option<Geometry> {
        let Geometry { k, m } = self.request.geometry;
        let domains = self.domains(Group::has_space);
        let k = u8::try_from(domains.saturating_sub(u32::from(m))).map_or(k, |fits| fits.min(k));
        (k >= self.request.k_min()).then_some(Geometry { k, m })
    }

    /// Domains that `counts` says yes to, less those beyond the bound of shards per node.
    fn domains(&self, counts: impl Fn(&Group<'a>) -> bool) -> u32 {
        let groups = self.groups.iter().filter(|group| counts(group));
        let domains = match (self.request.policy.level, self.request.policy.shards_per_node_max) {
            (DomainLevel::Drive, Some(bound)) => {
                let mut on_home: BTreeMap<&Home, usize> = BTreeMap::new();
                for slot in groups.flat_map(|group| &group.slots) {
                    *on_home.entry(&slot.drive.home).or_default() += 1;
                }
                on_home.values().map(|&drives| drives.min(bound.into())).sum()
            }
            _ => groups.count(),
        };
        u32::try_from(domains).unwrap_or(u32::MAX)
    }

    /// `count` domains by their free space, and a drive in each by the drive's: (group, slot).
    fn by_weight(&self, count: usize, turn: u64) -> Option<Vec<(usize, usize)>> {
        let weights: Vec<u64> = self.groups.iter().map(Group::weight).collect();
        let groups = choose(&weights, count, place(self.origin, turn))?;
        groups
            .into_iter()
            .map(|index| {
                let group = &self.groups[index];
                let weights: Vec<u64> = group.slots.iter().map(Slot::weight).collect();
                let slot = choose(&weights, 1, place(group.key, group.uses))?;
                Some((index, *slot.first()?))
            })
            .collect()
    }

    /// `count` drives, one after the other on the node or box that has fewest shards of the band yet, and there and
    /// among equals on the drive with most free space: (group, slot). The band then survives as many nodes as it
    /// can, which is what a cluster with few of them needs most.
    fn evenly(&self, count: usize, mut on_home: BTreeMap<&'a Home, u32>) -> Option<Vec<(usize, usize)>> {
        let bound = self
            .request
            .policy
            .shards_per_node_max
            .map_or(u32::MAX, u32::from);
        let mut chosen: Vec<(usize, usize)> = Vec::with_capacity(count);
        for _ in 0..count {
            // A group is one drive here, and the groups are shuffled: the first of equals is any of them.
            let (index, slot) = self
                .groups
                .iter()
                .enumerate()
                .filter_map(|(index, group)| Some((index, group.slots.first()?)))
                .filter(|(index, slot)| slot.chunks_left > 0 && !chosen.contains(&(*index, 0)))
                .filter(|(_, slot)| on_home.get(&slot.drive.home).is_none_or(|&shards| shards < bound))
                .min_by_key(|(_, slot)| {
                    let shards = on_home.get(&slot.drive.home).copied().unwrap_or(0);
                    (shards, std::cmp::Reverse(slot.weight()))
                })?;
            *on_home.entry(&slot.drive.home).or_default() += 1;
            chosen.push((index, 0));
        }
        Some(chosen)
    }

    fn take(&mut self, geometry: Geometry, chosen: &[(usize, usize)], turn: u64) -> Placement {
        let mut columns: Vec<&Drive> = Vec::with_capacity(chosen.len());
        for &(group, slot) in chosen {
            let group = &mut self.groups[group];
            group.uses += 1;
            let slot = &mut group.slots[slot];
            slot.chunks_left -= 1;
            columns.push(slot.drive);
        }
        // Which column a drive gets is drawn anew for each band: narrow stripes begin at the first columns.
        let draw = mix(self.request.seed, turn);
        columns.sort_by_key(|drive| (mix(draw, u64::from(drive.id.0)), drive.id));
        Placement {
            geometry,
            survivable: Survivable::of(geometry.m, columns.iter().copied()),
            drives: columns.iter().map(|drive| drive.id).collect(),
        }
    }
}

/// A number that stands for a domain in hashes.
fn domain_key(domain: &Domain) -> u64 {
    // FNV-1a, because the standard library's hasher may change from release to release.
    let of_name = |name: &str, kind: u64| {
        name.bytes().fold(0xcbf2_9ce4_8422_2325 ^ kind, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    match domain {
        Domain::Drive(drive) => u64::from(drive.0),
        Domain::Home(Home::Node(node)) => 1 << 32 | u64::from(node.0),
        Domain::Home(Home::Box(name)) => of_name(name, 1),
        Domain::Rack(name) => of_name(name, 2),
    }
}

/// Why not one band fits, and what would.
fn refusal(topology: &Topology, request: &Request) -> Refusal {
    let batch = Batch::new(topology, request, Penalties::Ignored);
    let with_space = batch.domains(Group::has_space);
    let in_service = batch.domains(|_| true);
    let (geometry, k_min, level) = (request.geometry, request.k_min(), request.policy.level);
    if in_service >= u32::from(k_min + geometry.m) {
        return Refusal::NoSpace {
            geometry,
            k_min,
            level,
            with_space,
            in_service,
        };
    }
    let mut by_drive = request.clone();
    by_drive.policy.level = DomainLevel::Drive;
    by_drive.policy.shards_per_node_max = None;
    by_drive.k_min = 1;
    let by_drive = (level != DomainLevel::Drive)
        .then(|| Batch::new(topology, &by_drive, Penalties::Ignored).geometry())
        .flatten();
    Refusal::TooFewDomains {
        geometry,
        k_min,
        level,
        with_space,
        in_service,
        would_fit: WouldFit {
            narrower: narrower(geometry, with_space),
            by_drive,
        },
    }
}

/// The widest geometry for so many domains: the same m if at all possible.
fn narrower(geometry: Geometry, domains: u32) -> Option<Geometry> {
    let domains = u8::try_from(domains).unwrap_or(u8::MAX);
    let m = geometry.m.min(domains.checked_sub(1)?);
    let k = geometry.k.min(domains - m);
    Geometry::new(k, m)
}
