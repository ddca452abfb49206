//! What makes a fused Compare and Write one step: no other write of this namespace comes between the two.
//!
//! Writes enter as shared, a fused pair as exclusive, per namespace and only among the commands that arrive through
//! this registry. As long as no fused pair is about, a write pays two counters and no wait; fused pairs are rare
//! (cluster heartbeats), so that one waits for all writes in flight and not only for those it overlaps.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use tokio::sync::oneshot;

/// Shared by the commands of one namespace.
#[derive(Clone, Default)]
pub(crate) struct FusedGate(Rc<Inner>);

#[derive(Default)]
struct Inner {
    shared: Cell<usize>,
    exclusive: Cell<bool>,
    /// In arrival order, so that neither kind starves.
    waiting: RefCell<VecDeque<(Kind, oneshot::Sender<Pass>)>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Shared,
    Exclusive,
}

/// The right to execute; given back when dropped.
pub(crate) struct Pass {
    inner: Rc<Inner>,
    kind: Kind,
}

impl FusedGate {
    /// Enters at once if nobody of the other kind is inside or waiting.
    pub(crate) fn try_enter(&self, kind: Kind) -> Option<Pass> {
        let inner = &self.0;
        (inner.waiting.borrow().is_empty() && inner.admits(kind)).then(|| inner.enter(kind))
    }

    /// Enters in arrival order.
    pub(crate) fn enter(&self, kind: Kind) -> Entry {
        if let Some(pass) = self.try_enter(kind) {
            return Entry::Entered(pass);
        }
        let (sender, receiver) = oneshot::channel();
        self.0.waiting.borrow_mut().push_back((kind, sender));
        Entry::Waiting(receiver)
    }
}

/// The answer of [`FusedGate::enter`].
pub(crate) enum Entry {
    Entered(Pass),
    Waiting(oneshot::Receiver<Pass>),
}

impl Entry {
    pub(crate) async fn pass(self) -> Pass {
        match self {
            Self::Entered(pass) => pass,
            Self::Waiting(receiver) => receiver.await.expect("the gate answers everybody while it lives"),
        }
    }
}

impl Inner {
    fn admits(&self, kind: Kind) -> bool {
        match kind {
            Kind::Shared => !self.exclusive.get(),
            Kind::Exclusive => !self.exclusive.get() && self.shared.get() == 0,
        }
    }

    fn enter(self: &Rc<Self>, kind: Kind) -> Pass {
        match kind {
            Kind::Shared => self.shared.set(self.shared.get() + 1),
            Kind::Exclusive => self.exclusive.set(true),
        }
        Pass {
            inner: Rc::clone(self),
            kind,
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let inner = &self.inner;
        match self.kind {
            Kind::Shared => inner.shared.set(inner.shared.get() - 1),
            Kind::Exclusive => inner.exclusive.set(false),
        }
        loop {
            let next = inner.waiting.borrow().front().map(|(kind, _)| *kind);
            let Some(kind) = next.filter(|&kind| inner.admits(kind)) else {
                return;
            };
            let popped = inner.waiting.borrow_mut().pop_front();
            if let Some((_, sender)) = popped {
                // A waiter that is gone gives its pass back here, which comes around to this loop.
                let _ = sender.send(inner.enter(kind));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn writes_share_and_a_fused_pair_is_alone() {
        let gate = FusedGate::default();
        let first = gate.try_enter(Kind::Shared).unwrap();
        let second = gate.try_enter(Kind::Shared).unwrap();
        assert!(gate.try_enter(Kind::Exclusive).is_none());
        let fused = gate.enter(Kind::Exclusive);
        let late = gate.enter(Kind::Shared);
        assert!(
            gate.try_enter(Kind::Shared).is_none(),
            "behind the fused pair that waits"
        );
        drop(first);
        drop(second);
        let fused = fused.pass().await;
        assert!(gate.try_enter(Kind::Shared).is_none());
        drop(fused);
        drop(late.pass().await);
        assert!(gate.try_enter(Kind::Exclusive).is_some());
    }

    #[tokio::test]
    async fn a_waiter_that_left_blocks_nobody() {
        let gate = FusedGate::default();
        let write = gate.try_enter(Kind::Shared).unwrap();
        drop(gate.enter(Kind::Exclusive));
        drop(write);
        assert!(gate.try_enter(Kind::Shared).is_some());
    }
}
