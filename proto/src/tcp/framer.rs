//! From received bytes to PDUs.
//!
//! The caller reads a socket into [`Framer::buffer`] and takes PDUs until [`Framer::next_pdu`] has none. Data
//! is a slice of the very buffer it was received in. A PDU is judged as early as its bytes allow: the common header
//! before its length is believed, the header (with its digest) before its data is waited for.
//!
//! Lent data keeps its buffer. The framer goes on in what is left of it and then in another one, and comes back when all that
//! was lent has been dropped: a connection that is busy allocates nothing.
//!
//! A wrong data digest does not end a connection: the PDU is yielded and its data is an error, so that the command
//! can fail with Transient Transport Error.
//!
//! NVMe/TCP Transport Specification, "PDU Common Header" and "Digests".

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::mem::size_of;
use std::ops::Deref;

use bytes::{Buf, Bytes, BytesMut};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::header::{
    COMMON_HEADER_BYTES, CommonHeader, DataPduHeader, IcReq, IcResp, PduFlags, PduType, R2T,
    TERM_REQ_DATA_MAX, TermReqHeader,
};
use super::{DIGEST_BYTES, Digests, PduError, TermReason, crc32c};

/// Buffers kept beside the one that is filled, for when nothing of them is lent any more. A guess: a queue of 128 blocks of 4 KiB
/// that are held while others come takes two of them.
const SPARES_MAX: usize = 3;

/// Bounds of what a peer may send. They start closed: no data at all until the connection is initialised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FramerLimits {
    /// Digests negotiated. Both are off until ICReq and ICResp have been exchanged.
    pub digests: Digests,
    /// Most data in a command capsule, in bytes. A host's framer does not use it.
    pub capsule_bytes_max: u32,
    /// Most data in one H2CData (MAXH2CDATA) or C2HData (the largest read that can be in flight), in bytes.
    pub data_bytes_max: u32,
    /// The alignment this side announced (HPDA or CPDA, zero-based dwords).
    pub pda_z: u8,
}

/// Data of a PDU, unless its digest says that it was damaged.
pub type PduData = Result<Bytes, DataDigestMismatch>;

/// Data arrived damaged. The command fails with Transient Transport Error; the connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("data digest {received:#010x}, computed {computed:#010x}")]
pub struct DataDigestMismatch {
    /// From the peer.
    pub received: u32,
    /// Over the bytes received.
    pub computed: u32,
}

/// A header, or what a header carries, in whole words. PDUs are moved a few times on their way, and bytes at odd addresses stall that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(align(8))]
pub struct Aligned<T>(pub T);

impl<T> Deref for Aligned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// A command capsule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapsuleCmd {
    /// Submission queue entry.
    pub sqe: Aligned<[u8; 64]>,
    /// In-capsule data, empty if there is none.
    pub data: PduData,
}

/// H2CData.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct H2CData {
    /// Which command, which R2T, which bytes.
    pub header: Aligned<DataPduHeader>,
    /// LAST_PDU: the last one of its R2T.
    pub last: bool,
    /// DATAL bytes.
    pub data: PduData,
}

/// C2HData.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct C2HData {
    /// Which command, which bytes.
    pub header: Aligned<DataPduHeader>,
    /// LAST_PDU: the last one of its command.
    pub last: bool,
    /// SUCCESS: the command is complete, no response capsule follows. Only meaningful with `last`.
    pub success: bool,
    /// DATAL bytes.
    pub data: PduData,
}

/// A Terminate Connection Request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TermReq {
    /// Why the peer ends the connection.
    pub reason: TermReason,
    /// As much of the PDU in error as the peer repeated.
    pub offending: Bytes,
}

/// What a controller can receive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromHost {
    /// Initialize Connection Request.
    IcReq(IcReq),
    /// H2CTermReq.
    TermReq(TermReq),
    /// Command capsule.
    CapsuleCmd(CapsuleCmd),
    /// Data that an R2T asked for.
    H2CData(H2CData),
}

/// What a host can receive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromController {
    /// Initialize Connection Response.
    IcResp(IcResp),
    /// C2HTermReq.
    TermReq(TermReq),
    /// Response capsule: a completion queue entry.
    CapsuleResp(Aligned<[u8; 16]>),
    /// Data of a command.
    C2HData(C2HData),
    /// A request for data of a command.
    R2T(R2T),
}

/// A whole PDU whose header has been checked; what [`Direction::pdu`] makes a typed one of.
#[derive(Debug)]
pub struct Received<'a> {
    common: CommonHeader,
    /// The header after the common one.
    specific: &'a [u8],
    data: PduData,
}

impl Received<'_> {
    #[inline]
    fn layout<T: FromBytes + KnownLayout + Immutable + Unaligned>(&self) -> Result<&T, PduError> {
        // HLEN has been checked against the type, so this can only fail if the table of HLENs is wrong.
        T::ref_from_bytes(self.specific).map_err(|_| PduError::Hlen {
            hlen: self.common.hlen,
            expected: u8::try_from(size_of::<T>() + COMMON_HEADER_BYTES).unwrap_or(u8::MAX),
        })
    }

    fn term_req(self) -> Result<TermReq, PduError> {
        let header = *self.layout::<TermReqHeader>()?;
        Ok(TermReq {
            reason: TermReason {
                fes: header.fes,
                fei: header.fei.get(),
            },
            offending: self.data.unwrap_or_default(),
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::FromHost {}
    impl Sealed for super::FromController {}
}

/// One direction of a connection: which PDUs it may carry.
pub trait Direction: Sized + sealed::Sealed {
    /// Whether this direction carries `pdu_type`.
    fn accepts(pdu_type: PduType) -> bool;

    /// The typed PDU.
    ///
    /// # Errors
    /// [`PduError::Type`] for a type that this direction does not carry.
    fn pdu(received: Received<'_>) -> Result<Self, PduError>;
}

impl Direction for FromHost {
    fn accepts(pdu_type: PduType) -> bool {
        matches!(
            pdu_type,
            PduType::IC_REQ | PduType::H2C_TERM_REQ | PduType::CAPSULE_CMD | PduType::H2C_DATA
        )
    }

    #[inline]
    fn pdu(received: Received<'_>) -> Result<Self, PduError> {
        let flags = received.common.flags;
        Ok(match received.common.pdu_type {
            PduType::IC_REQ => Self::IcReq(*received.layout()?),
            PduType::H2C_TERM_REQ => Self::TermReq(received.term_req()?),
            PduType::CAPSULE_CMD => Self::CapsuleCmd(CapsuleCmd {
                sqe: Aligned(*received.layout()?),
                data: received.data,
            }),
            PduType::H2C_DATA => Self::H2CData(H2CData {
                header: Aligned(*received.layout()?),
                last: flags.contains(PduFlags::LAST),
                data: received.data,
            }),
            pdu_type => return Err(PduError::Type { pdu_type }),
        })
    }
}

impl Direction for FromController {
    fn accepts(pdu_type: PduType) -> bool {
        matches!(
            pdu_type,
            PduType::IC_RESP
                | PduType::C2H_TERM_REQ
                | PduType::CAPSULE_RESP
                | PduType::C2H_DATA
                | PduType::R2T
        )
    }

    #[inline]
    fn pdu(received: Received<'_>) -> Result<Self, PduError> {
        let flags = received.common.flags;
        Ok(match received.common.pdu_type {
            PduType::IC_RESP => Self::IcResp(*received.layout()?),
            PduType::C2H_TERM_REQ => Self::TermReq(received.term_req()?),
            PduType::CAPSULE_RESP => Self::CapsuleResp(Aligned(*received.layout()?)),
            PduType::C2H_DATA => Self::C2HData(C2HData {
                header: Aligned(*received.layout()?),
                last: flags.contains(PduFlags::LAST),
                success: flags.contains(PduFlags::SUCCESS),
                data: received.data,
            }),
            PduType::R2T => Self::R2T(*received.layout()?),
            pdu_type => return Err(PduError::Type { pdu_type }),
        })
    }
}

/// Cuts a byte stream into PDUs of one direction. Owned by whoever reads the socket.
#[derive(Debug)]
pub struct Framer<D> {
    received: BytesMut,
    /// Buffers of which something was lent when they were left, the first one left first.
    spares: VecDeque<BytesMut>,
    limits: FramerLimits,
    direction: PhantomData<D>,
}

impl<D: Direction> Default for Framer<D> {
    fn default() -> Self {
        Self::new()
    }
}

impl<D: Direction> Framer<D> {
    /// For a new connection: everything closed until [`Framer::set_limits`].
    #[must_use]
    pub fn new() -> Self {
        Self {
            received: BytesMut::new(),
            spares: VecDeque::new(),
            limits: FramerLimits::default(),
            direction: PhantomData,
        }
    }

    /// Applies what was negotiated, to everything not yet taken with [`Framer::next_pdu`].
    pub fn set_limits(&mut self, limits: FramerLimits) {
        self.limits = limits;
    }

    /// Where received bytes are appended. Room for `bytes` more, or at least a quarter of them where data that is still lent
    /// takes the rest of the buffer; and for the rest of a PDU whose length is known, so that a long one is not moved again
    /// for each read.
    pub fn buffer(&mut self, bytes: usize) -> &mut BytesMut {
        let rest = match self.peek() {
            Some(common) => self
                .plen_bounded(&common)
                .map_or(0, |plen| plen.saturating_sub(self.received.len())),
            None => 0,
        };
        let (wanted, least) = (rest.max(bytes), rest.max(bytes.div_ceil(4)));
        if !self.received.try_reclaim(wanted) && self.received.capacity() - self.received.len() < least {
            self.change_buffer(wanted.max(self.received.len() + least));
        }
        &mut self.received
    }

    /// Goes on in a buffer of so many bytes: in one that was used before, if nothing of it is lent any more.
    fn change_buffer(&mut self, bytes: usize) {
        let spare = self.spares.pop_front_if(|spare| spare.try_reclaim(bytes));
        // With room for the beginning of a PDU that the next read ends: what was all given back is filled from its start again.
        let mut next = spare.unwrap_or_else(|| BytesMut::with_capacity(bytes + bytes / 4));
        next.extend_from_slice(&self.received);
        let mut used = std::mem::replace(&mut self.received, next);
        if used.capacity() == 0 {
            return;
        }
        used.clear();
        if self.spares.len() == SPARES_MAX {
            self.spares.pop_front();
        }
        self.spares.push_back(used);
    }

    /// Bytes received and not yet taken.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.received.len()
    }

    /// The header of the PDU that [`Framer::next_pdu`] refused, as far as it was received: what a TermReq repeats.
    #[must_use]
    pub fn offending(&self) -> &[u8] {
        let hlen = self.peek().map_or(0, |common| usize::from(common.hlen));
        let len = hlen.clamp(COMMON_HEADER_BYTES, TERM_REQ_DATA_MAX as usize);
        &self.received[..self.received.len().min(len)]
    }

    /// The next PDU, or `None` until more bytes have come.
    ///
    /// # Errors
    /// [`PduError`] ends the connection: the bytes stay, and every further call has the same answer.
    pub fn next_pdu(&mut self) -> Result<Option<D>, PduError> {
        let Some(common) = self.peek() else {
            return Ok(None);
        };
        let frame = self.check_common(&common)?;
        if self.received.len() < frame.head_len {
            return Ok(None);
        }
        self.check_head(&common, &frame)?;
        if self.received.len() < frame.plen {
            return Ok(None);
        }
        let hlen = usize::from(common.hlen);
        // The header is copied only where data is taken out of the buffer with it.
        let mut header = [0; PduType::HLEN_MAX];
        let data = (frame.data_len > 0).then(|| {
            header[..hlen].copy_from_slice(&self.received[..hlen]);
            self.take(&frame)
        });
        let whole = if data.is_some() {
            &header[..hlen]
        } else {
            &self.received[..hlen]
        };
        let pdu = D::pdu(Received {
            common,
            specific: &whole[COMMON_HEADER_BYTES..],
            data: data.unwrap_or(Ok(Bytes::new())),
        })?;
        if frame.data_len == 0 {
            self.received.advance(frame.plen);
        }
        Ok(Some(pdu))
    }

    fn peek(&self) -> Option<CommonHeader> {
        CommonHeader::read_from_prefix(&self.received)
            .ok()
            .map(|(common, _)| common)
    }

    /// PLEN of the PDU being received, if its common header is acceptable.
    fn plen_bounded(&self, common: &CommonHeader) -> Option<usize> {
        self.check_common(common).ok().map(|frame| frame.plen)
    }

    /// Everything the first 8 bytes can be wrong in.
    fn check_common(&self, common: &CommonHeader) -> Result<Frame, PduError> {
        let pdu_type = common.pdu_type;
        let Some(expected) = pdu_type.hlen().filter(|_| D::accepts(pdu_type)) else {
            return Err(PduError::Type { pdu_type });
        };
        if common.hlen != expected {
            return Err(PduError::Hlen {
                hlen: common.hlen,
                expected,
            });
        }
        let header_digest = self.limits.digests.header && pdu_type.takes_header_digest();
        if common.flags.contains(PduFlags::HEADER_DIGEST) != header_digest {
            return Err(PduError::Flags {
                flags: common.flags.0,
            });
        }
        let head_len = u32::from(expected) + if header_digest { DIGEST_BYTES as u32 } else { 0 };
        let plen = common.plen.get();
        let carries_data = pdu_type.takes_data() || pdu_type.is_term_req();
        if plen < head_len || (plen > head_len && !carries_data) {
            return Err(PduError::Plen {
                plen,
                expected: head_len,
            });
        }
        let mut frame = Frame {
            head_len: head_len as usize,
            header_digest,
            data_start: head_len as usize,
            data_len: 0,
            data_digest: false,
            plen: plen as usize,
        };
        if pdu_type.is_term_req() {
            // The PDU in error follows the header directly, without PDO or digest.
            let plen_max = head_len + TERM_REQ_DATA_MAX;
            if plen > plen_max {
                return Err(PduError::PlenTooLong { plen, plen_max });
            }
            frame.data_len = (plen - head_len) as usize;
            return Ok(frame);
        }
        if plen == head_len {
            return Ok(frame);
        }
        frame.data_digest = self.limits.digests.data;
        if common.flags.contains(PduFlags::DATA_DIGEST) != frame.data_digest {
            return Err(PduError::Flags {
                flags: common.flags.0,
            });
        }
        let pdo = u32::from(common.pdo);
        let alignment = (u32::from(self.limits.pda_z) + 1) * 4;
        let digest_len = if frame.data_digest { DIGEST_BYTES as u32 } else { 0 };
        // Some data, or there would be no PDO.
        if pdo < head_len || !pdo.is_multiple_of(alignment) || pdo + digest_len >= plen {
            return Err(PduError::Pdo { pdo: common.pdo });
        }
        let bytes = plen - pdo - digest_len;
        if pdu_type == PduType::CAPSULE_CMD {
            if bytes > self.limits.capsule_bytes_max {
                return Err(PduError::PlenTooLong {
                    plen,
                    plen_max: pdo + self.limits.capsule_bytes_max + digest_len,
                });
            }
        } else if bytes > self.limits.data_bytes_max {
            return Err(PduError::DataTooLong {
                bytes,
                bytes_max: self.limits.data_bytes_max,
            });
        }
        frame.data_start = pdo as usize;
        frame.data_len = bytes as usize;
        Ok(frame)
    }

    /// What the whole header can be wrong in, before its data is waited for.
    fn check_head(&self, common: &CommonHeader, frame: &Frame) -> Result<(), PduError> {
        let hlen = usize::from(common.hlen);
        if frame.header_digest {
            let received = digest_at(&self.received, hlen);
            let computed = crc32c(&self.received[..hlen]);
            if received != computed {
                return Err(PduError::HeaderDigest { received, computed });
            }
        }
        if matches!(common.pdu_type, PduType::H2C_DATA | PduType::C2H_DATA)
            && let Ok(header) = DataPduHeader::read_from_bytes(&self.received[COMMON_HEADER_BYTES..hlen])
        {
            let datal = header.datal.get();
            // A data PDU without data moves nothing and would let a peer keep us busy for free.
            if datal == 0 || datal as usize != frame.data_len {
                return Err(PduError::Datal {
                    datal,
                    bytes: u32::try_from(frame.data_len).unwrap_or(u32::MAX),
                });
            }
        }
        Ok(())
    }

    /// Takes the whole PDU, which has data, out of the buffer; answers its data.
    fn take(&mut self, frame: &Frame) -> PduData {
        let mut pdu = self.received.split_to(frame.plen).freeze();
        if frame.data_digest {
            let end = frame.data_start + frame.data_len;
            let received = digest_at(&pdu, end);
            let computed = crc32c(&pdu[frame.data_start..end]);
            if received != computed {
                return Err(DataDigestMismatch { received, computed });
            }
        }
        pdu.advance(frame.data_start);
        pdu.truncate(frame.data_len);
        Ok(pdu)
    }
}

/// Where the parts of the PDU being received lie, in bytes from its start. Checked: `data_start + data_len` and the
/// digest end at `plen`.
#[derive(Debug)]
struct Frame {
    /// Header and header digest.
    head_len: usize,
    header_digest: bool,
    data_start: usize,
    data_len: usize,
    data_digest: bool,
    plen: usize,
}

fn digest_at(bytes: &[u8], offset: usize) -> u32 {
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(&bytes[offset..offset + DIGEST_BYTES]);
    u32::from_le_bytes(digest)
}

#[cfg(test)]
mod tests;
