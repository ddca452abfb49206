//! Per-block linearizability with unknown outcomes: whether there is an order of all operations on a block in which each
//! takes effect once, between its invocation and its end, and every read sees the write before it.
//!
//! How an operation ended decides until when it may take effect:
//! - ok: until its completion, and it must;
//! - refused: until its completion, or never;
//! - unknown: at any time after its invocation, or never.
//!
//! # Method
//!
//! Written values are unique, which settles most of what is unknown before the search: a write without an answer that
//! no read saw need not have happened, and one that was seen must have happened before the first such read completed.
//! Only zeroes remain ambiguous. The search then walks the invocations and completions by time and keeps every possible
//! state: what the block holds, and which of the pending operations have taken effect. An operation takes effect no
//! earlier than some completion demands it, so states are few: as many as there are concurrent writers' orders, not as
//! many as there are operations. When a completion leaves no state, no order explains it.
//!
//! What it does not do: look across blocks. A command of several blocks is as many operations, as NVMe has it without
//! atomic boundaries.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use foldhash::fast::FixedState;

use crate::history::{Action, Block, Outcome, Record, Value};

/// Operations on one block that may be pending at once: bits of a mask.
const PENDING_MAX: usize = 128;

/// Lines of history that a violation shows from before it.
const SHOWN: usize = 24;

/// Why a block's history is not one of a correct volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The block.
    pub block: Block,
    /// What cannot be.
    pub reason: Reason,
    /// The operation at whose completion it showed.
    pub record: Record,
    /// What the block could have held there.
    pub possible: Vec<Value>,
    /// The block's last operations up to it, by completion.
    pub history: Vec<Record>,
}

/// What cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A read saw what no operation wrote to the block.
    NeverWritten,
    /// No order of the operations explains it.
    NoOrder,
    /// More operations were pending than the checker can tell apart.
    TooConcurrent,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:?} on volume {} block {}; the block could have held {:?}:\n{}",
            self.reason, self.block.volume, self.block.lba, self.possible, self.record
        )?;
        writeln!(f, "its operations before:")?;
        self.history
            .iter()
            .try_for_each(|record| writeln!(f, "  {record}"))
    }
}

/// Checks every block of a history. Returns at most one violation for each block, by block.
#[must_use]
pub fn check(history: &[Record]) -> Vec<Violation> {
    let mut blocks: BTreeMap<Block, Vec<Record>> = BTreeMap::new();
    for record in history {
        blocks.entry(record.block).or_default().push(*record);
    }
    blocks
        .values()
        .filter_map(|records| check_block(records).err().map(|violation| *violation))
        .collect()
}

/// Checks the operations on one block, which holds zeroes before the first.
///
/// # Errors
/// The first completion that cannot be explained.
pub fn check_block(records: &[Record]) -> Result<(), Box<Violation>> {
    let operations = operations(records)?;
    let mut events = Vec::with_capacity(operations.len() * 2);
    for (index, operation) in operations.iter().enumerate() {
        // Of equal times the invocation comes first: what cannot be told apart counts as concurrent.
        events.push((operation.from, false, index));
        if let Some(until) = operation.until {
            events.push((until, true, index));
        }
    }
    events.sort_unstable();
    let mut search = Search::new(operations);
    for (_, completes, index) in events {
        let explained = if completes {
            search.complete(index)
        } else {
            search.invoke(index)
        };
        if let Err(reason) = explained {
            return Err(violation(
                records,
                search.operations[index].record,
                reason,
                search.possible,
            ));
        }
    }
    Ok(())
}

fn violation(
    records: &[Record],
    record: Record,
    reason: Reason,
    possible: BTreeSet<Value>,
) -> Box<Violation> {
    let mut history: Vec<Record> = records
        .iter()
        .filter(|other| other.invoked_ns <= record.completed_ns)
        .copied()
        .collect();
    history.sort_by_key(|other| (other.completed_ns, other.invoked_ns));
    let history = history.split_off(history.len().saturating_sub(SHOWN));
    Box::new(Violation {
        block: record.block,
        reason,
        record,
        possible: possible.into_iter().collect(),
        history,
    })
}

/// An operation as the search sees it.
#[derive(Clone, Copy, Debug)]
struct Operation {
    record: Record,
    from: u64,
    /// When it has taken effect, or never will. `None`: there is no such time.
    until: Option<u64>,
    /// Whether it must take effect.
    required: bool,
}

/// Leaves out what need not have happened, and bounds what must have.
fn operations(records: &[Record]) -> Result<Vec<Operation>, Box<Violation>> {
    let mut seen: BTreeMap<Value, u64> = BTreeMap::new();
    let mut written: BTreeSet<Value> = BTreeSet::from([Value::Zero]);
    for record in records {
        if record.action != Action::Read {
            written.insert(record.value);
        } else if record.outcome == Outcome::Ok {
            let first = seen.entry(record.value).or_insert(record.completed_ns);
            *first = record.completed_ns.min(*first);
        }
    }
    let mut operations = Vec::with_capacity(records.len());
    for record in records {
        let (until, required) = match (record.action, record.outcome) {
            (Action::Read, Outcome::Ok) => {
                if record.value == Value::Foreign || !written.contains(&record.value) {
                    return Err(violation(records, *record, Reason::NeverWritten, written));
                }
                (Some(record.completed_ns), true)
            }
            (Action::Read, Outcome::Refused | Outcome::Unknown) => continue,
            (_, Outcome::Ok) => (Some(record.completed_ns), true),
            (_, outcome) => {
                let end = (outcome == Outcome::Refused).then_some(record.completed_ns);
                match seen.get(&record.value) {
                    _ if record.value == Value::Zero => (end, false),
                    // Seen before it was asked for: the read's completion shows that.
                    Some(seen) => {
                        let until = end.map_or(*seen, |end| end.min(*seen));
                        (Some(until.max(record.invoked_ns)), true)
                    }
                    None => continue,
                }
            }
        };
        operations.push(Operation {
            record: *record,
            from: record.invoked_ns,
            until,
            required,
        });
    }
    Ok(operations)
}

/// What may be true at one moment: what the block holds, and which pending operations have taken effect.
type State = (Value, u128);

struct Search {
    operations: Vec<Operation>,
    /// Pending operations by bit. Zeroes without an end are not among them: they are all alike, and counted.
    slots: Vec<Option<usize>>,
    /// Zeroes of unknown outcome invoked so far.
    zeroes: u32,
    /// Every state, with the fewest such zeroes it takes: the more are left, the more can still be explained.
    states: HashMap<State, u32, FixedState>,
    /// Values before the last completion.
    possible: BTreeSet<Value>,
}

impl Search {
    fn new(operations: Vec<Operation>) -> Self {
        Self {
            operations,
            slots: Vec::new(),
            zeroes: 0,
            states: std::iter::once(((Value::Zero, 0), 0)).collect(),
            possible: BTreeSet::new(),
        }
    }

    fn invoke(&mut self, index: usize) -> Result<(), Reason> {
        let operation = self.operations[index];
        if operation.until.is_none() {
            self.zeroes += 1;
            return Ok(());
        }
        let slot = match self.slots.iter().position(Option::is_none) {
            Some(slot) => slot,
            None if self.slots.len() < PENDING_MAX => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => return Err(Reason::TooConcurrent),
        };
        self.slots[slot] = Some(index);
        if operation.record.action == Action::Read {
            let states = std::mem::take(&mut self.states);
            for (state, zeroes) in states {
                self.keep(state, zeroes);
            }
        }
        Ok(())
    }

    fn complete(&mut self, index: usize) -> Result<(), Reason> {
        let Some(slot) = self.slots.iter().position(|slot| *slot == Some(index)) else {
            return Ok(());
        };
        let bit = 1_u128 << slot;
        self.possible = self.states.keys().map(|(value, _)| *value).collect();
        let mut done: Vec<(State, u32)> = Vec::new();
        let mut reached: HashMap<State, u32, FixedState> = HashMap::default();
        let mut open: Vec<(State, u32)> = std::mem::take(&mut self.states).into_iter().collect();
        while let Some((state, zeroes)) = open.pop() {
            if reached.get(&state).is_some_and(|fewest| *fewest <= zeroes) {
                continue;
            }
            reached.insert(state, zeroes);
            if state.1 & bit != 0 {
                done.push((state, zeroes));
                continue;
            }
            for (other, index) in self.slots.iter().enumerate() {
                let Some(operation) = index.map(|index| self.operations[index]) else {
                    continue;
                };
                if operation.record.action != Action::Read && state.1 & 1 << other == 0 {
                    let next = (operation.record.value, state.1 | 1 << other);
                    open.push((self.with_reads(next), zeroes));
                }
            }
            if zeroes < self.zeroes && state.0 != Value::Zero {
                open.push((self.with_reads((Value::Zero, state.1)), zeroes + 1));
            }
            // One that may never have taken effect, and did not.
            if !self.operations[index].required {
                done.push((state, zeroes));
            }
        }
        self.slots[slot] = None;
        for ((value, mask), zeroes) in done {
            self.keep((value, mask & !bit), zeroes);
        }
        if self.states.is_empty() {
            return Err(Reason::NoOrder);
        }
        Ok(())
    }

    /// A pending read that could see what the block holds does so at once: that takes no other possibility away.
    fn with_reads(&self, (value, mut mask): State) -> State {
        for (slot, index) in self.slots.iter().enumerate() {
            let sees = |index: usize| {
                let record = &self.operations[index].record;
                record.action == Action::Read && record.value == value
            };
            if index.is_some_and(sees) {
                mask |= 1 << slot;
            }
        }
        (value, mask)
    }

    fn keep(&mut self, state: State, zeroes: u32) {
        let state = self.with_reads(state);
        let fewest = self.states.entry(state).or_insert(zeroes);
        *fewest = zeroes.min(*fewest);
    }
}

#[cfg(test)]
mod tests;
