//! The floor of a target with many connections that carry little each: the echo over io_uring. One system call hands in
//! all answers and takes all requests, whichever connections they are of.
//!
//! An answer is copied together and sent as one piece: at 4 KiB that costs less than a gathered send. It polls the ring
//! while it is measured, so that a request does not wait for a thread to wake up.

#![allow(
    unsafe_code,
    reason = "io_uring entries point into the buffers of this module"
)]

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd as _;

use anyhow::ensure;
use io_uring::{IoUring, opcode, squeue, types};

use super::echo_answer::{Signals, answer};
use super::wire::Incoming;

/// Entries of the ring: more than two for each connection there may be.
const ENTRIES: u32 = 256;

struct Peer {
    stream: TcpStream,
    incoming: Incoming,
    receiving: bool,
    /// What is with the kernel, and how much of it has been sent.
    sending: Vec<u8>,
    sent: usize,
    /// What goes next.
    answers: Vec<u8>,
}

/// Which of a connection's two operations has completed.
const RECEIVED: u64 = 0;
const SENT: u64 = 1;

/// Answers what the connections ask until it is told to end.
pub(super) fn serve(streams: Vec<TcpStream>, table: &[u8], signals: &Signals) -> anyhow::Result<()> {
    ensure!(
        2 * streams.len() < ENTRIES as usize,
        "too many connections for the ring"
    );
    let mut ring = IoUring::builder()
        .setup_coop_taskrun()
        .setup_single_issuer()
        .build(ENTRIES)?;
    let mut peers: Vec<Peer> = streams
        .into_iter()
        .map(|stream| Peer {
            stream,
            incoming: Incoming::new(),
            receiving: false,
            sending: Vec::new(),
            sent: 0,
            answers: Vec::new(),
        })
        .collect();
    let served =
        serve_peers(&mut ring, &mut peers, table, signals).and_then(|()| settle(&mut ring, &mut peers));
    if served.is_err() {
        // The kernel may still write into them.
        std::mem::forget(peers);
    }
    Ok(served?)
}

fn serve_peers(ring: &mut IoUring, peers: &mut [Peer], table: &[u8], signals: &Signals) -> io::Result<()> {
    while signals.wait() {
        for (index, peer) in peers.iter_mut().enumerate() {
            for entry in [peer.receive(), peer.send()].into_iter().flatten() {
                push(ring, entry, index)?;
            }
        }
        // Waits for nothing: whatever the kernel has to tell is told at the end of a system call.
        ring.submit_and_wait(0)?;
        take(ring, peers, table)?;
    }
    Ok(())
}

/// Ends the connections and waits until the kernel has let go of their buffers.
fn settle(ring: &mut IoUring, peers: &mut [Peer]) -> io::Result<()> {
    for peer in peers.iter() {
        // It may be closed already.
        let _ = peer.stream.shutdown(Shutdown::Both);
    }
    while peers
        .iter()
        .any(|peer| peer.receiving || !peer.sending.is_empty())
    {
        ring.submit_and_wait(1)?;
        for (user_data, _) in completions(ring) {
            let peer = &mut peers[(user_data >> 1) as usize];
            match user_data & 1 {
                RECEIVED => peer.receiving = false,
                _ => peer.sending.clear(),
            }
        }
    }
    Ok(())
}

fn push(ring: &mut IoUring, (operation, entry): (u64, squeue::Entry), index: usize) -> io::Result<()> {
    let entry = entry.user_data((index as u64) << 1 | operation);
    // SAFETY: the entry points into a buffer of a peer, which is neither moved nor freed before its completion was seen:
    // `receiving` and `sending` say that the kernel has it, and `serve` leaks the peers after an error.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)
}

fn completions(ring: &mut IoUring) -> Vec<(u64, i32)> {
    ring.completion()
        .map(|completion| (completion.user_data(), completion.result()))
        .collect()
}

fn take(ring: &mut IoUring, peers: &mut [Peer], table: &[u8]) -> io::Result<()> {
    for completion in ring.completion() {
        let peer = &mut peers[(completion.user_data() >> 1) as usize];
        let bytes = match completion.result() {
            ended @ ..=0 => {
                // Only a receive of an ended connection answers 0. Either way the kernel has let go of this buffer, and
                // of the others nobody knows: the caller leaks them.
                return Err(io::Error::from_raw_os_error(-ended));
            }
            bytes => bytes as usize,
        };
        if completion.user_data() & 1 == RECEIVED {
            peer.receiving = false;
            peer.incoming.received(bytes);
            while let Some(request) = peer.incoming.next_pdu() {
                let (header, data) = answer(&request);
                peer.answers.extend_from_slice(&header);
                peer.answers.extend_from_slice(&table[data]);
            }
        } else {
            peer.sent += bytes;
            if peer.sent == peer.sending.len() {
                peer.sending.clear();
            } else {
                // What is left goes first.
                peer.sending.drain(..peer.sent);
                let next = std::mem::take(&mut peer.answers);
                peer.answers = std::mem::take(&mut peer.sending);
                peer.answers.extend_from_slice(&next);
            }
            peer.sent = 0;
        }
    }
    Ok(())
}

impl Peer {
    fn receive(&mut self) -> Option<(u64, squeue::Entry)> {
        if self.receiving {
            return None;
        }
        self.receiving = true;
        let space = self.incoming.space();
        let socket = types::Fd(self.stream.as_raw_fd());
        let entry = opcode::Recv::new(socket, space.as_mut_ptr(), space.len() as u32).build();
        Some((RECEIVED, entry))
    }

    fn send(&mut self) -> Option<(u64, squeue::Entry)> {
        if !self.sending.is_empty() || self.answers.is_empty() {
            return None;
        }
        std::mem::swap(&mut self.sending, &mut self.answers);
        let socket = types::Fd(self.stream.as_raw_fd());
        let entry = opcode::Send::new(socket, self.sending.as_ptr(), self.sending.len() as u32).build();
        Some((SENT, entry))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use crate::bench::echo::{Echo, Through};
    use crate::bench::host::Host;
    use crate::bench::target::random;

    #[test]
    fn both_echoes_answer_reads_and_writes_of_all_connections() {
        for through in [Through::Sockets, Through::Ring] {
            let payload: Bytes = vec![3; 128 << 10].into();
            let workload = |depth| random(50, depth);
            let table = vec![4; (workload(1).area.1 * 4096) as usize].into();
            let echo = Echo::start(through, 4, table).unwrap();
            let mut host = Host::to_echo(echo.address, 4, &payload).unwrap();
            echo.set_active(true);
            for depth in [1, 32] {
                let window = host.run(&workload(depth), Duration::from_millis(1)).unwrap();
                assert!(window.latency.count() > 0, "{through:?} {depth}");
            }
        }
    }
}
