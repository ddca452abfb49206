//! Who this agent is: written once, at `init` or `join`, and kept in the data folder.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use weft_proto::id::{ClusterId, NodeId};

/// The agent's place in a cluster. Its incarnations come and go; this stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) cluster: ClusterId,
    pub(crate) node: NodeId,
    /// Control addresses of members known when this was written: where to look for the leader first.
    pub(crate) members: Vec<String>,
}

/// The exclusive right to a data folder, held while the agent lives.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: fs::File,
}

impl DataDir {
    /// Creates the folder if needed and locks it.
    ///
    /// # Errors
    /// The folder cannot be made, or another agent holds it.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("create data_dir {}", path.display()))?;
        let lock_path = path.join("lock");
        let lock = fs::File::create(&lock_path).with_context(|| format!("open {}", lock_path.display()))?;
        lock.try_lock()
            .map_err(|_| anyhow::anyhow!("data_dir {} is in use by another agent", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// A path within.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The identity, or `None` before `init` or `join`.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub(crate) fn identity(&self) -> anyhow::Result<Option<Identity>> {
        let path = self.join("identity.json");
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(
                serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?,
            )),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    /// Writes the identity so that it is there whole after a crash, or not at all.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn write_identity(&self, identity: &Identity) -> anyhow::Result<()> {
        write_whole(&self.join("identity.json"), &serde_json::to_vec_pretty(identity)?)
    }
}

/// Writes a file so that after a crash it is the new one or the former one, and whole.
///
/// # Errors
/// The file system refuses.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        path.parent()
            .map_or(Ok(()), |folder| fs::File::open(folder)?.sync_all())
    };
    write().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_refused_the_data_folder_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let first = DataDir::open(folder.path()).unwrap();
        let error = DataDir::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("in use by another agent"), "{error}");
        drop(first);
        DataDir::open(folder.path()).unwrap();
    }

    #[test]
    fn an_identity_survives_the_agent() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = DataDir::open(folder.path()).unwrap();
        assert_eq!(data_dir.identity().unwrap(), None);
        let identity = Identity {
            cluster: ClusterId([7; 16]),
            node: NodeId(3),
            members: vec!["127.0.0.1:7420".into()],
        };
        data_dir.write_identity(&identity).unwrap();
        assert_eq!(data_dir.identity().unwrap(), Some(identity));
    }
}
