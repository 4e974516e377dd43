//! A guest's memory as the host sees it, and every guest pointer's way into it.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::layout::{Layout, PAGE, Region, SYSTEM_START, system};
use super::page_table::Words;

/// A piece of a template: where it lies in the guest's memory and in the template's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Extent {
    /// Offset in the guest's memory.
    pub offset: u64,
    /// Offset in the file.
    pub file_offset: u64,
    /// Bytes.
    pub len: u64,
}

/// An address that the guest gave and that is not its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault;

/// The guest's memory. Only one thread uses it, and the guest does not run meanwhile: its one
/// virtual processor is that thread. It is reached by copies and by system calls on raw pointers;
/// no reference into it is ever made.
#[derive(Debug)]
pub struct GuestMemory {
    base: NonNull<u8>,
    len: usize,
    regions: Vec<Region>,
    /// The region of the last hit, which is the next one's as a rule.
    hint: std::cell::Cell<usize>,
}

// SAFETY: the mapping belongs to the value and moves with it.
unsafe impl Send for GuestMemory {}

impl GuestMemory {
    /// Zeros for `layout`.
    ///
    /// # Errors
    /// Where there is no room for the mapping.
    pub fn new(layout: &Layout) -> nix::Result<Self> {
        let len = NonZeroUsize::new(usize::try_from(layout.memory).unwrap_or(0))
            .ok_or(nix::errno::Errno::EINVAL)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, len, rights, flags) }?;
        Ok(Self {
            base: base.cast(),
            len: len.get(),
            regions: layout.regions.clone(),
            hint: std::cell::Cell::new(0),
        })
    }

    /// Becomes zeros for `layout`, which asks for as much memory, at the same place.
    ///
    /// # Errors
    /// Where it asks for another size, or the kernel has no room for the mapping.
    pub fn renew(&mut self, layout: &Layout) -> nix::Result<()> {
        if layout.memory != self.len() {
            return Err(nix::errno::Errno::EINVAL);
        }
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let at = NonZeroUsize::new(self.base.as_ptr().addr());
        let len = NonZeroUsize::new(self.len).ok_or(nix::errno::Errno::EINVAL)?;
        // SAFETY: it replaces this value's own mapping, of which there is no reference.
        unsafe { mmap_anonymous(at, len, rights, flags) }?;
        self.regions.clone_from(&layout.regions);
        self.hint.set(0);
        Ok(())
    }

    /// Lays pieces of a file over it, privately: they are shared until they are written to.
    ///
    /// # Errors
    /// Where a piece lies outside, or cannot be mapped.
    pub fn lay(&self, file: &impl AsFd, extents: &[Extent]) -> nix::Result<()> {
        for extent in extents {
            let end = extent.offset.checked_add(extent.len);
            if end.is_none_or(|end| end > self.len as u64) || extent.offset % PAGE != 0 {
                return Err(nix::errno::Errno::EINVAL);
            }
            let at = NonZeroUsize::new(self.base.as_ptr().addr() + extent.offset as usize);
            let len = NonZeroUsize::new(extent.len as usize).ok_or(nix::errno::Errno::EINVAL)?;
            let offset = i64::try_from(extent.file_offset).unwrap_or(i64::MAX);
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
            let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: it replaces a part of this value's own mapping, of which there is no
            // reference.
            unsafe { mmap(at, len, rights, flags, file, offset) }?;
        }
        Ok(())
    }

    /// Address of its first byte in this process.
    pub fn host_address(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// A pointer to `offset` within it, `len` bytes long.
    fn raw(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        let end = offset.checked_add(len)?;
        if end > self.len as u64 {
            return None;
        }
        // SAFETY: the offset lies within the mapping, or at its end.
        Some(unsafe { self.base.add(offset as usize) })
    }

    /// The bytes at the guest's `address`, where all of them are the guest's to read, or to write.
    ///
    /// # Errors
    /// [`Fault`] where they are not.
    pub fn user(&self, address: u64, len: u64, write: bool) -> Result<NonNull<u8>, Fault> {
        if len == 0 {
            return Ok(self.base);
        }
        let end = address.checked_add(len).ok_or(Fault)?;
        let holds = |r: &Region| r.address <= address && end <= r.end();
        let hint = self.hint.get();
        let found = match self.regions.get(hint) {
            Some(region) if holds(region) => region,
            _ => {
                let found = self.regions.iter().position(holds).ok_or(Fault)?;
                self.hint.set(found);
                self.regions.get(found).ok_or(Fault)?
            }
        };
        if write && !found.write {
            return Err(Fault);
        }
        self.raw(found.offset + (address - found.address), len)
            .ok_or(Fault)
    }

    /// How many bytes from `address` on, at most `len`, are the guest's.
    pub fn reach(&self, address: u64, len: u64, write: bool) -> u64 {
        self.regions
            .iter()
            .find(|r| r.address <= address && address < r.end() && (r.write || !write))
            .map_or(0, |r| (r.end() - address).min(len))
    }

    /// Copies from the guest.
    ///
    /// # Errors
    /// [`Fault`] where the bytes are not the guest's to read.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Fault> {
        let from = self.user(address, into.len() as u64, false)?;
        // SAFETY: `user` has checked that so many bytes lie there, and `into` is another object.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies to the guest.
    ///
    /// # Errors
    /// [`Fault`] where the bytes are not the guest's to write.
    pub fn write(&self, address: u64, from: &[u8]) -> Result<(), Fault> {
        let into = self.user(address, from.len() as u64, true)?;
        // SAFETY: `user` has checked that so many bytes lie there, and `from` is another object.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_ptr(), from.len()) };
        Ok(())
    }

    /// Zeros in the guest.
    ///
    /// # Errors
    /// [`Fault`] where the bytes are not the guest's to write.
    pub fn zero(&self, address: u64, len: u64) -> Result<(), Fault> {
        let at = self.user(address, len, true)?;
        // SAFETY: `user` has checked that so many bytes lie there.
        unsafe { std::ptr::write_bytes(at.as_ptr(), 0, len as usize) };
        Ok(())
    }

    /// A number of the guest's.
    ///
    /// # Errors
    /// [`Fault`] where it is not the guest's to read.
    pub fn read_u64(&self, address: u64) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A string of the guest's that ends with a zero, which is left out.
    ///
    /// # Errors
    /// `Err(None)` where it is not the guest's, `Err(Some(()))` where it is longer than `most`.
    pub fn read_string(&self, address: u64, most: usize) -> Result<Vec<u8>, Option<()>> {
        let mut string = Vec::new();
        let mut at = address;
        while string.len() <= most {
            // To the end of a page, so that a string at the end of the guest's memory is read.
            let room = self.reach(at, PAGE - at % PAGE, false);
            if room == 0 {
                return Err(None);
            }
            let mut bytes = vec![0; room as usize];
            self.read(at, &mut bytes).map_err(|Fault| None)?;
            if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
                string.extend_from_slice(&bytes[..end]);
                return if string.len() <= most {
                    Ok(string)
                } else {
                    Err(Some(()))
                };
            }
            string.extend_from_slice(&bytes);
            at += room;
        }
        Err(Some(()))
    }

    /// Reads the host's side: `offset` counts from the beginning of the memory.
    pub fn read_offset(&self, offset: u64, into: &mut [u8]) {
        if let Some(from) = self.raw(offset, into.len() as u64) {
            // SAFETY: `raw` has checked the bounds.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        }
    }

    /// Writes the host's side: `offset` counts from the beginning of the memory.
    pub fn write_offset(&self, offset: u64, from: &[u8]) {
        if let Some(into) = self.raw(offset, from.len() as u64) {
            // SAFETY: `raw` has checked the bounds.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_ptr(), from.len()) };
        }
    }

    /// Zeros at `offset`; the host gets the pages back where `give_back` says so.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn clear_offset(&self, offset: u64, len: u64, give_back: bool) -> nix::Result<()> {
        let Some(at) = self.raw(offset, len) else {
            return Err(nix::errno::Errno::EINVAL);
        };
        if give_back {
            let advice = nix::sys::mman::MmapAdvise::MADV_DONTNEED;
            // SAFETY: within the mapping, of which there is no reference; the pages are anonymous
            // and read as zeros afterwards.
            return unsafe { nix::sys::mman::madvise(at.cast(), len as usize, advice) };
        }
        // SAFETY: `raw` has checked the bounds.
        unsafe { std::ptr::write_bytes(at.as_ptr(), 0, len as usize) };
        Ok(())
    }

    /// Pointer to `len` bytes at `offset`, for a system call of the host's.
    pub fn offset(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        self.raw(offset, len)
    }

    /// A word of the shim's data page.
    pub fn data(&self, at: u64) -> u64 {
        self.word(system::DATA + at)
    }

    /// Reads bytes of the shim's data page.
    pub fn read_data(&self, at: u64, into: &mut [u8]) {
        self.read_offset(system::DATA + at, into);
    }

    /// Writes bytes of the shim's data page.
    pub fn write_data(&self, at: u64, from: &[u8]) {
        self.write_offset(system::DATA + at, from);
    }

    /// Sets a word of the shim's data page.
    pub fn set_data(&self, at: u64, value: u64) {
        self.write_offset(system::DATA + at, &value.to_le_bytes());
    }
}

impl Words for GuestMemory {
    fn word(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read_offset(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn set_word(&mut self, offset: u64, value: u64) {
        self.write_offset(offset, &value.to_le_bytes());
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing points into it any more.
        let _cannot_fail = unsafe { munmap(self.base.cast(), self.len) };
    }
}

/// The guest's address of an offset on the host's side.
pub const fn system_address(offset: u64) -> u64 {
    SYSTEM_START + offset
}
