//! Writing the places of moved map blocks into their index blocks, so that the table of moved blocks, which is in memory and in
//! every root, stays short.
//!
//! An index block is rewritten under its own LBA; the new version is then itself a moved block, one level up: a
//! step turns up to 89 moved blocks into one. The old version and the old places stay as they are, so a root that
//! refers to them stays good.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::entry::MapEntry;

use super::address::PageId;
use super::index::{CHILDREN_PER_PAGE, Child, Index};
use super::merge::Merge;
use super::page::Page;
use super::store::{MapBlock, MapError};
use super::{PageMap, Run, run};

/// The index block above `id`.
fn parent(id: PageId) -> PageId {
    PageId {
        level: id.level + 1,
        position: id.position / CHILDREN_PER_PAGE as u32,
        ..id
    }
}

impl PageMap {
    /// Rewrites up to `blocks` index blocks, those with the most moved children first, if there are more than `keep`
    /// moved blocks. Answers how many it rewrote. `merging` is the merge that waits for its next step: its inputs are left
    /// alone, because it has read a part of their index already.
    pub(crate) async fn fold_moved(
        &self,
        merging: Option<&Merge>,
        blocks: usize,
        keep: usize,
    ) -> Result<usize, MapError> {
        let moved = self.pages.moved();
        if moved.len() <= keep {
            return Ok(0);
        }
        let mut by_parent: BTreeMap<PageId, Vec<(PageId, MapEntry)>> = BTreeMap::new();
        for (id, place) in moved {
            // The place of a run's top stands in the root itself.
            let below_top = self
                .run(id.run)
                .is_some_and(|run| id.level < run.descriptor.height);
            if below_top && !merging.is_some_and(|merge| merge.reads(id.run)) {
                by_parent.entry(parent(id)).or_default().push((id, place));
            }
        }
        let mut parents: Vec<_> = by_parent.into_iter().collect();
        parents.sort_by_key(|(_, children)| std::cmp::Reverse(children.len()));
        let mut rewritten = 0;
        for (id, children) in parents.into_iter().take(blocks) {
            rewritten += usize::from(self.fold(id, &children).await?);
        }
        Ok(rewritten)
    }

    /// Rewrites the index block `id` with the present places of `children`. `false` when it changed meanwhile.
    async fn fold(&self, id: PageId, children: &[(PageId, MapEntry)]) -> Result<bool, MapError> {
        let Some(run) = self.run(id.run) else {
            return Ok(false);
        };
        let Some(old) = self.place_of(&run.descriptor, id).await? else {
            return Ok(false);
        };
        let page = self.pages.read(id, old).await?;
        let mut all = page.children().to_vec();
        for (child, place) in children {
            let slot = run::slot_towards(id, *child).filter(|slot| *slot < all.len());
            if let Some(slot) = slot {
                all[slot] = Child::new(all[slot].lba(), *place);
            }
        }
        let data = Index::encode(self.pages.identity, id, &all);
        let block = MapBlock {
            lba: id.lba(),
            data: data.clone(),
        };
        let places = self.pages.store.append(vec![block]).await?;
        let Some(new) = places.first().copied() else {
            return Ok(false);
        };
        let page =
            Page::read(data, self.pages.identity, id).map_err(|reason| MapError::damaged(id, reason))?;
        Ok(self.enter_folded(id, &run, old, new, page, children))
    }

    /// From here on the new version is the block, unless the run was merged away or the old version moved.
    fn enter_folded(
        &self,
        id: PageId,
        run: &Rc<Run>,
        old: MapEntry,
        new: MapEntry,
        page: Page,
        children: &[(PageId, MapEntry)],
    ) -> bool {
        if self.run(id.run).is_none() || self.pages.place(id, old) != old {
            return false;
        }
        self.pages.set_moved(id, new);
        self.pages.rewritten(id, page);
        for (child, place) in children {
            // One that moved again keeps its line in the table, which overrides the index.
            if self.pages.place(*child, *place) == *place {
                self.pages.clear_moved(*child);
            }
        }
        run.folded.set(true);
        let mut counts = run.page_counts.borrow_mut();
        counts.subtract(old.band, 1);
        counts.add(new.band, 1);
        true
    }
}
