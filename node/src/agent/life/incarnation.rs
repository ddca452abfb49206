//! One incarnation, from the command that starts it to its end.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::FutureExt as _;
use rand::RngCore as _;
use tokio::sync::{mpsc, watch};
use weft_incarnation::fabric::Identity;
use weft_metadata::client::{ClientError, MetadataClient};
use weft_metadata::state::Command;
use weft_metadata::state::command::{NewNode, Refusal, Reply};
use weft_metadata::state::map::ClusterMap;
use weft_proto::id::{HostId, IncarnationId, NodeId};

use super::Plane;
use crate::agent::member::{self, Member, MemberOptions};
use crate::agent::thread::DataThread;

/// What is needed to start an incarnation.
pub(super) struct MemberStart {
    pub(super) client: MetadataClient,
    pub(super) node: NodeId,
    pub(super) new_node: NewNode,
    pub(super) reservations_dir: std::path::PathBuf,
    pub(super) guest_record: std::path::PathBuf,
    pub(super) nvme: TcpListener,
    pub(super) discovery: TcpListener,
    pub(super) engine: crate::config::EngineConfig,
    pub(super) fabric: crate::config::FabricConfig,
    pub(super) data: DataThread<Plane>,
}

impl MemberStart {
    /// Starts the incarnation and returns when it has been fenced or declared dead.
    pub(super) async fn run(self, fenced: &mpsc::Sender<()>) -> anyhow::Result<()> {
        let map = insist(|| self.client.map())
            .await
            .context("read the cluster map")?;
        let cluster = map.cluster.clone().context("the cluster has no identity")?;
        let node = map.nodes.get(&self.node).with_context(|| {
            format!(
                "node {} is not in the cluster any more; remove its data_dir and join again",
                self.node
            )
        })?;
        ensure!(
            node.name == self.new_node.name,
            "name = \"{}\": this data_dir belongs to node {}; a node keeps its name",
            self.new_node.name,
            node.name
        );
        let update = Command::UpdateNode {
            node: self.node,
            update: self.new_node.clone(),
        };
        insist(|| self.client.propose(update.clone()))
            .await
            .context("update the node's addresses")?;
        let mut host_id = [0; 16];
        rand::rng().fill_bytes(&mut host_id);
        let (host_id, key) = (HostId(host_id), member::draw_key());
        let start = Command::StartIncarnation {
            node: self.node,
            host_id,
            key: key.0,
        };
        let reply = insist(|| self.client.propose(start.clone()))
            .await
            .context("start an incarnation")?;
        let Reply::Incarnation(incarnation) = reply else {
            bail!("a new incarnation was answered with something else than its number");
        };
        tracing::info!(node = %self.node, %incarnation, "incarnation started");
        let mut live = self.client.session(incarnation);
        let map = self.follow_map(incarnation).await?;
        let options = MemberOptions {
            cluster,
            node: self.node,
            node_name: self.new_node.name,
            identity: Identity {
                incarnation,
                host_id,
                key,
            },
            client: self.client.clone(),
            map,
            reservations_dir: self.reservations_dir,
            guest_record: self.guest_record,
            nvme: self.nvme,
            discovery: self.discovery,
            engine: self.engine,
            keep_alive: Duration::from_millis(self.fabric.keep_alive_ms),
        };
        let fenced = fenced.clone();
        self.data
            .call(move |plane| {
                async move {
                    let drives = plane.drives.borrow().clone();
                    let member = Member::start(options, &drives).await?;
                    *plane.member.borrow_mut() = Some(member.clone());
                    tokio::task::spawn_local(async move {
                        member.wait_until_fenced().await;
                        let _ = fenced.send(()).await;
                    });
                    anyhow::Ok(())
                }
                .boxed_local()
            })
            .await??;
        // The session ends only with the runtime.
        let _ = live.wait_for(|live| !*live).await;
        tracing::error!(%incarnation, "the leader has declared this incarnation dead");
        Ok(())
    }

    /// The cluster map from the version that knows this incarnation on.
    async fn follow_map(
        &self,
        incarnation: IncarnationId,
    ) -> anyhow::Result<watch::Receiver<Arc<ClusterMap>>> {
        let mut map = self.client.watch();
        map.wait_for(|map| map.incarnations.contains_key(&incarnation))
            .await
            .context("follow the cluster map")?;
        Ok(map)
    }
}

/// Asks until there is an answer.
async fn insist<T, F>(ask: impl Fn() -> F) -> Result<T, Refusal>
where
    F: Future<Output = Result<T, ClientError>>,
{
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(ClientError::Refused(refusal)) => return Err(refusal),
            Err(error) => {
                tracing::debug!(%error, "no answer from the metadata service yet");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
