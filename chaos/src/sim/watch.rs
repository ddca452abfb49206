//! What is checked while a run goes on, whoever does what.
//!
//! - every write that lands on a drive lands in a chunk that a band of its sender holds, that was granted to a rebuild of its
//!   sender, or that waits for its sender's fence, and gives a row the bytes it gave it before, wherever the column lay then;
//! - nothing lands in a chunk once a rebuild has installed it;
//! - nothing lands of an incarnation after its fence on that drive was complete;
//! - an acknowledged write has a stripe with full m, all w+m shards of which have landed, unless its volume has been deleted: an owner
//!   that was declared dead and lives answers its hosts until it is fenced, from chunks in quarantine, and nobody asks for those bytes again;
//! - an epoch is granted once, to one incarnation, and one process answers for it;
//! - a root is never followed by an older one.
//!
//! It keeps the history of the hosts as well, for [`crate::checker`].

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use bytes::Bytes;
use foldhash::fast::FixedState;
use weft_metadata::state::ClusterState;
use weft_metadata::state::map::Owner;
use weft_proto::band::Band;
use weft_proto::id::{BandId, ClusterId, DriveId, Epoch, IncarnationId, StripeNumber, VolumeId};
use weft_proto::units::LbaRange;
use weft_volume::error::VolumeError;
use weft_volume::format::header::{HeaderKey, StripeHeader};
use weft_volume::testing::world::Landed;

use crate::history::{BLOCK_BYTES, Block, Outcome, Record, Value, named, observe};

/// 4 KiB blocks in a MiB.
const BLOCKS_PER_MIB: u64 = 256;
/// Violations kept: the first ones tell most.
const KEPT: usize = 20;

/// See the module.
#[derive(Default)]
pub(super) struct Watch {
    history: RefCell<Vec<Record>>,
    version: Cell<u32>,
    violations: RefCell<Vec<String>>,
    /// Incarnations by process. Processes are numbered by the world, incarnations by metadata.
    incarnations: RefCell<BTreeMap<IncarnationId, IncarnationId>>,
    fenced: RefCell<BTreeSet<(IncarnationId, DriveId)>>,
    answering: RefCell<BTreeMap<(VolumeId, Epoch), IncarnationId>>,
    granted: RefCell<BTreeMap<(VolumeId, Epoch), IncarnationId>>,
    /// Volumes whose deletion is over. What lands of them is in chunks of no band.
    deleted: RefCell<BTreeSet<VolumeId>>,
    acknowledgements: Cell<u64>,
    stale: Cell<bool>,
    holders: RefCell<BTreeMap<(DriveId, u32), Holder>>,
    rows: RefCell<HashMap<(BandId, u8, u32), u64, FixedState>>,
    stripes: RefCell<HashMap<StripeKey, Shards, FixedState>>,
    /// The stripes whose data shards hold what a write wrote to a block.
    places: RefCell<Places>,
}

/// By block, client and version.
type Places = HashMap<(Block, u16, u32), Vec<StripeKey>, FixedState>;
type StripeKey = (VolumeId, Epoch, StripeNumber, BandId);

/// Who may write to a chunk.
#[derive(Clone)]
struct Holder {
    mib: u32,
    writer: IncarnationId,
    /// `None` in quarantine.
    band: Option<(Rc<Band>, u8)>,
    state: Held,
}

/// What a chunk is held for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    /// Stripes, or whatever lands late.
    Written,
    /// An attempt to rebuild a column.
    Rebuilding,
    /// A column that was rebuilt: read only.
    Rebuilt,
}

#[derive(Default)]
struct Shards {
    /// A bit for each: a stripe has at most twenty.
    landed: u32,
    needed: u32,
}

/// Where an open operation's records are.
pub(super) struct Open {
    first: usize,
    count: usize,
}

impl Watch {
    // The history.

    pub(super) fn next_version(&self) -> u32 {
        self.version.set(self.version.get() + 1);
        self.version.get()
    }

    pub(super) fn record(&self, record: Record) {
        self.history.borrow_mut().push(record);
    }

    pub(super) fn open(&self, records: impl Iterator<Item = Record>) -> Open {
        let mut history = self.history.borrow_mut();
        let first = history.len();
        history.extend(records);
        Open {
            first,
            count: history.len() - first,
        }
    }

    pub(super) fn close(&self, open: Open, outcome: Outcome, completed_ns: u64) {
        for record in &mut self.history.borrow_mut()[open.first..open.first + open.count] {
            record.outcome = outcome;
            record.completed_ns = completed_ns;
        }
    }

    pub(super) fn take_history(&self) -> Vec<Record> {
        self.history.take()
    }

    // Violations.

    pub(super) fn violation(&self, what: String) {
        let mut violations = self.violations.borrow_mut();
        if violations.len() < KEPT {
            violations.push(what);
        }
    }

    pub(super) fn violations(&self) -> Vec<String> {
        self.violations.borrow().clone()
    }

    pub(super) fn unreadable(&self, volume: VolumeId, epoch: Epoch, error: &VolumeError) {
        self.violation(format!(
            "{volume} cannot be opened under {epoch} within the tolerated failures: {error}"
        ));
    }

    // Who is who.

    pub(super) fn incarnation_started(&self, process: IncarnationId, incarnation: IncarnationId) {
        self.incarnations.borrow_mut().insert(process, incarnation);
    }

    /// A fence is complete.
    pub(super) fn fenced(&self, incarnation: IncarnationId, drive: DriveId) {
        self.fenced.borrow_mut().insert((incarnation, drive));
    }

    /// Metadata has applied a command: an epoch belongs to one incarnation for ever.
    pub(super) fn applied(&self, state: &ClusterState) {
        for volume in state.map.volumes.values() {
            let Some(owner) = volume.phase.owner() else {
                continue;
            };
            let mut granted = self.granted.borrow_mut();
            let first = *granted
                .entry((volume.id, owner.epoch))
                .or_insert(owner.incarnation);
            if first != owner.incarnation {
                self.violation(format!(
                    "{} of {} was granted to {first} and then to {}",
                    owner.epoch, volume.id, owner.incarnation
                ));
            }
        }
    }

    pub(super) fn answered(&self, volume: VolumeId, owner: Owner, process: IncarnationId) {
        let key = (volume, owner.epoch);
        let first = *self.answering.borrow_mut().entry(key).or_insert(process);
        if first != process {
            self.violation(format!(
                "processes {first} and {process} both answer for {volume} under {}",
                owner.epoch
            ));
        }
    }

    // Redundancy.

    /// A write was acknowledged by its engine: every block of it must lie in a stripe that is complete. The bytes are the command's own,
    /// so their names are enough; what landed was compared byte by byte.
    pub(super) fn acknowledged(&self, volume: VolumeId, range: LbaRange, bytes: &Bytes) {
        if self.deleted.borrow().contains(&volume) {
            return;
        }
        self.acknowledgements.set(self.acknowledgements.get() + 1);
        for (lba, bytes) in (range.start.0..).zip(bytes.chunks(BLOCK_BYTES)) {
            let block = Block {
                volume: (volume.0 - 1) as u16,
                lba: lba as u32,
            };
            let Some((client, version)) = named(bytes) else {
                continue;
            };
            let places = self.places.borrow();
            let stripes = self.stripes.borrow();
            let complete = places.get(&(block, client, version)).is_some_and(|keys| {
                let mut found = keys.iter().filter_map(|key| stripes.get(key));
                found.any(|shards| shards.landed.count_ones() >= shards.needed)
            });
            if !complete {
                self.violation(format!(
                    "c{client}v{version} on {volume} block {lba} is acknowledged, and no stripe with it is complete"
                ));
            }
        }
    }

    pub(super) fn acknowledgements(&self) -> u64 {
        self.acknowledgements.get()
    }

    // Landing.

    /// Bands, chunks or roots have changed. A volume's root is never followed by an older one: one of an earlier epoch, or
    /// one that the same epoch wrote before.
    pub(super) fn layout_changed(&self, before: &ClusterState, after: &ClusterState) {
        self.stale.set(true);
        let gone = before
            .layouts
            .keys()
            .filter(|volume| !after.layouts.contains_key(volume));
        self.deleted.borrow_mut().extend(gone);
        let written = |state: &ClusterState, volume: &VolumeId| {
            let layout = state.layouts.get(volume)?;
            let root = layout.root?;
            let record = layout.bands.get(&root.band)?;
            Some((record.band.epoch, root.stripe))
        };
        for volume in after.layouts.keys() {
            let (old, new) = (written(before, volume), written(after, volume));
            if new < old {
                self.violation(format!("the root of {volume} goes back from {old:?} to {new:?}"));
            }
        }
    }

    fn refresh(&self, state: &ClusterState) {
        if !self.stale.replace(false) {
            return;
        }
        let mut holders = BTreeMap::new();
        for record in state.layouts.values().flat_map(|layout| layout.bands.values()) {
            let band = Rc::new(record.band.clone());
            for (column, chunk) in (0..).zip(&record.band.columns) {
                let replaced = record.replaced.get(&column);
                let holder = Holder {
                    mib: record.band.chunk_size.mib(),
                    writer: replaced.map_or(record.writer, |replaced| replaced.writer),
                    band: Some((Rc::clone(&band), column)),
                    state: if replaced.is_some() {
                        Held::Rebuilt
                    } else {
                        Held::Written
                    },
                };
                holders.insert((chunk.drive, chunk.offset_mib), holder);
            }
        }
        for layout in state.layouts.values() {
            for granted in &layout.replacements {
                let wanted = granted.replacement;
                let Some(record) = layout.bands.get(&wanted.band) else {
                    continue;
                };
                let holder = Holder {
                    mib: granted.size.mib(),
                    writer: granted.writer,
                    band: Some((Rc::new(record.band.clone()), wanted.column)),
                    state: Held::Rebuilding,
                };
                holders.insert((wanted.chunk.drive, wanted.chunk.offset_mib), holder);
            }
        }
        for (drive, chunks) in &state.chunks {
            for (offset_mib, quarantined) in &chunks.quarantine {
                let holder = Holder {
                    mib: quarantined.size.mib(),
                    writer: quarantined.writer,
                    band: None,
                    state: Held::Written,
                };
                holders.insert((*drive, *offset_mib), holder);
            }
        }
        *self.holders.borrow_mut() = holders;
    }

    /// A write lands.
    pub(super) fn landing(&self, state: &ClusterState, landed: &Landed<'_>) {
        if let Err(what) = self.judge(state, landed) {
            self.violation(format!(
                "{} blocks of process {} land at {} of {}: {what}",
                landed.blocks.len(),
                landed.sender,
                landed.start,
                landed.drive
            ));
        }
    }

    fn judge(&self, state: &ClusterState, landed: &Landed<'_>) -> Result<(), String> {
        self.refresh(state);
        let &Landed {
            drive, start, blocks, ..
        } = landed;
        let sender = self.incarnations.borrow().get(&landed.sender).copied();
        let sender = sender.ok_or("nobody's process")?;
        if self.fenced.borrow().contains(&(sender, drive)) {
            return Err(format!("{sender} was fenced there, and that was complete"));
        }
        let mib = (start / BLOCKS_PER_MIB) as u32;
        let holders = self.holders.borrow();
        let found = holders.range((drive, 0)..=(drive, mib)).next_back();
        let ((_, offset_mib), holder) = found
            .filter(|((_, offset), holder)| mib < offset + holder.mib)
            .ok_or("nobody holds a chunk there")?;
        if holder.writer != sender {
            return Err(format!("the chunk is {}'s, not {sender}'s", holder.writer));
        }
        let Some((band, column)) = &holder.band else {
            return Ok(());
        };
        if holder.state == Held::Rebuilt {
            return Err(format!(
                "column {column} of {} was rebuilt, and is only read",
                band.id
            ));
        }
        let first = (start - u64::from(*offset_mib) * BLOCKS_PER_MIB) as u32;
        if first + blocks.len() as u32 > band.chunk_size.rows() {
            return Err(format!("it ends past the chunk of {}", band.id));
        }
        for (row, bytes) in (first..).zip(blocks) {
            let Some(bytes) = bytes else {
                return Err(format!(
                    "row {row} of {} is deallocated while it is held",
                    band.id
                ));
            };
            let hash = hash(bytes);
            let before = self.rows.borrow_mut().insert((band.id, *column, row), hash);
            if before.is_some_and(|before| before != hash) {
                return Err(format!(
                    "row {row} of column {column} of {} is written twice",
                    band.id
                ));
            }
        }
        // A rebuilt shard adds nothing to what was acknowledged for its stripe.
        if landed.whole && holder.state == Held::Written {
            self.shard_landed(state, band, *column, first, blocks);
        }
        Ok(())
    }

    fn shard_landed(
        &self,
        state: &ClusterState,
        band: &Band,
        column: u8,
        row: u32,
        blocks: &[Option<Bytes>],
    ) {
        let Some(cluster) = &state.map.cluster else { return };
        let Some(Some(header)) = blocks.first() else {
            return;
        };
        let key = HeaderKey(cluster.authentication_key);
        let id: ClusterId = cluster.id;
        let Ok((header, part)) = StripeHeader::parse(header, &key, id, band, row, column) else {
            self.violation(format!("{} gets a shard whose header cannot be read", band.id));
            return;
        };
        let wanted = state
            .map
            .volumes
            .get(&band.volume)
            .map(|volume| volume.geometry.m);
        if Some(header.geometry.m) != wanted {
            self.violation(format!(
                "a stripe of {} has {} parities",
                band.id, header.geometry.m
            ));
        }
        let key = (header.volume, header.epoch, header.stripe, header.band);
        let mut stripes = self.stripes.borrow_mut();
        let shards = stripes.entry(key).or_default();
        shards.needed = u32::from(header.shape.w) + u32::from(header.geometry.m);
        shards.landed |= 1 << part.index;
        if part.index >= header.shape.w {
            return;
        }
        let depth = usize::from(header.d);
        for (index, payload) in blocks[1..].iter().enumerate() {
            let record = header.blocks.get(usize::from(part.index) * depth + index);
            let (Some(record), Some(payload)) = (record, payload) else {
                continue;
            };
            let block = Block {
                volume: (band.volume.0 - 1) as u16,
                lba: record.lba.0 as u32,
            };
            if record.lba.0 < u64::from(u32::MAX)
                && let Value::Written { client, version } = observe(block, payload)
            {
                let mut places = self.places.borrow_mut();
                places.entry((block, client, version)).or_default().push(key);
            }
        }
    }
}

/// Tells bytes apart; nobody here looks for collisions. Of whole blocks, four words at a time, so that no multiplication waits for the one
/// before it.
fn hash(bytes: &[u8]) -> u64 {
    let (blocks, rest) = bytes.as_chunks::<32>();
    debug_assert!(rest.is_empty(), "bytes of blocks");
    let mut lanes = [1_u64, 2, 3, 4].map(|lane| lane.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            let mixed = (*lane ^ u64::from_le_bytes(*word)).wrapping_mul(0xff51_afd7_ed55_8ccd);
            *lane = mixed.rotate_left(29);
        }
    }
    let mix = |hash: u64, lane: u64| (hash ^ lane).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
    lanes.into_iter().fold(0, mix)
}
