//! Calls on descriptors.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::fstat;

use super::super::memory::GuestMemory;
use super::table::{HostFile, Listing, Open};
use super::{Answer, Kernel, bytes_of};

/// The most bytes of one read or write, as on Linux.
const MOST_BYTES: u64 = 0x7fff_f000;
/// The most parts of a vector, as on Linux.
const MOST_PARTS: u64 = 1024;

/// Result of one of the host's calls that return a count.
fn count(n: isize) -> Answer {
    Errno::result(n).map(|n| n as i64)
}

impl Kernel {
    /// `read`
    pub fn read(&mut self, memory: &GuestMemory, fd: u64, into: u64, len: u64) -> Answer {
        let open = self.table.get(fd)?;
        let len = len.min(MOST_BYTES);
        // As much as is there, so that a buffer at the end of the guest's memory is filled.
        let room = memory.reach(into, len, true);
        if room == 0 && len > 0 {
            return Err(Errno::EFAULT);
        }
        let place = memory.user(into, room, true)?;
        match &mut *open.borrow_mut() {
            Open::Host(file) => {
                // SAFETY: `user` has checked `room` bytes.
                count(unsafe {
                    libc::read(file.fd.as_raw_fd(), place.as_ptr().cast(), room as usize)
                })
            }
            Open::Directory(_) => Err(Errno::EISDIR),
            Open::Bytes { bytes, at } => {
                let rest = bytes.get(*at..).unwrap_or_default();
                let part = &rest[..rest.len().min(room as usize)];
                memory.write(into, part)?;
                *at += part.len();
                Ok(part.len() as i64)
            }
            Open::Captured(_) => Err(Errno::EBADF),
            Open::Null => Ok(0),
            Open::Zero => {
                memory.zero(into, room)?;
                Ok(room as i64)
            }
            Open::Random => super::process::entropy(memory, into, room),
        }
    }

    /// `write`
    pub fn write(&mut self, memory: &GuestMemory, fd: u64, from: u64, len: u64) -> Answer {
        let open = self.table.get(fd)?;
        let len = len.min(MOST_BYTES);
        let room = memory.reach(from, len, false);
        if room == 0 && len > 0 {
            return Err(Errno::EFAULT);
        }
        match &*open.borrow() {
            Open::Host(file) => {
                let place = memory.user(from, room, false)?;
                self.put_file(file, None, room, || {
                    // SAFETY: `user` has checked `room` bytes.
                    count(unsafe {
                        libc::write(file.fd.as_raw_fd(), place.as_ptr().cast(), room as usize)
                    })
                })
            }
            Open::Captured(stream) => {
                let mut bytes = vec![0; room as usize];
                memory.read(from, &mut bytes)?;
                self.outputs.take(*stream, &bytes);
                Ok(room as i64)
            }
            Open::Null | Open::Zero | Open::Random => Ok(room as i64),
            Open::Directory(_) | Open::Bytes { .. } => Err(Errno::EBADF),
        }
    }

    /// Writes `len` bytes to a file by `write`: at `at`, or at its position. What it adds to the
    /// writable layer is counted.
    pub(super) fn put_file(
        &mut self,
        file: &HostFile,
        at: Option<u64>,
        len: u64,
        write: impl FnOnce() -> Answer,
    ) -> Answer {
        if !file.upper {
            return write();
        }
        let change = self.layers.change()?;
        let at = match at {
            Some(at) => at,
            None => position(file)?,
        };
        let write = || write().map(|n| n as u64);
        let written = self.layers.write(&change, &file.fd, (at, len), write)?;
        Ok(written as i64)
    }

    /// Addresses and lengths of a vector.
    fn parts(memory: &GuestMemory, at: u64, n: u64) -> Result<Vec<(u64, u64)>, Errno> {
        if n > MOST_PARTS {
            return Err(Errno::EINVAL);
        }
        let mut parts = Vec::with_capacity(n as usize);
        for i in 0..n {
            let entry = at.checked_add(i * 16).ok_or(Errno::EFAULT)?;
            let len = memory.read_u64(entry.wrapping_add(8))?;
            if len > i64::MAX as u64 {
                return Err(Errno::EINVAL);
            }
            parts.push((memory.read_u64(entry)?, len));
        }
        Ok(parts)
    }

    /// Does `one` for each part until one is short.
    fn vector(
        &mut self,
        memory: &GuestMemory,
        (at, n): (u64, u64),
        mut one: impl FnMut(&mut Self, u64, u64) -> Answer,
    ) -> Answer {
        let mut total = 0;
        for (address, len) in Self::parts(memory, at, n)? {
            if len == 0 {
                continue;
            }
            match one(self, address, len) {
                Ok(done) => {
                    total += done;
                    if (done as u64) < len {
                        break;
                    }
                }
                Err(why) if total == 0 => return Err(why),
                Err(_) => break,
            }
        }
        Ok(total)
    }

    /// `readv`
    pub fn read_vector(&mut self, memory: &GuestMemory, fd: u64, at: u64, n: u64) -> Answer {
        self.table.slot(fd)?;
        self.vector(memory, (at, n), |this, address, len| {
            this.read(memory, fd, address, len)
        })
    }

    /// `writev`
    pub fn write_vector(&mut self, memory: &GuestMemory, fd: u64, at: u64, n: u64) -> Answer {
        self.table.slot(fd)?;
        self.vector(memory, (at, n), |this, address, len| {
            this.write(memory, fd, address, len)
        })
    }

    /// `pread64`
    pub fn pread(&mut self, memory: &GuestMemory, fd: u64, into: u64, len: u64, at: u64) -> Answer {
        let open = self.table.get(fd)?;
        let open = open.borrow();
        let Open::Host(file) = &*open else {
            return Err(Errno::ESPIPE);
        };
        let place = memory.user(into, len.min(MOST_BYTES), true)?;
        let at = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
        let len = len.min(MOST_BYTES) as usize;
        // SAFETY: `user` has checked `len` bytes.
        count(unsafe { libc::pread(file.fd.as_raw_fd(), place.as_ptr().cast(), len, at) })
    }

    /// `pwrite64`
    pub fn pwrite(
        &mut self,
        memory: &GuestMemory,
        fd: u64,
        from: u64,
        len: u64,
        at: u64,
    ) -> Answer {
        let open = self.table.get(fd)?;
        let open = open.borrow();
        let Open::Host(file) = &*open else {
            return Err(Errno::ESPIPE);
        };
        let len = len.min(MOST_BYTES);
        let place = memory.user(from, len, false)?;
        let offset = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
        self.put_file(file, Some(at), len, || {
            let (fd, place) = (file.fd.as_raw_fd(), place.as_ptr());
            // SAFETY: `user` has checked `len` bytes.
            count(unsafe { libc::pwrite(fd, place.cast(), len as usize, offset) })
        })
    }

    /// `lseek`
    pub fn lseek(&mut self, fd: u64, to: u64, from: u64) -> Answer {
        let open = self.table.get(fd)?;
        match &mut *open.borrow_mut() {
            Open::Host(file) => {
                let from = i32::try_from(from).map_err(|_| Errno::EINVAL)?;
                // SAFETY: a descriptor of ours.
                let at = unsafe { libc::lseek(file.fd.as_raw_fd(), to as i64, from) };
                Errno::result(at)
            }
            Open::Directory(listing) if to == 0 && from == libc::SEEK_SET as u64 => {
                listing.entries = None;
                Ok(0)
            }
            Open::Directory(_) => Err(Errno::EINVAL),
            Open::Null | Open::Zero | Open::Random => Ok(0),
            Open::Bytes { .. } | Open::Captured(_) => Err(Errno::ESPIPE),
        }
    }

    /// `dup`, `dup2` and `dup3`
    pub fn dup(&mut self, fd: u64, to: Option<u64>, close_on_exec: bool) -> Answer {
        let open = self.table.get(fd)?;
        match to {
            Some(to) => {
                self.table.replace(to, open, close_on_exec)?;
                Ok(to as i64)
            }
            None => Ok(self.table.add(open, close_on_exec, 0)? as i64),
        }
    }

    /// `fcntl`
    pub fn fcntl(&mut self, fd: u64, command: u64, argument: u64) -> Answer {
        let slot = self.table.slot(fd)?.clone();
        match i32::try_from(command).unwrap_or(-1) {
            libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => {
                let least = usize::try_from(argument).map_err(|_| Errno::EINVAL)?;
                let close = command == libc::F_DUPFD_CLOEXEC as u64;
                Ok(self.table.add(slot.open, close, least)? as i64)
            }
            libc::F_GETFD => Ok(i64::from(slot.close_on_exec)),
            libc::F_SETFD => {
                let close = argument & libc::FD_CLOEXEC as u64 != 0;
                self.table.set_close_on_exec(fd, close)?;
                Ok(0)
            }
            libc::F_GETFL => match &*slot.open.borrow() {
                Open::Host(file) => {
                    // SAFETY: a descriptor of ours.
                    let flags = unsafe { libc::fcntl(file.fd.as_raw_fd(), libc::F_GETFL) };
                    // What only the host asked for.
                    let hidden = libc::O_NOFOLLOW | libc::O_CLOEXEC;
                    Ok(i64::from(Errno::result(flags)? & !hidden))
                }
                Open::Captured(_) => Ok(i64::from(libc::O_WRONLY)),
                Open::Bytes { .. } | Open::Directory(_) => Ok(i64::from(libc::O_RDONLY)),
                Open::Null | Open::Zero | Open::Random => Ok(i64::from(libc::O_RDWR)),
            },
            libc::F_SETFL => match &*slot.open.borrow() {
                Open::Host(file) => {
                    let kept = libc::O_APPEND | libc::O_NONBLOCK;
                    // SAFETY: a descriptor of ours, and a number.
                    let set = unsafe {
                        libc::fcntl(file.fd.as_raw_fd(), libc::F_SETFL, argument as i32 & kept)
                    };
                    Errno::result(set).map(i64::from)
                }
                _ => Ok(0),
            },
            _ => Err(Errno::EINVAL),
        }
    }

    /// `ioctl`: no descriptor is a terminal.
    pub fn ioctl(&mut self, memory: &GuestMemory, fd: u64, request: u64, argument: u64) -> Answer {
        let open = self.table.get(fd)?;
        if request == libc::FIONREAD {
            let bytes = match &*open.borrow() {
                Open::Host(file) => {
                    let mut n: libc::c_int = 0;
                    // SAFETY: a descriptor of ours, and a number that the call fills.
                    let asked =
                        unsafe { libc::ioctl(file.fd.as_raw_fd(), libc::FIONREAD, &raw mut n) };
                    Errno::result(asked)?;
                    n
                }
                Open::Bytes { bytes, at } => i32::try_from(bytes.len() - at).unwrap_or(i32::MAX),
                _ => return Err(Errno::ENOTTY),
            };
            memory.write(argument, &bytes.to_le_bytes())?;
            return Ok(0);
        }
        Err(Errno::ENOTTY)
    }

    /// `pipe` and `pipe2`
    pub fn pipe(&mut self, memory: &GuestMemory, into: u64, flags: u64) -> Answer {
        let known = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        if flags & !known != 0 {
            return Err(Errno::EINVAL);
        }
        memory.user(into, 8, true)?;
        let close = flags & libc::O_CLOEXEC as u64 != 0;
        let host = OFlag::from_bits_truncate(flags as i32) | OFlag::O_CLOEXEC;
        let (read, write) = nix::unistd::pipe2(host)?;
        let read = self.table.open(Open::Host(HostFile::pipe(read)), close)?;
        let write = match self.table.open(Open::Host(HostFile::pipe(write)), close) {
            Ok(fd) => fd,
            Err(why) => {
                self.table.close(read)?;
                return Err(why);
            }
        };
        let pair = [(read as i32).to_le_bytes(), (write as i32).to_le_bytes()].concat();
        memory.write(into, &pair)?;
        Ok(0)
    }

    /// `fstat`
    pub fn fstat(&mut self, memory: &GuestMemory, fd: u64, into: u64) -> Answer {
        let stat = self.stat_of(fd)?;
        memory.write(into, bytes_of(&stat))?;
        Ok(0)
    }

    /// What there is to say of a descriptor.
    pub fn stat_of(&mut self, fd: u64) -> Result<libc::stat, Errno> {
        let open = self.table.get(fd)?;
        let open = open.borrow();
        Ok(match &*open {
            Open::Host(file) => fstat(&file.fd)?,
            Open::Directory(listing) => {
                let place = self.layers.walk(&listing.path, true)?;
                place.found.ok_or(Errno::ENOENT)?.stat
            }
            Open::Bytes { .. } | Open::Captured(_) => made_up(libc::S_IFIFO | 0o600),
            Open::Null | Open::Zero | Open::Random => made_up(libc::S_IFCHR | 0o666),
        })
    }

    /// `ftruncate`
    pub fn ftruncate(&mut self, fd: u64, len: u64) -> Answer {
        let open = self.table.get(fd)?;
        let open = open.borrow();
        let Open::Host(file) = &*open else {
            return Err(Errno::EINVAL);
        };
        if !file.upper {
            return Err(Errno::EINVAL);
        }
        if i64::try_from(len).is_err() {
            return Err(Errno::EINVAL);
        }
        let change = self.layers.change()?;
        self.layers.set_len(&change, &file.fd, len)?;
        Ok(0)
    }

    /// `fchmod`
    pub fn fchmod(&mut self, fd: u64, mode: u64) -> Answer {
        let open = self.table.get(fd)?;
        let open = open.borrow();
        match &*open {
            Open::Host(file) if file.upper => {
                let mode = nix::sys::stat::Mode::from_bits_truncate((mode & 0o777) as u32);
                nix::sys::stat::fchmod(&file.fd, mode)?;
                Ok(0)
            }
            Open::Host(_) | Open::Directory(_) => Err(Errno::EROFS),
            _ => Err(Errno::EPERM),
        }
    }

    /// `getdents64`
    pub fn getdents(&mut self, memory: &GuestMemory, fd: u64, into: u64, len: u64) -> Answer {
        let open = self.table.get(fd)?;
        let mut open = open.borrow_mut();
        let Open::Directory(listing) = &mut *open else {
            return Err(Errno::ENOTDIR);
        };
        if listing.entries.is_none() {
            listing.entries = Some((self.entries(&listing.path)?, 0));
        }
        let Some((entries, next)) = &mut listing.entries else {
            return Ok(0);
        };
        let mut records = Vec::new();
        for (i, entry) in entries.iter().enumerate().skip(*next) {
            // inode, offset, length of the record, kind, name and its zero, in whole words.
            let size = (19 + entry.name.len() + 1).next_multiple_of(8);
            if (records.len() + size) as u64 > len {
                break;
            }
            let end = records.len() + size;
            records.extend_from_slice(&entry.inode.to_le_bytes());
            records.extend_from_slice(&(i as u64 + 1).to_le_bytes());
            records.extend_from_slice(&(size as u16).to_le_bytes());
            records.push(entry.kind);
            records.extend_from_slice(&entry.name);
            records.resize(end, 0);
            *next = i + 1;
        }
        if records.is_empty() && *next < entries.len() {
            return Err(Errno::EINVAL);
        }
        memory.write(into, &records)?;
        Ok(records.len() as i64)
    }

    /// A directory's entries, with `.` and `..`.
    fn entries(&mut self, path: &[u8]) -> Result<Vec<super::table::Entry>, Errno> {
        let place = self.layers.walk(path, true)?;
        let inode = place.found.map_or(1, |found| found.stat.st_ino);
        let dots = [&b"."[..], b".."].map(|name| super::table::Entry {
            name: name.to_vec(),
            inode,
            kind: libc::DT_DIR,
        });
        let mut entries = dots.to_vec();
        entries.extend(self.layers.list(&place)?);
        Ok(entries)
    }

    /// Waits for descriptors: what is not a file of the host's is always ready.
    fn wait_ready(&self, wanted: &mut [libc::pollfd], timeout: Option<libc::timespec>) -> Answer {
        let mut ready = 0;
        let mut host: Vec<(usize, RawFd)> = Vec::new();
        for (i, one) in wanted.iter_mut().enumerate() {
            one.revents = 0;
            let Ok(fd) = u64::try_from(one.fd) else {
                continue;
            };
            match self.table.get(fd) {
                Err(_) => one.revents = libc::POLLNVAL,
                Ok(open) => match open.borrow().host() {
                    Some(fd) => host.push((i, fd)),
                    None => one.revents = one.events & (libc::POLLIN | libc::POLLOUT),
                },
            }
            ready += i64::from(one.revents != 0);
        }
        let mut asked: Vec<libc::pollfd> = host
            .iter()
            .map(|(i, fd)| libc::pollfd {
                fd: *fd,
                events: wanted[*i].events,
                revents: 0,
            })
            .collect();
        let at_once = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let timeout = if ready > 0 { Some(at_once) } else { timeout };
        let timeout = timeout
            .as_ref()
            .map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: an array of ours with its length, a structure that is read, and no mask.
        let n = unsafe {
            libc::ppoll(
                asked.as_mut_ptr(),
                asked.len() as libc::nfds_t,
                timeout,
                std::ptr::null(),
            )
        };
        Errno::result(n)?;
        for ((i, _), answer) in host.iter().zip(&asked) {
            wanted[*i].revents = answer.revents;
            ready += i64::from(answer.revents != 0);
        }
        Ok(ready)
    }

    /// `poll`, with a timeout in milliseconds.
    pub fn poll(&mut self, memory: &GuestMemory, at: u64, n: u64, timeout: Option<u64>) -> Answer {
        let timeout = timeout.map(|ms| ms as i32).filter(|ms| *ms >= 0);
        let timeout = timeout.map(|ms| libc::timespec {
            tv_sec: i64::from(ms / 1000),
            tv_nsec: i64::from(ms % 1000) * 1_000_000,
        });
        self.poll_for(memory, at, n, timeout)
    }

    /// `ppoll`
    pub fn ppoll(&mut self, memory: &GuestMemory, at: u64, n: u64, timeout: u64) -> Answer {
        let timeout = match timeout {
            0 => None,
            at => Some(super::time::timespec(memory, at)?),
        };
        self.poll_for(memory, at, n, timeout)
    }

    fn poll_for(
        &mut self,
        memory: &GuestMemory,
        at: u64,
        n: u64,
        timeout: Option<libc::timespec>,
    ) -> Answer {
        if n > super::table::MOST_DESCRIPTORS as u64 {
            return Err(Errno::EINVAL);
        }
        let mut wanted = Vec::new();
        for i in 0..n {
            let word = memory.read_u64(at.wrapping_add(i * 8))?;
            wanted.push(libc::pollfd {
                fd: word as i32,
                events: (word >> 32) as i16,
                revents: 0,
            });
        }
        let ready = self.wait_ready(&mut wanted, timeout)?;
        for (i, one) in wanted.iter().enumerate() {
            let place = at.wrapping_add(i as u64 * 8 + 6);
            memory.write(place, &one.revents.to_le_bytes())?;
        }
        Ok(ready)
    }

    /// `select`
    pub fn select(&mut self, memory: &GuestMemory, args: [u64; 6]) -> Answer {
        let [n, read, write, except, timeout, _] = args;
        if n > super::table::MOST_DESCRIPTORS as u64 {
            return Err(Errno::EINVAL);
        }
        let timeout = match timeout {
            0 => None,
            at => {
                let (seconds, micros) =
                    (memory.read_u64(at)?, memory.read_u64(at.wrapping_add(8))?);
                if seconds > i64::MAX as u64 || micros >= 1_000_000 {
                    return Err(Errno::EINVAL);
                }
                Some(libc::timespec {
                    tv_sec: seconds as i64,
                    tv_nsec: micros as i64 * 1000,
                })
            }
        };
        let sets = [read, write, except];
        let words = n.div_ceil(64);
        let mut bits: [Vec<u64>; 3] = Default::default();
        for (set, bits) in sets.iter().zip(&mut bits) {
            for i in 0..words {
                bits.push(match set {
                    0 => 0,
                    set => memory.read_u64(set.wrapping_add(i * 8))?,
                });
            }
        }
        let events = [libc::POLLIN, libc::POLLOUT, libc::POLLPRI];
        let mut wanted = Vec::new();
        for fd in 0..n {
            let has = |set: &Vec<u64>| set[(fd / 64) as usize] >> (fd % 64) & 1 != 0;
            let asked = bits.iter().zip(events).filter(|(set, _)| has(set));
            let asked = asked.fold(0, |all, (_, event)| all | event);
            if asked != 0 {
                self.table.slot(fd)?;
                wanted.push(libc::pollfd {
                    fd: fd as i32,
                    events: asked,
                    revents: 0,
                });
            }
        }
        self.wait_ready(&mut wanted, timeout)?;
        let mut answer: [Vec<u64>; 3] = std::array::from_fn(|_| vec![0; words as usize]);
        let mut ready = 0;
        let over = libc::POLLHUP | libc::POLLERR;
        for one in &wanted {
            for ((set, event), also) in answer.iter_mut().zip(events).zip([over, libc::POLLERR, 0])
            {
                if one.events & event != 0 && one.revents & (event | also) != 0 {
                    set[one.fd as usize / 64] |= 1 << (one.fd % 64);
                    ready += 1;
                }
            }
        }
        for (set, bits) in sets.into_iter().zip(&answer) {
            for (i, word) in bits.iter().enumerate() {
                if set != 0 {
                    memory.write(set.wrapping_add(i as u64 * 8), &word.to_le_bytes())?;
                }
            }
        }
        Ok(ready)
    }
}

impl HostFile {
    /// A pipe, or what the owner gave.
    pub const fn pipe(fd: OwnedFd) -> Self {
        Self {
            fd,
            upper: false,
            regular: false,
            path: Vec::new(),
            held: None,
        }
    }
}

/// An open directory.
pub fn directory(path: Vec<u8>) -> Open {
    Open::Directory(Listing {
        path,
        entries: None,
    })
}

/// Where a file of the writable layer is written next.
pub(super) fn position(file: &HostFile) -> Result<u64, Errno> {
    // SAFETY: a descriptor of ours.
    let flags = Errno::result(unsafe { libc::fcntl(file.fd.as_raw_fd(), libc::F_GETFL) })?;
    if flags & libc::O_APPEND != 0 {
        return Ok(u64::try_from(fstat(&file.fd)?.st_size).unwrap_or(0));
    }
    // SAFETY: a descriptor of ours.
    let at = unsafe { libc::lseek(file.fd.as_raw_fd(), 0, libc::SEEK_CUR) };
    Ok(Errno::result(at)? as u64)
}

/// What is said of something that is not a file of the host's.
pub fn made_up(mode: u32) -> libc::stat {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    stat.st_mode = mode;
    stat.st_nlink = 1;
    stat.st_blksize = 4096;
    stat
}

/// Shares an open file.
pub fn share(open: Open) -> super::table::Shared {
    Rc::new(RefCell::new(open))
}
