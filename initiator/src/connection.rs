//! One TCP connection: a [`HostQueue`] with its socket.
//!
//! One task drives both directions. Commands that are submitted in one turn of the runtime leave with one vectored
//! write, and everything that a read of the socket brought is parsed before anybody is woken. The task ends with the
//! connection; there is no other owner of the socket.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io::IoSlice;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::Sleep;
use weft_block::polling::note_activity;

use crate::qpair::{CloseReason, Command, HostQueue, QueueOptions};
use crate::reply::{Answer, Reply};

/// Slices of one vectored write. Derived: well under the kernel's 1024, and 64 commands with data fill it.
const SLICES: usize = 128;

/// Reads of the socket in one turn of the task, so that other tasks get theirs. A guess.
const READS_PER_TURN: usize = 8;

/// A live connection, shared by whoever submits commands on it and by its task.
pub(crate) struct Connection {
    queue: RefCell<HostQueue<Rc<Reply>>>,
    /// Of the driving task, while it waits.
    waker: Cell<Option<Waker>>,
    closed: watch::Sender<Option<CloseReason>>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("closed", &self.closed())
            .field("outstanding", &self.outstanding())
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Drives `stream` until it ends. Commands may be submitted at once; they leave after the ICResp.
    pub(crate) fn spawn(stream: TcpStream, options: QueueOptions) -> Rc<Self> {
        let connection = Rc::new(Self {
            queue: RefCell::new(HostQueue::new(options)),
            waker: Cell::new(None),
            closed: watch::Sender::new(None),
        });
        tokio::task::spawn_local(drive(connection.clone(), stream));
        connection
    }

    /// Starts a command. On a connection that has ended it answers at once, as not sent.
    pub(crate) fn submit(&self, command: Command) -> Answer {
        self.submit_at(command, Instant::now())
    }

    /// The same for a caller who knows the time.
    pub(crate) fn submit_at(&self, command: Command, now: Instant) -> Answer {
        let (reply, answer) = Reply::new();
        let mut queue = self.queue.borrow_mut();
        queue.submit(command, reply, now);
        if queue.closed().is_some() {
            deliver(&mut queue);
        } else {
            drop(queue);
            self.wake();
        }
        answer
    }

    /// Ends the connection. Commands without an answer are lost.
    pub(crate) fn close(&self, reason: CloseReason) {
        let mut queue = self.queue.borrow_mut();
        queue.handle_closed(reason);
        deliver(&mut queue);
        drop(queue);
        self.wake();
    }

    /// Why it ended, once it has.
    pub(crate) fn watch_closed(&self) -> watch::Receiver<Option<CloseReason>> {
        self.closed.subscribe()
    }

    /// Why it ended, if it has.
    pub(crate) fn closed(&self) -> Option<CloseReason> {
        self.queue.borrow().closed()
    }

    /// Commands without an answer.
    pub(crate) fn outstanding(&self) -> usize {
        self.queue.borrow().outstanding()
    }

    /// When the youngest of the commands was started that have been answered.
    pub(crate) fn answered(&self) -> Option<Instant> {
        self.queue.borrow().answered()
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Moves whatever can be moved now. Ready when the connection has ended.
    fn turn(&self, cx: &mut Context<'_>, socket: &mut Socket<'_>) -> Poll<()> {
        let queue = &mut *self.queue.borrow_mut();
        self.waker.set(Some(cx.waker().clone()));
        // What was submitted goes out before anything else is done.
        socket.write(cx, queue);
        let more = socket.read(cx, queue);
        socket.write(cx, queue);
        if queue.closed().is_none() {
            socket.check_timeout(cx, queue);
        }
        deliver(queue);
        if let Some(reason) = queue.closed() {
            self.waker.take();
            self.closed.send_replace(Some(reason));
            return Poll::Ready(());
        }
        if more {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

/// Hands out what is finished. Wakers only schedule, so nobody comes back to the queue from here.
fn deliver(queue: &mut HostQueue<Rc<Reply>>) {
    while let Some((reply, outcome)) = queue.poll_completion() {
        reply.complete(outcome);
    }
}

async fn drive(connection: Rc<Connection>, mut stream: TcpStream) {
    let (reader, writer) = stream.split();
    let mut socket = Socket {
        reader,
        writer,
        timer: Box::pin(tokio::time::sleep(std::time::Duration::ZERO)),
        timer_armed: false,
    };
    poll_fn(|cx| connection.turn(cx, &mut socket)).await;
    if let Some(CloseReason::KeepAliveTimeout | CloseReason::CommandTimeout) = connection.closed() {
        // Its commands are sent again elsewhere: the kernel is not to go on delivering them. An error says that it
        // has nothing to deliver to.
        let _ = stream.set_zero_linger();
    }
}

/// The socket's halves and the timer of the task that drives it.
struct Socket<'a> {
    reader: ReadHalf<'a>,
    writer: WriteHalf<'a>,
    timer: Pin<Box<Sleep>>,
    timer_armed: bool,
}

impl Socket<'_> {
    /// Writes until there is nothing left or the socket is full. After the end, what is left (a TermReq) is
    /// offered once.
    fn write(&mut self, cx: &mut Context<'_>, queue: &mut HostQueue<Rc<Reply>>) {
        while !queue.transmit().is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = queue.transmit().fill(&mut slices);
            match Pin::new(&mut self.writer).poll_write_vectored(cx, &slices[..count]) {
                Poll::Ready(Ok(bytes)) => queue.handle_written(bytes),
                Poll::Ready(Err(error)) => {
                    queue.handle_closed(CloseReason::Socket(error.kind()));
                    return;
                }
                Poll::Pending => return,
            }
        }
    }

    /// Reads and parses what has come. Answers whether there may be more.
    fn read(&mut self, cx: &mut Context<'_>, queue: &mut HostQueue<Rc<Reply>>) -> bool {
        for _ in 0..READS_PER_TURN {
            if queue.closed().is_some() {
                return false;
            }
            let received = pin!(self.reader.read_buf(queue.receive_buffer())).poll(cx);
            match received {
                Poll::Ready(Ok(0)) => queue.handle_closed(CloseReason::PeerClosed),
                Poll::Ready(Ok(_)) => {
                    note_activity();
                    queue.handle_received(Instant::now());
                }
                Poll::Ready(Err(error)) => queue.handle_closed(CloseReason::Socket(error.kind())),
                Poll::Pending => return false,
            }
        }
        true
    }

    /// The timer is armed while commands are in flight and looks again when it fires, rather than being moved
    /// for every command; an idle connection has none.
    fn check_timeout(&mut self, cx: &mut Context<'_>, queue: &mut HostQueue<Rc<Reply>>) {
        loop {
            if !self.timer_armed {
                if queue.outstanding() == 0 {
                    return;
                }
                let Some(deadline) = queue.poll_timeout() else {
                    return;
                };
                self.timer.as_mut().reset(deadline.into());
                self.timer_armed = true;
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return;
            }
            self.timer_armed = false;
            queue.handle_timeout(Instant::now());
            if queue.closed().is_some() {
                return;
            }
        }
    }
}
