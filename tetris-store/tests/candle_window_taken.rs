//! A program with something of its own where the window would lie: a test binary of its own.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use common::{MemoryModel, store};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use tetris_store::candle::{CopyReason, MapAlloc, SharedTensors};

#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

#[test]
#[cfg(target_pointer_width = "64")]
fn where_the_window_is_taken_tensors_are_copies_and_nobody_waits_twice() {
    const PLACE: usize = 42 << 40;
    const LEN: usize = 1 << 20;
    // SAFETY: NOREPLACE: it touches nothing that is mapped.
    let mapped = unsafe {
        mmap_anonymous(
            NonZeroUsize::new(PLACE),
            NonZeroUsize::new(LEN).unwrap(),
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE,
        )
    }
    .unwrap();
    assert_eq!(mapped.as_ptr().addr(), PLACE);
    // SAFETY: mapped above, readable and writable, and nobody else's.
    let theirs = unsafe { std::slice::from_raw_parts_mut(mapped.as_ptr().cast::<u8>(), LEN) };
    theirs.fill(0x5a);

    let (_dir, store) = store();
    let model = MemoryModel::default().with_random("t", 1 << 20, 1);
    let id = store.ingest(&model).unwrap().model;
    let attach = || {
        let tensors = SharedTensors::of(&store.attach(&id).unwrap()).unwrap();
        let report = tensors.report();
        assert_eq!(report.mapped, 0);
        assert_eq!(report.copied[0].reason, CopyReason::NoVa);
        let bytes = tensors.get("t").unwrap().to_vec1::<u8>().unwrap();
        assert!(bytes == model.bytes_of("t"));
    };
    attach();
    let start = Instant::now();
    for _ in 0..100 {
        attach();
    }
    // Had each waited for the window as the first did, it would take 10 s.
    assert!(start.elapsed() < Duration::from_secs(8));
    assert!(theirs.iter().all(|byte| *byte == 0x5a));
}
