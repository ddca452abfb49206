//! Commands and the structures that answer them: what a target decodes of a host, and a host of a target.
//!
//! A command that was decoded, asked for by the host's side and decoded again is the same, as far as the host's side can ask
//! for it. Pages and lists survive encoding; their memory is bounded by their bytes.

use weft_proto::fabrics::command::{ConnectData, FabricsCommand};
use weft_proto::fabrics::discovery::DiscoveryEntry;
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;
use weft_proto::nvme::command::submit;
use weft_proto::nvme::command::{AdminCommand, Cns, GetLogPage, LogPageId, NvmCommand};
use weft_proto::nvme::feature::FeatureId;
use weft_proto::nvme::identify::{IdentifyNamespace, namespaces_of_list, uuid_of_descriptors};
use weft_proto::nvme::identify::{namespace_descriptors, namespace_list};
use weft_proto::nvme::log::{AnaGroup, AnaLog, AnaState};
use weft_proto::nvme::reservation::{
    AcquireAction, PersistChange, RegisterAction, Registrant, ReleaseAction, ReservationStatus,
    ReservationType,
};
use weft_proto::nvme::sqe::Sqe;
use weft_proto::units::{BlockCount, Lba};
use zerocopy::{FromBytes, IntoBytes};

use crate::input::Input;
use crate::memory::bounded;

/// Byte 0 says as what the others are read.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    let bytes = input.rest();
    bounded(16 * bytes.len() + (16 << 10), || match kind % 6 {
        0 => entry(bytes),
        1 => ana_log(bytes),
        2 => reservation_status(bytes),
        3 => namespaces(bytes),
        4 => connect_data(bytes),
        _ => discovery(bytes),
    });
}

fn entry(bytes: &[u8]) {
    let Ok((sqe, _)) = Sqe::read_from_prefix(bytes) else {
        return;
    };
    let nsid = sqe.nsid.get();
    // Looked at by a queue pair before anything else.
    let _ = (sqe.fuse(), sqe.data_pointer());
    if let Ok(command) = FabricsCommand::parse(&sqe) {
        assert_eq!(FabricsCommand::parse(&command.to_sqe()), Ok(command));
    }
    if let Ok(command) = AdminCommand::parse(&sqe)
        && let Some(again) = admin(command)
    {
        assert_eq!(AdminCommand::parse(&again), Ok(command));
    }
    if let Ok(command) = NvmCommand::parse(&sqe)
        && let Some(again) = nvm(nsid, command)
    {
        assert_eq!(again.nsid.get(), nsid);
        assert_eq!(NvmCommand::parse(&again), Ok(command));
    }
}

/// The entry that asks for a command, where the host's side can.
fn admin(command: AdminCommand) -> Option<Sqe> {
    Some(match command {
        AdminCommand::GetLogPage(GetLogPage {
            lid,
            lsp,
            retain_event,
            bytes,
            offset,
        }) => submit::get_log_page(lid, 0, lsp, retain_event, offset, u32::try_from(bytes).ok()?),
        AdminCommand::Identify {
            cns,
            cntid: 0,
            csi: 0,
            nsid,
        } => submit::identify(cns, nsid),
        AdminCommand::Abort { sqid, cid } => submit::abort(sqid, cid),
        AdminCommand::SetFeatures {
            fid,
            save: false,
            nsid,
            value,
        } => submit::set_features(fid, nsid, value),
        AdminCommand::GetFeatures {
            fid,
            sel: 0,
            nsid,
            value: 0,
        } => submit::get_features(fid, nsid),
        AdminCommand::AsyncEventRequest => submit::async_event_request(),
        AdminCommand::KeepAlive => submit::keep_alive(),
        AdminCommand::Identify { .. }
        | AdminCommand::SetFeatures { .. }
        | AdminCommand::GetFeatures { .. } => {
            return None;
        }
    })
}

/// The same for I/O commands.
fn nvm(nsid: u32, command: NvmCommand) -> Option<Sqe> {
    Some(match command {
        NvmCommand::Flush => submit::flush(nsid),
        NvmCommand::Write { range, fua } => submit::write(nsid, range.start, range.count, fua),
        NvmCommand::Read { range } => submit::read(nsid, range.start, range.count),
        NvmCommand::Compare { range } => submit::compare(nsid, range.start, range.count),
        NvmCommand::WriteZeroes {
            range,
            deallocate,
            fua,
        } => submit::write_zeroes(nsid, range.start, range.count, deallocate, fua),
        NvmCommand::DatasetManagement {
            ranges,
            deallocate: true,
        } => submit::deallocate(nsid, ranges),
        NvmCommand::Verify { range } => submit::verify(nsid, range.start, range.count),
        NvmCommand::ReservationRegister {
            action,
            ignore_existing_key,
            persist,
        } => submit::reservation_register(nsid, action, ignore_existing_key, persist),
        NvmCommand::ReservationReport {
            bytes,
            extended: true,
        } => submit::reservation_report(nsid, u32::try_from(bytes).ok()?),
        NvmCommand::ReservationAcquire { action, rtype } => submit::reservation_acquire(nsid, action, rtype),
        NvmCommand::ReservationRelease {
            action,
            rtype: Some(rtype),
        } => submit::reservation_release(nsid, action, rtype),
        NvmCommand::DatasetManagement { .. }
        | NvmCommand::ReservationReport { .. }
        | NvmCommand::ReservationRelease { .. } => return None,
    })
}

fn ana_log(bytes: &[u8]) {
    if let Some(log) = AnaLog::parse(bytes) {
        let again = log.to_bytes();
        assert!(again.len() <= bytes.len());
        assert_eq!(AnaLog::parse(&again), Some(log));
    }
}

fn reservation_status(bytes: &[u8]) {
    let needed = ReservationStatus::bytes_needed(bytes);
    let status = ReservationStatus::parse(bytes);
    if let (Some(status), Some(needed)) = (status, needed) {
        assert!(needed <= bytes.len(), "what was parsed was there");
        let again = status.to_bytes();
        assert!(again.len() <= bytes.len());
        assert_eq!(ReservationStatus::parse(&again), Some(status));
    }
}

fn namespaces(bytes: &[u8]) {
    let nsids: Vec<u32> = namespaces_of_list(bytes).collect();
    assert!(nsids.iter().all(|&nsid| nsid != 0));
    let _ = uuid_of_descriptors(bytes);
    if let Ok((namespace, _)) = IdentifyNamespace::read_from_prefix(bytes)
        && let Some(block_bytes) = namespace.block_bytes()
    {
        assert!(block_bytes.is_power_of_two());
    }
}

fn connect_data(bytes: &[u8]) {
    let Ok((data, _)) = ConnectData::read_from_prefix(bytes) else {
        return;
    };
    if let (Ok(subnqn), Ok(hostnqn)) = (Nqn::from_field(&data.subnqn), Nqn::from_field(&data.hostnqn)) {
        let again = ConnectData::new(HostId(data.hostid), data.cntlid.get(), &subnqn, &hostnqn);
        assert_eq!(Nqn::from_field(&again.subnqn), Ok(subnqn));
        assert_eq!(Nqn::from_field(&again.hostnqn), Ok(hostnqn));
        assert_eq!(again.hostid, data.hostid);
    }
}

fn discovery(bytes: &[u8]) {
    if let Ok((entry, _)) = DiscoveryEntry::read_from_prefix(bytes)
        && let (Some(subnqn), Some(address)) = (entry.subnqn(), entry.socket_addr())
    {
        let again = DiscoveryEntry::tcp(&subnqn, address, entry.portid.get());
        assert_eq!(again.subnqn(), Some(subnqn));
        assert_eq!(again.socket_addr(), Some(address));
    }
}

/// Every command that the host's side can ask for, and one of each structure.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let count = BlockCount::from_nlb_z(7);
    let commands = [
        submit::identify(Cns::CONTROLLER, 0),
        submit::get_log_page(LogPageId::ANA, 1, 1, true, 16, 4096),
        submit::abort(1, 2),
        submit::set_features(FeatureId(0x0b), 1, 0x100),
        submit::get_features(FeatureId(0x07), 0),
        submit::async_event_request(),
        submit::keep_alive(),
        submit::flush(1),
        submit::read(1, Lba(8), count),
        submit::write(1, Lba(8), count, true),
        submit::compare(1, Lba(8), count),
        submit::verify(1, Lba(8), count),
        submit::write_zeroes(1, Lba(8), count, true, true),
        submit::deallocate(1, 256),
        submit::reservation_register(1, RegisterAction::Replace, true, PersistChange::Set),
        submit::reservation_acquire(1, AcquireAction::PreemptAndAbort, ReservationType::WriteExclusive),
        submit::reservation_release(1, ReleaseAction::Clear, ReservationType::ExclusiveAccess),
        submit::reservation_report(1, 4096),
        FabricsCommand::Disconnect.to_sqe(),
    ];
    let mut seeds: Vec<Vec<u8>> = commands.iter().map(|sqe| seed(0, sqe.as_bytes())).collect();
    let ana = AnaLog {
        change_count: 3,
        groups: vec![AnaGroup {
            anagrpid: 1,
            change_count: 2,
            state: AnaState::OPTIMIZED,
            nsids: vec![1, 2, 3],
        }],
    };
    let status = ReservationStatus {
        generation: 9,
        rtype: Some(ReservationType::WriteExclusiveAllRegistrants),
        ptpl: true,
        registrants: vec![Registrant {
            hostid: HostId([0xaa; 16]),
            key: 7,
            holder: true,
        }],
    };
    let nqn: Nqn = "nqn.2014-08.org.nvmexpress:uuid:weft".parse().expect("a name");
    seeds.push(seed(1, &ana.to_bytes()));
    seeds.push(seed(2, &status.to_bytes()));
    seeds.push(seed(3, &namespace_list([1, 2].into_iter())));
    seeds.push(seed(3, &namespace_descriptors(&[7; 16])));
    seeds.push(seed(
        4,
        ConnectData::new(HostId([1; 16]), 0xffff, &nqn, &nqn).as_bytes(),
    ));
    let address = ([127, 0, 0, 1], 4420).into();
    seeds.push(seed(5, DiscoveryEntry::tcp(&nqn, address, 1).as_bytes()));
    seeds
}

fn seed(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let mut seed = vec![kind];
    seed.extend_from_slice(bytes);
    seed
}
