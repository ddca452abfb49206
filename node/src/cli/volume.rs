//! Volumes.

use rand::RngCore as _;
use serde_json::json;
use weft_metadata::state::command::NewVolume;
use weft_metadata::state::map::{Phase, Presentation, Volume};
use weft_metadata::state::{ClusterMap, Command as Proposal};
use weft_proto::band::Geometry;
use weft_proto::nqn::Nqn;

use super::cluster::not_found;
use super::output::{bytes, table};
use super::{Failure, Session};
use crate::args::VolumeCommand;

impl Session {
    pub(super) async fn volume(&self, command: VolumeCommand) -> Result<(), Failure> {
        let map = self.map().await?;
        match command {
            VolumeCommand::List => {
                let volumes: Vec<&Volume> = map.volumes.values().collect();
                self.output.rows(
                    &["VOLUME", "ID", "SIZE", "EC", "STATE", "OWNER", "EPOCH", "HOSTS"],
                    &volumes,
                    |volume| {
                        vec![
                            volume.name.clone(),
                            volume.id.to_string(),
                            bytes(volume.size_bytes),
                            volume.geometry.to_string(),
                            phase(volume).to_owned(),
                            owner_name(&map, volume),
                            volume.epoch.to_string(),
                            volume.allowed_hosts.len().to_string(),
                        ]
                    },
                );
            }
            VolumeCommand::Create {
                name,
                size,
                pool,
                ec,
                block_bytes,
            } => {
                self.propose(new_volume(&map, &name, &pool, size, ec, block_bytes, [])?)
                    .await?;
                self.output.one(&json!({ "volume": name, "bytes": size }), |_| {
                    format!("volume {name} created, {}; allow a host with `weft volume attach {name} --host NQN`\n", bytes(size))
                });
            }
            VolumeCommand::Show { name } => {
                let volume = named(&map, &name)?;
                self.output.one(volume, |volume| {
                    let mut text = table(
                        &["FIELD", "VALUE"],
                        &[
                            vec!["name".into(), volume.name.clone()],
                            vec!["id".into(), volume.id.to_string()],
                            vec!["size".into(), bytes(volume.size_bytes)],
                            vec!["erasure code".into(), volume.geometry.to_string()],
                            vec!["block size".into(), volume.block_bytes.to_string()],
                            vec!["subsystem".into(), volume.subnqn.to_string()],
                            vec!["state".into(), phase(volume).to_owned()],
                            vec!["owner".into(), owner_name(&map, volume)],
                            vec!["epoch".into(), volume.epoch.to_string()],
                            vec![
                                "hosts".into(),
                                volume
                                    .allowed_hosts
                                    .iter()
                                    .map(ToString::to_string)
                                    .collect::<Vec<_>>()
                                    .join(", "),
                            ],
                        ],
                    );
                    for line in connect_lines(&map, volume) {
                        text += &format!("{line}\n");
                    }
                    text
                });
            }
            VolumeCommand::Attach(args) => self.attach(&map, args).await?,
            VolumeCommand::Detach(args) => self.detach(&map, args).await?,
            VolumeCommand::Move { name, to } => {
                let volume = named(&map, &name)?;
                let node = map
                    .node_named(&to)
                    .ok_or_else(|| not_found("node", &to, map.nodes.values().map(|node| &node.name)))?;
                self.propose(Proposal::RequestMove {
                    volume: volume.id,
                    to: Some(node.id),
                })
                .await?;
                self.wait_for_owner(&name, node.id).await?;
                self.output.one(&json!({ "volume": name, "owner": to }), |_| {
                    format!("volume {name} is owned by {to}\n")
                });
            }
            VolumeCommand::Resize { name, size } => {
                let volume = named(&map, &name)?;
                self.propose(Proposal::ResizeVolume {
                    volume: volume.id,
                    size_bytes: size,
                })
                .await?;
                self.output.one(&json!({ "volume": name, "bytes": size }), |_| {
                    format!("volume {name} has {}\n", bytes(size))
                });
            }
            VolumeCommand::Delete { name, force } => {
                let volume = named(&map, &name)?;
                if !force && !volume.allowed_hosts.is_empty() {
                    return Err(Failure::Refused(format!(
                        "volume {name} serves {} hosts; detach them first, or delete it with --force",
                        volume.allowed_hosts.len()
                    )));
                }
                self.propose(Proposal::DeleteVolume { volume: volume.id }).await?;
                self.output
                    .one(&json!({ "volume": name }), |_| format!("volume {name} deleted\n"));
            }
        }
        Ok(())
    }

    /// Waits until `node` serves the volume.
    async fn wait_for_owner(&self, name: &str, node: weft_proto::id::NodeId) -> Result<(), Failure> {
        let deadline = tokio::time::Instant::now() + super::PATIENCE;
        loop {
            let map = self.map().await?;
            if matches!(named(&map, name)?.phase, Phase::Serving { owner } if owner.node == node) {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                return Err(Failure::Refused(format!(
                    "the move of {name} was requested but has not finished in {} s; it goes on, see `weft volume show {name}`",
                    super::PATIENCE.as_secs()
                )));
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
}

/// The proposal that creates a volume.
pub(crate) fn new_volume(
    map: &ClusterMap,
    name: &str,
    pool: &str,
    size_bytes: u64,
    geometry: Option<Geometry>,
    block_bytes: u32,
    allowed_hosts: impl IntoIterator<Item = Nqn>,
) -> Result<Proposal, Failure> {
    crate::config::check_name("volume name", name)?;
    let found = map
        .pool_named(pool)
        .ok_or_else(|| not_found("pool", pool, map.pools.values().map(|pool| &pool.name)))?;
    let cluster = map
        .cluster
        .as_ref()
        .ok_or_else(|| Failure::Refused("the cluster has not been initialised".into()))?;
    let mut uuid = [0; 16];
    rand::rng().fill_bytes(&mut uuid);
    Ok(Proposal::CreateVolume(NewVolume {
        name: name.to_owned(),
        pool: found.id,
        size_bytes,
        block_bytes,
        geometry,
        uuid,
        subnqn: crate::view::volume_subnqn(cluster.id, name),
        allowed_hosts: allowed_hosts.into_iter().collect(),
        presentation: Presentation::All,
        preferred: None,
    }))
}

pub(super) fn named<'a>(map: &'a ClusterMap, name: &str) -> Result<&'a Volume, Failure> {
    map.volume_named(name)
        .ok_or_else(|| not_found("volume", name, map.volumes.values().map(|volume| &volume.name)))
}

fn phase(volume: &Volume) -> &'static str {
    match volume.phase {
        Phase::Unowned => "unowned",
        Phase::Recovering { .. } => "recovering",
        Phase::Serving { .. } => "serving",
        Phase::Deleting { .. } => "deleting",
    }
}

fn owner_name(map: &ClusterMap, volume: &Volume) -> String {
    let owner = volume.phase.owner().and_then(|owner| map.nodes.get(&owner.node));
    owner.map_or_else(|| "-".to_owned(), |node| node.name.clone())
}

/// One `nvme connect` line for each path, the owner's first.
pub(crate) fn connect_lines(map: &ClusterMap, volume: &Volume) -> Vec<String> {
    let owner = volume.phase.owner().map(|owner| owner.node);
    let mut nodes: Vec<_> = map
        .nodes
        .values()
        .filter(|node| volume.presentation.includes(node.id))
        .collect();
    nodes.sort_by_key(|node| (Some(node.id) != owner, node.id));
    let line = |address: &str| {
        let (host, port) = address.rsplit_once(':').unwrap_or((address, "4420"));
        format!(
            "nvme connect -t tcp -a {host} -s {port} -n {} -k 5 -c 2 -l 60",
            volume.subnqn
        )
    };
    nodes.into_iter().map(|node| line(&node.nvme_address)).collect()
}
