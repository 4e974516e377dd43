//! The allocator that lets a `Vec` own memory that is a file.
//!
//! candle keeps a tensor on the CPU in a `Vec`, and a `Vec` hands its memory to the global
//! allocator in the end. So that memory must have come from the global allocator in the beginning:
//! from `std::alloc::alloc` itself, not from a method of some allocator. [`MapAlloc`] is a global
//! allocator that, asked by the adapter through a thread-local hint, serves an address in the
//! [window](super::window), and knows it again when it comes back.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::report::CopyReason;
use super::window;

/// Threads that are placing blocks at the moment. While there are none, which is nearly always,
/// `alloc` costs one compare more than the inner allocator's.
static PLACING: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    // Const and without a destructor: reading it neither allocates nor can fail.
    static HINT: Cell<Hint> = const { Cell::new(Hint::Nothing) };
}

/// What this thread wants from its next allocation.
#[derive(Clone, Copy)]
enum Hint {
    /// Ordinary memory.
    Nothing,
    /// A block of this layout at this address.
    Place(usize, Layout),
    /// It was served.
    Served,
    /// Somebody between `std::alloc::alloc` and us asked for another layout.
    Altered,
}

/// A global allocator that gives candle tensors the store's memory, and everything else the inner
/// allocator's.
///
/// ```
/// use tetris_store::candle::MapAlloc;
///
/// #[global_allocator]
/// static ALLOCATOR: MapAlloc = MapAlloc::system();
/// # fn main() {}
/// ```
///
/// Any allocator can be the inner one: `MapAlloc::new(mimalloc::MiMalloc)`. It must be the
/// *outermost*: an allocator around it that adds headers of its own makes every tensor a copy,
/// which [`LoadReport`](super::LoadReport) tells as [`CopyReason::Tainted`]. A dynamic library has
/// a global allocator of its own.
#[derive(Debug, Default, Clone, Copy)]
pub struct MapAlloc<A = System> {
    inner: A,
}

impl MapAlloc {
    /// Around the allocator of the operating system, Rust's own default.
    pub const fn system() -> Self {
        Self::new(System)
    }
}

impl<A> MapAlloc<A> {
    /// Around `inner`.
    pub const fn new(inner: A) -> Self {
        Self { inner }
    }
}

// SAFETY: a block is either the inner allocator's, and all calls about it go there, or a part of
// the window that `place` set aside for this one block with the layout it asks for: mapped,
// writable, aligned, and no other block's until `dealloc`. No call unwinds.
unsafe impl<A: GlobalAlloc> GlobalAlloc for MapAlloc<A> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Both ways end in a call: nothing has to be kept across one, so no frame is set up.
        if PLACING.load(Ordering::Relaxed) != 0 {
            // SAFETY: the caller's promise about `layout` is passed on.
            return unsafe { self.alloc_where_asked(layout) };
        }
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { self.inner.alloc(layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { self.inner.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if window::covers(block.addr()) {
            // SAFETY: the caller's promises are passed on.
            return unsafe { self.give_back(block, layout) };
        }
        // SAFETY: the block is not ours, so `inner` served it with this layout.
        unsafe { self.inner.dealloc(block, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if window::covers(block.addr()) && window::holds(block.addr()) {
            // SAFETY: the caller's promises are passed on.
            return unsafe { self.copy_out(block, layout, new_size) };
        }
        // SAFETY: the block is not ours, so `inner` served it with this layout.
        unsafe { self.inner.realloc(block, layout, new_size) }
    }
}

impl<A: GlobalAlloc> MapAlloc<A> {
    /// While some thread places blocks: perhaps this one, and this is the block.
    ///
    /// # Safety
    /// As for `alloc`.
    #[cold]
    #[inline(never)]
    unsafe fn alloc_where_asked(&self, layout: Layout) -> *mut u8 {
        if let Some(block) = serve(layout) {
            return block;
        }
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { self.inner.alloc(layout) }
    }

    /// A block that lies where the window does, or would.
    ///
    /// # Safety
    /// As for `dealloc`.
    #[cold]
    #[inline(never)]
    unsafe fn give_back(&self, block: *mut u8, layout: Layout) {
        if !window::drop_block(block.addr(), layout.size()) {
            // SAFETY: the block is not ours, so `inner` served it with this layout.
            unsafe { self.inner.dealloc(block, layout) }
        }
    }

    /// A mapped block cannot grow: its bytes move to memory of the inner allocator.
    ///
    /// # Safety
    /// As for `realloc`, of a block in the window.
    #[cold]
    unsafe fn copy_out(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: `realloc`'s caller promises a size that is not zero and does not overflow.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: its size is not zero.
        let new = unsafe { self.inner.alloc(new_layout) };
        if !new.is_null() {
            // SAFETY: both blocks are that long, and the new one is nobody else's.
            unsafe { ptr::copy_nonoverlapping(block, new, layout.size().min(new_size)) };
            window::drop_block(block.addr(), layout.size());
        }
        new
    }
}

/// The block this thread asked for, if it asked and this is the call.
fn serve(layout: Layout) -> Option<*mut u8> {
    match HINT.get() {
        Hint::Place(address, wanted) if wanted == layout => {
            HINT.set(Hint::Served);
            window::add_block(address);
            Some(ptr::with_exposed_provenance_mut(address))
        }
        Hint::Place(..) => {
            HINT.set(Hint::Altered);
            None
        }
        _ => None,
    }
}

/// Lets this thread place blocks for as long as it lives.
#[derive(Debug)]
pub(super) struct Placing {
    // Hints are this thread's.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl Placing {
    pub(super) fn start() -> Self {
        PLACING.fetch_add(1, Ordering::Relaxed);
        Self {
            _not_send: std::marker::PhantomData,
        }
    }

    /// Has the global allocator serve a block of `layout` at `address`.
    ///
    /// # Safety
    /// The bytes lie in a region that the caller holds, `layout` is not of size zero and fits the
    /// address, and no other block lies there.
    ///
    /// # Errors
    /// [`CopyReason::NotRegistered`] or [`CopyReason::Tainted`]. After the latter, somebody else
    /// may hold that block: nothing may be mapped over this region any more.
    pub(super) unsafe fn place(
        &self,
        address: usize,
        layout: Layout,
    ) -> Result<*mut u8, CopyReason> {
        HINT.set(Hint::Place(address, layout));
        // The optimiser may drop an allocation whose only use is a compare. black_box speaks
        // against it, and where it would not be heard, the compare below fails: that is safe.
        // SAFETY: the size is not zero.
        let block = black_box(unsafe { std::alloc::alloc(layout) });
        let hint = HINT.replace(Hint::Nothing);
        if block.addr() == address {
            return Ok(block);
        }
        if !block.is_null() {
            // SAFETY: it was allocated above, with this layout.
            unsafe { std::alloc::dealloc(block, layout) };
        }
        Err(match hint {
            Hint::Place(..) => CopyReason::NotRegistered,
            _ => CopyReason::Tainted,
        })
    }
}

impl Drop for Placing {
    fn drop(&mut self) {
        PLACING.fetch_sub(1, Ordering::Relaxed);
    }
}
