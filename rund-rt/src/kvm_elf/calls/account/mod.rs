//! What the processes of one sandbox use together, in memory that they share: a limit is the
//! sandbox's, however many processes it divides its work among.

mod processes;
mod upper;

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};

pub use processes::Processes;
pub use upper::{Change, Held, Lock, NAME, Upper};

use super::super::layout::PAGE;

/// The accounts. What every clone touches lies together, in the middle.
#[derive(Debug)]
#[repr(C)]
pub struct Account {
    /// Its processes.
    pub processes: Processes,
    /// Its captured output.
    pub output: Output,
    /// Its writable layer.
    pub upper: Upper,
}

/// In whole pages.
const SIZE: NonZeroUsize =
    NonZeroUsize::MIN.saturating_add(size_of::<Account>().next_multiple_of(PAGE as usize) - 1);

/// Bytes of captured output.
#[derive(Debug, Default)]
pub struct Output {
    most: AtomicU64,
    taken: AtomicU64,
    /// Bytes that there was no room for.
    dropped: AtomicU64,
}

impl Output {
    /// Nothing yet, and at most `most`.
    fn begin(&self, most: u64) {
        self.most.store(most, Ordering::Relaxed);
        self.taken.store(0, Ordering::Relaxed);
        self.dropped.store(0, Ordering::Relaxed);
    }

    /// Room for as many of `wanted` bytes as there is.
    pub fn take(&self, wanted: u64) -> u64 {
        let most = self.most.load(Ordering::Relaxed);
        let room = |taken: u64| wanted.min(most.saturating_sub(taken));
        let taken = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                Some(taken + room(taken))
            });
        let taken = room(taken.unwrap_or(most));
        if taken < wanted {
            self.dropped.fetch_add(wanted - taken, Ordering::Relaxed);
        }
        taken
    }

    /// Bytes that nobody took.
    pub fn lost(&self, bytes: u64) {
        self.dropped.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether something was dropped.
    pub fn is_truncated(&self) -> bool {
        self.dropped.load(Ordering::Relaxed) > 0
    }
}

impl Account {
    /// New accounts, for this process and those that it forks, until it ends.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn new() -> nix::Result<&'static Self> {
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let place = unsafe { mmap_anonymous(None, SIZE, rights, flags) }?;
        // SAFETY: as many zeros as the structure is long, which is a valid value of its atomic
        // numbers, aligned to a page; they stay mapped for the life of the process.
        Ok(unsafe { place.cast::<Self>().as_ref() })
    }

    /// For a clone that begins: nothing is used, and so much may be. No other process has these
    /// accounts any more, and nothing in the writable layer is open.
    pub fn begin(&self, output: u64, processes: u32) {
        let (many, files) = (self.processes.begin(processes), self.upper.begin());
        if many || files {
            self.clear(processes);
        }
        self.output.begin(output);
    }

    /// Zeros, but for what says whether there is a writable layer; its pages are given back.
    fn clear(&self, processes: u32) {
        let used = self.upper.used.load(Ordering::Acquire);
        let place = NonNull::from(self).cast();
        // SAFETY: the mapping, of atomic numbers, which are zero afterwards.
        let _old_numbers_only_refuse =
            unsafe { madvise(place, SIZE.get(), MmapAdvise::MADV_REMOVE) };
        self.upper.used.store(used, Ordering::Release);
        self.processes.begin(processes);
    }
}
