//! Doorbells in a page that the monitor maps into the guest.

use super::guest::{CC, DATA_AT, Guest, entry, set};
use super::work::pattern;
use super::{Server, assert_serves};

/// OACS, in the data of Identify Controller.
const OACS: u64 = 256;

fn identify(guest: &mut Guest, admin: &mut super::guest::Queue) -> u16 {
    let mut identify = entry(0x06, 0);
    set(&mut identify, 24, &DATA_AT.to_le_bytes());
    set(&mut identify, 40, &[1]);
    assert_eq!(guest.execute(admin, identify).status, 0);
    let oacs = guest.peek(DATA_AT + OACS, 2);
    u16::from_le_bytes([oacs[0], oacs[1]])
}

#[test]
fn the_page_of_doorbells_may_be_mapped_where_it_is_asked_for() {
    let server = Server::mapped();
    let mut guest = Guest::start(&server.path());
    // Told how much room it takes, then the whole, and the file with it.
    let (short, files) = guest.region_info(32);
    assert_eq!((short.len(), short[0], files.len()), (32, 64, 0));
    assert_eq!(short[4], 0x07, "QEMU refuses a capability without a place");
    let (info, files) = guest.region_info(64);
    assert_eq!((info.len(), files.len()), (64, 1));
    assert_eq!(info[4], 0x0f, "read, write, map, and it has capabilities");
    assert_eq!(rustix::fs::fstat(&files[0]).unwrap().st_size, 0x2000);

    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let (info, files) = guest.region_info(64);
    assert_eq!((info.len(), info[4], files.len()), (32, 0x03, 0), "trapped");
}

#[test]
fn commands_of_all_queues_are_rung_without_a_message() {
    let server = Server::mapped();
    let mut guest = Guest::start(&server.path());
    guest.map_doorbells();
    let mut admin = guest.enable();
    assert_eq!(
        identify(&mut guest, &mut admin) & 1 << 8,
        0,
        "no doorbells elsewhere"
    );
    let mut config = entry(0x7c, 0);
    set(&mut config, 24, &DATA_AT.to_le_bytes());
    set(&mut config, 32, &(DATA_AT + 4096).to_le_bytes());
    assert_eq!(guest.execute(&mut admin, config).status, 0x01, "Invalid Opcode");
    let mut queues = [guest.create(&mut admin, 1, 8), guest.create(&mut admin, 2, 8)];
    let written = pattern(3, 4096);
    guest.poke(DATA_AT, &written);
    // More than once around both queues.
    for round in 0..40u64 {
        let queue = &mut queues[round as usize % 2];
        let write = guest.transfer(0x01, round, 1, DATA_AT);
        assert_eq!(guest.execute(queue, write).status, 0);
        let read = guest.transfer(0x02, round, 1, DATA_AT + 8192);
        assert_eq!(guest.execute(queue, read).status, 0);
        assert!(guest.peek(DATA_AT + 8192, 4096) == written);
        guest.poke(DATA_AT + 8192, &[0; 4096]);
    }
}

#[test]
fn what_was_rung_for_a_queue_of_a_former_life_is_forgotten() {
    let server = Server::mapped();
    let mut guest = Guest::start(&server.path());
    guest.map_doorbells();
    for _ in 0..3 {
        let mut admin = guest.enable();
        let mut queue = guest.create(&mut admin, 1, 16);
        for lba in 0..5 {
            let read = guest.transfer(0x02, lba, 1, DATA_AT);
            assert_eq!(guest.execute(&mut queue, read).status, 0);
        }
        // The queue goes and comes again: the same tail as before is a new one.
        let mut delete = entry(0x00, 0);
        set(&mut delete, 40, &[1]);
        assert_eq!(guest.execute(&mut admin, delete).status, 0);
        delete[0] = 0x04;
        assert_eq!(guest.execute(&mut admin, delete).status, 0);
        let mut queue = guest.create(&mut admin, 1, 16);
        for lba in 0..4 {
            let read = guest.transfer(0x02, lba, 1, DATA_AT);
            guest.place(&mut queue, read);
        }
        let last = guest.transfer(0x02, 4, 1, DATA_AT);
        let cid = guest.submit(&mut queue, last);
        assert_eq!(guest.wait(&mut queue, cid).status, 0);
        guest.set_register(CC, 0);
        guest.wait_status(1, 0);
    }
}

#[test]
fn doorbells_that_cannot_be_are_events_and_nothing_else() {
    let server = Server::mapped();
    let mut guest = Guest::start(&server.path());
    guest.map_doorbells();
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 16);
    let event = guest.submit(&mut admin, entry(0x0c, 0));
    // Past the end, of a queue that does not exist, and the head of what was never completed.
    guest.set_doorbell(0x1000 + 5 * 8, 7);
    guest.set_doorbell(0x100c, 9);
    guest.set_doorbell(0x1008, 16);
    // Invalid Doorbell Write Value, of the error log.
    assert_eq!(guest.wait(&mut admin, event).result, 0x01_0100);
    guest.set_doorbell(0x100c, 0);
    for lba in 0..20 {
        let read = guest.transfer(0x02, lba, 1, DATA_AT);
        assert_eq!(guest.execute(&mut queue, read).status, 0);
    }
    drop(guest);
    assert_serves(&server.path());
}
