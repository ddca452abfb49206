//! The queue pair by itself: no socket, and the time is what the test says.

use weft_proto::nvme::command::submit;
use weft_proto::nvme::sgl::SglDescriptor;
use weft_proto::tcp::header::DigestEnables;
use weft_proto::tcp::{Aligned, DataPduHeader, PduFlags, PduType};
use weft_proto::units::{BlockCount, Lba};
use zerocopy::{FromZeros, IntoBytes};

use super::*;

const ENTRIES: u16 = 4;

fn ic_req(hpda: u8) -> FromHost {
    FromHost::IcReq(IcReq {
        hpda,
        ..IcReq::new(Digests::default(), 1)
    })
}

fn capsule(sqe: Sqe, data: &[u8]) -> FromHost {
    let mut bytes = [0; 64];
    bytes.copy_from_slice(sqe.as_bytes());
    FromHost::CapsuleCmd(CapsuleCmd {
        sqe: Aligned(bytes),
        data: Ok(Bytes::copy_from_slice(data)),
    })
}

fn connect_sqe(cattr: u8) -> Sqe {
    let connect = Connect {
        qid: 1,
        sqsize_z: ENTRIES - 1,
        cattr,
        kato_ms: 0,
    };
    FabricsCommand::Connect(connect)
        .to_sqe()
        .with_data(SglDescriptor::in_capsule(1024))
}

fn with_cid(sqe: Sqe, cid: u16) -> Sqe {
    Sqe {
        cid: cid.into(),
        ..sqe
    }
}

fn write(cid: u16, bytes: u32) -> Sqe {
    let sqe = submit::write(1, Lba(0), BlockCount::new(bytes.div_ceil(4096)).unwrap(), false);
    with_cid(sqe.with_data(SglDescriptor::transport(bytes)), cid)
}

fn data(cid: u16, offset: u32, len: u32, last: bool) -> FromHost {
    let header = DataPduHeader {
        cccid: cid.into(),
        ttag: cid.into(),
        datao: offset.into(),
        datal: len.into(),
        ..DataPduHeader::new_zeroed()
    };
    FromHost::H2CData(H2CData {
        header: Aligned(header),
        last,
        data: Ok(Bytes::from(vec![0; len as usize])),
    })
}

/// The PDUs that wait to be written, by type and flags.
fn written(queue: &mut QueuePair<()>) -> Vec<(PduType, PduFlags)> {
    let transmits = queue.transmits();
    let mut slices = [std::io::IoSlice::new(&[]); 256];
    let count = transmits.fill(&mut slices);
    let bytes: Vec<u8> = slices[..count]
        .iter()
        .flat_map(|slice| slice.iter().copied())
        .collect();
    let len = transmits.len();
    transmits.advance(len);
    let mut pdus = Vec::new();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        pdus.push((PduType(rest[0]), PduFlags(rest[1])));
        let plen = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
        rest = &rest[plen..];
    }
    pdus
}

fn types(queue: &mut QueuePair<()>) -> Vec<PduType> {
    written(queue).into_iter().map(|(pdu_type, _)| pdu_type).collect()
}

/// Gives a PDU of which nothing comes that is to be executed.
#[track_caller]
fn give(queue: &mut QueuePair<()>, pdu: FromHost, now: Instant) {
    let request = queue.handle_pdu(pdu, now, |_| ());
    assert!(request.is_none(), "{request:?}");
}

/// A queue pair that takes commands.
fn ready(cattr: u8) -> (QueuePair<()>, Instant) {
    let now = Instant::now();
    let mut queue = QueuePair::new(now);
    give(&mut queue, ic_req(0), now);
    let request = queue.handle_pdu(capsule(connect_sqe(cattr), &[0; 1024]), now, |_| ());
    let request = request.expect("the Connect");
    let Ok(FabricsCommand::Connect(connect)) = FabricsCommand::parse(&request.sqe) else {
        panic!("a Connect");
    };
    queue.handle_connected(connect);
    queue.handle_completion(request.complete(Status::SUCCESS));
    assert_eq!(types(&mut queue), [PduType::IC_RESP, PduType::CAPSULE_RESP]);
    (queue, now)
}

#[test]
fn silence_before_connect_ends_the_connection() {
    let start = Instant::now();
    let mut queue = QueuePair::<()>::new(start);
    assert_eq!(queue.poll_timeout(), Some(start + CONNECT_TIMEOUT));
    give(&mut queue, ic_req(0), start);
    queue.handle_timeout(start + CONNECT_TIMEOUT - Duration::from_millis(1));
    assert!(!queue.is_closing());
    queue.handle_timeout(start + CONNECT_TIMEOUT);
    assert!(queue.is_closing());
}

#[test]
fn a_connected_queue_has_no_deadline_of_its_own() {
    let (mut queue, now) = ready(0);
    assert_eq!(queue.poll_timeout(), None);
    queue.handle_timeout(now + Duration::from_secs(3600));
    assert!(!queue.is_closing());
}

#[test]
fn a_command_before_connect_ends_the_connection() {
    let now = Instant::now();
    let mut queue = QueuePair::new(now);
    give(&mut queue, ic_req(0), now);
    give(&mut queue, capsule(submit::flush(1), &[]), now);
    assert!(queue.is_closing());
    assert_eq!(types(&mut queue), [PduType::IC_RESP, PduType::C2H_TERM_REQ]);
}

#[test]
fn nothing_may_come_until_the_connect_is_answered() {
    let now = Instant::now();
    let mut queue = QueuePair::new(now);
    give(&mut queue, ic_req(0), now);
    let connect = queue.handle_pdu(capsule(connect_sqe(0), &[0; 1024]), now, |_| ());
    assert!(connect.is_some());
    give(&mut queue, capsule(with_cid(submit::flush(1), 1), &[]), now);
    assert!(queue.is_closing());
}

#[test]
fn a_connect_that_failed_may_be_tried_again() {
    let now = Instant::now();
    let mut queue = QueuePair::new(now);
    give(&mut queue, ic_req(0), now);
    for _ in 0..2 {
        let request = queue.handle_pdu(capsule(connect_sqe(0), &[0; 1024]), now, |_| ());
        let request = request.expect("the Connect");
        queue.handle_completion(request.complete(Status::CONNECT_CONTROLLER_BUSY));
        assert!(!queue.is_closing());
    }
    // Too little data is answered here.
    give(&mut queue, capsule(connect_sqe(0), &[0; 512]), now);
    assert!(!queue.is_closing());
}

#[test]
fn digests_and_alignment_are_what_the_host_asked_for() {
    let now = Instant::now();
    let mut queue = QueuePair::<()>::new(now);
    let request = IcReq {
        dgst: DigestEnables(3),
        ..IcReq::new(Digests::default(), 1)
    };
    give(&mut queue, FromHost::IcReq(request), now);
    assert_eq!(
        queue.framer_limits().digests,
        Digests {
            header: true,
            data: true
        }
    );
    let mut queue = QueuePair::<()>::new(now);
    give(&mut queue, ic_req(32), now);
    assert!(queue.is_closing(), "HPDA above 31");
}

#[test]
fn requests_for_data_are_bounded_and_go_on_as_data_comes() {
    let (mut queue, now) = ready(0);
    queue.entries = 64;
    let fits = (R2T_BYTES_MAX / TRANSFER_BYTES_MAX) as usize;
    for cid in 0..fits as u16 + 2 {
        give(&mut queue, capsule(write(cid, TRANSFER_BYTES_MAX), &[]), now);
    }
    assert_eq!(types(&mut queue), vec![PduType::R2T; fits]);
    let request = queue.handle_pdu(data(0, 0, TRANSFER_BYTES_MAX, true), now, |_| ());
    assert_eq!(request.expect("whole").cid(), 0);
    assert_eq!(types(&mut queue), [PduType::R2T], "room for one more");
    // Data that nobody has asked for yet.
    give(&mut queue, data(fits as u16 + 1, 0, 4096, false), now);
    assert!(queue.is_closing());
}

#[test]
fn a_command_above_the_largest_transfer_is_refused_before_its_data() {
    let (mut queue, now) = ready(0);
    give(&mut queue, capsule(write(1, TRANSFER_BYTES_MAX + 4096), &[]), now);
    assert_eq!(types(&mut queue), [PduType::CAPSULE_RESP]);
}

#[test]
fn data_that_ends_early_ends_the_connection() {
    let (mut queue, now) = ready(0);
    give(&mut queue, capsule(write(1, 8192), &[]), now);
    give(&mut queue, data(1, 0, 4096, true), now);
    assert!(queue.is_closing());
}

#[test]
fn damaged_data_fails_its_command_only() {
    let (mut queue, now) = ready(0);
    give(&mut queue, capsule(write(1, 4096), &[]), now);
    let FromHost::H2CData(mut damaged) = data(1, 0, 4096, true) else {
        panic!("H2CData")
    };
    damaged.data = Err(weft_proto::tcp::DataDigestMismatch {
        received: 1,
        computed: 2,
    });
    give(&mut queue, FromHost::H2CData(damaged), now);
    assert_eq!(types(&mut queue), [PduType::R2T, PduType::CAPSULE_RESP]);
    assert!(!queue.is_closing());
}

#[test]
fn without_flow_control_a_read_needs_no_response() {
    for (cattr, expected) in [
        (0, vec![PduType::C2H_DATA, PduType::CAPSULE_RESP]),
        (Connect::DISABLE_SQ_FLOW_CONTROL, vec![PduType::C2H_DATA]),
    ] {
        let (mut queue, now) = ready(cattr);
        let read = submit::read(1, Lba(0), BlockCount::from_nlb_z(0));
        let read = with_cid(read.with_data(SglDescriptor::transport(4096)), 3);
        let request = queue.handle_pdu(capsule(read, &[]), now, |_| ());
        let request = request.expect("the read");
        assert_eq!(request.answer_bytes_max, 4096);
        let answer = request
            .complete(Status::SUCCESS)
            .with_data(vec![Bytes::from(vec![1; 4096])]);
        queue.handle_completion(answer);
        let pdus = written(&mut queue);
        let success = pdus[0].1.contains(PduFlags::SUCCESS);
        assert_eq!(success, expected.len() == 1);
        assert_eq!(
            pdus.into_iter().map(|(pdu_type, _)| pdu_type).collect::<Vec<_>>(),
            expected
        );
    }
}

#[test]
fn nothing_is_answered_after_the_end() {
    let (mut queue, now) = ready(0);
    let request = queue.handle_pdu(capsule(with_cid(submit::flush(1), 1), &[]), now, |_| ());
    let request = request.expect("the flush");
    give(&mut queue, ic_req(0), now);
    assert_eq!(types(&mut queue), [PduType::C2H_TERM_REQ]);
    queue.handle_completion(request.complete(Status::SUCCESS));
    give(&mut queue, capsule(with_cid(submit::flush(1), 2), &[]), now);
    assert!(types(&mut queue).is_empty());
}

#[test]
fn a_fused_pair_whose_data_comes_late_is_yielded_once_and_whole() {
    let (mut queue, now) = ready(0);
    let compare = submit::compare(1, Lba(0), BlockCount::from_nlb_z(0));
    let compare = compare
        .with_data(SglDescriptor::transport(4096))
        .with_fuse(Fuse::First);
    give(&mut queue, capsule(with_cid(compare, 1), &[]), now);
    give(
        &mut queue,
        capsule(write(2, 4096).with_fuse(Fuse::Second), &[]),
        now,
    );
    give(&mut queue, data(2, 0, 4096, true), now);
    let request = queue.handle_pdu(data(1, 0, 4096, true), now, |_| ());
    let request = request.expect("the pair");
    assert_eq!(request.cid(), 2);
    assert_eq!(request.fused_first.map(|first| first.cid()), Some(1));
}
