//! The real input of the demo: bytes that exist, so that what comes back can be compared with them.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

/// Files, one after another, as one run of bytes padded with zeroes to whole blocks.
#[derive(Debug)]
pub(crate) struct Input {
    parts: Vec<Part>,
    bytes: u64,
}

#[derive(Debug)]
struct Part {
    file: File,
    path: PathBuf,
    start: u64,
    bytes: u64,
}

impl Input {
    /// Opens a file, or all files of a folder in order of their paths.
    ///
    /// # Errors
    /// Names the path that cannot be read; an input without bytes is refused.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let mut paths = Vec::new();
        collect(path, &mut paths)?;
        paths.sort();
        let mut input = Self {
            parts: Vec::new(),
            bytes: 0,
        };
        for path in paths {
            let file = File::open(&path).with_context(|| format!("open input {}", path.display()))?;
            let bytes = file
                .metadata()
                .with_context(|| format!("read input {}", path.display()))?
                .len();
            input.parts.push(Part {
                file,
                path,
                start: input.bytes,
                bytes,
            });
            input.bytes += bytes;
        }
        ensure!(input.bytes > 0, "input {} has no bytes", path.display());
        Ok(input)
    }

    /// The largest file of the Rust toolchain, or this program itself where there is no toolchain.
    ///
    /// # Errors
    /// As [`Input::open`].
    pub(crate) fn default_path() -> anyhow::Result<PathBuf> {
        let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output();
        let toolchain = sysroot
            .ok()
            .filter(|output| output.status.success())
            .and_then(|output| String::from_utf8(output.stdout).ok())
            .map(|text| PathBuf::from(text.trim()));
        let mut paths = Vec::new();
        if let Some(folder) = toolchain {
            collect(&folder, &mut paths)?;
        }
        let largest = paths
            .into_iter()
            .max_by_key(|path| path.metadata().map_or(0, |metadata| metadata.len()));
        match largest {
            Some(path) => Ok(path),
            None => std::env::current_exe().context("find this program"),
        }
    }

    /// Length without padding.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills `buffer` from `offset`; past the end are zeroes.
    ///
    /// # Errors
    /// Names the file that cannot be read, or that became shorter.
    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> anyhow::Result<()> {
        buffer.fill(0);
        let end = offset + buffer.len() as u64;
        for part in &self.parts {
            let (from, to) = (offset.max(part.start), end.min(part.start + part.bytes));
            if from < to {
                let within = &mut buffer[usize::try_from(from - offset)?..usize::try_from(to - offset)?];
                part.file
                    .read_exact_at(within, from - part.start)
                    .with_context(|| format!("read input {}", part.path.display()))?;
            }
        }
        Ok(())
    }
}

fn collect(path: &Path, into: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let metadata = path
        .symlink_metadata()
        .with_context(|| format!("input {}", path.display()))?;
    if metadata.is_dir() {
        for entry in path
            .read_dir()
            .with_context(|| format!("list {}", path.display()))?
        {
            collect(
                &entry.with_context(|| format!("list {}", path.display()))?.path(),
                into,
            )?;
        }
    } else if metadata.is_file() {
        into.push(path.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_folder_follow_each_other() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a"), [1; 5]).unwrap();
        std::fs::write(folder.path().join("b"), [2; 3]).unwrap();
        let input = Input::open(folder.path()).unwrap();
        assert_eq!(input.bytes(), 8);
        let mut buffer = [9; 6];
        input.read_at(4, &mut buffer).unwrap();
        assert_eq!(buffer, [1, 2, 2, 2, 0, 0]);
    }

    #[test]
    fn an_input_that_is_missing_or_empty_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("nothing");
        assert!(Input::open(&missing).unwrap_err().to_string().contains("nothing"));
        assert!(
            Input::open(folder.path())
                .unwrap_err()
                .to_string()
                .contains("has no bytes")
        );
    }
}
