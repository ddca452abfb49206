//! Identify data structures (Base Specification, "Identify command"; NVM Command Set, "Identify Namespace").

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of every Identify data structure.
pub const IDENTIFY_BYTES: usize = 4096;

/// Identify Controller.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI Vendor ID; 0 on fabrics.
    pub vid: U16,
    /// PCI Subsystem Vendor ID; 0 on fabrics.
    pub ssvid: U16,
    /// Serial Number, padded with spaces.
    pub sn: [u8; 20],
    /// Model Number, padded with spaces.
    pub mn: [u8; 40],
    /// Firmware Revision, padded with spaces.
    pub fr: [u8; 8],
    /// Recommended Arbitration Burst.
    pub rab: u8,
    /// IEEE OUI Identifier.
    pub ieee: [u8; 3],
    /// Controller Multi-Path I/O and Namespace Sharing Capabilities; see [`cmic`].
    pub cmic: u8,
    /// Maximum Data Transfer Size: 2^n units of the smallest memory page (4096 bytes here); 0 is no limit.
    pub mdts: u8,
    /// Controller ID.
    pub cntlid: U16,
    /// Version.
    pub ver: U32,
    /// RTD3 Resume Latency.
    pub rtd3r: U32,
    /// RTD3 Entry Latency.
    pub rtd3e: U32,
    /// Optional Asynchronous Events Supported.
    pub oaes: U32,
    /// Controller Attributes; see [`ctratt`].
    pub ctratt: U32,
    /// Read Recovery Levels Supported.
    pub rrls: U16,
    /// Reserved here.
    pub rsvd102: [u8; 9],
    /// Controller Type; see [`cntrltype`].
    pub cntrltype: u8,
    /// FRU Globally Unique Identifier.
    pub fguid: [u8; 16],
    /// Command Retry Delay Times 1 to 3, in units of 100 ms.
    pub crdt: [U16; 3],
    /// Reserved here.
    pub rsvd134: [u8; 122],
    /// Optional Admin Command Support.
    pub oacs: U16,
    /// Abort Command Limit, zero-based.
    pub acl: u8,
    /// Asynchronous Event Request Limit, zero-based.
    pub aerl: u8,
    /// Firmware Updates.
    pub frmw: u8,
    /// Log Page Attributes.
    pub lpa: u8,
    /// Error Log Page Entries, zero-based.
    pub elpe: u8,
    /// Number of Power States Support, zero-based.
    pub npss: u8,
    /// Admin Vendor Specific Command Configuration.
    pub avscc: u8,
    /// Autonomous Power State Transition Attributes.
    pub apsta: u8,
    /// Warning Composite Temperature Threshold, kelvin.
    pub wctemp: U16,
    /// Critical Composite Temperature Threshold, kelvin.
    pub cctemp: U16,
    /// Maximum Time for Firmware Activation.
    pub mtfa: U16,
    /// Host Memory Buffer Preferred Size.
    pub hmpre: U32,
    /// Host Memory Buffer Minimum Size.
    pub hmmin: U32,
    /// Total NVM Capacity.
    pub tnvmcap: [u8; 16],
    /// Unallocated NVM Capacity.
    pub unvmcap: [u8; 16],
    /// Replay Protected Memory Block Support.
    pub rpmbs: U32,
    /// Extended Device Self-test Time.
    pub edstt: U16,
    /// Device Self-test Options.
    pub dsto: u8,
    /// Firmware Update Granularity.
    pub fwug: u8,
    /// Keep Alive Support: granularity of the timer in units of 100 ms; 0 is none.
    pub kas: U16,
    /// Host Controlled Thermal Management Attributes.
    pub hctma: U16,
    /// Minimum Thermal Management Temperature.
    pub mntmt: U16,
    /// Maximum Thermal Management Temperature.
    pub mxtmt: U16,
    /// Sanitize Capabilities.
    pub sanicap: U32,
    /// Host Memory Buffer Minimum Descriptor Entry Size.
    pub hmminds: U32,
    /// Host Memory Maximum Descriptors Entries.
    pub hmmaxd: U16,
    /// NVM Set Identifier Maximum.
    pub nsetidmax: U16,
    /// Endurance Group Identifier Maximum.
    pub endgidmax: U16,
    /// ANA Transition Time, seconds.
    pub anatt: u8,
    /// Asymmetric Namespace Access Capabilities; see [`anacap`].
    pub anacap: u8,
    /// ANA Group Identifier Maximum.
    pub anagrpmax: U32,
    /// Number of ANA Group Identifiers.
    pub nanagrpid: U32,
    /// Persistent Event Log Size.
    pub pels: U32,
    /// Reserved here.
    pub rsvd356: [u8; 30],
    /// Command Quiesce Time, milliseconds: how long after a lost association its commands may still take effect; 0 is not
    /// reported. Since revision 2.1.
    pub cqt: U16,
    /// Reserved here.
    pub rsvd388: [u8; 124],
    /// Submission Queue Entry Size: required in bits 3:0, maximum in 7:4, as powers of two.
    pub sqes: u8,
    /// Completion Queue Entry Size, likewise.
    pub cqes: u8,
    /// Maximum Outstanding Commands per queue.
    pub maxcmd: U16,
    /// Number of Namespaces: the highest NSID.
    pub nn: U32,
    /// Optional NVM Command Support; see [`oncs`].
    pub oncs: U16,
    /// Fused Operation Support; bit 0 is Compare and Write.
    pub fuses: U16,
    /// Format NVM Attributes.
    pub fna: u8,
    /// Volatile Write Cache: bit 0 present, bits 2:1 say what Flush does with the NSID of all namespaces.
    pub vwc: u8,
    /// Atomic Write Unit Normal, zero-based blocks.
    pub awun: U16,
    /// Atomic Write Unit Power Fail, zero-based blocks.
    pub awupf: U16,
    /// I/O Command Set Vendor Specific Command Configuration.
    pub icsvscc: u8,
    /// Namespace Write Protection Capabilities.
    pub nwpc: u8,
    /// Atomic Compare & Write Unit, zero-based blocks.
    pub acwu: U16,
    /// Optional Copy Formats Supported.
    pub cdfs: U16,
    /// SGL Support; see [`sgls`].
    pub sgls: U32,
    /// Maximum Number of Allowed Namespaces.
    pub mnan: U32,
    /// Reserved here.
    pub rsvd544: [u8; 224],
    /// NVM Subsystem NVMe Qualified Name, NUL-padded.
    pub subnqn: [u8; 256],
    /// Reserved.
    pub rsvd1024: [u8; 768],
    /// I/O Queue Command Capsule Supported Size, in units of 16 bytes.
    pub ioccsz: U32,
    /// I/O Queue Response Capsule Supported Size, in units of 16 bytes.
    pub iorcsz: U32,
    /// In Capsule Data Offset, in units of 16 bytes.
    pub icdoff: U16,
    /// Fabrics Controller Attributes.
    pub fcatt: u8,
    /// Maximum SGL Data Block Descriptors.
    pub msdbd: u8,
    /// Optional Fabrics Commands Support; bit 0 is Disconnect.
    pub ofcs: U16,
    /// Reserved.
    pub rsvd1806: [u8; 242],
    /// Power State Descriptors.
    pub psd: [[u8; 32]; 32],
    /// Vendor Specific.
    pub vs: [u8; 1024],
}

const _: () = assert!(size_of::<IdentifyController>() == IDENTIFY_BYTES);
const _: () = assert!(offset_of!(IdentifyController, cmic) == 76);
const _: () = assert!(offset_of!(IdentifyController, cntlid) == 78);
const _: () = assert!(offset_of!(IdentifyController, oaes) == 92);
const _: () = assert!(offset_of!(IdentifyController, cntrltype) == 111);
const _: () = assert!(offset_of!(IdentifyController, crdt) == 128);
const _: () = assert!(offset_of!(IdentifyController, oacs) == 256);
const _: () = assert!(offset_of!(IdentifyController, tnvmcap) == 280);
const _: () = assert!(offset_of!(IdentifyController, kas) == 320);
const _: () = assert!(offset_of!(IdentifyController, anatt) == 342);
const _: () = assert!(offset_of!(IdentifyController, nanagrpid) == 348);
const _: () = assert!(offset_of!(IdentifyController, cqt) == 386);
const _: () = assert!(offset_of!(IdentifyController, sqes) == 512);
const _: () = assert!(offset_of!(IdentifyController, oncs) == 520);
const _: () = assert!(offset_of!(IdentifyController, vwc) == 525);
const _: () = assert!(offset_of!(IdentifyController, acwu) == 532);
const _: () = assert!(offset_of!(IdentifyController, sgls) == 536);
const _: () = assert!(offset_of!(IdentifyController, mnan) == 540);
const _: () = assert!(offset_of!(IdentifyController, subnqn) == 768);
const _: () = assert!(offset_of!(IdentifyController, ioccsz) == 1792);
const _: () = assert!(offset_of!(IdentifyController, ofcs) == 1804);
const _: () = assert!(offset_of!(IdentifyController, psd) == 2048);

/// Bits of CMIC.
pub mod cmic {
    /// The subsystem may have more than one port.
    pub const MULTI_PORT: u8 = 1 << 0;
    /// The subsystem may have more than one controller.
    pub const MULTI_CONTROLLER: u8 = 1 << 1;
    /// The subsystem reports Asymmetric Namespace Access.
    pub const ANA: u8 = 1 << 3;
}

/// Bits of CTRATT.
pub mod ctratt {
    /// 128-bit host identifiers.
    pub const HOSTID_128: u32 = 1 << 0;
    /// Traffic Based Keep Alive.
    pub const TBKAS: u32 = 1 << 6;
}

/// Values of CNTRLTYPE.
pub mod cntrltype {
    /// I/O controller.
    pub const IO: u8 = 1;
    /// Discovery controller.
    pub const DISCOVERY: u8 = 2;
}

/// Bits of ANACAP.
pub mod anacap {
    /// Reports each of the five states.
    pub const ALL_STATES: u8 = 0x1f;
    /// A namespace's ANAGRPID does not change while it is attached.
    pub const FIXED_GROUP: u8 = 1 << 6;
}

/// Bits of OACS.
pub mod oacs {
    /// Doorbell Buffer Config.
    pub const DOORBELL_BUFFER: u16 = 1 << 8;
}

/// Bits of ONCS.
pub mod oncs {
    /// Compare.
    pub const COMPARE: u16 = 1 << 0;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u16 = 1 << 2;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u16 = 1 << 3;
    /// Reservations.
    pub const RESERVATIONS: u16 = 1 << 5;
    /// Verify.
    pub const VERIFY: u16 = 1 << 7;
}

/// Bits of SGLS.
pub mod sgls {
    /// SGLs are supported, with no alignment or granularity asked for.
    pub const SUPPORTED: u32 = 0b01;
    /// The address field of a data block descriptor may be an offset (in-capsule data).
    pub const OFFSET: u32 = 1 << 20;
    /// Transport SGL Data Block descriptor.
    pub const TRANSPORT: u32 = 1 << 21;
    /// An SGL may be longer than the data.
    pub const LONGER: u32 = 1 << 18;
}

/// An LBA format.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata Size, bytes.
    pub ms: U16,
    /// LBA Data Size, as a power of two.
    pub lbads: u8,
    /// Relative Performance.
    pub rp: u8,
}

const _: () = assert!(size_of::<LbaFormat>() == 4);

/// Identify Namespace of the NVM command set.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Namespace Size, blocks.
    pub nsze: U64,
    /// Namespace Capacity, blocks.
    pub ncap: U64,
    /// Namespace Utilization, blocks.
    pub nuse: U64,
    /// Namespace Features; bit 0 thin provisioning, bit 4 the NPWG family is valid.
    pub nsfeat: u8,
    /// Number of LBA Formats, zero-based.
    pub nlbaf: u8,
    /// Formatted LBA Size: index of the format in bits 3:0.
    pub flbas: u8,
    /// Metadata Capabilities.
    pub mc: u8,
    /// End-to-end Data Protection Capabilities.
    pub dpc: u8,
    /// End-to-end Data Protection Type Settings.
    pub dps: u8,
    /// Namespace Multi-path I/O and Namespace Sharing Capabilities; bit 0 shared.
    pub nmic: u8,
    /// Reservation Capabilities; see [`rescap`].
    pub rescap: u8,
    /// Format Progress Indicator.
    pub fpi: u8,
    /// Deallocate Logical Block Features: bits 2:0 what deallocated blocks read as (001b zeroes), bit 3 Write
    /// Zeroes can deallocate.
    pub dlfeat: u8,
    /// Namespace Atomic Write Unit Normal.
    pub nawun: U16,
    /// Namespace Atomic Write Unit Power Fail.
    pub nawupf: U16,
    /// Namespace Atomic Compare & Write Unit.
    pub nacwu: U16,
    /// Namespace Atomic Boundary Size Normal.
    pub nabsn: U16,
    /// Namespace Atomic Boundary Offset.
    pub nabo: U16,
    /// Namespace Atomic Boundary Size Power Fail.
    pub nabspf: U16,
    /// Namespace Optimal I/O Boundary.
    pub noiob: U16,
    /// NVM Capacity, bytes.
    pub nvmcap: [u8; 16],
    /// Namespace Preferred Write Granularity, zero-based blocks.
    pub npwg: U16,
    /// Namespace Preferred Write Alignment, zero-based blocks.
    pub npwa: U16,
    /// Namespace Preferred Deallocate Granularity, zero-based blocks.
    pub npdg: U16,
    /// Namespace Preferred Deallocate Alignment, zero-based blocks.
    pub npda: U16,
    /// Namespace Optimal Write Size, zero-based blocks.
    pub nows: U16,
    /// Reserved here (Copy limits).
    pub rsvd74: [u8; 18],
    /// ANA Group Identifier.
    pub anagrpid: U32,
    /// Reserved.
    pub rsvd96: [u8; 3],
    /// Namespace Attributes; bit 0 write protected.
    pub nsattr: u8,
    /// NVM Set Identifier.
    pub nvmsetid: U16,
    /// Endurance Group Identifier.
    pub endgid: U16,
    /// Namespace Globally Unique Identifier.
    pub nguid: [u8; 16],
    /// IEEE Extended Unique Identifier.
    pub eui64: [u8; 8],
    /// LBA formats.
    pub lbaf: [LbaFormat; 64],
    /// Vendor Specific.
    pub vs: [[u8; 464]; 8],
}

const _: () = assert!(size_of::<IdentifyNamespace>() == IDENTIFY_BYTES);
const _: () = assert!(offset_of!(IdentifyNamespace, nmic) == 30);
const _: () = assert!(offset_of!(IdentifyNamespace, rescap) == 31);
const _: () = assert!(offset_of!(IdentifyNamespace, dlfeat) == 33);
const _: () = assert!(offset_of!(IdentifyNamespace, nvmcap) == 48);
const _: () = assert!(offset_of!(IdentifyNamespace, npwg) == 64);
const _: () = assert!(offset_of!(IdentifyNamespace, anagrpid) == 92);
const _: () = assert!(offset_of!(IdentifyNamespace, nsattr) == 99);
const _: () = assert!(offset_of!(IdentifyNamespace, nguid) == 104);
const _: () = assert!(offset_of!(IdentifyNamespace, lbaf) == 128);

/// Bits of RESCAP.
pub mod rescap {
    /// Persist Through Power Loss.
    pub const PTPL: u8 = 1 << 0;
    /// The six reservation types.
    pub const ALL_TYPES: u8 = 0x7e;
    /// Ignore Existing Key is used as in revision 1.3 and later.
    pub const IEKEY_1_3: u8 = 1 << 7;
}

impl IdentifyNamespace {
    /// Bytes of a logical block as formatted; `None` for a format the structure does not hold or a size
    /// outside of 512 bytes to 64 KiB.
    #[must_use]
    pub fn block_bytes(&self) -> Option<u32> {
        let index = usize::from(self.flbas & 0xf) | usize::from(self.flbas >> 5 & 0x3) << 4;
        let lbads = self.lbaf.get(index)?.lbads;
        (9..=16).contains(&lbads).then(|| 1 << lbads)
    }
}

/// I/O Command Set independent Identify Namespace (CNS 08h).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespaceIndependent {
    /// Common Namespace Features.
    pub nsfeat: u8,
    /// As in [`IdentifyNamespace::nmic`].
    pub nmic: u8,
    /// As in [`IdentifyNamespace::rescap`].
    pub rescap: u8,
    /// Format Progress Indicator.
    pub fpi: u8,
    /// ANA Group Identifier.
    pub anagrpid: U32,
    /// Namespace Attributes.
    pub nsattr: u8,
    /// Reserved.
    pub rsvd9: u8,
    /// NVM Set Identifier.
    pub nvmsetid: U16,
    /// Endurance Group Identifier.
    pub endgid: U16,
    /// Namespace Status; bit 0 ready.
    pub nstat: u8,
    /// Reserved.
    pub rsvd15: [u8; 17],
    /// Reserved.
    pub rsvd32: [[u8; 254]; 16],
}

const _: () = assert!(size_of::<IdentifyNamespaceIndependent>() == IDENTIFY_BYTES);
const _: () = assert!(offset_of!(IdentifyNamespaceIndependent, nstat) == 14);

/// Identify Controller of the NVM command set (CNS 06h, CSI 00h).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyControllerNvm {
    /// Verify Size Limit, as MDTS; 0 is no limit.
    pub vsl: u8,
    /// Write Zeroes Size Limit, as MDTS; 0 is no limit.
    pub wzsl: u8,
    /// Write Uncorrectable Size Limit.
    pub wusl: u8,
    /// Dataset Management Ranges Limit.
    pub dmrl: u8,
    /// Dataset Management Range Size Limit, blocks.
    pub dmrsl: U32,
    /// Dataset Management Size Limit, blocks.
    pub dmsl: U64,
    /// Reserved.
    pub rsvd16: [[u8; 255]; 16],
}

const _: () = assert!(size_of::<IdentifyControllerNvm>() == IDENTIFY_BYTES);

/// Namespace Identifier Type (NIDT) of a Namespace Identification Descriptor.
pub mod nidt {
    /// IEEE EUI-64, 8 bytes.
    pub const EUI64: u8 = 1;
    /// NGUID, 16 bytes.
    pub const NGUID: u8 = 2;
    /// UUID, 16 bytes.
    pub const UUID: u8 = 3;
    /// Command Set Identifier, 1 byte.
    pub const CSI: u8 = 4;
}

/// The Namespace Identification Descriptor list of a namespace with a UUID and the NVM command set.
#[must_use]
pub fn namespace_descriptors(uuid: &[u8; 16]) -> Vec<u8> {
    let mut list = vec![0; IDENTIFY_BYTES];
    list[0] = nidt::UUID;
    list[1] = 16;
    list[4..20].copy_from_slice(uuid);
    list[20] = nidt::CSI;
    list[21] = 1;
    // The identifier itself is one byte: 0, the NVM command set.
    list
}

/// The UUID in a Namespace Identification Descriptor list, or its NGUID where there is no UUID.
#[must_use]
pub fn uuid_of_descriptors(mut list: &[u8]) -> Option<[u8; 16]> {
    let mut nguid = None;
    while let [nidt, nidl, _, _, rest @ ..] = list {
        // Length 0 ends the list.
        let (value, after) = rest.split_at_checked(usize::from(*nidl))?;
        match (*nidt, <[u8; 16]>::try_from(value)) {
            (_, _) if value.is_empty() => break,
            (nidt::UUID, Ok(uuid)) => return Some(uuid),
            (nidt::NGUID, Ok(id)) => nguid = Some(id),
            _ => {}
        }
        list = after;
    }
    nguid
}

/// A Namespace ID list of 4096 bytes: up to 1024 identifiers, zero-terminated when shorter.
#[must_use]
pub fn namespace_list(nsids: impl Iterator<Item = u32>) -> Vec<u8> {
    let mut list: Vec<u8> = nsids
        .take(IDENTIFY_BYTES / 4)
        .flat_map(u32::to_le_bytes)
        .collect();
    list.resize(IDENTIFY_BYTES, 0);
    list
}

/// The identifiers of a Namespace ID list.
pub fn namespaces_of_list(list: &[u8]) -> impl Iterator<Item = u32> {
    list.chunks_exact(4)
        .map(|nsid| u32::from_le_bytes([nsid[0], nsid[1], nsid[2], nsid[3]]))
        .take_while(|&nsid| nsid != 0)
}

/// Copies text into a fixed field, cut or padded with `pad`.
pub fn fill_field(field: &mut [u8], text: &str, pad: u8) {
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text.as_bytes()[..len]);
    field[len..].fill(pad);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_list_holds_the_uuid() {
        let uuid = [7; 16];
        let list = namespace_descriptors(&uuid);
        assert_eq!(list.len(), IDENTIFY_BYTES);
        assert_eq!(&list[..4], &[3, 16, 0, 0]);
        assert_eq!(&list[20..26], &[4, 1, 0, 0, 0, 0]);
        assert_eq!(uuid_of_descriptors(&list), Some(uuid));
    }

    #[test]
    fn an_nguid_stands_in_for_a_missing_uuid_and_truncation_is_no_uuid() {
        let mut list = vec![1, 8, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 16, 0, 0];
        list.extend([9; 16]);
        assert_eq!(uuid_of_descriptors(&list), Some([9; 16]));
        assert_eq!(uuid_of_descriptors(&list[..20]), None);
        assert_eq!(uuid_of_descriptors(&[0; 64]), None);
    }

    #[test]
    fn a_list_of_namespaces_ends_at_zero() {
        let list = namespace_list([1, 2, 0x0102_0304].into_iter());
        assert_eq!(&list[..16], &[1, 0, 0, 0, 2, 0, 0, 0, 4, 3, 2, 1, 0, 0, 0, 0]);
        assert_eq!(namespaces_of_list(&list).collect::<Vec<_>>(), [1, 2, 0x0102_0304]);
    }

    #[test]
    fn the_block_size_is_read_from_the_format_in_use() {
        let mut bytes = [0; IDENTIFY_BYTES];
        bytes[26] = 1;
        bytes[128 + 4 + 2] = 12;
        let ns = IdentifyNamespace::read_from_bytes(&bytes).unwrap();
        assert_eq!(ns.block_bytes(), Some(4096));
        bytes[128 + 4 + 2] = 60;
        let ns = IdentifyNamespace::read_from_bytes(&bytes).unwrap();
        assert_eq!(ns.block_bytes(), None);
    }
}
