//! From PDUs to bytes: headers are gathered in one buffer, data stays where it lies.
//!
//! An [`Encoder`] knows what was negotiated and appends PDUs to a [`TransmitQueue`]; the owner of the socket writes
//! the queue with vectored writes and advances it. A turn that queues many PDUs costs one system call.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};
use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::header::{
    CommonHeader, DataPduHeader, IcReq, IcResp, PDA_MAX, PduFlags, PduType, R2T, TERM_REQ_DATA_MAX,
    TermReqHeader,
};
use super::{DIGEST_BYTES, Digests, TermReason, crc32c, crc32c_scattered};

/// Data up to this many bytes is copied beside its header instead of taking a slice of its own in the vectored
/// write. A guess: copying this much costs less than the bookkeeping of a slice.
const COPY_BYTES_MAX: usize = 256;

/// Where data begins at the latest (PDO): a header and its digest are shorter than the coarsest alignment.
const PDO_MAX: usize = (PDA_MAX as usize + 1) * 4;

/// Memory for headers and short data that an empty queue keeps. Guessed: a deep queue's answers fit, and a hundred idle
/// connections do not add up to much.
const KEPT_BYTES: usize = 256 << 10;

/// Bytes that wait for the socket, in order. Owned by whoever writes it.
///
/// Headers and short data are copied into memory that is used over and over: a PDU costs no allocation and no reference count but
/// that of its data.
#[derive(Debug, Default)]
pub struct TransmitQueue {
    /// What was copied, in order; what comes before `written` has been written.
    copied: Vec<u8>,
    written: usize,
    segments: VecDeque<Segment>,
    /// Copied bytes that follow the last segment.
    tail: usize,
    bytes: usize,
}

/// Data that is not copied, and what goes before it.
#[derive(Debug)]
struct Segment {
    /// Copied bytes since the segment before.
    copied: usize,
    /// Never empty.
    data: Bytes,
}

impl TransmitQueue {
    /// An empty queue.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes not yet written.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether everything has been written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Fills `slices` from the front; answers how many it filled.
    pub fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut copied = &self.copied[self.written..];
        let segments = self
            .segments
            .iter()
            .map(|segment| (segment.copied, &segment.data[..]));
        let mut filled = 0;
        for (before, data) in segments.chain([(self.tail, &[][..])]) {
            let (head, rest) = copied.split_at(before);
            copied = rest;
            for piece in [head, data] {
                if piece.is_empty() {
                    continue;
                }
                let Some(slice) = slices.get_mut(filled) else {
                    return filled;
                };
                *slice = IoSlice::new(piece);
                filled += 1;
            }
        }
        filled
    }

    /// Forgets the first `bytes`, which have been written.
    ///
    /// # Panics
    /// If the queue holds fewer: the caller counts wrong.
    pub fn advance(&mut self, mut bytes: usize) {
        assert!(bytes <= self.bytes, "more written than queued");
        self.bytes -= bytes;
        while let Some(front) = self.segments.front_mut() {
            let head = bytes.min(front.copied);
            front.copied -= head;
            self.written += head;
            bytes -= head;
            if bytes < front.data.len() {
                front.data.advance(bytes);
                return;
            }
            bytes -= front.data.len();
            self.segments.pop_front();
        }
        self.tail -= bytes;
        self.written += bytes;
        if self.written == self.copied.len() {
            self.written = 0;
            self.copied.clear();
            self.copied.shrink_to(KEPT_BYTES);
        }
    }

    #[inline]
    fn push_copied(&mut self, bytes: &[u8]) {
        // A peer that never takes all of it must not make this grow for ever.
        if self.written > KEPT_BYTES && self.written * 2 > self.copied.len() {
            self.copied.drain(..self.written);
            self.written = 0;
        }
        self.bytes += bytes.len();
        self.tail += bytes.len();
        self.copied.extend_from_slice(bytes);
    }

    /// The last bytes that were copied.
    fn last_copied(&self, bytes: usize) -> &[u8] {
        &self.copied[self.copied.len() - bytes..]
    }

    #[inline]
    fn push_shared(&mut self, data: Bytes) {
        if data.len() <= COPY_BYTES_MAX {
            self.push_copied(&data);
            return;
        }
        self.bytes += data.len();
        self.segments.push_back(Segment {
            copied: std::mem::take(&mut self.tail),
            data,
        });
    }
}

/// Scattered data that is given away with its PDU: a `Vec`, an array, whatever owns its pieces.
pub trait Scattered: AsRef<[Bytes]> + IntoIterator<Item = Bytes> {}

impl<T: AsRef<[Bytes]> + IntoIterator<Item = Bytes>> Scattered for T {}

/// Encodes the PDUs of one connection. Plain data: copy it where it is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encoder {
    /// Digests negotiated. Both are off until ICReq and ICResp have been exchanged.
    pub digests: Digests,
    /// The alignment that the receiver announced (CPDA for a host's encoder, HPDA for a controller's), in
    /// zero-based dwords, at most [`super::header::PDA_MAX`].
    pub pda_z: u8,
}

impl Encoder {
    /// Initialize Connection Request.
    pub fn ic_req(self, queue: &mut TransmitQueue, request: &IcReq) {
        self.header_only(queue, PduType::IC_REQ, request);
    }

    /// Initialize Connection Response.
    pub fn ic_resp(self, queue: &mut TransmitQueue, response: &IcResp) {
        self.header_only(queue, PduType::IC_RESP, response);
    }

    /// A host's Terminate Connection Request; `offending` is the header of the PDU in error.
    pub fn h2c_term_req(self, queue: &mut TransmitQueue, reason: TermReason, offending: &[u8]) {
        self.term_req(queue, PduType::H2C_TERM_REQ, reason, offending);
    }

    /// A controller's Terminate Connection Request; `offending` is the header of the PDU in error.
    pub fn c2h_term_req(self, queue: &mut TransmitQueue, reason: TermReason, offending: &[u8]) {
        self.term_req(queue, PduType::C2H_TERM_REQ, reason, offending);
    }

    /// A command capsule with its in-capsule data, if any.
    pub fn capsule_cmd(self, queue: &mut TransmitQueue, sqe: &[u8; 64], data: impl Scattered) {
        let bytes = data_len(data.as_ref());
        self.pdu(queue, PduType::CAPSULE_CMD, PduFlags::default(), sqe, bytes, data);
    }

    /// A response capsule.
    #[inline]
    pub fn capsule_resp(self, queue: &mut TransmitQueue, cqe: &[u8; 16]) {
        self.header_only(queue, PduType::CAPSULE_RESP, cqe);
    }

    /// H2CData: `data` at `datao`, in answer to the R2T with `ttag`; `last` of that R2T or not.
    pub fn h2c_data(
        self,
        queue: &mut TransmitQueue,
        at: DataAt,
        ttag: u16,
        last: bool,
        data: impl Scattered,
    ) {
        let flags = PduFlags::default().with(PduFlags::LAST, last);
        self.data_pdu(queue, PduType::H2C_DATA, flags, at, ttag, data);
    }

    /// C2HData: `data` at `datao`; `last` of the command or not, and whether that completes the command
    /// with success and without a response capsule.
    pub fn c2h_data(
        self,
        queue: &mut TransmitQueue,
        at: DataAt,
        last: bool,
        success: bool,
        data: impl Scattered,
    ) {
        let flags = PduFlags::default()
            .with(PduFlags::LAST, last)
            .with(PduFlags::SUCCESS, success);
        self.data_pdu(queue, PduType::C2H_DATA, flags, at, 0, data);
    }

    /// Ready to Transfer.
    pub fn r2t(self, queue: &mut TransmitQueue, r2t: &R2T) {
        self.header_only(queue, PduType::R2T, r2t);
    }

    fn data_pdu(
        self,
        queue: &mut TransmitQueue,
        pdu_type: PduType,
        flags: PduFlags,
        at: DataAt,
        ttag: u16,
        data: impl Scattered,
    ) {
        let bytes = data_len(data.as_ref());
        let header = DataPduHeader {
            cccid: at.cccid.into(),
            ttag: ttag.into(),
            datao: at.datao.into(),
            datal: bytes.into(),
            rsvd20: [0; 4],
        };
        self.pdu(queue, pdu_type, flags, &header, bytes, data);
    }

    fn header_only(
        self,
        queue: &mut TransmitQueue,
        pdu_type: PduType,
        specific: &(impl IntoBytes + Immutable + Unaligned + Copy),
    ) {
        self.pdu(queue, pdu_type, PduFlags::default(), specific, 0, []);
    }

    /// The PDU in error follows the header directly: no PDO, no digests.
    fn term_req(self, queue: &mut TransmitQueue, pdu_type: PduType, reason: TermReason, offending: &[u8]) {
        let offending = &offending[..offending.len().min(TERM_REQ_DATA_MAX as usize)];
        let header = TermReqHeader {
            fes: reason.fes,
            fei: reason.fei.into(),
            rsvd14: [0; 10],
        };
        let hlen = size_of::<CommonHeader>() + size_of::<TermReqHeader>();
        queue.push_copied(common(pdu_type, PduFlags::default(), hlen, 0, hlen + offending.len()).as_bytes());
        queue.push_copied(header.as_bytes());
        queue.push_copied(offending);
    }

    /// `specific` is the header after the common one, of a length that the compiler knows; `data` is of so many `bytes`.
    fn pdu<H: IntoBytes + Immutable + Unaligned + Copy>(
        self,
        queue: &mut TransmitQueue,
        pdu_type: PduType,
        flags: PduFlags,
        specific: &H,
        bytes: u32,
        data: impl Scattered,
    ) {
        debug_assert_eq!(bytes, data_len(data.as_ref()));
        let hlen = size_of::<Head<H>>();
        let header_digest = self.digests.header && pdu_type.takes_header_digest();
        let head_len = hlen + if header_digest { DIGEST_BYTES } else { 0 };
        let data_digest = self.digests.data && bytes > 0;
        let (pdo, plen) = if bytes == 0 {
            (0, head_len)
        } else {
            let pdo = head_len.next_multiple_of((usize::from(self.pda_z) + 1) * 4);
            (
                pdo,
                pdo + bytes as usize + if data_digest { DIGEST_BYTES } else { 0 },
            )
        };
        let flags = flags
            .with(PduFlags::HEADER_DIGEST, header_digest)
            .with(PduFlags::DATA_DIGEST, data_digest);
        let head = Head {
            common: common(pdu_type, flags, hlen, pdo, plen),
            specific: *specific,
        };
        queue.push_copied(head.as_bytes());
        let before_data = head_len.max(pdo);
        if before_data > hlen {
            let mut rest = [0; PDO_MAX];
            if header_digest {
                rest[..DIGEST_BYTES].copy_from_slice(&crc32c(queue.last_copied(hlen)).to_le_bytes());
            }
            queue.push_copied(&rest[..before_data - hlen]);
        }
        if bytes == 0 {
            return;
        }
        let digest = data_digest.then(|| match data.as_ref() {
            [whole] => crc32c(whole),
            pieces => crc32c_scattered(pieces.iter().map(|piece| &piece[..])),
        });
        data.into_iter().for_each(|piece| queue.push_shared(piece));
        if let Some(digest) = digest {
            queue.push_copied(&digest.to_le_bytes());
        }
    }
}

/// A whole header, as it is sent: in one piece, of a length that the compiler knows.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Head<H> {
    common: CommonHeader,
    specific: H,
}

/// Whose data a data PDU carries and where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataAt {
    /// CID of the command (CCCID).
    pub cccid: u16,
    /// Offset in the command's data, in bytes (DATAO).
    pub datao: u32,
}

fn common(pdu_type: PduType, flags: PduFlags, hlen: usize, pdo: usize, plen: usize) -> CommonHeader {
    CommonHeader {
        pdu_type,
        flags,
        hlen: u8::try_from(hlen).expect("every HLEN fits a byte"),
        pdo: u8::try_from(pdo).expect("a header of at most 76 bytes, aligned to at most 128, ends by 128"),
        plen: u32::try_from(plen)
            .expect("the caller bounds data by MDTS or MAXH2CDATA")
            .into(),
    }
}

fn data_len(data: &[Bytes]) -> u32 {
    let len: usize = data.iter().map(Bytes::len).sum();
    u32::try_from(len).expect("the caller bounds data by MDTS or MAXH2CDATA")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(queue: &TransmitQueue) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); 16];
        let count = queue.fill(&mut slices);
        slices[..count]
            .iter()
            .flat_map(|slice| slice.iter().copied())
            .collect::<Vec<u8>>()
    }

    #[test]
    fn a_response_capsule_is_24_bytes() {
        let mut queue = TransmitQueue::new();
        let cqe = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
        Encoder::default().capsule_resp(&mut queue, &cqe);
        let expected = [
            0x05, 0, 24, 0, 24, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,
        ];
        assert_eq!(written(&queue), expected);
    }

    #[test]
    fn data_is_written_from_where_it_lies() {
        let mut queue = TransmitQueue::new();
        let data = Bytes::from(vec![7; 4096]);
        let at = DataAt {
            cccid: 0x0102,
            datao: 0x1000,
        };
        Encoder::default().c2h_data(&mut queue, at, true, true, [data.clone()]);
        Encoder::default().capsule_resp(&mut queue, &[0; 16]);
        let mut slices = [IoSlice::new(&[]); 16];
        let count = queue.fill(&mut slices);
        assert_eq!(count, 3, "header, data, the next header");
        assert_eq!(
            &slices[0][..],
            [
                0x07, 0b1100, 24, 24, 0x18, 0x10, 0, 0, 0x02, 0x01, 0, 0, 0, 0x10, 0, 0, 0, 0x10, 0, 0, 0, 0,
                0, 0
            ]
        );
        assert_eq!(slices[1].as_ptr(), data.as_ptr());
        assert_eq!(queue.len(), 24 + 4096 + 24);
    }

    #[test]
    fn digests_and_padding_lie_where_the_specification_puts_them() {
        let mut queue = TransmitQueue::new();
        let encoder = Encoder {
            digests: Digests {
                header: true,
                data: true,
            },
            pda_z: 31,
        };
        encoder.capsule_cmd(
            &mut queue,
            &[0xab; 64],
            [Bytes::from_static(&[1, 2]), Bytes::from_static(&[3])],
        );
        let bytes = written(&queue);
        assert_eq!(&bytes[..8], [0x04, 0b0011, 72, 128, 135, 0, 0, 0]);
        assert_eq!(bytes.len(), 135);
        assert_eq!(bytes[72..76], crc32c(&bytes[..72]).to_le_bytes());
        assert!(bytes[76..128].iter().all(|&byte| byte == 0));
        assert_eq!(bytes[128..131], [1, 2, 3]);
        assert_eq!(bytes[131..135], crc32c(&[1, 2, 3]).to_le_bytes());
    }

    #[test]
    fn a_term_req_repeats_the_offending_header() {
        let mut queue = TransmitQueue::new();
        Encoder::default().c2h_term_req(&mut queue, TermReason::invalid_field(4), &[9; 200]);
        let bytes = written(&queue);
        assert_eq!(
            &bytes[..16],
            [0x03, 0, 24, 0, 152, 0, 0, 0, 1, 0, 4, 0, 0, 0, 0, 0]
        );
        assert_eq!(bytes.len(), 152);
        assert_eq!(&bytes[24..], [9; 128]);
    }

    #[test]
    fn a_peer_that_never_takes_everything_does_not_make_the_queue_grow_for_ever() {
        let mut queue = TransmitQueue::new();
        Encoder::default().capsule_resp(&mut queue, &[0; 16]);
        for _ in 0..4 * KEPT_BYTES / 24 {
            Encoder::default().capsule_resp(&mut queue, &[1; 16]);
            queue.advance(24);
        }
        assert_eq!(queue.len(), 24);
        assert_eq!(written(&queue)[8..], [1; 16]);
        assert!(queue.copied.capacity() < 4 * KEPT_BYTES);
    }

    #[test]
    fn a_queue_can_be_written_in_any_steps() {
        let fill = |queue: &mut TransmitQueue| {
            let encoder = Encoder::default();
            encoder.capsule_resp(queue, &[1; 16]);
            encoder.capsule_cmd(
                queue,
                &[2; 64],
                [Bytes::from(vec![3; 600]), Bytes::from(vec![4; 10])],
            );
            encoder.capsule_resp(queue, &[5; 16]);
        };
        let mut whole = TransmitQueue::new();
        fill(&mut whole);
        let expected = written(&whole);
        for step in [1, 7, 24, 600, 601, expected.len()] {
            let mut queue = TransmitQueue::new();
            fill(&mut queue);
            let mut bytes = Vec::new();
            while !queue.is_empty() {
                let mut slices = [IoSlice::new(&[]); 2];
                let count = queue.fill(&mut slices);
                let piece: Vec<u8> = slices[..count]
                    .iter()
                    .flat_map(|slice| slice.iter().copied())
                    .take(step)
                    .collect();
                queue.advance(piece.len());
                bytes.extend(piece);
            }
            assert_eq!(bytes, expected, "in steps of {step}");
        }
    }
}
