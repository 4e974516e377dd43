//! An allocator around `MapAlloc` that does not pass on what it is asked for.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::alloc::{GlobalAlloc, Layout};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use carlsbad_kit::leak::LeakGuard;
use carlsbad_types::DType as Stored;
use common::{MemoryModel, random_bytes, store};
use tetris_store::candle::{CopyReason, MapAlloc, SharedTensors};

/// Passes everything on.
const FAITHFUL: u8 = 0;
/// Puts 16 bytes in front of each block of `ODD` bytes.
const HEADERS: u8 = 1;
/// Takes a block of its own with each block of `ODD` bytes, before it, with the same layout.
const HOARDING: u8 = 2;

static MODE: AtomicU8 = AtomicU8::new(FAITHFUL);
static HOARD: AtomicUsize = AtomicUsize::new(0);
/// A size that nothing but the test's tensor has.
const ODD: usize = 123_460;

struct Wrapper(MapAlloc);

fn with_header(layout: Layout) -> Layout {
    Layout::from_size_align(layout.size() + 16, layout.align().max(16)).unwrap()
}

// SAFETY: blocks are the inner allocator's, or begin 16 bytes into one of its blocks.
unsafe impl GlobalAlloc for Wrapper {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mode = MODE.load(Ordering::Relaxed);
        if layout.size() != ODD || mode == FAITHFUL {
            // SAFETY: the caller's promise is passed on.
            return unsafe { self.0.alloc(layout) };
        }
        if mode == HEADERS {
            // SAFETY: the size is not zero.
            let block = unsafe { self.0.alloc(with_header(layout)) };
            // SAFETY: the block is 16 bytes longer.
            return unsafe { block.add(16) };
        }
        // SAFETY: the caller's promise is passed on.
        let hoarded = unsafe { self.0.alloc(layout) };
        // The first is the one in the window; the copies that follow are hoarded in vain.
        let hoarded = hoarded.expose_provenance();
        let _ = HOARD.compare_exchange(0, hoarded, Ordering::Relaxed, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if layout.size() == ODD && MODE.load(Ordering::Relaxed) == HEADERS {
            // SAFETY: `alloc` added as much.
            let block = unsafe { block.sub(16) };
            // SAFETY: it was allocated so.
            return unsafe { self.0.dealloc(block, with_header(layout)) };
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { self.0.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Wrapper = Wrapper(MapAlloc::system());

/// The mode is the process': one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn load(mode: u8) -> (Vec<CopyReason>, usize) {
    let (dir, store) = store();
    let model = MemoryModel::default()
        .with("a", Stored::U8, &[70_000], random_bytes(70_000, 1))
        .with("odd", Stored::F32, &[ODD / 4], random_bytes(ODD, 2));
    let id = store.ingest(&model).unwrap().model;
    let leaks = LeakGuard::beneath(dir.path());
    MODE.store(mode, Ordering::Relaxed);
    let tensors = SharedTensors::of(&store.attach(&id).unwrap()).unwrap();
    for name in ["a", "odd"] {
        let mut bytes = Vec::new();
        tensors.get(name).unwrap().write_bytes(&mut bytes).unwrap();
        assert!(bytes == model.bytes_of(name));
    }
    let report = tensors.report();
    drop(tensors);
    MODE.store(FAITHFUL, Ordering::Relaxed);
    leaks.check();
    let reasons = report.copied.iter().map(|copied| copied.reason).collect();
    (reasons, report.mapped)
}

#[test]
fn an_allocator_that_passes_everything_on_is_no_obstacle() {
    let _alone = ONE_AT_A_TIME.lock().unwrap();
    assert_eq!(load(FAITHFUL), (vec![], 2));
}

#[test]
fn one_that_adds_headers_taints() {
    let _alone = ONE_AT_A_TIME.lock().unwrap();
    assert_eq!(load(HEADERS), (vec![CopyReason::Tainted; 2], 0));
}

#[test]
fn one_that_keeps_our_block_taints_and_keeps_its_memory() {
    let _alone = ONE_AT_A_TIME.lock().unwrap();
    assert_eq!(load(HOARDING), (vec![CopyReason::Tainted; 2], 0));
    // What the wrapper kept is ordinary memory to it, still mapped and nobody else's.
    let hoarded = ptr::with_exposed_provenance_mut::<u8>(HOARD.load(Ordering::Relaxed));
    // SAFETY: the wrapper allocated ODD bytes there, and nobody has freed them.
    unsafe { ptr::write_bytes(hoarded, 7, ODD) };
    // SAFETY: as above.
    assert_eq!(unsafe { hoarded.wrapping_add(ODD - 1).read() }, 7);
    // SAFETY: the block came from the inner allocator with this layout, and the wrapper is
    // faithful again, so this is the inner allocator's `dealloc`.
    unsafe { std::alloc::dealloc(hoarded, Layout::from_size_align(ODD, 4).unwrap()) };
}
