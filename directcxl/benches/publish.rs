//! Figure 5: a namespace with content that a crash of its process does not undo, beside a file with
//! the same content that a power failure does not undo either.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

use std::fs::File;
use std::io::Write;

use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{interleave, time};
use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use directcxl::backend::Coherence;
use directcxl::{FileHdm, FormatOptions, NamespaceOptions, Pool};

/// What is written and published.
const CONTENT: usize = 4096;

fn main() {
    let (dir, disk) = (scratch::on_tmpfs().unwrap(), scratch::on_disk().unwrap());
    // Software coherence, so that `publish` does write lines back.
    let file = FileHdm::create(dir.path().join("pool"), ByteSize::mib(64))
        .unwrap()
        .coherence(Coherence::Software);
    let pool = Pool::format(file, FormatOptions::default()).unwrap();
    let content = vec![7u8; CONTENT];
    let (mut n, mut m) = (0u64, 0u64);
    let (warm_up, rounds) = if is_quick() { (0, 1) } else { (5, 101) };
    let samples = interleave(
        warm_up,
        rounds,
        || {
            n += 1;
            let name = format!("n{n}");
            let (elapsed, made) = time(|| {
                let made = pool
                    .create(&name, ByteSize::mib(2), NamespaceOptions::default())
                    .unwrap();
                made.write(0, &content).unwrap();
                made.publish(0..CONTENT as u64).unwrap();
                made
            });
            drop(made);
            pool.remove(&name).unwrap();
            elapsed.as_secs_f64() * 1e6
        },
        || {
            m += 1;
            let path = disk.path().join(format!("n{m}"));
            let (elapsed, made) = time(|| {
                let mut made = File::create_new(&path).unwrap();
                made.write_all(&content).unwrap();
                made.sync_all().unwrap();
                // The name is durable when its folder is.
                File::open(disk.path()).unwrap().sync_all().unwrap();
                made
            });
            drop(made);
            std::fs::remove_file(&path).unwrap();
            elapsed.as_secs_f64() * 1e6
        },
    );
    Figure::new(
        "directcxl/5",
        "create + publish, beside create + fsync on a disk's file system",
        "us",
    )
    .against("create + fsync (file and folder)", samples)
    .note(
        "4 KiB of content. Ours, on tmpfs with software coherence, is durable against the death \
             of every process and visible to other hosts, as on volatile CXL memory; the file \
             against power failure as well",
    )
    .emit()
    .unwrap();
}
