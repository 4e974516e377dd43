//! Reading a directory, and emptying one.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::super::account::NAME;
use super::super::table::Entry;
use super::whiteout::HIDDEN;
use super::{Layers, Place, beneath, join, open_in};

impl Layers {
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
}

/// Reads a directory, without `.` and `..`.
pub(super) fn read_directory(directory: &OwnedFd) -> Result<Vec<Entry>, Errno> {
    let mut entries = Vec::new();
    let mut buffer = vec![0u8; 32 << 10];
    // It may have been read before.
    // SAFETY: a descriptor of ours.
    Errno::result(unsafe { libc::lseek(directory.as_raw_fd(), 0, libc::SEEK_SET) })?;
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

/// How many directories are open at a time, one in the other: fewer than anybody may open.
const MOST_DEPTH: usize = 16;

/// Opens a directory whatever rights its owner has left himself.
fn open_directory(base: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    match openat2(base, path, how) {
        Err(Errno::EACCES) => {
            let mode = Mode::from_bits_truncate(0o700);
            if path == Path::new(".") {
                fchmod(base, mode)?;
            } else {
                fchmodat(base, path, mode, FchmodatFlags::FollowSymlink)?;
            }
            openat2(base, path, how)
        }
        other => other,
    }
}

/// Bytes that a layer has: of files, and of names. A file with several names counts in parts.
///
/// # Errors
/// ENAMETOOLONG where directories lie deeper than a path is long.
pub(super) fn measure(base: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut bytes = 0;
    let mut left = vec![b"/".to_vec()];
    while let Some(path) = left.pop() {
        let directory = open_directory(base, beneath(&path))?;
        for entry in read_directory(&directory)? {
            bytes += NAME;
            if entry.kind == libc::DT_DIR {
                left.push(join(&path, &entry.name));
            } else if entry.kind == libc::DT_REG {
                let name = Path::new(OsStr::from_bytes(&entry.name));
                let stat = fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                let size = u64::try_from(stat.st_size).unwrap_or(0);
                bytes += size.div_ceil(stat.st_nlink.max(1));
            }
        }
    }
    Ok(bytes)
}

/// Deletes all that is in a directory. Symbolic links are deleted, not followed. Gives how many names
/// that were.
pub fn remove_contents(base: BorrowedFd<'_>, path: &Path) -> Result<u64, Errno> {
    let top = open_directory(base, path)?;
    let mut moved = 0;
    let mut removed = 0;
    loop {
        removed += empty(&top, top.as_fd(), MOST_DEPTH, &mut moved)?;
        // What lay deeper than that lies here now.
        if moved == 0 {
            return Ok(removed);
        }
        moved = 0;
    }
}

/// Empties `directory`; what lies too deep is moved to `top`.
fn empty(
    directory: &OwnedFd,
    top: BorrowedFd<'_>,
    depth: usize,
    moved: &mut u64,
) -> Result<u64, Errno> {
    let mut removed = 0;
    for entry in read_directory(directory)? {
        let name = Path::new(OsStr::from_bytes(&entry.name));
        if entry.kind != libc::DT_DIR {
            unlinkat(directory.as_fd(), name, UnlinkatFlags::NoRemoveDir)?;
        } else if depth > 0 {
            let inner = open_directory(directory.as_fd(), name)?;
            removed += empty(&inner, top, depth - 1, moved)?;
            unlinkat(directory.as_fd(), name, UnlinkatFlags::RemoveDir)?;
        } else {
            // No name that a guest can give.
            let aside = format!(".wh..wh.deep.{}.{}", entry.inode, *moved);
            nix::fcntl::renameat(directory, name, top, Path::new(&aside))?;
            *moved += 1;
            continue;
        }
        removed += 1;
    }
    Ok(removed)
}
