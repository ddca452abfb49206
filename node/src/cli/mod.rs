//! The command line: each command asks the metadata service or one agent, and shows the answer.
//!
//! Exit codes, for scripts: 0 done, 1 failed, 2 usage, 3 no such thing, 4 refused by the cluster's state, 5 nobody
//! answered.

mod attach;
mod cluster;
pub(crate) mod output;
mod volume;

use std::time::Duration;

use anyhow::Context as _;
use weft_metadata::client::{ClientError, MetadataClient};
use weft_metadata::state::{ClusterMap, Command as Proposal, Refusal, Reply};
use weft_proto::grpc::admin::admin_client::AdminClient;

use crate::args::{Cli, Command};
use output::Output;
pub(crate) use volume::{connect_lines, new_volume};

/// How long a command looks for a leader before it gives up.
const PATIENCE: Duration = Duration::from_secs(15);

/// What ends a command other than success; its exit code is the discriminant.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The named thing does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The cluster's state does not allow it.
    #[error("{0}")]
    Refused(String),
    /// No agent answered.
    #[error("{0}")]
    Unreachable(String),
    /// Everything else.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Other(_) => 1,
            Self::NotFound(_) => 3,
            Self::Refused(_) => 4,
            Self::Unreachable(_) => 5,
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal.to_string())
    }
}

/// Runs one client command. Returns the process's exit code.
pub(crate) async fn run(cli: Cli) -> u8 {
    let output = Output { json: cli.json };
    let session = Session {
        addresses: cli.cluster,
        output,
    };
    match session.run(cli.command).await {
        Ok(()) => 0,
        Err(failure) => {
            if cli.json {
                output.one(&serde_json::json!({ "error": failure.to_string() }), |_| {
                    String::new()
                });
            }
            eprintln!("weft: {failure}");
            failure.exit_code()
        }
    }
}

/// One invocation: where the cluster is and how to answer.
struct Session {
    addresses: Vec<String>,
    output: Output,
}

impl Session {
    async fn run(&self, command: Command) -> Result<(), Failure> {
        match command {
            Command::Init {
                agent,
                name,
                voters,
                force,
            } => self.init(&agent, name, voters, force).await,
            Command::Join { agent, force } => self.join(&agent, force).await,
            Command::Status => self.status().await,
            Command::Node(command) => self.node(command).await,
            Command::Drive(command) => self.drive(command).await,
            Command::Pool(command) => self.pool(command).await,
            Command::Volume(command) => self.volume(command).await,
            Command::Host(command) => self.host(command).await,
            Command::Vm(command) => {
                self.vm(command);
                Ok(())
            }
            Command::Metrics(_) => {
                self.metrics_list();
                Ok(())
            }
            Command::Agent { .. }
            | Command::Bench(_)
            | Command::BenchPeer { .. }
            | Command::BenchMap(_)
            | Command::Demo(_) => {
                unreachable!("main runs these itself")
            }
        }
    }

    fn client(&self) -> MetadataClient {
        MetadataClient::new(self.addresses.clone()).with_deadline(PATIENCE)
    }

    async fn map(&self) -> Result<ClusterMap, Failure> {
        self.client()
            .map()
            .await
            .map_err(|error| self.client_failure(error))
    }

    async fn propose(&self, proposal: Proposal) -> Result<Reply, Failure> {
        self.client()
            .propose(proposal)
            .await
            .map_err(|error| self.client_failure(error))
    }

    fn client_failure(&self, error: ClientError) -> Failure {
        match error {
            ClientError::Refused(refusal) => refusal.into(),
            error => Failure::Unreachable(format!(
                "{error}; asked {} for {} s: name running agents with --cluster HOST:PORT,…",
                self.addresses.join(", "),
                PATIENCE.as_secs()
            )),
        }
    }

    fn metrics_list(&self) {
        let rows = crate::metrics::list();
        self.output
            .rows(&["NAME", "KIND", "UNIT", "LABELS", "MEANING"], &rows, |metric| {
                vec![
                    metric.name.to_owned(),
                    metric.kind.to_string(),
                    metric.unit.to_owned(),
                    metric.labels.join(","),
                    metric.help.to_owned(),
                ]
            });
    }
}

/// Connects to one agent's own service.
async fn admin(address: &str) -> Result<AdminClient<tonic::transport::Channel>, Failure> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
        .with_context(|| format!("agent address `{address}`"))?
        .connect_timeout(Duration::from_secs(5));
    let channel = endpoint.connect().await.map_err(|error| {
        Failure::Unreachable(format!(
            "no agent answers at {address}: {error}; is `weft agent` running there?"
        ))
    })?;
    Ok(AdminClient::new(channel))
}

/// An agent's refusal, in its own words.
fn status_failure(status: tonic::Status) -> Failure {
    match status.code() {
        tonic::Code::NotFound => Failure::NotFound(status.message().to_owned()),
        tonic::Code::FailedPrecondition | tonic::Code::AlreadyExists | tonic::Code::InvalidArgument => {
            Failure::Refused(status.message().to_owned())
        }
        tonic::Code::Unavailable | tonic::Code::DeadlineExceeded => {
            Failure::Unreachable(status.message().to_owned())
        }
        _ => Failure::Other(anyhow::anyhow!("{}", status.message().to_owned())),
    }
}
