//! A function without a socket, for who feeds it by hand: the fuzzer. Not for anything else, and not documented.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Instant;

use rustix::io::Errno;

use super::Attachment;
use super::function::Function;
use super::message::Request;
use super::server::connect;
use crate::registry::Registry;

/// See the module.
pub struct Unconnected {
    function: Function,
}

impl Unconnected {
    /// As for a client that has just connected.
    ///
    /// # Errors
    /// The registry does not present the subsystem to this host.
    pub fn new(registry: &Rc<Registry>, attachment: &Attachment) -> Result<Self, &'static str> {
        let (_, function) = connect(registry, attachment)?;
        Ok(Self { function })
    }

    /// Does what a message asks for.
    ///
    /// # Errors
    /// What the client would be told.
    pub fn handle(
        &mut self,
        request: Request<'_>,
        files: Vec<OwnedFd>,
        now: Instant,
    ) -> Result<Vec<u8>, Errno> {
        self.function
            .handle(request, files, now)
            .map(|answer| answer.body)
    }

    /// One turn; answers whether there was something to do.
    pub fn turn(&mut self, now: Instant) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        let rung = self.function.poll_doorbells();
        self.function.poll(&mut context, now) | rung
    }

    /// As before a thread sleeps.
    pub fn sleep(&mut self) -> bool {
        self.function.prepare_to_sleep()
    }
}
