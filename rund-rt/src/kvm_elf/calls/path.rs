//! Calls on paths.

use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::super::memory::GuestMemory;
use super::file::{directory, made_up};
use super::layers::{LayerFile, MOST_PATH, Place, split};
use super::table::{HostFile, Open};
use super::{AT_FDCWD, Answer, Kernel, NOFOLLOW, bytes_of};

/// Files that are there without a layer having them.
fn device(path: &[u8]) -> Option<Open> {
    Some(match path {
        b"/dev/null" => Open::Null,
        b"/dev/zero" => Open::Zero,
        b"/dev/random" | b"/dev/urandom" => Open::Random,
        _ => return None,
    })
}

impl Kernel {
    /// A path of the guest's, absolute.
    fn path(&self, memory: &GuestMemory, at: u64, name: u64) -> Result<Vec<u8>, Errno> {
        let name = memory
            .read_string(name, MOST_PATH)
            .map_err(|why| why.map_or(Errno::EFAULT, |()| Errno::ENAMETOOLONG))?;
        if name.is_empty() {
            return Err(Errno::ENOENT);
        }
        if name.starts_with(b"/") {
            return Ok(name);
        }
        let mut path = self.directory_of(at)?;
        path.push(b'/');
        path.extend_from_slice(&name);
        Ok(path)
    }

    fn directory_of(&self, at: u64) -> Result<Vec<u8>, Errno> {
        // The number is an int: its upper half does not count.
        if at as u32 == AT_FDCWD as u32 {
            return Ok(self.cwd.clone());
        }
        match &*self.table.get(at)?.borrow() {
            Open::Directory(listing) => Ok(listing.path.clone()),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn place(
        &mut self,
        memory: &GuestMemory,
        at: u64,
        name: u64,
        follow: bool,
    ) -> Result<Place, Errno> {
        let path = self.path(memory, at, name)?;
        self.layers.walk(&path, follow)
    }

    /// `openat`
    pub fn open(
        &mut self,
        memory: &GuestMemory,
        at: u64,
        name: u64,
        flags: u64,
        mode: u64,
    ) -> Answer {
        let path = self.path(memory, at, name)?;
        let flags = OFlag::from_bits_truncate(flags as i32);
        let open = self.open_path(&path, flags, mode)?;
        Ok(self.table.open(open, flags.contains(OFlag::O_CLOEXEC))? as i64)
    }

    fn open_path(&mut self, path: &[u8], flags: OFlag, mode: u64) -> Result<Open, Errno> {
        if let Some(open) = device(path) {
            return Ok(open);
        }
        if let Some(bytes) = self.virtual_file(path) {
            if flags & OFlag::O_ACCMODE != OFlag::O_RDONLY {
                return Err(Errno::EACCES);
            }
            return Ok(Open::Bytes {
                bytes: bytes.into(),
                at: 0,
            });
        }
        let follow =
            !flags.contains(OFlag::O_NOFOLLOW) && !flags.contains(OFlag::O_CREAT | OFlag::O_EXCL);
        let change = self.layers.change()?;
        let place = self.layers.walk(path, follow)?;
        let create = flags.contains(OFlag::O_CREAT);
        let Some(found) = place.found else {
            if !create || path.ends_with(b"/") {
                return Err(if create { Errno::EISDIR } else { Errno::ENOENT });
            }
            let mode = mode as u32 & 0o777 & !self.umask;
            let mode = Mode::from_bits_truncate(mode);
            let file = self.layers.open_write(&change, &place, flags, mode)?;
            return Ok(regular(file, true, place.path));
        };
        if create && flags.contains(OFlag::O_EXCL) {
            return Err(Errno::EEXIST);
        }
        if flags.contains(OFlag::O_DIRECTORY) && !found.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        let write = flags & OFlag::O_ACCMODE != OFlag::O_RDONLY || flags.contains(OFlag::O_TRUNC);
        if found.is_directory() {
            if write || create {
                return Err(Errno::EISDIR);
            }
            return Ok(directory(place.path));
        }
        if !found.is_regular() {
            return Err(if flags.contains(OFlag::O_NOFOLLOW) {
                Errno::ELOOP
            } else {
                Errno::ENXIO
            });
        }
        let file = if write {
            self.layers
                .open_write(&change, &place, flags, Mode::empty())?
        } else {
            self.layers.open_read(&place)?
        };
        Ok(regular(file, write, place.path))
    }

    /// What `/proc` has that programs ask for, in the sandbox's own terms.
    fn virtual_file(&self, path: &[u8]) -> Option<Vec<u8>> {
        let own = path.strip_prefix(b"/proc/self/").map(<[u8]>::to_vec);
        match own.as_deref() {
            Some(b"comm") => {
                let name = self.name.iter().take_while(|byte| **byte != 0);
                let mut name: Vec<u8> = name.copied().collect();
                name.push(b'\n');
                return Some(name);
            }
            Some(b"cmdline") => {
                return Some(self.identity.arguments.clone());
            }
            _ => {}
        }
        match path {
            b"/proc/sys/kernel/random/boot_id" => {
                Some(format!("{}\n", self.identity.boot_id()).into_bytes())
            }
            b"/proc/sys/kernel/hostname" => {
                Some(format!("{}\n", self.identity.host_name).into_bytes())
            }
            _ => None,
        }
    }

    /// What there is to say of a path.
    fn stat_path(&mut self, path: &[u8], follow: bool) -> Result<libc::stat, Errno> {
        if device(path).is_some() {
            return Ok(made_up(libc::S_IFCHR | 0o666));
        }
        if let Some(bytes) = self.virtual_file(path) {
            let mut stat = made_up(libc::S_IFREG | 0o444);
            stat.st_size = bytes.len() as i64;
            return Ok(stat);
        }
        if path == b"/proc/self/exe" {
            let program = self.program_path.clone();
            return if follow {
                self.stat_path(&program, true)
            } else {
                Ok(made_up(libc::S_IFLNK | 0o777))
            };
        }
        let place = self.layers.walk(path, follow)?;
        Ok(place.found.ok_or(Errno::ENOENT)?.stat)
    }

    fn stat_for(
        &mut self,
        memory: &GuestMemory,
        at: u64,
        name: u64,
        flags: u64,
    ) -> Result<libc::stat, Errno> {
        let empty = flags & libc::AT_EMPTY_PATH as u64 != 0
            && (name == 0 || memory.read_string(name, 0).is_ok());
        if empty {
            if at as u32 == AT_FDCWD as u32 {
                let cwd = self.cwd.clone();
                return self.stat_path(&cwd, true);
            }
            return self.stat_of(at);
        }
        let path = self.path(memory, at, name)?;
        self.stat_path(&path, flags & NOFOLLOW == 0)
    }

    /// `stat`, `lstat` and `newfstatat`
    pub fn stat(
        &mut self,
        memory: &GuestMemory,
        at: u64,
        name: u64,
        into: u64,
        flags: u64,
    ) -> Answer {
        let stat = self.stat_for(memory, at, name, flags)?;
        memory.write(into, bytes_of(&stat))?;
        Ok(0)
    }

    /// `statx`, as far as `stat` knows.
    pub fn statx(
        &mut self,
        memory: &GuestMemory,
        at: u64,
        name: u64,
        flags: u64,
        into: u64,
    ) -> Answer {
        let stat = self.stat_for(memory, at, name, flags)?;
        // SAFETY: all zeros is a valid value of this plain structure.
        let mut x: libc::statx = unsafe { std::mem::zeroed() };
        x.stx_mask = libc::STATX_BASIC_STATS;
        x.stx_blksize = stat.st_blksize as u32;
        x.stx_nlink = stat.st_nlink as u32;
        (x.stx_uid, x.stx_gid) = (stat.st_uid, stat.st_gid);
        x.stx_mode = stat.st_mode as u16;
        x.stx_ino = stat.st_ino;
        x.stx_size = stat.st_size as u64;
        x.stx_blocks = stat.st_blocks as u64;
        (x.stx_atime.tv_sec, x.stx_atime.tv_nsec) = (stat.st_atime, stat.st_atime_nsec as u32);
        (x.stx_mtime.tv_sec, x.stx_mtime.tv_nsec) = (stat.st_mtime, stat.st_mtime_nsec as u32);
        (x.stx_ctime.tv_sec, x.stx_ctime.tv_nsec) = (stat.st_ctime, stat.st_ctime_nsec as u32);
        (x.stx_dev_major, x.stx_dev_minor) = (libc::major(stat.st_dev), libc::minor(stat.st_dev));
        memory.write(into, bytes_of(&x))?;
        Ok(0)
    }

    /// `fstatfs`
    pub fn statfs(&mut self, memory: &GuestMemory, into: u64) -> Answer {
        let answer = self.layers.file_system()?;
        memory.write(into, bytes_of(&answer))?;
        Ok(0)
    }

    /// `statfs`
    pub fn statfs_of(&mut self, memory: &GuestMemory, name: u64, into: u64) -> Answer {
        self.exists(memory, AT_FDCWD, name, 0)?;
        self.statfs(memory, into)
    }

    /// Succeeds where a path leads to something.
    pub fn exists(&mut self, memory: &GuestMemory, at: u64, name: u64, flags: u64) -> Answer {
        self.stat_for(memory, at, name, flags).map(|_| 0)
    }

    /// `faccessat`
    pub fn access(&mut self, memory: &GuestMemory, at: u64, name: u64, mode: u64) -> Answer {
        let path = self.path(memory, at, name)?;
        let stat = self.stat_path(&path, true)?;
        let mode = mode as i32;
        if mode & libc::W_OK != 0 && device(&path).is_none() {
            // The guest is its sandbox's owner: it may write where there is a layer to write to.
            if !self.layers.is_writable() {
                return Err(Errno::EROFS);
            }
        }
        let is_directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        if mode & libc::X_OK != 0 && !is_directory && stat.st_mode & 0o111 == 0 {
            return Err(Errno::EACCES);
        }
        Ok(0)
    }

    /// `readlinkat`
    pub fn readlink(
        &mut self,
        memory: &GuestMemory,
        at: u64,
        name: u64,
        into: u64,
        len: u64,
    ) -> Answer {
        let path = self.path(memory, at, name)?;
        let target = if path == b"/proc/self/exe" {
            self.program_path.clone()
        } else {
            let place = self.layers.walk(&path, false)?;
            self.layers.read_link(&place)?
        };
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        let target = &target[..target.len().min(usize::try_from(len).unwrap_or(usize::MAX))];
        memory.write(into, target)?;
        Ok(target.len() as i64)
    }

    /// `getcwd`
    pub fn getcwd(&mut self, memory: &GuestMemory, into: u64, len: u64) -> Answer {
        let mut path = self.cwd.clone();
        path.push(0);
        if path.len() as u64 > len {
            return Err(Errno::ERANGE);
        }
        memory.write(into, &path)?;
        Ok(path.len() as i64)
    }

    /// `chdir`
    pub fn chdir(&mut self, memory: &GuestMemory, name: u64) -> Answer {
        let place = self.place(memory, AT_FDCWD, name, true)?;
        if !place.found.ok_or(Errno::ENOENT)?.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        self.cwd = place.path;
        Ok(0)
    }

    /// Makes `path` the working directory, before there is a guest.
    ///
    /// # Errors
    /// Where it is none.
    pub fn enter(&mut self, path: &[u8]) -> Result<(), String> {
        // The root is there even where nothing is in it.
        if path != b"/" {
            let found = self.layers.walk(path, true).ok().and_then(|p| p.found);
            if !found.is_some_and(|found| found.is_directory()) {
                let path = String::from_utf8_lossy(path);
                return Err(format!("its root has no directory {path} to work in"));
            }
        }
        self.cwd = path.to_vec();
        Ok(())
    }

    /// `fchdir`
    pub fn fchdir(&mut self, fd: u64) -> Answer {
        self.table.slot(fd)?;
        self.cwd = self.directory_of(fd)?;
        Ok(0)
    }

    /// `mkdirat`
    pub fn mkdir(&mut self, memory: &GuestMemory, at: u64, name: u64, mode: u64) -> Answer {
        let mut path = self.path(memory, at, name)?;
        while path.len() > 1 && path.ends_with(b"/") {
            path.pop();
        }
        let change = self.layers.change()?;
        let place = self.layers.walk(&path, false)?;
        let mode = Mode::from_bits_truncate(mode as u32 & 0o777 & !self.umask);
        self.layers.make_directory(&change, &place, mode)?;
        Ok(0)
    }

    /// `unlinkat`
    pub fn unlink(&mut self, memory: &GuestMemory, at: u64, name: u64, flags: u64) -> Answer {
        let is_directory = flags & libc::AT_REMOVEDIR as u64 != 0;
        let path = self.path(memory, at, name)?;
        if is_directory && path.ends_with(b"/.") {
            return Err(Errno::EINVAL);
        }
        let change = self.layers.change()?;
        let place = self.layers.walk(&path, false)?;
        self.layers.remove(&change, &place, is_directory)?;
        Ok(0)
    }

    /// `renameat`
    pub fn rename(
        &mut self,
        memory: &GuestMemory,
        from_at: u64,
        from: u64,
        to_at: u64,
        to: u64,
    ) -> Answer {
        let change = self.layers.change()?;
        let from = self.place(memory, from_at, from, false)?;
        let mut to = self.path(memory, to_at, to)?;
        if from.found.is_some_and(|found| found.is_directory()) {
            while to.len() > 1 && to.ends_with(b"/") {
                to.pop();
            }
        }
        let to = self.layers.walk(&to, false)?;
        self.layers.rename(&change, &from, &to)?;
        Ok(0)
    }

    /// `symlinkat`
    pub fn symlink(&mut self, memory: &GuestMemory, target: u64, at: u64, name: u64) -> Answer {
        let target = memory
            .read_string(target, MOST_PATH)
            .map_err(|why| why.map_or(Errno::EFAULT, |()| Errno::ENAMETOOLONG))?;
        if target.is_empty() {
            return Err(Errno::ENOENT);
        }
        let change = self.layers.change()?;
        let place = self.place(memory, at, name, false)?;
        self.layers.symlink(&change, &target, &place)?;
        Ok(0)
    }

    /// `linkat`
    pub fn link(&mut self, memory: &GuestMemory, args: [u64; 5]) -> Answer {
        let [from_at, from, to_at, to, flags] = args;
        let follow = flags & libc::AT_SYMLINK_FOLLOW as u64 != 0;
        let change = self.layers.change()?;
        let from = self.place(memory, from_at, from, follow)?;
        let to = self.place(memory, to_at, to, false)?;
        self.layers.link(&change, &from, &to)?;
        Ok(0)
    }

    /// `fchmodat`
    pub fn chmod(&mut self, memory: &GuestMemory, at: u64, name: u64, mode: u64) -> Answer {
        let change = self.layers.change()?;
        let place = self.place(memory, at, name, true)?;
        let mode = mode as u32 & 0o777;
        // What is as it should be needs no copy.
        if place.found.is_some_and(|f| f.stat.st_mode & 0o7777 == mode) {
            return Ok(0);
        }
        let mode = Mode::from_bits_truncate(mode);
        self.layers.set_mode(&change, &place, mode)?;
        Ok(0)
    }

    /// `truncate`
    pub fn truncate(&mut self, memory: &GuestMemory, name: u64, len: u64) -> Answer {
        let path = self.path(memory, AT_FDCWD, name)?;
        let open = self.open_path(&path, OFlag::O_WRONLY, 0)?;
        let fd = self.table.open(open, true)?;
        let done = self.ftruncate(fd, len);
        self.table.close(fd)?;
        done
    }

    /// `utimensat`
    pub fn utimens(
        &mut self,
        memory: &GuestMemory,
        at: u64,
        name: u64,
        times: u64,
        flags: u64,
    ) -> Answer {
        let mut values = [libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_NOW,
        }; 2];
        if times != 0 {
            for (i, value) in values.iter_mut().enumerate() {
                let at = times.wrapping_add(i as u64 * 16);
                value.tv_sec = memory.read_u64(at)? as i64;
                value.tv_nsec = memory.read_u64(at.wrapping_add(8))? as i64;
            }
        }
        let fd = if name == 0 {
            match &*self.table.get(at)?.borrow() {
                Open::Host(file) if file.upper => super::layers::duplicate({
                    use std::os::fd::AsRawFd;
                    file.fd.as_raw_fd()
                })?,
                Open::Host(_) | Open::Directory(_) => return Err(Errno::EROFS),
                _ => return Ok(0),
            }
        } else {
            let change = self.layers.change()?;
            let place = self.place(memory, at, name, flags & NOFOLLOW == 0)?;
            self.layers.open_changed(&change, &place)?
        };
        use std::os::fd::AsRawFd;
        // SAFETY: a descriptor of ours and two structures that are read.
        Errno::result(unsafe { libc::futimens(fd.as_raw_fd(), values.as_ptr()) })?;
        Ok(0)
    }

    /// The bytes of a program, and its path.
    pub fn program_at(&mut self, path: &[u8]) -> Result<(super::Program, Vec<u8>), Errno> {
        if path == b"/proc/self/exe" || path == self.program_path {
            return Ok((self.program.clone(), self.program_path.clone()));
        }
        let _unchanged = self.layers.change()?;
        let place = self.layers.walk(path, true)?;
        let found = place.found.ok_or(Errno::ENOENT)?;
        if !found.is_regular() || found.stat.st_mode & 0o111 == 0 {
            return Err(Errno::EACCES);
        }
        /// Static programs are larger than others, and not this large.
        const MOST: i64 = 256 << 20;
        if found.stat.st_size > MOST {
            return Err(Errno::ENOMEM);
        }
        let file = self.layers.open_read(&place)?;
        let program = super::Program {
            fd: Rc::new(file.fd),
            offset: 0,
            len: found.stat.st_size.unsigned_abs(),
            changes: found.presence.upper,
            held: file.held.map(Rc::new),
        };
        Ok((program, place.path))
    }

    /// An absolute path from one of the guest's.
    pub fn absolute(&self, path: &[u8]) -> Vec<u8> {
        if path.starts_with(b"/") {
            return path.to_vec();
        }
        [&self.cwd[..], b"/", path].concat()
    }
}

/// An open regular file of the layers.
pub fn regular(file: LayerFile, writes: bool, path: Vec<u8>) -> Open {
    Open::Host(HostFile {
        fd: file.fd,
        upper: writes,
        regular: true,
        path,
        held: file.held.map(Rc::new),
    })
}

/// The last component of a path.
pub fn file_name(path: &[u8]) -> &[u8] {
    split(path).1
}
