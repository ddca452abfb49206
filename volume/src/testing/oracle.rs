//! Whether what hosts read is what they wrote: linearizability, block by block (design section 3, point 2).
//!
//! A [`Oracle`] records when each operation was invoked and how it ended. Every write gives its blocks contents
//! that name it, so a read says whose data it saw. [`Oracle::check`] then asks, for every block by itself, whether there
//! is an order of all operations in which each takes effect once, between its start and its end, and every read sees
//! the write before it.
//!
//! How an operation ended decides until when it may take effect:
//! - acknowledged: until its end, and it must;
//! - refused: until its end, or never (the block contract lets a failed write leave a part);
//! - unknown (its engine died): until [`Oracle::settle`], or never. A recovery settles: what it did not bring back
//!   when it began to serve is gone, and what a read has seen stays.
//!
//! Write Zeroes, TRIM and blocks never written all read as zeroes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;
use weft_proto::units::{BLOCK_BYTES, Lba, LbaRange};

/// An operation that was invoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperationId(pub u64);

/// What a block holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// Zeroes.
    Zero,
    /// What this write wrote.
    Written(OperationId),
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("zeroes"),
            Self::Written(id) => write!(f, "write {}", id.0),
        }
    }
}

/// Why a history is not one of a correct volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A read saw bytes that nobody wrote to this block.
    #[error("{lba} read bytes nobody wrote there: {start}…")]
    Garbage {
        /// The block.
        lba: Lba,
        /// Its first bytes, in hexadecimal.
        start: String,
    },
    /// A read answered with another length than asked for.
    #[error("a read of {asked} bytes was answered with {answered}")]
    Length {
        /// Bytes asked for.
        asked: usize,
        /// Bytes answered.
        answered: usize,
    },
    /// No order of the operations explains what was read.
    #[error(
        "{lba}: no order explains read {read:?} of {value:?} (or an acknowledgement); history:\n{history}"
    )]
    NoOrder {
        /// The block.
        lba: Lba,
        /// The operation at whose end no explanation was left.
        read: OperationId,
        /// What it saw or wrote.
        value: Value,
        /// Every operation on the block, by time.
        history: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It must have taken effect by then.
    Done(u64),
    /// It took effect by then or never will.
    Perhaps(u64),
}

#[derive(Clone, Debug)]
struct Operation {
    range: LbaRange,
    kind: Kind,
    invoked: u64,
    end: Option<End>,
}

#[derive(Clone, Debug)]
enum Kind {
    Write,
    Zeroes,
    /// What each block held; empty until it ended.
    Read(Vec<Value>),
}

/// See the module. Its time is the order of the calls on it.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    time: u64,
    operations: BTreeMap<OperationId, Operation>,
    /// Operations that ended without an answer and are not settled.
    unknown: BTreeSet<OperationId>,
    garbage: Option<Violation>,
}

impl Oracle {
    /// A volume on which nothing was done.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    fn invoke(&mut self, range: LbaRange, kind: Kind) -> OperationId {
        let invoked = self.tick();
        let id = OperationId(invoked);
        let operation = Operation {
            range,
            kind,
            invoked,
            end: None,
        };
        self.operations.insert(id, operation);
        id
    }

    /// A write is about to be sent, with the bytes of [`contents`].
    pub fn write(&mut self, range: LbaRange) -> OperationId {
        self.invoke(range, Kind::Write)
    }

    /// A Write Zeroes or TRIM is about to be sent.
    pub fn zeroes(&mut self, range: LbaRange) -> OperationId {
        self.invoke(range, Kind::Zeroes)
    }

    /// A read is about to be sent.
    pub fn read(&mut self, range: LbaRange) -> OperationId {
        self.invoke(range, Kind::Read(Vec::new()))
    }

    /// A write, Write Zeroes or TRIM was acknowledged.
    ///
    /// By an owner that was settled as dead, too: then it must have taken effect by that time.
    pub fn acknowledged(&mut self, id: OperationId) {
        let time = self.tick();
        let operation = self
            .operations
            .get_mut(&id)
            .expect("an operation that was invoked");
        if let Some(End::Perhaps(settled)) = operation.end {
            operation.end = Some(End::Done(settled));
        } else {
            self.end(id, End::Done(time));
        }
    }

    /// It was answered with an error that says it will not happen.
    pub fn refused(&mut self, id: OperationId) {
        let time = self.tick();
        self.end(id, End::Perhaps(time));
    }

    /// Nobody will hear how it ended.
    pub fn unknown(&mut self, id: OperationId) {
        if matches!(self.operations.get(&id), Some(operation) if operation.end.is_none()) {
            self.unknown.insert(id);
        }
    }

    /// Every operation without an end is unknown: its engine died.
    pub fn all_unknown(&mut self) {
        let open = self
            .operations
            .iter()
            .filter(|(_, operation)| operation.end.is_none());
        self.unknown.extend(open.map(|(id, _)| *id));
    }

    /// A new owner serves: what is unknown has happened by now or never will.
    pub fn settle(&mut self) {
        let time = self.tick();
        for id in std::mem::take(&mut self.unknown) {
            self.end(id, End::Perhaps(time));
        }
    }

    /// A read was answered with `bytes`.
    ///
    /// # Errors
    /// When they are not whole blocks that somebody wrote there. [`Oracle::check`] says so again.
    pub fn answered(&mut self, id: OperationId, bytes: &Bytes) -> Result<(), Violation> {
        let time = self.tick();
        let operation = self.operations.get_mut(&id).expect("a read that was invoked");
        let asked = operation.range.count as usize * BLOCK_BYTES;
        let start = operation.range.start.0;
        let values = if bytes.len() == asked {
            (start..)
                .zip(bytes.chunks(BLOCK_BYTES))
                .map(|(lba, block)| identify(Lba(lba), block))
                .collect()
        } else {
            Err(Violation::Length {
                asked,
                answered: bytes.len(),
            })
        };
        match values {
            Ok(values) => {
                operation.kind = Kind::Read(values);
                operation.end = Some(End::Done(time));
                Ok(())
            }
            Err(violation) => {
                self.garbage.get_or_insert(violation.clone());
                Err(violation)
            }
        }
    }

    fn end(&mut self, id: OperationId, end: End) {
        let operation = self
            .operations
            .get_mut(&id)
            .expect("an operation that was invoked");
        assert!(operation.end.is_none(), "an operation ends once");
        operation.end = Some(end);
        self.unknown.remove(&id);
    }

    /// How many operations were recorded.
    #[must_use]
    pub fn operations(&self) -> usize {
        self.operations.len()
    }

    /// Whether the history so far is one of a correct volume. Operations still open are taken as perhaps effective.
    ///
    /// # Errors
    /// The first block for which it is not.
    pub fn check(&self) -> Result<(), Violation> {
        if let Some(violation) = &self.garbage {
            return Err(violation.clone());
        }
        let mut blocks: BTreeMap<u64, Vec<OperationId>> = BTreeMap::new();
        for (id, operation) in &self.operations {
            let start = operation.range.start.0;
            for lba in start..start + operation.range.count {
                blocks.entry(lba).or_default().push(*id);
            }
        }
        for (lba, ids) in blocks {
            self.check_block(Lba(lba), &ids)?;
        }
        Ok(())
    }

    fn value(&self, id: OperationId, lba: Lba) -> Option<Value> {
        let operation = &self.operations[&id];
        match &operation.kind {
            Kind::Write => Some(Value::Written(id)),
            Kind::Zeroes => Some(Value::Zero),
            Kind::Read(values) => values.get((lba.0 - operation.range.start.0) as usize).copied(),
        }
    }

    /// Walks the block's history in time with every state it can be in: the value, and which of the open operations
    /// have taken effect. An end throws out the states in which its operation has not.
    fn check_block(&self, lba: Lba, ids: &[OperationId]) -> Result<(), Violation> {
        let mut moments: Vec<(u64, OperationId, Option<End>)> = Vec::new();
        for id in ids {
            let operation = &self.operations[id];
            if matches!(&operation.kind, Kind::Read(values) if values.is_empty()) {
                // A read that was never answered says nothing.
                continue;
            }
            moments.push((operation.invoked, *id, None));
            if let Some(end @ (End::Done(time) | End::Perhaps(time))) = operation.end {
                moments.push((time, *id, Some(end)));
            }
        }
        moments.sort_by_key(|(time, ..)| *time);
        let mut open: BTreeSet<OperationId> = BTreeSet::new();
        let mut states = BTreeSet::from([State {
            value: Value::Zero,
            effective: BTreeSet::new(),
        }]);
        for (_, id, end) in moments {
            let Some(end) = end else {
                open.insert(id);
                continue;
            };
            states = self.closure(lba, states, &open);
            open.remove(&id);
            states = states
                .into_iter()
                .filter(|state| matches!(end, End::Perhaps(_)) || state.effective.contains(&id))
                .map(|mut state| {
                    state.effective.remove(&id);
                    state
                })
                .collect();
            if states.is_empty() {
                return Err(Violation::NoOrder {
                    lba,
                    read: id,
                    value: self.value(id, lba).unwrap_or(Value::Zero),
                    history: self.describe(lba, ids),
                });
            }
        }
        Ok(())
    }

    /// Every state that open operations can lead to. Reads take effect as early as they can: that never forbids
    /// anything later.
    fn closure(&self, lba: Lba, states: BTreeSet<State>, open: &BTreeSet<OperationId>) -> BTreeSet<State> {
        let mut reached = BTreeSet::new();
        let mut work: Vec<State> = states.into_iter().collect();
        while let Some(mut state) = work.pop() {
            for id in open {
                if matches!(self.operations[id].kind, Kind::Read(_))
                    && self.value(*id, lba) == Some(state.value)
                {
                    state.effective.insert(*id);
                }
            }
            if !reached.insert(state.clone()) {
                continue;
            }
            for id in open {
                if state.effective.contains(id) || matches!(self.operations[id].kind, Kind::Read(_)) {
                    continue;
                }
                let mut next = state.clone();
                next.effective.insert(*id);
                next.value = self.value(*id, lba).unwrap_or(Value::Zero);
                work.push(next);
            }
        }
        reached
    }

    fn describe(&self, lba: Lba, ids: &[OperationId]) -> String {
        let lines = ids.iter().map(|id| {
            let operation = &self.operations[id];
            let what = match &operation.kind {
                Kind::Write => "write".to_owned(),
                Kind::Zeroes => "zeroes".to_owned(),
                Kind::Read(_) => match self.value(*id, lba) {
                    Some(value) => format!("read of {value:?}"),
                    None => "read without an answer".to_owned(),
                },
            };
            let end = match operation.end {
                Some(End::Done(time)) => format!("done at {time}"),
                Some(End::Perhaps(time)) => format!("perhaps, by {time}"),
                None => "open".to_owned(),
            };
            format!(
                "  {}: {what} of {} blocks at {}, {end}",
                id.0, operation.range.count, operation.range.start
            )
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    value: Value,
    effective: BTreeSet<OperationId>,
}

/// "weft" and a version, so that a block of ours is recognised before it is believed.
const CONTENTS_MAGIC: u64 = 0x0001_7466_6577_6f0a;

/// The bytes that write `id` gives to `range`.
#[must_use]
pub fn contents(id: OperationId, range: LbaRange) -> Bytes {
    let mut bytes = Vec::with_capacity(range.count as usize * BLOCK_BYTES);
    for lba in range.start.0..range.start.0 + range.count {
        fill(&mut bytes, id, Lba(lba));
    }
    bytes.into()
}

fn fill(bytes: &mut Vec<u8>, id: OperationId, lba: Lba) {
    for word in [CONTENTS_MAGIC, id.0, lba.0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    let mut word = id.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ lba.0.wrapping_mul(0xd6e8_feb8_6659_fd93) | 1;
    for _ in 3..BLOCK_BYTES / 8 {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.extend_from_slice(&word.to_le_bytes());
    }
}

fn identify(lba: Lba, block: &[u8]) -> Result<Value, Violation> {
    if block.iter().all(|byte| *byte == 0) {
        return Ok(Value::Zero);
    }
    let word = |index: usize| {
        let bytes = block[8 * index..8 * index + 8].try_into();
        u64::from_le_bytes(bytes.expect("eight bytes"))
    };
    let id = OperationId(word(1));
    let mut expected = Vec::with_capacity(BLOCK_BYTES);
    fill(&mut expected, id, lba);
    if expected == block {
        Ok(Value::Written(id))
    } else {
        let start = block[..32].iter().map(|byte| format!("{byte:02x}")).collect();
        Err(Violation::Garbage { lba, start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(lba: u64) -> LbaRange {
        LbaRange {
            start: Lba(lba),
            count: 1,
        }
    }

    fn write(oracle: &mut Oracle, lba: u64) -> OperationId {
        let id = oracle.write(block(lba));
        oracle.acknowledged(id);
        id
    }

    fn read(oracle: &mut Oracle, lba: u64, value: Value) {
        let id = oracle.read(block(lba));
        oracle.answered(id, &bytes(lba, value)).unwrap();
    }

    fn bytes(lba: u64, value: Value) -> Bytes {
        match value {
            Value::Zero => Bytes::from_static(&[0; BLOCK_BYTES]),
            Value::Written(id) => contents(id, block(lba)),
        }
    }

    #[test]
    fn the_last_acknowledged_write_is_read() {
        let mut oracle = Oracle::new();
        read(&mut oracle, 5, Value::Zero);
        write(&mut oracle, 5);
        let second = write(&mut oracle, 5);
        read(&mut oracle, 5, Value::Written(second));
        oracle.check().unwrap();
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        let mut oracle = Oracle::new();
        let first = write(&mut oracle, 5);
        write(&mut oracle, 5);
        read(&mut oracle, 5, Value::Written(first));
        assert!(matches!(
            oracle.check(),
            Err(Violation::NoOrder { lba: Lba(5), .. })
        ));
    }

    #[test]
    fn zeroes_where_data_was_acknowledged_are_found() {
        let mut oracle = Oracle::new();
        write(&mut oracle, 5);
        read(&mut oracle, 5, Value::Zero);
        assert!(oracle.check().is_err());
    }

    #[test]
    fn data_that_was_trimmed_must_not_come_back() {
        let mut oracle = Oracle::new();
        let id = write(&mut oracle, 5);
        let trim = oracle.zeroes(block(5));
        oracle.acknowledged(trim);
        read(&mut oracle, 5, Value::Written(id));
        assert!(oracle.check().is_err());
    }

    #[test]
    fn a_write_in_flight_may_be_read_or_not_and_then_stays() {
        let mut oracle = Oracle::new();
        let old = write(&mut oracle, 5);
        let new = oracle.write(block(5));
        read(&mut oracle, 5, Value::Written(old));
        read(&mut oracle, 5, Value::Written(new));
        oracle.check().unwrap();
        read(&mut oracle, 5, Value::Written(old));
        assert!(oracle.check().is_err(), "it was seen and must not vanish");
    }

    #[test]
    fn concurrent_reads_may_see_both_in_one_order_only() {
        let mut oracle = Oracle::new();
        let old = write(&mut oracle, 5);
        let new = oracle.write(block(5));
        // Two reads side by side, one sees the new and one the old value.
        let (first, second) = (oracle.read(block(5)), oracle.read(block(5)));
        oracle.answered(first, &bytes(5, Value::Written(new))).unwrap();
        oracle.answered(second, &bytes(5, Value::Written(old))).unwrap();
        oracle.acknowledged(new);
        oracle.check().unwrap();
    }

    #[test]
    fn an_unknown_write_is_decided_when_the_next_owner_serves() {
        let mut oracle = Oracle::new();
        let old = write(&mut oracle, 5);
        let lost = oracle.write(block(5));
        oracle.all_unknown();
        oracle.settle();
        let mut kept = oracle.clone();
        read(&mut kept, 5, Value::Written(lost));
        kept.check().unwrap();
        read(&mut oracle, 5, Value::Written(old));
        oracle.check().unwrap();
        read(&mut oracle, 5, Value::Written(lost));
        assert!(oracle.check().is_err(), "a ghost write after the takeover");
    }

    #[test]
    fn a_refused_write_may_have_left_a_part_and_nothing_later() {
        let mut oracle = Oracle::new();
        let old = write(&mut oracle, 5);
        let refused = oracle.write(block(5));
        oracle.refused(refused);
        read(&mut oracle, 5, Value::Written(old));
        oracle.check().unwrap();
        read(&mut oracle, 5, Value::Written(refused));
        assert!(oracle.check().is_err());
    }

    #[test]
    fn an_acknowledgement_after_the_takeover_must_be_true() {
        let mut oracle = Oracle::new();
        let old = write(&mut oracle, 5);
        let late = oracle.write(block(5));
        oracle.all_unknown();
        oracle.settle();
        let mut recovered = oracle.clone();
        read(&mut recovered, 5, Value::Written(late));
        recovered.acknowledged(late);
        recovered.check().unwrap();
        read(&mut oracle, 5, Value::Written(old));
        oracle.acknowledged(late);
        assert!(oracle.check().is_err());
    }

    #[test]
    fn overlapping_writes_end_in_one_order_for_everybody() {
        let mut oracle = Oracle::new();
        let (a, b) = (oracle.write(block(5)), oracle.write(block(5)));
        oracle.acknowledged(a);
        oracle.acknowledged(b);
        read(&mut oracle, 5, Value::Written(a));
        oracle.check().unwrap();
        read(&mut oracle, 5, Value::Written(b));
        assert!(oracle.check().is_err());
    }

    #[test]
    fn bytes_of_another_block_are_garbage() {
        let mut oracle = Oracle::new();
        let id = write(&mut oracle, 6);
        let reading = oracle.read(block(5));
        let answer = oracle.answered(reading, &contents(id, block(6)));
        assert!(matches!(answer, Err(Violation::Garbage { lba: Lba(5), .. })));
        assert!(oracle.check().is_err());
    }

    #[test]
    fn a_short_answer_is_found() {
        let mut oracle = Oracle::new();
        let reading = oracle.read(LbaRange {
            start: Lba(5),
            count: 2,
        });
        let answer = oracle.answered(reading, &Bytes::from_static(&[0; BLOCK_BYTES]));
        assert!(matches!(answer, Err(Violation::Length { answered: 4096, .. })));
    }
}
