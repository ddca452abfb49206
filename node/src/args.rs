//! What was typed. Subcommands are the nouns and verbs of a storage operator.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::TypedValueParser as _;
use clap::{Args, Parser, Subcommand};
use weft_proto::nqn::Nqn;

/// Software-defined storage for hyperconverged clusters.
#[derive(Debug, Parser)]
#[command(name = "weft", version, about, propagate_version = true, max_term_width = 110)]
pub(crate) struct Cli {
    /// Control addresses of one or more agents, HOST:PORT; the leader is found from any of them.
    #[arg(
        long,
        global = true,
        value_delimiter = ',',
        default_value = "127.0.0.1:7420",
        env = "WEFT_CLUSTER"
    )]
    pub(crate) cluster: Vec<String>,

    /// Print JSON for programs instead of tables for people.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the agent of this server in the foreground.
    Agent {
        /// The configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// End when standard input does: so that agents do not outlive whoever started them.
        #[arg(long, hide = true)]
        exit_with_stdin: bool,
    },
    /// Make a new cluster of one running agent and the drives in its configuration.
    Init {
        /// Control address of the agent.
        #[arg(long, default_value = "127.0.0.1:7420")]
        agent: String,
        /// The cluster's name.
        #[arg(long)]
        name: String,
        /// How many agents vote on metadata.
        #[arg(long, default_value_t = 3, value_parser = clap::builder::PossibleValuesParser::new(["1", "3", "5"]).map(|v| v.parse::<u32>().expect("a listed value")))]
        voters: u32,
        /// Overwrite drive labels of other clusters. Their data is lost.
        #[arg(long)]
        force: bool,
    },
    /// Add a running agent and the drives in its configuration to the cluster that --cluster names.
    Join {
        /// Control address of the agent that joins.
        #[arg(long)]
        agent: String,
        /// Overwrite drive labels of other clusters. Their data is lost.
        #[arg(long)]
        force: bool,
    },
    /// The cluster at a glance.
    Status,
    /// Servers that run an agent.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Drives, local to nodes or third-party.
    #[command(subcommand)]
    Drive(DriveCommand),
    /// Pools: a default k+m and a failure domain.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Volumes.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Hosts and the volumes they may use.
    #[command(subcommand)]
    Host(HostCommand),
    /// Virtual machines with volumes as NVMe drives.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Metrics.
    #[command(subcommand)]
    Metrics(MetricsCommand),
    /// The whole story on one machine: a cluster, a volume, kills, a move, a new node, every byte compared.
    Demo(DemoArgs),
    /// How fast each stage of the data path is beside the floor it cannot beat, on this machine.
    Bench(BenchArgs),
    /// One process of the cluster that `bench` measures: an owner of these drives, or a drive. Ends with its input.
    #[command(hide = true)]
    BenchPeer {
        /// Where the drives listen.
        drives: Vec<SocketAddr>,
    },
    /// A page map that is filled in a process of its own, whose memory `bench` measures.
    #[command(hide = true)]
    BenchMap(BenchMapArgs),
}

/// `weft node …`
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// All nodes.
    List,
    /// One node, with the live state of its agent.
    Show {
        /// Node name.
        node: String,
    },
}

/// `weft drive …`
#[derive(Debug, Subcommand)]
pub(crate) enum DriveCommand {
    /// All drives.
    List,
    /// Add a drive: a local one with --path, or somebody's NVMe/TCP namespace with --nvme-tcp.
    Add(DriveAddArgs),
    /// One drive.
    Show {
        /// Drive name or id.
        drive: String,
    },
}

/// `weft drive add …`
#[derive(Debug, Args)]
pub(crate) struct DriveAddArgs {
    /// Control address of the agent whose server holds the drive, or that proves a third-party one.
    #[arg(long)]
    pub(crate) agent: Option<String>,
    /// A file or block device on the agent's server.
    #[arg(long, conflicts_with_all = ["nvme_tcp", "subnqn", "nsid"], required_unless_present = "nvme_tcp")]
    pub(crate) path: Option<PathBuf>,
    /// A third-party NVMe/TCP target, HOST:PORT.
    #[arg(long, requires_all = ["subnqn", "nsid"])]
    pub(crate) nvme_tcp: Option<SocketAddr>,
    /// Its subsystem.
    #[arg(long)]
    pub(crate) subnqn: Option<Nqn>,
    /// Its namespace.
    #[arg(long)]
    pub(crate) nsid: Option<u32>,
    /// Failure domain of a third-party drive: drives of one box share it. Default: its address.
    #[arg(long = "box")]
    pub(crate) box_name: Option<String>,
    /// scm, tlc or qlc.
    #[arg(long, default_value = "tlc", value_parser = ["scm", "tlc", "qlc"])]
    pub(crate) class: String,
    /// Overwrite the label of another cluster. Its data is lost.
    #[arg(long)]
    pub(crate) force: bool,
}

/// `weft pool …`
#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// All pools.
    List,
    /// Create a pool.
    Create {
        /// Pool name.
        name: String,
        /// Default data+parity of its volumes, such as 4+2.
        #[arg(long, default_value = "4+2", value_parser = parse_geometry)]
        ec: weft_proto::band::Geometry,
        /// Shards of a stripe lie in distinct ones of these.
        #[arg(long, default_value = "node", value_parser = ["drive", "node", "rack"])]
        domain: String,
    },
    /// One pool.
    Show {
        /// Pool name.
        pool: String,
    },
}

/// `weft volume …`
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// All volumes.
    List,
    /// Create a thin volume.
    Create {
        /// Volume name.
        name: String,
        /// Size, such as 10GiB or 500MiB; a multiple of 1 MiB.
        #[arg(long, value_parser = parse_size)]
        size: u64,
        /// Its pool.
        #[arg(long, default_value = "default")]
        pool: String,
        /// Data+parity, such as 4+2. Default: the pool's.
        #[arg(long, value_parser = parse_geometry)]
        ec: Option<weft_proto::band::Geometry>,
        /// Logical block size that hosts see.
        #[arg(long, default_value_t = 4096, value_parser = clap::builder::PossibleValuesParser::new(["512", "4096"]).map(|v| v.parse::<u32>().expect("a listed value")))]
        block_bytes: u32,
    },
    /// One volume, its owner, paths and hosts.
    Show {
        /// Volume name.
        name: String,
    },
    /// Allow a host to use a volume, and print its `nvme connect` lines; or give it to a guest of this server as an NVMe
    /// drive, and print the options of QEMU.
    Attach(AttachArgs),
    /// Stop a host or a guest from using a volume; its connections end.
    Detach(AttachmentArgs),
    /// Move a volume's owner to another node. No data is copied.
    Move {
        /// Volume name.
        name: String,
        /// Node name.
        #[arg(long)]
        to: String,
    },
    /// Grow a volume.
    Resize {
        /// Volume name.
        name: String,
        /// The new size.
        #[arg(long, value_parser = parse_size)]
        size: u64,
    },
    /// Delete a volume and its data.
    Delete {
        /// Volume name.
        name: String,
        /// Delete although hosts are attached.
        #[arg(long)]
        force: bool,
    },
}

/// `weft volume attach …` and `weft volume detach …`
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("guest").multiple(true)))]
pub(crate) struct AttachmentArgs {
    /// Volume name.
    pub(crate) name: String,
    /// The host's NQN (on Linux: /etc/nvme/hostnqn).
    #[arg(long, required_unless_present = "guest", conflicts_with = "guest")]
    pub(crate) host: Option<Nqn>,
    /// The socket of a guest on the agent's server, which a virtual machine monitor connects to.
    #[arg(long, value_name = "PATH", group = "guest")]
    pub(crate) vfio_user: Option<PathBuf>,
    /// Control address of the agent on whose server the guest runs. Default: the first of --cluster.
    #[arg(long, requires = "vfio_user", group = "guest")]
    pub(crate) agent: Option<String>,
}

/// `weft volume attach`
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    #[command(flatten)]
    pub(crate) attachment: AttachmentArgs,
    /// Map the doorbells into the guest, whose drivers then never trap, and look at them without a pause while the guest runs.
    /// Takes a core of the server; for guests whose driver has no doorbells in memory (Linux' has).
    #[arg(long, requires = "vfio_user", group = "guest")]
    pub(crate) map_doorbells: bool,
}

/// `weft vm …`
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Print the options with which QEMU (10.1 or later) boots from or uses a volume that is attached with --vfio-user.
    Qemu {
        /// The sockets, one for each volume.
        #[arg(required = true)]
        paths: Vec<PathBuf>,
        /// The guest's memory, MiB.
        #[arg(long, default_value_t = 1024)]
        memory_mib: u32,
    },
    /// Print the command of QEMU's monitor (QMP) that gives a running guest a volume that is attached with --vfio-user. The
    /// guest needs a free port, from `-device pcie-root-port,id=PORT,chassis=1`.
    Qmp {
        /// The socket.
        path: PathBuf,
        /// The `pcie-root-port` that the drive is put into.
        #[arg(long)]
        port: String,
    },
}

/// `weft host …`
#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Hosts and the volumes they may use.
    List,
}

/// `weft metrics …`
#[derive(Debug, Subcommand)]
pub(crate) enum MetricsCommand {
    /// Every metric an agent exports: name, kind, unit, labels, meaning.
    List,
}

/// `weft demo …`
#[derive(Clone, Debug, Args)]
pub(crate) struct DemoArgs {
    /// The real input: a file, or a folder whose files are written one after another. Default: the largest file of the
    /// Rust toolchain.
    #[arg(long)]
    pub(crate) input: Option<PathBuf>,
    /// Nodes to start with; one more is added on the way.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(6..=16))]
    pub(crate) nodes: u32,
    /// Drives of each node.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) drives: u32,
    /// Size of each drive file (sparse).
    #[arg(long, default_value = "2GiB", value_parser = parse_size)]
    pub(crate) drive_size: u64,
    /// Where the cluster lives. Default: a temporary folder that is removed at the end.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Leave the cluster up and print how to connect a real host.
    #[arg(long)]
    pub(crate) keep: bool,
}

/// `weft bench …`
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArgs {
    /// The stage. Default: all of them.
    pub(crate) stage: Option<BenchStage>,
    /// Shorter windows: within a minute for all stages, with wider intervals.
    #[arg(long)]
    pub(crate) quick: bool,
}

/// `weft bench-map …`
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct BenchMapArgs {
    /// Blocks to map.
    pub(crate) blocks: u64,
    /// The cache setting.
    pub(crate) cache_mib: usize,
    /// Changes between two checkpoints.
    pub(crate) checkpoint_blocks: u64,
}

/// A stage of the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BenchStage {
    /// An NVMe/TCP target with a memory drive.
    Target,
    /// An emulated controller of a guest with a memory drive, and 128 that are idle.
    VfioUser,
    /// A drive file through io_uring.
    Drive,
    /// The volume engine over six memory devices.
    Engine,
    /// The codec.
    Erasure,
    /// Six targets, an owner and a host.
    Cluster,
    /// Drive bytes per user byte in pools that are 70, 80 and 85 % full.
    Space,
    /// Memory of a page map.
    Memory,
    /// An agent with a hundred volumes and hosts that do nothing.
    Idle,
}

impl BenchStage {
    /// In the order they are run.
    pub(crate) const ALL: [Self; 9] = [
        Self::Target,
        Self::VfioUser,
        Self::Drive,
        Self::Engine,
        Self::Erasure,
        Self::Cluster,
        Self::Space,
        Self::Memory,
        Self::Idle,
    ];
}

/// Parses `K+M`.
pub(crate) fn parse_geometry(text: &str) -> Result<weft_proto::band::Geometry, String> {
    let usage = || format!("`{text}` is not K+M with 1 to 16 data and 1 to 4 parity shards, such as 4+2");
    let (k, m) = text.split_once('+').ok_or_else(usage)?;
    let (k, m) = (k.parse().map_err(|_| usage())?, m.parse().map_err(|_| usage())?);
    weft_proto::band::Geometry::new(k, m).ok_or_else(usage)
}

/// Parses a size in bytes with an optional binary unit; a multiple of 1 MiB.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 10] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("PiB", 1 << 50),
        ("K", 1 << 10),
        ("M", 1 << 20),
        ("G", 1 << 30),
        ("T", 1 << 40),
        ("P", 1 << 50),
    ];
    let (digits, unit) = UNITS
        .iter()
        .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|digits| (digits, *unit)))
        .unwrap_or((text, 1));
    let bytes = digits
        .trim()
        .parse::<u64>()
        .ok()
        .and_then(|count| count.checked_mul(unit))
        .ok_or_else(|| format!("`{text}` is not a size; write a number with KiB, MiB, GiB, TiB or PiB"))?;
    if bytes == 0 || bytes % weft_proto::units::MIB != 0 {
        return Err(format!("`{text}` is {bytes} bytes, not a multiple of 1 MiB"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn sizes_have_binary_units_and_are_whole_mebibytes() {
        assert_eq!(parse_size("10GiB"), Ok(10 << 30));
        assert_eq!(parse_size("3M"), Ok(3 << 20));
        assert!(parse_size("10KiB").unwrap_err().contains("multiple of 1 MiB"));
        for text in ["", "x", "0", "18446744073709551615TiB", "-1GiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_geometry_says_what_is_allowed() {
        assert_eq!(parse_geometry("4+2").unwrap().to_string(), "4+2");
        assert!(parse_geometry("17+2").unwrap_err().contains("1 to 16 data"));
        assert!(parse_geometry("4").is_err());
    }
}
