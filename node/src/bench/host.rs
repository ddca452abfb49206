//! The load generator: an NVMe/TCP host that polls, batches and does as little per command as a host can.
//!
//! It speaks to a target, or to the echo that is its floor, with the same code. One thread, any number of connections
//! of one association, a fixed number of commands outstanding on each.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use bytes::Bytes;

use anyhow::{Context as _, bail, ensure};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::event::{PollFd, PollFlags, Timespec};
use weft_proto::fabrics::command::{CNTLID_DYNAMIC, Connect, ConnectData, FabricsCommand};
use weft_proto::fabrics::property::{Configuration, Property};
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::command::submit;
use weft_proto::nvme::sqe::Sqe;
use weft_proto::units::{BlockCount, Lba};
use zerocopy::IntoBytes as _;

use super::histogram::Histogram;
use super::machine::CpuClock;
use super::pairs::{CpuPerIo, Window};
use super::wire::{
    C2H_DATA, CAPSULE_CMD, CAPSULE_RESP, COMMAND_BYTES, H2C_DATA, Incoming, LAST, Outgoing, R2T, SHORT_BYTES,
    SUCCESS, header, u16_at, u32_at,
};

/// Longest data that goes in the capsule to a target; the echo takes all of it there.
const CAPSULE_DATA_MAX: usize = 8192;

/// Entries of an I/O queue. More than any depth here.
pub(super) const QUEUE_ENTRIES: u16 = 256;

/// A command without an answer for this long has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest sleep of a host that sleeps: it has a window to end.
const WAIT_MAX: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Workload {
    /// Of 100 commands.
    pub(super) reads: u32,
    /// Blocks of 4 KiB of each command.
    pub(super) blocks: u32,
    /// First block and number of blocks of the part of the namespace that is used.
    pub(super) area: (u64, u64),
    pub(super) sequential: bool,
    /// Outstanding on each connection.
    pub(super) depth: usize,
}

impl Workload {
    /// Bytes of one command.
    pub(super) fn bytes(&self) -> usize {
        self.blocks as usize * 4096
    }
}

/// What the host does while it waits for answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Idle {
    /// Looks again at once.
    Poll,
    /// Sleeps until there is something: where others need its core.
    Sleep,
}

/// What the connections lead to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    Echo,
    Target,
}

/// A host with its connections.
pub(super) struct Host {
    peer: Peer,
    /// Polls unless it is told otherwise.
    pub(super) idle: Idle,
    connections: Vec<Connection>,
    /// Of the association; held open.
    _admin: Option<TcpStream>,
    random: SmallRng,
    next: u64,
}

struct Connection {
    stream: TcpStream,
    incoming: Incoming,
    outgoing: Outgoing,
    free: Vec<u16>,
    /// By command identifier: nanoseconds of the window at which it was sent.
    sent_at: Vec<u64>,
    outstanding: usize,
    /// Whether a write had to wait for an R2T.
    asked_for_data: bool,
}

impl Host {
    /// Connects to an echo.
    pub(super) fn to_echo(address: SocketAddr, connections: usize, payload: &Bytes) -> anyhow::Result<Self> {
        let streams = (0..connections)
            .map(|_| open(address))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Self::new(Peer::Echo, streams, None, payload)
    }

    /// Makes an association with a target's subsystem, with one I/O queue per connection and no keep-alive.
    pub(super) fn to_target(
        address: SocketAddr,
        subnqn: &Nqn,
        connections: usize,
        payload: &Bytes,
    ) -> anyhow::Result<Self> {
        let hostnqn: Nqn = "nqn.2026-01.io.weft:bench-host".parse()?;
        let hostid = HostId([0xbe; 16]);
        let mut admin = open(address)?;
        let connect = |stream: &mut TcpStream, qid: u16, sqsize_z: u16, cntlid: u16| {
            initialize(stream)?;
            let data = ConnectData::new(hostid, cntlid, subnqn, &hostnqn);
            let command = Connect {
                qid,
                sqsize_z,
                cattr: if qid > 0 {
                    Connect::DISABLE_SQ_FLOW_CONTROL
                } else {
                    0
                },
                kato_ms: 0,
            };
            execute(
                stream,
                &FabricsCommand::Connect(command).to_sqe(),
                data.as_bytes(),
            )
        };
        let cntlid = connect(&mut admin, 0, 31, CNTLID_DYNAMIC).context("Connect of the admin queue")? as u16;
        let enable = FabricsCommand::PropertySet {
            property: Property::CC,
            wide: false,
            value: u64::from(Configuration::ENABLED.0),
        };
        execute(&mut admin, &enable.to_sqe(), &[]).context("Property Set")?;
        let mut streams = Vec::new();
        for qid in 1..=u16::try_from(connections)? {
            let mut stream = open(address)?;
            connect(&mut stream, qid, QUEUE_ENTRIES - 1, cntlid)
                .with_context(|| format!("Connect of queue {qid}"))?;
            streams.push(stream);
        }
        Self::new(Peer::Target, streams, Some(admin), payload)
    }

    fn new(
        peer: Peer,
        streams: Vec<TcpStream>,
        admin: Option<TcpStream>,
        payload: &Bytes,
    ) -> anyhow::Result<Self> {
        let mut connections = Vec::new();
        for stream in streams {
            stream.set_nonblocking(true)?;
            connections.push(Connection {
                stream,
                incoming: Incoming::new(),
                outgoing: Outgoing::new(payload.clone()),
                free: Vec::new(),
                sent_at: vec![0; usize::from(QUEUE_ENTRIES)],
                outstanding: 0,
                asked_for_data: false,
            });
        }
        Ok(Self {
            peer,
            idle: Idle::Poll,
            connections,
            _admin: admin,
            random: SmallRng::seed_from_u64(4),
            next: 0,
        })
    }

    /// Keeps `workload` going for `window`, then waits for the last answers. The value is commands a second.
    ///
    /// # Errors
    /// A command failed, or the connection.
    pub(super) fn run(&mut self, workload: &Workload, window: Duration) -> anyhow::Result<Window> {
        // Answers are taken as they come, but new commands go out a few at a time: what arrives in one piece is
        // handled in one piece, on both ends.
        let batch = (workload.depth / 8).max(1);
        for connection in &mut self.connections {
            connection.free = (0..workload.depth as u16).collect();
        }
        let (clock, start) = (CpuClock::now(), Instant::now());
        let mut latency = Histogram::default();
        let mut done = 0u64;
        loop {
            let now = start.elapsed();
            // On a machine that gives this process nothing for a while, the window waits for something to be measured.
            if (now >= window && done > 0) || now >= window + PATIENCE {
                break;
            }
            let answered = self.turn(workload, batch, start, Some(&mut latency), true)?;
            done += answered;
            if answered == 0 && self.idle == Idle::Sleep {
                self.wait()?;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let (own, others) = clock.elapsed();
        let deadline = Instant::now() + PATIENCE;
        while self
            .connections
            .iter()
            .any(|connection| connection.outstanding > 0)
        {
            self.turn(workload, batch, start, None, false)?;
            ensure!(Instant::now() < deadline, "a command was not answered");
        }
        ensure!(done > 0, "nothing was answered");
        let per_io = |cpu: Duration| Some(cpu.as_secs_f64() * 1e6 / done as f64);
        Ok(Window {
            value: done as f64 / seconds,
            latency,
            cpu: CpuPerIo {
                host: per_io(own),
                target: per_io(others),
            },
        })
    }

    /// Whether any write had to wait until its data was asked for.
    pub(super) fn asked_for_data(&self) -> bool {
        self.connections
            .iter()
            .any(|connection| connection.asked_for_data)
    }

    /// Sleeps until a connection can be read, or written where something waits to be.
    fn wait(&self) -> io::Result<()> {
        let mut polled: Vec<PollFd<'_>> = self
            .connections
            .iter()
            .map(|connection| {
                let mut events = PollFlags::IN;
                events.set(PollFlags::OUT, !connection.outgoing.is_empty());
                PollFd::new(&connection.stream, events)
            })
            .collect();
        match rustix::event::poll(&mut polled, Some(&WAIT_MAX)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// One look at every connection; answers how many commands were answered.
    fn turn(
        &mut self,
        workload: &Workload,
        batch: usize,
        start: Instant,
        mut latency: Option<&mut Histogram>,
        submit: bool,
    ) -> anyhow::Result<u64> {
        let mut done = 0;
        for connection in &mut self.connections {
            if connection.outstanding > 0 && connection.incoming.read(&connection.stream)? {
                let now = start.elapsed().as_nanos() as u64;
                while let Some(pdu) = connection.incoming.next_pdu() {
                    let Some(cid) = connection.handle(&pdu)? else {
                        continue;
                    };
                    let sent_at = *connection
                        .sent_at
                        .get(usize::from(cid))
                        .context("an unknown command")?;
                    if let Some(latency) = &mut latency {
                        latency.record(now.saturating_sub(sent_at));
                    }
                    connection.free.push(cid);
                    connection.outstanding -= 1;
                    done += 1;
                }
            }
            if submit && connection.free.len() >= batch {
                let now = start.elapsed().as_nanos() as u64;
                while let Some(cid) = connection.free.pop() {
                    let places = workload.area.1 / u64::from(workload.blocks);
                    let place = if workload.sequential {
                        self.next += 1;
                        self.next % places
                    } else {
                        self.random.random_range(0..places)
                    };
                    let lba = Lba(workload.area.0 + place * u64::from(workload.blocks));
                    let read = workload.reads == 100
                        || (workload.reads > 0 && self.random.random_range(0..100) < workload.reads);
                    connection.start(self.peer, cid, lba, workload, read)?;
                    connection.sent_at[usize::from(cid)] = now;
                }
            }
            if !connection.outgoing.is_empty() {
                connection.outgoing.flush(&connection.stream)?;
            }
        }
        Ok(done)
    }
}

impl Connection {
    fn start(
        &mut self,
        peer: Peer,
        cid: u16,
        lba: Lba,
        workload: &Workload,
        read: bool,
    ) -> anyhow::Result<()> {
        let count = BlockCount::new(workload.blocks).context("a command of no blocks, or of too many")?;
        let mut sqe = if read {
            submit::read(1, lba, count)
        } else {
            submit::write(1, lba, count, true)
        };
        sqe.cid = cid.into();
        let bytes = workload.bytes();
        let in_capsule = !read && (bytes <= CAPSULE_DATA_MAX || peer == Peer::Echo);
        let data_bytes = if in_capsule { bytes } else { 0 };
        self.outgoing
            .push(&capsule(&sqe, data_bytes, bytes), 0, data_bytes);
        self.outstanding += 1;
        Ok(())
    }

    /// The command that a PDU ends, if it does.
    fn handle(&mut self, pdu: &[u8; COMMAND_BYTES]) -> anyhow::Result<Option<u16>> {
        match pdu[0] {
            C2H_DATA => Ok((pdu[1] & SUCCESS != 0).then(|| u16_at(pdu, 8))),
            CAPSULE_RESP => {
                let status = u16_at(pdu, 22) >> 1;
                ensure!(status == 0, "a command failed with status {status:#x}");
                Ok(Some(u16_at(pdu, 20)))
            }
            R2T => {
                self.asked_for_data = true;
                let length = u32_at(pdu, 16) as usize;
                let mut answer = header(H2C_DATA, LAST, SHORT_BYTES, length);
                // Command and transfer tag, then the offset.
                answer[8..16].copy_from_slice(&pdu[8..16]);
                answer[16..20].copy_from_slice(&pdu[16..20]);
                self.outgoing.push(&answer[..SHORT_BYTES], 0, length);
                Ok(None)
            }
            other => bail!("a PDU of type {other:#x}"),
        }
    }
}

/// A command capsule's header, for data in the capsule or elsewhere.
fn capsule(sqe: &Sqe, in_capsule: usize, bytes: usize) -> [u8; COMMAND_BYTES] {
    /// SGL descriptors: data block at an offset of the capsule; transport data block.
    const IN_CAPSULE: u8 = 0x01;
    const TRANSPORT: u8 = 0x5a;
    let mut capsule = header(CAPSULE_CMD, 0, COMMAND_BYTES, in_capsule);
    capsule[8..].copy_from_slice(sqe.as_bytes());
    // Dwords 6 to 9: address, length, type.
    capsule[8 + 1] = (capsule[8 + 1] & 0x3f) | 0x40;
    capsule[8 + 24..8 + 32].fill(0);
    capsule[8 + 32..8 + 36].copy_from_slice(&(bytes as u32).to_le_bytes());
    capsule[8 + 39] = if in_capsule > 0 { IN_CAPSULE } else { TRANSPORT };
    capsule
}

fn open(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// ICReq and ICResp, without digests.
fn initialize(stream: &mut TcpStream) -> io::Result<()> {
    let mut request = [0; 128];
    request[2] = 128;
    request[4] = 128;
    stream.write_all(&request)?;
    stream.read_exact(&mut request)
}

/// One command of the set-up, waited for; answers dwords 0 and 1 of its completion.
fn execute(stream: &mut TcpStream, sqe: &Sqe, data: &[u8]) -> anyhow::Result<u64> {
    let mut capsule = capsule(sqe, data.len(), data.len()).to_vec();
    capsule.extend_from_slice(data);
    stream.write_all(&capsule)?;
    let mut answer = [0; SHORT_BYTES];
    stream.read_exact(&mut answer)?;
    ensure!(
        answer[0] == CAPSULE_RESP,
        "a PDU of type {:#x} for an answer",
        answer[0]
    );
    let status = u16_at(&answer, 22) >> 1;
    ensure!(status == 0, "refused with status {status:#x}");
    Ok(u64::from(u32_at(&answer, 8)))
}
