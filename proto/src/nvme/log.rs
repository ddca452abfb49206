//! Log pages (Base Specification, "Get Log Page command").

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// ANA state (Base Specification, "Asymmetric Namespace Access States").
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct AnaState(pub u8);

impl AnaState {
    /// Full service on this path.
    pub const OPTIMIZED: Self = Self(0x01);
    /// Served, at a cost: another path is better.
    pub const NON_OPTIMIZED: Self = Self(0x02);
    /// Not served on this path now.
    pub const INACCESSIBLE: Self = Self(0x03);
    /// Never served on this path again.
    pub const PERSISTENT_LOSS: Self = Self(0x04);
    /// Between two states.
    pub const CHANGE: Self = Self(0x0f);

    /// Whether commands that touch media are served.
    #[must_use]
    pub fn is_accessible(self) -> bool {
        matches!(self, Self::OPTIMIZED | Self::NON_OPTIMIZED)
    }
}

impl std::fmt::Debug for AnaState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match *self {
            Self::OPTIMIZED => "optimized",
            Self::NON_OPTIMIZED => "non-optimized",
            Self::INACCESSIBLE => "inaccessible",
            Self::PERSISTENT_LOSS => "persistent-loss",
            Self::CHANGE => "change",
            Self(other) => return write!(f, "ana-state-{other:#04x}"),
        })
    }
}

/// Head of the ANA log page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AnaHeader {
    /// Change Count.
    pub chgcnt: U64,
    /// Number of ANA Group Descriptors.
    pub ngrps: U16,
    /// Reserved.
    pub rsvd10: [u8; 6],
}

const _: () = assert!(size_of::<AnaHeader>() == 16);

/// An ANA Group Descriptor; its NSIDs follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AnaGroupDescriptor {
    /// ANA Group ID, not 0.
    pub anagrpid: U32,
    /// Number of NSID Values.
    pub nnsids: U32,
    /// Change Count.
    pub chgcnt: U64,
    /// State in bits 3:0.
    pub state: u8,
    /// Reserved.
    pub rsvd17: [u8; 15],
}

const _: () = assert!(size_of::<AnaGroupDescriptor>() == 32);
const _: () = assert!(offset_of!(AnaGroupDescriptor, state) == 16);

/// One ANA group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnaGroup {
    /// Not 0.
    pub anagrpid: u32,
    /// Counts this group's changes.
    pub change_count: u64,
    /// Its state on this path.
    pub state: AnaState,
    /// Its namespaces; empty where the log was asked for groups only.
    pub nsids: Vec<u32>,
}

/// The ANA log page.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct AnaLog {
    /// Counts changes of any group.
    pub change_count: u64,
    /// In the order of their identifiers.
    pub groups: Vec<AnaGroup>,
}

impl AnaLog {
    /// Log Specific Parameter bit 0: Return Groups Only.
    pub const GROUPS_ONLY: u8 = 1;

    /// As the wire carries it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let header = AnaHeader {
            chgcnt: U64::new(self.change_count),
            ngrps: U16::new(u16::try_from(self.groups.len()).unwrap_or(u16::MAX)),
            rsvd10: [0; 6],
        };
        let mut bytes = header.as_bytes().to_vec();
        for group in self.groups.iter().take(usize::from(u16::MAX)) {
            let descriptor = AnaGroupDescriptor {
                anagrpid: U32::new(group.anagrpid),
                nnsids: U32::new(group.nsids.len() as u32),
                chgcnt: U64::new(group.change_count),
                state: group.state.0,
                rsvd17: [0; 15],
            };
            bytes.extend_from_slice(descriptor.as_bytes());
            bytes.extend(group.nsids.iter().copied().flat_map(u32::to_le_bytes));
        }
        bytes
    }

    /// From a page. `None` when it is cut short.
    #[must_use]
    pub fn parse(page: &[u8]) -> Option<Self> {
        let (header, mut rest) = AnaHeader::read_from_prefix(page).ok()?;
        let mut groups = Vec::new();
        for _ in 0..header.ngrps.get() {
            let (descriptor, after) = AnaGroupDescriptor::read_from_prefix(rest).ok()?;
            // The count is bounded by the page, which the reader sized, before anything is allocated.
            let bytes = usize::try_from(descriptor.nnsids.get()).ok()?.checked_mul(4)?;
            let (nsids, after) = after.split_at_checked(bytes)?;
            rest = after;
            groups.push(AnaGroup {
                anagrpid: descriptor.anagrpid.get(),
                change_count: descriptor.chgcnt.get(),
                state: AnaState(descriptor.state & 0xf),
                nsids: nsids
                    .chunks_exact(4)
                    .map(|nsid| u32::from_le_bytes([nsid[0], nsid[1], nsid[2], nsid[3]]))
                    .collect(),
            });
        }
        Some(Self {
            change_count: header.chgcnt.get(),
            groups,
        })
    }
}

/// An Error Information log entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ErrorEntry {
    /// Error Count; 0 marks an unused entry.
    pub error_count: U64,
    /// Submission Queue ID.
    pub sqid: U16,
    /// Command ID.
    pub cid: U16,
    /// Status Field, with the phase bit's place.
    pub status: U16,
    /// Parameter Error Location.
    pub location: U16,
    /// First LBA affected.
    pub lba: U64,
    /// Namespace.
    pub nsid: U32,
    /// Vendor Specific Information Available.
    pub vs_available: u8,
    /// Transport Type.
    pub trtype: u8,
    /// Reserved.
    pub rsvd30: [u8; 2],
    /// Command Specific Information.
    pub command_info: U64,
    /// Reserved and transport specific.
    pub rsvd40: [u8; 24],
}

const _: () = assert!(size_of::<ErrorEntry>() == 64);
const _: () = assert!(offset_of!(ErrorEntry, lba) == 16);

/// SMART / Health Information.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SmartLog {
    /// Critical Warning.
    pub critical_warning: u8,
    /// Composite Temperature, kelvin.
    pub temperature: U16,
    /// Available Spare, percent.
    pub avail_spare: u8,
    /// Available Spare Threshold, percent.
    pub spare_threshold: u8,
    /// Percentage Used.
    pub percent_used: u8,
    /// Endurance Group Critical Warning Summary.
    pub endurance_warning: u8,
    /// Reserved.
    pub rsvd7: [u8; 25],
    /// Data Units Read, thousands of 512 bytes, 128 bits.
    pub data_units_read: [U64; 2],
    /// Data Units Written, likewise.
    pub data_units_written: [U64; 2],
    /// Host Read Commands.
    pub host_reads: [U64; 2],
    /// Host Write Commands.
    pub host_writes: [U64; 2],
    /// Controller Busy Time, minutes.
    pub busy_time: [U64; 2],
    /// Power Cycles.
    pub power_cycles: [U64; 2],
    /// Power On Hours.
    pub power_on_hours: [U64; 2],
    /// Unsafe Shutdowns.
    pub unsafe_shutdowns: [U64; 2],
    /// Media and Data Integrity Errors.
    pub media_errors: [U64; 2],
    /// Number of Error Information Log Entries over the life of the controller.
    pub error_entries: [U64; 2],
    /// Temperatures and their history; reserved.
    pub rsvd192: [[u8; 160]; 2],
}

const _: () = assert!(size_of::<SmartLog>() == 512);
const _: () = assert!(offset_of!(SmartLog, data_units_read) == 32);
const _: () = assert!(offset_of!(SmartLog, media_errors) == 160);

/// Bytes of the Firmware Slot Information page.
pub const FIRMWARE_SLOT_BYTES: usize = 512;

/// The Firmware Slot Information page of a controller with one, active, slot.
#[must_use]
pub fn firmware_slot(revision: &[u8; 8]) -> Vec<u8> {
    let mut page = vec![0; FIRMWARE_SLOT_BYTES];
    page[0] = 1;
    page[8..16].copy_from_slice(revision);
    page
}

/// Bytes of the Changed Namespace List, and of an I/O command set's effects log.
pub const LIST_BYTES: usize = 4096;

/// Command Supported (CSUPP), a bit of an entry in the Commands Supported and Effects page.
pub const EFFECT_SUPPORTED: u32 = 1 << 0;
/// Logical Block Content Change (LBCC), likewise.
pub const EFFECT_CONTENT_CHANGE: u32 = 1 << 1;

/// The Commands Supported and Effects page from (opcode, effects) of each queue type.
#[must_use]
pub fn commands_supported(admin: &[(u8, u32)], io: &[(u8, u32)]) -> Vec<u8> {
    let mut page = vec![0; LIST_BYTES];
    for (base, entries) in [(0, admin), (1024, io)] {
        for &(opcode, effects) in entries {
            let at = base + usize::from(opcode) * 4;
            page[at..at + 4].copy_from_slice(&effects.to_le_bytes());
        }
    }
    page
}

/// Reservation Notification page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReservationNotification {
    /// Log Page Count: counts notifications, wraps past 0; 0 when there is none.
    pub log_page_count: U64,
    /// What happened; see [`ReservationNotificationType`].
    pub notification: ReservationNotificationType,
    /// Number of Available Log Pages after this one; saturates.
    pub available: u8,
    /// Reserved.
    pub rsvd10: [u8; 2],
    /// Namespace.
    pub nsid: U32,
    /// Reserved.
    pub rsvd16: [u8; 48],
}

const _: () = assert!(size_of::<ReservationNotification>() == 64);
const _: () = assert!(offset_of!(ReservationNotification, nsid) == 12);

impl ReservationNotification {
    /// The page of a controller with nothing to tell.
    #[must_use]
    pub fn empty() -> Self {
        Self::new_zeroed()
    }
}

/// Reservation Notification Log Page Type.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct ReservationNotificationType(pub u8);

impl ReservationNotificationType {
    /// Empty page.
    pub const EMPTY: Self = Self(0);
    /// Registration Preempted.
    pub const REGISTRATION_PREEMPTED: Self = Self(1);
    /// Reservation Released.
    pub const RESERVATION_RELEASED: Self = Self(2);
    /// Reservation Preempted.
    pub const RESERVATION_PREEMPTED: Self = Self(3);

    /// Its bit in the Reservation Notification Mask feature.
    #[must_use]
    pub fn mask_bit(self) -> u32 {
        1 << (self.0 & 0x1f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ana_page_reads_as_the_specification_writes_it() {
        let log = AnaLog {
            change_count: 2,
            groups: vec![AnaGroup {
                anagrpid: 7,
                change_count: 1,
                state: AnaState::NON_OPTIMIZED,
                nsids: vec![3, 4],
            }],
        };
        let mut bytes = vec![0; 16 + 32 + 8];
        bytes[0] = 2;
        bytes[8] = 1;
        bytes[16] = 7;
        bytes[20] = 2;
        bytes[24] = 1;
        bytes[32] = 2;
        bytes[48] = 3;
        bytes[52] = 4;
        assert_eq!(log.to_bytes(), bytes);
        assert_eq!(AnaLog::parse(&bytes), Some(log));
        for len in 0..bytes.len() {
            assert_eq!(AnaLog::parse(&bytes[..len]), None);
        }
    }

    #[test]
    fn a_group_that_claims_more_namespaces_than_the_page_is_refused() {
        let mut bytes = vec![0; 48];
        bytes[8] = 1;
        bytes[20..24].fill(0xff);
        assert_eq!(AnaLog::parse(&bytes), None);
    }

    #[test]
    fn effects_lie_at_their_opcodes() {
        let page = commands_supported(&[(0x06, 1)], &[(0x01, 3)]);
        assert_eq!(page[24], 1);
        assert_eq!(page[1024 + 4], 3);
    }
}
