//! The queues of one controller, which live and die together, and the tasks that keep them.
//!
//! An association ends with the first of its connections, with a keep alive that goes unanswered, or when its owner
//! lets go of it. Nothing here keeps it alive but its owner.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use weft_proto::nvme::command::submit;
use weft_proto::nvme::event::AsyncEvent;

use crate::connection::Connection;
use crate::qpair::{CloseReason, Command, Payload};

/// Events remembered per listener. More different ones than a controller can mean; the rest is dropped.
const EVENTS_MAX: usize = 64;

/// All queues of one controller.
#[derive(Debug)]
pub(crate) struct Association {
    connections: RefCell<Vec<Rc<Connection>>>,
    /// Why it has ended, for those who ask with every command; `watch` is for those who wait for it.
    closed: Cell<Option<CloseReason>>,
    watch: watch::Sender<Option<CloseReason>>,
    listeners: RefCell<Vec<Weak<Listener>>>,
    /// This side has asked the controller to shut down: however it ends now, it was disconnected.
    ending: Cell<bool>,
    /// To the controller, every command is as good as a Keep Alive.
    traffic_based: Cell<bool>,
}

impl Association {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            connections: RefCell::default(),
            closed: Cell::new(None),
            watch: watch::Sender::new(None),
            listeners: RefCell::default(),
            ending: Cell::new(false),
            traffic_based: Cell::new(false),
        })
    }

    /// Makes `connection` part of it.
    pub(crate) fn add(self: &Rc<Self>, connection: Rc<Connection>) {
        let mut ended = connection.watch_closed();
        self.connections.borrow_mut().push(connection);
        let association = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            let reason = match ended.wait_for(Option::is_some).await {
                Ok(reason) => reason.unwrap_or(CloseReason::PeerClosed),
                Err(_) => CloseReason::Disconnected,
            };
            if let Some(association) = association.upgrade() {
                association.close(reason);
            }
        });
    }

    /// Ends every connection. Only the first reason counts.
    pub(crate) fn close(&self, reason: CloseReason) {
        let reason = if self.ending.get() {
            CloseReason::Disconnected
        } else {
            reason
        };
        if self.closed.get().is_some() {
            return;
        }
        self.closed.set(Some(reason));
        self.watch.send_replace(Some(reason));
        let connections = self.connections.take();
        for connection in connections {
            connection.close(reason);
        }
        for listener in self.listeners.take() {
            if let Some(listener) = listener.upgrade() {
                listener.end();
            }
        }
    }

    /// An orderly end has begun.
    pub(crate) fn set_ending(&self) {
        self.ending.set(true);
    }

    pub(crate) fn closed(&self) -> Option<CloseReason> {
        self.closed.get()
    }

    pub(crate) fn watch_closed(&self) -> watch::Receiver<Option<CloseReason>> {
        self.watch.subscribe()
    }

    /// Events from now on.
    pub(crate) fn events(&self) -> Events {
        let listener = Rc::new(Listener::default());
        if self.closed().is_some() {
            listener.end();
        } else {
            let mut listeners = self.listeners.borrow_mut();
            listeners.retain(|listener| listener.strong_count() > 0);
            listeners.push(Rc::downgrade(&listener));
        }
        Events(listener)
    }

    /// Every command is as good as a Keep Alive from now on (Traffic Based Keep Alive Support, TBKAS).
    pub(crate) fn set_traffic_based(&self) {
        self.traffic_based.set(true);
    }

    /// When the youngest command was sent that is known to have kept the association alive, if there is any but Keep Alives.
    fn kept_alive(&self) -> Option<Instant> {
        if !self.traffic_based.get() {
            return None;
        }
        let connections = self.connections.borrow();
        connections
            .iter()
            .filter_map(|connection| connection.answered())
            .max()
    }

    /// Sends a Keep Alive when half of `kato` has passed since the last one, or the last command that was as good, was sent;
    /// and ends the association when one is not answered within `kato`. So something is sent every half of it, and what is
    /// concluded from silence, here and there, does not depend on which it was.
    pub(crate) fn keep_alive(self: &Rc<Self>, admin: Rc<Connection>, kato: Duration) {
        let association = Rc::downgrade(self);
        let mut sent = Instant::now();
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep_until((sent + kato / 2).into()).await;
                let Some(kept_alive) = association.upgrade().map(|association| association.kept_alive())
                else {
                    return;
                };
                if let Some(at) = kept_alive.filter(|at| *at > sent) {
                    sent = at;
                    continue;
                }
                sent = Instant::now();
                let keep_alive = Command {
                    sqe: submit::keep_alive(),
                    payload: Payload::None,
                    expires: false,
                };
                let answer = admin.submit_at(keep_alive, sent);
                let reason = match tokio::time::timeout(kato, answer).await {
                    Ok(Ok(completion)) if completion.status.is_success() => continue,
                    Ok(Ok(completion)) => CloseReason::KeepAliveRefused(completion.status),
                    Ok(Err(_)) => return,
                    Err(_) => CloseReason::KeepAliveTimeout,
                };
                if let Some(association) = association.upgrade() {
                    association.close(reason);
                }
                return;
            }
        });
    }

    /// Keeps an Asynchronous Event Request outstanding.
    pub(crate) fn listen(self: &Rc<Self>, admin: Rc<Connection>) {
        let association = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            loop {
                let command = Command {
                    sqe: submit::async_event_request(),
                    payload: Payload::None,
                    expires: false,
                };
                // Without an answer the association has ended; a controller that refuses has no events to tell.
                let Ok(completion) = admin.submit(command).await else {
                    return;
                };
                if !completion.status.is_success() {
                    tracing::debug!(status = %completion.status, "asynchronous event request refused");
                    return;
                }
                let Some(association) = association.upgrade() else {
                    return;
                };
                let event = AsyncEvent((completion.result & 0xffff_ffff) as u32);
                for listener in association.listeners.borrow().iter() {
                    if let Some(listener) = listener.upgrade() {
                        listener.push(event);
                    }
                }
            }
        });
    }
}

impl Drop for Association {
    fn drop(&mut self) {
        self.close(CloseReason::Disconnected);
    }
}

#[derive(Debug, Default)]
struct Listener(RefCell<ListenerState>);

#[derive(Debug, Default)]
struct ListenerState {
    pending: VecDeque<AsyncEvent>,
    ended: bool,
    waker: Option<Waker>,
}

impl Listener {
    /// An event says that something changed, so one that is pending already says it all.
    fn push(&self, event: AsyncEvent) {
        let state = &mut *self.0.borrow_mut();
        if !state.pending.contains(&event) && state.pending.len() < EVENTS_MAX {
            state.pending.push_back(event);
        }
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }

    fn end(&self) {
        let state = &mut *self.0.borrow_mut();
        state.ended = true;
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }
}

/// A controller's asynchronous events. Whoever acts on one reads its log page, or the controller will not send
/// another of its type.
#[derive(Debug)]
pub struct Events(Rc<Listener>);

impl Events {
    /// The next event, or `None` when the association has ended.
    pub async fn next(&mut self) -> Option<AsyncEvent> {
        poll_fn(|cx| {
            let state = &mut *self.0.0.borrow_mut();
            if let Some(event) = state.pending.pop_front() {
                return Poll::Ready(Some(event));
            }
            if state.ended {
                return Poll::Ready(None);
            }
            state.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}
