//! Set Features and Get Features.

use std::time::Duration;

use weft_proto::nvme::NSID_ALL;
use weft_proto::nvme::feature::{AsyncEventConfig, FeatureId, HOST_BEHAVIOR_BYTES, NumberOfQueues};
use weft_proto::nvme::log::ReservationNotificationType;
use weft_proto::nvme::status::Status;

use super::event::NotificationMasks;
use super::{AdminAnswer, Controller, IoRequest, KEEP_ALIVE_GRANULARITY_100MS, Transport, cut};
use crate::request::Completion;

/// What a host has set. Nothing of it survives a controller reset.
#[derive(Default)]
pub(super) struct Features {
    /// Granted by Number of Queues.
    pub(super) io_queues: Option<u16>,
    host_behavior: Option<Box<[u8]>>,
    notification_masks: NotificationMasks,
}

impl Features {
    pub(super) fn masks_reservation_notice(&self, nsid: u32, kind: ReservationNotificationType) -> bool {
        self.notification_masks.mask(nsid) & kind.mask_bit() != 0
    }
}

/// A Keep Alive Timeout, rounded up to the timer's granularity; `None` for 0, which disables it.
pub(crate) fn kato(kato_ms: u32) -> Option<Duration> {
    let granularity_ms = u32::from(KEEP_ALIVE_GRANULARITY_100MS) * 100;
    let rounded = u64::from(kato_ms.div_ceil(granularity_ms)) * u64::from(granularity_ms);
    (kato_ms > 0).then(|| Duration::from_millis(rounded))
}

impl Controller {
    pub(super) fn set_feature(
        &self,
        request: &IoRequest,
        fid: FeatureId,
        save: bool,
        nsid: u32,
        value: u32,
    ) -> AdminAnswer {
        let done = |status| AdminAnswer::Now(request.complete(status));
        if save {
            return done(Status::FEATURE_NOT_SAVEABLE.dnr());
        }
        match fid {
            FeatureId::NUMBER_OF_QUEUES if !self.is_discovery() => {
                let Some(asked) = NumberOfQueues::from_dword(value) else {
                    return done(Status::INVALID_FIELD.dnr());
                };
                if self.queues.borrow().len() > 1 {
                    // Only before the first I/O queue.
                    return done(Status::COMMAND_SEQUENCE_ERROR.dnr());
                }
                let limit = u32::from(self.registry.config().io_queues_max);
                let count = asked.submission.min(asked.completion).min(limit);
                self.features.borrow_mut().io_queues = u16::try_from(count).ok();
                let granted = NumberOfQueues {
                    submission: count,
                    completion: count,
                };
                AdminAnswer::Now(
                    request
                        .complete(Status::SUCCESS)
                        .with_result(granted.to_dword().into()),
                )
            }
            FeatureId::KEEP_ALIVE_TIMER => {
                self.silence.set_kato(kato(value));
                done(Status::SUCCESS)
            }
            FeatureId::ASYNC_EVENT_CONFIG => {
                self.events.borrow_mut().config = AsyncEventConfig(value);
                done(Status::SUCCESS)
            }
            FeatureId::HOST_BEHAVIOR => {
                let data = crate::io::gather(&request.data);
                if data.len() != HOST_BEHAVIOR_BYTES {
                    return done(Status::INVALID_SGL_LENGTH.dnr());
                }
                self.features.borrow_mut().host_behavior = Some(data.as_ref().into());
                done(Status::SUCCESS)
            }
            FeatureId::RESERVATION_NOTIFICATION_MASK => {
                let Some(subsystem) = self.subsystem() else {
                    return done(Status::INVALID_FIELD.dnr());
                };
                let namespaces = subsystem.namespaces.borrow();
                let nsids = namespaces
                    .keys()
                    .copied()
                    .filter(|&known| nsid == NSID_ALL || nsid == known);
                if nsid != NSID_ALL && !namespaces.contains_key(&nsid) {
                    return done(Status::INVALID_NAMESPACE.dnr());
                }
                self.features.borrow_mut().notification_masks.set(nsids, value);
                done(Status::SUCCESS)
            }
            FeatureId::RESERVATION_PERSISTENCE => {
                self.set_reservation_persistence(request, nsid, value & 1 != 0)
            }
            // Interrupts follow a batch of completions as it is.
            FeatureId::INTERRUPT_COALESCING | FeatureId::INTERRUPT_VECTOR
                if matches!(self.transport, Transport::Memory { .. }) =>
            {
                done(Status::SUCCESS)
            }
            // They exist, and have one value that serves.
            FeatureId::ARBITRATION
            | FeatureId::POWER_MANAGEMENT
            | FeatureId::TEMPERATURE_THRESHOLD
            | FeatureId::ERROR_RECOVERY
            | FeatureId::WRITE_ATOMICITY => done(Status::SUCCESS),
            FeatureId::VOLATILE_WRITE_CACHE | FeatureId::HOST_IDENTIFIER => {
                done(Status::FEATURE_NOT_CHANGEABLE.dnr())
            }
            _ => done(Status::INVALID_FIELD.dnr()),
        }
    }

    fn set_reservation_persistence(&self, request: &IoRequest, nsid: u32, ptpl: bool) -> AdminAnswer {
        let Some(open) = self.namespace(nsid) else {
            return AdminAnswer::Now(request.complete(Status::INVALID_NAMESPACE.dnr()));
        };
        let Some((reserved, _)) = open.reserved() else {
            return AdminAnswer::Now(request.complete(Status::INVALID_FIELD.dnr()));
        };
        let reserved = reserved.clone();
        let completion = request.complete(Status::SUCCESS);
        AdminAnswer::Later(Box::pin(async move {
            match reserved.set_ptpl(ptpl).await {
                Ok(()) => completion,
                Err(error) => Completion {
                    status: crate::status::of_reservation_error(&error),
                    ..completion
                },
            }
        }))
    }

    pub(super) fn get_feature(&self, request: &IoRequest, fid: FeatureId, sel: u8, nsid: u32) -> Completion {
        match self.feature(fid, sel, nsid) {
            Ok((value, data)) => request
                .complete(Status::SUCCESS)
                .with_result(u64::from(value))
                .with_data(cut(data, request.answer_bytes_max)),
            Err(status) => request.complete(status),
        }
    }

    /// A feature's value, and its data for those that have some.
    fn feature(&self, fid: FeatureId, sel: u8, nsid: u32) -> Result<(u32, Vec<u8>), Status> {
        /// Select: supported capabilities; bit 2 of the answer says changeable.
        const SEL_CAPABILITIES: u8 = 3;
        const CHANGEABLE: u32 = 1 << 2;
        let features = self.features.borrow();
        let value = match fid {
            FeatureId::NUMBER_OF_QUEUES if !self.is_discovery() => {
                let count = u32::from(self.io_queues());
                NumberOfQueues {
                    submission: count,
                    completion: count,
                }
                .to_dword()
            }
            FeatureId::KEEP_ALIVE_TIMER => self
                .silence
                .kato()
                .map_or(0, |kato| u32::try_from(kato.as_millis()).unwrap_or(u32::MAX)),
            FeatureId::ASYNC_EVENT_CONFIG => self.events.borrow().config.0,
            FeatureId::VOLATILE_WRITE_CACHE => u32::from(self.volatile_write_cache()),
            FeatureId::HOST_BEHAVIOR => {
                let data = features.host_behavior.as_ref().map(|data| data.to_vec());
                return Ok((0, data.unwrap_or_else(|| vec![0; HOST_BEHAVIOR_BYTES])));
            }
            FeatureId::HOST_IDENTIFIER => return Ok((0, self.association.hostid.0.to_vec())),
            FeatureId::RESERVATION_NOTIFICATION_MASK => features.notification_masks.mask(nsid),
            FeatureId::RESERVATION_PERSISTENCE => {
                let open = self.namespace(nsid).ok_or(Status::INVALID_NAMESPACE.dnr())?;
                let (reserved, _) = open.reserved().ok_or(Status::INVALID_FIELD.dnr())?;
                u32::from(reserved.report().ptpl)
            }
            FeatureId::INTERRUPT_COALESCING | FeatureId::INTERRUPT_VECTOR
                if matches!(self.transport, Transport::Memory { .. }) =>
            {
                0
            }
            FeatureId::ARBITRATION
            | FeatureId::POWER_MANAGEMENT
            | FeatureId::TEMPERATURE_THRESHOLD
            | FeatureId::ERROR_RECOVERY
            | FeatureId::WRITE_ATOMICITY => 0,
            _ => return Err(Status::INVALID_FIELD.dnr()),
        };
        Ok((
            if sel == SEL_CAPABILITIES {
                CHANGEABLE
            } else {
                value
            },
            Vec::new(),
        ))
    }

    /// Whether a Flush has something to do on any namespace.
    pub(super) fn volatile_write_cache(&self) -> bool {
        let nsids: Vec<u32> = self
            .subsystem()
            .map_or_else(Vec::new, |s| s.namespaces.borrow().keys().copied().collect());
        nsids
            .iter()
            .filter_map(|&nsid| self.namespace(nsid))
            .any(|open| open.info().volatile_write_cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_rounded_up_to_the_granularity() {
        assert_eq!(kato(0), None);
        assert_eq!(kato(1), Some(Duration::from_millis(100)));
        assert_eq!(kato(1001), Some(Duration::from_millis(1100)));
        assert_eq!(kato(5000), Some(Duration::from_secs(5)));
    }
}
