//! A queue pair against a scripted controller: bytes in, bytes out, no socket and no clock.

use std::io::IoSlice;

use weft_proto::fabrics::command::{Connect, ConnectData};
use weft_proto::nvme::command::submit;
use weft_proto::nvme::sgl::DataPointer;
use weft_proto::nvme::sqe::Sqe;
use weft_proto::tcp::{FromHost, H2CData};
use weft_proto::units::{BlockCount, Lba};

use super::*;

const BOTH: Digests = Digests {
    header: true,
    data: true,
};

/// The controller's end of the stream.
struct Peer {
    framer: Framer<FromHost>,
    encoder: Encoder,
}

impl Peer {
    /// A queue pair that has been answered its ICReq, and the other end of it.
    fn initialised(options: QueueOptions, agreed: Digests, maxh2cdata: u32) -> (Self, HostQueue<u32>) {
        let mut queue = HostQueue::new(options);
        let mut peer = Self {
            framer: Framer::new(),
            encoder: Encoder::default(),
        };
        let pdus = peer.receive(&mut queue);
        assert!(matches!(pdus[..], [FromHost::IcReq(_)]));
        peer.send(&mut queue, |encoder, out| {
            encoder.ic_resp(out, &IcResp::new(agreed, maxh2cdata));
        });
        peer.encoder.digests = agreed;
        peer.framer.set_limits(FramerLimits {
            digests: agreed,
            capsule_bytes_max: 1 << 20,
            data_bytes_max: 1 << 20,
            pda_z: 0,
        });
        (peer, queue)
    }

    /// Takes what the host transmits.
    fn receive(&mut self, queue: &mut HostQueue<u32>) -> Vec<FromHost> {
        let bytes = written(queue);
        self.framer.buffer(bytes.len()).extend_from_slice(&bytes);
        let mut pdus = Vec::new();
        while let Some(pdu) = self.framer.next_pdu().unwrap() {
            pdus.push(pdu);
        }
        assert_eq!(self.framer.pending_bytes(), 0);
        pdus
    }

    fn send(&mut self, queue: &mut HostQueue<u32>, encode: impl FnOnce(Encoder, &mut TransmitQueue)) {
        let mut out = TransmitQueue::new();
        encode(self.encoder, &mut out);
        let bytes = bytes_of(&out);
        queue.receive_buffer().extend_from_slice(&bytes);
        queue.handle_received(Instant::now());
    }

    fn respond(&mut self, queue: &mut HostQueue<u32>, cid: u16, status: Status) {
        let mut cqe = [0; 16];
        cqe.copy_from_slice(Cqe::new(cid, 0, status, 0x77).as_bytes());
        self.send(queue, |encoder, out| encoder.capsule_resp(out, &cqe));
    }

    fn data(&mut self, queue: &mut HostQueue<u32>, cid: u16, datao: u32, data: Vec<u8>, flags: (bool, bool)) {
        let at = DataAt { cccid: cid, datao };
        self.send(queue, |encoder, out| {
            encoder.c2h_data(out, at, flags.0, flags.1, [Bytes::from(data)]);
        });
    }

    fn r2t(&mut self, queue: &mut HostQueue<u32>, cid: u16, ttag: u16, r2to: u32, r2tl: u32) {
        let r2t = R2T {
            cccid: cid.into(),
            ttag: ttag.into(),
            r2to: r2to.into(),
            r2tl: r2tl.into(),
            rsvd20: [0; 4],
        };
        self.send(queue, |encoder, out| encoder.r2t(out, &r2t));
    }
}

fn bytes_of(queue: &TransmitQueue) -> Vec<u8> {
    let mut slices = [IoSlice::new(&[]); 256];
    let count = queue.fill(&mut slices);
    let bytes: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
    assert_eq!(bytes.len(), queue.len());
    bytes
}

fn written(queue: &mut HostQueue<u32>) -> Vec<u8> {
    let bytes = bytes_of(queue.transmit());
    queue.handle_written(bytes.len());
    bytes
}

fn options() -> QueueOptions {
    QueueOptions {
        depth: 4,
        digests: Digests::default(),
        command_timeout: Duration::from_secs(1),
        capsule_bytes_max: 8192,
    }
}

fn read(bytes: u32) -> Command {
    let blocks = BlockCount::new(bytes / 512).unwrap();
    Command::new(submit::read(1, Lba(0), blocks), Payload::In(bytes))
}

fn write(data: Vec<Bytes>) -> Command {
    let blocks = BlockCount::new(scattered_len(&data) / 512).unwrap();
    Command::new(submit::write(1, Lba(0), blocks, true), Payload::Out(data))
}

fn capsule(pdu: &FromHost) -> (Sqe, Bytes) {
    let FromHost::CapsuleCmd(capsule) = pdu else {
        panic!("not a command capsule: {pdu:?}");
    };
    (
        Sqe::read_from_bytes(&*capsule.sqe).unwrap(),
        capsule.data.clone().unwrap(),
    )
}

fn h2c(pdu: &FromHost) -> &H2CData {
    let FromHost::H2CData(data) = pdu else {
        panic!("not H2CData: {pdu:?}");
    };
    data
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index % 251) as u8).collect()
}

/// The controller was told why, and everything in flight has an outcome.
fn terminated(peer: &mut Peer, queue: &mut HostQueue<u32>, fes: FatalErrorStatus) {
    let Some(CloseReason::Protocol(reason)) = queue.closed() else {
        panic!("not terminated: {:?}", queue.closed());
    };
    assert_eq!(reason.fes, fes);
    let pdus = peer.receive(queue);
    let Some(FromHost::TermReq(request)) = pdus.last() else {
        panic!("no TermReq");
    };
    assert_eq!(request.reason, reason);
    assert_eq!(queue.outstanding(), 0);
}

#[test]
fn commands_wait_for_the_icresp_and_for_a_slot() {
    let mut queue = HostQueue::new(options());
    for context in 0..6 {
        queue.submit(read(512), context, Instant::now());
    }
    assert_eq!(queue.transmit().len(), 128, "an ICReq and nothing else");
    assert_eq!(queue.outstanding(), 6);
    let mut peer = Peer {
        framer: Framer::new(),
        encoder: Encoder::default(),
    };
    peer.receive(&mut queue);
    peer.framer.set_limits(FramerLimits::default());
    peer.send(&mut queue, |encoder, out| {
        encoder.ic_resp(out, &IcResp::new(Digests::default(), 4096));
    });
    let pdus = peer.receive(&mut queue);
    assert_eq!(pdus.len(), 4, "as many as the queue is deep");
    let (sqe, _) = capsule(&pdus[2]);
    peer.data(&mut queue, sqe.cid.get(), 0, vec![1; 512], (true, true));
    assert_eq!(queue.poll_completion().unwrap().0, 2);
    assert_eq!(peer.receive(&mut queue).len(), 1, "the next one takes its slot");
    assert_eq!(queue.outstanding(), 5);
}

#[test]
fn a_write_that_fits_leaves_in_its_capsule() {
    let (mut peer, mut queue) = Peer::initialised(options(), Digests::default(), 4096);
    let data = pattern(8192);
    queue.submit(write(vec![Bytes::from(data.clone())]), 1, Instant::now());
    let pdus = peer.receive(&mut queue);
    let (sqe, in_capsule) = capsule(&pdus[0]);
    assert_eq!(
        sqe.data_pointer(),
        Ok(DataPointer::InCapsule {
            offset: 0,
            length: 8192
        })
    );
    assert_eq!(in_capsule, data);
    peer.respond(&mut queue, sqe.cid.get(), Status::SUCCESS);
    let (context, outcome) = queue.poll_completion().unwrap();
    assert_eq!((context, outcome.unwrap().result), (1, 0x77));
}

#[test]
fn a_longer_write_waits_for_r2t_and_is_cut_at_maxh2cdata() {
    for digests in [Digests::default(), BOTH] {
        let (mut peer, mut queue) = Peer::initialised(QueueOptions { digests, ..options() }, digests, 4099);
        let data = pattern(12288);
        let scattered = vec![
            Bytes::from(data[..5000].to_vec()),
            Bytes::from(data[5000..5001].to_vec()),
            Bytes::from(data[5001..].to_vec()),
        ];
        queue.submit(write(scattered), 1, Instant::now());
        let pdus = peer.receive(&mut queue);
        let (sqe, in_capsule) = capsule(&pdus[0]);
        let cid = sqe.cid.get();
        assert_eq!(sqe.data_pointer(), Ok(DataPointer::Transport { length: 12288 }));
        assert!(in_capsule.is_empty());
        // Two R2T, the second half first: nothing says that they come in order.
        peer.r2t(&mut queue, cid, 8, 8192, 4096);
        peer.r2t(&mut queue, cid, 9, 0, 8192);
        let pdus = peer.receive(&mut queue);
        let mut assembled = vec![0; 12288];
        let mut seen = Vec::new();
        for pdu in &pdus {
            let pdu = h2c(pdu);
            let at = pdu.header.datao.get() as usize;
            let piece = pdu.data.clone().unwrap();
            assembled[at..at + piece.len()].copy_from_slice(&piece);
            seen.push((pdu.header.ttag.get(), at, piece.len(), pdu.last));
        }
        assert_eq!(
            seen,
            [(8, 8192, 4096, true), (9, 0, 4096, false), (9, 4096, 4096, true)]
        );
        assert_eq!(assembled, data);
        peer.respond(&mut queue, cid, Status::SUCCESS);
        assert!(queue.poll_completion().unwrap().1.unwrap().status.is_success());
    }
}

#[test]
fn without_in_capsule_data_only_fabrics_commands_carry_theirs() {
    let none = QueueOptions {
        capsule_bytes_max: 0,
        ..options()
    };
    let (mut peer, mut queue) = Peer::initialised(none, Digests::default(), 4096);
    let connect = Connect {
        qid: 1,
        sqsize_z: 4,
        cattr: 0,
        kato_ms: 0,
    };
    let sqe = FabricsCommand::Connect(connect).to_sqe();
    let data = Bytes::from(vec![5; size_of::<ConnectData>()]);
    queue.submit(Command::new(sqe, Payload::Out(vec![data])), 1, Instant::now());
    queue.submit(write(vec![Bytes::from(vec![6; 512])]), 2, Instant::now());
    let pdus = peer.receive(&mut queue);
    assert_eq!(capsule(&pdus[0]).1.len(), 1024);
    assert_eq!(capsule(&pdus[1]).1.len(), 0);
}

#[test]
fn a_read_is_lent_from_one_pdu_and_gathered_from_several() {
    let (mut peer, mut queue) = Peer::initialised(options(), Digests::default(), 4096);
    let data = pattern(2048);
    queue.submit(read(2048), 1, Instant::now());
    queue.submit(read(2048), 2, Instant::now());
    let pdus = peer.receive(&mut queue);
    let (first, second) = (capsule(&pdus[0]).0.cid.get(), capsule(&pdus[1]).0.cid.get());
    peer.data(&mut queue, second, 0, data[..512].to_vec(), (false, false));
    peer.data(&mut queue, first, 0, data.clone(), (true, true));
    peer.data(&mut queue, second, 512, data[512..].to_vec(), (true, false));
    assert_eq!(queue.poll_completion().unwrap().1.unwrap().data, data);
    assert!(
        queue.poll_completion().is_none(),
        "the second has no response yet"
    );
    peer.respond(&mut queue, second, Status::SUCCESS);
    let (context, outcome) = queue.poll_completion().unwrap();
    assert_eq!((context, outcome.unwrap().data), (2, Bytes::from(data)));
}

#[test]
fn damaged_data_fails_its_command_alone() {
    let (mut peer, mut queue) = Peer::initialised(
        QueueOptions {
            digests: BOTH,
            ..options()
        },
        BOTH,
        4096,
    );
    queue.submit(read(512), 1, Instant::now());
    let pdus = peer.receive(&mut queue);
    let cid = capsule(&pdus[0]).0.cid.get();
    let mut out = TransmitQueue::new();
    let at = DataAt { cccid: cid, datao: 0 };
    peer.encoder
        .c2h_data(&mut out, at, true, true, [Bytes::from(vec![1; 512])]);
    let mut bytes = bytes_of(&out);
    bytes[100] ^= 1;
    queue.receive_buffer().extend_from_slice(&bytes);
    queue.handle_received(Instant::now());
    let (_, outcome) = queue.poll_completion().unwrap();
    assert_eq!(outcome.unwrap().status, Status::TRANSIENT_TRANSPORT_ERROR);
    assert_eq!(queue.closed(), None);
}

#[test]
fn data_that_was_not_asked_for_ends_the_connection() {
    let out_of_range = FatalErrorStatus::DATA_TRANSFER_OUT_OF_RANGE;
    let invalid = FatalErrorStatus::INVALID_PDU_HEADER_FIELD;
    type Misbehaviour = fn(&mut Peer, &mut HostQueue<u32>, u16, u16);
    let table: [(&str, Misbehaviour, FatalErrorStatus); 8] = [
        (
            "past the end",
            |peer, queue, read, _| peer.data(queue, read, 0, vec![0; 1024], (true, false)),
            out_of_range,
        ),
        (
            "with a hole",
            |peer, queue, read, _| peer.data(queue, read, 256, vec![0; 256], (true, false)),
            out_of_range,
        ),
        (
            "for a write",
            |peer, queue, _, write| peer.data(queue, write, 0, vec![0; 256], (true, false)),
            out_of_range,
        ),
        (
            "for nobody",
            |peer, queue, read, _| peer.data(queue, read ^ 0x1000, 0, vec![0; 512], (true, false)),
            invalid,
        ),
        (
            "an R2T past the end",
            |peer, queue, _, write| peer.r2t(queue, write, 1, 8192, 8193),
            out_of_range,
        ),
        (
            "an R2T of nothing",
            |peer, queue, _, write| peer.r2t(queue, write, 1, 0, 0),
            out_of_range,
        ),
        (
            "an R2T for a read",
            |peer, queue, read, _| peer.r2t(queue, read, 1, 0, 512),
            out_of_range,
        ),
        (
            "the same bytes twice",
            |peer, queue, _, write| {
                peer.r2t(queue, write, 1, 0, 8192);
                peer.receive(queue);
                peer.r2t(queue, write, 1, 0, 16384);
            },
            out_of_range,
        ),
    ];
    for (what, misbehave, fes) in table {
        let (mut peer, mut queue) = Peer::initialised(options(), Digests::default(), 65536);
        queue.submit(read(512), 1, Instant::now());
        queue.submit(write(vec![Bytes::from(vec![0; 16384])]), 2, Instant::now());
        let pdus = peer.receive(&mut queue);
        let (read, write) = (capsule(&pdus[0]).0.cid.get(), capsule(&pdus[1]).0.cid.get());
        misbehave(&mut peer, &mut queue, read, write);
        terminated(&mut peer, &mut queue, fes);
        let outcomes: Vec<_> = std::iter::from_fn(|| queue.poll_completion()).collect();
        assert_eq!(
            outcomes,
            [(1, Err(CommandError::Lost)), (2, Err(CommandError::Lost))],
            "{what}"
        );
    }
}

#[test]
fn a_response_nobody_waits_for_ends_the_connection() {
    let (mut peer, mut queue) = Peer::initialised(options(), Digests::default(), 4096);
    queue.submit(read(512), 1, Instant::now());
    let pdus = peer.receive(&mut queue);
    let cid = capsule(&pdus[0]).0.cid.get();
    peer.respond(&mut queue, cid, Status::SUCCESS);
    assert!(queue.poll_completion().is_some());
    peer.respond(&mut queue, cid, Status::SUCCESS);
    terminated(&mut peer, &mut queue, FatalErrorStatus::INVALID_PDU_HEADER_FIELD);
}

#[test]
fn a_second_icresp_is_out_of_sequence() {
    let (mut peer, mut queue) = Peer::initialised(options(), Digests::default(), 4096);
    peer.send(&mut queue, |encoder, out| {
        encoder.ic_resp(out, &IcResp::new(Digests::default(), 4096));
    });
    terminated(&mut peer, &mut queue, FatalErrorStatus::PDU_SEQUENCE_ERROR);
}

#[test]
fn digests_are_what_was_asked_for_or_nothing() {
    let ask = |asked: Digests, agreed: Digests| {
        let options = QueueOptions {
            digests: asked,
            ..options()
        };
        let (_, queue) = Peer::initialised(options, agreed, 4096);
        queue.closed()
    };
    assert_eq!(ask(BOTH, BOTH), None);
    let header_only = Digests {
        header: true,
        data: false,
    };
    assert_eq!(ask(BOTH, header_only), Some(CloseReason::DigestDeclined));
    assert!(matches!(ask(header_only, BOTH), Some(CloseReason::Protocol(_))));
}

#[test]
fn what_was_never_written_was_not_sent() {
    let (_, mut queue) = Peer::initialised(options(), Digests::default(), 4096);
    for context in 0..6 {
        queue.submit(read(512), context, Instant::now());
    }
    // The socket took the first capsule and one byte of the second; the last two wait for a slot.
    queue.handle_written(73);
    queue.handle_closed(CloseReason::PeerClosed);
    let mut outcomes: Vec<_> = std::iter::from_fn(|| queue.poll_completion()).collect();
    outcomes.sort_by_key(|(context, _)| *context);
    let errors: Vec<_> = outcomes
        .into_iter()
        .map(|(_, outcome)| outcome.unwrap_err())
        .collect();
    use CommandError::{Lost, NotSent};
    assert_eq!(errors, [Lost, Lost, NotSent, NotSent, NotSent, NotSent]);
    queue.submit(read(512), 9, Instant::now());
    assert_eq!(queue.poll_completion(), Some((9, Err(NotSent))));
}

#[test]
fn silence_past_the_command_timeout_ends_the_connection() {
    let (mut peer, mut queue) = Peer::initialised(options(), Digests::default(), 4096);
    let start = Instant::now();
    let event_request = Command {
        expires: false,
        ..Command::new(submit::async_event_request(), Payload::None)
    };
    queue.submit(event_request, 1, start);
    assert_eq!(queue.poll_timeout(), None, "an event may take for ever");
    queue.submit(read(512), 2, start);
    peer.receive(&mut queue);
    let deadline = start + Duration::from_secs(1);
    assert_eq!(queue.poll_timeout(), Some(deadline));
    queue.handle_timeout(deadline - Duration::from_millis(1));
    assert_eq!(queue.closed(), None);
    queue.handle_timeout(deadline);
    assert_eq!(queue.closed(), Some(CloseReason::CommandTimeout));
    assert_eq!(queue.poll_completion(), Some((1, Err(CommandError::Lost))));
    assert_eq!(queue.poll_completion(), Some((2, Err(CommandError::Lost))));
}

#[test]
fn what_was_sent_last_of_all_that_was_answered_tells_when_the_controller_was_there() {
    let (mut peer, mut queue) = Peer::initialised(options(), Digests::default(), 4096);
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    for (tag, started) in [(1, at(0)), (2, at(100)), (3, at(200))] {
        queue.submit(Command::new(submit::flush(1), Payload::None), tag, started);
    }
    let cids: Vec<u16> = peer
        .receive(&mut queue)
        .iter()
        .map(|pdu| capsule(pdu).0.cid.get())
        .collect();
    assert_eq!(queue.answered(), None, "nothing is known of what was only sent");
    peer.respond(&mut queue, cids[1], Status::SUCCESS);
    assert_eq!(queue.answered(), Some(at(100)));
    peer.respond(&mut queue, cids[0], Status::SUCCESS);
    assert_eq!(queue.answered(), Some(at(100)), "an older one adds nothing");
    queue.handle_closed(CloseReason::PeerClosed);
    assert_eq!(queue.answered(), Some(at(100)), "the third one was lost");
}

#[test]
fn a_controllers_term_req_is_the_reason() {
    let (mut peer, mut queue) = Peer::initialised(options(), Digests::default(), 4096);
    let reason = TermReason::invalid_field(4);
    peer.send(&mut queue, |encoder, out| {
        encoder.c2h_term_req(out, reason, &[1, 2, 3])
    });
    assert_eq!(queue.closed(), Some(CloseReason::PeerTerminated(reason)));
    assert!(queue.transmit().is_empty(), "no TermReq answers a TermReq");
}
