//! How long a host has been silent, and what its next words are worth then.
//!
//! A host that gets no answer to a Keep Alive within its timeout gives the association up, and repeats its commands on
//! another path. What it had sent before may still lie in a socket: of a process that was stopped, or behind a
//! network that was cut for a while. Executed then, it would undo what the host wrote since (a ghost write). So:
//!
//! - silence of a whole timeout ends the association before anything that came since is looked at;
//! - after three quarters of it, commands that lay in the sockets are refused as not begun, on every queue until it has
//!   been read empty once, and the host sends them again. The last quarter is for the time between the host's clock and this one:
//!   what a command takes from here to its device, or to the volume's owner.
//!
//! A host that sends nothing else sends a Keep Alive every half of its timeout, so none of this happens to one that is heard. Without a timeout
//! there is nothing that could be concluded from silence.
//!
//! NVM Express Base Specification 2.0, "Keep Alive".

use std::cell::Cell;
use std::time::{Duration, Instant};

use weft_proto::deliberate::{Bug, planted};

/// What was heard of a host, on all queues of its association.
#[derive(Debug)]
pub struct Silence {
    kato: Cell<Option<Duration>>,
    heard: Cell<Instant>,
    /// How often it was silent for so long that its commands may be late.
    lapses: Cell<u64>,
}

/// What may be done with what was just read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Everything.
    InTime,
    /// It may have been given up: nothing of it may take effect.
    Late,
    /// The association is over.
    Expired,
}

/// Which of the lapses one queue has left behind it: it has been read empty since.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReadEmpty(u64);

impl Silence {
    /// Of a host that was heard `now`, with this Keep Alive Timeout.
    #[must_use]
    pub fn new(kato: Option<Duration>, now: Instant) -> Self {
        Self {
            kato: Cell::new(kato),
            heard: Cell::new(now),
            lapses: Cell::new(0),
        }
    }

    /// Keep Alive Timeout; `None` if there is none.
    #[must_use]
    pub fn kato(&self) -> Option<Duration> {
        self.kato.get()
    }

    /// Sets the Keep Alive Timeout.
    pub fn set_kato(&self, kato: Option<Duration>) {
        self.kato.set(kato);
    }

    /// When the host has been silent for too long.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        if planted(Bug::ForgiveSilence) {
            return None;
        }
        self.kato().map(|kato| self.heard.get() + kato)
    }

    /// The host is heard, on a queue with `read_empty` (Traffic Based Keep Alive).
    pub fn hear(&self, now: Instant, read_empty: ReadEmpty) -> Heard {
        if let Some(kato) = self.kato()
            && !planted(Bug::ForgiveSilence)
        {
            let silence = now.saturating_duration_since(self.heard.get());
            if silence >= kato {
                return Heard::Expired;
            }
            if silence >= kato * 3 / 4 {
                self.lapses.set(self.lapses.get() + 1);
            }
        }
        self.heard.set(now);
        if read_empty.0 == self.lapses.get() {
            Heard::InTime
        } else {
            Heard::Late
        }
    }

    /// What a queue is worth of which nothing is left to be read, or that is new.
    #[must_use]
    pub fn read_empty(&self) -> ReadEmpty {
        ReadEmpty(self.lapses.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_host_that_keeps_alive_is_always_in_time() {
        let mut now = Instant::now();
        let silence = Silence::new(Some(SECOND), now);
        for _ in 0..10 {
            now += SECOND / 2;
            assert_eq!(silence.hear(now, silence.read_empty()), Heard::InTime);
            assert_eq!(silence.deadline(), Some(now + SECOND));
        }
    }

    #[test]
    fn what_waited_on_any_queue_is_late_until_that_queue_was_read_empty() {
        let start = Instant::now();
        let silence = Silence::new(Some(SECOND), start);
        let (admin, io) = (silence.read_empty(), silence.read_empty());
        let resumed = start + SECOND * 4 / 5;
        assert_eq!(silence.hear(resumed, admin), Heard::Late);
        let admin = silence.read_empty();
        assert_eq!(silence.hear(resumed, admin), Heard::InTime);
        assert_eq!(
            silence.hear(resumed, io),
            Heard::Late,
            "heard on another queue meanwhile"
        );
        assert_eq!(silence.hear(resumed, io), Heard::Late, "there is more of it");
        let io = silence.read_empty();
        assert_eq!(silence.hear(resumed + SECOND / 2, io), Heard::InTime);
    }

    #[test]
    fn silence_of_the_whole_timeout_is_the_end_whatever_comes_then() {
        let start = Instant::now();
        let silence = Silence::new(Some(SECOND), start);
        let queue = silence.read_empty();
        assert_eq!(silence.hear(start + SECOND, queue), Heard::Expired);
        assert_eq!(
            silence.hear(start + SECOND, queue),
            Heard::Expired,
            "and stays it"
        );
    }

    #[test]
    fn nothing_follows_from_silence_without_a_timeout() {
        let start = Instant::now();
        let silence = Silence::new(None, start);
        let queue = silence.read_empty();
        assert_eq!(silence.hear(start + SECOND * 1000, queue), Heard::InTime);
        assert_eq!(silence.deadline(), None);
    }
}
