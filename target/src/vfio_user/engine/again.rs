//! Commands that are tried again: a guest has one path only, and must not see an error for what passes.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use weft_proto::nvme::sqe::Sqe;

use crate::controller::{Controller, IoRequest};
use crate::io::{self as nvm, Finished};
use crate::metrics;
use crate::request::{Completion, Pieces, Request};

/// Between two attempts of a command that the volume cannot serve at the moment.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Whether a command can be served later: its volume moves, or is being taken over. A host with several paths would try
/// another; this one has no other, and must not see an error for what passes.
pub(super) fn is_passing(completion: &Completion) -> bool {
    completion.status.is_path_related()
}

/// A command that may have to be tried again.
pub(super) struct Again {
    sqe: Sqe,
    /// Mostly one piece, or none: kept for every command, and hardly ever needed.
    data: Pieces,
    answer_bytes_max: u32,
    arrived: Instant,
    fused: bool,
    controller: Rc<Controller>,
    life: Rc<Cell<u64>>,
    born: u64,
}

impl Again {
    pub(super) fn new(request: &IoRequest, controller: Rc<Controller>, life: Rc<Cell<u64>>) -> Self {
        Self {
            sqe: request.sqe,
            data: request.data.iter().cloned().collect(),
            answer_bytes_max: request.answer_bytes_max,
            arrived: request.arrived,
            fused: request.fused_first.is_some(),
            controller,
            born: life.get(),
            life,
        }
    }

    /// Tries until the command is served or fails for good, or nobody waits for it any more.
    pub(super) async fn until_served(self, mut finished: Finished) -> Finished {
        // A fused pair is not repeated: whether its first half was executed is not known here.
        while !self.fused && is_passing(&finished.completion) && !self.is_over() {
            tokio::time::sleep(RETRY_PAUSE).await;
            if self.is_over() {
                break;
            }
            metrics::command_started();
            let again = Request::new(
                &self.sqe,
                self.data.to_vec(),
                self.answer_bytes_max,
                self.controller.admit(&self.sqe),
                self.arrived,
            );
            let attempt = nvm::start(again, None);
            finished = match attempt {
                nvm::Execution::Finished(completion) => completion.into(),
                nvm::Execution::Running(running) => running.await,
            };
        }
        finished
    }

    fn is_over(&self) -> bool {
        self.life.get() != self.born || self.controller.is_closed_for(0)
    }
}
