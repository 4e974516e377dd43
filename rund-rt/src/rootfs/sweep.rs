//! Mounts whose owner was killed: found by their lock, which ended with the owner.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, fstat};

use super::mounts::take_down;
use crate::error::{Error, Result};

/// Where an owner's private tree of mounts hangs, in the owner's directory.
pub(super) const POINT: &str = "mounts";
/// How often another name is tried where the first is taken, or swept at once.
const NAMES: usize = 16;

/// What [`sweep`] found and removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SweptMounts {
    /// Owners that are gone, whose mounts were taken down.
    pub owners: usize,
}

/// Takes down the mounts of stores below `run_dir` whose owner is gone.
///
/// An owner holds a lock on its directory, which the kernel drops when the owner ends, however that
/// happens. [`RootfsStore::open`](super::RootfsStore::open) begins with this.
///
/// # Errors
/// Where the directory cannot be read, or a mount not be taken down.
pub fn sweep(run_dir: &Path) -> Result<SweptMounts> {
    let mut swept = SweptMounts::default();
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(swept),
        Err(why) => return Err(Error::rootfs("list", run_dir)(why)),
    };
    for entry in entries.flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let folder = entry.path();
        let Some(lock) = lock(&folder)? else { continue };
        remove(&folder)?;
        drop(lock);
        swept.owners += 1;
    }
    Ok(swept)
}

/// Takes down and removes an owner's directory.
pub(super) fn remove(folder: &Path) -> Result<()> {
    let point = folder.join(POINT);
    // Without the right to unmount there may be nothing mounted: a directory that can be removed says
    // so.
    let down = take_down(&point);
    for path in [point.as_path(), folder] {
        match std::fs::remove_dir(path) {
            Ok(()) => {}
            Err(why) if why.kind() == io::ErrorKind::NotFound => {}
            Err(why) => {
                down.map_err(Error::mount("unmount", &point))?;
                return Err(Error::rootfs("remove", path)(why));
            }
        }
    }
    Ok(())
}

/// The directory, locked by us: `None` where its owner lives, or where it went away.
fn lock(folder: &Path) -> Result<Option<File>> {
    let file = match File::open(folder) {
        Ok(file) => file,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(why) => return Err(Error::rootfs("open", folder)(why)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(why) => return Err(Error::mount("lock", folder)(why)),
    }
    // Between opening and locking somebody else may have swept it.
    let is_it = |ours: rustix::fs::Stat| {
        rustix::fs::stat(folder)
            .is_ok_and(|now| (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino))
    };
    Ok(fstat(&file).is_ok_and(is_it).then_some(file))
}

/// A directory of a new owner below `run_dir`, locked.
pub(super) fn own(run_dir: &Path) -> Result<(PathBuf, File)> {
    std::fs::create_dir_all(run_dir).map_err(Error::rootfs("make", run_dir))?;
    for _ in 0..NAMES {
        let folder = run_dir.join(format!("{:016x}", fastrand::u64(..)));
        match std::fs::create_dir(&folder) {
            Ok(()) => {}
            Err(why) if why.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(why) => return Err(Error::rootfs("make", &folder)(why)),
        }
        if let Some(lock) = lock(&folder)? {
            return Ok((folder, lock));
        }
    }
    let why = io::Error::from(io::ErrorKind::AlreadyExists);
    Err(Error::rootfs("make an owner's directory in", run_dir)(why))
}
