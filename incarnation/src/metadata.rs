//! The metadata service as an incarnation asks it.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_metadata::client::{ClientError, MetadataClient};
use weft_metadata::propose::BandRequest;
use weft_metadata::state::command::ReplacementRequest;
use weft_metadata::state::{Command, Refusal, Reply};
use weft_proto::band::{Band, EpochGrant, Replacement};
use weft_proto::id::VolumeId;
use weft_volume::seams::Env;

use crate::time::sleep;

/// Between two attempts while there is no leader.
pub(crate) const RETRY: Duration = Duration::from_millis(50);

/// An answer of the service. Without one the outcome is unknown, and the same question may be asked again.
pub type Answer<T> = LocalBoxFuture<'static, Result<T, ClientError>>;

/// See the module.
pub trait Metadata {
    /// Proposes a command; answers once it is committed and applied.
    fn propose(&self, command: Command) -> Answer<Reply>;
    /// Asks for fresh bands, wherever placement puts them. May answer fewer than asked for.
    fn grant_bands(&self, request: BandRequest) -> Answer<Vec<Band>>;
    /// Asks for a fresh chunk to rebuild a column into, wherever placement puts it.
    fn grant_replacement(&self, request: ReplacementRequest) -> Answer<Replacement>;
    /// What the owner of the volume's new epoch needs; `None` unless the volume is recovering.
    fn epoch_grant(&self, volume: VolumeId) -> Answer<Option<EpochGrant>>;
    /// The volume's bands as they are now; `None` if there is no such volume.
    fn bands(&self, volume: VolumeId) -> Answer<Option<Vec<Band>>>;
}

impl Metadata for MetadataClient {
    fn propose(&self, command: Command) -> Answer<Reply> {
        let client = self.clone();
        async move { Self::propose(&client, command).await }.boxed_local()
    }

    fn grant_bands(&self, request: BandRequest) -> Answer<Vec<Band>> {
        let client = self.clone();
        async move { Self::grant_bands(&client, request).await }.boxed_local()
    }

    fn grant_replacement(&self, request: ReplacementRequest) -> Answer<Replacement> {
        let client = self.clone();
        async move { Self::grant_replacement(&client, request).await }.boxed_local()
    }

    fn epoch_grant(&self, volume: VolumeId) -> Answer<Option<EpochGrant>> {
        let client = self.clone();
        async move { Self::epoch_grant(&client, volume).await }.boxed_local()
    }

    fn bands(&self, volume: VolumeId) -> Answer<Option<Vec<Band>>> {
        let client = self.clone();
        async move { Self::bands(&client, volume).await }.boxed_local()
    }
}

/// Proposes until there is an answer.
pub(crate) async fn insist(
    metadata: &dyn Metadata,
    env: &dyn Env,
    command: Command,
) -> Result<Reply, Refusal> {
    loop {
        match metadata.propose(command.clone()).await {
            Ok(reply) => return Ok(reply),
            Err(ClientError::Refused(refusal)) => return Err(refusal),
            Err(error) => {
                tracing::debug!(%error, "the metadata service does not answer, asking again");
                sleep(env, RETRY).await;
            }
        }
    }
}
