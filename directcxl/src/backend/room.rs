//! Room in a file: taking it, giving it back, and finding out that there was none.
//!
//! The pages of a file that was never written are holes. Whoever touches a mapped hole takes a page
//! of its file system, and gets SIGBUS where there is none: the same signal as for a page that is
//! gone. The two are told apart by asking the file system afterwards.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Whence, lseek};

use crate::error::{Error, Result};

/// Taken in one system call: a signal undoes at most so much.
const PIECE: u64 = 64 << 20;

/// Punches a hole into a file, where its file system can.
pub(super) fn punch_hole(fd: BorrowedFd<'_>, place: String, range: Range<u64>) -> Result<bool> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match allocate(fd, flags, &range) {
        Ok(()) => Ok(true),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
        Err(why) => Err(Error::io("free a piece of", place)(why)),
    }
}

/// What taking room for a range came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is there.
    All,
    /// There is not as much.
    Full,
    /// The file system does not know how.
    Unknown,
}

/// Takes room for all of a range of a file, whatever of it is there already.
pub(super) fn take(fd: BorrowedFd<'_>, range: &Range<u64>) -> std::result::Result<Taken, Errno> {
    let mut at = range.start;
    while at < range.end {
        let piece = at..range.end.min(at.saturating_add(PIECE));
        match allocate(fd, FallocateFlags::FALLOC_FL_KEEP_SIZE, &piece) {
            Ok(()) => at = piece.end,
            Err(Errno::ENOSPC | Errno::EDQUOT | Errno::ENOMEM) => return Ok(Taken::Full),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(Taken::Unknown),
            Err(why) => return Err(why),
        }
    }
    Ok(Taken::All)
}

fn allocate(
    fd: BorrowedFd<'_>,
    flags: FallocateFlags,
    range: &Range<u64>,
) -> std::result::Result<(), Errno> {
    let offset = |bytes: u64| bytes.try_into().map_err(|_| Errno::EFBIG);
    let (start, length) = (
        offset(range.start)?,
        offset(range.end.saturating_sub(range.start))?,
    );
    loop {
        match fallocate(fd, flags, start, length) {
            Err(Errno::EINTR) => {}
            done => return done,
        }
    }
}

/// Whether a bus error within a page of a file was for want of room, and not since the file was cut
/// or its disk is gone. Nobody but the file system knows, and it is asked after the fact: where room
/// has come since, what it says of the page itself decides.
pub(super) fn was_full(file: &File, page: &Range<u64>, writable: bool) -> io::Result<bool> {
    if file.metadata()?.len() < page.end {
        return Ok(false);
    }
    // A hole is where a page had to be taken. A page that was taken, and is a hole to `lseek` until
    // it is written, does not fault.
    if is_hole(file, page.start)? {
        return Ok(true);
    }
    // On hugetlbfs everything is data to `lseek`; and where content is copied when it is written
    // (btrfs, a reflink of xfs) a page that is there takes room as well.
    if writable && take(file.as_fd(), page)? == Taken::Full {
        return Ok(true);
    }
    let system = fstatfs(file)?;
    // Without a limit there are no blocks to be counted.
    Ok(system.blocks() > 0 && system.blocks_available() == 0)
}

fn is_hole(file: &File, at: u64) -> io::Result<bool> {
    let at = at.try_into().map_err(io::Error::other)?;
    // Nothing here uses the position that this moves.
    match lseek(file, at, Whence::SeekData) {
        Ok(data) => Ok(data > at),
        // No data until the end.
        Err(Errno::ENXIO) => Ok(true),
        Err(Errno::EINVAL) => Ok(false),
        Err(why) => Err(why.into()),
    }
}
