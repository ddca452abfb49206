//! Map blocks as the map reads them: through the cache, at the place where they lie now.
//!
//! A pointer in an index block says where a child was written. Compaction may have moved the child since; the
//! table of moved blocks says so and wins. The table is part of every root and shrinks when runs are merged
//! away or their index is rewritten.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, Shared, WeakShared};

use crate::entry::MapEntry;

use super::address::PageId;
use super::block::{FormatError, MapIdentity};
use super::cache::{Cache, CacheStats};
use super::page::Page;
use super::store::{MapError, PageStore};

type ReadPage = LocalBoxFuture<'static, Result<Page, MapError>>;

/// A read in flight, until it is over or nobody waits for it any more.
struct UnderWay {
    pages: Rc<Pages>,
    id: PageId,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.pages.reading.borrow_mut().remove(&self.id);
    }
}

/// Where map blocks are read from.
pub(crate) struct Pages {
    pub(crate) identity: MapIdentity,
    pub(crate) store: Rc<dyn PageStore>,
    cache: RefCell<Cache>,
    /// Reads in flight, so that many lookups of one block are one read. The lookups own it: it refers to this, so one that nobody
    /// waits for any more would keep the whole map in memory.
    reading: RefCell<BTreeMap<PageId, WeakShared<ReadPage>>>,
    moved: RefCell<BTreeMap<PageId, MapEntry>>,
    /// Counts the changes after which a block read before may point to a place that is gone.
    layout: Cell<u64>,
}

impl Pages {
    pub(crate) fn new(identity: MapIdentity, store: Rc<dyn PageStore>, cache_bytes: usize) -> Self {
        Self {
            identity,
            store,
            cache: RefCell::new(Cache::new(cache_bytes)),
            reading: RefCell::default(),
            moved: RefCell::default(),
            layout: Cell::new(0),
        }
    }

    /// Where `id`, written at `place`, lies now.
    pub(crate) fn place(&self, id: PageId, place: MapEntry) -> MapEntry {
        self.moved.borrow().get(&id).copied().unwrap_or(place)
    }

    pub(crate) fn moved_to(&self, id: PageId) -> Option<MapEntry> {
        self.moved.borrow().get(&id).copied()
    }

    pub(crate) fn set_moved(&self, id: PageId, place: MapEntry) {
        self.moved.borrow_mut().insert(id, place);
    }

    pub(crate) fn clear_moved(&self, id: PageId) {
        self.moved.borrow_mut().remove(&id);
    }

    pub(crate) fn moved(&self) -> Vec<(PageId, MapEntry)> {
        self.moved
            .borrow()
            .iter()
            .map(|(id, place)| (*id, *place))
            .collect()
    }

    /// Counts retired runs and rewritten index blocks. A lookup that failed starts again when it has changed.
    pub(crate) fn layout(&self) -> u64 {
        self.layout.get()
    }

    /// Forgets a run that is no longer part of the map.
    pub(crate) fn retire(&self, run: u32) {
        self.layout.set(self.layout.get() + 1);
        self.moved.borrow_mut().retain(|id, _| id.run != run);
        self.cache.borrow_mut().remove_run(run);
    }

    /// The block, if it is in the cache.
    pub(crate) fn cached(&self, id: PageId) -> Option<Page> {
        self.cache.borrow_mut().find(id)
    }

    /// Puts a new version of an index block, which names the places of its children as they are now, in
    /// place of the old one.
    pub(crate) fn rewritten(&self, id: PageId, page: Page) {
        self.layout.set(self.layout.get() + 1);
        self.cache.borrow_mut().insert(id, page);
        self.reading.borrow_mut().remove(&id);
    }

    pub(crate) fn set_cache_limit(&self, bytes_max: usize) {
        self.cache.borrow_mut().set_limit(bytes_max);
    }

    pub(crate) fn cached_bytes(&self) -> usize {
        self.cache.borrow().resident_bytes()
    }

    pub(crate) fn cache_stats(&self) -> CacheStats {
        self.cache.borrow().stats()
    }

    /// The block, read if need be and kept in the cache.
    pub(crate) async fn page(self: &Rc<Self>, id: PageId, place: MapEntry) -> Result<Page, MapError> {
        if let Some(page) = self.cached(id) {
            return Ok(page);
        }
        let found = self.reading.borrow().get(&id).and_then(WeakShared::upgrade);
        let reading = found.unwrap_or_else(|| self.begin_reading(id, place));
        reading.await
    }

    fn begin_reading(self: &Rc<Self>, id: PageId, place: MapEntry) -> Shared<ReadPage> {
        let under_way = UnderWay {
            pages: Rc::clone(self),
            id,
        };
        let reading = async move {
            let pages = &under_way.pages;
            let layout = pages.layout.get();
            let result = pages.read(id, place).await.map(|page| page.kept());
            // An index block that was rewritten meanwhile must not come back into the cache.
            if let Ok(page) = &result
                && pages.layout.get() == layout
            {
                pages.cache.borrow_mut().insert(id, page.clone());
            }
            result
        };
        let reading = reading.boxed_local().shared();
        let shared = reading.downgrade().expect("it was not polled yet");
        self.reading.borrow_mut().insert(id, shared);
        reading
    }

    /// The block, past the cache: for a merge, which reads every block once.
    pub(crate) async fn read(&self, id: PageId, place: MapEntry) -> Result<Page, MapError> {
        loop {
            let place = self.place(id, place);
            match self.store.read(id.lba(), place).await {
                Ok(bytes) => match Page::read(bytes, self.identity, id) {
                    Ok(page) => return Ok(page),
                    Err(FormatError::Identity) => {}
                    Err(reason) => return Err(MapError::damaged(id, reason)),
                },
                // The block moved while it was read, and its old place may be gone.
                Err(_) if self.place(id, place) != place => continue,
                Err(error) => return Err(error.into()),
            }
            match self.store.read_around(id.lba(), place).await {
                Ok(bytes) => {
                    return Page::read(bytes, self.identity, id)
                        .map_err(|reason| MapError::damaged(id, reason));
                }
                Err(_) if self.place(id, place) != place => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::FutureExt as _;
    use weft_block::BlockError;
    use weft_proto::id::{BandId, Epoch, LayerId, Sequence, VolumeId};
    use weft_proto::units::Lba;

    use super::*;
    use crate::entry::ColumnSet;
    use crate::format::checksum::block_crc;
    use crate::map::index::{Child, Index};
    use crate::map::{MapBlock, PageStore};

    const IDENTITY: MapIdentity = MapIdentity {
        volume: VolumeId(1),
        layer: LayerId(1),
    };

    /// A drive that put a block where another one belongs, and others from which that one can be computed.
    struct Misdirected {
        stands: Bytes,
        belongs: Bytes,
    }

    impl PageStore for Misdirected {
        fn append(
            &self,
            _blocks: Vec<MapBlock>,
        ) -> LocalBoxFuture<'static, Result<Vec<MapEntry>, BlockError>> {
            unreachable!("nothing is written")
        }

        fn read(&self, _lba: Lba, _place: MapEntry) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
            std::future::ready(Ok(self.stands.clone())).boxed_local()
        }

        fn read_around(
            &self,
            _lba: Lba,
            _place: MapEntry,
        ) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
            std::future::ready(Ok(self.belongs.clone())).boxed_local()
        }
    }

    /// Found by the simulator: seed 2006129 of its first form, a drive that misdirects writes in a volume of 4+2.
    #[test]
    fn a_map_block_of_another_run_in_its_place_is_read_around() {
        let id = |run| PageId {
            run,
            level: 1,
            position: 0,
        };
        let sequence = |counter| Sequence {
            epoch: Epoch(1),
            counter,
        };
        let place = |crc| MapEntry {
            band: BandId(1),
            row: 1,
            column: 0,
            start: 0,
            w: 1,
            skipped: ColumnSet::NONE,
            sequence: sequence(20),
            crc,
        };
        let children = [Child::new(3, place(9))];
        let page = |run| Index::encode(IDENTITY, id(run), &children);
        let crc = |bytes: &[u8]| block_crc(VolumeId(1), id(7).lba(), sequence(20), bytes);
        assert_ne!(page(6), page(7));
        // Both are closed by crc32c, header and records. Stripes of version 1 had the same checksum for both.
        assert_ne!(crc(&page(6)), crc(&page(7)));
        let store = Rc::new(Misdirected {
            stands: page(6),
            belongs: page(7),
        });
        let pages = Rc::new(Pages::new(IDENTITY, store, 1 << 20));
        let place = place(crc(&page(7)));
        let read = pages.page(id(7), place).now_or_never().expect("nothing waits");
        assert_eq!(read.map(|page| page.children().len()), Ok(1));
    }

    /// A drive whose answers never come.
    struct Silent;

    impl PageStore for Silent {
        fn append(
            &self,
            _blocks: Vec<MapBlock>,
        ) -> LocalBoxFuture<'static, Result<Vec<MapEntry>, BlockError>> {
            unreachable!("nothing is written")
        }

        fn read(&self, _lba: Lba, _place: MapEntry) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
            std::future::pending().boxed_local()
        }

        fn read_around(
            &self,
            _lba: Lba,
            _place: MapEntry,
        ) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
            std::future::pending().boxed_local()
        }
    }

    /// Found by the simulator: seed 126, in which an owner was fenced under a read of its map.
    #[test]
    fn a_read_that_nobody_waits_for_keeps_nothing_in_memory() {
        let pages = Rc::new(Pages::new(IDENTITY, Rc::new(Silent), 1 << 20));
        let place = MapEntry {
            band: BandId(1),
            row: 1,
            column: 0,
            start: 0,
            w: 1,
            skipped: ColumnSet::NONE,
            sequence: Sequence {
                epoch: Epoch(1),
                counter: 20,
            },
            crc: 9,
        };
        let id = |position| PageId {
            run: 1,
            level: 0,
            position,
        };
        for position in 0..3 {
            assert!(pages.page(id(position), place).now_or_never().is_none());
        }
        assert_eq!(pages.reading.borrow().len(), 0, "abandoned reads are forgotten");
        let left = Rc::downgrade(&pages);
        drop(pages);
        assert_eq!(left.strong_count(), 0, "and keep nothing");
    }
}
