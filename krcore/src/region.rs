//! Registered memory: a sealed memfd, mapped, and never seen as a slice.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use carlsbad_types::ByteSize;
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The greatest region: 1 TiB.
const MAX_REGION: u64 = 1 << 40;

/// The key a peer names a region by. A key is not used twice before 2^20 registrations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RKey(pub u32);

/// What peers may do with a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Nothing: the region is a source and a target of its own node only.
    Local,
    /// READ.
    Read,
    /// READ, WRITE and the atomics.
    ReadWrite,
}

/// A memfd that can neither shrink nor grow, so that no access within its length faults, whoever
/// holds the descriptor.
pub(crate) struct Sealed {
    map: MmapRaw,
    file: File,
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Io { what, source }
}

impl Sealed {
    pub(crate) fn create(name: &std::ffi::CStr, bytes: u64) -> Result<Self> {
        if bytes == 0 || bytes > MAX_REGION {
            return Err(Error::OutOfRange {
                what: "the length of a region",
                given: bytes,
                least: 1,
                most: MAX_REGION,
            });
        }
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .map_err(|e| io("create a memfd")(e.into()))?;
        let file = File::from(fd);
        file.set_len(bytes).map_err(io("size a memfd"))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| io("seal a memfd")(e.into()))?;
        let map = MmapOptions::new()
            .map_raw(&file)
            .map_err(io("map a memfd"))?;
        Ok(Self { map, file })
    }

    /// Maps what another process has made, once it is seen that its length can no longer change.
    pub(crate) fn adopt(fd: OwnedFd, writable: bool) -> Result<Self> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| Error::NotSealed)?;
        let needed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        if !SealFlag::from_bits_truncate(seals).contains(needed) {
            return Err(Error::NotSealed);
        }
        let file = File::from(fd);
        let length = file
            .metadata()
            .map_err(io("ask for a memfd's length"))?
            .len();
        if length == 0 || length > MAX_REGION {
            return Err(Error::NotSealed);
        }
        let bytes = usize::try_from(length).map_err(|_| Error::NotSealed)?;
        let mut options = MmapOptions::new();
        options.len(bytes);
        let map = if writable {
            options.map_raw(&file)
        } else {
            options.map_raw_read_only(&file)
        };
        let map = map.map_err(io("map a memfd of another process"))?;
        Ok(Self { map, file })
    }

    pub(crate) fn len(&self) -> u64 {
        self.map.len() as u64
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// `count` words from the byte `offset` on, shared with whoever else maps them.
    pub(crate) fn words(&self, offset: usize, count: usize) -> Option<&[AtomicU64]> {
        let end = count.checked_mul(8)?.checked_add(offset)?;
        if !offset.is_multiple_of(8) || end > self.map.len() {
            return None;
        }
        #[allow(
            clippy::cast_ptr_alignment,
            reason = "a mapping begins at a page, the offset is a multiple of 8"
        )]
        let at = self.map.as_ptr().wrapping_add(offset).cast::<AtomicU64>();
        // SAFETY: aligned and inside of the mapping (checked), which lives as long as `self` and
        // cannot shrink (sealed). Memory that others write is seen as atomics only.
        Some(unsafe { std::slice::from_raw_parts(at, count) })
    }
}

impl Sealed {
    /// The 4 bytes at `offset`, shared with whoever else maps them: an index, or a futex.
    pub(crate) fn half(&self, offset: usize) -> Option<&AtomicU32> {
        if !offset.is_multiple_of(4) || offset.checked_add(4)? > self.map.len() {
            return None;
        }
        #[allow(
            clippy::cast_ptr_alignment,
            reason = "a mapping begins at a page, the offset is a multiple of 4"
        )]
        let at = self.map.as_mut_ptr().wrapping_add(offset).cast::<u32>();
        // SAFETY: aligned and inside of the mapping (checked), which lives as long as `self`. No
        // byte is used both as a half and as a word.
        Some(unsafe { AtomicU32::from_ptr(at) })
    }
}

impl AsFd for Sealed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealed")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// A registered memory region, on a sealed memfd.
pub struct MemoryRegion {
    /// With RDMA devices, for requests of this side. Before the memory, so that they go first.
    #[cfg(feature = "verbs")]
    registrations: std::sync::Mutex<Vec<Arc<crate::fabric::Registration>>>,
    memory: Sealed,
    key: RKey,
    access: Access,
    /// Which [`Node`](crate::Node) of this process registered it.
    owner: u64,
}

impl MemoryRegion {
    pub(crate) fn create(
        len: ByteSize,
        access: Access,
        key: RKey,
        owner: u64,
    ) -> Result<Arc<Self>> {
        let memory = Sealed::create(c"krcore", len.get())?;
        Ok(Self::over(memory, access, key, owner))
    }

    pub(crate) fn over(memory: Sealed, access: Access, key: RKey, owner: u64) -> Arc<Self> {
        Arc::new(Self {
            #[cfg(feature = "verbs")]
            registrations: std::sync::Mutex::default(),
            memory,
            key,
            access,
            owner,
        })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.memory.map.len()
    }

    /// Never: a region has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The key that peers name it by.
    pub fn key(&self) -> RKey {
        self.key
    }

    /// What peers may do with it.
    pub fn access(&self) -> Access {
        self.access
    }

    pub(crate) fn owner(&self) -> u64 {
        self.owner
    }

    /// The bytes from `offset`, `len` of them, as a work request names them. Whether they lie in the
    /// region is checked when the request is posted.
    pub fn slice(self: &Arc<Self>, offset: u64, len: u64) -> RegionSlice {
        RegionSlice {
            region: Arc::clone(self),
            offset,
            len,
        }
    }

    /// Where a peer finds the bytes from `offset` on.
    pub fn remote(&self, offset: u64) -> RemoteSlice {
        RemoteSlice {
            key: self.key,
            offset,
        }
    }

    pub(crate) fn contains(&self, offset: u64, len: u64) -> bool {
        offset
            .checked_add(len)
            .is_some_and(|end| end <= self.len() as u64)
    }

    /// Where it is mapped.
    #[cfg(feature = "verbs")]
    pub(crate) fn base(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    #[cfg(feature = "verbs")]
    pub(crate) fn registrations(
        &self,
    ) -> std::sync::MutexGuard<'_, Vec<Arc<crate::fabric::Registration>>> {
        self.registrations
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn at(&self, offset: u64) -> *mut u8 {
        self.memory.as_ptr().wrapping_add(offset as usize)
    }

    /// Copies from the region to `out`; false, and nothing copied, where the range is outside. Eight
    /// aligned bytes go as one.
    #[must_use]
    pub fn read(&self, offset: u64, out: &mut [u8]) -> bool {
        if !self.contains(offset, out.len() as u64) {
            return false;
        }
        if out.len() == 8
            && let Some(word) = self.atomic(offset)
        {
            out.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
            return true;
        }
        // SAFETY: the range lies in the mapping (checked), which cannot shrink (sealed); `out` is
        // exclusive memory of ours.
        unsafe { std::ptr::copy_nonoverlapping(self.at(offset), out.as_mut_ptr(), out.len()) };
        true
    }

    /// Copies `bytes` into the region; false, and nothing copied, where the range is outside. Eight
    /// aligned bytes go as one.
    #[must_use]
    pub fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        if !self.contains(offset, bytes.len() as u64) {
            return false;
        }
        if let Ok(word) = bytes.try_into()
            && let Some(to) = self.atomic(offset)
        {
            to.store(u64::from_ne_bytes(word), Ordering::Release);
            return true;
        }
        // SAFETY: the range lies in the mapping (checked), which cannot shrink (sealed) and is
        // handed out as no reference.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset), bytes.len()) };
        true
    }

    /// The 8 bytes at `offset` as an atomic; `None` where they are outside or not aligned.
    pub fn atomic(&self, offset: u64) -> Option<&AtomicU64> {
        self.memory
            .words(usize::try_from(offset).ok()?, 1)
            .and_then(<[AtomicU64]>::first)
    }

    /// Copies between regions, which may be one and the same. Eight aligned bytes go as one.
    #[must_use]
    pub(crate) fn copy(from: &Self, at: u64, to: &Self, to_at: u64, len: u64) -> bool {
        if !from.contains(at, len) || !to.contains(to_at, len) {
            return false;
        }
        if len == 8
            && let (Some(source), Some(target)) = (from.atomic(at), to.atomic(to_at))
        {
            target.store(source.load(Ordering::Acquire), Ordering::Release);
            return true;
        }
        // SAFETY: both ranges lie in sealed mappings (checked); `copy` allows an overlap.
        unsafe { std::ptr::copy(from.at(at), to.at(to_at), len as usize) };
        true
    }
}

impl AsFd for MemoryRegion {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegion")
            .field("len", &self.len())
            .field("key", &self.key)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

/// Bytes of a region, kept alive by whoever names them.
#[derive(Debug, Clone)]
pub struct RegionSlice {
    /// The region.
    pub region: Arc<MemoryRegion>,
    /// Where in it, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// Bytes of a peer's region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteSlice {
    /// The region's key.
    pub key: RKey,
    /// Where in it, in bytes.
    pub offset: u64,
}
