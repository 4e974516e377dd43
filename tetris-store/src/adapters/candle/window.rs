//! One window of address space in which every mapped tensor lives, so that an allocator can tell a
//! mapped block from its own by one compare.
//!
//! The window is reserved once, without access rights, and handed out in granules. A *region* is a
//! run of granules that one attached model occupies. It counts its live blocks and closes the lease
//! of its model when the last one goes. All bookkeeping is atomics in static memory: it runs inside
//! `dealloc`, where nothing may allocate, and in forked children, where no lock can be trusted.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering, fence};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::lease::Lease;

/// Bytes of address space in the window: 1 TiB, of 128 TiB that a process has on x86-64.
const WINDOW: usize = if usize::BITS >= 64 { 1 << 40 } else { 1 << 28 };
/// Pieces the window is handed out in: 64 MiB each.
const GRANULES: usize = 1 << 14;
/// Bytes of address space in one piece.
pub(super) const GRANULE: usize = WINDOW / GRANULES;
/// Where the window lies, in multiples of its length: a constant, so that `covers` loads nothing. Far
/// from where Linux puts programs, heaps, stacks and mappings on any 47-bit address space; taken only
/// if it is free.
const PLACE: usize = if usize::BITS >= 64 { 42 } else { 5 };
/// The window's first address.
const BASE: usize = PLACE * WINDOW;

/// Granules really reserved: none before there is a window, fewer than [`GRANULES`] under
/// `RLIMIT_AS`.
static RESERVED: AtomicUsize = AtomicUsize::new(0);
/// Mappings that the regions take, or are about to.
static MAPPINGS: AtomicUsize = AtomicUsize::new(0);
static CELLS: [Cell; GRANULES] = [const { Cell::new() }; GRANULES];

/// What is known of one granule. Only the first granule of a region uses the last four.
struct Cell {
    /// 0: free. Otherwise the number of its region's first granule, plus 1.
    owner: AtomicU32,
    /// Granules in the region.
    span: AtomicU32,
    /// Mappings that the region counts for.
    mappings: AtomicU32,
    /// Live blocks, and 1 while the region is being set up.
    live: AtomicUsize,
    /// A descriptor to close at the end, plus 1; 0 is none.
    lease: AtomicI32,
}

impl Cell {
    const fn new() -> Self {
        Self {
            owner: AtomicU32::new(0),
            span: AtomicU32::new(0),
            mappings: AtomicU32::new(0),
            live: AtomicUsize::new(0),
            lease: AtomicI32::new(0),
        }
    }
}

/// Whether `address` may lie in the window. The one compare that every `dealloc` pays.
#[inline(always)]
pub(super) fn covers(address: usize) -> bool {
    address / WINDOW == PLACE
}

/// The first granule of the region that `address` lies in, if it lies in one.
fn region_of(address: usize) -> Option<usize> {
    let granule = address.wrapping_sub(BASE) / GRANULE;
    // Beyond what is really reserved, the address belongs to somebody else. Relaxed suffices: whoever
    // holds a block of the window got it from the thread that set RESERVED.
    if granule >= RESERVED.load(Ordering::Relaxed) {
        return None;
    }
    (CELLS[granule].owner.load(Ordering::Relaxed) as usize).checked_sub(1)
}

/// Whether a block at `address` is the window's.
pub(super) fn holds(address: usize) -> bool {
    region_of(address).is_some()
}

/// Counts one more live block in the region of `address`.
pub(super) fn add_block(address: usize) {
    if let Some(first) = region_of(address) {
        CELLS[first].live.fetch_add(1, Ordering::Relaxed);
    }
}

/// Takes back the block of `len` bytes at `address`, if the window holds it.
#[cold]
pub(super) fn drop_block(address: usize, len: usize) -> bool {
    let Some(first) = region_of(address) else {
        return false;
    };
    let errno = Errno::last_raw();
    discard_whole_pages(address, len);
    drop_count(first);
    // Programs read errno after memory was freed; `free` keeps it, and so does this.
    Errno::set_raw(errno);
    true
}

/// Gives pages back that only this block used: those it wrote to are private memory.
fn discard_whole_pages(address: usize, len: usize) {
    let page = page_size();
    let start = address.next_multiple_of(page);
    let end = (address + len) / page * page;
    if start < end {
        let start = NonNull::new(ptr::with_exposed_provenance_mut::<c_void>(start));
        if let Some(start) = start {
            // SAFETY: these pages lie wholly in a block that its owner has just given up.
            let discarded = unsafe {
                madvise(
                    start,
                    end - start.as_ptr().addr(),
                    MmapAdvise::MADV_DONTNEED,
                )
            };
            // Refused on locked pages only; they go with the region.
            let _ = discarded;
        }
    }
}

fn drop_count(first: usize) {
    if CELLS[first].live.fetch_sub(1, Ordering::Release) != 1 {
        return;
    }
    fence(Ordering::Acquire);
    let lease = CELLS[first].lease.swap(0, Ordering::Relaxed);
    let span = CELLS[first].span.load(Ordering::Relaxed) as usize;
    let mappings = CELLS[first].mappings.load(Ordering::Relaxed) as usize;
    let start = BASE + first * GRANULE;
    // Should the kernel refuse, these addresses stay taken: memory is lost, nothing is unsound.
    if map_anonymous(start, span * GRANULE, ProtFlags::PROT_NONE).is_ok() {
        for cell in CELLS[first..first + span].iter().rev() {
            cell.owner.store(0, Ordering::Release);
        }
        MAPPINGS.fetch_sub(mappings, Ordering::Relaxed);
    }
    if lease != 0 {
        // SAFETY: `Region::hold` took the descriptor over, and the swap gives it to one thread.
        Lease::give_back(unsafe { OwnedFd::from_raw_fd(lease - 1) });
    }
}

/// Replaces what is mapped at `start` by fresh anonymous memory. Only for addresses in the window.
fn map_anonymous(start: usize, len: usize, access: ProtFlags) -> nix::Result<()> {
    let len = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
    // SAFETY: the window is ours, and the caller holds these granules of it with no live block.
    let mapped = unsafe {
        mmap_anonymous(
            NonZeroUsize::new(start),
            len,
            access,
            MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED,
        )
    };
    mapped.map(drop)
}

/// Bytes in a page of this machine.
pub(super) fn page_size() -> usize {
    static PAGE: AtomicUsize = AtomicUsize::new(0);
    let known = PAGE.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    // SAFETY: sysconf only reads.
    let asked = unsafe { nix::libc::sysconf(nix::libc::_SC_PAGESIZE) };
    let page = usize::try_from(asked).unwrap_or(4096);
    PAGE.store(page, Ordering::Relaxed);
    page
}

/// Reserves the window if there is none: as much of it as the address-space limit leaves.
///
/// Threads may race here: the one that maps the window says how much is real. A child forked between
/// the two never learns it, and copies.
fn reserve() -> io::Result<()> {
    /// Something of the program's lies where the window would: there is none, and nobody waits.
    static TAKEN: AtomicBool = AtomicBool::new(false);
    /// Between two calls of a thread that may have lost its processor; a tenth of a second in all.
    const PAUSE: Duration = Duration::from_millis(1);
    for _ in 0..100 {
        if RESERVED.load(Ordering::Acquire) != 0 {
            return Ok(());
        }
        if TAKEN.load(Ordering::Relaxed) {
            break;
        }
        match map_window() {
            Ok(granules) => {
                RESERVED.store(granules, Ordering::Release);
                return Ok(());
            }
            // By another thread, which is about to say so; or the place is somebody else's.
            Err(Errno::EEXIST) => std::thread::sleep(PAUSE),
            Err(errno) => return Err(errno.into()),
        }
    }
    TAKEN.store(true, Ordering::Relaxed);
    Err(Errno::EEXIST.into())
}

/// Maps the largest window to be had, and says how many granules that is.
fn map_window() -> nix::Result<usize> {
    let mut granules = GRANULES;
    loop {
        let len = NonZeroUsize::new(granules * GRANULE).ok_or(Errno::ENOMEM)?;
        // SAFETY: NOREPLACE: it touches nothing that is mapped.
        let mapped = unsafe {
            mmap_anonymous(
                NonZeroUsize::new(BASE),
                len,
                ProtFlags::PROT_NONE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED_NOREPLACE,
            )
        };
        match mapped {
            Ok(base) if base.as_ptr().expose_provenance() == BASE => return Ok(granules),
            // Linux before 4.17 takes the address for a hint.
            Ok(elsewhere) => {
                // SAFETY: mapped above, and nobody has seen it.
                unsafe { munmap(elsewhere, len.get()) }?;
                return Err(Errno::EEXIST);
            }
            Err(Errno::ENOMEM) if granules > 1 => granules /= 2,
            Err(errno) => return Err(errno),
        }
    }
}

/// A run of granules for one model. It stays mapped until this and every block in it are gone.
#[derive(Debug)]
pub(super) struct Region {
    first: usize,
}

impl Region {
    /// Takes `len` bytes of address space, readable, writable and zero, in which `files` stretches of
    /// files are to be mapped.
    ///
    /// # Errors
    /// Of the kind `OutOfMemory` where the process may not have that much address space, or that
    /// many mappings.
    pub(super) fn claim(len: usize, files: usize) -> io::Result<Self> {
        reserve()?;
        // One before and one behind the files.
        let mappings = u32::try_from(files + 2).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let taken = MAPPINGS.fetch_add(mappings as usize, Ordering::Relaxed);
        let span = len.div_ceil(GRANULE).max(1);
        let first = if taken + mappings as usize <= most_mappings() {
            claim_granules(span)
        } else {
            None
        };
        let Some(first) = first else {
            MAPPINGS.fetch_sub(mappings as usize, Ordering::Relaxed);
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        CELLS[first].mappings.store(mappings, Ordering::Relaxed);
        let region = Self { first };
        let len = len.max(1).next_multiple_of(page_size());
        map_anonymous(
            region.start(),
            len,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        )?;
        Ok(region)
    }

    /// Its first address.
    pub(super) fn start(&self) -> usize {
        BASE + self.first * GRANULE
    }

    /// Gives back `lease`, which [`Lease::share`] gave, when the last block is gone.
    pub(super) fn hold(&self, lease: OwnedFd) {
        let before = CELLS[self.first]
            .lease
            .swap(lease.into_raw_fd() + 1, Ordering::Relaxed);
        debug_assert_eq!(before, 0, "a region holds one lease");
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        drop_count(self.first);
    }
}

/// The most mappings that regions may take: three quarters of what the kernel allows a process. A
/// program without any left cannot even allocate, and is ended by that.
fn most_mappings() -> usize {
    /// The kernel's default.
    const DEFAULT: usize = 65_530;
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT);
        limit / 4 * 3
    })
}

/// Finds and takes `span` free granules in a row.
fn claim_granules(span: usize) -> Option<usize> {
    let reserved = RESERVED.load(Ordering::Acquire);
    let mut first = 0;
    while first + span <= reserved {
        let Some(taken) = first_taken(first, span) else {
            let cell = &CELLS[first];
            cell.span.store(span as u32, Ordering::Relaxed);
            cell.live.store(1, Ordering::Relaxed);
            return Some(first);
        };
        first = taken + 1;
    }
    None
}

/// Takes `span` granules from `first` on, or none of them and says which is taken already.
fn first_taken(first: usize, span: usize) -> Option<usize> {
    let cells = &CELLS[first..first + span];
    let is_taken = |cell: &Cell| {
        let mark = first as u32 + 1;
        (cell.owner)
            .compare_exchange(0, mark, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
    };
    let taken = cells.iter().position(is_taken)?;
    for cell in &cells[..taken] {
        cell.owner.store(0, Ordering::Release);
    }
    Some(first + taken)
}
