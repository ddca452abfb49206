//! How an agent reaches drives: the one of its server past the target's reservations, others by calls to their agents. The
//! reservations and what is done with them are the real ones, at either end.

use std::rc::Rc;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_block::Device;
use weft_incarnation::fabric::{FENCE_TIMEOUT, Reach};
use weft_incarnation::local_drive::LocalReach;
use weft_volume::seams::{FenceError, Fencing, ReservationKey, ReservationReport};
use weft_volume::testing::answer::answer;

use super::drive::RemoteDrive;

type Fenced<T> = LocalBoxFuture<'static, Result<T, FenceError>>;

/// The drive of the agent's own server.
pub(super) struct OwnDrive {
    pub(super) reach: LocalReach,
    /// Says who sends, for those who watch.
    pub(super) device: Device,
}

impl Reach for OwnDrive {
    fn device(&self) -> Option<Device> {
        Some(Rc::clone(&self.device))
    }
}

impl Fencing for OwnDrive {
    fn register(&self, own: ReservationKey) -> Fenced<()> {
        self.reach.register(own)
    }

    fn report(&self) -> Fenced<ReservationReport> {
        self.reach.report()
    }

    fn preempt_and_abort(&self, own: ReservationKey, victim: ReservationKey) -> Fenced<()> {
        self.reach.preempt_and_abort(own, victim)
    }
}

/// The drive of another server.
pub(super) struct OtherDrive(pub(super) Rc<RemoteDrive>);

impl OtherDrive {
    /// Has `command` done where the drive is. The answer says whether it is reached.
    fn there<T: 'static>(&self, command: impl FnOnce(LocalReach) -> Fenced<T> + 'static) -> Fenced<T> {
        let drive = Rc::clone(&self.0);
        let (giver, answered) = answer();
        self.0.process.spawn(async move {
            let called = drive.call(FENCE_TIMEOUT, |namespace, host| {
                async move {
                    match namespace {
                        Some(namespace) => command(LocalReach { namespace, host }).await,
                        None => Err(FenceError::Unreachable),
                    }
                }
                .boxed_local()
            });
            let called = called.await;
            drive.set_connected(!matches!(called, Err(_) | Ok(Err(FenceError::Unreachable))));
            giver.give(called.unwrap_or(Err(FenceError::Unreachable)));
        });
        answered.boxed_local()
    }
}

impl Reach for OtherDrive {
    fn device(&self) -> Option<Device> {
        self.0.is_connected().then(|| Rc::clone(&self.0) as Device)
    }
}

impl Fencing for OtherDrive {
    fn register(&self, own: ReservationKey) -> Fenced<()> {
        self.there(move |reach| reach.register(own))
    }

    fn report(&self) -> Fenced<ReservationReport> {
        self.there(|reach| reach.report())
    }

    fn preempt_and_abort(&self, own: ReservationKey, victim: ReservationKey) -> Fenced<()> {
        self.there(move |reach| reach.preempt_and_abort(own, victim))
    }
}
