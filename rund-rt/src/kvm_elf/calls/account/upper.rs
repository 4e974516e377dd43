//! Bytes of a writable layer: of files, and of what a name costs, as long as they are there. A file
//! whose last name is gone is there until nobody has it open.
//!
//! Which files are open is counted by their inode numbers, in so many buckets: the bytes of a file
//! without a name wait in its bucket until no file of that bucket is open.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::stat::fstat;

/// What a name costs beside the file's bytes: a page, which is more than an inode, its entry and the
/// unused end of a last page.
pub const NAME: u64 = 4096;
/// How many buckets there are: files are numbered one after the other.
const BUCKETS: usize = 16384;
/// How many bits of a bucket count its bytes without a name; those above count its open files.
const BYTES: u32 = 44;
const ONE_OPEN: u64 = 1 << BYTES;
const MOST_BYTES: u64 = ONE_OPEN - 1;

/// What is known of a writable layer. Who changes it holds its [`Lock`], except to close a file.
#[derive(Debug)]
#[repr(C)]
pub struct Upper {
    /// 1 once its directory is there.
    pub used: AtomicU64,
    bytes: AtomicU64,
    /// Of those, in files without a name.
    nameless: AtomicU64,
    /// Whether a file was ever open.
    opened: AtomicU64,
    /// Last: most of their pages are never touched.
    buckets: [AtomicU64; BUCKETS],
}

fn take_off(from: &AtomicU64, bytes: u64) {
    let _always = from.fetch_update(Ordering::AcqRel, Ordering::Acquire, |all| {
        Some(all.saturating_sub(bytes))
    });
}

impl Upper {
    /// Nothing is in it. Says whether a file of it was open.
    pub(super) fn begin(&self) -> bool {
        self.bytes.store(0, Ordering::Relaxed);
        self.nameless.store(0, Ordering::Relaxed);
        self.opened.swap(0, Ordering::Relaxed) > 0
    }

    /// Counts `bytes` that are about to be there; false where that would be more than `most`.
    pub fn charge(&self, bytes: u64, most: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= most);
        bytes == 0
            || self
                .bytes
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, fits)
                .is_ok()
    }

    /// So many bytes are there no more.
    pub fn free(&self, bytes: u64) {
        take_off(&self.bytes, bytes);
    }

    /// What has names was counted anew: processes that were killed may have left mistakes.
    pub fn recounted(&self, named: u64) {
        let all = named.saturating_add(self.nameless.load(Ordering::Acquire));
        self.bytes.store(all, Ordering::Release);
    }

    fn bucket(&self, inode: u64) -> &AtomicU64 {
        &self.buckets[(inode % BUCKETS as u64) as usize]
    }

    /// Counts a file that was opened just now.
    ///
    /// # Errors
    /// Where the kernel says nothing of it.
    pub fn open(&'static self, file: impl AsFd) -> Result<Held, Errno> {
        let held = Held {
            account: self,
            inode: fstat(&file)?.st_ino,
        };
        self.opened.store(1, Ordering::Relaxed);
        held.share();
        Ok(held)
    }

    /// The last name of a file of `bytes` is gone: they are given back now, or when it is closed.
    pub fn nameless(&self, inode: u64, bytes: u64) {
        let waits =
            self.bucket(inode)
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |bucket| {
                    let sum = (bucket & MOST_BYTES).checked_add(bytes)?;
                    (bucket >= ONE_OPEN && sum <= MOST_BYTES).then_some(bucket + bytes)
                });
        if waits.is_ok() {
            self.nameless.fetch_add(bytes, Ordering::AcqRel);
        } else {
            self.free(bytes);
        }
    }

    /// A file without a name has grown by `grown` bytes, or shrunk.
    pub fn nameless_changed(&self, inode: u64, grown: i64) {
        let changed =
            self.bucket(inode)
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |bucket| {
                    let bytes = (bucket & MOST_BYTES).saturating_add_signed(grown);
                    Some(bucket & !MOST_BYTES | bytes.min(MOST_BYTES))
                });
        let _always = changed.and_then(|_| {
            self.nameless
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |all| {
                    Some(all.saturating_add_signed(grown))
                })
        });
    }

    fn close(&self, inode: u64) {
        let closed =
            self.bucket(inode)
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |bucket| {
                    let left = bucket.checked_sub(ONE_OPEN)?;
                    Some(if left < ONE_OPEN { 0 } else { left })
                });
        if let Ok(bucket) = closed
            && bucket >> BYTES == 1
        {
            let bytes = bucket & MOST_BYTES;
            take_off(&self.nameless, bytes);
            self.free(bytes);
        }
    }
}

/// A file of the writable layer that is open, in one process.
#[derive(Debug)]
pub struct Held {
    account: &'static Upper,
    /// Its number.
    pub inode: u64,
}

impl Held {
    /// A process that is about to be forked will have it open, too.
    pub fn share(&self) {
        self.account
            .bucket(self.inode)
            .fetch_add(ONE_OPEN, Ordering::AcqRel);
    }

    /// That process was not made.
    pub fn unshare(&self) {
        self.account.close(self.inode);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.account.close(self.inode);
    }
}

/// What keeps two processes of a sandbox from changing its writable layer at the same time.
///
/// A record lock of the kernel's on one byte of a file: it belongs to the process, is not inherited
/// by a fork, and goes with a process that is killed.
#[derive(Debug, Clone, Copy)]
pub struct Lock {
    /// A file of all sandboxes of a zygote, which has no other descriptor in this process.
    file: &'static OwnedFd,
    /// This sandbox's byte of it.
    byte: i64,
}

impl Lock {
    /// The byte `byte` of `file`, open for writing.
    pub const fn new(file: &'static OwnedFd, byte: i64) -> Self {
        Self { file, byte }
    }

    fn set(&self, kind: i32, command: i32) -> Result<(), Errno> {
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.byte,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: a descriptor of ours and a structure that the call reads.
        let set = unsafe { libc::fcntl(self.file.as_raw_fd(), command, &raw const lock) };
        Errno::result(set).map(drop)
    }

    /// Waits until nobody else changes anything. One process has it once at a time.
    ///
    /// # Errors
    /// EINTR where a signal came first.
    pub fn take(self) -> Result<Change, Errno> {
        self.set(libc::F_WRLCK, libc::F_SETLKW)?;
        Ok(Change(Some(self)))
    }
}

/// The writable layer is this process's to change until this is dropped.
#[derive(Debug)]
pub struct Change(Option<Lock>);

impl Change {
    /// Where there is no writable layer, nobody changes it.
    pub const fn of_nothing() -> Self {
        Self(None)
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if let Some(lock) = self.0 {
            let _always = lock.set(libc::F_UNLCK, libc::F_SETLK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Account;
    use super::{NAME, Upper};
    use std::os::unix::fs::MetadataExt;
    use std::sync::atomic::Ordering;

    fn upper() -> &'static Upper {
        &Account::new().unwrap().upper
    }

    fn bytes(upper: &Upper) -> u64 {
        upper.bytes.load(Ordering::Relaxed)
    }

    #[test]
    fn there_is_no_more_than_there_may_be() {
        let upper = upper();
        assert!(upper.charge(60, 100));
        assert!(!upper.charge(41, 100));
        assert!(!upper.charge(u64::MAX, u64::MAX));
        assert!(upper.charge(40, 100));
        assert!(upper.charge(0, 10), "nothing always fits in");
        upper.free(70);
        assert_eq!(bytes(upper), 30);
        upper.recounted(7);
        assert_eq!(bytes(upper), 7);
    }

    #[test]
    fn a_file_without_a_name_counts_until_it_is_closed() {
        let upper = upper();
        assert!(upper.charge(NAME, u64::MAX));
        let file = tempfile::NamedTempFile::new().unwrap();
        let inode = file.as_file().metadata().unwrap().ino();
        let held = upper.open(file.as_file()).unwrap();
        held.share();
        upper.nameless(inode, NAME);
        assert_eq!(bytes(upper), NAME);
        // It grows, and is cut.
        assert!(upper.charge(10, u64::MAX));
        upper.nameless_changed(inode, 10);
        drop(held);
        assert_eq!(bytes(upper), NAME + 10, "another process has it");
        upper.recounted(5);
        assert_eq!(bytes(upper), NAME + 15);
        upper.close(inode);
        assert_eq!(bytes(upper), 5);
        assert_eq!(upper.nameless.load(Ordering::Relaxed), 0);
        // Closed before, it is given back at once.
        upper.nameless(inode, 5);
        assert_eq!(bytes(upper), 0);
    }
}
