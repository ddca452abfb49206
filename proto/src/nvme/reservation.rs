//! Reservation data structures and codes (Base Specification, "Reservation Register / Acquire / Release /
//! Report command").

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::mem::offset_of;

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::id::HostId;

/// Reservation Type (RTYPE), checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum ReservationType {
    /// One holder writes, everybody reads.
    WriteExclusive = 1,
    /// One holder reads and writes.
    ExclusiveAccess = 2,
    /// Registrants write, everybody reads; one holder.
    WriteExclusiveRegistrantsOnly = 3,
    /// Registrants read and write; one holder.
    ExclusiveAccessRegistrantsOnly = 4,
    /// Registrants write, everybody reads; every registrant is a holder.
    WriteExclusiveAllRegistrants = 5,
    /// Registrants read and write; every registrant is a holder.
    ExclusiveAccessAllRegistrants = 6,
}

impl ReservationType {
    /// Every type, in the specification's order.
    pub const ALL: [Self; 6] = [
        Self::WriteExclusive,
        Self::ExclusiveAccess,
        Self::WriteExclusiveRegistrantsOnly,
        Self::ExclusiveAccessRegistrantsOnly,
        Self::WriteExclusiveAllRegistrants,
        Self::ExclusiveAccessAllRegistrants,
    ];

    /// From the wire; `None` for 0 and reserved values.
    #[must_use]
    pub fn from_wire(rtype: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|known| *known as u8 == rtype)
    }

    /// As the wire carries it.
    #[must_use]
    pub fn to_wire(self) -> u8 {
        self as u8
    }

    /// Whether every registrant is a holder.
    #[must_use]
    pub fn is_all_registrants(self) -> bool {
        matches!(
            self,
            Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants
        )
    }
}

/// What a Reservation Register does (RREGA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterAction {
    /// 0: Register Reservation Key.
    Register,
    /// 1: Unregister Reservation Key.
    Unregister,
    /// 2: Replace Reservation Key.
    Replace,
}

/// Change Persist Through Power Loss State (CPTPL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PersistChange {
    /// 0: no change.
    Keep,
    /// 2: registrations and reservation are released at a power on.
    Clear,
    /// 3: registrations and reservation persist.
    Set,
}

/// What a Reservation Acquire does (RACQA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcquireAction {
    /// 0.
    Acquire,
    /// 1.
    Preempt,
    /// 2: completes only when the preempted hosts' commands are gone.
    PreemptAndAbort,
}

/// What a Reservation Release does (RRELA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseAction {
    /// 0.
    Release,
    /// 1: releases the reservation and removes every registrant.
    Clear,
}

/// Data of Reservation Register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegisterData {
    /// Current Reservation Key.
    pub crkey: U64,
    /// New Reservation Key.
    pub nrkey: U64,
}

const _: () = assert!(size_of::<RegisterData>() == 16);

/// Data of Reservation Acquire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AcquireData {
    /// Current Reservation Key.
    pub crkey: U64,
    /// Preempt Reservation Key.
    pub prkey: U64,
}

const _: () = assert!(size_of::<AcquireData>() == 16);

/// Data of Reservation Release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReleaseData {
    /// Current Reservation Key.
    pub crkey: U64,
}

const _: () = assert!(size_of::<ReleaseData>() == 8);

/// Head of the Reservation Status Extended data structure; registrants follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StatusHeader {
    /// Generation: counts registers, clears and preempts; wraps.
    pub generation: U32,
    /// Reservation Type; 0 when none is held.
    pub rtype: u8,
    /// Number of Registered Controllers (REGCTL, called REGSTRNT later): entries that follow.
    pub regctl: U16,
    /// Reserved.
    pub rsvd7: [u8; 2],
    /// Persist Through Power Loss State, 0 or 1.
    pub ptpls: u8,
    /// Reserved.
    pub rsvd10: [u8; 14],
    /// Reserved; absent from the short structure.
    pub rsvd24: [u8; 40],
}

const _: () = assert!(size_of::<StatusHeader>() == 64);
const _: () = assert!(offset_of!(StatusHeader, regctl) == 5);
const _: () = assert!(offset_of!(StatusHeader, ptpls) == 9);

/// One registrant in the extended structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegistrantEntry {
    /// Controller ID; `0xffff` where the host has no static controller.
    pub cntlid: U16,
    /// Reservation Status: bit 0 set for a holder.
    pub rcsts: u8,
    /// Reserved.
    pub rsvd3: [u8; 5],
    /// Reservation Key.
    pub rkey: U64,
    /// Host Identifier, 128 bits.
    pub hostid: [u8; 16],
    /// Reserved.
    pub rsvd32: [u8; 32],
}

const _: () = assert!(size_of::<RegistrantEntry>() == 64);
const _: () = assert!(offset_of!(RegistrantEntry, rkey) == 8);
const _: () = assert!(offset_of!(RegistrantEntry, hostid) == 16);

/// A namespace's reservation, as a Reservation Report with the extended data structure gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReservationStatus {
    /// Counts registers, clears and preempts; wraps.
    pub generation: u32,
    /// The reservation held, if any.
    pub rtype: Option<ReservationType>,
    /// Whether registrations persist through power loss.
    pub ptpl: bool,
    /// By host.
    pub registrants: Vec<Registrant>,
}

/// One registrant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registrant {
    /// Who.
    pub hostid: HostId,
    /// Its key.
    pub key: u64,
    /// Whether it holds the reservation.
    pub holder: bool,
}

impl ReservationStatus {
    /// The extended data structure. A host truncates by asking for fewer bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let header = StatusHeader {
            generation: U32::new(self.generation),
            rtype: self.rtype.map_or(0, ReservationType::to_wire),
            regctl: U16::new(u16::try_from(self.registrants.len()).unwrap_or(u16::MAX)),
            ptpls: u8::from(self.ptpl),
            ..StatusHeader::new_zeroed()
        };
        let mut bytes = header.as_bytes().to_vec();
        for registrant in &self.registrants {
            let entry = RegistrantEntry {
                cntlid: U16::new(0xffff),
                rcsts: u8::from(registrant.holder),
                rkey: U64::new(registrant.key),
                hostid: registrant.hostid.0,
                ..RegistrantEntry::new_zeroed()
            };
            bytes.extend_from_slice(entry.as_bytes());
        }
        bytes
    }

    /// From the extended data structure. `None` when it is cut short or its type is unknown. Entries of one
    /// host on several controllers are joined.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (header, mut rest) = StatusHeader::read_from_prefix(bytes).ok()?;
        let rtype = match header.rtype {
            0 => None,
            wire => Some(ReservationType::from_wire(wire)?),
        };
        let mut registrants: Vec<Registrant> = Vec::new();
        // Where each host stands in them: a target may list 65,535.
        let mut places: HashMap<HostId, usize> = HashMap::new();
        for _ in 0..header.regctl.get() {
            let (entry, after) = RegistrantEntry::read_from_prefix(rest).ok()?;
            rest = after;
            let hostid = HostId(entry.hostid);
            let holder = entry.rcsts & 1 != 0;
            match places.entry(hostid) {
                Entry::Occupied(place) => registrants[*place.get()].holder |= holder,
                Entry::Vacant(place) => {
                    place.insert(registrants.len());
                    registrants.push(Registrant {
                        hostid,
                        key: entry.rkey.get(),
                        holder,
                    });
                }
            }
        }
        Some(Self {
            generation: header.generation.get(),
            rtype,
            ptpl: header.ptpls != 0,
            registrants,
        })
    }

    /// Bytes of the structure whose header is at the start of `bytes`, to size a second report.
    #[must_use]
    pub fn bytes_needed(bytes: &[u8]) -> Option<usize> {
        let (header, _) = StatusHeader::read_from_prefix(bytes).ok()?;
        Some(size_of::<StatusHeader>() + usize::from(header.regctl.get()) * size_of::<RegistrantEntry>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extended_status_reads_as_the_specification_writes_it() {
        let mut bytes = vec![0; 128];
        bytes[0] = 9; // GEN
        bytes[4] = 5; // RTYPE: Write Exclusive - All Registrants
        bytes[5] = 1; // REGCTL
        bytes[9] = 1; // PTPLS
        bytes[64] = 0xff;
        bytes[65] = 0xff;
        bytes[66] = 1; // RCSTS
        bytes[72..80].copy_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
        bytes[80..96].copy_from_slice(&[0xaa; 16]);
        let status = ReservationStatus {
            generation: 9,
            rtype: Some(ReservationType::WriteExclusiveAllRegistrants),
            ptpl: true,
            registrants: vec![Registrant {
                hostid: HostId([0xaa; 16]),
                key: 0x0102_0304_0506_0708,
                holder: true,
            }],
        };
        assert_eq!(status.to_bytes(), bytes);
        assert_eq!(ReservationStatus::parse(&bytes), Some(status));
        for len in 0..bytes.len() {
            assert_eq!(ReservationStatus::parse(&bytes[..len]), None);
        }
        assert_eq!(ReservationStatus::bytes_needed(&bytes[..64]), Some(128));
    }

    #[test]
    fn types_outside_of_the_six_are_unknown() {
        assert_eq!(ReservationType::from_wire(0), None);
        assert_eq!(ReservationType::from_wire(7), None);
        for rtype in ReservationType::ALL {
            assert_eq!(ReservationType::from_wire(rtype.to_wire()), Some(rtype));
        }
    }

    #[test]
    fn the_entries_of_one_host_are_joined_wherever_they_stand_in_a_long_report() {
        let host = |number: u16| {
            let mut hostid = [0; 16];
            hostid[..2].copy_from_slice(&number.to_le_bytes());
            HostId(hostid)
        };
        let entry = |number| Registrant {
            hostid: host(number),
            key: u64::from(number) + 1,
            holder: number == 3,
        };
        // Each host on two controllers, the second half in the order of the first.
        let listed = ReservationStatus {
            generation: 1,
            rtype: Some(ReservationType::WriteExclusiveAllRegistrants),
            ptpl: true,
            registrants: (0..30_000).chain(0..30_000).map(entry).collect(),
        };
        let parsed = ReservationStatus::parse(&listed.to_bytes()).expect("a whole report");
        assert_eq!(parsed.registrants, (0..30_000).map(entry).collect::<Vec<_>>());
    }
}
