//! Asynchronous events (Base Specification, "Asynchronous Event Request command").

/// What dword 0 of an Asynchronous Event Request's completion says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AsyncEvent(pub u32);

impl AsyncEvent {
    /// Write to Invalid Doorbell Register: read the error log (01h).
    pub const INVALID_DOORBELL: Self = Self::new(0x0, 0x00, 0x01);
    /// Invalid Doorbell Write Value: read the error log (01h).
    pub const INVALID_DOORBELL_VALUE: Self = Self::new(0x0, 0x01, 0x01);
    /// Namespace Attribute Changed: read the Changed Namespace List (04h).
    pub const NAMESPACE_CHANGED: Self = Self::new(0x2, 0x00, 0x04);
    /// Asymmetric Namespace Access Change: read the ANA log page (0Ch).
    pub const ANA_CHANGE: Self = Self::new(0x2, 0x03, 0x0c);
    /// Discovery Log Page Change: read the discovery log page (70h).
    pub const DISCOVERY_CHANGE: Self = Self::new(0x2, 0xf0, 0x70);
    /// Reservation Log Page Available: read the Reservation Notification log page (80h).
    pub const RESERVATION_LOG: Self = Self::new(0x6, 0x00, 0x80);

    /// From event type (bits 2:0), information (15:8) and log page identifier (23:16).
    #[must_use]
    pub const fn new(event_type: u8, info: u8, lid: u8) -> Self {
        Self((event_type & 0x7) as u32 | (info as u32) << 8 | (lid as u32) << 16)
    }

    /// Event type: 0 error, 1 SMART, 2 notice, 6 I/O command specific.
    #[must_use]
    pub const fn event_type(self) -> u8 {
        (self.0 & 0x7) as u8
    }

    /// Event information.
    #[must_use]
    pub const fn info(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// The log page to read, which clears the event.
    #[must_use]
    pub const fn lid(self) -> u8 {
        (self.0 >> 16) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_packed_as_specified() {
        assert_eq!(AsyncEvent::ANA_CHANGE.0, 0x000c_0302);
        assert_eq!(AsyncEvent::NAMESPACE_CHANGED.0, 0x0004_0002);
        assert_eq!(AsyncEvent::DISCOVERY_CHANGE.0, 0x0070_f002);
        assert_eq!(AsyncEvent::RESERVATION_LOG.0, 0x0080_0006);
        assert_eq!(AsyncEvent::ANA_CHANGE.info(), 3);
    }
}
