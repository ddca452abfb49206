//! What a fabric makes of a drive that is slow, forgetful, taken over or forgotten, in simulated time.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_block::Device;
use weft_block::memory::MemoryDrive;
use weft_incarnation::fabric::{Fabric, Identity, Reach};
use weft_incarnation::published::Published;
use weft_proto::id::{DriveId, HostId, IncarnationId};
use weft_volume::seams::{Drives as _, FenceError, Fencing, Lease as _, ReservationKey, ReservationReport};
use weft_volume::testing::World;

const DRIVE: DriveId = DriveId(1);
const OWN: ReservationKey = ReservationKey(7);
const HOST: HostId = HostId([7; 16]);
const VICTIM: ReservationKey = ReservationKey(9);

/// A drive that does as it is told.
struct Told {
    registered: Cell<u32>,
    registrants: RefCell<Vec<(HostId, ReservationKey)>>,
    lost_reservation: Cell<bool>,
    /// Keeps its answers for later.
    hangs: Rc<Published<bool>>,
}

impl Default for Told {
    fn default() -> Self {
        Self {
            registered: Cell::new(0),
            registrants: RefCell::default(),
            lost_reservation: Cell::new(false),
            hangs: Published::new(false),
        }
    }
}

type Fenced<T> = LocalBoxFuture<'static, Result<T, FenceError>>;

impl Told {
    fn answer<T: 'static>(&self, value: Result<T, FenceError>) -> Fenced<T> {
        let mut hangs = self.hangs.subscribe();
        async move {
            while *hangs.borrow_and_update() {
                hangs.changed().await;
            }
            value
        }
        .boxed_local()
    }

    fn forget_everybody(&self) {
        self.registrants.borrow_mut().clear();
    }
}

/// The way to it.
struct Way(Rc<Told>);

impl Reach for Way {
    fn device(&self) -> Option<Device> {
        Some(MemoryDrive::new(4096, 16))
    }
}

impl Fencing for Way {
    fn register(&self, own: ReservationKey) -> Fenced<()> {
        self.0.registered.set(self.0.registered.get() + 1);
        self.0.registrants.borrow_mut().push((HOST, own));
        self.0.answer(Ok(()))
    }

    fn report(&self) -> Fenced<ReservationReport> {
        self.0.answer(Ok(ReservationReport {
            in_force: !self.0.lost_reservation.get(),
            persists: true,
            registrants: self.0.registrants.borrow().clone(),
        }))
    }

    fn preempt_and_abort(&self, _own: ReservationKey, victim: ReservationKey) -> Fenced<()> {
        let mut registrants = self.0.registrants.borrow_mut();
        let before = registrants.len();
        registrants.retain(|(_, key)| *key != victim);
        let found = registrants.len() < before;
        self.0
            .answer(found.then_some(()).ok_or(FenceError::Refused { status: 0x083 }))
    }
}

struct Scene {
    world: Rc<World>,
    life: IncarnationId,
    fabric: Rc<Fabric>,
    drive: Rc<Told>,
}

impl Scene {
    fn new() -> Self {
        let world = World::new(1);
        let life = world.incarnation();
        let identity = Identity {
            incarnation: IncarnationId(3),
            host_id: HOST,
            key: OWN,
        };
        let fabric = Fabric::new(identity, world.env(life));
        let drive = Rc::new(Told::default());
        fabric.add(DRIVE, Rc::new(Way(Rc::clone(&drive))));
        Self {
            world,
            life,
            fabric,
            drive,
        }
    }

    fn pass(&self, milliseconds: u64) {
        self.world
            .run_for(Duration::from_millis(milliseconds))
            .expect("the world goes on");
    }

    fn is_fenced(&self) -> bool {
        self.fabric.wait_until_fenced().now_or_never().is_some()
    }

    fn fence(&self) -> Result<(), FenceError> {
        let fabric = Rc::clone(&self.fabric);
        let fence = async move { fabric.fence(DRIVE, VICTIM).await };
        self.world.block_on(self.life, fence).expect("the world goes on")
    }
}

#[test]
fn an_incarnation_registers_once_and_keeps_its_lease_by_looking() {
    let scene = Scene::new();
    scene.pass(2000);
    assert_eq!(scene.drive.registered.get(), 1);
    assert!(scene.fabric.device(DRIVE).is_some());
    let confirmed = scene.fabric.confirmed_at(DRIVE).expect("the drive was looked at");
    assert!(scene.world.now() <= confirmed.after(Duration::from_millis(300)));
    scene.drive.hangs.replace(true);
    scene.pass(2000);
    let stale = scene.fabric.confirmed_at(DRIVE).expect("it was");
    assert!(
        stale <= confirmed.after(Duration::from_millis(300)),
        "no answer confirms nothing"
    );
    assert!(!scene.is_fenced());
}

#[test]
fn a_registration_that_is_missing_ends_the_incarnation_and_is_not_made_again() {
    let scene = Scene::new();
    scene.pass(500);
    scene.drive.forget_everybody();
    scene.pass(1000);
    assert!(scene.is_fenced());
    assert_eq!(scene.drive.registered.get(), 1);
}

#[test]
fn a_drive_that_lost_its_reservation_is_not_trusted_and_fences_nobody() {
    let scene = Scene::new();
    scene.pass(500);
    scene.drive.lost_reservation.set(true);
    scene.drive.forget_everybody();
    scene.pass(1000);
    assert!(!scene.is_fenced(), "it says nothing of who was fenced");
    assert!(scene.fabric.device(DRIVE).is_none());
    assert_eq!(scene.fence(), Err(FenceError::NotRegistered));
}

#[test]
fn what_a_forgotten_drive_answers_counts_for_nothing() {
    let scene = Scene::new();
    scene.pass(500);
    // A look at it is under way, and would not find the registration.
    scene.drive.forget_everybody();
    scene.drive.hangs.replace(true);
    scene.pass(350);
    scene.fabric.remove(DRIVE);
    scene.drive.hangs.replace(false);
    scene.pass(2000);
    assert!(!scene.is_fenced());
    assert!(scene.fabric.known().is_empty());
    let fabric = Rc::downgrade(&scene.fabric);
    drop(scene.fabric);
    scene
        .world
        .run_for(Duration::from_secs(1))
        .expect("the world goes on");
    assert!(fabric.upgrade().is_none(), "nobody attends the drive any more");
}

#[test]
fn a_key_that_is_not_found_is_fenced_where_the_reservation_is_in_force() {
    let scene = Scene::new();
    scene.pass(500);
    scene
        .drive
        .registrants
        .borrow_mut()
        .push((HostId([9; 16]), VICTIM));
    assert_eq!(scene.fence(), Ok(()));
    assert_eq!(scene.fence(), Ok(()), "fenced by somebody before");
    scene.drive.lost_reservation.set(true);
    assert_eq!(scene.fence(), Err(FenceError::NotInForce));
}

#[test]
fn a_drive_that_does_not_answer_within_half_a_second_is_not_fenced() {
    let scene = Scene::new();
    scene.pass(500);
    scene.drive.hangs.replace(true);
    let before = scene.world.now();
    assert_eq!(scene.fence(), Err(FenceError::Unreachable));
    assert_eq!(scene.world.now(), before.after(Duration::from_millis(500)));
}
