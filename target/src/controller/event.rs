//! Asynchronous events of one controller: what happened, what was reported, and who waits to hear.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use weft_proto::nvme::event::AsyncEvent;
use weft_proto::nvme::feature::AsyncEventConfig;
use weft_proto::nvme::log::{ReservationNotification, ReservationNotificationType};

/// Asynchronous Event Requests that may be outstanding (AERL + 1). Hosts use one to four.
pub(super) const REQUESTS_MAX: usize = 16;

/// Reservation notifications kept until they are read; older ones give way.
const NOTIFICATIONS_MAX: usize = 64;

/// Most entries of a Changed Namespace List; beyond, it says "many".
const CHANGED_MAX: usize = 1024;

#[derive(Default)]
pub(super) struct Events {
    /// Which notices the host asked for.
    pub(super) config: AsyncEventConfig,
    /// Requests that wait, oldest first.
    parked: VecDeque<u16>,
    /// Not yet reported.
    pending: BTreeSet<AsyncEvent>,
    /// Reported, and masked until the host has read the log page.
    reported: BTreeSet<AsyncEvent>,
    changed_namespaces: BTreeSet<u32>,
    notifications: VecDeque<(u64, u32, ReservationNotificationType)>,
    notification_count: u64,
}

impl Events {
    /// Notes an event; answers whether there is a completion to send.
    pub(super) fn raise(&mut self, event: AsyncEvent) -> bool {
        if !self.wants(event) || self.reported.contains(&event) {
            return false;
        }
        self.pending.insert(event) && !self.parked.is_empty()
    }

    fn wants(&self, event: AsyncEvent) -> bool {
        match event {
            AsyncEvent::NAMESPACE_CHANGED => self.config.wants(AsyncEventConfig::NAMESPACE_ATTRIBUTE),
            AsyncEvent::ANA_CHANGE => self.config.wants(AsyncEventConfig::ANA_CHANGE),
            AsyncEvent::DISCOVERY_CHANGE => self.config.wants(AsyncEventConfig::DISCOVERY_CHANGE),
            // Has a mask of its own.
            _ => true,
        }
    }

    /// Keeps a request until something happens.
    pub(super) fn park(&mut self, cid: u16) -> bool {
        let room = self.parked.len() < REQUESTS_MAX;
        if room {
            self.parked.push_back(cid);
        }
        room
    }

    /// A request and what it is completed with.
    pub(super) fn poll(&mut self) -> Option<(u16, AsyncEvent)> {
        if self.parked.is_empty() {
            return None;
        }
        let event = self.pending.pop_first()?;
        self.reported.insert(event);
        self.parked.pop_front().map(|cid| (cid, event))
    }

    /// The host has read a log page, which ends the masking of its events.
    pub(super) fn log_read(&mut self, lid: u8) {
        self.reported.retain(|event| event.lid() != lid);
        self.pending.retain(|event| event.lid() != lid);
    }

    pub(super) fn namespace_changed(&mut self, nsid: u32) {
        if self.changed_namespaces.len() <= CHANGED_MAX {
            self.changed_namespaces.insert(nsid);
        }
    }

    /// The Changed Namespace List, which reading empties.
    pub(super) fn changed_namespaces(&mut self, retain: bool) -> Vec<u32> {
        let list: Vec<u32> = self.changed_namespaces.iter().copied().collect();
        if !retain {
            self.changed_namespaces.clear();
        }
        if list.len() > CHANGED_MAX {
            vec![weft_proto::nvme::NSID_ALL]
        } else {
            list
        }
    }

    pub(super) fn reservation_notice(&mut self, nsid: u32, kind: ReservationNotificationType) {
        self.notification_count = self.notification_count.wrapping_add(1).max(1);
        if self.notifications.len() == NOTIFICATIONS_MAX {
            self.notifications.pop_front();
        }
        self.notifications
            .push_back((self.notification_count, nsid, kind));
    }

    /// The oldest reservation notification, which reading removes. Answers whether more follow.
    pub(super) fn reservation_notification(&mut self, retain: bool) -> (ReservationNotification, bool) {
        let mut page = ReservationNotification::empty();
        let Some(&(count, nsid, kind)) = self.notifications.front() else {
            return (page, false);
        };
        let available = self.notifications.len() - 1;
        page.log_page_count = count.into();
        page.notification = kind;
        page.available = u8::try_from(available).unwrap_or(u8::MAX);
        page.nsid = nsid.into();
        if !retain {
            self.notifications.pop_front();
        }
        (page, available > 0)
    }
}

/// Reservation Notification Mask by namespace, part of the features.
#[derive(Default)]
pub(super) struct NotificationMasks(BTreeMap<u32, u32>);

impl NotificationMasks {
    pub(super) fn set(&mut self, nsids: impl Iterator<Item = u32>, mask: u32) {
        self.0.extend(nsids.map(|nsid| (nsid, mask)));
    }

    pub(super) fn mask(&self, nsid: u32) -> u32 {
        self.0.get(&nsid).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening() -> Events {
        let config = AsyncEventConfig(AsyncEventConfig::ANA_CHANGE);
        Events {
            config,
            ..Events::default()
        }
    }

    #[test]
    fn an_event_is_reported_once_until_its_log_page_is_read() {
        let mut events = listening();
        assert!(events.park(7) && events.park(8));
        assert!(events.raise(AsyncEvent::ANA_CHANGE));
        assert_eq!(events.poll(), Some((7, AsyncEvent::ANA_CHANGE)));
        assert!(!events.raise(AsyncEvent::ANA_CHANGE), "masked");
        assert_eq!(events.poll(), None);
        events.log_read(0x0c);
        assert!(events.raise(AsyncEvent::ANA_CHANGE));
        assert_eq!(events.poll(), Some((8, AsyncEvent::ANA_CHANGE)));
    }

    #[test]
    fn an_event_waits_for_a_request_and_unwanted_ones_do_not_happen() {
        let mut events = listening();
        assert!(!events.raise(AsyncEvent::NAMESPACE_CHANGED), "not asked for");
        assert!(!events.raise(AsyncEvent::ANA_CHANGE), "nobody waits yet");
        assert!(events.park(1));
        assert_eq!(events.poll(), Some((1, AsyncEvent::ANA_CHANGE)));
    }

    #[test]
    fn requests_are_bounded() {
        let mut events = listening();
        for cid in 0..REQUESTS_MAX as u16 {
            assert!(events.park(cid));
        }
        assert!(!events.park(99));
    }

    #[test]
    fn reservation_notifications_are_read_oldest_first() {
        let mut events = listening();
        events.reservation_notice(1, ReservationNotificationType::REGISTRATION_PREEMPTED);
        events.reservation_notice(2, ReservationNotificationType::RESERVATION_RELEASED);
        let (page, more) = events.reservation_notification(false);
        assert_eq!(
            (page.nsid.get(), page.log_page_count.get(), page.available, more),
            (1, 1, 1, true)
        );
        let (page, more) = events.reservation_notification(false);
        assert_eq!(
            (page.nsid.get(), page.log_page_count.get(), page.available, more),
            (2, 2, 0, false)
        );
        let (page, _) = events.reservation_notification(false);
        assert_eq!(page.notification, ReservationNotificationType::EMPTY);
    }
}
