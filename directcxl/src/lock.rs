//! Locks that die with their holder: open file description locks on bytes that no data lie at.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::pool::locked;

/// How long a lock is tried without sleeping: holders have it for microseconds.
const SPIN: Duration = Duration::from_micros(200);
/// How long is slept between tries after that.
const NAP: Duration = Duration::from_micros(100);

/// Whether others may hold it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Shared,
    Exclusive,
}

/// A lock that is given back when it goes away.
#[derive(Debug)]
pub(crate) struct Guard<'a> {
    fd: BorrowedFd<'a>,
    byte: u64,
}

impl<'a> Guard<'a> {
    /// A lock that this descriptor holds already.
    pub(crate) fn held(fd: BorrowedFd<'a>, byte: u64) -> Self {
        Self { fd, byte }
    }

    /// Keeps the lock beyond this guard.
    pub(crate) fn keep(self) {
        let _kept = std::mem::ManuallyDrop::new(self);
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // Only a closed descriptor could refuse it, and that has no locks.
        let _refused = release(self.fd, self.byte);
    }
}

fn range(byte: u64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte as libc::off_t,
        l_len: 1,
        l_pid: 0,
    }
}

/// Locks a byte, or says after `patience` that `what` is busy.
pub(crate) fn acquire<'a>(
    fd: BorrowedFd<'a>,
    byte: u64,
    kind: Kind,
    patience: Duration,
    what: &'static str,
) -> Result<Guard<'a>> {
    let kind = match kind {
        Kind::Shared => libc::F_RDLCK,
        Kind::Exclusive => libc::F_WRLCK,
    };
    let mut start = None;
    loop {
        match fcntl(fd, FcntlArg::F_OFD_SETLK(&range(byte, kind))) {
            Ok(_) => return Ok(Guard { fd, byte }),
            Err(Errno::EAGAIN | Errno::EACCES | Errno::EINTR) => {}
            Err(why) => return Err(Error::io("lock", what)(why)),
        }
        let waited = start.get_or_insert_with(Instant::now).elapsed();
        if waited >= patience {
            return Err(Error::Busy { what, waited });
        }
        if waited < SPIN {
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
        }
    }
}

/// Gives a lock back.
pub(crate) fn release(fd: BorrowedFd<'_>, byte: u64) -> Result<()> {
    fcntl(fd, FcntlArg::F_OFD_SETLK(&range(byte, libc::F_UNLCK)))
        .map(|_| ())
        .map_err(Error::io("unlock", "a pool"))
}

/// Whether an open file description other than this one holds a lock on the byte.
pub(crate) fn is_held_elsewhere(fd: BorrowedFd<'_>, byte: u64) -> Result<bool> {
    is_any_held_elsewhere(fd, byte, 1)
}

/// As [`is_held_elsewhere`], for so many bytes.
pub(crate) fn is_any_held_elsewhere(fd: BorrowedFd<'_>, byte: u64, bytes: u64) -> Result<bool> {
    let mut asked = range(byte, libc::F_WRLCK);
    asked.l_len = bytes as libc::off_t;
    fcntl(fd, FcntlArg::F_OFD_GETLK(&mut asked))
        .map_err(Error::io("look at the locks of", "a pool"))?;
    Ok(i32::from(asked.l_type) != libc::F_UNLCK)
}

/// Descriptors that pools of this process are open on.
static DESCRIPTORS: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// A descriptor that one pool of this process uses.
#[derive(Debug)]
pub(crate) struct Descriptor(RawFd);

impl Descriptor {
    /// Nothing where another pool has it.
    pub(crate) fn claim(backend: &dyn Backend) -> Option<Self> {
        let fd = backend.as_fd().as_raw_fd();
        let is_new = locked(&DESCRIPTORS).insert(fd);
        // Not before it is known to be ours: to drop one gives the descriptor back.
        is_new.then(|| Self(fd))
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        locked(&DESCRIPTORS).remove(&self.0);
    }
}
