//! The PDU framer, both directions.
//!
//! - Whatever way a stream is cut, the same PDUs and the same verdict come out.
//! - A PDU that was decoded is encoded and decoded to itself.
//! - Memory is bounded by what was received and the largest PDU that is acceptable.

use std::fmt::Debug;
use std::io::IoSlice;

use bytes::Bytes;
use weft_proto::tcp::{
    C2HData, CapsuleCmd, DataAt, Digests, Direction, Encoder, FatalErrorStatus, Framer, FramerLimits,
    FromController, FromHost, H2CData, IcReq, IcResp, PduError, R2T, TermReason, TransmitQueue, crc32c,
};

use crate::input::Input;
use crate::memory::bounded;

/// Most data of one PDU, here.
const DATA_BYTES_MAX: u32 = 64 << 10;

/// A PDU that can be encoded again.
trait Encode: Direction + Debug + PartialEq {
    /// Queues it. `false` if its data was damaged, which no encoder can repeat.
    fn encode(&self, encoder: Encoder, queue: &mut TransmitQueue) -> bool;

    /// Without what the encoder does not carry: reserved bytes.
    fn without_reserved(self) -> Self;
}

impl Encode for FromHost {
    fn encode(&self, encoder: Encoder, queue: &mut TransmitQueue) -> bool {
        match self {
            Self::IcReq(request) => encoder.ic_req(queue, request),
            Self::TermReq(term) => encoder.h2c_term_req(queue, term.reason, &term.offending),
            Self::CapsuleCmd(CapsuleCmd { sqe, data: Ok(data) }) => {
                encoder.capsule_cmd(queue, sqe, [data.clone()]);
            }
            Self::H2CData(H2CData {
                header,
                last,
                data: Ok(data),
            }) => {
                let at = DataAt {
                    cccid: header.cccid.get(),
                    datao: header.datao.get(),
                };
                encoder.h2c_data(queue, at, header.ttag.get(), *last, [data.clone()]);
            }
            Self::CapsuleCmd(_) | Self::H2CData(_) => return false,
        }
        true
    }

    fn without_reserved(mut self) -> Self {
        if let Self::H2CData(data) = &mut self {
            data.header.0.rsvd20 = [0; 4];
        }
        self
    }
}

impl Encode for FromController {
    fn encode(&self, encoder: Encoder, queue: &mut TransmitQueue) -> bool {
        match self {
            Self::IcResp(response) => encoder.ic_resp(queue, response),
            Self::TermReq(term) => encoder.c2h_term_req(queue, term.reason, &term.offending),
            Self::CapsuleResp(cqe) => encoder.capsule_resp(queue, cqe),
            Self::C2HData(C2HData {
                header,
                last,
                success,
                data: Ok(data),
            }) => {
                let at = DataAt {
                    cccid: header.cccid.get(),
                    datao: header.datao.get(),
                };
                encoder.c2h_data(queue, at, *last, *success, [data.clone()]);
            }
            Self::R2T(r2t) => encoder.r2t(queue, r2t),
            Self::C2HData(_) => return false,
        }
        true
    }

    fn without_reserved(mut self) -> Self {
        if let Self::C2HData(data) = &mut self {
            data.header.0.rsvd20 = [0; 4];
            data.header.0.ttag = 0.into();
        }
        self
    }
}

/// What a stream came to.
#[derive(Debug, PartialEq)]
struct Outcome<D> {
    pdus: Vec<D>,
    verdict: Result<(), PduError>,
}

/// Feeds `bytes` in pieces of the sizes that `next` gives, taking all PDUs after each.
fn receive<D: Direction>(
    mut bytes: &[u8],
    limits: FramerLimits,
    mut next: impl FnMut() -> usize,
) -> Outcome<D> {
    let mut framer = Framer::<D>::new();
    framer.set_limits(limits);
    let mut pdus = Vec::new();
    let mut verdict = Ok(());
    while !bytes.is_empty() && verdict.is_ok() {
        let (piece, rest) = bytes.split_at(next().clamp(1, bytes.len()));
        bytes = rest;
        framer.buffer(piece.len()).extend_from_slice(piece);
        verdict = loop {
            match framer.next_pdu() {
                Ok(Some(pdu)) => pdus.push(pdu),
                Ok(None) => break Ok(()),
                Err(error) => {
                    assert_eq!(framer.next_pdu().err(), Some(error), "a verdict stands");
                    break Err(error);
                }
            }
        };
    }
    Outcome { pdus, verdict }
}

/// All that is queued.
pub(crate) fn written(queue: &mut TransmitQueue) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(queue.len());
    while !queue.is_empty() {
        let mut slices = [IoSlice::new(&[]); 64];
        let count = queue.fill(&mut slices);
        let before = bytes.len();
        slices[..count]
            .iter()
            .for_each(|slice| bytes.extend_from_slice(slice));
        queue.advance(bytes.len() - before);
    }
    bytes
}

fn check<D: Encode>(bytes: &[u8], limits: FramerLimits, mut cuts: u64) {
    let bound = 8 * bytes.len() + 4 * DATA_BYTES_MAX as usize + (64 << 10);
    bounded(bound, || {
        let whole = receive::<D>(bytes, limits, || usize::MAX);
        let pieces = receive::<D>(bytes, limits, || {
            // xorshift: pieces of 1 to 256 bytes, mostly short ones.
            cuts ^= cuts << 13;
            cuts ^= cuts >> 7;
            cuts ^= cuts << 17;
            1 + (cuts & 0xff & (cuts >> 8)) as usize
        });
        assert_eq!(whole, pieces, "the same in any cut");
        let encoder = Encoder {
            digests: limits.digests,
            pda_z: limits.pda_z,
        };
        for pdu in whole.pdus {
            let mut queue = TransmitQueue::new();
            if !pdu.encode(encoder, &mut queue) {
                continue;
            }
            let again = receive::<D>(&written(&mut queue), limits, || usize::MAX);
            assert_eq!(again.verdict, Ok(()));
            assert_eq!(again.pdus, [pdu.without_reserved()], "the same after encoding");
        }
    });
}

/// Makes the digests of a stream right, as far as it can be followed.
fn repair(bytes: &mut [u8]) {
    let mut rest = bytes;
    while rest.len() >= 8 {
        let (flags, hlen, pdo) = (rest[1], usize::from(rest[2]), usize::from(rest[3]));
        let plen = u32::from_le_bytes([rest[4], rest[5], rest[6], rest[7]]) as usize;
        if plen < hlen.max(8) || plen > rest.len() {
            return;
        }
        let (pdu, following) = rest.split_at_mut(plen);
        if flags & 1 != 0 && hlen + 4 <= plen {
            let digest = crc32c(&pdu[..hlen]).to_le_bytes();
            pdu[hlen..hlen + 4].copy_from_slice(&digest);
        }
        if flags & 2 != 0 && pdo + 4 <= plen {
            let digest = crc32c(&pdu[pdo..plen - 4]).to_le_bytes();
            pdu[plen - 4..].copy_from_slice(&digest);
        }
        rest = following;
    }
}

const FROM_CONTROLLER: u8 = 1 << 2;
const REPAIR: u8 = 1 << 3;

/// Byte 0: digests, direction, whether digests are made right. Byte 1: alignment. Then eight that cut, then the stream.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let limits = FramerLimits {
        digests: digests(flags),
        capsule_bytes_max: 8192,
        data_bytes_max: DATA_BYTES_MAX,
        pda_z: input.u8() % 32,
    };
    let cuts = input.u64() | 1;
    let mut bytes = input.rest().to_vec();
    if flags & REPAIR != 0 {
        repair(&mut bytes);
    }
    if flags & FROM_CONTROLLER == 0 {
        check::<FromHost>(&bytes, limits, cuts);
    } else {
        check::<FromController>(&bytes, limits, cuts);
    }
}

/// By the two low bits.
pub(crate) fn digests(flags: u8) -> Digests {
    Digests {
        header: flags & 1 != 0,
        data: flags & 2 != 0,
    }
}

/// Every PDU of both directions, with and without digests and alignment.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for flags in 0..4 {
        for pda_z in [0, 31] {
            let encoder = Encoder {
                digests: digests(flags),
                pda_z,
            };
            let data = [Bytes::from(vec![0x5a; 300]), Bytes::from_static(b"weft")];
            let at = DataAt { cccid: 7, datao: 512 };
            let reason = TermReason::new(FatalErrorStatus::PDU_SEQUENCE_ERROR);

            let mut host = TransmitQueue::new();
            encoder.ic_req(&mut host, &IcReq::new(encoder.digests, 4));
            encoder.capsule_cmd(&mut host, &[1; 64], []);
            encoder.capsule_cmd(&mut host, &[2; 64], data.clone());
            encoder.h2c_data(&mut host, at, 7, true, data.clone());
            encoder.h2c_term_req(&mut host, reason, &[3; 24]);

            let mut controller = TransmitQueue::new();
            encoder.ic_resp(&mut controller, &IcResp::new(encoder.digests, 8192));
            encoder.c2h_data(&mut controller, at, true, true, data);
            encoder.capsule_resp(&mut controller, &[4; 16]);
            let r2t = R2T {
                cccid: 7.into(),
                ttag: 7.into(),
                r2to: 0.into(),
                r2tl: 4096.into(),
                rsvd20: [0; 4],
            };
            encoder.r2t(&mut controller, &r2t);
            encoder.c2h_term_req(&mut controller, reason, &[5; 24]);

            for (direction, queue) in [(0, &mut host), (FROM_CONTROLLER, &mut controller)] {
                let mut seed = vec![flags | direction | REPAIR, pda_z];
                seed.extend(0x0123_4567_89ab_cdef_u64.to_le_bytes());
                seed.extend(written(queue));
                seeds.push(seed);
            }
        }
    }
    seeds
}
