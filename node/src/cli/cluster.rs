//! Cluster, nodes, drives, pools and hosts.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;
use weft_metadata::state::command::NewPool;
use weft_metadata::state::map::{DomainLevel, Drive, DriveClass, DriveHome, Phase};
use weft_metadata::state::{ClusterMap, Command as Proposal};
use weft_proto::grpc::admin::{
    AddDriveRequest, InitRequest, InspectRequest, JoinRequest, ThirdParty, add_drive_request,
};

use super::output::{bytes, table};
use super::{Failure, Session, admin, status_failure};
use crate::args::{DriveAddArgs, DriveCommand, HostCommand, NodeCommand, PoolCommand};

impl Session {
    pub(super) async fn init(
        &self,
        agent: &str,
        name: String,
        voters: u32,
        force: bool,
    ) -> Result<(), Failure> {
        crate::config::check_name("cluster name", &name)?;
        let request = InitRequest {
            cluster_name: name,
            voters,
            force,
        };
        let reply = admin(agent)
            .await?
            .init(request)
            .await
            .map_err(status_failure)?
            .into_inner();
        self.output.one(
            &json!({ "cluster": reply.cluster_id, "node": reply.node_id }),
            |_| {
                format!(
                    "cluster {} made; its first node is n{}\n",
                    reply.cluster_id, reply.node_id
                )
            },
        );
        Ok(())
    }

    pub(super) async fn join(&self, agent: &str, force: bool) -> Result<(), Failure> {
        let request = JoinRequest {
            members: self.addresses.clone(),
            force,
        };
        let reply = admin(agent)
            .await?
            .join(request)
            .await
            .map_err(status_failure)?
            .into_inner();
        self.output.one(
            &json!({ "cluster": reply.cluster_id, "node": reply.node_id }),
            |_| format!("joined cluster {} as node n{}\n", reply.cluster_id, reply.node_id),
        );
        Ok(())
    }

    pub(super) async fn status(&self) -> Result<(), Failure> {
        let status = self.cluster_status().await?;
        self.output.one(&status, |status| {
            let text = |key: &str| status[key].as_str().unwrap_or_default().to_owned();
            let number = |key: &str| status[key].as_u64().unwrap_or_default();
            let mut lines = format!("cluster  {} ({})\n", text("name"), text("cluster"));
            let voters: Vec<&str> = status["voters"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|voter| voter.as_str())
                .collect();
            lines += &format!(
                "leader   {} of the voters {}\n",
                text("leader"),
                voters.join(", ")
            );
            lines += &format!("nodes    {} of {} up\n", number("nodes_up"), number("nodes"));
            lines += &format!(
                "drives   {} of {} online\n",
                number("drives_online"),
                number("drives")
            );
            lines += &format!(
                "volumes  {} of {} serving\n",
                number("volumes_serving"),
                number("volumes")
            );
            for pool in status["pools"].as_array().into_iter().flatten() {
                let number = |name: &str| pool[name].as_u64().unwrap_or_default();
                // Drives that are filled unevenly, or of unequal size.
                let stranded = number("free_bytes") - number("free_in_reach_bytes");
                lines += &format!(
                    "pool     {} {}: {} raw, {} free{}, {} usable\n",
                    pool["name"].as_str().unwrap_or_default(),
                    pool["ec"].as_str().unwrap_or_default(),
                    bytes(number("raw_bytes")),
                    bytes(number("free_bytes")),
                    if stranded > number("raw_bytes") / 20 {
                        format!(" ({} of it on too few domains for a band)", bytes(stranded))
                    } else {
                        String::new()
                    },
                    bytes(number("usable_bytes")),
                );
            }
            lines
        });
        Ok(())
    }

    /// What `weft status` shows, as JSON.
    async fn cluster_status(&self) -> Result<serde_json::Value, Failure> {
        let map = self.map().await?;
        let status = self
            .client()
            .status()
            .await
            .map_err(|error| self.client_failure(error))?;
        let cluster = map.cluster.as_ref();
        let serving = map
            .volumes
            .values()
            .filter(|volume| matches!(volume.phase, Phase::Serving { .. }));
        Ok(json!({
            "cluster": cluster.map(|cluster| cluster.id.to_string()),
            "name": cluster.map(|cluster| cluster.name.clone()),
            "leader": map.nodes.get(&status.leader).map_or_else(|| status.leader.to_string(), |node| node.name.clone()),
            "voters": status.voters.iter().map(|voter| {
                map.nodes.get(voter).map_or_else(|| voter.to_string(), |node| node.name.clone())
            }).collect::<Vec<_>>(),
            "nodes": map.nodes.len(),
            "nodes_up": map.nodes.values().filter(|node| crate::view::node_is_up(node)).count(),
            "drives": crate::view::drives(&map).count(),
            "drives_online": crate::view::drives(&map).filter(|drive| map.in_service(drive)).count(),
            "volumes": map.volumes.len(),
            "volumes_serving": serving.count(),
            "pools": status.pools.iter().map(|(id, pool)| json!({
                "name": map.pools.get(id).map(|found| found.name.clone()),
                "ec": pool.geometry.to_string(),
                "domains": pool.domains,
                "raw_bytes": pool.capacity_mib << 20,
                "free_bytes": pool.free_mib << 20,
                "free_in_reach_bytes": pool.free_reach_mib << 20,
                "quarantined_bytes": pool.quarantined_mib << 20,
                "reserved_bytes": pool.reserve_mib() << 20,
                "usable_bytes": pool.usable_bytes(),
            })).collect::<Vec<_>>(),
        }))
    }

    pub(super) async fn node(&self, command: NodeCommand) -> Result<(), Failure> {
        let map = self.map().await?;
        match command {
            NodeCommand::List => {
                let nodes: Vec<_> = map.nodes.values().collect();
                self.output.rows(
                    &[
                        "NODE", "ID", "STATE", "RACK", "CONTROL", "NVME", "DRIVES", "VOLUMES",
                    ],
                    &nodes,
                    |node| {
                        let drives =
                            crate::view::drives(&map).filter(|drive| drive.home == DriveHome::Node(node.id));
                        let owned = map
                            .volumes
                            .values()
                            .filter(|volume| volume.phase.owner().is_some_and(|owner| owner.node == node.id));
                        vec![
                            node.name.clone(),
                            node.id.to_string(),
                            format!("{:?}", node.state).to_lowercase(),
                            node.rack.clone().unwrap_or_default(),
                            node.control_address.clone(),
                            node.nvme_address.clone(),
                            drives.count().to_string(),
                            owned.count().to_string(),
                        ]
                    },
                );
            }
            NodeCommand::Show { node } => {
                let found = map
                    .node_named(&node)
                    .ok_or_else(|| not_found("node", &node, map.nodes.values().map(|node| &node.name)))?;
                let live = admin(&found.control_address)
                    .await?
                    .inspect(InspectRequest {})
                    .await
                    .map_err(status_failure)?
                    .into_inner();
                let live: serde_json::Value =
                    serde_json::from_str(&live.json).map_err(anyhow::Error::from)?;
                self.output.one(&json!({ "node": found, "live": live }), |value| {
                    format!("{}\n", serde_json::to_string_pretty(value).unwrap_or_default())
                });
            }
        }
        Ok(())
    }

    pub(super) async fn drive(&self, command: DriveCommand) -> Result<(), Failure> {
        match command {
            DriveCommand::List => {
                let map = self.map().await?;
                let status = self
                    .client()
                    .status()
                    .await
                    .map_err(|error| self.client_failure(error))?;
                let allocated: BTreeMap<_, _> = status
                    .drives
                    .iter()
                    .map(|(drive, usage)| (*drive, usage.allocated_mib))
                    .collect();
                let drives: Vec<&Drive> = crate::view::drives(&map).collect();
                self.output.rows(
                    &["DRIVE", "ID", "STATE", "CLASS", "SIZE", "ALLOCATED", "DOMAIN"],
                    &drives,
                    |drive| {
                        vec![
                            drive.name.clone(),
                            drive.id.to_string(),
                            drive_state(&map, drive),
                            format!("{:?}", drive.class).to_lowercase(),
                            bytes(drive.capacity_mib() << 20),
                            bytes(allocated.get(&drive.id).copied().unwrap_or_default() << 20),
                            domain(&map, drive),
                        ]
                    },
                );
            }
            DriveCommand::Show { drive } => {
                let map = self.map().await?;
                let found = crate::view::drives(&map)
                    .find(|found| found.name == drive || found.id.to_string() == drive);
                let found = found.ok_or_else(|| {
                    not_found(
                        "drive",
                        &drive,
                        crate::view::drives(&map).map(|drive| &drive.name),
                    )
                })?;
                self.output.one(found, |drive| {
                    let registered = drive
                        .registrations
                        .iter()
                        .map(|(id, state)| format!("{id} {state:?}"))
                        .collect::<Vec<_>>();
                    table(
                        &["FIELD", "VALUE"],
                        &[
                            vec!["name".into(), drive.name.clone()],
                            vec!["id".into(), drive.id.to_string()],
                            vec!["uuid".into(), drive.uuid.to_string()],
                            vec!["state".into(), drive_state(&map, drive)],
                            vec!["domain".into(), domain(&map, drive)],
                            vec!["size".into(), bytes(drive.capacity_mib() << 20)],
                            vec!["registrations".into(), registered.join(", ")],
                        ],
                    )
                });
            }
            DriveCommand::Add(args) => self.drive_add(args).await?,
        }
        Ok(())
    }

    async fn drive_add(&self, args: DriveAddArgs) -> Result<(), Failure> {
        let DriveAddArgs {
            agent,
            path,
            nvme_tcp,
            subnqn,
            nsid,
            box_name,
            class,
            force,
        } = args;
        let agent = agent
            .or_else(|| self.addresses.first().cloned())
            .unwrap_or_default();
        let source = match (path, nvme_tcp, subnqn, nsid) {
            (Some(path), ..) => add_drive_request::Source::Path(path.display().to_string()),
            (None, Some(address), Some(subnqn), Some(nsid)) => {
                add_drive_request::Source::ThirdParty(ThirdParty {
                    address: address.to_string(),
                    subnqn: subnqn.to_string(),
                    nsid,
                    box_name: box_name.unwrap_or_else(|| address.ip().to_string()),
                })
            }
            _ => unreachable!("clap requires --path, or all of --nvme-tcp, --subnqn and --nsid"),
        };
        let request = AddDriveRequest {
            class,
            force,
            source: Some(source),
        };
        let reply = admin(&agent)
            .await?
            .add_drive(request)
            .await
            .map_err(status_failure)?
            .into_inner();
        self.output.one(
            &json!({ "drive": reply.drive_id, "name": reply.name, "bytes": reply.bytes }),
            |_| {
                format!(
                    "drive {} (d{}) added, {}\n",
                    reply.name,
                    reply.drive_id,
                    bytes(reply.bytes)
                )
            },
        );
        Ok(())
    }

    pub(super) async fn pool(&self, command: PoolCommand) -> Result<(), Failure> {
        match command {
            PoolCommand::List => {
                let map = self.map().await?;
                let pools: Vec<_> = map.pools.values().collect();
                self.output
                    .rows(&["POOL", "ID", "EC", "DOMAIN", "VOLUMES"], &pools, |pool| {
                        vec![
                            pool.name.clone(),
                            pool.id.to_string(),
                            pool.geometry.to_string(),
                            format!("{:?}", pool.domain).to_lowercase(),
                            map.volumes
                                .values()
                                .filter(|volume| volume.pool == pool.id)
                                .count()
                                .to_string(),
                        ]
                    });
            }
            PoolCommand::Create { name, ec, domain } => {
                crate::config::check_name("pool name", &name)?;
                let domain = match domain.as_str() {
                    "drive" => DomainLevel::Drive,
                    "rack" => DomainLevel::Rack,
                    _ => DomainLevel::Node,
                };
                let classes = BTreeSet::from([DriveClass::Scm, DriveClass::Tlc, DriveClass::Qlc]);
                self.propose(Proposal::CreatePool(NewPool {
                    name: name.clone(),
                    geometry: ec,
                    domain,
                    classes,
                }))
                .await?;
                self.output
                    .one(&json!({ "pool": name }), |_| format!("pool {name} created\n"));
            }
            PoolCommand::Show { pool } => {
                let map = self.map().await?;
                let found = map
                    .pool_named(&pool)
                    .ok_or_else(|| not_found("pool", &pool, map.pools.values().map(|pool| &pool.name)))?;
                self.output.one(found, |pool| {
                    format!("{} {} domain {:?}\n", pool.name, pool.geometry, pool.domain)
                });
            }
        }
        Ok(())
    }

    pub(super) async fn host(&self, command: HostCommand) -> Result<(), Failure> {
        let HostCommand::List = command;
        let map = self.map().await?;
        let mut hosts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for volume in map.volumes.values() {
            for host in &volume.allowed_hosts {
                hosts
                    .entry(host.to_string())
                    .or_default()
                    .push(volume.name.clone());
            }
        }
        let hosts: Vec<_> = hosts
            .into_iter()
            .map(|(host, volumes)| json!({ "host": host, "volumes": volumes }))
            .collect();
        self.output.rows(&["HOST", "VOLUMES"], &hosts, |host| {
            let volumes: Vec<&str> = host["volumes"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|name| name.as_str())
                .collect();
            vec![
                host["host"].as_str().unwrap_or_default().to_owned(),
                volumes.join(","),
            ]
        });
        Ok(())
    }
}

/// Names what was asked for and what there is.
pub(super) fn not_found<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a String>) -> Failure {
    let known: Vec<&str> = known.map(String::as_str).collect();
    let there_is = if known.is_empty() {
        "there is none".to_owned()
    } else {
        format!("there are: {}", known.join(", "))
    };
    Failure::NotFound(format!("no {what} is called `{name}`; {there_is}"))
}

fn drive_state(map: &ClusterMap, drive: &Drive) -> String {
    let own = format!("{:?}", drive.state).to_lowercase();
    if own == "online" && !map.in_service(drive) {
        "unreachable".to_owned()
    } else {
        own
    }
}

fn domain(map: &ClusterMap, drive: &Drive) -> String {
    match &drive.home {
        DriveHome::Node(node) => map
            .nodes
            .get(node)
            .map_or_else(|| node.to_string(), |node| node.name.clone()),
        DriveHome::ThirdParty {
            address, box_name, ..
        } => format!("{box_name} (third party at {address})"),
    }
}
