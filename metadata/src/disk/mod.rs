//! What log and snapshots do to files, in one place, so that a test can crash after each of these things.
//!
//! Nothing here is more than a call to the operating system; in tests every call that changes something is noted in a journal,
//! from which the files can be made again as a crash after any of them might have left them (`journal`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

#[cfg(test)]
pub(crate) mod journal;

/// Notes an effect in the journal of a test, and is nothing otherwise.
macro_rules! note {
    ($effect:ident($($part:expr),*)) => {
        #[cfg(test)]
        journal::note(journal::Effect::$effect($($part),*));
    };
}

/// A file that is written.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
    #[cfg(test)]
    path: std::path::PathBuf,
}

impl DiskFile {
    /// An empty file of this name, in place of what had it.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        note!(Create(path.to_owned()));
        Ok(Self::of(file, path))
    }

    /// A file that is there.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self::of(file, path))
    }

    #[cfg_attr(not(test), expect(unused_variables, reason = "the journal alone needs it"))]
    fn of(file: File, path: &Path) -> Self {
        Self {
            file,
            #[cfg(test)]
            path: path.to_owned(),
        }
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        note!(Write(self.path.clone(), offset, bytes.to_vec()));
        Ok(())
    }

    /// Its bytes are durable, and its length where that was needed to find them.
    pub(crate) fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()?;
        note!(Sync(self.path.clone()));
        Ok(())
    }

    /// Everything about it is durable but its name.
    pub(crate) fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()?;
        note!(Sync(self.path.clone()));
        Ok(())
    }

    pub(crate) fn bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

/// Takes a file away. Durable with [`sync_directory`].
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path)?;
    note!(Remove(path.to_owned()));
    Ok(())
}

/// Gives a file another name, in place of what had it. Durable with [`sync_directory`].
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)?;
    note!(Rename(from.to_owned(), to.to_owned()));
    Ok(())
}

/// The names in a directory are durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()?;
    note!(SyncDirectory(path.to_owned()));
    Ok(())
}
