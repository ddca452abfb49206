//! The target over a real socket, against bytes written by hand from the specifications.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::time::Duration;

use common::*;

#[test]
fn a_connection_initialises_connects_and_moves_data() {
    run(async {
        let (target, _) = memory_target().await;
        let mut raw = Raw::open(target.address).await;
        let resp = raw.initialize().await;
        // PFV 0, CPDA 0, no digests, MAXH2CDATA 128 KiB.
        assert_eq!(resp.header[..8], [0, 0, 0, 0, 0, 0, 2, 0]);

        let mut host = Identity::default().connect(target.address).await;
        let data: Vec<u8> = (0..8192_u32).map(|index| (index / 7) as u8).collect();
        let written = host
            .io
            .execute(inline(write_sqe(1, 5, 2, true), 8192), &data)
            .await
            .ok();
        assert_eq!(written.cid, 1);
        let read = host.io.execute(read_sqe(2, 5, 2), &[]).await.ok();
        assert_eq!(read.data, data);
        let read = host.io.execute(read_sqe(3, 6, 1), &[]).await.ok();
        assert_eq!(read.data, data[4096..]);
    });
}

#[test]
fn sqhd_counts_commands_and_wraps() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = Identity::default().connect(target.address).await;
        // 32 entries; the Connect took the first.
        for expected in (2_u16..32).chain(0..3) {
            host.io.command(sqe(0x00, expected, 1, &[]), &[]).await;
            let pdu = host.io.receive().await.unwrap();
            assert_eq!(pdu.header[8..10], expected.to_le_bytes());
        }
    });
}

#[test]
fn a_large_write_is_asked_for_and_several_are_in_flight() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = Identity::default().connect(target.address).await;
        let len: u32 = 1 << 20;
        let data = |cid: u16| -> Vec<u8> { (0..len).map(|index| (index / 4096) as u8 ^ cid as u8).collect() };
        for cid in 1..=3 {
            let entry = write_sqe(cid, u32::from(cid) * 256, 256, false);
            host.io.command(transport(entry, len), &[]).await;
        }
        let mut tags = Vec::new();
        for cid in 1..=3_u16 {
            let r2t = host.io.receive().await.unwrap();
            assert_eq!(r2t.pdu_type, 0x09);
            assert_eq!(r2t.header[..2], cid.to_le_bytes());
            assert_eq!(r2t.header[4..8], 0_u32.to_le_bytes());
            assert_eq!(r2t.header[8..12], len.to_le_bytes());
            tags.push(u16::from_le_bytes([r2t.header[2], r2t.header[3]]));
        }
        // Interleaved, the last command first, in pieces of the most that one PDU may carry.
        let step = 128 << 10;
        for offset in (0..len as usize).step_by(step) {
            for cid in [3_u16, 1, 2] {
                let piece = &data(cid)[offset..offset + step];
                let last = offset + step == len as usize;
                let tag = tags[usize::from(cid) - 1];
                host.io
                    .send(&h2c_data(cid, tag, offset as u32, last, piece))
                    .await;
            }
        }
        let mut done: Vec<u16> = Vec::new();
        for _ in 0..3 {
            done.push(host.io.answer().await.ok().cid);
        }
        done.sort_unstable();
        assert_eq!(done, [1, 2, 3]);
        for cid in 1..=3 {
            let read = host
                .io
                .execute(read_sqe(9, u32::from(cid) * 256, 256), &[])
                .await
                .ok();
            assert!(read.data == data(cid), "command {cid}");
        }
    });
}

#[test]
fn a_shard_travels_in_its_capsule_and_a_longer_capsule_ends_the_connection() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = Identity::default().connect(target.address).await;
        let len: u32 = 136 << 10;
        let data: Vec<u8> = (0..len).map(|index| (index / 513) as u8).collect();
        host.io
            .execute(inline(write_sqe(1, 64, 34, false), len), &data)
            .await
            .ok();
        let read = host.io.execute(read_sqe(2, 64, 34), &[]).await.ok();
        assert!(read.data == data);
        let longer = vec![0; (140 << 10) as usize];
        host.io
            .command(inline(write_sqe(3, 64, 35, false), 140 << 10), &longer)
            .await;
        let term = host.io.receive().await.unwrap();
        assert_eq!(term.pdu_type, 0x03, "C2HTermReq");
    });
}

#[test]
fn header_and_data_digests_protect_both_directions() {
    run(async {
        let (target, _) = memory_target().await;
        let crc = |bytes: &[u8]| weft_proto::tcp::crc32c(bytes).to_le_bytes();
        let mut raw = Raw::open(target.address).await;
        raw.send(&ic_req(3)).await;
        let resp = raw.receive().await.unwrap();
        assert_eq!(resp.header[3], 3, "both digests");
        let with_digests = |mut entry: Vec<u8>, data: &[u8]| {
            // CH and SQE, then the header digest, then data, then its digest.
            let plen = 72 + 4 + if data.is_empty() { 0 } else { data.len() + 4 };
            entry[1] = if data.is_empty() { 0b01 } else { 0b11 };
            entry[3] = if data.is_empty() { 0 } else { 76 };
            entry[4..8].copy_from_slice(&(plen as u32).to_le_bytes());
            entry.truncate(72);
            let header_digest = crc(&entry);
            entry.extend(header_digest);
            if !data.is_empty() {
                entry.extend(data);
                entry.extend(crc(data));
            }
            entry
        };
        let data = connect_data(HOSTID, 0xffff, SUBNQN, HOSTNQN);
        raw.send(&with_digests(capsule(connect_sqe(7, 0, 31, 0), &[]), &data))
            .await;
        let pdu = raw.receive().await.unwrap();
        assert_eq!(
            (pdu.pdu_type, pdu.flags),
            (0x05, 0b01),
            "a response with a header digest"
        );
        // A damaged digest of data fails the command and not the connection.
        let mut get = with_digests(capsule(property_get(8, 0x1c, false), &[]), &[]);
        raw.send(&get).await;
        assert_eq!(raw.receive().await.unwrap().header[12], 8);
        // A damaged header ends the connection; FEI is the digest received.
        let last = get.len() - 1;
        get[last] ^= 1;
        let received = u32::from_le_bytes(get[72..76].try_into().unwrap());
        raw.send(&get).await;
        raw.expect_term_req(3, received).await;
    });
}

#[test]
fn pdus_out_of_order_or_malformed_end_that_connection_only() {
    run(async {
        let (target, _) = memory_target().await;
        let mut bystander = Identity::default().connect(target.address).await;
        let command = capsule(sqe(0x00, 1, 1, &[]), &[]);

        // (what, PDUs sent after an ICReq if any, FES, FEI)
        let cases: Vec<(&str, bool, Vec<u8>, u16, u32)> = vec![
            ("a command before ICReq", false, command.clone(), 2, 0),
            ("a second ICReq", true, ic_req(0), 2, 0),
            ("a command before Connect", true, command.clone(), 2, 0),
            (
                "data before Connect",
                true,
                h2c_data(1, 1, 0, true, &[0; 8]),
                2,
                0,
            ),
            (
                "an unknown PDU type",
                true,
                vec![0x0b, 0, 24, 0, 24, 0, 0, 0],
                1,
                0,
            ),
            ("a PDU for hosts", true, vec![0x05, 0, 24, 0, 24, 0, 0, 0], 1, 0),
            ("a wrong HLEN", true, vec![0x04, 0, 71, 0, 72, 0, 0, 0], 1, 2),
            ("a PLEN below HLEN", true, vec![0x04, 0, 72, 0, 71, 0, 0, 0], 1, 4),
            (
                "an enormous PLEN",
                true,
                vec![0x04, 0, 72, 72, 0, 0, 0, 0x7f],
                1,
                4,
            ),
            (
                "a digest nobody agreed on",
                true,
                vec![0x04, 1, 72, 0, 76, 0, 0, 0],
                1,
                1,
            ),
            (
                "a PDO inside the header",
                true,
                vec![0x04, 0, 72, 8, 80, 0, 0, 0],
                1,
                3,
            ),
            (
                "an oversized H2CData",
                true,
                vec![0x06, 0, 24, 24, 0x19, 0, 2, 0],
                5,
                0,
            ),
        ];
        for (what, initialize, bytes, fes, fei) in cases {
            println!("{what}");
            let mut raw = Raw::open(target.address).await;
            if initialize {
                raw.initialize().await;
            }
            raw.send(&bytes).await;
            raw.expect_term_req(fes, fei).await;
        }

        let mut raw = Raw::open(target.address).await;
        let mut unknown_format = ic_req(0);
        unknown_format[8] = 1;
        raw.send(&unknown_format).await;
        raw.expect_term_req(6, 8).await;

        bystander.io.execute(sqe(0x00, 1, 1, &[]), &[]).await.ok();
    });
}

#[test]
fn data_that_nobody_asked_for_ends_the_connection() {
    run(async {
        let (target, _) = memory_target().await;
        // (what, tag offset, data offset, bytes, FES, FEI)
        for (what, cid, tag, offset, len, fes, fei) in [
            ("an unknown command", 9, 0, 0, 4096, 1, 8),
            ("another tag", 1, 1, 0, 4096, 1, 10),
            ("a gap", 1, 0, 8, 4096, 4, 0),
            ("too much", 1, 0, 0, 16384, 4, 0),
        ] {
            println!("{what}");
            let mut host = Identity::default().connect(target.address).await;
            host.io
                .command(transport(write_sqe(1, 0, 3, false), 12288), &[])
                .await;
            let r2t = host.io.receive().await.unwrap();
            let ttag = u16::from_le_bytes([r2t.header[2], r2t.header[3]]);
            host.io
                .send(&h2c_data(cid, ttag + tag, offset, false, &vec![0; len]))
                .await;
            host.io.expect_term_req(fes, fei).await;
        }
    });
}

#[test]
fn a_cid_in_flight_twice_and_more_commands_than_entries_end_the_connection() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = Identity::default().connect(target.address).await;
        // Writes that wait for their data keep their CID.
        host.io
            .command(transport(write_sqe(1, 0, 1, false), 4096), &[])
            .await;
        assert_eq!(host.io.receive().await.unwrap().pdu_type, 0x09);
        host.io
            .command(transport(write_sqe(1, 0, 1, false), 4096), &[])
            .await;
        host.io.expect_term_req(2, 0).await;

        let mut host = Identity::default().connect(target.address).await;
        for cid in 0..33 {
            host.io
                .command(transport(write_sqe(cid, 0, 1, false), 4096), &[])
                .await;
        }
        for _ in 0..32 {
            assert_eq!(host.io.receive().await.unwrap().pdu_type, 0x09);
        }
        host.io.expect_term_req(2, 0).await;
    });
}

#[test]
fn connect_refuses_by_the_parameter_that_is_wrong() {
    run(async {
        let (target, _) = memory_target().await;
        let host = Identity::default();
        let refused = |identity: Identity, cntlid: u16| async move {
            let (_, answer) = identity.queue(target.address, 0, cntlid).await;
            (answer.code(), answer.result as u32)
        };
        // Connect Invalid Parameters; dword 0 has the offset, bit 16 says in the data.
        assert_eq!(
            refused(host, 7).await,
            (0x182, 0x1_0010),
            "a controller that is not dynamic"
        );
        let elsewhere = Identity {
            subnqn: "nqn.2026-01.io.weft:other",
            ..host
        };
        assert_eq!(
            refused(elsewhere, 0xffff).await,
            (0x182, 0x1_0100),
            "no such subsystem"
        );
        let nameless = Identity {
            hostnqn: "host",
            ..host
        };
        assert_eq!(refused(nameless, 0xffff).await, (0x182, 0x1_0200), "no NQN");
        let (_, answer) = host.queue(target.address, 1, 99).await;
        assert_eq!(
            (answer.code(), answer.result),
            (0x182, 0x1_0010),
            "no such controller"
        );

        let (_admin, cntlid) = host.admin(target.address).await;
        let (_, answer) = host.queue(target.address, 17, cntlid).await;
        assert_eq!(
            (answer.code(), answer.result),
            (0x182, 42),
            "more queues than there are"
        );
        let (_io, answer) = host.queue(target.address, 1, cntlid).await;
        answer.ok();
        let (_, answer) = host.queue(target.address, 1, cntlid).await;
        assert_eq!(
            (answer.code(), answer.result),
            (0x182, 42),
            "a queue that is connected"
        );
        let stranger = Identity::hostid(9);
        let (_, answer) = stranger.queue(target.address, 2, cntlid).await;
        assert_eq!(answer.code(), 0x182, "another host's controller");
    });
}

#[test]
fn a_controller_says_what_linux_asks_of_it() {
    run(async {
        let (target, _) = memory_target().await;
        let (mut admin, cntlid) = Identity::default().admin(target.address).await;
        let cap = admin.execute(property_get(1, 0, true), &[]).await.ok().result;
        assert_eq!(cap & 0xffff, 127, "MQES");
        assert_ne!(cap >> 24 & 0xff, 0, "TO");
        assert_eq!(cap >> 37 & 1, 1, "CSS: NVM");
        let vs = admin.execute(property_get(2, 8, false), &[]).await.ok().result;
        assert!(vs >= 0x0001_0300, "descriptors are asked for from 1.3 on");

        let id = admin
            .execute(transport(sqe(0x06, 3, 0, &[1]), 4096), &[])
            .await
            .ok()
            .data;
        let word = |at: usize| u16::from_le_bytes([id[at], id[at + 1]]);
        let dword = |at: usize| u32::from_le_bytes(id[at..at + 4].try_into().unwrap());
        assert_eq!(&id[4..12], b"serial-1");
        assert_eq!(id[76], 0b1011, "CMIC: ports, controllers, ANA");
        assert_eq!(id[77], 8, "MDTS 1 MiB");
        assert_eq!(word(78), cntlid);
        assert_eq!(id[111], 1, "CNTRLTYPE: I/O");
        assert_eq!(word(320), 1, "KAS");
        assert_ne!(id[342], 0, "ANATT");
        assert_eq!((dword(344), dword(348)), (1024, 1024), "ANAGRPMAX, NANAGRPID");
        assert_eq!(word(514), 128, "MAXCMD");
        assert_eq!((dword(516), dword(540)), (64, 64), "NN, MNAN");
        assert_eq!(word(520), 0b1010_1101, "ONCS");
        assert_eq!(id[525] & 1, 0, "no volatile cache");
        assert_eq!(dword(536), 0x0030_0001, "SGLS");
        assert_eq!(&id[768..768 + SUBNQN.len()], SUBNQN.as_bytes());
        assert_eq!(
            dword(1792) * 16,
            64 + 136 * 1024,
            "IOCCSZ: a shard of 33 blocks, and more"
        );
        assert_eq!(dword(1796) * 16, 16, "IORCSZ");
        assert_eq!(word(1800), 0, "ICDOFF");

        let list = admin
            .execute(transport(sqe(0x06, 4, 0, &[2]), 4096), &[])
            .await
            .ok()
            .data;
        assert_eq!(list[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
        let descriptors = admin
            .execute(transport(sqe(0x06, 5, 1, &[3]), 4096), &[])
            .await
            .ok()
            .data;
        assert_eq!(descriptors[..4], [3, 16, 0, 0]);
        assert_eq!(descriptors[4..20], UUID);
        let ns = admin
            .execute(transport(sqe(0x06, 6, 1, &[0]), 4096), &[])
            .await
            .ok()
            .data;
        assert_eq!(ns[..8], (64_u64 << 8).to_le_bytes(), "NSZE");
        assert_eq!(
            (ns[30], ns[31]),
            (1, 0xfe),
            "NMIC shared, RESCAP without persistence"
        );
        assert_eq!(ns[130], 12, "LBADS");
        assert_eq!(ns[92..96], [1, 0, 0, 0], "ANAGRPID");

        let queues = admin
            .execute(sqe(0x09, 7, 0, &[7, 0x0003_0003]), &[])
            .await
            .ok()
            .result;
        assert_eq!(queues, 0x0003_0003);
        let ana = admin
            .execute(transport(sqe(0x02, 8, 0, &[0x0c | 15 << 16]), 64), &[])
            .await
            .ok()
            .data;
        assert_eq!(ana[8..10], [1, 0], "one group");
        assert_eq!(
            (ana[16], ana[32], ana[48]),
            (1, 1, 1),
            "group 1, optimized, namespace 1"
        );
        // The tail of the longest page that Identify announces: zeroes.
        let tail = transport(sqe(0x02, 8, 0, &[0x0c | 15 << 16, 0, 32768]), 64);
        assert_eq!(admin.execute(tail, &[]).await.ok().data, [0; 64]);
        for lid in [1_u32, 2, 3, 4, 5] {
            admin
                .execute(transport(sqe(0x02, 9, 0xffff_ffff, &[lid | 127 << 16]), 512), &[])
                .await
                .ok();
        }
        let unknown = admin
            .execute(transport(sqe(0x02, 9, 0, &[0xee | 127 << 16]), 512), &[])
            .await;
        assert_eq!(unknown.code(), 0x109);
    });
}

#[test]
fn commands_answer_what_they_cannot_do() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = Identity::default().connect(target.address).await;
        let blocks = 64 << 8;
        let io = &mut host.io;
        let out_of_range = io.execute(read_sqe(1, blocks, 1), &[]).await;
        assert_eq!(out_of_range.status, 0x4080, "LBA out of range, do not retry");
        let unknown_namespace = io.execute(sqe(0x00, 1, 9, &[]), &[]).await;
        assert_eq!(unknown_namespace.code(), 0x0b);
        let unknown_opcode = io.execute(sqe(0x90, 1, 1, &[]), &[]).await;
        assert_eq!(unknown_opcode.code(), 0x01);
        let short = io
            .execute(inline(write_sqe(1, 0, 2, false), 4096), &[0; 4096])
            .await;
        assert_eq!(short.code(), 0x0f, "less data than blocks");
        let mut outside = inline(write_sqe(1, 0, 1, false), 4096);
        outside[24] = 1;
        assert_eq!(
            io.execute(outside, &[0; 4096]).await.code(),
            0x16,
            "past the capsule's data"
        );
        let too_long = transport(sqe(0x02, 1, 1, &[0, 0, 256]), 257 * 4096);
        assert_eq!(io.execute(too_long, &[]).await.code(), 0x02, "above MDTS");
        let mut keyed = transport(sqe(0x02, 1, 1, &[0, 0, 0]), 4096);
        keyed[39] = 0x40;
        assert_eq!(io.execute(keyed, &[]).await.code(), 0x11);
        // The connection is as good as new.
        io.execute(read_sqe(1, 0, 1), &[]).await.ok();
    });
}

#[test]
fn zeroes_deallocation_compare_and_verify_do_what_they_say() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = Identity::default().connect(target.address).await;
        let io = &mut host.io;
        let ones = vec![1; 4096];
        for lba in 0..4 {
            io.execute(inline(write_sqe(1, lba, 1, false), 4096), &ones)
                .await
                .ok();
        }
        // Write Zeroes with DEAC on block 0, Dataset Management on blocks 1 and 3.
        io.execute(sqe(0x08, 1, 1, &[0, 0, 1 << 25]), &[]).await.ok();
        let mut ranges = Vec::new();
        for lba in [1_u64, 3] {
            ranges.extend([0; 4]);
            ranges.extend(1_u32.to_le_bytes());
            ranges.extend(lba.to_le_bytes());
        }
        io.execute(inline(sqe(0x09, 1, 1, &[1, 4]), 32), &ranges)
            .await
            .ok();
        let read = io.execute(read_sqe(1, 0, 4), &[]).await.ok().data;
        let nonzero: Vec<bool> = read.chunks(4096).map(|block| block[0] == 1).collect();
        assert_eq!(nonzero, [false, false, true, false]);

        let compare = |cid| inline(sqe(0x05, cid, 1, &[2, 0, 0]), 4096);
        io.execute(compare(1), &ones).await.ok();
        let different = io.execute(compare(1), &[2; 4096]).await;
        assert_eq!(different.code(), 0x285);
        io.execute(sqe(0x0c, 1, 1, &[0, 0, 3]), &[]).await.ok();
        let outside = io.execute(sqe(0x0c, 1, 1, &[(64 << 8) - 1, 0, 3]), &[]).await;
        assert_eq!(outside.code(), 0x80);
    });
}

#[test]
fn a_fused_pair_writes_only_what_compares_equal() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = Identity::default().connect(target.address).await;
        let io = &mut host.io;
        let fuse = |mut entry: [u8; 64], bits: u8| {
            entry[1] |= bits;
            entry
        };
        let first = fuse(inline(sqe(0x05, 1, 1, &[0, 0, 0]), 4096), 1);
        let second = fuse(inline(write_sqe(2, 0, 1, false), 4096), 2);

        io.command(first, &[0; 4096]).await;
        io.command(second, &[7; 4096]).await;
        assert_eq!(io.answer().await.ok().cid, 1);
        assert_eq!(io.answer().await.ok().cid, 2);

        io.command(first, &[0; 4096]).await;
        io.command(second, &[9; 4096]).await;
        assert_eq!(io.answer().await.code(), 0x285, "compare failure");
        assert_eq!(
            io.answer().await.code(),
            0x09,
            "aborted due to failed fused command"
        );
        assert_eq!(io.execute(read_sqe(3, 0, 1), &[]).await.ok().data, [7; 4096]);

        // Halves that do not meet.
        assert_eq!(io.execute(second, &[9; 4096]).await.code(), 0x0a);
        io.command(first, &[7; 4096]).await;
        io.command(read_sqe(3, 0, 1), &[]).await;
        assert_eq!(io.answer().await.code(), 0x0a);
        assert_eq!(io.answer().await.ok().cid, 3);
    });
}

#[test]
fn a_disabled_controller_takes_no_commands_and_a_reset_one_starts_again() {
    run(async {
        let (target, _) = memory_target().await;
        let identity = Identity::default();
        let (mut admin, answer) = identity.queue(target.address, 0, 0xffff).await;
        let cntlid = answer.ok().result as u16;
        let early = admin.execute(transport(sqe(0x06, 1, 0, &[1]), 4096), &[]).await;
        assert_eq!(early.code(), 0x0c, "not enabled");
        admin.execute(property_set_cc(1, 0x0046_0001), &[]).await.ok();
        let (mut io, answer) = identity.queue(target.address, 1, cntlid).await;
        answer.ok();
        admin.execute(property_set_cc(1, 0x0046_0000), &[]).await.ok();
        assert_eq!(io.receive().await, None, "a reset deletes I/O queues");
        assert_eq!(
            admin.execute(property_get(2, 0x1c, false), &[]).await.ok().result,
            0
        );
        admin.execute(property_set_cc(1, 0x0046_0001), &[]).await.ok();
        let (_io, answer) = identity.queue(target.address, 1, cntlid).await;
        answer.ok();
        admin.execute(property_set_cc(1, 0x0046_4001), &[]).await.ok();
        let csts = admin.execute(property_get(2, 0x1c, false), &[]).await.ok().result;
        assert_eq!(csts & 0xc, 0x8, "shutdown complete");
        drop(admin);
        until(|| target.registry.associations().is_empty()).await;
    });
}

#[test]
fn events_tell_of_access_states_and_namespaces() {
    run(async {
        let (target, _) = memory_target().await;
        let mut host = Identity::default().connect(target.address).await;
        let subnqn = nqn(SUBNQN);
        host.admin
            .execute(sqe(0x09, 1, 0, &[0x0b, 1 << 8 | 1 << 11]), &[])
            .await
            .ok();
        host.admin.command(sqe(0x0c, 20, 0, &[]), &[]).await;
        host.admin.command(sqe(0x0c, 21, 0, &[]), &[]).await;
        // An answer to this says that the requests have arrived.
        host.admin.execute(sqe(0x18, 2, 0, &[]), &[]).await.ok();

        let inaccessible = weft_proto::nvme::log::AnaState::INACCESSIBLE;
        target.registry.set_ana_state(&subnqn, 1, inaccessible).unwrap();
        let event = host.admin.answer().await.ok();
        assert_eq!((event.cid, event.result), (20, 0x000c_0302));
        assert_eq!(
            host.io.execute(read_sqe(1, 0, 1), &[]).await.status,
            0x302,
            "ANA inaccessible"
        );
        let log = transport(sqe(0x02, 3, 0, &[0x0c | 15 << 16]), 64);
        let ana = host.admin.execute(log, &[]).await.ok().data;
        assert_eq!(ana[32], 3);

        target.registry.remove_namespace(&subnqn, 1).unwrap();
        let event = host.admin.answer().await.ok();
        assert_eq!((event.cid, event.result), (21, 0x0004_0002));
        let log = transport(sqe(0x02, 3, 0, &[0x04 | 1023 << 16]), 4096);
        let changed = host.admin.execute(log, &[]).await.ok().data;
        assert_eq!(changed[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    });
}

#[test]
fn discovery_shows_a_host_what_is_for_it() {
    run(async {
        use weft_target::{AllowedHosts, DiscoveryRecord};
        let (target, _) = memory_target().await;
        let record = |name: &str, hosts| DiscoveryRecord {
            subnqn: nqn(name),
            address: "127.0.0.3:4420".parse().unwrap(),
            portid: 3,
            hosts,
        };
        let mine = AllowedHosts::List([nqn(HOSTNQN)].into());
        let nobodys = AllowedHosts::List(std::collections::BTreeSet::new());
        target
            .registry
            .set_discovery(vec![record("nqn.a", mine), record("nqn.b", nobodys)]);

        let identity = Identity {
            subnqn: "nqn.2014-08.org.nvmexpress.discovery",
            ..Identity::default()
        };
        let (mut admin, _) = identity.admin(target.address).await;
        let id = admin
            .execute(transport(sqe(0x06, 3, 0, &[1]), 4096), &[])
            .await
            .ok()
            .data;
        assert_eq!(id[111], 2, "CNTRLTYPE: discovery");
        let log = |cid, dwords: u32| transport(sqe(0x02, cid, 0, &[0x70 | (dwords - 1) << 16]), dwords * 4);
        let page = admin.execute(log(4, 512), &[]).await.ok().data;
        assert_eq!(page[..8], [1, 0, 0, 0, 0, 0, 0, 0], "GENCTR");
        assert_eq!(page[8..16], [1, 0, 0, 0, 0, 0, 0, 0], "NUMREC");
        assert_eq!(page[1024..1028], [3, 1, 2, 2], "TCP, IPv4, NVM subsystem");
        assert_eq!(&page[1024 + 256..1024 + 262], b"nqn.a\0");
        assert_eq!(&page[1024 + 512..1024 + 522], b"127.0.0.3 ");

        admin.execute(sqe(0x09, 5, 0, &[0x0b, 1 << 31]), &[]).await.ok();
        admin.command(sqe(0x0c, 6, 0, &[]), &[]).await;
        admin.execute(sqe(0x18, 7, 0, &[]), &[]).await.ok();
        target.registry.set_discovery(Vec::new());
        assert_eq!(admin.answer().await.ok().result, 0x0070_f002);
    });
}

#[test]
fn a_host_that_may_not_or_may_no_longer_is_kept_out() {
    run(async {
        use weft_target::AllowedHosts;
        let (target, _) = memory_target().await;
        let mut host = Identity::default().connect(target.address).await;
        let others = AllowedHosts::List([nqn("nqn.2026-01.io.weft:somebody")].into());
        target.registry.set_hosts(&nqn(SUBNQN), others).unwrap();
        assert_eq!(host.io.receive().await, None);
        assert_eq!(host.admin.receive().await, None);
        let (_, answer) = Identity::default().queue(target.address, 0, 0xffff).await;
        assert_eq!(answer.code(), 0x184, "connect invalid host");
    });
}

/// A host that has read for twice its keep-alive timeout; `None` if it was given up, or told to send a command again.
async fn after_traffic(target: &Target, kato: Duration) -> Option<Host> {
    let identity = Identity {
        kato_ms: kato.as_millis() as u32,
        ..Identity::default()
    };
    let mut host = identity.connect(target.address).await;
    for _ in 0..10 {
        tokio::time::sleep(kato / 5).await;
        host.io.command(read_sqe(1, 0, 1), &[]).await;
        let answer = host.io.answer_if_any().await?;
        if answer.code() == ANA_TRANSITION {
            return None;
        }
        answer.ok();
    }
    Some(host)
}

#[test]
fn silence_past_the_keep_alive_timeout_ends_the_association_and_traffic_does_not() {
    run(async {
        let (target, _) = memory_target().await;
        // A machine that stands still for as long is silence too: the next host has more time.
        for kato in [1, 4, 16].map(Duration::from_secs) {
            if let Some(mut host) = after_traffic(&target, kato).await {
                assert_eq!(host.admin.receive().await, None);
                assert_eq!(host.io.receive().await, None);
                assert!(target.registry.associations().is_empty());
                return;
            }
        }
        panic!("a host is given up although it sends commands");
    });
}

#[test]
fn a_shutdown_answers_what_is_in_execution_and_closes() {
    run(async {
        use weft_block::faulty::{Fault, Faulty, Ops};
        use weft_block::memory::MemoryDrive;
        let (device, faults) = Faulty::wrap(MemoryDrive::device(8 << 20));
        let (target, _) = target(device).await;
        let mut host = Identity::default().connect(target.address).await;
        // One connection that has not even begun.
        let mut silent = Raw::open(target.address).await;
        faults.next(Ops::READ, 1, Fault::Hold);
        host.io.command(read_sqe(1, 0, 1), &[]).await;
        faults.wait_held(1).await;
        target.registry.shutdown();
        assert_eq!(silent.receive().await, None);
        assert!(!target.serving.is_finished());
        faults.release();
        assert_eq!(host.io.answer().await.ok().data.len(), 4096);
        assert_eq!(host.io.receive().await, None);
        assert_eq!(host.admin.receive().await, None);
        target.serving.await.unwrap().unwrap();
    });
}

#[test]
fn a_host_that_takes_no_answers_and_is_given_up_does_not_keep_its_next_connect_waiting() {
    run(async {
        let (target, _) = memory_target().await;
        let identity = Identity {
            kato_ms: 200,
            ..Identity::default()
        };
        let mut host = identity.connect(target.address).await;
        // Far more answers than the socket's buffers hold, and nobody reads them.
        for cid in 0..32 {
            host.io.command(read_sqe(cid, 0, 256), &[]).await;
        }
        until(|| target.registry.associations().is_empty()).await;
        let mut next = identity.connect(target.address).await;
        next.io.execute(read_sqe(1, 0, 1), &[]).await.ok();
    });
}
