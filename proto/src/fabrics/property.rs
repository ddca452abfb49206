//! Controller properties, which fabrics have in place of registers (Base Specification, "Controller Properties").

/// A property's offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Property(pub u32);

impl Property {
    /// Controller Capabilities, 8 bytes.
    pub const CAP: Self = Self(0x00);
    /// Version, 4 bytes.
    pub const VS: Self = Self(0x08);
    /// Controller Configuration, 4 bytes.
    pub const CC: Self = Self(0x14);
    /// Controller Status, 4 bytes.
    pub const CSTS: Self = Self(0x1c);
    /// NVM Subsystem Reset, 4 bytes.
    pub const NSSR: Self = Self(0x20);
}

/// Controller Capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Of a fabrics controller with the NVM command set and 4 KiB pages. `ready_timeout_500ms` bounds a change
    /// of CSTS.RDY, in units of 500 ms.
    #[must_use]
    pub fn fabrics(mqes_z: u16, ready_timeout_500ms: u8) -> Self {
        const CQR: u64 = 1 << 16;
        const CSS_NVM: u64 = 1 << 37;
        Self(u64::from(mqes_z) | CQR | u64::from(ready_timeout_500ms) << 24 | CSS_NVM)
    }

    /// Of a memory-based controller with the NVM command set, 4 KiB pages and doorbells 4 bytes apart, whose queues
    /// have to be contiguous.
    #[must_use]
    pub fn memory(mqes_z: u16, ready_timeout_500ms: u8) -> Self {
        Self::fabrics(mqes_z, ready_timeout_500ms)
    }

    /// Maximum Queue Entries Supported, zero-based.
    #[must_use]
    pub fn mqes_z(self) -> u16 {
        self.0 as u16
    }

    /// Timeout (TO) of a change of CSTS.RDY, in units of 500 ms.
    #[must_use]
    pub fn ready_timeout_500ms(self) -> u8 {
        (self.0 >> 24) as u8
    }

    /// Memory Page Size Minimum, bytes: the unit of MDTS.
    #[must_use]
    pub fn page_bytes_min(self) -> u32 {
        1 << (12 + (self.0 >> 48 & 0xf))
    }
}

/// Shutdown Notification (CC.SHN).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownNotification {
    /// No effect.
    None,
    /// Normal or abrupt: stop serving, in order.
    Requested,
}

/// Controller Configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Configuration(pub u32);

impl Configuration {
    const EN: u32 = 1;
    const SHN: u32 = 0b11 << 14;

    /// Enabled, NVM command set, 64-byte and 16-byte entries.
    pub const ENABLED: Self = Self(Self::EN | 6 << 16 | 4 << 20);
    /// As [`Self::ENABLED`], with a normal shutdown asked for.
    pub const SHUTDOWN: Self = Self(Self::ENABLED.0 | 0b01 << 14);

    /// EN.
    #[must_use]
    pub fn enabled(self) -> bool {
        self.0 & Self::EN != 0
    }

    /// SHN.
    #[must_use]
    pub fn shutdown(self) -> ShutdownNotification {
        match self.0 & Self::SHN {
            0 => ShutdownNotification::None,
            _ => ShutdownNotification::Requested,
        }
    }

    /// I/O Command Set Selected (CSS).
    #[must_use]
    pub fn command_set(self) -> u8 {
        (self.0 >> 4) as u8 & 0x7
    }

    /// Memory Page Size (MPS), as a power of two above 4096.
    #[must_use]
    pub fn page_shift(self) -> u8 {
        (self.0 >> 7) as u8 & 0xf
    }
}

/// Controller Status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ControllerStatus(pub u32);

impl ControllerStatus {
    /// Ready (RDY).
    pub const READY: u32 = 1;
    /// Controller Fatal Status (CFS).
    pub const FATAL: u32 = 1 << 1;
    /// Shutdown Status (SHST): occurring.
    pub const SHUTDOWN_OCCURRING: u32 = 0b01 << 2;
    /// Shutdown Status (SHST): complete.
    pub const SHUTDOWN_COMPLETE: u32 = 0b10 << 2;

    /// RDY.
    #[must_use]
    pub fn ready(self) -> bool {
        self.0 & Self::READY != 0
    }

    /// CFS.
    #[must_use]
    pub fn fatal(self) -> bool {
        self.0 & Self::FATAL != 0
    }

    /// Whether shutdown processing is complete.
    #[must_use]
    pub fn shutdown_complete(self) -> bool {
        self.0 & (0b11 << 2) == Self::SHUTDOWN_COMPLETE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_lie_at_their_bits() {
        let cap = Capabilities::fabrics(127, 15);
        assert_eq!(cap.0, 0x0000_0020_0f01_007f);
        assert_eq!(
            (cap.mqes_z(), cap.ready_timeout_500ms(), cap.page_bytes_min()),
            (127, 15, 4096)
        );
    }

    #[test]
    fn the_configuration_a_host_writes_enables_and_shuts_down() {
        assert_eq!(Configuration::ENABLED.0, 0x0046_0001);
        assert!(Configuration::ENABLED.enabled());
        assert_eq!(
            Configuration(0x0046_4001).shutdown(),
            ShutdownNotification::Requested
        );
        assert!(ControllerStatus(0x9).shutdown_complete());
    }
}
