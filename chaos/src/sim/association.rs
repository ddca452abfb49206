//! The receiving side of a connection: which commands an agent begins, and where.
//!
//! A counterpart of `target/src/connection.rs` and `node/src/agent/route.rs`, with the product's own account of silence: a host that gave
//! a connection up has sent its commands again on another path, so what still lies in a socket may have to be left there.
//! `docs/design/ghost-writes.md` has the rules.

use std::cell::RefCell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{LocalBoxFuture, select};
use weft_block::BlockError;
use weft_proto::id::{IncarnationId, NodeId};
use weft_target::silence::{Heard, Silence};
use weft_volume::seams::Timestamp;

use super::agent::Agent;
use super::connection::{Answered, Connection, Request, Socket};
use super::front::HostCommand;

/// How long a command waits for an owner to be known and reached.
const ROUTE_WAIT: Duration = Duration::from_millis(150);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Longest keep alive of forwarding associations.
const FORWARD_KATO: Duration = Duration::from_secs(1);

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A host, for which commands are forwarded.
    Host,
    /// An agent that forwards: what is not served here is refused.
    Forwarder,
}

/// A host, or an agent in its name, as this agent knows it.
struct Association {
    kind: Kind,
    kato: Duration,
    /// To the owner, of this association alone.
    forward: RefCell<Option<Rc<Connection>>>,
}

impl Agent {
    /// Takes a new connection. Answers the process that does.
    pub(super) fn accept(self: &Rc<Self>, socket: &Rc<Socket>, kind: Kind, kato: Duration) -> IncarnationId {
        self.ends.add_socket(socket);
        let association = Rc::new(Association {
            kind,
            kato,
            forward: RefCell::default(),
        });
        self.process
            .spawn(Rc::clone(self).serve_connection(Rc::clone(socket), association));
        self.process.id
    }

    async fn serve_connection(self: Rc<Self>, socket: Rc<Socket>, association: Rc<Association>) {
        let now = || instant(self.process.now());
        let silence = Silence::new(Some(association.kato), now());
        let mut read_empty = silence.read_empty();
        let mut news = socket.news.subscribe();
        'open: loop {
            drop(news.borrow_and_update());
            let read = socket.read();
            if read.is_empty() {
                if socket.is_reset() {
                    break;
                }
                read_empty = silence.read_empty();
                let end = silence.deadline().map_or(Timestamp(u64::MAX), timestamp);
                let end = pin!(self.process.sleep_until(end));
                select(pin!(news.changed()), end).await;
                // Whatever lies in the socket by now.
                if silence.deadline().is_some_and(|deadline| deadline <= now()) {
                    break;
                }
                continue;
            }
            let arrived = self.process.now();
            let mut heard = silence.hear(instant(arrived), read_empty);
            let ends = read.iter().any(|(request, _)| matches!(request, Request::End));
            if heard == Heard::InTime && (ends || socket.is_reset()) {
                heard = Heard::Late;
            }
            for (request, giver) in read {
                let answered = match (request, heard) {
                    (_, Heard::Expired) | (Request::End, _) => break 'open,
                    (Request::KeepAlive, _) => Ok(Bytes::new()),
                    (Request::Command(command), Heard::InTime) => {
                        // In the order in which they are read: the first step is taken here.
                        let begun = self.begin(&association, &command);
                        let (this, socket) = (Rc::clone(&self), Rc::clone(&socket));
                        let serving = this
                            .clone()
                            .route(Rc::clone(&association), command, arrived, begun);
                        self.process.spawn(async move {
                            let answered = serving.await;
                            this.cluster.answer_on(&socket, &this.process, giver, answered);
                        });
                        continue;
                    }
                    (Request::Command(_), Heard::Late) => Err(BlockError::NotReady),
                };
                self.cluster.answer_on(&socket, &self.process, giver, answered);
            }
        }
        self.cluster.close_socket(&socket, self.node);
        if let Some(forward) = association.forward.take() {
            forward.give_up();
        }
    }

    /// Begins a command where its volume is served, if that is known and at hand.
    fn begin(
        &self,
        association: &Association,
        command: &HostCommand,
    ) -> Option<LocalBoxFuture<'static, Answered>> {
        if let Some(serving) = self.begin_owned(command) {
            return Some(serving);
        }
        let owner = self.forwarded_to(association, command)?;
        let connection = association.forward.borrow().clone()?;
        if connection.to() != owner || connection.is_lost() {
            return None;
        }
        let sent = connection.send(command.clone());
        // The connection broke: the command may have been done.
        Some(async move { sent.await.unwrap_or(Err(BlockError::Unknown)) }.boxed_local())
    }

    fn forwarded_to(&self, association: &Association, command: &HostCommand) -> Option<NodeId> {
        match association.kind {
            Kind::Host => self.owner_elsewhere(command.volume),
            Kind::Forwarder => None,
        }
    }

    /// Serves a command, again if nothing was done and another place may serve it, for as long as it may wait since it arrived.
    async fn route(
        self: Rc<Self>,
        association: Rc<Association>,
        command: HostCommand,
        arrived: Timestamp,
        mut begun: Option<LocalBoxFuture<'static, Answered>>,
    ) -> Answered {
        let deadline = arrived.after(ROUTE_WAIT.min(association.kato / 4));
        loop {
            if let Some(serving) = begun.take() {
                match serving.await {
                    // What is about to end says so at once.
                    Err(BlockError::NotReady) => self.process.sleep(LOOK_AGAIN).await,
                    answered => return answered,
                }
            }
            if association.kind == Kind::Forwarder {
                return Err(BlockError::NotReady);
            }
            self.connect(&association, &command, deadline).await;
            // Whoever was held up for longer may have been given up, whatever stands open now.
            if self.process.now() >= deadline {
                return Err(BlockError::NotReady);
            }
            begun = self.begin(&association, &command);
            if begun.is_none() {
                self.process.sleep(LOOK_AGAIN).await;
            }
        }
    }

    /// Sees to it that there is a connection to the owner, if there is one elsewhere.
    async fn connect(&self, association: &Association, command: &HostCommand, deadline: Timestamp) {
        let Some(owner) = self.forwarded_to(association, command) else {
            return;
        };
        let former = association.forward.borrow().clone();
        if former.is_some_and(|former| former.to() == owner && !former.is_lost()) {
            return;
        }
        let kato = association.kato.min(FORWARD_KATO);
        let opening = Connection::open(&self.cluster, &self.process, owner, Kind::Forwarder, kato);
        let left = Duration::from_nanos(deadline.0.saturating_sub(self.process.now().0));
        if let Some(Some(connection)) = self.process.within(left, opening).await {
            self.ends.add_connection(&connection);
            *association.forward.borrow_mut() = Some(connection);
        }
    }
}

/// The product counts in [`Instant`]s, of which only differences matter.
static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

fn instant(now: Timestamp) -> Instant {
    *ORIGIN + Duration::from_nanos(now.0)
}

fn timestamp(instant: Instant) -> Timestamp {
    Timestamp(instant.duration_since(*ORIGIN).as_nanos() as u64)
}
