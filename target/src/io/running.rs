//! Requests that their devices have not answered yet.
//!
//! A read or a write is a future of a known type, which whoever keeps many of them has a place for: all that it takes from the
//! allocator is what its device does.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use smallvec::smallvec;
use weft_block::{BlockError, Io};

use super::{Finished, complete, count, status};
use crate::fused::Pass;
use crate::metrics::Op;
use crate::namespace::Admitted;
use crate::request::Pieces;

/// A request in execution.
pub(crate) enum Running {
    /// A read or a write, without a box: whoever keeps many of them has a place for each anyway.
    InDevice(InDevice),
    /// Anything that takes several steps.
    InSteps(LocalBoxFuture<'static, Finished>),
}

/// A read or a write that its device has, and what is needed of its request to end it. There are hundreds: it is kept small.
pub(crate) struct InDevice {
    pub(super) cid: u16,
    pub(super) arrived: Instant,
    pub(super) admitted: Option<Admitted>,
    pub(super) op: Op,
    /// Bytes from the host.
    pub(super) received: u64,
    pub(super) io: DeviceIo,
}

impl Future for Running {
    type Output = Finished;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Finished> {
        let InDevice {
            cid,
            arrived,
            admitted,
            op,
            received,
            io,
        } = match &mut *self {
            Self::InDevice(command) => command,
            Self::InSteps(future) => return future.as_mut().poll(context),
        };
        let outcome =
            ready!(Pin::new(io).poll(context)).map_err(|error| status(admitted.as_ref(), *arrived, &error));
        count(*arrived, *op, *received, &outcome);
        Poll::Ready(complete(*cid, outcome).into())
    }
}

/// What a device was asked for, without more around it than it needs.
pub(super) enum DeviceIo {
    Read(Io<Bytes>),
    Write(Io<()>, Pass),
    InParts(Io<Pieces>),
}

impl Future for DeviceIo {
    type Output = Result<Pieces, BlockError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Read(io) => Pin::new(io).poll(context).map_ok(|bytes| smallvec![bytes]),
            Self::Write(io, _) => Pin::new(io).poll(context).map_ok(|()| Pieces::new()),
            Self::InParts(io) => Pin::new(io).poll(context),
        }
    }
}
