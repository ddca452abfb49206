//! NVMe/TCP: the protocol data units (PDUs) that carry NVMe over Fabrics capsules on a byte stream.
//!
//! - [`header`]: the layouts, one struct per PDU type;
//! - [`Framer`]: received bytes in, typed PDUs out, payload shared and never copied. A host's framer yields
//!   [`FromController`], a controller's [`FromHost`]: a PDU that the other side may not send has no value here;
//! - [`Encoder`]: PDUs into a [`TransmitQueue`], headers gathered and data scattered, for one vectored write;
//! - [`PduError`]: bytes that no state could accept, with the status that a TermReq carries.
//!
//! A legal PDU at the wrong time is not decided here, nor is anything about commands: an SQE is 64 bytes, a
//! CQE 16. Nothing here reads a clock or a socket.
//!
//! NVM Express NVMe/TCP Transport Specification 1.0, "TCP Transport Protocol".

mod encoder;
mod error;
mod framer;
pub mod header;

pub use encoder::{DataAt, Encoder, Scattered, TransmitQueue};
pub use error::{FatalErrorStatus, PduError, TermReason};
pub use framer::{
    Aligned, C2HData, CapsuleCmd, DataDigestMismatch, Direction, Framer, FramerLimits, FromController,
    FromHost, H2CData, PduData, Received, TermReq,
};
pub use header::{DataPduHeader, IcReq, IcResp, PduFlags, PduType, R2T};

/// What two sides agreed to protect with a CRC-32C, by ICReq and ICResp (HDGST_ENABLE and DDGST_ENABLE).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    /// A digest after every header, except of ICReq, ICResp and TermReq.
    pub header: bool,
    /// A digest after the data of every PDU that carries some.
    pub data: bool,
}

/// Bytes of a header digest and of a data digest.
pub const DIGEST_BYTES: usize = 4;

/// CRC-32C (Castagnoli), the digest of headers and data.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC-32C of data that lies in pieces.
#[must_use]
pub fn crc32c_scattered<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let mut pieces = pieces.into_iter();
    let Some(first) = pieces.next() else {
        return crc32c(&[]);
    };
    let Some(second) = pieces.next() else {
        return crc32c(first);
    };
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(first);
    digest.update(second);
    for piece in pieces {
        digest.update(piece);
    }
    u32::try_from(digest.finalize()).expect("a CRC-32 has 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_the_crc_of_iscsi() {
        // RFC 3720, section B.4: 32 bytes of zeroes, of ones, and ascending.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }

    #[test]
    fn pieces_have_the_digest_of_their_whole() {
        let bytes: Vec<u8> = (0..=255).collect();
        for cut in 0..=bytes.len() {
            let (left, right) = bytes.split_at(cut);
            assert_eq!(crc32c_scattered([left, right]), crc32c(&bytes));
        }
        assert_eq!(crc32c_scattered([]), 0);
    }
}
