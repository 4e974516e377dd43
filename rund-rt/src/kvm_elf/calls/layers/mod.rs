//! The root file system as a guest sees it: a read-only layer that all share, and a writable one of
//! its own on top, joined here, call by call, without a mount.
//!
//! Paths are walked one component at a time, in both layers. A path that has been walked contains no
//! symbolic link any more. It, or the directory that it is in, is opened beneath a layer's directory
//! by `openat2` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, and no other call of the host's gets
//! more than one component: whatever happens in between, nothing outside is reached.

mod change;
mod copy_up;
mod directory;
#[cfg(test)]
mod tests;
mod upper;
mod walk;
mod whiteout;

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};

pub use directory::remove_contents;
pub use upper::Upper;

use super::account::Held;

/// The longest path.
pub const MOST_PATH: usize = 4095;

/// The two layers.
#[derive(Debug)]
pub struct Layers {
    lower: Option<OwnedFd>,
    upper: Option<Upper>,
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

/// A file or directory of a layer that is open.
#[derive(Debug)]
pub struct LayerFile {
    /// The host's descriptor.
    pub fd: OwnedFd,
    /// That it is open, where it is of the writable layer.
    pub held: Option<Held>,
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

/// Opens `path` beneath a directory, along which there must be no symbolic link.
fn open_in(
    directory: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlag,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
        .mode(mode)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(directory, beneath(path), how)
}

/// What lies at `path` beneath a directory, a symbolic link itself: not to be read, but to be asked
/// about.
fn point_at(directory: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open_in(directory, path, OFlag::O_PATH, Mode::empty())
}

/// What the kernel says of `path` beneath a directory.
fn stat_in(directory: BorrowedFd<'_>, path: &[u8]) -> Option<FileStat> {
    point_at(directory, path).and_then(fstat).ok()
}

/// The directory that `path` is in, beneath a directory, and its name there. Calls that have no
/// `RESOLVE_BENEATH` of their own are made with these: a name alone leads nowhere else, whatever
/// another process of the guest has put on the way since it was walked.
fn parent_in<'a>(directory: BorrowedFd<'_>, path: &'a [u8]) -> Result<(OwnedFd, &'a Path), Errno> {
    let (parent, name) = split(path);
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let parent = open_in(directory, parent, flags, Mode::empty())?;
    Ok((parent, Path::new(OsStr::from_bytes(name))))
}

impl Layers {
    /// Joins a read-only directory and a writable layer, either of which may be missing.
    pub const fn new(lower: Option<OwnedFd>, upper: Option<Upper>) -> Self {
        Self { lower, upper }
    }

    fn lower(&self) -> Option<BorrowedFd<'_>> {
        self.lower.as_ref().map(AsFd::as_fd)
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
        let link = point_at(layer, path)?;
        Ok(readlinkat(&link, Path::new(""))?.as_bytes().to_vec())
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
    pub fn open_read(&mut self, place: &Place) -> Result<LayerFile, Errno> {
        let found = place.found.ok_or(Errno::ENOENT)?;
        if !found.is_regular() && !found.is_directory() {
            return Err(Errno::ENXIO);
        }
        let layer = self.layer(found.presence)?;
        let fd = open_in(layer, &place.path, OFlag::O_RDONLY, Mode::empty())?;
        let held = if found.presence.upper {
            self.hold(&fd)?
        } else {
            None
        };
        Ok(LayerFile { fd, held })
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

    /// Whether there is a writable layer.
    pub const fn is_split(&self) -> bool {
        self.lower.is_some() && self.is_writable()
    }
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
