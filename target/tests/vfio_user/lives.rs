//! What outlives what: commands and resets, doorbells in memory and in registers, guests and those beside them.

use std::cell::RefCell;
use std::rc::Rc;

use weft_block::Device;
use weft_block::faulty::{Fault, Faults, Faulty, Ops};
use weft_block::memory::MemoryDrive;
use weft_proto::id::HostId;
use weft_target::vfio_user::unconnected::Unconnected;
use weft_target::vfio_user::{Attachment, Doorbells};

use crate::guest::{CC, CC_ENABLE, CSTS, DATA_AT, Guest, MIB, Queue, entry, set};
use crate::{Server, namespace, nqn, registry};

thread_local! {
    /// Of the device of the server on this thread.
    static FAULTS: RefCell<Faults> = RefCell::default();
}

/// A server whose device meets the faults of its thread.
fn faulty() -> Server {
    Server::with_device(|| {
        let (device, faults): (Device, Faults) = Faulty::wrap(MemoryDrive::device(64 << 20));
        FAULTS.set(faults);
        device
    })
}

fn with_faults<T: Send + 'static>(server: &Server, job: impl FnOnce(&Faults) -> T + Send + 'static) -> T {
    let (answer, answered) = std::sync::mpsc::channel();
    server.on_registry(move |_| {
        answer.send(FAULTS.with_borrow(job)).unwrap();
    });
    answered.recv().unwrap()
}

#[test]
fn a_write_that_is_held_across_a_reset_keeps_the_next_life_waiting_and_is_not_answered_there() {
    for reset in ["controller", "function", "device"] {
        let server = faulty();
        let mut guest = Guest::start(&server.path());
        let mut admin = guest.enable();
        let mut queue = guest.create(&mut admin, 1, 16);
        with_faults(&server, |faults| faults.next(Ops::WRITE, 1, Fault::Hold));
        guest.poke(DATA_AT, &[1; 4096]);
        let old = guest.transfer(0x01, 5, 1, DATA_AT);
        guest.submit(&mut queue, old);
        while with_faults(&server, Faults::held) == 0 {
            std::thread::yield_now();
        }
        match reset {
            "controller" => guest.set_register(CC, CC_ENABLE & !1),
            "function" => guest.write(crate::guest::CONFIG, 0x60, &[0x10, 0xa8]),
            _ => drop(guest.request(13, &[], &[]).unwrap()),
        }
        assert_eq!(guest.register(CSTS) & 1, 0, "a reset is over at once");
        guest.write(crate::guest::CONFIG, 4, &[6, 4]);
        guest.poke(0x1000, &[0; 0x2000]);
        guest.set_register(0x24, 31 << 16 | 31);
        guest.write(crate::guest::BAR0, 0x28, &0x1000u64.to_le_bytes());
        guest.write(crate::guest::BAR0, 0x30, &0x2000u64.to_le_bytes());
        guest.set_register(CC, CC_ENABLE);
        // However often it is asked: the old write could still land on top of a new one.
        for _ in 0..50 {
            assert_eq!(guest.register(CSTS) & 1, 0, "{reset}");
        }
        with_faults(&server, Faults::release);
        guest.wait_status(1, 1);
        let mut admin = Queue::new(0, 32, 0x1000, 0x2000);
        let mut queue = guest.create(&mut admin, 1, 16);
        assert_eq!(guest.poll(&mut queue), None, "an answer of the old life");
        guest.poke(DATA_AT, &[2; 4096]);
        let new = guest.transfer(0x01, 5, 1, DATA_AT);
        assert_eq!(guest.execute(&mut queue, new).status, 0);
        let read = guest.transfer(0x02, 5, 1, DATA_AT + MIB);
        assert_eq!(guest.execute(&mut queue, read).status, 0);
        assert_eq!(guest.peek(DATA_AT + MIB, 1), [2]);
    }
}

#[test]
fn what_a_guest_asked_for_before_it_was_gone_is_not_begun_by_a_server_that_was_held_up() {
    let server = Server::start();
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 64);
    guest.poke(DATA_AT, &[1; 4096]);
    let (held, is_held) = std::sync::mpsc::channel();
    let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            server.on_registry(move |_| {
                held.send(()).unwrap();
                goes_on.recv().unwrap();
                // Long enough to be noticed, whoever was to be polled next.
                std::thread::sleep(std::time::Duration::from_millis(20));
            });
        });
        is_held.recv().unwrap();
        // More messages than are read in one turn.
        for at in 0..50u32 {
            let write = guest.transfer(0x01, 9, 1, DATA_AT);
            guest.place(&mut queue, write);
            let mut message = vec![1, 0, 10, 0];
            message.extend([16 + 20, 1 << 4, 0].map(u32::to_le_bytes).concat());
            message.extend(0x1008u64.to_le_bytes());
            message.extend([0, 4, at + 1].map(u32::to_le_bytes).concat());
            assert!(guest.send(&message, &[]));
        }
        drop(guest);
        go_on.send(()).unwrap();
    });
    let mut guest = Guest::start_next(&server.path());
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 64);
    let read = guest.transfer(0x02, 9, 1, DATA_AT);
    assert_eq!(guest.execute(&mut queue, read).status, 0);
    assert_eq!(guest.peek(DATA_AT, 4096), [0; 4096]);
}

/// Doorbells in memory, all of whose values are 0.
fn with_shadow(server: &Server) -> (Guest, Queue, u64) {
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let queue = guest.create(&mut admin, 1, 16);
    let doorbells = 12 * MIB;
    let mut config = entry(0x7c, 0);
    set(&mut config, 24, &doorbells.to_le_bytes());
    set(&mut config, 32, &(doorbells + 4096).to_le_bytes());
    assert_eq!(guest.execute(&mut admin, config).status, 0);
    (guest, queue, doorbells)
}

#[test]
fn a_host_that_goes_on_to_ring_registers_alone_is_heard() {
    let server = Server::start();
    let (mut guest, mut queue, _) = with_shadow(&server);
    // More than the queue has entries.
    for round in 0..40 {
        let read = guest.transfer(0x02, round, 1, DATA_AT);
        assert_eq!(guest.execute(&mut queue, read).status, 0, "round {round}");
    }
}

#[test]
fn a_register_that_says_less_than_memory_repeats_nothing() {
    let server = Server::start();
    let (mut guest, mut queue, doorbells) = with_shadow(&server);
    let place = |guest: &mut Guest, queue: &mut Queue| {
        let read = guest.transfer(0x02, 0, 1, DATA_AT);
        let cid = guest.place(queue, read);
        guest.poke(doorbells + 8, &queue.tail.to_le_bytes());
        cid
    };
    let first = place(&mut guest, &mut queue);
    let late = queue.tail;
    let second = place(&mut guest, &mut queue);
    guest.ring(&queue);
    for cid in [first, second] {
        assert_eq!(guest.wait(&mut queue, cid).status, 0);
    }
    // A ring of before the second command, underway for long.
    guest.set_register(0x1008, late);
    let third = place(&mut guest, &mut queue);
    guest.ring(&queue);
    assert_eq!(guest.wait(&mut queue, third).status, 0);
    assert_eq!(guest.poll(&mut queue), None, "what was done is not done again");
}

#[test]
fn a_guest_hears_of_a_namespace_that_goes_and_keeps_the_others() {
    let server = Server::start();
    server.on_registry(|registry| {
        let device = MemoryDrive::device(1 << 20);
        registry.add_namespace(&nqn(), namespace(2, device)).unwrap();
    });
    let mut guest = Guest::start(&server.path());
    let mut admin = guest.enable();
    let mut queue = guest.create(&mut admin, 1, 16);
    let mut other = guest.transfer(0x02, 0, 1, DATA_AT);
    set(&mut other, 4, &2u32.to_le_bytes());
    assert_eq!(guest.execute(&mut queue, other).status, 0);
    let mut wants = entry(0x09, 0);
    wants[40] = 0x0b;
    set(&mut wants, 44, &(1u32 << 8).to_le_bytes());
    assert_eq!(guest.execute(&mut admin, wants).status, 0);
    let event = guest.submit(&mut admin, entry(0x0c, 0));
    server.on_registry(|registry| registry.remove_namespace(&nqn(), 2).unwrap());
    assert_eq!(guest.wait(&mut admin, event).result, 0x0004_0002);
    assert_eq!(
        guest.execute(&mut queue, other).status,
        0x00b,
        "invalid namespace or format"
    );
    let read = guest.transfer(0x02, 0, 1, DATA_AT);
    assert_eq!(guest.execute(&mut queue, read).status, 0);
}

#[test]
fn a_guest_that_never_stops_asking_leaves_others_on_the_thread_their_turn() {
    let server = Server::start();
    let (guest, queue, doorbells) = with_shadow(&server);
    // Commands that the server answers on the spot, all around the queue, and a tail that moves on without end. Completions are
    // taken by moving on their head as well.
    for at in 0..queue.entries {
        guest.poke(queue.sq_at + u64::from(at) * 64, &entry(0x7f, 1));
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut tail = 0u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                tail = (tail + 5) % queue.entries;
                guest.poke(doorbells + 8, &tail.to_le_bytes());
                guest.poke(doorbells + 12, &tail.to_le_bytes());
            }
        });
        for _ in 0..20 {
            server.on_registry(|_| {});
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// Found by the fuzzer: half an hour of guests took all memory that it had.
#[test]
fn nothing_is_left_of_a_guest_that_was_dropped() {
    let registry = registry(MemoryDrive::device(1 << 20));
    let attachment = Attachment {
        subsystem: nqn(),
        hostnqn: "nqn.2014-08.org.nvmexpress:uuid:guest".parse().unwrap(),
        hostid: HostId([7; 16]),
        doorbells: Doorbells::Trapped,
    };
    drop(Unconnected::new(&registry, &attachment).unwrap());
    let weak = Rc::downgrade(&registry);
    drop(registry);
    assert!(weak.upgrade().is_none());
}
