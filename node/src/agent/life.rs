//! The control side of an agent, from its first start to its end.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::FutureExt as _;
use rand::RngCore as _;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{mpsc, watch};
use weft_metadata::client::{ClientError, MetadataClient};
use weft_metadata::service::{self, MetadataService};
use weft_metadata::state::Command;
use weft_metadata::state::command::{NewDrive, NewNode, NewPool, Refusal, Reply};
use weft_metadata::state::map::{Cluster, ClusterMap, DomainLevel, DriveClass, DriveHome, Settings};
use weft_proto::band::Geometry;
use weft_proto::grpc::admin::admin_server::AdminServer;
use weft_proto::grpc::admin::{
    AddDriveReply, AddDriveRequest, InitReply, InitRequest, InspectReply, JoinReply, JoinRequest,
    add_drive_request,
};
use weft_proto::id::{ClusterId, DriveId, DriveUuid, HostId, IncarnationId, NodeId};

use super::control::{AdminService, Order, Refused};
use super::fabric;
use super::identity::{DataDir, Identity};
use super::local_drives::{self, LocalDrive};
use super::member::{self, Member, MemberOptions};
use super::third_party;
use super::thread::DataThread;
use crate::config::{Config, DriveConfig};
use crate::view;

/// How long `init` and `join` wait for a leader.
const LEADER_WAIT: Duration = Duration::from_secs(20);

/// Registrants that a drive of ours takes: many more than a cluster has agents.
const REGISTRANTS_MAX: u32 = 1000;

/// The pool every cluster begins with.
const DEFAULT_POOL: &str = "default";

/// Why an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By signal, or because standard input ended.
    Asked,
    /// This incarnation has been fenced.
    Fenced,
}

/// What the data thread holds.
#[derive(Default)]
pub(crate) struct Plane {
    drives: RefCell<Vec<Rc<LocalDrive>>>,
    member: RefCell<Option<Rc<Member>>>,
}

/// Starts an agent and runs it to its end.
///
/// # Errors
/// Names the configuration key, file or address that stands in the way.
pub(crate) fn run(config: Config, exit_with_stdin: bool) -> anyhow::Result<Ending> {
    let data_dir = DataDir::open(&config.data_dir)?;
    let control = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("weft-control")
        .enable_all()
        .build()
        .context("start the control runtime")?;
    let (data, _thread) = DataThread::spawn(Plane::default).context("start the data thread")?;
    let ending = control.block_on(Life::live(config, data_dir, data, exit_with_stdin));
    // Whatever still runs has nobody to answer to.
    control.shutdown_background();
    ending
}

struct Life {
    config: Config,
    data_dir: DataDir,
    data: DataThread<Plane>,
    control_listener: TcpListener,
    nvme_listener: TcpListener,
    discovery_listener: TcpListener,
    admin: AdminService,
    /// The running gRPC server; dropping the sender ends it.
    server: Option<tokio::sync::oneshot::Sender<()>>,
    membership: Option<Membership>,
    fenced: mpsc::Sender<()>,
}

/// What the control side of a member holds.
struct Membership {
    identity: Identity,
    client: MetadataClient,
    /// Ends with the agent.
    _service: MetadataService,
}

impl Life {
    async fn live(
        config: Config,
        data_dir: DataDir,
        data: DataThread<Plane>,
        exit_with_stdin: bool,
    ) -> anyhow::Result<Ending> {
        let listen = |key: &str, address| -> anyhow::Result<TcpListener> {
            let listener = TcpListener::bind(address)
                .with_context(|| format!("{key} = \"{address}\": cannot listen"))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let control_listener = listen("control_listen", config.control_listen)?;
        let nvme_listener = listen("nvme_listen", config.nvme_listen)?;
        let discovery_listener = listen("discovery_listen", config.discovery_listen)?;
        crate::metrics::serve(config.metrics_listen)?;
        let (admin, orders) = AdminService::new();
        let (fenced, fenced_receiver) = mpsc::channel(1);
        let mut life = Self {
            config,
            data_dir,
            data,
            control_listener,
            nvme_listener,
            discovery_listener,
            admin,
            server: None,
            membership: None,
            fenced,
        };
        life.open_drives().await?;
        match life.data_dir.identity()? {
            Some(identity) => life.become_member(identity).await?,
            None => {
                life.serve_control(None)?;
                tracing::info!(control = %life.config.control_listen, "waiting for `weft init` or `weft join`");
            }
        }
        life.attend(orders, fenced_receiver, exit_with_stdin).await
    }

    /// Carries out orders until the end.
    async fn attend(
        &mut self,
        mut orders: mpsc::Receiver<Order>,
        mut fenced: mpsc::Receiver<()>,
        exit_with_stdin: bool,
    ) -> anyhow::Result<Ending> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).context("listen for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for signals")?;
        let mut stdin = Box::pin(async move {
            if exit_with_stdin {
                let mut sink = Vec::new();
                let _ = tokio::io::stdin().read_to_end(&mut sink).await;
            } else {
                std::future::pending::<()>().await;
            }
        });
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.carry_out(order).await,
                    None => bail!("the control service has ended"),
                },
                _ = fenced.recv() => return Ok(Ending::Fenced),
                _ = terminate.recv() => return Ok(Ending::Asked),
                _ = interrupt.recv() => return Ok(Ending::Asked),
                () = &mut stdin => return Ok(Ending::Asked),
            }
        }
    }

    async fn carry_out(&mut self, order: Order) {
        // Nobody may be waiting for the answer any more; what was done stays done.
        match order {
            Order::Init(request, answer) => {
                let _ = answer.send(self.init(request).await.map_err(refused));
            }
            Order::Join(request, answer) => {
                let _ = answer.send(self.join(request).await.map_err(refused));
            }
            Order::AddDrive(request, answer) => {
                let _ = answer.send(self.add_drive(request).await.map_err(refused));
            }
            Order::Inspect(answer) => {
                let _ = answer.send(self.inspect().await.map_err(refused));
            }
        }
    }

    /// Opens and locks the drives of the configuration. One that cannot be opened is an error before the agent is a
    /// member, and a loss to be logged afterwards: the other drives of the server have to serve.
    async fn open_drives(&self) -> anyhow::Result<()> {
        let configs = self.config.drives.clone();
        let is_member = self.data_dir.identity()?.is_some();
        self.data
            .call(move |plane| {
                async move {
                    for config in &configs {
                        match LocalDrive::open(config).await {
                            Ok(drive) => plane.drives.borrow_mut().push(drive),
                            Err(error) if is_member => {
                                tracing::error!("drive {} left out: {error:#}", config.path.display());
                            }
                            Err(error) => return Err(error),
                        }
                    }
                    Ok(())
                }
                .boxed_local()
            })
            .await?
    }

    /// Starts the gRPC server, or replaces it: a member serves metadata beside administration.
    fn serve_control(&mut self, service: Option<&MetadataService>) -> anyhow::Result<()> {
        let listener = self
            .control_listener
            .try_clone()
            .context("share control_listen")?;
        let listener = tokio::net::TcpListener::from_std(listener).context("control_listen")?;
        let mut router =
            tonic::transport::Server::builder().add_service(AdminServer::new(self.admin.clone()));
        if let Some(service) = service {
            let (clients, members) = service.services();
            router = router.add_service(clients).add_service(members);
        }
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        // The former server, if any, finishes the request it is answering and lets go of its clone of the listener.
        self.server = Some(stop);
        tokio::spawn(async move {
            let ended = router
                .serve_with_incoming_shutdown(service::incoming(listener), stopped.map(drop))
                .await;
            if let Err(error) = ended {
                tracing::error!(%error, "the control service has failed");
            }
        });
        Ok(())
    }

    async fn init(&mut self, request: InitRequest) -> anyhow::Result<InitReply> {
        self.expect_no_member()?;
        crate::config::check_name("cluster name", &request.cluster_name)?;
        ensure!(
            matches!(request.voters, 1 | 3 | 5),
            "voters is {}, expected 1, 3 or 5",
            request.voters
        );
        let cluster = draw_cluster(request.cluster_name, u8::try_from(request.voters)?);
        self.check_drives(&cluster, request.force).await?;
        // The first node of a cluster is always the first number.
        let node = NodeId(1);
        let identity = Identity {
            cluster: cluster.id,
            node,
            members: vec![self.control_address()],
        };
        let service = self.start_metadata(&identity).await?;
        let init = Command::Init {
            id: cluster.id,
            name: cluster.name.clone(),
            authentication_key: cluster.authentication_key,
            fencing_host_id: cluster.fencing_host_id,
            fencing_key: cluster.fencing_key,
            settings: cluster.settings.clone(),
        };
        service
            .bootstrap(init, self.new_node())
            .await
            .context("begin the metadata service")?;
        self.serve_control(Some(&service))?;
        let client = self.client(&identity);
        let geometry = Geometry::new(4, 2).expect("a supported geometry");
        let classes = BTreeSet::from([DriveClass::Scm, DriveClass::Tlc, DriveClass::Qlc]);
        let pool = NewPool {
            name: DEFAULT_POOL.to_owned(),
            geometry,
            domain: DomainLevel::Node,
            classes,
        };
        propose(&client, Command::CreatePool(pool)).await?;
        self.label_drives(&client, &cluster, node, request.force).await?;
        self.data_dir.write_identity(&identity)?;
        self.start_member(Membership {
            identity,
            client,
            _service: service,
        })
        .await?;
        Ok(InitReply {
            cluster_id: cluster.id.to_string(),
            node_id: node.0,
        })
    }

    async fn join(&mut self, request: JoinRequest) -> anyhow::Result<JoinReply> {
        self.expect_no_member()?;
        ensure!(!request.members.is_empty(), "no member to join was named");
        let client = MetadataClient::new(request.members.clone());
        let map = client
            .clone()
            .with_deadline(LEADER_WAIT)
            .map()
            .await
            .with_context(|| format!("ask {}", request.members.join(", ")))?;
        let cluster = map
            .cluster
            .clone()
            .context("that cluster has not been initialised")?;
        self.check_drives(&cluster, request.force).await?;
        let Reply::Node(node) = propose(&client, Command::AddNode(self.new_node())).await? else {
            bail!("the cluster answered the new node with something else than its number");
        };
        self.label_drives(&client, &cluster, node, request.force).await?;
        let mut members: Vec<String> = map
            .nodes
            .values()
            .map(|node| node.control_address.clone())
            .collect();
        members.push(self.control_address());
        let identity = Identity {
            cluster: cluster.id,
            node,
            members,
        };
        self.data_dir.write_identity(&identity)?;
        self.become_member(identity).await?;
        Ok(JoinReply {
            cluster_id: cluster.id.to_string(),
            node_id: node.0,
        })
    }

    fn expect_no_member(&self) -> anyhow::Result<()> {
        if let Some(membership) = &self.membership {
            bail!(
                "this agent is node {} of cluster {} already; to use it elsewhere, stop it and remove its data_dir {}",
                membership.identity.node,
                membership.identity.cluster,
                self.config.data_dir.display()
            );
        }
        Ok(())
    }

    /// Starts the metadata service and everything that follows.
    async fn become_member(&mut self, identity: Identity) -> anyhow::Result<()> {
        let service = self.start_metadata(&identity).await?;
        self.serve_control(Some(&service))?;
        let client = self.client(&identity);
        self.start_member(Membership {
            identity,
            client,
            _service: service,
        })
        .await
    }

    async fn start_metadata(&self, identity: &Identity) -> anyhow::Result<MetadataService> {
        MetadataService::start(weft_metadata::Config::new(
            self.data_dir.join("metadata"),
            identity.node,
        ))
        .await
        .context("start the metadata service")
    }

    fn client(&self, identity: &Identity) -> MetadataClient {
        MetadataClient::new(identity.members.clone())
    }

    /// Starts the incarnation in the background: it needs a leader, and orders are answered meanwhile.
    async fn start_member(&mut self, membership: Membership) -> anyhow::Result<()> {
        let start = MemberStart {
            client: membership.client.clone(),
            data_client: self.client(&membership.identity),
            node: membership.identity.node,
            new_node: self.new_node(),
            reservations_dir: self.data_dir.join("reservations"),
            nvme: self.nvme_listener.try_clone().context("share nvme_listen")?,
            discovery: self
                .discovery_listener
                .try_clone()
                .context("share discovery_listen")?,
            engine: self.config.engine.clone(),
            fabric: self.config.fabric.clone(),
            data: self.data.clone(),
        };
        std::fs::create_dir_all(&start.reservations_dir)
            .with_context(|| format!("create {}", start.reservations_dir.display()))?;
        let fenced = self.fenced.clone();
        tokio::spawn(async move {
            if let Err(error) = start.run(&fenced).await {
                tracing::error!("the agent cannot serve: {error:#}");
            }
            let _ = fenced.send(()).await;
        });
        self.membership = Some(membership);
        Ok(())
    }

    async fn check_drives(&self, cluster: &Cluster, force: bool) -> anyhow::Result<()> {
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
    async fn label_drives(
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

    async fn add_drive(&self, request: AddDriveRequest) -> anyhow::Result<AddDriveReply> {
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

    async fn inspect(&self) -> anyhow::Result<InspectReply> {
        let tree = self
            .data
            .call(|plane| {
                async move {
                    let member = plane.member.borrow().clone();
                    member.map_or_else(
                        || serde_json::json!({ "state": "starting" }),
                        |member| member.inspect(),
                    )
                }
                .boxed_local()
            })
            .await?;
        Ok(InspectReply {
            json: tree.to_string(),
        })
    }

    fn control_address(&self) -> String {
        self.config.control_listen.to_string()
    }

    fn new_node(&self) -> NewNode {
        NewNode {
            name: self.config.name.clone(),
            rack: Some(self.config.rack.clone()),
            control_address: self.control_address(),
            nvme_address: self.config.nvme_listen.to_string(),
        }
    }
}

/// What is needed to start an incarnation.
struct MemberStart {
    client: MetadataClient,
    /// Of the data thread: connections belong to the runtime that made them.
    data_client: MetadataClient,
    node: NodeId,
    new_node: NewNode,
    reservations_dir: std::path::PathBuf,
    nvme: TcpListener,
    discovery: TcpListener,
    engine: crate::config::EngineConfig,
    fabric: crate::config::FabricConfig,
    data: DataThread<Plane>,
}

impl MemberStart {
    /// Starts the incarnation and returns when it has been fenced or declared dead.
    async fn run(self, fenced: &mpsc::Sender<()>) -> anyhow::Result<()> {
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
            identity: fabric::Identity {
                incarnation,
                host_id,
                key,
            },
            client: self.data_client,
            map,
            reservations_dir: self.reservations_dir,
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

async fn propose(client: &MetadataClient, command: Command) -> anyhow::Result<Reply> {
    Ok(client.clone().with_deadline(LEADER_WAIT).propose(command).await?)
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
        Ok(other) => bail!("a new drive was answered with {other:?}"),
        Err(error) => Err(error.into()),
    }
}

fn refused(error: anyhow::Error) -> Refused {
    let unavailable = matches!(
        error.downcast_ref::<ClientError>(),
        Some(ClientError::Unavailable { .. })
    );
    let sentence = format!("{error:#}");
    if unavailable {
        Refused::Unavailable(sentence)
    } else {
        Refused::Precondition(sentence)
    }
}

/// The identity of a new cluster.
fn draw_cluster(name: String, voters: u8) -> Cluster {
    let mut random = rand::rng();
    let mut draw16 = || {
        let mut bytes = [0; 16];
        random.fill_bytes(&mut bytes);
        bytes
    };
    let (id, fencing_host_id) = (ClusterId(draw16()), HostId(draw16()));
    let mut authentication_key = [0; 32];
    rand::rng().fill_bytes(&mut authentication_key);
    Cluster {
        id,
        name,
        authentication_key,
        fencing_host_id,
        fencing_key: member::draw_key().0,
        settings: Settings {
            voters,
            ..Settings::default()
        },
    }
}

/// A drive identity, drawn.
pub(crate) fn draw_drive_uuid() -> DriveUuid {
    let mut bytes = [0; 16];
    rand::rng().fill_bytes(&mut bytes);
    DriveUuid(bytes)
}
