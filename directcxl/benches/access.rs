//! Figure 3: a namespace is memory, and costs what memory costs: the same chase through a namespace
//! and through a plain mapping of the same bytes.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod chase;

use std::fs::File;

use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::interleave;
use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use chase::{LINE, chase, cycle, write};
use directcxl::{FileHdm, FormatOptions, NamespaceOptions, Pool};

fn main() {
    let length: u64 = if is_quick() { 8 << 20 } else { 128 << 20 };
    let dir = scratch::on_tmpfs().unwrap();
    let path = dir.path().join("pool");
    let file = FileHdm::create(&path, ByteSize::new(length + (8 << 20))).unwrap();
    let pool = Pool::format(file, FormatOptions::default()).unwrap();
    let memory = pool
        .create("chase", ByteSize::new(length), NamespaceOptions::default())
        .unwrap();
    write(&memory, &cycle(length as usize / LINE, 1));
    let (_, offset, length) = memory.mapping();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let raw = memmap2::MmapOptions::new()
        .offset(offset)
        .len(length as usize)
        .map_raw(&file)
        .unwrap();
    // Both have every page mapped before the clock runs.
    for at in (0..length as usize).step_by(4096) {
        // SAFETY: both mappings have that many bytes.
        unsafe { raw.as_ptr().wrapping_add(at).read_volatile() };
        // SAFETY: as above.
        unsafe { memory.as_ptr().as_ptr().wrapping_add(at).read_volatile() };
    }
    let steps = if is_quick() { 1_000 } else { 50_000 };
    let (warm_up, rounds) = if is_quick() { (0, 1) } else { (4, 101) };
    let base = memory.as_ptr().as_ptr().cast_const();
    let (mut ours, mut theirs) = (0, 0);
    let samples = interleave(
        warm_up,
        rounds,
        || {
            // SAFETY: the namespace holds the cycle, and lives.
            let (now, ns) = unsafe { chase(base, ours, steps) };
            ours = now;
            ns
        },
        || {
            // SAFETY: so does the plain mapping.
            let (now, ns) = unsafe { chase(raw.as_ptr(), theirs, steps) };
            theirs = now;
            ns
        },
    );
    assert_eq!(ours, theirs);
    Figure::new(
        "directcxl/3",
        "access to a namespace, beside a raw mmap of the same file",
        "ns",
    )
    .against("raw mmap", samples)
    .note("64 B pointer chase over 128 MiB of tmpfs")
    .emit()
    .unwrap();
}
