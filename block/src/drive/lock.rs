//! The exclusive lock on a drive: a second agent is refused, by name.
//!
//! Files are locked with flock. A block device is also opened exclusively (O_EXCL), which a mounted file system, a
//! volume manager and another exclusive opener hold too.
//!
//! The lock belongs to the open file. When an agent is killed the kernel gives it up with the last reference,
//! that is, when the last operation in flight has ended: whoever gets the lock finds nothing of its
//! predecessor still on its way. For the same reason a successor may have to wait a moment, and does.

use std::os::fd::AsFd;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// Tries to lock `file`; `false` if somebody else holds the lock.
pub(super) fn try_lock(file: impl AsFd) -> Result<bool, Errno> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno),
    }
}
