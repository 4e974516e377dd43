//! The root file system as a guest sees it: a read-only layer that all share, and a writable one of
//! its own on top, joined here, call by call, without a mount.
//!
//! Paths are walked one component at a time, in both layers. A path that has been walked contains no
//! symbolic link any more, and is opened beneath a layer's directory by `openat2` with
//! `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`: whatever happens in between, nothing outside is reached.
//!
//! What is deleted of the lower layer is hidden by an empty file `.wh.NAME` in the upper one, a
//! directory that hides the lower one of its name holds `.wh..wh..opq`, as in OCI image layers.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::table::Entry;

/// Beginning of the names that hide.
const HIDDEN: &[u8] = b".wh.";
/// The file in a directory that hides all of the lower one.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// The most symbolic links on one way, as on Linux.
const MOST_LINKS: usize = 40;
/// The longest path.
pub const MOST_PATH: usize = 4095;

/// The two layers.
#[derive(Debug)]
pub struct Layers {
    lower: Option<OwnedFd>,
    upper: Option<Upper>,
}

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
    pub shared: &'static UpperUse,
    /// The directory, once it is there.
    pub directory: Option<OwnedFd>,
}

/// What the processes of a sandbox share of their writable layer.
#[derive(Debug, Default)]
pub struct UpperUse {
    /// 1 once there is something in it.
    pub used: AtomicU64,
    /// Bytes in it.
    pub bytes: AtomicU64,
}

/// Where a path leads.
#[derive(Debug)]
pub struct Place {
    /// Absolute, without symbolic links; `/` for the root.
    pub path: Vec<u8>,
    /// What is there.
    pub found: Option<Found>,
    /// Whether its parent is there (in which layer, then).
    pub parent: Presence,
}

/// Something that is there.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    /// What the kernel says of it.
    pub stat: FileStat,
    /// In which layers it is.
    pub presence: Presence,
}

/// In which layers something is. A file is in the uppermost alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Presence {
    /// The writable one.
    pub upper: bool,
    /// The read-only one, visible.
    pub lower: bool,
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

impl Found {
    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        kind(&self.stat) == SFlag::S_IFDIR
    }

    /// Whether it is a regular file.
    pub fn is_regular(&self) -> bool {
        kind(&self.stat) == SFlag::S_IFREG
    }

    fn is_link(&self) -> bool {
        kind(&self.stat) == SFlag::S_IFLNK
    }
}

/// `path` relative to a layer's directory.
fn beneath(path: &[u8]) -> &Path {
    let relative = path.strip_prefix(b"/").unwrap_or(path);
    Path::new(OsStr::from_bytes(if relative.is_empty() {
        b"."
    } else {
        relative
    }))
}

/// Parent and name of an absolute path.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(0) | None => (b"/", path.strip_prefix(b"/").unwrap_or(path)),
        Some(at) => (&path[..at], &path[at + 1..]),
    }
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = directory.to_vec();
    if path.last() != Some(&b'/') {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

fn hidden_name(path: &[u8]) -> Vec<u8> {
    let (parent, name) = split(path);
    join(parent, &[HIDDEN, name].concat())
}

/// Opens `path` beneath a directory, along which there must be no symbolic link.
fn open_in(
    directory: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlag,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NOCTTY)
        .mode(mode)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(directory, beneath(path), how)
}

/// What the kernel says of `path` beneath a directory.
fn stat_in(directory: BorrowedFd<'_>, path: &[u8]) -> Option<FileStat> {
    fstatat(directory, beneath(path), AtFlags::AT_SYMLINK_NOFOLLOW).ok()
}

impl Layers {
    /// Joins a read-only directory and a writable layer, either of which may be missing.
    pub const fn new(lower: Option<OwnedFd>, upper: Option<Upper>) -> Self {
        Self { lower, upper }
    }

    fn lower(&self) -> Option<BorrowedFd<'_>> {
        self.lower.as_ref().map(AsFd::as_fd)
    }

    /// The writable layer's directory, where something is in it.
    fn upper(&mut self) -> Option<BorrowedFd<'_>> {
        let upper = self.upper.as_mut()?;
        if upper.directory.is_none() {
            if upper.shared.used.load(Ordering::Acquire) == 0 {
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
    fn make_upper(&mut self) -> Result<RawFd, Errno> {
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
            upper.shared.used.store(1, Ordering::Release);
        }
        upper
            .directory
            .as_ref()
            .map(AsRawFd::as_raw_fd)
            .ok_or(Errno::EROFS)
    }

    /// Walks `path` (absolute). A symbolic link at its end is followed where `follow` says so.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG: as Linux says for what lies before the last component.
    pub fn walk(&mut self, path: &[u8], follow: bool) -> Result<Place, Errno> {
        if path.len() > MOST_PATH {
            return Err(Errno::ENAMETOOLONG);
        }
        let root = Presence {
            upper: self.upper().is_some(),
            lower: self.lower.is_some(),
        };
        let mut rest: Vec<Vec<u8>> = components(path);
        // A path that ends in a slash names a directory.
        let directory_asked = path.ends_with(b"/") || path.ends_with(b"/.");
        // Where we are: the components, and what each of them is.
        let mut at: Vec<(Vec<u8>, Found)> = Vec::new();
        let mut links = 0;
        let root_found = Found {
            stat: self.root_stat()?,
            presence: root,
        };
        while let Some(name) = rest.pop() {
            if name == b".." {
                at.pop();
                continue;
            }
            let here = at.last().map_or(root_found, |(_, found)| *found);
            if !here.is_directory() {
                return Err(Errno::ENOTDIR);
            }
            if name.len() > 255 {
                return Err(Errno::ENAMETOOLONG);
            }
            if name.starts_with(HIDDEN) {
                return Err(Errno::ENOENT);
            }
            let parent: &[u8] = at.last().map_or(b"/", |(path, _)| path);
            let path = join(parent, &name);
            let Some(found) = self.look(&path, here.presence) else {
                if rest.is_empty() {
                    return Ok(Place {
                        path,
                        found: None,
                        parent: here.presence,
                    });
                }
                return Err(Errno::ENOENT);
            };
            if found.is_link() && (follow || !rest.is_empty() || directory_asked) {
                links += 1;
                if links > MOST_LINKS {
                    return Err(Errno::ELOOP);
                }
                let target = self.read_link_at(&path, found.presence)?;
                if target.starts_with(b"/") {
                    at.clear();
                }
                rest.extend(components(&target));
                if rest.len() > MOST_PATH {
                    return Err(Errno::ENAMETOOLONG);
                }
                continue;
            }
            at.push((path, found));
        }
        let parent = match at.len() {
            0 | 1 => root,
            n => at[n - 2].1.presence,
        };
        let (path, found) = at.pop().unwrap_or((b"/".to_vec(), root_found));
        if directory_asked && !found.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        Ok(Place {
            path,
            found: Some(found),
            parent,
        })
    }

    fn root_stat(&mut self) -> Result<FileStat, Errno> {
        if let Some(lower) = self.lower() {
            return fstat(lower);
        }
        if let Some(upper) = self.upper() {
            return fstat(upper);
        }
        match &self.upper {
            Some(upper) => fstat(upper.base.as_fd()),
            None => Err(Errno::ENOENT),
        }
    }

    /// What is at `path`, whose parent is in the layers `parent`.
    fn look(&mut self, path: &[u8], parent: Presence) -> Option<Found> {
        let mut lower_visible = parent.lower;
        if parent.upper
            && let Some(upper) = self.upper()
        {
            let hidden = lower_visible && stat_in(upper, &hidden_name(path)).is_some();
            lower_visible &= !hidden;
            if let Some(stat) = stat_in(upper, path) {
                let mut found = Found {
                    stat,
                    presence: Presence {
                        upper: true,
                        lower: false,
                    },
                };
                if found.is_directory()
                    && lower_visible
                    && stat_in(upper, &join(path, OPAQUE)).is_none()
                {
                    let below = self.lower().and_then(|lower| stat_in(lower, path));
                    found.presence.lower = below.is_some_and(|s| kind(&s) == SFlag::S_IFDIR);
                }
                return Some(found);
            }
        }
        if !lower_visible {
            return None;
        }
        let stat = stat_in(self.lower()?, path)?;
        Some(Found {
            stat,
            presence: Presence {
                upper: false,
                lower: true,
            },
        })
    }

    fn layer(&mut self, presence: Presence) -> Result<BorrowedFd<'_>, Errno> {
        if presence.upper {
            self.upper().ok_or(Errno::ENOENT)
        } else {
            self.lower().ok_or(Errno::ENOENT)
        }
    }

    fn read_link_at(&mut self, path: &[u8], presence: Presence) -> Result<Vec<u8>, Errno> {
        let layer = self.layer(presence)?;
        Ok(readlinkat(layer, beneath(path))?.as_bytes().to_vec())
    }

    /// Where the symbolic link at `place` points.
    ///
    /// # Errors
    /// EINVAL where it is none.
    pub fn read_link(&mut self, place: &Place) -> Result<Vec<u8>, Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        if !found.is_link() {
            return Err(Errno::EINVAL);
        }
        self.read_link_at(&place.path, found.presence)
    }

    /// Opens what is at `place` for reading. Only regular files and directories are opened.
    ///
    /// # Errors
    /// ENXIO for devices and sockets.
    pub fn open_read(&mut self, place: &Place) -> Result<OwnedFd, Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        if !found.is_regular() && !found.is_directory() {
            return Err(Errno::ENXIO);
        }
        let layer = self.layer(found.presence)?;
        open_in(layer, &place.path, OFlag::O_RDONLY, Mode::empty())
    }

    /// Opens the regular file at `place` for writing, in the writable layer; it is copied there
    /// where it is not.
    ///
    /// # Errors
    /// EROFS where there is no writable layer, ENOSPC where it is full.
    pub fn open_write(
        &mut self,
        place: &Place,
        flags: OFlag,
        mode: Mode,
    ) -> Result<OwnedFd, Errno> {
        let access = flags & (OFlag::O_ACCMODE | OFlag::O_APPEND | OFlag::O_TRUNC);
        match place.found {
            Some(found) if found.is_directory() => Err(Errno::EISDIR),
            Some(found) if !found.is_regular() => Err(Errno::ENXIO),
            Some(found) => {
                if !found.presence.upper {
                    self.copy_up(place, flags.contains(OFlag::O_TRUNC))?;
                }
                let upper = self.upper().ok_or(Errno::EROFS)?;
                let fd = open_in(upper, &place.path, access, Mode::empty())?;
                if flags.contains(OFlag::O_TRUNC) && found.presence.upper {
                    self.shrink(found.stat.st_size);
                }
                Ok(fd)
            }
            None => {
                self.make_parents(&place.path)?;
                let upper = self.upper().ok_or(Errno::EROFS)?;
                let _not_hidden = unlinkat(
                    upper,
                    beneath(&hidden_name(&place.path)),
                    UnlinkatFlags::NoRemoveDir,
                );
                let flags = access | OFlag::O_CREAT | OFlag::O_EXCL;
                open_in(upper, &place.path, flags, mode)
            }
        }
    }

    fn shrink(&self, bytes: i64) {
        if let Some(upper) = &self.upper {
            let bytes = u64::try_from(bytes).unwrap_or(0);
            let used = &upper.shared.bytes;
            let _always = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                Some(used.saturating_sub(bytes))
            });
        }
    }

    /// Makes room for `bytes` more in the writable layer.
    ///
    /// # Errors
    /// ENOSPC where it is full.
    pub fn grow(&self, bytes: u64) -> Result<(), Errno> {
        let upper = self.upper.as_ref().ok_or(Errno::EROFS)?;
        upper
            .shared
            .bytes
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                used.checked_add(bytes).filter(|sum| *sum <= upper.most)
            })
            .map(|_| ())
            .map_err(|_| Errno::ENOSPC)
    }

    /// Gives back room that was not used.
    pub fn give_back(&self, bytes: u64) {
        self.shrink(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Makes the directories on the way to `path` in the writable layer, as the lower one has them.
    fn make_parents(&mut self, path: &[u8]) -> Result<(), Errno> {
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
            let upper = self.upper().ok_or(Errno::EROFS)?;
            mkdirat(upper, beneath(&at), Mode::from_bits_truncate(mode | 0o700))?;
        }
        Ok(())
    }

    /// Copies a file of the lower layer to the writable one.
    fn copy_up(&mut self, place: &Place, empty: bool) -> Result<(), Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        self.make_parents(&place.path)?;
        let size = if empty {
            0
        } else {
            u64::try_from(found.stat.st_size).unwrap_or(0)
        };
        self.grow(size)?;
        let from = self.open_read(place)?;
        let upper = self.upper().ok_or(Errno::EROFS)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        let mode = Mode::from_bits_truncate(found.stat.st_mode & 0o7777);
        let into = open_in(upper, &place.path, flags, mode)?;
        nix::sys::stat::fchmod(&into, mode)?;
        let mut left = size;
        let mut buffer = vec![0; 64 << 10];
        while left > 0 {
            let n = nix::unistd::read(&from, &mut buffer)?;
            if n == 0 {
                break;
            }
            let mut part = &buffer[..n];
            while !part.is_empty() {
                let written = nix::unistd::write(&into, part)?;
                part = &part[written..];
            }
            left = left.saturating_sub(n as u64);
        }
        Ok(())
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// EEXIST, EROFS.
    pub fn make_directory(&mut self, place: &Place, mode: Mode) -> Result<(), Errno> {
        if place.found.is_some() {
            return Err(Errno::EEXIST);
        }
        self.make_parents(&place.path)?;
        let upper = self.upper().ok_or(Errno::EROFS)?;
        mkdirat(upper, beneath(&place.path), mode)?;
        let hidden = hidden_name(&place.path);
        if unlinkat(upper, beneath(&hidden), UnlinkatFlags::NoRemoveDir).is_ok() {
            // What was deleted under this name stays deleted.
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT;
            open_in(
                upper,
                &join(&place.path, OPAQUE),
                flags,
                Mode::from_bits_truncate(0o600),
            )?;
        }
        Ok(())
    }

    /// Hides what the lower layer has at `path`.
    fn hide(&mut self, path: &[u8]) -> Result<(), Errno> {
        self.make_parents(path)?;
        let upper = self.upper().ok_or(Errno::EROFS)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT;
        open_in(
            upper,
            &hidden_name(path),
            flags,
            Mode::from_bits_truncate(0o600),
        )
        .map(drop)
    }

    /// Whether the lower layer has something at `path` that would show.
    fn shows_through(&mut self, place: &Place) -> bool {
        place.parent.lower
            && self
                .lower()
                .is_some_and(|lower| stat_in(lower, &place.path).is_some())
    }

    /// Deletes what is at `place`.
    ///
    /// # Errors
    /// ENOENT, EISDIR, ENOTDIR, ENOTEMPTY, EROFS.
    pub fn remove(&mut self, place: &Place, directory: bool) -> Result<(), Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        if place.path == b"/" {
            return Err(Errno::EBUSY);
        }
        if self.upper.is_none() {
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
        let shows = self.shows_through(place);
        if found.presence.upper {
            let upper = self.upper().ok_or(Errno::EROFS)?;
            if directory {
                // Nothing is left in it but what hides.
                remove_contents(upper, beneath(&place.path))?;
                unlinkat(upper, beneath(&place.path), UnlinkatFlags::RemoveDir)?;
            } else {
                unlinkat(upper, beneath(&place.path), UnlinkatFlags::NoRemoveDir)?;
                if found.stat.st_nlink == 1 {
                    self.shrink(found.stat.st_size);
                }
            }
        }
        if shows {
            self.hide(&place.path)?;
        }
        Ok(())
    }

    /// Moves what is at `from` to `to`, over what is there.
    ///
    /// # Errors
    /// EXDEV for a directory of the lower layer, as overlayfs says: whoever moves it copies it.
    pub fn rename(&mut self, from: &Place, to: &Place) -> Result<(), Errno> {
        let found = from.found.ok_or(Errno::ENOENT)?;
        if self.upper.is_none() {
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
            Some(there) if there.is_directory() => self.remove(to, true)?,
            _ => {}
        }
        if !found.presence.upper {
            if found.is_link() {
                let target = self.read_link_at(&from.path, found.presence)?;
                self.make_parents(&to.path)?;
                let upper = self.upper().ok_or(Errno::EROFS)?;
                let _absent = unlinkat(upper, beneath(&to.path), UnlinkatFlags::NoRemoveDir);
                nix::unistd::symlinkat(OsStr::from_bytes(&target), upper, beneath(&to.path))?;
                return self.remove(from, false);
            }
            self.copy_up(from, false)?;
        }
        let shows = self.shows_through(from);
        self.make_parents(&to.path)?;
        let upper = self.upper().ok_or(Errno::EROFS)?;
        nix::fcntl::renameat(upper, beneath(&from.path), upper, beneath(&to.path))?;
        let hidden = hidden_name(&to.path);
        let _not_hidden = unlinkat(upper, beneath(&hidden), UnlinkatFlags::NoRemoveDir);
        if shows {
            self.hide(&from.path)?;
        }
        Ok(())
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// EEXIST, EROFS.
    pub fn symlink(&mut self, target: &[u8], place: &Place) -> Result<(), Errno> {
        if place.found.is_some() {
            return Err(Errno::EEXIST);
        }
        self.make_parents(&place.path)?;
        let upper = self.upper().ok_or(Errno::EROFS)?;
        nix::unistd::symlinkat(OsStr::from_bytes(target), upper, beneath(&place.path))?;
        let hidden = hidden_name(&place.path);
        let _not_hidden = unlinkat(upper, beneath(&hidden), UnlinkatFlags::NoRemoveDir);
        Ok(())
    }

    /// Makes a hard link.
    ///
    /// # Errors
    /// EEXIST, EROFS, EPERM for directories.
    pub fn link(&mut self, from: &Place, place: &Place) -> Result<(), Errno> {
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
        let upper = self.upper().ok_or(Errno::EROFS)?;
        let flags = AtFlags::empty();
        nix::unistd::linkat(
            upper,
            beneath(&from.path),
            upper,
            beneath(&place.path),
            flags,
        )?;
        let hidden = hidden_name(&place.path);
        let _not_hidden = unlinkat(upper, beneath(&hidden), UnlinkatFlags::NoRemoveDir);
        Ok(())
    }

    /// A descriptor of what is at `place` in the writable layer, to change its mode or times.
    ///
    /// # Errors
    /// EROFS.
    pub fn open_changed(&mut self, place: &Place) -> Result<OwnedFd, Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        if !found.presence.upper {
            if found.is_directory() {
                self.make_parents(&join(&place.path, b"x"))?;
            } else if found.is_regular() {
                self.copy_up(place, false)?;
            } else {
                return Err(Errno::EROFS);
            }
        }
        let upper = self.upper().ok_or(Errno::EROFS)?;
        open_in(
            upper,
            &place.path,
            OFlag::O_RDONLY | OFlag::O_NONBLOCK,
            Mode::empty(),
        )
    }

    /// What the directory at `place` holds, without `.` and `..`.
    ///
    /// # Errors
    /// ENOTDIR, or where it cannot be read.
    pub fn list(&mut self, place: &Place) -> Result<Vec<Entry>, Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        if !found.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut entries: Vec<Entry> = Vec::new();
        let mut known = std::collections::HashSet::new();
        if found.presence.upper
            && let Some(upper) = self.upper()
        {
            for entry in read_directory(&open_in(upper, &place.path, flags, Mode::empty())?)? {
                match entry.name.strip_prefix(HIDDEN) {
                    Some(hidden) => {
                        known.insert(hidden.to_vec());
                    }
                    None => {
                        known.insert(entry.name.clone());
                        entries.push(entry);
                    }
                }
            }
        }
        if found.presence.lower
            && let Some(lower) = self.lower()
        {
            let below = read_directory(&open_in(lower, &place.path, flags, Mode::empty())?)?;
            entries.extend(below.into_iter().filter(|e| !known.contains(&e.name)));
        }
        Ok(entries)
    }

    /// Statistics of the file system that `statfs` asks for.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn file_system(&mut self) -> Result<libc::statfs, Errno> {
        let fd = match (&self.lower, &self.upper) {
            (Some(lower), _) => lower.as_raw_fd(),
            (None, Some(upper)) => upper.base.as_raw_fd(),
            (None, None) => return Err(Errno::ENOENT),
        };
        // SAFETY: all zeros is a valid value of this plain structure.
        let mut answer: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: a descriptor of ours and a structure that the call fills.
        Errno::result(unsafe { libc::fstatfs(fd, &raw mut answer) })?;
        Ok(answer)
    }

    /// Empties the writable layer.
    ///
    /// # Errors
    /// Where something in it cannot be deleted.
    pub fn reset(&mut self) -> Result<(), Errno> {
        let Some(upper) = &self.upper else {
            return Ok(());
        };
        if upper.shared.used.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        if let Some(directory) = self.upper() {
            remove_contents(directory, Path::new("."))?;
        }
        if let Some(upper) = &mut self.upper {
            upper.shared.bytes.store(0, Ordering::Release);
            // The directory stays, and is empty.
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
            upper.shared.used.store(0, Ordering::Release);
        }
    }

    /// Sets the most bytes of the writable layer.
    pub fn set_most(&mut self, most: u64) {
        if let Some(upper) = &mut self.upper {
            upper.most = most;
        }
    }

    /// Whether there is a writable layer.
    pub const fn is_split(&self) -> bool {
        self.lower.is_some() && self.upper.is_some()
    }
}

/// The names between slashes, last first.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}

/// Reads a directory, without `.` and `..`.
fn read_directory(directory: &OwnedFd) -> Result<Vec<Entry>, Errno> {
    let mut entries = Vec::new();
    let mut buffer = vec![0u8; 32 << 10];
    loop {
        // SAFETY: a descriptor of ours, and a buffer of the size that is given.
        let n = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                directory.as_raw_fd(),
                buffer.as_mut_ptr(),
                buffer.len(),
            )
        };
        let n = usize::try_from(Errno::result(n)?).unwrap_or(0);
        if n == 0 {
            return Ok(entries);
        }
        let mut rest = &buffer[..n];
        // struct linux_dirent64: inode, offset, length of the record, kind, name.
        while let [
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            l0,
            l1,
            kind,
            ..,
        ] = *rest
        {
            let len = usize::from(u16::from_le_bytes([l0, l1]));
            let Some(name) = rest.get(19..len) else {
                break;
            };
            let name: Vec<u8> = name.iter().take_while(|b| **b != 0).copied().collect();
            if name != b"." && name != b".." {
                entries.push(Entry {
                    name,
                    inode: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
                    kind,
                });
            }
            rest = &rest[len..];
        }
    }
}

/// Deletes all that is in a directory. Symbolic links are deleted, not followed.
pub fn remove_contents(base: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let directory = openat2(base, path, how)?;
    for entry in read_directory(&directory)? {
        let name = Path::new(OsStr::from_bytes(&entry.name));
        if entry.kind == libc::DT_DIR {
            // A guest may have taken its own rights away.
            let mode = Mode::from_bits_truncate(0o700);
            let flags = nix::sys::stat::FchmodatFlags::FollowSymlink;
            let _already = nix::sys::stat::fchmodat(directory.as_fd(), name, mode, flags);
            remove_contents(directory.as_fd(), name)?;
            unlinkat(directory.as_fd(), name, UnlinkatFlags::RemoveDir)?;
        } else {
            unlinkat(directory.as_fd(), name, UnlinkatFlags::NoRemoveDir)?;
        }
    }
    Ok(())
}

/// A second descriptor of `fd`.
///
/// # Errors
/// EMFILE.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: `fcntl` on a number, which fails where it is not open.
    let new = Errno::result(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel just gave it to us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}
