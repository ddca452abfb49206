//! One stripe on its way: encoded, sent to w+m drives, and complete, or abandoned at the first column that fails.
//!
//! Complete means durable on every column. Only then do its blocks become visible and its writes are acknowledged.
//! An abandoned stripe keeps its number open until each of its parts is in another stripe that is complete.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::pin::pin;
use std::rc::Rc;
use std::sync::LazyLock;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use weft_block::buffer::AlignedBuf;
use weft_block::{BlockError, Durability, Io};
use weft_erasure::Codec;
use weft_proto::band::{ChunkAddress, Geometry, RootPointer};
use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::{DriveId, StripeNumber};
use weft_proto::units::{BLOCK_BYTES, Lba};

use super::append::{Plan, Stream};
use super::work::{Abandoned, BlockWork, Target, Work};
use super::{Core, Life};
use crate::band::{BandState, Reservation};
use crate::entry::{ColumnSet, MapEntry};
use crate::format::checksum::{content_crc, followed_by_block, payload_crc};
use crate::format::header::{BlockRecord, ShardPart, StripeHeader, ZeroRecord};
use crate::metrics::Bytes as SentBytes;
use crate::seams::BandPurpose;
use crate::sync::patience;

/// A payload block of zeroes: padding, and what a block without data reads as.
pub(crate) static ZERO_BLOCK: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

static ZERO_BLOCK_CRC: LazyLock<u32> = LazyLock::new(|| payload_crc(&ZERO_BLOCK));

/// A stripe that was sent.
struct Flight {
    number: StripeNumber,
    band: Rc<BandState>,
    purpose: BandPurpose,
    place: Reservation,
    d: u32,
    blocks: Vec<BlockWork>,
    zeroes: Vec<super::work::ZeroWork>,
}

/// The answer of one column.
type Answer = (u8, ChunkAddress, Result<(), BlockError>);

impl Core {
    /// Sends one stripe of `plan`'s shape with `work` in it.
    pub(crate) fn send_stripe(
        self: &Rc<Self>,
        stream: &Stream,
        band: &Rc<BandState>,
        skipped: ColumnSet,
        plan: Plan,
        work: Vec<Work>,
    ) {
        let (mut blocks, mut zeroes) = (Vec::with_capacity(plan.blocks), Vec::new());
        for work in work {
            match work {
                // Killed while it waited: a stripe formed now must not hold it.
                Work::Block(block) if block.target.is_dead() => self.block_dropped(block),
                Work::Block(block) => blocks.push(block),
                Work::Zeroes(record) => zeroes.push(record),
            }
        }
        if blocks.is_empty() && zeroes.is_empty() {
            return;
        }
        let d = if blocks.is_empty() { 0 } else { plan.d };
        let reappends = blocks.iter().any(|block| !block.was_in.is_empty())
            || zeroes.iter().any(|record| !record.was_in.is_empty());
        let (number, closed_through) = {
            let mut numbers = self.numbers.borrow_mut();
            let number = numbers.next(reappends);
            (number, numbers.closed_through())
        };
        let place = band.writer.borrow_mut().reserve(number, plan.w, d + 1, skipped);
        let header = StripeHeader {
            cluster: self.identity.cluster,
            volume: self.volume,
            layer: self.layer,
            epoch: self.epoch,
            band: band.id,
            stripe: number,
            closed_through,
            row: place.row,
            d: d as u16,
            geometry: band.geometry,
            shape: place.shape,
            blocks: blocks.iter().map(BlockWork::record).collect(),
            zeroes: zeroes
                .iter()
                .map(|record| ZeroRecord {
                    range: record.range,
                    sequence: record.sequence,
                })
                .collect(),
        };
        let shards = self.shards(&header, &blocks, d as usize);
        let bytes = self.count_stripe(band.geometry, plan.w, d, &blocks);
        let writes = self.send_shards(band, &place, shards);
        self.checkpoints.written(bytes, self);
        stream.in_flight.set(stream.in_flight.get() + 1);
        let flight = Flight {
            number,
            band: Rc::clone(band),
            purpose: stream.purpose,
            place,
            d,
            blocks,
            zeroes,
        };
        let core = Rc::clone(self);
        self.spawn(async move { core.fly(flight, writes).await });
    }

    /// Counts what a stripe sends to drives, and answers how many bytes that is.
    fn count_stripe(&self, geometry: Geometry, w: u8, d: u32, blocks: &[BlockWork]) -> u64 {
        let counters = &self.counters;
        counters.stripe_sent(w, d);
        let block = BLOCK_BYTES as u64;
        let header = u64::from(w + geometry.m) * block;
        let parity = u64::from(geometry.m) * u64::from(d) * block;
        counters.sent(SentBytes::Header, header);
        counters.sent(SentBytes::Parity, parity);
        for work in blocks {
            counters.sent(self.kind(work), block);
        }
        // Padding is what its stripe is.
        let padding = u64::from(w) * u64::from(d) - blocks.len() as u64;
        if let Some(first) = blocks.first() {
            counters.sent(self.kind(first), padding * block);
        }
        header + parity + u64::from(w) * u64::from(d) * block
    }

    fn kind(&self, work: &BlockWork) -> SentBytes {
        match work.target {
            Target::Page(..) | Target::Root(_) => SentBytes::Map,
            Target::Copy { .. } => SentBytes::Copy,
            Target::Host(_) if self.life.get() == Life::Opening || !work.was_in.is_empty() => SentBytes::Copy,
            Target::Host(_) => SentBytes::User,
        }
    }

    /// The bytes of each shard, as whole blocks: its header, its payload.
    fn shards(&self, header: &StripeHeader, blocks: &[BlockWork], d: usize) -> Vec<Vec<Bytes>> {
        let (w, m) = (usize::from(header.shape.w), usize::from(header.geometry.m));
        let template = header.template(&self.identity.key);
        let mut payloads: Vec<Payload> = (0..w).map(|index| self.payload(blocks, index * d, d)).collect();
        if w == 1 {
            // The first coefficient is 1 in every parity: copies, and no arithmetic.
            for _ in 0..m {
                payloads.push(payloads[0].clone());
            }
        } else if d > 0 {
            payloads.extend(parity(header.geometry, &payloads, d));
        }
        let columns = header.shape.columns(header.geometry);
        let shards: Vec<Vec<Bytes>> = payloads
            .into_iter()
            .zip(columns)
            .enumerate()
            .map(|(index, (payload, column))| {
                let Payload { crc, mut pieces } = payload;
                let part = ShardPart {
                    index: index as u8,
                    column,
                    payload_crc: crc,
                };
                pieces[0] = template.shard(part);
                pieces
            })
            .collect();
        assert_eq!(shards.len(), w + m, "a stripe goes out with full m or not at all");
        shards
    }

    /// The payload of a data shard: `d` blocks from the one numbered `first`, with zeroes where there are no more. Its checksum
    /// is put together from theirs.
    fn payload(&self, blocks: &[BlockWork], first: usize, d: usize) -> Payload {
        let mut payload = Payload::with_capacity(1 + d);
        for index in first..first + d {
            let (crc, bytes) = match blocks.get(index) {
                Some(block) => {
                    let crc = content_crc(self.volume, block.lba, block.sequence, block.crc);
                    (crc, block.data.clone())
                }
                None => (*ZERO_BLOCK_CRC, Bytes::from_static(&ZERO_BLOCK)),
            };
            payload.crc = followed_by_block(payload.crc, crc);
            payload.pieces.push(bytes);
        }
        payload
    }

    /// Starts the writes of all shards.
    fn send_shards(
        &self,
        band: &Rc<BandState>,
        place: &Reservation,
        shards: Vec<Vec<Bytes>>,
    ) -> FuturesUnordered<Io1> {
        let writes = FuturesUnordered::new();
        for (column, shard) in place.shape.columns(band.geometry).zip(shards) {
            let Some(chunk) = band.chunk(column) else {
                continue;
            };
            let io: Io<()> = match self.seams.drives.device(chunk.drive) {
                Some(device) => {
                    let info = device.info();
                    let durability = if info.volatile_write_cache {
                        Durability::Durable
                    } else {
                        Durability::Cached
                    };
                    let start = Lba(chunk.row_byte_offset(place.row) / u64::from(info.block_bytes));
                    device.write(start, shard, durability)
                }
                None => Io::ready(Err(BlockError::NotReady)),
            };
            band.sent.begin(column);
            writes.push(io.map(move |result| (column, chunk, result)).boxed_local());
        }
        writes
    }

    async fn fly(self: Rc<Self>, flight: Flight, mut writes: FuturesUnordered<Io1>) {
        let mut stall = pin!(patience(&*self.seams.env, self.settings.stall));
        let mut waiting: BTreeMap<u8, DriveId> = flight
            .place
            .shape
            .columns(flight.band.geometry)
            .filter_map(|column| Some((column, flight.band.chunk(column)?.drive)))
            .collect();
        let complete = loop {
            if waiting.is_empty() || planted(Bug::AcknowledgeBeforeDurable) && waiting.len() == 1 {
                break true;
            }
            if self.is_over() {
                break false;
            }
            let changed = self.changed.changed();
            let event = {
                let other = pin!(select(changed, stall.as_mut()));
                match select(writes.next(), other).await {
                    Either::Left((answer, _)) => {
                        answer.map_or(Event::Answer(None), |a| Event::Answer(Some(a)))
                    }
                    Either::Right((Either::Left(_), _)) => Event::Changed,
                    Either::Right((Either::Right(_), _)) => Event::Stalled,
                }
            };
            match event {
                Event::Answer(Some((column, chunk, result))) => {
                    let band = &flight.band;
                    band.sent.end(column, chunk, &result);
                    match result {
                        Ok(()) => {
                            waiting.remove(&column);
                        }
                        Err(_) if planted(Bug::AcknowledgeDespiteError) => {
                            waiting.remove(&column);
                        }
                        Err(error) => {
                            let drive = chunk.drive;
                            tracing::warn!(volume = %self.volume, %drive, stripe = %flight.number, %error, "shard not written");
                            self.drive_error(drive, &error);
                            // Whatever the error says of the drive, this column did not take the shard.
                            self.suspect(drive);
                            break false;
                        }
                    }
                }
                Event::Answer(None) => break waiting.is_empty(),
                Event::Changed => {
                    // Another stripe found out about a column that this one waits for: do not wait for the
                    // stall time again.
                    if waiting.values().any(|drive| self.health.is_suspect(*drive)) {
                        break false;
                    }
                }
                Event::Stalled => {
                    for drive in waiting.values() {
                        self.suspect(*drive);
                    }
                    break false;
                }
            }
        };
        let stream = self.stream(flight.purpose);
        stream.in_flight.set(stream.in_flight.get() - 1);
        if !writes.is_empty() {
            self.drain(Rc::clone(&flight.band), writes);
        }
        if self.is_over() {
            flight.fail();
        } else if complete {
            self.complete(flight);
        } else {
            self.abandon(flight);
        }
        self.changed.notify();
        self.pump.notify();
    }

    /// Keeps waiting for writes that nobody needs any more: the band is not freed before they are answered.
    fn drain(&self, band: Rc<BandState>, mut writes: FuturesUnordered<Io1>) {
        let changed = Rc::clone(&self.changed);
        self.spawn(async move {
            while let Some((column, chunk, result)) = writes.next().await {
                band.sent.end(column, chunk, &result);
            }
            changed.notify();
        });
    }

    fn complete(self: &Rc<Self>, flight: Flight) {
        let columns: Vec<u8> = flight.place.shape.columns(flight.band.geometry).collect();
        let first = flight.blocks.first();
        if let Some(Target::Root(reply)) = first.map(|block| block.target.clone()) {
            reply.give(Ok(RootPointer {
                band: flight.band.id,
                row: flight.place.row,
                start: flight.place.shape.start,
                w: flight.place.shape.w,
                d: flight.d as u16,
                stripe: flight.number,
            }));
        }
        let Flight {
            blocks,
            zeroes,
            place,
            band,
            d,
            number,
            ..
        } = flight;
        for record in zeroes {
            self.kill_copies(record.range.start.0, record.range.count, record.sequence);
            self.map().zero_range(record.range, record.sequence);
            self.checkpoints
                .zeroes_pending
                .borrow_mut()
                .remove(&record.sequence);
            self.space.hope();
            self.close_parts(&record.was_in);
            record.op.part_done();
        }
        for (index, block) in blocks.iter().enumerate() {
            let (shard, depth) = (index / d as usize, index % d as usize);
            let entry = MapEntry {
                band: band.id,
                row: place.row + 1 + depth as u32,
                column: columns[shard],
                start: place.shape.start,
                w: place.shape.w,
                skipped: place.shape.skipped,
                sequence: block.sequence,
                crc: block.crc,
            };
            self.block_written(block, entry);
        }
        // After all of them are entered: whoever is woken, and whatever is given back, takes locked instructions, and each of those
        // waits for the stores before it.
        for block in blocks {
            if let Target::Host(op) = &block.target {
                op.part_done();
            }
        }
        self.close_stripe(number, &band);
    }

    /// The blocks go first in the queue again, with what they owe to this stripe's number.
    fn abandon(self: &Rc<Self>, flight: Flight) {
        self.counters.abandoned.add(1);
        let is_root = |block: &BlockWork| matches!(block.target, Target::Root(_));
        let (roots, blocks): (Vec<_>, Vec<_>) = flight.blocks.into_iter().partition(is_root);
        for root in roots {
            // Nothing refers to a root before it is published; the checkpoint writes another one.
            root.target.fail(BlockError::Unknown);
        }
        let parts = blocks.len() + flight.zeroes.len();
        if parts == 0 {
            self.close_stripe(flight.number, &flight.band);
            return;
        }
        let abandoned = Rc::new(Abandoned {
            number: flight.number,
            band: flight.band,
            remaining: Cell::new(parts),
        });
        let blocks = blocks.into_iter().map(Work::Block);
        let zeroes = flight.zeroes.into_iter().map(Work::Zeroes);
        let stream = self.stream(flight.purpose);
        let again: Vec<Work> = blocks
            .chain(zeroes)
            .map(|mut work| {
                match &mut work {
                    Work::Block(block) => block.was_in.push(Rc::clone(&abandoned)),
                    Work::Zeroes(record) => record.was_in.push(Rc::clone(&abandoned)),
                }
                work
            })
            .collect();
        let mut queue = stream.queue.borrow_mut();
        for work in again.into_iter().rev() {
            queue.push_front(work);
        }
    }

    /// Makes a durable block visible. A host is answered by the caller.
    fn block_written(self: &Rc<Self>, block: &BlockWork, entry: MapEntry) {
        match &block.target {
            Target::Host(_) => {
                self.kill_copies(block.lba.0, 1, block.sequence);
                self.map().insert(block.lba, entry);
            }
            Target::Page(..) => block.target.page_done(entry),
            Target::Copy { copy, expected, seen } => {
                if crate::map::is_map_lba(block.lba) {
                    self.map().relocate_page(block.lba, expected, entry);
                } else if !copy.is_dead() {
                    self.map().relocate(block.lba, expected, entry, *seen);
                }
                self.unregister(copy);
                copy.group.borrow().done();
            }
            Target::Root(_) => {}
        }
        self.close_parts(&block.was_in);
    }

    /// A copy that is not wanted any more: a newer version is durable.
    pub(crate) fn block_dropped(self: &Rc<Self>, block: BlockWork) {
        if let Target::Copy { copy, .. } = &block.target {
            self.unregister(copy);
            copy.group.borrow().done();
        }
        self.close_parts(&block.was_in);
    }

    fn close_parts(&self, was_in: &[Rc<Abandoned>]) {
        for abandoned in was_in {
            let remaining = abandoned.remaining.get() - 1;
            abandoned.remaining.set(remaining);
            if remaining == 0 {
                self.close_stripe(abandoned.number, &abandoned.band);
            }
        }
    }

    fn close_stripe(&self, number: StripeNumber, band: &BandState) {
        self.numbers.borrow_mut().close(number);
        band.writer.borrow_mut().close(number);
    }
}

type Io1 = futures_util::future::LocalBoxFuture<'static, Answer>;

enum Event {
    Answer(Option<Answer>),
    Changed,
    Stalled,
}

impl Flight {
    fn fail(&self) {
        for block in &self.blocks {
            block.target.fail(BlockError::NotReady);
        }
        for record in &self.zeroes {
            record.op.fail(BlockError::NotReady);
        }
    }
}

impl BlockWork {
    fn record(&self) -> BlockRecord {
        BlockRecord {
            lba: self.lba,
            sequence: self.sequence,
            crc: self.crc,
        }
    }
}

/// The bytes of a shard behind its header, for which the first piece is a place.
#[derive(Clone)]
struct Payload {
    pieces: Vec<Bytes>,
    /// [`payload_crc`] of all pieces.
    crc: u32,
}

impl Payload {
    /// Of no bytes, with room for so many pieces, the header's included.
    fn with_capacity(pieces: usize) -> Self {
        let mut payload = Self {
            pieces: Vec::with_capacity(pieces),
            crc: payload_crc(&[]),
        };
        payload.pieces.push(Bytes::new());
        payload
    }
}

/// The parity shards, each in one piece.
fn parity(geometry: Geometry, data: &[Payload], d: usize) -> impl Iterator<Item = Payload> + use<> {
    let codec = Codec::new(geometry.m).expect("a Geometry has 1 to 4 parity shards");
    let shard_bytes = d * BLOCK_BYTES;
    // Of the pool: encoding writes every byte.
    let mut parity = AlignedBuf::new(usize::from(geometry.m) * shard_bytes);
    let sources: Vec<&[Bytes]> = data.iter().map(|payload| &payload.pieces[1..]).collect();
    let mut outputs: Vec<&mut [u8]> = parity.chunks_exact_mut(shard_bytes).collect();
    codec.encode_scattered(&sources, &mut outputs);
    let parity = parity.freeze();
    (0..usize::from(geometry.m)).map(move |shard| {
        let bytes = parity.slice(shard * shard_bytes..(shard + 1) * shard_bytes);
        Payload {
            crc: payload_crc(&bytes),
            pieces: vec![Bytes::new(), bytes],
        }
    })
}
