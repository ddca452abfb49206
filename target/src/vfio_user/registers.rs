//! BAR 0: what lies where, and what a write to a doorbell means.
//!
//! NVM Express Base Specification, "Controller Properties"; NVMe over PCIe Transport Specification, "Doorbells".

/// Bytes of BAR 0.
pub(super) const BAR0_BYTES: u64 = 0x4000;

/// Where doorbells begin.
pub(super) const DOORBELLS_AT: u64 = 0x1000;

/// Their bytes: a page, which a client may map.
pub(super) const DOORBELLS_BYTES: u64 = MSIX_TABLE_AT - DOORBELLS_AT;

/// The MSI-X table, which the virtual machine monitor keeps, and its pending bits.
pub(super) const MSIX_TABLE_AT: u64 = 0x2000;
pub(super) const MSIX_PENDING_AT: u64 = 0x3000;

/// Controller registers.
pub(super) mod at {
    pub(in crate::vfio_user) const CAP: u64 = 0x00;
    pub(in crate::vfio_user) const CAP_HIGH: u64 = 0x04;
    pub(in crate::vfio_user) const VS: u64 = 0x08;
    pub(in crate::vfio_user) const INTMS: u64 = 0x0c;
    pub(in crate::vfio_user) const INTMC: u64 = 0x10;
    pub(in crate::vfio_user) const CC: u64 = 0x14;
    pub(in crate::vfio_user) const CSTS: u64 = 0x1c;
    pub(in crate::vfio_user) const AQA: u64 = 0x24;
    pub(in crate::vfio_user) const ASQ: u64 = 0x28;
    pub(in crate::vfio_user) const ASQ_HIGH: u64 = 0x2c;
    pub(in crate::vfio_user) const ACQ: u64 = 0x30;
    pub(in crate::vfio_user) const ACQ_HIGH: u64 = 0x34;
}

/// A doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doorbell {
    /// Submission Queue Tail.
    Tail(u16),
    /// Completion Queue Head.
    Head(u16),
}

impl Doorbell {
    /// Which doorbell is at an offset of BAR 0; `None` if none is.
    pub(super) fn at(offset: u64) -> Option<Self> {
        let index = offset.checked_sub(DOORBELLS_AT)?;
        if offset >= MSIX_TABLE_AT || !index.is_multiple_of(4) {
            return None;
        }
        let (qid, is_head) = (u16::try_from(index / 8).ok()?, index % 8 == 4);
        Some(if is_head { Self::Head(qid) } else { Self::Tail(qid) })
    }

    /// Where its shadow, or its event index, lies in its page.
    pub(super) fn offset(self) -> u64 {
        match self {
            Self::Tail(qid) => u64::from(qid) * 8,
            Self::Head(qid) => u64::from(qid) * 8 + 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doorbells_alternate_from_1000h() {
        assert_eq!(Doorbell::at(0x1000), Some(Doorbell::Tail(0)));
        assert_eq!(Doorbell::at(0x1004), Some(Doorbell::Head(0)));
        assert_eq!(Doorbell::at(0x100c), Some(Doorbell::Head(1)));
        assert_eq!(Doorbell::at(0x1006), None);
        assert_eq!(Doorbell::at(0xffc), None);
        assert_eq!(Doorbell::at(0x2000), None);
        assert_eq!(Doorbell::Head(3).offset(), 28);
    }
}
