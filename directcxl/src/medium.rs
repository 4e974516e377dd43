//! Mapped memory of a backend: what every byte of a pool goes through.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{self, Ordering};

use carlsbad_types::ByteSize;
use memmap2::{MmapOptions, MmapRaw};

use crate::backend::{Backend, Coherence, Persistence};
use crate::error::{Error, Result};
use crate::flush::Step;
use crate::{arch, fault};

/// What a mapping may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// Reading. The mapping is read-only, so that no line of it can be dirty here: an `acquire`
    /// would write a dirty line over what another host has written.
    Read,
    /// Reading and writing.
    Write,
}

/// A mapped piece of a backend. Offsets are from its beginning.
///
/// [`Memory`] is the one that real backends give. A test may give one that models caches.
pub trait Medium: fmt::Debug + Send + Sync {
    /// Where it is mapped.
    fn base(&self) -> NonNull<u8>;

    /// Its length in bytes.
    fn length(&self) -> u64;

    /// Reads `into.len()` bytes at `offset`, as they are in this host's caches.
    ///
    /// # Errors
    /// Where the memory is gone or poisoned, and for a range outside.
    fn load(&self, offset: u64, into: &mut [u8]) -> Result<()>;

    /// Writes `bytes` at `offset`, into this host's caches.
    ///
    /// # Errors
    /// Where the memory is gone or poisoned or mapped for reading, and for a range outside.
    fn store(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Writes the lines of `range` from this host's caches to memory, and waits until they are
    /// there. `step` says what for. No load that comes after it is made before.
    ///
    /// # Errors
    /// For a range outside, where the memory is gone, and where the backend writes to a disk that
    /// fails.
    fn write_back(&self, range: Range<u64>, step: Step) -> Result<()>;

    /// Drops the lines of `range` from this host's caches, so that loads see what other hosts wrote
    /// back. `step` says what for.
    ///
    /// # Errors
    /// For a range outside, and where the memory is gone.
    fn invalidate(&self, range: Range<u64>, step: Step) -> Result<()>;
}

/// Refuses a range that does not lie within `length` bytes.
pub(crate) fn within(range: &Range<u64>, length: u64) -> Result<()> {
    if range.start <= range.end && range.end <= length {
        return Ok(());
    }
    Err(Error::OutOfRange {
        start: range.start,
        end: range.end,
        length: ByteSize::new(length),
        why: "it ends outside",
    })
}

/// A real mapping.
#[derive(Debug)]
pub struct Memory {
    map: MmapRaw,
    access: Access,
    /// Of this mapping, within the backend.
    offset: u64,
    /// Whether lines have to be moved for others to see them, or for a power failure.
    write_back: bool,
    invalidate: bool,
    sync: bool,
    backend: Arc<dyn Backend>,
}

/// Has the kernel map every page. `MAP_POPULATE` would do so as well, but keeps to itself where it
/// could not. Says whether the kernel knows how: since Linux 5.14.
fn fill_in(map: &MmapRaw) -> io::Result<bool> {
    let start = map.as_mut_ptr().cast();
    loop {
        // SAFETY: the range is that of a live mapping, whose content this does not change.
        if unsafe { libc::madvise(start, map.len(), libc::MADV_POPULATE_READ) } == 0 {
            return Ok(true);
        }
        let why = io::Error::last_os_error();
        match why.raw_os_error() {
            Some(libc::EINVAL) => return Ok(false),
            Some(libc::EINTR | libc::EAGAIN) => {}
            _ => return Err(why),
        }
    }
}

impl Memory {
    /// Maps `range` of a descriptor. With `populate` every page is there when this returns.
    ///
    /// # Errors
    /// Where the kernel refuses: among others for want of huge pages, and for a range of a device
    /// that is not a multiple of its alignment.
    pub fn map(
        backend: Arc<dyn Backend>,
        fd: BorrowedFd<'_>,
        range: Range<u64>,
        access: Access,
        populate: bool,
    ) -> Result<Self> {
        fault::install()?;
        let geometry = backend.geometry();
        let (align, length) = (geometry.alignment.get(), range.end - range.start);
        // A device accepts a misaligned offset and maps something else: it is refused here.
        if !range.start.is_multiple_of(align) || !length.is_multiple_of(align) || length == 0 {
            return Err(Error::OutOfRange {
                start: range.start,
                end: range.end,
                length: geometry.length,
                why: "a mapping begins and ends at a multiple of the alignment",
            });
        }
        within(&range, geometry.length.get())?;
        let too_long = |_| Error::OutOfRange {
            start: range.start,
            end: range.end,
            length: geometry.length,
            why: "it is longer than an address space",
        };
        let mut options = MmapOptions::new();
        options
            .offset(range.start)
            .len(usize::try_from(length).map_err(too_long)?);
        let map = match access {
            Access::Read => options.map_raw_read_only(&fd),
            Access::Write => options.map_raw(&fd),
        };
        let map = map.map_err(|why| backend.map_error(length, why))?;
        let persistent = geometry.persistence == Persistence::Power;
        let software = geometry.coherence == Coherence::Software;
        let memory = Self {
            map,
            access,
            offset: range.start,
            write_back: persistent || software,
            invalidate: software,
            sync: geometry.persistence == Persistence::Synced,
            backend,
        };
        if populate {
            memory.populate()?;
        }
        Ok(memory)
    }

    fn populate(&self) -> Result<()> {
        match fill_in(&self.map) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            // For want of memory, or for poison: a touch says which, and where.
            Err(why) if matches!(why.raw_os_error(), Some(libc::EFAULT | libc::EHWPOISON)) => {}
            Err(why) => return Err(Error::io("map every page of", self.backend.place())(why)),
        }
        let step = self.backend.geometry().alignment.get().max(1);
        let mut at = 0;
        while at < self.length() {
            self.load(at, &mut [0])?;
            at += step;
        }
        Ok(())
    }

    fn at(&self, range: &Range<u64>) -> Result<*mut u8> {
        within(range, self.map.len() as u64)?;
        Ok(self.map.as_mut_ptr().wrapping_add(range.start as usize))
    }

    fn fault(&self, fault: fault::Fault) -> Error {
        let (fault::Fault::Gone { address } | fault::Fault::Poison { address }) = fault;
        let into = address.wrapping_sub(self.map.as_ptr().addr()) as u64;
        let offset = self.offset.wrapping_add(into);
        match fault {
            fault::Fault::Gone { .. } => self.backend.bus_error(offset),
            fault::Fault::Poison { .. } => Error::Poisoned {
                place: self.backend.place(),
                offset,
            },
        }
    }
}

impl Medium for Memory {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr()).unwrap_or(NonNull::dangling())
    }

    fn length(&self) -> u64 {
        self.map.len() as u64
    }

    fn load(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let from = self.at(&(offset..offset.saturating_add(into.len() as u64)))?;
        // SAFETY: `at` has checked the range against the mapping, which lives as long as `self`; the
        // other side is a slice of ours. `map` has installed the handler.
        unsafe { fault::copy(into.as_mut_ptr(), from, into.len()) }.map_err(|why| self.fault(why))
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let to = self.at(&(offset..offset.saturating_add(bytes.len() as u64)))?;
        if self.access == Access::Read {
            return Err(Error::ReadOnly { what: "write" });
        }
        // SAFETY: as in `load`, and the mapping is writable.
        unsafe { fault::copy(to, bytes.as_ptr(), bytes.len()) }.map_err(|why| self.fault(why))
    }

    fn write_back(&self, range: Range<u64>, step: Step) -> Result<()> {
        let start = self.at(&range)?;
        let length = (range.end - range.start) as usize;
        if self.write_back {
            // SAFETY: `at` has checked the range against the mapping, and `map` has installed the
            // handler.
            unsafe { arch::write_back(start, length) }.map_err(|why| self.fault(why))?;
        }
        if self.sync {
            self.map
                .flush_range(range.start as usize, length)
                .map_err(Error::io("write back", self.backend.place()))?;
        }
        // Whoever stores one of these looks next what others have stored, and relies on one of the
        // two seeing the other. A processor lets loads overtake stores, also those that `sfence` has
        // put in order.
        if matches!(
            step,
            Step::RecordFirst | Step::RecordSecond | Step::Entry | Step::Lease
        ) {
            atomic::fence(Ordering::SeqCst);
        }
        Ok(())
    }

    fn invalidate(&self, range: Range<u64>, _: Step) -> Result<()> {
        let start = self.at(&range)?;
        if self.invalidate {
            let length = (range.end - range.start) as usize;
            // SAFETY: as in `write_back`.
            unsafe { arch::invalidate(start, length) }.map_err(|why| self.fault(why))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use carlsbad_types::ByteSize;

    use super::{Access, Medium};
    use crate::MemfdHdm;
    use crate::backend::{Backend, Coherence};
    use crate::flush::Step;

    /// How often, of `rounds` in which each of two stores what the other then loads, neither sees the
    /// other.
    fn missed(medium: &dyn Medium, steps: [Step; 2], rounds: u64) -> u64 {
        let turn = AtomicU64::new(0);
        let seen = [const { AtomicU64::new(0) }; 2];
        let meet = |goal: u64| {
            turn.fetch_add(1, Ordering::SeqCst);
            while turn.load(Ordering::SeqCst) < goal {
                std::hint::spin_loop();
            }
        };
        let side = |mine: usize| {
            let mut missed = 0;
            let at = |side: usize| 4096 * side as u64;
            for round in 1..=rounds {
                meet(4 * round - 2);
                medium.store(at(mine), &round.to_le_bytes()).unwrap();
                medium
                    .write_back(at(mine)..at(mine) + 8, steps[mine])
                    .unwrap();
                let mut other = [0; 8];
                medium.load(at(1 - mine), &mut other).unwrap();
                let other = u64::from_le_bytes(other);
                seen[mine].store(other, Ordering::SeqCst);
                meet(4 * round);
                missed += u64::from(seen.iter().all(|seen| seen.load(Ordering::SeqCst) < round));
            }
            missed
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| side(1));
            side(0).max(other.join().unwrap())
        })
    }

    fn memory() -> Box<dyn Medium> {
        let memory = MemfdHdm::new(ByteSize::mib(2))
            .unwrap()
            .coherence(Coherence::Hardware);
        let backend: Arc<dyn Backend> = Arc::new(memory);
        backend.map(0..2 << 20, Access::Write, true).unwrap()
    }

    /// Of a claim and an entry one is seen, of a removal and a lease as well.
    #[test]
    fn of_two_that_store_and_then_look_one_sees_the_other() {
        let medium = memory();
        for steps in [
            [Step::Entry, Step::RecordSecond],
            [Step::Entry, Step::Lease],
            [Step::RecordFirst, Step::RecordSecond],
        ] {
            assert_eq!(missed(&*medium, steps, 100_000), 0, "{steps:?}");
        }
        // What nobody relies on shows that they could miss each other, where two processors run at
        // once.
        let unordered = missed(&*medium, [Step::Publish; 2], 100_000);
        println!("without order {unordered} of 100000 missed each other");
    }
}
