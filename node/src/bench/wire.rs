//! NVMe/TCP bytes on a non-blocking socket, at their cheapest: what goes out is gathered into one vectored write,
//! what comes in is parsed as far as its headers, and data is skipped.
//!
//! The load generator and the echo that is its floor share this, so that neither has an advantage.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::net::TcpStream;

use bytes::Bytes;

/// Bytes of a command capsule without data: common header and submission queue entry.
pub(super) const COMMAND_BYTES: usize = 72;

/// Bytes of a response capsule, and of the header of a data PDU or R2T.
pub(super) const SHORT_BYTES: usize = 24;

/// PDU types.
pub(super) const CAPSULE_CMD: u8 = 0x04;
pub(super) const CAPSULE_RESP: u8 = 0x05;
pub(super) const H2C_DATA: u8 = 0x06;
pub(super) const C2H_DATA: u8 = 0x07;
pub(super) const R2T: u8 = 0x09;

/// PDU flags of data.
pub(super) const LAST: u8 = 1 << 2;
pub(super) const SUCCESS: u8 = 1 << 3;

/// Slices of one vectored write.
const SLICES: usize = 128;

/// Bytes asked of the socket at a time.
const READ_BYTES: usize = 256 << 10;

/// A PDU that goes out: a header, and the part of the shared payload that it says.
struct Piece {
    header: [u8; COMMAND_BYTES],
    header_bytes: usize,
    data_at: usize,
    data_bytes: usize,
}

/// What waits for the socket.
pub(super) struct Outgoing {
    pieces: VecDeque<Piece>,
    /// Of the first piece.
    sent: usize,
    payload: Bytes,
}

impl Outgoing {
    /// All data comes from `payload`.
    pub(super) fn new(payload: Bytes) -> Self {
        Self {
            pieces: VecDeque::new(),
            sent: 0,
            payload,
        }
    }

    /// With `data_bytes` from byte `data_at` of the payload.
    pub(super) fn push(&mut self, header: &[u8], data_at: usize, data_bytes: usize) {
        let mut piece = Piece {
            header: [0; COMMAND_BYTES],
            header_bytes: header.len(),
            data_at,
            data_bytes,
        };
        piece.header[..header.len()].copy_from_slice(header);
        self.pieces.push_back(piece);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Writes until there is nothing left or the socket takes no more.
    pub(super) fn flush(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while !self.pieces.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            let mut skip = self.sent;
            for piece in &self.pieces {
                if count + 2 > SLICES {
                    break;
                }
                for part in [
                    &piece.header[..piece.header_bytes],
                    &self.payload[piece.data_at..piece.data_at + piece.data_bytes],
                ] {
                    let skipped = skip.min(part.len());
                    skip -= skipped;
                    if skipped < part.len() {
                        slices[count] = IoSlice::new(&part[skipped..]);
                        count += 1;
                    }
                }
            }
            match stream.write_vectored(&slices[..count]) {
                Ok(written) => self.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn advance(&mut self, written: usize) {
        self.sent += written;
        while let Some(piece) = self.pieces.front() {
            let bytes = piece.header_bytes + piece.data_bytes;
            if self.sent < bytes {
                return;
            }
            self.sent -= bytes;
            self.pieces.pop_front();
        }
    }
}

/// What has come in.
pub(super) struct Incoming {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Header of the PDU whose data is being skipped, and how much of it is left.
    current: Option<([u8; COMMAND_BYTES], usize)>,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; READ_BYTES],
            start: 0,
            end: 0,
            current: None,
        }
    }

    /// Reads once. `false` if there was nothing.
    ///
    /// # Errors
    /// The socket's; `UnexpectedEof` when the peer has closed it.
    pub(super) fn read(&mut self, mut stream: &TcpStream) -> io::Result<bool> {
        match stream.read(self.space()) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => {
                self.received(bytes);
                Ok(true)
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Where the next bytes go. It stays there until this is called again.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buffer[self.end..]
    }

    /// So many bytes are in that space now.
    pub(super) fn received(&mut self, bytes: usize) {
        self.end += bytes;
    }

    /// The header of the next PDU that is here with all its data.
    pub(super) fn next_pdu(&mut self) -> Option<[u8; COMMAND_BYTES]> {
        let (header, left) = match self.current.take() {
            Some(current) => current,
            None => {
                let received = &self.buffer[self.start..self.end];
                let common: &[u8; 8] = received.first_chunk()?;
                let (header_bytes, pdu_bytes) = (usize::from(common[2]), pdu_bytes(common));
                if received.len() < header_bytes {
                    return None;
                }
                let mut header = [0; COMMAND_BYTES];
                let kept = header_bytes.min(COMMAND_BYTES);
                header[..kept].copy_from_slice(&received[..kept]);
                self.start += header_bytes;
                (header, pdu_bytes.saturating_sub(header_bytes))
            }
        };
        let here = left.min(self.end - self.start);
        self.start += here;
        if here < left {
            self.current = Some((header, left - here));
            return None;
        }
        Some(header)
    }
}

/// PLEN of a common header.
fn pdu_bytes(common: &[u8; 8]) -> usize {
    u32::from_le_bytes([common[4], common[5], common[6], common[7]]) as usize
}

/// Two bytes of a header.
pub(super) fn u16_at(header: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([header[at], header[at + 1]])
}

/// Four bytes of a header.
pub(super) fn u32_at(header: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
}

/// A common header followed by zeroes.
pub(super) fn header(pdu_type: u8, flags: u8, bytes: usize, data_bytes: usize) -> [u8; COMMAND_BYTES] {
    let mut header = [0; COMMAND_BYTES];
    header[0] = pdu_type;
    header[1] = flags;
    header[2] = bytes as u8;
    header[3] = if data_bytes > 0 { bytes as u8 } else { 0 };
    header[4..8].copy_from_slice(&((bytes + data_bytes) as u32).to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn pdus_come_out_with_their_data_however_the_bytes_arrive() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        sender.set_nonblocking(true).unwrap();
        let mut outgoing = Outgoing::new(vec![9; 300_000].into());
        // More than a socket's buffer takes at once, and than one vectored write.
        for index in 0..200u16 {
            let data_bytes = if index == 7 { 300_000 } else { 4096 };
            let mut header = header(CAPSULE_CMD, 0, COMMAND_BYTES, data_bytes);
            header[10..12].copy_from_slice(&index.to_le_bytes());
            outgoing.push(&header, 0, data_bytes);
        }
        let mut incoming = Incoming::new();
        let mut seen = Vec::new();
        while seen.len() < 200 {
            outgoing.flush(&sender).unwrap();
            incoming.read(&receiver).unwrap();
            while let Some(header) = incoming.next_pdu() {
                seen.push(u16_at(&header, 10));
            }
        }
        assert_eq!(seen, (0..200).collect::<Vec<_>>());
        assert!(outgoing.is_empty());
        drop(sender);
        assert!(incoming.read(&receiver).is_err());
    }
}
