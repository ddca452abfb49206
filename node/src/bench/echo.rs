//! The floor of a target: a peer on the same core that answers the same bytes and does nothing else.
//!
//! A read is answered from a table as large as the drive, at the place that was asked for: that a drive's bytes are not in a
//! cache is no fault of the target. What is written is received and dropped.
//!
//! It parses as much as says where a request ends and which of the two answers it wants, batches as the target does,
//! and polls while it is measured. Between measurements it sleeps, so that it takes nothing from the subject.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, Thread};

use super::machine;
use super::wire::{
    C2H_DATA, CAPSULE_RESP, COMMAND_BYTES, Incoming, LAST, Outgoing, SHORT_BYTES, SUCCESS, header, u16_at,
    u32_at,
};

/// Where the opcode, the command identifier and the number of blocks lie in a command capsule.
const OPCODE: usize = 8;
const CID: usize = 10;
const SLBA: usize = 8 + 40;
const NLB_Z: usize = 8 + 48;
const READ: u8 = 0x02;

/// A running echo of one connection set.
pub(super) struct Echo {
    pub(super) address: SocketAddr,
    active: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    thread: Thread,
    join: Option<JoinHandle<()>>,
}

impl Echo {
    /// Listens for `connections`, which have to be made before it is first activated. Reads are answered from `table`.
    pub(super) fn start(connections: usize, table: Arc<[u8]>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (active, ended) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let flags = (Arc::clone(&active), Arc::clone(&ended));
        let join = std::thread::Builder::new().name("echo".into()).spawn(move || {
            // An error ends the connections, which the load generator reports.
            let _ = serve(&listener, connections, &table, &flags.0, &flags.1);
        })?;
        Ok(Self {
            address,
            active,
            ended,
            thread: join.thread().clone(),
            join: Some(join),
        })
    }

    /// Polls from now on, or sleeps.
    pub(super) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
        self.thread.unpark();
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
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
    connections: usize,
    table: &Arc<[u8]>,
    active: &AtomicBool,
    ended: &AtomicBool,
) -> anyhow::Result<()> {
    machine::pin(machine::SUBJECT_CORE)?;
    let mut peers = Vec::new();
    for _ in 0..connections {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        peers.push(Peer {
            stream,
            incoming: Incoming::new(),
            outgoing: Outgoing::new(Arc::clone(table)),
        });
    }
    while !ended.load(Ordering::Acquire) {
        if !active.load(Ordering::Acquire) {
            std::thread::park();
            continue;
        }
        for peer in &mut peers {
            if peer.incoming.read(&peer.stream)? {
                while let Some(request) = peer.incoming.next_pdu() {
                    answer(&request, &mut peer.outgoing);
                }
            }
            if !peer.outgoing.is_empty() {
                peer.outgoing.flush(&peer.stream)?;
            }
        }
    }
    Ok(())
}

fn answer(request: &[u8; COMMAND_BYTES], outgoing: &mut Outgoing) {
    let cid = u16_at(request, CID).to_le_bytes();
    if request[OPCODE] == READ {
        let data_bytes = (u32_at(request, NLB_Z) as usize & 0xffff) * 4096 + 4096;
        let mut header = header(C2H_DATA, LAST | SUCCESS, SHORT_BYTES, data_bytes);
        header[8..10].copy_from_slice(&cid);
        outgoing.push(
            &header[..SHORT_BYTES],
            u32_at(request, SLBA) as usize * 4096,
            data_bytes,
        );
    } else {
        let mut header = header(CAPSULE_RESP, 0, SHORT_BYTES, 0);
        header[20..22].copy_from_slice(&cid);
        outgoing.push(&header[..SHORT_BYTES], 0, 0);
    }
}
