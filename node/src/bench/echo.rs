//! The floor of a target: a peer on the same core that answers the same bytes and does nothing else. Over plain sockets
//! here, over io_uring in `ring_echo`.
//!
//! A read is answered from a table as large as the drive, at the place that was asked for: that a drive's bytes are not in a
//! cache is no fault of the target. What is written is received and dropped.
//!
//! It parses as much as says where a request ends and which of the two answers it wants, batches as the target does,
//! and polls while it is measured. Between measurements it sleeps, so that it takes nothing from the subject.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::{JoinHandle, Thread};

use bytes::Bytes;

use super::echo_answer::{Signals, answer};
use super::wire::{Incoming, Outgoing};
use super::{machine, ring_echo};

/// How an echo reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Through {
    /// A read and a vectored write for each connection: best for few connections with much to carry.
    Sockets,
    /// One system call for all connections: best for many with little.
    Ring,
}

/// A running echo of one connection set.
pub(super) struct Echo {
    pub(super) address: SocketAddr,
    signals: Signals,
    thread: Thread,
    join: Option<JoinHandle<()>>,
}

impl Echo {
    /// Listens for `connections`, which have to be made before it is first activated. Reads are answered from `table`.
    pub(super) fn start(through: Through, connections: usize, table: Bytes) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let signals = Signals::default();
        let heard = signals.clone();
        let join = std::thread::Builder::new().name("echo".into()).spawn(move || {
            // An error ends the connections, which the load generator reports.
            let _ = serve(&listener, through, connections, &table, &heard);
        })?;
        Ok(Self {
            address,
            signals,
            thread: join.thread().clone(),
            join: Some(join),
        })
    }

    /// Polls from now on, or sleeps.
    pub(super) fn set_active(&self, active: bool) {
        self.signals.set_active(active);
        self.thread.unpark();
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.signals.end();
        self.thread.unpark();
        if let Some(join) = self.join.take() {
            // It panicked or not: the load generator has noticed.
            let _ = join.join();
        }
    }
}

struct Peer {
    stream: TcpStream,
    incoming: Incoming,
    outgoing: Outgoing,
}

fn serve(
    listener: &TcpListener,
    through: Through,
    connections: usize,
    table: &Bytes,
    signals: &Signals,
) -> anyhow::Result<()> {
    machine::pin(machine::SUBJECT_CORE)?;
    let mut streams = Vec::new();
    for _ in 0..connections {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        streams.push(stream);
    }
    match through {
        Through::Sockets => serve_sockets(streams, table, signals),
        Through::Ring => ring_echo::serve(streams, table, signals),
    }
}

fn serve_sockets(streams: Vec<TcpStream>, table: &Bytes, signals: &Signals) -> anyhow::Result<()> {
    let mut peers = Vec::new();
    for stream in streams {
        stream.set_nonblocking(true)?;
        peers.push(Peer {
            stream,
            incoming: Incoming::new(),
            outgoing: Outgoing::new(table.clone()),
        });
    }
    while signals.wait() {
        for peer in &mut peers {
            if peer.incoming.read(&peer.stream)? {
                while let Some(request) = peer.incoming.next_pdu() {
                    let (header, data) = answer(&request);
                    peer.outgoing.push(&header, data.start, data.len());
                }
            }
            if !peer.outgoing.is_empty() {
                peer.outgoing.flush(&peer.stream)?;
            }
        }
    }
    Ok(())
}
