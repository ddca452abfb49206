//! What well-behaved guests do.

use crate::guest::{BAR0, CC, CC_ENABLE, CONFIG, DATA_AT, Guest, MIB, entry, set};
use crate::{Server, namespace, nqn};
use weft_block::memory::MemoryDrive;

pub fn pattern(seed: u8, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| (at as u8).wrapping_mul(31) ^ seed ^ (at >> 8) as u8)
        .collect()
}

#[test]
fn a_guest_finds_a_controller_by_its_class_and_capabilities() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    assert_eq!(guest.read(CONFIG, 0x09, 3), [0x02, 0x08, 0x01]);
    // VFIO device info: reset and PCI, nine regions, five kinds of interrupts.
    let info = guest.request(4, &[0; 16], &[]).unwrap();
    assert_eq!(info, [16, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0]);
    let mut ask = [0; 32];
    ask[0] = 32;
    let bar = guest.request(5, &ask, &[]).unwrap();
    assert_eq!(bar[16..24], 0x4000u64.to_le_bytes());
    // 1024 entries, contiguous, doorbells 4 bytes apart, the NVM command set.
    let cap = u64::from_le_bytes(guest.read(BAR0, 0, 8).try_into().unwrap());
    assert_eq!(
        (cap & 0xffff, cap >> 16 & 1, cap >> 32 & 0xf, cap >> 37 & 1),
        (1023, 1, 0, 1)
    );
}

#[test]
fn a_guest_identifies_writes_flushes_and_reads() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let mut identify = entry(0x06, 0);
    set(&mut identify, 24, &DATA_AT.to_le_bytes());
    identify[40] = 1;
    assert_eq!(guest.execute(&mut admin, identify).status, 0);
    let data = guest.peek(DATA_AT, 4096);
    assert_eq!(&data[4..12], b"serial-1");
    assert!(guest.interrupts(0) > 0, "the admin queue interrupts by vector 0");
    let mut identify = entry(0x06, 1);
    set(&mut identify, 24, &DATA_AT.to_le_bytes());
    assert_eq!(guest.execute(&mut admin, identify).status, 0);
    assert_eq!(guest.peek(DATA_AT, 8), (64 * MIB / 4096).to_le_bytes());

    let mut queue = guest.create(&mut admin, 1, 64);
    // One page, two, a list, the longest, and one that begins inside of a page.
    for (blocks, offset) in [(1u16, 0u64), (2, 0), (16, 0), (256, 0), (3, 512), (255, 2048)] {
        let bytes = usize::from(blocks) * 4096;
        let written = pattern(blocks as u8, bytes);
        guest.poke(DATA_AT + offset, &written);
        let write = guest.transfer(0x01, 100, blocks, DATA_AT + offset);
        assert_eq!(guest.execute(&mut queue, write).status, 0);
        assert_eq!(guest.execute(&mut queue, entry(0x00, 1)).status, 0);
        let read = guest.transfer(0x02, 100, blocks, DATA_AT + 4 * MIB + offset);
        assert_eq!(guest.execute(&mut queue, read).status, 0);
        assert!(
            guest.peek(DATA_AT + 4 * MIB + offset, bytes) == written,
            "{blocks} blocks"
        );
    }
    assert!(guest.interrupts(1) > 0);
}

#[test]
fn data_may_be_scattered_by_sgls() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 64);
    let written = pattern(9, 8192);
    guest.poke(DATA_AT, &written);
    let write = guest.transfer(0x01, 7, 2, DATA_AT);
    assert_eq!(guest.execute(&mut queue, write).status, 0);
    // A data block in the entry itself.
    let mut read = guest.transfer(0x02, 7, 2, 0);
    read[1] = 0b01 << 6;
    set(&mut read, 24, &(DATA_AT + MIB).to_le_bytes());
    set(&mut read, 32, &[0, 0x20, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.execute(&mut queue, read).status, 0);
    assert!(guest.peek(DATA_AT + MIB, 8192) == written);
    // A segment of three blocks, and a last segment of one.
    let block = |at: u64, bytes: u32, kind: u8| {
        let mut descriptor = at.to_le_bytes().to_vec();
        descriptor.extend(bytes.to_le_bytes());
        descriptor.extend([0, 0, 0, kind]);
        descriptor
    };
    let first: Vec<u8> = [
        block(DATA_AT + 2 * MIB, 100, 0),
        block(DATA_AT + 3 * MIB, 5000, 0),
        block(8 * MIB + 4096, 16, 0x30),
    ]
    .concat();
    guest.poke(8 * MIB, &first);
    guest.poke(8 * MIB + 4096, &block(DATA_AT + 4 * MIB, 8192, 0));
    let mut read = guest.transfer(0x02, 7, 2, 0);
    read[1] = 0b01 << 6;
    set(&mut read, 24, &block(8 * MIB, 48, 0x20));
    assert_eq!(guest.execute(&mut queue, read).status, 0);
    let mut found = guest.peek(DATA_AT + 2 * MIB, 100);
    found.extend(guest.peek(DATA_AT + 3 * MIB, 5000));
    found.extend(guest.peek(DATA_AT + 4 * MIB, 8192 - 5100));
    assert!(found == written);
}

#[test]
fn queues_are_full_to_the_brim_and_go_around() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 8);
    for round in 0..20u64 {
        let cids: Vec<u16> = (0..7)
            .map(|at| {
                let read = guest.transfer(0x02, round * 7 + at, 1, DATA_AT + at * 4096);
                guest.place(&mut queue, read)
            })
            .collect();
        guest.ring(&queue);
        for cid in cids {
            assert_eq!(guest.wait(&mut queue, cid).status, 0);
        }
    }
}

#[test]
fn a_compare_and_write_is_one_step_and_fails_as_a_pair() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 16);
    guest.poke(DATA_AT, &[0; 4096]);
    guest.poke(DATA_AT + 4096, &[1; 4096]);
    let pair = |guest: &mut Guest, queue: &mut _| {
        let mut compare = guest.transfer(0x05, 3, 1, DATA_AT);
        compare[1] = 0b01;
        let mut write = guest.transfer(0x01, 3, 1, DATA_AT + 4096);
        write[1] = 0b10;
        let cids = (guest.place(queue, compare), guest.place(queue, write));
        guest.ring(queue);
        (guest.wait(queue, cids.0).status, guest.wait(queue, cids.1).status)
    };
    assert_eq!(pair(&mut guest, &mut queue), (0, 0));
    assert_eq!(
        pair(&mut guest, &mut queue),
        (0x285, 0x009),
        "compare failure, failed fused"
    );
    let mut alone = guest.transfer(0x01, 3, 1, DATA_AT);
    alone[1] = 0b10;
    assert_eq!(guest.execute(&mut queue, alone).status, 0x00a, "missing fused");
}

#[test]
fn doorbells_in_memory_need_no_register() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 16);
    let (doorbells, events) = (12 * MIB, 12 * MIB + 4096);
    let mut config = entry(0x7c, 0);
    set(&mut config, 24, &doorbells.to_le_bytes());
    set(&mut config, 32, &events.to_le_bytes());
    assert_eq!(guest.execute(&mut admin, config).status, 0);
    // As the Linux driver does it: the value first, then a look at whether the other side wants to be told.
    let mut told = 0;
    for round in 0..200u64 {
        let read = guest.transfer(0x02, round, 1, DATA_AT);
        let old = queue.tail as u16;
        let cid = guest.place(&mut queue, read);
        guest.poke(doorbells + 8, &queue.tail.to_le_bytes());
        let (event, new) = (guest.peek_u32(events + 8) as u16, queue.tail as u16);
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            told += 1;
            guest.ring(&queue);
        }
        let completion = loop {
            if let Some(completion) = guest.poll(&mut queue) {
                break completion;
            }
        };
        guest.poke(doorbells + 12, &queue.head().to_le_bytes());
        assert_eq!((completion.cid, completion.status), (cid, 0));
    }
    assert!(told > 0, "a controller that sleeps is woken");
}

#[test]
fn queues_are_deleted_in_order_and_made_again() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    guest.create(&mut admin, 1, 16);
    let delete = |opcode: u8, qid: u8| {
        let mut delete = entry(opcode, 0);
        delete[40] = qid;
        delete
    };
    assert_eq!(
        guest.execute(&mut admin, delete(0x04, 1)).status,
        0x10c,
        "its submission queue is there"
    );
    assert_eq!(guest.execute(&mut admin, delete(0x00, 1)).status, 0);
    assert_eq!(guest.execute(&mut admin, delete(0x00, 1)).status, 0x101);
    assert_eq!(guest.execute(&mut admin, delete(0x04, 1)).status, 0);
    assert_eq!(
        guest.execute(&mut admin, delete(0x04, 0)).status,
        0x101,
        "the admin queue stays"
    );
    let mut queue = guest.create(&mut admin, 1, 32);
    assert_eq!(guest.execute(&mut queue, entry(0x00, 1)).status, 0);
}

#[test]
fn a_guest_hears_of_a_namespace_that_comes() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let mut wants = entry(0x09, 0);
    wants[40] = 0x0b;
    set(&mut wants, 44, &(1u32 << 8).to_le_bytes());
    assert_eq!(guest.execute(&mut admin, wants).status, 0);
    let event = guest.submit(&mut admin, entry(0x0c, 0));
    server.on_registry(|registry| {
        let device = MemoryDrive::device(1 << 20);
        registry.add_namespace(&nqn(), namespace(2, device)).unwrap();
    });
    // Notice, namespace attribute changed, changed namespace list.
    assert_eq!(guest.wait(&mut admin, event).result, 0x0004_0002);
    let mut log = entry(0x02, 0xffff_ffff);
    set(&mut log, 24, &DATA_AT.to_le_bytes());
    set(&mut log, 40, &(1023u32 << 16 | 0x04).to_le_bytes());
    assert_eq!(guest.execute(&mut admin, log).status, 0);
    assert_eq!(guest.peek_u32(DATA_AT), 2);
}

#[test]
fn a_reset_of_any_kind_leaves_a_controller_as_new() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    for reset in 0..3 {
        let mut admin = guest.enable();
        let mut queue = guest.create(&mut admin, 1, 16);
        let read = guest.transfer(0x02, 0, 1, DATA_AT);
        assert_eq!(guest.execute(&mut queue, read).status, 0);
        match reset {
            0 => guest.set_register(CC, CC_ENABLE & !1),
            1 => {
                // Function level reset: Device Control of the PCI Express capability, bit 15.
                guest.write(CONFIG, 0x60, &[0x10, 0xa8]);
                assert_eq!(guest.read(CONFIG, 4, 2), [0, 0], "no bus master");
                guest.write(CONFIG, 4, &[6, 4]);
            }
            _ => {
                guest.request(13, &[], &[]).unwrap();
                guest.write(CONFIG, 4, &[6, 4]);
            }
        }
        guest.wait_status(1, 0);
        if reset > 0 {
            assert_eq!((guest.register(CC), guest.register(0x24)), (0, 0));
        }
    }
    let mut admin = guest.enable();
    guest.create(&mut admin, 1, 16);
}

#[test]
fn a_shutdown_is_reported_complete() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    guest.enable();
    guest.set_register(CC, CC_ENABLE | 1 << 14);
    guest.wait_status(0b1100, 0b1000);
    guest.set_register(CC, 0x0046_0000);
    guest.wait_status(0b1111, 0);
    guest.enable();
}

#[test]
fn a_line_interrupts_where_no_vectors_are_used() {
    let server = Server::start();
    let mut guest = Guest::connect(&server.path());
    guest.negotiate().unwrap();
    guest.map(0, crate::guest::MEMORY_BYTES, 0).unwrap();
    let line = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let connect = [20u32, 0x24, 0, 0, 1].map(u32::to_le_bytes).concat();
    guest
        .request(8, &connect, &[std::os::fd::AsFd::as_fd(&line)])
        .unwrap();
    guest.write(CONFIG, 4, &[6, 0]);
    let mut admin = guest.enable();
    assert_eq!(guest.execute(&mut admin, entry(0x18, 0)).status, 0);
    let mut count = [0; 8];
    rustix::io::read(&line, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    // Its head has been rung: the level is down, and unmasking signals nothing.
    let unmask = [20u32, 0x11, 0, 0, 1].map(u32::to_le_bytes).concat();
    guest.request(8, &unmask, &[]).unwrap();
    assert!(rustix::io::read(&line, &mut count).is_err());
}
