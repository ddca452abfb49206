//! Identify: what a controller and its namespaces say of themselves.

use weft_proto::nvme::NSID_ALL;
use weft_proto::nvme::command::Cns;
use weft_proto::nvme::feature::AsyncEventConfig;
use weft_proto::nvme::identify::{
    IDENTIFY_BYTES, IdentifyController, IdentifyControllerNvm, IdentifyNamespace,
    IdentifyNamespaceIndependent, anacap, cmic, cntrltype, ctratt, fill_field, namespace_descriptors,
    namespace_list, oacs, oncs, rescap, sgls,
};
use weft_proto::nvme::status::Status;
use zerocopy::{FromZeros, IntoBytes};

use super::event::REQUESTS_MAX;
use super::{Controller, KEEP_ALIVE_GRANULARITY_100MS, Transport, VERSION};
use crate::namespace::OpenNamespace;
use crate::qpair::CAPSULE_BYTES_MAX;
use crate::request::TRANSFER_BYTES_MAX;

/// Seconds that a change of ANA state may take (ANATT). An unplanned takeover is done within two; hosts give up on a path
/// that stays in transition for longer.
const ANATT_SECONDS: u8 = 10;

/// CSI of the NVM command set, the only one here.
const CSI_NVM: u8 = 0;

impl Controller {
    pub(super) fn identify(&self, cns: Cns, csi: u8, nsid: u32) -> Result<Vec<u8>, Status> {
        let invalid_field = Status::INVALID_FIELD.dnr();
        let (cns, csi_matters) = match cns {
            Cns::NAMESPACE_CSI | Cns::CONTROLLER_CSI => (cns, true),
            Cns::ACTIVE_NAMESPACES_CSI => (Cns::ACTIVE_NAMESPACES, true),
            other => (other, false),
        };
        if csi_matters && csi != CSI_NVM {
            return Err(invalid_field);
        }
        if cns == Cns::CONTROLLER {
            return Ok(self.identify_controller().as_bytes().to_vec());
        }
        if self.is_discovery() {
            return Err(invalid_field);
        }
        match cns {
            Cns::NAMESPACE => {
                self.identify_if_active(nsid, |open| identify_namespace(open).as_bytes().to_vec())
            }
            Cns::NAMESPACE_INDEPENDENT => self.identify_if_active(nsid, |open| {
                identify_namespace_independent(open).as_bytes().to_vec()
            }),
            Cns::NAMESPACE_CSI => self.identify_if_active(nsid, |_| vec![0; IDENTIFY_BYTES]),
            Cns::CONTROLLER_CSI => {
                let mut limits = IdentifyControllerNvm::new_zeroed();
                limits.dmrl = u8::MAX;
                Ok(limits.as_bytes().to_vec())
            }
            Cns::ACTIVE_NAMESPACES => {
                if nsid >= NSID_ALL - 1 {
                    return Err(Status::INVALID_NAMESPACE.dnr());
                }
                let active = self.subsystem().map(|subsystem| {
                    namespace_list(
                        subsystem
                            .namespaces
                            .borrow()
                            .range(nsid + 1..)
                            .map(|(&nsid, _)| nsid),
                    )
                });
                active.ok_or(invalid_field)
            }
            Cns::NAMESPACE_DESCRIPTORS => {
                let open = self.namespace(nsid).ok_or(Status::INVALID_NAMESPACE.dnr())?;
                Ok(namespace_descriptors(&open.namespace.uuid))
            }
            Cns::COMMAND_SETS => {
                // One combination, of the NVM command set alone.
                let mut sets = vec![0; IDENTIFY_BYTES];
                sets[0] = 1;
                Ok(sets)
            }
            _ => Err(invalid_field),
        }
    }

    /// A structure of an active namespace; zeroes for one that could be, an error for one that could not.
    fn identify_if_active(
        &self,
        nsid: u32,
        structure: impl FnOnce(&OpenNamespace) -> Vec<u8>,
    ) -> Result<Vec<u8>, Status> {
        let nsid_max = self
            .subsystem()
            .map_or(0, |subsystem| subsystem.config.namespaces_max);
        match self.namespace(nsid) {
            Some(open) => Ok(structure(&open)),
            None if (1..=nsid_max).contains(&nsid) => Ok(vec![0; IDENTIFY_BYTES]),
            None => Err(Status::INVALID_NAMESPACE.dnr()),
        }
    }

    fn identify_controller(&self) -> IdentifyController {
        let config = self.registry.config();
        let mut data = IdentifyController::new_zeroed();
        // What any controller says.
        data.mdts = (TRANSFER_BYTES_MAX / 4096).ilog2() as u8;
        data.cntlid = self.association.cntlid.into();
        data.ver = VERSION.into();
        data.ctratt = ctratt::HOSTID_128.into();
        data.acl = 3;
        data.aerl = (REQUESTS_MAX - 1) as u8;
        // One slot of firmware, read only.
        data.frmw = 0b011;
        // Get Log Page takes offsets and long lengths; there is an effects page.
        data.lpa = 0b110;
        data.sqes = 0x66;
        data.cqes = 0x44;
        match self.transport {
            Transport::Fabrics => {
                data.ctratt = (ctratt::HOSTID_128 | ctratt::TBKAS).into();
                data.kas = KEEP_ALIVE_GRANULARITY_100MS.into();
                data.maxcmd = config.queue_entries_max.into();
                data.cqt = u16::try_from(config.command_quiesce.as_millis())
                    .unwrap_or(u16::MAX)
                    .into();
                data.sgls = (sgls::SUPPORTED | sgls::OFFSET | sgls::TRANSPORT).into();
                data.ioccsz = ((64 + CAPSULE_BYTES_MAX) / 16).into();
                data.iorcsz = 1.into();
                data.msdbd = 1;
                data.ofcs = 1.into();
            }
            Transport::Memory { doorbell_buffer } => {
                if doorbell_buffer {
                    data.oacs = oacs::DOORBELL_BUFFER.into();
                }
                data.sgls = (sgls::SUPPORTED | sgls::LONGER).into();
            }
        }
        fill_field(&mut data.fr, &config.firmware, b' ');
        fill_field(&mut data.subnqn, self.association.subsystem.as_str(), 0);
        let Some(subsystem) = self.subsystem() else {
            data.cntrltype = cntrltype::DISCOVERY;
            data.oaes = AsyncEventConfig::DISCOVERY_CHANGE.into();
            fill_field(&mut data.sn, "discovery", b' ');
            fill_field(&mut data.mn, "Weft discovery", b' ');
            return data;
        };
        data.cntrltype = cntrltype::IO;
        fill_field(&mut data.sn, &subsystem.config.serial, b' ');
        fill_field(&mut data.mn, &subsystem.config.model, b' ');
        data.oaes = AsyncEventConfig::NAMESPACE_ATTRIBUTE.into();
        // A function in a machine is its only path to the subsystem, and says nothing of paths.
        if self.transport == Transport::Fabrics {
            data.cmic = cmic::MULTI_PORT | cmic::MULTI_CONTROLLER | cmic::ANA;
            data.oaes = (AsyncEventConfig::NAMESPACE_ATTRIBUTE | AsyncEventConfig::ANA_CHANGE).into();
            data.anatt = ANATT_SECONDS;
            data.anacap = anacap::ALL_STATES | anacap::FIXED_GROUP;
            data.anagrpmax = config.ana_group_max.into();
            data.nanagrpid = config.ana_group_max.into();
        }
        data.nn = subsystem.config.namespaces_max.into();
        data.mnan = subsystem.config.namespaces_max.into();
        data.oncs = (oncs::COMPARE
            | oncs::DATASET_MANAGEMENT
            | oncs::WRITE_ZEROES
            | oncs::RESERVATIONS
            | oncs::VERIFY)
            .into();
        data.fuses = 1.into();
        // Bits 2:1 say 10b: Flush takes no NSID of all namespaces.
        data.vwc = u8::from(self.volatile_write_cache()) | 0b10 << 1;
        data
    }
}

fn identify_namespace(open: &OpenNamespace) -> IdentifyNamespace {
    let info = open.info();
    let mut data = IdentifyNamespace::new_zeroed();
    data.nsze = info.blocks.into();
    data.ncap = info.blocks.into();
    data.nuse = info.blocks.into();
    data.lbaf[0].lbads = info.block_bytes.ilog2() as u8;
    data.nmic = 1;
    data.rescap = reservation_capabilities(open);
    // Write Zeroes can deallocate; what deallocated blocks read as is the device's.
    data.dlfeat = 1 << 3 | u8::from(info.deallocated_reads_zero);
    data.nvmcap = u128::from(info.bytes()).to_le_bytes();
    data.anagrpid = open.namespace.ana_group.into();
    data.nguid = open.namespace.uuid;
    if info.block_bytes < 4096 {
        // The fabric's own block is 4 KiB: smaller or unaligned writes cost a merge (OPTPERF).
        let blocks_z = (4096 / info.block_bytes - 1) as u16;
        data.nsfeat = 1 << 4;
        data.npwg = blocks_z.into();
        data.npwa = blocks_z.into();
        data.npdg = blocks_z.into();
        data.npda = blocks_z.into();
        data.nows = blocks_z.into();
    }
    data
}

fn identify_namespace_independent(open: &OpenNamespace) -> IdentifyNamespaceIndependent {
    let mut data = IdentifyNamespaceIndependent::new_zeroed();
    data.nmic = 1;
    data.rescap = reservation_capabilities(open);
    data.anagrpid = open.namespace.ana_group.into();
    data.nstat = 1;
    data
}

fn reservation_capabilities(open: &OpenNamespace) -> u8 {
    open.reserved().map_or(0, |(reserved, _)| {
        let ptpl = if reserved.can_persist() { rescap::PTPL } else { 0 };
        ptpl | rescap::ALL_TYPES | rescap::IEKEY_1_3
    })
}
