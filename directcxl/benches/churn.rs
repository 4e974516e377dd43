//! Figure 6: namespaces come and go in a pool that is 95% full, a million times.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{Interleaved, quantile, time};
use carlsbad_types::ByteSize;
use directcxl::{Contents, FormatOptions, MemfdHdm, NamespaceOptions, Pool};

/// Operations in a sample: a create or a remove each.
const BATCH: usize = 1000;

fn main() {
    let operations = if is_quick() { 4 * BATCH } else { 1_000_000 };
    let memory = MemfdHdm::new(ByteSize::gib(2)).unwrap();
    let pool = Pool::format(memory, FormatOptions::default()).unwrap();
    let before = pool.info().unwrap();
    let options = NamespaceOptions {
        contents: Contents::Kept,
        ..NamespaceOptions::default()
    };
    let size = ByteSize::mib(2);
    let create = |name: &str| drop(pool.create(name, size, options).unwrap());
    let count = before.free.get() / size.get() * 95 / 100;
    let mut names: Vec<String> = (0..count).map(|i| format!("n{i}")).collect();
    names.iter().for_each(|name| create(name));
    let mut rng = carlsbad_kit::seed::Rng::with_seed(1);
    let (mut batches, mut worst) = (Vec::new(), Vec::new());
    for batch in 0..operations / BATCH {
        let mut longest = 0f64;
        let (elapsed, ()) = time(|| {
            for i in 0..BATCH / 2 {
                let victim = rng.usize(..names.len());
                let (one, ()) = time(|| {
                    pool.remove(&names[victim]).unwrap();
                    names[victim] = format!("b{batch}-{i}");
                    create(&names[victim]);
                });
                longest = longest.max(one.as_secs_f64() * 1e6);
            }
        });
        batches.push(elapsed.as_secs_f64() * 1e6 / BATCH as f64);
        worst.push(longest);
    }
    for name in &names {
        pool.remove(name).unwrap();
    }
    let after = pool.info().unwrap();
    let tenth = (batches.len() / 10).max(1);
    let samples = Interleaved {
        ours: batches[batches.len() - tenth..].to_vec(),
        rival: batches[..tenth].to_vec(),
    };
    Figure::new(
        "directcxl/6",
        "create + remove at 95% full, 1 M operations: the last tenth beside the first",
        "us",
    )
    .against("the first tenth", samples)
    .note(format!(
        "{count} namespaces of 2 MiB, random victims; mean of {BATCH} operations a sample; the \
         longest pair of a sample takes {:.0} us (median), {:.0} us (99%)",
        quantile(&worst, 0.5),
        quantile(&worst, 0.99)
    ))
    .emit()
    .unwrap();
    let leaked = before.free.get() - after.free.get();
    Figure::new("directcxl/6b", "bytes that the churn leaked", "B")
        .samples([leaked as f64])
        .emit()
        .unwrap();
}
