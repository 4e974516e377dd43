//! Pools whose owner was killed: found by their lock, which ended with the owner.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock, fstat};

use super::hierarchy::{Hierarchy, Tree};
use super::slot::{Folder, Slot};
use crate::error::{Error, Result};

/// Below this directory of every tree lie the pools.
pub(super) const BASE: &str = "rund-rt";
/// How long killed members of an abandoned group may take to go.
const PATIENCE: Duration = Duration::from_secs(5);

/// What [`sweep`] found and removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Directories of pools, one in each tree.
    pub pools: usize,
    /// Groups in them, one in each tree.
    pub slots: usize,
    /// Processes that were still members, and were killed.
    pub members: usize,
}

/// Removes the groups of pools whose owner is gone, and kills who is still in them.
///
/// An owner holds a lock on its pool's directory, which the kernel drops when the owner ends,
/// however that happens: no process ids, which may be used again or belong to another namespace.
/// [`CgroupPool::new`](super::CgroupPool::new) begins with this.
///
/// # Errors
/// Where a tree cannot be read, or killed members do not go within five seconds.
pub fn sweep(hierarchy: &Hierarchy) -> Result<Swept> {
    let mut swept = Swept::default();
    for tree in hierarchy.trees() {
        sweep_tree(hierarchy, tree, &mut swept)?;
    }
    Ok(swept)
}

fn sweep_tree(hierarchy: &Hierarchy, tree: &Tree, swept: &mut Swept) -> Result<()> {
    let base = tree.directory.join(BASE);
    // A hierarchy of this tree alone: kill and freeze look at no other.
    let alone = hierarchy.clone().only_tree(tree);
    for path in directories(&base)? {
        let Some(pool) = lock(&path)? else { continue };
        let mut empty = true;
        for group in directories(&path)? {
            let Some(name) = group.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            let Ok(slot) = Slot::open(&pool, name.to_owned()) else {
                continue;
            };
            swept.members += slot.members().map_or(0, |members| members.len());
            slot.remove(&alone, std::slice::from_ref(&pool), PATIENCE)?;
            swept.slots += 1;
            empty &= !group.exists();
        }
        if empty && std::fs::remove_dir(&path).is_ok() {
            swept.pools += 1;
        }
    }
    Ok(())
}

/// The directory, locked by us: `None` where its owner lives, or where it went away.
pub(super) fn lock(path: &Path) -> Result<Option<Folder>> {
    let folder = match Folder::open(path) {
        Ok(folder) => folder,
        Err(why) if why.kind() == ErrorKind::NotFound => return Ok(None),
        Err(why) => return Err(Error::cgroup("open", path)(why)),
    };
    match flock(&folder.descriptor, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(why) => return Err(Error::cgroup("lock", path)(why.into())),
    }
    // Between opening and locking somebody else may have swept it, and a new one of the name may
    // stand in its place.
    let is_it = |ours: rustix::fs::Stat| {
        rustix::fs::stat(path)
            .is_ok_and(|now| (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino))
    };
    Ok(fstat(&folder.descriptor).is_ok_and(is_it).then_some(folder))
}

fn directories(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(why) if why.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(why) => return Err(Error::cgroup("list", path)(why)),
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}
