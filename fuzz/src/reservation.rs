//! The file that a drive's reservations are kept in.
//!
//! A table that is believed is the same after it has been written and read again, and answers every question a command
//! asks of it.

use std::collections::BTreeMap;

use weft_proto::id::HostId;
use weft_proto::nvme::reservation::{PersistChange, RegisterAction, ReservationType};
use weft_proto::tcp::crc32c;
use weft_target::reservation::file::{decode, encode};
use weft_target::reservation::table::{Held, ReservationTable};

use crate::input::Input;
use crate::memory::bounded;

const NAMESPACE: [u8; 16] = [0x77; 16];
const HEADER: usize = 64;
const ENTRY: usize = 24;

/// Makes the checksums and the number of registrants right.
fn repair(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().max(HEADER), 0);
    let whole = HEADER + (bytes.len() - HEADER) / ENTRY * ENTRY;
    bytes.truncate(whole);
    let count = ((whole - HEADER) / ENTRY) as u32;
    bytes[12..16].copy_from_slice(&count.to_le_bytes());
    let body = crc32c(&bytes[HEADER..]);
    bytes[56..60].copy_from_slice(&body.to_le_bytes());
    let header = crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&header.to_le_bytes());
}

/// Byte 0: whether checksums are made right. Then the file.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let mut bytes = input.rest().to_vec();
    if flags & 1 != 0 {
        repair(&mut bytes);
    }
    bounded(16 * bytes.len() + (64 << 10), || {
        let Ok(mut table) = decode(NAMESPACE, &bytes) else {
            return;
        };
        let again = encode(NAMESPACE, &table);
        assert_eq!(decode(NAMESPACE, &again), Ok(table.clone()));
        let host = HostId([1; 16]);
        let key = table.registrants().get(&host).copied().unwrap_or(0);
        let _ = table.register(host, RegisterAction::Register, true, key, 5, PersistChange::Set);
        let _ = table.acquire(host, 5, ReservationType::WriteExclusiveAllRegistrants);
        assert_eq!(decode(NAMESPACE, &encode(NAMESPACE, &table)), Ok(table));
    });
}

/// Tables without anything, with a registrant, and with a reservation of each type.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let registrants = BTreeMap::from([(HostId([1; 16]), 7), (HostId([2; 16]), 8)]);
    let mut tables = vec![ReservationTable::new()];
    tables.extend(ReservationTable::restore(3, registrants.clone(), None));
    for rtype in ReservationType::ALL {
        let held = Held {
            rtype,
            holder: HostId([2; 16]),
        };
        tables.extend(ReservationTable::restore(3, registrants.clone(), Some(held)));
    }
    let mut seeds = Vec::new();
    for table in tables {
        for flags in [0, 1] {
            let mut seed = vec![flags];
            seed.extend(encode(NAMESPACE, &table));
            seeds.push(seed);
        }
    }
    seeds
}
