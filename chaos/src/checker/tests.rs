//! Histories edited by hand, and small random ones judged by a slow checker that tries every order.

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;

const BLOCK: Block = Block { volume: 0, lba: 1 };

fn value(version: u32) -> Value {
    match version {
        0 => Value::Zero,
        version => Value::Written { client: 1, version },
    }
}

fn record(action: Action, version: u32, outcome: Outcome, from: u64, until: u64) -> Record {
    Record {
        block: BLOCK,
        client: 1,
        action,
        outcome,
        value: value(version),
        invoked_ns: from,
        completed_ns: until,
    }
}

fn read(version: u32, from: u64, until: u64) -> Record {
    record(Action::Read, version, Outcome::Ok, from, until)
}

fn write(version: u32, from: u64, until: u64) -> Record {
    record(Action::Write, version, Outcome::Ok, from, until)
}

fn unknown(version: u32, from: u64, until: u64) -> Record {
    record(Action::Write, version, Outcome::Unknown, from, until)
}

fn refused(version: u32, from: u64, until: u64) -> Record {
    record(Action::Write, version, Outcome::Refused, from, until)
}

fn zeroes(outcome: Outcome, from: u64, until: u64) -> Record {
    record(Action::WriteZeroes, 0, outcome, from, until)
}

#[track_caller]
fn accepts(history: &[Record]) {
    assert_eq!(check(history), []);
}

#[track_caller]
fn rejects(history: &[Record], reason: Reason) {
    let violations = check(history);
    assert_eq!(violations.len(), 1, "{violations:?}");
    assert_eq!(violations[0].reason, reason);
}

#[test]
fn reads_of_the_last_acknowledged_write_are_accepted() {
    accepts(&[
        read(0, 0, 1),
        write(1, 2, 3),
        read(1, 4, 5),
        write(2, 6, 7),
        read(2, 8, 9),
    ]);
    accepts(&[write(1, 0, 1), zeroes(Outcome::Ok, 2, 3), read(0, 4, 5)]);
}

#[test]
fn a_lost_acknowledged_write_is_rejected() {
    rejects(&[write(1, 0, 1), read(0, 2, 3)], Reason::NoOrder);
    rejects(&[write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)], Reason::NoOrder);
    let trim = record(Action::Deallocate, 0, Outcome::Ok, 2, 3);
    rejects(&[write(1, 0, 1), trim, read(1, 4, 5)], Reason::NoOrder);
}

#[test]
fn a_stale_read_is_rejected() {
    rejects(
        &[write(1, 0, 1), write(2, 2, 3), read(2, 4, 5), read(1, 6, 7)],
        Reason::NoOrder,
    );
    // A read that has seen a write in flight binds the later one.
    rejects(
        &[write(1, 0, 1), write(2, 2, 9), read(2, 3, 4), read(1, 5, 6)],
        Reason::NoOrder,
    );
}

#[test]
fn a_value_that_flips_back_is_rejected() {
    rejects(
        &[
            write(1, 0, 1),
            write(2, 2, 20),
            read(2, 3, 4),
            read(1, 5, 6),
            read(2, 7, 8),
        ],
        Reason::NoOrder,
    );
    // Nobody heard of the second write, but somebody saw it.
    rejects(
        &[write(1, 0, 1), unknown(2, 2, 3), read(2, 4, 5), read(1, 6, 7)],
        Reason::NoOrder,
    );
    // Overwritten, an unknown write that has been seen cannot come again.
    rejects(
        &[
            unknown(1, 0, 1),
            read(1, 2, 3),
            write(2, 4, 5),
            read(2, 6, 7),
            read(1, 8, 9),
        ],
        Reason::NoOrder,
    );
}

#[test]
fn a_value_never_written_is_rejected() {
    rejects(&[write(1, 0, 1), read(7, 2, 3)], Reason::NeverWritten);
    let mut foreign = read(1, 2, 3);
    foreign.value = Value::Foreign;
    rejects(&[write(1, 0, 1), foreign], Reason::NeverWritten);
}

#[test]
fn a_read_before_the_write_it_saw_is_rejected() {
    rejects(&[read(1, 0, 1), write(1, 2, 3)], Reason::NoOrder);
    rejects(&[read(1, 0, 1), unknown(1, 2, 3)], Reason::NoOrder);
}

#[test]
fn concurrent_operations_may_take_effect_in_any_order() {
    for last in [1, 2] {
        accepts(&[write(1, 0, 10), write(2, 1, 9), read(last, 11, 12)]);
    }
    accepts(&[write(1, 0, 10), read(0, 1, 2), read(1, 3, 4), read(1, 5, 6)]);
    accepts(&[
        write(1, 0, 10),
        write(2, 0, 10),
        read(1, 1, 9),
        read(2, 2, 8),
        read(1, 12, 13),
    ]);
    rejects(
        &[
            write(1, 0, 10),
            write(2, 0, 10),
            read(1, 1, 2),
            read(2, 3, 4),
            read(1, 12, 13),
        ],
        Reason::NoOrder,
    );
}

#[test]
fn an_unknown_write_may_take_effect_late_or_never() {
    accepts(&[write(1, 0, 1), unknown(2, 2, 3), read(1, 4, 5), read(1, 100, 101)]);
    accepts(&[
        write(1, 0, 1),
        unknown(2, 2, 3),
        read(1, 4, 5),
        write(3, 6, 7),
        read(2, 100, 101),
    ]);
}

#[test]
fn a_refused_write_may_take_effect_before_its_answer_or_never() {
    accepts(&[write(1, 0, 1), refused(2, 2, 5), read(1, 6, 7)]);
    accepts(&[write(1, 0, 1), refused(2, 2, 5), read(2, 6, 7)]);
    rejects(
        &[write(1, 0, 1), refused(2, 2, 5), read(1, 6, 7), read(2, 8, 9)],
        Reason::NoOrder,
    );
}

#[test]
fn each_zeroes_of_unknown_outcome_takes_effect_once() {
    let wiped = [zeroes(Outcome::Unknown, 0, 1), write(1, 2, 3), read(0, 4, 5)];
    accepts(&wiped);
    let again = [write(2, 6, 7), read(2, 8, 9), read(0, 10, 11)];
    rejects(&[&wiped[..], &again].concat(), Reason::NoOrder);
    accepts(&[&[zeroes(Outcome::Unknown, 0, 1)], &wiped[..], &again].concat());
    rejects(
        &[
            write(1, 0, 1),
            zeroes(Outcome::Refused, 2, 3),
            read(1, 4, 5),
            read(0, 6, 7),
        ],
        Reason::NoOrder,
    );
}

#[test]
fn blocks_are_judged_each_by_itself() {
    let other = |mut record: Record| {
        record.block = Block { volume: 1, ..BLOCK };
        record
    };
    accepts(&[write(1, 0, 1), other(read(0, 2, 3))]);
    rejects(&[write(1, 0, 1), other(read(1, 2, 3))], Reason::NeverWritten);
}

/// Whether some order explains a history, by trying them all.
fn some_order(rest: &[Record], held: Value) -> bool {
    // What has not taken effect need not, if it was not acknowledged.
    if rest.iter().all(|record| record.outcome != Outcome::Ok) {
        return true;
    }
    (0..rest.len()).any(|index| {
        let next = rest[index];
        // Nothing that had to happen before `next` was invoked may be left; refused ones are given up then.
        let mut left = rest.to_vec();
        left.remove(index);
        let too_late =
            |other: &Record| other.outcome != Outcome::Unknown && other.completed_ns < next.invoked_ns;
        if left
            .iter()
            .any(|other| too_late(other) && other.outcome == Outcome::Ok)
        {
            return false;
        }
        left.retain(|other| !too_late(other));
        match next.action {
            Action::Read => next.value == held && some_order(&left, held),
            _ => some_order(&left, next.value),
        }
    })
}

#[test]
fn small_random_histories_are_judged_as_by_trying_every_order() {
    let mut random = SmallRng::seed_from_u64(11);
    let mut verdicts = [0, 0];
    for _ in 0..6000 {
        let mut history = Vec::new();
        let writes = random.random_range(1..5_u32);
        for version in 1..=writes {
            let from = random.random_range(0..20);
            let until = from + random.random_range(1..8);
            let outcome = match random.random_range(0..4) {
                0 => Outcome::Unknown,
                1 => Outcome::Refused,
                _ => Outcome::Ok,
            };
            history.push(if random.random_range(0..4) == 0 {
                zeroes(outcome, from, until)
            } else {
                record(Action::Write, version, outcome, from, until)
            });
        }
        for _ in 0..random.random_range(1..4) {
            let from = random.random_range(0..24);
            let seen = history[random.random_range(0..writes as usize)].value;
            let seen = if random.random_range(0..5) == 0 {
                Value::Zero
            } else {
                seen
            };
            history.push(Record {
                value: seen,
                ..read(0, from, from + random.random_range(1..6))
            });
        }
        let expected = some_order(&history, Value::Zero);
        verdicts[usize::from(expected)] += 1;
        assert_eq!(check(&history).is_empty(), expected, "{history:#?}");
    }
    // Both kinds have to be among them, or the test would say little.
    assert!(verdicts.iter().all(|count| *count > 500), "{verdicts:?}");
}
