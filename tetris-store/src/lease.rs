//! Leases: the right to keep a model's tensors from being reclaimed.
//!
//! A lease is a shared flock on the model's manifest, which every user may open for reading, also
//! through a read-only mount and in another PID or user namespace. The kernel gives it back when
//! the last process that has it ends, however it ends; no count can go wrong. The paper instead
//! scans the names of running pods every 5 seconds.

use std::fs::File;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[cfg(feature = "candle")]
use {
    std::ffi::OsStr,
    std::io::Write,
    std::os::fd::{AsRawFd, OwnedFd},
    std::os::unix::ffi::OsStrExt,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::error::{Error, Result};
use crate::lifecycle::Moment;
use crate::lock::{Lock, try_lock, wait_lock};
use crate::regular;
use crate::stamp;

/// A lease on one model. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Lease {
    manifest: Option<File>,
    path: PathBuf,
    /// Where this process may not stamp: what it opens for an agent to see that it attached, and
    /// to see when it ends.
    _seen: Option<File>,
}

impl Lease {
    /// Takes a lease on the model whose manifest is at `path` and reads the manifest; `None` where
    /// there is no such model.
    pub(crate) fn take(path: &Path, patience: Duration) -> Result<Option<(Self, Vec<u8>)>> {
        let start = Instant::now();
        loop {
            let Some(mut file) = regular::open(path)? else {
                return Ok(None);
            };
            let left = patience.saturating_sub(start.elapsed());
            if !wait_lock(&file, Lock::Shared, path, left)? {
                let what = "being reclaimed";
                return Err(Error::Busy {
                    what,
                    path: path.to_owned(),
                    waited: patience,
                });
            }
            // Before the look below: see the lifecycle's notes on idle time.
            let stamped = mark_in_use(&file, path);
            // The reclaimer may have been faster: the lease would be on a file without a name.
            let metadata = file.metadata().map_err(Error::io("look at", path))?;
            if metadata.nlink() == 0 {
                continue;
            }
            let bytes = regular::read(&mut file, path)?;
            let lease = Self {
                manifest: Some(file),
                path: path.to_owned(),
                _seen: (!stamped)
                    .then(|| regular::open(&seen_file(path)).ok().flatten())
                    .flatten(),
            };
            return Ok(Some((lease, bytes)));
        }
    }
}

#[cfg(feature = "candle")]
impl Lease {
    /// Another descriptor of the same lease: the last one to be closed gives it back.
    pub(crate) fn share(&self) -> Result<Option<OwnedFd>> {
        let shared = self.manifest.as_ref().map(File::try_clone).transpose();
        let shared = shared.map_err(Error::io("keep open", &self.path))?;
        Ok(shared.map(OwnedFd::from))
    }

    /// Gives back what [`share`](Self::share) gave. Allocates nothing unless something fails, since
    /// an allocator calls it; for the same reason there is no path, and the kernel's is used.
    pub(crate) fn give_back(shared: OwnedFd) {
        let mut path = [0; 32];
        let left = {
            let mut rest = &mut path[..];
            // Fits: the number has at most ten digits.
            let _fits = write!(rest, "/proc/self/fd/{}", shared.as_raw_fd());
            rest.len()
        };
        let path = Path::new(OsStr::from_bytes(&path[..path.len() - left]));
        let Ok(manifest) = File::open(path) else {
            return;
        };
        drop(shared);
        if try_lock(&manifest, Lock::Exclusive, path).is_ok_and(|last| last) {
            let now = stamp::now();
            // As in `begin_idle_time`; here there is nowhere to report to.
            let _not_the_owner = now.map(|now| stamp::write(&manifest, now));
        }
    }
}

impl Lease {
    /// Leaves the lease to whatever program this process executes next.
    pub(crate) fn keep_on_exec(mut self) -> Result<()> {
        let Some(manifest) = self.manifest.take() else {
            return Ok(());
        };
        fcntl(&manifest, FcntlArg::F_SETFD(FdFlag::empty()))
            .map_err(Error::io("keep open", &self.path))?;
        // Nobody here closes it any more.
        let _kept = manifest.into_raw_fd();
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Closed, never unlocked: a forked child keeps it.
        drop(self.manifest.take());
        begin_idle_time(&self.path);
    }
}

/// What an agent watches for the model whose manifest is at `path`: a file that nobody but those
/// who take a lease opens. There is one only where there is, or was, an agent.
pub(crate) fn seen_file(path: &Path) -> PathBuf {
    let root = path.parent().and_then(Path::parent).unwrap_or(path);
    root.join("seen").join(path.file_name().unwrap_or_default())
}

/// Notes that the model at `path` is in use; whether that was possible. Only the store's owner can;
/// where others take a lease, a sweep or the agent sees the lease itself.
pub(crate) fn mark_in_use(manifest: &File, path: &Path) -> bool {
    let stamped = stamp::write(manifest, Moment::IN_USE);
    if let Err(error) = &stamped {
        tracing::trace!(path = %path.display(), %error, "use not noted");
    }
    stamped.is_ok()
}

/// Where nobody holds a lease on the model at `path`, its idle time begins now. Otherwise, and
/// where this process may not say so, it begins with the first sweep that finds it unleased.
pub(crate) fn begin_idle_time(path: &Path) {
    let begun = || -> Result<()> {
        let Some(manifest) = regular::open(path)? else {
            return Ok(());
        };
        // Through a description of its own: changing a lock that a forked child shares would
        // change the child's as well.
        if try_lock(&manifest, Lock::Exclusive, path)? {
            stamp::write(&manifest, stamp::now()?).map_err(Error::io("stamp", path))?;
        }
        Ok(())
    };
    if let Err(error) = begun() {
        tracing::trace!(path = %path.display(), %error, "idle time begins with the next sweep");
    }
}
