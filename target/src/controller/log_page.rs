//! Get Log Page.

use weft_proto::fabrics::discovery::discovery_page;
use weft_proto::nvme::command::{GetLogPage, LogPageId};
use weft_proto::nvme::event::AsyncEvent;
use weft_proto::nvme::identify::namespace_list;
use weft_proto::nvme::log::{
    AnaGroupDescriptor, AnaHeader, AnaLog, EFFECT_CONTENT_CHANGE, EFFECT_SUPPORTED, ErrorEntry, SmartLog,
    commands_supported, firmware_slot,
};
use weft_proto::nvme::opcode::{AdminOpcode, NvmOpcode};
use weft_proto::nvme::status::Status;
use zerocopy::{FromZeros, IntoBytes};

use super::Controller;
use crate::request::TRANSFER_BYTES_MAX;

/// What a SMART page shows: a temperature that alarms nobody (kelvin), and all spare available.
const TEMPERATURE_KELVIN: u16 = 310;

impl Controller {
    pub(super) fn log_page(&self, request: &GetLogPage) -> Result<Vec<u8>, Status> {
        let invalid_field = Status::INVALID_FIELD.dnr();
        if request.bytes > u64::from(TRANSFER_BYTES_MAX) {
            return Err(invalid_field);
        }
        let mut page = self.whole_page(request)?;
        // Read in pieces, a page is read when its first piece is: what changes later is a new event.
        if !request.retain_event {
            self.events.borrow_mut().log_read(request.lid.0);
        }
        if request.lid == LogPageId::RESERVATION_NOTIFICATION && self.has_notification() {
            self.raise(AsyncEvent::RESERVATION_LOG);
        }
        let offset = usize::try_from(request.offset).map_err(|_| invalid_field)?;
        if offset > page.len() {
            return Err(invalid_field);
        }
        page.drain(..offset);
        page.resize(request.bytes as usize, 0);
        Ok(page)
    }

    fn has_notification(&self) -> bool {
        let (page, _) = self.events.borrow_mut().reservation_notification(true);
        page.log_page_count.get() != 0
    }

    fn whole_page(&self, request: &GetLogPage) -> Result<Vec<u8>, Status> {
        let unknown = Status::INVALID_LOG_PAGE.dnr();
        // Reading these two takes what they hold, so only a read from the start does.
        let retain = request.retain_event || request.offset > 0;
        let Some(subsystem) = self.subsystem() else {
            return match request.lid {
                LogPageId::DISCOVERY => {
                    let (genctr, entries) = self.registry.discovery_log(&self.association.hostnqn);
                    Ok(discovery_page(genctr, &entries))
                }
                LogPageId::ERROR => Ok(ErrorEntry::new_zeroed().as_bytes().to_vec()),
                _ => Err(unknown),
            };
        };
        Ok(match request.lid {
            LogPageId::ERROR => ErrorEntry::new_zeroed().as_bytes().to_vec(),
            LogPageId::SMART => {
                let mut smart = SmartLog::new_zeroed();
                smart.temperature = TEMPERATURE_KELVIN.into();
                smart.avail_spare = 100;
                smart.as_bytes().to_vec()
            }
            LogPageId::FIRMWARE_SLOT => {
                let mut revision = [b' '; 8];
                weft_proto::nvme::identify::fill_field(&mut revision, &self.registry.config().firmware, b' ');
                firmware_slot(&revision)
            }
            LogPageId::CHANGED_NAMESPACES => {
                namespace_list(self.events.borrow_mut().changed_namespaces(retain).into_iter())
            }
            LogPageId::COMMANDS_SUPPORTED => effects(),
            LogPageId::ANA => {
                let log = subsystem.ana_log(request.lsp & AnaLog::GROUPS_ONLY != 0);
                let mut page = log.to_bytes();
                // Some hosts read the longest page there could be, in pieces: there is no offset past its end.
                let groups = self.registry.config().ana_group_max as usize;
                let nsids = subsystem.config.namespaces_max as usize;
                let descriptors = groups * size_of::<AnaGroupDescriptor>() + nsids * size_of::<u32>();
                page.resize(size_of::<AnaHeader>() + descriptors, 0);
                page
            }
            LogPageId::RESERVATION_NOTIFICATION => {
                let (page, _) = self.events.borrow_mut().reservation_notification(retain);
                page.as_bytes().to_vec()
            }
            _ => return Err(unknown),
        })
    }
}

fn effects() -> Vec<u8> {
    const SUPPORTED: u32 = EFFECT_SUPPORTED;
    const WRITES: u32 = EFFECT_SUPPORTED | EFFECT_CONTENT_CHANGE;
    let admin = [
        AdminOpcode::GET_LOG_PAGE,
        AdminOpcode::IDENTIFY,
        AdminOpcode::ABORT,
        AdminOpcode::SET_FEATURES,
        AdminOpcode::GET_FEATURES,
        AdminOpcode::ASYNC_EVENT_REQUEST,
        AdminOpcode::KEEP_ALIVE,
    ]
    .map(|opcode| (opcode.0, SUPPORTED));
    let io = [
        (NvmOpcode::FLUSH, SUPPORTED),
        (NvmOpcode::WRITE, WRITES),
        (NvmOpcode::READ, SUPPORTED),
        (NvmOpcode::COMPARE, SUPPORTED),
        (NvmOpcode::WRITE_ZEROES, WRITES),
        (NvmOpcode::DATASET_MANAGEMENT, WRITES),
        (NvmOpcode::VERIFY, SUPPORTED),
        (NvmOpcode::RESERVATION_REGISTER, SUPPORTED),
        (NvmOpcode::RESERVATION_REPORT, SUPPORTED),
        (NvmOpcode::RESERVATION_ACQUIRE, SUPPORTED),
        (NvmOpcode::RESERVATION_RELEASE, SUPPORTED),
    ]
    .map(|(opcode, effects)| (opcode.0, effects));
    commands_supported(&admin, &io)
}
