//! The label of a drive, at both of its ends.
//!
//! A label that is found fits its drive, is the same after its repair, and can be changed.

use bytes::Bytes;
use futures_util::FutureExt;
use weft_block::label::{self, AuthenticationKey, Label};
use weft_block::memory::MemoryDrive;
use weft_block::{Device, Durability};
use weft_proto::band::DriveClass;
use weft_proto::id::{ClusterId, DriveUuid};
use weft_proto::tcp::crc32c;
use weft_proto::units::{Lba, LbaRange, MIB};

use crate::input::Input;
use crate::memory::bounded;

/// What a copy's header block says, as `docs/format/label.md` has it, before its reserved end.
const USED: usize = 128;
const HEADER: usize = 4096;
const DRIVE_MIB: u64 = 70;

const CHECKSUMS: u8 = 1 << 0;
const SAME_AT_THE_END: u8 = 1 << 1;

fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("a drive in memory is always ready")
}

/// A copy: the first bytes of its header and its body, both from the input.
fn copy(input: &mut Input<'_>, flags: u8) -> Vec<u8> {
    let mut header = input.array::<USED>().to_vec();
    header.resize(HEADER, 0);
    let bytes = usize::from(input.u16()) % 8192;
    let body = input.bytes(bytes);
    if flags & CHECKSUMS != 0 {
        header[12..16].copy_from_slice(&((HEADER + body.len()) as u32).to_le_bytes());
        header[20..24].copy_from_slice(&crc32c(body).to_le_bytes());
        header[16..20].fill(0);
        let crc = crc32c(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
    }
    header.extend_from_slice(body);
    header.resize(header.len().next_multiple_of(HEADER), 0);
    header
}

/// Byte 0: whether checksums are made right, and whether the last copy is the first one's. Byte 1: where the last one lies.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let last_mib = u64::from(input.u8()) % DRIVE_MIB;
    // A label may announce a body as long as its area, a MiB, which is then read, and written to both ends of a drive in memory,
    // which takes 8 MiB for each place that is written.
    bounded(32 << 20, || {
        let drive: Device = MemoryDrive::device(DRIVE_MIB * MIB);
        let put = |mib: u64, bytes: Vec<u8>| {
            let start = Lba(mib * MIB / 4096);
            now(drive.write(start, vec![Bytes::from(bytes)], Durability::Durable)).expect("it fits");
        };
        let first = copy(&mut input, flags);
        let last = if flags & SAME_AT_THE_END == 0 {
            copy(&mut input, flags)
        } else {
            // The place is a field of the copy.
            let mut last = first.clone();
            last[72] = 1;
            if flags & CHECKSUMS != 0 {
                last[16..20].fill(0);
                let crc = crc32c(&last[..HEADER]);
                last[16..20].copy_from_slice(&crc.to_le_bytes());
            }
            last
        };
        put(last_mib, last);
        put(0, first);
        check(&drive);
    });
}

fn check(drive: &Device) {
    let Ok(mut found) = now(label::read(drive)) else {
        return;
    };
    let label = &found.label;
    assert!(u64::from(label.size_mib) <= DRIVE_MIB);
    assert!(label.chunks_start_mib > 0 && label.chunks_start_mib < label.chunks_end_mib);
    assert!(label.chunks_end_mib < label.size_mib);
    now(label::repair(drive, &mut found)).expect("a drive in memory takes every write");
    let again = now(label::read(drive)).expect("repaired");
    assert_eq!(again, found, "the same after its repair");
    assert_eq!(again.worse, None);
    let changed = Label {
        body: Bytes::from_static(b"changed"),
        ..found.label.clone()
    };
    if now(label::update(drive, &mut found, changed)).is_ok() {
        assert_eq!(now(label::read(drive)), Ok(found));
    }
}

/// A drive with both copies, with one of them older, and with a body.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let drive: Device = MemoryDrive::device(DRIVE_MIB * MIB);
    let mut label = Label::new(
        ClusterId([1; 16]),
        AuthenticationKey([2; 32]),
        DriveUuid([3; 16]),
        DriveClass::Tlc,
        DRIVE_MIB * MIB,
    )
    .expect("large enough");
    let mut seeds = Vec::new();
    for body in [&b""[..], b"a copy of the metadata's snapshot"] {
        label.body = Bytes::copy_from_slice(body);
        now(label::format(&drive, &label, label::Overwrite::Forced)).expect("a drive in memory");
        let read = |mib: u64| {
            let range = LbaRange {
                start: Lba(mib * MIB / 4096),
                count: 2,
            };
            let bytes = now(drive.read(range)).expect("in memory");
            let mut copy = bytes[..USED].to_vec();
            copy.extend((body.len() as u16).to_le_bytes());
            copy.extend_from_slice(&bytes[HEADER..HEADER + body.len()]);
            copy
        };
        let (first, last) = (read(0), read(DRIVE_MIB - 1));
        for flags in [0, CHECKSUMS, CHECKSUMS | SAME_AT_THE_END] {
            let mut seed = vec![flags, DRIVE_MIB as u8 - 1];
            seed.extend_from_slice(&first);
            seed.extend_from_slice(&last);
            seeds.push(seed);
        }
    }
    seeds
}
