//! A store in memory whose bands can be freed, and a way to run futures without a runtime.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use weft_block::BlockError;
use weft_proto::id::{BandId, Epoch, Sequence};
use weft_proto::units::Lba;

use crate::entry::{ColumnSet, MapEntry};
use crate::map::{MapBlock, PageStore};

/// Map blocks lie in bands from here on, so that a test tells them from user blocks.
pub(crate) const MAP_BANDS: u64 = 1_000_000;

type Place = (BandId, u32, u8);

fn place_of(entry: &MapEntry) -> Place {
    (entry.band, entry.row, entry.column)
}

/// Map blocks by place. Each append is one step of time, each read another.
#[derive(Default)]
pub(crate) struct MemoryStore {
    pub(crate) blocks: RefCell<BTreeMap<Place, (Lba, Sequence, Bytes)>>,
    pub(crate) band_blocks: Cell<u32>,
    band: Cell<u64>,
    used: Cell<u32>,
    counter: Cell<u64>,
    pub(crate) reads: Cell<u64>,
    /// Fails the appends to come, so many.
    pub(crate) fail_appends: Cell<u32>,
    receive_buffers: Arc<()>,
}

/// What a read is lent from: as of a remote drive, far larger than the block in it.
struct ReceiveBuffer {
    block: Bytes,
    _in_use: Arc<()>,
}

impl AsRef<[u8]> for ReceiveBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.block
    }
}

impl MemoryStore {
    pub(crate) fn new(band_blocks: u32) -> Rc<Self> {
        let store = Self::default();
        store.band_blocks.set(band_blocks);
        store.band.set(MAP_BANDS);
        Rc::new(store)
    }

    pub(crate) fn put(&self, lba: Lba, sequence: Option<Sequence>, data: Bytes) -> MapEntry {
        if self.used.get() == self.band_blocks.get() {
            self.seal();
        }
        let row = self.used.get();
        self.used.set(row + 1);
        self.counter.set(self.counter.get() + 1);
        let entry = MapEntry {
            band: BandId(self.band.get()),
            row,
            column: 1,
            start: 1,
            w: 1,
            skipped: ColumnSet::NONE,
            sequence: sequence.unwrap_or(Sequence {
                epoch: Epoch(99),
                counter: self.counter.get(),
            }),
            crc: crate::map::block::crc32c(&data),
        };
        let old = self
            .blocks
            .borrow_mut()
            .insert(place_of(&entry), (lba, entry.sequence, data));
        assert!(old.is_none(), "a row is written once");
        entry
    }

    /// Receive buffers that somebody keeps.
    pub(crate) fn receive_buffers(&self) -> usize {
        Arc::strong_count(&self.receive_buffers) - 1
    }

    /// Later blocks go to another band.
    pub(crate) fn seal(&self) {
        self.band.set(self.band.get() + 1);
        self.used.set(0);
    }

    pub(crate) fn open_band(&self) -> BandId {
        BandId(self.band.get())
    }

    pub(crate) fn bands(&self) -> Vec<BandId> {
        let mut bands: Vec<BandId> = self.blocks.borrow().keys().map(|place| place.0).collect();
        bands.dedup();
        bands
    }

    pub(crate) fn in_band(&self, band: BandId) -> Vec<(Lba, MapEntry, Bytes)> {
        let blocks = self.blocks.borrow();
        let blocks = blocks.iter().filter(|(place, _)| place.0 == band);
        blocks
            .map(|((band, row, column), (lba, sequence, data))| {
                let entry = MapEntry {
                    band: *band,
                    row: *row,
                    column: *column,
                    start: 1,
                    w: 1,
                    skipped: ColumnSet::NONE,
                    sequence: *sequence,
                    crc: crate::map::block::crc32c(data),
                };
                (*lba, entry, data.clone())
            })
            .collect()
    }

    pub(crate) fn free(&self, band: BandId) {
        self.blocks.borrow_mut().retain(|place, _| place.0 != band);
    }
}

impl MemoryStore {
    pub(crate) fn handle(self: &Rc<Self>) -> Rc<dyn PageStore> {
        Rc::new(Handle(Rc::clone(self)))
    }
}

/// What the map holds of the store.
pub(crate) struct Handle(pub(crate) Rc<MemoryStore>);

impl PageStore for Handle {
    fn append(&self, blocks: Vec<MapBlock>) -> LocalBoxFuture<'static, Result<Vec<MapEntry>, BlockError>> {
        let store = Rc::clone(&self.0);
        async move {
            pause().await;
            if store.fail_appends.get() > 0 {
                store.fail_appends.set(store.fail_appends.get() - 1);
                return Err(BlockError::CapacityExceeded);
            }
            Ok(blocks
                .into_iter()
                .map(|block| {
                    assert_eq!(block.data.len(), 4096);
                    store.put(block.lba, None, block.data)
                })
                .collect())
        }
        .boxed_local()
    }

    fn read(&self, lba: Lba, place: MapEntry) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
        let store = Rc::clone(&self.0);
        async move {
            pause().await;
            store.reads.set(store.reads.get() + 1);
            let blocks = store.blocks.borrow();
            match blocks.get(&place_of(&place)) {
                Some((found, sequence, data)) if *found == lba && *sequence == place.sequence => {
                    Ok(Bytes::from_owner(ReceiveBuffer {
                        block: data.clone(),
                        _in_use: Arc::clone(&store.receive_buffers),
                    }))
                }
                _ => Err(BlockError::Unrecovered { start: lba }),
            }
        }
        .boxed_local()
    }
}

/// Lets everything else run once.
pub(crate) async fn pause() {
    let mut paused = false;
    futures_util::future::poll_fn(|context| {
        if std::mem::replace(&mut paused, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Runs a future that needs nothing but to be polled.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(futures_util::task::noop_waker_ref());
    for _ in 0..10_000_000 {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
    panic!("the future does not end");
}
