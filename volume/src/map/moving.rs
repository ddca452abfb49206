//! Map blocks as compaction meets them: in use or not, and where they lie now.

use weft_proto::units::Lba;

use super::PageMap;
use super::address::PageId;
use super::run::{self, RunDescriptor};
use super::store::MapError;
use crate::entry::MapEntry;

/// Whether a map block found in a band is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// The map refers to this copy: move it before the band is freed.
    Live,
    /// Nothing refers to it.
    Dead,
    /// It may belong to a run that is being written. The band cannot be evacuated until that is done.
    Pending,
}

impl PageMap {
    /// Whether the map block `lba` found at `place` is in use.
    pub async fn page_state(&self, lba: Lba, place: &MapEntry) -> Result<PageState, MapError> {
        let Some(id) = PageId::from_lba(lba) else {
            return Ok(PageState::Dead);
        };
        loop {
            if self.unfinished.borrow().contains(&id.run) {
                return Ok(PageState::Pending);
            }
            let Some(run) = self.run(id.run) else {
                return Ok(PageState::Dead);
            };
            let layout = self.pages.layout();
            match self.place_of(&run.descriptor, id).await {
                Ok(Some(found)) if found.same_place(place) && found.sequence == place.sequence => {
                    return Ok(PageState::Live);
                }
                Ok(_) => return Ok(PageState::Dead),
                Err(_) if self.pages.layout() != layout => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Enters a copy of the map block that [`PageMap::page_state`] found live at `expected`. `false` when its
    /// run was merged away, or the block moved meanwhile or may have: the copy is then garbage, and the band keeps its
    /// reference if it had one.
    pub fn relocate_page(&self, lba: Lba, expected: &MapEntry, copy: MapEntry) -> bool {
        let Some((id, run)) = PageId::from_lba(lba).and_then(|id| Some((id, self.run(id.run)?))) else {
            return false;
        };
        // Where the index was rewritten, no line in the table of moved blocks does not mean that the block never moved.
        let stands = match self.pages.moved_to(id) {
            Some(place) => place == *expected,
            None => !run.folded.get() || self.place_cached(&run.descriptor, id) == Some(*expected),
        };
        if !stands {
            return false;
        }
        self.pages.set_moved(id, copy);
        let mut counts = run.page_counts.borrow_mut();
        counts.subtract(expected.band, 1);
        counts.add(copy.band, 1);
        true
    }

    /// Where `id` lies now, if the cache knows.
    fn place_cached(&self, run: &RunDescriptor, id: PageId) -> Option<MapEntry> {
        let mut at = run.top_id();
        let mut place = run.top;
        while at.level > id.level {
            let page = self.pages.cached(at)?;
            let slot = run::slot_towards(at, id).filter(|slot| *slot < page.children().len())?;
            (at, place) = run::child(at, slot, &page).ok()?;
        }
        (at == id).then(|| self.pages.place(id, place))
    }

    /// Where `id` lies now; `None` when the run has no such block.
    pub(crate) async fn place_of(
        &self,
        run: &RunDescriptor,
        id: PageId,
    ) -> Result<Option<MapEntry>, MapError> {
        let mut at = run.top_id();
        let mut place = run.top;
        if id.level > at.level {
            return Ok(None);
        }
        while at.level > id.level {
            let page = self.pages.page(at, place).await?;
            let Some(slot) = run::slot_towards(at, id).filter(|slot| *slot < page.children().len()) else {
                return Ok(None);
            };
            (at, place) = run::child(at, slot, &page)?;
        }
        Ok((at == id).then(|| self.pages.place(id, place)))
    }
}
