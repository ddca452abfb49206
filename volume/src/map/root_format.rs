//! The layout of a root: header, body sections, and the head of a spilled one.
//!
//! Every count that comes from a drive is bounded by the bytes that are there before it sizes anything.

use weft_proto::band::{Band, ChunkAddress, ChunkSize, DATA_SHARDS_MAX, Geometry, PARITY_SHARDS_MAX};
use weft_proto::id::{BandId, ClusterId, DriveId, Epoch, LayerId, Sequence, StripeNumber, VolumeId};
use weft_proto::units::Lba;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::entry::MapEntry;

use super::address::{INDEX_LEVEL_MAX, POSITIONS, RUNS};
use super::block::{FormatError, MapIdentity, PAGE_BODY_BYTES, crc32c};
use super::index::Child;
use super::leaf::LEAF_RECORDS_MAX;
use super::packed::{self, Table};
use super::root::{BandState, Root, RootBand, Spilled};
use super::run::RunDescriptor;
use super::{MapRoot, RunRoot};

/// First bytes of every root.
pub(crate) const ROOT_MAGIC: [u8; 8] = *b"WEFTROOT";
/// Versions of the root's layout. 1: the first. 2: the same, over map blocks of their second version. 3: bands and counts as packed
/// tables.
pub(crate) const ROOT_VERSION: u16 = 3;

/// The first 144 bytes of a root.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RootHeader {
    /// [`ROOT_MAGIC`].
    magic: [u8; 8],
    /// [`ROOT_VERSION`].
    version: U16,
    /// k of new bands.
    k: u8,
    /// m of new bands.
    m: u8,
    /// Table blocks that hold the body; 0 when it follows this header.
    table_blocks: U32,
    cluster: [u8; 16],
    volume: U64,
    layer: U64,
    epoch: U64,
    root_version: U64,
    size_bytes: U64,
    counter_next: U64,
    stripe_next: U64,
    /// H.
    complete: U64,
    run_next: U32,
    /// The run number of the table blocks.
    table_run: U32,
    /// Bytes that follow this header in the stripe.
    inline_bytes: U32,
    /// crc32c of them.
    inline_crc: U32,
    /// Bytes of the body, wherever it lies.
    body_bytes: U32,
    /// crc32c of the body.
    body_crc: U32,
    rsvd120: [u8; 20],
    /// crc32c of bytes 0 … 139.
    header_crc: U32,
}

const _: () = assert!(size_of::<RootHeader>() == 144);
const _: () = assert!(std::mem::offset_of!(RootHeader, volume) == 32);
const _: () = assert!(std::mem::offset_of!(RootHeader, run_next) == 96);
const _: () = assert!(std::mem::offset_of!(RootHeader, header_crc) == 140);

/// A run; where its blocks lie, by band, follows as a table of counts.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RunRecord {
    number: U32,
    leaves: U32,
    records: U64,
    /// Of the highest sequence.
    epoch: U64,
    /// Of the highest sequence.
    counter: U64,
    height: u8,
    rsvd33: [u8; 2],
    /// As in an index block; its LBA is 0.
    top: Child,
}

const _: () = assert!(size_of::<RunRecord>() == 80);

/// An earlier epoch and the last of its stripes that is valid.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct EndedRecord {
    epoch: U64,
    stripe: U64,
}

/// Most blocks of a band: what a run can refer to in one.
const BAND_BLOCKS_MAX: u64 = (DATA_SHARDS_MAX + PARITY_SHARDS_MAX) as u64 * 16384;

/// A root's stripe, checked.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    header: RootHeader,
    pub(crate) identity: MapIdentity,
    pub(crate) body_bytes: usize,
    pub(crate) spilled: Option<Spilled>,
    /// The body, unless it is spilled.
    pub(crate) inline: Vec<u8>,
}

/// Lays out header and what follows it: the body, or where it lies.
pub(crate) fn encode_head(root: &Root, body: &[u8], spilled: Option<&Spilled>) -> Vec<u8> {
    let mut inline = Vec::new();
    match spilled {
        None => inline.extend_from_slice(body),
        Some(spilled) => {
            for place in &spilled.places {
                inline.extend_from_slice(Child::new(0, *place).as_bytes());
            }
            encode_bands(&mut inline, &spilled.bands);
        }
    }
    let mut header = RootHeader {
        magic: ROOT_MAGIC,
        version: ROOT_VERSION.into(),
        k: root.geometry.k,
        m: root.geometry.m,
        table_blocks: length(spilled.map_or(0, |spilled| spilled.places.len())),
        cluster: root.cluster.0,
        volume: root.volume.0.into(),
        layer: root.layer.0.into(),
        epoch: root.epoch.0.into(),
        root_version: root.root_version.into(),
        size_bytes: root.size_bytes.into(),
        counter_next: root.counter_next.into(),
        stripe_next: root.stripe_next.0.into(),
        complete: root.complete.0.into(),
        run_next: root.map.run_next.into(),
        table_run: spilled.map_or(0, |spilled| spilled.run).into(),
        inline_bytes: length(inline.len()),
        inline_crc: crc32c(&inline).into(),
        body_bytes: length(body.len()),
        body_crc: crc32c(body).into(),
        rsvd120: [0; 20],
        header_crc: 0.into(),
    };
    header.header_crc = crc32c(&header.as_bytes()[..140]).into();
    let mut bytes = header.as_bytes().to_vec();
    bytes.append(&mut inline);
    bytes
}

/// Lays out the sections in their order.
pub(crate) fn encode_body(root: &Root) -> Vec<u8> {
    let mut body = Vec::new();
    put(&mut body, &length(root.name.len()));
    body.extend_from_slice(root.name.as_bytes());
    put(&mut body, &length(root.layers.len()));
    for layer in &root.layers {
        put(&mut body, &U64::new(layer.0));
    }
    put(&mut body, &length(root.ended.len()));
    for (epoch, stripe) in &root.ended {
        let record = EndedRecord {
            epoch: epoch.0.into(),
            stripe: stripe.0.into(),
        };
        put(&mut body, &record);
    }
    encode_bands(&mut body, &root.bands);
    put(&mut body, &length(root.map.runs.len()));
    for run in &root.map.runs {
        put(&mut body, &run_record(&run.run));
        encode_counts(&mut body, &run.page_counts);
    }
    put(&mut body, &length(root.map.moved.len()));
    for (lba, place) in &root.map.moved {
        put(&mut body, &Child::new(lba.0, *place));
    }
    encode_counts(&mut body, &root.map.record_counts);
    body
}

fn encode_bands(body: &mut Vec<u8>, bands: &[RootBand]) {
    let rows: Vec<_> = bands.iter().map(band_row).collect();
    debug_assert!(rows.is_sorted_by_key(|row| row[0]), "bands ascend");
    packed::encode(body, &rows);
    let mut chunks = Vec::new();
    for root_band in bands {
        let band = &root_band.band;
        assert_eq!(
            band.columns.len(),
            usize::from(band.geometry.n()),
            "a band has n columns"
        );
        let columns = band.columns.iter();
        chunks.extend(columns.map(|column| [u64::from(column.drive.0), u64::from(column.offset_mib)]));
    }
    packed::encode(body, &chunks);
}

/// Numbers of a band's row.
const BAND_FIELDS: usize = 12;

fn band_row(root_band: &RootBand) -> [u64; BAND_FIELDS] {
    let band = &root_band.band;
    [
        band.id.0,
        band.volume.0,
        band.layer.0,
        band.epoch.0,
        band.version,
        root_band.stripe_last.0,
        band.window_rows.into(),
        root_band.append_row.into(),
        band.chunk_size.mib().into(),
        band.geometry.k.into(),
        band.geometry.m.into(),
        match root_band.state {
            BandState::Granted => 0,
            BandState::Open => 1,
            BandState::Sealed => 2,
        },
    ]
}

fn band_of(row: [u64; BAND_FIELDS]) -> Result<RootBand, FormatError> {
    let [
        id,
        volume,
        layer,
        epoch,
        version,
        stripe_last,
        window_rows,
        append_row,
        chunk_mib,
        k,
        m,
        state,
    ] = row;
    let geometry = Geometry::new(narrow(k, "k, m")?, narrow(m, "k, m")?);
    Ok(RootBand {
        band: Band {
            id: BandId(id),
            volume: VolumeId(volume),
            layer: LayerId(layer),
            epoch: Epoch(epoch),
            geometry: geometry.ok_or(FormatError::Field("k, m"))?,
            chunk_size: match chunk_mib {
                1 => ChunkSize::Mib1,
                8 => ChunkSize::Mib8,
                64 => ChunkSize::Mib64,
                _ => return Err(FormatError::Field("chunk_mib")),
            },
            window_rows: narrow(window_rows, "window_rows")?,
            version,
            columns: Vec::new(),
        },
        state: match state {
            0 => BandState::Granted,
            1 => BandState::Open,
            2 => BandState::Sealed,
            _ => return Err(FormatError::Field("state")),
        },
        append_row: narrow(append_row, "append_row")?,
        stripe_last: StripeNumber(stripe_last),
    })
}

fn narrow<T: TryFrom<u64>>(value: u64, field: &'static str) -> Result<T, FormatError> {
    T::try_from(value).map_err(|_| FormatError::Field(field))
}

fn encode_counts(body: &mut Vec<u8>, counts: &[(BandId, u64)]) {
    let rows: Vec<_> = counts.iter().map(|(band, count)| [band.0, *count]).collect();
    packed::encode(body, &rows);
}

fn run_record(run: &RunDescriptor) -> RunRecord {
    RunRecord {
        number: run.number.into(),
        leaves: run.leaves.into(),
        records: run.records.into(),
        epoch: run.sequence_max.epoch.0.into(),
        counter: run.sequence_max.counter.into(),
        height: run.height,
        rsvd33: [0; 2],
        top: Child::new(0, run.top),
    }
}

fn put<T: IntoBytes + Immutable>(body: &mut Vec<u8>, value: &T) {
    body.extend_from_slice(value.as_bytes());
}

fn length(length: usize) -> U32 {
    U32::new(u32::try_from(length).expect("a root has less than 4 GiB"))
}

impl Head {
    /// The one place where a root is believed. `payload` may have padding behind it.
    pub(crate) fn read(payload: &[u8]) -> Result<Self, FormatError> {
        let (header, rest) = RootHeader::read_from_prefix(payload).map_err(|_| FormatError::Length {
            expected: size_of::<RootHeader>(),
            found: payload.len(),
        })?;
        if header.magic != ROOT_MAGIC {
            return Err(FormatError::Magic);
        }
        if header.header_crc.get() != crc32c(&payload[..140]) {
            return Err(FormatError::HeaderChecksum);
        }
        if header.version.get() != ROOT_VERSION {
            return Err(FormatError::Version(header.version.get()));
        }
        let inline_bytes = header.inline_bytes.get() as usize;
        let inline = rest.get(..inline_bytes).ok_or(FormatError::Length {
            expected: inline_bytes,
            found: rest.len(),
        })?;
        if header.inline_crc.get() != crc32c(inline) {
            return Err(FormatError::BodyChecksum);
        }
        let table_blocks = header.table_blocks.get() as usize;
        let body_bytes = header.body_bytes.get() as usize;
        let mut head = Self {
            header,
            identity: MapIdentity {
                volume: VolumeId(header.volume.get()),
                layer: LayerId(header.layer.get()),
            },
            body_bytes,
            spilled: None,
            inline: Vec::new(),
        };
        if table_blocks == 0 {
            head.inline = inline.to_vec();
            return Ok(head);
        }
        if body_bytes.div_ceil(PAGE_BODY_BYTES) != table_blocks {
            return Err(FormatError::Field("table_blocks"));
        }
        if header.table_run.get() >= RUNS {
            return Err(FormatError::Field("table_run"));
        }
        let mut input = Input(inline);
        let mut places = Vec::new();
        for _ in 0..table_blocks {
            places.push(input.place()?.1);
        }
        head.spilled = Some(Spilled {
            run: header.table_run.get(),
            places,
            bands: input.bands()?,
        });
        input.end()?;
        Ok(head)
    }
}

/// Reads the sections of a body.
pub(crate) fn decode_body(head: &Head, body: &[u8]) -> Result<Root, FormatError> {
    let header = &head.header;
    if body.len() != head.body_bytes {
        return Err(FormatError::Length {
            expected: head.body_bytes,
            found: body.len(),
        });
    }
    if header.body_crc.get() != crc32c(body) {
        return Err(FormatError::BodyChecksum);
    }
    let mut input = Input(body);
    let name_bytes = input.count(1)?;
    let name =
        String::from_utf8(input.bytes(name_bytes)?.to_vec()).map_err(|_| FormatError::Field("name"))?;
    let mut layers = Vec::new();
    for _ in 0..input.count(size_of::<U64>())? {
        layers.push(LayerId(input.take::<U64>()?.get()));
    }
    let mut ended = Vec::new();
    for _ in 0..input.count(size_of::<EndedRecord>())? {
        let record = input.take::<EndedRecord>()?;
        ended.push((Epoch(record.epoch.get()), StripeNumber(record.stripe.get())));
    }
    let bands = input.bands()?;
    let mut runs = Vec::new();
    for _ in 0..input.count(size_of::<RunRecord>())? {
        runs.push(RunRoot {
            run: input.run()?,
            page_counts: input.counts(BAND_BLOCKS_MAX)?,
        });
    }
    let mut moved = Vec::new();
    for _ in 0..input.count(size_of::<Child>())? {
        moved.push(input.place()?);
    }
    let record_counts = input.counts(BAND_BLOCKS_MAX * u64::from(RUNS))?;
    input.end()?;
    if header.run_next.get() >= RUNS {
        return Err(FormatError::Field("run_next"));
    }
    Ok(Root {
        cluster: ClusterId(header.cluster),
        volume: head.identity.volume,
        name,
        size_bytes: header.size_bytes.get(),
        layer: head.identity.layer,
        layers,
        geometry: Geometry::new(header.k, header.m).ok_or(FormatError::Field("k, m"))?,
        epoch: Epoch(header.epoch.get()),
        root_version: header.root_version.get(),
        counter_next: header.counter_next.get(),
        stripe_next: StripeNumber(header.stripe_next.get()),
        complete: StripeNumber(header.complete.get()),
        ended,
        bands,
        map: MapRoot {
            runs,
            moved,
            record_counts,
            run_next: header.run_next.get(),
        },
    })
}

/// What is left to read of a section list.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(FormatError::Length {
            expected: count,
            found: self.0.len(),
        })?;
        self.0 = rest;
        Ok(taken)
    }

    fn take<T: FromBytes>(&mut self) -> Result<T, FormatError> {
        let bytes = self.bytes(size_of::<T>())?;
        T::read_from_bytes(bytes).map_err(|_| FormatError::Field("section"))
    }

    /// A count of items of at least `item_bytes` each, as many as can be there.
    fn count(&mut self, item_bytes: usize) -> Result<usize, FormatError> {
        let count = self.take::<U32>()?.get() as usize;
        let expected = count.saturating_mul(item_bytes);
        if expected > self.0.len() {
            return Err(FormatError::Length {
                expected,
                found: self.0.len(),
            });
        }
        Ok(count)
    }

    fn end(&self) -> Result<(), FormatError> {
        match self.0 {
            [] => Ok(()),
            rest => Err(FormatError::Length {
                expected: 0,
                found: rest.len(),
            }),
        }
    }

    fn place(&mut self) -> Result<(Lba, MapEntry), FormatError> {
        let child = self.take::<Child>()?;
        let place = child.place().ok_or(FormatError::Field("w"))?;
        Ok((Lba(child.lba()), place))
    }

    /// In ascending order, with the chunks of each.
    fn bands(&mut self) -> Result<Vec<RootBand>, FormatError> {
        let mut bands: Vec<RootBand> = Vec::new();
        for row in Table::take(&mut self.0)? {
            let band = band_of(row)?;
            if bands.last().is_some_and(|last| last.band.id >= band.band.id) {
                return Err(FormatError::Field("band"));
            }
            bands.push(band);
        }
        let mut chunks = Table::<2>::take(&mut self.0)?;
        let columns: usize = bands.iter().map(|band| usize::from(band.band.geometry.n())).sum();
        if chunks.len() != columns {
            return Err(FormatError::Field("columns"));
        }
        for RootBand { band, .. } in &mut bands {
            for [drive, offset_mib] in chunks.by_ref().take(band.geometry.n().into()) {
                band.columns.push(ChunkAddress {
                    drive: DriveId(narrow(drive, "drive")?),
                    offset_mib: narrow(offset_mib, "offset_mib")?,
                });
            }
        }
        Ok(bands)
    }

    fn run(&mut self) -> Result<RunDescriptor, FormatError> {
        let record = self.take::<RunRecord>()?;
        if record.height > INDEX_LEVEL_MAX {
            return Err(FormatError::Field("height"));
        }
        if record.number.get() >= RUNS {
            return Err(FormatError::Field("number"));
        }
        if !(1..POSITIONS).contains(&record.leaves.get()) {
            return Err(FormatError::Field("leaves"));
        }
        // Every leaf has a record, and room for so many.
        let leaves = u64::from(record.leaves.get());
        if !(leaves..=leaves * LEAF_RECORDS_MAX as u64).contains(&record.records.get()) {
            return Err(FormatError::Field("records"));
        }
        Ok(RunDescriptor {
            number: record.number.get(),
            height: record.height,
            top: record.top.place().ok_or(FormatError::Field("w"))?,
            leaves: record.leaves.get(),
            records: record.records.get(),
            sequence_max: Sequence {
                epoch: Epoch(record.epoch.get()),
                counter: record.counter.get(),
            },
        })
    }

    /// In ascending order of bands, each from 1 to `count_max`: so that no sum of them overflows.
    fn counts(&mut self, count_max: u64) -> Result<Vec<(BandId, u64)>, FormatError> {
        let mut counts: Vec<(BandId, u64)> = Vec::new();
        for [band, count] in Table::take(&mut self.0)? {
            let band = BandId(band);
            if counts.last().is_some_and(|(last, _)| *last >= band) {
                return Err(FormatError::Field("band of a count"));
            }
            if !(1..=count_max).contains(&count) {
                return Err(FormatError::Field("count"));
            }
            counts.push((band, count));
        }
        Ok(counts)
    }
}
