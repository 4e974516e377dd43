//! The fill protocol: who fills a file that several want, and what happens when he dies.
//!
//! The paper creates the shared file under its final name and fills it in place: whoever
//! opens it meanwhile reads what is not there yet. Here a file is filled without a name, and gets
//! one when it is complete, so that a name is never seen with partial bytes behind it.
//!
//! A *claim* keeps several processes from filling the same file at once: an exclusive flock on
//! `tmp/<key>`, where the key is the fingerprint of what is to be stored. It is advisory. Whoever
//! dies with one loses it to the next in line, and whoever has waited for one for too long fills
//! without: the first to publish wins, and the other copy goes away.

use std::fmt;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::lock::{Lock, try_lock, wait_lock};
use crate::regular::open_or_make;

/// The right to fill one file. Dropping it lets the next one in.
#[derive(Debug)]
pub(crate) struct Claim {
    path: PathBuf,
    _lock: File,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Under the lock, so that nobody else's claim is taken away. Where it cannot be removed it
        // stays as an empty file that the next claim of this key or the next sweep takes over.
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "a claim stays behind");
        }
    }
}

impl Claim {
    /// The claim on `key`, or `None` where somebody else has it.
    pub(crate) fn try_take(tmp: &Path, key: impl fmt::Display) -> Result<Option<Self>> {
        let path = tmp.join(format!("claim-{key}"));
        loop {
            let file = open(&path)?;
            if !try_lock(&file, Lock::Exclusive, &path)? {
                return Ok(None);
            }
            if is_current(&file, &path)? {
                return Ok(Some(Self { path, _lock: file }));
            }
        }
    }

    /// The claim on `key` as soon as whoever has it gives it back or dies, or `None` when
    /// `patience` is over.
    pub(crate) fn wait(
        tmp: &Path,
        key: impl fmt::Display,
        patience: Duration,
    ) -> Result<Option<Self>> {
        let path = tmp.join(format!("claim-{key}"));
        let start = Instant::now();
        loop {
            let file = open(&path)?;
            let left = patience.saturating_sub(start.elapsed());
            if !wait_lock(&file, Lock::Exclusive, &path, left)? {
                return Ok(None);
            }
            if is_current(&file, &path)? {
                return Ok(Some(Self { path, _lock: file }));
            }
        }
    }
}

fn open(path: &Path) -> Result<File> {
    open_or_make(path).map_err(Error::io("claim", path))
}

/// Whether `path` still names the file that was locked: the holder before may have removed it.
fn is_current(file: &File, path: &Path) -> Result<bool> {
    let failed = |error| Error::io("look at", path)(error);
    let locked = file.metadata().map_err(failed)?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (locked.dev(), locked.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_the_claim_and_the_next_gets_it_when_the_first_is_gone() {
        let tmp = tempfile::tempdir().unwrap();
        let first = Claim::try_take(tmp.path(), "k").unwrap().unwrap();
        assert!(Claim::try_take(tmp.path(), "k").unwrap().is_none());
        assert!(Claim::try_take(tmp.path(), "other").unwrap().is_some());
        let patience = Duration::from_millis(20);
        assert!(Claim::wait(tmp.path(), "k", patience).unwrap().is_none());
        std::thread::scope(|scope| {
            let next = scope.spawn(|| Claim::wait(tmp.path(), "k", Duration::from_secs(10)));
            std::thread::sleep(Duration::from_millis(20));
            drop(first);
            assert!(next.join().unwrap().unwrap().is_some());
        });
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_dead_holder_left_behind_is_taken_over() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("claim-k"), []).unwrap();
        assert!(Claim::try_take(tmp.path(), "k").unwrap().is_some());
    }
}
