//! Figure 4: attaching a large namespace with every page mapped, on huge pages and on small ones.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

use carlsbad_kit::capability::Capability;
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{interleave, time};
use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use directcxl::{Contents, FileHdm, FormatOptions, NamespaceOptions, Pool};

fn main() {
    let what = "attach of 512 MiB with every page mapped: huge pages beside 4 KiB pages";
    let figure = Figure::new("directcxl/4", what, "ms");
    if !Capability::HugeTlb.is_present() {
        figure.without(Capability::HugeTlb).emit().unwrap();
        return;
    }
    let length: u64 = if is_quick() { 8 << 20 } else { 512 << 20 };
    let whole = ByteSize::new(length + (8 << 20));
    let (huge, small) = (
        scratch::on_hugetlbfs(whole.get()).unwrap(),
        scratch::on_tmpfs().unwrap(),
    );
    let pool = |dir: &std::path::Path| {
        let file = FileHdm::create(dir.join("pool"), whole).unwrap();
        let pool = Pool::format(file, FormatOptions::default()).unwrap();
        let options = NamespaceOptions {
            contents: Contents::Kept,
            populate: true,
        };
        // Every page is there, so that neither side has to find memory.
        drop(pool.create("a", ByteSize::new(length), options).unwrap());
        pool
    };
    let (huge_pool, small_pool) = (pool(huge.path()), pool(small.path()));
    let (warm_up, rounds) = if is_quick() { (0, 1) } else { (2, 21) };
    let attach = |pool: &Pool| {
        let (elapsed, attached) = time(|| pool.attach_populated("a").unwrap());
        drop(attached);
        elapsed.as_secs_f64() * 1e3
    };
    let samples = interleave(
        warm_up,
        rounds,
        || attach(&huge_pool),
        || attach(&small_pool),
    );
    figure
        .against("4 KiB pages of tmpfs", samples)
        .note("lease, look-up and mapping; every page of both is in memory before")
        .emit()
        .unwrap();
}
