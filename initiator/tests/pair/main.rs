//! The real host and the real target in one process, over loopback sockets ([`rig`]).

#![allow(unreachable_pub, clippy::unwrap_used, reason = "test code")]

mod association;
mod commands;
mod multipath;
mod remote_drive;
mod rig;
