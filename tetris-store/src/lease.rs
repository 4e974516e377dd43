//! Leases: the right to keep a model's tensors from being reclaimed.
//!
//! A lease is a shared flock on the model's manifest, which every user may open for reading, also
//! through a read-only mount and in another PID or user namespace. The kernel gives it back when
//! the last process that has it ends, however it ends; no count can go wrong. The paper instead
//! scans the names of running pods every 5 seconds (§4.1).

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::lock::{Lock, wait_lock};
use crate::stamp::Stamp;

/// A lease on one model. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Lease {
    manifest: File,
    path: PathBuf,
}

impl Lease {
    /// Takes a lease on the model whose manifest is at `path` and reads the manifest; `None` where
    /// there is no such model.
    pub(crate) fn take(path: &Path, patience: Duration) -> Result<Option<(Self, Vec<u8>)>> {
        let start = Instant::now();
        loop {
            let mut file = match File::open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::io("open", path)(error)),
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
            // The reclaimer may have been faster: the lease would be on a file without a name.
            let metadata = file.metadata().map_err(Error::io("look at", path))?;
            if metadata.nlink() == 0 {
                continue;
            }
            let mut bytes = Vec::with_capacity(metadata.len() as usize + 1);
            file.read_to_end(&mut bytes)
                .map_err(Error::io("read", path))?;
            let lease = Self {
                manifest: file,
                path: path.to_owned(),
            };
            lease.stamp();
            return Ok(Some((lease, bytes)));
        }
    }

    /// Notes that the model is in use now. Only its owner can; for others the sweeps and the agent
    /// see the lease itself.
    fn stamp(&self) {
        let stamped = Stamp::now(true).and_then(|stamp| stamp.put(&self.manifest));
        if let Err(error) = stamped {
            tracing::trace!(path = %self.path.display(), %error, "lease not stamped");
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Idle time begins now. The mark stays, for there may be other leases.
        self.stamp();
    }
}
