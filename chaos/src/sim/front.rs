//! What a node does with a host's command: its own engine answers, or the owner's, to which it forwards.
//!
//! A counterpart of `node/src/agent/route.rs`: a command goes on at once or is refused after a while, and is forwarded to
//! owners only, so it cannot loop.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_block::{BlockDevice as _, BlockError, Durability};
use weft_proto::id::{NodeId, VolumeId};
use weft_proto::units::LbaRange;

use super::agent::{Agent, Serving};
use super::host::COMMAND_LIMIT;

/// How long a command waits for an owner to be known and reached.
const ROUTE_WAIT: Duration = Duration::from_millis(50);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// A host's command.
#[derive(Clone, Debug)]
pub(super) struct HostCommand {
    pub(super) volume: VolumeId,
    pub(super) range: LbaRange,
    pub(super) what: What,
}

#[derive(Clone, Debug)]
pub(super) enum What {
    Read,
    Write(Bytes),
    Zeroes,
    Deallocate,
}

impl Agent {
    /// Serves a host.
    pub(super) async fn serve_host(self: Rc<Self>, command: HostCommand) -> Result<Bytes, BlockError> {
        let deadline = self.process.now().after(ROUTE_WAIT);
        loop {
            if self.engines.borrow().contains_key(&command.volume) {
                match Rc::clone(&self).serve_owned(command.clone()).await {
                    Err(BlockError::NotReady) => {}
                    answer => return answer,
                }
            } else if let Some(owner) = self.owner_elsewhere(command.volume) {
                let forwarded = command.clone();
                let called = self.cluster.call(&self.process, owner, COMMAND_LIMIT, |agent| {
                    async move { agent.serve_owned(forwarded).await }.boxed_local()
                });
                match called.await {
                    Ok(Err(BlockError::NotReady)) => {}
                    Ok(answer) => return answer,
                    // The connection broke: the command may have been done.
                    Err(_) => return Err(BlockError::Unknown),
                }
            }
            if self.process.now() >= deadline {
                return Err(BlockError::NotReady);
            }
            self.process.sleep(LOOK_AGAIN).await;
        }
    }

    pub(super) fn owner_elsewhere(&self, volume: VolumeId) -> Option<NodeId> {
        let owner = self.map.borrow().volumes.get(&volume)?.phase.owner()?;
        (owner.node != self.node).then_some(owner.node)
    }

    /// Serves a command with an engine of this agent, or not at all.
    async fn serve_owned(self: Rc<Self>, command: HostCommand) -> Result<Bytes, BlockError> {
        match self.begin_owned(&command) {
            Some(serving) => serving.await,
            None => Err(BlockError::NotReady),
        }
    }

    /// Gives a command to an engine of this agent, if there is one. It has its place in the order of commands then.
    pub(super) fn begin_owned(
        &self,
        command: &HostCommand,
    ) -> Option<LocalBoxFuture<'static, Result<Bytes, BlockError>>> {
        let Serving {
            owner,
            engine,
            silence,
        } = self.engines.borrow().get(&command.volume).cloned()?;
        if silence.holds() {
            return None;
        }
        let (volume, range) = (command.volume, command.range);
        let (cluster, process) = (Rc::clone(&self.cluster), self.process.id);
        let mut written = None;
        let done = match &command.what {
            What::Read => {
                let read = engine.read(range);
                let reading = async move {
                    let bytes = silence.or_answer(read).await?;
                    cluster.watch.answered(volume, owner, process);
                    Ok(bytes)
                };
                return Some(reading.boxed_local());
            }
            What::Write(bytes) => {
                written = Some(bytes.clone());
                engine.write(range.start, vec![bytes.clone()], Durability::Durable)
            }
            What::Zeroes => engine.write_zeroes(range, false, Durability::Durable),
            What::Deallocate => engine.deallocate(vec![range]),
        };
        let changing = async move {
            silence.or_answer(done).await?;
            if let Some(bytes) = written {
                cluster.watch.acknowledged(volume, range, &bytes);
            }
            cluster.watch.answered(volume, owner, process);
            Ok(Bytes::new())
        };
        Some(changing.boxed_local())
    }
}
