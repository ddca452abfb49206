//! Bytes written by hand from the specification, so that encoder and framer cannot agree on the same mistake.

use super::*;
use crate::tcp::{DataAt, Encoder, FatalErrorStatus, TransmitQueue};

const BOTH: Digests = Digests {
    header: true,
    data: true,
};

fn limits(digests: Digests) -> FramerLimits {
    FramerLimits {
        digests,
        capsule_bytes_max: 8192,
        data_bytes_max: 65536,
        pda_z: 0,
    }
}

fn framer<D: Direction>(digests: Digests) -> Framer<D> {
    let mut framer = Framer::new();
    framer.set_limits(limits(digests));
    framer
}

fn feed<D: Direction>(framer: &mut Framer<D>, bytes: &[u8]) {
    framer.buffer(bytes.len()).extend_from_slice(bytes);
}

fn refused<D: Direction + std::fmt::Debug>(bytes: &[u8]) -> PduError {
    let mut framer = framer::<D>(Digests::default());
    feed(&mut framer, bytes);
    framer.next_pdu().unwrap_err()
}

/// A PDU with a header of `hlen` bytes, zeroes but for the common header.
fn header(pdu_type: u8, flags: u8, hlen: u8, pdo: u8, plen: u32) -> Vec<u8> {
    let mut bytes = vec![pdu_type, flags, hlen, pdo];
    bytes.extend(plen.to_le_bytes());
    bytes.resize(usize::from(hlen), 0);
    bytes
}

/// C2HData of CID 0x0102 with four bytes at offset 0x200, the last one, with success.
const C2H_DATA: [u8; 28] = [
    0x07, 0b1100, 24, 24, 28, 0, 0, 0, //
    0x02, 0x01, 0, 0, 0x00, 0x02, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, //
    0xde, 0xad, 0xbe, 0xef,
];

/// H2CData of CID 7 for the R2T with TTAG 9, eight bytes at 0, not the last one.
const H2C_DATA: [u8; 32] = [
    0x06, 0, 24, 24, 32, 0, 0, 0, //
    7, 0, 9, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, //
    1, 2, 3, 4, 5, 6, 7, 8,
];

#[test]
fn every_truncation_asks_for_more_bytes() {
    for len in 0..C2H_DATA.len() {
        let mut framer = framer::<FromController>(Digests::default());
        feed(&mut framer, &C2H_DATA[..len]);
        assert_eq!(framer.next_pdu(), Ok(None), "{len} bytes");
        feed(&mut framer, &C2H_DATA[len..]);
        assert!(matches!(framer.next_pdu(), Ok(Some(FromController::C2HData(_)))));
        assert_eq!(framer.pending_bytes(), 0);
    }
}

#[test]
fn data_pdus_carry_their_fields() {
    let mut controller = framer::<FromHost>(Digests::default());
    feed(&mut controller, &H2C_DATA);
    let Some(FromHost::H2CData(pdu)) = controller.next_pdu().unwrap() else {
        panic!("not H2CData");
    };
    assert_eq!((pdu.header.cccid.get(), pdu.header.ttag.get()), (7, 9));
    assert_eq!((pdu.header.datao.get(), pdu.last), (0, false));
    assert_eq!(pdu.data.unwrap(), Bytes::from_static(&[1, 2, 3, 4, 5, 6, 7, 8]));

    let mut host = framer::<FromController>(Digests::default());
    feed(&mut host, &C2H_DATA);
    let Some(FromController::C2HData(pdu)) = host.next_pdu().unwrap() else {
        panic!("not C2HData");
    };
    assert_eq!((pdu.header.cccid.get(), pdu.header.datao.get()), (0x0102, 0x200));
    assert!(pdu.last && pdu.success);
    assert_eq!(pdu.data.unwrap(), Bytes::from_static(&[0xde, 0xad, 0xbe, 0xef]));
}

#[test]
fn data_is_lent_from_the_buffer_it_was_received_in() {
    let mut host = framer::<FromController>(Digests::default());
    feed(&mut host, &C2H_DATA);
    let at = host.received[24..].as_ptr();
    let Some(FromController::C2HData(pdu)) = host.next_pdu().unwrap() else {
        panic!("not C2HData");
    };
    assert_eq!(pdu.data.unwrap().as_ptr(), at);
}

#[test]
fn an_icreq_and_an_icresp_are_taken_before_anything_is_negotiated() {
    let mut request = header(0x00, 0, 128, 0, 128);
    request[10] = 3; // HPDA
    request[11] = 0b11; // DGST
    request[12] = 15; // MAXR2T, zero-based
    let mut controller = Framer::<FromHost>::new();
    feed(&mut controller, &request);
    let Some(FromHost::IcReq(pdu)) = controller.next_pdu().unwrap() else {
        panic!("not ICReq");
    };
    assert_eq!((pdu.pfv.get(), pdu.hpda, pdu.maxr2t_z.get()), (0, 3, 15));
    assert_eq!(pdu.dgst.digests(), BOTH);

    let mut response = header(0x01, 0, 128, 0, 128);
    response[12..16].copy_from_slice(&[0, 0, 2, 0]);
    let mut host = Framer::<FromController>::new();
    feed(&mut host, &response);
    let Some(FromController::IcResp(pdu)) = host.next_pdu().unwrap() else {
        panic!("not ICResp");
    };
    assert_eq!(pdu.maxh2cdata.get(), 131_072);
}

#[test]
fn no_data_is_taken_before_it_is_negotiated() {
    let mut controller = Framer::<FromHost>::new();
    feed(&mut controller, &H2C_DATA);
    assert_eq!(
        controller.next_pdu(),
        Err(PduError::DataTooLong {
            bytes: 8,
            bytes_max: 0
        })
    );
}

#[test]
fn each_side_refuses_what_only_the_other_may_receive() {
    for (pdu_type, hlen) in [(0x00, 128), (0x02, 24), (0x04, 72), (0x06, 24)] {
        let bytes = header(pdu_type, 0, hlen, 0, u32::from(hlen));
        let pdu_type = PduType(pdu_type);
        assert_eq!(refused::<FromController>(&bytes), PduError::Type { pdu_type });
    }
    for (pdu_type, hlen) in [(0x01, 128), (0x03, 24), (0x05, 24), (0x07, 24), (0x09, 24)] {
        let bytes = header(pdu_type, 0, hlen, 0, u32::from(hlen));
        let pdu_type = PduType(pdu_type);
        assert_eq!(refused::<FromHost>(&bytes), PduError::Type { pdu_type });
    }
    let pdu_type = PduType(0x08);
    assert_eq!(
        refused::<FromHost>(&header(0x08, 0, 24, 0, 24)),
        PduError::Type { pdu_type }
    );
}

#[test]
fn lengths_that_cannot_be_are_refused_from_the_first_eight_bytes() {
    let table: [(Vec<u8>, PduError, u32); 9] = [
        (
            header(0x04, 0, 71, 0, 72),
            PduError::Hlen {
                hlen: 71,
                expected: 72,
            },
            2,
        ),
        (
            header(0x04, 0, 72, 0, 71),
            PduError::Plen {
                plen: 71,
                expected: 72,
            },
            4,
        ),
        (header(0x04, 1, 72, 0, 76), PduError::Flags { flags: 1 }, 1),
        (header(0x04, 2, 72, 72, 80), PduError::Flags { flags: 2 }, 1),
        (header(0x04, 0, 72, 68, 80), PduError::Pdo { pdo: 68 }, 3),
        (header(0x04, 0, 72, 74, 80), PduError::Pdo { pdo: 74 }, 3),
        (header(0x04, 0, 72, 80, 80), PduError::Pdo { pdo: 80 }, 3),
        (header(0x04, 0, 72, 0, 80), PduError::Pdo { pdo: 0 }, 3),
        (
            header(0x04, 0, 72, 72, 72 + 8193),
            PduError::PlenTooLong {
                plen: 72 + 8193,
                plen_max: 72 + 8192,
            },
            4,
        ),
    ];
    for (bytes, error, fei) in table {
        // The first eight bytes are enough to refuse it.
        assert_eq!(refused::<FromHost>(&bytes[..8]), error);
        assert_eq!(error.term_reason(), TermReason::invalid_field(fei));
    }
    assert_eq!(
        refused::<FromController>(&header(0x05, 0, 24, 0, 28)),
        PduError::Plen {
            plen: 28,
            expected: 24
        }
    );
}

#[test]
fn more_data_than_announced_is_a_limit_exceeded() {
    let error = refused::<FromHost>(&header(0x06, 0, 24, 24, 24 + 65537));
    assert_eq!(
        error,
        PduError::DataTooLong {
            bytes: 65537,
            bytes_max: 65536
        }
    );
    assert_eq!(error.term_reason().fes, FatalErrorStatus::LIMIT_EXCEEDED);
    assert_eq!(
        refused::<FromHost>(&header(0x06, 0, 24, 24, u32::MAX)),
        PduError::DataTooLong {
            bytes: u32::MAX - 24,
            bytes_max: 65536
        }
    );
}

#[test]
fn datal_has_to_be_what_plen_leaves() {
    let mut bytes = H2C_DATA;
    bytes[16] = 4;
    // Refused as soon as the header is there, without waiting for the data.
    let error = refused::<FromHost>(&bytes[..24]);
    assert_eq!(error, PduError::Datal { datal: 4, bytes: 8 });
    assert_eq!(error.term_reason(), TermReason::invalid_field(16));
    assert_eq!(
        refused::<FromHost>(&header(0x06, 0, 24, 0, 24)),
        PduError::Datal { datal: 0, bytes: 0 }
    );
}

#[test]
fn digests_are_checked_where_the_specification_puts_them() {
    let mut bytes = header(0x05, 1, 24, 0, 28);
    let digest = crc32c(&bytes);
    bytes.extend(digest.to_le_bytes());
    let mut host = framer::<FromController>(BOTH);
    feed(&mut host, &bytes);
    assert_eq!(
        host.next_pdu(),
        Ok(Some(FromController::CapsuleResp(Aligned([0; 16]))))
    );

    bytes[9] ^= 1;
    let computed = crc32c(&bytes[..24]);
    feed(&mut host, &bytes);
    let error = host.next_pdu().unwrap_err();
    assert_eq!(
        error,
        PduError::HeaderDigest {
            received: digest,
            computed
        }
    );
    assert_eq!(
        error.term_reason(),
        TermReason {
            fes: FatalErrorStatus::HEADER_DIGEST_ERROR,
            fei: digest
        }
    );
    // The answer stays, and the TermReq can repeat the header.
    assert_eq!(host.next_pdu(), Err(error));
    assert_eq!(host.offending(), &bytes[..24]);
}

#[test]
fn damaged_data_fails_its_pdu_and_not_the_connection() {
    let data_only = Digests {
        header: false,
        data: true,
    };
    let mut bytes = header(0x06, 0b110, 24, 24, 24 + 32 + 4);
    bytes[16] = 32; // DATAL
    bytes.extend([0; 32]);
    bytes.extend([0xaa, 0x36, 0x91, 0x8a]); // RFC 3720: CRC of 32 zeroes
    let mut damaged = bytes.clone();
    damaged[30] = 1;

    let mut controller = framer::<FromHost>(data_only);
    feed(&mut controller, &damaged);
    feed(&mut controller, &bytes);
    let Some(FromHost::H2CData(pdu)) = controller.next_pdu().unwrap() else {
        panic!("not H2CData");
    };
    assert_eq!(pdu.data.unwrap_err().received, 0x8a91_36aa);
    let Some(FromHost::H2CData(pdu)) = controller.next_pdu().unwrap() else {
        panic!("not H2CData");
    };
    assert!(pdu.last);
    assert_eq!(pdu.data.unwrap(), Bytes::from_static(&[0; 32]));
}

#[test]
fn a_term_req_carries_reason_and_offending_header() {
    let mut bytes = header(0x03, 0, 24, 0, 32);
    bytes[8] = 2;
    bytes[10] = 5;
    bytes.extend([1, 2, 3, 4, 5, 6, 7, 8]);
    let mut host = framer::<FromController>(BOTH);
    feed(&mut host, &bytes);
    let Some(FromController::TermReq(pdu)) = host.next_pdu().unwrap() else {
        panic!("not a TermReq");
    };
    assert_eq!(pdu.reason.fes, FatalErrorStatus::PDU_SEQUENCE_ERROR);
    assert_eq!(pdu.reason.fei, 5);
    assert_eq!(pdu.offending, Bytes::from_static(&[1, 2, 3, 4, 5, 6, 7, 8]));
    assert_eq!(
        refused::<FromController>(&header(0x03, 0, 24, 0, 153)),
        PduError::PlenTooLong {
            plen: 153,
            plen_max: 152
        }
    );
}

/// What the encoder writes, the framer reads, wherever the stream is cut.
#[test]
fn framing_does_not_depend_on_where_the_stream_is_split() {
    for digests in [Digests::default(), BOTH] {
        for pda_z in [0, 31] {
            let encoder = Encoder { digests, pda_z };
            let mut queue = TransmitQueue::new();
            encoder.capsule_cmd(&mut queue, &[1; 64], []);
            encoder.capsule_cmd(
                &mut queue,
                &[2; 64],
                [Bytes::from(vec![3; 100]), Bytes::from(vec![4; 300])],
            );
            let at = DataAt { cccid: 5, datao: 6 };
            encoder.h2c_data(&mut queue, at, 7, true, [Bytes::from(vec![8; 513])]);
            encoder.capsule_cmd(&mut queue, &[9; 64], []);
            let mut slices = [std::io::IoSlice::new(&[]); 16];
            let count = queue.fill(&mut slices);
            let stream = slices[..count]
                .iter()
                .flat_map(|slice| slice.iter().copied())
                .collect::<Vec<u8>>();

            let mut whole = framer::<FromHost>(digests);
            whole.limits.pda_z = pda_z;
            feed(&mut whole, &stream);
            let mut expected = Vec::new();
            while let Some(pdu) = whole.next_pdu().unwrap() {
                expected.push(pdu);
            }
            assert_eq!(expected.len(), 4);
            assert_eq!(whole.pending_bytes(), 0);

            for split in 0..=stream.len() {
                let mut framer = framer::<FromHost>(digests);
                framer.limits.pda_z = pda_z;
                let mut pdus = Vec::new();
                for part in [&stream[..split], &stream[split..]] {
                    feed(&mut framer, part);
                    while let Some(pdu) = framer.next_pdu().unwrap() {
                        pdus.push(pdu);
                    }
                }
                assert_eq!(pdus, expected, "split at {split}");
            }
            for step in 1..80 {
                let mut framer = framer::<FromHost>(digests);
                framer.limits.pda_z = pda_z;
                let mut pdus = Vec::new();
                for part in stream.chunks(step) {
                    feed(&mut framer, part);
                    while let Some(pdu) = framer.next_pdu().unwrap() {
                        pdus.push(pdu);
                    }
                }
                assert_eq!(pdus, expected, "in steps of {step}");
            }
        }
    }
}

/// Whatever bytes come, the framer answers and keeps within its bounds; a small generator instead of a dependency.
#[test]
fn arbitrary_bytes_never_panic() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..20_000 {
        let mut bytes = if round % 2 == 0 {
            H2C_DATA.to_vec()
        } else {
            header(0x04, 0, 72, 72, 80)
        };
        for _ in 0..1 + random() % 6 {
            let index = random() as usize % bytes.len().min(24);
            bytes[index] = random() as u8;
        }
        let mut controller = framer::<FromHost>(if round % 3 == 0 { BOTH } else { Digests::default() });
        feed(&mut controller, &bytes);
        while let Ok(Some(_)) = controller.next_pdu() {}
        assert!(controller.buffer(1).capacity() <= 2 * (65536 + 256));
    }
}

#[test]
fn a_buffer_is_used_again_once_nothing_of_it_is_lent() {
    const BUFFER: usize = 64 << 10;
    let write = || {
        let mut bytes = header(0x04, 0, 72, 72, 72 + 4096);
        bytes.resize(72 + 4096, 7);
        bytes
    };
    let mut framer = framer::<FromHost>(Digests::default());
    let mut lent = VecDeque::new();
    let mut places = std::collections::BTreeSet::new();
    for _ in 0..1000 {
        let buffer = framer.buffer(BUFFER);
        assert!(buffer.capacity() - buffer.len() >= BUFFER / 4);
        buffer.extend_from_slice(&write());
        let Ok(Some(FromHost::CapsuleCmd(capsule))) = framer.next_pdu() else {
            panic!("a command is whole");
        };
        let data = capsule.data.unwrap();
        assert_eq!(data, vec![7; 4096]);
        places.insert(data.as_ptr() as usize / BUFFER);
        lent.push_back(data);
        if lent.len() > 16 {
            lent.pop_front();
        }
    }
    // Two or three buffers, which need not begin at a multiple of their size.
    assert!(places.len() <= 8, "{} places", places.len());
}
