//! `flock` with a deadline.
//!
//! A lock belongs to the open file description: the kernel drops it with the last descriptor,
//! however the holder ended, and a forked child keeps it. It is given back by closing, never by
//! LOCK_UN, which would take it from such a child as well.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Shared or exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    Shared,
    Exclusive,
}

/// Whether the lock was to be had at once.
pub(crate) fn try_lock(file: &File, lock: Lock, path: &Path) -> Result<bool> {
    let tried = match lock {
        Lock::Shared => file.try_lock_shared(),
        Lock::Exclusive => file.try_lock(),
    };
    match tried {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", path)(error)),
    }
}

/// Waits for the lock for at most `patience`; whether it was to be had.
///
/// `flock` has no time limit of its own, so this asks again and again, at first after 50 us, at
/// last every 5 ms: what it waits for takes a fill's or a sweep's time.
pub(crate) fn wait_lock(file: &File, lock: Lock, path: &Path, patience: Duration) -> Result<bool> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(50);
    loop {
        if try_lock(file, lock, path)? {
            return Ok(true);
        }
        let left = patience.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}
