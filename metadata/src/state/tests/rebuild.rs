//! One column of a band is replaced: who may, what is refused, and where the chunks end up.

use weft_proto::band::{Band, ChunkAddress, Replacement};
use weft_proto::id::{BandId, DriveId, Epoch, IncarnationId, NodeId, StripeNumber, VolumeId};

use super::super::command::{Command, Refusal, ReplacementRequest, Reply};
use super::{Checked, geometry};

/// Five nodes, and a volume of 1+1 that node 1 serves; its band lies on the first two drives.
fn serving() -> (Checked, VolumeId, Band) {
    let mut cluster = Checked::cluster(5, 256, geometry(1, 1));
    let volume = cluster.volume("v");
    let band = cluster.serve(volume, 1);
    assert_eq!(
        (band.columns[0].drive, band.columns[1].drive),
        (DriveId(1), DriveId(2))
    );
    (cluster, volume, band)
}

impl Checked {
    fn ask(&self, volume: VolumeId, request: u64, band: &Band, column: u8, drive: u32) -> Command {
        let request = ReplacementRequest {
            volume,
            epoch: self.state.map.volumes[&volume].epoch,
            request,
            band: band.id,
            column,
            version: band.version,
        };
        let drive = DriveId(drive);
        Command::GrantReplacement { request, drive }
    }

    fn replacement(
        &mut self,
        volume: VolumeId,
        request: u64,
        band: &Band,
        column: u8,
        drive: u32,
    ) -> Replacement {
        let command = self.ask(volume, request, band, column, drive);
        match self.accept(command) {
            Reply::Replacement(replacement) => replacement,
            reply => panic!("{reply:?}"),
        }
    }

    fn install(&self, volume: VolumeId, replacement: Replacement, settled: bool) -> Command {
        Command::InstallReplacement {
            volume,
            epoch: self.state.map.volumes[&volume].epoch,
            replacement,
            settled,
        }
    }

    fn installed(&mut self, volume: VolumeId, replacement: Replacement, settled: bool) -> Band {
        let command = self.install(volume, replacement, settled);
        match self.accept(command) {
            Reply::Band(band) => band,
            reply => panic!("{reply:?}"),
        }
    }

    fn waits_for(&self, chunk: ChunkAddress) -> Option<IncarnationId> {
        let quarantine = &self.state.chunks[&chunk.drive].quarantine;
        quarantine.get(&chunk.offset_mib).map(|waiting| waiting.writer)
    }

    fn is_free(&self, chunk: ChunkAddress, band: &Band) -> bool {
        let space = &self.state.chunks[&chunk.drive].space;
        !space.is_allocated(chunk.offset_mib, band.chunk_size)
    }
}

#[test]
fn an_installed_chunk_takes_the_columns_place_and_the_old_one_waits_for_its_writer() {
    let (mut cluster, volume, band) = serving();
    let fresh = cluster.replacement(volume, 7, &band, 1, 3);
    assert_eq!(fresh.chunk.drive, DriveId(3));
    let now = cluster.installed(volume, fresh, false);
    assert_eq!((now.version, now.columns[0]), (1, band.columns[0]));
    assert_eq!(now.columns[1], fresh.chunk);
    assert_eq!(cluster.waits_for(band.columns[1]), Some(IncarnationId(1)));
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(1),
    });
    cluster.fence(IncarnationId(1), &[2]);
    assert!(cluster.is_free(band.columns[1], &band));
}

#[test]
fn the_old_chunk_is_free_at_once_where_its_owner_says_that_its_writes_have_ended() {
    let (mut cluster, volume, band) = serving();
    let fresh = cluster.replacement(volume, 7, &band, 1, 3);
    cluster.installed(volume, fresh, true);
    assert!(cluster.is_free(band.columns[1], &band));
}

#[test]
fn a_successor_cannot_say_that_a_former_owners_writes_have_ended() {
    let (mut cluster, volume, band) = serving();
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(1),
    });
    // Fenced on one of two drives: enough for 1+1.
    cluster.fence(IncarnationId(1), &[1]);
    cluster.serve(volume, 3);
    let fresh = cluster.replacement(volume, 7, &band, 1, 4);
    cluster.installed(volume, fresh, true);
    assert_eq!(cluster.waits_for(band.columns[1]), Some(IncarnationId(1)));
    // The new chunk is the rebuilder's: when its band goes, nobody's write is under way to it.
    let root = cluster.state.layouts[&volume].root.unwrap().band;
    let update = cluster.root(volume, root, &[band.id]);
    cluster.accept(Command::PublishRoot { update });
    assert!(cluster.is_free(fresh.chunk, &band));
}

#[test]
fn repeated_commands_are_answered_as_the_first_were() {
    let (mut cluster, volume, band) = serving();
    let ask = cluster.ask(volume, 7, &band, 1, 3);
    let first = cluster.accept(ask.clone());
    let fresh = cluster.replacement(volume, 7, &band, 1, 4);
    assert_eq!(
        first,
        Reply::Replacement(fresh),
        "the same request, proposed elsewhere"
    );
    let now = cluster.installed(volume, fresh, true);
    let before = cluster.state.clone();
    assert_eq!(cluster.installed(volume, fresh, false), now);
    assert_eq!(
        cluster.refuse(ask),
        Refusal::BandConflict {
            band: band.id,
            expected: 0,
            current: 1
        },
        "a late copy of the first command takes nothing"
    );
    let back = Command::ReturnReplacement {
        volume,
        epoch: Epoch(1),
        replacement: fresh,
        settled: true,
    };
    assert_eq!(cluster.accept(back), Reply::Unchanged, "it is the band's by now");
    assert_eq!(cluster.state, before);
}

#[test]
fn a_chunk_is_granted_only_where_the_owner_is_registered_and_apart_from_the_other_columns() {
    let (mut cluster, volume, band) = serving();
    for (column, drive) in [(1, 1), (0, 2)] {
        assert_eq!(
            cluster.refuse(cluster_ask(&cluster, volume, &band, column, drive)),
            Refusal::ProposalConflict {
                drive: DriveId(drive)
            },
            "the other column's node"
        );
    }
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(3),
    });
    cluster.fence(IncarnationId(1), &[4]);
    for drive in [3, 4] {
        assert_eq!(
            cluster.refuse(cluster_ask(&cluster, volume, &band, 1, drive)),
            Refusal::ProposalConflict {
                drive: DriveId(drive)
            },
            "its node is down, or the owner is not registered there"
        );
    }
    assert_eq!(
        cluster.refuse(cluster_ask(&cluster, volume, &band, 2, 5)),
        Refusal::NoSuchColumn {
            band: band.id,
            column: 2
        }
    );
}

fn cluster_ask(cluster: &Checked, volume: VolumeId, band: &Band, column: u8, drive: u32) -> Command {
    cluster.ask(volume, 99, band, column, drive)
}

#[test]
fn two_replacements_of_one_version_cannot_both_be_installed() {
    let (mut cluster, volume, band) = serving();
    // Each is apart from the other's former column, and both are on one drive.
    let first = cluster.replacement(volume, 7, &band, 0, 3);
    let second = cluster.replacement(volume, 8, &band, 1, 3);
    cluster.installed(volume, first, true);
    let install = cluster.install(volume, second, true);
    assert_eq!(
        cluster.refuse(install),
        Refusal::BandConflict {
            band: band.id,
            expected: 0,
            current: 1
        }
    );
}

#[test]
fn each_attempt_takes_a_fresh_chunk_and_the_one_before_it_waits_for_its_writer() {
    let (mut cluster, volume, band) = serving();
    let first = cluster.replacement(volume, 7, &band, 1, 3);
    let second = cluster.replacement(volume, 8, &band, 1, 3);
    assert_ne!(first.chunk, second.chunk);
    assert_eq!(cluster.waits_for(first.chunk), Some(IncarnationId(1)));
    let install = cluster.install(volume, first, true);
    assert_eq!(
        cluster.refuse(install),
        Refusal::NoSuchReplacement {
            band: band.id,
            column: 1
        }
    );
    cluster.installed(volume, second, true);
}

#[test]
fn a_returned_chunk_is_free_if_its_writes_have_ended_and_waits_otherwise() {
    let (mut cluster, volume, band) = serving();
    for settled in [true, false] {
        let fresh = cluster.replacement(volume, 7, &band, 1, 3);
        let back = Command::ReturnReplacement {
            volume,
            epoch: Epoch(1),
            replacement: fresh,
            settled,
        };
        assert_eq!(cluster.accept(back.clone()), Reply::Applied);
        assert_eq!(cluster.is_free(fresh.chunk, &band), settled);
        assert_eq!(cluster.accept(back), Reply::Unchanged);
    }
}

#[test]
fn what_was_not_installed_waits_for_its_writer_when_the_band_is_freed() {
    let (mut cluster, volume, band) = serving();
    let other = cluster.band(volume);
    let fresh = cluster.replacement(volume, 7, &band, 1, 3);
    let update = cluster.root(volume, other.id, &[band.id]);
    cluster.accept(Command::PublishRoot { update });
    assert!(cluster.is_free(band.columns[1], &band));
    assert_eq!(cluster.waits_for(fresh.chunk), Some(IncarnationId(1)));
    let install = cluster.install(volume, fresh, true);
    assert_eq!(cluster.refuse(install), Refusal::NoSuchBand(band.id));
}

#[test]
fn what_was_not_installed_waits_for_its_writer_when_the_volume_moves() {
    let (mut cluster, volume, band) = serving();
    let fresh = cluster.replacement(volume, 7, &band, 1, 3);
    let install = cluster.install(volume, fresh, true);
    cluster.accept(Command::Handover {
        volume,
        epoch: Epoch(1),
        last_stripe: StripeNumber(9),
        update: None,
        unsettled: vec![],
        to: NodeId(2),
    });
    assert_eq!(cluster.waits_for(fresh.chunk), Some(IncarnationId(1)));
    assert!(matches!(cluster.refuse(install), Refusal::Stale { .. }));
    let grant = cluster.state.epoch_grant(volume).unwrap();
    assert_eq!(grant.bands, [band], "the new owner finds the band as it was");
}

#[test]
fn what_was_not_installed_is_free_when_the_volume_is_gone_and_its_writer_fenced() {
    let (mut cluster, volume, band) = serving();
    let fresh = cluster.replacement(volume, 7, &band, 1, 3);
    cluster.accept(Command::DeleteVolume { volume });
    cluster.accept(Command::FinishDelete {
        volume,
        epoch: Epoch(1),
        unsettled: Some(vec![]),
    });
    assert!(cluster.is_free(band.columns[1], &band));
    assert_eq!(cluster.waits_for(fresh.chunk), Some(IncarnationId(1)));
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(1),
    });
    cluster.fence(IncarnationId(1), &[3]);
    assert!(cluster.is_free(fresh.chunk, &band));
}

#[test]
fn only_an_owner_that_serves_rebuilds_and_only_bands_that_there_are() {
    let (mut cluster, volume, band) = serving();
    let mut unknown = band.clone();
    unknown.id = BandId(99);
    assert_eq!(
        cluster.refuse(cluster_ask(&cluster, volume, &unknown, 1, 3)),
        Refusal::NoSuchBand(BandId(99))
    );
    cluster.accept(Command::MarkDead {
        incarnation: IncarnationId(1),
    });
    assert_eq!(
        cluster.refuse(cluster_ask(&cluster, volume, &band, 1, 3)),
        Refusal::IncarnationIsDead(IncarnationId(1))
    );
    cluster.begin(volume, 2).unwrap();
    assert_eq!(
        cluster.refuse(cluster_ask(&cluster, volume, &band, 1, 3)),
        Refusal::WrongPhase(volume),
        "it recovers"
    );
}

#[test]
fn a_layout_of_before_reads_back_without_replacements() {
    let (cluster, volume, _) = serving();
    let layout = &cluster.state.layouts[&volume];
    let mut value = ciborium::Value::serialized(layout).unwrap();
    let ciborium::Value::Map(fields) = &mut value else {
        panic!("a map of fields");
    };
    fields.retain(|(name, _)| name.as_text() != Some("replacements"));
    for (name, bands) in fields {
        if name.as_text() == Some("bands") {
            let ciborium::Value::Map(bands) = bands else {
                panic!("bands by id");
            };
            for (_, record) in bands {
                let ciborium::Value::Map(record) = record else {
                    panic!("a map of fields");
                };
                record.retain(|(name, _)| name.as_text() != Some("replaced"));
            }
        }
    }
    assert_eq!(
        value
            .deserialized::<super::super::layout::VolumeLayout>()
            .unwrap(),
        *layout
    );
}
