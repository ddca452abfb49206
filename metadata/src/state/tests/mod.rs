//! Tests of the state: one cluster built by commands, and every invariant after each of them.

mod ownership;
mod random;
mod rebuild;
mod space;
mod topology;

use std::collections::BTreeSet;

use weft_proto::band::{Band, ChunkSize, Geometry, RootPointer, RootUpdate};
use weft_proto::id::{
    BandId, ClusterId, DriveId, DriveUuid, Epoch, HostId, IncarnationId, NodeId, PoolId, StripeNumber,
    VolumeId,
};

use super::ClusterState;
use super::command::{BandProposal, Command, NewDrive, NewNode, NewPool, NewVolume, Purpose, Refusal, Reply};
use super::invariants::{violations, violations_between};
use super::map::{DomainLevel, DriveClass, DriveHome, Presentation, Settings};

/// A state whose every step is checked.
pub(crate) struct Checked {
    pub(crate) state: ClusterState,
    next_request: u64,
}

impl Checked {
    /// Applies, and checks every invariant, that a refusal changed nothing, and that the stored form survives.
    pub(crate) fn apply(&mut self, command: Command) -> Reply {
        let before = self.state.clone();
        let reply = self.state.apply(command.clone());
        let mut found = violations(&self.state);
        found.extend(violations_between(&before, &self.state));
        if matches!(reply, Reply::Refused(_) | Reply::Unchanged) && before != self.state {
            found.push("a refusal changed the state".into());
        }
        assert!(found.is_empty(), "after {command:?}: {found:#?}");
        reply
    }

    pub(crate) fn accept(&mut self, command: Command) -> Reply {
        let text = format!("{command:?}");
        self.apply(command)
            .accepted()
            .unwrap_or_else(|refusal| panic!("{text}: {refusal}"))
    }

    pub(crate) fn refuse(&mut self, command: Command) -> Refusal {
        match self.apply(command) {
            Reply::Refused(refusal) => refusal,
            reply => panic!("expected a refusal, not {reply:?}"),
        }
    }

    /// Each node with a live incarnation, one drive and a registration on every drive; one pool of `geometry`.
    pub(crate) fn cluster(nodes: u32, drive_mib: u32, geometry: Geometry) -> Self {
        let mut cluster = Self {
            state: ClusterState::default(),
            next_request: 0,
        };
        cluster.accept(init());
        for index in 1..=nodes {
            cluster.accept(Command::AddNode(new_node(index)));
            cluster.start(NodeId(index));
            cluster.accept(Command::AddDrive(NewDrive {
                uuid: DriveUuid([index as u8; 16]),
                name: format!("drive-{index}"),
                home: DriveHome::Node(NodeId(index)),
                class: DriveClass::Tlc,
                start_mib: 1,
                end_mib: 1 + drive_mib,
                registrants_max: 16,
            }));
        }
        for index in 1..=nodes {
            cluster.register(IncarnationId(u64::from(index)));
        }
        cluster.accept(Command::CreatePool(NewPool {
            name: "pool".into(),
            geometry,
            domain: DomainLevel::Node,
            classes: BTreeSet::from([DriveClass::Tlc]),
        }));
        cluster
    }

    /// Three nodes with a drive of 256 MiB each, and a volume of 1+1 that node 1 serves, with the band that holds its
    /// root.
    pub(crate) fn serving() -> (Self, VolumeId, Band) {
        let mut cluster = Self::cluster(3, 256, geometry(1, 1));
        let volume = cluster.volume("v");
        let band = cluster.serve(volume, 1);
        (cluster, volume, band)
    }

    pub(crate) fn start(&mut self, node: NodeId) -> IncarnationId {
        let draw = self.state.next.incarnation;
        match self.accept(Command::StartIncarnation {
            node,
            host_id: HostId([draw as u8; 16]),
            key: draw,
        }) {
            Reply::Incarnation(id) => id,
            reply => panic!("{reply:?}"),
        }
    }

    pub(crate) fn register(&mut self, incarnation: IncarnationId) {
        let drives = self.state.map.drives.keys().copied().collect();
        self.accept(Command::RecordRegistrations { incarnation, drives });
    }

    pub(crate) fn fence(&mut self, incarnation: IncarnationId, drives: &[u32]) -> Reply {
        self.apply(Command::RecordFenced {
            incarnation,
            drives: drives.iter().map(|id| DriveId(*id)).collect(),
        })
    }

    pub(crate) fn volume(&mut self, name: &str) -> VolumeId {
        match self.accept(Command::CreateVolume(new_volume(name))) {
            Reply::Volume(id) => id,
            reply => panic!("{reply:?}"),
        }
    }

    pub(crate) fn begin(&mut self, volume: VolumeId, node: u32) -> Result<Epoch, Refusal> {
        let incarnation = self.state.map.nodes[&NodeId(node)].incarnation.unwrap();
        let expected = self.state.map.volumes[&volume].epoch;
        match self.accept(Command::BeginTakeover {
            node: NodeId(node),
            incarnation,
            volumes: vec![(volume, expected)],
        }) {
            Reply::Takeovers(mut answers) => answers.remove(0).1,
            reply => panic!("{reply:?}"),
        }
    }

    /// Bands on the first drives in service.
    pub(crate) fn grant(&mut self, volume: VolumeId, purpose: Purpose, size: ChunkSize) -> Reply {
        self.next_request += 1;
        let epoch = self.state.map.volumes[&volume].epoch;
        let geometry = self.state.map.volumes[&volume].geometry;
        let drives = self
            .state
            .map
            .drives
            .values()
            .filter(|drive| self.state.map.in_service(drive))
            .map(|drive| drive.id)
            .take(usize::from(geometry.n()))
            .collect();
        self.apply(Command::GrantBands {
            volume,
            epoch,
            request: self.next_request,
            purpose,
            chunk_size: size,
            proposals: vec![BandProposal { geometry, drives }],
        })
    }

    pub(crate) fn band(&mut self, volume: VolumeId) -> Band {
        match self.grant(volume, Purpose::Internal, ChunkSize::Mib1) {
            Reply::Bands(mut bands) => bands.remove(0),
            reply => panic!("{reply:?}"),
        }
    }

    pub(crate) fn root(&self, volume: VolumeId, band: BandId, freed: &[BandId]) -> RootUpdate {
        let layout = &self.state.layouts[&volume];
        RootUpdate {
            volume,
            epoch: self.state.map.volumes[&volume].epoch,
            expected_version: layout.root_version,
            root: RootPointer {
                band,
                row: layout.root_version as u32,
                start: 0,
                w: 1,
                d: 1,
                stripe: StripeNumber(1),
            },
            freed: freed.to_vec(),
            unsettled: vec![],
        }
    }

    /// Takes the volume over, with one band that holds the root, and serves.
    pub(crate) fn serve(&mut self, volume: VolumeId, node: u32) -> Band {
        self.begin(volume, node).unwrap();
        let recovered = self.state.epoch_grant(volume).unwrap().recover;
        let band = self.band(volume);
        let update = self.root(volume, band.id, &[]);
        self.accept(Command::FinishTakeover {
            update,
            recovered,
            ended_at: StripeNumber(7),
        });
        band
    }
}

pub(crate) fn init() -> Command {
    Command::Init {
        id: ClusterId([1; 16]),
        name: "test".into(),
        authentication_key: [2; 32],
        fencing_host_id: HostId([3; 16]),
        fencing_key: 4,
        settings: Settings::default(),
    }
}

pub(crate) fn new_node(index: u32) -> NewNode {
    NewNode {
        name: format!("node-{index}"),
        rack: None,
        control_address: format!("127.0.0.1:{}", 1000 + index),
        nvme_address: format!("127.0.0.1:{}", 2000 + index),
    }
}

pub(crate) fn new_volume(name: &str) -> NewVolume {
    NewVolume {
        name: name.into(),
        pool: PoolId(1),
        size_bytes: 1 << 30,
        block_bytes: 4096,
        geometry: None,
        uuid: [name.len() as u8; 16],
        subnqn: format!("nqn.2026-01.example:{name}").parse().unwrap(),
        allowed_hosts: BTreeSet::new(),
        presentation: Presentation::All,
        preferred: None,
    }
}

pub(crate) fn geometry(k: u8, m: u8) -> Geometry {
    Geometry::new(k, m).unwrap()
}
