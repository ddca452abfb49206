use zerocopy::FromBytes;

use super::*;

/// An entry with dwords 10 to 12 written by hand.
fn entry(opcode: u8, nsid: u8, dwords: [[u8; 4]; 3]) -> Sqe {
    let mut bytes = [0; 64];
    bytes[0] = opcode;
    bytes[1] = 0x40;
    bytes[4] = nsid;
    for (index, dword) in dwords.iter().enumerate() {
        bytes[40 + 4 * index..44 + 4 * index].copy_from_slice(dword);
    }
    Sqe::read_from_bytes(&bytes).unwrap()
}

#[test]
fn a_write_carries_lba_zero_based_count_and_fua() {
    let sqe = entry(
        0x01,
        3,
        [[0x10, 0, 0, 0], [0x01, 0, 0, 0], [0x07, 0x00, 0x00, 0x40]],
    );
    let range = BlockRange {
        start: Lba(0x1_0000_0010),
        count: BlockCount::from_nlb_z(7),
    };
    assert_eq!(
        NvmCommand::parse(&sqe),
        Ok(NvmCommand::Write { range, fua: true })
    );
    assert_eq!(submit::write(3, range.start, range.count, true), sqe);
}

#[test]
fn write_zeroes_carries_deallocate() {
    let sqe = entry(0x08, 1, [[0; 4], [0; 4], [0xff, 0xff, 0x00, 0x02]]);
    let range = BlockRange {
        start: Lba(0),
        count: BlockCount::from_nlb_z(0xffff),
    };
    assert_eq!(
        NvmCommand::parse(&sqe),
        Ok(NvmCommand::WriteZeroes {
            range,
            deallocate: true,
            fua: false
        })
    );
    assert_eq!(
        submit::write_zeroes(1, range.start, range.count, true, false),
        sqe
    );
}

#[test]
fn dataset_management_counts_from_zero() {
    let sqe = entry(0x09, 1, [[0xff, 0, 0, 0], [0x04, 0, 0, 0], [0; 4]]);
    assert_eq!(
        NvmCommand::parse(&sqe),
        Ok(NvmCommand::DatasetManagement {
            ranges: 256,
            deallocate: true
        })
    );
    assert_eq!(submit::deallocate(1, 256), sqe);
}

#[test]
fn a_register_carries_action_key_check_and_persistence() {
    let sqe = entry(0x0d, 1, [[0x0a, 0, 0, 0xc0], [0; 4], [0; 4]]);
    assert_eq!(
        NvmCommand::parse(&sqe),
        Ok(NvmCommand::ReservationRegister {
            action: RegisterAction::Replace,
            ignore_existing_key: true,
            persist: PersistChange::Set
        })
    );
    assert_eq!(
        submit::reservation_register(1, RegisterAction::Replace, true, PersistChange::Set),
        sqe
    );
    let reserved = entry(0x0d, 1, [[0x00, 0, 0, 0x40], [0; 4], [0; 4]]);
    assert_eq!(NvmCommand::parse(&reserved), Err(Status::INVALID_FIELD.dnr()));
}

#[test]
fn preempt_and_abort_is_action_two() {
    let sqe = entry(0x11, 1, [[0x02, 0x05, 0, 0], [0; 4], [0; 4]]);
    let rtype = ReservationType::WriteExclusiveAllRegistrants;
    let action = AcquireAction::PreemptAndAbort;
    assert_eq!(
        NvmCommand::parse(&sqe),
        Ok(NvmCommand::ReservationAcquire { action, rtype })
    );
    assert_eq!(submit::reservation_acquire(1, action, rtype), sqe);
}

#[test]
fn a_release_and_a_report_read_as_written() {
    let release = entry(0x15, 1, [[0x00, 0x01, 0, 0], [0; 4], [0; 4]]);
    assert_eq!(
        NvmCommand::parse(&release),
        Ok(NvmCommand::ReservationRelease {
            action: ReleaseAction::Release,
            rtype: Some(ReservationType::WriteExclusive)
        })
    );
    assert_eq!(
        submit::reservation_release(1, ReleaseAction::Release, ReservationType::WriteExclusive),
        release
    );
    let report = entry(0x0e, 1, [[0xff, 0x03, 0, 0], [1, 0, 0, 0], [0; 4]]);
    assert_eq!(
        NvmCommand::parse(&report),
        Ok(NvmCommand::ReservationReport {
            bytes: 4096,
            extended: true
        })
    );
    assert_eq!(submit::reservation_report(1, 4096), report);
}

#[test]
fn a_log_page_request_joins_the_halves_of_its_length() {
    let mut sqe = entry(
        0x02,
        0,
        [[0x0c, 0x81, 0xff, 0xff], [0x01, 0, 0, 0], [0x08, 0, 0, 0]],
    );
    assert_eq!(
        AdminCommand::parse(&sqe),
        Ok(AdminCommand::GetLogPage(GetLogPage {
            lid: LogPageId::ANA,
            lsp: 1,
            retain_event: true,
            bytes: 0x2_0000 * 4,
            offset: 8,
        }))
    );
    assert_eq!(
        submit::get_log_page(LogPageId::ANA, 0, 1, true, 8, 0x2_0000 * 4),
        sqe
    );
    sqe.cdw12 = 6.into();
    assert_eq!(AdminCommand::parse(&sqe), Err(Status::INVALID_FIELD.dnr()));
}

#[test]
fn identify_and_features_read_as_written() {
    let identify = entry(0x06, 5, [[0x00, 0, 0, 0], [0; 4], [0; 4]]);
    assert_eq!(
        AdminCommand::parse(&identify),
        Ok(AdminCommand::Identify {
            cns: Cns::NAMESPACE,
            cntid: 0,
            csi: 0,
            nsid: 5
        })
    );
    assert_eq!(submit::identify(Cns::NAMESPACE, 5), identify);
    let set = entry(0x09, 0, [[0x07, 0, 0, 0], [0x03, 0, 0x03, 0], [0; 4]]);
    assert_eq!(
        AdminCommand::parse(&set),
        Ok(AdminCommand::SetFeatures {
            fid: FeatureId::NUMBER_OF_QUEUES,
            save: false,
            nsid: 0,
            value: 0x0003_0003
        })
    );
    assert_eq!(
        submit::set_features(FeatureId::NUMBER_OF_QUEUES, 0, 0x0003_0003),
        set
    );
}

#[test]
fn unknown_opcodes_are_answered_with_a_status() {
    assert_eq!(
        AdminCommand::parse(&entry(0x80, 0, [[0; 4]; 3])),
        Err(Status::INVALID_OPCODE.dnr())
    );
    assert_eq!(
        NvmCommand::parse(&entry(0x99, 0, [[0; 4]; 3])),
        Err(Status::INVALID_OPCODE.dnr())
    );
}

#[test]
fn every_opcode_with_every_low_byte_parses_or_answers() {
    // Cheap totality: no value of opcode or of the first dword byte panics.
    for opcode in 0..=255 {
        for byte in 0..=255 {
            let sqe = entry(opcode, 1, [[byte; 4], [byte; 4], [byte; 4]]);
            let _ = AdminCommand::parse(&sqe);
            let _ = NvmCommand::parse(&sqe);
        }
    }
}
