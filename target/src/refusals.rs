//! Who was told lately that it may not connect: a host that tries again and again is logged once a minute.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use weft_proto::nqn::Nqn;
use weft_proto::nvme::status::Status;

/// Between two lines about the same refusal.
const QUIET: Duration = Duration::from_secs(60);

/// Refusals remembered. Names are of the host's making, so there has to be a bound.
const REFUSALS_MAX: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Refusals(RefCell<HashMap<(Nqn, Nqn, Status), Instant>>);

impl Refusals {
    /// Whether a refusal of `host` by `subsystem` is worth a line.
    pub(crate) fn is_news(&self, host: &Nqn, subsystem: &Nqn, status: Status, now: Instant) -> bool {
        let refusals = &mut *self.0.borrow_mut();
        if refusals.len() >= REFUSALS_MAX {
            refusals.retain(|_, told| now.saturating_duration_since(*told) < QUIET);
        }
        let key = (host.clone(), subsystem.clone(), status);
        if let Some(told) = refusals.get_mut(&key) {
            let news = now.saturating_duration_since(*told) >= QUIET;
            if news {
                *told = now;
            }
            return news;
        }
        // Whoever makes up names by the hundred gets no line for each.
        if refusals.len() >= REFUSALS_MAX {
            return false;
        }
        refusals.insert(key, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_refusal_is_news_once_a_minute() {
        let refusals = Refusals::default();
        let nqn = |name: &str| -> Nqn { name.parse().unwrap() };
        let start = Instant::now();
        let news = |host: &str, status, seconds| {
            let now = start + Duration::from_secs(seconds);
            refusals.is_news(&nqn(host), &nqn("nqn.subsystem"), status, now)
        };
        let status = Status::CONNECT_INVALID_HOST;
        assert!(news("nqn.a", status, 0));
        assert!(!news("nqn.a", status, 59));
        assert!(news("nqn.b", status, 59));
        assert!(news("nqn.a", Status::CONNECT_CONTROLLER_BUSY, 59));
        assert!(news("nqn.a", status, 60));
        assert!(!news("nqn.a", status, 61));
    }

    #[test]
    fn names_without_end_take_no_memory_without_end() {
        let refusals = Refusals::default();
        let subsystem: Nqn = "nqn.subsystem".parse().unwrap();
        let start = Instant::now();
        let status = Status::CONNECT_INVALID_HOST;
        for number in 0..2 * REFUSALS_MAX {
            let host: Nqn = format!("nqn.{number}").parse().unwrap();
            let news = refusals.is_news(&host, &subsystem, status, start);
            assert_eq!(news, number < REFUSALS_MAX);
        }
        assert_eq!(refusals.0.borrow().len(), REFUSALS_MAX);
        let later = start + QUIET;
        assert!(refusals.is_news(&"nqn.later".parse().unwrap(), &subsystem, status, later));
    }
}
