//! Copying up: what is written to in the lower layer is first copied to the upper one.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::super::account::Change;
use super::walk::components;
use super::{LayerFile, Layers, Place, beneath, join, open_in, parent_in, split, stat_in};

/// A file that is being copied: no name that a guest can give.
const ASIDE: &[u8] = b"/.wh..wh.copy";

impl Layers {
    /// Makes the directories on the way to `path` in the writable layer, as the lower one has them.
    pub(super) fn make_parents(&mut self, path: &[u8]) -> Result<(), Errno> {
        self.make_upper()?;
        let (parent, _) = split(path);
        let mut at = Vec::new();
        let mut parts = components(parent);
        while let Some(name) = parts.pop() {
            at.push(b'/');
            at.extend_from_slice(&name);
            let upper = self.upper().ok_or(Errno::EROFS)?;
            if stat_in(upper, &at).is_some() {
                continue;
            }
            let mode = self
                .lower()
                .and_then(|lower| stat_in(lower, &at))
                .map_or(0o755, |stat| stat.st_mode & 0o7777);
            let mode = Mode::from_bits_truncate(mode | 0o700);
            self.add_name(|upper| {
                let (parent, name) = parent_in(upper, &at)?;
                mkdirat(&parent, name, mode)
            })?;
        }
        Ok(())
    }

    /// Copies a file of the lower layer to the writable one. It appears there when it is whole, for
    /// whoever reads it meanwhile.
    pub(super) fn copy_up(&mut self, place: &Place, empty: bool) -> Result<(), Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        self.make_parents(&place.path)?;
        let size = if empty { 0 } else { found.stat.st_size };
        let size = u64::try_from(size).unwrap_or(0);
        let from = self.open_read(place)?.fd;
        let mode = Mode::from_bits_truncate(found.stat.st_mode & 0o7777);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC;
        self.charge(size)?;
        let copied = self.add_name(|upper| {
            let into = open_in(upper, ASIDE, flags, mode)?;
            fchmod(&into, mode)?;
            copy(&from, &into, size)?;
            let (parent, name) = parent_in(upper, &place.path)?;
            renameat(upper, beneath(ASIDE), &parent, name)
        });
        if copied.is_err() {
            self.free(size);
            if let Some(upper) = self.upper() {
                let _absent = unlinkat(upper, beneath(ASIDE), UnlinkatFlags::NoRemoveDir);
            }
        }
        copied
    }

    /// Opens the regular file at `place` for writing, in the writable layer; it is copied there
    /// where it is not, and made where there is none.
    ///
    /// # Errors
    /// EROFS where there is no writable layer, ENOSPC where it is full.
    pub fn open_write(
        &mut self,
        change: &Change,
        place: &Place,
        flags: OFlag,
        mode: Mode,
    ) -> Result<LayerFile, Errno> {
        let access = flags & (OFlag::O_ACCMODE | OFlag::O_APPEND);
        let fd = match place.found {
            Some(found) if found.is_directory() => return Err(Errno::EISDIR),
            Some(found) if !found.is_regular() => return Err(Errno::ENXIO),
            Some(found) => {
                let cut = flags.contains(OFlag::O_TRUNC);
                if !found.presence.upper {
                    self.copy_up(place, cut)?;
                }
                let upper = self.upper().ok_or(Errno::EROFS)?;
                if cut && found.presence.upper {
                    let whole = open_in(upper, &place.path, OFlag::O_WRONLY, Mode::empty())?;
                    self.set_len(change, &whole, 0)?;
                }
                let upper = self.upper().ok_or(Errno::EROFS)?;
                open_in(upper, &place.path, access, Mode::empty())?
            }
            None => {
                self.make_parents(&place.path)?;
                let flags = access | OFlag::O_CREAT | OFlag::O_EXCL;
                let fd = self.add_name(|upper| open_in(upper, &place.path, flags, mode))?;
                self.unhide(&place.path);
                fd
            }
        };
        let held = self.hold(&fd)?;
        Ok(LayerFile { fd, held })
    }

    /// Brings what is at `place` to the writable layer, to change its mode or times.
    fn bring_up(&mut self, place: &Place) -> Result<(), Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        if found.presence.upper {
            return Ok(());
        }
        if found.is_directory() {
            self.make_parents(&join(&place.path, b"x"))
        } else if found.is_regular() {
            self.copy_up(place, false)
        } else {
            Err(Errno::EROFS)
        }
    }

    /// A descriptor of what is at `place` in the writable layer, to change its times.
    ///
    /// # Errors
    /// EROFS.
    pub fn open_changed(&mut self, _: &Change, place: &Place) -> Result<OwnedFd, Errno> {
        self.bring_up(place)?;
        let upper = self.upper().ok_or(Errno::EROFS)?;
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
        open_in(upper, &place.path, flags, Mode::empty())
    }

    /// Changes the mode of what is at `place`, which its present mode does not hinder.
    ///
    /// # Errors
    /// EROFS.
    pub fn set_mode(&mut self, _: &Change, place: &Place, mode: Mode) -> Result<(), Errno> {
        self.bring_up(place)?;
        let upper = self.upper().ok_or(Errno::EROFS)?;
        if place.path == b"/" {
            return fchmod(upper, mode);
        }
        let (parent, name) = parent_in(upper, &place.path)?;
        // No link: it was found while nobody changed anything, and nobody has since.
        fchmodat(&parent, name, mode, FchmodatFlags::FollowSymlink)
    }
}

/// Copies `size` bytes.
fn copy(from: &OwnedFd, into: &OwnedFd, size: u64) -> Result<(), Errno> {
    let mut left = size;
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let most = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = nix::unistd::read(from, &mut buffer[..most])?;
        if n == 0 {
            break;
        }
        let mut part = &buffer[..n];
        while !part.is_empty() {
            let written = nix::unistd::write(into, part)?;
            part = &part[written..];
        }
        left -= n as u64;
    }
    Ok(())
}
