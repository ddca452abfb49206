//! The simulator itself: a seed is one history, and the bugs that are planted are found.

use weft_chaos::sim::{self, Fault};

/// The digest stands for the order of all polls and the time of every answer.
#[test]
fn a_seed_is_replayed_poll_by_poll() {
    let runs = |seeds: std::ops::Range<u64>| -> Vec<_> {
        seeds
            .map(|seed| sim::run(seed, false))
            .map(|run| {
                (
                    run.digest,
                    run.events,
                    run.operations,
                    run.commands,
                    run.simulated,
                )
            })
            .collect()
    };
    let first = runs(0..12);
    assert_eq!(first, runs(0..12));
    let mut distinct = first.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), first.len(), "every seed is a history of its own");
}

/// Its owner was stopped, declared dead, and went on when its volume had been deleted: what it answered then counted as lost.
#[test]
fn an_owner_that_outlives_its_volume_loses_nothing() {
    assert_eq!(sim::run(8_727_249, false).failures, Vec::<String>::new());
}

#[test]
fn a_few_seeds_do_what_a_run_is_for_and_nothing_is_wrong() {
    let mut coverage = sim::Coverage::default();
    let mut operations = 0;
    for seed in 100..200 {
        let outcome = sim::run(seed, false);
        assert_eq!(outcome.failures, Vec::<String>::new(), "seed {seed}");
        coverage.merge(&outcome.coverage);
        operations += outcome.operations;
    }
    assert!(coverage.faults() > 40, "{coverage}");
    assert!(operations > 10_000, "{operations} operations");
    let missing: Vec<Fault> = Fault::ALL
        .iter()
        .copied()
        .filter(|fault| coverage.times(*fault) == 0)
        .collect();
    assert_eq!(missing, [], "every kind of fault happens in a hundred seeds");
}

/// `cargo test --release -p weft-chaos --features deliberate-bugs --test sim`. All of them, over more seeds: `sim --bug all`.
#[cfg(feature = "deliberate-bugs")]
#[test]
fn bugs_of_every_crate_are_found() {
    use weft_proto::deliberate::Bug;

    for bug in [
        Bug::AcknowledgeBeforeDurable,
        Bug::DropLastStripe,
        Bug::TrimInMemoryOnly,
        Bug::ReuseEpoch,
        Bug::AbortDoesNotWait,
        Bug::DeleteDoesNotDrain,
    ] {
        let found = sim::hunt(bug, 0..400, false);
        assert!(found.is_some(), "{bug:?} was not found");
    }
}
