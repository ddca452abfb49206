//! Volumes as drives of guests, through real agents: attachments outlive an agent.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::cluster;

/// Whether a server agrees on a version of vfio-user there.
fn serves(path: &Path) -> bool {
    let Ok(mut socket) = UnixStream::connect(path) else {
        return false;
    };
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // Message 1, command 1 (version), 20 bytes, a command; version 0.1.
    let message = [1, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let mut reply = [0; 16];
    socket.write_all(&message).is_ok() && socket.read_exact(&mut reply).is_ok() && reply[8] == 1
}

#[test]
fn a_guest_finds_its_volume_after_its_agent_was_killed_until_it_is_detached() {
    let folder = tempfile::tempdir().unwrap();
    let mut agents = cluster(folder.path(), 3, 256);
    agents
        .weft_ok(&["volume", "create", "disk", "--size", "16MiB", "--ec", "2+1"])
        .unwrap();
    let socket = folder.path().join("disk.sock");
    let path = socket.display().to_string();
    let attach = ["volume", "attach", "disk", "--vfio-user", path.as_str()];
    agents.weft_ok(&attach).unwrap();
    assert!(serves(&socket));
    for _ in 0..2 {
        agents.kill(0).unwrap();
        assert!(!serves(&socket));
        agents.start(0).unwrap();
        agents
            .wait_until("the socket is there again", |_| serves(&socket))
            .unwrap();
    }
    let refused = agents.weft(&attach).unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("has a guest on this node already"));
    agents
        .weft_ok(&["volume", "detach", "disk", "--vfio-user", &path])
        .unwrap();
    assert!(!socket.exists());
    let record = agents.list[0].config.data_dir.join("guests.json");
    assert_eq!(std::fs::read_to_string(record).unwrap(), "{}");
}
