//! What guests and their monitors should not do, and what they get for it.

use std::os::fd::AsFd;

use crate::guest::{
    BAR0, CC, CC_ENABLE, CONFIG, DATA_AT, Guest, MEMORY_BYTES, MIB, Queue, entry, memory_file, set,
};
use crate::{Server, assert_serves};

const DATA_TRANSFER_ERROR: u16 = 0x004;
const INVALID_FIELD: u16 = 0x002;
const PRP_OFFSET_INVALID: u16 = 0x013;

fn started(server: &Server) -> (Guest, Queue, Queue) {
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let queue = guest.create(&mut admin, 1, 64);
    (guest, admin, queue)
}

#[test]
fn addresses_outside_of_memory_are_a_transfer_error() {
    let server = Server::start();
    let (mut guest, mut admin, mut queue) = started(&server);
    for at in [MEMORY_BYTES, MEMORY_BYTES - 4096 + 4096, !4095, 1 << 52] {
        for opcode in [0x01, 0x02] {
            let mut command = guest.transfer(opcode, 0, 1, 0);
            set(&mut command, 24, &at.to_le_bytes());
            assert_eq!(
                guest.execute(&mut queue, command).status,
                DATA_TRANSFER_ERROR,
                "{at:#x}"
            );
        }
        let mut list = guest.transfer(0x02, 0, 16, DATA_AT);
        set(&mut list, 32, &at.to_le_bytes());
        assert_eq!(guest.execute(&mut queue, list).status, DATA_TRANSFER_ERROR);
        let mut identify = entry(0x06, 1);
        set(&mut identify, 24, &at.to_le_bytes());
        assert_eq!(guest.execute(&mut admin, identify).status, DATA_TRANSFER_ERROR);
    }
    // A transfer whose second page is the first behind the end.
    let mut write = guest.transfer(0x01, 0, 2, MEMORY_BYTES - 4096);
    set(&mut write, 32, &MEMORY_BYTES.to_le_bytes());
    assert_eq!(guest.execute(&mut queue, write).status, DATA_TRANSFER_ERROR);
}

#[test]
fn lists_of_pages_that_lead_nowhere_end() {
    let server = Server::start();
    let (mut guest, _, mut queue) = started(&server);
    // A list that begins at the last entry of a page, which is then where the list goes on: to itself.
    let at = 8 * MIB + 4096 - 8;
    guest.poke(at, &at.to_le_bytes());
    let mut read = guest.transfer(0x02, 0, 16, DATA_AT);
    set(&mut read, 32, &at.to_le_bytes());
    assert_eq!(guest.execute(&mut queue, read).status, PRP_OFFSET_INVALID);
    // A whole page whose last entry leads to its own begin: the transfer ends before it matters.
    guest.poke(at, &(8 * MIB).to_le_bytes());
    for entry in 0..511u64 {
        guest.poke(8 * MIB + entry * 8, &DATA_AT.to_le_bytes());
    }
    let mut read = guest.transfer(0x02, 0, 256, DATA_AT);
    set(&mut read, 32, &(8 * MIB).to_le_bytes());
    assert_eq!(guest.execute(&mut queue, read).status, 0);
    for (first, second) in [
        (DATA_AT + 2, DATA_AT),
        (DATA_AT, DATA_AT + 512),
        (DATA_AT, DATA_AT + 4),
    ] {
        let mut read = guest.transfer(0x02, 0, 2, DATA_AT);
        set(&mut read, 24, &first.to_le_bytes());
        set(&mut read, 32, &second.to_le_bytes());
        assert_eq!(guest.execute(&mut queue, read).status, PRP_OFFSET_INVALID);
    }
}

#[test]
fn scattered_lists_that_lead_nowhere_end() {
    let server = Server::start();
    let (mut guest, _, mut queue) = started(&server);
    let descriptor = |at: u64, bytes: u32, kind: u8| {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&at.to_le_bytes());
        descriptor[8..12].copy_from_slice(&bytes.to_le_bytes());
        descriptor[15] = kind;
        descriptor
    };
    let mut read = |first: [u8; 16]| {
        let mut read = guest.transfer(0x02, 0, 2, 0);
        read[1] = 0b01 << 6;
        set(&mut read, 24, &first);
        guest.poke(8 * MIB, &descriptor(8 * MIB, 16, 0x20));
        guest.execute(&mut queue, read).status
    };
    assert_eq!(
        read(descriptor(8 * MIB, 16, 0x20)),
        0x00e,
        "a segment that leads to itself"
    );
    assert_eq!(
        read(descriptor(8 * MIB, 16, 0x30)),
        0x00d,
        "a segment in a last segment"
    );
    assert_eq!(read(descriptor(8 * MIB, 0, 0x20)), 0x00d);
    assert_eq!(read(descriptor(8 * MIB, 24, 0x20)), 0x00d);
    assert_eq!(read(descriptor(8 * MIB, 0xffff_fff0, 0x30)), 0x00e);
    assert_eq!(read(descriptor(DATA_AT, 4096, 0x00)), 0x00f, "too short");
    assert_eq!(read(descriptor(DATA_AT, 8192, 0x5a)), 0x011, "of fabrics");
    assert_eq!(
        read(descriptor(MEMORY_BYTES - 4096, 8192, 0x00)),
        DATA_TRANSFER_ERROR
    );
    assert_eq!(read(descriptor(u64::MAX - 100, 8192, 0x00)), DATA_TRANSFER_ERROR);
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    let server = Server::start();
    let (mut guest, mut admin, mut queue) = started(&server);
    let mut both = guest.transfer(0x02, 0, 1, DATA_AT);
    both[1] = 0b11 << 6;
    assert_eq!(guest.execute(&mut queue, both).status, INVALID_FIELD);
    let mut fused = guest.transfer(0x02, 0, 1, DATA_AT);
    fused[1] = 0b11;
    assert_eq!(guest.execute(&mut queue, fused).status, INVALID_FIELD);
    let mut long = guest.transfer(0x02, 0, 1, DATA_AT);
    set(&mut long, 48, &u16::MAX.to_le_bytes());
    assert_eq!(guest.execute(&mut queue, long).status, INVALID_FIELD, "past MDTS");
    let past = guest.transfer(0x02, 1 << 40, 1, DATA_AT);
    assert_eq!(guest.execute(&mut queue, past).status, 0x080);
    let mut nowhere = guest.transfer(0x02, 0, 1, DATA_AT);
    set(&mut nowhere, 4, &99u32.to_le_bytes());
    assert_eq!(guest.execute(&mut queue, nowhere).status, 0x00b);
    assert_eq!(guest.execute(&mut queue, entry(0x7f, 1)).status, 0x001);
    assert_eq!(
        guest.execute(&mut admin, entry(0x7f, 1)).status,
        0x001,
        "no fabrics here"
    );
    assert_eq!(guest.execute(&mut admin, entry(0xff, 1)).status, 0x001);
    let mut sgl = entry(0x06, 1);
    sgl[1] = 0b01 << 6;
    assert_eq!(guest.execute(&mut admin, sgl).status, INVALID_FIELD);
}

#[test]
fn doorbells_that_cannot_be_are_told_and_ignored() {
    let server = Server::start();
    let (mut guest, mut admin, mut queue) = started(&server);
    let mut event = |guest: &mut Guest, ring: &dyn Fn(&mut Guest)| {
        let cid = guest.submit(&mut admin, entry(0x0c, 0));
        ring(guest);
        let result = guest.wait(&mut admin, cid).result;
        // Reading the error log lets the next event through.
        let mut log = entry(0x02, 0xffff_ffff);
        set(&mut log, 24, &DATA_AT.to_le_bytes());
        set(&mut log, 40, &(15u32 << 16 | 0x01).to_le_bytes());
        assert_eq!(guest.execute(&mut admin, log).status, 0);
        result
    };
    let value = event(&mut guest, &|guest| guest.set_register(0x1008, 64));
    assert_eq!(value, 0x0001_0100, "a tail past the end of its queue");
    let value = event(&mut guest, &|guest| guest.set_register(0x100c, 5));
    assert_eq!(value, 0x0001_0100, "a head past what was completed");
    let register = event(&mut guest, &|guest| guest.set_register(0x1010, 1));
    assert_eq!(register, 0x0001_0000, "of a queue that is not there");
    let register = event(&mut guest, &|guest| guest.set_register(0x1ff8, 1));
    assert_eq!(register, 0x0001_0000, "of a queue that could not be");
    let read = guest.transfer(0x02, 0, 1, DATA_AT);
    assert_eq!(guest.execute(&mut queue, read).status, 0);
}

#[test]
fn queues_of_no_size_or_nowhere_are_refused() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let mut create = |opcode: u8, qid: u16, size_z: u16, at: u64, dword11: u32| {
        let mut create = entry(opcode, 0);
        set(&mut create, 24, &at.to_le_bytes());
        set(&mut create, 40, &qid.to_le_bytes());
        set(&mut create, 42, &size_z.to_le_bytes());
        set(&mut create, 44, &dword11.to_le_bytes());
        guest.execute(&mut admin, create).status
    };
    assert_eq!(create(0x05, 1, 0, MIB, 1), 0x102);
    assert_eq!(create(0x05, 1, 1024, MIB, 1), 0x102);
    assert_eq!(create(0x05, 0, 15, MIB, 1), 0x101);
    assert_eq!(create(0x05, 0xffff, 15, MIB, 1), 0x101);
    assert_eq!(create(0x05, 1, 15, MIB, 0), INVALID_FIELD, "not contiguous");
    assert_eq!(create(0x05, 1, 15, MIB + 16, 1), PRP_OFFSET_INVALID);
    assert_eq!(create(0x05, 1, 15, MEMORY_BYTES, 1), DATA_TRANSFER_ERROR);
    assert_eq!(create(0x05, 1, 1023, MEMORY_BYTES - 8192, 1), DATA_TRANSFER_ERROR);
    assert_eq!(
        create(0x05, 1, 15, MIB, 200 << 16 | 0b11),
        0x108,
        "no such vector"
    );
    assert_eq!(
        create(0x01, 1, 15, MIB, 1 << 16 | 1),
        0x100,
        "no such completion queue"
    );
    assert_eq!(create(0x05, 1, 15, MIB, 1), 0);
    assert_eq!(create(0x05, 1, 15, MIB, 1), 0x101, "there already");
    assert_eq!(
        create(0x01, 1, 15, MIB, 1),
        0x100,
        "the admin queue's is for it alone"
    );
}

#[test]
fn admin_queues_of_no_size_or_nowhere_are_fatal_until_the_next_reset() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    guest.set_register(CC, CC_ENABLE);
    guest.wait_status(2, 2);
    guest.set_register(CC, 0);
    guest.wait_status(3, 0);
    guest.set_register(0x24, 31 << 16 | 31);
    guest.write(BAR0, 0x28, &(1u64 << 50).to_le_bytes());
    guest.write(BAR0, 0x30, &(1u64 << 51).to_le_bytes());
    guest.set_register(CC, CC_ENABLE);
    guest.wait_status(1, 1);
    guest.set_register(0x1000, 1);
    guest.wait_status(2, 2);
    guest.set_register(CC, 0);
    guest.wait_status(3, 0);
    guest.set_register(CC, CC_ENABLE | 3 << 7);
    guest.wait_status(2, 2);
    guest.set_register(CC, 0);
    guest.enable();
}

#[test]
fn memory_that_goes_while_queues_are_live_is_an_error_or_fatal_and_nothing_else() {
    let server = Server::start();
    let mut guest = Guest::connect(&server.path());
    guest.negotiate().unwrap();
    guest.write(CONFIG, 4, &[6, 4]);
    // Queues below, data above, as two ranges.
    guest.map(0, DATA_AT, 0).unwrap();
    guest.map(DATA_AT, MIB, DATA_AT).unwrap();
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 16);
    let read = guest.transfer(0x02, 0, 1, DATA_AT);
    assert_eq!(guest.execute(&mut queue, read).status, 0);
    guest.unmap(DATA_AT, MIB).unwrap();
    let read = guest.transfer(0x02, 0, 1, DATA_AT);
    assert_eq!(guest.execute(&mut queue, read).status, DATA_TRANSFER_ERROR);
    guest.map(DATA_AT, MIB, DATA_AT).unwrap();
    let read = guest.transfer(0x02, 0, 1, DATA_AT);
    assert_eq!(guest.execute(&mut queue, read).status, 0);
    // What goes and comes back, cut otherwise, is met by no command.
    for _ in 0..50 {
        let read = guest.transfer(0x02, 0, 1, DATA_AT);
        guest.place(&mut queue, read);
        guest.unmap(DATA_AT, MIB).unwrap();
        guest.ring(&queue);
        guest.map(DATA_AT, MIB / 2, DATA_AT).unwrap();
        guest.map(DATA_AT + MIB / 2, MIB / 2, DATA_AT + MIB / 2).unwrap();
        let last = guest.transfer(0x02, 0, 1, DATA_AT);
        assert_eq!(guest.execute(&mut queue, last).status, 0);
        guest.unmap(DATA_AT, MIB).unwrap();
        guest.map(DATA_AT, MIB, DATA_AT).unwrap();
    }
    guest.unmap(0, DATA_AT).unwrap();
    guest.set_register(0x1008, (queue.tail + 1) % 16);
    guest.wait_status(2, 2);
    guest.map(0, DATA_AT, 0).unwrap();
    guest.set_register(CC, 0);
    guest.enable();
}

#[test]
fn memory_that_is_read_only_is_not_written() {
    let server = Server::start();
    let (mut guest, mut admin, mut queue) = started(&server);
    let rom = memory_file(MIB);
    guest.map_file(1 << 30, MIB, 0, 1, &rom).unwrap();
    let mut write = guest.transfer(0x01, 0, 1, 0);
    set(&mut write, 24, &(1u64 << 30).to_le_bytes());
    assert_eq!(guest.execute(&mut queue, write).status, 0);
    let mut read = write;
    read[0] = 0x02;
    assert_eq!(guest.execute(&mut queue, read).status, DATA_TRANSFER_ERROR);
    let mut create = entry(0x05, 0);
    set(&mut create, 24, &(1u64 << 30).to_le_bytes());
    set(&mut create, 40, &(15u32 << 16 | 2).to_le_bytes());
    create[44] = 1;
    assert_eq!(guest.execute(&mut admin, create).status, DATA_TRANSFER_ERROR);
}

#[test]
fn memory_that_is_not_what_it_says_is_refused() {
    let server = Server::start();
    let (mut guest, _, mut queue) = started(&server);
    let short = memory_file(4096);
    assert_eq!(guest.map_file(1 << 30, MIB, 0, 3, &short), Err(22));
    assert_eq!(guest.map_file(1 << 30, 4096, 4096, 3, &short), Err(22));
    assert_eq!(guest.map_file(1 << 30, 4096, !4095, 3, &short), Err(22));
    assert_eq!(guest.map_file(!4095, 8192, 0, 3, &memory_file(8192)), Err(22));
    assert_eq!(guest.map(MIB, MIB, 0), Err(17), "there is memory");
    assert_eq!(guest.unmap(0, MIB), Err(22), "a part of a range");
    assert_eq!(guest.unmap(1 << 40, MIB), Err(2));
    // A file that cannot be sealed is cut short after it was mapped.
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::empty()).unwrap();
    rustix::fs::ftruncate(&file, MIB).unwrap();
    guest.map_file(1 << 30, MIB, 0, 3, &file).unwrap();
    rustix::fs::ftruncate(&file, 0).unwrap();
    let mut write = guest.transfer(0x01, 0, 1, 0);
    set(&mut write, 24, &(1u64 << 30).to_le_bytes());
    assert_eq!(guest.execute(&mut queue, write).status, DATA_TRANSFER_ERROR);
}

#[test]
fn a_second_client_is_turned_away_and_the_next_one_served() {
    let server = Server::start();
    let (mut guest, _, mut queue) = started(&server);
    let mut second = Guest::connect(&server.path());
    assert!(second.is_hung_up());
    let read = guest.transfer(0x02, 0, 1, DATA_AT);
    assert_eq!(guest.execute(&mut queue, read).status, 0);
    drop(guest);
    assert_serves(&server.path());
}

#[test]
fn a_client_that_does_not_keep_to_the_protocol_loses_its_connection_and_nobody_else() {
    let server = Server::start();
    let header = |command: u8, size: u32, flags: u8| {
        let mut header = vec![1, 0, command, 0];
        header.extend(size.to_le_bytes());
        header.extend([flags, 0, 0, 0, 0, 0, 0, 0]);
        header
    };
    let fresh = || loop {
        // One at a time: the server has to notice that the last one left.
        let mut guest = Guest::connect(&server.path());
        if guest.try_request(1, b"\0\0\x01\0", &[]).is_some() {
            return guest;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    for message in [
        header(9, 15, 0),
        header(9, u32::MAX, 0),
        header(9, 16, 1),
        header(9, 16, 7),
    ] {
        let mut guest = fresh();
        guest.send(&message, &[]);
        assert!(guest.is_hung_up());
    }
    let mut guest = fresh();
    assert_eq!(
        guest.request(99, &[0; 100], &[]),
        Err(38),
        "unknown, its body skipped"
    );
    assert_eq!(guest.request(9, &[0; 3], &[]), Err(22));
    assert_eq!(guest.request(5, &[0xff; 32], &[]), Err(22));
    assert_eq!(guest.try_write(BAR0, u64::MAX, &[0; 4]), Err(22));
    assert_eq!(guest.try_write(CONFIG, 4094, &[0; 4]), Err(22));
    assert_eq!(guest.try_write(3, 0, &[0; 4]), Err(22));
    let pipe = std::io::pipe().unwrap();
    let body = [20u32, 0x24, 2, 0, 1].map(u32::to_le_bytes).concat();
    assert_eq!(guest.request(8, &body, &[pipe.1.as_fd()]), Err(22), "no eventfd");
    drop(guest);
    let mut older = fresh();
    let reply = older.request(1, b"\0\0\0\0", &[]).unwrap();
    assert_eq!(reply[..4], [0, 0, 0, 0], "not more than was proposed");
    drop(older);
    let mut silent = Guest::connect(&server.path());
    if silent.try_request(9, &[0; 16], &[]).is_some() {
        panic!("served before the version was agreed on");
    }
    assert_serves(&server.path());
}
