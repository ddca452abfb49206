//! What a read has received so far.

use bytes::{Bytes, BytesMut};

/// Data of a read. One C2HData is lent as it was received; several are gathered.
#[derive(Debug)]
pub(super) enum Received {
    Lent(Bytes),
    Gathered(BytesMut),
}

impl Received {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Lent(data) => data.len(),
            Self::Gathered(data) => data.len(),
        }
    }

    pub(super) fn push(&mut self, piece: Bytes, bytes_max: u32) {
        match self {
            Self::Lent(data) if data.is_empty() => *data = piece,
            Self::Lent(data) => {
                let mut gathered = BytesMut::with_capacity(bytes_max as usize);
                gathered.extend_from_slice(data);
                gathered.extend_from_slice(&piece);
                *self = Self::Gathered(gathered);
            }
            Self::Gathered(data) => data.extend_from_slice(&piece),
        }
    }

    pub(super) fn into_bytes(self) -> Bytes {
        match self {
            Self::Lent(data) => data,
            Self::Gathered(data) => data.freeze(),
        }
    }
}
