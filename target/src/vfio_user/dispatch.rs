//! What a client asks of a function, once its message is parsed.

use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;

use super::function::Function;
use super::message::{self, REGION_BAR0, REGION_CONFIG, RegionWrite, Request};
use super::pci::CONFIG_BYTES;
use super::registers::{BAR0_BYTES, DOORBELLS_AT, DOORBELLS_BYTES};

/// What a client gets.
pub(super) struct Answer {
    /// Of the reply.
    pub(super) body: Vec<u8>,
    /// What goes with it.
    pub(super) file: Option<OwnedFd>,
}

impl From<Vec<u8>> for Answer {
    fn from(body: Vec<u8>) -> Self {
        Self { body, file: None }
    }
}

impl Function {
    /// Does what a client asks for.
    pub(super) fn handle(
        &mut self,
        request: Request<'_>,
        files: Vec<OwnedFd>,
        now: Instant,
    ) -> Result<Answer, Errno> {
        match request {
            Request::RegionInfo {
                index: REGION_BAR0,
                argsz,
            } => self.bar_info(argsz),
            request => self.handle_plain(request, files, now).map(Answer::from),
        }
    }

    fn bar_info(&self, argsz: u32) -> Result<Answer, Errno> {
        let Some(file) = self.doorbell_file() else {
            return Ok(message::region_info_reply(REGION_BAR0, BAR0_BYTES).into());
        };
        let doorbells = DOORBELLS_AT..DOORBELLS_AT + DOORBELLS_BYTES;
        let body = message::mapped_region_info_reply(REGION_BAR0, BAR0_BYTES, doorbells, argsz);
        // A client that has to ask again would get it twice.
        let is_whole = argsz >= message::MAPPED_REGION_INFO_BYTES;
        let file = if is_whole { Some(file?) } else { None };
        Ok(Answer { body, file })
    }

    /// Whatever is answered without a file.
    fn handle_plain(
        &mut self,
        request: Request<'_>,
        mut files: Vec<OwnedFd>,
        now: Instant,
    ) -> Result<Vec<u8>, Errno> {
        match request {
            Request::Version { .. } => Err(Errno::INVAL),
            Request::DmaMap(map) => {
                if files.len() > 1 {
                    return Err(Errno::INVAL);
                }
                self.memory.map(&map, files.pop()).map(|()| Vec::new())
            }
            Request::DmaUnmap { address, bytes } => {
                self.memory.unmap(address, bytes, now)?;
                Ok(message::unmap_reply(address, bytes))
            }
            Request::DeviceInfo => Ok(message::device_info_reply()),
            Request::RegionInfo { index, .. } => match index {
                REGION_CONFIG => Ok(message::region_info_reply(index, CONFIG_BYTES as u64)),
                index if index < message::REGIONS => Ok(message::region_info_reply(index, 0)),
                _ => Err(Errno::INVAL),
            },
            Request::InterruptInfo { index } if index < message::INTERRUPTS => {
                Ok(message::interrupt_info_reply(index, self.interrupts.count(index)))
            }
            Request::InterruptInfo { .. } => Err(Errno::INVAL),
            Request::SetInterrupts(set) => self.interrupts.set(&set, files).map(|()| Vec::new()),
            Request::RegionRead {
                region,
                offset,
                count,
            } => {
                let data = match region {
                    REGION_CONFIG => self.read_config(offset, count as usize).map(<[u8]>::to_vec),
                    REGION_BAR0 => {
                        let mut data = vec![0; count as usize];
                        self.read_bar(offset, &mut data).map(|()| data)
                    }
                    _ => None,
                };
                let data = data.ok_or(Errno::INVAL)?;
                Ok(message::access_reply(region, offset, count, &data))
            }
            Request::RegionWrite(write) => {
                self.write_region(&write)?;
                let count = write.data.len() as u32;
                Ok(message::access_reply(write.region, write.offset, count, &[]))
            }
            Request::RegionWriteMulti(writes) => {
                for write in &writes {
                    self.write_region(write)?;
                }
                Ok(message::write_multi_reply(writes.len()))
            }
            Request::Reset => {
                self.reset();
                Ok(Vec::new())
            }
        }
    }

    fn write_region(&mut self, write: &RegionWrite<'_>) -> Result<(), Errno> {
        let written = match write.region {
            REGION_BAR0 => self.write_bar(write.offset, write.data),
            REGION_CONFIG => self.write_config(write.offset, write.data),
            _ => None,
        };
        written.ok_or(Errno::INVAL)
    }
}
