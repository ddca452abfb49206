//! The page map's blocks, as ordinary blocks of internal stripes.

use std::rc::Rc;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use weft_block::BlockError;
use weft_proto::units::Lba;

use super::work::{BlockWork, PageAppend, Target, Work};
use super::{Core, WeakCore};
use crate::entry::MapEntry;
use crate::format::checksum::block_crc;
use crate::map::{MapBlock, PageStore};
use crate::seams::BandPurpose;

impl PageStore for WeakCore {
    fn append(&self, blocks: Vec<MapBlock>) -> LocalBoxFuture<'static, Result<Vec<MapEntry>, BlockError>> {
        let Some(core) = self.0.upgrade() else {
            return std::future::ready(Err(BlockError::NotReady)).boxed_local();
        };
        let append = PageAppend::new(blocks.len());
        for (index, block) in blocks.into_iter().enumerate() {
            let sequence = core.next_sequence();
            let work = BlockWork {
                lba: block.lba,
                sequence,
                crc: block_crc(core.volume, block.lba, sequence, &block.data),
                data: block.data,
                target: Target::Page(Rc::clone(&append), index),
                was_in: Vec::new(),
            };
            core.enqueue(BandPurpose::Internal, Work::Block(work));
        }
        append.reply.wait().boxed_local()
    }

    fn read(&self, lba: Lba, place: MapEntry) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
        let Some(core) = self.0.upgrade() else {
            return std::future::ready(Err(BlockError::NotReady)).boxed_local();
        };
        async move {
            core.read_entry(lba, place)
                .await
                .map_err(|error| error.to_block(lba))
        }
        .boxed_local()
    }

    fn read_around(&self, lba: Lba, place: MapEntry) -> LocalBoxFuture<'static, Result<Bytes, BlockError>> {
        let Some(core) = self.0.upgrade() else {
            return std::future::ready(Err(BlockError::NotReady)).boxed_local();
        };
        async move {
            core.read_around(lba, place)
                .await
                .map_err(|error| error.to_block(lba))
        }
        .boxed_local()
    }
}

impl Core {
    /// The store handle that the page map keeps.
    pub(crate) fn page_store(self: &Rc<Self>) -> Rc<dyn PageStore> {
        Rc::new(WeakCore(Rc::downgrade(self)))
    }
}
