//! Figure 3d: what `MapAlloc` costs those who only want memory.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;

use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{interleave, time};
use carlsbad_kit::scratch;
use carlsbad_types::{DType, Shape};
use tetris_store::candle::{MapAlloc, SharedTensors};
use tetris_store::{
    ElementType, ModelSource, Result, Sidecar, SourceFormat, SourceTensor, Store, StoreConfig,
};

#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

/// Sizes as programs ask for them: mostly small.
const SIZES: [usize; 16] = [
    16, 24, 32, 48, 64, 24, 96, 16, 128, 200, 32, 512, 1024, 48, 2048, 4096,
];
/// Blocks alive at a time.
const ALIVE: usize = 8;

/// As programs reach their global allocator: by a call that is not inlined. Without it the compiler
/// unrolls the loop around one allocator and not around the other, and that is what is measured.
#[inline(never)]
fn alloc(allocator: &impl GlobalAlloc, layout: Layout) -> *mut u8 {
    // SAFETY: no size is zero.
    unsafe { allocator.alloc(layout) }
}

/// See [`alloc`].
///
/// # Safety
/// `block` came from `alloc` of this allocator with this layout, and is not used any more.
#[inline(never)]
unsafe fn free(allocator: &impl GlobalAlloc, block: *mut u8, layout: Layout) {
    // SAFETY: the caller's promise.
    unsafe { allocator.dealloc(block, layout) };
}

/// Nanoseconds for one alloc and one free.
#[inline(never)]
fn alloc_and_free(allocator: &impl GlobalAlloc, pairs: usize) -> f64 {
    let layouts = SIZES.map(|size| Layout::from_size_align(size, 8).unwrap());
    let (elapsed, ()) = time(|| {
        for round in 0..pairs / ALIVE {
            let mut alive = [std::ptr::null_mut(); ALIVE];
            for (i, block) in alive.iter_mut().enumerate() {
                let layout = black_box(layouts[(round + i) % SIZES.len()]);
                *block = black_box(alloc(allocator, layout));
            }
            for (i, block) in alive.into_iter().enumerate() {
                let layout = layouts[(round + i) % SIZES.len()];
                // SAFETY: allocated above, with this layout.
                unsafe { free(allocator, black_box(block), black_box(layout)) };
            }
        }
    });
    elapsed.as_secs_f64() * 1e9 / pairs as f64
}

/// One tensor, so that there is a window to compare with.
struct OneTensor([SourceTensor; 1]);

impl ModelSource for OneTensor {
    fn format(&self) -> SourceFormat {
        SourceFormat::Safetensors
    }
    fn tensors(&self) -> &[SourceTensor] {
        &self.0
    }
    fn read_at(&self, _: usize, _: u64, into: &mut [u8]) -> Result<()> {
        into.fill(1);
        Ok(())
    }
    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(Vec::new())
    }
}

fn main() {
    let directory = scratch::on_tmpfs().unwrap();
    let store = Store::open(StoreConfig::at(directory.path().join("store"))).unwrap();
    let source = OneTensor([SourceTensor {
        name: "w".to_owned(),
        element: ElementType::Plain(DType::F32),
        shape: Shape::from([1 << 18]),
        len: 1 << 20,
    }]);
    let model = store.ingest(&source).unwrap().model;
    let attached = SharedTensors::of(&store.attach(&model).unwrap()).unwrap();
    assert_eq!(attached.report().mapped, 1);

    let (rounds, pairs) = if is_quick() { (1, 800) } else { (201, 80_000) };
    let ours = MapAlloc::system();
    let samples = interleave(
        2,
        rounds,
        || alloc_and_free(black_box(&ours), pairs),
        || alloc_and_free(black_box(&System), pairs),
    );
    Figure::new(
        "tetris-store/3d",
        "ordinary alloc + free through MapAlloc",
        "ns",
    )
    .against("the inner allocator", samples)
    .note("glibc malloc inside; 16 B to 4 KiB, 8 blocks alive; with a model attached")
    .emit()
    .unwrap();
}
