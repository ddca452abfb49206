//! The socket: one client at a time, its messages, and the turns of its [`Function`].

use std::future::{Future, poll_fn};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustix::cmsg_space;
use rustix::event::{self, PollFd, PollFlags, Timespec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Sleep;
use weft_block::polling::{SPAN_DEFAULT, is_polling, note_activity};

use super::dispatch::Answer;
use super::doorbell_page::DoorbellPage;
use super::function::Function;
use super::memory::RANGES_MAX;
use super::message::{self, HEADER_BYTES, Header, MESSAGE_FDS_MAX, Request};
use super::replies::Replies;
use super::{Attachment, Doorbells};
use crate::controller::{Controller, Transport};
use crate::error_chain;
use crate::namespace::Association;
use crate::registry::Registry;

/// Messages handled before the queues have their turn.
const MESSAGES_PER_TURN: usize = 32;

/// Turns before others on the thread have theirs: a guest that never stops asking does not have it to itself.
const TURNS_MAX: usize = 4;

/// Replies that wait for the socket before nothing more is read.
const REPLY_BYTES_MAX: usize = 256 << 10;

/// Between two looks at a client: after a longer pause this process may have been stopped, and the client be gone since.
const PAUSE: Duration = Duration::from_millis(10);

/// Pause after an accept that failed for want of resources.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves one guest's controller on a socket until `stop`, or [`Registry::shutdown`]. A client whose subsystem is not
/// presented any more to the attachment's host loses its connection; it may come back when it is.
///
/// Call it within a `LocalSet`, on the thread of the registry's devices. Dropping the future drops its connection and
/// abandons its commands without waiting for them: a guest of the same host that comes back to this registry would wait for them for ever.
///
/// # Errors
/// Never for what a client did; only if the listener itself is broken.
pub async fn serve(
    listener: UnixListener,
    registry: Rc<Registry>,
    attachment: Attachment,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let mut shutdown = registry.shutdown_receiver();
    let mut client: Option<LocalBoxFuture<'static, ()>> = None;
    let mut controller: Option<Rc<Controller>> = None;
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            biased;
            // The sender lives in the registry, which is held here.
            _ = shutdown.wait_for(|&shutdown| shutdown) => break,
            () = &mut stop => break,
            () = async { client.as_mut().expect("checked").await }, if client.is_some() => {
                client = None;
                controller = None;
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) if client.is_some() => {
                tracing::warn!(subsystem = %attachment.subsystem, "a second client of one controller is turned away");
                drop(stream);
            }
            Ok((stream, _)) => match connect(&registry, &attachment) {
                Ok((connected, function)) => {
                    controller = Some(Rc::clone(&connected));
                    client = Some(run(stream, connected, function, Rc::clone(&registry)).boxed_local());
                }
                Err(reason) => {
                    tracing::warn!(subsystem = %attachment.subsystem, reason, "client turned away");
                }
            },
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(error),
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    if let Some(controller) = controller {
        controller.close("detached");
    }
    if let Some(client) = client {
        client.await;
    }
    Ok(())
}

/// Makes a controller for a client, and the function that has it.
pub(super) fn connect(
    registry: &Rc<Registry>,
    attachment: &Attachment,
) -> Result<(Rc<Controller>, Function), &'static str> {
    let subsystem = registry
        .subsystem(&attachment.subsystem)
        .ok_or("the subsystem is not presented")?;
    if !subsystem.allows(&attachment.hostnqn) {
        return Err("the host is not allowed");
    }
    let page = match attachment.doorbells {
        Doorbells::Trapped => None,
        Doorbells::Mapped => Some(DoorbellPage::new().map_err(|_| "no memory for doorbells")?),
    };
    let cntlid = registry.free_cntlid().ok_or("no controller identifier is free")?;
    let association = Association {
        hostnqn: attachment.hostnqn.clone(),
        hostid: attachment.hostid,
        cntlid,
        subsystem: attachment.subsystem.clone(),
        kato: None,
    };
    tracing::info!(cntlid, subsystem = %association.subsystem, host = %association.hostnqn, "guest connected");
    let controller = Controller::new(
        Rc::clone(registry),
        Transport::Memory {
            doorbell_buffer: attachment.doorbells == Doorbells::Trapped,
        },
        association,
        Some(subsystem),
        Instant::now(),
    );
    registry.insert_controller(Rc::clone(&controller));
    let function = Function::new(Rc::clone(&controller), registry.config().io_queues_max, page);
    Ok((controller, function))
}

/// A message on its way in.
#[derive(Default)]
struct Incoming {
    header: Option<Header>,
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
}

struct Connection {
    stream: UnixStream,
    controller: Rc<Controller>,
    function: Function,
    incoming: Incoming,
    replies: Replies,
    /// A version was agreed on.
    negotiated: bool,
    timer: Pin<Box<Sleep>>,
    shutdown: LocalBoxFuture<'static, ()>,
    /// Until when doorbells in memory are looked at without being told.
    awake_until: Instant,
    /// When this looked last.
    looked: Instant,
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("closed by the client")]
    Closed,
    #[error("the subsystem is not presented to this host any more")]
    Withdrawn,
    #[error(transparent)]
    Header(#[from] message::HeaderError),
    #[error("too many file descriptors")]
    Files,
    #[error("version {0} of the protocol")]
    Version(u16),
    #[error("a message before the version was agreed on")]
    NotNegotiated,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves a client until it leaves and its last command has left the device.
async fn run(stream: UnixStream, controller: Rc<Controller>, function: Function, registry: Rc<Registry>) {
    let mut shutdown = registry.shutdown_receiver();
    let now = Instant::now();
    let mut connection = Connection {
        stream,
        function,
        controller,
        incoming: Incoming::default(),
        replies: Replies::default(),
        negotiated: false,
        timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
        // An error says that the registry is gone, which is the same.
        shutdown: Box::pin(async move { drop(shutdown.wait_for(|&shutdown| shutdown).await) }),
        awake_until: now,
        looked: now,
    };
    let end = loop {
        match poll_fn(|cx| connection.poll(cx)).await {
            Ok(()) => tokio::task::yield_now().await,
            Err(end) => break end,
        }
    };
    match end {
        End::Closed => tracing::info!("guest disconnected"),
        end => tracing::warn!(reason = error_chain(&end), "guest's connection ended"),
    }
    connection.finish().await;
}

impl Connection {
    /// Ready when the connection is over, or when this wants to be called again after others had their turn.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        self.controller.set_waker(0, cx.waker());
        for _ in 0..TURNS_MAX {
            if self.shutdown.as_mut().poll(cx).is_ready() || self.controller.is_closed_for(0) {
                return Poll::Ready(Err(End::Withdrawn));
            }
            let now = Instant::now();
            // What a guest that is gone had asked for may be asked for again by its successor, elsewhere, and already be
            // overwritten there. So nothing is taken from its queues any more, whatever is in the socket in front of the end.
            if now - self.looked > PAUSE && self.has_hung_up() {
                return Poll::Ready(Err(End::Closed));
            }
            self.looked = now;
            let mut progress = self.poll_read(cx, now)?;
            progress |= self.function.poll_doorbells();
            progress |= self.function.poll(cx, now);
            progress |= self.poll_write(cx)?;
            if progress {
                self.awake_until = now + SPAN_DEFAULT;
                continue;
            }
            if self.poll_timer(cx, now) {
                continue;
            }
            let is_awake = || self.function.has_shadow() && now < self.awake_until && is_polling();
            if self.function.is_never_told() || is_awake() {
                return Poll::Ready(Ok(()));
            }
            if !self.function.prepare_to_sleep() {
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Whether the client has closed its end.
    fn has_hung_up(&self) -> bool {
        let mut files = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        // An error says that it cannot be known; the next read tells.
        event::poll(&mut files, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let Some(deadline) = self.function.poll_timeout() else {
            return false;
        };
        if self.timer.deadline().into_std() != deadline {
            self.timer.as_mut().reset(deadline.into());
        }
        self.timer.as_mut().poll(cx).is_ready() && now >= deadline
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<bool, End> {
        let mut progress = false;
        for _ in 0..MESSAGES_PER_TURN {
            if self.replies.waiting() > REPLY_BYTES_MAX {
                break;
            }
            if self.poll_message(cx)?.is_pending() {
                break;
            }
            note_activity();
            progress = true;
            self.handle_message(now)?;
        }
        Ok(progress)
    }

    /// Receives until a message is whole.
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, End> {
        loop {
            let incoming = &mut self.incoming;
            let wanted = incoming.header.map_or(HEADER_BYTES, |header| header.body_bytes());
            if incoming.bytes.len() == wanted {
                if incoming.header.is_some() {
                    return Ok(Poll::Ready(()));
                }
                let bytes = incoming
                    .bytes
                    .first_chunk()
                    .expect("as many bytes as a header has");
                incoming.header = Some(Header::parse(bytes)?);
                incoming.bytes.clear();
                continue;
            }
            if self.stream.poll_read_ready(cx)?.is_pending() {
                return Ok(Poll::Pending);
            }
            // Never past the end of a message: descriptors come with the bytes of the message they belong to.
            let had = incoming.bytes.len();
            incoming.bytes.resize(wanted, 0);
            let received = self.stream.try_io(Interest::READABLE, || {
                receive(&self.stream, &mut incoming.bytes[had..], &mut incoming.files)
            });
            incoming
                .bytes
                .truncate(had + received.as_ref().map_or(0, |&count| count));
            match received {
                Ok(0) => return Err(End::Closed),
                Ok(_) if incoming.files.len() > MESSAGE_FDS_MAX => return Err(End::Files),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(End::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn handle_message(&mut self, now: Instant) -> Result<(), End> {
        let Incoming { header, bytes, files } = &mut self.incoming;
        let header = header.take().expect("the message is whole");
        let body = std::mem::take(bytes);
        let files = std::mem::take(files);
        let outcome = match Request::parse(&header, &body) {
            Ok(Request::Version { major, minor }) => {
                if major != 0 {
                    return Err(End::Version(major));
                }
                self.negotiated = true;
                Ok(message::version_reply(minor, RANGES_MAX).into())
            }
            _ if !self.negotiated => return Err(End::NotNegotiated),
            Ok(request) => self.function.handle(request, files, now),
            Err(errno) => Err(errno),
        };
        if let Err(errno) = outcome {
            tracing::debug!(?header, %errno, "message refused");
        }
        if !header.no_reply {
            let (outcome, file) = match outcome {
                Ok(Answer { body, file }) => (Ok(body), file),
                Err(errno) => (Err(errno), None),
            };
            self.replies
                .push(&header.reply(outcome.as_deref().map_err(|&errno| errno)), file);
        }
        // Its memory serves the next one.
        self.incoming.bytes = body;
        self.incoming.bytes.clear();
        Ok(())
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut progress = false;
        while self.replies.waiting() > 0 {
            match self.stream.poll_write_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => break,
            }
            let sent = self
                .stream
                .try_io(Interest::WRITABLE, || self.replies.send(&self.stream));
            match sent {
                Ok(()) => progress = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(progress)
    }

    /// Closes the socket, then stays until the last command has left the device.
    async fn finish(self) {
        let Self {
            stream, mut function, ..
        } = self;
        function.close();
        drop(stream);
        function.drain().await;
    }
}

/// Receives bytes, and descriptors if some come with them.
fn receive(stream: &UnixStream, to: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MESSAGE_FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream.as_fd(),
        &mut [IoSliceMut::new(to)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    Ok(received.bytes)
}
