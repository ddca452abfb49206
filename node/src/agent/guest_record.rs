//! Which volumes have guests on this server, on disk, so that they have them after a restart of the agent.
//!
//! It is what was asked for, not what is: a volume that is not presented here, or not yet, stays on record until it is detached.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::identity::write_whole;

/// A guest of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Recorded {
    /// Of the volume: another one may have its name by now.
    pub(super) uuid: [u8; 16],
    /// Of the socket.
    pub(super) path: PathBuf,
    /// Its doorbells are mapped.
    #[serde(default)]
    pub(super) map_doorbells: bool,
}

/// By the names of volumes.
pub(super) type Records = BTreeMap<String, Recorded>;

/// Reads the file; there is none before the first guest.
///
/// # Errors
/// It is there and cannot be read.
pub(super) fn read(file: &Path) -> anyhow::Result<Records> {
    match std::fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("read {}", file.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Records::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", file.display())),
    }
}

/// Replaces the file.
///
/// # Errors
/// The file system refuses.
pub(super) fn write(file: &Path, records: &Records) -> anyhow::Result<()> {
    write_whole(file, &serde_json::to_vec_pretty(records)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_on_record_until_they_are_taken_off() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("guests.json");
        assert_eq!(read(&file).unwrap(), Records::new());
        let recorded = Recorded {
            uuid: [7; 16],
            path: "/run/guest".into(),
            map_doorbells: true,
        };
        let records = Records::from([("disk".to_owned(), recorded)]);
        write(&file, &records).unwrap();
        assert_eq!(read(&file).unwrap(), records);
        std::fs::write(&file, "{").unwrap();
        assert!(format!("{:#}", read(&file).unwrap_err()).contains("guests.json"));
    }
}
