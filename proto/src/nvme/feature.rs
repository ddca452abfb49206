//! Features (Base Specification, "Set Features command").

/// Feature Identifier (FID).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FeatureId(pub u8);

impl FeatureId {
    /// Arbitration.
    pub const ARBITRATION: Self = Self(0x01);
    /// Power Management.
    pub const POWER_MANAGEMENT: Self = Self(0x02);
    /// Temperature Threshold.
    pub const TEMPERATURE_THRESHOLD: Self = Self(0x04);
    /// Error Recovery.
    pub const ERROR_RECOVERY: Self = Self(0x05);
    /// Volatile Write Cache.
    pub const VOLATILE_WRITE_CACHE: Self = Self(0x06);
    /// Number of Queues.
    pub const NUMBER_OF_QUEUES: Self = Self(0x07);
    /// Interrupt Coalescing: of memory-based transports.
    pub const INTERRUPT_COALESCING: Self = Self(0x08);
    /// Interrupt Vector Configuration: of memory-based transports.
    pub const INTERRUPT_VECTOR: Self = Self(0x09);
    /// Write Atomicity Normal.
    pub const WRITE_ATOMICITY: Self = Self(0x0a);
    /// Asynchronous Event Configuration.
    pub const ASYNC_EVENT_CONFIG: Self = Self(0x0b);
    /// Keep Alive Timer.
    pub const KEEP_ALIVE_TIMER: Self = Self(0x0f);
    /// Host Behavior Support: 512 bytes of data.
    pub const HOST_BEHAVIOR: Self = Self(0x16);
    /// Host Identifier: 8 or 16 bytes of data.
    pub const HOST_IDENTIFIER: Self = Self(0x81);
    /// Reservation Notification Mask, per namespace.
    pub const RESERVATION_NOTIFICATION_MASK: Self = Self(0x82);
    /// Reservation Persistence, per namespace.
    pub const RESERVATION_PERSISTENCE: Self = Self(0x83);
}

/// Bytes of the Host Behavior Support data structure.
pub const HOST_BEHAVIOR_BYTES: usize = 512;

/// The answer to Number of Queues, and its argument: zero-based counts of submission and completion queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NumberOfQueues {
    /// I/O submission queues, one-based.
    pub submission: u32,
    /// I/O completion queues, one-based.
    pub completion: u32,
}

impl NumberOfQueues {
    /// From command dword 11 or completion dword 0.
    ///
    /// `None` for 65535 of either, which the specification reserves.
    #[must_use]
    pub fn from_dword(dword: u32) -> Option<Self> {
        let (nsq_z, ncq_z) = (dword & 0xffff, dword >> 16);
        (nsq_z != 0xffff && ncq_z != 0xffff).then_some(Self {
            submission: nsq_z + 1,
            completion: ncq_z + 1,
        })
    }

    /// As command dword 11 and completion dword 0 carry it.
    #[must_use]
    pub fn to_dword(self) -> u32 {
        (self.submission.saturating_sub(1) & 0xffff) | (self.completion.saturating_sub(1) & 0xffff) << 16
    }
}

/// Asynchronous Event Configuration: which notices a host wants (dword 11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct AsyncEventConfig(pub u32);

impl AsyncEventConfig {
    /// Namespace Attribute Notices, also in Identify Controller's OAES.
    pub const NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
    /// Asymmetric Namespace Access Change Notices, also in OAES.
    pub const ANA_CHANGE: u32 = 1 << 11;
    /// Discovery Log Page Change Notices, also in OAES.
    pub const DISCOVERY_CHANGE: u32 = 1 << 31;

    /// Whether a notice is asked for.
    #[must_use]
    pub fn wants(self, notice: u32) -> bool {
        self.0 & notice != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_counts_are_zero_based_in_each_half() {
        let queues = NumberOfQueues {
            submission: 4,
            completion: 2,
        };
        assert_eq!(queues.to_dword(), 0x0001_0003);
        assert_eq!(NumberOfQueues::from_dword(0x0001_0003), Some(queues));
        assert_eq!(NumberOfQueues::from_dword(0xffff), None);
    }
}
