//! Connections that last: from a host to an agent, and from an agent to the owner that it forwards to.
//!
//! What is sent on one arrives in order or not at all, late if the wire loses it, and lies in the socket of the receiving process until that
//! runs. It may outlive its sender. The sender sends a Keep Alive half of a timeout after the last thing that it sent and got an answer to; when
//! one is not answered for a whole timeout it gives the connection up, and with it every command that has no answer. What the receiving side makes of what it reads, and of
//! silence, is in [`super::association`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{Either, LocalBoxFuture, select};
use weft_block::BlockError;
use weft_incarnation::published::Published;
use weft_proto::id::{IncarnationId, NodeId};
use weft_volume::seams::Timestamp;
use weft_volume::testing::answer::{Answer, Giver, answer};

use super::association::Kind;
use super::cluster::Cluster;
use super::front::{HostCommand, What};
use super::host::FIRST_HOST;
use super::network::Message;
use super::process::Process;

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(1);

/// What the other side says to a command.
pub(super) type Answered = Result<Bytes, BlockError>;

/// Something that is sent.
pub(super) enum Request {
    KeepAlive,
    Command(HostCommand),
    /// Nothing follows. What a kernel sends for a process that has ended.
    End,
}

/// The receiving end, in the kernel of a server.
pub(super) struct Socket {
    sender: NodeId,
    /// What has arrived and was not read, by its place in the order.
    arrived: RefCell<BTreeMap<u64, (Request, Giver<Answered>)>>,
    /// The place of what is to be read next.
    next: Cell<u64>,
    /// Changes when something arrives.
    pub(super) news: Rc<Published<()>>,
    /// The sender has reset the connection, and that has arrived.
    reset: Cell<bool>,
    /// Nobody reads any more.
    over: Cell<bool>,
    /// Whether the sender holds it to be lost.
    lost: Rc<Published<bool>>,
}

impl Socket {
    fn new(sender: NodeId, lost: Rc<Published<bool>>) -> Rc<Self> {
        Rc::new(Self {
            sender,
            arrived: RefCell::default(),
            next: Cell::new(0),
            news: Published::new(()),
            reset: Cell::new(false),
            over: Cell::new(false),
            lost,
        })
    }

    /// Everything that lies there in order.
    pub(super) fn read(&self) -> Vec<(Request, Giver<Answered>)> {
        let mut arrived = self.arrived.borrow_mut();
        let mut read = Vec::new();
        while let Some(request) = arrived.remove(&self.next.get()) {
            self.next.set(self.next.get() + 1);
            read.push(request);
        }
        read
    }

    pub(super) fn is_reset(&self) -> bool {
        self.reset.get()
    }

    /// Whether a write or TRIM lies there, of a host itself.
    fn holds_write_of_host(&self) -> bool {
        let changes = |request: &Request| matches!(request, Request::Command(command) if !matches!(command.what, What::Read));
        let arrived = self.arrived.borrow();
        self.sender.0 >= FIRST_HOST && arrived.values().any(|(request, _)| changes(request))
    }
}

impl Cluster {
    /// Sends an answer back on a connection.
    pub(super) fn answer_on(
        self: &Rc<Self>,
        socket: &Socket,
        from: &Process,
        giver: Giver<Answered>,
        answered: Answered,
    ) {
        let from = (from.node, from.id);
        let arrives = Box::new(move |_: &Rc<Self>| giver.give(answered));
        self.carry(from, socket.sender, Rc::clone(&socket.lost), arrives);
    }

    /// Nobody reads a socket any more: what lies there, and what comes, is refused.
    pub(super) fn close_socket(self: &Rc<Self>, socket: &Socket, node: NodeId) {
        socket.over.set(true);
        socket.arrived.take();
        self.reset_sender(socket, node);
    }

    fn reset_sender(self: &Rc<Self>, socket: &Socket, node: NodeId) {
        let lost = Rc::clone(&socket.lost);
        self.transmit((node, IncarnationId(0)), socket.sender, move |_| lose(&lost));
    }

    /// Brings a message to the other side, however often the wire loses it, until the connection is lost.
    fn carry(
        self: &Rc<Self>,
        from: (NodeId, IncarnationId),
        to: NodeId,
        lost: Rc<Published<bool>>,
        arrives: Message,
    ) {
        let delay = self.network.delay(from.0 == to);
        self.carry_after(delay, from, to, lost, arrives);
    }

    fn carry_after(
        self: &Rc<Self>,
        delay: Duration,
        from: (NodeId, IncarnationId),
        to: NodeId,
        lost: Rc<Published<bool>>,
        arrives: Message,
    ) {
        let cluster = Rc::clone(self);
        let world = self.world();
        world.at(world.now().after(delay), None, move |world| {
            // A connection that is given up is reset, and its kernel sends no more of it; that of a dead process may.
            let silenced = world.is_dead(from.1) && (cluster.is_dark(from.0) || cluster.network.chance(1, 2));
            if *lost.borrow() || silenced {
                return;
            }
            if cluster.network.is_cut(from.0, to) {
                let again = cluster.network.repetition();
                cluster.carry_after(again, from, to, lost, arrives);
                return;
            }
            arrives(&cluster);
        });
    }
}

/// The sending end.
pub(super) struct Connection {
    cluster: Rc<Cluster>,
    process: Process,
    to: NodeId,
    server: IncarnationId,
    socket: Rc<Socket>,
    kato: Duration,
    sent: Cell<u64>,
    /// When the youngest request was sent that has been answered.
    answered: Cell<Timestamp>,
    lost: Rc<Published<bool>>,
}

impl Connection {
    /// Connects to the agent on `to`.
    pub(super) async fn open(
        cluster: &Rc<Cluster>,
        process: &Process,
        to: NodeId,
        kind: Kind,
        kato: Duration,
    ) -> Option<Rc<Self>> {
        let lost = Published::new(false);
        let (sender, view) = (process.node, Rc::clone(&lost));
        let accepted = cluster.call(process, to, CONNECT, move |agent| {
            let socket = Socket::new(sender, view);
            async move { (agent.accept(&socket, kind, kato), socket) }.boxed_local()
        });
        let (server, socket) = accepted.await.ok()?;
        let connection = Rc::new(Self {
            cluster: Rc::clone(cluster),
            process: process.clone(),
            to,
            server,
            socket,
            kato,
            sent: Cell::new(0),
            answered: Cell::new(process.now()),
            lost,
        });
        process.spawn(Rc::clone(&connection).keep_alive());
        Some(connection)
    }

    pub(super) fn to(&self) -> NodeId {
        self.to
    }

    pub(super) fn is_lost(&self) -> bool {
        *self.lost.borrow()
    }

    /// Waits until the connection is lost.
    pub(super) async fn lost(&self) {
        let mut lost = self.lost.subscribe();
        while !*lost.borrow_and_update() {
            lost.changed().await;
        }
    }

    /// Sends a command, at once. `None` when the connection is lost before the answer is here.
    pub(super) fn send(self: &Rc<Self>, command: HostCommand) -> LocalBoxFuture<'static, Option<Answered>> {
        let sent = self.process.now();
        let answered = self.post(Request::Command(command));
        let connection = Rc::clone(self);
        async move {
            let lost = std::pin::pin!(connection.lost());
            match select(answered, lost).await {
                Either::Left((answered, _)) => {
                    connection.note_answered(sent);
                    Some(answered)
                }
                Either::Right(_) => None,
            }
        }
        .boxed_local()
    }

    fn post(self: &Rc<Self>, request: Request) -> Answer<Answered> {
        let (giver, answered) = answer();
        let number = self.sent.replace(self.sent.get() + 1);
        let connection = Rc::clone(self);
        let from = (self.process.node, self.process.id);
        let arrives =
            Box::new(move |cluster: &Rc<Cluster>| connection.arrive(cluster, number, request, giver));
        self.cluster.carry(from, self.to, Rc::clone(&self.lost), arrives);
        answered
    }

    fn arrive(&self, cluster: &Rc<Cluster>, number: u64, request: Request, giver: Giver<Answered>) {
        let lives = cluster
            .agent(self.to)
            .is_some_and(|agent| agent.process.id == self.server);
        if lives && !self.socket.over.get() {
            self.socket.arrived.borrow_mut().insert(number, (request, giver));
            self.socket.news.replace(());
        } else if !cluster.is_dark(self.to) {
            cluster.reset_sender(&self.socket, self.to);
        }
    }

    async fn keep_alive(self: Rc<Self>) {
        loop {
            let kept_alive = self.answered.get();
            self.process.sleep_until(kept_alive.after(self.kato / 2)).await;
            if self.is_lost() {
                return;
            }
            if self.answered.get() > kept_alive {
                continue;
            }
            let sent = self.process.now();
            let answered = self.post(Request::KeepAlive);
            if self.process.within(self.kato, answered).await.is_none() {
                return self.give_up();
            }
            self.note_answered(sent);
        }
    }

    fn note_answered(&self, sent: Timestamp) {
        self.answered.set(self.answered.get().max(sent));
    }

    /// Resets the connection.
    pub(super) fn give_up(&self) {
        lose(&self.lost);
        let socket = Rc::clone(&self.socket);
        let from = (self.process.node, self.process.id);
        self.cluster.transmit(from, self.to, move |_| {
            socket.reset.set(true);
            socket.news.replace(());
        });
    }

    /// What the kernel does when the process of this end has died.
    pub(super) fn end(self: &Rc<Self>) {
        drop(self.post(Request::End));
    }
}

fn lose(lost: &Published<bool>) {
    if !*lost.borrow() {
        lost.replace(true);
    }
}

/// The connections of a process, of which its end is known to its kernel.
#[derive(Default)]
pub(super) struct Ends {
    sockets: RefCell<Vec<Weak<Socket>>>,
    connections: RefCell<Vec<Weak<Connection>>>,
}

impl Ends {
    pub(super) fn add_socket(&self, socket: &Rc<Socket>) {
        let mut sockets = self.sockets.borrow_mut();
        sockets.retain(|socket| socket.strong_count() > 0);
        sockets.push(Rc::downgrade(socket));
    }

    /// Whether a write of a host was sent to this process and has not been read.
    pub(super) fn hold_write_of_host(&self) -> bool {
        let sockets = self.sockets.borrow();
        let mut living = sockets.iter().filter_map(Weak::upgrade);
        living.any(|socket| socket.holds_write_of_host())
    }

    pub(super) fn add_connection(&self, connection: &Rc<Connection>) {
        let mut connections = self.connections.borrow_mut();
        connections.retain(|connection| connection.strong_count() > 0);
        connections.push(Rc::downgrade(connection));
    }

    /// The process has died on `node`, whose kernel lives.
    pub(super) fn close(&self, cluster: &Rc<Cluster>, node: NodeId) {
        for socket in self.sockets.take().iter().filter_map(Weak::upgrade) {
            cluster.close_socket(&socket, node);
        }
        for connection in self.connections.take().iter().filter_map(Weak::upgrade) {
            connection.end();
        }
    }
}
