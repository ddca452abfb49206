//! What dropped connections of a host still have in a device.
//!
//! A host that lost a connection may retry its commands on the next one. The retry may not overtake the original,
//! or an old write would land on top of a newer one (a ghost write). So a connection that ends reports how many of
//! its commands are still in a device, and a Connect of the same host to the same subsystem waits until there are
//! none, for a bounded time; then it is refused as busy and the host tries again.
//!
//! This covers connections that this side knows to be gone. A connection whose end has not been noticed yet still
//! counts as alive: it ends with its keep-alive timeout at the latest.

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;

/// Longest wait of a Connect. A guess: longer than a device's slow moments, shorter than hosts wait for an answer
/// to Connect.
pub(crate) const CONNECT_WAIT_MAX: Duration = Duration::from_secs(5);

/// The commands of one host's dropped connections to one subsystem.
#[derive(Default)]
pub(crate) struct Outstanding {
    dropped: Cell<usize>,
    changed: Notify,
}

impl Outstanding {
    /// Commands of dropped connections in a device.
    pub(crate) fn dropped(&self) -> usize {
        self.dropped.get()
    }

    /// A connection has ended with `count` commands in a device.
    pub(crate) fn add(self: &Rc<Self>, count: usize) {
        self.dropped.set(self.dropped.get() + count);
    }

    /// One of them has left the device.
    pub(crate) fn finish_one(&self) {
        self.dropped.set(self.dropped.get() - 1);
        if self.dropped.get() == 0 {
            self.changed.notify_waiters();
        }
    }

    /// Waits until none is left; `false` when `limit` came first.
    pub(crate) async fn wait_until_none(&self, limit: impl Future<Output = ()>) -> bool {
        let mut limit = pin!(limit);
        loop {
            let notified = self.changed.notified();
            if self.dropped.get() == 0 {
                return true;
            }
            tokio::select! {
                biased;
                () = notified => {}
                () = &mut limit => return self.dropped.get() == 0,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_ends_with_the_last_command() {
        let outstanding = Rc::new(Outstanding::default());
        outstanding.add(2);
        let wait = outstanding.wait_until_none(std::future::pending());
        let finish = async {
            outstanding.finish_one();
            tokio::task::yield_now().await;
            assert_eq!(outstanding.dropped(), 1);
            outstanding.finish_one();
        };
        assert!(futures_util::future::join(wait, finish).await.0);
    }

    #[tokio::test]
    async fn a_wait_is_bounded() {
        let outstanding = Rc::new(Outstanding::default());
        outstanding.add(1);
        assert!(!outstanding.wait_until_none(std::future::ready(())).await);
    }
}
