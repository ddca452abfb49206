//! The PCI configuration space of an NVMe controller: a type 0 header with power management, MSI-X and PCI Express
//! capabilities.
//!
//! The virtual machine monitor emulates most of it itself (BARs, MSI-X) and passes the guest's writes on; what matters
//! here is that the guest finds a well-formed device, whether it may be a bus master, and a function level reset.
//!
//! PCI Express Base Specification, "PCI-Compatible Configuration Registers" and "PCI Express Capability Structure".

use super::registers::{BAR0_BYTES, MSIX_PENDING_AT, MSIX_TABLE_AT};

/// Bytes of the configuration space of a PCI Express function.
pub(super) const CONFIG_BYTES: usize = 4096;

/// Vendor and device. The numbers are given out by the PCI-SIG and Weft has none: these are not taken, and drivers
/// find an NVMe controller by its class.
const VENDOR: u16 = 0x5746;
const DEVICE: u16 = 0x0001;

/// Mass storage, non-volatile memory, NVM Express.
const CLASS: [u8; 3] = [0x02, 0x08, 0x01];

const COMMAND_AT: usize = 0x04;
const BAR0_AT: usize = 0x10;
const POWER_AT: usize = 0x40;
const MSIX_AT: usize = 0x48;
const EXPRESS_AT: usize = 0x58;
const DEVICE_CONTROL_AT: usize = EXPRESS_AT + 8;

const COMMAND_BUS_MASTER: u8 = 1 << 2;
const COMMAND_INTX_DISABLE: u8 = 1 << 2;
const INITIATE_FLR: u8 = 1 << 7;

/// See the module.
#[derive(Debug)]
pub(super) struct Config {
    bytes: Box<[u8; CONFIG_BYTES]>,
    /// Which bits a guest can change.
    writable: Box<[u8; CONFIG_BYTES]>,
}

impl Config {
    /// As after a reset.
    pub(super) fn new(msix_vectors: u16) -> Self {
        let mut config = Self {
            bytes: Box::new([0; CONFIG_BYTES]),
            writable: Box::new([0; CONFIG_BYTES]),
        };
        config.put(0x00, &VENDOR.to_le_bytes());
        config.put(0x02, &DEVICE.to_le_bytes());
        // There is a list of capabilities.
        config.put(0x06, &[0x10]);
        config.put(0x09, &CLASS);
        config.put(0x2c, &VENDOR.to_le_bytes());
        config.put(0x2e, &DEVICE.to_le_bytes());
        config.put(0x34, &[POWER_AT as u8]);
        // INTA.
        config.put(0x3d, &[1]);
        // Memory space, bus master, parity, SERR; INTx disable.
        config.allow(COMMAND_AT, &[0b0100_0110, 0b0000_0101]);
        config.allow(0x0c, &[0xff]);
        config.allow(0x3c, &[0xff]);
        // A 64-bit memory BAR: the bits below its size stay.
        config.put(BAR0_AT, &[0b100]);
        config.allow(BAR0_AT, &(!(BAR0_BYTES - 1)).to_le_bytes());

        // Version 3, no soft reset; nothing but D0 and D3hot.
        config.put(POWER_AT, &[0x01, MSIX_AT as u8, 0x03, 0x00, 0x08, 0x00]);
        config.allow(POWER_AT + 4, &[0b11]);

        config.put(MSIX_AT, &[0x11, EXPRESS_AT as u8]);
        config.put(MSIX_AT + 2, &(msix_vectors - 1).to_le_bytes());
        // Enable and function mask.
        config.allow(MSIX_AT + 3, &[0b1100_0000]);
        // Both in BAR 0, whose index is in the low bits.
        config.put(MSIX_AT + 4, &(MSIX_TABLE_AT as u32).to_le_bytes());
        config.put(MSIX_AT + 8, &(MSIX_PENDING_AT as u32).to_le_bytes());

        // Version 2, an endpoint.
        config.put(EXPRESS_AT, &[0x10, 0x00, 0x02, 0x00]);
        // Role-based error reporting, function level reset.
        config.put(EXPRESS_AT + 4, &(1u32 << 15 | 1 << 28).to_le_bytes());
        // Error reporting, relaxed ordering, payload, no snoop, read request size. The reset bit always reads 0.
        config.put(DEVICE_CONTROL_AT, &[0x10, 0x28]);
        config.allow(DEVICE_CONTROL_AT, &[0xff, 0x79]);
        // One lane of the first generation, up.
        config.put(EXPRESS_AT + 12, &[0x11]);
        config.put(EXPRESS_AT + 18, &[0x11]);
        config.allow(EXPRESS_AT + 16, &[0xc3, 0x00]);
        config.allow(EXPRESS_AT + 40, &[0x1f]);
        config
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// What a guest reads.
    pub(super) fn read(&self, offset: u64, count: usize) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.bytes.get(start..start.checked_add(count)?)
    }

    /// What a guest writes; answers whether it asks for a function level reset.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Option<bool> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(data.len()).filter(|&end| end <= CONFIG_BYTES)?;
        let mut reset = false;
        for (at, &byte) in (start..end).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
            reset |= at == DEVICE_CONTROL_AT + 1 && byte & INITIATE_FLR != 0;
        }
        Some(reset)
    }

    /// Whether the device may access memory.
    pub(super) fn is_bus_master(&self) -> bool {
        self.bytes[COMMAND_AT] & COMMAND_BUS_MASTER != 0
    }

    /// Whether the interrupt line may be used.
    pub(super) fn allows_intx(&self) -> bool {
        self.bytes[COMMAND_AT + 1] & COMMAND_INTX_DISABLE == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capabilities(config: &Config) -> Vec<(u8, u8)> {
        let mut at = config.bytes[0x34];
        let mut found = Vec::new();
        while at != 0 {
            found.push((config.bytes[usize::from(at)], at));
            at = config.bytes[usize::from(at) + 1];
        }
        found
    }

    #[test]
    fn a_driver_finds_an_nvme_controller_with_its_capabilities() {
        let config = Config::new(17);
        assert_eq!(config.read(0x08, 4), Some(&[0, 2, 8, 1][..]));
        assert_eq!(
            capabilities(&config),
            [(0x01, 0x40), (0x11, 0x48), (0x10, 0x58)],
            "power management, MSI-X, PCI Express"
        );
        assert_eq!(
            config.read(0x4a, 2),
            Some(&[16, 0][..]),
            "the table's size less one"
        );
    }

    #[test]
    fn a_bar_tells_its_size_to_who_writes_ones() {
        let mut config = Config::new(17);
        config.write(0x10, &[0xff; 8]).unwrap();
        assert_eq!(
            config.read(0x10, 8),
            Some(&[0x04, 0xc0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff][..])
        );
    }

    #[test]
    fn a_reset_is_asked_for_by_a_bit_that_never_reads_as_set() {
        let mut config = Config::new(17);
        assert_eq!(config.write(0x60, &[0x10, 0xa8]), Some(true));
        assert_eq!(config.read(0x60, 2), Some(&[0x10, 0x28][..]));
        assert_eq!(config.write(0x60, &[0x10, 0x28]), Some(false));
    }

    #[test]
    fn an_access_past_the_end_is_none() {
        let mut config = Config::new(17);
        assert_eq!(config.read(4094, 4), None);
        assert_eq!(config.write(u64::MAX, &[0]), None);
        assert!(!config.is_bus_master());
        config.write(4, &[6, 4]).unwrap();
        assert!(config.is_bus_master() && !config.allows_intx());
    }
}
