//! Making, removing, renaming and linking, in the upper layer alone.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, renameat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat};

use super::super::account::{Change, NAME};
use super::{Found, Layers, Place, join, parent_in, remove_contents};

impl Layers {
    /// Makes a directory.
    ///
    /// # Errors
    /// EEXIST, EROFS.
    pub fn make_directory(&mut self, _: &Change, place: &Place, mode: Mode) -> Result<(), Errno> {
        if place.found.is_some() {
            return Err(Errno::EEXIST);
        }
        self.make_parents(&place.path)?;
        self.add_name(|upper| {
            let (parent, name) = parent_in(upper, &place.path)?;
            mkdirat(&parent, name, mode)
        })?;
        if self.unhide(&place.path) {
            // What was deleted under this name stays deleted.
            self.make_opaque(&place.path)?;
        }
        Ok(())
    }

    /// Deletes what is at `place`.
    ///
    /// # Errors
    /// ENOENT, EISDIR, ENOTDIR, ENOTEMPTY, EROFS.
    pub fn remove(&mut self, _: &Change, place: &Place, directory: bool) -> Result<(), Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        if place.path == b"/" {
            return Err(Errno::EBUSY);
        }
        if !self.is_writable() {
            return Err(Errno::EROFS);
        }
        match (directory, found.is_directory()) {
            (true, false) => return Err(Errno::ENOTDIR),
            (false, true) => return Err(Errno::EISDIR),
            _ => {}
        }
        if directory && !self.list(place)?.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        // First, since there may be no room for the name that hides.
        if self.shows_through(place) {
            self.hide(&place.path)?;
        }
        if found.presence.upper {
            let upper = self.upper().ok_or(Errno::EROFS)?;
            let (parent, name) = parent_in(upper, &place.path)?;
            if directory {
                // Nothing is left in it but what hides.
                let names = remove_contents(parent.as_fd(), name)?;
                unlinkat(&parent, name, UnlinkatFlags::RemoveDir)?;
                self.free(names * NAME);
            } else {
                unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir)?;
            }
            self.name_gone(&found.stat);
        }
        Ok(())
    }

    /// Moves what is at `from` to `to`, over what is there.
    ///
    /// # Errors
    /// EXDEV for a directory of the lower layer, as overlayfs says: whoever moves it copies it.
    pub fn rename(&mut self, change: &Change, from: &Place, to: &Place) -> Result<(), Errno> {
        let found = from.found.ok_or(Errno::ENOENT)?;
        if !self.is_writable() {
            return Err(Errno::EROFS);
        }
        if from.path == to.path {
            return Ok(());
        }
        if to.path.starts_with(&join(&from.path, b"")) {
            return Err(Errno::EINVAL);
        }
        if found.is_directory() && found.presence.lower {
            return Err(Errno::EXDEV);
        }
        match to.found {
            Some(there) if there.is_directory() && !found.is_directory() => {
                return Err(Errno::EISDIR);
            }
            Some(there) if !there.is_directory() && found.is_directory() => {
                return Err(Errno::ENOTDIR);
            }
            Some(there) if there.is_directory() => self.remove(change, to, true)?,
            _ => {}
        }
        if !found.presence.upper {
            if found.is_link() {
                let target = self.read_link_at(&from.path, found.presence)?;
                if to.found.is_some() {
                    self.remove(change, to, false)?;
                }
                self.make_link(&target, &to.path)?;
                return self.remove(change, from, false);
            }
            self.copy_up(from, false)?;
        }
        self.make_parents(&to.path)?;
        let shows = self.shows_through(from);
        if shows {
            self.hide(&from.path)?;
        }
        let upper = self.upper().ok_or(Errno::EROFS)?;
        let moved = parent_in(upper, &from.path).and_then(|(old, old_name)| {
            let (new, new_name) = parent_in(upper, &to.path)?;
            renameat(&old, old_name, &new, new_name)
        });
        if let Err(why) = moved {
            if shows {
                self.unhide(&from.path);
            }
            return Err(why);
        }
        let same = |there: &Found| there.stat.st_ino == found.stat.st_ino;
        if let Some(there) = to
            .found
            .filter(|there| there.presence.upper && !there.is_directory() && !same(there))
        {
            self.name_gone(&there.stat);
        }
        self.unhide(&to.path);
        Ok(())
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// EEXIST, EROFS.
    pub fn symlink(&mut self, _: &Change, target: &[u8], place: &Place) -> Result<(), Errno> {
        if place.found.is_some() {
            return Err(Errno::EEXIST);
        }
        self.make_link(target, &place.path)
    }

    fn make_link(&mut self, target: &[u8], path: &[u8]) -> Result<(), Errno> {
        self.make_parents(path)?;
        self.add_name(|upper| {
            let (parent, name) = parent_in(upper, path)?;
            symlinkat(OsStr::from_bytes(target), &parent, name)
        })?;
        self.unhide(path);
        Ok(())
    }

    /// Makes a hard link.
    ///
    /// # Errors
    /// EEXIST, EROFS, EPERM for directories.
    pub fn link(&mut self, _: &Change, from: &Place, place: &Place) -> Result<(), Errno> {
        let found = from.found.ok_or(Errno::ENOENT)?;
        if place.found.is_some() {
            return Err(Errno::EEXIST);
        }
        if !found.is_regular() {
            return Err(Errno::EPERM);
        }
        if !found.presence.upper {
            self.copy_up(from, false)?;
        }
        self.make_parents(&place.path)?;
        self.add_name(|upper| {
            let (old, old_name) = parent_in(upper, &from.path)?;
            let (new, new_name) = parent_in(upper, &place.path)?;
            linkat(&old, old_name, &new, new_name, AtFlags::empty())
        })?;
        self.unhide(&place.path);
        Ok(())
    }
}
