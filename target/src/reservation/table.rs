//! The reservation rules, without I/O: who is registered, what is held, who may do what.
//!
//! A method either refuses, and nothing has changed, or changes the table and says what follows from it in
//! [`Effects`]: whom to notify, and whose commands a Preempt and Abort has to see ended. Hosts are known by their
//! Host Identifier; the keys only prove that a reservation command is meant for this state of affairs.
//!
//! NVM Express Base Specification 2.0, "Reservations" and its command descriptions.

use std::collections::BTreeMap;

use weft_proto::deliberate::{Bug, planted};
use weft_proto::id::HostId;
use weft_proto::nvme::log::ReservationNotificationType;
use weft_proto::nvme::reservation::{
    PersistChange, RegisterAction, Registrant, ReservationStatus, ReservationType,
};

/// Most registrants of a namespace. Bounds memory, the file and a report (64 KiB); a cluster of hundreds of nodes
/// stays far below.
pub const REGISTRANTS_MAX: usize = 1023;

/// What a command does with the blocks, as the rules tell commands apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read, Compare, Verify.
    Read,
    /// Write, Write Zeroes, Dataset Management, Flush.
    Write,
}

/// Why the table did not do what it was asked. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Reservation Conflict.
    #[error("reservation conflict")]
    Conflict,
    /// Invalid Field in Command: a type or key that the command may not carry in this state.
    #[error("invalid field in reservation command")]
    InvalidField,
    /// [`REGISTRANTS_MAX`] hosts are registered.
    #[error("no room for another registrant")]
    Full,
}

/// Something a host is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whom.
    pub host: HostId,
    /// What.
    pub kind: ReservationNotificationType,
}

/// What follows from a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// In no particular order.
    pub notices: Vec<Notice>,
    /// Hosts that a preempt unregistered.
    pub preempted: Vec<HostId>,
}

/// A reservation that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its type.
    pub rtype: ReservationType,
    /// Who acquired it. With the all-registrants types every registrant is a holder, and this is only
    /// history.
    pub holder: HostId,
}

/// Registrations and reservation of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReservationTable {
    generation: u32,
    ptpl: bool,
    registrants: BTreeMap<HostId, u64>,
    held: Option<Held>,
}

impl ReservationTable {
    /// Nobody registered, nothing held.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From what was persisted. `None` for a state that no sequence of commands leads to.
    #[must_use]
    pub fn restore(generation: u32, registrants: BTreeMap<HostId, u64>, held: Option<Held>) -> Option<Self> {
        let consistent = registrants.len() <= REGISTRANTS_MAX
            && match held {
                None => true,
                Some(held) if held.rtype.is_all_registrants() => !registrants.is_empty(),
                Some(held) => registrants.contains_key(&held.holder),
            };
        consistent.then_some(Self {
            generation,
            ptpl: true,
            registrants,
            held,
        })
    }

    /// Counts registers, clears and preempts; wraps.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Whether registrations and reservation persist through power loss.
    #[must_use]
    pub fn ptpl(&self) -> bool {
        self.ptpl
    }

    /// The reservation held.
    #[must_use]
    pub fn held(&self) -> Option<Held> {
        self.held
    }

    /// Registered hosts and their keys.
    #[must_use]
    pub fn registrants(&self) -> &BTreeMap<HostId, u64> {
        &self.registrants
    }

    /// Whether `host` holds the reservation.
    #[must_use]
    pub fn is_holder(&self, host: HostId) -> bool {
        self.held.is_some_and(|held| {
            if held.rtype.is_all_registrants() {
                self.registrants.contains_key(&host)
            } else {
                held.holder == host
            }
        })
    }

    /// Whether a command of `host` may touch the blocks.
    #[must_use]
    pub fn allows(&self, host: HostId, access: Access) -> bool {
        let Some(held) = self.held else { return true };
        let reads_are_free = matches!(
            held.rtype,
            ReservationType::WriteExclusive
                | ReservationType::WriteExclusiveRegistrantsOnly
                | ReservationType::WriteExclusiveAllRegistrants
        );
        if access == Access::Read && reads_are_free {
            return true;
        }
        match held.rtype {
            ReservationType::WriteExclusive | ReservationType::ExclusiveAccess => held.holder == host,
            ReservationType::WriteExclusiveRegistrantsOnly
            | ReservationType::ExclusiveAccessRegistrantsOnly
            | ReservationType::WriteExclusiveAllRegistrants
            | ReservationType::ExclusiveAccessAllRegistrants => self.registrants.contains_key(&host),
        }
    }

    /// What a Reservation Report says.
    #[must_use]
    pub fn status(&self) -> ReservationStatus {
        ReservationStatus {
            generation: self.generation,
            rtype: self.held.map(|held| held.rtype),
            ptpl: self.ptpl,
            registrants: self
                .registrants
                .iter()
                .map(|(&hostid, &key)| Registrant {
                    hostid,
                    key,
                    holder: self.is_holder(hostid),
                })
                .collect(),
        }
    }

    /// Feature Reservation Persistence.
    pub fn set_ptpl(&mut self, ptpl: bool) {
        self.ptpl = ptpl;
    }

    /// Reservation Register.
    ///
    /// # Errors
    /// [`Refused`], and nothing has changed.
    pub fn register(
        &mut self,
        host: HostId,
        action: RegisterAction,
        ignore_existing_key: bool,
        current_key: u64,
        new_key: u64,
        persist: PersistChange,
    ) -> Result<Effects, Refused> {
        let registered = self.registrants.get(&host).copied();
        let mut effects = Effects::default();
        match action {
            RegisterAction::Register => match registered {
                // CRKEY is not looked at. The same key again is a repeated command, another key a conflict.
                Some(key) if key != new_key => return Err(Refused::Conflict),
                Some(_) => {}
                None if self.registrants.len() >= REGISTRANTS_MAX => return Err(Refused::Full),
                None => {
                    self.registrants.insert(host, new_key);
                }
            },
            RegisterAction::Unregister => {
                let key = registered.ok_or(Refused::Conflict)?;
                if key != current_key && !ignore_existing_key {
                    return Err(Refused::Conflict);
                }
                let was_holder = self.is_holder(host);
                self.registrants.remove(&host);
                if let Some(held) = self.held
                    && was_holder
                    && (!held.rtype.is_all_registrants() || self.registrants.is_empty())
                {
                    self.held = None;
                    self.tell_released(held.rtype, host, &mut effects);
                }
            }
            RegisterAction::Replace => {
                let key = registered.ok_or(Refused::Conflict)?;
                if key != current_key && !ignore_existing_key {
                    return Err(Refused::Conflict);
                }
                self.registrants.insert(host, new_key);
            }
        }
        match persist {
            PersistChange::Keep => {}
            PersistChange::Clear => self.ptpl = false,
            PersistChange::Set => self.ptpl = true,
        }
        self.changed();
        Ok(effects)
    }

    /// Reservation Acquire, action Acquire.
    ///
    /// # Errors
    /// [`Refused`], and nothing has changed.
    pub fn acquire(
        &mut self,
        host: HostId,
        current_key: u64,
        rtype: ReservationType,
    ) -> Result<Effects, Refused> {
        self.check_key(host, current_key)?;
        match self.held {
            None => self.held = Some(Held { rtype, holder: host }),
            // The holder asks for what it has. Another type would be a change, which takes a release.
            Some(held) if held.rtype == rtype && self.is_holder(host) => {}
            Some(_) => return Err(Refused::Conflict),
        }
        Ok(Effects::default())
    }

    /// Reservation Acquire, actions Preempt and Preempt and Abort, which differ in when they complete only.
    ///
    /// # Errors
    /// [`Refused`], and nothing has changed. `preempt_key` that nobody has is a conflict.
    pub fn preempt(
        &mut self,
        host: HostId,
        current_key: u64,
        preempt_key: u64,
        rtype: ReservationType,
    ) -> Result<Effects, Refused> {
        self.check_key(host, current_key)?;
        let Some(held) = self.held else {
            return self.remove_others(host, Some(preempt_key), None);
        };
        if held.rtype.is_all_registrants() {
            if preempt_key != 0 {
                // Every registrant holds it: the caller goes on doing so, with the type it has.
                return self.remove_others(host, Some(preempt_key), None);
            }
            let effects = self.remove_others(host, None, Some(held))?;
            self.held = Some(Held { rtype, holder: host });
            return Ok(effects);
        }
        if self.registrants.get(&held.holder) == Some(&preempt_key) {
            let effects = if held.holder == host {
                // A host that preempts itself changes the type; others with its key go.
                self.remove_others(host, Some(preempt_key), Some(held))
                    .or_else(|refused| match refused {
                        Refused::Conflict => {
                            self.changed();
                            Ok(Effects::default())
                        }
                        other => Err(other),
                    })?
            } else {
                self.remove_others(host, Some(preempt_key), Some(held))?
            };
            let mut effects = effects;
            self.held = Some(Held { rtype, holder: host });
            if rtype != held.rtype {
                self.tell_released(held.rtype, host, &mut effects);
            }
            return Ok(effects);
        }
        if preempt_key == 0 {
            return Err(Refused::InvalidField);
        }
        self.remove_others(host, Some(preempt_key), None)
    }

    /// Reservation Release, action Release.
    ///
    /// # Errors
    /// [`Refused`], and nothing has changed.
    pub fn release(
        &mut self,
        host: HostId,
        current_key: u64,
        rtype: Option<ReservationType>,
    ) -> Result<Effects, Refused> {
        self.check_key(host, current_key)?;
        let mut effects = Effects::default();
        // Without a reservation, or for another's, there is nothing to do, and that is a success.
        if let Some(held) = self.held.filter(|_| self.is_holder(host)) {
            if rtype != Some(held.rtype) {
                return Err(Refused::InvalidField);
            }
            self.held = None;
            self.tell_released(held.rtype, host, &mut effects);
        }
        Ok(effects)
    }

    /// Reservation Release, action Clear: no reservation, no registrants.
    ///
    /// # Errors
    /// [`Refused`], and nothing has changed.
    pub fn clear(&mut self, host: HostId, current_key: u64) -> Result<Effects, Refused> {
        self.check_key(host, current_key)?;
        self.held = None;
        let notices = self
            .registrants
            .keys()
            .filter(|&&other| other != host)
            .map(|&other| Notice {
                host: other,
                kind: ReservationNotificationType::RESERVATION_PREEMPTED,
            })
            .collect();
        self.registrants.clear();
        self.changed();
        Ok(Effects {
            notices,
            preempted: Vec::new(),
        })
    }

    fn check_key(&self, host: HostId, current_key: u64) -> Result<(), Refused> {
        match self.registrants.get(&host) {
            Some(&key) if key == current_key => Ok(()),
            Some(_) | None => Err(Refused::Conflict),
        }
    }

    /// Unregisters every host but `host` whose key is `key` (`None`: any key). `lost` is the reservation that they
    /// lose with it.
    fn remove_others(
        &mut self,
        host: HostId,
        key: Option<u64>,
        lost: Option<Held>,
    ) -> Result<Effects, Refused> {
        let preempted: Vec<HostId> = self
            .registrants
            .iter()
            .filter(|&(&other, &other_key)| other != host && key.is_none_or(|key| key == other_key))
            .map(|(&other, _)| other)
            .collect();
        if preempted.is_empty() && key.is_some() {
            return Err(Refused::Conflict);
        }
        let notices = preempted
            .iter()
            .map(|&other| Notice {
                host: other,
                kind: if lost.is_some_and(|held| held.rtype.is_all_registrants() || held.holder == other) {
                    ReservationNotificationType::RESERVATION_PREEMPTED
                } else {
                    ReservationNotificationType::REGISTRATION_PREEMPTED
                },
            })
            .collect();
        for other in preempted.iter().filter(|_| !planted(Bug::PreemptChangesNothing)) {
            self.registrants.remove(other);
        }
        self.changed();
        Ok(Effects { notices, preempted })
    }

    /// Tells the remaining registrants that they are no longer covered. With the two exclusive types they never
    /// were.
    fn tell_released(&self, rtype: ReservationType, by: HostId, effects: &mut Effects) {
        if matches!(
            rtype,
            ReservationType::WriteExclusive | ReservationType::ExclusiveAccess
        ) {
            return;
        }
        effects.notices.extend(
            self.registrants
                .keys()
                .filter(|&&other| other != by)
                .map(|&host| Notice {
                    host,
                    kind: ReservationNotificationType::RESERVATION_RELEASED,
                }),
        );
    }

    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests;
