//! The control side of an agent, from its first start to its end.

mod drives;
mod incarnation;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use rand::RngCore as _;
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use weft_metadata::client::{ClientError, MetadataClient};
use weft_metadata::service::{self, MetadataService};
use weft_metadata::state::Command;
use weft_metadata::state::command::{NewNode, NewPool, Reply};
use weft_metadata::state::map::{Cluster, DomainLevel, DriveClass, Settings};
use weft_proto::band::Geometry;
use weft_proto::grpc::admin::admin_server::AdminServer;
use weft_proto::grpc::admin::{
    AttachGuestReply, AttachGuestRequest, DetachGuestReply, DetachGuestRequest, InitReply, InitRequest,
    InspectReply, JoinReply, JoinRequest,
};
use weft_proto::id::{ClusterId, HostId, NodeId};

use super::control::{AdminService, Order, Refused};
use super::identity::{DataDir, Identity};
use super::local_drives::LocalDrive;
use super::member::{self, Member};
use super::thread::DataThread;
use crate::config::Config;
use incarnation::MemberStart;

/// How long `init` and `join` wait for a leader.
const LEADER_WAIT: Duration = Duration::from_secs(20);

/// How long an ending agent waits for its data thread, which lets go of drives and connections meanwhile.
const DATA_THREAD_WAIT: Duration = Duration::from_secs(2);

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
    // One thread, this one: whatever waits for a disk has threads of its own, and a second one would spend more on waking the
    // first than on work.
    let control = tokio::runtime::Builder::new_current_thread()
        .thread_name("weft-blocking")
        .enable_all()
        .build()
        .context("start the control runtime")?;
    let polling = Duration::from_micros(config.fabric.polling_us);
    let (data, thread) = DataThread::spawn(polling, Plane::default).context("start the data thread")?;
    let ending = control.block_on(Life::live(config, data_dir, data, exit_with_stdin));
    // Whatever still runs has nobody to answer to.
    control.shutdown_background();
    // What comes next, an exit or a new program image, ends all threads: better one that has let go of its drives.
    if !thread.joined_within(DATA_THREAD_WAIT) {
        tracing::warn!("the data thread does not end");
    }
    ending
}

fn asked_by(what: &str) -> Ending {
    tracing::info!(by = what, "asked to end");
    Ending::Asked
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
                _ = terminate.recv() => return Ok(asked_by("SIGTERM")),
                _ = interrupt.recv() => return Ok(asked_by("SIGINT")),
                () = &mut stdin => return Ok(asked_by("the end of standard input")),
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
            Order::AttachGuest(request, answer) => {
                let _ = answer.send(self.attach_guest(request).await.map_err(refused));
            }
            Order::DetachGuest(request, answer) => {
                let _ = answer.send(self.detach_guest(request).await.map_err(refused));
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
            node: membership.identity.node,
            new_node: self.new_node(),
            reservations_dir: self.data_dir.join("reservations"),
            guest_record: self.data_dir.join("guests.json"),
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

    async fn attach_guest(&self, request: AttachGuestRequest) -> anyhow::Result<AttachGuestReply> {
        let AttachGuestRequest {
            volume,
            path,
            map_doorbells,
        } = request;
        self.on_member(move |member| {
            async move { member.guests().attach(&volume, path.into(), map_doorbells).await }.boxed_local()
        })
        .await?;
        Ok(AttachGuestReply {})
    }

    async fn detach_guest(&self, request: DetachGuestRequest) -> anyhow::Result<DetachGuestReply> {
        let DetachGuestRequest { volume, path } = request;
        self.on_member(|member| {
            async move { member.guests().detach(&volume, path.as_ref()).await }.boxed_local()
        })
        .await?;
        Ok(DetachGuestReply {})
    }

    /// Does something with the data side of this member.
    async fn on_member<T: Send + 'static>(
        &self,
        work: impl FnOnce(Rc<Member>) -> LocalBoxFuture<'static, anyhow::Result<T>> + Send + 'static,
    ) -> anyhow::Result<T> {
        let done = self.data.call(move |plane| {
            async move {
                let member = plane.member.borrow().clone();
                let member = member.context("this agent is not a member that serves, yet")?;
                work(member).await
            }
            .boxed_local()
        });
        done.await?
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

async fn propose(client: &MetadataClient, command: Command) -> anyhow::Result<Reply> {
    Ok(client.clone().with_deadline(LEADER_WAIT).propose(command).await?)
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
