//! A namespace that is attached: memory with a name.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use carlsbad_types::ByteSize;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::flush::Step;
use crate::layout::Extent;
use crate::medium::{Medium, within};
use crate::pool::Shared;

/// What a new namespace holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Contents {
    /// Zeroes.
    #[default]
    Zeroed,
    /// Whatever was there, of whoever had it: for those who overwrite all of it, and who share the
    /// pool with nobody who must not read what others had.
    Kept,
}

/// How a namespace is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NamespaceOptions {
    /// What it holds at first.
    pub contents: Contents,
    /// Whether the kernel maps every page before `create` returns.
    pub populate: bool,
}

/// What a pool says of a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// What it is called.
    pub name: String,
    /// Which one of all that were ever called so.
    pub generation: u64,
    /// Where it begins in the device or file.
    pub offset: u64,
    /// Its bytes.
    pub length: ByteSize,
}

/// Names one namespace for ever: it is never another one's, unlike a name or an offset. 48 bytes,
/// which other processes and hosts can be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle {
    /// The pool.
    pub pool: Uuid,
    /// Of the pool: it is another after the pool was formatted again.
    pub incarnation: u64,
    /// Of the namespace.
    pub generation: u64,
    /// Where it begins in the device or file.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

impl Handle {
    /// Its bytes when it is sent.
    pub const SIZE: usize = 48;

    /// Writes it: the uuid, then four little-endian numbers in the order of the fields.
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..16].copy_from_slice(self.pool.as_bytes());
        let numbers = [self.incarnation, self.generation, self.offset, self.length];
        for (to, number) in bytes[16..].as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
            *to = number.to_le_bytes();
        }
        bytes
    }

    /// Reads one. Whether it names anything is for [`Pool::resolve`](crate::Pool::resolve) to say.
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut pool = [0; 16];
        pool.copy_from_slice(&bytes[..16]);
        let (numbers, _) = bytes[16..].as_chunks::<8>();
        Self {
            pool: Uuid::from_bytes(pool),
            incarnation: u64::from_le_bytes(numbers[0]),
            generation: u64::from_le_bytes(numbers[1]),
            offset: u64::from_le_bytes(numbers[2]),
            length: u64::from_le_bytes(numbers[3]),
        }
    }
}

/// A namespace that this process is attached to: it stays mapped, and its memory is nobody else's,
/// until every clone of this is dropped.
#[derive(Debug, Clone)]
pub struct Namespace {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) generation: u64,
    pub(crate) extent: Extent,
    pub(crate) name: String,
    pub(crate) medium: Box<dyn Medium>,
    /// Held by whoever of this process changes the heap: the kernel's lock is the process'. One for
    /// all mappings of a namespace, of which there are two after it was resized.
    pub(crate) heap: Arc<Mutex<()>>,
    /// Which attached. A forked child has a copy of this, but the lease is its parent's to end.
    pub(crate) process: u32,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if std::process::id() == self.process {
            self.shared.detach(self.generation);
        }
    }
}

impl Namespace {
    /// What it was called when it was attached.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its bytes: what was asked for, rounded up to 2 MiB.
    pub fn length(&self) -> ByteSize {
        ByteSize::new(self.inner.extent.length)
    }

    /// What names it for others.
    pub fn handle(&self) -> Handle {
        let superblock = &self.inner.shared.log.superblock;
        Handle {
            pool: superblock.uuid,
            incarnation: superblock.incarnation,
            generation: self.inner.generation,
            offset: self.inner.extent.offset,
            length: self.inner.extent.length,
        }
    }

    /// Where it is mapped in this process, until `self` is dropped.
    ///
    /// Others change what is there at any time: read and write it through raw pointers, volatile or
    /// atomic, and never make a reference to it that is not of an atomic type. Where the memory is
    /// removed, an access through a pointer is a bus error; [`Namespace::read`] and
    /// [`Namespace::write`] give an error instead.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.inner.medium.base()
    }

    /// The descriptor, offset and length by which any program can map it, in any language.
    pub fn mapping(&self) -> (BorrowedFd<'_>, u64, u64) {
        let extent = self.inner.extent;
        (
            self.inner.shared.backend.as_fd(),
            extent.offset,
            extent.length,
        )
    }

    /// Makes this host's stores to a range visible to the other hosts, and safe as far as the
    /// medium is. Stores to the range that other threads make meanwhile may be left out.
    ///
    /// # Errors
    /// Where the range does not lie within the namespace, or the memory is gone.
    pub fn publish(&self, range: Range<u64>) -> Result<()> {
        self.inner.medium.write_back(range, Step::Publish)
    }

    /// Makes what other hosts have published to a range visible to this host's loads. A writer must
    /// have published its own stores to these lines before: they are written over what others wrote.
    ///
    /// # Errors
    /// Where the range does not lie within the namespace, or the memory is gone.
    pub fn acquire(&self, range: Range<u64>) -> Result<()> {
        self.inner.medium.invalidate(range, Step::Acquire)
    }

    /// Copies bytes out. Eight aligned bytes are read as one.
    ///
    /// Memory that is gone is an error, but not in a thread that blocks SIGBUS, nor where a handler
    /// that was installed after the first pool was opened takes the signal for itself.
    ///
    /// # Errors
    /// [`Error::Removed`] and [`Error::Poisoned`] where the memory is; [`Error::NoSpace`] where a page
    /// that was never touched finds none; for a range outside.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.inner.medium.load(offset, out)
    }

    /// Copies bytes in. Eight aligned bytes are written as one.
    ///
    /// # Errors
    /// As of [`Namespace::read`]; [`Error::ReadOnly`] for a reader.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.inner.medium.store(offset, bytes)
    }

    /// An atomic number of the namespace, for processes of one host. Between hosts whose coherence
    /// is software's, no atomic operation means anything. As with [`Namespace::as_ptr`], where the
    /// memory is removed an access is a bus error.
    ///
    /// # Errors
    /// Where the place is not a multiple of 8 or outside, and for a reader.
    pub fn atomic(&self, offset: u64) -> Result<&AtomicU64> {
        if self.inner.shared.epoch.is_none() {
            return Err(Error::ReadOnly {
                what: "use an atomic number",
            });
        }
        let range = offset..offset.saturating_add(8);
        within(&range, self.inner.extent.length)?;
        if !offset.is_multiple_of(8) {
            return Err(Error::OutOfRange {
                start: range.start,
                end: range.end,
                length: self.length(),
                why: "an atomic number begins at a multiple of 8",
            });
        }
        let at = self.as_ptr().as_ptr().wrapping_add(offset as usize);
        // SAFETY: the place is within a mapping for writing that lives as long as `self`, it is
        // aligned, and an atomic may be changed by others at any time.
        Ok(unsafe { AtomicU64::from_ptr(at.cast()) })
    }
}
