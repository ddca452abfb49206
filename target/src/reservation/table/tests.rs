//! Table-driven: each row is one sentence of the specification.

use ReservationType::{
    ExclusiveAccess, ExclusiveAccessAllRegistrants, ExclusiveAccessRegistrantsOnly, WriteExclusive,
    WriteExclusiveAllRegistrants, WriteExclusiveRegistrantsOnly,
};

use super::*;

const HOLDER: HostId = HostId([1; 16]);
const REGISTRANT: HostId = HostId([2; 16]);
const STRANGER: HostId = HostId([3; 16]);

fn register(table: &mut ReservationTable, host: HostId, key: u64) {
    table
        .register(host, RegisterAction::Register, false, 0, key, PersistChange::Keep)
        .expect("registers");
}

/// HOLDER with key 10 holds `rtype`, REGISTRANT with key 20 is registered.
fn held(rtype: ReservationType) -> ReservationTable {
    let mut table = ReservationTable::new();
    register(&mut table, HOLDER, 10);
    register(&mut table, REGISTRANT, 20);
    table.acquire(HOLDER, 10, rtype).expect("acquires");
    table
}

fn notice(host: HostId, kind: ReservationNotificationType) -> Notice {
    Notice { host, kind }
}

#[test]
fn each_type_lets_each_kind_of_host_do_what_the_specification_says() {
    // (type, [holder, registrant, stranger] may read, may write)
    let rows = [
        (WriteExclusive, [true, true, true], [true, false, false]),
        (ExclusiveAccess, [true, false, false], [true, false, false]),
        (
            WriteExclusiveRegistrantsOnly,
            [true, true, true],
            [true, true, false],
        ),
        (
            ExclusiveAccessRegistrantsOnly,
            [true, true, false],
            [true, true, false],
        ),
        (
            WriteExclusiveAllRegistrants,
            [true, true, true],
            [true, true, false],
        ),
        (
            ExclusiveAccessAllRegistrants,
            [true, true, false],
            [true, true, false],
        ),
    ];
    for (rtype, reads, writes) in rows {
        let table = held(rtype);
        for (host, may_read, may_write) in [
            (HOLDER, reads[0], writes[0]),
            (REGISTRANT, reads[1], writes[1]),
            (STRANGER, reads[2], writes[2]),
        ] {
            assert_eq!(table.allows(host, Access::Read), may_read, "{rtype:?} {host}");
            assert_eq!(table.allows(host, Access::Write), may_write, "{rtype:?} {host}");
        }
        assert_eq!(
            table.is_holder(REGISTRANT),
            rtype.is_all_registrants(),
            "{rtype:?}"
        );
    }
}

#[test]
fn without_a_reservation_everybody_may_do_everything() {
    let mut table = ReservationTable::new();
    register(&mut table, HOLDER, 10);
    assert!(table.allows(STRANGER, Access::Write));
}

#[test]
fn registering_again_takes_the_same_key() {
    let mut table = held(WriteExclusive);
    register(&mut table, REGISTRANT, 20);
    let again = table.register(
        REGISTRANT,
        RegisterAction::Register,
        true,
        20,
        21,
        PersistChange::Set,
    );
    assert_eq!(again, Err(Refused::Conflict));
    assert!(!table.ptpl(), "a refused command changes nothing");
}

#[test]
fn unregister_and_replace_prove_the_key_unless_told_to_ignore_it() {
    for action in [RegisterAction::Unregister, RegisterAction::Replace] {
        let mut table = held(WriteExclusive);
        let stranger = table.register(STRANGER, action, true, 20, 30, PersistChange::Keep);
        assert_eq!(stranger, Err(Refused::Conflict), "{action:?}: not registered");
        let wrong = table.register(REGISTRANT, action, false, 21, 30, PersistChange::Keep);
        assert_eq!(wrong, Err(Refused::Conflict), "{action:?}: wrong key");
        assert!(
            table
                .clone()
                .register(REGISTRANT, action, false, 20, 30, PersistChange::Keep)
                .is_ok()
        );
        assert!(
            table
                .register(REGISTRANT, action, true, 21, 30, PersistChange::Keep)
                .is_ok()
        );
        let left = table.registrants().get(&REGISTRANT).copied();
        assert_eq!(
            left,
            if action == RegisterAction::Replace {
                Some(30)
            } else {
                None
            }
        );
    }
}

#[test]
fn a_holder_that_unregisters_releases_unless_others_hold_too() {
    for rtype in ReservationType::ALL {
        let mut table = held(rtype);
        let effects = table
            .register(
                HOLDER,
                RegisterAction::Unregister,
                false,
                10,
                0,
                PersistChange::Keep,
            )
            .expect("unregisters");
        assert_eq!(table.held().is_some(), rtype.is_all_registrants(), "{rtype:?}");
        let released = notice(REGISTRANT, ReservationNotificationType::RESERVATION_RELEASED);
        let told = matches!(
            rtype,
            WriteExclusiveRegistrantsOnly | ExclusiveAccessRegistrantsOnly
        );
        assert_eq!(
            effects.notices,
            if told { vec![released] } else { vec![] },
            "{rtype:?}"
        );
        if rtype.is_all_registrants() {
            table
                .register(
                    REGISTRANT,
                    RegisterAction::Unregister,
                    false,
                    20,
                    0,
                    PersistChange::Keep,
                )
                .expect("unregisters");
            assert_eq!(table.held(), None, "the last registrant takes it along");
        }
    }
}

#[test]
fn acquire_needs_a_registration_its_key_and_nobody_else() {
    let mut table = ReservationTable::new();
    assert_eq!(
        table.acquire(HOLDER, 0, WriteExclusive),
        Err(Refused::Conflict),
        "not registered"
    );
    register(&mut table, HOLDER, 10);
    register(&mut table, REGISTRANT, 20);
    assert_eq!(
        table.acquire(HOLDER, 11, WriteExclusive),
        Err(Refused::Conflict),
        "wrong key"
    );
    assert!(table.acquire(HOLDER, 10, WriteExclusive).is_ok());
    assert!(table.acquire(HOLDER, 10, WriteExclusive).is_ok(), "what it has");
    assert_eq!(
        table.acquire(HOLDER, 10, ExclusiveAccess),
        Err(Refused::Conflict),
        "another type"
    );
    assert_eq!(
        table.acquire(REGISTRANT, 20, WriteExclusive),
        Err(Refused::Conflict),
        "another's"
    );
}

#[test]
fn every_registrant_acquires_what_every_registrant_holds() {
    let mut table = held(WriteExclusiveAllRegistrants);
    assert!(
        table
            .acquire(REGISTRANT, 20, WriteExclusiveAllRegistrants)
            .is_ok()
    );
    assert_eq!(
        table.acquire(REGISTRANT, 20, WriteExclusive),
        Err(Refused::Conflict)
    );
}

#[test]
fn release_asks_for_the_type_and_is_idle_for_those_who_hold_nothing() {
    for rtype in ReservationType::ALL {
        let mut table = held(rtype);
        let other = if rtype == WriteExclusive {
            ExclusiveAccess
        } else {
            WriteExclusive
        };
        assert_eq!(table.release(HOLDER, 10, Some(other)), Err(Refused::InvalidField));
        assert_eq!(table.release(HOLDER, 11, Some(rtype)), Err(Refused::Conflict));
        assert_eq!(table.release(STRANGER, 0, Some(rtype)), Err(Refused::Conflict));
        if !rtype.is_all_registrants() {
            assert_eq!(table.release(REGISTRANT, 20, Some(rtype)), Ok(Effects::default()));
            assert!(table.held().is_some());
        }
        let effects = table.release(HOLDER, 10, Some(rtype)).expect("releases");
        assert_eq!(table.held(), None);
        let told = !matches!(rtype, WriteExclusive | ExclusiveAccess);
        assert_eq!(effects.notices.len(), usize::from(told), "{rtype:?}");
        assert_eq!(table.registrants().len(), 2, "registrations stay");
    }
}

#[test]
fn clear_removes_everything_and_tells_the_others() {
    let mut table = held(WriteExclusiveAllRegistrants);
    assert_eq!(table.clear(STRANGER, 0), Err(Refused::Conflict));
    let effects = table.clear(HOLDER, 10).expect("clears");
    assert_eq!(table.held(), None);
    assert!(table.registrants().is_empty());
    assert_eq!(
        effects.notices,
        [notice(
            REGISTRANT,
            ReservationNotificationType::RESERVATION_PREEMPTED
        )]
    );
}

#[test]
fn preempting_the_holder_takes_its_place() {
    for rtype in [
        WriteExclusive,
        ExclusiveAccess,
        WriteExclusiveRegistrantsOnly,
        ExclusiveAccessRegistrantsOnly,
    ] {
        let mut table = held(rtype);
        let effects = table
            .preempt(REGISTRANT, 20, 10, ExclusiveAccess)
            .expect("preempts");
        assert_eq!(effects.preempted, [HOLDER]);
        assert_eq!(
            effects.notices,
            [notice(HOLDER, ReservationNotificationType::RESERVATION_PREEMPTED)]
        );
        assert_eq!(
            table.held(),
            Some(Held {
                rtype: ExclusiveAccess,
                holder: REGISTRANT
            })
        );
        assert!(!table.allows(HOLDER, Access::Write));
    }
}

#[test]
fn preempting_a_registrant_leaves_the_reservation() {
    let mut table = held(WriteExclusiveRegistrantsOnly);
    let effects = table.preempt(HOLDER, 10, 20, ExclusiveAccess).expect("preempts");
    assert_eq!(effects.preempted, [REGISTRANT]);
    assert_eq!(
        effects.notices,
        [notice(
            REGISTRANT,
            ReservationNotificationType::REGISTRATION_PREEMPTED
        )]
    );
    assert_eq!(
        table.held(),
        Some(Held {
            rtype: WriteExclusiveRegistrantsOnly,
            holder: HOLDER
        })
    );
}

#[test]
fn preempting_one_of_all_registrants_keeps_the_reservation_in_force() {
    let mut table = held(WriteExclusiveAllRegistrants);
    let effects = table
        .preempt(REGISTRANT, 20, 10, WriteExclusiveAllRegistrants)
        .expect("preempts");
    assert_eq!(effects.preempted, [HOLDER]);
    assert_eq!(
        table.held().map(|held| held.rtype),
        Some(WriteExclusiveAllRegistrants)
    );
    assert!(!table.allows(HOLDER, Access::Write));
    assert!(table.allows(REGISTRANT, Access::Write));
    let again = table.preempt(REGISTRANT, 20, 10, WriteExclusiveAllRegistrants);
    assert_eq!(again, Err(Refused::Conflict), "nobody has that key any more");
}

#[test]
fn preempting_key_zero_takes_it_from_all_registrants_and_is_invalid_otherwise() {
    let mut table = held(ExclusiveAccessAllRegistrants);
    register(&mut table, STRANGER, 30);
    let effects = table
        .preempt(REGISTRANT, 20, 0, WriteExclusive)
        .expect("preempts");
    assert_eq!(effects.preempted, [HOLDER, STRANGER]);
    assert_eq!(
        table.held(),
        Some(Held {
            rtype: WriteExclusive,
            holder: REGISTRANT
        })
    );
    assert_eq!(
        table.preempt(REGISTRANT, 20, 0, WriteExclusive),
        Err(Refused::InvalidField)
    );
}

#[test]
fn preempting_without_a_reservation_only_unregisters() {
    let mut table = ReservationTable::new();
    register(&mut table, HOLDER, 10);
    register(&mut table, REGISTRANT, 20);
    register(&mut table, STRANGER, 20);
    let effects = table.preempt(HOLDER, 10, 20, WriteExclusive).expect("preempts");
    assert_eq!(
        effects.preempted,
        [REGISTRANT, STRANGER],
        "everybody with that key"
    );
    assert_eq!(table.held(), None);
    assert_eq!(
        table.preempt(HOLDER, 10, 20, WriteExclusive),
        Err(Refused::Conflict)
    );
}

#[test]
fn a_host_that_preempts_itself_changes_the_type() {
    let mut table = held(WriteExclusiveRegistrantsOnly);
    let effects = table.preempt(HOLDER, 10, 10, WriteExclusive).expect("preempts");
    assert_eq!(
        table.held(),
        Some(Held {
            rtype: WriteExclusive,
            holder: HOLDER
        })
    );
    assert!(effects.preempted.is_empty());
    assert_eq!(
        effects.notices,
        [notice(
            REGISTRANT,
            ReservationNotificationType::RESERVATION_RELEASED
        )]
    );
}

#[test]
fn preempt_proves_the_key_first() {
    for rtype in ReservationType::ALL {
        let mut table = held(rtype);
        let before = table.clone();
        assert_eq!(table.preempt(STRANGER, 0, 10, rtype), Err(Refused::Conflict));
        assert_eq!(table.preempt(REGISTRANT, 99, 10, rtype), Err(Refused::Conflict));
        assert_eq!(table, before);
    }
}

#[test]
fn the_generation_counts_registers_preempts_and_clears_only() {
    let mut table = held(WriteExclusiveAllRegistrants);
    assert_eq!(table.generation(), 2);
    table
        .release(HOLDER, 10, Some(WriteExclusiveAllRegistrants))
        .expect("releases");
    assert_eq!(table.generation(), 2);
    table.preempt(HOLDER, 10, 20, WriteExclusive).expect("preempts");
    assert_eq!(table.generation(), 3);
    table.clear(HOLDER, 10).expect("clears");
    assert_eq!(table.generation(), 4);
}

#[test]
fn registrants_are_bounded() {
    let mut table = ReservationTable::new();
    for index in 0..REGISTRANTS_MAX {
        register(&mut table, HostId((index as u128).to_le_bytes()), 1);
    }
    let one_more = table.register(
        HostId([0xff; 16]),
        RegisterAction::Register,
        false,
        0,
        1,
        PersistChange::Keep,
    );
    assert_eq!(one_more, Err(Refused::Full));
}

#[test]
fn a_state_that_no_commands_lead_to_is_not_restored() {
    let held = Held {
        rtype: WriteExclusive,
        holder: HOLDER,
    };
    assert_eq!(ReservationTable::restore(1, BTreeMap::new(), Some(held)), None);
    let registrants = BTreeMap::from([(HOLDER, 10)]);
    let table = ReservationTable::restore(1, registrants, Some(held)).expect("consistent");
    assert!(table.ptpl() && table.is_holder(HOLDER));
}
