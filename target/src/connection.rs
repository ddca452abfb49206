//! One NVMe/TCP connection: the socket, the clock and the tasks of a [`QueuePair`].
//!
//! A turn reads what the socket has, hands every PDU to the queue pair, starts every command that came of it, collects
//! what the devices have finished, and writes all answers with one vectored write. It never waits in between: one
//! future polls all of it, so a host that does not read its answers does not keep its commands from finishing.
//!
//! The futures of commands are never dropped before they are done: a connection that ends closes its socket at once
//! and then stays until its last command has left the device, counted in [`crate::outstanding`].

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::time::Sleep;
use weft_block::polling::note_activity;
use weft_proto::fabrics::command::FabricsCommand;
use weft_proto::nvme::status::Status;
use weft_proto::tcp::{Framer, FromHost};

use crate::connect::{self, Connected};
use crate::controller::{AdminAnswer, Controller, IoRequest};
use crate::io::{self as nvm, Finished};
use crate::metrics::{self, Op, Tally};
use crate::qpair::{QueuePair, R2T_BYTES_MAX};
use crate::registry::Registry;
use crate::request::Completion;
use crate::running_set::RunningSet;
use crate::silence::{Heard, ReadEmpty};

/// Bytes asked of the socket at a time. Measured by others on this kind of socket: larger reads gain nothing.
const READ_BYTES: usize = 256 << 10;

/// Reads in one turn before answers are written.
const READS_PER_TURN: usize = 4;

/// Answers that wait for the socket before nothing more is read: a host that does not take its answers gets no
/// more of them made.
const TRANSMIT_BYTES_MAX: usize = 8 << 20;

/// Data of commands in execution beyond which nothing more is read: what hosts send unasked, in capsules, is bounded by
/// their sockets then. As much as may be asked for.
const EXECUTING_BYTES_MAX: usize = R2T_BYTES_MAX as usize;

/// Pieces of one vectored write. Linux takes 1024; beyond some tens nothing is gained.
const SLICES_MAX: usize = 256;

/// How long a connection that this side ends waits for the host to read the reason and close.
const LINGER: Duration = Duration::from_secs(1);

/// What this connection waits for.
enum Task {
    /// A command, with so many bytes of data.
    Command(nvm::Running, usize),
    /// Anything else.
    Other(LocalBoxFuture<'static, Done>),
}

impl Future for Task {
    type Output = Done;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Done> {
        match &mut *self {
            Self::Command(command, bytes) => Pin::new(command)
                .poll(cx)
                .map(|finished| Done::Command(finished, *bytes)),
            Self::Other(future) => future.as_mut().poll(cx),
        }
    }
}

/// What a task of this connection ended with.
enum Done {
    /// A command, with so many bytes of data.
    Command(Finished, usize),
    /// A Connect.
    Connect(Box<Result<Connected, Completion>>),
}

struct Connection {
    stream: TcpStream,
    registry: Rc<Registry>,
    framer: Framer<FromHost>,
    qpair: QueuePair<Option<crate::namespace::Admitted>>,
    /// Once connected.
    queue: Option<Queue>,
    running: RunningSet<Task>,
    /// Data that the commands among them hold.
    executing_bytes: usize,
    tally: Tally,
    timer: Pin<Box<Sleep>>,
    shutdown: LocalBoxFuture<'static, ()>,
    shutting_down: bool,
    read_closed: bool,
    /// When a connection that is closing is given up.
    closing: Option<Instant>,
}

struct Queue {
    controller: Rc<Controller>,
    qid: u16,
    read_empty: ReadEmpty,
    /// What the last read was worth.
    heard: Heard,
}

/// Serves a connection until it ends and its last command has left the device.
pub(crate) async fn run(stream: TcpStream, peer: SocketAddr, registry: Rc<Registry>) {
    let _open = metrics::Open::connection();
    // Answers are written whole, in one piece: waiting for more only adds latency.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "cannot disable Nagle's algorithm");
    }
    let mut shutdown = registry.shutdown_receiver();
    let mut connection = Connection {
        stream,
        registry,
        framer: Framer::new(),
        qpair: QueuePair::new(Instant::now()),
        queue: None,
        running: RunningSet::new(),
        executing_bytes: 0,
        tally: Tally::default(),
        timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
        // An error says that the registry is gone, which is the same.
        shutdown: Box::pin(async move { drop(shutdown.wait_for(|&shutdown| shutdown).await) }),
        shutting_down: false,
        read_closed: false,
        closing: None,
    };
    match poll_fn(|cx| connection.poll(cx)).await {
        Ok(()) => tracing::debug!(%peer, "connection ended"),
        Err(error) => tracing::debug!(%peer, %error, "connection lost"),
    }
    connection.finish().await;
}

impl Connection {
    /// Ready when the connection is over and everything that could be written has been.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shutting_down = self.shutting_down || self.shutdown.as_mut().poll(cx).is_ready();
        loop {
            self.check_closed(cx);
            let mut progress = self.poll_timer(cx);
            progress |= self.poll_read(cx)?;
            progress |= self.poll_running(cx);
            progress |= self.poll_write(cx)?;
            let idle = self.qpair.transmits().is_empty();
            if self.qpair.is_closing() {
                // A host that takes no bytes may not keep the end of its connection, and its next Connect, waiting.
                let now = Instant::now();
                if self.closing.is_none() {
                    self.closing = Some(now + LINGER);
                    // Once more around, so that the timer knows.
                    progress = true;
                }
                if idle || self.closing.is_some_and(|deadline| now >= deadline) {
                    return Poll::Ready(Ok(()));
                }
            }
            if self.shutting_down && self.running.is_empty() && idle && !self.has_io_queues() {
                return Poll::Ready(Ok(()));
            }
            if self.read_closed {
                return Poll::Ready(Ok(()));
            }
            if !progress {
                return Poll::Pending;
            }
        }
    }

    /// Whether this is an admin queue whose I/O queues have not ended: they would end with it, unanswered.
    fn has_io_queues(&self) -> bool {
        matches!(&self.queue, Some(Queue { controller, qid: 0, .. }) if controller.has_io_queues())
    }

    fn check_closed(&mut self, cx: &Context<'_>) {
        if let Some(Queue { controller, qid, .. }) = &self.queue {
            controller.set_waker(*qid, cx.waker());
            if controller.is_closed_for(*qid) {
                self.qpair.handle_close();
            }
        }
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> bool {
        let keep_alive = match &self.queue {
            Some(Queue {
                controller, qid: 0, ..
            }) => controller.keep_alive_deadline(),
            _ => None,
        };
        // What ends a connection does not matter any more to one that ends.
        let deadline = match self.closing {
            Some(_) => self.closing,
            None => [self.qpair.poll_timeout(), keep_alive]
                .into_iter()
                .flatten()
                .min(),
        };
        let Some(deadline) = deadline else { return false };
        // A deadline that moves away, as the keep-alive's does with every PDU, is looked at when the timer fires.
        if deadline < self.timer.deadline().into_std() {
            self.timer.as_mut().reset(deadline.into());
        }
        if self.timer.as_mut().poll(cx).is_pending() {
            return false;
        }
        let now = Instant::now();
        if now < deadline {
            self.timer.as_mut().reset(deadline.into());
            return self.timer.as_mut().poll(cx).is_ready();
        }
        if self.closing.is_some() {
            return true;
        }
        self.qpair.handle_timeout(now);
        if let Some(Queue { controller, .. }) = &self.queue
            && keep_alive.is_some_and(|deadline| deadline <= now)
        {
            // Whatever lies in the socket: see `silence`.
            controller.handle_timeout(now);
            self.qpair.handle_close();
        }
        true
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut progress = false;
        for _ in 0..READS_PER_TURN {
            if self.qpair.is_closing()
                || self.shutting_down
                || self.qpair.transmits().len() > TRANSMIT_BYTES_MAX
                || self.executing_bytes > EXECUTING_BYTES_MAX
            {
                break;
            }
            // A read that does not fill the buffer says that there is no more: the next one asks only once there is.
            match pin!(self.stream.read_buf(self.framer.buffer(READ_BYTES))).poll(cx) {
                Poll::Ready(Ok(0)) => {
                    self.read_closed = true;
                    return Ok(true);
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => {
                    if let Some(queue) = &mut self.queue {
                        queue.read_empty = queue.controller.read_empty();
                    }
                    break;
                }
            }
            note_activity();
            progress = true;
            let now = Instant::now();
            if self.hear(now, cx) == Heard::Expired {
                self.qpair.handle_close();
                break;
            }
            self.take_pdus(now);
        }
        Ok(progress)
    }

    /// Takes note of a read, and of what it is worth.
    fn hear(&mut self, now: Instant, cx: &mut Context<'_>) -> Heard {
        let Some(queue) = &mut self.queue else {
            return Heard::InTime;
        };
        queue.heard = queue.controller.handle_traffic(now, queue.read_empty);
        // A host that has closed the connection behind its commands has given them up, and may be repeating them.
        if queue.heard == Heard::InTime
            && let Poll::Ready(Ok(ready)) = pin!(self.stream.ready(Interest::READABLE)).poll(cx)
            && ready.is_read_closed()
        {
            queue.heard = Heard::Late;
        }
        queue.heard
    }

    /// Hands every PDU received to the queue pair and starts what comes of it.
    fn take_pdus(&mut self, now: Instant) {
        self.start_all(now);
        self.tally.count(now);
    }

    fn start_all(&mut self, now: Instant) {
        loop {
            self.framer.set_limits(self.qpair.framer_limits());
            match self.framer.next_pdu() {
                Ok(Some(pdu)) => {
                    let queue = &self.queue;
                    let request = self.qpair.handle_pdu(pdu, now, |sqe| match queue {
                        Some(Queue {
                            controller, qid: 1.., ..
                        }) => controller.admit(sqe),
                        _ => None,
                    });
                    if let Some(request) = request {
                        self.start(request);
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    let offending = self.framer.offending().to_vec();
                    self.qpair.handle_pdu_error(error, &offending);
                }
            }
            if self.qpair.is_closing() {
                return;
            }
        }
    }

    fn start(&mut self, request: IoRequest) {
        match &self.queue {
            None => {
                metrics::command_started();
                let registry = Rc::clone(&self.registry);
                let connect = connect::connect(registry, request);
                let connected = async move { Done::Connect(Box::new(connect.await)) };
                self.running.push(Task::Other(Box::pin(connected)));
            }
            Some(Queue {
                controller, qid: 0, ..
            }) => {
                metrics::command_started();
                let answer = controller.handle_admin(&request);
                match answer {
                    AdminAnswer::Now(completion) => self.complete_admin(completion, request.arrived),
                    // It may wait for ever: not a command in flight for those who look at the gauge.
                    AdminAnswer::Parked => metrics::command_dropped(),
                    AdminAnswer::Later(completion) => {
                        let arrived = request.arrived;
                        self.running.push(Task::Other(Box::pin(async move {
                            let completion = completion.await;
                            let success = completion.status.is_success();
                            metrics::command_completed(Op::Admin, success, 0, arrived.elapsed());
                            Done::Command(completion.into(), 0)
                        })));
                    }
                }
            }
            Some(Queue { controller, qid, .. }) if FabricsCommand::is_fabrics(&request.sqe) => {
                metrics::command_started();
                let status = match FabricsCommand::parse(&request.sqe) {
                    Ok(FabricsCommand::Disconnect) => {
                        controller.end_queue(*qid);
                        Status::SUCCESS
                    }
                    Ok(_) => Status::INVALID_QUEUE_TYPE.dnr(),
                    Err(status) => status,
                };
                self.complete_admin(request.complete(status), request.arrived);
            }
            Some(Queue { heard, .. }) if *heard != Heard::InTime => {
                commands_started(request.fused_first.is_some());
                self.finish_command(nvm::refuse_late(request));
            }
            Some(_) => {
                let bytes = request.data.iter().map(Bytes::len).sum();
                let is_pair = request.fused_first.is_some();
                match nvm::start(request, Some(&mut self.tally)) {
                    nvm::Execution::Finished(completion) => self.qpair.handle_completion(completion),
                    nvm::Execution::Running(command) => {
                        commands_started(is_pair);
                        self.executing_bytes += bytes;
                        self.running.push(Task::Command(command, bytes));
                    }
                }
            }
        }
    }

    fn finish_command(&mut self, finished: Finished) {
        if let Some(first) = finished.first {
            self.qpair.handle_completion(first);
        }
        self.qpair.handle_completion(finished.completion);
    }

    fn complete_admin(&mut self, completion: Completion, arrived: Instant) {
        let success = completion.status.is_success();
        metrics::command_completed(Op::Admin, success, 0, arrived.elapsed());
        self.qpair.handle_completion(completion);
    }

    fn poll_running(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while let Poll::Ready(Some(done)) = self.running.poll_next(cx) {
            progress = true;
            match done {
                Done::Command(finished, bytes) => {
                    self.executing_bytes -= bytes;
                    self.finish_command(finished);
                }
                Done::Connect(result) => self.handle_connect(*result),
            }
        }
        if let Some(Queue {
            controller, qid: 0, ..
        }) = &self.queue
        {
            while let Some(completion) = controller.poll_event() {
                progress = true;
                self.qpair.handle_completion(completion);
            }
        }
        progress
    }

    fn handle_connect(&mut self, result: Result<Connected, Completion>) {
        match result {
            Ok(Connected {
                controller,
                connect,
                completion,
            }) => {
                metrics::command_completed(Op::Admin, true, 0, Duration::ZERO);
                self.queue = Some(Queue {
                    read_empty: controller.read_empty(),
                    controller,
                    qid: connect.qid,
                    heard: Heard::InTime,
                });
                self.qpair.handle_connected(connect);
                self.qpair.handle_completion(completion);
            }
            Err(completion) => {
                metrics::command_completed(Op::Admin, false, 0, Duration::ZERO);
                self.qpair.handle_completion(completion);
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut progress = false;
        while !self.qpair.transmits().is_empty() {
            match self.stream.poll_write_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => break,
            }
            let written = {
                let mut slices = [IoSlice::new(&[]); SLICES_MAX];
                let count = self.qpair.transmits().fill(&mut slices);
                self.stream.try_write_vectored(&slices[..count])
            };
            match written {
                Ok(written) => self.qpair.transmits().advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            }
            progress = true;
        }
        Ok(progress)
    }

    /// Closes the socket, then stays until the last command has left the device.
    async fn finish(self) {
        let Self {
            mut stream,
            queue,
            mut running,
            read_closed,
            ..
        } = self;
        let outstanding = queue.and_then(|Queue { controller, qid, .. }| {
            controller.leave(qid, running.len());
            controller.outstanding().cloned()
        });
        let drain = async {
            while let Some(done) = running.next().await {
                if let Some(outstanding) = &outstanding {
                    outstanding.finish_one();
                }
                // A controller that was made for a host that did not wait for it.
                if let Done::Connect(result) = done {
                    metrics::command_dropped();
                    if let Ok(connected) = *result {
                        connected.controller.leave(connected.connect.qid, 0);
                    }
                }
            }
        };
        let close = async {
            // Whatever went wrong here, the connection is over.
            let _ = stream.shutdown().await;
            if !read_closed {
                // Unread bytes would turn the close into a reset, and the host would lose the TermReq.
                let _ = tokio::time::timeout(LINGER, discard(&stream)).await;
            }
            drop(stream);
        };
        futures_util::future::join(drain, close).await;
    }
}

/// Counts a request as in flight.
fn commands_started(is_pair: bool) {
    metrics::command_started();
    if is_pair {
        metrics::command_started();
    }
}

/// Reads until the host closes.
async fn discard(stream: &TcpStream) -> io::Result<()> {
    let mut scratch = [0; 4096];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut scratch) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
