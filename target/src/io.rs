//! I/O commands: from a request with its data to a completion.
//!
//! A command is split where a device takes less in one transfer than a host may ask for; the parts run at once and
//! the command fails if any does. A write that failed may have been done in part, as NVMe allows.
//!
//! NVM Command Set Specification 1.0; reservations in the Base Specification.

mod running;

use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use smallvec::smallvec;
use weft_block::{BlockError, DeviceInfo, Durability, Io};
use weft_proto::nvme::command::{BlockRange, DsmRange, NvmCommand};
use weft_proto::nvme::log::AnaState;
use weft_proto::nvme::reservation::{AcquireAction, AcquireData, RegisterData, ReleaseAction, ReleaseData};
use weft_proto::nvme::status::Status;
use weft_proto::units::{Lba, LbaRange};
use zerocopy::FromBytes;

use crate::controller::IoRequest;
use crate::fused::{Entry, Kind, Pass};
use crate::metrics::{self, Op, Tally};
use crate::namespace::{Admitted, CommandDevice, OpenNamespace};
use crate::request::{Completion, Pieces, TRANSFER_BYTES_MAX};
use crate::status::{of_block_error, of_reservation_error};

pub(crate) use running::Running;
use running::{DeviceIo, InDevice};

/// The completions of a request: of its first half, if it is a fused pair, and its own.
pub(crate) struct Finished {
    pub(crate) first: Option<Completion>,
    pub(crate) completion: Completion,
}

impl From<Completion> for Finished {
    fn from(completion: Completion) -> Self {
        Self {
            first: None,
            completion,
        }
    }
}

/// How a command ends: data for the host, or a status.
type Outcome = Result<Pieces, Status>;

/// Pieces as one.
pub(crate) fn gather(pieces: &[Bytes]) -> Bytes {
    match pieces {
        [] => Bytes::new(),
        [whole] => whole.clone(),
        pieces => {
            let mut whole = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
            for piece in pieces {
                whole.extend_from_slice(piece);
            }
            whole.freeze()
        }
    }
}

/// The label of a command's metrics.
fn op_of(command: &Result<NvmCommand, Status>) -> Op {
    match command {
        Ok(NvmCommand::Flush) => Op::Flush,
        Ok(NvmCommand::Write { .. }) => Op::Write,
        Ok(NvmCommand::Read { .. }) => Op::Read,
        Ok(NvmCommand::Compare { .. }) => Op::Compare,
        Ok(NvmCommand::WriteZeroes { .. }) => Op::WriteZeroes,
        Ok(NvmCommand::DatasetManagement { .. }) => Op::Deallocate,
        Ok(NvmCommand::Verify { .. }) => Op::Verify,
        Ok(
            NvmCommand::ReservationRegister { .. }
            | NvmCommand::ReservationReport { .. }
            | NvmCommand::ReservationAcquire { .. }
            | NvmCommand::ReservationRelease { .. },
        ) => Op::Reservation,
        Err(_) => Op::Other,
    }
}

/// A request that was started.
pub(crate) enum Execution {
    /// And is over: what a device in memory answers at once needs no future.
    Finished(Completion),
    Running(Running),
}

/// Starts a request. Reads and writes are with the device when this returns: writes enter the namespace in the order of
/// the calls.
///
/// With a tally, one that is over when this returns is counted there, and must not have been counted as started; all others
/// count themselves when they are.
pub(crate) fn start(mut request: IoRequest, tally: Option<&mut Tally>) -> Execution {
    if let Some(first) = request.fused_first.take() {
        let execution = execute_fused(*first, request);
        return Execution::Running(Running::InSteps(execution.boxed_local()));
    }
    let command = NvmCommand::parse(&request.sqe);
    let op = op_of(&command);
    let data = std::mem::take(&mut request.data);
    let received = total(&data);
    let submitted = match command {
        Ok(NvmCommand::Read { range }) => start_read(&request, range),
        Ok(NvmCommand::Write { range, fua }) => start_write(&request, range, durability(fua), data),
        Ok(command) => {
            let execution = async move {
                let outcome = execute_command(&request, command, data).await;
                finish(&request, op, received, outcome).into()
            };
            return Execution::Running(Running::InSteps(execution.boxed_local()));
        }
        Err(status) => Err(status),
    };
    // From the device to the completion in as few steps as can be: each is a copy of what was stored a moment ago.
    let completion = match submitted {
        Ok(DeviceIo::Read(io)) => match io.take_ready() {
            Ok(Ok(data)) => Completion {
                data: Pieces::from_buf([data]),
                ..request.complete(Status::SUCCESS)
            },
            Ok(Err(error)) => failed(&request, &error),
            Err(io) => return in_device(request, op, received, DeviceIo::Read(io)),
        },
        Ok(DeviceIo::Write(io, pass)) => match io.take_ready() {
            Ok(Ok(())) => request.complete(Status::SUCCESS),
            Ok(Err(error)) => failed(&request, &error),
            Err(io) => return in_device(request, op, received, DeviceIo::Write(io, pass)),
        },
        Ok(io) => return in_device(request, op, received, io),
        Err(status) => request.complete(status),
    };
    let (success, bytes) = (completion.status.is_success(), received + total(&completion.data));
    match tally {
        Some(tally) => tally.add(op, success, bytes),
        None => metrics::command_completed(op, success, bytes, request.arrived.elapsed()),
    }
    Execution::Finished(completion)
}

fn in_device(request: IoRequest, op: Op, received: u64, io: DeviceIo) -> Execution {
    Execution::Running(Running::InDevice(InDevice {
        cid: request.cid(),
        arrived: request.arrived,
        admitted: request.admitted,
        op,
        received,
        io,
    }))
}

/// The completion of a request that its device refused.
fn failed(request: &IoRequest, error: &BlockError) -> Completion {
    request.complete(status(request.admitted.as_ref(), request.arrived, error))
}

/// What the host is told of an error of the device that its command was admitted to.
fn status(admitted: Option<&Admitted>, arrived: Instant, error: &BlockError) -> Status {
    match admitted {
        Some(admitted) => status_of(admitted.at(arrived), error),
        None => of_block_error(error),
    }
}

/// Inlined into [`start`], which looks at what it answers at once: a call would have it stored and loaded in between.
#[inline(always)]
fn start_read(request: &IoRequest, range: BlockRange) -> Result<DeviceIo, Status> {
    let access = admitted(request)?;
    let info = access.open.info();
    if transfer_bytes(range, &info)? > u64::from(request.answer_bytes_max) {
        return Err(Status::INVALID_SGL_LENGTH.dnr());
    }
    let mut parts = parts(range.lba_range(), &info);
    let (first, second) = (parts.next(), parts.next());
    Ok(match (first, second) {
        (Some(only), None) => DeviceIo::Read(access.read(only)),
        (first, second) => {
            let parts = first.into_iter().chain(second).chain(parts);
            let reads = all(parts.map(|part| access.read(part)).collect());
            DeviceIo::InParts(Io::running(async move { Ok(reads.await?.into()) }))
        }
    })
}

fn start_write(
    request: &IoRequest,
    range: BlockRange,
    durability: Durability,
    data: Vec<Bytes>,
) -> Result<DeviceIo, Status> {
    let access = admitted(request)?;
    let info = access.open.info();
    if transfer_bytes(range, &info)? != total(&data) {
        return Err(Status::INVALID_SGL_LENGTH.dnr());
    }
    let range = range.lba_range();
    match access.open.namespace.fused.enter(Kind::Shared) {
        Entry::Entered(pass) => {
            let write = if parts(range, &info).nth(1).is_none() {
                access.write(range.start, data, durability)
            } else {
                let parts = write_parts(access, range, &info, data, durability);
                Io::running(async move { all(parts).await.map(drop) })
            };
            Ok(DeviceIo::Write(write, pass))
        }
        // Behind a fused pair.
        waiting @ Entry::Waiting(_) => {
            let (admitted, arrived) = (request.admitted.clone(), request.arrived);
            Ok(DeviceIo::InParts(Io::running(async move {
                let _pass = waiting.pass().await;
                let access = admitted.as_ref().ok_or(BlockError::NotReady)?.at(arrived);
                not_late(access)?;
                write(access, range, &info, data, durability).await
            })))
        }
    }
}

/// The end of a request that its host may have given up, and repeated elsewhere (see [`crate::silence`]). It was not
/// begun, and a host that is still there tries again, here or on another path.
pub(crate) fn refuse_late(mut request: IoRequest) -> Finished {
    let refuse = |request: &IoRequest| {
        metrics::command_late();
        let op = op_of(&NvmCommand::parse(&request.sqe));
        finish(request, op, total(&request.data), Err(Status::ANA_TRANSITION))
    };
    let first = request.fused_first.take();
    Finished {
        first: first.map(|first| refuse(&first)),
        completion: refuse(&request),
    }
}

fn finish(request: &IoRequest, op: Op, received: u64, outcome: Outcome) -> Completion {
    count(request.arrived, op, received, &outcome);
    complete(request.cid(), outcome)
}

fn count(arrived: Instant, op: Op, received: u64, outcome: &Outcome) {
    let bytes = received + answered(outcome);
    metrics::command_completed(op, outcome.is_ok(), bytes, arrived.elapsed());
}

/// Bytes for the host.
fn answered(outcome: &Outcome) -> u64 {
    outcome.as_ref().map_or(0, |data| total(data))
}

fn complete(cid: u16, outcome: Outcome) -> Completion {
    match outcome {
        Ok(data) => Completion::new(cid, Status::SUCCESS).with_data(data),
        Err(status) => Completion::new(cid, status),
    }
}

/// The namespace of a request, if it is there and served on this path.
fn admitted(request: &IoRequest) -> Result<CommandDevice<'_>, Status> {
    let admitted = request.admitted.as_ref().ok_or(Status::INVALID_NAMESPACE.dnr())?;
    match admitted.open.namespace.ana.state.get() {
        state if state.is_accessible() => Ok(admitted.at(request.arrived)),
        AnaState::PERSISTENT_LOSS => Err(Status::ANA_PERSISTENT_LOSS),
        AnaState::CHANGE => Err(Status::ANA_TRANSITION),
        _ => Err(Status::ANA_INACCESSIBLE),
    }
}

async fn execute_command(request: &IoRequest, command: NvmCommand, data: Vec<Bytes>) -> Outcome {
    let answer_bytes_max = request.answer_bytes_max;
    let access = admitted(request)?;
    let info = access.open.info();
    let outcome: Result<Pieces, BlockError> = match command {
        NvmCommand::Read { range } => start_read(request, range)?.await,
        NvmCommand::Write { range, fua } => start_write(request, range, durability(fua), data)?.await,
        NvmCommand::Compare { range } => return compare(access, range, &info, &data).await,
        NvmCommand::Verify { range } => {
            let mut done = Ok(Pieces::new());
            // One part at a time: a host may ask for 65536 blocks, and nobody waits for them.
            for part in parts(range.lba_range(), &info) {
                if let Err(error) = access.read(part).await {
                    done = Err(error);
                    break;
                }
            }
            done
        }
        NvmCommand::Flush => access.flush().await.map(|()| Pieces::new()),
        NvmCommand::WriteZeroes {
            range,
            deallocate,
            fua,
        } => match enter(access, Kind::Shared).await {
            Ok(_pass) => {
                let range = range.lba_range();
                let done = access.write_zeroes(range, deallocate, durability(fua)).await;
                done.map(|()| Pieces::new())
            }
            Err(late) => Err(late),
        },
        NvmCommand::DatasetManagement { ranges, deallocate } => {
            let ranges = dsm_ranges(&gather(&data), ranges, &info)?;
            if !deallocate || ranges.is_empty() {
                return Ok(Pieces::new());
            }
            match enter(access, Kind::Shared).await {
                Ok(_pass) => access.deallocate(ranges).await.map(|()| Pieces::new()),
                Err(late) => Err(late),
            }
        }
        NvmCommand::ReservationRegister { .. }
        | NvmCommand::ReservationReport { .. }
        | NvmCommand::ReservationAcquire { .. }
        | NvmCommand::ReservationRelease { .. } => {
            return reservation(access.open, command, &gather(&data), answer_bytes_max).await;
        }
    };
    outcome.map_err(|error| status_of(access, &error))
}

/// What the host is told; a command that a Preempt and Abort ended says so.
fn status_of(access: CommandDevice<'_>, error: &BlockError) -> Status {
    if *error == BlockError::ReservationConflict && access.is_aborted() {
        Status::ABORTED_PREEMPT
    } else {
        of_block_error(error)
    }
}

fn durability(fua: bool) -> Durability {
    if fua {
        Durability::Durable
    } else {
        Durability::Cached
    }
}

/// Waits for fused pairs, or for what a fused pair has to wait for.
async fn enter(access: CommandDevice<'_>, kind: Kind) -> Result<Pass, BlockError> {
    match access.open.namespace.fused.enter(kind) {
        Entry::Entered(pass) => Ok(pass),
        waiting @ Entry::Waiting(_) => {
            let pass = waiting.pass().await;
            not_late(access)?;
            Ok(pass)
        }
    }
}

/// Refuses, as not begun, what has waited for so long that its host may have sent it again elsewhere.
fn not_late(access: CommandDevice<'_>) -> Result<(), BlockError> {
    if access.is_late() {
        metrics::command_late();
        return Err(BlockError::NotReady);
    }
    Ok(())
}

fn total(data: &[Bytes]) -> u64 {
    data.iter().map(|piece| piece.len() as u64).sum()
}

/// Bytes of a range; an error past MDTS.
fn transfer_bytes(range: BlockRange, info: &DeviceInfo) -> Result<u64, Status> {
    let bytes = u64::from(range.count.get()) * u64::from(info.block_bytes);
    if bytes > u64::from(TRANSFER_BYTES_MAX) {
        return Err(Status::INVALID_FIELD.dnr());
    }
    Ok(bytes)
}

/// A range in parts that the device takes. A range outside of the device is one part, for the device to refuse.
fn parts(range: LbaRange, info: &DeviceInfo) -> impl Iterator<Item = LbaRange> + use<> {
    let step = u64::from((info.transfer_bytes_max.min(TRANSFER_BYTES_MAX) / info.block_bytes).max(1));
    let step = if range.is_within(info.blocks) {
        step
    } else {
        range.count
    };
    let mut left = range;
    std::iter::from_fn(move || {
        let count = left.count.min(step);
        if count == 0 {
            return None;
        }
        let part = LbaRange {
            start: left.start,
            count,
        };
        left = LbaRange {
            start: Lba(left.start.0.wrapping_add(count)),
            count: left.count - count,
        };
        Some(part)
    })
}

/// Waits for all parts. They have all been submitted; the first error is the command's.
async fn all<T>(mut parts: Vec<Io<T>>) -> Result<Vec<T>, BlockError> {
    if parts.len() == 1
        && let Some(only) = parts.pop()
    {
        return Ok(vec![only.await?]);
    }
    // Every part is waited for even if one has failed: the command is in execution as long as any part is.
    let results = futures_util::future::join_all(parts).await;
    results.into_iter().collect()
}

async fn write(
    access: CommandDevice<'_>,
    range: LbaRange,
    info: &DeviceInfo,
    data: Vec<Bytes>,
    durability: Durability,
) -> Result<Pieces, BlockError> {
    all(write_parts(access, range, info, data, durability)).await?;
    Ok(Pieces::new())
}

fn write_parts(
    access: CommandDevice<'_>,
    range: LbaRange,
    info: &DeviceInfo,
    data: Vec<Bytes>,
    durability: Durability,
) -> Vec<Io<()>> {
    let mut rest = data.into();
    parts(range, info)
        .map(|part| {
            let bytes = part.count * u64::from(info.block_bytes);
            access.write(part.start, take(&mut rest, bytes), durability)
        })
        .collect()
}

/// Takes `bytes` from the front of scattered data.
fn take(rest: &mut std::collections::VecDeque<Bytes>, bytes: u64) -> Vec<Bytes> {
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut taken = Vec::new();
    while left > 0
        && let Some(front) = rest.front_mut()
    {
        if front.len() <= left {
            left -= front.len();
            taken.extend(rest.pop_front());
        } else {
            taken.push(front.split_to(left));
            left = 0;
        }
    }
    taken
}

async fn compare(access: CommandDevice<'_>, range: BlockRange, info: &DeviceInfo, data: &[Bytes]) -> Outcome {
    if transfer_bytes(range, info)? != total(data) {
        return Err(Status::INVALID_SGL_LENGTH.dnr());
    }
    let reads = parts(range.lba_range(), info)
        .map(|part| access.read(part))
        .collect();
    let found = all(reads).await.map_err(|error| status_of(access, &error))?;
    let same = found
        .iter()
        .flat_map(|piece| piece.iter())
        .eq(data.iter().flat_map(|piece| piece.iter()));
    if same {
        Ok(Pieces::new())
    } else {
        Err(Status::COMPARE_FAILURE.dnr())
    }
}

/// Compare and Write, as one step among this registry's commands.
async fn execute_fused(first: IoRequest, second: IoRequest) -> Finished {
    let commands = (NvmCommand::parse(&first.sqe), NvmCommand::parse(&second.sqe));
    let (compared, written) = match commands {
        (Ok(NvmCommand::Compare { range }), Ok(NvmCommand::Write { range: target, fua }))
            if range == target && first.sqe.nsid == second.sqe.nsid =>
        {
            compare_and_write(&first, &second, range, fua).await
        }
        // Nothing else can be fused, and both halves are of the same blocks.
        _ => (
            Err(Status::INVALID_FIELD.dnr()),
            Err(Status::ABORTED_FAILED_FUSED),
        ),
    };
    Finished {
        first: Some(finish(&first, Op::Compare, total(&first.data), compared)),
        completion: finish(&second, Op::Write, total(&second.data), written),
    }
}

async fn compare_and_write(
    first: &IoRequest,
    second: &IoRequest,
    range: BlockRange,
    fua: bool,
) -> (Outcome, Outcome) {
    let not_written = Err(Status::ABORTED_FAILED_FUSED);
    let checked = admitted(first).and_then(|compare| Ok((compare, admitted(second)?)));
    let (comparing, writing) = match checked {
        Ok(both) => both,
        Err(status) => return (Err(status), not_written),
    };
    let info = comparing.open.info();
    match transfer_bytes(range, &info) {
        Ok(bytes) if bytes == total(&second.data) => {}
        Ok(_) => return (Err(Status::INVALID_SGL_LENGTH.dnr()), not_written),
        Err(status) => return (Err(status), not_written),
    }
    let _pass = match enter(comparing, Kind::Exclusive).await {
        Ok(pass) => pass,
        Err(late) => return (Err(status_of(writing, &late)), not_written),
    };
    if let Err(status) = compare(comparing, range, &info, &first.data).await {
        return (Err(status), not_written);
    }
    let written = match not_late(writing) {
        Ok(()) => {
            let data = second.data.clone();
            write(writing, range.lba_range(), &info, data, durability(fua)).await
        }
        Err(late) => Err(late),
    };
    (
        Ok(Pieces::new()),
        written.map_err(|error| status_of(writing, &error)),
    )
}

/// The ranges of a Dataset Management that are not empty.
fn dsm_ranges(data: &[u8], count: u16, info: &DeviceInfo) -> Result<Vec<LbaRange>, Status> {
    let bytes = usize::from(count) * size_of::<DsmRange>();
    let data = data.get(..bytes).ok_or(Status::INVALID_SGL_LENGTH.dnr())?;
    let mut ranges = Vec::with_capacity(usize::from(count));
    for range in data.chunks_exact(size_of::<DsmRange>()) {
        let range = DsmRange::read_from_bytes(range).map_err(|_| Status::INVALID_SGL_LENGTH.dnr())?;
        let range = LbaRange {
            start: Lba(range.slba.get()),
            count: u64::from(range.nlb.get()),
        };
        if !range.is_within(info.blocks) {
            return Err(Status::LBA_OUT_OF_RANGE.dnr());
        }
        if range.count > 0 {
            ranges.push(range);
        }
    }
    Ok(ranges)
}

async fn reservation(
    open: &OpenNamespace,
    command: NvmCommand,
    data: &[u8],
    answer_bytes_max: u32,
) -> Outcome {
    let Some((namespace, host)) = open.reserved() else {
        return Err(Status::INVALID_OPCODE.dnr());
    };
    let too_short = |_| Status::INVALID_SGL_LENGTH.dnr();
    let done = match command {
        NvmCommand::ReservationRegister {
            action,
            ignore_existing_key,
            persist,
        } => {
            let (keys, _) = RegisterData::read_from_prefix(data).map_err(|_| too_short(()))?;
            let (crkey, nrkey) = (keys.crkey.get(), keys.nrkey.get());
            namespace
                .register(host, action, ignore_existing_key, crkey, nrkey, persist)
                .await
        }
        NvmCommand::ReservationAcquire { action, rtype } => {
            let (keys, _) = AcquireData::read_from_prefix(data).map_err(|_| too_short(()))?;
            let (crkey, prkey) = (keys.crkey.get(), keys.prkey.get());
            match action {
                AcquireAction::Acquire => namespace.acquire(host, crkey, rtype).await,
                AcquireAction::Preempt => namespace.preempt(host, crkey, prkey, rtype).await,
                AcquireAction::PreemptAndAbort => {
                    namespace.preempt_and_abort(host, crkey, prkey, rtype).await
                }
            }
        }
        NvmCommand::ReservationRelease { action, rtype } => {
            let (keys, _) = ReleaseData::read_from_prefix(data).map_err(|_| too_short(()))?;
            match action {
                ReleaseAction::Release => namespace.release(host, keys.crkey.get(), rtype).await,
                ReleaseAction::Clear => namespace.clear(host, keys.crkey.get()).await,
            }
        }
        NvmCommand::ReservationReport { bytes, extended } => {
            // Host identifiers have 128 bits here, which the short structure cannot hold.
            if !extended {
                return Err(Status::HOSTID_INCONSISTENT_FORMAT.dnr());
            }
            let mut report = namespace.report().to_bytes();
            let bytes = bytes.min(u64::from(answer_bytes_max));
            report.resize(
                usize::try_from(bytes)
                    .unwrap_or(usize::MAX)
                    .min(TRANSFER_BYTES_MAX as usize),
                0,
            );
            return Ok(smallvec![Bytes::from(report)]);
        }
        NvmCommand::Flush
        | NvmCommand::Write { .. }
        | NvmCommand::Read { .. }
        | NvmCommand::Compare { .. }
        | NvmCommand::WriteZeroes { .. }
        | NvmCommand::DatasetManagement { .. }
        | NvmCommand::Verify { .. } => Err(crate::reservation::table::Refused::InvalidField.into()),
    };
    done.map(|()| Pieces::new())
        .map_err(|error| of_reservation_error(&error))
}
