//! The reservation table's file: what survives power loss.
//!
//! The file stands outside of the namespace, beside the drive; its owner chooses the path. It is replaced whole:
//! written to a temporary neighbour, synced, renamed, and the directory synced, so that a reader finds the old
//! table or the new one. A file that cannot be believed is an error, never an empty table: an empty table would let
//! every fenced host write again.
//!
//! All integers little-endian:
//!
//! ```text
//! offset  bytes
//!      0      8  magic "WEFTRSV\0"
//!      8      4  version, 1
//!     12      4  number of registrants
//!     16     16  UUID of the namespace
//!     32      4  generation
//!     36      1  persist through power loss, 0 or 1
//!     37      1  reservation type, 0 for none
//!     38      2  reserved, 0
//!     40     16  host identifier of the holder, 0 for none
//!     56      4  crc32c of the registrants
//!     60      4  crc32c of bytes 0 to 59
//!     64     24  each registrant: host identifier (16), key (8)
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::mem::offset_of;
use std::path::{Path, PathBuf};

use weft_proto::id::HostId;
use weft_proto::nvme::reservation::ReservationType;
use weft_proto::tcp::crc32c;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::{Held, REGISTRANTS_MAX, ReservationTable};

const MAGIC: [u8; 8] = *b"WEFTRSV\0";
const VERSION: u32 = 1;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    count: U32,
    namespace: [u8; 16],
    generation: U32,
    ptpl: u8,
    rtype: u8,
    rsvd38: U16,
    holder: [u8; 16],
    body_crc: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<Header>() == 64);
const _: () = assert!(offset_of!(Header, holder) == 40);
const _: () = assert!(offset_of!(Header, header_crc) == 60);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Entry {
    hostid: [u8; 16],
    key: U64,
}

const _: () = assert!(size_of::<Entry>() == 24);

/// Why a reservation file was not believed or not written.
#[derive(Debug, thiserror::Error)]
pub enum ReservationFileError {
    /// The operating system.
    #[error("reservation file {}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a reservation file, or a damaged one.
    #[error("reservation file {}: {what}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Bytes of a table. Without persistence only the fact of it is kept.
#[must_use]
pub fn encode(namespace: [u8; 16], table: &ReservationTable) -> Vec<u8> {
    let mut body = Vec::new();
    let held = table.held().filter(|_| table.ptpl());
    if table.ptpl() {
        for (&hostid, &key) in table.registrants() {
            body.extend_from_slice(
                Entry {
                    hostid: hostid.0,
                    key: U64::new(key),
                }
                .as_bytes(),
            );
        }
    }
    let mut header = Header {
        magic: MAGIC,
        version: U32::new(VERSION),
        count: U32::new((body.len() / size_of::<Entry>()) as u32),
        namespace,
        generation: U32::new(table.generation()),
        ptpl: u8::from(table.ptpl()),
        rtype: held.map_or(0, |held| held.rtype.to_wire()),
        rsvd38: U16::ZERO,
        holder: held.map_or([0; 16], |held| held.holder.0),
        body_crc: U32::new(crc32c(&body)),
        header_crc: U32::ZERO,
    };
    header.header_crc = U32::new(crc32c(&header.as_bytes()[..60]));
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(&body);
    bytes
}

/// The table in a file's bytes.
///
/// # Errors
/// What is wrong with them.
pub fn decode(namespace: [u8; 16], bytes: &[u8]) -> Result<ReservationTable, &'static str> {
    let (header, body) = Header::read_from_prefix(bytes).map_err(|_| "shorter than its header")?;
    if header.magic != MAGIC {
        return Err("not a reservation file");
    }
    if header.header_crc.get() != crc32c(&bytes[..60]) {
        return Err("header checksum");
    }
    if header.version.get() != VERSION {
        return Err("unknown version");
    }
    if header.namespace != namespace {
        return Err("of another namespace");
    }
    let count = header.count.get() as usize;
    if count > REGISTRANTS_MAX || body.len() != count * size_of::<Entry>() {
        return Err("length differs from the number of registrants");
    }
    if header.body_crc.get() != crc32c(body) {
        return Err("checksum of the registrants");
    }
    if header.ptpl == 0 {
        return Ok(ReservationTable::new());
    }
    let mut registrants = BTreeMap::new();
    for entry in body.chunks_exact(size_of::<Entry>()) {
        let entry = Entry::read_from_bytes(entry).map_err(|_| "length of a registrant")?;
        registrants.insert(HostId(entry.hostid), entry.key.get());
    }
    let held = match header.rtype {
        0 => None,
        wire => {
            let rtype = ReservationType::from_wire(wire).ok_or("reservation type")?;
            Some(Held {
                rtype,
                holder: HostId(header.holder),
            })
        }
    };
    ReservationTable::restore(header.generation.get(), registrants, held).ok_or("contradicts itself")
}

/// Reads the table at `path`; an empty one if there is no file, as for a drive that was never reserved.
///
/// # Errors
/// [`ReservationFileError`] for a file that cannot be read or believed.
pub fn load(path: &Path, namespace: [u8; 16]) -> Result<ReservationTable, ReservationFileError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ReservationTable::new()),
        Err(source) => {
            return Err(ReservationFileError::Io {
                path: path.to_owned(),
                source,
            });
        }
    };
    decode(namespace, &bytes).map_err(|what| ReservationFileError::Damaged {
        path: path.to_owned(),
        what,
    })
}

/// Replaces the file at `path` durably. Blocks.
///
/// # Errors
/// [`ReservationFileError`]; the old file may then still be the one that is found.
pub fn store(path: &Path, bytes: &[u8]) -> Result<(), ReservationFileError> {
    let write = || {
        let temporary = path.with_extension("tmp");
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)?.sync_all()
    };
    write().map_err(|source| ReservationFileError::Io {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use weft_proto::nvme::reservation::{PersistChange, RegisterAction};

    use super::*;

    const NAMESPACE: [u8; 16] = [0x77; 16];

    fn table() -> ReservationTable {
        let mut table = ReservationTable::new();
        table
            .register(
                HostId([1; 16]),
                RegisterAction::Register,
                false,
                0,
                0x0102,
                PersistChange::Set,
            )
            .unwrap();
        table
            .acquire(
                HostId([1; 16]),
                0x0102,
                ReservationType::WriteExclusiveAllRegistrants,
            )
            .unwrap();
        table
    }

    #[test]
    fn the_bytes_are_those_of_the_module_page() {
        let bytes = encode(NAMESPACE, &table());
        let mut expected = b"WEFTRSV\0".to_vec();
        expected.extend([1, 0, 0, 0, 1, 0, 0, 0]);
        expected.extend([0x77; 16]);
        expected.extend([1, 0, 0, 0, 1, 5, 0, 0]);
        expected.extend([1; 16]);
        assert_eq!(bytes[..56], expected);
        let mut body = vec![1; 16];
        body.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[64..], body);
        assert_eq!(bytes[56..60], crc32c(&body).to_le_bytes());
        assert_eq!(bytes[60..64], crc32c(&bytes[..60]).to_le_bytes());
        assert_eq!(decode(NAMESPACE, &bytes), Ok(table()));
    }

    #[test]
    fn no_damaged_file_is_believed() {
        let bytes = encode(NAMESPACE, &table());
        for len in 0..bytes.len() {
            assert!(decode(NAMESPACE, &bytes[..len]).is_err(), "cut to {len}");
        }
        for index in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[index] ^= 0x10;
            assert!(decode(NAMESPACE, &flipped).is_err(), "byte {index} flipped");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(decode(NAMESPACE, &longer).is_err());
        assert_eq!(decode([0; 16], &bytes), Err("of another namespace"));
    }

    #[test]
    fn a_table_that_does_not_persist_is_empty_after_power_loss() {
        let mut table = table();
        table.set_ptpl(false);
        assert_eq!(
            decode(NAMESPACE, &encode(NAMESPACE, &table)),
            Ok(ReservationTable::new())
        );
    }

    #[test]
    fn a_stored_table_is_loaded_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("drive.reservations");
        assert_eq!(load(&path, NAMESPACE).unwrap(), ReservationTable::new());
        store(&path, &encode(NAMESPACE, &table())).unwrap();
        assert_eq!(load(&path, NAMESPACE).unwrap(), table());
        fs::write(&path, b"WEFTRSV").unwrap();
        assert!(matches!(
            load(&path, NAMESPACE),
            Err(ReservationFileError::Damaged { .. })
        ));
    }
}
