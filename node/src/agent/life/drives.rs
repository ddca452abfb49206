//! Drives that come into the cluster: this server's, labelled, and third parties', proven.

use anyhow::Context as _;
use futures_util::FutureExt as _;
use weft_metadata::client::{ClientError, MetadataClient};
use weft_metadata::state::Command;
use weft_metadata::state::command::{NewDrive, Refusal, Reply};
use weft_metadata::state::map::{Cluster, DriveHome};
use weft_proto::grpc::admin::{AddDriveReply, AddDriveRequest, add_drive_request};
use weft_proto::id::{DriveId, NodeId};

use super::{LEADER_WAIT, Life};
use crate::agent::local_drives::{self, LocalDrive};
use crate::agent::third_party;
use crate::config::DriveConfig;
use crate::view;

/// Registrants that a drive of ours takes: many more than a cluster has agents.
const REGISTRANTS_MAX: u32 = 1000;

impl Life {
    pub(super) async fn check_drives(&self, cluster: &Cluster, force: bool) -> anyhow::Result<()> {
        let cluster = cluster.clone();
        self.data
            .call(move |plane| {
                async move {
                    plane
                        .drives
                        .borrow()
                        .iter()
                        .try_for_each(|drive| drive.check(&cluster, force))
                }
                .boxed_local()
            })
            .await?
    }

    /// Labels the drives of the configuration and adds them to the cluster.
    pub(super) async fn label_drives(
        &self,
        client: &MetadataClient,
        cluster: &Cluster,
        node: NodeId,
        force: bool,
    ) -> anyhow::Result<()> {
        let count = self
            .data
            .call(|plane| async move { plane.drives.borrow().len() }.boxed_local())
            .await?;
        for index in 0..count {
            self.label_drive(client, cluster, node, index, force).await?;
        }
        Ok(())
    }

    async fn label_drive(
        &self,
        client: &MetadataClient,
        cluster: &Cluster,
        node: NodeId,
        index: usize,
        force: bool,
    ) -> anyhow::Result<(DriveId, String, u64)> {
        let label_cluster = cluster.clone();
        let (label, name, bytes) = self
            .data
            .call(move |plane| {
                async move {
                    let drive = plane.drives.borrow()[index].clone();
                    let label = drive.label(&label_cluster, force).await?;
                    anyhow::Ok((label, local_drives::metric_name(&drive.path), drive.bytes()))
                }
                .boxed_local()
            })
            .await??;
        let name = format!("{}-{name}", self.config.name);
        let new = NewDrive {
            uuid: label.drive_uuid,
            name: name.clone(),
            home: DriveHome::Node(node),
            class: label.class,
            start_mib: label.chunks_start_mib,
            end_mib: label.chunks_end_mib,
            registrants_max: REGISTRANTS_MAX,
        };
        let drive = add_drive(client, new).await?;
        self.data
            .call(move |plane| {
                async move {
                    let local = plane.drives.borrow()[index].clone();
                    local.record_id(drive, node).await
                }
                .boxed_local()
            })
            .await??;
        Ok((drive, name, bytes))
    }

    pub(super) async fn add_drive(&self, request: AddDriveRequest) -> anyhow::Result<AddDriveReply> {
        let membership = self
            .membership
            .as_ref()
            .context("this agent belongs to no cluster yet")?;
        let client = &membership.client;
        let map = client.map().await.context("read the cluster map")?;
        let cluster = map
            .cluster
            .clone()
            .context("the cluster has not been initialised")?;
        let (drive, name, bytes) = match request.source.context("no drive was named")? {
            add_drive_request::Source::Path(path) => {
                let config = DriveConfig {
                    path: path.into(),
                    class: request.class,
                };
                self.add_local_drive(client, &cluster, membership.identity.node, config, request.force)
                    .await?
            }
            add_drive_request::Source::ThirdParty(source) => {
                let host = weft_initiator::HostIdentity {
                    hostnqn: view::node_host_nqn(cluster.id, &self.config.name),
                    hostid: cluster.fencing_host_id,
                };
                let class = request.class;
                let prove_cluster = cluster.clone();
                let force = request.force;
                let new = self
                    .data
                    .call(move |_| {
                        async move { third_party::prove(source, &class, &prove_cluster, host, force).await }
                            .boxed_local()
                    })
                    .await??;
                let (name, bytes) = (new.name.clone(), u64::from(new.end_mib - new.start_mib) << 20);
                (add_drive(client, new).await?, name, bytes)
            }
        };
        Ok(AddDriveReply {
            drive_id: drive.0,
            name,
            bytes,
        })
    }

    async fn add_local_drive(
        &self,
        client: &MetadataClient,
        cluster: &Cluster,
        node: NodeId,
        config: DriveConfig,
        force: bool,
    ) -> anyhow::Result<(DriveId, String, u64)> {
        let check = cluster.clone();
        let index = self
            .data
            .call(move |plane| {
                async move {
                    let drive = LocalDrive::open(&config).await?;
                    drive.check(&check, force)?;
                    plane.drives.borrow_mut().push(drive);
                    anyhow::Ok(plane.drives.borrow().len() - 1)
                }
                .boxed_local()
            })
            .await??;
        let added = self.label_drive(client, cluster, node, index, force).await?;
        let wanted = added.0;
        self.data
            .call(move |plane| {
                async move {
                    let member = plane
                        .member
                        .borrow()
                        .clone()
                        .context("the agent is starting; try again")?;
                    let local = plane.drives.borrow()[index].clone();
                    member.wait_for_drive(wanted).await;
                    member.add_local(local).await
                }
                .boxed_local()
            })
            .await??;
        Ok(added)
    }
}

/// Adds a drive, or finds the one that was added before a crash.
async fn add_drive(client: &MetadataClient, new: NewDrive) -> anyhow::Result<DriveId> {
    match client
        .clone()
        .with_deadline(LEADER_WAIT)
        .propose(Command::AddDrive(new))
        .await
    {
        Ok(Reply::Drive(drive)) | Err(ClientError::Refused(Refusal::DriveKnown { drive, .. })) => Ok(drive),
        Ok(other) => anyhow::bail!("a new drive was answered with {other:?}"),
        Err(error) => Err(error.into()),
    }
}
