//! What a node does with a host's command: its own engine answers, or the owner's, to which it forwards.
//!
//! A counterpart of `node/src/agent/route.rs`: a command goes on at once or is refused after a while, and is forwarded to
//! owners only, so it cannot loop.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use weft_block::{BlockDevice as _, BlockError, Durability};
use weft_proto::id::{NodeId, VolumeId};
use weft_proto::units::LbaRange;

use super::agent::Agent;
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

    fn owner_elsewhere(&self, volume: VolumeId) -> Option<NodeId> {
        let owner = self.map.borrow().volumes.get(&volume)?.phase.owner()?;
        (owner.node != self.node).then_some(owner.node)
    }

    /// Serves a command with an engine of this agent, or not at all.
    async fn serve_owned(self: Rc<Self>, command: HostCommand) -> Result<Bytes, BlockError> {
        let serving = self.engines.borrow().get(&command.volume).cloned();
        let Some((owner, engine)) = serving else {
            return Err(BlockError::NotReady);
        };
        let range = command.range;
        let done = match command.what {
            What::Read => {
                let bytes = engine.read(range).await?;
                self.cluster
                    .watch
                    .answered(command.volume, owner, self.process.id);
                return Ok(bytes);
            }
            What::Write(bytes) => {
                let done = engine
                    .write(range.start, vec![bytes.clone()], Durability::Durable)
                    .await;
                if done.is_ok() {
                    self.cluster.watch.acknowledged(command.volume, range, &bytes);
                }
                done
            }
            What::Zeroes => engine.write_zeroes(range, false, Durability::Durable).await,
            What::Deallocate => engine.deallocate(vec![range]).await,
        };
        if done.is_ok() {
            self.cluster
                .watch
                .answered(command.volume, owner, self.process.id);
        }
        done.map(|()| Bytes::new())
    }
}
