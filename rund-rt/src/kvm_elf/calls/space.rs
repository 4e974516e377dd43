//! Heap and mappings of a guest process: which of its addresses are in use.
//!
//! All of them are mapped, always, readable and writable. The shim hands out what was never used;
//! what comes back is kept here, and is zeroed before it is handed out again.

use nix::errno::Errno;

use super::super::layout::{Layout, PAGE, page_down, page_up};
use super::super::memory::GuestMemory;
use super::super::shim::data;
use super::table::Open;
use super::{Answer, Kernel};

/// Heap and mappings.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Space {
    heap: (u64, u64),
    area: (u64, u64),
    /// What was given back, in ascending order: address and length.
    free: Vec<(u64, u64)>,
}

impl Space {
    /// Nothing in use.
    pub fn new(layout: &Layout) -> Self {
        Self {
            heap: (layout.heap.address, layout.heap.end()),
            area: (layout.mmap.address, layout.mmap.end()),
            free: Vec::new(),
        }
    }

    /// Writes the beginning into the shim's page.
    pub fn publish(&self, memory: &GuestMemory) {
        memory.set_data(data::BRK, self.heap.0);
        memory.set_data(data::BRK + 8, self.heap.0);
        memory.set_data(data::BRK + 16, self.heap.1);
        memory.set_data(data::MMAP, self.area.0);
        memory.set_data(data::MMAP + 8, self.area.1);
    }

    /// The break, as the guest says and as it can be.
    fn current_break(&self, memory: &GuestMemory) -> u64 {
        memory.data(data::BRK + 8).clamp(self.heap.0, self.heap.1)
    }

    /// The first address of the area that was never handed out.
    fn next(&self, memory: &GuestMemory) -> u64 {
        page_down(memory.data(data::MMAP).clamp(self.area.0, self.area.1))
    }

    /// `brk`
    pub fn brk(&self, memory: &GuestMemory, to: u64) -> i64 {
        let current = self.current_break(memory);
        if !(self.heap.0..=self.heap.1).contains(&to) {
            return current as i64;
        }
        if to < current {
            // Within the heap, so that it cannot fail.
            let _within = memory.zero(to, current - to);
        }
        memory.set_data(data::BRK + 8, to);
        to as i64
    }

    /// Hands out `len` bytes, zeroed.
    fn allocate(&mut self, memory: &GuestMemory, len: u64) -> Result<u64, Errno> {
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        if len > self.area.1 - self.area.0 {
            return Err(Errno::ENOMEM);
        }
        let len = page_up(len);
        if let Some(at) = self.free.iter().position(|(_, free)| *free >= len) {
            let (address, free) = self.free[at];
            if free == len {
                self.free.remove(at);
            } else {
                self.free[at] = (address + len, free - len);
            }
            memory.zero(address, len)?;
            return Ok(address);
        }
        let next = self.next(memory);
        if len > self.area.1 - next {
            return Err(Errno::ENOMEM);
        }
        memory.set_data(data::MMAP, next + len);
        // Zeros, unless the guest has written to what was not its own yet.
        Ok(next)
    }

    /// `munmap`
    pub fn unmap(&mut self, memory: &GuestMemory, address: u64, len: u64) -> Answer {
        let end = address.checked_add(len).ok_or(Errno::EINVAL)?;
        if !address.is_multiple_of(PAGE) || len == 0 {
            return Err(Errno::EINVAL);
        }
        let next = self.next(memory);
        if address < self.area.0 || end > self.area.1 {
            return Err(Errno::EINVAL);
        }
        let (from, to) = (address, page_up(end).min(next));
        if from < to {
            self.give_back(from, to);
        }
        Ok(0)
    }

    /// Adds `from..to` to what is free, which may be free in part already.
    fn give_back(&mut self, from: u64, to: u64) {
        let (mut from, mut to) = (from, to);
        self.free.retain(|(address, len)| {
            let (start, end) = (*address, address + len);
            if end < from || start > to {
                return true;
            }
            from = from.min(start);
            to = to.max(end);
            false
        });
        let at = self.free.partition_point(|(address, _)| *address < from);
        self.free.insert(at, (from, to - from));
    }

    /// `mremap`
    pub fn remap(
        &mut self,
        memory: &GuestMemory,
        old: u64,
        old_len: u64,
        new_len: u64,
        flags: u64,
    ) -> Answer {
        let (most, least) = (self.area.1 - self.area.0, self.area.0);
        if !old.is_multiple_of(PAGE)
            || old_len == 0
            || new_len == 0
            || old_len > most
            || new_len > most
        {
            return Err(Errno::EINVAL);
        }
        let (old_len, new_len) = (page_up(old_len), page_up(new_len));
        let end = old.checked_add(old_len).ok_or(Errno::EFAULT)?;
        if old < least || end > self.next(memory) {
            return Err(Errno::EFAULT);
        }
        if flags & !(libc::MREMAP_MAYMOVE as u64) != 0 {
            return Err(Errno::EINVAL);
        }
        if new_len <= old_len {
            if new_len < old_len {
                self.give_back(old + new_len, end);
            }
            return Ok(old as i64);
        }
        if flags & libc::MREMAP_MAYMOVE as u64 == 0 {
            return Err(Errno::ENOMEM);
        }
        let new = self.allocate(memory, new_len)?;
        let from = memory.user(old, old_len, false)?;
        let into = memory.user(new, old_len, true)?;
        // SAFETY: `user` has checked both; they do not overlap since the new one was free.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_ptr(), old_len as usize) };
        self.give_back(old, end);
        Ok(new as i64)
    }

    /// `madvise`: what is not needed reads as zeros afterwards.
    pub fn advise(&self, memory: &GuestMemory, address: u64, len: u64, advice: u64) -> Answer {
        if advice == libc::MADV_DONTNEED as u64 && address.is_multiple_of(PAGE) {
            let end = address.checked_add(len).ok_or(Errno::EINVAL)?;
            if address >= self.area.0 && end <= self.next(memory) {
                memory.zero(address, len)?;
            }
        }
        Ok(0)
    }
}

impl Kernel {
    /// `mmap`
    pub fn mmap(&mut self, memory: &GuestMemory, args: [u64; 6]) -> Answer {
        let [address, len, rights, flags, fd, offset] = args;
        let flags = flags as i32;
        if rights & libc::PROT_EXEC as u64 != 0 {
            // No page becomes executable.
            return Err(Errno::EPERM);
        }
        if flags & libc::MAP_FIXED != 0 || flags & libc::MAP_FIXED_NOREPLACE != 0 {
            return self.map_fixed(memory, address, len, flags);
        }
        if flags & libc::MAP_ANONYMOUS != 0 {
            return Ok(self.space.allocate(memory, len)? as i64);
        }
        if flags & libc::MAP_TYPE != libc::MAP_PRIVATE && rights & libc::PROT_WRITE as u64 != 0 {
            return Err(Errno::ENODEV);
        }
        let open = self.table.get(fd)?;
        let open = open.borrow();
        let Open::Host(file) = &*open else {
            return Err(Errno::ENODEV);
        };
        if !file.regular {
            return Err(Errno::ENODEV);
        }
        let at = self.space.allocate(memory, len)?;
        let into = memory.user(at, len, true)?;
        let (mut done, mut offset) = (0u64, offset);
        while done < len {
            // SAFETY: `user` has checked `len` bytes from `into` on.
            let place = unsafe { into.add(done as usize) };
            let most = (len - done) as usize;
            let from = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
            use std::os::fd::AsRawFd;
            // SAFETY: `place` has `most` bytes, by the same check.
            let n = unsafe { libc::pread(file.fd.as_raw_fd(), place.as_ptr().cast(), most, from) };
            match Errno::result(n)? {
                0 => break,
                n => {
                    done += n as u64;
                    offset += n as u64;
                }
            }
        }
        Ok(at as i64)
    }

    /// Only over what was handed out before.
    fn map_fixed(&mut self, memory: &GuestMemory, address: u64, len: u64, flags: i32) -> Answer {
        let end = address.checked_add(len).ok_or(Errno::ENOMEM)?;
        let inside = address >= self.space.area.0 && end <= self.space.next(memory);
        if !inside || flags & libc::MAP_ANONYMOUS == 0 || !address.is_multiple_of(PAGE) || len == 0
        {
            return Err(Errno::ENOMEM);
        }
        if flags & libc::MAP_FIXED_NOREPLACE != 0 {
            return Err(Errno::EEXIST);
        }
        memory.zero(address, page_up(len))?;
        Ok(address as i64)
    }
}
