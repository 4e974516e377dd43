//! Where writable layers lie: a directory on a tmpfs, of which each monitor has a part of its own.
//! A lock says that its owner lives; what a killed one has left is swept by the next.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Error, Result};

use super::calls::layers::remove_contents;
use super::open_directory;

/// Beginning of the directories' names.
const PREFIX: &str = "rund-upper-";
/// The file in one that is locked while its owner lives.
const LOCK: &str = ".lock";

/// What the names of layers are made from.
pub type Secret = [u8; 32];

/// Name of a monitor's layer. No guest can guess it, though it can learn the numbers of processes.
pub fn layer_name(secret: &Secret, pid: i32) -> String {
    blake3::keyed_hash(secret, &pid.to_le_bytes())
        .to_hex()
        .to_string()
}

/// A directory for writable layers.
#[derive(Debug)]
pub(super) struct UpperBase {
    path: PathBuf,
    directory: OwnedFd,
    secret: Secret,
    // Let go when all is deleted.
    _lock: Flock<File>,
}

/// A tmpfs that every Linux has, or the temporary directory.
fn places() -> [PathBuf; 2] {
    ["/dev/shm".into(), std::env::temp_dir()]
}

impl UpperBase {
    /// A new directory; sweeps those of dead owners.
    pub(super) fn new() -> Result<Self> {
        let mut last = None;
        for place in places() {
            sweep(&place);
            match Self::new_in(&place) {
                Ok(base) => return Ok(base),
                Err(why) => last = Some(why),
            }
        }
        Err(last.unwrap_or(Error::Rootfs {
            path: "/dev/shm".into(),
            why: "no place for writable layers".into(),
        }))
    }

    fn new_in(place: &Path) -> Result<Self> {
        let mut random = [0; 8];
        super::guest::fill_random(&mut random);
        let name = format!("{PREFIX}{:016x}", u64::from_le_bytes(random));
        let path = place.join(name);
        let cannot = |what| Error::io(what, &path);
        // Under another name until it is locked, so that nobody sweeps it before.
        let unlocked = place.join(format!(".{PREFIX}{:016x}", u64::from_le_bytes(random)));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&unlocked)
            .map_err(cannot("make"))?;
        let locked = File::create(unlocked.join(LOCK))
            .map_err(cannot("make"))
            .and_then(|file| {
                Flock::lock(file, FlockArg::LockExclusiveNonblock)
                    .map_err(|(_, why)| cannot("lock")(why.into()))
            })
            .and_then(|lock| {
                std::fs::rename(&unlocked, &path).map_err(cannot("name"))?;
                Ok(lock)
            });
        if locked.is_err() {
            let _gone = std::fs::remove_dir_all(&unlocked);
        }
        let mut secret = Secret::default();
        super::guest::fill_random(&mut secret);
        let lock = locked?;
        Ok(Self {
            directory: open_directory(&path)?,
            secret,
            _lock: lock,
            path,
        })
    }

    pub(super) const fn secret(&self) -> &Secret {
        &self.secret
    }

    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Deletes the layer of a monitor that has ended without doing so.
    pub(super) fn remove(&self, pid: i32) {
        let name = layer_name(&self.secret, pid);
        if remove_contents(self.directory.as_fd(), Path::new(&name)).is_ok() {
            let _gone = nix::unistd::unlinkat(
                self.directory.as_fd(),
                Path::new(&name),
                nix::unistd::UnlinkatFlags::RemoveDir,
            );
        }
    }
}

impl Drop for UpperBase {
    fn drop(&mut self) {
        let _nothing = remove_contents(self.directory.as_fd(), Path::new("."));
        let _gone = std::fs::remove_dir(&self.path);
    }
}

/// Deletes directories whose owner is dead.
fn sweep(place: &Path) {
    for entry in std::fs::read_dir(place).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if !name.to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        let Ok(file) = File::open(path.join(LOCK)) else {
            continue;
        };
        if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            // What a guest has left may be deeper than the standard library can go.
            if let Ok(directory) = open_directory(&path) {
                let _another_sweeps = remove_contents(directory.as_fd(), Path::new("."));
            }
            let _gone = std::fs::remove_dir(&path);
            drop(lock);
        }
    }
}
