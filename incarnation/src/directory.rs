//! The engine's view of the metadata service. Asks until a leader answers; a lost answer is asked for again with the
//! same content, and the service recognises it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use weft_metadata::client::ClientError;
use weft_metadata::propose::BandRequest;
use weft_metadata::state::Command;
use weft_metadata::state::command::{Purpose, Refusal, ReplacementRequest, Reply};
use weft_proto::band::{Band, ChunkSize, Replacement, RootUpdate};
use weft_proto::id::{BandId, Epoch, StripeNumber, VolumeId};
use weft_volume::seams::{BandPurpose, Directory, DirectoryError, Env, Timestamp};

use crate::metadata::{Metadata, RETRY, insist};
use crate::time::sleep;

/// How long an owner waits for its registrations before it takes narrower bands, and for how long it then takes
/// them at once: a drive in service may be out of this node's reach. Guessed.
const PATIENCE: Duration = Duration::from_secs(2);
const IMPATIENCE: Duration = Duration::from_secs(10);

/// See the module.
pub struct RaftDirectory {
    metadata: Rc<dyn Metadata>,
    env: Rc<dyn Env>,
    /// Until when narrower bands are taken at once.
    impatient_until: Rc<Cell<Option<Timestamp>>>,
}

impl RaftDirectory {
    /// A directory over `metadata`.
    #[must_use]
    pub fn new(metadata: Rc<dyn Metadata>, env: Rc<dyn Env>) -> Self {
        Self {
            metadata,
            env,
            impatient_until: Rc::default(),
        }
    }

    fn propose(&self, command: Command) -> impl Future<Output = Result<Reply, DirectoryError>> + use<> {
        let reply = self.ask(command);
        async move { reply.await.map_err(directory_error) }
    }

    fn ask(&self, command: Command) -> impl Future<Output = Result<Reply, Refusal>> + use<> {
        let (metadata, env) = (Rc::clone(&self.metadata), Rc::clone(&self.env));
        async move { insist(&*metadata, &*env, command).await }
    }
}

impl Directory for RaftDirectory {
    fn grant_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        chunk_size: ChunkSize,
        count: u32,
        purpose: BandPurpose,
    ) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        let (metadata, env) = (Rc::clone(&self.metadata), Rc::clone(&self.env));
        let purpose = match purpose {
            BandPurpose::User => Purpose::User,
            BandPurpose::Internal => Purpose::Internal,
        };
        let impatient_until = Rc::clone(&self.impatient_until);
        let mut request = BandRequest {
            volume,
            epoch,
            request: self.env.random_u64(),
            purpose,
            chunk_size,
            count,
            patient: true,
        };
        async move {
            let asked = env.now();
            loop {
                request.patient = impatient_until.get().is_none_or(|until| env.now() >= until);
                match metadata.grant_bands(request).await {
                    Ok(bands) => return Ok(bands),
                    Err(ClientError::Refused(refusal @ Refusal::AwaitsRegistration { .. })) => {
                        if env.now() >= asked.after(PATIENCE) {
                            tracing::warn!(%volume, %refusal, "not waiting any longer");
                            impatient_until.set(Some(env.now().after(IMPATIENCE)));
                        } else {
                            sleep(&*env, RETRY).await;
                        }
                    }
                    // The state moved on between the proposal and its commit.
                    Err(ClientError::Refused(Refusal::ProposalConflict { .. })) => {
                        sleep(&*env, RETRY).await;
                    }
                    Err(ClientError::Refused(refusal)) => return Err(directory_error(refusal)),
                    Err(error) => {
                        tracing::debug!(%error, "no bands yet, asking again");
                        sleep(&*env, RETRY).await;
                    }
                }
            }
        }
        .boxed_local()
    }

    fn publish_root(&self, update: RootUpdate) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        let reply = self.propose(Command::PublishRoot { update });
        async move { root_version(reply.await?) }.boxed_local()
    }

    fn finish_takeover(
        &self,
        update: RootUpdate,
        recovered: Option<Epoch>,
        ended_at: StripeNumber,
    ) -> LocalBoxFuture<'static, Result<u64, DirectoryError>> {
        let reply = self.propose(Command::FinishTakeover {
            update,
            recovered,
            ended_at,
        });
        async move { root_version(reply.await?) }.boxed_local()
    }

    fn bands(&self, volume: VolumeId) -> LocalBoxFuture<'static, Result<Vec<Band>, DirectoryError>> {
        let (metadata, env) = (Rc::clone(&self.metadata), Rc::clone(&self.env));
        async move {
            loop {
                match metadata.bands(volume).await {
                    Ok(bands) => return bands.ok_or(DirectoryError::NoSuchVolume),
                    Err(ClientError::Refused(refusal)) => return Err(directory_error(refusal)),
                    Err(_) => sleep(&*env, RETRY).await,
                }
            }
        }
        .boxed_local()
    }

    fn grant_replacement(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        band: BandId,
        column: u8,
        version: u64,
    ) -> LocalBoxFuture<'static, Result<Replacement, DirectoryError>> {
        let (metadata, env) = (Rc::clone(&self.metadata), Rc::clone(&self.env));
        let request = ReplacementRequest {
            volume,
            epoch,
            request: self.env.random_u64(),
            band,
            column,
            version,
        };
        async move {
            loop {
                match metadata.grant_replacement(request).await {
                    Ok(replacement) => return Ok(replacement),
                    // The state moved on between the proposal and its commit.
                    Err(ClientError::Refused(Refusal::ProposalConflict { .. })) => {}
                    Err(ClientError::Refused(refusal)) => return Err(replacement_error(band, refusal)),
                    Err(error) => tracing::debug!(%error, "no chunk yet, asking again"),
                }
                sleep(&*env, RETRY).await;
            }
        }
        .boxed_local()
    }

    fn install_replacement(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        replacement: Replacement,
        settled: bool,
    ) -> LocalBoxFuture<'static, Result<Band, DirectoryError>> {
        let reply = self.ask(Command::InstallReplacement {
            volume,
            epoch,
            replacement,
            settled,
        });
        async move {
            match reply.await {
                Ok(Reply::Band(band)) => Ok(band),
                Ok(other) => {
                    tracing::error!(?other, "an installation was answered with something else");
                    Err(DirectoryError::Unavailable)
                }
                Err(refusal) => Err(replacement_error(replacement.band, refusal)),
            }
        }
        .boxed_local()
    }

    fn return_replacement(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        replacement: Replacement,
        settled: bool,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>> {
        let reply = self.propose(Command::ReturnReplacement {
            volume,
            epoch,
            replacement,
            settled,
        });
        async move { reply.await.map(drop) }.boxed_local()
    }

    fn return_bands(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        bands: Vec<BandId>,
    ) -> LocalBoxFuture<'static, Result<(), DirectoryError>> {
        let reply = self.propose(Command::ReturnBands { volume, epoch, bands });
        async move { reply.await.map(drop) }.boxed_local()
    }
}

fn root_version(reply: Reply) -> Result<u64, DirectoryError> {
    match reply {
        Reply::Root { version } => Ok(version),
        other => {
            tracing::error!(?other, "a root was answered with something else");
            Err(DirectoryError::Unavailable)
        }
    }
}

/// What a refusal means to the rebuild of a column of `band`.
fn replacement_error(band: BandId, refusal: Refusal) -> DirectoryError {
    match refusal {
        Refusal::BandConflict { .. } | Refusal::NoSuchBand(_) | Refusal::NoSuchReplacement { .. } => {
            DirectoryError::BandChanged { band }
        }
        other => directory_error(other),
    }
}

/// What a refusal means to an engine. One place; a refusal that only operators can get is unexpected here.
fn directory_error(refusal: Refusal) -> DirectoryError {
    match refusal {
        Refusal::Stale { epoch, current } => DirectoryError::Stale { epoch, current },
        Refusal::RootConflict { expected, current } => DirectoryError::RootConflict { expected, current },
        Refusal::NoSpace { .. } => DirectoryError::NoSpace,
        Refusal::TooFewDomains {
            available, needed, ..
        } => DirectoryError::TooFewDomains { available, needed },
        Refusal::NoSuchVolume(_) => DirectoryError::NoSuchVolume,
        other => {
            tracing::warn!(%other, "the metadata service refused an engine's command");
            DirectoryError::Unavailable
        }
    }
}
