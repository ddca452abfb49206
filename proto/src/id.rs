//! Identifiers. An integer that names something has a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! integer_id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

integer_id!(
    /// A server that runs an agent. Assigned by metadata, never reused.
    NodeId(u32), "n"
);
integer_id!(
    /// A drive of the cluster, local to a node or third-party. Assigned by metadata, never reused.
    DriveId(u32), "d"
);
integer_id!(
    /// A pool: a default k+m and the drive classes its bands may use.
    PoolId(u32), "p"
);
integer_id!(
    /// A volume. Assigned by metadata, never reused.
    VolumeId(u64), "v"
);
integer_id!(
    /// A layer: a set of bands with one page map. Never reused.
    LayerId(u64), "l"
);
integer_id!(
    /// A band, unique in the cluster and never reused, so that a late write is recognised by its header.
    BandId(u64), "b"
);
integer_id!(
    /// The ownership generation of a volume, granted by Raft and never reused. Epoch 0 is never granted.
    Epoch(u64), "e"
);
integer_id!(
    /// The version of the cluster map (nodes, drives, volumes). Counts changes.
    MapVersion(u64), "map"
);
integer_id!(
    /// One life of an agent process. Assigned by metadata, never reused.
    IncarnationId(u64), "i"
);
integer_id!(
    /// The number of a stripe within its volume's epoch, from 1. Apart from the sequences of its blocks.
    StripeNumber(u64), "s"
);

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                format_uuid(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidUuid;
            fn from_str(s: &str) -> Result<Self, InvalidUuid> {
                parse_uuid(s).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidUuid;
            fn try_from(s: String) -> Result<Self, InvalidUuid> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

uuid_id!(
    /// The cluster's identity, drawn at `weft init`; on every drive label and in every stripe header.
    ClusterId
);
uuid_id!(
    /// NVMe Host Identifier (HOSTID), 128 bits. Each incarnation draws its own, because NVMe checks
    /// reservations against it and never against the key (NVM Express Base, "Reservations").
    HostId
);
uuid_id!(
    /// A drive label's own identity, drawn when the label is written.
    DriveUuid
);

/// Text that is not a UUID in the 8-4-4-4-12 form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a UUID (expected xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx)")]
pub struct InvalidUuid(pub String);

fn format_uuid(bytes: &[u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            f.write_str("-")?;
        }
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}

fn parse_uuid(s: &str) -> Result<[u8; 16], InvalidUuid> {
    let invalid = || InvalidUuid(s.to_owned());
    let groups: Vec<&str> = s.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    if lengths != [8, 4, 4, 4, 12] || !s.is_ascii() {
        return Err(invalid());
    }
    let digits = groups.concat();
    let mut bytes = [0; 16];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).map_err(|_| invalid())?;
    }
    Ok(bytes)
}

/// The order of a block's versions: the highest sequence of an LBA wins, never the place or time of a copy.
/// Given to a block at its first write and kept for life. Never repeats within a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Sequence {
    /// Compared first.
    pub epoch: Epoch,
    /// Counts within the epoch, from 1.
    pub counter: u64,
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.counter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_survives_its_text() {
        let id = ClusterId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
        assert_eq!(id.to_string(), "00010203-0405-0607-0809-0a0b0c0d0eff");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn what_is_not_a_uuid_is_refused_by_name() {
        for text in [
            "",
            "0001",
            "00010203-0405-0607-0809-0a0b0c0d0efg",
            "00010203040506070809-0a0b-0c0d-0e-ff",
            "é0010203-0405-0607-0809-0a0b0c0d0ef",
        ] {
            assert_eq!(text.parse::<ClusterId>(), Err(InvalidUuid(text.into())));
        }
    }

    #[test]
    fn the_epoch_decides_before_the_counter() {
        let old = Sequence {
            epoch: Epoch(1),
            counter: 900,
        };
        let new = Sequence {
            epoch: Epoch(2),
            counter: 1,
        };
        assert!(new > old);
    }
}
