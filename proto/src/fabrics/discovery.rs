//! The discovery log page (Base Specification, "Discovery Log Page").

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::nqn::Nqn;
use crate::nvme::identify::fill_field;

/// Head of the page; 1024 bytes, as is each entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DiscoveryHeader {
    /// Generation Counter: a reader that sees it change starts again.
    pub genctr: U64,
    /// Number of Records.
    pub numrec: U64,
    /// Record Format, 0.
    pub recfmt: U16,
    /// Reserved.
    pub rsvd18: [[u8; 503]; 2],
}

const _: () = assert!(size_of::<DiscoveryHeader>() == 1024);

/// An entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DiscoveryEntry {
    /// Transport Type; 3 is TCP.
    pub trtype: u8,
    /// Address Family; 1 is IPv4, 2 is IPv6.
    pub adrfam: u8,
    /// Subsystem Type; see [`subtype`].
    pub subtype: u8,
    /// Transport Requirements; bits 1:0 secure channel, 2 is not required.
    pub treq: u8,
    /// Port ID.
    pub portid: U16,
    /// Controller ID; `0xffff` is the dynamic model.
    pub cntlid: U16,
    /// Admin Max SQ Size.
    pub asqsz: U16,
    /// Entry Flags.
    pub eflags: U16,
    /// Reserved.
    pub rsvd12: [u8; 20],
    /// Transport Service Identifier: the port, in ASCII, padded with spaces.
    pub trsvcid: [u8; 32],
    /// Reserved.
    pub rsvd64: [u8; 192],
    /// Subsystem NQN, NUL-padded.
    pub subnqn: [u8; 256],
    /// Transport Address, in ASCII, padded with spaces.
    pub traddr: [u8; 256],
    /// Transport Specific Address Subtype; byte 0 is TCP's Security Type, 0 none.
    pub tsas: [u8; 256],
}

const _: () = assert!(size_of::<DiscoveryEntry>() == 1024);
const _: () = assert!(offset_of!(DiscoveryEntry, trsvcid) == 32);
const _: () = assert!(offset_of!(DiscoveryEntry, subnqn) == 256);
const _: () = assert!(offset_of!(DiscoveryEntry, traddr) == 512);
const _: () = assert!(offset_of!(DiscoveryEntry, tsas) == 768);

/// Values of SUBTYPE.
pub mod subtype {
    /// A referral to another discovery service.
    pub const REFERRAL: u8 = 1;
    /// An NVM subsystem.
    pub const NVM: u8 = 2;
    /// The discovery subsystem itself.
    pub const CURRENT_DISCOVERY: u8 = 3;
}

/// Transport Type of TCP.
pub const TRTYPE_TCP: u8 = 3;

impl DiscoveryEntry {
    /// An NVM subsystem reachable over TCP.
    #[must_use]
    pub fn tcp(subnqn: &Nqn, address: std::net::SocketAddr, portid: u16) -> Self {
        let mut entry = Self::new_zeroed();
        entry.trtype = TRTYPE_TCP;
        entry.adrfam = if address.is_ipv4() { 1 } else { 2 };
        entry.subtype = subtype::NVM;
        entry.treq = 2;
        entry.portid = U16::new(portid);
        entry.cntlid = U16::new(0xffff);
        entry.asqsz = U16::new(32);
        fill_field(&mut entry.trsvcid, &address.port().to_string(), b' ');
        fill_field(&mut entry.subnqn, subnqn.as_str(), 0);
        fill_field(&mut entry.traddr, &address.ip().to_string(), b' ');
        entry
    }

    /// The subsystem.
    #[must_use]
    pub fn subnqn(&self) -> Option<Nqn> {
        Nqn::from_field(&self.subnqn).ok()
    }

    /// Address and port, where the transport is TCP and both can be read.
    #[must_use]
    pub fn socket_addr(&self) -> Option<std::net::SocketAddr> {
        if self.trtype != TRTYPE_TCP {
            return None;
        }
        let ip = ascii(&self.traddr)?.parse().ok()?;
        let port = ascii(&self.trsvcid)?.parse().ok()?;
        Some(std::net::SocketAddr::new(ip, port))
    }
}

/// A field's text: some targets pad with spaces, some with NULs.
fn ascii(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field)
        .ok()
        .map(|text| text.trim_end_matches(['\0', ' ']))
}

/// A whole page.
#[must_use]
pub fn discovery_page(genctr: u64, entries: &[DiscoveryEntry]) -> Vec<u8> {
    let mut header = DiscoveryHeader::new_zeroed();
    header.genctr = U64::new(genctr);
    header.numrec = U64::new(entries.len() as u64);
    let mut page = header.as_bytes().to_vec();
    for entry in entries {
        page.extend_from_slice(entry.as_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_holds_name_and_address_at_their_offsets() {
        let subnqn = "nqn.x".parse().unwrap();
        let entry = DiscoveryEntry::tcp(&subnqn, "127.0.0.2:4420".parse().unwrap(), 7);
        let page = discovery_page(3, &[entry]);
        assert_eq!(page.len(), 2048);
        assert_eq!((page[0], page[8]), (3, 1));
        assert_eq!(&page[1024..1036], &[3, 1, 2, 2, 7, 0, 0xff, 0xff, 32, 0, 0, 0]);
        assert_eq!(&page[1024 + 32..1024 + 37], b"4420 ");
        assert_eq!(&page[1024 + 256..1024 + 262], b"nqn.x\0");
        assert_eq!(&page[1024 + 512..1024 + 522], b"127.0.0.2 ");
        assert_eq!(entry.subnqn(), Some(subnqn));
        assert_eq!(entry.socket_addr(), Some("127.0.0.2:4420".parse().unwrap()));
    }
}
