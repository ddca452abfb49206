//! A host written by hand: PDUs are byte arrays from the specifications, so that the target and its tests cannot
//! agree on the same mistake.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "test code")]

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, LocalSet};
use weft_block::Device;
use weft_block::memory::MemoryDrive;
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::log::AnaState;
use weft_target::reservation::ReservedNamespace;
use weft_target::{AllowedHosts, NamespaceConfig, Registry, RegistryConfig, Source, SubsystemConfig, serve};

pub const SUBNQN: &str = "nqn.2026-01.io.weft:test";
pub const HOSTNQN: &str = "nqn.2014-08.org.nvmexpress:uuid:host-a";
pub const HOSTID: [u8; 16] = [0xa1; 16];
pub const UUID: [u8; 16] = [0x42; 16];

/// Asymmetric Access Transition, what a host is told that may have given up a command: it may send it again.
pub const ANA_TRANSITION: u16 = 0x303;

pub fn nqn(name: &str) -> Nqn {
    name.parse().unwrap()
}

/// Runs a test on a runtime of the kind that the target needs.
pub fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let limit = Duration::from_secs(60);
    LocalSet::new().block_on(&runtime, async move {
        tokio::time::timeout(limit, test).await.expect("the test hangs");
    });
}

pub struct Target {
    pub registry: Rc<Registry>,
    pub address: SocketAddr,
    pub serving: JoinHandle<std::io::Result<()>>,
}

/// A target with one subsystem and no namespace.
pub async fn empty_target() -> Target {
    let registry = Registry::new(RegistryConfig::default());
    registry
        .add_subsystem(SubsystemConfig {
            nqn: nqn(SUBNQN),
            serial: "serial-1".into(),
            model: "Weft".into(),
            hosts: AllowedHosts::Any,
            namespaces_max: 64,
        })
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::task::spawn_local(serve(listener, Rc::clone(&registry)));
    Target {
        registry,
        address,
        serving,
    }
}

/// A target whose namespace 1 is `device` under reservations.
pub async fn target(device: Device) -> (Target, ReservedNamespace) {
    let target = empty_target().await;
    let reserved = ReservedNamespace::open(device, UUID, None).unwrap();
    target
        .registry
        .add_namespace(
            &nqn(SUBNQN),
            NamespaceConfig {
                nsid: 1,
                uuid: UUID,
                ana_group: 1,
                ana_state: AnaState::OPTIMIZED,
                source: Source::Reserved(reserved.clone()),
            },
        )
        .unwrap();
    (target, reserved)
}

/// A target whose namespace 1 is 64 MiB of memory.
pub async fn memory_target() -> (Target, ReservedNamespace) {
    target(MemoryDrive::device(64 << 20)).await
}

/// A PDU as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pdu {
    pub pdu_type: u8,
    pub flags: u8,
    /// Everything after the common header, without padding or digests.
    pub header: Vec<u8>,
    pub data: Vec<u8>,
}

/// A completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub cid: u16,
    /// SCT in bits 10:8, SC in 7:0; Do Not Retry is bit 14.
    pub status: u16,
    pub result: u64,
    pub data: Vec<u8>,
}

impl Answer {
    /// Without Do Not Retry.
    pub fn code(&self) -> u16 {
        self.status & 0x7ff
    }

    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.status, 0, "status {:#x}", self.status);
        self
    }
}

/// One connection.
pub struct Raw {
    pub stream: TcpStream,
}

impl Raw {
    pub async fn open(address: SocketAddr) -> Self {
        Self {
            stream: TcpStream::connect(address).await.unwrap(),
        }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next PDU; `None` when the connection has been closed.
    pub async fn receive(&mut self) -> Option<Pdu> {
        let mut common = [0; 8];
        self.stream.read_exact(&mut common).await.ok()?;
        let (hlen, pdo) = (usize::from(common[2]), usize::from(common[3]));
        let plen = u32::from_le_bytes(common[4..8].try_into().unwrap()) as usize;
        let mut rest = vec![0; plen - 8];
        self.stream.read_exact(&mut rest).await.ok()?;
        let data = match common[0] {
            // A TermReq's data follows its header.
            0x03 => rest[hlen - 8..].to_vec(),
            _ if pdo > 0 => rest[pdo - 8..].to_vec(),
            _ => Vec::new(),
        };
        Some(Pdu {
            pdu_type: common[0],
            flags: common[1],
            header: rest[..hlen - 8].to_vec(),
            data,
        })
    }

    /// Expects a C2HTermReq with this Fatal Error Status and information, and then the end.
    #[track_caller]
    pub fn expect_term_req(&mut self, fes: u16, fei: u32) -> impl Future<Output = ()> {
        let location = std::panic::Location::caller();
        async move {
            let pdu = self
                .receive()
                .await
                .unwrap_or_else(|| panic!("no TermReq, at {location}"));
            assert_eq!(pdu.pdu_type, 0x03, "at {location}: {pdu:?}");
            assert_eq!(pdu.header[..2], fes.to_le_bytes(), "FES at {location}");
            assert_eq!(pdu.header[2..6], fei.to_le_bytes(), "FEI at {location}");
            assert_eq!(self.receive().await, None, "closed, at {location}");
        }
    }

    /// ICReq without digests and its ICResp.
    pub async fn initialize(&mut self) -> Pdu {
        self.send(&ic_req(0)).await;
        let pdu = self.receive().await.expect("an ICResp");
        assert_eq!(pdu.pdu_type, 0x01);
        pdu
    }

    /// A command capsule with its in-capsule data.
    pub async fn command(&mut self, sqe: [u8; 64], data: &[u8]) {
        self.send(&capsule(sqe, data)).await;
    }

    /// The next completion, with the data that came before it.
    pub async fn answer(&mut self) -> Answer {
        self.answer_if_any().await.expect("an answer")
    }

    /// The same, where the target may have closed the connection instead.
    pub async fn answer_if_any(&mut self) -> Option<Answer> {
        let mut data = Vec::new();
        loop {
            let pdu = self.receive().await?;
            match pdu.pdu_type {
                0x07 => {
                    let offset = u32::from_le_bytes(pdu.header[4..8].try_into().unwrap()) as usize;
                    assert_eq!(offset, data.len(), "data in order");
                    data.extend(&pdu.data);
                    if pdu.flags & 0b1000 != 0 {
                        let cid = u16::from_le_bytes([pdu.header[0], pdu.header[1]]);
                        return Some(Answer {
                            cid,
                            status: 0,
                            result: 0,
                            data,
                        });
                    }
                }
                0x05 => {
                    let h = &pdu.header;
                    return Some(Answer {
                        cid: u16::from_le_bytes([h[12], h[13]]),
                        status: u16::from_le_bytes([h[14], h[15]]) >> 1,
                        result: u64::from_le_bytes(h[..8].try_into().unwrap()),
                        data,
                    });
                }
                other => panic!("unexpected PDU type {other:#x}"),
            }
        }
    }

    /// A command and its completion.
    pub async fn execute(&mut self, sqe: [u8; 64], data: &[u8]) -> Answer {
        self.command(sqe, data).await;
        self.answer().await
    }
}

/// ICReq with digest enables.
pub fn ic_req(dgst: u8) -> Vec<u8> {
    let mut pdu = vec![0; 128];
    pdu[..8].copy_from_slice(&[0x00, 0, 128, 0, 128, 0, 0, 0]);
    pdu[11] = dgst;
    pdu
}

/// A command capsule.
pub fn capsule(sqe: [u8; 64], data: &[u8]) -> Vec<u8> {
    let plen = 72 + data.len() as u32;
    let pdo = if data.is_empty() { 0 } else { 72 };
    let mut pdu = vec![0x04, 0, 72, pdo];
    pdu.extend(plen.to_le_bytes());
    pdu.extend(sqe);
    pdu.extend(data);
    pdu
}

/// H2CData.
pub fn h2c_data(cid: u16, ttag: u16, offset: u32, last: bool, data: &[u8]) -> Vec<u8> {
    let mut pdu = vec![0x06, if last { 0b100 } else { 0 }, 24, 24];
    pdu.extend((24 + data.len() as u32).to_le_bytes());
    pdu.extend(cid.to_le_bytes());
    pdu.extend(ttag.to_le_bytes());
    pdu.extend(offset.to_le_bytes());
    pdu.extend((data.len() as u32).to_le_bytes());
    pdu.extend([0; 4]);
    pdu.extend(data);
    pdu
}

/// An entry: opcode, CID, NSID, dwords from 10 on.
pub fn sqe(opcode: u8, cid: u16, nsid: u32, dwords: &[u32]) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = opcode;
    entry[1] = 0x40;
    entry[2..4].copy_from_slice(&cid.to_le_bytes());
    entry[4..8].copy_from_slice(&nsid.to_le_bytes());
    for (index, dword) in dwords.iter().enumerate() {
        entry[40 + 4 * index..44 + 4 * index].copy_from_slice(&dword.to_le_bytes());
    }
    entry
}

/// With data in the capsule.
pub fn inline(mut entry: [u8; 64], len: u32) -> [u8; 64] {
    entry[32..36].copy_from_slice(&len.to_le_bytes());
    entry[39] = 0x01;
    entry
}

/// With data that the transport moves.
pub fn transport(mut entry: [u8; 64], len: u32) -> [u8; 64] {
    entry[32..36].copy_from_slice(&len.to_le_bytes());
    entry[39] = 0x5a;
    entry
}

pub fn fabrics(fctype: u8, cid: u16, from_40: &[u8]) -> [u8; 64] {
    let mut entry = sqe(0x7f, cid, u32::from(fctype), &[]);
    entry[40..40 + from_40.len()].copy_from_slice(from_40);
    entry
}

pub fn connect_sqe(cid: u16, qid: u16, sqsize_z: u16, kato_ms: u32) -> [u8; 64] {
    let mut from_40 = vec![0, 0];
    from_40.extend(qid.to_le_bytes());
    from_40.extend(sqsize_z.to_le_bytes());
    from_40.extend([0, 0]);
    from_40.extend(kato_ms.to_le_bytes());
    inline(fabrics(0x01, cid, &from_40), 1024)
}

pub fn connect_data(hostid: [u8; 16], cntlid: u16, subnqn: &str, hostnqn: &str) -> Vec<u8> {
    let mut data = vec![0; 1024];
    data[..16].copy_from_slice(&hostid);
    data[16..18].copy_from_slice(&cntlid.to_le_bytes());
    data[256..256 + subnqn.len()].copy_from_slice(subnqn.as_bytes());
    data[512..512 + hostnqn.len()].copy_from_slice(hostnqn.as_bytes());
    data
}

pub fn property_set_cc(cid: u16, cc: u32) -> [u8; 64] {
    let mut from_40 = vec![0, 0, 0, 0, 0x14, 0, 0, 0];
    from_40.extend(cc.to_le_bytes());
    fabrics(0x00, cid, &from_40)
}

pub fn property_get(cid: u16, offset: u32, wide: bool) -> [u8; 64] {
    let mut from_40 = vec![u8::from(wide), 0, 0, 0];
    from_40.extend(offset.to_le_bytes());
    fabrics(0x04, cid, &from_40)
}

/// A host with an admin queue and one I/O queue.
pub struct Host {
    pub admin: Raw,
    pub io: Raw,
    pub cntlid: u16,
}

/// Who connects to what.
#[derive(Clone, Copy)]
pub struct Identity {
    pub hostnqn: &'static str,
    pub hostid: [u8; 16],
    pub subnqn: &'static str,
    pub kato_ms: u32,
}

impl Default for Identity {
    fn default() -> Self {
        Self {
            hostnqn: HOSTNQN,
            hostid: HOSTID,
            subnqn: SUBNQN,
            kato_ms: 0,
        }
    }
}

impl Identity {
    pub fn hostid(id: u8) -> Self {
        Self {
            hostid: [id; 16],
            ..Self::default()
        }
    }

    pub fn id(&self) -> HostId {
        HostId(self.hostid)
    }

    /// A connection with its queue connected.
    pub async fn queue(&self, address: SocketAddr, qid: u16, cntlid: u16) -> (Raw, Answer) {
        let mut raw = Raw::open(address).await;
        raw.initialize().await;
        let kato_ms = if qid == 0 { self.kato_ms } else { 0 };
        let data = connect_data(self.hostid, cntlid, self.subnqn, self.hostnqn);
        let answer = raw.execute(connect_sqe(0, qid, 31, kato_ms), &data).await;
        (raw, answer)
    }

    /// An enabled controller.
    pub async fn admin(&self, address: SocketAddr) -> (Raw, u16) {
        let (mut admin, answer) = self.queue(address, 0, 0xffff).await;
        let cntlid = answer.ok().result as u16;
        admin.execute(property_set_cc(1, 0x0046_0001), &[]).await.ok();
        let csts = admin.execute(property_get(2, 0x1c, false), &[]).await.ok();
        assert_eq!(csts.result, 1, "CSTS.RDY");
        (admin, cntlid)
    }

    pub async fn connect(&self, address: SocketAddr) -> Host {
        let (admin, cntlid) = self.admin(address).await;
        let (io, answer) = self.queue(address, 1, cntlid).await;
        answer.ok();
        Host { admin, io, cntlid }
    }
}

/// Write of whole blocks with data in the capsule.
pub fn write_sqe(cid: u16, lba: u32, blocks: u32, fua: bool) -> [u8; 64] {
    sqe(0x01, cid, 1, &[lba, 0, (blocks - 1) | u32::from(fua) << 30])
}

pub fn read_sqe(cid: u16, lba: u32, blocks: u32) -> [u8; 64] {
    transport(sqe(0x02, cid, 1, &[lba, 0, blocks - 1]), blocks * 4096)
}

/// Data of Reservation Register and Acquire.
pub fn keys(current: u64, other: u64) -> Vec<u8> {
    [current.to_le_bytes(), other.to_le_bytes()].concat()
}

/// Waits until a condition holds.
pub async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
