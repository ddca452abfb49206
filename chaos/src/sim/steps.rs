//! Which protocol steps are under way, and which faults have met them: the coverage table.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

macro_rules! table_axis {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $label:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// All of them, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As the table names it.
            #[must_use]
            pub fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }
        }
    };
}

table_axis!(
    /// A step of a protocol that takes time, so that a fault can meet it.
    Step {
        /// A host's read.
        Read = "read",
        /// A host's write of a few blocks.
        Write = "write",
        /// A host's write of eight blocks or more.
        WideWrite = "wide",
        /// Write Zeroes or TRIM.
        Trim = "trim",
        /// A host's compare.
        Compare = "compare",
        /// A band is asked for: before it, the former one was sealed or is about to be.
        Grant = "grant",
        /// A root is published.
        Checkpoint = "root",
        /// Live blocks are moved out of a band.
        Compaction = "compact",
        /// A column is rebuilt.
        Rebuild = "rebuild",
        /// An agent starts: incarnation, reservation, registrations.
        Register = "register",
        /// A dead incarnation is preempted.
        Fence = "fence",
        /// A former epoch is scanned and replayed.
        Recover = "recover",
        /// The end of the former epoch is being committed.
        Finish = "finish",
        /// The former owner's lease runs out.
        LeaseWait = "lease",
        /// A planned move.
        Move = "move",
        /// A volume is deleted.
        Delete = "delete",
        /// Metadata has no leader.
        NoLeader = "no leader",
    }
);

table_axis!(
    /// What the nemesis does.
    Fault {
        /// A process is killed between two awaits.
        Kill = "kill",
        /// A server loses power: its volatile cache, and no connection is reset.
        Power = "power",
        /// More servers die at once than redundancy covers.
        Many = "many die",
        /// A process stands still and goes on.
        Pause = "pause",
        /// A drive is gone and comes back with what it held.
        DriveDead = "drive dead",
        /// A drive answers nothing for a while.
        DriveStall = "drive hangs",
        /// A drive is 10 to 1000 times slower.
        DriveSlow = "drive slow",
        /// A drive refuses writes for want of space.
        DriveFull = "drive full",
        /// Writes are answered and never land.
        LostWrite = "lost write",
        /// Writes land elsewhere on the drive.
        Misdirected = "misdirected",
        /// Bits flip on the medium.
        BitFlip = "bit flip",
        /// Messages are lost, late, twice or out of order.
        Messages = "messages",
        /// Two sides that do not reach each other.
        Partition = "partition",
        /// One side does not reach the other.
        OneWay = "one-way",
        /// A server has no way to metadata, and to everything else it has.
        NoMetadata = "no metadata",
        /// A clock goes wrong by half a percent.
        Drift = "drift",
    }
);

/// Steps under way: how many of each.
#[derive(Default)]
pub(super) struct Steps([Cell<u32>; Step::ALL.len()]);

/// A step under way, until dropped.
pub(super) struct Under(Rc<Steps>, Step);

impl Steps {
    pub(super) fn enter(self: &Rc<Self>, step: Step) -> Under {
        self.0[step as usize].update(|count| count + 1);
        Under(Rc::clone(self), step)
    }

    pub(super) fn is_under_way(&self, step: Step) -> bool {
        self.0[step as usize].get() > 0
    }

    pub(super) fn under_way(&self) -> Vec<Step> {
        let all = Step::ALL.iter().copied();
        all.filter(|step| self.is_under_way(*step)).collect()
    }
}

impl Drop for Under {
    fn drop(&mut self) {
        self.0.0[self.1 as usize].update(|count| count - 1);
    }
}

/// How often each fault has met each step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    cells: BTreeMap<(Fault, Step), u64>,
    /// How often each fault happened.
    faults: BTreeMap<Fault, u64>,
}

impl Coverage {
    pub(super) fn note(&mut self, fault: Fault, under_way: &[Step]) {
        *self.faults.entry(fault).or_default() += 1;
        for step in under_way {
            *self.cells.entry((fault, *step)).or_default() += 1;
        }
    }

    /// Adds another run's.
    pub fn merge(&mut self, other: &Self) {
        for (cell, count) in &other.cells {
            *self.cells.entry(*cell).or_default() += count;
        }
        for (fault, count) in &other.faults {
            *self.faults.entry(*fault).or_default() += count;
        }
    }

    /// Faults injected.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.values().sum()
    }

    /// How often a fault happened.
    #[must_use]
    pub fn times(&self, fault: Fault) -> u64 {
        self.faults.get(&fault).copied().unwrap_or(0)
    }

    /// Fault and step that have not met.
    #[must_use]
    pub fn empty(&self) -> Vec<(Fault, Step)> {
        let cells = Fault::ALL
            .iter()
            .flat_map(|fault| Step::ALL.iter().map(|step| (*fault, *step)));
        cells.filter(|cell| !self.cells.contains_key(cell)).collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<12}{:>9}", "fault", "times")?;
        for step in Step::ALL {
            write!(f, "{:>10}", step.label())?;
        }
        writeln!(f)?;
        for fault in Fault::ALL {
            let times = self.faults.get(fault).copied().unwrap_or(0);
            write!(f, "{:<12}{times:>9}", fault.label())?;
            for step in Step::ALL {
                let count = self.cells.get(&(*fault, *step)).copied().unwrap_or(0);
                write!(f, "{count:>10}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
