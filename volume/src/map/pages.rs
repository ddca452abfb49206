//! Map blocks as the map reads them: through the cache, at the place where they lie now.
//!
//! A pointer in an index block says where a child was written. Compaction may have moved the child since; the
//! table of moved blocks says so and wins. The table is part of every root and shrinks when runs are merged
//! away or their index is rewritten.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, Shared};

use crate::entry::MapEntry;

use super::address::PageId;
use super::cache::{Cache, CacheStats};
use super::format::{MapIdentity, Page, damaged};
use super::store::{MapError, PageStore};

type Reading = Shared<LocalBoxFuture<'static, Result<Page, MapError>>>;

/// Where map blocks are read from.
pub(crate) struct Pages {
    pub(crate) identity: MapIdentity,
    pub(crate) store: Rc<dyn PageStore>,
    cache: RefCell<Cache>,
    /// Reads in flight, so that many lookups of one block are one read.
    reading: RefCell<HashMap<PageId, Reading>>,
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

    pub(crate) fn cache_stats(&self) -> CacheStats {
        self.cache.borrow().stats()
    }

    /// The block, read if need be and kept in the cache.
    pub(crate) async fn page(self: &Rc<Self>, id: PageId, place: MapEntry) -> Result<Page, MapError> {
        if let Some(page) = self.cached(id) {
            return Ok(page);
        }
        let found = self.reading.borrow().get(&id).cloned();
        let reading = found.unwrap_or_else(|| {
            let pages = Rc::clone(self);
            let reading = async move {
                let layout = pages.layout.get();
                let result = pages.read(id, place).await.map(|page| page.kept());
                pages.reading.borrow_mut().remove(&id);
                // An index block that was rewritten meanwhile must not come back into the cache.
                if let Ok(page) = &result
                    && pages.layout.get() == layout
                {
                    pages.cache.borrow_mut().insert(id, page.clone());
                }
                result
            };
            let reading = reading.boxed_local().shared();
            self.reading.borrow_mut().insert(id, reading.clone());
            reading
        });
        reading.await
    }

    /// The block, past the cache: for a merge, which reads every block once.
    pub(crate) async fn read(&self, id: PageId, place: MapEntry) -> Result<Page, MapError> {
        loop {
            let place = self.place(id, place);
            match self.store.read(id.lba(), place).await {
                Ok(bytes) => {
                    return Page::read(bytes, self.identity, id).map_err(|reason| damaged(id, reason));
                }
                // The block moved while it was read, and its old place may be gone.
                Err(_) if self.place(id, place) != place => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
