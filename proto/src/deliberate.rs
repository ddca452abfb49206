//! Bugs that are there on purpose, so that the simulator can show that it would find them.
//!
//! Each is one wrong line in the crate whose promise it breaks, asked for by name. Without the feature `deliberate-bugs`,
//! which nothing that is shipped enables, [`planted`] is `false` for the compiler, and none of it is in the program.
//! With it, one bug at a time is chosen for the running thread.

/// A bug and what it breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A write is acknowledged when all shards of its stripe but one are durable.
    AcknowledgeBeforeDurable,
    /// A shard that a drive refused counts as written.
    AcknowledgeDespiteError,
    /// Reads and writes are answered without a lease.
    AnswerWithoutLease,
    /// The lease is taken to last four times as long.
    LeaseTooLong,
    /// Recovery drops the last stripe above H, although it is whole.
    DropLastStripe,
    /// What was read is not compared with its checksum.
    ForgetChecksum,
    /// A sealed band is freed although the page map refers to it.
    FreeBandTooEarly,
    /// A chunk with a write of unknown outcome counts as one that nobody writes to.
    ForgetUnsettled,
    /// H claims stripes that are still in flight.
    ClosedThroughTooHigh,
    /// A copy that compaction made replaces a newer version of its block.
    CopyWinsOverNewer,
    /// A lower sequence replaces a higher one in the page map.
    LowerSequenceWins,
    /// TRIM is kept in memory only.
    TrimInMemoryOnly,
    /// Rows of a narrow stripe are given to the next one too.
    RowGivenTwice,
    /// Recovery looks for stripes from above the row that the root recorded.
    RecoverFromTooHigh,
    /// Recovery goes on with more than m columns missing.
    RecoverFromTooFew,
    /// A takeover of an unfinished takeover gets the same epoch.
    ReuseEpoch,
    /// Chunks are free although their writer is not fenced.
    NoQuarantine,
    /// A deleted volume's chunks are free although its last writes are under way.
    DeleteDoesNotDrain,
    /// An owner's commands are taken whatever their epoch.
    AcceptStaleEpoch,
    /// A root is recorded although it does not follow the current one.
    NoCompareAndSwap,
    /// Preempt and Abort does not wait for what is in execution.
    AbortDoesNotWait,
    /// A preempted host stays registered.
    PreemptChangesNothing,
    /// Writes are not checked against the reservations.
    WritesUnchecked,
    /// "Nobody has this key" is answered while that host's writes are still being waited for.
    ConflictRunsAhead,
    /// What a host sent before a silence of any length is executed.
    ForgiveSilence,
    /// A successor serves before the former owner's lease has run out.
    NoLeaseWait,
    /// A fence that failed is put on record like any other.
    RecordFailedFences,
    /// An incarnation whose registration is missing registers again.
    RegisterAgain,
    /// A rebuilt chunk is installed although a shard of it was not written.
    InstallDespiteError,
    /// A shard is rebuilt from others whose payload was not compared with its checksum.
    RebuildUnproven,
    /// A chunk that was replaced is free although its writer's last writes are under way.
    ReplacedChunkIsFree,
    /// The chunk of an attempt that was given up is free although its writes are under way.
    GivenUpChunkIsFree,
}

impl Bug {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::AcknowledgeBeforeDurable,
        Self::AcknowledgeDespiteError,
        Self::AnswerWithoutLease,
        Self::LeaseTooLong,
        Self::DropLastStripe,
        Self::ForgetChecksum,
        Self::FreeBandTooEarly,
        Self::ForgetUnsettled,
        Self::ClosedThroughTooHigh,
        Self::CopyWinsOverNewer,
        Self::LowerSequenceWins,
        Self::TrimInMemoryOnly,
        Self::RowGivenTwice,
        Self::RecoverFromTooHigh,
        Self::RecoverFromTooFew,
        Self::ReuseEpoch,
        Self::NoQuarantine,
        Self::DeleteDoesNotDrain,
        Self::AcceptStaleEpoch,
        Self::NoCompareAndSwap,
        Self::AbortDoesNotWait,
        Self::PreemptChangesNothing,
        Self::WritesUnchecked,
        Self::ConflictRunsAhead,
        Self::ForgiveSilence,
        Self::NoLeaseWait,
        Self::RecordFailedFences,
        Self::RegisterAgain,
        Self::InstallDespiteError,
        Self::RebuildUnproven,
        Self::ReplacedChunkIsFree,
        Self::GivenUpChunkIsFree,
    ];
}

/// A word that every program with the switch contains, and no other one.
#[cfg(feature = "deliberate-bugs")]
static MARK: &str = "weft-deliberate-bugs-are-compiled-in";

#[cfg(feature = "deliberate-bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Chooses the bug of this thread, or none.
#[cfg(feature = "deliberate-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether `bug` is planted.
#[cfg(feature = "deliberate-bugs")]
#[must_use]
pub fn planted(bug: Bug) -> bool {
    std::hint::black_box(MARK);
    PLANTED.get() == Some(bug)
}

/// Whether `bug` is planted: it is not.
#[cfg(not(feature = "deliberate-bugs"))]
#[must_use]
#[inline]
pub const fn planted(_bug: Bug) -> bool {
    false
}
