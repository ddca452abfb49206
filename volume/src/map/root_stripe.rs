//! A root as the payload of a stripe: a header, then either the whole body, or, when that is longer than the engine wants in one
//! stripe, pointers to table blocks that hold the body, and the bands these lie in. `docs/format/checkpoint.md` has the byte tables.

use bytes::Bytes;
use weft_proto::units::BLOCK_BYTES;

use crate::entry::MapEntry;

use super::PageMap;
use super::address::{PageId, TABLE_LEVEL};
use super::block::{FormatError, MapIdentity, PAGE_BODY_BYTES, encode_table, read_table};
use super::root::{Root, RootBand, Spilled};
use super::root_format::{self, Head};
use super::store::{MapBlock, MapError, PageStore};

impl Root {
    /// Lays the root out as whole blocks for the payload of a stripe, at most `blocks_max` of them. What does not fit is
    /// appended through the map's store first.
    pub async fn write(mut self, map: &PageMap, blocks_max: usize) -> Result<Vec<Bytes>, MapError> {
        let tables_run = map.next_run()?;
        self.map.run_next = map.run_next.get();
        let body = root_format::encode_body(&self);
        let whole = root_format::encode_head(&self, &body, None);
        if whole.len() <= blocks_max * BLOCK_BYTES {
            return Ok(blocks(whole));
        }
        let mut places = Vec::new();
        for (batch_index, batch) in body
            .chunks(PAGE_BODY_BYTES * super::writer::APPEND_BLOCKS)
            .enumerate()
        {
            let first = batch_index * super::writer::APPEND_BLOCKS;
            let batch = batch.chunks(PAGE_BODY_BYTES).enumerate().map(|(index, part)| {
                let id = table_id(tables_run, first + index)?;
                Ok(MapBlock {
                    lba: id.lba(),
                    data: encode_table(self.identity(), id, part),
                })
            });
            let batch = batch.collect::<Result<Vec<_>, MapError>>()?;
            places.extend(map.pages.store.append(batch).await?);
        }
        let spilled = Spilled {
            run: tables_run,
            bands: self.bands_of(&places),
            places,
        };
        let head = root_format::encode_head(&self, &body, Some(&spilled));
        if head.len() > blocks_max * BLOCK_BYTES {
            return Err(MapError::RootTooLarge { bytes: body.len() });
        }
        Ok(blocks(head))
    }

    /// The listed bands that `places` lie in.
    fn bands_of(&self, places: &[MapEntry]) -> Vec<RootBand> {
        let mut ids: Vec<_> = places.iter().map(|place| place.band).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.into_iter()
            .filter_map(|id| self.bands.iter().find(|band| band.band.id == id).cloned())
            .collect()
    }
}

/// A root's own stripe, checked; its body may lie elsewhere.
#[derive(Clone, Debug)]
pub struct RootHead {
    head: Head,
}

impl RootHead {
    /// Checks the payload of a root's stripe. `identity` is `None` only where drives alone are known.
    pub fn read(payload: &[u8], identity: Option<MapIdentity>) -> Result<Self, MapError> {
        let head = Head::read(payload).map_err(MapError::Root)?;
        if identity.is_some_and(|identity| identity != head.identity) {
            return Err(MapError::Root(FormatError::Identity));
        }
        Ok(Self { head })
    }

    /// Whose root it is.
    #[must_use]
    pub fn identity(&self) -> MapIdentity {
        self.head.identity
    }

    /// The bands one has to know to read the body: empty when the stripe holds it all. A band granted after the
    /// root was captured is missing here, and known to the metadata service.
    #[must_use]
    pub fn bands(&self) -> &[RootBand] {
        self.head.spilled.as_ref().map_or(&[], |spilled| &spilled.bands)
    }

    /// Reads what the stripe does not hold, and answers the root.
    pub async fn load(self, store: &dyn PageStore) -> Result<Root, MapError> {
        let Some(spilled) = &self.head.spilled else {
            return root_format::decode_body(&self.head, &self.head.inline).map_err(MapError::Root);
        };
        let mut body = Vec::with_capacity(self.head.body_bytes);
        for (index, place) in spilled.places.iter().enumerate() {
            let id = table_id(spilled.run, index)?;
            let block = store.read(id.lba(), *place).await?;
            let part =
                read_table(&block, self.head.identity, id).map_err(|reason| MapError::damaged(id, reason))?;
            body.extend_from_slice(&part);
        }
        root_format::decode_body(&self.head, &body).map_err(MapError::Root)
    }
}

fn table_id(run: u32, index: usize) -> Result<PageId, MapError> {
    Ok(PageId {
        run,
        level: TABLE_LEVEL,
        position: u32::try_from(index).map_err(|_| MapError::Exhausted)?,
    })
}

/// Cuts bytes into zero-padded blocks.
fn blocks(mut bytes: Vec<u8>) -> Vec<Bytes> {
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    let bytes = Bytes::from(bytes);
    (0..bytes.len())
        .step_by(BLOCK_BYTES)
        .map(|start| bytes.slice(start..start + BLOCK_BYTES))
        .collect()
}
