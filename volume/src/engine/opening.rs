//! An engine that is not open yet: for whoever may have to end the opening, and then has to know what was sent.

use std::rc::Rc;
use std::time::Duration;

use weft_proto::band::{ChunkAddress, EpochGrant};

use super::{Core, Engine, Life};
use crate::error::VolumeError;
use crate::seams::Seams;
use crate::settings::{Identity, Settings};

/// What [`Engine::open`] opens. The future of [`Self::open`] may be dropped at any time; what it had sent until then is known here.
#[derive(Clone)]
pub struct Opening {
    engine: Engine,
    grant: EpochGrant,
}

impl Opening {
    /// Of this volume, which nothing is sent of yet.
    #[must_use]
    pub fn new(seams: Seams, settings: Settings, identity: Identity, grant: EpochGrant) -> Self {
        let core = Core::new(seams, settings, identity, &grant);
        Self {
            engine: Engine(core),
            grant,
        }
    }

    /// See [`Engine::open`]. Once.
    pub async fn open(&self) -> Result<Engine, VolumeError> {
        let core: &Rc<Core> = &self.engine.0;
        match core.open(self.grant.clone()).await {
            Ok(()) => {
                core.life.set(Life::Serving);
                core.changed.notify();
                core.start_background();
                Ok(self.engine.clone())
            }
            Err(error) => {
                core.stop(Life::Closed);
                Err(error)
            }
        }
    }

    /// [`Engine::abort_and_drain`] of an engine that may be open or not, when nobody polls [`Self::open`] any more.
    pub async fn abort_and_drain(&self, limit: Duration) -> Vec<ChunkAddress> {
        self.engine.abort_and_drain(limit).await
    }
}
