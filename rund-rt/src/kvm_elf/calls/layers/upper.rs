//! The writable layer: a directory that is made at the first write, with room for so many bytes.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, ftruncate, unlinkat};

use super::super::account::{self, Change, Held, Lock, NAME};
use super::directory::measure;
use super::{Layers, kind, open_in, remove_contents};

/// A writable layer: a directory that is made at the first write.
#[derive(Debug)]
pub struct Upper {
    /// Where it is made.
    pub base: OwnedFd,
    /// Its name there.
    pub name: String,
    /// The most bytes in it.
    pub most: u64,
    /// What all guest processes of the sandbox know of it.
    pub account: &'static account::Upper,
    /// Which one of them changes it.
    pub lock: Lock,
    /// The directory, once it is there.
    pub directory: Option<OwnedFd>,
}

impl Layers {
    /// The writable layer's directory, where something is in it.
    pub(super) fn upper(&mut self) -> Option<BorrowedFd<'_>> {
        let upper = self.upper.as_mut()?;
        if upper.directory.is_none() {
            if upper.account.used.load(Ordering::Acquire) == 0 {
                return None;
            }
            // Another process of this sandbox made it.
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let base = upper.base.as_fd();
            upper.directory = open_in(base, upper.name.as_bytes(), flags, Mode::empty()).ok();
        }
        upper.directory.as_ref().map(AsFd::as_fd)
    }

    /// The writable layer's directory; made where it is missing.
    pub(super) fn make_upper(&mut self) -> Result<RawFd, Errno> {
        if !self.is_writable() {
            return Err(Errno::EROFS);
        }
        let upper = self.upper.as_mut().ok_or(Errno::EROFS)?;
        if upper.directory.is_none() {
            let name = Path::new(&upper.name);
            match mkdirat(upper.base.as_fd(), name, Mode::from_bits_truncate(0o700)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(why) => return Err(why),
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let base = upper.base.as_fd();
            upper.directory = Some(open_in(base, upper.name.as_bytes(), flags, Mode::empty())?);
            upper.account.used.store(1, Ordering::Release);
        }
        upper
            .directory
            .as_ref()
            .map(AsRawFd::as_raw_fd)
            .ok_or(Errno::EROFS)
    }

    /// Before anything in the writable layer is looked at in order to change it.
    ///
    /// # Errors
    /// EINTR where a signal came while another process changed something.
    pub fn change(&self) -> Result<Change, Errno> {
        match &self.upper {
            Some(upper) => upper.lock.take(),
            None => Ok(Change::of_nothing()),
        }
    }

    /// Whether there is a writable layer: one without room for anything is none.
    pub const fn is_writable(&self) -> bool {
        matches!(&self.upper, Some(upper) if upper.most > 0)
    }

    /// Counts `bytes` that are about to be there.
    ///
    /// # Errors
    /// ENOSPC where it is full.
    pub fn charge(&mut self, bytes: u64) -> Result<(), Errno> {
        let upper = self.upper.as_ref().ok_or(Errno::EROFS)?;
        let (account, most) = (upper.account, upper.most);
        if most == 0 {
            return Err(Errno::EROFS);
        }
        if account.charge(bytes, most) {
            return Ok(());
        }
        let named = match self.upper() {
            Some(directory) => measure(directory).ok(),
            None => None,
        };
        if let Some(named) = named {
            account.recounted(named);
        }
        if account.charge(bytes, most) {
            Ok(())
        } else {
            Err(Errno::ENOSPC)
        }
    }

    /// So many bytes are there no more.
    pub fn free(&self, bytes: u64) {
        if let Some(upper) = &self.upper {
            upper.account.free(bytes);
        }
    }

    /// Lets `make` make a name, which costs [`NAME`].
    pub(super) fn add_name<T>(
        &mut self,
        make: impl FnOnce(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.charge(NAME)?;
        let made = match self.upper() {
            Some(upper) => make(upper),
            None => Err(Errno::EROFS),
        };
        if made.is_err() {
            self.free(NAME);
        }
        made
    }

    /// A name of a file or link is gone, which `stat` describes as it was.
    pub(super) fn name_gone(&self, stat: &FileStat) {
        let Some(upper) = &self.upper else { return };
        upper.account.free(NAME);
        if stat.st_nlink == 1 && kind(stat) == SFlag::S_IFREG {
            let bytes = u64::try_from(stat.st_size).unwrap_or(0);
            upper.account.nameless(stat.st_ino, bytes);
        }
    }

    /// Counts an open file of the writable layer.
    pub(super) fn hold(&self, fd: &OwnedFd) -> Result<Option<Held>, Errno> {
        let upper = self.upper.as_ref();
        upper.map(|upper| upper.account.open(fd)).transpose()
    }

    /// Makes an open file of the writable layer `len` bytes long.
    ///
    /// # Errors
    /// ENOSPC, or what the kernel says.
    pub fn set_len(&mut self, _: &Change, fd: &OwnedFd, len: u64) -> Result<(), Errno> {
        let stat = fstat(fd)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let grown = len.saturating_sub(size);
        self.charge(grown)?;
        let len_signed = i64::try_from(len).map_err(|_| Errno::EFBIG);
        if let Err(why) = len_signed.and_then(|len| ftruncate(fd, len)) {
            self.free(grown);
            return Err(why);
        }
        self.free(size.saturating_sub(len));
        self.changed_size(
            &stat,
            grown.cast_signed() - size.saturating_sub(len).cast_signed(),
        );
        Ok(())
    }

    /// An open file, which `stat` describes as it was, has grown.
    fn changed_size(&self, stat: &FileStat, grown: i64) {
        if let Some(upper) = &self.upper
            && stat.st_nlink == 0
        {
            upper.account.nameless_changed(stat.st_ino, grown);
        }
    }

    /// Lets `write` write `len` bytes at `at` into an open file of the writable layer.
    ///
    /// # Errors
    /// ENOSPC, EFBIG, or what `write` says.
    pub fn write(
        &mut self,
        _: &Change,
        fd: &OwnedFd,
        (at, len): (u64, u64),
        write: impl FnOnce() -> Result<u64, Errno>,
    ) -> Result<u64, Errno> {
        let stat = fstat(fd)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let grown = |len: u64| Some(at.checked_add(len)?.saturating_sub(size));
        let wanted = grown(len).ok_or(Errno::EFBIG)?;
        self.charge(wanted)?;
        let written = write();
        let is = written.ok().and_then(grown).unwrap_or(0).min(wanted);
        self.free(wanted - is);
        self.changed_size(&stat, is.cast_signed());
        written
    }

    /// Sets the most bytes of the writable layer.
    pub fn set_most(&mut self, most: u64) {
        if let Some(upper) = &mut self.upper {
            upper.most = most;
        }
    }

    /// Empties the writable layer.
    ///
    /// # Errors
    /// Where something in it cannot be deleted.
    pub fn reset(&mut self) -> Result<(), Errno> {
        let Some(upper) = &self.upper else {
            return Ok(());
        };
        if upper.account.used.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        if let Some(directory) = self.upper() {
            // It stays, and is empty.
            remove_contents(directory, Path::new("."))?;
        }
        Ok(())
    }

    /// Deletes the writable layer.
    pub fn delete(&mut self) {
        let _stays = self.reset();
        if let Some(upper) = &mut self.upper
            && upper.directory.take().is_some()
        {
            let name = Path::new(&upper.name);
            let _gone = unlinkat(upper.base.as_fd(), name, UnlinkatFlags::RemoveDir);
            upper.account.used.store(0, Ordering::Release);
        }
    }
}
