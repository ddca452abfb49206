//! The journal of what tests did to files, and the files that a crash leaves.
//!
//! What is modelled: bytes written and not synced survive by sectors of 512 bytes, in any subset; what was done to names in a
//! directory and not synced survives in any subset as well, the order of its parts kept. What was synced survives.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Bytes that are written as a whole or not at all.
const SECTOR: usize = 512;

/// One call that changed something.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    Create(PathBuf),
    Write(PathBuf, u64, Vec<u8>),
    Sync(PathBuf),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
    SyncDirectory(PathBuf),
}

impl Effect {
    fn path(&self) -> &Path {
        match self {
            Self::Create(path)
            | Self::Write(path, ..)
            | Self::Sync(path)
            | Self::Remove(path)
            | Self::Rename(path, _)
            | Self::SyncDirectory(path) => path,
        }
    }
}

/// By the directory that a test watches. Of all threads: the log has one of its own.
static JOURNALS: Mutex<BTreeMap<PathBuf, Vec<Effect>>> = Mutex::new(BTreeMap::new());

fn with<T>(look: impl FnOnce(&mut BTreeMap<PathBuf, Vec<Effect>>) -> T) -> T {
    look(&mut JOURNALS.lock().unwrap_or_else(PoisonError::into_inner))
}

pub(super) fn note(effect: Effect) {
    with(|journals| {
        for (root, journal) in journals.iter_mut() {
            if effect.path().starts_with(root) {
                journal.push(effect.clone());
            }
        }
    });
}

/// Notes from now on what happens under `root`.
pub(crate) fn begin(root: &Path) {
    with(|journals| journals.insert(root.to_owned(), Vec::new()));
}

/// Effects under `root` so far.
pub(crate) fn len(root: &Path) -> usize {
    with(|journals| journals[root].len())
}

/// Ends the journal of `root`.
pub(crate) fn end(root: &Path) -> Vec<Effect> {
    with(|journals| journals.remove(root)).unwrap_or_default()
}

/// Which of what was not synced survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Survives {
    Nothing,
    Everything,
    /// Any subset, by a seed.
    Some(u64),
}

impl Survives {
    fn draw(&mut self) -> bool {
        match self {
            Self::Nothing => false,
            Self::Everything => true,
            Self::Some(seed) => {
                // splitmix64
                *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mixed = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                (mixed ^ (mixed >> 27)) & 1 == 0
            }
        }
    }
}

#[derive(Default)]
struct Inode {
    durable: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
}

#[derive(Clone)]
enum Naming {
    Put(PathBuf, usize),
    Drop(PathBuf),
    Move(PathBuf, PathBuf),
}

/// Makes under `to` what the effects, done under `from` and cut off by a crash, leave there.
pub(crate) fn crash(effects: &[Effect], from: &Path, to: &Path, mut survives: Survives) {
    let mut inodes: Vec<Inode> = Vec::new();
    let mut names: BTreeMap<PathBuf, usize> = BTreeMap::new();
    let mut durable = names.clone();
    let mut pending: Vec<Naming> = Vec::new();
    for effect in effects {
        match effect {
            Effect::Create(path) => {
                // A name that was taken keeps its inode, which is empty now whatever happens.
                if let Some(inode) = names.get(path) {
                    inodes[*inode] = Inode::default();
                    continue;
                }
                inodes.push(Inode::default());
                names.insert(path.clone(), inodes.len() - 1);
                pending.push(Naming::Put(path.clone(), inodes.len() - 1));
            }
            Effect::Write(path, offset, bytes) => {
                inodes[names[path]].pending.push((*offset, bytes.clone()));
            }
            Effect::Sync(path) => {
                let inode = &mut inodes[names[path]];
                for (offset, bytes) in std::mem::take(&mut inode.pending) {
                    put(&mut inode.durable, offset as usize, &bytes);
                }
            }
            Effect::Remove(path) => {
                names.remove(path);
                pending.push(Naming::Drop(path.clone()));
            }
            Effect::Rename(old, new) => {
                let inode = names.remove(old).expect("it was there");
                names.insert(new.clone(), inode);
                pending.push(Naming::Move(old.clone(), new.clone()));
            }
            Effect::SyncDirectory(directory) => {
                let here = |path: &Path| path.parent() == Some(directory);
                pending.retain(|naming| {
                    let (Naming::Put(path, _) | Naming::Drop(path) | Naming::Move(path, _)) = naming;
                    !here(path)
                });
                durable.retain(|path, _| !here(path));
                durable.extend(
                    names
                        .iter()
                        .filter(|(path, _)| here(path))
                        .map(|(p, i)| (p.clone(), *i)),
                );
            }
        }
    }
    for naming in pending {
        if !survives.draw() {
            continue;
        }
        match naming {
            Naming::Put(path, inode) => drop(durable.insert(path, inode)),
            Naming::Drop(path) => drop(durable.remove(&path)),
            Naming::Move(old, new) => {
                if let Some(inode) = durable.remove(&old) {
                    durable.insert(new, inode);
                }
            }
        }
    }
    for (path, inode) in durable {
        let Inode { durable, pending } = &inodes[inode];
        let mut bytes = durable.clone();
        for (offset, written) in pending {
            let mut at = 0;
            while at < written.len() {
                let position = *offset as usize + at;
                let end = written.len().min(at + SECTOR - position % SECTOR);
                if survives.draw() {
                    put(&mut bytes, position, &written[at..end]);
                }
                at = end;
            }
        }
        let path = to.join(path.strip_prefix(from).expect("it was done under the root"));
        std::fs::create_dir_all(path.parent().expect("a file is in a directory")).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if file.len() < at + bytes.len() {
        file.resize(at + bytes.len(), 0);
    }
    file[at..at + bytes.len()].copy_from_slice(bytes);
}
