//! A page: a leaf or an index block that has been checked, whichever its level says.

use bytes::Bytes;

use super::address::PageId;
use super::block::{FormatError, MapIdentity, check};
use super::index::{Child, Index};
use super::leaf::Leaf;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) enum Page {
    Leaf(Leaf),
    Index(Index),
}

impl Page {
    /// Checks `bytes` to be the block `id` of `identity`.
    pub(crate) fn read(bytes: Bytes, identity: MapIdentity, id: PageId) -> Result<Self, FormatError> {
        let count = check(&bytes, identity, id)?;
        match id.level {
            0 => Leaf::read(bytes, count).map(Self::Leaf),
            _ => Index::read(bytes, count).map(Self::Index),
        }
    }

    /// The same in memory of its own: what was lent may be a small part of a receive buffer, all of which it keeps alive.
    pub(crate) fn kept(&self) -> Self {
        match self {
            Self::Leaf(leaf) => Self::Leaf(leaf.kept()),
            Self::Index(index) => Self::Index(index.kept()),
        }
    }

    /// The children of an index block; a leaf has none.
    pub(crate) fn children(&self) -> &[Child] {
        match self {
            Self::Leaf(_) => &[],
            Self::Index(index) => index.children(),
        }
    }
}
